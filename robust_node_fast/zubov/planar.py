"""Zubov-Nets in the plane: their prescribed and simulated regions on a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_node_fast.zubov.attraction import attracted_to, overlap, plane
from robust_node_fast.zubov.boundary import sample_boundary
from robust_node_fast.zubov.network import ZubovNet

__all__ = ["Regions", "regions"]


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


@torch.no_grad()
def regions(net: ZubovNet, points: Tensor, *, side: int = 101, step_size: float = 0.025) -> Regions:
    """Both kinds of regions of a network of states in the plane, over all boundaries and the ``points``' states.

    The simulation covers 40 units of time; ``step_size`` is its own: the region of attraction is that of ``dx/dt = f``.

    Raises:
        ValueError: the right-hand side changes from step to step: there is no f whose region it would be.
    """
    if not net.dynamics.shared_weights:
        raise ValueError("net.dynamics has weights of its own for every step, expected shared ones: dx/dt = f(x)")
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
