"""A model of the GPU kernels' speed, for want of a GPU: bytes and operations, occupancy, the slowest part decides.

    python -m robust_node_fast.bench.model [--output bench/results/gpu_model.csv]

Everything it prints is predicted, nothing measured. What goes in:

- the cards' data sheets (``CARDS``);
- bytes that each kernel moves, in units of one state ``S = B C H W`` numbers (``PASSES``): for unfused PyTorch counted
  operation by operation (``tests/test_model.py`` counts again on the real thing), for ours what the kernels read and
  write;
- registers and shared memory of every configuration (``bench/results/triton_resources.csv``), from which follow the
  blocks that a multiprocessor holds, and with them how evenly the last wave of blocks fills the card;
- three assumptions: a stream reaches ``STREAM`` of the data sheet's bandwidth; reading again from the L2 cache (each
  tap of the filter reads its pixels again, each block the filters) ``CACHE`` of its peak; and products, on tensor cores
  or not, ``PRODUCT`` of their peak on a multiprocessor that is at work.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from .resources import RESULTS as RESOURCES
from .resources import Resources, read

RESULTS = RESOURCES.with_name("gpu_model.csv")
STREAM = 0.85
CACHE = 0.65
PRODUCT = 0.65
LAUNCH = 2.5e-6  # seconds between two kernels of a stream


@dataclass(frozen=True)
class Card:
    """Peaks of the data sheet, dense, in operations and bytes a second; sizes in bytes."""

    name: str
    target: str  # of the compiler
    multiprocessors: int
    half: float  # bfloat16 and float16 on tensor cores
    tf32: float
    bandwidth: float
    l2_bandwidth: float  # 64 bytes a cycle for each multiprocessor; MI300X: the Infinity Cache's
    l2: int
    shared: int  # of a multiprocessor
    registers: int = 65536
    threads: int = 2048
    clock: float = 1.7e9
    warp: int = 32


CARDS = (
    Card("A100 80GB SXM", "sm_80", 108, 312e12, 156e12, 2.04e12, 9.7e12, 40 << 20, 164 << 10, clock=1.41e9),
    Card("H100 SXM", "sm_90", 132, 989e12, 494e12, 3.35e12, 15.5e12, 50 << 20, 228 << 10, clock=1.83e9),
    Card("H200 SXM", "sm_90", 132, 989e12, 494e12, 4.8e12, 15.5e12, 50 << 20, 228 << 10, clock=1.83e9),
    Card(
        "MI300X",
        "gfx942",
        304,
        1307e12,
        654e12,
        5.3e12,
        17e12,
        256 << 20,
        64 << 10,
        131072,
        clock=2.1e9,
        warp=64,
    ),
)


@dataclass(frozen=True)
class Shape:
    name: str
    channels: int
    size: int
    n_steps: int

    def state(self, batch: int) -> int:
        return batch * self.channels * self.size**2

    def operations(self, batch: int) -> float:
        """Of one convolution of one step."""
        return 18.0 * self.channels * self.state(batch)


SHAPES = (Shape("MNIST", 8, 28, 10), Shape("C32", 32, 32, 10), Shape("CIFAR", 128, 32, 16))
BATCHES = (128, 256, 512, 1024, 2048, 4096)
DTYPES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Kernel:
    """One launch of a step: states that it reads and writes, convolutions that it computes, which of ours it is."""

    states: float
    convolutions: int = 0
    ours: str = ""


# What a step launches. Eager PyTorch, forward: convolution (read, write), three products and softplus (two each), two
# sums (three each). The compiler makes one kernel of what is between two convolutions.
CONVOLUTION = Kernel(2, 1)
PASSES: dict[str, dict[str, tuple[Kernel, ...]]] = {
    "forward": {
        "eager": (CONVOLUTION, *(Kernel(2),) * 4, *(Kernel(3),) * 2),
        "compile": (CONVOLUTION, Kernel(3)),
        "ours": (Kernel(2, 1, "euler_step"),),
    },
    "training": {
        # Forward, then: three products (two each), softplus (three), sum of the two ways to u (three), the gradients of
        # the convolution and its bias, sum with the gradient that went past the step (three).
        "eager": (
            *(CONVOLUTION, *(Kernel(2),) * 4, *(Kernel(3),) * 2),
            *(*(Kernel(2),) * 3, Kernel(3), Kernel(3), CONVOLUTION, CONVOLUTION, Kernel(1), Kernel(3)),
        ),
        "compile": (CONVOLUTION, Kernel(3), Kernel(5), CONVOLUTION, CONVOLUTION, Kernel(1)),
        # The forward pass again with slopes, then gradient_step (v, gradient and slopes in; gradient and v out) and the
        # weight's gradient. recompute=False saves the second pass and writes the first one's slopes.
        "ours": (
            Kernel(2, 1, "euler_step"),
            Kernel(3, 1, "euler_step"),
            Kernel(5, 1, "gradient_step"),
            Kernel(2, 1, "weight_gradient"),
        ),
        "ours, recompute=False": (
            Kernel(3, 1, "euler_step"),
            Kernel(5, 1, "gradient_step"),
            Kernel(2, 1, "weight_gradient"),
        ),
    },
}


@dataclass(frozen=True)
class Prediction:
    """A row of the table."""

    card: str
    shape: str
    batch: int
    dtype: str
    mode: str
    provider: str
    ms: float
    bound: str  # what takes the most time: memory, L2, products, launches
    roofline_fraction: float  # least time the operations or compulsory bytes allow, over the predicted
    eager_over_this: float
    compile_over_this: float


def peak(card: Card, dtype: str) -> float:
    return card.half if dtype == "bfloat16" else card.tf32


def blocks_at_once(card: Card, row: Resources) -> int:
    """Blocks that a multiprocessor holds."""
    warps = int(row.configuration.split(" w")[1].split()[0])
    threads = warps * card.warp
    by_registers = card.registers // (max(row.registers, 32) * threads)
    by_shared = card.shared // (row.shared_bytes + 1024) if row.shared_bytes else by_registers
    return max(1, min(by_registers, by_shared, card.threads // threads, 32))


def product_kernel(
    card: Card, shape: Shape, batch: int, itemsize: int, kernel: Kernel, row: Resources
) -> dict[str, float]:
    """Seconds that each part of the card needs for one launch of one of our Triton kernels."""
    m, n, k = (int(size) for size in row.configuration.split()[0].split("x"))
    pixels, channels = batch * shape.size**2, shape.channels
    if kernel.ours == "weight_gradient":  # 9 C x C, the pixels split
        tiles = 9 * math.ceil(channels / m) * math.ceil(channels / n)
        tiles *= min(64, math.ceil(pixels / 2048))
        covered = 9.0 * math.ceil(channels / m) * m * math.ceil(channels / n) * n * pixels
        reread = itemsize * 9.0 * pixels * channels * (math.ceil(channels / m) + math.ceil(channels / n))
    else:
        tiles = math.ceil(pixels / m) * math.ceil(channels / n)
        covered = 9.0 * math.ceil(pixels / m) * m * math.ceil(channels / n) * n * math.ceil(channels / k) * k
        reread = itemsize * 9.0 * channels * (pixels * math.ceil(channels / n) + math.ceil(pixels / m) * channels)
    places = card.multiprocessors * blocks_at_once(card, row)
    waves = tiles / places
    even = waves / math.ceil(waves) if waves > 1 else min(1.0, tiles / card.multiprocessors)
    dtype = "bfloat16" if itemsize == 2 else "float32"
    return {
        "memory": itemsize * kernel.states * shape.state(batch) / (STREAM * card.bandwidth),
        "L2": reread / (CACHE * card.l2_bandwidth),
        "products": 2.0 * covered / (PRODUCT * peak(card, dtype) * even),
        "launches": LAUNCH,
    }


def plain_kernel(card: Card, shape: Shape, batch: int, itemsize: int, kernel: Kernel) -> dict[str, float]:
    """The same of one of PyTorch's: its convolutions are taken to have blocks of 128 x 128 that fill any card."""
    dtype = "bfloat16" if itemsize == 2 else "float32"
    pixels, channels = batch * shape.size**2, shape.channels
    reread = itemsize * 9.0 * channels * (pixels * math.ceil(channels / 128) + math.ceil(pixels / 128) * channels)
    return {
        "L2": kernel.convolutions * reread / (CACHE * card.l2_bandwidth),
        "memory": itemsize * kernel.states * shape.state(batch) / (STREAM * card.bandwidth),
        "products": kernel.convolutions * shape.operations(batch) / (PRODUCT * peak(card, dtype)),
        "launches": LAUNCH,
    }


