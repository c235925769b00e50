"""Prescribed and simulated regions of attraction side by side; V along trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from torch import Tensor

from robust_node_fast.zubov.following import Followed
from robust_node_fast.zubov.planar import Regions

__all__ = ["over_time", "side_by_side"]

COLOURS = ("#2a6f97", "#d1602b", "#5a8f3c", "#8a5fa8")


def side_by_side(title: str, rows: Mapping[str, Regions], labels: Tensor, path: Path) -> None:
    """A named row for each: ``{V_k < 1}`` on the left, what is attracted by ``x*_k`` on the right; written as a PNG.

    Args:
        title: above all.
        rows: regions by the name of the row.
        labels: ``(M,)`` int64 of the regions' states.
        path: of the PNG; its folder is made.
    """
    figure = Figure(figsize=(7.2, 3.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    figure.suptitle(title)
    for row, (what_of, regions) in zip(grid, rows.items(), strict=True):
        box = [float(v) for v in (regions.low[0], regions.high[0], regions.low[1], regions.high[1])]
        name = f"{what_of}: " if what_of else ""
        iou = ", ".join(f"{value:.3f}" for value in regions.overlaps)
        for axis, sets, what in (
            (row[0], regions.prescribed, f"{name}prescribed, V < 1"),
            (row[1], regions.attracted, f"{name}simulated, IoU {iou}"),
        ):
            for k, inside in enumerate(sets):
                shown = torch.where(inside, 1.0, torch.nan).view(regions.side, regions.side)
                colour = ListedColormap([COLOURS[k]])
                axis.imshow(shown.numpy(), origin="lower", extent=box, cmap=colour, alpha=0.45, aspect="auto")
                axis.scatter(*regions.states[labels == k].T.numpy(), s=2, color=COLOURS[k])
            axis.scatter(*regions.equilibria.T.numpy(), s=60, marker="x", color="black")
            axis.set(xlim=box[:2], ylim=box[2:])
            axis.set_title(what, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72, format="png")


def over_time(title: str, found: Followed, path: Path) -> None:
    """The own V and the smallest other one over time: median, and from the 10th to the 90th percentile; a PNG."""
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for value, colour, name in ((found.own, COLOURS[0], "own class"), (found.other, COLOURS[1], "nearest other class")):
        low, middle, high = (
            value.nan_to_num(nan=torch.inf).clamp(1e-6, 1e6).float().quantile(torch.tensor([0.1, 0.5, 0.9]), 1)
        )
        axis.plot(found.times, middle.numpy(), color=colour, label=name)
        axis.fill_between(found.times, low.numpy(), high.numpy(), color=colour, alpha=0.25, linewidth=0)
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set(yscale="log", xlabel="time", ylabel="V", title=title, xlim=(0.0, found.times[-1]))
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72, format="png")
