"""In the plane: prescribed and simulated regions on a grid, of a network or of any other system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_node_fast.zubov.attraction import attracted_to, overlap, plane
from robust_node_fast.zubov.boundary import sample_boundary
from robust_node_fast.zubov.lyapunov import ConvexLyapunov
from robust_node_fast.zubov.network import ZubovNet

__all__ = ["Regions", "regions", "regions_of"]


@dataclass(frozen=True)
class Regions:
    """Prescribed and simulated regions on a grid over the rectangle from ``low`` to ``high``, both ``(2,)``.

    ``prescribed``, ``attracted``: bool ``(K, side^2)``; ``equilibria`` ``(K, 2)``; ``states`` ``(M, 2)`` of the data;
    ``time`` and ``moving`` ``(side^2,)`` as ``Attraction``.
    """

    low: Tensor
    high: Tensor
    side: int
    prescribed: Tensor
    attracted: Tensor
    equilibria: Tensor
    states: Tensor
    time: float
    moving: Tensor

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
    """``regions_of`` a network, over the states that its backbone makes of the ``points``.

    Raises:
        ValueError: the right-hand side changes from step to step: there is no f whose region it would be.
    """
    if not net.dynamics.shared_weights:
        raise ValueError("net.dynamics has weights of its own for every step, expected shared ones: dx/dt = f(x)")
    states = net.features(points)
    return regions_of(net.lyapunov, lambda x: net.vector_field(x[None])[0], states, side=side, step_size=step_size)


@torch.no_grad()
def regions_of(
    lyapunov: ConvexLyapunov,
    vector_field: Callable[[Tensor], Tensor],
    states: Tensor,
    *,
    side: int = 101,
    step_size: float = 0.025,
) -> Regions:
    """``{V_k < 1}`` and what ``dx/dt = f`` brings to ``x*_k``, over all boundaries, the states and a quarter more.

    Args:
        lyapunov: K functions in the plane.
        vector_field: autonomous f, ``(M, 2) -> (M, 2)``.
        states: ``(M, 2)``; none will do.
        side: points along each side of the grid.
        step_size: of the simulation.

    Raises:
        TypeError, ValueError: as ``sample_boundary`` and ``attracted_to``.
    """
    boundary = sample_boundary(lyapunov, 256, generator=torch.Generator().manual_seed(0))
    around = torch.cat([boundary.flatten(0, 1), states])
    low, high = around.amin(0), around.amax(0)
    low, high = low - 0.25 * (high - low), high + 0.25 * (high - low)
    grid, equilibria = plane(low, high, side), lyapunov.equilibria.detach()
    end = attracted_to(vector_field, grid, equilibria, step_size=step_size)
    attracted = end.nearest == torch.arange(len(equilibria))[:, None]
    return Regions(low, high, side, lyapunov(grid).T < 1.0, attracted, equilibria, states, end.time, end.moving)
