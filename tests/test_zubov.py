"""Contract of rnf.zubov: convex, positive, zero at the equilibrium; derivatives, boundary and losses against loops."""

from __future__ import annotations

import copy
import csv
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import example, given, settings
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import robust_node_fast as rnf
from robust_node_fast import zubov
from robust_node_fast.zubov import contenders, exact, softplus
from robust_node_fast.zubov.boundary import facing_offsets

ROOT = Path(__file__).resolve().parent.parent
BOTH = pytest.mark.parametrize("partial", [False, True], ids=["convex", "partial"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def functions(dim: int = 3, k: int = 4, **options: Any) -> zubov.ConvexLyapunov:
    options = {"width": 7, "dtype": torch.float64, **options}
    return zubov.ConvexLyapunov(dim, k, **options)


def in_double(lyapunov: zubov.ConvexLyapunov) -> zubov.ConvexLyapunov:
    return copy.deepcopy(lyapunov).double()


def scaled(module: Any, gain: float) -> Any:
    """All parameters times ``gain``: from nearly quadratic to sharp kinks and one-hot attention."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(gain)
    return module


def exact_system(dtype: torch.dtype = torch.float64) -> zubov.ConvexLyapunov:
    """``V = |x|^2`` (once for each of two classes), which solves Zubov's equation for ``dx/dt = -x (1 - |x|^2)``."""
    lyapunov = zubov.ConvexLyapunov(2, 2, width=3, eps=1.0, equilibria=torch.zeros(2, 2), dtype=dtype)
    nn.init.zeros_(lyapunov.input_weight)
    return lyapunov


# ---------------------------------------------------------------------------------------------------------------------
# The functions
# ---------------------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    dim=st.integers(1, 6),
    k=st.integers(1, 4),
    width=st.integers(1, 9),
    depth=st.integers(1, 4),
    partial=st.booleans(),
    normalized=st.booleans(),
    gain=st.sampled_from((0.1, 1.0, 4.0)),
    spread=st.sampled_from((1e-2, 1.0, 30.0)),
)
@settings(max_examples=60)
def test_convex_along_segments_positive_and_zero_at_the_equilibrium(
    seed: int,
    dim: int,
    k: int,
    width: int,
    depth: int,
    partial: bool,
    normalized: bool,
    gain: float,
    spread: float,
) -> None:
    torch.manual_seed(seed)
    options = {"width": width, "depth": depth, "partial": partial, "normalized": normalized}
    lyapunov = scaled(functions(dim, k, **options), gain)
    a, b = spread * torch.randn(2, 16, dim, dtype=torch.float64)
    share = torch.rand(16, 1, dtype=torch.float64)
    with torch.no_grad():
        chord = share * lyapunov(a) + (1 - share) * lyapunov(b)
        gap = chord - lyapunov(share * a + (1 - share) * b)
        assert (gap >= -1e-12 * (1 + chord)).all()
        assert torch.equal(lyapunov(lyapunov.equilibria).diagonal(), torch.zeros(k, dtype=torch.float64))
        lower_bound = lyapunov.eps * lyapunov.offsets(a).square().sum(-1).T
        assert (lyapunov(a) >= lower_bound).all()
        assert (lower_bound > 0).all()


@BOTH
def test_attention_that_depends_on_the_state_would_not_be_convex(partial: bool) -> None:
    """That the test above can fail: the same network with the state in the place of the context."""
    torch.manual_seed(0)
    lyapunov = scaled(functions(2, 1, partial=True), 3.0)
    if not partial:  # then let the state move the queries only
        for shift in lyapunov.context_anchor:
            nn.init.zeros_(shift.weight)

    def value(x: Tensor) -> Tensor:
        state = {**dict(lyapunov.named_parameters()), "equilibria": x[None]}
        g = torch.func.functional_call(lyapunov, state, (x[None] + 1.0,))
        return g.squeeze()

    points = torch.randn(400, 2, 2, dtype=torch.float64) * 2
    with torch.no_grad():
        values = torch.stack([torch.stack([value(a), value((a + b) / 2), value(b)]) for a, b in points])
    assert (values[:, 0] + values[:, 2] - 2 * values[:, 1]).min() < -1e-2


@BOTH
@pytest.mark.parametrize("gain", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("spread", [1e-8, 1e-6, 1e-3, 1.0, 1e3, 1e8])
def test_float32_is_never_negative_and_close_to_float64(partial: bool, gain: float, spread: float) -> None:
    lyapunov = scaled(functions(width=16, partial=partial, dtype=torch.float32), gain)
    offset = spread * torch.randn(4, 50, 3)
    value = lyapunov.values(lyapunov.coefficients(), offset)
    double = in_double(lyapunov)
    exact = double.values(double.coefficients(), offset.double())
    assert (value > 0).all()
    steepest = double.coefficients().gradient.abs().sum(1) + lyapunov.log_scale.double().exp()[:, None]
    size = lyapunov.input_weight.detach().double().norm(dim=2).amax() * offset.double().norm(dim=-1)
    assert ((value - exact).abs() <= 3e-6 * (size * (1 + steepest) + exact)).all()


@DTYPES
def test_softplus_increment(dtype: torch.dtype) -> None:
    """Of a size from the smallest numbers to where exp overflows, and with its derivatives in three ways."""
    size = torch.logspace(-30, 4, 60, dtype=torch.float64)
    delta = torch.cat([-size.flip(0), torch.zeros(1).double(), size, torch.linspace(-40, 40, 401).double()])
    delta = delta.to(dtype).expand(1, 5, -1)
    anchor = torch.tensor([-30.0, -2.0, 0.0, 3.0, 30.0], dtype=dtype).view(1, 5, 1)
    found = softplus.softplus_increment(delta, anchor)
    # log1p(sigmoid(a) expm1(d)) or its mirror image, where nothing cancels, in float64
    d, a = delta.double().clamp(-1, 1), anchor.double()
    near = torch.log1p(torch.sigmoid(a) * torch.expm1(d))
    far = F.softplus(a + delta.double(), threshold=40.0) - F.softplus(a, threshold=40.0)
    exact = torch.where(delta.double().abs() <= 1, near, far)
    eps = torch.finfo(dtype).eps
    assert (found[delta == 0] == 0).all()
    size = delta.abs() + torch.where(delta.abs() > 0.5, anchor.abs(), 0.0)
    assert ((found - exact).abs() <= 4 * eps * size).all()
    where = torch.maximum(delta.abs(), anchor.abs() + 0 * delta) < 300
    inner, tangent = torch.where(where, delta, 0.0), torch.randn_like(delta)
    value, rate = softplus.softplus_increment_and_tangent(torch.cat([inner, tangent], -1), anchor).chunk(2, -1)
    assert torch.equal(value, softplus.softplus_increment(inner, anchor))
    _, jvp = torch.func.jvp(lambda t: softplus.softplus_increment(t, anchor), (inner,), (tangent,))
    assert_close(rate, jvp, 20 * eps)


def test_gradients_of_the_softplus_increment() -> None:
    both, anchor = 3 * torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(2, 3, 1, dtype=torch.float64)
    both[0, 0, 0] = 0.0
    leaves = [t.requires_grad_() for t in (both, anchor)]
    assert gradcheck(softplus.softplus_increment, leaves)
    assert torch.autograd.gradgradcheck(softplus.softplus_increment, leaves)
    assert gradcheck(softplus.softplus_increment_and_tangent, leaves)


def with_gradients(function: Any, model: zubov.ConvexLyapunov, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Both results, and the gradients of a loss that depends on both."""
    value, derivative = function(model, *inputs)
    first, second = torch.linspace(-1, 1, 2 * value.numel(), dtype=value.dtype).view(2, *value.shape)
    loss = (first * value).sum() + (second * derivative.square()).sum()
    return value, derivative, *torch.autograd.grad(loss, [*inputs, *model.parameters()], materialize_grads=True)


@BOTH
@DTYPES
def test_value_and_derivative_against_a_loop_over_classes(partial: bool, dtype: torch.dtype) -> None:
    for depth, normalized in ((1, True), (2, True), (3, True), (3, False)):
        lyapunov = functions(partial=partial, normalized=normalized, depth=depth, dtype=dtype)
        double = in_double(lyapunov)
        x, dx = (torch.randn(6, 3, dtype=dtype).requires_grad_() for _ in range(2))

        found = with_gradients(zubov.value_and_derivative, lyapunov, x, dx)
        wide = [t.detach().double().requires_grad_() for t in (x, dx)]
        exact = with_gradients(zubov.reference.value_and_derivative, double, *wide)
        jvp = with_gradients(lambda v, *xs: torch.func.jvp(v, xs[:1], xs[1:]), lyapunov, x, dx)
        for ours, theirs, true in zip(found, jvp, exact, strict=True):
            assert_close(ours.detach().double(), true.detach(), 1e-10 if dtype == torch.float64 else 2e-5)
            assert_close(theirs.detach().double(), true.detach(), 1e-10 if dtype == torch.float64 else 2e-5)
        assert_close(lyapunov(x).detach(), found[0].detach(), 1e-14 if dtype == torch.float64 else 1e-6)
        points = torch.randn(4, 5, 3, dtype=dtype)
        own = torch.stack([lyapunov(points[k])[:, k] for k in range(4)])
        assert_close(lyapunov.per_class(points).detach(), own.detach(), 1e-6)


@BOTH
def test_second_derivatives(partial: bool) -> None:
    lyapunov = functions(2, 2, width=3, partial=partial, depth=2)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lyapunov, x)


@BOTH
def test_transforms_state_dict_and_compile(partial: bool) -> None:
    lyapunov = functions(partial=partial, dtype=torch.float32)
    x = torch.randn(5, 6, 3)
    assert_close(torch.vmap(lyapunov)(x).detach(), torch.stack([lyapunov(part) for part in x]).detach(), 1e-6)
    leaf = x[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(lyapunov(leaf)[:, 1].sum(), leaf)
    assert_close(torch.vmap(torch.func.grad(lambda s: lyapunov(s[None])[0, 1]))(x[0]), gradient, 1e-5)
    other = functions(partial=partial, dtype=torch.float32)
    other.load_state_dict(lyapunov.state_dict())
    assert torch.equal(other(x[0]), lyapunov(x[0]))
    assert torch.equal(copy.deepcopy(lyapunov)(x[0]), lyapunov(x[0]))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"x has dtype torch\.float64, expected torch\.float32"):
            lyapunov(torch.randn(2, 3, dtype=torch.float64))
        assert torch.equal(lyapunov(x[0]), other(x[0]))
        assert lyapunov(x[0].bfloat16()).dtype == torch.float32
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, ds: zubov.value_and_derivative(lyapunov, s, ds), fullgraph=True, backend="aot_eager"
    )
    for found, expected in zip(compiled(x[0], x[1]), zubov.value_and_derivative(lyapunov, x[0], x[1]), strict=True):
        assert_close(found.detach(), expected.detach(), 1e-5)
    compiled(x[0], x[1])[1].square().sum().backward()
    ours = lyapunov.input_weight.grad
    lyapunov.zero_grad()
    zubov.value_and_derivative(lyapunov, x[0], x[1])[1].square().sum().backward()
    assert ours is not None
    assert lyapunov.input_weight.grad is not None
    assert_close(ours, lyapunov.input_weight.grad, 1e-5)


def test_fixed_and_learned_equilibria() -> None:
    fixed = torch.randn(4, 3)
    lyapunov = functions(equilibria=fixed)
    assert "equilibria" in lyapunov.state_dict()
    assert "equilibria" not in dict(lyapunov.named_parameters())
    assert_close(lyapunov.equilibria, fixed.double(), 0.0)
    learned = functions()
    learned(torch.randn(5, 3, dtype=torch.float64)).sum().backward()
    assert learned.equilibria.grad is not None
    assert (learned.equilibria.grad != 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The boundary
# ---------------------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    depth=st.integers(1, 3),
    partial=st.booleans(),
    gain=st.sampled_from((0.3, 1.0, 5.0)),
    scale=st.sampled_from((1e-4, 1.0, 1e4)),
    level=st.sampled_from((0.01, 1.0, 50.0)),
    double=st.booleans(),
)
@example(seed=645417, depth=3, partial=True, gain=5.0, scale=1.0, level=1.0, double=False)
@settings(max_examples=60)
def test_boundary_is_met_to_tolerance(
    seed: int, depth: int, partial: bool, gain: float, scale: float, level: float, double: bool
) -> None:
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    lyapunov = scaled(functions(depth=depth, partial=partial, eps=1e-3, dtype=dtype), gain)
    with torch.no_grad():
        lyapunov.input_weight.mul_(scale)  # regions of a size from 1e-4 to 1e2
        points = zubov.sample_boundary(lyapunov, 20, level=level)
    assert points.shape == (4, 20, 3)
    wide = in_double(lyapunov)
    exact = points.double()
    offset = exact - wide.equilibria[:, None]
    # V with the coefficients that these functions have: those of float64 differ by what rounds in the context network.
    coefficients = lyapunov.coefficients().double()
    leaf = offset.detach().requires_grad_()
    value = wide.values(coefficients, leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    # What rounding the point to its precision does to V, and rounding in V itself, a difference of two linear terms.
    linear = (offset.abs() @ coefficients.gradient.abs()).squeeze(-1) + value
    ulp = torch.finfo(dtype).eps * (exact.abs() + wide.equilibria.detach()[:, None].abs() + offset.abs())
    unavoidable = (gradient.abs() * ulp).sum(-1) + 8 * torch.finfo(dtype).eps * linear
    assert ((value - level).abs() <= (1e-12 if double else 1e-6) * level + unavoidable).all()


@DTYPES
@BOTH
def test_boundary_of_ordinary_functions_within_the_stated_tolerance(partial: bool, dtype: torch.dtype) -> None:
    lyapunov = zubov.ConvexLyapunov(8, 10, partial=partial, dtype=dtype)
    points = zubov.sample_boundary(lyapunov, 50)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert (in_double(lyapunov).per_class(points.double()) - 1).abs().max() <= tolerance
    assert (lyapunov.per_class(points) - 1).abs().max() <= 2 * tolerance  # V's own rounding is in this one


def test_boundary_of_functions_whose_parts_cancel() -> None:
    """Where rounding makes the slope along a ray negative the tangent leads anywhere: up to V = 1e8 it did."""
    generator = torch.Generator().manual_seed(174)

    def draw(least: float, most: float) -> float:
        return least + (most - least) * float(torch.rand((), generator=generator))

    for seed in range(60):
        torch.manual_seed(seed)
        lyapunov = zubov.ConvexLyapunov(2, 2, width=8, depth=2, eps=10.0 ** draw(-4.0, 0.0))
        with torch.no_grad():
            lyapunov.log_scale.fill_(draw(0.0, 4.0))
            lyapunov.input_weight.mul_(10.0 ** draw(0.0, 1.5))
            lyapunov.anchor.add_(draw(0.0, 30.0))
            offset = zubov.sample_boundary(lyapunov, 16) - lyapunov.equilibria[:, None]
            value = lyapunov.values(lyapunov.coefficients().double(), offset.double())
        assert float((value - 1.0).abs().max()) < 2e-3, seed


def test_equilibria_and_precision_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="equilibria is not finite"):
        zubov.ConvexLyapunov(2, 2, equilibria=torch.full((2, 2), torch.nan))
    with pytest.raises(TypeError, match=r"dtype=torch\.float16 is unknown, expected float32 or float64"):
        zubov.ConvexLyapunov(2, 2, dtype=torch.float16)
    lyapunov = functions()
    with torch.no_grad():
        lyapunov.equilibria[0, 0] = torch.inf
    with pytest.raises(ValueError, match="the equilibria are not finite"):
        zubov.sample_boundary(lyapunov, 3)


def test_derivative_where_rounding_is_all_that_is_left_of_an_increment() -> None:
    """As jvp of the function as it is: where the increment is clipped to 0 it does not change either."""
    lyapunov = zubov.ConvexLyapunov(3, 4, width=8, depth=2)
    with torch.no_grad():
        lyapunov.anchor.fill_(20.0)
    x, dx = lyapunov.equilibria[0] + torch.randn(40, 3), torch.randn(40, 3)
    found = zubov.value_and_derivative(lyapunov, x, dx)[1]
    clipped = lyapunov(x) <= lyapunov.eps * (x[:, None] - lyapunov.equilibria).square().sum(2) * (1.0 + 1e-6)
    assert int(clipped.sum()) > 0
    expected = 2.0 * lyapunov.eps * ((x[:, None] - lyapunov.equilibria) * dx[:, None]).sum(2)
    assert_close(found[clipped].detach(), expected[clipped].detach(), 1e-5)


def test_boundary_against_a_loop_over_rays() -> None:
    lyapunov = functions(k=3, partial=True)
    found, expected = (
        module.sample_boundary(lyapunov, 4, level=0.7, generator=torch.Generator().manual_seed(3))
        for module in (zubov, zubov.reference)
    )
    assert_close(found.detach(), expected.detach(), 1e-11)
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((weights * found).sum(), list(lyapunov.parameters())),
        torch.autograd.grad((weights * expected).sum(), list(lyapunov.parameters())),
        strict=True,
    ):
        assert_close(ours, theirs, 1e-9)


@BOTH
def test_gradient_of_the_boundary_is_that_of_the_points_found(partial: bool) -> None:
    lyapunov = functions(2, 2, width=3, depth=2, partial=partial)
    names, values = zip(*lyapunov.named_parameters(), strict=True)
    assert "equilibria" in names

    class Boundary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = lyapunov

        def forward(self) -> Tensor:
            return zubov.sample_boundary(self.inner, 3, generator=torch.Generator().manual_seed(0))

    module = Boundary()

    def points(*parameters: Tensor) -> Tensor:
        named = {f"inner.{name}": value for name, value in zip(names, parameters, strict=True)}
        return functional_call(module, named, ())

    assert gradcheck(points, [value.detach().clone().requires_grad_() for value in values], atol=1e-5)


def test_rays_are_uniform_and_the_generator_decides() -> None:
    lyapunov = exact_system()
    points = zubov.sample_boundary(lyapunov, 4000, level=4.0)
    assert_close(points.norm(dim=-1), torch.full((2, 4000), 2.0).double(), 1e-12)
    assert points.mean(1).abs().max() < 0.2
    same = [zubov.sample_boundary(lyapunov, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*same)


def test_level_that_is_never_reached_is_reported() -> None:
    lyapunov = functions(eps=1e-30)
    nn.init.zeros_(lyapunov.input_weight[1])
    with pytest.raises(ValueError, match=r"V stays below level=1.0 .* 5 of 20 rays \(classes 1\)"):
        zubov.sample_boundary(lyapunov, 5)
    nn.init.constant_(lyapunov.input_weight[1], torch.nan)
    with pytest.raises(ValueError, match=r"V is not finite along 5 of 20 rays \(classes 1\)"):
        zubov.sample_boundary(lyapunov, 5)


# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------


def batch(dim: int = 3, k: int = 4, steps: int = 2, size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(steps + 1, size, dim, dtype=torch.float64), torch.randint(k, (size,))


def losses(lyapunov: zubov.ConvexLyapunov, *args: Any, **options: Any) -> dict[str, Tensor]:
    return zubov.zubov_losses(lyapunov, *args, generator=torch.Generator().manual_seed(0), **options)


def test_the_exact_system_satisfies_the_equation() -> None:
    lyapunov = exact_system()
    x = 1.5 * torch.randn(200, 2, dtype=torch.float64)
    value, derivative = zubov.value_and_derivative(lyapunov, x, exact.field(x))
    assert zubov.zubov_residual(value, derivative, rate=2.0).abs().max() <= 1e-12 * (1 + value.max() ** 2)
    assert zubov.zubov_residual(value, derivative, rate=2.2).abs().max() > 1e-2
    trajectory = torch.randn(4, 6, 2, dtype=torch.float64)
    labels = torch.randint(2, (6,))
    found = losses(lyapunov, exact.field, trajectory, labels, rate=2.0, classification=0.0, separation=0.0)
    assert found["consistency"] <= 1e-20 * (1 + trajectory.square().sum(-1).max() ** 4)
    without = {"classification": 0.0, "separation": 0.0}  # the two functions are the same
    wrong = losses(lyapunov, lambda x: 1.1 * exact.field(x), trajectory, labels, rate=2.0, **without)
    assert wrong["consistency"] > 1e-3


def test_closed_form_of_the_decay() -> None:
    """``V(t) = 1 / (1 + (1 / V(0) - 1) exp(c t))`` for psi = c V, by Runge-Kutta on the exact system, c = 2."""
    assert exact.decay_error(exact_system()) <= 1e-8
    assert exact.decay_error(exact_system(), n_steps=10) > 1e-6  # a coarse one is seen


LOSSES = ("consistency", "classification", "separation", "spacing", "containment", "exclusion", "arrival")


@torch.no_grad()
def facing_value(lyapunov: zubov.ConvexLyapunov, i: int, j: int) -> Tensor:
    """``V_j`` where the boundary of region i meets the ray to ``x*_j``, by bisection."""
    start, direction = lyapunov.equilibria[i], lyapunov.equilibria[j] - lyapunov.equilibria[i]
    low, high = 0.0, 1e3
    for _ in range(100):
        middle = 0.5 * (low + high)
        inside = float(zubov.reference.class_value(lyapunov, i, (start + middle * direction)[None])) < 1.0
        low, high = (middle, high) if inside else (low, middle)
    return zubov.reference.class_value(lyapunov, j, (start + low * direction)[None])[0]


EQUATION = pytest.mark.parametrize(("reach", "floor"), [(0.0, None), (0.25, 0.3)], ids=["as it is", "as the recipes"])


@EQUATION
@BOTH
def test_losses_against_the_formulas(partial: bool, reach: float, floor: float | None) -> None:
    """Every term once more, with a loop over classes and samples and the reference's functions."""
    lyapunov = functions(partial=partial)
    steps, rays = 3, 5
    net = zubov.DenseFlow(3, steps, 0.2, width=4, dtype=torch.float64)
    start, labels = 2.0 * torch.randn(5, 3, dtype=torch.float64), torch.tensor([1, 1, 3, 1, 0])  # none of class 2
    trajectory = net(start, return_trajectory=True)
    options = {"rate": 1.7, "temperature": 0.3, "margin": 0.2, "n_rays": rays, "reach": reach, "floor": floor}
    found = losses(lyapunov, net.fields, trajectory, labels, **options)

    generator = torch.Generator().manual_seed(0)
    boundary = zubov.reference.sample_boundary(lyapunov, 6, generator=generator)  # 5 rounded up to steps
    share = torch.rand((4, 6, 1), dtype=torch.float64, generator=generator)
    centre = lyapunov.equilibria[:, None]
    inside = centre + (1.0 + reach) * share * (boundary - centre)

    def residual(k: int, x: Tensor, n: int) -> Tensor:
        field = net.vector_field(n * 0.2, x[None])
        value, derivative = zubov.reference.value_and_derivative(lyapunov, x[None], field)
        return (derivative[0, k] + 1.7 * value[0, k] * (1 - value[0, k])) / (
            1.0 if floor is None else value[0, k] + floor
        )

    def near_residual(k: int, x: Tensor, n: int) -> Tensor:
        """Relative to V, of f less what it is at the equilibrium."""
        both = net.vector_field(n * 0.2, torch.stack([x, lyapunov.equilibria[k]]))
        value, derivative = zubov.reference.value_and_derivative(lyapunov, x[None], both[:1] - both[1:])
        return derivative[0, k] / value[0, k] + 1.7 * (1 - value[0, k])

    visited = [residual(int(y), trajectory[n, i], n) for i, y in enumerate(labels) for n in range(steps)]
    kinds = [[residual(k, part[k, r], r % steps) for k in range(4) for r in range(6)] for part in (inside, boundary)]
    expected = sum(torch.stack(kind).square().mean() for kind in (visited, *kinds)) / 3
    at_rest = torch.stack([net.vector_field(n * 0.2, lyapunov.equilibria) for n in range(steps)])
    expected = expected + at_rest.square().sum(-1).mean()
    assert_close(found["consistency"].detach(), expected.detach(), 1e-9)
    logits = -zubov.reference.value(lyapunov, trajectory[-1]) / 0.3
    assert_close(found["classification"].detach(), F.cross_entropy(logits, labels).detach(), 1e-9)
    others = [
        (1.2 - zubov.reference.class_value(lyapunov, j, boundary[i])).relu()
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    assert_close(found["separation"].detach(), torch.stack(others).mean().detach(), 1e-9)
    assert found["spacing"] == 0.0
    spaced = losses(lyapunov, net.fields, trajectory, labels, spacing=2.0, **options)["spacing"]
    towards = torch.stack([facing_value(lyapunov, i, j) for i in range(4) for j in range(4) if i != j])
    assert_close(spaced.detach(), 2.0 * (1.2 - towards).relu().mean(), 1e-9)
    assert spaced > 0
    weighted = losses(lyapunov, net.fields, trajectory, labels, consistency=2.0, separation=0.5, **options)
    assert_close(weighted["consistency"], 2 * found["consistency"], 1e-14)
    assert_close(weighted["separation"], 0.5 * found["separation"], 1e-14)
    assert found["containment"] == 0.0
    contained = losses(lyapunov, net.fields, trajectory, labels, containment=2.0, **options)["containment"]
    first = zubov.reference.value(lyapunov, trajectory[0]).gather(1, labels[:, None])
    assert_close(contained.detach(), 2.0 * (first - 0.5).relu().mean().detach(), 1e-9)
    assert contained > 0
    excluded = losses(lyapunov, net.fields, trajectory, labels, exclusion=3.0, **options)["exclusion"]
    values = zubov.reference.value(lyapunov, trajectory[0])
    others = [(1.2 - values[i, j]).relu() for i, y in enumerate(labels) for j in range(4) if j != y]
    assert found["exclusion"] == 0.0
    assert_close(excluded.detach(), 3.0 * torch.stack(others).sum().detach() / 5, 1e-9)
    assert excluded > 0
    assert found["arrival"] == 0.0
    nothing = dict.fromkeys(LOSSES, 0.0)
    arriving = losses(lyapunov, net.fields, trajectory, labels, **options, **{**nothing, "arrival": 2.0})["arrival"]
    near = centre + (0.01 + 0.09 * share) * (boundary - centre)
    expected = torch.stack([near_residual(k, near[k, r], r % steps) for k in range(4) for r in range(6)])
    assert_close(arriving.detach(), 2.0 * expected.square().mean().detach(), 1e-7)


@EQUATION
@BOTH
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_of_each_loss(name: str, partial: bool, reach: float, floor: float | None) -> None:
    """In all parameters, the states and what the vector field closes over; boundary points move with them."""
    lyapunov = functions(2, 3, width=3, depth=2, partial=partial)
    names, values = zip(*lyapunov.named_parameters(), strict=True)
    weights = {key: float(key == name) for key in LOSSES}
    labels = torch.tensor([0, 2, 2])

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = lyapunov

        def forward(self, trajectory: Tensor, matrix: Tensor) -> Tensor:
            def field(x: Tensor) -> Tensor:
                return torch.tanh(x @ matrix)

            options = {"n_rays": 2, "margin": 3.0, "reach": reach, "floor": floor, **weights}
            return losses(self.inner, field, trajectory, labels, **options)[name]

    module = Loss()

    def loss(trajectory: Tensor, matrix: Tensor, *parameters: Tensor) -> Tensor:
        named = {f"inner.{key}": value for key, value in zip(names, parameters, strict=True)}
        return functional_call(module, named, (trajectory, matrix))

    inputs = [torch.randn(3, 3, 2).double(), torch.randn(2, 2).double(), *[value.detach().clone() for value in values]]
    assert gradcheck(loss, [t.requires_grad_() for t in inputs], atol=1e-5)


def test_what_has_weight_zero_is_not_computed() -> None:
    lyapunov = functions(eps=1e-30)
    nn.init.zeros_(lyapunov.input_weight)  # a boundary would be an error
    trajectory, labels = batch()

    def field(x: Tensor) -> Tensor:
        raise AssertionError("computed")

    nothing = dict.fromkeys(LOSSES, 0.0)
    assert losses(lyapunov, field, trajectory, labels, **nothing) == nothing
    for name in ("containment", "exclusion"):
        found = losses(lyapunov, field, trajectory, labels, **{**nothing, name: 1.0})
        assert {key: float(value) for key, value in found.items() if key != name} == {
            key: 0.0 for key in LOSSES if key != name
        }
    for name in ("separation", "spacing", "arrival"):
        with pytest.raises(ValueError, match="V stays below level"):
            losses(lyapunov, field, trajectory, labels, **{**nothing, name: 1.0})


def test_separation_sees_a_nested_region_from_one_side_only() -> None:
    """Both orders count: points of the inner boundary lie within the outer region, but not the other way round."""
    nested = functions(2, 2, equilibria=torch.zeros(2, 2), width=16)
    with torch.no_grad():
        nested.input_weight[1].copy_(4.0 * nested.input_weight[0])
        for parameter in (nested.anchor, nested.query, nested.key, nested.readout_query):
            parameter[1].copy_(parameter[0])
    for order in ([0, 1], [1, 0]):
        state = {key: value[order] for key, value in nested.state_dict().items()}
        swapped = functions(2, 2, equilibria=torch.zeros(2, 2), width=16)
        swapped.load_state_dict(state)
        boundary = zubov.sample_boundary(swapped, 50)
        inner = order.index(1)
        assert (swapped(boundary[inner])[:, 1 - inner] < 1).all()
        assert (swapped(boundary[1 - inner])[:, inner] > 1).all()
        trajectory, labels = batch(2, 2)
        options = {"consistency": 0.0, "classification": 0.0, "spacing": 1.0, "margin": 0.0, "n_rays": 50}
        found = losses(swapped, torch.tanh, trajectory, labels, **options)
        boundary = zubov.sample_boundary(swapped, 50, generator=torch.Generator().manual_seed(0))
        seen = (1.0 - swapped(boundary[inner])[:, 1 - inner]).mean()
        assert seen > 0.1
        assert_close(found["separation"].detach(), 0.5 * seen.detach(), 1e-12)  # the other half of the mean is zero
        # Equilibria in one place are no direction: any will do to look in.
        with torch.no_grad():
            coefficients = swapped.coefficients()
            facing = facing_offsets(swapped, coefficients, torch.tensor([[1], [0]]), 1.0)
            seen = (1.0 - swapped.values(coefficients, facing.flip(0))).relu()
        assert_close(found["spacing"].detach(), seen.mean(), 1e-12)


def test_spacing_looks_towards_so_many_others_as_there_are_rays() -> None:
    lyapunov = functions(eps=0.2)
    pairs = {(i, j): float((2.0 - facing_value(lyapunov, i, j)).relu()) for i in range(4) for j in range(4) if i != j}
    found = []
    for seed in range(12):
        trajectory, labels = batch()
        options = {**dict.fromkeys(LOSSES, 0.0), "spacing": 1.0, "margin": 1.0, "n_rays": 1}
        generator = torch.Generator().manual_seed(seed)
        loss = zubov.zubov_losses(lyapunov, torch.tanh, trajectory, labels, **options, generator=generator)
        found.append(float(loss["spacing"].detach()))
    expected = [sum(pairs[i, (i + shift) % 4] for i in range(4)) / 4 for shift in (1, 2, 3)]
    assert {min(range(3), key=lambda n: abs(one - expected[n])) for one in found} == {0, 1, 2}
    assert all(min(abs(one - other) for other in expected) < 1e-9 for one in found)


def test_a_second_derivative_through_the_boundary_is_an_error() -> None:
    lyapunov = functions()
    points = zubov.sample_boundary(lyapunov, 3)
    (first,) = torch.autograd.grad(points.square().sum(), lyapunov.log_scale, create_graph=True)
    with pytest.raises(RuntimeError, match="are differentiable once, not twice"):
        torch.autograd.grad(first.sum(), lyapunov.log_scale)


def test_every_parameter_of_one_layer_gets_a_gradient() -> None:
    """DDP waits for all of them."""
    lyapunov = functions(depth=1)
    lyapunov(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None and parameter.numel() for parameter in lyapunov.parameters())
    assert "query" not in lyapunov.state_dict()


def test_a_boundary_just_short_of_the_largest_radius_is_found() -> None:
    """The level is met, if only to rounding, where a ray would be given up."""
    far = functions(2, 1, equilibria=torch.zeros(1, 2), eps=2.0**-39.99)
    with torch.no_grad():
        far.log_scale.fill_(-60.0)  # V is eps |x|^2
    radius = torch.linalg.vector_norm(zubov.sample_boundary(far, 5), dim=-1)
    assert_close(radius, torch.full_like(radius, 2.0**19.995), 1e-9)


def test_regions_that_meet() -> None:
    """Balls of radius 2 around their equilibria meet where these are less than 4 apart; one can hold the other's."""
    lyapunov = functions(2, 4, equilibria=torch.tensor([[0.0, 0.0], [3.9, 0.0], [0.0, 4.1], [0.0, 0.0]]), eps=0.25)
    with torch.no_grad():
        lyapunov.log_scale.fill_(-40.0)  # V is eps |x - x*|^2
    meeting = zubov.regions_that_meet(lyapunov)
    assert meeting.tolist() == [
        [False, True, False, True],
        [True, False, False, True],
        *[[False] * 4],
        [True] * 2 + [False] * 2,
    ]
    with torch.no_grad():
        lyapunov.log_scale[0] = 12.0  # no longer a ball, and very small
    assert zubov.regions_that_meet(lyapunov)[0].tolist() == [False, False, False, True]


def test_regions_that_meet_share_a_point_of_the_segment() -> None:
    lyapunov = functions(3, 5, width=8, eps=0.05)
    meeting = zubov.regions_that_meet(lyapunov)
    share = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)[:, None]
    for i in range(5):
        for j in range(i):
            points = torch.lerp(lyapunov.equilibria[i], lyapunov.equilibria[j], share)
            inside = lyapunov(points)[:, [i, j]] < 1.0
            assert bool(inside.all(1).any()) == bool(meeting[i, j]) == bool(meeting[j, i])
    assert meeting.any()
    assert not meeting.all()


def test_functions_that_are_all_the_same_have_collapsed() -> None:
    """Their cross-entropy is log K for good, whatever the states do."""
    one = functions(k=1, equilibria=torch.zeros(1, 3))
    same = functions(equilibria=torch.zeros(4, 3))
    state = {key: value.expand_as(same.state_dict()[key]) for key, value in one.state_dict().items()}
    same.load_state_dict(state)
    trajectory, labels = batch(size=8)
    with pytest.raises(
        zubov.Degenerate, match="or for all classes: backbone, flow or Lyapunov functions have collapsed"
    ):
        losses(same, torch.tanh, trajectory, labels)


def test_a_small_batch_of_one_image_and_a_high_temperature_are_no_collapse() -> None:
    lyapunov = functions()
    trajectory, labels = batch(size=2)
    losses(lyapunov, torch.tanh, trajectory[:, :1].expand(-1, 2, -1), torch.tensor([0, 1]))
    trajectory, labels = batch(size=8)
    losses(lyapunov, torch.tanh, trajectory, labels, temperature=1e6)
    with pytest.raises(zubov.Degenerate, match="V is the same for all states"):
        losses(lyapunov, torch.tanh, trajectory[:, :1].expand(-1, 8, -1), labels)


def test_no_loop_over_classes_or_rays() -> None:
    """As many operations for five times the classes, and for eight times the rays, forward and backward."""

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += 1
            return function(*args, **(kwargs or {}))

    def operations(k: int, n_rays: int) -> int:
        lyapunov = functions(8, k, width=16)
        trajectory, labels = batch(8, k, size=32)
        weights = dict.fromkeys(LOSSES, 1.0)
        with Count() as counted:
            found = losses(lyapunov, torch.tanh, trajectory, labels, n_rays=n_rays, **weights)
            torch.stack(list(found.values())).sum().backward()
        return counted.number

    least = operations(2, 8)
    assert operations(10, 8) < 1.2 * least  # Newton's iterations may be a few more
    assert operations(2, 64) < 1.2 * least


def test_boundary_points_under_torch_func() -> None:
    lyapunov = functions()
    names, values = zip(*lyapunov.named_parameters(), strict=True)

    class Farthest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = lyapunov

        def forward(self) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return zubov.sample_boundary(self.inner, 3, generator=generator).square().sum()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(Farthest(), {f"inner.{name}": value for name, value in parameters.items()}, ())

    found = torch.func.grad(loss)({name: value.detach() for name, value in zip(names, values, strict=True)})
    expected = torch.autograd.grad(Farthest()(), values)
    for name, gradient in zip(names, expected, strict=True):
        assert_close(found[name], gradient, 1e-12)


def test_missing_classes_and_empty_batches_are_finite() -> None:
    lyapunov = functions()
    for size in (5, 1, 0):
        trajectory, _ = batch(size=size)
        labels = torch.full((size,), 2)
        found = losses(lyapunov, torch.tanh, trajectory, labels, containment=1.0, exclusion=1.0)
        total = sum(found.values())
        gradients = torch.autograd.grad(total, list(lyapunov.parameters()), allow_unused=True)
        assert torch.isfinite(total)
        assert all(g is None or g.isfinite().all() for g in gradients)


def test_bad_input_of_the_losses() -> None:
    lyapunov = functions()
    trajectory, labels = batch()

    def call(**changed: Any) -> dict[str, Tensor]:
        arguments = {"lyapunov": lyapunov, "vector_field": torch.tanh, "trajectory": trajectory, "labels": labels}
        return zubov.zubov_losses(**{**arguments, **changed})

    assert all(loss.isfinite() for loss in call().values())
    poisoned = trajectory.clone()
    poisoned[1, 2, 0] = torch.nan
    for error, match, changed in (
        (ValueError, "trajectory is not finite", {"trajectory": poisoned}),
        (ValueError, r"not finite, expected a finite right-hand side", {"vector_field": lambda x: x / 0.0}),
        (ValueError, "vector_field returned shape", {"vector_field": lambda x: x[:1]}),
        (TypeError, "vector_field returned a int", {"vector_field": lambda x: 3}),
        (ValueError, r"labels lies in \[0, 4\], expected 0 to 3", {"labels": torch.tensor([0, 1, 2, 3, 4])}),
        (ValueError, r"labels has shape \(3,\)", {"labels": labels[:3]}),
        (TypeError, "expected an int64 tensor", {"labels": labels.int()}),
        (
            ValueError,
            r"trajectory has shape \(3, 5, 2\), expected \(N \+ 1, B, dim\)",
            {"trajectory": trajectory[..., 1:]},
        ),
        (ValueError, "with one step or more", {"trajectory": trajectory[:1]}),
        (TypeError, "trajectory has dtype torch.float32", {"trajectory": trajectory.float()}),
        (ValueError, "lyapunov has one class", {"lyapunov": functions(k=1), "labels": torch.zeros(5).long()}),
        (TypeError, "lyapunov is a Linear", {"lyapunov": nn.Linear(2, 2)}),
        (ValueError, "separation=-1.0 is negative", {"separation": -1.0}),
        (ValueError, "rate=0.0 is too small, expected a float > 0", {"rate": 0.0}),
        (ValueError, "margin=-0.1 is too small, expected a float >= 0", {"margin": -0.1}),
        (ValueError, "n_rays=0 is too small", {"n_rays": 0}),
        (
            ValueError,
            "V is the same for all states of the batch, whose labels differ, or for all classes",
            {"trajectory": trajectory[:, :1].expand(-1, 8, -1), "labels": torch.arange(8) % 4},
        ),
        (TypeError, "vector_field is a NoneType, expected a function", {"vector_field": None}),
        (ValueError, "V is not finite at a state", {"trajectory": 1e200 * trajectory, "consistency": 0.0}),
        (
            ValueError,
            "V is not finite at a state",
            {
                "trajectory": 1e200 * trajectory,
                **dict.fromkeys(("consistency", "classification", "separation"), 0.0),
                "containment": 1.0,
            },
        ),
    ):
        with pytest.raises(error, match=match):
            call(**changed)
    one = functions(k=1)
    alone = zubov.zubov_losses(one, torch.tanh, trajectory, torch.zeros(5).long(), classification=0.0, separation=0.0)
    assert alone["consistency"] > 0


def test_consistency_is_learned() -> None:
    """A field is trained until the regions of given functions are those of attraction: the loss falls."""
    torch.manual_seed(0)
    lyapunov = functions(2, 2, equilibria=torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), dtype=torch.float32)
    flow = zubov.DenseFlow(2, 1, 0.1, width=32, shared_weights=True)
    optimizer = torch.optim.Adam(flow.parameters(), 0.02)
    trajectory, labels = torch.zeros(2, 0, 2), torch.zeros(0).long()
    history = []
    for _ in range(150):
        loss = zubov.zubov_losses(
            lyapunov, flow.fields, trajectory, labels, classification=0.0, separation=0.0, rate=1.0, n_rays=32
        )["consistency"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.05 * sum(history[:5])


# ---------------------------------------------------------------------------------------------------------------------
# The network and its certificate
# ---------------------------------------------------------------------------------------------------------------------


def dense_net(seed: int = 0, *, shared: bool = False, gain: float = 1.0, normalized: bool = True) -> zubov.ZubovNet:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    dynamics = zubov.DenseFlow(3, 3, 0.2, width=5, shared_weights=shared)
    lyapunov = functions(3, 4, normalized=normalized, dtype=torch.float32)
    net = zubov.ZubovNet(backbone, dynamics, lyapunov, temperature=0.5)
    scaled(net, gain)
    return net


def conv_net(seed: int = 0, *, shared: bool = False, gain: float = 1.0, normalized: bool = True) -> zubov.ZubovNet:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), rnf.nn.SmoothLeakyReLU())
    dynamics = rnf.nn.EulerConvFlow(2, 3, 0.1, shared_weights=shared)
    net = zubov.ZubovNet(backbone, dynamics, functions(2 * 16, 3, normalized=normalized, dtype=torch.float32))
    scaled(net, gain)
    return net


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_network(kind: str, shared: bool) -> None:
    net = dense_net(shared=shared) if kind == "dense" else conv_net(shared=shared)
    x = torch.randn(6, 5) if kind == "dense" else torch.rand(6, 1, 4, 4)
    states = net.trajectory(x)
    assert states.shape == (4, 6, net.lyapunov.dim)
    assert_close(states[0].detach(), net.features(x).flatten(1).detach(), 0.0)
    assert_close(net(x).detach(), (-net.lyapunov(states[-1]) / net.temperature).detach(), 1e-6)
    step = states[:-1] + net.dynamics.step_size * net.vector_field(states[:-1])
    assert_close(step.detach(), states[1:].detach(), 1e-5)
    for n in range(3):
        state = states[n] if kind == "dense" else states[n].view(6, 2, 4, 4)
        field = net.dynamics.vector_field(n * net.dynamics.step_size, state).flatten(1)
        assert_close(net.vector_field(states[:-1])[n].detach(), field.detach(), 1e-5)
    labels = torch.arange(6) % net.lyapunov.num_classes
    found = zubov.zubov_losses(net.lyapunov, net.vector_field, states, labels, temperature=net.temperature)
    assert_close(found["classification"].detach(), F.cross_entropy(net(x), labels).detach(), 1e-5)
    sum(found.values()).backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    clone = copy.deepcopy(net)
    clone.load_state_dict(net.state_dict())
    assert torch.equal(clone(x), net(x))


def test_states_of_another_shape_are_refused() -> None:
    """Laid out as squares they would be those of another system."""
    for states in (torch.randn(2, 4), torch.randn(3)):
        with pytest.raises(ValueError, match=r"input has shape .*, expected \(B, 3\)"):
            zubov.DenseFlow(3, 2, 0.1)(states)
    net = conv_net(shared=False)
    backbone = nn.Conv2d(1, 2, 3, padding=1)
    wide = zubov.ZubovNet(backbone, net.dynamics, net.lyapunov)
    assert wide.trajectory(torch.rand(2, 1, 4, 4)).shape == (4, 2, 32)
    with pytest.raises(ValueError, match=r"backbone gives \(2, 2, 2, 8\), expected square states"):
        wide.trajectory(torch.rand(2, 1, 2, 8))
    with pytest.raises(ValueError, match=r"states has shape \(2, 5, 32\), expected \(3, M, 32\): a row for each step"):
        net.vector_field(torch.rand(2, 5, 32))
    states = torch.rand(5, 32)
    assert torch.equal(net.field_at(0.0, states), net.vector_field(states.expand(3, 5, 32))[0])
    assert torch.equal(net.field_at(99.0, states), net.vector_field(states.expand(3, 5, 32))[2])


def worst_margin(net: zubov.ZubovNet, x: Tensor, y: Tensor, radius: Tensor, p: str) -> Tensor:
    """Smallest ``V_j - V_y`` that projected gradients on it find, in float64."""
    net, x = copy.deepcopy(net).double(), x.double()
    shape = (-1, *[1] * (x.dim() - 1))
    worst = torch.full((len(x),), torch.inf, dtype=torch.float64)

    def margin(z: Tensor) -> Tensor:
        value = net.lyapunov(net.dynamics(net.features(z)).flatten(1))
        others = value.scatter(1, y[:, None], torch.inf)
        return others.amin(1) - value.gather(1, y[:, None]).squeeze(1)

    def projected(delta: Tensor) -> Tensor:
        if p == "inf":
            return delta.clamp(-radius.view(shape), radius.view(shape))
        norm = delta.flatten(1).norm(float(p), dim=1).clamp_min(1e-300)
        return delta * (radius / norm).clamp_max(1.0).view(shape)

    for restart in range(4):
        start = torch.randn_like(x)
        delta = projected((start.sign() if restart % 2 else start) * radius.view(shape))
        for _ in range(20):
            delta.requires_grad_()
            found = margin(x + delta)
            worst = torch.minimum(worst, found.detach())
            (gradient,) = torch.autograd.grad(found.sum(), delta)
            step = (
                gradient.sign()
                if p == "inf"
                else gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-300).view(shape)
            )
            delta = projected(delta.detach() - 0.3 * radius.view(shape) * step)
        worst = torch.minimum(worst, margin(x + delta).detach())
    return worst


