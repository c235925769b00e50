"""Times the hot path of Zubov-Net against the straightforward one, forward and backward; writes a CSV and a picture.

    python bench/zubov.py [--threads 1] [--output bench/results/zubov.csv] [--picture docs/zubov_cost.png]

- K values and derivatives along f: one forward-mode pass for all classes, against a loop over classes with
  ``autograd.grad``, and against ``torch.func.jvp`` of our functions.
- A training step on digits, against those of the networks that a Zubov-Net is compared with.
- Boundary sampling: all rays at once, against a loop over rays with bisection, which evaluates one point at a time, and
  against a loop over classes that bisects all rays of a class together.

Everything is in float32 with the default width and depth. Results are compared before anything is timed; ways to do the
same take turns, medians are over the turns. The cost in K, depth and rays is that of our way alone.
"""

from __future__ import annotations

import csv
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

import robust_node_fast as rnf
from robust_node_fast import zubov
from robust_node_fast._machine import machine
from robust_node_fast.bench.plot import BLUE, GREEN, ORANGE
from robust_node_fast.training import TrainConfig
from robust_node_fast.training.objective import objective_of
from robust_node_fast.zubov import ConvexLyapunov, contenders, reference

OURS, LOOP, JVP, PER_CLASS = "robust_node_fast", "loop", "torch.func.jvp", "loop over classes"
DERIVATIVE, BOUNDARY, BOTH = "value and derivative", "boundary", "both"
DIM, BATCH, RAYS = 16, 64, 8
CLASSES, GROWTH = (
    (2, 10, 100),
    {"classes": (2, 5, 10, 20, 50, 100), "depth": (1, 2, 3, 4, 6, 8), "rays": (4, 16, 64, 256)},
)


class Row(NamedTuple):
    work: str
    sweep: str
    provider: str
    classes: int
    depth: int
    batch: int
    rays: int
    p50_ms: float
    loop_over_this: float | None = None  # of training steps: the Zubov-Net's over this one's
    rounds: int = 0


def derivative(way: Callable[..., tuple[Tensor, Tensor]], lyapunov: ConvexLyapunov) -> Callable[[], list[Tensor]]:
    """V and dV/dt of a batch, and the gradients of a loss that needs both."""
    generator = torch.Generator().manual_seed(1)
    x, dx = (torch.randn(BATCH, DIM, generator=generator).requires_grad_() for _ in range(2))
    leaves = [x, dx, *lyapunov.parameters()]

    def call() -> list[Tensor]:
        value, rate = way(lyapunov, x, dx)
        loss = (rate + value * (1.0 - value)).square().mean()
        return [value, rate, *torch.autograd.grad(loss, leaves)]

    return call


def boundary(way: Callable[..., Tensor], lyapunov: ConvexLyapunov, rays: int) -> Callable[[], list[Tensor]]:
    """Points of the boundary, and the gradients of their mean square."""

    def call() -> list[Tensor]:
        points = way(lyapunov, rays, generator=torch.Generator().manual_seed(2))
        leaves = list(lyapunov.parameters())
        return [points, *torch.autograd.grad(points.square().mean(), leaves)]

    return call


