"""Bound E: each sample's own l_inf bound, carried through the network as a centre and a radius for every number.

All that the network can compute for inputs within eps lies within the radius ``R >= 0`` of the centre ``z``, layer by
layer. The centre follows the network from the input on, but activations and flows move it to where the radius is small.

- The input: ``R = eps``.
- A convolution, a linear layer, ``u = W z + b``: ``|u' - u| = |W (z' - z)| <= |W| R``. Padding is a linear map whose
  entries are 0 and 1, a choice of pixels or zero, so the radius is padded as the centre is: with zeros, circular,
  reflect or replicate.
- BatchNorm in eval mode, where it is ``scale z + shift`` (input normalisation can be one): ``|scale| R``. Average
  pooling, padded channels, dropout in eval mode: linear without negative entries, ``A R``.
- Euler flows: ``functional.euler_conv_flow_bound``, whose docstring has the proof.
- An activation that does not fall: the ends of the interval, ``s(z - R)`` and ``s(z + R)``; the new centre is the
  middle, from where the ends are as near as they can be. (About ``s(z)`` the radius would be ``s(z + R) - s(z)`` for a
  convex s: up to twice as much.)
- The head: ``f_y - f_j`` changes by ``(w_y - w_j) (z' - z)``, at most ``|w_y - w_j| R``, which knows that all logits
  see the same perturbation. Certified if the centre's margin is larger for all ``j != y``.

Soundness of the arithmetic: flows, and a convolution with the activation behind it, cover the errors of their own: in
float32 where the weights are float32 numbers and the compiled library is there (csrc/cpu/interval.inc), else in float64
(``reference.bound_e``). All other layers are in float64. There a relative error ``g`` that none of a layer's sums
exceeds (twice 2^-53 for every term) is covered by entering with ``R + g |z|``, which a linear layer turns into ``|W| R
+ g |W| |z|``, at least what its sums lose, and by adding ``g (|z| + R)`` of the result; BatchNorm adds ``g`` of what it
shifts by. So what one layer loses is followed through the next ones like any other perturbation, and a certificate is
about the network in exact arithmetic with the weights as they are. The final comparison asks for more margin than the
bound, by 1e-9 of what the head adds up and of the bound.

Source: arXiv 2508.11432 for the network; the bound is this project's (interval bounds with a slope for each pixel).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast import _checks, functional, reference
from robust_node_fast.certify import _network
from robust_node_fast.certify.lipschitz import lipschitz_radius
from robust_node_fast.nn import EulerConvFlow, PadChannels, SmoothLeakyReLU

__all__ = ["linf_certified", "linf_radius", "worst_case_logits"]


SMALLEST, LARGEST = 1e-3, 1e6  # where the search for a radius starts, and where it ends at the latest
FINEST = 1e-12  # of radii, relative: numbers in float64 are not much closer together


class Box(NamedTuple):
    """All tensors within ``radius`` of ``centre``, number by number; one radius can serve all samples."""

    centre: Tensor
    radius: Tensor


class ActivatedConv(nn.Module):
    """A convolution with zero "same" padding and the activation behind it, as one layer."""

    def __init__(self, conv: nn.Conv2d, activation: SmoothLeakyReLU) -> None:
        super().__init__()
        self.weight, self.bias, self.negative_slope = conv.weight, conv.bias, activation.negative_slope

    @classmethod
    def of(cls, conv: nn.Module, activation: nn.Module) -> ActivatedConv | None:
        """``None`` where the two layers are no such thing."""
        if not isinstance(conv, nn.Conv2d) or not isinstance(activation, SmoothLeakyReLU):
            return None
        k = conv.kernel_size[0]
        plain = (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
        same = conv.kernel_size == (k, k) and k % 2 == 1 and conv.padding in ("same", (k // 2, k // 2))
        return cls(conv, activation) if plain and same else None


def _flow(layer: EulerConvFlow, box: Box) -> Box:
    z, radius = box
    bound = functional.euler_conv_flow_bound(
        z,
        radius.expand_as(z),
        layer.weight,
        layer.bias,
        step_size=layer.step_size,
        negative_slope=layer.negative_slope,
        n_steps=layer.n_steps if layer.shared_weights else None,
    )
    return Box(*bound)


def _activated_conv(layer: ActivatedConv, box: Box) -> Box:
    z, radius = box
    radius = radius.expand_as(z)
    bound = functional.activated_conv_bound(z, radius, layer.weight, layer.bias, negative_slope=layer.negative_slope)
    return Box(*bound)


def _convolution(layer: nn.Conv2d, box: Box) -> Box:
    z, radius = box
    padding: str | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros":
        radius = F.pad(radius, layer._reversed_padding_repeated_twice, layer.padding_mode)
        padding = (0, 0)
    spread = F.conv2d(radius, layer.weight.abs(), None, layer.stride, padding, layer.dilation, layer.groups)
    return Box(layer(z), spread)


def _activation(layer: SmoothLeakyReLU | nn.ReLU, box: Box) -> Box:
    z, radius = box
    slope = layer.negative_slope if isinstance(layer, SmoothLeakyReLU) else 0.0
    if slope < 0.0:
        return Box(layer(z), radius * max(1.0, -slope))  # it falls and rises: no slope is larger than these
    low, high = layer(z - radius), layer(z + radius)
    return Box(0.5 * (low + high), 0.5 * (high - low).clamp(min=0.0))  # computed, it may fall by a rounding error


def _batch_norm(layer: nn.BatchNorm2d, box: Box) -> Box:
    scale, _ = _network.normalisation_of(layer)
    return Box(layer(box.centre), box.radius * scale.view(-1, 1, 1))


def _through(layer: nn.Module, box: Box) -> Box:
    z, radius = box
    if isinstance(layer, EulerConvFlow):
        return _flow(layer, box)
    if isinstance(layer, ActivatedConv):
        return _activated_conv(layer, box)
    if isinstance(layer, nn.Conv2d):
        return _convolution(layer, box)
    if isinstance(layer, nn.Linear):
        return Box(layer(z), F.linear(radius, layer.weight.abs()))
    if isinstance(layer, SmoothLeakyReLU | nn.ReLU):
        return _activation(layer, box)
    if isinstance(layer, nn.BatchNorm2d):
        return _batch_norm(layer, box)
    if isinstance(layer, nn.Dropout) and layer.training:  # the same numbers are dropped in all of the box
        kept = layer(torch.ones_like(z))
        return Box(z * kept, radius * kept)
    if isinstance(layer, nn.AvgPool2d) and (layer.divisor_override or 1) < 0:
        raise ValueError(f"{layer} has a negative divisor, expected a positive one")
    if isinstance(layer, nn.AvgPool2d | nn.Flatten | nn.Identity | nn.Dropout | PadChannels):
        return Box(layer(z), layer(radius))  # linear, and none of its factors negative
    raise TypeError(f"no bound is known for the layer {type(layer).__name__}")


_MOVING = (nn.Flatten, nn.Identity, PadChannels)  # numbers, and computing nothing
_ROUNDING_OUTWARD = (EulerConvFlow, ActivatedConv)


def _behind(body: Sequence[nn.Module], x: Tensor, eps: Tensor, *, covered: bool) -> Box:
    """The box behind the layers; ``eps`` is one number for each sample, or one for all.

    ``covered``: it holds for the network in exact arithmetic (module docstring).
    """
    box = Box(x, eps.view(-1, *(1,) * (x.dim() - 1)).expand(-1, *x.shape[1:]))
    for layer in body:
        if isinstance(layer, _MOVING):
            box = _through(layer, box)
        elif isinstance(layer, _ROUNDING_OUTWARD):
            box = _through(layer, Box(*reference.round_outward(*box, layer.weight.dtype)))
        else:
            box = Box(*reference.round_outward(*box, x.dtype))
            box = _through_covered(layer, box) if covered else _through(layer, box)
    return box


def _through_covered(layer: nn.Module, box: Box) -> Box:
    """``_through`` with the errors that it makes in float64."""
    lost = _network.rounding_of(layer)
    centre, radius = _through(layer, Box(box.centre, box.radius + lost * box.centre.abs()))
    radius = radius + lost * (radius + centre.abs())
    if isinstance(layer, nn.BatchNorm2d):
        radius = radius + lost * _network.normalisation_of(layer)[1].view(-1, 1, 1)
    return Box(centre, radius)


def _margins(head: nn.Module, box: Box, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centre's margins, ``(B, K)`` and ``inf`` at the label; the most they can change; the centre's logits."""
    assert isinstance(head, nn.Linear)
    dtype = head.weight.dtype
    logits = head(box.centre.to(dtype))
    radius, change = box.radius.expand_as(box.centre), torch.zeros_like(logits)
    for label in torch.unique(y).tolist():
        of_label = y == label
        change[of_label] = F.linear(radius[of_label].to(dtype), (head.weight[label] - head.weight).abs())
    return _network.margins(logits, y), change, logits


