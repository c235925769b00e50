"""``value_and_derivative``: all Lyapunov functions and their derivatives in time, in one forward-mode pass."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_node_fast.zubov.lyapunov import ConvexLyapunov

__all__ = ["value_and_derivative"]


def value_and_derivative(lyapunov: ConvexLyapunov, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.func.jvp(lyapunov, (x,), (dx,))``: ``V_k(x)`` and ``grad V_k(x).dx`` of all classes.

    Args:
        lyapunov: K functions.
        x: states ``(B, dim)``.
        dx: ``(B, dim)``, what the states change by: the right-hand side ``f(x)`` gives ``dV/dt``.

    Returns:
        Two ``(B, K)``, differentiable in the parameters, ``x`` and ``dx``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: forward-mode differentiation; ``torch.func.jvp`` and K backward passes are this function's test oracles.
    """
    if not isinstance(lyapunov, ConvexLyapunov):
        raise TypeError(f"lyapunov is a {type(lyapunov).__name__}, expected a ConvexLyapunov")
    x = lyapunov.checked("x", x, (None, lyapunov.dim), "(B, dim)")
    dx = lyapunov.checked("dx", dx, (x.shape[0], lyapunov.dim), "(B, dim) as x")
    with torch.autocast(x.device.type, enabled=False):
        value, derivative = lyapunov.values_and_derivatives(lyapunov.coefficients(), lyapunov.offsets(x), dx)
    return value.T, derivative.T
