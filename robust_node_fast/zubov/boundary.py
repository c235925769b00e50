"""``sample_boundary``: points where ``V_k`` has a given level, along random rays from its equilibrium, all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust_node_fast import _checks
from robust_node_fast.zubov.errors import Degenerate
from robust_node_fast.zubov.lyapunov import Coefficients, ConvexLyapunov

__all__ = ["regions_that_meet", "sample_boundary"]

_TOLERANCE = 2.5e-13  # of V, relative to the level
_WRONG = 1e-3  # of V, relative to the level: a point that is no point of the boundary
_LARGEST = 2.0**20  # radius at which a ray is given up
_ITERATIONS = 60  # at the latest; five are usual


def sample_boundary(
    lyapunov: ConvexLyapunov, n_rays: int, *, level: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """``x* + r u`` with ``V_k(x* + r u) = level``, for random unit vectors ``u`` (uniform on the sphere).

    Along a ray from its equilibrium V is convex and grows from 0, so that there is one such point. All rays of all
    classes are searched together: Newton's iteration for ``log V`` against ``log r``, for which a power of ``r`` takes
    one step, within a bracket from tangents and chords, in float64.

    Args:
        lyapunov: K functions.
        n_rays: R, of each class.
        level: > 0; 1 is the boundary of the prescribed region of attraction.
        generator: of the directions; the default generator of the device when left out.

    Returns:
        ``(K, R, dim)`` with ``|V - level| <= 1e-6 level`` in float32, ``1e-12 level`` in float64, or as near as
        rounding of V and of the points allows; V has the coefficients that ``lyapunov`` computes in its own precision.
        Differentiable once (twice is an error), by torch.func.grad too, not under vmap: by the implicit function
        theorem ``dx = dx* - u dV / (grad V . u)``, dV at a fixed offset, in all parameters, learned equilibria too.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
        Degenerate: a ValueError; V or an equilibrium is not finite; V stays below the level up to a radius of ``2^20``
            along some ray (V as flat as that has collapsed); V is not within 0.1% of the level anywhere for rounding.

    Source: the name and the purpose are arXiv 2509.21879's (parallel boundary sampling); the method is ours.
    """
    if not isinstance(lyapunov, ConvexLyapunov):
        raise TypeError(f"lyapunov is a {type(lyapunov).__name__}, expected a ConvexLyapunov")
    _checks.count("n_rays", n_rays)
    _checks.number("level", level)
    if not bool(lyapunov.equilibria.isfinite().all()):
        raise Degenerate("the equilibria are not finite, expected finite states")
    if level <= 0:
        raise ValueError(f"level={level!r} is not positive, expected a float > 0")
    with torch.autocast(lyapunov.equilibria.device.type, enabled=False):
        offset = boundary_offsets(lyapunov, lyapunov.coefficients(), n_rays, level, generator)
        return lyapunov.equilibria[:, None] + offset


def boundary_offsets(
    lyapunov: ConvexLyapunov,
    coefficients: Coefficients,
    n_rays: int,
    level: float,
    generator: torch.Generator | None,
) -> Tensor:
    """``sample_boundary`` less the equilibria, for functions whose coefficients are at hand."""
    like = lyapunov.equilibria
    shape = (lyapunov.num_classes, n_rays, lyapunov.dim)
    direction = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    return _along(lyapunov, coefficients, _unit(direction)[0], level)


def facing_offsets(lyapunov: ConvexLyapunov, coefficients: Coefficients, others: Tensor, level: float) -> Tensor:
    """Boundary points ``(K, M, dim)`` of regions towards the equilibria of ``others`` ``(K, M)``, less their own."""
    direction, _ = _unit(lyapunov.equilibria[others] - lyapunov.equilibria[:, None])
    return _along(lyapunov, coefficients, direction, level)


def _along(lyapunov: ConvexLyapunov, coefficients: Coefficients, direction: Tensor, level: float) -> Tensor:
    """``r u`` with ``V_k(x* + r u) = level``, for unit vectors ``u`` ``(K, R, dim)``."""
    with torch.no_grad():
        radius, slope = (
            t.to(direction.dtype) for t in _radii(lyapunov, coefficients.double(), direction.double(), level)
        )
    if torch.is_grad_enabled():
        value = lyapunov.values(coefficients, radius.unsqueeze(-1) * direction)
        radius = _Radius.apply(value, radius, slope)
    return radius.unsqueeze(-1) * direction


class _Radius(torch.autograd.Function):
    """The radius itself; its derivative is ``-dV / slope``, dV at the point found. It knows nothing of second ones."""

    @staticmethod
    def forward(value: Tensor, radius: Tensor, slope: Tensor) -> Tensor:
        return radius.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        value, _, slope = inputs
        ctx.save_for_backward(value, slope)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        value, slope = ctx.saved_tensors
        return _Once.apply(-gradient / slope, value), None, None


class _Once(torch.autograd.Function):
    """A gradient that is not to be differentiated again, in whatever ``value`` depends on.

    ``once_differentiable`` does not say so where torch.autograd.grad is asked for the gradient of some tensors only.
    """

    @staticmethod
    def forward(gradient: Tensor, value: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise RuntimeError("boundary points of Lyapunov functions are differentiable once, not twice")


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """``(..., dim)`` as unit vectors and lengths ``(...)``; any direction will do for one without length."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    none = length == 0
    direction = torch.where(none, vectors.shape[-1] ** -0.5, vectors / length.masked_fill(none, 1.0))
    return direction, length.squeeze(-1)


