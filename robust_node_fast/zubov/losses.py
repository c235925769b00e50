"""The losses of Zubov-Net: consistency with Zubov's equation, classification, separation, and four of ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_node_fast import _checks
from robust_node_fast.zubov.boundary import boundary_offsets, facing_offsets
from robust_node_fast.zubov.errors import Degenerate
from robust_node_fast.zubov.lyapunov import Coefficients, ConvexLyapunov

__all__ = ["zubov_losses", "zubov_residual"]

VectorField = Callable[[Tensor], Tensor]
CONTAINED = 0.5  # of V: what first states are asked to stay below, well within the region
NEAR = (0.01, 0.1)  # shares of the way to the boundary, between which arrival looks
_ALIKE, _FEW = 1e-4, 8  # differences of V, relative to its size, that tell nothing apart; states that may be alike


def zubov_residual(value: Tensor, derivative: Tensor, *, rate: float) -> Tensor:
    """``dV/dt + rate V (1 - V)``, zero where Zubov's equation ``grad V . f = -psi (1 - V)`` holds for ``psi = rate V``.

    Its solution along a trajectory is ``V(t) = 1 / (1 + (1 / V(0) - 1) exp(rate t))``: what starts below 1 decays, what
    starts at 1 stays, and the time to shrink from ``v`` to ``w`` is ``(logit(v) - logit(w)) / rate``.

    Args:
        value: V, of any shape.
        derivative: dV/dt, of the same shape and dtype, per unit of time.
        rate: c of ``psi = c V``, per unit of time.

    Returns:
        Of that shape and dtype.

    Source: arXiv 2509.21879 for the equation; ``psi = c V`` is our reading.
    """
    return derivative + rate * value * (1.0 - value)


def zubov_losses(
    lyapunov: ConvexLyapunov,
    vector_field: VectorField,
    trajectory: Tensor,
    labels: Tensor,
    *,
    consistency: float = 1.0,
    classification: float = 1.0,
    separation: float = 1.0,
    spacing: float = 0.0,
    containment: float = 0.0,
    exclusion: float = 0.0,
    arrival: float = 0.0,
    rate: float = 4.0,
    temperature: float = 1.0,
    margin: float = 0.1,
    n_rays: int = 16,
    reach: float = 0.0,
    floor: float | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The losses of Zubov-Net, times their weights; the objective is their sum.

    The recipes (docs/training.md) have ``rate=1`` and ``reach=0.25`` in the place of these defaults.

    - ``consistency``: mean squares of ``zubov_residual`` of the own class's V, averaged over three kinds of points:
      those of the trajectory, points at a uniform share of the way to the boundary (or a little beyond, see ``reach``),
      and the boundary ``V = 1``; plus
      the mean of ``|f(x*)|^2``, as the equation says nothing at ``x*``, where its terms vanish whatever f is.
    - ``classification``: cross-entropy of the logits ``-V_k(x(T)) / temperature``.
    - ``separation``: mean of ``relu(1 + margin - V_j(x_b))`` over ordered pairs ``i != j`` and points ``x_b`` of the
      boundary of region i, on random rays. A region within another one is only seen from one side: hence both orders.
    - ``spacing``: the same mean over one point for each pair, where the boundary of region i meets the ray to ``x*_j``;
      at most ``n_rays`` pairs for each class. Where dimensions are many, random rays hardly ever point at another
      region, and separation does not see that regions meet.
    - ``containment``: mean of ``relu(V_y(x(0)) - 1/2)``. The cross-entropy is content with first states on the
      boundary, as long as the other V are larger; there the equation is content with states that stay there, and they
      do not come to rest at ``x*``.
    - ``exclusion``: mean over the batch of ``sum_{j != y} relu(1 + margin - V_j(x(0)))``: first states are to lie
      outside the other classes' regions, which spacing does not see where regions meet beside the segments between
      their equilibria.
    - ``arrival``: mean of ``((dV/dt + rate V (1 - V)) / V)^2`` of each class's V on random rays, close to ``x*``: at a
      uniform share of 1 to 10% of the way to the boundary, with ``f(x) - f(x*)`` in the place of ``f(x)``. Residuals
      are as small as V there, so that in many dimensions consistency leaves some directions in which ``x*`` repels:
      regions that hold for a while, and that all states leave in the end.

    Args:
        lyapunov: K functions; one will do for consistency, containment and arrival.
        vector_field: ``(N, M, dim) -> (N, M, dim)``: row n by the right-hand side of time step n. Points on rays are
            divided evenly among the steps.
        trajectory: ``(N + 1, B, dim)``, x(0) first.
        labels: ``(B,)`` int64. Classes may be missing from the batch: their regions take part all the same.
        consistency, classification, separation, spacing, containment, exclusion, arrival: weights >= 0; what has
            weight 0 is not computed, and is 0.
        rate: c of ``psi = c V``, per unit of time.
        temperature, margin: as above; > 0 and >= 0.
        n_rays: rays of each class, rounded up to a multiple of N.
        reach: the shares go up to ``1 + reach``, >= 0. A trajectory from outside may cross a boundary on whose inner
            side alone the equation holds: then more is attracted than is prescribed.
        floor: divide consistency's residuals by ``V + floor``, > 0, gradients and all. Near ``x*`` all terms of the
            equation are as small as V, and their squares say next to nothing about how fast states arrive. None: the
            equation as it is.
        generator: of rays and shares.

    Returns:
        Seven scalars. Differentiable once (twice is an error): exact gradients of these numbers, boundary points move
        with the parameters.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
        Degenerate: a ValueError; states or right-hand sides are not finite; V of 8 states or more of several classes
            is the same for all states, or for all classes (collapsed; with classification); V is not finite, or does
            not reach 1.

    Source: arXiv 2509.21879 for the first three; their equations are our reading, and the other four are ours.
    """
    weights = {
        "consistency": consistency,
        "classification": classification,
        "separation": separation,
        "spacing": spacing,
        "containment": containment,
        "exclusion": exclusion,
        "arrival": arrival,
    }
    for name, weight in weights.items():
        _checks.number(name, weight)
        if weight < 0:
            raise ValueError(f"{name}={weight!r} is negative, expected a weight >= 0")
    for name, number, least in (
        ("rate", rate, 0.0),
        ("temperature", temperature, 0.0),
        ("margin", margin, None),
        ("reach", reach, None),
    ):
        _checks.number(name, number)
        if number < 0 or number == least:
            raise ValueError(f"{name}={number!r} is too small, expected a float {'>=' if least is None else '>'} 0")
    if floor is not None:
        _checks.number("floor", floor)
        if floor <= 0:
            raise ValueError(f"floor={floor!r} is not positive, expected a float > 0 or None")
    _checks.count("n_rays", n_rays)
    if not callable(vector_field):
        raise TypeError(f"vector_field is a {type(vector_field).__name__}, expected a function of states")
    trajectory = _check_batch(lyapunov, trajectory, labels)
    if lyapunov.num_classes < 2 and (classification or separation or spacing or exclusion):
        raise ValueError(
            "lyapunov has one class, expected two or more, or classification=0, separation=0, spacing=0 and exclusion=0"
        )
    with torch.autocast(trajectory.device.type, enabled=False):
        coefficients = lyapunov.coefficients()
        losses = dict.fromkeys(weights, trajectory.new_zeros(()))
        if consistency or separation or arrival:
            steps = trajectory.shape[0] - 1
            n_rays = -(-n_rays // steps) * steps
            boundary = boundary_offsets(lyapunov, coefficients, n_rays, 1.0, generator)
        if consistency:
            found = _consistency(
                lyapunov, coefficients, vector_field, trajectory[:-1], labels, boundary, rate, reach, floor, generator
            )
            losses["consistency"] = consistency * found
        if classification:
            last = _finite(lyapunov.values(coefficients, lyapunov.offsets(trajectory[-1]))).T
            _check_collapse(last.detach(), labels)
            entropy = F.cross_entropy(-last / temperature, labels, reduction="sum") / max(1, len(labels))
            losses["classification"] = classification * entropy
        if separation:
            losses["separation"] = separation * _separation(lyapunov, coefficients, boundary, margin)
        if spacing:
            losses["spacing"] = spacing * _spacing(lyapunov, coefficients, n_rays, margin, generator)
        if containment or exclusion:
            first, own = _finite(lyapunov.values(coefficients, lyapunov.offsets(trajectory[0]))), labels[None]
            if containment:
                inside = (first.gather(0, own) - CONTAINED).relu().sum() / max(1, len(labels))
                losses["containment"] = containment * inside
            if exclusion:
                outside = (1.0 + margin - first).relu().scatter(0, own, 0.0).sum() / max(1, len(labels))
                losses["exclusion"] = exclusion * outside
        if arrival:
            losses["arrival"] = arrival * _arrival(
                lyapunov, coefficients, vector_field, boundary, steps, rate, generator
            )
    return losses


def _consistency(
    lyapunov: ConvexLyapunov,
    coefficients: Coefficients,
    vector_field: VectorField,
    states: Tensor,
    labels: Tensor,
    boundary: Tensor,
    rate: float,
    reach: float,
    floor: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    steps, batch, dim = states.shape
    k, n_rays = boundary.shape[:2]
    share = torch.rand((k, n_rays, 1), dtype=boundary.dtype, device=boundary.device, generator=generator)
    rays = torch.cat([(1.0 + reach) * share * boundary, boundary], 1)

    # One call of the vector field for everything: row n of `points` holds what belongs to time step n.
    on_rays = _by_step(lyapunov.equilibria[:, None] + rays, steps)
    points = torch.cat([states, on_rays, lyapunov.equilibria.expand(steps, -1, -1)], 1)
    along, across, residue = torch.split(_field(vector_field, points), [batch, on_rays.shape[1], k], 1)
    across = _by_ray(across, k)

    # Only the own class's V is asked for: samples are sorted into rows by class, the rest of a row stays empty.
    row = _place_in_class(labels, k)
    longest = int(row.max()) + 1 if batch else 0

    def by_class(x: Tensor) -> Tensor:
        empty = x.new_zeros(k, longest, steps, dim)
        return empty.index_put((labels, row), x.transpose(0, 1)).flatten(1, 2)

    offset = torch.cat([by_class(states - lyapunov.equilibria[labels]), rays], 1)
    tangent = torch.cat([by_class(along), across], 1)
    value, derivative = lyapunov.values_and_derivatives(coefficients, offset, tangent)
    residual = zubov_residual(_finite(value), derivative, rate=rate)
    square = (residual if floor is None else residual / (value + floor)).square()
    visited, around, edge = torch.split(square, [longest * steps, n_rays, n_rays], 1)
    own = visited.view(k, longest, steps)[labels, row]
    means = own.sum() / max(1, own.numel()) + around.mean() + edge.mean()
    return means / 3.0 + residue.square().sum(-1).mean()


def _separation(lyapunov: ConvexLyapunov, coefficients: Coefficients, boundary: Tensor, margin: float) -> Tensor:
    k, n_rays = boundary.shape[:2]
    points = (lyapunov.equilibria[:, None] + boundary).flatten(0, 1)
    value = lyapunov.values(coefficients, lyapunov.offsets(points)).view(k, k, n_rays)
    others = 1.0 - torch.eye(k, dtype=value.dtype, device=value.device)[..., None]
    return ((1.0 + margin - value).relu() * others).sum() / (k * (k - 1) * n_rays)


def _spacing(
    lyapunov: ConvexLyapunov, coefficients: Coefficients, n_rays: int, margin: float, generator: torch.Generator | None
) -> Tensor:
    # Region i towards the class s further on, for every shift s: of these each class is asked about as many.
    k, centre, device = lyapunov.num_classes, lyapunov.equilibria[:, None], lyapunov.equilibria.device
    shift = torch.arange(1, k, device=device)
    if k - 1 > n_rays:
        shift = shift[torch.randperm(k - 1, generator=generator, device=device)[:n_rays]]
    classes = torch.arange(k, device=device)[:, None]
    facing = centre + facing_offsets(lyapunov, coefficients, (classes + shift) % k, 1.0)
    from_others = facing.gather(0, ((classes - shift) % k)[..., None].expand_as(facing))
    value = lyapunov.values(coefficients, from_others - centre)
    return (1.0 + margin - value).relu().mean()


def _arrival(
    lyapunov: ConvexLyapunov,
    coefficients: Coefficients,
    vector_field: VectorField,
    boundary: Tensor,
    steps: int,
    rate: float,
    generator: torch.Generator | None,
) -> Tensor:
    k, n_rays = boundary.shape[:2]
    share = torch.rand((k, n_rays, 1), dtype=boundary.dtype, device=boundary.device, generator=generator)
    offset = (NEAR[0] + (NEAR[1] - NEAR[0]) * share) * boundary
    near = _by_step(lyapunov.equilibria[:, None] + offset, steps)
    points = torch.cat([near, lyapunov.equilibria.expand(steps, -1, -1)], 1)
    field, residue = torch.split(_field(vector_field, points), [near.shape[1], k], 1)
    relative = field - residue.repeat_interleave(near.shape[1] // k, 1)
    value, derivative = lyapunov.values_and_derivatives(coefficients, offset, _by_ray(relative, k))
    return (zubov_residual(_finite(value), derivative, rate=rate) / value).square().mean()


def _by_step(points: Tensor, steps: int) -> Tensor:
    """Points on rays, dealt out to the time steps one after the other: ``(K, R, dim) -> (N, K R / N, dim)``."""
    return torch.unflatten(points, 1, (points.shape[1] // steps, steps)).permute(2, 0, 1, 3).flatten(1, 2)


def _by_ray(field: Tensor, k: int) -> Tensor:
    """Inverse of ``_by_step``."""
    return torch.unflatten(field, 1, (k, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _place_in_class(labels: Tensor, k: int) -> Tensor:
    """How many samples before it have the same label, for each sample."""
    seen = F.one_hot(labels, k).cumsum(0)
    return seen.gather(1, labels[:, None]).squeeze(1) - 1


def _check_batch(lyapunov: object, trajectory: object, labels: object) -> Tensor:
    if not isinstance(lyapunov, ConvexLyapunov):
        raise TypeError(f"lyapunov is a {type(lyapunov).__name__}, expected a ConvexLyapunov")
    _checks.tensor("trajectory", trajectory)
    assert isinstance(trajectory, Tensor)
    states = lyapunov.checked("trajectory", trajectory, (None, None, lyapunov.dim), "(N + 1, B, dim)")
    if len(states) < 2:
        raise ValueError(f"trajectory has shape {tuple(states.shape)}, expected (N + 1, B, dim) with one step or more")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels!r:.60}, expected an int64 tensor")
    if labels.shape != states.shape[1:2]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(states.shape[1:2])} as trajectory")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < lyapunov.num_classes):
        raise ValueError(
            f"labels lies in [{int(labels.min())}, {int(labels.max())}], expected 0 to {lyapunov.num_classes - 1}"
        )
    if not bool(states.isfinite().all()):
        raise Degenerate("trajectory is not finite, expected finite states")
    return states


def _field(vector_field: VectorField, points: Tensor) -> Tensor:
    field = vector_field(points)
    if not isinstance(field, Tensor):
        raise TypeError(f"vector_field returned a {type(field).__name__}, expected a torch.Tensor")
    if field.shape != points.shape or field.dtype != points.dtype:
        raise ValueError(
            f"vector_field returned shape {tuple(field.shape)} and {field.dtype} for states of shape "
            f"{tuple(points.shape)} and {points.dtype}, expected the same"
        )
    if not bool(field.isfinite().all()):
        raise Degenerate("vector_field returned numbers that are not finite, expected a finite right-hand side")
    return field


def _finite(value: Tensor) -> Tensor:
    if not bool(value.isfinite().all()):
        raise Degenerate("V is not finite at a state of the batch or a point on a ray, expected finite numbers")
    return value


def _check_collapse(value: Tensor, labels: Tensor) -> None:
    """``(B, K)``. A few states may be those of one image."""
    if len(labels) < _FEW or bool((labels == labels[0]).all()):
        return
    relative = value - value.mean(1, keepdim=True)
    if bool(((relative - relative.mean(0)).abs() <= _ALIKE * value.abs().amax()).all()):
        raise Degenerate(
            "V is the same for all states of the batch, whose labels differ, or for all classes: backbone, flow or "
            "Lyapunov functions have collapsed"
        )
