"""The Triton kernels (kernels/): allocates results in the contract's layout and launches, step by step.

States between steps are in the tensor's dtype, sums in float32. float32 products follow PyTorch's own switch for
convolutions, ``torch.backends.cudnn.allow_tf32``, unless ``RNF_PRECISION=exact``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from robust_node_fast import _checks, _layout
from robust_node_fast.kernels import configs, contraction_penalty

_EXACT = os.environ.get("RNF_PRECISION") == "exact"
_INTERPRETED = knobs.runtime.interpret
_SPLITS = 64  # of the pixels in a weight gradient, at most
_PIXELS = 2048  # and at least so many in each


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    tf32 = torch.backends.cudnn.allow_tf32 and not _EXACT
    return {
        "PRECISION": "tf32" if dtype == torch.float32 and tf32 else "ieee",
        "WIDEN": _INTERPRETED and dtype == torch.bfloat16,
    }


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[-4:]]


def _banks(weight: Tensor) -> Tensor:
    """``(N, C, C, k, k)``, or one bank for shared weights."""
    return weight if weight.dim() == 5 else weight[None]


def _packed(weight: Tensor) -> Tensor:
    """``(N, taps, C_in, C_out)``"""
    return _banks(weight).permute(0, 3, 4, 2, 1).flatten(1, 2).contiguous()


def _packed_transposed(weight: Tensor) -> Tensor:
    """The filters of the input gradient: taps flipped, inputs and outputs exchanged."""
    return _banks(weight).flip(3, 4).permute(0, 3, 4, 1, 2).flatten(1, 2).contiguous()


def _grid(rows: int, columns: int) -> Callable[[dict[str, Any]], tuple[int]]:
    return lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"]),)


def _step(
    input: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    output: Tensor,
    slopes: Tensor | None,
    step_size: float,
    negative_slope: float,
    kernel_size: int,
) -> None:
    batch, channels, height, width = input.shape
    configs.launch(
        configs.euler_step,
        _grid(batch * height * width, channels),
        input,
        filters,
        input if bias is None else bias,
        output,
        output if slopes is None else slopes,
        step_size,
        negative_slope,
        batch,
        channels,
        height,
        width,
        *_strides(input, output),
        HAS_BIAS=bias is not None,
        SAVE_SLOPES=slopes is not None,
        KERNEL=kernel_size,
        **_precision(input.dtype),
    )


def _run_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    states: Sequence[Tensor],
    slopes: Sequence[Tensor] | None,
) -> None:
    """``states[k]`` becomes the state after step k."""
    if input.numel() == 0:
        return
    filters = _packed(weight)
    with torch.cuda.device_of(input):
        for k in range(n_steps):
            bank = 0 if weight.dim() == 4 else k
            b = None if bias is None else bias.contiguous().view(-1, bias.shape[-1])[bank]
            source = input if k == 0 else states[k - 1]
            slope = None if slopes is None else slopes[k]
            _step(source, filters[bank], b, states[k], slope, step_size, negative_slope, weight.shape[-1])


def euler_conv_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    return_trajectory: bool,
) -> Tensor:
    if return_trajectory:
        output = _layout.empty_trajectory(input, n_steps + 1)
        output[0].copy_(input)
        states = list(output[1:])
    else:
        output = _layout.empty_state(input)
        other = torch.empty_like(output) if n_steps > 1 else output
        states = [output if (n_steps - k) % 2 else other for k in range(n_steps)]
    _run_flow(input, weight, bias, step_size, negative_slope, n_steps, states, None)
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
    if save_states:
        kept[0].copy_(input)
        states = [*kept[1:], output]
    else:
        other = torch.empty_like(output)
        states = [output if (n_steps - k) % 2 else other for k in range(n_steps)]
    _run_flow(input, weight, bias, step_size, negative_slope, n_steps, states, slopes.unbind(0))
    return output, kept, slopes


def _weight_gradient(state: Tensor, v: Tensor, kernel_size: int, wants_bias: bool) -> tuple[Tensor, Tensor]:
    """``(taps, C_in, C_out)`` and ``(C,)``, in float32."""
    batch, channels, height, width = v.shape
    pixels = batch * height * width
    splits = min(_SPLITS, triton.cdiv(pixels, _PIXELS))
    atomic = splits > 1 and not torch.are_deterministic_algorithms_enabled()
    copies = 1 if atomic else splits
    shape = (copies, kernel_size**2, channels, channels)
    create = state.new_zeros if atomic else state.new_empty
    weight_sums = create(shape, dtype=torch.float32)
    bias_sums = create((copies, channels), dtype=torch.float32)
    per_split = triton.cdiv(triton.cdiv(pixels, splits), 64) * 64  # whole blocks

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        blocks = triton.cdiv(channels, meta["BLOCK_M"]) * triton.cdiv(channels, meta["BLOCK_N"])
        return kernel_size**2 * blocks, splits

    configs.launch(
        configs.weight_gradient,
        grid,
        state,
        v,
        weight_sums,
        bias_sums,
        batch,
        channels,
        height,
        width,
        per_split,
        *_strides(state, v),
        HAS_BIAS=wants_bias,
        ATOMIC=atomic,
        KERNEL=kernel_size,
        **_precision(state.dtype),
    )
    return weight_sums.sum(0), bias_sums.sum(0)


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
    kernel_size, shared = int(weight.shape[-1]), weight.dim() == 4
    needs_states = wants_weight or wants_bias
    if slopes is None:
        _, states, slopes = euler_conv_flow_saving(
            input, weight, bias, step_size, negative_slope, n_steps, needs_states
        )
    elif needs_states and states is None:
        raise ValueError("slopes without states give no gradient of the weight")
    order = _layout.empty_state(slopes[0])  # all of the loop's tensors share its strides

    def placed(tensor: Tensor) -> Tensor:
        return tensor if tensor.stride() == order.stride() else torch.empty_like(order).copy_(tensor)

    steps = list(slopes.to(input.dtype))
    grad = placed(grad_output[-1] if return_trajectory else grad_output)
    banks = 1 if shared else n_steps
    grad_weight = weight.new_zeros((banks, kernel_size**2, *weight.shape[-4:-2]), dtype=torch.float32)
    grad_bias = weight.new_zeros((banks, weight.shape[-4]), dtype=torch.float32)
    filters = _packed_transposed(weight)
    v = steps[-1] * grad
    with torch.cuda.device_of(input):
        for k in reversed(range(n_steps) if input.numel() else ()):
            bank = 0 if shared else k
            if needs_states:
                assert states is not None
                of_weight, of_bias = _weight_gradient(states[k], v, kernel_size, wants_bias)
                grad_weight[bank] += of_weight
                grad_bias[bank] += of_bias
            if k == 0 and not wants_input:
                break
            below, v_below = torch.empty_like(grad), torch.empty_like(v)
            extra = placed(grad_output[k]) if return_trajectory else grad
            batch, channels, height, width = input.shape
            configs.launch(
                configs.gradient_step,
                _grid(batch * height * width, channels),
                v,
                filters[bank],
                grad,
                extra,
                steps[k - 1],
                below,
                v_below,
                batch,
                channels,
                height,
                width,
                *_strides(v),
                HAS_EXTRA=return_trajectory,
                HAS_BELOW=k > 0,
                KERNEL=kernel_size,
                **_precision(input.dtype),
            )
            grad, v = below, v_below
    unwanted = input.new_empty(0)
    result = _layout.empty_state(input).copy_(grad) if wants_input else unwanted
    taps = grad_weight.view(banks, kernel_size, kernel_size, *weight.shape[-4:-2]).permute(0, 4, 3, 1, 2)
    return (
        result,
        taps.to(weight.dtype).reshape(weight.shape).contiguous() if wants_weight else unwanted.clone(),
        grad_bias.to(weight.dtype).reshape(weight.shape[:-3]) if wants_bias else unwanted.clone(),
    )


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
    return euler_conv_flow_backward(
        grad_output, input, weight, bias, step_size, negative_slope, 1, False, output_mask
    )


def _penalty_blocks(channels: int) -> dict[str, int]:
    return {"BLOCK_D": min(16, triton.next_power_of_2(channels)), "BLOCK_E": 128}


def penalty(
    weight: Tensor, rate: float, slope_low: float, slope_high: float, norm: str, reduction: str
) -> tuple[Tensor, Tensor]:
    banks = _banks(weight).contiguous()
    steps, channels, taps = banks.shape[0], banks.shape[1], banks.shape[-1] ** 2
    per_channel = weight.shape[:-3]
    excess = weight.new_empty(per_channel, dtype=torch.float32)
    coefficients = weight.new_empty((*per_channel[:-1], 3, channels))
    blocks = _penalty_blocks(channels)
    scale = 1.0 / (steps * channels) if reduction == "mean" else 1.0
    with torch.cuda.device_of(weight):
        contraction_penalty.penalty[(triton.cdiv(channels, blocks["BLOCK_D"]), steps)](
            banks,
            excess,
            coefficients,
            channels,
            rate,
            slope_low,
            slope_high,
            scale,
            NORM=_checks.NORMS.index(norm),
            TAPS=taps,
            **blocks,
        )
    value = excess if reduction == "none" else excess.sum() * scale
    return value.to(weight.dtype), coefficients


def penalty_backward(grad_output: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
    grad_weight = weight.new_empty(weight.shape)
    banks = _banks(weight).contiguous()
    steps, channels, taps = banks.shape[0], banks.shape[1], banks.shape[-1] ** 2
    blocks = _penalty_blocks(channels)
    with torch.cuda.device_of(weight):
        contraction_penalty.penalty_gradient[(triton.cdiv(channels, blocks["BLOCK_D"]), steps)](
            grad_output.contiguous(),
            banks,
            coefficients,
            grad_weight,
            channels,
            PER_CHANNEL=grad_output.dim() > 0,
            TAPS=taps,
            **blocks,
        )
    return grad_weight


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "euler_conv_step": euler_conv_step,
    "euler_conv_step_backward": euler_conv_step_backward,
    "euler_conv_flow": euler_conv_flow,
    "euler_conv_flow_saving": euler_conv_flow_saving,
    "euler_conv_flow_backward": euler_conv_flow_backward,
    "contraction_penalty": penalty,
    "contraction_penalty_backward": penalty_backward,
}
