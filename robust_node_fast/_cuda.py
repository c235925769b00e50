"""The CUDA kernels (csrc/cuda/): allocates results in the contract's layout and hands over addresses.

A flow runs in one launch while each sample's state is in a block's shared memory, in float32 whatever the tensors'
dtype: for float32 and k in {1, 3, 5}, float16 or bfloat16 and k = 3, up to 32 channels, and images which ``refuses``
does not. The penalty takes any filters of these dtypes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from robust_node_fast import _checks, _layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of registration.cpp

_native: ModuleType | None
try:
    _native = importlib.import_module("robust_node_fast._cuda_C")
    _missing = ""
except ImportError as error:
    _native = None
    _missing = str(error)


def missing() -> str | None:
    """Why the library cannot be used with this PyTorch, or ``None``."""
    if _native is None:
        return f"the CUDA library is missing ({_missing}): reinstall with nvcc; pip install -v shows what went wrong"
    return None if torch.version.hip is None else "the CUDA library does not serve ROCm devices"


def refuses(op: str, dtype: torch.dtype, sizes: Sequence[int], kernel_size: int) -> str | None:
    """Why ``op`` cannot run for these sizes, the device's number first and then a flow's ``C, H, W``; or ``None``.

    A flow must fit a block's shared memory; any filters fit the penalties. Without sizes: small ones, on any device.
    """
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    device, *state = sizes or (None, 1, 1, 1)
    native = _library()
    if device is not None and (reason := _unusable(device)) is not None:
        return reason
    if op.startswith("contraction"):
        return None
    needed = native.flow_shared_bytes(DTYPES.index(dtype), [1, *state, kernel_size, 1])
    if needed == 0:
        most = "up to 32 channels, in 16 bits with k = 3"
        return f"has flows of {most}, not of {tuple(state)} in {_name(dtype)} with k = {kernel_size}"
    if device is None:
        return None
    limit = native.shared_memory_limit(device)
    return None if needed <= limit else f"needs {needed} bytes of shared memory for {tuple(state)}, {limit} there are"


@cache
def _unusable(device: int) -> str | None:
    """Why the library cannot run on a device that PyTorch can use, or ``None``."""
    native = _library()
    try:
        native.shared_memory_limit(device)
    except RuntimeError as error:  # the driver may be older than the toolkit of this build
        return f"cannot use device {device} ({str(error).splitlines()[0]})"
    major, minor = torch.cuda.get_device_capability(device)
    least = min(int(name.removeprefix("sm_")) for name in native.build_info()["architectures"])
    return None if 10 * major + minor >= least else f"has code from sm_{least} on, the device is sm_{major}{minor}"


def _library() -> ModuleType:
    if _native is None:
        raise RuntimeError(f"robust_node_fast: {missing()}")
    return _native


def _queue(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device and the handle of its current stream."""
    index = tensor.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _storage(tensor: Tensor) -> int:
    """The tensor's dtype as the library counts them."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"a tensor has dtype {_name(tensor.dtype)}, expected one of {', '.join(map(_name, DTYPES))}")
    return DTYPES.index(tensor.dtype)


def _address(name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> int:
    """Where the tensor is; the kernels read it as ``dtype``, or that of ``like``, on the device of ``like``."""
    if tensor.dtype != (dtype or like.dtype):
        raise TypeError(f"{name} has dtype {_name(tensor.dtype)}, expected {_name(dtype or like.dtype)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")
    return tensor.data_ptr()


def _dense(name: str, tensor: Tensor, like: Tensor) -> tuple[Tensor, int]:
    """The tensor in contiguous form, to be kept until the launch, and where it is."""
    dense = tensor.contiguous()
    return dense, _address(name, dense, like)


def _addressable(states: Tensor) -> Tensor:
    """Itself, or a copy whose elements the kernels can reach."""
    return states if _layout.addressable(states) else states.contiguous()


def _strided(
    name: str, tensor: Tensor | None, like: Tensor, states: int | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Address and strides of a state with the shape of ``like``, or of so many."""
    if tensor is None:
        return None
    allowed = [like.shape] if states is None else [like.shape, (states, *like.shape)]
    if tuple(tensor.shape) not in [tuple(shape) for shape in allowed]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {' or '.join(map(str, map(tuple, allowed)))}"
        )
    return _address(name, tensor, like, dtype), tensor.stride()


def _saved(name: str, tensor: Tensor | None, input: Tensor, n_steps: int) -> Any:
    """Address and strides of what each step keeps."""
    return _strided(name, tensor, input, n_steps, _layout.saved_dtype(input.dtype))


def _flow_sizes(input: Tensor, weight: Tensor, bias: Tensor | None, n_steps: int) -> tuple[list[int], bool]:
    """Batch, channels, height, width, kernel and steps, and whether one bank of filters serves all steps."""
    shared = weight.dim() == 4
    channels, kernel = input.shape[1], weight.shape[-1]
    banks = () if shared else (n_steps,)
    if tuple(weight.shape) != (*banks, channels, channels, kernel, kernel):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, which does not fit {channels} channels")
    if bias is not None and tuple(bias.shape) != (*banks, channels):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(*banks, channels)}")
    return [*input.shape, kernel, n_steps], shared


