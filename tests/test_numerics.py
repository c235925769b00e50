"""Contract of the numbers: as accurate as PyTorch in the same precision, for every shape, layout and option.

The criterion, flash-attention's: with the plain reference in float64 as the exact result,
``error(ours) <= 2 * error(PyTorch in the same dtype) + ULPS * ulp * scale``. The scale is the size of the terms that a
result is summed from, so that cancellation is not held against anyone. Where Winograd's algorithm runs (float32, 3x3
filters, from 16 channels on) the factor is 4.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    COMPILED,
    DTYPES,
    LAYOUTS,
    NORMS,
    REDUCTIONS,
    assert_close,
    assert_finite,
    assert_layout_kept,
    gradients,
    kernels_in,
    max_error,
    random_filters,
    random_state,
)
from hypothesis import given, settings
from torch import Tensor

from robust_node_fast import _ops, backend_info, functional, reference

ULPS = 8
HALF = (torch.bfloat16, torch.float16)
FLOAT64_TOLERANCE = 1e-12


def assert_as_accurate(
    ours: Tensor, same_dtype: Tensor, exact: Tensor, scale: float, what: str, factor: float = 2.0
) -> None:
    """The file's criterion. ``scale``: size of the terms of the sum; that of the exact result counts as well."""
    dtype = ours.dtype
    assert dtype == same_dtype.dtype, what
    error, allowed = max_error(ours, exact), factor * max_error(same_dtype, exact)
    if exact.numel():
        info = torch.finfo(dtype)
        scale = max(scale, exact.abs().max().item())
        unit = FLOAT64_TOLERANCE if dtype == torch.float64 else ULPS * info.eps
        allowed += unit * scale + info.smallest_normal  # results below the normal numbers have no relative precision
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
    if dtype in HALF and exact.numel() >= 64:
        # Eight of its units are 6% in bfloat16: a systematic error shows in the mean square, in which rounding does not
        # add up.
        ours_rms, theirs_rms, exact_rms = (
            float(t.double().square().mean().sqrt()) for t in (ours - exact, same_dtype - exact, exact)
        )
        allowed = factor * theirs_rms + 0.5 * info.eps * exact_rms + info.smallest_normal
        assert ours_rms <= allowed, f"{what}: error {ours_rms:.3e} in the mean square, allowed {allowed:.3e}"


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, int, int, int]
    kernel: int
    steps: int
    shared: bool
    bias: bool
    trajectory: bool
    layout: str
    dtype: torch.dtype
    negative_slope: float
    step_size: float
    seed: int
    recompute: bool = True

    @property
    def factor(self) -> float:
        """How many times PyTorch's error is allowed."""
        return 4.0 if self.kernel == 3 and self.shape[1] >= 16 and self.dtype == torch.float32 else 2.0


@st.composite
def problems(draw: Any) -> Problem:
    size = st.one_of(st.integers(1, 20), st.integers(21, 40))
    dtype = draw(st.sampled_from(DTYPES))
    return Problem(
        shape=(draw(st.integers(0, 5)), draw(st.integers(1, 40)), draw(size), draw(size)),
        kernel=draw(st.sampled_from((1, 3, 5))),
        steps=draw(st.integers(1, 6)),
        shared=draw(st.booleans()),
        bias=draw(st.booleans()),
        trajectory=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=dtype,
        negative_slope=draw(st.floats(0.01, 1.0)),
        step_size=draw(st.floats(-0.5, 1.0, allow_subnormal=False)),
        seed=draw(st.integers(0, 2**31 - 1)),
        recompute=draw(st.booleans()),
    )


def run(module: Any, p: Problem, tensors: list[Tensor | None], grad_output: Tensor) -> list[Tensor]:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return module.euler_conv_flow(
            input,
            weight,
            bias,
            step_size=p.step_size,
            negative_slope=p.negative_slope,
            n_steps=p.steps if p.shared else None,
            return_trajectory=p.trajectory,
            **({"recompute": p.recompute} if module is functional else {}),
        )

    return gradients(call, tensors, grad_output)


