"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference: shapes, layouts, dtypes, masks.

What a device alone can show is in test_gpu.py. The interpreter truncates where it rounds to bfloat16, hence the wider
tolerance; it ignores the precision of float32 products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, NORMS, REDUCTIONS, assert_close, assert_layout_kept, random_filters, random_state
from torch import Tensor

from robust_node_fast import _ops, reference

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this process may not mix interpreter and device")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 6e-2}


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from robust_node_fast import _triton

        yield _triton


def exact(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


SHAPES = [(2, 3, 5, 6), (1, 16, 8, 9), (3, 17, 4, 3), (2, 33, 3, 5)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trajectory", [False, True])
def test_flow_in_every_layout(kernels: Any, layout: str, trajectory: bool) -> None:
    input = random_state((2, 5, 6, 7), layout)
    weight, bias = random_filters(5, 3, 3, True)
    found = kernels.euler_conv_flow(input, weight, bias, 0.3, 0.1, 3, trajectory)
    assert_layout_kept(found, input)
    wide = exact([input, weight, bias])
    assert_close(found, reference.euler_conv_flow(*wide, step_size=0.3, return_trajectory=trajectory), 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_flow_and_gradients(kernels: Any, shape: tuple[int, ...], kernel: int, dtype: torch.dtype) -> None:
    shared, with_bias = kernel == 5, shape[0] != 3
    input, grad_output = random_state(shape, dtype=dtype), torch.randn(shape).to(dtype)
    weight, bias = random_filters(shape[1], kernel, None if shared else 2, with_bias, dtype)
    found = kernels.euler_conv_flow(input, weight, bias, 0.3, 0.1, 2, False)
    wide = exact([input, weight, bias])
    expected = reference.euler_conv_flow(*wide, step_size=0.3, n_steps=2 if shared else None)
    assert found.dtype == dtype
    assert_close(found, expected, TOLERANCE[dtype])
    mask = (True, True, with_bias)
    grads = kernels.euler_conv_flow_backward(grad_output, input, weight, bias, 0.3, 0.1, 2, False, mask)
    truth = reference.euler_conv_flow_backward(grad_output.double(), *wide, 0.3, 0.1, 2, False, mask)
    for mine, theirs in zip(grads, truth, strict=True):
        assert mine.shape == theirs.shape
        assert_close(mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)])
@pytest.mark.parametrize("saved", [False, True])
def test_gradients_of_a_trajectory_and_of_what_was_saved(kernels: Any, mask: tuple[bool, ...], saved: bool) -> None:
    input = random_state((2, 5, 4, 6), "channels_last")
    weight, bias = random_filters(5, 3, 3, True)
    kept: list[Tensor | None] = [None, None]
    if saved:
        output, *kept = kernels.euler_conv_flow_saving(input, weight, bias, 0.3, 0.1, 3, mask != (True, False, False))
        theirs = reference.euler_conv_flow_saving(input, weight, bias, 0.3, 0.1, 3, mask != (True, False, False))
        for mine, other in zip((output, *kept), theirs, strict=True):
            assert_close(mine, other, 2e-5)
        kept = [None if t is None or t.numel() == 0 else t for t in kept]
    grad_output = torch.randn((2, 5, 4, 6) if saved else (4, 2, 5, 4, 6))
    arguments = (0.3, 0.1, 3, not saved, mask)
    found = kernels.euler_conv_flow_backward(grad_output, input, weight, bias, *arguments, *kept)
    wide = exact([grad_output, input, weight, bias])
    for mine, truth in zip(found, reference.euler_conv_flow_backward(*wide, *arguments), strict=True):
        assert mine.shape == truth.shape
        assert_close(mine, truth, 2e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_weight_gradient_in_splits(kernels: Any, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PIXELS", 64)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    state, v = torch.randn(3, 4, 9, 11), torch.randn(3, 4, 9, 11)
    weight, bias = kernels._weight_gradient(state, v, 3, True)
    found = weight.view(3, 3, 4, 4).permute(3, 2, 0, 1)
    exact_weight = torch.nn.grad.conv2d_weight(state.double(), (4, 4, 3, 3), v.double(), padding=1)
    assert_close(found, exact_weight, 2e-5)
    assert_close(bias, v.double().sum((0, 2, 3)), 2e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("channels", "kernel"), [(3, 3), (20, 1), (17, 5)])
def test_penalty(kernels: Any, norm: str, reduction: str, channels: int, kernel: int) -> None:
    weight, _ = random_filters(channels, kernel, 2, False)
    weight.view(-1)[:3] = 0.0
    arguments = (2.0, 0.1, 1.0, norm, reduction)
    value, coefficients = kernels.penalty(weight, *arguments)
    exact_value, exact_coefficients = _ops._reference_penalty(weight.double(), *arguments)
    assert value.shape == exact_value.shape
    assert_close(value, exact_value, 1e-5)
    assert_close(coefficients, exact_coefficients, 1e-5)
    grad_output = torch.randn(value.shape)
    found = kernels.penalty_backward(grad_output, weight, coefficients)
    truth = reference.contraction_penalty_backward(grad_output.double(), weight.double(), exact_coefficients)
    assert_close(found, truth, 1e-5)


def test_activation_does_not_overflow(kernels: Any) -> None:
    u = torch.tensor([-1e30, -100.0, -88.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.0, 100.0, 1e30]).view(1, 1, 1, 11)
    found = kernels.euler_conv_flow(u, torch.ones(1, 1, 1, 1, 1), None, 1.0, 0.1, 1, False)
    assert_close(found, u.double() + reference.smooth_leaky_relu(u.double(), 0.1), 1e-6, scale=2e30)
    small = u.abs() < 1e3
    truth = (u.double() + reference.smooth_leaky_relu(u.double(), 0.1))[small]
    assert_close(found[small], truth, 1e-6, scale=100.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(kernels: Any, value: float) -> None:
    input = random_state((1, 4, 7, 7))
    input[0, 1, 3, 3] = value
    weight, bias = random_filters(4, 3, 1, True)
    found = kernels.euler_conv_flow(input, weight, bias, 0.3, 0.1, 1, False)
    truth = reference.euler_conv_flow(input, weight, bias, step_size=0.3)
    assert torch.equal(found.isfinite(), truth.isfinite())


def test_empty_batch(kernels: Any) -> None:
    input = torch.empty(0, 3, 5, 5)
    weight, bias = random_filters(3, 3, 2, True)
    assert kernels.euler_conv_flow(input, weight, bias, 0.3, 0.1, 2, True).shape == (3, 0, 3, 5, 5)
    grads = kernels.euler_conv_flow_backward(input, input, weight, bias, 0.3, 0.1, 2, False, (True, True, True))
    assert [tuple(g.shape) for g in grads] == [(0, 3, 5, 5), tuple(weight.shape), (2, 3)]
    assert not grads[1].any()
