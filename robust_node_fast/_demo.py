"""What ``rnf demo`` does: both networks on digits from the same start in one table, and the speed of the flow."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from robust_node_fast import _backends, _timing, data, models, reference, robustness, training
from robust_node_fast.robustness.curves import plot_accuracy
from robust_node_fast.training import Outcome, TrainConfig

EPS = 0.1  # of the table
CURVE = (0.02, 0.05, EPS, 0.2)  # of the plot
COLUMNS = (
    ("clean", "clean", 0.0),
    ("Gauss\n0.1", "gaussian", 0.1),
    ("Gauss\n0.2", "gaussian", 0.2),
    ("Gauss\n0.3", "gaussian", 0.3),
    ("salt &\npepper\n0.05", "salt_and_pepper", 0.05),
    ("salt &\npepper\n0.2", "salt_and_pepper", 0.2),
    (f"FGSM\n{EPS}", "fgsm", EPS),
    (f"PGD-40\n{EPS}", "pgd", EPS),
)
WORK = (("digits network", 8), ("MNIST network", 28))
BATCH = 128


def run(folder: Path, console: Console, fit: Callable[[Path, data.Dataset], Outcome]) -> None:
    """Train, evaluate, time; print one table; write ``report.md``, ``report.json`` and three plots to ``folder``.

    Raises:
        DataError, RunError: as training does.
    """
    dataset = data.load("digits")
    outcomes, reports = {}, {}
    for network in training.NETWORKS:
        config = TrainConfig.recipe("digits", network=network)
        training.prepare(config, folder / network, replace=True)
        outcomes[network] = fit(folder / network, dataset)
        model, _ = training.load_model(folder / network)
        test = (dataset.test_images, dataset.test_labels)
        reports[network] = robustness.evaluate(model, test, eps=CURVE)
    speed = {name: measure(image_size) for name, image_size in WORK}

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, title="Accuracy in %, digits")
    table.add_column("network")
    for heading in (*(heading for heading, _, _ in COLUMNS), "guaran-\nteed\nrate", "penalty"):
        table.add_column(heading, justify="right")
    for network in training.NETWORKS:
        table.add_row(network, *_cells(outcomes[network], reports[network]))
    console.print(table)
    verdict = training.rate_sentence(outcomes["contractive"])
    console.print(verdict, highlight=False, soft_wrap=True)
    for line in _speed_lines(speed):
        console.print(line, highlight=False, soft_wrap=True)

    with training.writing(folder):
        (folder / "report.md").write_text(_markdown(outcomes, reports, verdict, speed))
        content = {"networks": {name: json.loads(report.to_json()) for name, report in reports.items()}, "speed": speed}
        (folder / "report.json").write_text(json.dumps(content, indent=2))
        plot_accuracy(reports, folder / "accuracy.png")
        _plot_training(folder, folder / "training.png")
    console.print(f"Report and plots: {folder / 'report.md'}", highlight=False, soft_wrap=True)


def _cells(outcome: Outcome, report: robustness.Report) -> list[str]:
    accuracies = [f"{100 * report.accuracy(name, strength):.1f}" for _, name, strength in COLUMNS]
    return [*accuracies, f"{outcome.rate:.3g}", f"{outcome.penalty:.3g}"]


def measure(image_size: int) -> dict[str, dict[str, float]]:
    """Seconds per call, by task, of the package's network and of plain PyTorch's with the same weights."""
    torch.manual_seed(0)
    fused, plain = models.MNISTNode(image_size=image_size), reference.MNISTNode(image_size=image_size)
    plain.load_state_dict(fused.reference_state_dict())
    images, labels = torch.rand(BATCH, 1, image_size, image_size), torch.randint(10, (BATCH,))

    def forward(model: nn.Module) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(images)
        return logits

    def forward_backward(model: nn.Module) -> None:
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images), labels))

    def compare(task: Callable[[nn.Module], object]) -> dict[str, float]:
        return _timing.interleaved({"robust_node_fast": lambda: task(fused), "plain PyTorch": lambda: task(plain)})

    torch.testing.assert_close(forward(fused), forward(plain))  # a speed-up is never reported on a wrong result
    return {"forward": compare(forward), "forward + backward": compare(forward_backward)}


def _speed_lines(speed: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    implementation = _backends.backend_info()["ops"]["euler_conv_flow"]["cpu"]["implementation"]
    yield f"Speed (batch {BATCH}, {torch.get_num_threads()} threads, the flow runs on: {implementation}):"
    for name, tasks in speed.items():
        for task, seconds in tasks.items():
            ours, plain = seconds["robust_node_fast"], seconds["plain PyTorch"]
            yield f"  {name}, {task}: {1e3 * ours:.2f} ms, plain PyTorch {1e3 * plain:.2f} ms: {plain / ours:.2f}x"


def _markdown(
    outcomes: dict[str, Outcome],
    reports: dict[str, robustness.Report],
    verdict: str,
    speed: dict[str, dict[str, dict[str, float]]],
) -> str:
    headings = ["network", *(heading.replace("\n", " ") for heading, _, _ in COLUMNS), "guaranteed rate", "penalty"]
    rows = [[network, *_cells(outcomes[network], reports[network])] for network in outcomes]
    lines = [
        "# digits: vanilla against contractive",
        "",
        "Same initial weights, data order and number of steps; accuracy in % on the 360 test images.",
        "",
        *(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)),
        "",
        verdict,
        "",
        "![accuracy](accuracy.png)",
        "![training](training.png)",
        "",
        "## Speed",
        "",
        f"torch {torch.__version__}, {platform.machine()}; least of interleaved rounds.",
        "",
        *(line.replace("  ", "- ") for line in _speed_lines(speed)),
    ]
    for network, report in reports.items():
        lines += ["", f"## {network}", "", report.to_markdown()]
    return "\n".join(lines)


def _plot_training(folder: Path, path: Path) -> None:
    """Loss, penalty and rate of both networks against optimizer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for network in training.NETWORKS:
        lines = (folder / network / "metrics.jsonl").read_text().splitlines()
        steps: list[dict[str, Any]] = [record for record in map(json.loads, lines) if "loss" in record]
        for axis, name in zip(axes, ("loss", "penalty", "rate"), strict=True):
            axis.plot([record["step"] for record in steps], [record[name] for record in steps], label=network, lw=1)
    for axis, name, scale in zip(axes, ("loss", "penalty", "rate"), ("log", "symlog", "symlog"), strict=True):
        axis.set(xlabel="step", ylabel=name, yscale=scale)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path)
