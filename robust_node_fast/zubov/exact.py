"""The system of the specification that is solved in closed form: its regions are the unit disc, its V is ``|x|^2``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robust_node_fast.zubov.lyapunov import ConvexLyapunov

__all__ = ["RATE", "decay_error", "field", "lyapunov"]

RATE = 2.0


def field(x: Tensor) -> Tensor:
    """``f(x) = -x (1 - |x|^2)``, ``(..., 2)``: states in the unit disc end at 0, those outside run away."""
    return -x * (1.0 - x.square().sum(-1, keepdim=True))


def lyapunov() -> ConvexLyapunov:
    """``V(x) = |x|^2``, which solves ``grad V . f = -RATE V (1 - V)``: one class, float64, no convex network."""
    found = ConvexLyapunov(2, 1, width=4, depth=2, eps=1.0, equilibria=torch.zeros(1, 2), dtype=torch.float64)
    nn.init.zeros_(found.input_weight)
    return found.requires_grad_(False)


@torch.no_grad()
def decay_error(value: ConvexLyapunov, *, time: float = 3.0, n_steps: int = 300) -> float:
    """The largest ``|V(x(t)) - 1 / (1 + (1 / V(x(0)) - 1) exp(RATE t))|``, of states by Runge-Kutta's method.

    Args:
        value: one function.
        time, n_steps: of the trajectories, which start at three states in the disc.
    """
    x, h = torch.tensor([[0.3, 0.1], [0.6, -0.7], [0.0, 0.99]], dtype=torch.float64), time / n_steps
    start, largest = value(x)[:, 0], 0.0
    for n in range(1, n_steps + 1):
        k1 = field(x)
        k2 = field(x + h / 2 * k1)
        k3 = field(x + h / 2 * k2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + h * k3))
        expected = 1.0 / (1.0 + (1.0 / start - 1.0) * math.exp(RATE * n * h))
        largest = max(largest, float((value(x)[:, 0] - expected).abs().max()))
    return largest
