"""Accuracies as pictures: over the radius of attacks, method by method, and as bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no global state, no display

__all__ = ["bars", "over_radius"]

Values = Sequence[float]  # of all seeds, in %
COLOURS = ("#8a5fa8", "#5a8f3c", "#d1602b", "#9a8c2b", "#2a6f97")


def over_radius(
    title: str,
    radii: Sequence[float],
    attacks: Mapping[str, Mapping[str, Sequence[Values]]],
    single: Mapping[str, tuple[float, Mapping[str, Values]]],
    path: Path,
) -> None:
    """A panel for every attack with a line for every method, mean and standard deviation over seeds; as a PNG.

    Args:
        title: above all.
        radii: of all panels but the last, the first is 0.
        attacks: by name, of each method the values at all radii.
        single: an attack at one radius: a panel of bars.
        path: of the PNG; its folder is made.
    """
    figure = Figure(figsize=(2.9 * (len(attacks) + len(single)), 3.1), layout="constrained")
    panels = figure.subplots(1, len(attacks) + len(single))
    figure.suptitle(title)
    for axes, (attack, methods) in zip(panels, attacks.items(), strict=False):
        for colour, (method, points) in zip(COLOURS, methods.items(), strict=False):
            means, spreads = zip(*(_mean_and_spread(values) for values in points), strict=True)
            axes.errorbar(radii, means, spreads, color=colour, marker="o", markersize=3, capsize=2, label=method)
        axes.set(title=attack, xlabel="radius, l_inf", ylim=(0, 100))
    for axes, (attack, (radius, rows)) in zip(panels[len(attacks) :], single.items(), strict=True):
        _bars(axes, rows)
        axes.set(title=f"{attack}, {radius:.2g}")
    panels[0].set(ylabel="accuracy, %")
    panels[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, format="png")


def bars(title: str, panels: Mapping[str, Mapping[str, Values]], path: Path) -> None:
    """A panel of bars for every heading, one for every row, mean and standard deviation over seeds; as a PNG."""
    longest = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(2.4 * len(panels) + 1.6, 0.3 * longest + 1.0), layout="constrained")
    figure.suptitle(title)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (heading, rows) in zip(row, panels.items(), strict=True):
        _bars(axes, rows)
        axes.set(title=heading)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, format="png")


def _bars(axes: Axes, rows: Mapping[str, Values]) -> None:
    names = list(rows)[::-1]
    means, spreads = zip(*(_mean_and_spread(rows[name]) for name in names), strict=True)
    colours = [colour for colour, _ in zip(COLOURS, names, strict=False)][::-1] if len(names) <= len(COLOURS) else None
    axes.barh(names, means, xerr=spreads, color=colours or COLOURS[-1], height=0.6)
    axes.tick_params(labelsize=8)
    axes.set(xlabel="accuracy, %")


def _mean_and_spread(values: Values) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if values[1:] else 0.0
