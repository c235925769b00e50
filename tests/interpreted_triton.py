"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference: shapes, layouts, dtypes, masks.

``test_triton.py`` runs this file in a process of its own, with TRITON_INTERPRET=1 set before Triton is imported. What a
device alone can show is in ``test_gpu.py``. The interpreter truncates where it rounds to bfloat16, hence the wide
tolerance; it ignores the precision of float32 products. A program takes it as long for a pixel as for a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LAYOUTS,
    NORMS,
    REDUCTIONS,
    assert_close,
    assert_layout_kept,
    assert_same_non_finite,
    far_apart,
    random_filters,
    random_state,
)
from torch import Tensor

from robust_node_fast import _ops, _triton, reference
from robust_node_fast.kernels import configs

assert _triton._INTERPRETED
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 6e-2}
FLOW = (0.3, 0.1)  # step size, negative slope


def run(name: str, *args: Any) -> Any:
    """The op's Triton implementation; its results have the shape, dtype and strides that the contract promises."""
    results = _triton.IMPLEMENTATIONS[name](*args)
    promised = _ops._FAKES[name](*args)
    for found, fake in zip(*((r,) if isinstance(r, Tensor) else r for r in (results, promised)), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (fake.shape, fake.dtype, fake.stride())
    return results


def exact(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def assert_all_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, tolerance)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs in every direction."""
    monkeypatch.setattr(configs, "INTERPRETED", configs.Blocks(32, 16, 16, 4, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 16])
def test_flow_in_every_layout(layout: str, channels: int) -> None:
    input = random_state((2, channels, 5, 6), layout)
    weight, bias = random_filters(channels, 3, 3, True)
    trajectory = layout in ("channels_last", "transposed")
    found = run("euler_conv_flow", input, weight, bias, *FLOW, 3, trajectory)
    assert_layout_kept(found, input)
    wide = exact([input, weight, bias])
    assert_close(found, reference.euler_conv_flow(*wide, step_size=0.3, return_trajectory=trajectory), 2e-5)


FLOWS = [
    (torch.float32, (1, 1, 1, 1), 3),
    (torch.float32, (2, 3, 5, 6), 5),
    (torch.float32, (1, 16, 8, 9), 3),
    (torch.float32, (2, 65, 3, 3), 3),
    (torch.float16, (2, 3, 5, 6), 3),
    (torch.float16, (3, 17, 4, 3), 1),
    (torch.bfloat16, (1, 16, 8, 9), 3),
    (torch.bfloat16, (3, 17, 4, 3), 1),
]


@pytest.mark.parametrize(("dtype", "shape", "kernel"), FLOWS)
def test_flow_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], kernel: int) -> None:
    shared, with_bias = kernel == 5, shape[0] != 3
    steps = 1 if shape[1] == 65 else 2
    input, grad_output = random_state(shape, dtype=dtype), torch.randn(shape).to(dtype)
    weight, bias = random_filters(shape[1], kernel, None if shared else steps, with_bias, dtype)
    found = run("euler_conv_flow", input, weight, bias, *FLOW, steps, False)
    wide = exact([input, weight, bias])
    expected = reference.euler_conv_flow(*wide, step_size=0.3, n_steps=steps if shared else None)
    assert_close(found, expected, TOLERANCE[dtype])
    arguments = (*FLOW, steps, False, (True, True, with_bias))
    grads = run("euler_conv_flow_backward", grad_output, input, weight, bias, *arguments)
    truth = reference.euler_conv_flow_backward(grad_output.double(), *wide, *arguments)
    assert_all_close(grads, truth, TOLERANCE[dtype])


def test_elements_further_apart_than_32_bits_can_count(tmp_path: Path) -> None:
    input = far_apart(tmp_path)
    weight, bias = random_filters(3, 3, 2, True, input.dtype)
    wide = exact([input, weight, bias])
    found = run("euler_conv_flow", input, weight, bias, *FLOW, 2, False)
    assert_close(found, reference.euler_conv_flow(*wide, step_size=0.3), TOLERANCE[input.dtype])
    arguments = (*FLOW, 2, False, (True, True, True))
    grads = run("euler_conv_flow_backward", input, input, weight, bias, *arguments)
    assert_all_close(grads, reference.euler_conv_flow_backward(wide[0], *wide, *arguments), TOLERANCE[input.dtype])
    assert bias is not None
    check_gradients_from_the_input(input, weight[:1], bias[:1])


@pytest.mark.parametrize("shape", [(2**20, 1, 64, 32), (1, 2**11, 2**10, 2**10)])
def test_more_pixels_or_elements_of_a_sample_than_32_bits_can_count_are_refused(shape: tuple[int, ...]) -> None:
    input = torch.empty(shape, device="meta")
    weight = torch.empty(1, shape[1], shape[1], 1, 1, device="meta")
    with pytest.raises(ValueError, match="split the batch"):
        _triton.euler_conv_flow(input, weight, None, *FLOW, 1, False)
    slopes = torch.empty(1, *shape, device="meta")
    with pytest.raises(ValueError, match="split the batch"):
        _triton.euler_conv_flow_backward(
            input, input, weight, None, *FLOW, 1, False, (True, False, False), None, slopes
        )


def test_several_programs_in_every_direction(small_blocks: None) -> None:
    input, grad_output = random_state((2, 35, 6, 5), "channels_last"), torch.randn(2, 35, 6, 5)
    weight, bias = random_filters(35, 1, 1, True)
    wide = exact([grad_output, input, weight, bias])
    found = run("euler_conv_flow", input, weight, bias, *FLOW, 1, False)
    assert_close(found, reference.euler_conv_flow(*wide[1:], step_size=0.3), 2e-5)
    arguments = (*FLOW, 1, False, (True, True, True))
    grads = run("euler_conv_flow_backward", grad_output, input, weight, bias, *arguments)
    assert_all_close(grads, reference.euler_conv_flow_backward(*wide, *arguments), 2e-5)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)])
@pytest.mark.parametrize("saved", [False, True])
def test_gradients_of_a_trajectory_and_of_what_was_saved(mask: tuple[bool, ...], saved: bool) -> None:
    channels, dtype = (17, torch.float16) if saved else (5, torch.float32)  # float16 is saved as float32
    input = random_state((2, channels, 4, 6), dtype=dtype)
    weight, bias = random_filters(channels, 3, 3, True, dtype)
    kept: list[Tensor | None] = [None, None]
    if saved:
        flow = (input, weight, bias, *FLOW, 3, mask[1])
        output, *kept = run("euler_conv_flow_saving", *flow)
        truth = reference.euler_conv_flow_saving(*exact([input, weight, bias]), *FLOW, 3, mask[1])
        assert_all_close((output, *kept), truth, TOLERANCE[dtype])
        assert torch.equal(output, run("euler_conv_flow", *flow[:-1], False)), "the same rounding, whatever is saved"
        kept = [None if t.numel() == 0 else t for t in kept]
    grad_output = torch.randn((2, channels, 4, 6) if saved else (4, 2, 5, 4, 6)).to(dtype)
    arguments = (*FLOW, 3, not saved, mask)
    found = run("euler_conv_flow_backward", grad_output, input, weight, bias, *arguments, *kept)
    truth = reference.euler_conv_flow_backward(*exact([grad_output, input, weight, bias]), *arguments)
    assert_all_close(found, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [16, 17])
def test_the_state_of_a_single_step_may_be_its_input(channels: int, dtype: torch.dtype) -> None:
    """Contiguous where what is saved would be channels last, and not in the dtype of what is saved."""
    input, (weight, bias) = (
        random_state((2, channels, 4, 6), dtype=dtype),
        random_filters(channels, 3, 1, True, dtype),
    )
    check_gradients_from_the_input(input, weight, bias)


def check_gradients_from_the_input(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _, _, slopes = run("euler_conv_flow_saving", input, weight, bias, *FLOW, 1, False)
    grad_output = torch.randn(input.shape).to(input.dtype)
    arguments = (*FLOW, 1, False, (True, True, True))
    found = run("euler_conv_flow_backward", grad_output, input, weight, bias, *arguments, input[None], slopes)
    truth = reference.euler_conv_flow_backward(*exact([grad_output, input, weight, bias]), *arguments)
    assert_all_close(found, truth, TOLERANCE[input.dtype])


def test_slopes_without_states_give_no_weight_gradient() -> None:
    input = random_state((1, 2, 3, 3))
    weight, bias = random_filters(2, 3, 1, True)
    with pytest.raises(ValueError, match="states"):
        _triton.euler_conv_flow_backward(
            input, input, weight, bias, *FLOW, 1, False, (True, True, True), None, input[None]
        )


def test_one_step() -> None:
    input, grad_output = random_state((2, 4, 5, 5)), torch.randn(2, 4, 5, 5)
    weight, bias = random_filters(4, 3, None, True)
    wide = exact([grad_output, input, weight, bias])
    found = run("euler_conv_step", input, weight, bias, *FLOW)
    assert_close(found, reference.euler_conv_step(*wide[1:], step_size=0.3), 2e-5)
    grads = run("euler_conv_step_backward", grad_output, input, weight, bias, *FLOW, (True, True, True))
    assert_all_close(grads, _ops._reference_step_backward(*wide, *FLOW, (True, True, True)), 2e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_weight_gradient_in_splits(deterministic: bool, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_PIXELS", 64)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    input, grad_output = random_state((3, 4, 9, 7)), torch.randn(3, 4, 9, 7)
    weight, bias = random_filters(4, 1, None if shared else 2, True)
    arguments = (*FLOW, 2, False, (False, True, True))
    found = run("euler_conv_flow_backward", grad_output, input, weight, bias, *arguments)
    truth = reference.euler_conv_flow_backward(*exact([grad_output, input, weight, bias]), *arguments)
    assert_all_close(found, truth, 2e-5)
    if deterministic:
        again = run("euler_conv_flow_backward", grad_output, input, weight, bias, *arguments)
        assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_penalty(norm: str, reduction: str) -> None:
    channels, kernel = {"sum": (3, 3), "mean": (20, 1), "none": (17, 5)}[reduction]
    weight, _ = random_filters(channels, kernel, 2, False)
    weight.view(-1)[:3] = 0.0
    arguments = (2.0, 0.1, 1.0, norm, reduction)
    value, coefficients = run("contraction_penalty", weight, *arguments)
    exact_value, exact_coefficients = _ops._reference_penalty(weight.double(), *arguments)
    assert_all_close((value, coefficients), (exact_value, exact_coefficients), 1e-5)
    grad_output = torch.randn(value.shape)
    found = run("contraction_penalty_backward", grad_output, weight, coefficients)
    truth = reference.contraction_penalty_backward(grad_output.double(), weight.double(), exact_coefficients)
    assert_close(found, truth, 1e-5)


def test_penalty_of_one_bank_and_of_what_is_not_a_number() -> None:
    weight, _ = random_filters(4, 3, None, False)
    weight[1, 2, 0, 0] = torch.nan
    value, coefficients = run("contraction_penalty", weight, 2.0, 0.1, 1.0, "2-sharp", "none")
    exact_value, exact_coefficients = _ops._reference_penalty(weight.double(), 2.0, 0.1, 1.0, "2-sharp", "none")
    assert_same_non_finite(value, exact_value, 1e-5)
    found = run("contraction_penalty_backward", torch.ones(4), weight, coefficients)
    truth = reference.contraction_penalty_backward(torch.ones(4).double(), weight.double(), exact_coefficients)
    truth[1, 2, 0, 0] = torch.nan  # as the compiled CPU kernels have it; PyTorch's sign(NaN) is 0
    assert_same_non_finite(found, truth, 1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_activation(dtype: torch.dtype) -> None:
    input, grad_output = random_state((2, 3, 4, 5), "channels_last", dtype), torch.randn(2, 3, 4, 5).to(dtype)
    wide = exact([grad_output, input])
    found = run("smooth_leaky_relu", input, 0.1)
    assert_close(found, reference.smooth_leaky_relu(wide[1], 0.1), TOLERANCE[dtype])
    found = run("smooth_leaky_relu_backward", grad_output, input, 0.1)
    assert_close(found, reference.smooth_leaky_relu_backward(*wide, 0.1), TOLERANCE[dtype])


def test_activation_does_not_overflow() -> None:
    large = [-1e30, -100.0, -88.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.0, 100.0, 1e30, torch.inf, -torch.inf, torch.nan]
    u = torch.tensor(large)
    found, truth = run("smooth_leaky_relu", u, 0.1), reference.smooth_leaky_relu(u.double(), 0.1)
    finite = truth.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert ((found[finite] - truth[finite]).abs() <= 1e-6 * truth[finite].abs()).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    input = random_state((1, 4, 7, 7))
    input[0, 1, 3, 3] = value
    weight, bias = random_filters(4, 3, 1, True)
    found = run("euler_conv_flow", input, weight, bias, *FLOW, 1, False)
    truth = reference.euler_conv_flow(input, weight, bias, step_size=0.3)
    assert torch.equal(found.isfinite(), truth.isfinite())


def test_empty_batch() -> None:
    input = torch.empty(0, 3, 5, 5)
    weight, bias = random_filters(3, 3, 2, True)
    run("euler_conv_flow", input, weight, bias, *FLOW, 2, True)
    grads = run("euler_conv_flow_backward", input, input, weight, bias, *FLOW, 2, False, (True, True, True))
    assert not grads[1].any()
    assert not grads[2].any()
    run("smooth_leaky_relu", input, 0.1)


@pytest.mark.parametrize("channels", [112, 33])
def test_large_blocks_that_finish_in_quarters(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest blocks: an Euler step stores a quarter of its channels at a time."""
    monkeypatch.setattr(configs, "INTERPRETED", configs.Blocks(128, 128, 64, 8, 1))
    input = random_state((2, channels, 6, 11))  # more pixels than a block has
    weight, bias = random_filters(channels, 3, 1, True)
    found = run("euler_conv_flow_saving", input, weight, bias, *FLOW, 1, True)
    expected = reference.euler_conv_flow_saving(*exact([input, weight, bias]), *FLOW, 1, True)
    assert_all_close(found, expected, 2e-5)
