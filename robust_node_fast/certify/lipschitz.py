"""Bounds A, B, C: Lipschitz constants of every layer in a p-norm, their product, and the radius it certifies.

Per Euler step ``rnf.functional.euler_lipschitz_bound``; convolutions by the row sums ``max_o sum |W[o]|`` (p = inf) and
column sums ``max_c sum |W[:, c]|`` (p = 1) of their filters; p = 2 by ``||M||_2 <= sqrt(||M||_1 ||M||_inf)`` or by
``spectral``, whichever is less: of an Euler step ``||I + h c W|| + |h| d ||W||``, where the activation has slopes
``c +- d``. A row of the operator has the entries of a filter, some added up where padding repeats pixels, some missing:
row sums bound the operator's under any padding. A column has each entry at most once under zero padding, and under
circular padding that adds no more than a filter takes away; otherwise there is no bound for p = 1 and 2.

Radius in norm p with the head's rows ``w`` and q dual to p:

    min over j != y of (f_y - f_j) / (||w_y - w_j||_q L)      L = product of all layers before the head

less what float64 may have lost on the way to ``f``: layer by layer at most ``_network.rounding_of`` times what it adds
up, which the layers behind it enlarge like any other change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robust_node_fast import _checks, functional
from robust_node_fast.certify import _network, spectral
from robust_node_fast.nn import EulerConvFlow, PadChannels, SmoothLeakyReLU

__all__ = ["l2_radius", "layer_bounds", "lipschitz_radius"]


class LayerBound(NamedTuple):
    """A layer's name, and its Lipschitz constants in the infinity norm, the 1-norm and the 2-norm."""

    layer: str
    inf: float
    one: float
    two: float

    @classmethod
    def of_sums(cls, layer: str, inf: float, one: float, two: float = math.inf) -> LayerBound:
        """With the geometric mean of the first two as a bound of the third."""
        return cls(layer, inf, one, min(two, (inf * one) ** 0.5))

    def of(self, p: str) -> float:
        return {"inf": self.inf, "1": self.one, "2": self.two}[p]


def _bound(layer: nn.Module, *, spectral_norms: bool = True) -> list[LayerBound]:
    """Of the layer, or of each of its Euler steps; without spectral norms, the dearest part, ``two`` is the mean."""
    name = type(layer).__name__
    if isinstance(layer, EulerConvFlow):
        a = layer.negative_slope
        slope = (min(a, 1.0), max(a, 1.0))
        weight, count = layer.weight, layer.n_steps if layer.weight.dim() == 4 else 1
        rows_columns = [
            functional.euler_lipschitz_bound(weight, step_size=layer.step_size, slope=slope, p=p).reshape(-1).tolist()
            for p in ("inf", "1")
        ]
        norms = [math.inf] * len(rows_columns[0])
        if spectral_norms:
            norms = _euler_norm(weight, layer.step_size, slope).reshape(-1).tolist()
        bounds = zip(*rows_columns, norms, strict=True)
        return [
            LayerBound.of_sums(f"{name}, step {k + 1}", *bound)
            for k, bound in enumerate(step for step in bounds for _ in range(count))
        ]
    if isinstance(layer, nn.Conv2d | nn.Linear):
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError("a convolution has groups: no bound is known")
        sums = layer.weight.abs().flatten(2).sum(2) if layer.weight.dim() == 4 else layer.weight.abs()
        inf = sums.sum(1).max().item()
        if isinstance(layer, nn.Conv2d) and not _counts_once(layer):
            return [LayerBound(name, inf, math.inf, math.inf)]
        one = sums.sum(0).max().item()
        if not spectral_norms:
            return [LayerBound.of_sums(name, inf, one)]
        norm = spectral.convolution_norm if isinstance(layer, nn.Conv2d) else spectral.matrix_norm
        return [LayerBound.of_sums(name, inf, one, norm(layer.weight).item())]
    if isinstance(layer, SmoothLeakyReLU):
        steepest = max(1.0, abs(layer.negative_slope))
        return [LayerBound.of_sums(name, steepest, steepest)]
    if isinstance(layer, nn.BatchNorm2d):
        steepest = _network.normalisation_of(layer)[0].max().item()
        return [LayerBound.of_sums(name, steepest, steepest)]
    if isinstance(layer, nn.AvgPool2d):
        size, own = layer.kernel_size, layer.ceil_mode or layer.divisor_override is not None
        if not isinstance(size, int) or size != layer.stride or layer.padding != 0 or own:
            raise ValueError(f"{layer} overlaps, pads or has its own divisor: no bound is known")
        return [LayerBound.of_sums(name, 1.0, size**-2)]
    if isinstance(layer, nn.ReLU | nn.Flatten | nn.Identity | nn.Dropout | PadChannels):
        return []  # 1 in every norm
    raise TypeError(f"no bound is known for the layer {name}")


