"""``ConvexLyapunov``: K convex functions, zero at their equilibria and positive elsewhere, as one batch of networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.zubov.softplus import softplus_increment, softplus_increment_and_tangent

__all__ = ["ConvexLyapunov"]


class Coefficients(NamedTuple):
    """All that the functions need and that no state enters; W units, L layers."""

    weight: Tensor  # (K, L W, dim), of the offset from the equilibrium
    attention: tuple[Tensor, ...]  # L - 1 times (K, W, W), not negative; rows sum to one if normalized
    readout: Tensor  # (K, 1, W), not negative
    anchor: tuple[Tensor, ...]  # L times (K, W, 1), pre-activations at the equilibrium
    gradient: Tensor  # (K, dim, 1), of the network at the equilibrium

    def double(self) -> Coefficients:
        """In float64."""
        weight, attention, readout, anchor, gradient = self
        layers = tuple(layer.double() for layer in attention), tuple(layer.double() for layer in anchor)
        return Coefficients(weight.double(), layers[0], readout.double(), layers[1], gradient.double())


class ConvexLyapunov(nn.Module):
    """K Lyapunov functions ``V(x) = g(x) - g(x*) - grad g(x*).(x - x*) + eps |x - x*|^2``, one for each class.

    Of every class ``g(x) = s p.z_L`` is an input-attention-based convex network:

        z_1 = softplus(B_1 x + c_1),   z_{l+1} = softplus(P_l z_l + B_{l+1} x + c_{l+1}),
        P_l = softmax(Q_l K_l' / sqrt(d))

    ``P_l`` and ``p`` are rows of attention, not negative and with sum one; so ``g`` is convex, whatever the parameters.
    Attention does not depend on ``x``, which would break convexity. ``V`` is ``g``'s Bregman distance from ``x*``.

    Our reading, where the paper's equations are not at hand: the attention has learned queries and keys for every unit
    and class; the last row of attention reads the last layer, times a learned scale ``s > 0``; instead of ``c_l`` the
    pre-activation at the equilibrium is the parameter, which is the same set of functions and moves them along with
    a learned equilibrium. With ``partial``, a context network (tanh, shared by all classes) sees ``x*``, is not convex
    in it, and shifts these pre-activations and scales the components of the attention's scores.

    Args:
        dim: n, of a state.
        num_classes: K; a single function is allowed.
        width: units W of a layer.
        depth: layers L.
        partial: add the context network: convex in the state, not in the equilibrium.
        normalized: False for an ordinary input-convex network, to compare with: ``softplus(scores) / W`` in the place
            of ``softmax(scores)``, not negative either, but with any sum.
        eps: of ``eps |x - x*|^2``, > 0: what keeps V from collapsing to a constant.
        equilibria: ``(K, dim)`` to keep fixed; by default they are learned, from a normal distribution on.
        device, dtype: of the parameters, float32 or float64.

    Attributes:
        equilibria: ``(K, dim)``, parameter or buffer. ``V_k`` is exactly 0 at ``equilibria[k]``.

    Input ``(B, dim)``, output ``(B, K)``, not negative; rounding is relative to ``|grad g(x*)| |x - x*|``, so that near
    the equilibrium V has fewer digits than there are. Runs in the parameters' precision, also under autocast.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: arXiv 2509.21879 (attention-based convex network, partially convex variant); Bregman form and centred
    parameters are ours.
    """

    equilibria: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        width: int = 64,
        depth: int = 3,
        partial: bool = False,
        normalized: bool = True,
        eps: float = 0.01,
        equilibria: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_classes", num_classes), ("width", width), ("depth", depth)):
            _checks.count(name, value)
        if dtype not in (None, torch.float32, torch.float64):
            raise TypeError(f"dtype={dtype} is unknown, expected float32 or float64")
        _checks.number("eps", eps)
        if eps <= 0:
            raise ValueError(f"eps={eps!r} is not positive, expected a float > 0: without it V can be constant")
        self.dim, self.num_classes, self.width, self.depth = dim, num_classes, width, depth
        self.partial, self.normalized, self.eps = partial, normalized, eps
        heads = math.ceil(width / 4)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.input_weight = parameter(num_classes, depth * width, dim)
        self.anchor = parameter(num_classes, depth, width)
        # Of one layer there are none: an empty parameter would never get a gradient, for which DDP would wait.
        self.query = parameter(num_classes, depth - 1, width, heads) if depth > 1 else None
        self.key = parameter(num_classes, depth, width, heads)
        self.readout_query = parameter(num_classes, 1, heads)
        self.log_scale = parameter(num_classes)
        if equilibria is None:
            self.equilibria = parameter(num_classes, dim)
        else:
            _checks.tensor("equilibria", equilibria)
            if equilibria.shape != (num_classes, dim):
                raise ValueError(
                    f"equilibria has shape {tuple(equilibria.shape)}, expected {(num_classes, dim)}: (K, dim)"
                )
            if not bool(equilibria.isfinite().all()):
                raise ValueError("equilibria is not finite, expected finite states")
            kind = self.anchor
            self.register_buffer("equilibria", equilibria.detach().to(kind.device, kind.dtype, copy=True))
        inputs = [dim, *[width] * (depth - 1)] if partial else []
        self.context = nn.ModuleList(nn.Linear(n, width, device=device, dtype=dtype) for n in inputs)
        self.context_anchor = nn.ModuleList(nn.Linear(width, width, device=device, dtype=dtype) for _ in inputs)
        self.context_gate = nn.ModuleList(nn.Linear(width, heads, device=device, dtype=dtype) for _ in inputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scores and pre-activations of variance one for states of variance one; ``s = 1``; learned equilibria too."""
        nn.init.normal_(self.input_weight, std=self.dim**-0.5)
        for parameter in (self.anchor, self.query, self.key, self.readout_query):
            if parameter is not None:
                nn.init.normal_(parameter)
        nn.init.zeros_(self.log_scale)
        if isinstance(self.equilibria, nn.Parameter):
            nn.init.normal_(self.equilibria)
        for linear in (*self.context, *self.context_anchor, *self.context_gate):
            assert isinstance(linear, nn.Linear)
            linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``V_k(x)`` of all states and classes: ``(B, dim) -> (B, K)``."""
        x = self.checked("x", x, (None, self.dim), "(B, dim)")
        with torch.autocast(x.device.type, enabled=False):
            return self.values(self.coefficients(), self.offsets(x)).T

    def per_class(self, points: Tensor) -> Tensor:
        """``V_k`` at points of its own: ``(K, R, dim) -> (K, R)``."""
        points = self.checked("points", points, (self.num_classes, None, self.dim), "(K, R, dim)")
        with torch.autocast(points.device.type, enabled=False):
            return self.values(self.coefficients(), points - self.equilibria[:, None])

    def offsets(self, x: Tensor) -> Tensor:
        """``x - x*`` of all states and classes: ``(B, dim) -> (K, B, dim)``."""
        return x - self.equilibria[:, None]

    def coefficients(self) -> Coefficients:
        """To be computed once for several calls of ``values``; good as long as the parameters stay."""
        anchor: Tensor = self.anchor
        keys: Tensor = self.key
        if self.partial:
            shifts, gates = [], []
            context = self.equilibria
            for layer, shift, gate in zip(self.context, self.context_anchor, self.context_gate, strict=True):
                context = torch.tanh(layer(context))
                shifts.append(shift(context))
                gates.append(1.0 + gate(context))
            anchor, keys = anchor + torch.stack(shifts, 1), keys * torch.stack(gates, 1).unsqueeze(2)
        # unbind: the gradient of an indexed tensor is a zero tensor of full size, for every index. Before the softmax:
        # gradients of scores would be put together in a larger copy than those of queries and keys.
        *lower, last = (keys * keys.shape[-1] ** -0.5).unbind(1)
        queries = () if self.query is None else self.query.unbind(1)
        attention = tuple(self._mixing(q @ k.mT) for q, k in zip(queries, lower, strict=True))
        readout = self._mixing(self.readout_query @ last.mT) * self.log_scale.exp()[:, None, None]
        anchor = anchor.unsqueeze(-1)
        slopes = torch.sigmoid(anchor).unbind(1)
        through = [slopes[-1] * readout.mT]  # d g / d pre-activations at x*, the last layer's first
        for layer_attention, layer_slope in zip(attention[::-1], slopes[-2::-1], strict=True):
            through.append(layer_slope * (layer_attention.mT @ through[-1]))
        gradient = self.input_weight.mT @ torch.cat(through[::-1], 1)
        return Coefficients(self.input_weight, attention, readout, anchor.unbind(1), gradient)

    def _mixing(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, -1) if self.normalized else F.softplus(scores) / self.width

    def values(self, coefficients: Coefficients, offset: Tensor) -> Tensor:
        """V at ``x* + offset``: ``(K, N, dim) -> (K, N)``.

        Works with what changes from the equilibrium on: nothing large cancels, and no change gives exactly 0.
        """
        increment = self._increment(coefficients, offset, softplus_increment)
        return increment.relu() + self.eps * offset.square().sum(-1)

    def values_and_derivatives(
        self, coefficients: Coefficients, offset: Tensor, tangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """V at ``x* + offset`` and its derivative along ``tangent``, ``(N, dim)`` or ``(K, N, dim)``: both ``(K, N)``.

        Forward mode written out: every layer carries its change, and beside it the rate of its change.
        """
        both = torch.cat([offset, tangent.expand_as(offset)], 1)
        increment, rate = self._increment(coefficients, both, softplus_increment_and_tangent).chunk(2, 1)
        value = increment.relu() + self.eps * offset.square().sum(-1)
        rate = torch.where(increment > 0, rate, 0.0)  # else rounding is all that there is, and V does not have it
        return value, rate + 2.0 * self.eps * (offset * tangent).sum(-1)

    def _increment(
        self, coefficients: Coefficients, offset: Tensor, activation: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """``p.(z_L(x) - z_L(x*)) - grad g(x*).(x - x*)``, not negative but for rounding: ``(K, N, dim) -> (K, N)``."""
        weight, attention, readout, anchor, gradient = coefficients
        # B_l (x - x*) layer by layer: the gradient of all at once would be put together from the layers' in a copy
        first, *others = torch.split(weight, self.width, 1)
        rise = activation(first @ offset.mT, anchor[0])
        for layer_attention, layer_weight, layer_anchor in zip(attention, others, anchor[1:], strict=True):
            rise = activation(torch.baddbmm(layer_weight @ offset.mT, layer_attention, rise), layer_anchor)
        return (readout @ rise).squeeze(1) - (offset @ gradient).squeeze(-1)

    def checked(self, name: str, value: Tensor, shape: tuple[int | None, ...], expected: str) -> Tensor:
        """``value`` in the parameters' precision.

        Raises:
            TypeError, ValueError: naming the argument, its value and what was expected.
        """
        _checks.tensor(name, value)
        if self.anchor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the Lyapunov functions have dtype {self.anchor.dtype}, expected float32 or float64")
        if value.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected {expected} with dim={self.dim}, K={self.num_classes}"
            )
        if value.device != self.anchor.device:
            raise ValueError(f"{name} is on {value.device}, expected {self.anchor.device} as the Lyapunov functions")
        cast = value.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(value.device.type)
        if value.dtype != self.anchor.dtype and not cast:
            raise TypeError(f"{name} has dtype {value.dtype}, expected {self.anchor.dtype} as the Lyapunov functions")
        return value.to(self.anchor.dtype)

    def extra_repr(self) -> str:
        learned = "learned" if isinstance(self.equilibria, nn.Parameter) else "fixed"
        return (
            f"{self.dim}, num_classes={self.num_classes}, width={self.width}, depth={self.depth}, "
            f"partial={self.partial}, normalized={self.normalized}, eps={self.eps}, equilibria {learned}"
        )
