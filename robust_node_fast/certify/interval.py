"""Bound E: each sample's own l_inf bound, carried through the network as a centre and a radius for every number.

The centre is the network's own trajectory ``z``; the radius ``R >= 0`` bounds ``|z' - z|`` for every input within eps.
One Euler step ``z + h s(W z + b)`` with centre taps ``m``: ``sR = |W| R`` bounds the change of ``u = W z + b``, so the
mean slope ``t`` between the two trajectories lies between ``s'(u - sR)`` and ``s'(u + sR)``, and

    z'_d - z_d at the next step = (1 + h t m_d) (z'_d - z_d) + h t (all other taps)
    R <- max over the two slopes t of |1 + h t m| R + |h| t (sR - |m| R)

(convex in t, so the ends suffice). The head: certified if for all ``j != y`` the margin of the centre exceeds
``sum_i |w_y - w_j|_i R_i``, which knows that all logits see the same perturbation.

Soundness of the arithmetic: everything is in float64, and bounds are sums of non-negative numbers, whose relative error
is at most the number of terms times 2^-53, layer by layer: below 1e-10 for sums of 10^4 terms in 100 layers. The final
comparison asks for more margin than the bound, by 1e-9 of the logits and of the bound.

Source: arXiv 2508.11432 for the network; the bound is this project's (interval bounds with a slope for each pixel).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast import _checks, reference
from robust_node_fast.certify import _network
from robust_node_fast.certify.lipschitz import lipschitz_radius
from robust_node_fast.nn import EulerConvFlow, PadChannels, SmoothLeakyReLU

__all__ = ["flow_radius", "linf_certified", "linf_radius", "worst_case_logits"]


SMALLEST, LARGEST = 1e-3, 1e6  # where the search for a radius starts, and where it ends at the latest


class Box(NamedTuple):
    """All tensors within ``radius`` of ``centre``, number by number."""

    centre: Tensor
    radius: Tensor


def _slope(u: Tensor, negative_slope: float) -> Tensor:
    return negative_slope + (1.0 - negative_slope) * torch.sigmoid(u)


def flow_radius(
    z: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    step_size: float,
    negative_slope: float = 0.1,
    n_steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``euler_conv_flow(z, ...)`` and a bound of ``|euler_conv_flow(z', ...) - euler_conv_flow(z, ...)|``.

    Args:
        z: ``(B, C, H, W)``.
        radius: ``(B, C, H, W)``, not negative: the bound holds for every ``z'`` with ``|z' - z| <= radius``.
        weight, bias, step_size, negative_slope, n_steps: as in ``functional.euler_conv_flow``.

    Returns:
        Both ``(B, C, H, W)``, differentiable: also a loss for certified training.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: derived for this project (bound E, see above).
    """
    _checks.flow(z, weight, bias, (4, 5), step_size, negative_slope)
    _checks.steps(weight, n_steps)
    banks = [weight] * int(n_steps or 0) if weight.dim() == 4 else list(weight)
    biases = [bias] * len(banks) if bias is None or bias.dim() == 1 else list(bias)
    for w, b in zip(banks, biases, strict=True):
        padding = w.shape[-1] // 2
        u = F.conv2d(z, w, b, padding=padding)
        change = F.conv2d(radius, w.abs(), padding=padding)
        m = w.diagonal()[padding, padding].view(-1, 1, 1)
        others = change - m.abs() * radius
        slopes = (_slope(u - change, negative_slope), _slope(u + change, negative_slope))
        grown = [(1.0 + step_size * t * m).abs() * radius + abs(step_size) * t * others for t in slopes]
        z = z + step_size * reference.smooth_leaky_relu(u, negative_slope)
        radius = torch.maximum(*grown)
    return z, radius


def _through(layer: nn.Module, box: Box) -> Box:
    z, radius = box
    if isinstance(layer, EulerConvFlow):
        n_steps = layer.n_steps if layer.weight.dim() == 4 else None
        return Box(
            *flow_radius(
                z,
                radius,
                layer.weight,
                layer.bias,
                step_size=layer.step_size,
                negative_slope=layer.negative_slope,
                n_steps=n_steps,
            )
        )
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            raise ValueError(f"a convolution pads with {layer.padding_mode!r}, expected 'zeros'")
        spread = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return Box(layer(z), spread)
    if isinstance(layer, nn.Linear):
        return Box(layer(z), F.linear(radius, layer.weight.abs()))
    if isinstance(layer, SmoothLeakyReLU | nn.ReLU):  # monotone, so the ends of the interval suffice
        centre = layer(z)
        return Box(centre, torch.maximum((layer(z + radius) - centre).abs(), (layer(z - radius) - centre).abs()))
    if isinstance(layer, nn.BatchNorm2d):
        assert layer.running_var is not None
        scale = (layer.running_var + layer.eps).rsqrt()
        scale = scale if layer.weight is None else scale * layer.weight.abs()
        return Box(layer(z), radius * scale.view(-1, 1, 1))
    if isinstance(layer, nn.AvgPool2d | nn.Flatten | nn.Identity | nn.Dropout | PadChannels):
        return Box(layer(z), layer(radius))  # linear, and none of its factors negative
    raise TypeError(f"no bound is known for the layer {type(layer).__name__}")


