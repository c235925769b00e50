"""Times one epoch of contractive MNIST training, the package's network against plain PyTorch's, and writes a CSV.

    RNF_DATA_ROOT=... python bench/epoch.py [--threads 2] [--output bench/results/mnist_epoch.csv]

Both start from the same weights and see the same batches; they take turns every few steps, so that drift of the machine
hits both alike. A step is the paper's: forward, cross-entropy + penalty, backward, Adam.
"""

from __future__ import annotations

import csv
import datetime
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import robust_node_fast as rnf
from robust_node_fast._machine import machine

BATCH, LR, RATE, TURN = 128, 0.05, 2.0, 47


def plain_penalty(model: rnf.reference.MNISTNode) -> Tensor:
    filters = [model.get_parameter(f"conv{k}.weight") for k in range(1, model.n_steps + 1)]
    return rnf.reference.contraction_penalty(filters, rate=RATE)


def main(
    threads: Annotated[int, typer.Option(help="torch.set_num_threads.")] = 2,
    output: Annotated[Path, typer.Option(help="CSV to write.")] = Path("bench/results/mnist_epoch.csv"),
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dataset = rnf.data.load("mnist")
    batches = torch.split(torch.randperm(len(dataset.train_labels)), BATCH)
    fused = rnf.models.MNISTNode()
    fused.center_biases_()
    plain = rnf.reference.MNISTNode()
    plain.load_state_dict(fused.reference_state_dict())
    penalties: dict[str, Callable[[], Tensor]] = {
        "robust_node_fast": lambda: fused.contraction_penalty(rate=RATE),
        "plain PyTorch": lambda: plain_penalty(plain),
    }
    networks: dict[str, nn.Module] = {"robust_node_fast": fused, "plain PyTorch": plain}
    optimizers = {name: torch.optim.Adam(model.parameters(), LR) for name, model in networks.items()}
    seconds, losses = dict.fromkeys(networks, 0.0), dict.fromkeys(networks, 0.0)

    def step(name: str, index: Tensor) -> float:
        optimizers[name].zero_grad()
        loss = F.cross_entropy(networks[name](dataset.train_images[index]), dataset.train_labels[index])
        torch.autograd.backward(loss + penalties[name]())
        optimizers[name].step()
        return loss.item()

    # No time without the same result: the first batch, from the same weights.
    first = [
        F.cross_entropy(networks[name](dataset.train_images[batches[0]]), dataset.train_labels[batches[0]])
        for name in networks
    ]
    for ours, theirs in (tuple(first), tuple(penalty() for penalty in penalties.values())):
        if not float((ours - theirs).detach().abs()) <= 1e-4 * float(theirs.detach().abs()):
            raise SystemExit(f"the networks differ: {ours.item()}, {theirs.item()}")
    for start in range(0, len(batches), TURN):
        for name in networks:
            begin = time.perf_counter()
            for index in batches[start : start + TURN]:
                losses[name] = step(name, index)
            seconds[name] += time.perf_counter() - begin
    for name in networks:
        print(f"{name}: {seconds[name]:.1f} s, last loss {losses[name]:.4f}")
    if not all(math.isfinite(loss) for loss in losses.values()):
        raise SystemExit("a loss is not finite: nothing is written")
    print(f"ratio {seconds['plain PyTorch'] / seconds['robust_node_fast']:.2f}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["provider", "seconds_per_epoch", "steps", "machine", "threads", "torch", "version", "time"])
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        about = [len(batches), machine(), threads, torch.__version__, rnf.__version__, now]
        writer.writerows([name, round(seconds[name], 2), *about] for name in networks)


if __name__ == "__main__":
    typer.run(main)
