"""The same functions and modules in plain, unfused PyTorch.

This file is the oracle of every test and benchmark, and the default implementation of every op: what no fused
kernel covers runs here. Nothing in it is clever. The modules keep the authors' layout (one ``nn.Conv2d`` per Euler
step, named as in their checkpoints), so ``reference.MNISTNode().state_dict()`` has the reference's keys.

Source: Zakwan, Xu, Ferrari-Trecate, arXiv 2508.11432.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Beyond this threshold softplus(u) and u agree to the last bit of float64 (exp(-40) = 4e-18), and exp(u) below it
# cannot overflow float32. PyTorch's default threshold of 20 is only good to 2e-9.
_SOFTPLUS_THRESHOLD = 40.0

# Up to here the difference of two softplus would cancel.
_NEAR = math.log(2.0)


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def smooth_leaky_relu(input: Tensor, negative_slope: float = 0.1) -> Tensor:
    """``negative_slope * input + (1 - negative_slope) * softplus(input)``, finite for every finite input."""
    return negative_slope * input + (1.0 - negative_slope) * _softplus(input)


def _softplus(input: Tensor) -> Tensor:
    return F.softplus(input, threshold=_SOFTPLUS_THRESHOLD)


def softplus_increment(delta: Tensor, anchor: Tensor) -> Tensor:
    """``softplus(anchor + delta) - softplus(anchor)``, near 0 as ``log1p(sigmoid(anchor) expm1(delta))``."""
    near = delta.clamp(-_NEAR, _NEAR)
    beyond = _softplus(anchor + delta) - _softplus(anchor + near)
    # No branch: where delta is near, the same number is subtracted from itself.
    return torch.log1p(torch.sigmoid(anchor) * torch.expm1(near)) + beyond


def softplus_increment_and_tangent(both: Tensor, anchor: Tensor) -> Tensor:
    """``softplus_increment(delta)`` and ``sigmoid(anchor + delta) * tangent``, side by side as these are."""
    delta, tangent = both.chunk(2, -1)
    return torch.cat([softplus_increment(delta, anchor), torch.sigmoid(anchor + delta) * tangent], -1)


def euler_conv_step(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, step_size: float, negative_slope: float = 0.1
) -> Tensor:
    """``input + step_size * smooth_leaky_relu(conv2d(input, weight, bias, padding="same"))``."""
    return input + step_size * smooth_leaky_relu(
        F.conv2d(input, weight, bias, padding=weight.shape[-1] // 2), negative_slope
    )


def euler_conv_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    step_size: float,
    negative_slope: float = 0.1,
    n_steps: int | None = None,
    return_trajectory: bool = False,
) -> Tensor:
    """``euler_conv_step`` repeated: with ``weight[k]``, ``bias[k]`` (5-D weight) or ``n_steps`` times with one."""
    shared = weight.dim() == 4
    if shared and n_steps is None:
        raise ValueError("n_steps is required when weight is (C, C, k, k)")
    steps = n_steps if shared and n_steps is not None else weight.shape[0]
    states = [input]
    for k in range(steps):
        states.append(
            euler_conv_step(
                states[-1],
                weight if shared else weight[k],
                bias if shared or bias is None else bias[k],
                step_size=step_size,
                negative_slope=negative_slope,
            )
        )
    return torch.stack(states) if return_trajectory else states[-1]


def filter_sums(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre tap ``m``, row sum ``r`` and column sum ``q`` of a filter bank, each ``(..., C)``.

    ``m[d] = weight[d, d, c, c]``; ``r[d] = sum|weight[d]| - |m[d]|``; ``q[d] = sum|weight[:, d]| - |m[d]|``.
    """
    centre = weight.shape[-1] // 2
    m = weight[..., centre, centre].diagonal(dim1=-2, dim2=-1)
    magnitude = weight.abs().sum((-2, -1))
    return m, magnitude.sum(-1) - m.abs(), magnitude.sum(-2) - m.abs()


def _hinge_argument(weight: Tensor, rate: float, slope: tuple[float, float], norm: str) -> Tensor:
    """At most 0 for every channel: the condition of that norm, see ``functional.contraction_penalty``."""
    a, b = slope
    m, r, q = filter_sums(weight)
    if norm == "2":
        return rate + 2.0 * (a + b) * m + b * (2.0 * m.abs() + r + q)
    if norm == "2-sharp":
        diagonal = 2.0 * m + r
        return rate + torch.maximum(a * diagonal, b * diagonal) + b * q
    if norm == "inf":
        return 0.5 * rate + a * (m + r)
    if norm == "1":
        return 0.5 * rate + a * m + b * q
    raise ValueError(f"norm={norm!r} is unknown, expected one of '2', '2-sharp', 'inf', '1'")