@torch.no_grad()
def regions_that_meet(lyapunov: ConvexLyapunov, *, level: float = 1.0) -> Tensor:
    """Which regions ``{V_i < level}``, ``{V_j < level}`` share points of the segment from ``x*_i`` to ``x*_j``.

    Regions are convex, so each holds the part of the segment next to its equilibrium: they share some where the two
    parts are longer than the segment. Regions that do not may still meet beside it.

    Returns:
        ``(K, K)`` bool, symmetric, false on the diagonal.

    Raises:
        TypeError, ValueError: as ``sample_boundary``.
    """
    if not isinstance(lyapunov, ConvexLyapunov):
        raise TypeError(f"lyapunov is a {type(lyapunov).__name__}, expected a ConvexLyapunov")
    _checks.number("level", level)
    if level <= 0:
        raise ValueError(f"level={level!r} is not positive, expected a float > 0")
    centres = lyapunov.equilibria.double()
    direction, distance = _unit(centres - centres[:, None])  # those in one place meet at once
    radius, _ = _radii(lyapunov, lyapunov.coefficients().double(), direction, level)
    return (radius + radius.T > distance).fill_diagonal_(False)


def _radii(
    lyapunov: ConvexLyapunov, coefficients: Coefficients, direction: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """Radii ``(K, R)`` at which V has the level, and V's slopes along the rays there.

    In float64: the rounding of V in float32 alone is almost the tolerance.
    """
    eps = torch.finfo(direction.dtype).eps
    radius = direction.new_ones(direction.shape[:-1])
    low, high = torch.zeros_like(radius), torch.full_like(radius, _LARGEST)
    for left in reversed(range(_ITERATIONS)):
        value, slope = lyapunov.values_and_derivatives(coefficients, radius.unsqueeze(-1) * direction, direction)
        # V is convex and V(0) = 0: the chord through 0 bounds the root on one side, the tangent from above; and the
        # tangent is at least as steep as the chord, which rounding may have made less.
        chord = radius * (level / value)
        slope = torch.maximum(slope, value / radius)
        outside = value > level
        low = torch.maximum(low, torch.where(outside, chord, radius))
        high = torch.minimum(high, torch.where(outside, radius, chord))
        high = torch.maximum(torch.minimum(high, radius + (level - value) / slope), low)
        power = (radius * slope / value).clamp_min(1.0)
        guess = radius * (level / value) ** power.reciprocal()
        guess = torch.where(guess > low, torch.minimum(guess, high), (low * high).sqrt())
        off = (value - level).abs() > _TOLERANCE * level
        off &= (guess - radius).abs() > 2.0 * eps * radius  # else rounding is all that is left
        if left == 0 or not bool(off.any()):
            break
        radius = torch.where(off, guess, radius)
    _report(value, radius, level, lyapunov.equilibria.dtype)
    return radius, slope


def _report(value: Tensor, radius: Tensor, level: float, kind: torch.dtype) -> None:
    lost = ~(value.isfinite() & radius.isfinite())
    if bool(lost.any()):
        raise Degenerate(f"V is not finite along {_rays(lost)}, expected finite Lyapunov functions")
    flat = (value < (1.0 - _WRONG) * level) & (radius > 0.5 * _LARGEST)
    if bool(flat.any()):
        raise Degenerate(
            f"V stays below level={level!r} up to a radius of {_LARGEST:g} along {_rays(flat)}, expected functions "
            f"that reach it: they are nearly constant, or eps is too small"
        )
    lost = (value - level).abs() > _WRONG * level
    if bool(lost.any()):
        raise Degenerate(
            f"V cannot be told from its rounding where it should be level={level!r} along {_rays(lost)}, expected "
            f"functions whose parts do not cancel: their scale is too large for {kind}"
        )


def _rays(which: Tensor) -> str:
    classes = which.any(1).nonzero().flatten().tolist()
    return f"{int(which.sum())} of {which.numel()} rays (classes {', '.join(map(str, classes))})"