@given(
    seed=st.integers(0, 10**6),
    gain=st.floats(0.5, 2.5),
    p=st.sampled_from(("inf", "2", "1")),
    shared=st.booleans(),
    normalized=st.booleans(),
    make=st.sampled_from((dense_net, conv_net)),
)
@settings(max_examples=20)
def test_no_attack_on_the_margin_breaks_the_certificate(
    seed: int, gain: float, p: str, shared: bool, normalized: bool, make: Callable[..., zubov.ZubovNet]
) -> None:
    net = make(seed, shared=shared, gain=gain, normalized=normalized).eval()
    x = torch.randn(8, 5) if make is dense_net else torch.rand(8, 1, 4, 4)
    y = net(x).argmax(1)
    radius = zubov.margin_radius(net, x, y, p=p)
    assert radius.dtype == torch.float64
    assert (radius > 0).all()
    assert (worst_margin(net, x, y, radius, p) > 0).all()
    wrong = zubov.margin_radius(net, x, (y + 1) % net.lyapunov.num_classes, p=p)
    assert (wrong == 0).all()


def test_certificate_is_tight_where_everything_is_linear() -> None:
    """V_j - V_y of two quadratics is linear and the network the identity: the radius is the distance to the plane."""
    lyapunov = zubov.ConvexLyapunov(2, 2, eps=1.0, equilibria=torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    nn.init.zeros_(lyapunov.input_weight)
    flow = zubov.DenseFlow(2, 1, 0.1)
    nn.init.zeros_(flow.weight2)
    nn.init.zeros_(flow.bias2)
    net = zubov.ZubovNet(nn.Identity(), flow, lyapunov).eval()
    x = torch.tensor([[-0.7, 3.0], [-0.01, -5.0]])
    for p in ("inf", "2", "1"):
        radius = zubov.margin_radius(net, x, torch.zeros(2).long(), p=p)
        assert_close(radius, torch.tensor([0.7, 0.01]).double(), 1e-6)
        assert (radius < torch.tensor([0.7, 0.01]).double()).all()


def test_certificate_behind_a_rotation_is_nearly_what_attacks_need() -> None:
    """A quarter more breaks most: a certificate that claims too much by that would be seen to."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    for layer in backbone:
        nn.init.orthogonal_(layer.weight)
    flow = zubov.DenseFlow(3, 1, 0.1, dtype=torch.float64)
    nn.init.zeros_(flow.weight2)
    net = zubov.ZubovNet(backbone, flow, functions(3, 3)).eval()
    x = 0.2 * torch.randn(64, 3, dtype=torch.float64)
    y = net(x).argmax(1)
    radius = zubov.margin_radius(net, x, y, p="2")
    assert (worst_margin(net, x, y, radius, "2") > 0).all()
    broken = (worst_margin(net, x, y, 1.25 * radius, "2") < 0).double().mean()
    assert broken > 0.5


@BOTH
@pytest.mark.parametrize("p", ["inf", "1", "2"])
def test_no_gradient_leaves_the_box(partial: bool, p: str) -> None:
    lyapunov = scaled(functions(partial=partial), 2.0)
    state, rho = torch.randn(6, 3, dtype=torch.float64), torch.logspace(-2, 1, 6, dtype=torch.float64)
    dual = {"inf": 1.0, "1": torch.inf, "2": 2.0}[p]
    with torch.no_grad():
        box = zubov.certificate._gradient_box(lyapunov, lyapunov.coefficients(), lyapunov.offsets(state), rho, dual)
        exact = zubov.certificate._gradient_box(lyapunov, lyapunov.coefficients(), lyapunov.offsets(state), 0 * rho, 1)

    def gradients(x: Tensor) -> Tensor:
        """Of ``V_k - eps |x - x*|^2``: ``(K, B, dim)``."""
        x = x.expand(4, -1, -1).clone().requires_grad_()
        quadratic = lyapunov.eps * (x - lyapunov.equilibria[:, None]).square().sum(-1)
        return torch.autograd.grad((lyapunov.per_class(x) - quadratic).sum(), x)[0]

    for end in exact:  # but for 1e-9 of what is added up
        assert_close(end, gradients(state), 2e-8)
    assert bool((exact[0] < exact[1]).all())
    for i in range(100):
        step = torch.randn_like(state)
        step = step.sign() if p == "inf" and i % 2 else step / step.norm(float(p), dim=1, keepdim=True)
        found = gradients(state + rho[:, None] * step)
        assert (box[0] - 1e-10 <= found).all()
        assert (found <= box[1] + 1e-10).all()


@pytest.mark.parametrize("p", ["inf", "2"])
def test_no_attack_on_the_margin_of_sharp_functions(p: str) -> None:
    """Kinks within the radius: bounds of the gradient at the state alone would claim too much here."""
    claimed_too_much = False
    for seed in range(20):
        torch.manual_seed(seed)
        lyapunov = functions(2, 3, width=3, depth=2, eps=1e-3)
        with torch.no_grad():
            lyapunov.input_weight.mul_(20.0)
            lyapunov.anchor.sub_(8.0)
        flow = zubov.DenseFlow(2, 1, 0.1, dtype=torch.float64)
        nn.init.zeros_(flow.weight2)
        nn.init.zeros_(flow.bias2)
        net = zubov.ZubovNet(nn.Identity(), flow, lyapunov).eval()
        x = torch.randn(16, 2, dtype=torch.float64)
        y = net(x).argmax(1)
        radius = zubov.margin_radius(net, x, y, p=p)
        assert (worst_margin(net, x, y, radius, p) > 0).all()
        with torch.no_grad():
            slope = zubov.certificate._pair_slopes(
                lyapunov, lyapunov.coefficients(), lyapunov.offsets(x), torch.zeros(16).double(), y, p
            )
            value = lyapunov(x)
            margin = (value - value.gather(1, y[:, None])).scatter(1, y[:, None], torch.inf)
            at_the_state = (margin / slope.scatter(1, y[:, None], 1.0)).amin(1)
        claimed_too_much |= bool((worst_margin(net, x, y, at_the_state, p) < 0).any())
    assert claimed_too_much


def test_certificate_exceeds_the_specified_margin() -> None:
    """``min_j (V_j - V_y) / (2 L L_phi)`` with L from the same box on the same ball is never larger."""
    net = dense_net(3).eval()
    x = torch.randn(8, 5)
    y = net(x).argmax(1)
    wide = copy.deepcopy(net).double()
    constant = zubov.certificate.lipschitz_constant(wide, "inf")
    radius = zubov.margin_radius(net, x, y)
    with torch.no_grad():
        state = wide.dynamics(wide.features(x.double()))
        coefficients, offset = wide.lyapunov.coefficients(), wide.lyapunov.offsets(state)
        rho = radius * constant
        low, high = zubov.certificate._gradient_box(wide.lyapunov, coefficients, offset, rho, 1.0)
        quadratic = 2 * wide.lyapunov.eps * (offset.abs() + rho[:, None])
        slope = (torch.maximum(low.abs(), high.abs()) + quadratic).sum(-1).amax(0)
        value = wide.lyapunov(state)
    margin = value.scatter(1, y[:, None], torch.inf).amin(1) - value.gather(1, y[:, None]).squeeze(1)
    assert (radius >= margin / (2 * slope * constant) * (1 - 1e-6)).all()


@pytest.mark.parametrize("p", ["inf", "1", "2"])
def test_bounds_of_the_dense_flow(p: str) -> None:
    flow = zubov.DenseFlow(3, 2, 0.7, width=4, dtype=torch.float64)
    with torch.no_grad():
        flow.weight1.mul_(4.0)
    bounds = zubov.certificate._dense_bounds(flow)
    assert len(bounds) == 2
    for n, bound in enumerate(bounds):
        for x in torch.randn(200, 3, dtype=torch.float64):
            jacobian = torch.func.jacrev(lambda s, n=n: s + 0.7 * flow._step(n, s[None])[0])(x)
            assert torch.linalg.matrix_norm(jacobian, float(p)) <= bound.of(p) * (1 + 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    lyapunov = functions(dtype=torch.float32)
    x = torch.randn(5, 3)
    flow = zubov.DenseFlow(3, 2, 0.1)
    for error, match, call in (
        (ValueError, "dim=0 is too small", lambda: zubov.ConvexLyapunov(0, 2)),
        (TypeError, "num_classes=2.0 is a float", lambda: zubov.ConvexLyapunov(3, 2.0)),  # type: ignore[arg-type]
        (ValueError, "eps=0.0 is not positive", lambda: zubov.ConvexLyapunov(3, 2, eps=0.0)),
        (ValueError, r"equilibria has shape \(3, 2\)", lambda: zubov.ConvexLyapunov(3, 2, equilibria=torch.ones(3, 2))),
        (ValueError, r"x has shape \(5, 2\), expected \(B, dim\)", lambda: lyapunov(x[:, :2])),
        (ValueError, r"x has shape \(3,\), expected \(B, dim\)", lambda: lyapunov(x[0])),
        (TypeError, "x has dtype torch.float64, expected torch.float32", lambda: lyapunov(x.double())),
        (ValueError, "x is on meta", lambda: lyapunov(x.to("meta"))),
        (TypeError, "x has dtype torch.int64", lambda: lyapunov(x.long())),
        (TypeError, "have dtype torch.float16", lambda: copy.deepcopy(lyapunov).half()(x.half())),
        (ValueError, r"points has shape \(3, 5, 3\)", lambda: lyapunov.per_class(x.expand(3, 5, 3))),
        (ValueError, r"dx has shape \(4, 3\)", lambda: zubov.value_and_derivative(lyapunov, x, x[:4])),
        (TypeError, "lyapunov is a DenseFlow", lambda: zubov.value_and_derivative(flow, x, x)),  # type: ignore[arg-type]
        (ValueError, "n_rays=0 is too small", lambda: zubov.sample_boundary(lyapunov, 0)),
        (ValueError, "level=-1.0 is not positive", lambda: zubov.sample_boundary(lyapunov, 2, level=-1.0)),
        (ValueError, "level=inf is not finite", lambda: zubov.sample_boundary(lyapunov, 2, level=math.inf)),
        (TypeError, "lyapunov is a DenseFlow", lambda: zubov.sample_boundary(flow, 2)),  # type: ignore[arg-type]
        (ValueError, "1 class, expected two", lambda: zubov.ZubovNet(nn.Identity(), flow, functions(k=1))),
        (ValueError, "dim=2, expected 3", lambda: zubov.ZubovNet(nn.Identity(), flow, functions(2))),
        (TypeError, "dynamics is a Linear", lambda: zubov.ZubovNet(nn.Identity(), nn.Linear(3, 3), lyapunov)),  # type: ignore[arg-type]
        (ValueError, "square states", lambda: zubov.ZubovNet(nn.Identity(), rnf.nn.EulerConvFlow(1, 2, 0.1), lyapunov)),
        (ValueError, "temperature=0", lambda: zubov.ZubovNet(nn.Identity(), flow, lyapunov, temperature=0.0)),
        (ValueError, "n_steps=0 is too small", lambda: zubov.DenseFlow(3, 0, 0.1)),
    ):
        with pytest.raises(error, match=match):
            call()


class Forgetful(nn.Module):
    """A backbone whose layers are not what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)

    def layers(self) -> list[nn.Module]:
        return [self.body]

    def forward(self, input: Tensor) -> Tensor:
        return self.body(100.0 * input)


