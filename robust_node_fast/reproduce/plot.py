"""What attacks leave and what is certified, over the radius: the truth lies between the two."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from matplotlib.figure import Figure  # without pyplot: no global state, no display

from robust_node_fast.reproduce.cell import CellResult
from robust_node_fast.reproduce.claims import accuracies
from robust_node_fast.reproduce.grid import EPS, Cell
from robust_node_fast.reproduce.summary import BEATEN, by_row

__all__ = ["attacked_and_certified"]


def attacked_and_certified(
    cells: Sequence[Cell], results: Mapping[str, CellResult], target: str | Path | IO[bytes]
) -> bool:
    """A panel per data set with certified training, its networks beside the paper's; False where there is none."""
    panels = {}
    for dataset, group in itertools.groupby(cells, key=lambda cell: cell.config.dataset):
        rows = {row: found for part in by_row(list(group), results).values() for row, found in part.items()}
        if "certified" in rows:
            panels[dataset] = {row: rows[row] for row in BEATEN if row in rows}
    if not panels:
        return False
    figure = Figure(figsize=(4.0 * len(panels) + 1.8, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (dataset, shown) in zip(axes, panels.items(), strict=True):
        for number, (row, found) in enumerate(shown.items()):
            for test, style, what in (("worst case", "-", "attacked"), ("certified", "--", "certified")):
                means = [statistics.fmean(accuracies(found, test, eps).values()) for eps in EPS]
                clean = statistics.fmean(accuracies(found, "clean").values())
                label, color = f"{row.removeprefix('grid/')}, {what}", f"C{number}"
                axis.plot((0.0, *EPS), (clean, *means), style, marker="o", markersize=3.5, color=color, label=label)
        axis.set(title=dataset, xlabel="l_inf radius", ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    axes[-1].legend(fontsize=7, handlelength=3.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(target, dpi=120)
    return True
