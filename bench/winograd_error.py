"""Rounding errors of Winograd's algorithm by tile size and evaluation points, as multiples of PyTorch's own in float32.

``python bench/winograd_error.py`` writes ``bench/results/winograd_error.csv``. Why the kernels use F(4x4, 3x3).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_node_fast import reference

P = math.sqrt(0.5)
POINTS: dict[str, tuple[int, list[float]]] = {  # size of a tile, evaluation points beside infinity
    "F(4x4) 0 1/sqrt2 sqrt2": (4, [0, P, -P, 1 / P, -1 / P]),
    "F(4x4) 0 1 2": (4, [0, 1, -1, 2, -2]),
    "F(6x6) 0 1 2 1/2": (6, [0, 1, -1, 2, -2, 0.5, -0.5]),
    "F(6x6) 0 1 3/5 5/3": (6, [0, 1, -1, 0.6, -0.6, 5 / 3, -5 / 3]),
    "F(6x6) 0 1 1/sqrt2 sqrt2": (6, [0, P, -P, 1, -1, 1 / P, -1 / P]),
}
CHANNELS, STEPS, STEP_SIZE, SIZE = 64, 16, 0.1, 24
Conv = Callable[[Tensor, Tensor], Tensor]


def transforms(tile: int, points: list[float]) -> list[Tensor]:
    """A', G and B' of F(tile, 3), exact but for rounding to float64; rows of B' have a largest entry of one."""
    a = torch.tensor(points, dtype=torch.float64)

    def powers(count: int) -> Tensor:
        infinity = torch.eye(count, dtype=torch.float64)[-1:]
        return torch.cat([torch.stack([a**j for j in range(count)], 1), infinity])

    inputs = torch.linalg.inv(powers(tile + 2)).T
    scale = inputs.abs().amax(1, keepdim=True)
    return [powers(tile).T, powers(3) * scale, inputs / scale]


def winograd(tile: int, points: list[float]) -> Conv:
    def conv(input: Tensor, weight: Tensor) -> Tensor:
        output, taps, window = (t.to(input.dtype) for t in transforms(tile, points))
        channels, height, width = input.shape[1:]
        down, right = -(-height // tile), -(-width // tile)
        padded = F.pad(input, (1, 1 + right * tile - width, 1, 1 + down * tile - height))
        tiles = padded.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)
        values = torch.einsum("ij,bcyxjk,lk->ilbyxc", window, tiles, window).reshape((tile + 2) ** 2, -1, channels)
        filters = torch.einsum("ij,ocjk,lk->ilco", taps, weight, taps).reshape((tile + 2) ** 2, channels, -1)
        products = torch.bmm(values, filters).reshape(tile + 2, tile + 2, len(input), down, right, -1)
        sums = torch.einsum("im,mnbyxo,jn->boyixj", output, products, output)
        return sums.reshape(len(input), -1, down * tile, right * tile)[:, :, :height, :width]

    return conv


def direct(input: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(input, weight, padding=1)


def flow(input: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    for bank in weight:
        input = input + STEP_SIZE * reference.smooth_leaky_relu(conv(input, bank))
    return input


def main() -> None:
    torch.manual_seed(0)
    input = torch.randn(1, CHANNELS, SIZE, SIZE)
    weight = torch.randn(STEPS, CHANNELS, CHANNELS, 3, 3) / math.sqrt(9 * CHANNELS)

    def errors(conv: Conv) -> list[float]:
        """Largest and root mean square, of one convolution and of the flow."""
        found = [conv(input, weight[0]), flow(input, weight, conv)]
        exact = [direct(input.double(), weight[0].double()), flow(input.double(), weight.double(), direct)]
        differences = [(a - b).abs() for a, b in zip(found, exact, strict=True)]
        return [value.item() for d in differences for value in (d.max(), d.square().mean().sqrt())]

    plain = errors(direct)
    with (Path(__file__).parent / "results" / "winograd_error.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algorithm", "convolution_max", "convolution_rms", "flow_max", "flow_rms", "torch"])
        for name, (tile, points) in POINTS.items():
            ratios = [f"{a / b:.2f}" for a, b in zip(errors(winograd(tile, points)), plain, strict=True)]
            writer.writerow([name, *ratios, torch.__version__])
            print(name, *ratios)


if __name__ == "__main__":
    main()
