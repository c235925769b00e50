"""The Triton kernels (kernels/): allocates results in the contract's layout and launches, step by step.

States and gradients between steps are in the tensors' dtype, as PyTorch rounds them, and sums in float32; slopes kept
for the backward pass are rounded to bfloat16 for bfloat16 tensors. Products of float32 follow PyTorch's own switch for
convolutions, ``torch.backends.cudnn.conv.fp32_precision``; with ``RNF_PRECISION=exact`` they are exact.

Nothing here waits for the device, so that CUDA graphs can capture every op once the tuner has seen its shape. Under
torch.compile the launches become nodes of the graph (``_ops.py`` registers that).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from triton import knobs

from robust_node_fast import _checks, _layout
from robust_node_fast.kernels import activation, configs, euler_conv
from robust_node_fast.kernels import contraction_penalty as penalty_kernels

_EXACT = os.environ.get("RNF_PRECISION") == "exact"
_INTERPRETED = knobs.runtime.interpret
_SPLITS = 64  # of the pixels in a weight gradient, at most
_PIXELS = 2048  # and at least so many in each

Grid = Callable[[dict[str, Any]], tuple[Any, ...]]


def _launch(kernel: Any, grid: Grid, *args: Any, **constants: Any) -> None:
    """On the device of the first argument; or into the graph that is being traced."""
    if isinstance(args[0], FunctionalTensor):
        torch.library.wrap_triton(kernel)[grid](*args, **constants)
    elif args[0].is_cuda:
        with torch.cuda.device(args[0].device):
            kernel[grid](*args, **constants)
    else:  # Triton's interpreter
        kernel[grid](*args, **constants)


@cache
def _has_tf32(device: torch.device) -> bool:
    """Of AMD's matrix cores, only those of the MI300 know TensorFloat-32."""
    return torch.version.hip is None or "gfx942" in torch.cuda.get_device_properties(device).gcnArchName


