"""Memory layout of results: layout in = layout out. Shared by the fake kernels and the back ends, so they agree."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(input: Tensor) -> torch.memory_format:
    """channels_last where it is unambiguous, contiguous everywhere else (also for non-dense inputs)."""
    if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_state(input: Tensor) -> Tensor:
    """An uninitialised ``(B, C, H, W)``."""
    return torch.empty_like(input, memory_format=memory_format(input))


def empty_trajectory(input: Tensor, states: int | torch.SymInt) -> Tensor:
    """An uninitialised ``(states, B, C, H, W)`` whose every state has the layout of ``input``."""
    batch, channels, height, width = input.shape
    if memory_format(input) is torch.channels_last:
        return input.new_empty((states, batch, height, width, channels)).permute(0, 1, 4, 2, 3)
    return input.new_empty((states, batch, channels, height, width))


def empty_saved(input: Tensor, n_steps: int | torch.SymInt, save_states: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised states (empty unless wanted) and slopes of all steps, in float32 at least."""
    wide = input if input.dtype == torch.float64 else torch.empty_like(input, dtype=torch.float32)
    states = empty_trajectory(wide, n_steps) if save_states else wide.new_empty(0)
    return states, empty_trajectory(wide, n_steps)
