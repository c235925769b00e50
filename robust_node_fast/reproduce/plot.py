"""What attacks leave and what is certified, over the radius: the truth lies between the two."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from matplotlib.lines import Line2D

from robust_node_fast.reproduce.cell import CellResult
from robust_node_fast.reproduce.claims import AGAIN, Rows, accuracies
from robust_node_fast.reproduce.grid import EPS, FULL_ATTACK_SAMPLES, FULL_EPS, FULL_SEEDS, Cell
from robust_node_fast.reproduce.summary import BEATEN, by_row, failed_at

__all__ = ["attacked_and_certified"]

TITLES = {"digits": "digits", "mnist": "MNIST", "fashionmnist": "FashionMNIST"}
NETWORKS = dict(
    zip(
        BEATEN,
        (
            "ours (recipe certified)",
            "the paper's",
            "the paper's penalty, PyTorch's initialisation",
            "no penalty (vanilla)",
        ),
        strict=True,
    )
)


def attacked_and_certified(
    cells: Sequence[Cell], results: Mapping[str, CellResult], target: str | Path | IO[bytes]
) -> bool:
    """A panel per data set with certified training, its networks beside the paper's; False where there is none.

    Lines: means over the seeds, under attack by suite ``standard`` and certified. Crosses: under attack by suite
    ``full``. Hollow: a check failed at that radius for one of the seeds at least, of this suite or of the network's
    other ones.
    """
    panels: dict[str, Rows] = {}
    for dataset, group in itertools.groupby(cells, key=lambda cell: cell.config.dataset):
        there = {row: found for part in by_row(list(group), results).values() for row, found in part.items()}
        if "certified" in there:
            panels[dataset] = there
    if not panels:
        return False
    figure = Figure(figsize=(4.2 * len(panels) + 0.6, 5.0), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (dataset, rows) in zip(axes, panels.items(), strict=True):
        for row, color in zip(BEATEN, ("C0", "C1", "C2", "C3"), strict=True):
            failed = failed_at([cell for name in (row, *_again(row)) for cell in rows.get(name, ())])
            if found := rows.get(row, ()):
                clean = statistics.fmean(accuracies(found, "clean").values())
                certified = _means(found, "certified", EPS)
                axis.plot((0.0, *EPS), (clean, *certified), "--", marker="o", markersize=3.5, color=color)
                attacked = _means(found, "worst case", EPS)
                axis.plot((0.0, *EPS), (clean, *attacked), "-", color=color)
                _markers(axis, (0.0, *EPS), (clean, *attacked), failed, "o", 5.0, color)
            if found := rows.get(_full(row), ()):
                _markers(axis, FULL_EPS, _means(found, "worst case", FULL_EPS), failed, "X", 7.0, color)
        axis.set(title=TITLES[dataset], xlabel="l_inf radius", ylim=(-2, 102))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    full = [rows[name] for rows in panels.values() for name in map(_full, BEATEN) if name in rows]
    figure.legend(handles=_legend(full), fontsize=8, handlelength=3.0, loc="outside lower center", ncols=2)
    figure.savefig(target, dpi=120)
    return True


def _full(row: str) -> str:
    """The row of the same network under suite ``full``."""
    return f"full/{row.removeprefix('grid/')}"


def _again(row: str) -> list[str]:
    """The rows of the same network in other parts."""
    return [f"{part}/{row.removeprefix('grid/')}" for part in AGAIN]


def _means(found: Sequence[CellResult], test: str, radii: Sequence[float]) -> list[float]:
    return [statistics.fmean(accuracies(found, test, eps).values()) for eps in radii]


def _markers(
    axis: Axes,
    radii: Sequence[float],
    heights: Sequence[float],
    failed: set[float],
    marker: str,
    size: float,
    color: str,
) -> None:
    """One each, hollow where a check failed."""
    for eps, height in zip(radii, heights, strict=True):
        face = "white" if eps in failed else color
        axis.plot(eps, height, marker, markersize=size, color=color, markerfacecolor=face, zorder=3, clip_on=False)


def _legend(full: Sequence[Sequence[CellResult]]) -> list[Line2D]:
    """Down the first column what is under attack, down the second what is certified; ``full``: rows of that suite."""

    def key(label: str, style: str, marker: str, size: float, color: str, face: str = "") -> Line2D:
        look = {"linestyle": style, "marker": marker, "markersize": size, "color": color}
        return Line2D([], [], label=label, markerfacecolor=face or color, **look)  # type: ignore[arg-type]

    seeds = sorted({len(found) for found in full}) or [FULL_SEEDS]
    many = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else "1 seed" if seeds == [1] else f"{seeds[0]} seeds"
    crosses = f"under attack by suite full: AutoAttack, Square, ... ({many}, {FULL_ATTACK_SAMPLES} images)"
    names = [(name, f"C{number}") for number, name in enumerate(NETWORKS.values())]
    return [
        *(key(f"{name}: under attack", "-", "o", 5.0, color) for name, color in names),
        key(crosses, "none", "X", 7.0, "0.3"),
        *(
            key(f"{name.removesuffix(' (recipe certified)')}: certified", "--", "o", 3.5, color)
            for name, color in names
        ),
        key("hollow: a check of the evaluation failed, the truth may be lower", "none", "o", 5.0, "0.3", "white"),
    ]