def check_flow(p: Problem, factors: dict[str, float] | None = None) -> None:
    """In each of the layouts with its factor; where none is given, in the one that the rule chooses."""
    torch.manual_seed(p.seed)
    input = random_state(p.shape, p.layout, p.dtype)
    weight, bias = random_filters(p.shape[1], p.kernel, None if p.shared else p.steps, p.bias, p.dtype)
    grad_output = torch.randn(*((p.steps + 1,) if p.trajectory else ()), *p.shape).to(p.dtype)
    tensors = [input, weight, bias]

    same_dtype = run(reference, p, tensors, grad_output)
    exact = run(reference, p, [None if t is None else t.double() for t in tensors], grad_output.double())

    largest = max((t.abs().max().item() for t in (input, exact[0]) if t.numel()), default=0.0)
    incoming = grad_output.double().flatten()
    # A weight or bias gradient is a sum over all pixels, states and samples: its size is that of a random walk.
    walk = abs(p.step_size) * incoming.norm().item() * max(1.0, largest)
    scales = [largest, incoming.abs().max().item() if incoming.numel() else 0.0, walk, walk]
    for layout, factor in (factors or {"": p.factor}).items():
        with kernels_in(layout) if layout else nullcontext():
            ours = run(functional, p, tensors, grad_output)
        assert_layout_kept(ours[0], input)
        for mine, theirs, truth, scale, what in zip(
            ours, same_dtype, exact, scales, ("output", "grad input", "grad weight", "grad bias"), strict=False
        ):
            assert_as_accurate(mine, theirs, truth, scale, f"{layout} {what}", factor)


@given(problems())
@settings(max_examples=150)
def test_flow_and_its_gradients(p: Problem) -> None:
    check_flow(p)


# What the examples above meet too rarely: the shapes of the networks, and channels and sizes around a vector's width.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "kernel", "steps"),
    [
        ((3, 8, 28, 28), 3, 10),
        ((2, 32, 32, 32), 3, 3),
        ((1, 64, 16, 16), 3, 2),
        ((1, 112, 8, 8), 3, 2),
        ((1, 128, 32, 32), 3, 1),
        ((2, 15, 7, 31), 3, 2),
        ((2, 16, 8, 32), 5, 2),
        ((2, 17, 9, 33), 1, 2),
        ((33, 8, 3, 2), 3, 2),
        ((1, 1, 1, 1), 5, 3),
        ((2, 4, 1, 64), 5, 2),
        ((2, 4, 64, 1), 3, 2),
        ((1, 2, 130, 3), 3, 2),
    ],
)
def test_flow_at_chosen_shapes(shape: tuple[int, int, int, int], kernel: int, steps: int, layout: str) -> None:
    check_flow(Problem(shape, kernel, steps, False, True, False, layout, torch.float32, 0.1, 0.1, seed=1))
    check_flow(Problem(shape, kernel, steps, True, True, True, layout, torch.float32, 0.1, 0.1, seed=2))


@given(
    shape=st.tuples(
        st.integers(1, 4),
        st.one_of(st.integers(1, 40), st.sampled_from((48, 64, 95, 96))),
        st.integers(1, 24),
        st.integers(1, 36),
    ),
    kernel=st.sampled_from((1, 3, 3, 5)),
    steps=st.integers(1, 4),
    step_size=st.floats(-0.25, 0.25, allow_subnormal=False),
    layout=st.sampled_from(LAYOUTS),
    recompute=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=60)
