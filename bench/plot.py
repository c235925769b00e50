"""Draws three plots from a CSV of the results, and from nothing else.

python -m robust_node_fast.bench.plot bench/results/flow.csv docs
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import rows as results
from .registry import OURS, TIMED, compulsory_bytes
from .report import NCNN
from .rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; shapes and line styles differ as well.
BLUE, SKY, ORANGE, GREEN, GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#555555"
STYLE: dict[str, dict[str, Any]] = {
    OURS: {"color": BLUE, "marker": "o"},
    "eager": {"color": ORANGE, "marker": "s"},
    "eager channels_last": {"color": GREEN, "marker": "^"},
}
SPECIAL = ("penalty loop", NCNN)  # peers that belong to single rows


def draw(source: Path, folder: Path) -> list[Path]:
    """``bench_ratios.png``, ``bench_roofline.png``, ``bench_scaling.png``: those that the CSV has rows for.

    Raises:
        ValueError: no CSV of ``rows.write``.
    """
    from matplotlib.figure import Figure

    rows = [row for row in results.read(source) if row.cost]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    plots: tuple[tuple[str, Callable[[Figure, Sequence[Row]], bool]], ...] = (
        ("ratios", _ratios),
        ("roofline", _roofline),
        ("scaling", _scaling),
    )
    for name, plot in plots:
        figure = Figure(layout="constrained")
        if plot(figure, rows):
            drawn.append(folder / f"bench_{name}.png")
            figure.savefig(drawn[-1], dpi=100)
    return drawn


def _conditions(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"{first.machine}, torch {first.torch}, {first.time[:10]}"


def _ratios(figure: Figure, rows: Sequence[Row]) -> bool:
    """How many times faster each bar is than eager, than the best PyTorch, and than its own peer."""
    bars = [row for row in rows if row.group == "bars" and row.mode in TIMED]
    ours = [row for row in bars if row.provider == OURS][::-1]
    if not ours:
        return False
    figure.set_size_inches(8, 1.2 + 0.5 * len(ours))
    axes = figure.subplots()
    special = {
        (row.workload, row.mode): (peer.provider, ratio)
        for row in ours
        for peer in bars
        if peer.provider in SPECIAL and (peer.workload, peer.mode) == (row.workload, row.mode)
        if (ratio := _over(peer, row))
    }
    usual = [ratio for row in ours for ratio in (row.eager_over_this, row.best_pytorch_over_this) if ratio]
    left = 0.8 * min(0.75, *usual, *(ratio for _, ratio in special.values()))
    right = max(2.0, *usual)
    for i, row in enumerate(ours):
        ratios = [(row.best_pytorch_over_this, BLUE, ""), (row.eager_over_this, SKY, "")]
        name, ratio = special.get((row.workload, row.mode), ("", None))
        ratios.append((ratio, ORANGE, f" {name}"))
        known = [(ratio, color, note) for ratio, color, note in ratios if ratio]
        height = 0.8 / max(1, len(known))
        for k, (ratio, color, note) in enumerate(known):
            y = i + 0.4 - (k + 0.5) * height
            shown = min(ratio, right)
            axes.barh(y, shown - 1, height, left=1, color=color)
            cut = " \N{RIGHTWARDS ARROW}" if ratio > right else ""
            at = (max(shown, 1), y)
            text = f"{ratio:.2f}{note}{cut}"
            axes.annotate(text, at, xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    most = max(row.threads for row in ours)
    labels = [f"{row.workload}\n{row.mode}{'' if row.threads == most else ', 1 thread'}" for row in ours]
    axes.set_yticks(range(len(ours)), labels, fontsize=7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.axvline(1, color="black", lw=0.8)
    axes.set_ylim(-0.6, len(ours) - 0.4)
    axes.set_xlim(left, 1.8 * right)
    axes.set(xlabel="times faster (right) or slower (left) than")
    axes.set_title(f"{_conditions(ours)}, {most} threads", fontsize=8)
    for color, label in ((BLUE, "the best PyTorch"), (SKY, "PyTorch eager"), (ORANGE, "the peer named")):
        axes.bar(0, 0, color=color, label=label)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    return True


def _over(peer: Row, row: Row) -> float | None:
    return peer.cost / row.cost if peer.cost and row.cost else None


def _roofline(figure: Figure, rows: Sequence[Row]) -> bool:
    """Direct-convolution GFLOP/s of forward passes against the arithmetic intensity that the shape allows."""
    forward = [row for row in rows if row.mode == "forward" and row.dtype == "float32" and row.gflops]
    threads = max((row.threads for row in forward), default=0)
    forward = [row for row in forward if row.threads == threads and row.provider in STYLE]
    if not forward:
        return False
    figure.set_size_inches(7, 4.5)
    axes = figure.subplots()
    intensities = []
    for provider in ("eager", OURS):
        style = STYLE[provider]
        mine = [row for row in forward if row.provider == provider]
        x = [_intensity(row) for row in mine]
        intensities += x
        axes.scatter(x, [row.gflops or 0.0 for row in mine], s=16, alpha=0.8, label=provider, **style)
    first = forward[0]
    if first.gemm_gflops and first.bandwidth_gbs and intensities:
        ends = [min(intensities) / 1.5, max(intensities) * 1.5]
        knee = first.gemm_gflops / first.bandwidth_gbs
        x = sorted({*ends, min(max(knee, ends[0]), ends[1])})
        roof = [min(first.gemm_gflops, first.bandwidth_gbs * value) for value in x]
        label = f"measured sgemm {first.gemm_gflops:.0f} GFLOP/s, copy {first.bandwidth_gbs:.0f} GB/s"
        axes.plot(x, roof, color=GREY, lw=1.5, label=label)
    axes.set(xscale="log", yscale="log", ylabel="GFLOP/s of direct convolutions")
    axes.set_xlabel("FLOP per byte of input, parameters and output (what a flow has to move at least)")
    axes.set_title(f"Forward, float32, {threads} threads: {_conditions(forward)}", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="above the roof: Winograd needs fewer operations", title_fontsize=7)
    return True


def _intensity(row: Row) -> float:
    flop = (row.gflops or 0.0) * (row.p50_ms or 0.0) * 1e6
    return flop / compulsory_bytes(row.batch, row.channels, row.height * row.width, row.n_steps, 4)


def _scaling(figure: Figure, rows: Sequence[Row]) -> bool:
    """Rates along B, N and C, and what the second thread brings."""
    swept = [row for row in rows if row.group == "scaling"]
    if not swept:
        return False
    figure.set_size_inches(9, 6)
    panels = figure.subplots(2, 2).flatten()
    for axes, sweep in zip(panels, ("B", "N", "C"), strict=False):
        _panel(axes, [row for row in swept if row.sweep == sweep], sweep)
    _threads(panels[3], [row for row in swept if row.sweep == "threads"])
    labelled = {
        label: line for axes in panels[:3] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if labelled:
        figure.legend(labelled.values(), labelled.keys(), fontsize=7, loc="outside lower center", ncols=3)
    figure.suptitle(_conditions(swept), fontsize=8)
    return True


def _panel(axes: Axes, rows: Sequence[Row], sweep: str) -> None:
    size: dict[str, Callable[[Row], int]] = {
        "B": lambda row: row.batch,
        "N": lambda row: row.n_steps,
        "C": lambda row: row.channels,
    }
    for provider, style in STYLE.items():
        for mode, line in (("forward", "-"), ("forward+backward", "--")):
            mine = sorted((r for r in rows if r.provider == provider and r.mode == mode), key=size[sweep])
            if mine:
                y = [row.gflops or 0.0 for row in mine]
                label = f"{provider}, {mode}"
                axes.plot([size[sweep](row) for row in mine], y, line, ms=4, lw=1.2, label=label, **style)
    if not rows:
        return
    values = sorted({size[sweep](row) for row in rows})
    axes.set(xscale="log", ylabel="GFLOP/s (direct)")
    if sweep == "C":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(values, [str(value) for value in values], fontsize=7)
    axes.minorticks_off()
    first = rows[0]
    sizes = {"B": first.batch, "C": first.channels, "N": first.n_steps}
    fixed = ", ".join(f"{name} {value}" for name, value in sizes.items() if name != sweep)
    axes.set_xlabel(f"{sweep}   ({fixed}, {first.height}x{first.width}, {first.threads} threads)", fontsize=8)
    axes.grid(alpha=0.3)


def _threads(axes: Axes, rows: Sequence[Row]) -> None:
    most = max((row.threads for row in rows), default=1)
    names = list(dict.fromkeys((row.workload, row.mode) for row in rows))
    costs = {(row.workload, row.mode, row.provider, row.threads): row.cost for row in rows}
    for k, provider in enumerate(("eager", OURS)):
        speed = [_ratio(costs.get((*name, provider, 1)), costs.get((*name, provider, most))) for name in names]
        at = [i + 0.4 * k - 0.2 for i in range(len(names))]
        bars = axes.bar(at, speed, 0.4, color=STYLE[provider]["color"], label=provider)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    labels = [f"{workload.removeprefix('threads, ')}\n{mode}" for workload, mode in names]
    axes.set_xticks(range(len(names)), labels, fontsize=6)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_ylabel(f"time on 1 thread / on {most}")
    axes.margins(y=0.25)
    axes.legend(fontsize=6, loc="upper right", ncols=2)


def _ratio(one: float | None, more: float | None) -> float:
    return one / more if one and more else 0.0


if __name__ == "__main__":
    print(*draw(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