def _euler_norm(weight: Tensor, step_size: float, slope: tuple[float, float]) -> Tensor:
    """At least the 2-norm of ``I + h S W`` for any diagonal S with entries in ``slope``, of every bank of filters."""
    low, high = slope
    middle = step_size * 0.5 * (low + high) * weight.double()
    centre = middle.shape[-1] // 2
    middle[..., centre, centre].diagonal(dim1=-2, dim2=-1).add_(1.0)
    spread = abs(step_size) * 0.5 * (high - low)
    return spectral.convolution_norm(middle) + spread * spectral.convolution_norm(weight)


def _counts_once(layer: nn.Conv2d) -> bool:
    """Whether no tap of a filter meets a pixel twice. Reflected and replicated it does, and where circles overlap."""
    if layer.padding_mode != "circular":
        return layer.padding_mode == "zeros"
    sides = layer._reversed_padding_repeated_twice  # left, right, top, bottom
    added = sides[2] + sides[3], sides[0] + sides[1]
    return all(n <= d * (k - 1) for n, d, k in zip(added, layer.dilation, layer.kernel_size, strict=True))


@torch.no_grad()
def layer_bounds(model: nn.Module) -> list[LayerBound]:
    """Every layer's bounds, the head's left out; an Euler step counts as a layer.

    Raises:
        TypeError, ValueError: as ``linf_certified``.
    """
    layers = _network.layers_of(_network.in_float64(model))
    _network.check_known(layers)
    return [bound for layer in layers[:-1] for bound in _bound(layer)]


@torch.no_grad()
def lipschitz_radius(model: nn.Module, x: Tensor, y: Tensor, *, p: str, batch_size: int = 256) -> Tensor:
    """Radius in the p-norm within which the prediction is provably ``y``: ``(B,)`` float64, 0 if misclassified.

    Args:
        model, x, y, batch_size: as in ``linf_certified``.
        p: ``"inf"``, ``"1"`` or ``"2"``.

    Raises:
        TypeError, ValueError: as ``linf_certified``; an unknown ``p``.
    """
    _checks.choice("p", p, _checks.DUALS)
    model = _network.in_float64(model)
    x, y = _network.samples(model, x, y)
    *body, head = _network.layers_of(model)
    _network.same_function(model, [*body, head], x)
    bounds = [_bound(layer, spectral_norms=p == "2") for layer in body]
    constant = math.prod(bound.of(p) for layer in bounds for bound in layer)
    assert isinstance(head, nn.Linear)
    dual = {"inf": 1.0, "1": torch.inf, "2": 2.0}[p]
    distances = torch.linalg.vector_norm(head.weight[:, None] - head.weight[None], dual, dim=2)
    found = []
    for part, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        state = part.to(torch.float64, copy=True)
        lost = torch.zeros(len(part), 1, dtype=torch.float64, device=part.device)
        for layer, of_layer in zip(body, bounds, strict=True):
            state, lost = followed(layer, of_layer, state, lost, p)
        logits = head(state)
        distance = distances[labels].scatter(1, labels[:, None], 1.0)
        slack = _network.ROUNDING * _network.summed_in(head, state) + lost * distance
        left = (_network.margins(logits, labels) - slack).clamp_min(0.0)
        # Two equal rows of the head: their margin never changes.
        each = torch.where(distance * constant > 0, left / (distance * constant), torch.where(left > 0, torch.inf, 0.0))
        found.append(each.amin(1) * (1.0 - _network.ROUNDING))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def followed(
    layer: nn.Module, bounds: Sequence[LayerBound], state: Tensor, lost: Tensor, p: str
) -> tuple[Tensor, Tensor]:
    """The next state; and how far in the p-norm it can be from that of exact arithmetic, ``(B, 1)``, of that before."""
    if isinstance(layer, EulerConvFlow):
        states = layer(state, return_trajectory=True)
        summed = [_summed_in_step(layer, k, z) for k, z in enumerate(states[:-1])]
        after = states[-1]
    else:
        summed = [_network.summed_in(layer, state)] * len(bounds)  # none where nothing is computed
        after = layer(state)
    count = float(after[0].numel()) if len(after) else 1.0
    each = _network.rounding_of(layer) * {"inf": 1.0, "1": count, "2": math.sqrt(count)}[p]
    for bound, most in zip(bounds, summed, strict=True):
        lost = lost * bound.of(p) + each * (1.0 + most)
    return after, lost


def _summed_in_step(flow: EulerConvFlow, k: int, z: Tensor) -> Tensor:
    """``_network.summed_in`` of one Euler step: of its convolution, times h and the activation's slopes, and ``z``."""
    weight = flow.weight if flow.shared_weights else flow.weight[k]
    largest = _network.summed_in(nn.Identity(), z)
    drive = largest * weight.abs().flatten(1).sum(1).max()
    if flow.bias is not None:
        drive = drive + (flow.bias if flow.shared_weights else flow.bias[k]).abs().max()
    slopes = abs(flow.negative_slope) + abs(1.0 - flow.negative_slope)
    return largest + abs(flow.step_size) * slopes * (1.0 + drive)


def l2_radius(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 256) -> Tensor:
    """``lipschitz_radius`` in the 2-norm."""
    return lipschitz_radius(model, x, y, p="2", batch_size=batch_size)
