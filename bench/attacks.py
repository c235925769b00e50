"""Times PGD-40 on the MNIST network, the package's against plain PyTorch's, and writes a CSV.

    RNF_DATA_ROOT=... python bench/attacks.py [--threads 2] [--output bench/results/mnist_pgd.csv]

Both have the same weights, contractive and trained for a few steps, and the same real test images; they take turns, so
that drift of the machine hits both alike. What is timed is ``rnf.robustness.pgd``: 40 forward passes, input gradients
and signed steps from a random start. First the two are compared: the logits on the images, one step of the attack.
"""

from __future__ import annotations

import csv
import datetime
import functools
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import robust_node_fast as rnf
from robust_node_fast import _timing
from robust_node_fast._machine import machine

BATCH, EPS, STEPS, TRAINING_STEPS, LR, RATE = 128, 0.1, 40, 150, 0.005, 2.0


def trained() -> tuple[rnf.models.MNISTNode, Tensor, Tensor]:
    """The contractive network after a few steps of training, and the first test images."""
    dataset = rnf.data.load("mnist")
    model = rnf.models.MNISTNode()
    model.center_biases_()
    rnf.nn.contractive_init_(model.flow, RATE)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    for index in torch.split(torch.randperm(len(dataset.train_labels))[: TRAINING_STEPS * BATCH], BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(dataset.train_images[index]), dataset.train_labels[index])
        torch.autograd.backward(loss + model.contraction_penalty(rate=RATE))
        optimizer.step()
    return model.eval(), dataset.test_images[:BATCH], dataset.test_labels[:BATCH]


def main(
    threads: Annotated[int, typer.Option(help="torch.set_num_threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Turns of each; the least time counts.")] = 8,
    output: Annotated[Path, typer.Option(help="CSV to write.")] = Path("bench/results/mnist_pgd.csv"),
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    fused, images, labels = trained()
    plain = rnf.reference.MNISTNode().eval()
    plain.load_state_dict(fused.reference_state_dict())
    saving = rnf.models.MNISTNode().eval()
    saving.load_state_dict(fused.state_dict())
    saving.flow.recompute = False
    networks: dict[str, nn.Module] = {
        "robust_node_fast": fused,
        "robust_node_fast, recompute=False": saving,
        "plain PyTorch": plain,
    }

    def attack(model: nn.Module, n_steps: int = STEPS) -> Tensor:
        options = {"step_size": 2.5 * EPS / STEPS, "n_steps": n_steps}
        generator = torch.Generator().manual_seed(0)
        return rnf.robustness.pgd(model, images, labels, EPS, generator=generator, **options)

    clean: dict[str, float] = {}
    attacked: dict[str, float] = {}
    with torch.no_grad():
        for model in networks.values():
            torch.testing.assert_close(model(images), plain(images), atol=1e-4, rtol=1e-4)
    for name, model in networks.items():
        same = (attack(model, 1) == attack(plain, 1)).double().mean().item()  # only gradients around 0 differ in sign
        if same < 0.99:
            raise SystemExit(f"nothing is reported: one step of {name} differs in {1 - same:.1%} of the pixels")
        with torch.no_grad():
            for found, shown in ((clean, images), (attacked, attack(model))):
                found[name] = (model(shown).argmax(1) == labels).double().mean().item()
    tasks = {name: functools.partial(attack, model) for name, model in networks.items()}
    seconds = _timing.interleaved(tasks, rounds)

    names = [
        "provider",
        "seconds",
        "plain_over_this",
        "clean_accuracy",
        "attacked_accuracy",
        "batch",
        "steps",
        "eps",
        "rounds",
    ]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = [BATCH, STEPS, EPS, rounds, machine(), threads, torch.__version__, rnf.__version__, now]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "machine", "threads", "torch", "version", "time"])
        for name, second in seconds.items():
            ratio = seconds["plain PyTorch"] / second
            writer.writerow([name, round(second, 3), round(ratio, 2), clean[name], attacked[name], *about])
            print(f"{name}: {second:.3f} s, {ratio:.2f} times faster, accuracy {clean[name]:.1%}, {attacked[name]:.1%}")


if __name__ == "__main__":
    typer.run(main)