class Faster(zubov.DenseFlow):
    def forward(self, input: Tensor, return_trajectory: bool = False) -> Tensor:
        return super().forward(100.0 * input, return_trajectory)


class FasterConv(rnf.nn.EulerConvFlow):
    def forward(self, input: Tensor, return_trajectory: bool = False) -> Tensor:
        return super().forward(100.0 * input, return_trajectory)


class OtherNet(zubov.ZubovNet):
    def features(self, input: Tensor) -> Tensor:
        return 100.0 * super().features(input)


def test_bad_input_of_the_certificate() -> None:
    net, x, y = dense_net().eval(), torch.randn(4, 5), torch.zeros(4).long()
    poisoned = copy.deepcopy(net)
    nn.init.constant_(poisoned.lyapunov.anchor, torch.nan)
    unknown = zubov.ZubovNet(nn.Sequential(nn.Linear(5, 3), nn.Tanh()), net.dynamics, net.lyapunov).eval()
    forgetful = zubov.ZubovNet(Forgetful(), net.dynamics, net.lyapunov).eval()
    faster = zubov.ZubovNet(net.backbone, Faster(3, 2, 0.1), net.lyapunov).eval()
    other = OtherNet(net.backbone, net.dynamics, net.lyapunov).eval()
    images, flow = torch.rand(4, 1, 2, 2), FasterConv(1, 2, 0.1)
    convolutional = zubov.ZubovNet(nn.Identity(), flow, zubov.ConvexLyapunov(4, 3, width=3)).eval()
    for error, match, call in (
        (ValueError, "in training mode", lambda: zubov.margin_radius(copy.deepcopy(net).train(), x, y)),
        (ValueError, "lyapunov.anchor is not finite", lambda: zubov.margin_radius(poisoned, x, y)),
        (ValueError, "x is not finite", lambda: zubov.margin_radius(net, x / 0.0, y)),
        (ValueError, r"y lies in \[4, 4\]", lambda: zubov.margin_radius(net, x, y + 4)),
        (ValueError, r"y has shape \(3,\)", lambda: zubov.margin_radius(net, x, y[:3])),
        (ValueError, "p='3' is unknown", lambda: zubov.margin_radius(net, x, y, p="3")),
        (TypeError, "no bound is known for the layer Tanh", lambda: zubov.margin_radius(unknown, x, y)),
        (TypeError, "net is a Linear", lambda: zubov.margin_radius(nn.Linear(2, 2), x, y)),  # type: ignore[arg-type]
        (ValueError, "does not compute what", lambda: zubov.margin_radius(forgetful, x, y)),
        (TypeError, "net.dynamics is a Faster", lambda: zubov.margin_radius(faster, x, y)),
        (TypeError, "net.dynamics is a FasterConv", lambda: zubov.margin_radius(convolutional, images, y)),
        (TypeError, "net is a OtherNet, expected a ZubovNet", lambda: zubov.margin_radius(other, x, y)),
        (ValueError, "eps=-1.0 is negative", lambda: zubov.margin_certified(net, x, y, -1.0)),
    ):
        with pytest.raises(error, match=match):
            call()
    assert zubov.margin_radius(net, x[:0], y[:0]).shape == (0,)