def test_flow_in_bfloat16(
    shape: tuple[int, int, int, int],
    kernel: int,
    steps: int,
    step_size: float,
    layout: str,
    recompute: bool,
    seed: int,
) -> None:
    """Step sizes up to those for which products may be rounded, in the layout of the rule and in both that round."""
    p = Problem(shape, kernel, steps, False, True, False, layout, torch.bfloat16, 0.1, step_size, seed, recompute)
    check_flow(p, {"best": 2.0, "planes": 2.0, "channels": 2.0})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_is_a_flow_of_one_step(layout: str, dtype: torch.dtype) -> None:
    input = random_state((3, 8, 9, 7), layout, dtype)
    weight, bias = random_filters(8, 3, None, True, dtype)
    step = functional.euler_conv_step(input, weight, bias, step_size=0.25)
    assert_layout_kept(step, input)
    assert step.dtype == dtype
    flow = functional.euler_conv_flow(input, weight, bias, step_size=0.25, n_steps=1)
    assert_close(step, flow, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trajectory_starts_with_the_input_and_ends_with_the_result(layout: str) -> None:
    input = random_state((3, 8, 9, 7), layout)
    weight, bias = random_filters(8, 3, 4, True)
    states = functional.euler_conv_flow(input, weight, bias, step_size=0.25, return_trajectory=True)
    assert states.shape == (5, 3, 8, 9, 7)
    assert_layout_kept(states, input)
    assert torch.equal(states[0], input)
    assert_close(states[-1], functional.euler_conv_flow(input, weight, bias, step_size=0.25), 1e-6)
    for k in range(4):
        step = functional.euler_conv_step(states[k], weight[k], None if bias is None else bias[k], step_size=0.25)
        assert_close(states[k + 1], step, 1e-6)


def test_results_share_no_memory_with_the_input() -> None:
    input = random_state((1, 8, 5, 5))
    weight, bias = random_filters(8, 3, 1, True)
    states = functional.euler_conv_flow(input, weight, bias, step_size=0.1, return_trajectory=True)
    assert states.untyped_storage().data_ptr() != input.untyped_storage().data_ptr()
    before = input.clone()
    states.zero_()
    assert torch.equal(input, before)


# ---------------------------------------------------------------------------------------------------------------------
# Activation
# ---------------------------------------------------------------------------------------------------------------------


def sweep(dtype: torch.dtype) -> Tensor:
    tiny = torch.finfo(torch.float32).smallest_normal
    special = [0.0, -0.0, 88.0, -88.0, 88.8, -88.8, 104.0, -104.0, 20.0, 40.0, -40.0, 1e4, -1e4, tiny / 8, -tiny / 8]
    return torch.cat(
        [torch.tensor(special), torch.linspace(-1e4, 1e4, 4001), torch.linspace(-120, 120, 48001), torch.randn(1000)]
    ).to(dtype)


@pytest.mark.parametrize("negative_slope", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_over_the_whole_range(negative_slope: float, dtype: torch.dtype) -> None:
    """Value and slope within 4 ulp of the exact one, or of 1e-7: the sum ``a u + (1 - a) log(1 + e^u)`` has a zero."""
    input = sweep(dtype)
    u = input.double().numpy()
    exact = negative_slope * u + (1 - negative_slope) * np.logaddexp(0.0, u)
    with np.errstate(over="ignore"):
        slope = negative_slope + (1 - negative_slope) / (1 + np.exp(-u))
    value, gradient = gradients(
        lambda x: functional.smooth_leaky_relu(x, negative_slope), [input], torch.ones_like(input)
    )
    assert_finite(value, gradient)
    # Near its zero the value is a difference of terms no larger than max(|a u|, log 2), and accurate to their ulp.
    terms = np.maximum(np.abs(exact), np.minimum(np.abs(negative_slope * u), 1.0))
    for found, truth, size in ((value, exact, terms), (gradient, slope, np.abs(slope))):
        error = (found.double() - torch.from_numpy(truth)).abs()
        allowed = 4 * torch.finfo(dtype).eps * torch.from_numpy(np.maximum(size, 1e-7))
        worst = (error / allowed).argmax()
        assert (error <= allowed).all(), f"at {input[worst].item()!r}: {4 * (error / allowed)[worst].item():.2f} ulp"


def test_activation_does_not_overflow_where_the_formula_does() -> None:
    input = torch.tensor([89.0, 200.0, 1e4, 3e38, -1e4, -3e38])
    naive = 0.1 * input + 0.9 * torch.log(1 + torch.exp(input))
    assert naive[:3].isinf().all()
    assert_finite(functional.smooth_leaky_relu(input))
    expected = torch.where(input > 0, input, 0.1 * input)
    assert float(((functional.smooth_leaky_relu(input) - expected) / expected).abs().max()) < 1e-6


@pytest.mark.parametrize("negative_slope", [0.01, 0.1, 0.5, 1.0, 2.0])
def test_activation_inside_a_flow(negative_slope: float) -> None:
    """A step whose filter carries u over to an empty channel: there value and slope come out alone, not added to u.

    In the flow AVX-512 takes them from a table (csrc/cpu/activation_table.inc), with another one for both together.
    """
    isa = backend_info()["backends"]["cpu"].get("isa")
    value_bound, slope_bound = (1.2e-7, 1.0e-7) if COMPILED and isa.startswith(("avx512", "amx")) else (4.8e-7, 2.4e-7)
    u = torch.cat([sweep(torch.float32), torch.linspace(-20, 20, 100_001)])
    exact = u.double().requires_grad_()
    value = reference.smooth_leaky_relu(exact, negative_slope)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    weight = torch.zeros(1, 2, 2, 1, 1)
    weight[0, 1, 0] = 1.0
    input, grad_output = torch.zeros(2, 1, 2, 1, len(u))
    input[0, 0, 0] = u
    grad_output[0, 1] = 1.0
    for recompute in (True, False):  # without and with the slope in the forward pass
        result, grad_input = gradients(
            lambda x, r=recompute: functional.euler_conv_flow(
                x, weight, step_size=1.0, negative_slope=negative_slope, recompute=r
            ),
            [input],
            grad_output,
        )
        assert_finite(result, grad_input)
        assert ((result[0, 1, 0] - value).abs() <= value_bound * value.abs().clamp(min=1.0)).all()
        assert max_error(grad_input[0, 0, 0], slope) <= slope_bound * max(1.0, negative_slope)


@given(
    shape=st.lists(st.integers(0, 9), max_size=5),
    dtype=st.sampled_from(DTYPES),
    negative_slope=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31 - 1),
    permute=st.booleans(),
    slice_=st.booleans(),
)
@settings(max_examples=60)
def test_activation_of_any_shape_and_layout(
    shape: list[int], dtype: torch.dtype, negative_slope: float, seed: int, permute: bool, slice_: bool
) -> None:
    torch.manual_seed(seed)
    input = (20 * torch.randn(shape)).to(dtype)
    if permute:
        input = input.permute(tuple(reversed(range(input.dim()))))
    if slice_ and input.dim():
        input = input[..., ::2]
    grad_output = torch.randn(input.shape).to(dtype)

    def run(module: Any, x: Tensor) -> list[Tensor]:
        return gradients(lambda t: module.smooth_leaky_relu(t, negative_slope), [x], grad_output)

    ours, same_dtype, exact = run(functional, input), run(reference, input), run(reference, input.double())
    assert ours[0].stride() == torch.empty_like(input).stride()
    for mine, theirs, truth in zip(ours, same_dtype, exact, strict=True):
        assert_as_accurate(mine, theirs, truth, 1.0, "activation")


# ---------------------------------------------------------------------------------------------------------------------
# Penalty, rate, Lipschitz bound
# ---------------------------------------------------------------------------------------------------------------------

SLOPES = st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 2.0)).map(lambda pair: (min(pair), max(pair)))