def _launch_convolution(name: str, grid: Grid, input: Tensor, *args: Any, kernel_size: int, **constants: Any) -> None:
    """One of the kernels of ``euler_conv`` with the fastest blocks."""
    if input.dtype != torch.float32:
        products = "16 bit"
    else:
        switch = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        products = "tf32" if switch == "tf32" and not _EXACT and _has_tf32(input.device) else "ieee"
    constants |= {"KERNEL": kernel_size, "WIDEN": _INTERPRETED and input.dtype == torch.bfloat16}
    constants["PRECISION"] = "tf32" if products == "tf32" else "ieee"
    if _INTERPRETED:  # it cannot tune
        kernel = getattr(euler_conv, name)
        constants |= configs.constants(name, configs.INTERPRETED)
    else:
        kernel = configs.tuned(
            *(name, products, int(input.shape[1]), input.device),
            with_bias=name == "weight_gradient" and args[2] is not None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    _launch(kernel, grid, input, *args, **constants)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def _blocks(length: Any, block: Any) -> Any:
    """Integers, which may be symbolic."""
    return -(-length // block)


def _grid(pixels: int, channels: int) -> Grid:
    return lambda meta: (_blocks(pixels, meta["BLOCK_M"]) * _blocks(channels, meta["BLOCK_N"]),)


# ---------------------------------------------------------------------------------------------------------------------
# Activation
# ---------------------------------------------------------------------------------------------------------------------


def _dense_like(tensor: Tensor, template: Tensor) -> Tensor:
    """``tensor`` in the memory order of ``template``, which is one dense block."""
    if tensor.stride() == template.stride():
        return tensor
    return torch.empty_like(template, dtype=tensor.dtype).copy_(tensor)


def smooth_leaky_relu(input: Tensor, negative_slope: float) -> Tensor:
    output = torch.empty_like(input)
    count = input.numel()
    if count:
        args = (_dense_like(input, output), output, count, negative_slope)
        _launch(
            activation.smooth_leaky_relu, lambda meta: (_blocks(count, meta["BLOCK"]),), *args, BLOCK=configs.ELEMENTS
        )
    return output


def smooth_leaky_relu_backward(grad_output: Tensor, input: Tensor, negative_slope: float) -> Tensor:
    output = torch.empty_like(input)
    count = input.numel()
    if count:
        kernel, dense = activation.smooth_leaky_relu_backward, (_dense_like(t, output) for t in (grad_output, input))
        args = (*dense, output, count, negative_slope)
        _launch(kernel, lambda meta: (_blocks(count, meta["BLOCK"]),), *args, BLOCK=configs.ELEMENTS)
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Flow
# ---------------------------------------------------------------------------------------------------------------------


def _banks(weight: Tensor) -> Tensor:
    """``(N, C, C, k, k)``, or one bank for shared weights."""
    return weight if weight.dim() == 5 else weight[None]


def _packed(weight: Tensor) -> Tensor:
    """``(N, taps, C_in, C_out)``"""
    return _banks(weight).permute(0, 3, 4, 2, 1).flatten(1, 2).contiguous()


def _packed_transposed(weight: Tensor) -> Tensor:
    """The filters of the input gradient: taps flipped, inputs and outputs exchanged."""
    return _banks(weight).flip(3, 4).permute(0, 3, 4, 1, 2).flatten(1, 2).contiguous()


def _each(tensors: Tensor) -> list[Tensor]:
    """One by one. Not ``unbind``: what torch.compile makes of writing to its results depends on the batch size."""
    return [tensors[k] for k in range(tensors.shape[0])]


def _usable(tensor: Tensor) -> bool:
    """Whether kernels can work on it as it lies: the fast blocks, which serve channels in multiples of 16, only on
    channels last; the others wherever a sample's elements can be addressed."""
    if tensor.shape[1] % configs.VECTOR != 0:
        return _layout.addressable(tensor)
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _check_size(input: Tensor) -> None:
    """Kernels count pixels and the elements of a sample in 32 bits, up to a block beyond the last."""
    batch, channels, height, width = input.shape
    if batch * height * width >= 2**31 - 1024 or channels * height * width >= 2**31 - 1024:
        raise ValueError(
            f"Triton's kernels count up to 2^31 pixels of a batch and elements of a sample, not {tuple(input.shape)}: "
            "split the batch"
        )


def _run_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    targets: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
    kept: Tensor | None = None,
) -> None:
    """``targets[k]`` becomes the state after step k, unless it is None, and ``slopes[k]`` that step's ``h s'(u)``.

    ``kept[k]``, if given, becomes a copy of the state that enters step k.
    """
    if input.numel() == 0:
        return
    _check_size(input)
    filters, biases = _packed(weight), None if bias is None else bias.contiguous().view(-1, bias.shape[-1])
    batch, channels, height, width = input.shape
    source = input if _usable(input) else input.contiguous(memory_format=torch.channels_last)
    # States that nobody wants, or not as the kernels write them, go into two buffers in turn. Channels last: a block's
    # channels are neighbours in memory.
    spare = min(2, sum(target is None or not _usable(target) for target in targets))
    scratch = cycle([torch.empty_like(input, memory_format=torch.channels_last) for _ in range(spare)])
    for k, (target, slope) in enumerate(zip(targets, slopes, strict=True)):
        bank = 0 if weight.dim() == 4 else k
        if kept is not None:
            kept[k].copy_(source)
        state = target if target is not None and _usable(target) else next(scratch)
        _launch_convolution(
            "euler_step",
            _grid(batch * height * width, channels),
            source,
            filters[bank],
            None if biases is None else biases[bank],
            state,
            slope,
            step_size,
            negative_slope,
            batch,
            channels,
            height,
            width,
            *_strides(source, state, state if slope is None else slope),
            kernel_size=int(weight.shape[-1]),
        )
        if target is not None and target is not state:
            target.copy_(state)
        source = state


def euler_conv_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    return_trajectory: bool,
) -> Tensor:
    targets: list[Tensor | None]
    if return_trajectory:
        output = _layout.empty_trajectory(input, n_steps + 1)
        output[0].copy_(input)
        targets = [*_each(output)[1:]]
    else:
        output = _layout.empty_state(input)
        targets = [*[None] * (n_steps - 1), output]
    _run_flow(input, weight, bias, step_size, negative_slope, targets, [None] * n_steps)
    return output


