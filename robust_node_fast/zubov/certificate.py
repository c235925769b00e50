"""A certificate on the Lyapunov margin: how far an input can move before another V can be the smallest.

Backbone and flow move the last state by at most ``L_phi r`` when the input moves by ``r`` (``certify.layer_bounds``,
and the same kind of bound for a ``DenseFlow``). Within a ball of radius ``rho`` around ``x(T)`` the gradient of
``V_j - V_y`` lies in a box, so that its dual norm is at most some ``L_jy(rho)``. If ``L_phi r <= rho`` and
``L_jy(rho) L_phi r < V_j - V_y`` for all j, the prediction stays. ``rho`` is found by bisection: every rho gives a
valid radius. The simple margin, ``(min_j V_j - V_y) / (2 L L_phi)``, is this with ``2 L`` in the place of
``L_jy``; in a small ball ``L_jy`` is the length of the margin's own gradient, at most ``L_j + L_y``.

The box: ``B_l (x - x*)`` moves by at most ``rho ||B_row||_q``, and attention, not negative, carries intervals; softplus
and its slope grow with the pre-activation, so that their ends are the ends'. The gradient of ``p.z_L`` is
``sum_l B_l' v_l`` with ``v_l = slope_l * (P_l' v_{l+1})``, not negative, carried in the same way. The quadratic terms'
gradients differ by ``2 eps (x*_y - x*_j)``, whatever the state.

The l_inf radius is the larger of that of the infinity norm and ``n^(-1/2)`` times that of the 2-norm, whose constants
are much smaller (``certify.spectral``).

Everything is in float64. How far ``x(T)`` can be from that of exact arithmetic is followed through the layers
(``certify.lipschitz.followed``) and taken off the radius; what cannot be told from rounding in V and its gradient, 1e-9
of what they add up, is taken off the margin and added to the box. The certificate is about the network in exact
arithmetic: in float32 a label may change earlier, within the rounding of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_node_fast import _checks, reference
from robust_node_fast.certify import _network, lipschitz, spectral
from robust_node_fast.nn import EulerConvFlow
from robust_node_fast.zubov.lyapunov import Coefficients, ConvexLyapunov
from robust_node_fast.zubov.network import DenseFlow, ZubovNet
from robust_node_fast.zubov.softplus import softplus_increment

__all__ = ["margin_certified", "margin_radius"]

_BISECTIONS = 30
_DOWN = 1.0 - _network.ROUNDING


@torch.no_grad()
def margin_radius(net: ZubovNet, x: Tensor, y: Tensor, *, p: str = "inf", batch_size: int = 64) -> Tensor:
    """Radius in the p-norm of the input within which ``V_y`` provably stays the smallest: ``(B,)`` float64.

    Args:
        net: in eval mode; its backbone made of layers that ``certify`` has a Lipschitz bound for.
        x: inputs ``(B, ...)``, float32 or float64.
        y: labels ``(B,)``.
        p: ``"inf"``, ``"1"`` or ``"2"``.
        batch_size: samples at a time.

    Returns:
        0 where the prediction is not y; inf where nothing can change it.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected; a layer without a bound; a subclass
            or a hook anywhere, which may compute something else.

    Source: arXiv 2509.21879 v2 has a certified margin; this bound is ours (module docstring).
    """
    # No subclasses: they may compute something else.
    if type(net) is not ZubovNet:
        raise TypeError(f"net is a {type(net).__name__}, expected a ZubovNet")
    if type(net.lyapunov) is not ConvexLyapunov:
        raise TypeError(f"net.lyapunov is a {type(net.lyapunov).__name__}, expected a ConvexLyapunov")
    if type(net.dynamics) not in (DenseFlow, EulerConvFlow):
        raise TypeError(f"net.dynamics is a {type(net.dynamics).__name__}, expected a DenseFlow or an EulerConvFlow")
    _checks.choice("p", p, _checks.DUALS)
    _checks.count("batch_size", batch_size)
    net = _network.in_float64(net)  # type: ignore[assignment]
    _check_samples(net, x, y)
    _network.same_function(net.backbone, _network.flattened(net.backbone), x)
    _same_logits(net, x)
    if not len(x):
        return torch.zeros(0, dtype=torch.float64, device=x.device)
    found = _radius(net, x, y, p, batch_size)
    if p == "inf":  # the ball of the 2-norm around this one
        found = torch.maximum(found, _radius(net, x, y, "2", batch_size) / math.sqrt(x[0].numel()) * _DOWN)
    return found


def _radius(net: ZubovNet, x: Tensor, y: Tensor, p: str, batch_size: int) -> Tensor:
    layers = [*_network.flattened(net.backbone), net.dynamics]
    bounds = [_bounds(layer) for layer in layers]
    constant = lipschitz_constant(net, p)
    found = []
    for part, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        state = part.to(torch.float64, copy=True)  # layers may work in place
        lost = torch.zeros(len(part), 1, dtype=torch.float64, device=part.device)
        for layer, of_layer in zip(layers, bounds, strict=True):
            follow = _followed_dense if isinstance(layer, DenseFlow) else lipschitz.followed
            state, lost = follow(layer, of_layer, state, lost, p)  # type: ignore[arg-type]
        radius = _state_radius(net.lyapunov, state.flatten(1), labels.long(), p) * _DOWN - lost.squeeze(1)
        found.append(torch.where(radius > 0, radius / constant * _DOWN, 0.0))
    return torch.cat(found)


def margin_certified(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """``margin_radius(net, x, y) > eps``, ``(B,)`` bool: no l_inf perturbation of that size changes the label.

    Raises:
        TypeError, ValueError: as ``margin_radius``; a negative ``eps``.
    """
    _checks.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps={eps!r} is negative, expected a radius")
    return margin_radius(net, x, y) > eps  # type: ignore[arg-type]


def lipschitz_constant(net: ZubovNet, p: str) -> float:
    """Of ``x(T)`` as a function of the input, in the p-norm; ``net`` in float64."""
    layers = (*_network.flattened(net.backbone), net.dynamics)
    return math.prod(bound.of(p) for layer in layers for bound in _bounds(layer))


def _bounds(layer: nn.Module) -> list[lipschitz.LayerBound]:
    return _dense_bounds(layer) if type(layer) is DenseFlow else lipschitz._bound(layer)


def _dense_bounds(flow: DenseFlow) -> list[lipschitz.LayerBound]:
    """Of ``I + h W2 D W1`` for any diagonal D with entries in ``1/2 +- 1/2``, the slopes of tanh.

    Row and column sums of ``|I + h/2 W2 W1| + |h|/2 |W2| |W1|``; in the 2-norm also ``||I + h/2 W2 W1|| + |h|/2 ||W2||
    ||W1||``.
    """
    middle = 0.5 * flow.step_size * (flow.weight2 @ flow.weight1)
    middle = middle + torch.eye(flow.dim, dtype=middle.dtype, device=middle.device)
    half = 0.5 * abs(flow.step_size)
    most = middle.abs() + half * (flow.weight2.abs() @ flow.weight1.abs())
    norm = spectral.matrix_norm
    two = norm(middle) + half * norm(flow.weight2) * norm(flow.weight1)
    each = zip(most.sum(2).amax(1).tolist(), most.sum(1).amax(1).tolist(), two.tolist(), strict=True)
    bounds = [lipschitz.LayerBound.of_sums("DenseFlow step", *step) for step in each]
    return bounds * (flow.n_steps // len(bounds))


def _followed_dense(
    flow: DenseFlow, bounds: Sequence[lipschitz.LayerBound], state: Tensor, lost: Tensor, p: str
) -> tuple[Tensor, Tensor]:
    """As ``lipschitz.followed``."""
    states = flow(state, return_trajectory=True)
    rounding = reference.rounding_of_sums(max(flow.dim, flow.width))
    scale = {"inf": 1.0, "1": float(flow.dim), "2": math.sqrt(flow.dim)}[p]
    rows1, rows2 = (weight.abs().sum(2).amax(1) for weight in (flow.weight1, flow.weight2))
    bias1, bias2 = flow.bias1.abs().amax(1), flow.bias2.abs().amax(1)
    for k, bound in enumerate(bounds):
        n, largest = 0 if flow.shared_weights else k, states[k].abs().amax(1, keepdim=True)
        hidden = 1.0 + rows1[n] * largest + bias1[n]  # the error of what tanh is of, and of its own
        added = 1.0 + largest + abs(flow.step_size) * (rows2[n] * hidden + bias2[n])
        lost = lost * bound.of(p) + rounding * scale * added
    return states[-1], lost


def _state_radius(lyapunov: ConvexLyapunov, state: Tensor, y: Tensor, p: str) -> Tensor:
    """The same for the last state: how far it can move, ``(B,)``."""
    coefficients = lyapunov.coefficients()
    offset = lyapunov.offsets(state)
    value = lyapunov.values(coefficients, offset).T
    lost = _network.ROUNDING * _summands(lyapunov, coefficients, state)
    margin = value - value.gather(1, y[:, None]) - lost - lost.gather(1, y[:, None])
    margin = margin.scatter(1, y[:, None], torch.inf)

    def reach(rho: Tensor) -> Tensor:
        """How far the margins last if gradients are those within rho; falls with rho."""
        slope = _pair_slopes(lyapunov, coefficients, offset, rho, y, p)
        return (margin.clamp_min(0.0) / slope.scatter(1, y[:, None], 1.0)).amin(1)

    low, high = torch.zeros_like(margin[:, 0]), reach(torch.zeros_like(margin[:, 0]))
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        kept = reach(middle) >= middle
        low, high = torch.where(kept, middle, low), torch.where(kept, high, middle)
    return torch.where(margin.amin(1) > 0, low, 0.0)


def _summands(lyapunov: ConvexLyapunov, coefficients: Coefficients, state: Tensor) -> Tensor:
    """At least what ``V_k`` adds up, in magnitude: ``(B, K)``."""
    weight, attention, readout, _, gradient = coefficients
    size = state.abs() + lyapunov.equilibria[:, None].abs()  # (K, B, dim): of what offsets come from
    drive = torch.unflatten(weight.abs() @ size.mT, 1, (lyapunov.depth, lyapunov.width)).amax(2)
    largest = drive[:, 0]
    for mixing, further in zip(attention, drive.unbind(1)[1:], strict=True):
        largest = mixing.sum(-1).amax(-1, keepdim=True) * largest + further
    linear = (size @ gradient.abs()).squeeze(-1)
    return (1.0 + largest * readout.sum((1, 2))[:, None] + linear + lyapunov.eps * size.square().sum(-1)).T


def _same_logits(net: ZubovNet, x: Tensor) -> None:
    """That ``net`` computes what is certified, for the first samples of ``x``."""
    few = x[:32].to(torch.float64, copy=True)
    if len(few):
        value = net.lyapunov.values(
            net.lyapunov.coefficients(), net.lyapunov.offsets(net.dynamics(net.backbone(few)).flatten(1))
        )
        expected = -value.T / net.temperature
        found = net(x[:32].to(torch.float64, copy=True))
        if not torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * (1.0 + expected.abs().max().item())):
            raise ValueError("net does not compute -V(dynamics(backbone(x))) / temperature: no certificate is possible")


def _pair_slopes(
    lyapunov: ConvexLyapunov, coefficients: Coefficients, offset: Tensor, rho: Tensor, y: Tensor, p: str
) -> Tensor:
    """Upper bound of the dual norm of ``grad (V_j - V_y)`` within rho of the states: ``(B, K)``."""
    dual = {"inf": 1.0, "1": torch.inf, "2": 2.0}[p]
    low, high = _gradient_box(lyapunov, coefficients, offset, rho, dual)
    own = y.view(1, -1, 1).expand(1, -1, lyapunov.dim)
    shift = 2.0 * lyapunov.eps * (lyapunov.equilibria[y] - lyapunov.equilibria[:, None])
    least, most = low - high.gather(0, own) + shift, high - low.gather(0, own) + shift
    return torch.linalg.vector_norm(torch.maximum(most.abs(), least.abs()), dual, dim=-1).T


def _gradient_box(
    lyapunov: ConvexLyapunov, coefficients: Coefficients, offset: Tensor, rho: Tensor, dual: float
) -> tuple[Tensor, Tensor]:
    """Where ``grad V - 2 eps (x - x*)`` lies within rho of the states, number by number: ``(K, B, dim)`` twice."""
    weight, attention, readout, anchor, gradient = coefficients
    layers = lyapunov.depth, lyapunov.width
    drive = torch.unflatten(weight @ offset.mT, 1, layers)
    spread = torch.unflatten(torch.linalg.vector_norm(weight, dual, dim=2)[..., None] * rho, 1, layers)
    ends = []
    for first in (drive - spread, drive + spread):
        delta, slopes = first[:, 0], []
        for i in range(lyapunov.depth):
            if i:
                delta = attention[i - 1] @ softplus_increment(delta, anchor[i - 1]) + first[:, i]
            slopes.append(torch.sigmoid(anchor[i] + delta))
        through = [slopes[-1] * readout.mT]
        for i in range(lyapunov.depth - 2, -1, -1):
            through.append(slopes[i] * (attention[i].mT @ through[-1]))
        ends.append(torch.cat(through[::-1], 1))
    rising, falling = weight.clamp_min(0.0).mT, weight.clamp_max(0.0).mT
    lost = _network.ROUNDING * (weight.abs().mT @ ends[1] + gradient.abs())
    low = rising @ ends[0] + falling @ ends[1] - gradient - lost
    high = rising @ ends[1] + falling @ ends[0] - gradient + lost
    return low.mT, high.mT


def _check_samples(net: nn.Module, x: object, y: object) -> None:
    _checks.tensor("x", x)
    assert isinstance(net, ZubovNet)
    assert isinstance(x, Tensor)
    if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"y is {y!r:.60}, expected an integer tensor of labels")
    if y.dim() != 1 or x.dim() < 2 or len(y) != len(x):
        raise ValueError(
            f"y has shape {tuple(y.shape)}, x {tuple(x.shape)}, expected (B,) and (B, ...): one label for each sample"
        )
    if not bool(x.isfinite().all()):
        raise ValueError("x is not finite, expected finite samples")
    k = net.lyapunov.num_classes
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < k):
        raise ValueError(f"y lies in [{int(y.min())}, {int(y.max())}], expected labels from 0 to {k - 1}")
