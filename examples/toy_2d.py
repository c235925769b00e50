"""The paper's toy in the plane: a contractive Neural ODE forgets perturbations of its initial state.

A tanh network 2-64-64-2 is trained so that 50 Euler points on [0, 0.5] lead from (2, 2) to (4, 4) and from (2, -2) to
(4, -4): once by the squared error alone, once with the Jacobian regulariser at rho = 1 on the states that a disc of
initial states around each start passes through. Both networks start from the same weights.

    python examples/toy_2d.py --output runs/toy_2d.png

Source: arXiv 2508.11432, Eq. (5) and its two-dimensional example.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from robust_node_fast.jacobian import jacobian_penalty

STARTS = torch.tensor([[2.0, 2.0], [2.0, -2.0]])
TARGETS = torch.tensor([[4.0, 4.0], [4.0, -4.0]])
HORIZON, POINTS, RATE = 0.5, 50, 1.0
STEP = HORIZON / (POINTS - 1)
RADIUS = 0.5  # of the disc of perturbed initial states
COLOURS = {"plain": "#d1602b", "contractive": "#2a6f97"}
INK, PALE = "#333333", "#b8bfc6"


def trajectory(field: nn.Module, z: Tensor) -> Tensor:
    """All Euler points ``(POINTS, B, 2)`` from initial states ``(B, 2)``."""
    states = [z]
    for _ in range(POINTS - 1):
        states.append(states[-1] + STEP * field(states[-1]))
    return torch.stack(states)


def disc(count: int, generator: torch.Generator) -> Tensor:
    """``(2 * count, 2)``: perturbed initial states, uniform in the discs around both starts, start by start."""
    angle = 2.0 * math.pi * torch.rand(2, count, generator=generator)
    radius = RADIUS * torch.rand(2, count, generator=generator).sqrt()
    return (STARTS[:, None] + radius[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)).flatten(0, 1)


def train(field: nn.Module, *, contractive: bool, iterations: int, seed: int) -> nn.Module:
    """Adam on the squared error at the end, plus the penalty where ``contractive``."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        states = trajectory(field, torch.cat([STARTS, disc(12, generator)]) if contractive else STARTS)
        loss = (states[-1, :2] - TARGETS).square().sum(1).mean()
        if contractive:
            # In the plane two Krylov vectors are exact.
            loss = loss + jacobian_penalty(field, states, rate=RATE, n_iter=2, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return field


@torch.no_grad()
def distances(field: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Perturbed trajectories ``(POINTS, 2, 200, 2)`` and their distances ``(POINTS, 400)`` to the nominal ones."""
    perturbed = trajectory(field, disc(200, generator)).unflatten(1, (2, 200))
    nominal = trajectory(field, STARTS)[:, :, None]
    return perturbed, (perturbed - nominal).norm(dim=-1).flatten(1)


def report(name: str, field: nn.Module, apart: Tensor) -> None:
    """One line: how well it hits the targets and what became of the perturbations."""
    with torch.no_grad():
        miss = (trajectory(field, STARTS)[-1] - TARGETS).norm(dim=1).max().item()
    factor = apart[-1] / apart[0]
    print(
        f"{name:<12} miss {miss:.4f}   mean distance to the nominal trajectory {apart[0].mean():.3f} -> "
        f"{apart[-1].mean():.3f}   factor: mean {factor.mean():.3f}, largest {factor.max():.3f}"
    )


def draw(networks: dict[str, nn.Module], bundles: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Left and middle: vector field and bundles of trajectories. Right: distance to the nominal one over time."""
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": PALE, "axes.linewidth": 0.8, "text.color": INK})
    figure, axes = plt.subplots(
        1, 3, figsize=(9.2, 4.4), gridspec_kw={"width_ratios": [1, 1, 1.5]}, layout="constrained"
    )
    x, y = torch.meshgrid(torch.linspace(0.8, 5.8, 60), torch.linspace(-5.8, 5.8, 120), indexing="xy")
    for ax, (name, field) in zip(axes, networks.items(), strict=False):
        with torch.no_grad():
            velocity = field(torch.stack([x, y], dim=-1))
            nominal = trajectory(field, STARTS)
        ax.streamplot(
            x.numpy(), y.numpy(), velocity[..., 0].numpy(), velocity[..., 1].numpy(), color=PALE, density=0.9,
            linewidth=0.6, arrowsize=0.6, zorder=1,
        )  # fmt: skip
        perturbed = bundles[name][0]
        for i in range(len(STARTS)):
            ax.plot(*perturbed[:, i, :60].unbind(-1), color=COLOURS[name], alpha=0.3, linewidth=0.6, zorder=2)
            for point in (0, -1):
                ax.scatter(*perturbed[point, i].unbind(-1), s=4, color=COLOURS[name], linewidths=0, zorder=3)
            ax.plot(*nominal[:, i].unbind(-1), color=INK, linewidth=1.4, zorder=4)
        ax.scatter(*STARTS.unbind(-1), s=26, color="white", edgecolors=INK, zorder=5, label="start")
        ax.scatter(*TARGETS.unbind(-1), s=50, marker="x", color=INK, linewidths=1.6, zorder=5, label="target")
        ax.set(title=name, xlim=(0.8, 5.8), ylim=(-5.8, 5.8), aspect="equal", xlabel="$z_1$")
    axes[0].set_ylabel("$z_2$")
    axes[0].legend(loc="center right", facecolor="white", edgecolor="none", framealpha=1.0)

    ax, times = axes[2], STEP * torch.arange(POINTS)
    for name, (_, apart) in bundles.items():
        factor = apart / apart[0]
        ax.fill_between(times, factor.min(1).values, factor.max(1).values, color=COLOURS[name], alpha=0.18, linewidth=0)
        ax.plot(times, factor.mean(1), color=COLOURS[name], linewidth=1.8)
        label(ax, name, factor[-1].mean().item(), COLOURS[name])
    ax.plot(times, torch.exp(-0.5 * RATE * times), color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    label(ax, r"$e^{-\rho t/2}$", math.exp(-0.5 * RATE * HORIZON), INK)
    ax.set(title="distance to the nominal trajectory\nrelative to the start: mean, range", xlabel="$t$")
    ax.set(xlim=(0, HORIZON), yscale="log")
    ax.set_yticks([0.5, 1.0, 2.0], labels=["0.5", "1", "2"])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=115)


def label(ax: plt.Axes, text: str, height: float, colour: str) -> None:
    """Names a curve at its right end."""
    ax.annotate(text, (HORIZON, height), xytext=(5, 0), textcoords="offset points", color=colour, va="center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/toy_2d.png"), help="picture to write (PNG)")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    untrained = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    networks = {
        name: train(copy.deepcopy(untrained), contractive=flag, iterations=arguments.iterations, seed=arguments.seed)
        for name, flag in (("plain", False), ("contractive", True))
    }
    print(
        f"rho = {RATE:g} on [0, {HORIZON:g}]: the differential equation guarantees nearby states the factor "
        f"exp(-rho/2 * T) = {math.exp(-0.5 * RATE * HORIZON):.3f} where the penalty is zero; "
        f"discs of radius {RADIUS:g} around the starts:"
    )
    bundles = {}
    for name, field in networks.items():
        bundles[name] = distances(field, torch.Generator().manual_seed(arguments.seed + 1))
        report(name, field, bundles[name][1])
    draw(networks, bundles, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