def contraction_penalty(
    weight: Tensor | Sequence[Tensor],
    *,
    rate: float,
    slope: tuple[float, float] = (0.1, 1.0),
    norm: str = "2",
    reduction: str = "sum",
) -> Tensor:
    """``relu(hinge argument)`` per step and channel (paper, Theorem 1, Lemma 1 and Eq. 14), then reduced."""
    if isinstance(weight, Tensor):
        excess = _hinge_argument(weight, rate, slope, norm).relu()
    else:
        excess = torch.cat([_hinge_argument(w, rate, slope, norm).relu().flatten() for w in weight])
    if reduction == "none":
        return excess
    return excess.mean() if reduction == "mean" else excess.sum()


def contraction_rate(weight: Tensor, *, slope: tuple[float, float] = (0.1, 1.0), norm: str = "2") -> Tensor:
    """The largest ``rate`` for which the hinge argument of every channel is at most 0, per step."""
    scale = 1.0 if norm in ("2", "2-sharp") else 2.0
    return -scale * _hinge_argument(weight, 0.0, slope, norm).amax(-1)


def euler_lipschitz_bound(
    weight: Tensor, *, step_size: float, slope: tuple[float, float] = (0.1, 1.0), p: str = "inf"
) -> Tensor:
    """Bounds A (``p="inf"``), B (``"1"``) and C (``"2"``) of a step, see ``functional.euler_lipschitz_bound``."""
    m, r, q = filter_sums(weight)
    h = step_size

    def bound(off_centre_at: dict[float, Tensor]) -> Tensor:
        per_slope = [(1.0 + h * t * m).abs() + abs(h) * off for t, off in off_centre_at.items()]
        return torch.stack(per_slope).amax(0).amax(-1)

    a, b = slope
    l_inf = bound({a: abs(a) * r, b: abs(b) * r})
    l_1 = bound(dict.fromkeys((a, b), max(abs(a), abs(b)) * q))
    return {"inf": l_inf, "1": l_1, "2": (l_1 * l_inf).sqrt()}[p]