def test_certificate_refuses_hooks_everywhere_and_methods_that_were_replaced() -> None:
    """Each of these changes labels within the radius that the functions and layers by themselves would have."""
    x, y = torch.randn(4, 5), torch.zeros(4).long()
    for name in ("", "backbone", "dynamics", "lyapunov"):
        for change in (
            lambda module: module.register_forward_pre_hook(lambda _, inputs: (30.0 * inputs[0],)),
            lambda module: module.register_forward_hook(lambda _, inputs, output: torch.sin(40.0 * output)),
            lambda module: vars(module).update(forward=torch.sin),
        ):
            net = dense_net().eval()
            change(net.get_submodule(name))
            with pytest.raises(TypeError, match=f"no bound is known for model.*{name}.*a hook or a forward of its own"):
                zubov.margin_radius(net, x, y)
    net = dense_net().eval()
    net.features = lambda input: torch.sin(30.0 * input[:, :3])  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="net does not compute"):
        zubov.margin_radius(net, x, y)


def test_no_certificate_of_lyapunov_functions_rests_on_numbers_that_cancel() -> None:
    """Softplus is linear so far from 0: exactly, the network's part of V is almost 0; in float64 it is rounding."""
    torch.manual_seed(5)
    lyapunov = zubov.ConvexLyapunov(3, 3, width=8, depth=2, eps=0.01)
    with torch.no_grad():
        lyapunov.anchor.fill_(60.0)
        lyapunov.log_scale.fill_(25.0)
        flow = zubov.DenseFlow(3, 1, 0.1)
        for parameter in flow.parameters():
            parameter.zero_()
    net = zubov.ZubovNet(nn.Flatten(), flow, lyapunov).double().eval()
    x = torch.randn(300, 3, dtype=torch.float64)
    squares = (x[:, None] - net.lyapunov.equilibria).square().sum(2)  # of which V is 0.01 times
    y = squares.argmin(1)
    distance = net.lyapunov.equilibria[y][:, None] - net.lyapunov.equilibria
    margin = squares - squares.gather(1, y[:, None])
    exact = (margin / (2.0 * distance.abs().sum(2))).scatter(1, y[:, None], torch.inf).amin(1)
    assert bool((zubov.margin_radius(net, x, y) <= exact).all())


