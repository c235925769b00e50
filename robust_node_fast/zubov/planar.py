"""Zubov-Nets in the plane: data, network and budget of a run as one configuration, and what it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.zubov.attraction import attracted_to, overlap, plane
from robust_node_fast.zubov.boundary import sample_boundary
from robust_node_fast.zubov.lyapunov import ConvexLyapunov
from robust_node_fast.zubov.network import DenseFlow, ZubovNet
from robust_node_fast.zubov.training import Budget, ZubovObjective

__all__ = ["BEST", "BUDGET", "PROBLEMS", "Planar", "Regions", "data", "regions"]

# Name -> number of classes.
PROBLEMS = {"moons": 2, "rings": 2, "blobs": 2, "blobs3": 3}
# Slow enough for a network to follow in steps of 1/2; the equation also somewhat outside, and in earnest near x*.
BEST = ZubovObjective(consistency=30.0, rate=1.0, n_rays=240, reach=0.25, floor=0.3)
BUDGET = Budget(steps=2500, batch_size=64)


@dataclass(frozen=True)
class Planar:
    """A run in the plane. The state is the point itself, or what a network of two hidden layers makes of it.

    Raises:
        TypeError, ValueError: a field out of its range; the message names it, its value and what was expected.
    """

    problem: Literal["moons", "rings", "blobs", "blobs3"] = "blobs"
    backbone: Literal["identity", "mlp"] = "identity"
    attention: Literal["full", "partial"] = "full"
    seed: int = 0
    samples: int = 512
    eps: float = 0.25
    field_width: int = 128
    n_steps: int = 6
    step_size: float = 0.5
    objective: ZubovObjective = BEST
    budget: Budget = BUDGET

    def __post_init__(self) -> None:
        for name, choices in (
            ("problem", tuple(PROBLEMS)),
            ("backbone", ("identity", "mlp")),
            ("attention", ("full", "partial")),
        ):
            _checks.choice(name, getattr(self, name), choices)
        _checks.count("samples", self.samples)

    def build(self) -> ZubovNet:
        """A freshly initialised network: one field for all times, so that it has regions of attraction."""
        torch.manual_seed(self.seed)
        backbone: nn.Module = nn.Identity()
        if self.backbone == "mlp":
            backbone = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        flow = DenseFlow(2, self.n_steps, self.step_size, width=self.field_width, shared_weights=True)
        partial = self.attention == "partial"
        lyapunov = ConvexLyapunov(2, PROBLEMS[self.problem], width=32, depth=3, partial=partial, eps=self.eps)
        angle = 2.0 * torch.pi * torch.arange(lyapunov.num_classes) / lyapunov.num_classes
        with torch.no_grad():  # apart from the start; they are learned from there on
            lyapunov.equilibria.copy_(1.5 * torch.stack([angle.cos(), angle.sin()], 1))
        return ZubovNet(backbone, flow, lyapunov)


@dataclass(frozen=True)
class Regions:
    """Prescribed and simulated regions on a grid of states, class by class: bool ``(K, side^2)``."""

    low: Tensor
    high: Tensor
    side: int
    prescribed: Tensor
    attracted: Tensor

    @property
    def overlaps(self) -> list[float]:
        """Intersection over union, of each class."""
        return [overlap(a, b) for a, b in zip(self.prescribed, self.attracted, strict=True)]

    @property
    def shared(self) -> float:
        """The share of the prescribed regions' union that lies in more than one of them."""
        count = self.prescribed.sum(0)
        return int((count > 1).sum()) / max(1, int((count > 0).sum()))


def data(problem: str, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points ``(samples, 2)`` with mean 0 and standard deviation 1, and their classes."""
    from sklearn import datasets

    _checks.choice("problem", problem, tuple(PROBLEMS))
    if problem == "moons":
        points, labels = datasets.make_moons(samples, noise=0.08, random_state=seed)
    elif problem == "rings":
        points, labels = datasets.make_circles(samples, noise=0.05, factor=0.4, random_state=seed)
    else:
        angles = 2.0 * np.pi * np.arange(PROBLEMS[problem]) / PROBLEMS[problem]
        centres = 3.0 * np.stack([np.cos(angles), np.sin(angles)], 1)
        points, labels = datasets.make_blobs(samples, centers=centres, cluster_std=0.7, random_state=seed)
    points = (points - points.mean(0)) / points.std()
    return torch.from_numpy(points).float(), torch.from_numpy(labels).long()


@torch.no_grad()
def regions(net: ZubovNet, points: Tensor, *, side: int = 101, step_size: float = 0.025) -> Regions:
    """Both kinds of regions of a network of states in the plane, over all boundaries and the ``points``' states.

    The simulation covers 40 units of time; ``step_size`` is its own: the region of attraction is that of ``dx/dt = f``.
    """
    generator = torch.Generator().manual_seed(0)
    boundary = sample_boundary(net.lyapunov, 256, generator=generator)
    around = torch.cat([boundary.flatten(0, 1), net.features(points)])
    low, high = around.amin(0), around.amax(0)
    low, high = low - 0.25 * (high - low), high + 0.25 * (high - low)
    grid = plane(low, high, side)
    equilibria = net.lyapunov.equilibria
    end = attracted_to(
        lambda x: net.vector_field(x[None])[0], grid, equilibria, step_size=step_size, n_steps=round(40.0 / step_size)
    )
    classes = torch.arange(len(equilibria))[:, None]
    return Regions(low, high, side, net.lyapunov(grid).T < 1.0, end == classes)
