"""Contract of ``robust_node_fast.jacobian``: equal to dense eigenvalues and their gradients, never above them, loud."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from helpers import assert_close, assert_finite
from torch import Tensor, nn

import robust_node_fast as rnf
from robust_node_fast.jacobian import jacobian_penalty, symmetric_jacobian_eigenvalue


def mlp(dimension: int, width: int = 12) -> nn.Module:
    layers = [nn.Linear(dimension, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dimension)]
    return nn.Sequential(*layers).double()


def dense_eigenvalues(field: Any, z: Tensor) -> Tensor:
    """All eigenvalues of J + J', ascending: ``(B, n)``."""
    n = z[0].numel()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: field(x[None])[0]))(z).reshape(len(z), n, n)
    return torch.linalg.eigvalsh(jacobian + jacobian.mT)


def conv_field() -> tuple[rnf.nn.EulerConvFlow, Any]:
    flow = rnf.nn.EulerConvFlow(3, 2, 0.1).double()
    with torch.no_grad():
        flow.weight.mul_(3.0)
    return flow, functools.partial(flow.vector_field, 0.1)


@pytest.mark.parametrize("dimension", [1, 2, 3, 7])
@pytest.mark.parametrize("n_iter", [24, 1000])
def test_equals_dense_eigenvalue_of_a_network(dimension: int, n_iter: int) -> None:
    field, z = mlp(dimension), torch.randn(6, dimension, dtype=torch.float64)
    found = symmetric_jacobian_eigenvalue(field, z, n_iter=n_iter)
    assert found.shape == (6,)
    assert_close(found, dense_eigenvalues(field, z)[:, -1], 1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_dense_eigenvalue_of_a_convolutional_flow(memory_format: torch.memory_format) -> None:
    _, field = conv_field()
    z = torch.randn(3, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    assert_close(symmetric_jacobian_eigenvalue(field, z, n_iter=60), dense_eigenvalues(field, z)[:, -1], 1e-10)


def test_a_short_iteration_never_exceeds_the_eigenvalue_and_converges() -> None:
    _, field = conv_field()
    z = torch.randn(4, 3, 4, 5, dtype=torch.float64)
    exact = dense_eigenvalues(field, z)[:, -1]
    gaps = []
    for n_iter in (1, 2, 4, 8, 16, 32):
        found = symmetric_jacobian_eigenvalue(field, z, n_iter=n_iter)
        assert_finite(found)
        assert (found <= exact + 1e-12).all()
        gaps.append((exact - found).max().item())
    assert gaps[-1] < 1e-3 * gaps[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [-3.0, 0.0, 2.0])
def test_exhausted_krylov_space(factor: float, dtype: torch.dtype) -> None:
    """Multiples of the identity and zero Jacobians break the recurrence off after one step."""
    z = torch.randn(4, 2, 3, dtype=dtype)
    assert_close(symmetric_jacobian_eigenvalue(lambda x: factor * x, z), torch.full((4,), 2.0 * factor), 1e-5)


def test_samples_that_break_off_at_different_steps() -> None:
    """One sample has one eigenvalue, one has two, all negative; the others have as many as dimensions."""
    matrices = torch.randn(5, 6, 6, dtype=torch.float64)
    matrices[0] = -4.0 * torch.eye(6)
    matrices[1] = torch.diag(torch.tensor([-3.0, -3.0, -3.0, -2.0, -2.0, -2.0]))
    z = torch.randn(5, 6, dtype=torch.float64)

    def field(x: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", matrices[: len(x)], x)

    exact = torch.linalg.eigvalsh(matrices + matrices.mT)[:, -1]
    assert_close(symmetric_jacobian_eigenvalue(field, z), exact, 1e-12)


def test_non_finite_states_stay_in_their_sample() -> None:
    field, z = mlp(3), torch.randn(4, 3, dtype=torch.float64)
    expected = symmetric_jacobian_eigenvalue(field, z)
    z[1, 2] = torch.nan
    found = symmetric_jacobian_eigenvalue(field, z)
    assert found.isnan().tolist() == [False, True, False, False]
    assert_close(found[[0, 2, 3]], expected[[0, 2, 3]], 1e-12)
    assert jacobian_penalty(field, z.unsqueeze(0), rate=1.0).isnan()


def test_gradient_equals_differentiating_the_dense_eigenvalue() -> None:
    field = mlp(3)
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64)
    variables = [z, *(p for name, p in field.named_parameters() if name != "4.bias")]  # J does not depend on that one
    ours = torch.autograd.grad((symmetric_jacobian_eigenvalue(field, z) * weights).sum(), variables)
    dense = torch.autograd.grad((dense_eigenvalues(field, z)[:, -1] * weights).sum(), variables)
    for mine, exact in zip(ours, dense, strict=True):
        assert exact.abs().max() > 0
        assert_close(mine, exact, 1e-10)


def test_gradient_of_a_convolutional_flow_equals_finite_differences() -> None:
    flow, field = conv_field()
    z = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    direction, weight_direction = torch.randn_like(z), torch.randn_like(flow.weight)

    def value() -> Tensor:
        return jacobian_penalty(field, z.unsqueeze(0), rate=1.0, n_iter=40)

    grad_z, grad_weight = torch.autograd.grad(value(), [z, flow.weight])
    expected = (grad_z * direction).sum() + (grad_weight * weight_direction).sum()
    step = 1e-5
    sides = []
    with torch.no_grad():
        for sign in (1.0, -2.0):  # + step, then - step from there
            z.add_(direction, alpha=sign * step)
            flow.weight.add_(weight_direction, alpha=sign * step)
            sides.append(value())
    assert_close((sides[0] - sides[1]) / (2 * step), expected, 1e-6)


def test_penalty_is_the_mean_over_points_and_samples() -> None:
    field = mlp(2)
    states = torch.randn(5, 4, 2, dtype=torch.float64)
    top = dense_eigenvalues(field, states.flatten(0, 1))[:, -1]
    rate = -top.median().item()  # about half of the hinges are active
    assert_close(jacobian_penalty(field, states, rate=rate), (rate + top).relu().mean(), 1e-12)
    per_point = jacobian_penalty([field] * 5, states, rate=rate)
    assert_close(per_point, (rate + top).relu().mean(), 1e-12)


def test_penalty_of_a_field_that_changes_in_time() -> None:
    flow = rnf.nn.EulerConvFlow(2, 3, 0.1).double()
    states = flow(torch.randn(2, 2, 3, 3, dtype=torch.float64), return_trajectory=True)[:-1]
    fields = [functools.partial(flow.vector_field, k * flow.step_size) for k in range(3)]
    expected = torch.stack([dense_eigenvalues(f, z.detach())[:, -1] for f, z in zip(fields, states, strict=True)])
    penalty = jacobian_penalty(fields, states, rate=1.0)
    assert_close(penalty, (1.0 + expected).relu().mean(), 1e-9)
    penalty.backward()
    assert flow.weight.grad is not None
    assert_finite(flow.weight.grad)
    assert (flow.weight.grad.flatten(1).norm(dim=1) > 0).all()


def test_contractive_flow_has_no_penalty() -> None:
    flow = rnf.nn.contractive_init_(rnf.nn.EulerConvFlow(3, 2, 0.1), rate=2.0)
    states = flow(torch.randn(3, 3, 5, 5), return_trajectory=True)[:-1]
    fields = [functools.partial(flow.vector_field, k * flow.step_size) for k in range(2)]
    assert jacobian_penalty(fields, states, rate=2.0 - 1e-4).item() == 0.0


def test_generator_makes_it_reproducible_and_spares_the_global_one() -> None:
    _, field = conv_field()
    z, state = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.get_rng_state()
    first, again = (
        symmetric_jacobian_eigenvalue(field, z, n_iter=3, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())


def test_autocast_leaves_the_precision_alone() -> None:
    field, z = mlp(3).float(), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = symmetric_jacobian_eigenvalue(field, z)
    assert found.dtype == torch.float32
    assert_close(found, dense_eigenvalues(field, z)[:, -1].detach(), 1e-5)


@pytest.mark.parametrize("shape", [(0, 2), (0, 3, 4, 4)])
def test_no_samples(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, requires_grad=True)
    assert symmetric_jacobian_eigenvalue(torch.tanh, z).shape == (0,)
    penalty = jacobian_penalty(torch.tanh, z.unsqueeze(0), rate=1.0)
    penalty.backward()
    assert penalty.item() == 0.0
    assert z.grad is not None
    assert z.grad.shape == shape


Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: symmetric_jacobian_eigenvalue(None, Z), TypeError, ["vector_field", "NoneType", "callable"]),
        (lambda: symmetric_jacobian_eigenvalue(torch.tanh, [1.0]), TypeError, ["z", "list", "torch.Tensor"]),
        (lambda: symmetric_jacobian_eigenvalue(torch.tanh, Z.int()), TypeError, ["z", "int32", "float32"]),
        (lambda: symmetric_jacobian_eigenvalue(torch.tanh, Z.half()), TypeError, ["z", "float16", "float32"]),
        (lambda: symmetric_jacobian_eigenvalue(torch.tanh, Z[0]), ValueError, ["z", "(3,)", "(B, ...)"]),
        (lambda: symmetric_jacobian_eigenvalue(torch.tanh, Z[:, :0]), ValueError, ["z", "(2, 0)", "one component"]),
        (lambda: symmetric_jacobian_eigenvalue(torch.tanh, Z, n_iter=0), ValueError, ["n_iter=0", "at least 1"]),
        (lambda: symmetric_jacobian_eigenvalue(torch.tanh, Z, n_iter=2.0), TypeError, ["n_iter=2.0", "int"]),
        (
            lambda: symmetric_jacobian_eigenvalue(lambda z: z[:, :2], Z),
            ValueError,
            ["vector_field", "(2, 2)", "(2, 3)"],
        ),
        (
            lambda: symmetric_jacobian_eigenvalue(lambda z: z.double(), Z),
            ValueError,
            ["vector_field", "float64", "float32"],
        ),
        (lambda: jacobian_penalty(torch.tanh, Z, rate=1.0), ValueError, ["states", "(2, 3)", "(T, B, ...)"]),
        (lambda: jacobian_penalty(torch.tanh, Z[None], rate="1"), TypeError, ["rate", "str", "float"]),
        (lambda: jacobian_penalty(torch.tanh, Z[None], rate=torch.nan), ValueError, ["rate=nan", "finite"]),
        (lambda: jacobian_penalty([torch.tanh], Z.expand(2, 2, 3), rate=1.0), ValueError, ["length 1", "expected 2"]),
        (lambda: jacobian_penalty([None], Z[None], rate=1.0), TypeError, ["vector_field", "NoneType", "callable"]),
    ],
)
def test_errors_name_argument_value_and_expectation(call: Any, error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as raised:
        call()
    for part in says:
        assert re.search(re.escape(part), str(raised.value)), f"{part!r} is not in {raised.value}"