@DTYPES
def test_what_is_not_finite_propagates(dtype: torch.dtype) -> None:
    lyapunov = functions(dtype=dtype)
    x = torch.randn(4, 3, dtype=dtype)
    x[1, 0], x[2, 1] = torch.nan, torch.inf
    value = lyapunov(x)
    assert value[[0, 3]].isfinite().all()
    assert not value[[1, 2]].isfinite().any()
    assert lyapunov(x[:0]).shape == (0, 4)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_and_refuses_wrong_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("bench_zubov", ROOT / "bench" / "zubov.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    for name, value in (("BATCH", 4), ("RAYS", 2), ("CLASSES", (2,))):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "GROWTH", {"classes": (2, 3), "depth": (1,), "rays": (2,)})
    bench.main(1, tmp_path / "zubov.csv", tmp_path / "zubov.png")
    assert (tmp_path / "zubov.png").stat().st_size > 1000
    with (tmp_path / "zubov.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["work"] for row in rows if row["provider"] == "loop"} == {"value and derivative", "boundary", "both"}
    assert [row["provider"] for row in rows if row["sweep"] == "methods"] == list(contenders.METHODS)
    assert all(float(row["p50_ms"]) > 0 and row["machine"] for row in rows)

    right = zubov.value_and_derivative

    def wrong(lyapunov: zubov.ConvexLyapunov, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        value, rate = right(lyapunov, x, dx)
        return value, 1.01 * rate

    monkeypatch.setattr(bench.zubov, "value_and_derivative", wrong)
    with pytest.raises(ValueError, match="results differ"):
        bench.compare(2)
