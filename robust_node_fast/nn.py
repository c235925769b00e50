"""Drop-in layers over ``robust_node_fast.functional``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_node_fast import _checks, functional, reference

__all__ = ["EulerConvFlow", "PadChannels", "SmoothLeakyReLU", "authors_init_", "center_bias_", "contractive_init_"]


class SmoothLeakyReLU(nn.Module):
    """``functional.smooth_leaky_relu`` as a module; any shape."""

    def __init__(self, negative_slope: float = 0.1) -> None:
        super().__init__()
        _checks.number("negative_slope", negative_slope)
        self.negative_slope = negative_slope

    def forward(self, input: Tensor) -> Tensor:
        return functional.smooth_leaky_relu(input, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class PadChannels(nn.Module):
    """``reference.pad_channels``: zero channels on both sides, up to ``channels``; (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, input: Tensor) -> Tensor:
        return reference.pad_channels(input, self.channels)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class EulerConvFlow(nn.Module):
    """``n_steps`` forward Euler steps ``z + step_size * smooth_leaky_relu(conv2d(z, weight[k], bias[k]))``, fused.

    Args:
        channels: C, kept by every step.
        n_steps: N.
        step_size: Euler step ``h``; the flow covers the time ``N * h``.
        kernel_size: odd k; zero "same" padding.
        bias: learn ``bias``.
        negative_slope: of the activation.
        shared_weights: one filter bank for all steps instead of one per step.
        recompute: as in ``functional.euler_conv_flow``: true saves memory, false may save time. The default is true if
            N > 1.
        device, dtype: of the parameters.

    Attributes:
        weight: ``(N, C, C, k, k)``, or ``(C, C, k, k)`` when shared; initialised as ``nn.Conv2d`` does.
        bias: ``(N, C)``, ``(C,)`` or ``None``.

    Input and output: ``(B, C, H, W)``, contiguous or channels_last.

    Raises:
        TypeError, ValueError: a size that is not a positive int, an even kernel, a step size that is not finite.

    Source: arXiv 2508.11432, the convolutional Neural ODE under forward Euler with time-varying weights.
    """

    def __init__(
        self,
        channels: int,
        n_steps: int,
        step_size: float,
        *,
        kernel_size: int = 3,
        bias: bool = True,
        negative_slope: float = 0.1,
        shared_weights: bool = False,
        recompute: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("n_steps", n_steps), ("kernel_size", kernel_size)):
            _checks.count(name, value)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size!r} is even, expected an odd kernel")
        _checks.number("step_size", step_size)
        _checks.number("negative_slope", negative_slope)
        self.channels, self.n_steps, self.step_size = channels, n_steps, step_size
        self.kernel_size, self.negative_slope, self.shared_weights = kernel_size, negative_slope, shared_weights
        self.recompute = recompute
        steps = () if shared_weights else (n_steps,)
        self.weight = nn.Parameter(
            torch.empty((*steps, channels, channels, kernel_size, kernel_size), device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty((*steps, channels), device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.Conv2d``'s initialisation for every filter bank: uniform in ``+-1 / sqrt(C k k)``."""
        bound = 1.0 / math.sqrt(self.channels * self.kernel_size**2)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, return_trajectory: bool = False) -> Tensor:
        """The last state ``(B, C, H, W)``, or all states ``(N + 1, B, C, H, W)``."""
        return functional.euler_conv_flow(
            input,
            self.weight,
            self.bias,
            step_size=self.step_size,
            negative_slope=self.negative_slope,
            n_steps=self.n_steps if self.shared_weights else None,
            return_trajectory=return_trajectory,
            recompute=self.recompute,
        )

    def vector_field(self, t: Tensor | float, z: Tensor) -> Tensor:
        """``smooth_leaky_relu(conv2d(z, weight[k], bias[k]))`` for the step ``k = floor(t / step_size)``.

        Piecewise constant in time, so that ``torchdiffeq.odeint(flow.vector_field, z0, t, method="euler")`` on the grid
        ``t = step_size * arange(N + 1)`` gives the states of ``forward``.
        """
        # The grid's float32 times may fall a little short of k * h: a quarter step of tolerance decides the interval.
        k = math.floor(float(t) / self.step_size + 0.25)
        k = min(max(k, 0), self.n_steps - 1)
        weight = self.weight if self.shared_weights else self.weight[k]
        bias = self.bias if self.shared_weights or self.bias is None else self.bias[k]
        u = nn.functional.conv2d(z, weight, bias, padding=self.kernel_size // 2)
        return functional.smooth_leaky_relu(u, self.negative_slope)

    def contraction_penalty(self, *, rate: float, norm: str = "2", reduction: str = "sum") -> Tensor:
        """``functional.contraction_penalty`` of the filters, with the slopes of this flow's activation."""
        return functional.contraction_penalty(self.weight, rate=rate, slope=self.slope, norm=norm, reduction=reduction)

    def contraction_rate(self, *, norm: str = "2") -> Tensor:
        """``functional.contraction_rate``: the rate that each step satisfies, ``(N,)`` (``(1,)`` when shared)."""
        return functional.contraction_rate(self.weight, slope=self.slope, norm=norm).reshape(-1)

    @property
    def slope(self) -> tuple[float, float]:
        """Smallest and largest slope of the activation."""
        return min(self.negative_slope, 1.0), max(self.negative_slope, 1.0)

    @classmethod
    def from_convs(cls, convs: Sequence[nn.Conv2d], step_size: float, *, negative_slope: float = 0.1) -> EulerConvFlow:
        """A flow with the (copied) parameters of ``nn.Conv2d`` layers, one Euler step each.

        Args:
            convs: as many channels out as in, odd kernels, zero "same" padding, stride 1; all alike.
            step_size, negative_slope: as for the layer.

        Raises:
            ValueError: a layer that is no Euler step (channels change, stride, dilation, groups, other padding), or
                layers that differ in channels, kernel, bias, dtype or device.
        """
        convs = list(convs)
        if not convs:
            raise ValueError("convs is empty, expected at least one nn.Conv2d")
        for i, conv in enumerate(convs):
            _check_euler_conv(i, conv)
            kind, first = _kind(conv), _kind(convs[0])
            if kind != first:
                raise ValueError(
                    f"convs[{i}] differs from convs[0], expected the same (channels, kernel, bias, dtype, device): "
                    f"{kind} against {first}"
                )
        weight = torch.stack([conv.weight.detach() for conv in convs])
        with torch.device("meta"):
            flow = cls(
                convs[0].in_channels,
                len(convs),
                step_size,
                kernel_size=weight.shape[-1],
                bias=convs[0].bias is not None,
                negative_slope=negative_slope,
            )
        flow.weight = nn.Parameter(weight)
        if flow.bias is not None:
            flow.bias = nn.Parameter(torch.stack([conv.bias.detach() for conv in convs if conv.bias is not None]))
        return flow

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, n_steps={self.n_steps}, step_size={self.step_size}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}, negative_slope={self.negative_slope}, shared_weights={self.shared_weights}"
        )


def _kind(conv: nn.Conv2d) -> tuple[object, ...]:
    return conv.in_channels, conv.kernel_size, conv.bias is not None, conv.weight.dtype, conv.weight.device


def _check_euler_conv(i: int, conv: nn.Conv2d) -> None:
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"convs[{i}] is a {type(conv).__name__}, expected an nn.Conv2d")
    k = conv.kernel_size[0]
    same = conv.padding == "same" or tuple(conv.padding) == (k // 2, k // 2)
    if (
        conv.in_channels != conv.out_channels
        or conv.kernel_size[0] != conv.kernel_size[1]
        or k % 2 == 0
        or conv.stride != (1, 1)
        or conv.dilation != (1, 1)
        or conv.groups != 1
        or conv.padding_mode != "zeros"
        or not same
    ):
        raise ValueError(
            f"convs[{i}]={conv} is no Euler step, expected equal channels, a square odd kernel, stride 1, dilation 1, "
            f"groups 1 and zero 'same' padding"
        )


def _activation_root(negative_slope: float) -> float:
    """The negative ``u`` with ``smooth_leaky_relu(u) = 0``, by bisection to the last bit of a float."""
    if not 0.0 < negative_slope < 1.0:
        raise ValueError(f"negative_slope={negative_slope!r} gives no root, expected a float between 0 and 1")
    low, high = -1.0 / negative_slope, 0.0  # s(low) < 0: softplus(u) < 1 <= -negative_slope * u at u = low
    while low < (middle := 0.5 * (low + high)) < high:
        if negative_slope * middle + (1.0 - negative_slope) * math.log1p(math.exp(middle)) < 0.0:
            low = middle
        else:
            high = middle
    return high


@torch.no_grad()
def center_bias_(bias: Tensor, negative_slope: float = 0.1) -> Tensor:
    """Fill ``bias`` with the root of the activation, -1.62 for slope 0.1: then ``smooth_leaky_relu(bias) = 0``.

    With it zero is an equilibrium of an Euler step, and a stem maps the black background of an image to zero. PyTorch's
    initial biases, near zero, give every background pixel the feature ``s(0) = 0.62``, one large component that all
    features share, which makes a linear head slow to train.

    Args:
        bias: any shape, changed in place and returned.
        negative_slope: of the activation, between 0 and 1.

    Raises:
        ValueError: ``negative_slope`` is not between 0 and 1.

    Source: this project's.
    """
    return bias.fill_(_activation_root(negative_slope))


@torch.no_grad()
def contractive_init_(flow: EulerConvFlow, rate: float, norm: str = "2") -> EulerConvFlow:
    """Filters ``-rate / (2 a)`` at the centre tap from each channel to itself, else zero: the condition with equality.

    All four norms agree on it: without off-centre weights each reads ``rate + 2 a m <= 0``. Biases stay as they are.

    Args:
        flow: changed in place and returned.
        rate: contraction rate ``rho`` > 0.
        norm: as in ``functional.contraction_penalty``.

    Raises:
        TypeError, ValueError: ``rate`` is not a positive finite float; unknown norm.

    Source: the identity-kernel initialisation of arXiv 2508.11432's reference, solved for equality.
    """
    if not isinstance(flow, EulerConvFlow):
        raise TypeError(f"flow is a {type(flow).__name__}, expected an EulerConvFlow")
    _checks.number("rate", rate)
    _checks.choice("norm", norm, _checks.NORMS)
    if rate <= 0:
        raise ValueError(f"rate={rate!r} is not positive, expected a contraction rate > 0")
    centre = flow.kernel_size // 2
    flow.weight.zero_()
    flow.weight[..., centre, centre].diagonal(dim1=-2, dim2=-1).fill_(-rate / (2.0 * flow.slope[0]))
    return flow


@torch.no_grad()
def authors_init_(flow: EulerConvFlow) -> EulerConvFlow:
    """``-5 * eye(k)`` as each of the C * C filters of every step. Biases stay as they are.

    Far from contractive: ``relu(rho - 10 a + b (2 C k - 2) 5)`` a channel in norm "2", 18,480 for the MNIST network at
    ``rho = 2``.

    Args:
        flow: changed in place and returned.

    Raises:
        TypeError: ``flow`` is no EulerConvFlow.

    Source: what the published code of arXiv 2508.11432 starts its contractive network from, and only that one.
    """
    if not isinstance(flow, EulerConvFlow):
        raise TypeError(f"flow is a {type(flow).__name__}, expected an EulerConvFlow")
    flow.weight.copy_(-5.0 * torch.eye(flow.kernel_size, dtype=flow.weight.dtype, device=flow.weight.device))
    return flow