def worst_case_logits(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Logits of the centre, each other class's raised by the largest change of its margin: ``(B, K)``.

    Cross-entropy of these is the loss of certified training: if the label's is the largest, the sample is certified.
    Differentiable, in the dtype of the model, in training mode too (BatchNorm alone has to be in eval mode).

    Raises:
        TypeError, ValueError: as ``linf_certified``, weights aside.

    Source: arXiv 1810.12715 (interval bound propagation) with bound E in place of plain intervals.
    """
    _check_eps(eps)
    x, y = _network.samples(model, x, y)
    *body, head = _network.layers_of(model)
    box = _behind(body, x, x.new_full((1,), float(eps)), covered=False)
    _, change, logits = _margins(head, box, y)
    return logits + change  # zero at the label


def _check_eps(eps: float) -> None:
    _checks.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps={eps!r} is negative, expected a radius")


def _deployed(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The layers in float64, in float32 where that holds their weights and the kernels round outward.

    They are compared with the model on ``x``.
    """
    double = _network.in_float64(model)
    layers = _network.layers_of(double)
    _network.same_function(double, layers, x)
    found: list[nn.Module] = []
    for layer in layers:
        together = ActivatedConv.of(found[-1], layer) if found else None
        found[-1 if together else len(found) :] = [together or layer]
    return [_narrowed(layer) if isinstance(layer, _ROUNDING_OUTWARD) else layer for layer in found]


def _narrowed(layer: nn.Module) -> nn.Module:
    narrow = copy.deepcopy(layer).float()
    exact = all(torch.equal(a.double(), b) for a, b in zip(narrow.parameters(), layer.parameters(), strict=True))
    return narrow if exact else layer


def _certified(layers: list[nn.Module], x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
    *body, head = layers
    box = _behind(body, x.double(), eps, covered=True)
    margins, change, _ = _margins(head, box, y)
    slack = _network.ROUNDING * (_network.summed_in(head, box.centre) + change)
    return (margins - change > slack).all(1)


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
    _check_eps(eps)
    layers = _deployed(model, _network.samples(model, x, y)[0])
    radius = torch.full((1,), float(eps), dtype=torch.float64, device=x.device)
    found = [
        _certified(layers, part, labels, radius)
        for part, labels in zip(torch.split(x, batch_size), torch.split(y.long(), batch_size), strict=True)
        if len(part)
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool, device=x.device)


def _largest(layers: list[nn.Module], x: Tensor, y: Tensor, low: Tensor, tolerance: float) -> Tensor:
    """By doubling and bisection, from radii ``low`` that are certified already."""
    high = torch.where(low > 0, 2 * low, torch.full_like(low, SMALLEST))
    growing = torch.ones_like(y, dtype=torch.bool)
    while growing.any():
        growing &= _certified(layers, x, y, high) & (high < LARGEST)
        low, high = torch.where(growing, high, low), torch.where(growing, 2 * high, high)
    while (high - low > tolerance * high).any():
        middle = 0.5 * (low + high)
        inside = _certified(layers, x, y, middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return low


@torch.no_grad()
def linf_radius(model: nn.Module, x: Tensor, y: Tensor, *, tolerance: float = 1e-4, batch_size: int = 256) -> Tensor:
    """The ``eps`` up to which bisection certifies, to ``tolerance``: ``(B,)`` float64, 0 if misclassified.

    By doubling and bisection on bound E, up to 10^6 and to 1e-12 at the finest; never less than the radius of the
    Lipschitz constants.
    Every radius that is returned was certified itself: that does not rest on the search.

    Args, Raises: as ``linf_certified``; ``tolerance`` not above 0.
    """
    _checks.number("tolerance", tolerance)
    if tolerance <= 0:
        raise ValueError(f"tolerance={tolerance!r} is too small, expected a relative tolerance above 0")
    lipschitz = lipschitz_radius(model, x, y, p="inf", batch_size=batch_size)
    layers, y = _deployed(model, x), y.long()
    found = []
    for part, labels, start in zip(*(torch.split(t, batch_size) for t in (x, y, lipschitz)), strict=True):
        if not len(part):
            continue
        possible = _certified(layers, part, labels, torch.zeros_like(start))
        radius = torch.zeros_like(start)
        if possible.any():
            finest = max(tolerance, FINEST)
            radius[possible] = _largest(layers, part[possible], labels[possible], start[possible], finest)
        found.append(radius)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device=x.device)