def euler_conv_flow_saving(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output = _layout.empty_state(input)
    kept, slopes = _layout.empty_saved(input, n_steps, save_states, input.dtype)
    targets: list[Tensor | None] = [*[None] * (n_steps - 1), output]
    copied = kept if save_states else None
    if save_states and kept.dtype == input.dtype:  # what is kept is what the steps read
        input = kept[0].copy_(input)
        targets, copied = [*_each(kept)[1:], output], None
    _run_flow(input, weight, bias, step_size, negative_slope, targets, _each(slopes), copied)
    return output, kept, slopes


class _FilterGradients:
    """Gradients for all banks of filters and biases, summed in float32, step by step."""

    def __init__(self, v: Tensor, weight: Tensor, wants_weight: bool, wants_bias: bool) -> None:
        batch, channels, height, width = v.shape
        self.pixels = batch * height * width
        self.splits = torch.sym_min(_SPLITS, _blocks(self.pixels, _PIXELS))  # the batch may be symbolic
        self.shared, self.kernel_size = weight.dim() == 4, int(weight.shape[-1])
        banks = 1 if self.shared else weight.shape[0]
        of_weight, of_bias = (self.kernel_size**2, channels, channels), (channels,)
        options: dict[str, Any] = {"dtype": torch.float32, "device": v.device}
        # A bank to which one program adds, and only once, need not start at zero.
        once = self.splits == 1 and not self.shared
        create = torch.empty if once else torch.zeros
        self.weight = create((banks, *of_weight), **options) if wants_weight else None
        self.bias = torch.zeros((banks, *of_bias), **options) if wants_bias else None
        self.atomic = not once and not (self.splits > 1 and torch.are_deterministic_algorithms_enabled())
        self.parts: tuple[Tensor, Tensor | None] | None = None  # of each split, added up in their order
        if wants_weight and not once and not self.atomic:
            parts_of_bias = torch.empty((self.splits, *of_bias), **options) if wants_bias else None
            self.parts = torch.empty((self.splits, *of_weight), **options), parts_of_bias

    def add(self, step: int, state: Tensor | None, v: Tensor) -> None:
        """What the step adds that ``state`` entered; without a state, to the bias alone."""
        if self.pixels == 0:
            return
        bank = 0 if self.shared else step
        bias = None if self.bias is None else self.bias[bank]
        if self.weight is None or state is None:
            if bias is not None:
                bias.add_(v.sum((0, 2, 3), dtype=torch.float32))
        elif self.parts is None:
            self._launch(state, v, self.weight[bank], bias)
        else:
            weight_parts, bias_parts = self.parts
            self._launch(state, v, weight_parts, bias_parts)
            self.weight[bank].add_(weight_parts.sum(0))
            if bias is not None and bias_parts is not None:
                bias.add_(bias_parts.sum(0))

    def _launch(self, state: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        batch, channels, height, width = v.shape

        def grid(meta: dict[str, Any]) -> tuple[Any, ...]:
            blocks = _blocks(channels, meta["BLOCK_M"]) * _blocks(channels, meta["BLOCK_N"])
            return self.kernel_size**2 * blocks, self.splits

        _launch_convolution(
            "weight_gradient",
            grid,
            state,
            v,
            weight,
            bias,
            batch,
            channels,
            height,
            width,
            _blocks(self.pixels, self.splits),
            *_strides(state, v),
            ATOMIC=self.atomic,
            kernel_size=self.kernel_size,
        )

    def results(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """In the shapes and dtype of ``weight`` and its bias; empty where nothing was wanted."""
        of_weight, of_bias = weight.new_empty(0), weight.new_empty(0)
        if self.weight is not None:
            taps = self.weight.view(-1, self.kernel_size, self.kernel_size, *self.weight.shape[2:]).permute(
                0, 4, 3, 1, 2
            )
            of_weight = taps.reshape(weight.shape).to(weight.dtype).contiguous()
        if self.bias is not None:
            of_bias = self.bias.reshape(weight.shape[:-3]).to(weight.dtype)
        return of_weight, of_bias


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
    states: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wants_input, wants_weight, wants_bias = output_mask
    if slopes is None:
        _, states, slopes = euler_conv_flow_saving(
            input, weight, bias, step_size, negative_slope, n_steps, wants_weight
        )
    elif wants_weight and states is None:
        raise ValueError("slopes without states give no gradient of the weight")
    _check_size(input)
    batch, channels, height, width = input.shape
    # All of the loop's tensors have the memory order of what was saved; only the result has its own.
    grad = _dense_like(grad_output[-1] if return_trajectory else grad_output, slopes[-1])
    v = (slopes[-1] * grad).to(input.dtype)
    grads = cycle([torch.empty_like(v) for _ in range(min(2, n_steps - 1))])
    others = cycle([torch.empty_like(v) if n_steps > 1 else v, v])
    result = _layout.empty_state(input) if wants_input else input.new_empty(0)
    last = result if not wants_input or _usable(result) else torch.empty_like(v)
    sums = _FilterGradients(v, weight, wants_weight, wants_bias)
    filters = _packed_transposed(weight)
    for k in reversed(range(n_steps)):
        state = states[k].to(input.dtype) if wants_weight and states is not None else None
        sums.add(k, state if state is None or _usable(state) else _dense_like(state, v), v)
        if input.numel() == 0 or (k == 0 and not wants_input):
            continue
        below, v_below = (next(grads), next(others)) if k else (last, None)
        _launch_convolution(
            "gradient_step",
            _grid(batch * height * width, channels),
            v,
            filters[0 if weight.dim() == 4 else k],
            _dense_like(grad, v),
            _dense_like(grad_output[k], v) if return_trajectory else None,
            _dense_like(slopes[k - 1], v) if k else None,
            below,
            v_below,
            batch,
            channels,
            height,
            width,
            *_strides(v, below),
            kernel_size=int(weight.shape[-1]),
        )
        if v_below is not None:
            grad, v = below, v_below
    return result if last is result else result.copy_(last), *sums.results(weight)


def euler_conv_step(
    input: Tensor, weight: Tensor, bias: Tensor | None, step_size: float, negative_slope: float
) -> Tensor:
    return euler_conv_flow(input, weight, bias, step_size, negative_slope, 1, False)


def euler_conv_step_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return euler_conv_flow_backward(grad_output, input, weight, bias, step_size, negative_slope, 1, False, output_mask)


# ---------------------------------------------------------------------------------------------------------------------
# Penalty: one launch for all steps, one more for its gradient
# ---------------------------------------------------------------------------------------------------------------------


def _penalty_grid(channels: int, steps: int) -> Grid:
    return lambda meta: (_blocks(channels, meta["BLOCK_D"]), steps)


def contraction_penalty(
    weight: Tensor, rate: float, slope_low: float, slope_high: float, norm: str, reduction: str
) -> tuple[Tensor, Tensor]:
    banks = _banks(weight).contiguous()
    steps, channels = banks.shape[:2]
    per_channel = weight.shape[:-3]
    excess = weight.new_empty(per_channel, dtype=torch.float32)
    coefficients = weight.new_empty((*per_channel[:-1], 3, channels))
    scale = 1.0 / (steps * channels) if reduction == "mean" else 1.0
    _launch(
        penalty_kernels.penalty,
        _penalty_grid(channels, steps),
        banks,
        excess,
        coefficients,
        channels,
        rate,
        slope_low,
        slope_high,
        scale,
        NORM=_checks.NORMS.index(norm),
        TAPS=banks.shape[-1] ** 2,
        **configs.PENALTY,
    )
    value = excess if reduction == "none" else excess.sum() * scale
    return value.to(weight.dtype), coefficients


def contraction_penalty_backward(grad_output: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
    grad_weight = weight.new_empty(weight.shape)
    banks = _banks(weight).contiguous()
    steps, channels = banks.shape[:2]
    _launch(
        penalty_kernels.penalty_gradient,
        _penalty_grid(channels, steps),
        grad_output.contiguous(),
        banks,
        coefficients,
        grad_weight,
        channels,
        PER_CHANNEL=grad_output.dim() > 0,
        TAPS=banks.shape[-1] ** 2,
        **configs.PENALTY,
    )
    return grad_weight


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        smooth_leaky_relu,
        smooth_leaky_relu_backward,
        euler_conv_step,
        euler_conv_step_backward,
        euler_conv_flow,
        euler_conv_flow_saving,
        euler_conv_flow_backward,
        contraction_penalty,
        contraction_penalty_backward,
    )
}
