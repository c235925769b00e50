"""Accuracy against strength, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from matplotlib.figure import Figure  # without pyplot: no global state, no display

from robust_node_fast.robustness.report import Report

__all__ = ["plot_accuracy"]

STYLES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))
STRONG = ("worst case", "certified")


def plot_accuracy(reports: dict[str, Report], target: str | Path | IO[bytes]) -> None:
    """One panel per noise and per norm of the attacks, one line per test and report; all start at the clean accuracy.

    Of one report colours tell the tests apart, of several the reports; ``target`` is a file or where to write a PNG.
    """
    panels: dict[str, list[str]] = {}
    for report in reports.values():
        for result in report.results:
            if result.measure:
                tests = panels.setdefault(_panel(result.name, result.measure), [])
                if result.name not in tests:
                    tests.append(result.name)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (panel, tests) in zip(axes.flat, panels.items(), strict=False):
        for number, (title, report) in enumerate(reports.items()):
            for line, name in enumerate(tests):
                points = [
                    (result.strength, result.mean, result.std)
                    for result in report.results
                    if result.name == name and result.measure and _panel(name, result.measure) == panel
                ]
                if not points:
                    continue
                points = sorted({(0.0, report.accuracy("clean"), 0.0), *points})
                x, y, error = zip(*points, strict=True)
                axis.errorbar(
                    x,
                    y,
                    error,
                    label=" ".join(part for part in (title, name.replace("_", "-")) if part),
                    linestyle=STYLES[line % len(STYLES)] if len(reports) > 1 else "-",
                    linewidth=2.5 if name in STRONG else 1.3,
                    color=f"C{number if len(reports) > 1 else line}",
                    marker="o",
                    markersize=4,
                    capsize=3,
                )
        axis.set(xlabel=panel, ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for row in axes:
        row[0].set_ylabel("accuracy")
    figure.savefig(target, dpi=120)


def _panel(name: str, measure: str) -> str:
    """Attacks in one norm share a panel, a noise has its own."""
    return measure if measure.endswith("eps") else f"{name.replace('_', '-')} {measure}"
