"""What float32 really loses in bound E's activation, over every float32 number from -120 to 120. Writes a CSV.

    python bench/interval_rounding.py [--every 1] [--output bench/results/interval_rounding.csv]

csrc/cpu/interval.inc adds its own rounding errors to the radius, those of the activation by two constants that were
measured (kValue, kSlope). Here a flow is that activation alone, one Euler step with a filter of 1, against the same in
float64: without a radius, where the whole bound is what rounding is said to cost, and with radii that are drawn anew
for each number. ``worst`` is the largest share of the bound that is used up, above 1 it would not hold.
"""

from __future__ import annotations

import csv
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import robust_node_fast as rnf
from robust_node_fast import reference
from robust_node_fast._machine import processor
from robust_node_fast.functional import euler_conv_flow_bound

LARGEST = 120.0  # beyond, softplus is the identity or 0 in float32
CHUNK = 1 << 17
COLUMNS = ("negative_slope", "step_size", "radius", "numbers", "worst", "seconds", "machine", "torch", "version")


def main(
    every: Annotated[int, typer.Option(help="Only one number of so many.")] = 1,
    negative_slope: Annotated[float, typer.Option(help="Of the activation.")] = 0.1,
    step_size: Annotated[float, typer.Option(help="Of the Euler step.")] = 1.0,
    output: Annotated[Path, typer.Option(help="CSV to write.")] = Path("bench/results/interval_rounding.csv"),
) -> None:
    torch.manual_seed(0)
    rows = []
    for largest_radius in (0.0, 1.0):
        start, count, worst = time.perf_counter(), 0, 0.0
        for z in numbers(every):
            radius = largest_radius * torch.rand_like(z) ** 8  # down to tiny ones
            worst = max(worst, used(z, radius, step_size, negative_slope))
            count += z.numel()
        seconds = round(time.perf_counter() - start, 1)
        rows.append((negative_slope, step_size, largest_radius, count, worst, seconds))
        print(rows[-1], flush=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((*row, processor(), torch.__version__, rnf.__version__) for row in rows)


def numbers(every: int) -> Iterator[Tensor]:
    """All float32 numbers up to ``LARGEST`` in magnitude, or one of so many, both signs, as states ``(1, 1, 1, n)``."""
    (last,) = struct.unpack("<i", struct.pack("<f", LARGEST))
    for first in range(0, last + 1, CHUNK * every):
        bits = torch.arange(first, min(first + CHUNK * every, last + 1), every, dtype=torch.int32)
        positive = bits.view(torch.float32)
        yield torch.cat([positive, -positive]).view(1, 1, 1, -1)


def used(z: Tensor, radius: Tensor, step_size: float, negative_slope: float) -> float:
    one = torch.ones(1, 1, 1, 1, 1)
    centre, bound = euler_conv_flow_bound(z, radius, one, step_size=step_size, negative_slope=negative_slope)
    exact, exact_bound = reference.bound_e(
        z.double(), radius.double(), one.double(), None, step_size, negative_slope, 1
    )
    return float((((centre - exact).abs() + exact_bound) / bound.double()).max())


if __name__ == "__main__":
    typer.run(main)