def flow_time(
    card: Card, shape: Shape, batch: int, dtype: str, kernels: tuple[Kernel, ...], table: list[Resources]
) -> tuple[float, str]:
    """Seconds of all steps, and what takes most of them."""
    itemsize = DTYPES[dtype]
    total, parts = 0.0, dict.fromkeys(("memory", "L2", "products", "launches"), 0.0)
    channels = "any" if shape.channels % 16 else "multiple of 16"
    wanted = (card.target, channels, *(("bf16", "ieee") if dtype == "bfloat16" else ("fp32", "tf32")))
    for kernel in kernels:
        if kernel.ours:
            costs = [
                product_kernel(card, shape, batch, itemsize, kernel, row)
                for row in table
                if row.kernel == kernel.ours and (row.target, row.channels, row.dtype, row.precision) == wanted
            ]
            cost = min(costs, key=lambda each: max(each.values()))  # what autotuning would pick
        else:
            cost = plain_kernel(card, shape, batch, itemsize, kernel)
        slowest = max(cost, key=lambda name: cost[name])
        parts[slowest] += cost[slowest]
        total += cost[slowest]
    return shape.n_steps * total, max(parts, key=lambda name: parts[name])


# ---------------------------------------------------------------------------------------------------------------------
# All steps in shared memory (csrc/cuda): float32, few channels
# ---------------------------------------------------------------------------------------------------------------------


