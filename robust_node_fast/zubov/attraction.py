"""Regions of attraction by simulation, to hold the prescribed regions ``{V_k < 1}`` against."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from robust_node_fast import _checks

__all__ = ["Attraction", "attracted_to", "overlap", "plane"]

FIRST, LONGEST = 50.0, 400.0  # times at which labels are looked at: the first, doubled up to the longest


class Attraction(NamedTuple):
    """What a simulation found.

    ``nearest``: ``(M,)`` int64, which equilibrium states end at, or -1: another attractor, states on their way or gone
    (which may overflow). ``moving``: ``(M,)`` bool, not at rest anywhere, or gone. ``time``: how long it was simulated.
    """

    nearest: Tensor
    moving: Tensor
    time: float


@torch.no_grad()
def attracted_to(
    vector_field: Callable[[Tensor], Tensor],
    points: Tensor,
    equilibria: Tensor,
    *,
    step_size: float = 0.1,
    radius: float = 0.1,
) -> Attraction:
    """Which equilibrium the Euler states from each point end at.

    Simulated for 100 units of time, and twice and four times as long if that changed the answer, or may do so yet: a
    state is still moving, and closer to an equilibrium than it was.

    Args:
        vector_field: autonomous, ``(M, dim) -> (M, dim)``.
        points: ``(M, dim)``.
        equilibria: ``(K, dim)``.
        step_size: of forward Euler.
        radius: a state has converged if it ends no farther than this from an equilibrium, and its last step is shorter
            than ``1e-3 * radius * step_size``: it has come to rest there and does not pass by.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    for name, tensor in (("points", points), ("equilibria", equilibria)):
        _checks.tensor(name, tensor)
    if points.dim() != 2 or equilibria.dim() != 2 or points.shape[1] != equilibria.shape[1]:
        raise ValueError(
            f"points has shape {tuple(points.shape)} and equilibria {tuple(equilibria.shape)}, expected (M, dim) and "
            f"(K, dim)"
        )
    for name, number in (("step_size", step_size), ("radius", radius)):
        _checks.number(name, number)
        if number <= 0:
            raise ValueError(f"{name}={number!r} is not positive, expected a float > 0")
    state, time, known, was = points, 0.0, None, None
    while True:
        until, last = max(FIRST, 2.0 * time), state
        for _ in range(max(1, round((until - time) / step_size))):
            last, state = state, state + step_size * vector_field(state)
        time = until
        distance, nearest = torch.cdist(state, equilibria).min(1)
        at_rest = torch.linalg.vector_norm(state - last, dim=1) < 1e-3 * radius * step_size
        found = torch.where((distance <= radius) & at_rest, nearest, -1)  # a NaN is no smaller than anything
        if was is not None and known is not None:
            settled = torch.equal(known, found) and not bool((~at_rest & (distance < was)).any())
            if settled or time >= LONGEST:
                return Attraction(found, ~at_rest, time)
        known, was = found, distance


def overlap(first: Tensor, second: Tensor) -> float:
    """Intersection over union of two sets given as bool tensors; 1 if both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def plane(low: Tensor, high: Tensor, side: int) -> Tensor:
    """``side * side`` points of the rectangle from ``low`` to ``high``, both ``(2,)``, row by row: ``(side^2, 2)``."""
    ends = zip(low, high, strict=True)
    horizontal, vertical = (torch.linspace(float(a), float(b), side, dtype=low.dtype) for a, b in ends)
    return torch.stack(torch.meshgrid(horizontal, vertical, indexing="xy"), -1).view(-1, 2)
