"""Bounds A, B, C: Lipschitz constants of every layer in a p-norm, their product, and the radius it certifies.

Per Euler step ``rnf.functional.euler_lipschitz_bound``; convolutions by the row sums ``max_o sum |W[o]|`` (p = inf) and
column sums ``max_c sum |W[:, c]|`` (p = 1) of their filters; p = 2 by ``||M||_2 <= sqrt(||M||_1 ||M||_inf)``. A row of
the operator has the entries of a filter, some added up where padding repeats pixels, some missing: row sums bound the
operator's under any padding. A column has each entry at most once under zero padding, and under circular padding that
adds no more than a filter takes away; otherwise there is no bound for p = 1 and 2. No power
iteration: it would be a bound from below.

Radius in norm p with the head's rows ``w`` and q dual to p:

    min over j != y of (f_y - f_j) / (||w_y - w_j||_q L)      L = product of all layers before the head
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robust_node_fast import _checks, functional
from robust_node_fast.certify import _network
from robust_node_fast.nn import EulerConvFlow, PadChannels, SmoothLeakyReLU

__all__ = ["l2_radius", "layer_bounds", "lipschitz_radius"]


class LayerBound(NamedTuple):
    """A layer's name, and its Lipschitz constants in the infinity norm and the 1-norm."""

    layer: str
    inf: float
    one: float

    def of(self, p: str) -> float:
        return {"inf": self.inf, "1": self.one, "2": (self.inf * self.one) ** 0.5}[p]


def _bound(layer: nn.Module) -> list[LayerBound]:
    name = type(layer).__name__
    if isinstance(layer, EulerConvFlow):
        a = layer.negative_slope
        slope = (min(a, 1.0), max(a, 1.0))
        weight, count = layer.weight, layer.n_steps if layer.weight.dim() == 4 else 1
        rows, columns = (
            functional.euler_lipschitz_bound(weight, step_size=layer.step_size, slope=slope, p=p).reshape(-1).tolist()
            for p in ("inf", "1")
        )
        return [
            LayerBound(f"{name}, step {k + 1}", row, column)
            for k, (row, column) in enumerate(zip(rows * count, columns * count, strict=True))
        ]
    if isinstance(layer, nn.Conv2d | nn.Linear):
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError("a convolution has groups: no bound is known")
        sums = layer.weight.abs().flatten(2).sum(2) if layer.weight.dim() == 4 else layer.weight.abs()
        each_once = not isinstance(layer, nn.Conv2d) or _counts_once(layer)
        return [LayerBound(name, sums.sum(1).max().item(), sums.sum(0).max().item() if each_once else math.inf)]
    if isinstance(layer, SmoothLeakyReLU):
        steepest = max(1.0, abs(layer.negative_slope))
        return [LayerBound(name, steepest, steepest)]
    if isinstance(layer, nn.BatchNorm2d):
        if layer.running_var is None:
            raise ValueError("a BatchNorm2d uses the statistics of its batch, expected running ones")
        scale = (layer.running_var + layer.eps).rsqrt()
        steepest = (scale if layer.weight is None else scale * layer.weight.abs()).max().item()
        return [LayerBound(name, steepest, steepest)]
    if isinstance(layer, nn.AvgPool2d):
        size, own = layer.kernel_size, layer.ceil_mode or layer.divisor_override is not None
        if not isinstance(size, int) or size != layer.stride or layer.padding != 0 or own:
            raise ValueError(f"{layer} overlaps, pads or has its own divisor: no bound is known")
        return [LayerBound(name, 1.0, size**-2)]
    if isinstance(layer, nn.ReLU | nn.Flatten | nn.Identity | nn.Dropout | PadChannels):
        return []  # 1 in every norm
    raise TypeError(f"no bound is known for the layer {name}")


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
    constant = 1.0
    for bound in layer_bounds(model):
        constant *= bound.of(p)
    model = _network.in_float64(model)
    x, y = _network.samples(model, x, y)
    layers = _network.layers_of(model)
    _network.same_function(model, layers, x)
    head = layers[-1]
    assert isinstance(head, nn.Linear)
    dual = {"inf": 1.0, "1": torch.inf, "2": 2.0}[p]
    distances = torch.linalg.vector_norm(head.weight[:, None] - head.weight[None], dual, dim=2)
    found = []
    for part, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        logits, largest = (
            part.to(torch.float64, copy=True),
            torch.ones(len(part), 1, dtype=torch.float64, device=part.device),
        )
        for layer in layers:
            largest = torch.maximum(largest, _network.largest_in(layer, logits))
            logits = layer(logits)
        slack = _network.ROUNDING * (largest + logits.abs().amax(1, keepdim=True))
        left = (_network.margins(logits, labels) - slack).clamp_min(0.0)
        distance = distances[labels].scatter(1, labels[:, None], 1.0)
        # Two equal rows of the head: their margin never changes.
        each = torch.where(distance * constant > 0, left / (distance * constant), torch.where(left > 0, torch.inf, 0.0))
        found.append(each.amin(1) * (1.0 - _network.ROUNDING))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def l2_radius(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 256) -> Tensor:
    """``lipschitz_radius`` in the 2-norm."""
    return lipschitz_radius(model, x, y, p="2", batch_size=batch_size)
