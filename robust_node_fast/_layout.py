"""Memory layout of results: layout in = layout out. Shared by the fake kernels and the back ends, so they agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Empty = Callable[..., Tensor]  # torch.empty, or what takes its shape, dtype and device


def memory_format(input: Tensor) -> torch.memory_format:
    """channels_last where it is unambiguous, contiguous everywhere else (also for non-dense inputs)."""
    if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def addressable(states: Tensor) -> bool:
    """Whether the elements of each ``(C, H, W)`` lie less than 2^31 apart: what GPU kernels count in 32 bits."""
    sizes, strides = states.shape[-3:], states.stride()[-3:]
    return bool(sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) < 2**31)


def empty_state(input: Tensor) -> Tensor:
    """An uninitialised ``(B, C, H, W)``."""
    return torch.empty_like(input, memory_format=memory_format(input))


def empty_trajectory(input: Tensor, states: int | torch.SymInt) -> Tensor:
    """An uninitialised ``(states, B, C, H, W)`` whose every state has the layout of ``input``."""
    return _empty_states(input, states, memory_format(input), input.dtype)


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what is saved for ``dtype`` tensors: float32 for float16, in which slopes of small steps would be denormal."""
    return torch.float32 if dtype == torch.float16 else dtype


def empty_saved(
    input: Tensor, n_steps: int | torch.SymInt, save_states: bool, dtype: torch.dtype, empty: Empty = torch.empty
) -> tuple[Tensor, Tensor]:
    """Uninitialised states (empty unless wanted) and slopes of all steps, for the backward pass of ``dtype`` tensors.

    Channels last where the kernels compute so.
    """
    dtype = saved_dtype(dtype)
    order = torch.channels_last if input.shape[1] >= 16 else memory_format(input)
    states = _empty_states(input, n_steps, order, dtype, empty) if save_states else input.new_empty(0, dtype=dtype)
    return states, _empty_states(input, n_steps, order, dtype, empty)


def _empty_states(
    input: Tensor, count: int | torch.SymInt, order: torch.memory_format, dtype: torch.dtype, empty: Empty = torch.empty
) -> Tensor:
    batch, channels, height, width = input.shape
    if order is torch.channels_last:
        shape = (count, batch, height, width, channels)
        return empty(shape, dtype=dtype, device=input.device).permute(0, 1, 4, 2, 3)
    return empty((count, batch, channels, height, width), dtype=dtype, device=input.device)
