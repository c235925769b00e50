"""Times certifying the MNIST test images at one eps against the network's plain forward pass, and writes a CSV.

    RNF_DATA_ROOT=... python bench/certify.py [--threads 2] [--output bench/results/certify.csv]

The network of the papers (8 channels, 10 Euler steps), 10,000 images; forward passes and certificates take turns, so
that drift of the machine hits both alike. Each takes the size of batch that is best for it. Time does not depend on
the weights: those are the initial ones, and nobody should read the certified fraction as a result.
"""

from __future__ import annotations

import csv
import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

import robust_node_fast as rnf
from robust_node_fast._machine import processor

EPS, BATCHES = 0.1, (64, 128, 256, 512)


def main(
    threads: Annotated[int, typer.Option(help="torch.set_num_threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 9,
    output: Annotated[Path, typer.Option(help="CSV to write.")] = Path("bench/results/certify.csv"),
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dataset = rnf.data.load("mnist")
    images, labels = dataset.test_images, dataset.test_labels
    model = rnf.models.MNISTNode().eval()

    def forward(size: int) -> None:
        with torch.inference_mode():
            for batch in images.split(size):
                model(batch)

    def certificate(size: int) -> None:
        rnf.certify.linf_certified(model, images, labels, EPS, batch_size=size)

    def seconds(work: Callable[[int], None], size: int) -> float:
        begin = time.perf_counter()
        work(size)
        return time.perf_counter() - begin

    works: dict[str, Callable[[int], None]] = {"forward": forward, "certificate": certificate}
    best = {
        name: min(BATCHES, key=lambda size: min(seconds(work, size) for _ in range(2))) for name, work in works.items()
    }
    turns = [{name: seconds(work, best[name]) for name, work in works.items()} for _ in range(rounds)]
    medians = {name: sorted(turn[name] for turn in turns)[rounds // 2] for name in works}
    ratio = sorted(turn["certificate"] / turn["forward"] for turn in turns)[rounds // 2]
    for name in works:
        print(f"{name}: {medians[name]:.2f} s, batches of {best[name]}")
    print(f"one certificate costs {ratio:.2f} forward passes (median of {rounds} turns)")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["work", "p50_s", "forwards", "batch", "images", "rounds", "machine", "threads", "torch", "version", "time"]
        )
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        about = [len(images), rounds, processor(), threads, torch.__version__, rnf.__version__, now]
        for name, forwards in (("forward", 1.0), ("certificate", round(ratio, 2))):
            writer.writerow([name, round(medians[name], 3), forwards, best[name], *about])


if __name__ == "__main__":
    typer.run(main)
