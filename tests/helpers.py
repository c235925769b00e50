"""What the tests share: random inputs in awkward layouts, and comparisons that a NaN or a wrong shape never passes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_node_fast import backend_info, training
from robust_node_fast.training import TrainConfig

COMPILED = backend_info()["ops"]["euler_conv_flow"]["cpu"]["implementation"] == "cpu"
needs_kernels = pytest.mark.skipif(not COMPILED, reason="the compiled CPU library is not there (or not chosen)")
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NORMS = ("2", "2-sharp", "inf", "1")
REDUCTIONS = ("sum", "mean", "none")


def random_state(shape: Sequence[int], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal ``(B, C, H, W)`` in one of ``LAYOUTS``."""
    b, c, h, w = shape
    if layout == "contiguous":
        return torch.randn(b, c, h, w).to(dtype)
    if layout == "channels_last":
        return torch.randn(b, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.randn(b, c + 2, 2 * h, w + 3).to(dtype)[:, 1 : c + 1, ::2, 2 : w + 2]
    if layout == "expanded":
        return torch.randn(1, c, h, w).to(dtype).expand(b, c, h, w)
    if layout == "transposed":
        return torch.randn(w, h, c, b).to(dtype).permute(3, 2, 1, 0)
    raise AssertionError(layout)


def far_apart(folder: Path) -> Tensor:
    """A float16 state ``(2, 3, 2, 3)`` whose columns lie 2^30 apart, in a file that takes a few pages of a disk."""
    memory = torch.from_file(str(folder / "sparse"), shared=True, size=2**31 + 64, dtype=torch.float16)
    state = memory.as_strided((2, 3, 2, 3), (1, 2, 8, 2**30 + 8))
    return state.copy_(torch.randn(state.shape))


def random_filters(
    channels: int, kernel: int, steps: int | None, bias: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Filters and bias at the scale of ``nn.Conv2d``'s initialisation; ``steps=None`` for shared ones."""
    lead = () if steps is None else (steps,)
    scale = (channels * kernel**2) ** -0.5
    weight = (scale * torch.randn(*lead, channels, channels, kernel, kernel)).to(dtype)
    return weight, torch.randn(*lead, channels).to(dtype) if bias else None


@contextmanager
def kernels_in(layout: str) -> Iterator[None]:
    """The compiled kernels in ``"best"``, ``"planes"`` (direct), ``"channels"`` or ``"strips"`` (both Winograd)."""
    module = sys.modules.get("robust_node_fast._cpu")
    if module is None:
        yield
        return
    before = module.layout
    module.layout = layout  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.layout = before  # type: ignore[attr-defined]


def fresh(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Detached leaves that require gradients, with the strides of the originals where these are dense."""
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], grad_output: Tensor) -> list[Tensor]:
    """Result of ``function(*tensors)``, then the gradients of its inner product with ``grad_output``."""
    leaves = fresh(*tensors)
    result = function(*leaves)
    found = torch.autograd.grad(result, [leaf for leaf in leaves if leaf is not None], grad_output.to(result.dtype))
    return [result.detach(), *found]


def assert_finite(*tensors: Tensor) -> None:
    for i, tensor in enumerate(tensors):
        assert torch.isfinite(tensor).all(), f"tensor {i} is not finite"


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute error in float64 of finite tensors of one shape."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert_finite(actual, exact)
    return (actual.double() - exact.double()).abs().max().item() if actual.numel() else 0.0


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, scale: float | None = None) -> None:
    """``|actual - expected| <= tolerance * scale``, the scale being the largest expected magnitude, at least 1."""
    error = max_error(actual, expected)
    if scale is None:
        scale = max(1.0, expected.double().abs().max().item()) if expected.numel() else 1.0
    assert error <= tolerance * scale, f"error {error:.3e}, allowed {tolerance * scale:.3e}"


def assert_same_non_finite(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """NaN, +inf and -inf in exactly the same places; close everywhere else."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places"
    assert torch.equal(actual.isposinf(), expected.isposinf()), "+inf in other places"
    assert torch.equal(actual.isneginf(), expected.isneginf()), "-inf in other places"
    finite = expected.isfinite()
    assert_close(actual[finite], expected[finite], tolerance)


def assert_layout_kept(result: Tensor, input: Tensor) -> None:
    """channels_last in, channels_last out; contiguous otherwise. ``result`` may be a trajectory of such states."""
    unambiguous = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
    expected = torch.channels_last if unambiguous else torch.contiguous_format
    for state in result if result.dim() == 5 else [result]:
        template = torch.empty(state.shape, memory_format=expected)
        assert state.stride() == template.stride(), f"stride {state.stride()}, expected {template.stride()}"


def parameter_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def start(folder: Path, config: TrainConfig) -> Path:
    """``folder``, with a run of this configuration in it that has not begun."""
    training.prepare(config, folder)
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics without the clock's."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]