def bound_e(
    input: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    rounding: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Bound E: centre and radius of the box that the states of ``euler_conv_flow`` stay in.

    Differentiable. ``functional.euler_conv_flow_bound`` has the proof. With ``rounding``, a relative error that no sum
    of a convolution and no function exceeds, the radius covers the errors of this arithmetic as well: ``|u - (W z +
    b)|`` is at most ``rounding (|W| |z| + |b|)``, so the radius is carried as ``r + rounding |z|``; what else is
    rounded is no larger than the terms of the last line.
    """
    z, r, h, a = input, radius, step_size, negative_slope
    for k in range(n_steps):
        if rounding:
            r = r + rounding * z.abs()
        w = weight if weight.dim() == 4 else weight[k]
        b = bias if bias is None or weight.dim() == 4 else bias[k]
        padding = int(w.shape[-1]) // 2
        u = F.conv2d(z, w, b, padding=padding)
        change = F.conv2d(r, w.abs(), None if b is None or not rounding else rounding * b.abs(), padding=padding)
        m = w[..., padding, padding].diagonal().view(-1, 1, 1)
        others = change - m.abs() * r
        s, t = smooth_leaky_relu(u, a), a + (1.0 - a) * torch.sigmoid(u)
        low = smooth_leaky_relu(u - change, a) - s + t * change
        high = smooth_leaky_relu(u + change, a) - s - t * change
        gap = h * (torch.maximum(low, high) if a <= 1.0 else torch.minimum(low, high))  # convex, or concave
        z, r = z + h * s + 0.5 * gap, (1.0 + h * t * m).abs() * r + (h * t).abs() * others + 0.5 * gap.abs()
        if rounding:
            terms = abs(h) * (abs(a) + abs(1.0 - a)) * (1.0 + u.abs() + change)
            r = r + rounding * (r + z.abs() + terms)
    return z, r


def rounding_of_sums(terms: int) -> float:
    """A relative error that a sum of so many terms in float64 stays well below, in any order, and ``exp`` too."""
    return (terms + 32) * torch.finfo(torch.float64).eps


def round_outward(centre: Tensor, radius: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A centre and a radius in ``dtype``, the radius enlarged by what that loses."""
    rounded = centre.to(dtype)
    if dtype in (torch.float64, centre.dtype):
        return rounded, radius.to(dtype)
    lost = (centre - rounded).abs_().add_(torch.finfo(dtype).tiny)
    return rounded, lost.add_(radius).mul_(1.0 + torch.finfo(dtype).eps).to(dtype)


def euler_conv_flow_bound(
    input: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
) -> tuple[Tensor, Tensor]:
    """``bound_e`` in float64 with all of its rounding, rounded outward to the input's dtype."""
    tensors = (input.double(), radius.double(), weight.double(), None if bias is None else bias.double())
    rounding = rounding_of_sums(math.prod(weight.shape[-3:]))
    return round_outward(*bound_e(*tensors, step_size, negative_slope, n_steps, rounding), input.dtype)


def bound_of_activated_conv(
    input: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    negative_slope: float,
    rounding: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Centre and radius of the box that ``smooth_leaky_relu(conv2d(x))`` stays in; ``rounding`` as in ``bound_e``."""
    padding, a = int(weight.shape[-1]) // 2, negative_slope
    u = F.conv2d(input, weight, bias, padding=padding)
    kept = radius + rounding * input.abs() if rounding else radius
    lost = None if bias is None or not rounding else rounding * bias.abs()
    change = F.conv2d(kept, weight.abs(), lost, padding=padding)
    if a < 0.0:  # it falls and rises: no slope is larger than these
        z, r = smooth_leaky_relu(u, a), max(1.0, -a) * change
    else:
        low, high = smooth_leaky_relu(u - change, a), smooth_leaky_relu(u + change, a)
        z, r = 0.5 * (low + high), 0.5 * (high - low)
    if rounding:
        r = r + rounding * (r + (abs(a) + abs(1.0 - a)) * (1.0 + u.abs() + change))
    return z, r


def activated_conv_bound(
    input: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float
) -> tuple[Tensor, Tensor]:
    """``bound_of_activated_conv`` in float64 with all of its rounding, rounded outward to the input's dtype."""
    tensors = (input.double(), radius.double(), weight.double(), None if bias is None else bias.double())
    rounding = rounding_of_sums(math.prod(weight.shape[-3:]))
    return round_outward(*bound_of_activated_conv(*tensors, negative_slope, rounding), input.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, written out: the default implementation of the backward ops. They are made of differentiable functions,
# so that differentiating them once more gives the double backward.
# ---------------------------------------------------------------------------------------------------------------------


def smooth_leaky_relu_backward(grad_output: Tensor, input: Tensor, negative_slope: float) -> Tensor:
    """``grad_output * (a + (1 - a) * sigmoid(input))``."""
    return grad_output * (negative_slope + (1.0 - negative_slope) * torch.sigmoid(input))


def softplus_increment_backward(grad_output: Tensor, delta: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """``g * slope`` and the sum of ``g * (slope - sigmoid(anchor))``, with ``slope = sigmoid(anchor + delta)``."""
    slope = torch.sigmoid(anchor + delta)
    return slope * grad_output, ((slope - torch.sigmoid(anchor)) * grad_output).sum(-1, keepdim=True)


def softplus_increment_and_tangent_backward(grad_output: Tensor, both: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """The increment's and ``slope * g`` for the tangent, which times ``tangent * (1 - slope)`` adds to the others."""
    delta, tangent = both.chunk(2, -1)
    grad_increment, grad_rate = grad_output.chunk(2, -1)
    grad_delta, grad_anchor = softplus_increment_backward(grad_increment, delta, anchor)
    grad_tangent = torch.sigmoid(anchor + delta) * grad_rate
    curved = grad_tangent * tangent * torch.sigmoid(-anchor - delta)
    return torch.cat([grad_delta + curved, grad_tangent], -1), grad_anchor + curved.sum(-1, keepdim=True)


def euler_conv_flow_saving(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Last state, the states that enter the steps (empty unless wanted) and the slopes ``h * s'(u_k)``.

    What is saved has the input's dtype; float32 for float16, in which slopes of small steps would be denormal.
    """
    states, slopes = [input], []
    for k in range(n_steps):
        w = weight if weight.dim() == 4 else weight[k]
        b = bias if bias is None or weight.dim() == 4 else bias[k]
        u = F.conv2d(states[-1], w, b, padding=int(weight.shape[-1]) // 2)
        slopes.append(step_size * smooth_leaky_relu_backward(torch.ones_like(u), u, negative_slope))
        states.append(states[-1] + step_size * smooth_leaky_relu(u, negative_slope))
    dtype = torch.float32 if input.dtype == torch.float16 else input.dtype
    kept = torch.stack(states[:-1]).to(dtype) if save_states else input.new_empty(0, dtype=dtype)
    return states[-1], kept, torch.stack(slopes).to(dtype)


def euler_conv_flow_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    return_trajectory: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``euler_conv_flow`` for input, weight and bias; an empty tensor where the mask says no.

    ``v = h * s'(u_k) * g;  dW_k = conv_weight_gradient(z_k, v);  db_k = sum(v);  g <- g + conv_transpose(v, W_k)``.
    """
    shared = weight.dim() == 4
    banks = [weight] * n_steps if shared else list(weight.unbind(0))
    biases: list[Tensor | None] = (
        [None] * n_steps if bias is None else [bias] * n_steps if shared else list(bias.unbind(0))
    )
    padding = [int(weight.shape[-1]) // 2] * 2  # int: the double backward of a convolution takes no symbolic padding
    states = [input]
    for w, b in zip(banks[:-1], biases[:-1], strict=True):
        states.append(euler_conv_step(states[-1], w, b, step_size=step_size, negative_slope=negative_slope))
    grad = grad_output[n_steps] if return_trajectory else grad_output
    weight_grads: list[Tensor] = []
    bias_grads: list[Tensor] = []
    mask = [True, output_mask[1], output_mask[2]]
    for k in reversed(range(n_steps)):
        u = F.conv2d(states[k], banks[k], biases[k], padding=padding[0])
        v = step_size * smooth_leaky_relu_backward(grad, u, negative_slope)
        through, dw, db = torch.ops.aten.convolution_backward(
            v, states[k], banks[k], [v.shape[1]], [1, 1], padding, [1, 1], False, [0, 0], 1, mask
        )
        grad = grad + through
        if return_trajectory:
            grad = grad + grad_output[k]
        weight_grads.append(dw)
        bias_grads.append(db)

    def collect(per_step: list[Tensor], wanted: bool) -> Tensor:
        if not wanted:
            return input.new_empty(0)
        stacked = torch.stack(per_step[::-1])
        return stacked.sum(0) if shared else stacked

    return (
        grad if output_mask[0] else input.new_empty(0),
        collect(weight_grads, output_mask[1]),
        collect(bias_grads, output_mask[2]),
    )


def penalty_coefficients(
    weight: Tensor, rate: float, slope: tuple[float, float], norm: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """``contraction_penalty`` and each channel's derivatives: ``(..., 3, C)`` for ``m``, ``r``, ``q``."""
    a, b = slope
    m, r, _ = filter_sums(weight)
    argument = _hinge_argument(weight, rate, slope, norm)
    excess = argument.relu()
    if norm == "2":
        dm, dr, dq = 2.0 * (a + b) + 2.0 * b * m.sign(), torch.full_like(m, b), torch.full_like(m, b)
    elif norm == "2-sharp":
        side = (2.0 * m + r).sign()  # torch.maximum gives each slope half where they tie
        dr = 0.5 * (a + b) + 0.5 * (b - a) * side
        dm, dq = 2.0 * dr, torch.full_like(m, b)
    elif norm == "inf":
        dm, dr, dq = torch.full_like(m, a), torch.full_like(m, a), torch.zeros_like(m)
    else:
        dm, dr, dq = torch.full_like(m, a), torch.zeros_like(m), torch.full_like(m, b)
    active = (~(argument <= 0.0)).to(weight.dtype)
    coefficients = torch.stack([dm * active, dr * active, dq * active], dim=-2)
    if reduction == "none":
        return excess, coefficients
    if reduction == "mean":
        return excess.mean(), coefficients / excess.numel()
    return excess.sum(), coefficients


def contraction_penalty_backward(grad_output: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
    """Gradient for the filters: ``sign(W) * (c_r[d] + c_q[e])``, at the centre taps ``c_m[d]``, times ``grad_output``.

    ``grad_output`` is a scalar (reduced penalty) or one value per channel.
    """
    dm, dr, dq = (coefficients * grad_output.unsqueeze(-2) if grad_output.dim() else coefficients * grad_output).unbind(
        -2
    )
    off_centre = weight.sign() * (dr.unsqueeze(-1) + dq.unsqueeze(-2))[..., None, None]
    centre = weight.shape[-1] // 2
    channels = torch.arange(weight.shape[-3], device=weight.device)
    taps = torch.zeros_like(weight)
    taps[..., channels, channels, centre, centre] = 1.0
    return torch.where(taps.bool(), (torch.diag_embed(dm))[..., None, None], off_centre)


# ---------------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------------


class SmoothLeakyReLU(nn.Module):
    """``smooth_leaky_relu`` as a module."""

    def __init__(self, negative_slope: float = 0.1) -> None:
        super().__init__()
        self.negative_slope = negative_slope

    def forward(self, input: Tensor) -> Tensor:
        return smooth_leaky_relu(input, self.negative_slope)


class MNISTNode(nn.Module):
    """conv0 + activation, ``n_steps`` Euler steps ``conv1 .. convN``, flatten, ``fc1`` (the authors' MNIST net)."""

    def __init__(
        self,
        channels: int = 8,
        n_steps: int = 10,
        step_size: float = 0.01,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        self.n_steps, self.step_size, self.negative_slope = n_steps, step_size, negative_slope
        self.conv0 = nn.Conv2d(in_channels, channels, 3, padding=1)
        for k in range(1, n_steps + 1):
            self.add_module(f"conv{k}", nn.Conv2d(channels, channels, 3, padding=1))
        self.fc1 = nn.Linear(channels * image_size**2, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        z = smooth_leaky_relu(self.conv0(input), self.negative_slope)
        for k in range(1, self.n_steps + 1):
            z = z + self.step_size * smooth_leaky_relu(self.get_submodule(f"conv{k}")(z), self.negative_slope)
        return self.fc1(z.flatten(1))


class CIFARNode(nn.Module):
    """conv0, batch norm, dropout, ``n_steps`` Euler steps ``conv.0 ..``, flatten, dropout, ``fc1``."""

    def __init__(
        self,
        channels: int = 128,
        n_steps: int = 16,
        step_size: float = 0.1,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        self.step_size, self.negative_slope = step_size, negative_slope
        self.conv0 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.drop0 = nn.Dropout(0.1)
        self.conv = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(n_steps))
        self.drop1 = nn.Dropout(0.2)
        self.fc1 = nn.Linear(channels * image_size**2, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        z = self.drop0(self.bn(self.conv0(input)))
        for conv in self.conv:
            z = z + self.step_size * smooth_leaky_relu(conv(z), self.negative_slope)
        return self.fc1(self.drop1(z.flatten(1)))


def pad_channels(input: Tensor, channels: int) -> Tensor:
    """Zero channels added on both sides (one more behind when the number is odd), up to ``channels``."""
    missing = channels - input.shape[1]
    return F.pad(input, (0, 0, 0, 0, missing // 2, missing - missing // 2))


class StagedCIFARNode(nn.Module):
    """conv0, batch norm, then stages of Euler steps with zero-padded channels and 2x2 average pooling between."""

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 112),
        n_steps: int = 6,
        step_size: float = 0.1,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        self.channels, self.n_steps = tuple(channels), n_steps
        self.step_size, self.negative_slope = step_size, negative_slope
        self.conv0 = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.bn = nn.BatchNorm2d(channels[0])
        self.conv = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels for _ in range(n_steps))
        for weight in (p for name, p in self.conv.named_parameters() if name.endswith("weight")):
            nn.init.zeros_(weight)
        side = image_size // 2 ** (len(channels) - 1)
        self.fc1 = nn.Linear(channels[-1] * side**2, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        z = self.bn(self.conv0(input))
        for k, conv in enumerate(self.conv):
            stage, step = divmod(k, self.n_steps)
            if stage and step == 0:
                z = pad_channels(F.avg_pool2d(z, 2), self.channels[stage])
            z = z + self.step_size * smooth_leaky_relu(conv(z), self.negative_slope)
        return self.fc1(z.flatten(1))


class StridedNode(nn.Module):
    """Stages of ``downs.k`` (stride 2), activation, ``n_steps`` Euler steps; then ``fc0``, activation, ``fc1``."""

    def __init__(
        self,
        channels: Sequence[int] = (16, 32),
        n_steps: int = 1,
        step_size: float = 1.0,
        hidden_features: int = 48,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        self.n_steps, self.step_size, self.negative_slope = n_steps, step_size, negative_slope
        sizes = [in_channels, *channels]
        self.downs = nn.ModuleList(nn.Conv2d(sizes[k], c, 3, stride=2, padding=1) for k, c in enumerate(channels))
        self.conv = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels for _ in range(n_steps))
        side = image_size
        for _ in channels:
            side = (side + 1) // 2
        self.fc0 = nn.Linear(channels[-1] * side**2, hidden_features)
        self.fc1 = nn.Linear(hidden_features, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        z = input
        for k, down in enumerate(self.downs):
            z = smooth_leaky_relu(down(z), self.negative_slope)
            for conv in self.conv[k * self.n_steps : (k + 1) * self.n_steps]:
                z = z + self.step_size * smooth_leaky_relu(conv(z), self.negative_slope)
        return self.fc1(smooth_leaky_relu(self.fc0(z.flatten(1)), self.negative_slope))
