"""Block sizes that each kernel may run with; ``bench/resources.py`` compiles every one for every target.

Listed are those without spilled registers whose shared memory fits the smallest target (docs/gpu.md has the table).
"""

from __future__ import annotations

from typing import Any

import triton
from triton import Config, knobs

from robust_node_fast.kernels import euler_conv

# Rows x columns x depth of a block, warps, stages of the pipeline.
_STEP = (
    (128, 128, 32, 8, 3),
    (128, 64, 32, 8, 3),
    (64, 64, 32, 4, 3),
    (128, 32, 32, 4, 3),
    (64, 16, 16, 4, 2),
)
_WEIGHT = ((64, 64, 32, 4, 3), (32, 32, 64, 4, 3), (16, 16, 64, 4, 2))


def _configs(blocks: tuple[tuple[int, int, int, int, int], ...], **constants: int) -> list[Config]:
    return [
        Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, **constants}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in blocks
    ]


STEP = _configs(_STEP, GROUP=8)
WEIGHT = _configs(_WEIGHT)
KEY = ["C", "KERNEL", "PRECISION"]

euler_step = triton.autotune(STEP, key=KEY)(euler_conv.euler_step)
gradient_step = triton.autotune(STEP, key=KEY)(euler_conv.gradient_step)
# Atomic additions would add up over the runs of the tuner.
weight_gradient = triton.autotune(WEIGHT, key=KEY, reset_to_zero=["grad_weight", "grad_bias"])(
    euler_conv.weight_gradient
)


def launch(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
    """Run with the best configuration; Triton's interpreter, which cannot tune, takes the last, smallest one."""
    if knobs.runtime.interpret:
        config = kernel.configs[-1]
        meta = {**config.kwargs, **constants}
        kernel.fn[grid(meta)](*args, **meta)
    else:
        kernel[grid](*args, **constants)
