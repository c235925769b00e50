"""The compiled CPU kernels (csrc/): allocates results in the contract's layout and hands over.

float16 and bfloat16 tensors are computed in float32 inside and rounded once at the end; only the products of a flow in
bfloat16 are rounded to it where the processor has a unit for them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robust_node_fast import _checks, _layout
from robust_node_fast._C import HUGE_PAGE, Memory

_native = torch.ops.robust_node_fast_cpu
_flow_forward = _native.flow_forward.default
_flow_backward = _native.flow_backward.default
_flow_bound = _native.flow_bound.default
_convolution_bound = _native.convolution_bound.default
_activation = _native.activation.default
_contraction_penalty = _native.contraction_penalty.default
_contraction_penalty_backward = _native.contraction_penalty_backward.default
_increment = _native.increment.default
_increment_backward = _native.increment_backward.default

# The layouts of csrc/cpu/api.h. "best" takes Winograd's algorithm for 3x3 filters in float32, whose rounding errors are
# somewhat larger than those of the direct one, "planes" (docs/kernels.md has the bounds).
_LAYOUTS = ("best", "planes", "channels", "strips")
_exact = os.environ.get("RNF_PRECISION") == "exact"
layout = "planes" if _exact else "best"

# Products in bfloat16 make an error that grows with the step size; PyTorch rounds every state, whatever the step. Up to
# here ours is the smaller one.
_LARGEST_BFLOAT16_STEP = 0.25


def _rounds_products(bfloat16: bool, step_size: float) -> bool:
    return bfloat16 and not _exact and abs(step_size) <= _LARGEST_BFLOAT16_STEP


# What was saved for backward, in the backward op's arguments: the kernels read bfloat16 as it is.
_SAVED = 9


def _widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run in float32 for float16 and bfloat16 tensors."""

    def up(value: Any, narrow: Sequence[torch.dtype] = (torch.float16, torch.bfloat16)) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in narrow else value

    def run(*args: Any) -> Any:
        dtype = args[0].dtype
        if dtype not in (torch.float16, torch.bfloat16):
            return function(*args)
        is_flow = function.__name__.startswith("euler")
        options = {"bfloat16": dtype == torch.bfloat16} if is_flow else {}
        saved = (up(value, (torch.float16,)) for value in args[_SAVED:])
        result = function(*map(up, args[:_SAVED]), *saved, **options)
        if isinstance(result, Tensor):
            return result.to(dtype)
        if function is euler_conv_flow_saving:
            return result[0].to(dtype), *result[1:]
        return tuple(r.to(dtype) for r in result)

    return run


def _dense_like(tensor: Tensor, template: Tensor) -> Tensor:
    """``tensor`` in the memory order of ``template``, which is one dense block."""
    if tensor.stride() == template.stride():
        return tensor
    return torch.empty_like(template).copy_(tensor)


def smooth_leaky_relu(input: Tensor, negative_slope: float) -> Tensor:
    output = torch.empty_like(input)
    _activation(None, _dense_like(input, output), negative_slope, output)
    return output


def smooth_leaky_relu_backward(grad_output: Tensor, input: Tensor, negative_slope: float) -> Tensor:
    output = torch.empty_like(input)
    _activation(_dense_like(grad_output, output), _dense_like(input, output), negative_slope, output)
    return output


def _run_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    output: Tensor,
    states: Tensor | None,
    slopes: Tensor | None,
    bfloat16: bool,
) -> None:
    _flow_forward(
        input,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        step_size,
        negative_slope,
        n_steps,
        _LAYOUTS.index(layout),
        _rounds_products(bfloat16, step_size),
        output,
        states,
        slopes,
    )


def euler_conv_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    return_trajectory: bool,
    *,
    bfloat16: bool = False,
) -> Tensor:
    output = _layout.empty_trajectory(input, n_steps + 1) if return_trajectory else _layout.empty_state(input)
    _run_flow(input, weight, bias, step_size, negative_slope, n_steps, output, None, None, bfloat16)
    return output


