"""Contract of the gradients: exact for the discrete network, of first and second order, any subset of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LAYOUTS, NORMS, REDUCTIONS, assert_close, gradients, random_filters, random_state
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from robust_node_fast import _ops, functional, reference

# (shared weights, whole trajectory, kernel)
FLOWS = [(False, False, 3), (False, True, 3), (True, False, 3), (True, True, 1), (False, False, 5), (False, True, 1)]


def problem(shared: bool, kernel: int, channels: int = 2, bias: bool = True, batch: int = 2) -> tuple[Tensor, ...]:
    """Float64 leaves: input, weight, bias (where there is one)."""
    input = random_state((batch, channels, 3, 4), dtype=torch.float64)
    weight, b = random_filters(channels, kernel, None if shared else 2, bias, torch.float64)
    return tuple(t.requires_grad_() for t in (input, weight, b) if t is not None)


def flow(shared: bool, trajectory: bool, module: Any = functional) -> Any:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return module.euler_conv_flow(
            input,
            weight,
            bias,
            step_size=0.3,
            negative_slope=0.2,
            n_steps=2 if shared else None,
            return_trajectory=trajectory,
        )

    return call


@pytest.mark.parametrize(("shared", "trajectory", "kernel"), FLOWS)
@pytest.mark.parametrize("bias", [True, False])
def test_flow_gradcheck(shared: bool, trajectory: bool, kernel: int, bias: bool) -> None:
    assert gradcheck(flow(shared, trajectory), problem(shared, kernel, bias=bias))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flow_gradcheck_in_every_layout(layout: str) -> None:
    weight, bias = random_filters(2, 3, 2, bias=True, dtype=torch.float64)
    dense = random_state((2, 2, 3, 4), "contiguous", torch.float64).requires_grad_()

    def call(x: Tensor) -> Tensor:
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "sliced":
            x = torch.nn.functional.pad(x, (1, 2, 0, 1))[:, :, :3, 1:5]
        elif layout == "expanded":
            x = x[:1].expand(3, -1, -1, -1)
        elif layout == "transposed":
            x = x.mT
        return functional.euler_conv_flow(x, weight, bias, step_size=0.3)

    assert gradcheck(call, (dense,))


@pytest.mark.parametrize(("shared", "trajectory", "kernel"), FLOWS)
def test_flow_gradgradcheck(shared: bool, trajectory: bool, kernel: int) -> None:
    assert gradgradcheck(flow(shared, trajectory), problem(shared, kernel, batch=1))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_step_gradcheck_and_gradgradcheck(kernel: int, bias: bool) -> None:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.euler_conv_step(input, weight, bias, step_size=-0.3, negative_slope=0.2)

    inputs = problem(True, kernel, bias=bias)
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, problem(True, kernel, bias=bias, batch=1))


@pytest.mark.parametrize("negative_slope", [0.01, 0.1, 1.0])
def test_activation_gradcheck_and_gradgradcheck(negative_slope: float) -> None:
    input = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    assert gradcheck(functional.smooth_leaky_relu, (input, negative_slope))
    assert gradgradcheck(functional.smooth_leaky_relu, (input, negative_slope))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("stacked", [True, False])
def test_penalty_gradcheck_and_gradgradcheck(norm: str, reduction: str, stacked: bool) -> None:
    weight, _ = random_filters(3, 3, 2 if stacked else None, bias=False, dtype=torch.float64)
    # Away from the kinks: |w| at 0, and the hinge, which a rate of the median's size crosses in some channels only.
    weight = torch.where(weight.abs() < 0.02, 0.1, weight).requires_grad_()
    zero_rate = reference._hinge_argument(weight.detach(), 0.0, (0.1, 1.0), norm).flatten().sort().values
    gap = zero_rate.diff().argmax()
    rate = -(zero_rate[gap] + zero_rate[gap + 1]).item() / 2 * (1 if norm.startswith("2") else 2)
    excess = functional.contraction_penalty(weight, rate=rate, norm=norm, reduction="none")
    assert 0 < (excess > 0).sum() < excess.numel()

    def call(w: Tensor) -> Tensor:
        return functional.contraction_penalty(w, rate=rate, norm=norm, reduction=reduction)

    assert gradcheck(call, (weight,))
    assert gradgradcheck(call, (weight,))


def test_penalty_gradcheck_of_a_list() -> None:
    banks = [random_filters(c, k, None, False, torch.float64)[0].requires_grad_() for c, k in ((2, 3), (3, 1), (1, 5))]
    for reduction in REDUCTIONS:
        assert gradcheck(lambda *w, r=reduction: functional.contraction_penalty(w, rate=30.0, reduction=r), banks)


@pytest.mark.parametrize("norm", NORMS)
def test_penalty_subgradients_at_the_kinks_are_pytorchs(norm: str) -> None:
    weight = torch.zeros(2, 3, 3, 3, 3, dtype=torch.float64)
    for rate in (0.0, 1.0):  # at the hinge and above it; every |w| at 0
        ours, exact = (
            gradients(
                lambda w, m=module, r=rate: m.contraction_penalty(w, rate=r, norm=norm),
                [weight],
                torch.tensor(1.0, dtype=torch.float64),
            )
            for module in (functional, reference)
        )
        assert_close(ours[0], exact[0], 0.0)
        assert_close(ours[1], exact[1], 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shared", "trajectory", "kernel"), FLOWS)
def test_flow_gradients_equal_autograd_through_the_reference(
    shared: bool, trajectory: bool, kernel: int, layout: str
) -> None:
    steps = 2  # as in flow()
    input = random_state((3, 5, 7, 6), layout, torch.float64)
    weight, bias = random_filters(5, kernel, None if shared else steps, True, torch.float64)
    grad_output = torch.randn(*((steps + 1,) if trajectory else ()), 3, 5, 7, 6, dtype=torch.float64)
    ours = gradients(flow(shared, trajectory), [input, weight, bias], grad_output)
    exact = gradients(flow(shared, trajectory, reference), [input, weight, bias], grad_output)
    for mine, theirs in zip(ours, exact, strict=True):
        assert_close(mine, theirs, 1e-12)


@pytest.mark.parametrize(("shared", "trajectory", "kernel"), FLOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_any_subset_of_the_gradients_equals_the_full_set(
    shared: bool, trajectory: bool, kernel: int, dtype: torch.dtype, wanted: tuple[int, ...]
) -> None:
    input = random_state((2, 8, 6, 7), dtype=dtype)
    weight, bias = random_filters(8, kernel, None if shared else 2, True, dtype)
    assert bias is not None
    leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]
    result = flow(shared, trajectory)(*leaves)
    grad_output = torch.randn_like(result)
    full = torch.autograd.grad(result, leaves, grad_output)

    subset = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((input, weight, bias))]
    found = torch.autograd.grad(flow(shared, trajectory)(*subset), [subset[i] for i in wanted], grad_output)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for i, mine in zip(wanted, found, strict=True):
        assert_close(mine, full[i], tolerance)


def test_gradient_of_a_trajectory_adds_up_over_its_states() -> None:
    input, weight, bias = problem(False, 3)
    call = flow(False, True)
    grad_output = torch.randn(3, *input.shape, dtype=torch.float64)
    together = torch.autograd.grad(call(input, weight, bias), [input, weight, bias], grad_output)
    apart = []
    for k in range(3):
        only = torch.zeros_like(grad_output)
        only[k] = grad_output[k]
        apart.append(torch.autograd.grad(call(input, weight, bias), [input, weight, bias], only))
    for mine, *parts in zip(together, *apart, strict=True):
        assert_close(mine, sum(parts[1:], parts[0]), 1e-13)


@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "constant", "same in every state"])
@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
def test_gradients_do_not_depend_on_the_layout_of_the_incoming_gradient(
    grad_layout: str, trajectory: bool, input_layout: str
) -> None:
    input = random_state((2, 8, 5, 6), input_layout)
    weight, bias = random_filters(8, 3, 2, True)
    shape = (*((3,) if trajectory else ()), 2, 8, 5, 6)
    if grad_layout == "constant":  # what .sum() sends: every stride 0
        grad_output = torch.randn(()).expand(shape)
    elif grad_layout == "same in every state":
        grad_output = random_state((2, 8, 5, 6)).expand(shape)
    elif trajectory:
        grad_output = torch.stack([random_state((2, 8, 5, 6), grad_layout) for _ in range(3)], dim=2).movedim(2, 0)
    else:
        grad_output = random_state((2, 8, 5, 6), grad_layout)
    ours = gradients(flow(False, trajectory), [input, weight, bias], grad_output)
    dense = gradients(
        flow(False, trajectory), [input, weight, bias], grad_output.clone(memory_format=torch.contiguous_format)
    )
    for mine, exact in zip(ours, dense, strict=True):
        assert_close(mine, exact, 1e-6)


def test_inputs_are_never_changed() -> None:
    input = random_state((2, 8, 5, 6))
    weight, bias = random_filters(8, 3, 2, True)
    assert bias is not None
    copies = [t.clone() for t in (input, weight, bias)]
    gradients(flow(False, True), [input, weight, bias], torch.randn(3, 2, 8, 5, 6))
    for now, before in zip((input, weight, bias), copies, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("op", [_ops.softplus_increment, _ops.softplus_increment_and_tangent])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_increment(op: Any, wanted: tuple[bool, bool]) -> None:
    """Both orders, at 0 and on both sides of where the formula changes."""
    input, anchor = 2 * torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(2, 3, 1, dtype=torch.float64)
    input[0, :, 0], input[1, :, 1], input[1, :, 2] = 0.0, 0.69, -0.7
    leaves = [t.requires_grad_(want) for t, want in zip((input, anchor), wanted, strict=True)]
    assert gradcheck(op, leaves)
    assert gradgradcheck(op, leaves)