def jvp(lyapunov: ConvexLyapunov, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    value, rate = torch.func.jvp(lyapunov, (x,), (dx,))  # type: ignore[misc]
    return value, rate


def per_class_boundary(lyapunov: ConvexLyapunov, rays: int, *, generator: torch.Generator) -> Tensor:
    """As ``reference.sample_boundary``, with all rays of a class at once."""
    directions = torch.randn(lyapunov.num_classes, rays, DIM, generator=generator)
    directions = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    points = []
    for k, u in enumerate(directions):
        own, centre = reference.ClassValue(lyapunov, k), lyapunov.equilibria[k]
        low, high = torch.zeros(rays, 1), torch.ones(rays, 1)
        with torch.no_grad():
            while bool((inside := own(centre + high * u) <= 1.0).any()):
                high = torch.where(inside[:, None], 2.0 * high, high)
            for _ in range(26):
                middle = 0.5 * (low + high)
                inside = (own(centre + middle * u) <= 1.0)[:, None]
                low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        x = centre + high * u
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(own(leaf).sum(), leaf, retain_graph=True)
        value = own(x)
        points.append(x - u * ((value - value.detach()) / (gradient * u).sum(1))[:, None])
    return torch.stack(points)


def turns(calls: dict[str, Callable[[], list[Tensor]]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each in every turn, once their results agree.

    Raises:
        ValueError: they do not.
    """
    expected, *others = (call() for call in calls.values())
    for found in others:
        for ours, theirs in zip(expected, found, strict=True):
            scale = theirs.abs().max().clamp_min(1e-3)
            if not bool((ours - theirs).abs().max() <= 1e-3 * scale):
                raise ValueError(f"results differ by {float((ours - theirs).abs().max() / scale):.1e}")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return taken


def compare(classes: int) -> list[Row]:
    """Both works of one number of classes, and their sum: the hot path of a training step."""
    lyapunov = ConvexLyapunov(DIM, classes)
    first = turns(
        {
            OURS: derivative(zubov.value_and_derivative, lyapunov),
            LOOP: derivative(reference.value_and_derivative, lyapunov),
            JVP: derivative(jvp, lyapunov),
        },
        15,
    )
    second = turns(
        {
            OURS: boundary(zubov.sample_boundary, lyapunov, RAYS),
            LOOP: boundary(reference.sample_boundary, lyapunov, RAYS),
            PER_CLASS: boundary(per_class_boundary, lyapunov, RAYS),
        },
        9,
    )
    # The loop over classes for values and derivatives goes with either way to loop for the boundary.
    both = {
        name: [a + b for a, b in zip(first[OURS if name == OURS else LOOP], second[name], strict=False)]
        for name in (OURS, LOOP, PER_CLASS)
    }
    rows = []
    for work, taken in ((DERIVATIVE, first), (BOUNDARY, second), (BOTH, both)):
        for name, milliseconds in taken.items():
            ratio = statistics.median(b / a for a, b in zip(milliseconds, taken[LOOP], strict=True))
            p50 = statistics.median(milliseconds)
            rows.append(
                Row(work, "comparison", name, classes, lyapunov.depth, BATCH, RAYS, p50, ratio, len(milliseconds))
            )
    return rows


def growth(sweep: str, rounds: int = 9) -> list[Row]:
    """Our cost in one quantity, the others as in the middle comparison."""
    rows = []
    for size in GROWTH[sweep]:
        sizes = {"classes": 10, "depth": 3, "rays": 16, sweep: size}
        lyapunov = ConvexLyapunov(DIM, sizes["classes"], depth=sizes["depth"])
        calls = {DERIVATIVE: derivative(zubov.value_and_derivative, lyapunov)} if sweep != "rays" else {}
        calls[BOUNDARY] = boundary(zubov.sample_boundary, lyapunov, sizes["rays"])
        for work, call in calls.items():
            p50 = statistics.median(turns({work: call}, rounds)[work])
            rows.append(
                Row(work, sweep, OURS, sizes["classes"], sizes["depth"], BATCH, sizes["rays"], p50, None, rounds)
            )
    return rows


def training_steps(rounds: int = 15) -> list[Row]:
    """Forward and backward of a training step's loss on digits, of the Zubov-Net and of what it is compared with."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(128, 1, 8, 8, generator=generator), torch.arange(128) % 10
    taken: dict[str, list[float]] = {method: [] for method in contenders.METHODS}
    goals = {}
    for method in taken:
        config = TrainConfig.recipe("digits", "zubov", model=method)
        net = config.initial_model()
        goals[method] = net, objective_of(net, config)
    for turn in range(rounds + 1):
        for method, (net, goal) in goals.items():
            begin = time.perf_counter()
            goal(images, labels)[0].backward()
            if turn:  # the first one warms up
                taken[method].append(1e3 * (time.perf_counter() - begin))
            net.zero_grad()
    rows = []
    for method, milliseconds in taken.items():
        ratio = statistics.median(b / a for a, b in zip(milliseconds, taken["zubov"], strict=True))
        p50 = statistics.median(milliseconds)
        rows.append(Row("training step, digits", "methods", method, 10, 2, 128, 16, p50, ratio, rounds))
    return rows


def draw(rows: Sequence[Row], path: Path, conditions: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    ratios, *panels = figure.subplots(1, 4)
    for work, color, marker in ((DERIVATIVE, BLUE, "o"), (BOUNDARY, ORANGE, "s"), (BOTH, GREEN, "^")):
        ours = [row for row in rows if row.sweep == "comparison" and row.provider == OURS and row.work == work]
        ratios.plot(
            [row.classes for row in ours], [row.loop_over_this or 0 for row in ours], color=color, marker=marker
        )
        for axes, sweep in zip(panels, GROWTH, strict=True):
            line = [row for row in rows if row.sweep == sweep and row.work == work]
            axes.plot([getattr(row, sweep) for row in line], [row.p50_ms for row in line], color=color, marker=marker)
            axes.set(xlabel=sweep, ylabel="ms", xscale="linear" if sweep == "depth" else "log", yscale="log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        ratios.plot([], [], color=color, marker=marker, label=work)
    ratios.set(xlabel="classes", xscale="log", yscale="log", ylabel="times faster than the loop")
    ratios.legend(fontsize=7)
    figure.suptitle(f"forward and backward; {conditions}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    threads: Annotated[int, typer.Option(help="torch.set_num_threads.")] = 1,
    output: Annotated[Path, typer.Option(help="CSV to write.")] = Path("bench/results/zubov.csv"),
    picture: Annotated[Path, typer.Option(help="Picture to write.")] = Path("docs/zubov_cost.png"),
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = [row for sweep in GROWTH for row in growth(sweep)] + [row for k in CLASSES for row in compare(k)]
    rows += training_steps()
    for row in rows:
        ratio = "" if row.loop_over_this is None else f"{row.loop_over_this:8.1f}x"
        size = f"K={row.classes} depth={row.depth} rays={row.rays}"
        print(f"{row.work:22} {row.sweep:11} {row.provider:17} {size:24} {row.p50_ms:10.2f} ms {ratio}")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = [machine(), threads, torch.__version__, rnf.__version__, now]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Row._fields, "dim", "machine", "threads", "torch", "version", "time"])
        for row in rows:
            cells = [f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row]
            writer.writerow([*cells, DIM, *about])
    draw(rows, picture, f"{machine()}, {threads} thread, torch {torch.__version__}, {now[:10]}")


if __name__ == "__main__":
    typer.run(main)
