"""What certificates cost, in forward passes of the same network; with --run, how much they certify. Writes a CSV.

    RNF_DATA_ROOT=... python bench/certify.py [--threads 1] [--samples 10000] [--output bench/results/certify.csv]
    RNF_DATA_ROOT=... python bench/certify.py --run RUN [--run ...] [--output bench/results/certificates.csv]

Cost: the network of the papers (8 channels, 10 Euler steps) and that of the recipe ``certified``, on the first MNIST
test images, in time of the processor: other work on the machine makes this process wait, which does not count. Forward
passes and certificates take turns, so that drift of the machine hits all alike. Each takes the size of batch that is
best for it. Time does not depend on the weights: those are the initial ones.

Strength: trained networks (run folders), on their first test images: what bound E certifies at one eps, what the
global Lipschitz constants do, and the median radius of each, 0 where an image is classified wrongly.
"""

from __future__ import annotations

import csv
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import robust_node_fast as rnf
from robust_node_fast import training
from robust_node_fast._machine import processor

EPS, BATCHES = 0.1, (64, 128, 256, 512)
RESULTS = Path("bench/results")
ABOUT = ("machine", "threads", "torch", "version", "time")


def main(
    threads: Annotated[int, typer.Option(help="torch.set_num_threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 9,
    run: Annotated[list[Path] | None, typer.Option(help="Run folder: measure strength instead of cost.")] = None,
    samples: Annotated[int, typer.Option(help="First test images.")] = 1000,
    output: Annotated[Path | None, typer.Option(help="CSV to write.", show_default="one in bench/results")] = None,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if run:
        path, rows = output or RESULTS / "certificates.csv", [row for each in run for row in strengths(each, samples)]
    else:
        dataset = rnf.data.load("mnist")
        first = dataset.test_images[:samples], dataset.test_labels[:samples]
        models = (rnf.models.MNISTNode().eval(), rnf.models.StridedNode().eval())
        path, rows = (
            output or RESULTS / "certify.csv",
            [row for model in models for row in costs(model, *first, rounds)],
        )
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = dict(zip(ABOUT, (processor(), threads, torch.__version__, rnf.__version__, now), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *ABOUT])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


def costs(model: nn.Module, images: Tensor, labels: Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for the forward pass, one for bound E at one eps, and one for each norm's radii by Lipschitz constants."""

    def forward(size: int) -> None:
        with torch.inference_mode():
            for batch in torch.split(images, size):
                model(batch)

    works: dict[str, Callable[[int], object]] = {
        "forward": forward,
        "certificate": lambda size: rnf.certify.linf_certified(model, images, labels, EPS, batch_size=size),
        "constants, l_inf": lambda size: rnf.certify.lipschitz_radius(model, images, labels, p="inf", batch_size=size),
        "constants, l_2": lambda size: rnf.certify.l2_radius(model, images, labels, batch_size=size),
    }

    def seconds(name: str, size: int) -> float:
        begin = time.process_time()
        works[name](size)
        return time.process_time() - begin

    best = {name: min(BATCHES, key=lambda size: min(seconds(name, size) for _ in range(2))) for name in works}
    turns = [{name: seconds(name, best[name]) for name in works} for _ in range(rounds)]
    for name in works:
        p50 = median([turn[name] for turn in turns])
        forwards = median([turn[name] / turn["forward"] for turn in turns])
        network = type(model).__name__
        print(f"{network}, {name}: {p50:.3f} s, batches of {best[name]}; {forwards:.2f} forward passes", flush=True)
        yield {
            "network": network,
            "work": name,
            "p50_cpu_s": round(p50, 3),
            "forwards": round(forwards, 2),
            "batch": best[name],
            "images": len(labels),
            "rounds": rounds,
        }


def strengths(run: Path, samples: int) -> Iterator[dict[str, Any]]:
    """A row for every bound."""
    model, config = training.load_model(run)
    dataset = rnf.data.load(config.dataset)
    images, labels = dataset.test_images[:samples], dataset.test_labels[:samples]
    with torch.inference_mode():
        clean = float((model(images).argmax(1) == labels).double().mean())
    radii = {
        ("bound E", "inf"): rnf.certify.linf_radius(model, images, labels),
        ("constants", "inf"): rnf.certify.lipschitz_radius(model, images, labels, p="inf"),
        ("constants", "2"): rnf.certify.l2_radius(model, images, labels),
    }
    for (bound, norm), radius in radii.items():
        # A radius of bound E is found by bisection, up to a tolerance: at one eps it can be asked.
        held = rnf.certify.linf_certified(model, images, labels, EPS) if bound == "bound E" else radius >= EPS
        row = {
            "network": run.name,
            "bound": bound,
            "norm": norm,
            "clean": round(clean, 4),
            "eps": EPS,
            "certified": round(float(held.double().mean()), 4),
            "median_radius": f"{float(radius.median()):.3g}",
            "images": len(labels),
        }
        print(row, flush=True)
        yield row


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    typer.run(main)