def _before_head(model: nn.Module, x: Tensor, eps: Tensor) -> tuple[Box, nn.Linear]:
    *body, head = _network.layers_of(model)
    assert isinstance(head, nn.Linear)
    box = Box(x, eps.view(-1, *(1,) * (x.dim() - 1)).expand_as(x))
    for layer in body:
        box = _through(layer, box)
    return box, head


def _margins(model: nn.Module, x: Tensor, y: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centre's margins, ``(B, K)`` and ``inf`` at the label; the most they can change; the centre's logits."""
    (z, radius), head = _before_head(model, x, eps)
    z, radius = z.flatten(1), radius.flatten(1)
    logits = head(z)
    # |w_y - w_j| for every pair of classes, applied to each sample's radius and its own label.
    pairs = (head.weight[:, None] - head.weight[None]).abs().flatten(0, 1)
    change = F.linear(radius, pairs).view(len(x), *(head.out_features,) * 2)[torch.arange(len(x), device=x.device), y]
    return _network.margins(logits, y), change, logits


def worst_case_logits(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Logits of the centre, each other class's raised by the largest change of its margin: ``(B, K)``.

    Cross-entropy of these is the loss of certified training: if the label's is the largest, the sample is certified.
    Differentiable, in the dtype of the model, in training mode too.

    Source: arXiv 1810.12715 (interval bound propagation) with bound E in place of plain intervals.
    """
    _, change, logits = _margins(model, x, y, torch.full((len(x),), float(eps), dtype=x.dtype, device=x.device))
    return logits + change  # zero at the label


def _certified(model: nn.Module, x: Tensor, y: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Which samples are; and the logits of the centre."""
    margins, change, logits = _margins(model, x, y, eps)
    slack = _network.ROUNDING * (1.0 + logits.abs().amax(1, keepdim=True) + change)
    return (margins - change > slack).all(1), logits


@torch.no_grad()
def linf_certified(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, batch_size: int = 256) -> Tensor:
    """Whether no perturbation of at most ``eps`` in any pixel changes the prediction ``y``: ``(B,)`` bool, by bound E.

    Args:
        model: a network of ``rnf.models``, an ``nn.Sequential``, or a module with ``layers()``; in eval mode.
        x: ``(B, ...)`` samples; perturbed ones may leave [0, 1].
        y: ``(B,)`` labels. A sample that is classified otherwise is not certified.
        eps: radius, not negative.
        batch_size: samples at a time.

    Raises:
        TypeError, ValueError: training mode, weights or samples that are not finite, labels out of range, a negative
            ``eps``, a layer without a bound, layers that do not compute what the model does.
    """
    _checks.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps={eps!r} is negative, expected a radius")
    model = _network.in_float64(model)
    x, y = _network.samples(model, x, y)
    found = []
    for part, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        radius = torch.full((len(part),), float(eps), dtype=torch.float64, device=x.device)
        certified, logits = _certified(model, part, labels, radius)
        if not found:
            _network.same_function(model, part, logits)
        found.append(certified)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)


def _largest(model: nn.Module, x: Tensor, y: Tensor, low: Tensor, tolerance: float) -> Tensor:
    """By doubling and bisection, from radii ``low`` that are certified already."""
    high = torch.where(low > 0, 2 * low, torch.full_like(low, SMALLEST))
    growing = torch.ones_like(y, dtype=torch.bool)
    while growing.any():
        growing &= _certified(model, x, y, high)[0] & (high < LARGEST)
        low, high = torch.where(growing, high, low), torch.where(growing, 2 * high, high)
    while (high - low > tolerance * high).any():
        middle = 0.5 * (low + high)
        inside, _ = _certified(model, x, y, middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return low


@torch.no_grad()
def linf_radius(model: nn.Module, x: Tensor, y: Tensor, *, tolerance: float = 1e-4, batch_size: int = 256) -> Tensor:
    """The largest ``eps`` that is certified, from below to ``tolerance``: ``(B,)`` float64, 0 if misclassified.

    By bisection on bound E, which grows with eps, up to 10^6; never less than the radius of the Lipschitz constants.

    Args, Raises: as ``linf_certified``.
    """
    lipschitz = lipschitz_radius(model, x, y, p="inf", batch_size=batch_size)
    model = _network.in_float64(model)
    x, y = _network.samples(model, x, y)
    found = []
    for part, labels, start in zip(*(t.split(batch_size) for t in (x, y, lipschitz)), strict=True):
        possible, logits = _certified(model, part, labels, torch.zeros_like(start))
        if not found:
            _network.same_function(model, part, logits)
        radius = torch.zeros_like(start)
        radius[possible] = _largest(model, part[possible], labels[possible], start[possible], tolerance)
        found.append(radius)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
