"""Contract of ``torch.ops.robust_node_fast``: ``opcheck`` on every op: schema, fake kernel, autograd, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import NORMS, REDUCTIONS, assert_close, random_filters, random_state
from torch import Tensor

from robust_node_fast import reference

OPS = torch.ops.robust_node_fast


def leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.requires_grad_()


def forward_samples() -> list[Any]:
    """(shape, layout, kernel, shared, trajectory, bias)"""
    return [
        ((2, 3, 5, 4), "contiguous", 3, False, False, True),
        ((2, 8, 6, 7), "channels_last", 3, False, True, True),
        ((0, 3, 4, 4), "contiguous", 3, False, False, True),
        ((0, 3, 4, 4), "contiguous", 3, True, True, False),
        ((1, 4, 4, 5), "sliced", 5, True, False, False),
        ((3, 2, 4, 5), "transposed", 1, True, True, True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "layout", "kernel", "shared", "trajectory", "bias"), forward_samples())
def test_flow(
    shape: tuple[int, ...], layout: str, kernel: int, shared: bool, trajectory: bool, bias: bool, dtype: torch.dtype
) -> None:
    input = random_state(shape, layout, dtype).requires_grad_()
    weight, b = random_filters(shape[1], kernel, None if shared else 2, bias, dtype)
    torch.library.opcheck(OPS.euler_conv_flow.default, (input, leaf(weight), leaf(b), 0.1, 0.2, 2, trajectory))


@pytest.mark.parametrize(
    ("shape", "layout", "shared", "dtype"),
    [
        ((2, 3, 5, 4), "channels_last", False, torch.float32),
        ((1, 2, 4, 5), "sliced", True, torch.float64),
        ((0, 3, 4, 4), "contiguous", True, torch.float32),
    ],
)
def test_flow_bound(shape: tuple[int, ...], layout: str, shared: bool, dtype: torch.dtype) -> None:
    input, radius = random_state(shape, layout, dtype), 0.1 * random_state(shape, "contiguous", dtype).abs()
    weight, b = random_filters(shape[1], 3, None if shared else 2, not shared, dtype)
    arguments = (leaf(input), leaf(radius), leaf(weight), leaf(b), 0.1, 0.2, 2)
    torch.library.opcheck(OPS.euler_conv_flow_bound.default, arguments)


@pytest.mark.parametrize(("layout", "dtype"), [("channels_last", torch.float32), ("sliced", torch.float64)])
def test_bound_of_an_activated_convolution(layout: str, dtype: torch.dtype) -> None:
    input, radius = random_state((2, 3, 5, 4), layout, dtype), 0.1 * random_state((2, 3, 5, 4), dtype=dtype).abs()
    weight, bias = torch.randn(5, 3, 3, 3, dtype=dtype), torch.randn(5, dtype=dtype)
    arguments = (leaf(input), leaf(radius), leaf(weight), leaf(bias), 0.2)
    torch.library.opcheck(OPS.activated_conv_bound.default, arguments)


def saving_samples() -> list[Any]:
    """(shape, layout, kernel, shared, bias)"""
    return [
        ((2, 3, 5, 4), "contiguous", 3, False, True),
        ((2, 16, 6, 7), "channels_last", 3, False, True),
        ((0, 3, 4, 4), "contiguous", 3, True, True),
        ((1, 4, 4, 5), "sliced", 5, True, False),
        ((3, 2, 4, 5), "transposed", 1, False, False),
    ]


@pytest.mark.parametrize("save_states", [False, True])  # the weight's gradient takes the states
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "layout", "kernel", "shared", "bias"), saving_samples())
def test_flow_saving(
    shape: tuple[int, ...], layout: str, kernel: int, shared: bool, bias: bool, dtype: torch.dtype, save_states: bool
) -> None:
    input = random_state(shape, layout, dtype).requires_grad_()
    weight, b = random_filters(shape[1], kernel, None if shared else 2, bias, dtype)
    weight.requires_grad_(save_states)
    arguments = (input, weight, leaf(b), 0.1, 0.2, 2, save_states)
    torch.library.opcheck(OPS.euler_conv_flow_saving.default, arguments)
    output, states, slopes = OPS.euler_conv_flow_saving.default(*arguments)
    assert not states.requires_grad
    assert not slopes.requires_grad
    assert output.dtype == dtype
    assert states.dtype == slopes.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert states.shape == ((2, *shape) if save_states else (0,))
    expected = reference.euler_conv_flow_saving(*arguments)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    for mine, exact in zip((output, states, slopes), expected, strict=True):
        assert_close(mine.detach(), exact.detach(), tolerance)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize(("shape", "layout", "kernel", "shared", "bias"), saving_samples())
def test_flow_backward_from_what_was_saved(
    shape: tuple[int, ...], layout: str, kernel: int, shared: bool, bias: bool, with_states: bool
) -> None:
    input = random_state(shape, layout)
    weight, b = random_filters(shape[1], kernel, None if shared else 2, bias)
    _, states, slopes = OPS.euler_conv_flow_saving.default(input, weight, b, 0.1, 0.2, 2, with_states)
    mask = (True, with_states, bias)
    arguments = [torch.randn(shape), input, weight, b, 0.1, 0.2, 2, False, mask]
    if with_states:  # second order: of the full mask only, as above
        for tensor in arguments[:4]:
            leaf(tensor)
    torch.library.opcheck(OPS.euler_conv_flow_backward.default, (*arguments, states if with_states else None, slopes))


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize(("shape", "layout", "kernel", "shared", "trajectory", "bias"), forward_samples())
def test_flow_backward(
    shape: tuple[int, ...], layout: str, kernel: int, shared: bool, trajectory: bool, bias: bool, mask: tuple[bool, ...]
) -> None:
    input = random_state(shape, layout)
    grad_output = torch.randn(*((3,) if trajectory else ()), *shape)
    weight, b = random_filters(shape[1], kernel, None if shared else 2, bias)
    mask = (*mask[:2], mask[2] and bias)
    arguments = (grad_output, input, weight, b, 0.1, 0.2, 2, trajectory, mask)
    # Second order is asked of the full mask only: gradients of an output that was not wanted do not exist.
    if all(mask[:2]):
        for tensor in arguments[:4]:
            leaf(tensor)
    torch.library.opcheck(OPS.euler_conv_flow_backward.default, arguments)


@pytest.mark.parametrize(  # opcheck itself cannot clone an empty slice
    ("batch", "layout"),
    [(0, "contiguous"), (0, "channels_last"), (2, "contiguous"), (2, "channels_last"), (2, "sliced")],
)
@pytest.mark.parametrize("bias", [True, False])
def test_step_and_its_backward(batch: int, layout: str, bias: bool) -> None:
    input = random_state((max(batch, 1), 3, 5, 4), layout)[:batch].requires_grad_()
    weight, b = random_filters(3, 3, None, bias)
    torch.library.opcheck(OPS.euler_conv_step.default, (input, leaf(weight), leaf(b), 0.1, 0.2))
    grad_output = torch.randn(batch, 3, 5, 4, requires_grad=True)
    arguments = (grad_output, input, weight, b, 0.1, 0.2, (True, True, bias))
    torch.library.opcheck(OPS.euler_conv_step_backward.default, arguments)


@pytest.mark.parametrize(
    "input",
    [
        torch.randn(7),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 6).mT,
        torch.randn(4, 12)[:, ::2],
        torch.randn(0, 3),
        torch.randn(()),
    ],
    ids=["row", "channels_last", "transposed", "strided", "empty", "scalar"],
)
def test_activation_and_its_backward(input: Tensor) -> None:
    torch.library.opcheck(OPS.smooth_leaky_relu.default, (input.detach().requires_grad_(), 0.1))
    grad_output = torch.randn(input.shape, requires_grad=True)
    torch.library.opcheck(OPS.smooth_leaky_relu_backward.default, (grad_output, input.detach().requires_grad_(), 0.1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("steps", [None, 2])
def test_penalty_and_its_backward(norm: str, reduction: str, steps: int | None) -> None:
    weight, _ = random_filters(3, 3, steps, bias=False)
    torch.library.opcheck(OPS.contraction_penalty.default, (weight.requires_grad_(), 5.0, 0.1, 1.0, norm, reduction))
    value, coefficients = OPS.contraction_penalty.default(weight.detach(), 5.0, 0.1, 1.0, norm, reduction)
    torch.library.opcheck(
        OPS.contraction_penalty_backward.default,
        (torch.rand_like(value).requires_grad_(), weight, coefficients.requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["softplus_increment", "softplus_increment_and_tangent"])
@pytest.mark.parametrize(
    ("input", "anchor"),
    [
        (torch.randn(2, 3, 10), torch.randn(2, 3, 1)),
        (torch.randn(3, 2, 34).transpose(0, 1), torch.randn(2, 5, 3)[:, 1, :, None]),
        (torch.randn(2, 4, 9, 3)[..., 1].mT[..., ::2], torch.randn(2, 1, 1).expand(2, 9, 1)),
        (torch.randn(0, 3, 4), torch.randn(0, 3, 1)),
        (torch.randn(2, 3, 0), torch.randn(2, 3, 1)),
    ],
    ids=["contiguous", "transposed", "strided", "no rows", "no columns"],
)
def test_increment_and_its_backward(name: str, input: Tensor, anchor: Tensor, dtype: torch.dtype) -> None:
    tensors = [t.detach().to(dtype).requires_grad_() for t in (input, anchor)]
    torch.library.opcheck(getattr(OPS, name).default, tensors)
    grad_output = torch.randn(input.shape, dtype=dtype, requires_grad=True)
    torch.library.opcheck(getattr(OPS, f"{name}_backward").default, (grad_output, *tensors))
