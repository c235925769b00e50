"""Prescribed and simulated regions of attraction side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from torch import Tensor

from robust_node_fast.zubov.network import ZubovNet
from robust_node_fast.zubov.planar import Regions

__all__ = ["before_and_after"]

COLOURS = ("#2a6f97", "#d1602b", "#5a8f3c", "#8a5fa8")


@torch.no_grad()
def before_and_after(
    title: str,
    states: Sequence[tuple[ZubovNet, Regions]],
    points: Tensor,
    labels: Tensor,
    path: Path,
    names: Sequence[str] = ("before training", "after training"),
) -> None:
    """A row for every network: ``{V_k < 1}`` on the left, what is attracted by ``x*_k`` on the right; as a PNG."""
    figure = Figure(figsize=(7.2, 3.4 * len(states)), layout="constrained")
    grid = figure.subplots(len(states), 2, squeeze=False)
    figure.suptitle(title)
    for row, (net, regions), name in zip(grid, states, names, strict=False):
        box = [float(v) for v in (regions.low[0], regions.high[0], regions.low[1], regions.high[1])]
        seen = net.features(points)
        iou = ", ".join(f"{value:.3f}" for value in regions.overlaps)
        for axis, sets, what in (
            (row[0], regions.prescribed, f"{name}: prescribed, V < 1"),
            (row[1], regions.attracted, f"{name}: simulated, IoU {iou}"),
        ):
            for k, inside in enumerate(sets):
                shown = torch.where(inside, 1.0, torch.nan).view(regions.side, regions.side)
                colour = ListedColormap([COLOURS[k]])
                axis.imshow(shown.numpy(), origin="lower", extent=box, cmap=colour, alpha=0.45, aspect="auto")
                axis.scatter(*seen[labels == k].T.numpy(), s=2, color=COLOURS[k])
            axis.scatter(*net.lyapunov.equilibria.T.numpy(), s=60, marker="x", color="black")
            axis.set(xlim=box[:2], ylim=box[2:])
            axis.set_title(what, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72, format="png")
