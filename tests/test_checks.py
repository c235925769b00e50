"""Contract of the arguments: every mistake is named, empty batches work, NaN and inf go where PyTorch sends them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LAYOUTS,
    NORMS,
    REDUCTIONS,
    assert_finite,
    assert_same_non_finite,
    kernels_in,
    random_filters,
    random_state,
)
from torch import Tensor, nn

import robust_node_fast as rnf
from robust_node_fast import functional, reference

X = torch.zeros(2, 3, 4, 4)
W1 = torch.zeros(3, 3, 3, 3)
W5 = torch.zeros(2, 3, 3, 3, 3)
ON_META = torch.empty(3, 3, 3, 3, device="meta")


def step(input: Any = X, weight: Any = W1, bias: Any = None, **options: Any) -> Tensor:
    return functional.euler_conv_step(input, weight, bias, **{"step_size": 0.1, **options})


def flow(input: Any = X, weight: Any = W5, bias: Any = None, **options: Any) -> Tensor:
    return functional.euler_conv_flow(input, weight, bias, **{"step_size": 0.1, **options})


def penalty(weight: Any = W5, **options: Any) -> Tensor:
    return functional.contraction_penalty(weight, **{"rate": 1.0, **options})


def lipschitz(weight: Any = W5, **options: Any) -> Tensor:
    return functional.euler_lipschitz_bound(weight, **{"step_size": 0.1, **options})


def rate(weight: Any = W5, **options: Any) -> Tensor:
    return functional.contraction_rate(weight, **options)


def relu(input: Any = X, *args: Any) -> Tensor:
    return functional.smooth_leaky_relu(input, *args)


def conv(*args: Any, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **{"padding": "same", **options})


# Each row: the call, the error, and what its message must contain: the argument, its value, what was expected.
ARGUMENTS: list[tuple[Any, type[Exception], list[str]]] = [
    # Not a tensor, not floating point
    (lambda: relu([1.0]), TypeError, ["input", "list", "expected a torch.Tensor"]),
    (lambda: relu(X.int()), TypeError, ["input", "torch.int32", "expected float16"]),
    (lambda: relu(X.bool()), TypeError, ["input", "torch.bool", "expected float16"]),
    (lambda: relu(X.cfloat()), TypeError, ["input", "torch.complex64", "expected float16"]),
    *[
        row
        for f in (step, flow)
        for row in [
            (lambda f=f: f(input=1.0), TypeError, ["input", "float", "expected a torch.Tensor"]),
            (lambda f=f: f(input=X.long()), TypeError, ["input", "torch.int64", "expected float16"]),
            (lambda f=f: f(weight=None), TypeError, ["weight", "NoneType", "expected a torch.Tensor"]),
            (lambda f=f: f(bias=0.5), TypeError, ["bias", "float", "expected a torch.Tensor"]),
            (lambda f=f: f(bias=torch.zeros(3).int()), TypeError, ["bias", "torch.int32", "expected float16"]),
            (lambda f=f: f(step_size="h"), TypeError, ["step_size", "str", "expected a float"]),
            (lambda f=f: f(step_size=True), TypeError, ["step_size", "bool", "expected a float"]),
            (lambda f=f: f(step_size=torch.tensor(0.1)), TypeError, ["step_size", "Tensor", "expected a float"]),
            (lambda f=f: f(negative_slope=None), TypeError, ["negative_slope", "NoneType", "expected a float"]),
            # Rank, channels
            (lambda f=f: f(input=X[0]), ValueError, ["input", "(3, 4, 4)", "expected (B, C, H, W)"]),
            (lambda f=f: f(input=X[None]), ValueError, ["input", "(1, 2, 3, 4, 4)", "expected (B, C, H, W)"]),
            (lambda f=f: f(input=X[:, :2]), ValueError, ["input", "(2, 2, 4, 4)", "expected 3"]),
            (lambda f=f: f(input=X[:, :, :0]), ValueError, ["input", "(2, 3, 0, 4)", "expected at least one row"]),
            (lambda f=f: f(input=X[..., :0]), ValueError, ["input", "(2, 3, 4, 0)", "one column"]),
            # Not finite
            (lambda f=f: f(step_size=float("nan")), ValueError, ["step_size=nan", "expected a finite float"]),
            (lambda f=f: f(step_size=float("-inf")), ValueError, ["step_size=-inf", "expected a finite float"]),
            (lambda f=f: f(negative_slope=float("inf")), ValueError, ["negative_slope=inf", "expected a finite float"]),
            # Mixed kinds
            (lambda f=f: f(input=X.double()), TypeError, ["weight", "torch.float32", "expected torch.float64"]),
            (lambda f=f: f(input=X.to("meta")), ValueError, ["weight", "cpu", "expected meta"]),
        ]
    ],
    (lambda: relu(X, "a"), TypeError, ["negative_slope", "str", "expected a float"]),
    (lambda: relu(X, float("nan")), ValueError, ["negative_slope=nan", "expected a finite float"]),
    (lambda: step(weight=ON_META), ValueError, ["weight", "meta", "expected cpu"]),
    (lambda: step(bias=torch.zeros(3, device="meta")), ValueError, ["bias", "meta", "expected cpu"]),
    (lambda: step(bias=torch.zeros(3).half()), TypeError, ["bias", "torch.float16", "expected torch.float32"]),
    (lambda: step(bias=torch.zeros(4)), ValueError, ["bias", "(4,)", "expected (3,)"]),
    (lambda: step(bias=torch.zeros(1, 3)), ValueError, ["bias", "(1, 3)", "expected (3,)"]),
    (lambda: step(weight=W5), ValueError, ["weight", "(2, 3, 3, 3, 3)", "expected (C, C, k, k)"]),
    (lambda: flow(bias=torch.zeros(3)), ValueError, ["bias", "(3,)", "expected (2, 3)"]),
    (lambda: flow(weight=W1, n_steps=2, bias=torch.zeros(2, 3)), ValueError, ["bias", "(2, 3)", "expected (3,)"]),
    (lambda: flow(weight=W1[0]), ValueError, ["weight", "(3, 3, 3)", "expected (C, C, k, k) or (N, C, C, k, k)"]),
    # Steps
    (lambda: flow(weight=W1), ValueError, ["n_steps is missing", "(3, 3, 3, 3)", "expected an int"]),
    (lambda: flow(n_steps=2), ValueError, ["n_steps=2", "twice", "expected n_steps=None"]),
    (lambda: flow(weight=W1, n_steps=0), ValueError, ["n_steps=0", "expected at least 1"]),
    (lambda: flow(weight=W1, n_steps=-1), ValueError, ["n_steps=-1", "expected at least 1"]),
    (lambda: flow(weight=W1, n_steps=2.0), TypeError, ["n_steps=2.0", "float", "expected an int"]),
    (lambda: flow(weight=W1, n_steps=True), TypeError, ["n_steps=True", "bool", "expected an int"]),
    (lambda: flow(weight=W5[:0]), ValueError, ["weight", "(0, 3, 3, 3, 3)", "expected at least one step"]),
    # Filters, in every function that takes them
    *[
        row
        for f in (step, flow, penalty, rate, lipschitz)
        for row in [
            (lambda f=f: f(weight=W1[..., :2, :2]), ValueError, ["weight", "(3, 3, 2, 2)", "odd kernel size"]),
            (lambda f=f: f(weight=W1[..., :1]), ValueError, ["weight", "(3, 3, 3, 1)", "odd kernel size"]),
            (lambda f=f: f(weight=W1[:2]), ValueError, ["weight", "(2, 3, 3, 3)", "as many output as input channels"]),
            (lambda f=f: f(weight=W1[:0, :0]), ValueError, ["weight", "(0, 0, 3, 3)", "at least one channel"]),
            (lambda f=f: f(weight=W1[..., :0, :0]), ValueError, ["weight", "(3, 3, 0, 0)", "odd kernel size"]),
            (lambda f=f: f(weight=torch.zeros(3)), ValueError, ["weight", "(3,)", "expected (C, C, k, k)"]),
            (lambda f=f: f(weight=W1.int()), TypeError, ["weight", "torch.int32", "expected float16"]),
            (lambda f=f: f(weight=3.0), TypeError, ["weight", "float", "expected a torch.Tensor"]),
        ]
    ],
    # Penalty, rate and Lipschitz bound
    *[
        row
        for f in (penalty, rate)
        for row in [
            (lambda f=f: f(slope=(0.0, 1.0)), ValueError, ["slope=(0.0, 1.0)", "0 < a <= b"]),
            (lambda f=f: f(slope=(-0.1, 1.0)), ValueError, ["slope=(-0.1, 1.0)", "0 < a <= b"]),
        ]
    ],
    *[
        row
        for f in (penalty, rate, lipschitz)
        for row in [
            (lambda f=f: f(slope=(1.0, 0.1)), ValueError, ["slope=(1.0, 0.1)", "a <= b"]),
            (lambda f=f: f(slope=(0.1, float("inf"))), ValueError, ["slope[1]=inf", "expected a finite float"]),
            (lambda f=f: f(slope=(float("nan"), 1.0)), ValueError, ["slope[0]=nan", "expected a finite float"]),
            (lambda f=f: f(slope=0.1), TypeError, ["slope=0.1", "a <= b"]),
            (lambda f=f: f(slope=(0.1, 0.5, 1.0)), TypeError, ["slope=(0.1, 0.5, 1.0)", "a <= b"]),
            (lambda f=f: f(slope=("a", 1.0)), TypeError, ["slope[0]", "str", "expected a float"]),
        ]
    ],
    *[
        (lambda f=f, norm=norm: f(norm=norm), ValueError, [f"norm={norm!r}", "'2'", "'2-sharp'", "'inf'", "'1'"])
        for f in (penalty, rate)
        for norm in ("3", "", 2, None)
    ],
    (lambda: penalty(reduction="max"), ValueError, ["reduction='max'", "'sum'", "'mean'", "'none'"]),
    (lambda: penalty(reduction=None), ValueError, ["reduction=None", "'sum'", "'mean'", "'none'"]),
    (lambda: penalty(rate="2"), TypeError, ["rate", "str", "expected a float"]),
    (lambda: penalty(rate=torch.tensor(2.0)), TypeError, ["rate", "Tensor", "expected a float"]),
    (lambda: penalty(rate=float("nan")), ValueError, ["rate=nan", "expected a finite float"]),
    (lambda: penalty([]), ValueError, ["weight", "empty", "expected at least one (C, C, k, k)"]),
    (lambda: penalty([W5]), ValueError, ["weight", "(2, 3, 3, 3, 3)", "expected (C, C, k, k)"]),
    (lambda: penalty([W1, 3]), TypeError, ["weight", "int", "expected a torch.Tensor"]),
    (lambda: penalty({W1}), TypeError, ["weight", "set", "expected a torch.Tensor or a sequence"]),
    (lambda: lipschitz(p="3"), ValueError, ["p='3'", "'inf'", "'1'", "'2'"]),
    (lambda: lipschitz(p=2), ValueError, ["p=2", "'inf'", "'1'", "'2'"]),
    (lambda: lipschitz(step_size=float("inf")), ValueError, ["step_size=inf", "expected a finite float"]),
    (lambda: lipschitz(step_size=None), TypeError, ["step_size", "NoneType", "expected a float"]),
    # Modules
    (lambda: rnf.nn.SmoothLeakyReLU("a"), TypeError, ["negative_slope", "str", "expected a float"]),
    (lambda: rnf.nn.SmoothLeakyReLU(float("nan")), ValueError, ["negative_slope=nan", "expected a finite float"]),
    (lambda: rnf.nn.EulerConvFlow(0, 1, 0.1), ValueError, ["channels=0", "expected at least 1"]),
    (lambda: rnf.nn.EulerConvFlow(2.0, 1, 0.1), TypeError, ["channels=2.0", "float", "expected an int"]),
    (lambda: rnf.nn.EulerConvFlow(2, 0, 0.1), ValueError, ["n_steps=0", "expected at least 1"]),
    (lambda: rnf.nn.EulerConvFlow(2, "3", 0.1), TypeError, ["n_steps='3'", "str", "expected an int"]),
    (lambda: rnf.nn.EulerConvFlow(2, 1, float("nan")), ValueError, ["step_size=nan", "expected a finite float"]),
    (lambda: rnf.nn.EulerConvFlow(2, 1, None), TypeError, ["step_size", "NoneType", "expected a float"]),
    (lambda: rnf.nn.EulerConvFlow(2, 1, 0.1, kernel_size=4), ValueError, ["kernel_size=4", "expected an odd kernel"]),
    (lambda: rnf.nn.EulerConvFlow(2, 1, 0.1, kernel_size=-1), ValueError, ["kernel_size=-1", "expected at least 1"]),
    (lambda: rnf.nn.EulerConvFlow(2, 1, 0.1, negative_slope="a"), TypeError, ["negative_slope", "expected a float"]),
    (lambda: rnf.nn.EulerConvFlow(4, 2, 0.1)(X), ValueError, ["input", "(2, 3, 4, 4)", "expected 4"]),
    (
        lambda: rnf.nn.EulerConvFlow(3, 2, 0.1).contraction_penalty(rate=1.0, norm="3"),
        ValueError,
        ["norm='3'", "'inf'"],
    ),
    (lambda: rnf.nn.EulerConvFlow(3, 2, 0.1).contraction_rate(norm="3"), ValueError, ["norm='3'", "'inf'"]),
    (lambda: rnf.nn.contractive_init_(nn.Conv2d(3, 3, 3), 1.0), TypeError, ["flow", "Conv2d", "an EulerConvFlow"]),
    (lambda: rnf.nn.contractive_init_(rnf.nn.EulerConvFlow(3, 2, 0.1), 0.0), ValueError, ["rate=0.0", "> 0"]),
    (lambda: rnf.nn.contractive_init_(rnf.nn.EulerConvFlow(3, 2, 0.1), "1"), TypeError, ["rate", "expected a float"]),
    (lambda: rnf.nn.contractive_init_(rnf.nn.EulerConvFlow(3, 2, 0.1), 1.0, "3"), ValueError, ["norm='3'", "'inf'"]),
    (lambda: rnf.nn.EulerConvFlow.from_convs([], 0.1), ValueError, ["convs", "empty", "at least one nn.Conv2d"]),
    (lambda: rnf.nn.EulerConvFlow.from_convs([3], 0.1), TypeError, ["convs[0]", "int", "expected an nn.Conv2d"]),
    *[
        (
            lambda bad=bad: rnf.nn.EulerConvFlow.from_convs([conv(4, 4, 3), bad], 0.1),
            ValueError,
            ["convs[1]", "expected"],
        )
        for bad in (
            conv(4, 8, 3),
            conv(4, 4, 2),
            conv(4, 4, (3, 5)),
            conv(4, 4, 3, stride=2, padding=1),
            conv(4, 4, 3, dilation=2),
            conv(4, 4, 3, groups=2),
            conv(4, 4, 3, padding_mode="circular"),
            conv(4, 4, 3, padding=0),
            conv(4, 4, 5),
            conv(4, 4, 3, bias=False),
            conv(8, 8, 3),
            conv(4, 4, 3, dtype=torch.float64),
        )
    ],
    (lambda: rnf.set_backend("gpu"), ValueError, ["backend='gpu'", "'auto'", "'reference'"]),
]


@pytest.mark.parametrize(("call", "error", "says"), ARGUMENTS)
def test_error_names_argument_value_and_expectation(call: Any, error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as raised:
        call()
    assert raised.type is error
    for part in says:
        assert part in str(raised.value), f"{part!r} is not in: {raised.value}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("channels", [3, 8, 17])
def test_empty_batch_through_the_flow(layout: str, trajectory: bool, shared: bool, channels: int) -> None:
    input = random_state((1, channels, 5, 6), layout)[:0].requires_grad_()
    weight, bias = random_filters(channels, 3, None if shared else 2, bias=True)
    weight.requires_grad_()
    assert bias is not None
    bias.requires_grad_()
    result = functional.euler_conv_flow(
        input, weight, bias, step_size=0.1, n_steps=2 if shared else None, return_trajectory=trajectory
    )
    assert result.shape == ((3, 0, channels, 5, 6) if trajectory else (0, channels, 5, 6))
    grad_input, grad_weight, grad_bias = torch.autograd.grad(result.sum(), [input, weight, bias])
    assert grad_input.shape == input.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))
    assert torch.equal(grad_bias, torch.zeros_like(bias))


def test_empty_batch_through_step_activation_and_models() -> None:
    input = torch.empty(0, 3, 4, 5, requires_grad=True)
    weight, bias = random_filters(3, 3, None, bias=True)
    weight.requires_grad_()
    for result in (functional.euler_conv_step(input, weight, bias, step_size=0.1), functional.smooth_leaky_relu(input)):
        assert result.shape == input.shape
        result.sum().backward()
    assert input.grad is not None
    assert input.grad.shape == input.shape
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    model = rnf.models.MNISTNode(n_steps=2)
    logits = model(torch.empty(0, 1, 28, 28))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert_finite(*(p.grad for p in model.parameters() if p.grad is not None))


def run(module: Any, input: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> list[Tensor]:
    """Result and the gradients of its sum."""
    leaves = [t.detach().requires_grad_() for t in (input, weight, bias)]
    result = module.euler_conv_flow(*leaves, step_size=0.1, **options)
    return [result.detach(), *torch.autograd.grad(result.sum(), leaves)]


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [3, 8, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_spreads_as_in_pytorch(value: float, channels: int, layout: str, kernel: int) -> None:
    """With the direct kernels; test_winograd.py says how it spreads with Winograd's algorithm."""
    input = random_state((2, channels, 13, 17), layout)
    input[1, 1, 6, 9] = value
    weight, bias = random_filters(channels, kernel, 2, bias=True)
    assert bias is not None
    for trajectory in (False, True):
        with kernels_in("planes"):
            ours = run(functional, input, weight, bias, return_trajectory=trajectory)
        expected = run(reference, input, weight, bias, return_trajectory=trajectory)
        assert not expected[0].isfinite().all()
        for mine, exact in zip(ours, expected, strict=True):
            assert_same_non_finite(mine, exact, 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_parameters_spread_as_in_pytorch(value: float) -> None:
    input = random_state((2, 8, 7, 9))
    weight, bias = random_filters(8, 3, 2, bias=True)
    assert bias is not None
    centre_tap, one_bias = weight.clone(), bias.clone()
    centre_tap[0, 2, 3, 1, 1] = value
    one_bias[1, 4] = value
    for w, b in ((centre_tap, bias), (weight, one_bias)):
        with kernels_in("planes"):
            ours, expected = (module.euler_conv_flow(input, w, b, step_size=0.1) for module in (functional, reference))
        assert not expected.isfinite().all()
        assert_same_non_finite(ours, expected, 1e-4)


def test_non_finite_values_through_the_activation() -> None:
    input = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -1.0]).repeat(7)
    leaves = [input.clone().requires_grad_() for _ in range(2)]
    for leaf, module in zip(leaves, (functional, reference), strict=True):
        module.smooth_leaky_relu(leaf).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert_same_non_finite(functional.smooth_leaky_relu(input), reference.smooth_leaky_relu(input), 1e-6)
    assert_same_non_finite(leaves[0].grad, leaves[1].grad, 1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_filters_make_the_penalty_nan(norm: str, reduction: str) -> None:
    weight, _ = random_filters(4, 3, 2, bias=False)
    weight[1, 2, 1, 0, 2] = torch.nan
    ours, expected = (
        module.contraction_penalty(weight, rate=2.0, norm=norm, reduction=reduction)
        for module in (functional, reference)
    )
    assert expected.isnan().any()
    assert_same_non_finite(ours, expected, 1e-5)
