"""How far softplus rises from a fixed point: the one element-wise function of the Lyapunov networks."""

from __future__ import annotations

from torch import Tensor

from robust_node_fast import _ops, functional, reference


def softplus_increment(delta: Tensor, anchor: Tensor) -> Tensor:
    """``softplus(anchor + delta) - softplus(anchor)`` without cancellation; exactly 0 at ``delta = 0``.

    Args:
        delta: ``(K, W, N)``, float32 or float64.
        anchor: ``(K, W, 1)``.

    Returns:
        ``(K, W, N)``, contiguous. The error is a few units in the last place of ``delta``; where the reference runs,
        beyond log(2) of ``|delta| + |anchor|``. Finite wherever ``delta`` and ``anchor + delta`` are.

    Source: this project's. For ``|delta| <= log(2)`` it is ``log1p(sigmoid(anchor) expm1(delta))``; from there on two
    softplus are subtracted.
    """
    if functional._transformed():
        return reference.softplus_increment(delta, anchor)
    return _ops.softplus_increment(delta, anchor)


def softplus_increment_and_tangent(both: Tensor, anchor: Tensor) -> Tensor:
    """``softplus_increment(delta)`` and its directional derivative ``sigmoid(anchor + delta) * tangent``, side by side.

    Args:
        both: ``(K, W, 2 N)``, ``delta`` and then ``tangent``.
        anchor: ``(K, W, 1)``.

    Returns:
        ``(K, W, 2 N)``, contiguous.
    """
    if functional._transformed():
        return reference.softplus_increment_and_tangent(both, anchor)
    return _ops.softplus_increment_and_tangent(both, anchor)