def _kept(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty`` in memory that an earlier call has used: fresh pages take as long as what is written to them."""
    count = math.prod(shape)
    if count * dtype.itemsize < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(Memory(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


def euler_conv_flow_saving(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    save_states: bool,
    *,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    output = _layout.empty_state(input)
    dtype = torch.bfloat16 if bfloat16 else input.dtype
    states, slopes = _layout.empty_saved(input, n_steps, save_states, dtype, _kept)
    kept = states if save_states else None
    _run_flow(input, weight, bias, step_size, negative_slope, n_steps, output, kept, slopes, bfloat16)
    return output, states, slopes


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
    *,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input = _layout.empty_state(input) if output_mask[0] else None
    grad_weight = weight.new_empty(weight.shape) if output_mask[1] else None
    grad_bias = weight.new_empty(weight.shape[:-3]) if output_mask[2] else None
    _flow_backward(
        grad_output,
        input,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        step_size,
        negative_slope,
        n_steps,
        _LAYOUTS.index(layout),
        _rounds_products(bfloat16, step_size),
        states,
        slopes,
        grad_input,
        grad_weight,
        grad_bias,
    )
    unwanted = input.new_empty(0)

    def or_unwanted(grad: Tensor | None) -> Tensor:
        return unwanted.clone() if grad is None else grad

    return or_unwanted(grad_input), or_unwanted(grad_weight), or_unwanted(grad_bias)


def euler_conv_flow_bound(
    input: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
) -> tuple[Tensor, Tensor]:
    centre, bound = _layout.empty_state(input), _layout.empty_state(input)
    _flow_bound(
        input,
        radius,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        step_size,
        negative_slope,
        n_steps,
        centre,
        bound,
    )
    return centre, bound


def activated_conv_bound(
    input: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float
) -> tuple[Tensor, Tensor]:
    shape = (input.shape[0], weight.shape[0], *input.shape[2:])
    centre, bound = input.new_empty(shape), input.new_empty(shape)
    contiguous = None if bias is None else bias.contiguous()
    _convolution_bound(input, radius, weight.contiguous(), contiguous, negative_slope, centre, bound)
    return centre, bound


def euler_conv_step(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    *,
    bfloat16: bool = False,
) -> Tensor:
    return euler_conv_flow(input, weight, bias, step_size, negative_slope, 1, False, bfloat16=bfloat16)


def euler_conv_step_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    output_mask: Sequence[bool],
    *,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return euler_conv_flow_backward(
        grad_output, input, weight, bias, step_size, negative_slope, 1, False, output_mask, bfloat16=bfloat16
    )


def contraction_penalty(
    weight: Tensor, rate: float, slope_low: float, slope_high: float, norm: str, reduction: str
) -> tuple[Tensor, Tensor]:
    per_channel = weight.shape[:-3]
    value = weight.new_empty(per_channel if reduction == "none" else ())
    coefficients = weight.new_empty((*per_channel[:-1], 3, per_channel[-1]))
    _contraction_penalty(
        weight.contiguous(),
        rate,
        slope_low,
        slope_high,
        _checks.NORMS.index(norm),
        _checks.REDUCTIONS.index(reduction),
        value,
        coefficients,
    )
    return value, coefficients


def contraction_penalty_backward(grad_output: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
    grad_weight = weight.new_empty(weight.shape)
    _contraction_penalty_backward(grad_output.contiguous(), weight.contiguous(), coefficients, grad_weight)
    return grad_weight


# In kept memory, as one training step asks for it a dozen times: fresh pages took a quarter of a step of 100 classes.
def _rise(input: Tensor, anchor: Tensor, tangent: bool) -> Tensor:
    output = _kept(tuple(input.shape), dtype=input.dtype, device=input.device)
    _increment(input.contiguous(), anchor.contiguous(), tangent, output)
    return output


def _rise_backward(grad_output: Tensor, input: Tensor, anchor: Tensor, tangent: bool) -> tuple[Tensor, Tensor]:
    grad_input = _kept(tuple(input.shape), dtype=input.dtype, device=input.device)
    grad_anchor = anchor.new_empty(anchor.shape)
    _increment_backward(
        grad_output.contiguous(), input.contiguous(), anchor.contiguous(), tangent, grad_input, grad_anchor
    )
    return grad_input, grad_anchor


def softplus_increment(delta: Tensor, anchor: Tensor) -> Tensor:
    return _rise(delta, anchor, False)


def softplus_increment_backward(grad_output: Tensor, delta: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    return _rise_backward(grad_output, delta, anchor, False)


def softplus_increment_and_tangent(both: Tensor, anchor: Tensor) -> Tensor:
    return _rise(both, anchor, True)


def softplus_increment_and_tangent_backward(grad_output: Tensor, both: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    return _rise_backward(grad_output, both, anchor, True)


# Bounds are not widened: in float16 their results would have to be rounded outward.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "euler_conv_flow_bound": euler_conv_flow_bound,
    "activated_conv_bound": activated_conv_bound,
    **{
        function.__name__: _widened(function)
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
            softplus_increment,
            softplus_increment_backward,
            softplus_increment_and_tangent,
            softplus_increment_and_tangent_backward,
        )
    },
}