def random_banks(seed: int, channels: list[int], kernel: int, dtype: torch.dtype) -> list[Tensor]:
    """Filters with strongly negative centres, as penalised networks have them."""
    torch.manual_seed(seed)
    banks = []
    for c in channels:
        weight = torch.randn(c, c, kernel, kernel, dtype=torch.float64) / (c * kernel**2)
        weight[..., kernel // 2, kernel // 2] -= torch.diag(3 * torch.rand(c, dtype=torch.float64))
        banks.append(weight.to(dtype))
    return banks


@given(
    channels=st.integers(1, 40),
    steps=st.one_of(st.none(), st.integers(1, 6)),
    kernel=st.sampled_from((1, 3, 5, 7)),
    dtype=st.sampled_from(DTYPES),
    norm=st.sampled_from(NORMS),
    reduction=st.sampled_from(REDUCTIONS),
    slope=SLOPES,
    rate=st.floats(-4.0, 8.0),
    strided=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=150)
def test_penalty_and_its_gradient(
    channels: int,
    steps: int | None,
    kernel: int,
    dtype: torch.dtype,
    norm: str,
    reduction: str,
    slope: tuple[float, float],
    rate: float,
    strided: bool,
    seed: int,
) -> None:
    banks = random_banks(seed, [channels] * (steps or 1), kernel, dtype)
    weight = banks[0] if steps is None else torch.stack(banks)
    if strided:
        weight = weight.mT.transpose(-3, -4)

    def call(module: Any, w: Tensor, reduction_: str = reduction) -> Tensor:
        return module.contraction_penalty(w, rate=rate, slope=slope, norm=norm, reduction=reduction_)

    exact_weight = weight.double()
    argument = reference._hinge_argument(exact_weight, rate, slope, norm)
    terms = abs(rate) + 2 * (slope[0] + slope[1]) * exact_weight.abs().sum((-1, -2)).sum(-1).amax().item()
    terms += slope[1] * exact_weight.abs().sum((-1, -2)).sum(-2).amax().item()
    count = argument.numel() if reduction == "sum" else 1
    value_of = {name: call(module, w) for name, module, w in (
        ("ours", functional, weight), ("same", reference, weight), ("exact", reference, exact_weight)
    )}  # fmt: skip
    assert value_of["ours"].shape == value_of["exact"].shape
    assert value_of["ours"].dtype == dtype
    # In 16 bits all is added up in float32 and rounded once.
    inner = torch.float32 if dtype in HALF else dtype
    error, theirs = (max_error(value_of[name], value_of["exact"]) for name in ("ours", "same"))
    unit = FLOAT64_TOLERANCE if dtype == torch.float64 else ULPS * torch.finfo(inner).eps
    rounded = torch.finfo(dtype).eps * float(value_of["exact"].abs().max()) + torch.finfo(dtype).smallest_normal
    assert error <= 2.0 * theirs + unit * terms * count + rounded, (error, theirs, terms * count)

    m, r, _ = reference.filter_sums(exact_weight)
    kinks = [argument] + ([2 * m + r] if norm == "2-sharp" else [])
    # Where a hinge argument is within rounding of its kink, either side is right.
    if all((kink.abs() > 1e3 * torch.finfo(inner).eps * terms).all() for kink in kinks):
        grad_output = torch.rand(value_of["exact"].shape, dtype=torch.float64)
        grads = [
            gradients(lambda w, m=module: call(m, w), [w], grad_output.to(dtype if w is weight else torch.float64))[1]
            for module, w in ((functional, weight), (reference, weight), (reference, exact_weight))
        ]
        assert_as_accurate(*grads, 0.0, "grad of penalty")


@given(
    channels=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    norm=st.sampled_from(NORMS),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=40)
def test_penalty_of_a_list(channels: list[int], norm: str, reduction: str, seed: int) -> None:
    banks = random_banks(seed, channels, 3, torch.float64)

    def run(module: Any) -> list[Tensor]:
        shape = (sum(channels),) if reduction == "none" else ()
        weights = torch.linspace(1, 2, max(1, sum(shape)), dtype=torch.float64).reshape(shape)
        return gradients(
            lambda *w: module.contraction_penalty(list(w), rate=2.0, norm=norm, reduction=reduction), banks, weights
        )

    for mine, exact in zip(run(functional), run(reference), strict=True):
        assert_close(mine, exact, FLOAT64_TOLERANCE)
    # A list of equal banks is the stack, and a tuple is a list.
    same = [banks[0], banks[0]]
    options: dict[str, Any] = {"rate": 2.0, "norm": norm, "reduction": reduction}
    stacked = functional.contraction_penalty(torch.stack(same), **options)
    assert_close(functional.contraction_penalty(tuple(same), **options), stacked.reshape(-1).reshape(
        (-1,) if reduction == "none" else ()), FLOAT64_TOLERANCE)  # fmt: skip


@given(
    channels=st.integers(1, 12),
    steps=st.integers(1, 3),
    norm=st.sampled_from(NORMS),
    slope=SLOPES,
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=60)
def test_rate_is_the_largest_without_penalty(
    channels: int, steps: int, norm: str, slope: tuple[float, float], seed: int
) -> None:
    weight = torch.stack(random_banks(seed, [channels] * steps, 3, torch.float64))
    rates = functional.contraction_rate(weight, slope=slope, norm=norm)
    assert rates.shape == (steps,)
    assert_finite(rates)
    assert functional.contraction_rate(weight[0], slope=slope, norm=norm).shape == ()
    for bank, rate in zip(weight, rates.tolist(), strict=True):
        penalty = functional.contraction_penalty(bank, rate=rate, slope=slope, norm=norm)
        assert_close(penalty, torch.zeros(()), 1e-12, scale=max(1.0, abs(rate)))
        assert functional.contraction_penalty(bank, rate=rate + 1e-6, slope=slope, norm=norm).item() > 1e-7
        assert functional.contraction_penalty(bank, rate=rate - 1e-6, slope=slope, norm=norm).item() == 0.0


def dense_operator(bank: Tensor, height: int, width: int) -> Tensor:
    """Matrix ``(C H W, C H W)`` of the zero-padded convolution, from its action on unit vectors."""
    n = bank.shape[0] * height * width
    units = torch.eye(n, dtype=bank.dtype).view(n, bank.shape[0], height, width)
    return F.conv2d(units, bank, padding=bank.shape[-1] // 2).reshape(n, n).mT


# (C, k, H, W): the image is large enough for some pixel to see every tap, so that the bounds of rows are attained.
OPERATORS = [(1, 1, 2, 2), (3, 1, 2, 2), (1, 3, 4, 5), (2, 3, 4, 4), (4, 3, 3, 4), (2, 5, 6, 5)]


@pytest.mark.parametrize(("channels", "kernel", "height", "width"), OPERATORS)
def test_filter_sums_are_those_of_the_dense_operator(channels: int, kernel: int, height: int, width: int) -> None:
    (bank,) = random_banks(channels, [channels], kernel, torch.float64)
    matrix = dense_operator(bank, height, width)
    pixels = (channels, height * width)
    m, r, q = reference.filter_sums(bank)
    diagonal = matrix.diagonal().view(pixels)
    assert_close(diagonal, m[:, None].expand(pixels), 1e-15)
    off_centre = matrix.abs() - torch.diag(matrix.diagonal().abs())
    assert_close(off_centre.sum(1).view(pixels).amax(1), r, 1e-14)
    assert_close(off_centre.sum(0).view(pixels).amax(1), q, 1e-14)


@pytest.mark.parametrize(("channels", "kernel", "height", "width"), OPERATORS)
@pytest.mark.parametrize("slope", [(0.1, 1.0), (0.3, 0.3), (0.2, 1.7)])
@pytest.mark.parametrize("norm", NORMS)
def test_rate_is_sound_for_the_dense_operator(
    channels: int, kernel: int, height: int, width: int, slope: tuple[float, float], norm: str
) -> None:
    """The matrix measure of ``D A`` (or the 2-norm's, of its symmetric part) is at most ``-rate / 2`` for every D."""
    (bank,) = random_banks(7 * channels, [channels], kernel, torch.float64)
    matrix = dense_operator(bank, height, width)
    rate = functional.contraction_rate(bank, slope=slope, norm=norm).item()
    a, b = slope
    for sample in range(60):
        # Corners of the box as well as points within.
        mixing = torch.rand(len(matrix), dtype=torch.float64)
        d = a + (b - a) * (mixing.round() if sample % 2 else mixing)
        product = d[:, None] * matrix
        off_centre = product.abs() - torch.diag(product.diagonal().abs())
        if norm in ("2", "2-sharp"):
            measure = torch.linalg.eigvalsh(product + product.mT)[-1].item() / 2
        elif norm == "inf":
            measure = (product.diagonal() + off_centre.sum(1)).max().item()
        else:
            measure = (product.diagonal() + off_centre.sum(0)).max().item()
        # "inf" and "1" know no positive rate beyond the lower slope; they promise only where the rate is positive.
        if norm in ("2", "2-sharp") or rate >= 0:
            assert measure <= -rate / 2 + 1e-10


@pytest.mark.parametrize(("channels", "kernel", "height", "width"), OPERATORS)
@pytest.mark.parametrize("step_size", [0.05, 0.5, 1.5, -0.3])
@pytest.mark.parametrize("slope", [(0.1, 1.0), (-0.5, 0.8), (-2.0, 0.0)])
def test_lipschitz_bounds_against_the_dense_operator(
    channels: int, kernel: int, height: int, width: int, step_size: float, slope: tuple[float, float]
) -> None:
    a, b = slope
    bank = random_banks(3 * channels, [channels], kernel, torch.float64)[0]
    matrix = dense_operator(bank, height, width)
    identity = torch.eye(len(matrix), dtype=torch.float64)
    bound = {
        p: functional.euler_lipschitz_bound(bank, step_size=step_size, slope=(a, b), p=p).item()
        for p in ("inf", "1", "2")
    }
    # Infinity norm, exact: the rows of I + h D A are independent and convex in their slope, so corners suffice.
    rows = torch.stack([(identity + step_size * t * matrix).abs().sum(1) for t in (a, b)])
    assert abs(bound["inf"] - rows.max().item()) <= 1e-12 * bound["inf"]
    # 1-norm, exact: in a column the diagonal entry takes either corner, every other its largest magnitude.
    steepest = max(abs(a), abs(b))
    off_centre = matrix.abs() - torch.diag(matrix.diagonal().abs())
    columns = torch.stack(
        [(1 + step_size * t * matrix.diagonal()).abs() + abs(step_size) * steepest * off_centre.sum(0) for t in (a, b)]
    )
    assert abs(bound["1"] - columns.max().item()) <= 1e-12 * bound["1"]
    for sample in range(60):
        mixing = torch.rand(len(matrix), dtype=torch.float64)
        d = a + (b - a) * (mixing.round() if sample % 2 else mixing)
        step = identity + step_size * d[:, None] * matrix
        assert torch.linalg.matrix_norm(step, 2).item() <= bound["2"] * (1 + 1e-12)
        assert torch.linalg.matrix_norm(step, 1).item() <= bound["1"] * (1 + 1e-12)
        assert torch.linalg.matrix_norm(step, torch.inf).item() <= bound["inf"] * (1 + 1e-12)


def test_lipschitz_bound_holds_for_the_step_itself() -> None:
    weight = torch.stack(random_banks(5, [3, 3], 3, torch.float64))
    bound = functional.euler_lipschitz_bound(weight, step_size=0.4, p="inf")
    assert bound.shape == (2,)
    x = torch.randn(40, 3, 6, 6, dtype=torch.float64)
    y = x + torch.randn(40, 3, 6, 6, dtype=torch.float64) * torch.logspace(-6, 1, 40).view(-1, 1, 1, 1)
    for bank, factor in zip(weight, bound, strict=True):
        fx, fy = (functional.euler_conv_step(z, bank, step_size=0.4) for z in (x, y))
        growth = (fx - fy).flatten(1).abs().amax(1) / (x - y).flatten(1).abs().amax(1)
        assert_finite(growth)
        assert (growth <= factor * (1 + 1e-9)).all()


# ---------------------------------------------------------------------------------------------------------------------
# How far softplus rises from an anchor
# ---------------------------------------------------------------------------------------------------------------------


def sigmoid(u: Any) -> Any:
    return np.exp(-np.logaddexp(0, -u))


def rise(anchor: Any, delta: Any) -> Any:
    """``softplus(anchor + delta) - softplus(anchor)``, correct to a few units of numpy's widest numbers."""
    near = np.log1p(sigmoid(anchor) * np.expm1(np.clip(delta, -1, 1)))
    upper = delta + np.log1p(np.exp(-np.abs(anchor + delta))) - np.log1p(np.exp(-np.abs(anchor)))
    beyond = np.where(
        (anchor > 0) & (anchor + delta > 0), upper, np.logaddexp(0, anchor + delta) - np.logaddexp(0, anchor)
    )
    return np.where(np.abs(delta) <= 1, near, beyond)


def rise_of_slope(anchor: Any, delta: Any) -> Any:
    """``sigmoid(anchor + delta) - sigmoid(anchor)``."""
    near = sigmoid(anchor + delta) * sigmoid(-anchor) * -np.expm1(-np.clip(delta, -1, 1))
    return np.where(np.abs(delta) <= 1, near, sigmoid(anchor + delta) - sigmoid(anchor))


def anything() -> Any:
    """Numbers of all sizes that matter: down to 1e-30, up to 1e4, and around where exp and the formula change."""
    size = st.floats(-30, 4).map(lambda exponent: 10.0**exponent)
    return st.one_of(size, size.map(lambda x: -x), st.floats(-1, 1), st.floats(-100, 100), st.just(0.0))


@given(
    dtype=st.sampled_from((torch.float32, torch.float64)),
    anchors=st.lists(st.one_of(st.floats(-100, 100), st.floats(-1e4, 1e4)), min_size=1, max_size=5),
    deltas=st.lists(anything(), min_size=1, max_size=40),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=150)
def test_increment(dtype: torch.dtype, anchors: list[float], deltas: list[float], seed: int) -> None:
    """Value, rate and gradients to a few units in the last place; near 0 relative to how far it is."""
    torch.manual_seed(seed)
    delta = torch.tensor(deltas, dtype=dtype).expand(1, len(anchors), -1)
    anchor = torch.tensor(anchors, dtype=dtype).view(1, -1, 1)
    tangent = torch.randn_like(delta)
    leaves = [torch.cat([delta, tangent], -1).requires_grad_(), anchor.requires_grad_()]
    both = _ops.softplus_increment_and_tangent(*leaves)
    g = torch.randn_like(both)
    found, rate, grad_delta, grad_tangent = (
        part for t in (both, torch.autograd.grad(both, leaves[0], g, retain_graph=True)[0]) for part in t.chunk(2, -1)
    )
    (grad_anchor,) = torch.autograd.grad(both, leaves[1], g)

    d, a, t, g1, g2 = (x.detach().numpy().astype(np.longdouble) for x in (delta, anchor, tangent, *g.chunk(2, -1)))
    info = torch.finfo(dtype)
    eps = max(info.eps, 2 * float(np.finfo(np.longdouble).eps))

    def check(found: Tensor, exact: Any, size: Any, units: float = 4.0) -> None:
        error = np.abs(found.detach().numpy().astype(np.longdouble) - exact)
        nothing = 100 * info.tiny  # where exp would leave the normal numbers it stays on their edge
        assert (error <= units * eps * size + nothing).all(), float((error / (eps * size + nothing)).max())

    u, steps = a + d, np.abs(d)
    slope, falling = sigmoid(u), 1 + np.abs(u) * sigmoid(-u)  # where u's rounding counts, the slope is exp(u)
    curved = slope * sigmoid(-u) * t * g2
    around = 2 * (1 + np.abs(u)) * np.abs(curved)
    assert (found[delta == 0] == 0).all()
    beyond = np.abs(a) * (steps > 0.5)
    check(found, rise(a, d), steps if COMPILED else steps + beyond)
    check(rate, slope * t, slope * falling * np.abs(t))
    check(grad_tangent, slope * g2, slope * falling * np.abs(g2))
    check(grad_delta, slope * g1 + curved, slope * falling * np.abs(g1) + around)
    total = np.minimum(steps, 1) if COMPILED else 1.0
    exact = (rise_of_slope(a, d) * g1 + curved).sum(-1, keepdims=True)
    check(grad_anchor, exact, (total * np.abs(g1) + around).sum(-1, keepdims=True), 16.0)

    alone = [delta.contiguous().requires_grad_(), leaves[1]]
    increment = _ops.softplus_increment(*alone)
    assert torch.equal(increment, found)
    first, second = torch.autograd.grad(increment, alone, g.chunk(2, -1)[0])
    check(first, slope * g1, slope * falling * np.abs(g1))
    exact = (rise_of_slope(a, d) * g1).sum(-1, keepdims=True)
    check(second, exact, (total * np.abs(g1)).sum(-1, keepdims=True), 16.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 4, 50])
def test_increment_without_surprises(dtype: torch.dtype, columns: int) -> None:
    """NaN stays in its place, infinity has its limits, and what is finite gives what is finite."""
    largest = torch.finfo(dtype).max
    anchor = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4], dtype=dtype).view(1, 5, 1)
    for value in (0.0, 1e4, -1e4, 0.5 * largest, -largest, torch.inf, -torch.inf, torch.nan):
        delta = torch.randn(1, 5, columns, dtype=dtype)
        delta[..., columns // 2] = value
        tangent = torch.ones_like(delta)
        leaves = [torch.cat([delta, tangent], -1).requires_grad_(), anchor.clone().requires_grad_()]
        increment, rate = _ops.softplus_increment_and_tangent(*leaves).chunk(2, -1)
        first, second = torch.autograd.grad(increment.sum() + rate.sum(), leaves)
        for result in (increment, rate, first[..., :columns], first[..., columns:]):
            assert torch.equal(result.isnan(), delta.isnan())
        assert torch.equal(increment.isposinf(), delta.isposinf())
        assert (rate[~delta.isnan()] >= 0).all()
        assert (rate[~delta.isnan()] <= 1).all()
        assert second.isfinite().all() == (not delta.isnan().any())
        at = increment[..., columns // 2]
        if value in (-largest, -torch.inf):
            assert_close(at, -reference.smooth_leaky_relu(anchor, 0.0)[..., 0], 1e-6)
    delta = torch.linspace(-3, 3, columns, dtype=dtype).expand(1, 5, columns)
    assert _ops.softplus_increment(delta, torch.full_like(anchor, torch.nan)).isnan().all()