class _Workspace:
    """Memory for a launch, allocated when its size is known; PyTorch reuses it in the order of the stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, size: int) -> int:
        self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.memory.data_ptr()


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
) -> None:
    storage, input = _storage(input), _addressable(input)
    weight, filters = _dense("weight", weight, input)
    bias, biases = (None, None) if bias is None else _dense("bias", bias, input)
    _library().flow_forward(
        *_queue(input),
        storage,
        *_flow_sizes(input, weight, bias, n_steps),
        step_size,
        negative_slope,
        _strided("input", input, input),
        filters,
        biases,
        _strided("output", output, input, n_steps + 1),
        _saved("states", states, input, n_steps),
        _saved("slopes", slopes, input, n_steps),
    )


def euler_conv_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    return_trajectory: bool,
) -> Tensor:
    output = _layout.empty_trajectory(input, n_steps + 1) if return_trajectory else _layout.empty_state(input)
    _run_flow(input, weight, bias, step_size, negative_slope, n_steps, output, None, None)
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
    states, slopes = _layout.empty_saved(input, n_steps, save_states, input.dtype)
    _run_flow(input, weight, bias, step_size, negative_slope, n_steps, output, states if save_states else None, slopes)
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
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input = _layout.empty_state(input) if output_mask[0] else None
    grad_weight = weight.new_empty(weight.shape) if output_mask[1] else None
    grad_bias = weight.new_empty(weight.shape[:-3]) if output_mask[2] else None
    if any(output_mask):
        input, grad_output = _addressable(input), _addressable(grad_output)
        if states is not None:  # a single step's are its input
            states = _addressable(states.to(_layout.saved_dtype(input.dtype)))
        weight, filters = _dense("weight", weight, input)
        bias, biases = (None, None) if bias is None else _dense("bias", bias, input)
        _library().flow_backward(
            *_queue(input),
            _storage(input),
            *_flow_sizes(input, weight, bias, n_steps),
            step_size,
            negative_slope,
            _strided("grad_output", grad_output, input, n_steps + 1),
            _strided("input", input, input),
            filters,
            biases,
            _saved("states", states, input, n_steps),
            _saved("slopes", slopes, input, n_steps),
            _strided("grad_input", grad_input, input),
            None if grad_weight is None else grad_weight.data_ptr(),
            None if grad_bias is None else grad_bias.data_ptr(),
            _Workspace(input.device),
        )
    unwanted = input.new_empty(0)

    def or_unwanted(grad: Tensor | None) -> Tensor:
        return unwanted.clone() if grad is None else grad

    return or_unwanted(grad_input), or_unwanted(grad_weight), or_unwanted(grad_bias)


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


def _penalty_sizes(weight: Tensor) -> tuple[int, int, int]:
    """Steps, channels and kernel size."""
    return weight.shape[0] if weight.dim() == 5 else 1, weight.shape[-3], weight.shape[-1]


def contraction_penalty(
    weight: Tensor, rate: float, slope_low: float, slope_high: float, norm: str, reduction: str
) -> tuple[Tensor, Tensor]:
    per_channel = weight.shape[:-3]
    value = weight.new_empty(per_channel if reduction == "none" else ())
    coefficients = weight.new_empty((*per_channel[:-1], 3, per_channel[-1]))
    weight, filters = _dense("weight", weight, weight)
    _library().contraction_penalty(
        *_queue(weight),
        _storage(weight),
        *_penalty_sizes(weight),
        rate,
        slope_low,
        slope_high,
        _checks.NORMS.index(norm),
        _checks.REDUCTIONS.index(reduction),
        filters,
        value.data_ptr(),
        coefficients.data_ptr(),
        _Workspace(weight.device),
    )
    return value, coefficients


def contraction_penalty_backward(grad_output: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
    grad_weight = weight.new_empty(weight.shape)
    grad_output, upstream = _dense("grad_output", grad_output, weight)
    weight, filters = _dense("weight", weight, weight)
    coefficients, derivatives = _dense("coefficients", coefficients, weight)
    channels = weight.shape[:-3].numel()
    if coefficients.numel() != 3 * channels or grad_output.numel() != (channels if grad_output.dim() else 1):
        raise ValueError("grad_output and coefficients do not belong to this weight")
    _library().contraction_penalty_backward(
        *_queue(weight),
        _storage(weight),
        *_penalty_sizes(weight),
        upstream,
        grad_output.dim() > 0,
        filters,
        derivatives,
        grad_weight.data_ptr(),
    )
    return grad_weight


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        euler_conv_step,
        euler_conv_step_backward,
        euler_conv_flow,
        euler_conv_flow_saving,
        euler_conv_flow_backward,
        contraction_penalty,
        contraction_penalty_backward,
    )
}
