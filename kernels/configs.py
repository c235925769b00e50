"""Block sizes of the convolutions that the tuner may choose from; ``bench/resources.py`` compiles every one of them.

Listed are only those that spill no register and fit into the shared memory of every target: the committed table
``bench/results/triton_resources.csv`` shows it, ``tests/test_triton_resources.py`` checks it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from robust_node_fast.kernels import euler_conv


class Blocks(NamedTuple):
    """Of a matrix product: rows, columns and terms at a time, warps, stages of the pipeline that loads ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth} w{self.warps} s{self.stages}"


# Channels in multiples of it, side by side in memory, are read and written as vectors. All others take an address each:
# those need so many registers that large blocks would spill.
VECTOR = 16

_CONVOLUTION = {
    "16 bit": (
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 64, 64, 8, 3),
        Blocks(64, 128, 32, 8, 3),
        Blocks(64, 64, 32, 4, 3),
        Blocks(128, 32, 64, 4, 3),
        Blocks(128, 16, 16, 4, 3),
    ),
    "tf32": (
        Blocks(128, 64, 32, 8, 3),
        Blocks(64, 128, 32, 8, 3),
        Blocks(64, 64, 32, 4, 3),
        Blocks(128, 32, 32, 4, 3),
        Blocks(128, 16, 16, 4, 3),
    ),
    # Exact products of float32 run without tensor cores on NVIDIA and keep both factors in registers.
    "ieee": (
        Blocks(128, 64, 16, 8, 2),
        Blocks(64, 64, 16, 8, 2),
        Blocks(64, 32, 16, 4, 2),
        Blocks(64, 16, 16, 4, 2),
    ),
    "any channels": (
        Blocks(128, 32, 16, 8, 2),
        Blocks(64, 32, 16, 4, 2),
        Blocks(64, 16, 16, 4, 2),
    ),
}
# Rows and columns are input and output channels here; the sum runs over pixels.
_WEIGHT_GRADIENT = {
    "16 bit": (
        Blocks(64, 128, 32, 8, 3),
        Blocks(64, 64, 64, 8, 3),
        Blocks(32, 32, 64, 4, 3),
        Blocks(16, 16, 64, 4, 3),
    ),
    "tf32": (
        Blocks(128, 64, 16, 8, 3),  # with a depth of 32 it spilled on sm_100 where k = 1
        Blocks(64, 64, 32, 8, 3),
        Blocks(32, 32, 64, 4, 3),
        Blocks(16, 16, 64, 4, 3),
    ),
    "ieee": (
        Blocks(64, 64, 16, 8, 2),
        Blocks(32, 32, 32, 4, 2),
        Blocks(16, 16, 32, 4, 2),
    ),
    "any channels": (
        Blocks(64, 64, 32, 8, 2),
        Blocks(32, 32, 16, 8, 2),  # with 4 warps it spilled on sm_100 where k = 1
        Blocks(16, 16, 32, 4, 2),
    ),
}
BLOCKS: dict[str, dict[str, tuple[Blocks, ...]]] = {
    "euler_step": _CONVOLUTION,
    "gradient_step": _CONVOLUTION,
    "weight_gradient": _WEIGHT_GRADIENT,
}
ELEMENTS = 1024  # of a program of an element-wise kernel
PENALTY = {"BLOCK_D": 16, "BLOCK_E": 128}  # output channels, and filter taps of all input channels, at a time
INTERPRETED = Blocks(128, 64, 64, 4, 1)  # Triton's interpreter takes as long for a small block as for a large one


def constants(kernel: str, blocks: Blocks) -> dict[str, int]:
    """The kernel's compile-time arguments for these blocks."""
    sizes = {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns, "BLOCK_K": blocks.depth}
    return sizes if kernel == "weight_gradient" else {**sizes, "GROUP": 8}


def serving(kernel: str, products: str, channels: int) -> list[Blocks]:
    """Without blocks that would mostly hold channels that are not there."""
    widest = max(16, triton.next_power_of_2(channels))
    return [
        blocks
        for blocks in BLOCKS[kernel][products if channels % VECTOR == 0 else "any channels"]
        if blocks.columns <= widest and (kernel != "weight_gradient" or blocks.rows <= widest)
    ]


@cache
def tuned(
    kernel: str, products: str, channels: int, device: torch.device, *, with_bias: bool, deterministic: bool
) -> Any:
    """The kernel with the configurations for so many channels, of which the first call on a device takes the fastest.

    Deterministic: the first one, as timing is not, and another one adds in another order.

    The runs of the tuner would add up in an atomic weight gradient: what is there before is put back. Not by
    ``reset_to_zero``: shared filters' gradients may be tuned for in the middle of their sum. Only of tensors that are
    there: the tuner asks None for a copy. Not ``prune_configs_by``: under torch.compile it loses the former.
    """
    configurations = [
        triton.Config(constants(kernel, blocks), num_warps=blocks.warps, num_stages=blocks.stages)
        for blocks in serving(kernel, products, channels)[: 1 if deterministic else None]
    ]
    sums = ["grad_weight", *(["grad_bias"] if with_bias else [])] if kernel == "weight_gradient" else None
    return triton.autotune(configurations, key=["C", "KERNEL"], restore_value=sums)(getattr(euler_conv, kernel))