def in_shared_memory(card: Card, shape: Shape, batch: int, mode: str) -> tuple[float, str] | None:
    """Seconds of the whole flow in one launch each way, or ``None`` where a sample does not fit a block.

    A thread computes four pixels of eight channels (csrc/cuda/geometry.h has the same arithmetic), a multiprocessor 128
    products a cycle. Per channel and column of the filter a warp makes 96 products and asks shared memory 12 times,
    which takes half as long: products bound it. The backward pass keeps states and slopes of the samples at work in
    memory that stays in the L2 cache if it fits.
    """
    c, strips, groups = shape.channels, math.ceil(shape.size / 4), math.ceil(shape.channels / 8)
    state = c * ((strips * 4 + 2) * (shape.size + 2) | 1)
    taken = 4 * (72 * groups * c + 2 * state)
    if c > 32 or card.target.startswith("gfx") or taken > card.shared - 1024:
        return None
    items = groups * strips * shape.size
    passes = math.ceil(items / 512)
    threads = max(128, math.ceil(math.ceil(items / passes) / 32) * 32)
    resident = min(card.shared // (taken + 1024), card.threads // threads)
    convolutions, numbers = {"forward": (1, 2), "training": (4, 5)}[mode]
    cycles = shape.n_steps * convolutions * passes * threads * 288 * c / 128
    waves = math.ceil(batch / (card.multiprocessors * resident))
    # States and slopes written and read, by the samples at work.
    kept = 0 if mode == "forward" else 4 * 2 * shape.n_steps * shape.state(1)
    in_l2 = kept * min(batch, card.multiprocessors * resident) <= card.l2
    cost = {
        "memory": (4 * numbers * shape.state(batch) + (0 if in_l2 else 2 * kept * batch)) / (STREAM * card.bandwidth),
        "L2": 2 * kept * batch / (CACHE * card.l2_bandwidth),
        "products": waves * resident * cycles / (PRODUCT * card.clock),
        "launches": LAUNCH * (1 if mode == "forward" else 3),
    }
    slowest = max(cost, key=lambda name: cost[name])
    return cost[slowest], slowest


def predictions(table: list[Resources]) -> Iterator[Prediction]:
    for card in CARDS:
        for shape in SHAPES:
            for batch in BATCHES:
                for dtype, itemsize in DTYPES.items():
                    for mode, providers in PASSES.items():
                        found = {p: flow_time(card, shape, batch, dtype, k, table) for p, k in providers.items()}
                        whole = in_shared_memory(card, shape, batch, mode) if dtype == "float32" else None
                        if whole is not None:
                            found["ours, all steps in shared memory"] = whole
                        convolutions = 1 if mode == "forward" else 3
                        least = max(
                            convolutions * shape.n_steps * shape.operations(batch) / peak(card, dtype),
                            itemsize * (2 if mode == "forward" else 3) * shape.state(batch) / card.bandwidth,
                        )
                        for provider, (seconds, bound) in found.items():
                            yield Prediction(
                                card.name,
                                shape.name,
                                batch,
                                dtype,
                                mode,
                                provider,
                                round(seconds * 1e3, 4),
                                bound,
                                round(least / seconds, 3),
                                round(found["eager"][0] / seconds, 2),
                                round(found["compile"][0] / seconds, 2),
                            )


def main(
    output: Annotated[Path, typer.Option(help="CSV to write.")] = RESULTS,
    batch: Annotated[int, typer.Option(help="Batch of the table that is printed.")] = 1024,
) -> None:
    rows = list(predictions(read(RESOURCES)))
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Prediction)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"A model, not a measurement. Batch {batch}.\n")
    print("| card | flow | dtype | mode | ours | ms | bound | of the roofline | eager / ours | compile / ours |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        if row.batch == batch and row.provider.startswith("ours"):
            which = row.provider.removeprefix("ours").lstrip(", ") or "a kernel a step"
            print(
                f"| {row.card} | {row.shape} | {row.dtype} | {row.mode} | {which} "
                f"| {row.ms:.3g} | {row.bound} | {row.roofline_fraction:.0%} | {row.eager_over_this:.1f} "
                f"| {row.compile_over_this:.1f} |"
            )


if __name__ == "__main__":
    typer.run(main)
