"""Contract with PyTorch's transformations: compile without graph breaks, export, autocast, ``torch.func``."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import assert_close, assert_finite, gradients, max_error, parameter_gradients, random_filters, random_state
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import robust_node_fast as rnf
from robust_node_fast import functional, reference


def objective(model: rnf.models.MNISTNode, images: Tensor) -> Tensor:
    """Everything a training step calls: activation, flow, penalty."""
    return model(images).square().mean() + model.contraction_penalty(rate=2.0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def test_compiled_training_step_equals_eager() -> None:
    """The one test through Inductor's code generation; the others stop at the graphs it would be given."""
    model = rnf.models.MNISTNode(channels=4, n_steps=2, step_size=0.1, image_size=12)
    compiled = torch.compile(objective, fullgraph=True)
    images = torch.rand(3, 1, 12, 12)
    torch._dynamo.mark_dynamic(images, 0)
    for batch in (images, torch.rand(7, 1, 12, 12)):
        results = []
        for function in (objective, compiled):
            model.zero_grad()
            loss = function(model, batch)
            loss.backward()
            results.append((loss.detach(), parameter_gradients(model)))
        assert_close(results[1][0], results[0][0], 1e-5)
        assert results[1][1].keys() == results[0][1].keys()
        for name, gradient in results[0][1].items():
            assert_close(results[1][1][name], gradient, 1e-4)


@pytest.mark.parametrize("how", ["mark_dynamic", "dynamic=True"])
def test_one_graph_serves_all_batch_sizes(how: str) -> None:
    flow = rnf.nn.EulerConvFlow(4, 2, 0.1)

    def call(z: Tensor) -> Tensor:
        return functional.smooth_leaky_relu(flow(z)).square().mean() + flow.contraction_penalty(rate=2.0)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True if how == "dynamic=True" else None)
    for batch in (2, 3, 8, 17, 40):
        z = random_state((batch, 4, 6, 7))
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(z, 0)
        loss = compiled(z)
        loss.backward()
        assert_close(loss.detach(), call(z).detach(), 1e-5)
        if batch == 2:  # dynamic=True makes Dynamo start over once, to take the float step size as a constant
            frames = counter.frame_count
    assert counter.frame_count == frames <= 2


def test_one_graph_of_a_whole_model_serves_all_batch_sizes() -> None:
    model = rnf.models.MNISTNode(channels=4, n_steps=2, image_size=12)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 8, 15):  # PyTorch itself compiles its nn.Conv2d, the stem, again from a batch of 16 on
        images = torch.rand(batch, 1, 12, 12)
        torch._dynamo.mark_dynamic(images, 0)
        compiled(model, images).backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shared", [False, True])
def test_compiled_trajectory_keeps_its_strides(layout: str, shared: bool) -> None:
    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.euler_conv_flow(x, w, b, step_size=0.1, n_steps=2 if shared else None, return_trajectory=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    input = random_state((2, 4, 5, 6), layout)
    weight, bias = random_filters(4, 3, None if shared else 2, True)
    grad_output = torch.randn(3, 2, 4, 5, 6)
    assert compiled(input, weight, bias).stride() == call(input, weight, bias).stride()
    for mine, eager in zip(
        gradients(compiled, [input, weight, bias], grad_output),
        gradients(call, [input, weight, bias], grad_output),
        strict=True,
    ):
        assert_close(mine, eager, 1e-6)


def test_exported_model_runs_on_any_batch() -> None:
    model = rnf.models.MNISTNode(channels=4, n_steps=2, image_size=12).eval()
    program = torch.export.export(
        model, (torch.rand(3, 1, 12, 12),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    names = {str(node.target) for node in program.graph.nodes}
    assert "robust_node_fast.euler_conv_flow.default" in names
    for batch in (1, 3, 11):
        images = torch.rand(batch, 1, 12, 12)
        assert_close(program.module()(images), model(images), 1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_runs_the_flow_in_bfloat16_and_the_penalty_in_float32(compiled: bool) -> None:
    flow = rnf.nn.EulerConvFlow(8, 3, 0.1)
    input = random_state((2, 8, 9, 9)).requires_grad_()
    grad_output = torch.randn(2, 8, 9, 9)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return flow(x), flow.contraction_penalty(rate=2.0)

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, penalty = function(input)
        step = functional.euler_conv_step(input, flow.weight[0], step_size=0.1)
    assert result.dtype == torch.bfloat16
    assert step.dtype == torch.bfloat16
    assert penalty.dtype == torch.float32
    exact_penalty = reference.contraction_penalty(flow.weight.double(), rate=2.0)
    assert_close(penalty.detach(), exact_penalty.detach(), 1e-6)

    found = torch.autograd.grad(result, [input, flow.weight, flow.bias], grad_output.bfloat16(), retain_graph=compiled)
    exact = gradients(
        lambda x, w, b: reference.euler_conv_flow(x, w, b, step_size=0.1),
        [t.detach().double() for t in (input, flow.weight, flow.bias)],
        grad_output.double(),
    )
    assert_close(result.detach(), exact[0], 0.02)
    for gradient, parameter, truth in zip(found, (input, flow.weight, flow.bias), exact[1:], strict=True):
        assert gradient.dtype == parameter.dtype == torch.float32
        assert_close(gradient, truth, 0.02)
    (by_penalty,) = torch.autograd.grad(penalty, flow.weight)
    assert by_penalty.dtype == torch.float32


def test_autocast_leaves_float64_alone_and_mixes_dtypes_otherwise() -> None:
    input = random_state((2, 4, 5, 5), dtype=torch.float64)
    weight, bias = random_filters(4, 3, 2, True, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.euler_conv_flow(input, weight, bias, step_size=0.1).dtype == torch.float64
        half = functional.euler_conv_flow(input.bfloat16(), weight.float(), None, step_size=0.1)
    assert half.dtype == torch.bfloat16
    assert max_error(half, reference.euler_conv_flow(input, weight, step_size=0.1)) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# torch.func
# ---------------------------------------------------------------------------------------------------------------------


def flow(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.euler_conv_flow(x, w, b, step_size=0.3)


def flow_arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = random_filters(3, 3, 2, True, dtype)
    assert bias is not None
    return random_state((4, 3, 5, 6), dtype=dtype), weight, bias


def test_vmap_over_inputs_weights_and_both() -> None:
    x, w, b = flow_arguments()
    many = torch.stack([x, x + 1, x * 2])
    assert_close(torch.vmap(flow, (0, None, None))(many, w, b), torch.stack([flow(z, w, b) for z in many]), 1e-13)
    filters = torch.stack([w, w + 0.1, w * 2])
    found = torch.vmap(flow, (None, 0, None))(x, filters, b)
    assert_close(found, torch.stack([flow(x, v, b) for v in filters]), 1e-13)
    found = torch.vmap(flow, (0, 0, None))(many, filters, b)
    assert_close(found, torch.stack([flow(z, v, b) for z, v in zip(many, filters, strict=True)]), 1e-13)
    penalties = torch.vmap(lambda v: functional.contraction_penalty(v, rate=2.0))(filters)
    expected = torch.stack([functional.contraction_penalty(v, rate=2.0) for v in filters])
    assert_close(penalties, expected, 1e-13)


def test_grad_equals_autograd() -> None:
    arguments = flow_arguments()
    found = torch.func.grad(lambda *t: flow(*t).square().sum(), argnums=(0, 1, 2))(*arguments)
    leaves = [t.clone().requires_grad_() for t in arguments]
    for mine, exact in zip(found, torch.autograd.grad(flow(*leaves).square().sum(), leaves), strict=True):
        assert_close(mine, exact, 1e-12)


def test_per_sample_gradients_equal_a_loop() -> None:
    x, w, b = flow_arguments()

    def loss(weight: Tensor, bias: Tensor, sample: Tensor) -> Tensor:
        return flow(sample[None], weight, bias).square().sum()

    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(w, b, x)
    for i, sample in enumerate(x):
        leaves = [w.clone().requires_grad_(), b.clone().requires_grad_()]
        exact = torch.autograd.grad(loss(*leaves, sample), leaves)
        assert_close(found[0][i], exact[0], 1e-12)
        assert_close(found[1][i], exact[1], 1e-12)


def test_jvp_equals_finite_differences_and_vjp() -> None:
    arguments = flow_arguments()
    tangents = tuple(torch.randn_like(t) for t in arguments)
    value, tangent = torch.func.jvp(flow, arguments, tangents)
    assert_close(value, flow(*arguments), 1e-13)
    step = 1e-6
    sides = [flow(*(t + sign * step * d for t, d in zip(arguments, tangents, strict=True))) for sign in (1, -1)]
    assert_close(tangent, (sides[0] - sides[1]) / (2 * step), 1e-7)
    _, pull_back = torch.func.vjp(flow, *arguments)
    cotangent = torch.randn_like(value)
    paired = sum((g * d).sum() for g, d in zip(pull_back(cotangent), tangents, strict=True))
    assert_close(torch.as_tensor(paired), (cotangent * tangent).sum(), 1e-11)


def test_forward_mode_and_hessian_of_the_activation() -> None:
    u = torch.linspace(-3, 3, 7, dtype=torch.float64)
    slope = 0.1 + 0.9 * torch.sigmoid(u)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(u, torch.full_like(u, 2.0))
        tangent = torch.autograd.forward_ad.unpack_dual(functional.smooth_leaky_relu(dual)).tangent
    assert_close(tangent, 2.0 * slope, 1e-13)
    hessian = torch.func.hessian(lambda x: functional.smooth_leaky_relu(x).sum())(u)
    assert_close(hessian, torch.diag(0.9 * torch.sigmoid(u) * torch.sigmoid(-u)), 1e-13)


def run_in_fresh_process(script: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout.strip()


def test_compiled_vmap_and_jvp() -> None:
    """In a fresh process, out of reach of the other tests' caches; Inductor needs static shapes under vmap."""
    output = run_in_fresh_process("""
        import torch
        import robust_node_fast as rnf

        torch.manual_seed(0)
        weight = 0.2 * torch.randn(2, 3, 3, 3, 3)
        x = torch.randn(4, 2, 3, 5, 6)
        tangent = torch.randn_like(x)

        def flow(z):
            return rnf.functional.euler_conv_flow(z, weight, step_size=0.1)

        def both(z, dz):
            return torch.func.jvp(torch.vmap(flow), (z,), (dz,))

        for mine, eager in zip(torch.compile(both, fullgraph=True, dynamic=False)(x, tangent), both(x, tangent)):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, eager)
        print("equal")
    """)
    assert output == "equal"


def test_import_needs_no_compiler_and_warns_of_nothing() -> None:
    output = run_in_fresh_process("""
        import sys, warnings
        warnings.simplefilter("error")
        import robust_node_fast
        print("torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
    """)
    assert output.endswith("False"), output


def test_finite_under_every_transformation() -> None:
    x, w, b = flow_arguments(torch.float32)
    assert_finite(torch.vmap(lambda z: flow(z[None], w, b))(1e4 * x), flow(1e4 * x, w, b))


def test_penalty_under_grad_transform_of_every_norm() -> None:
    _, w, _ = flow_arguments()
    for norm in ("2", "2-sharp", "inf", "1"):
        found = torch.func.grad(lambda v, n=norm: functional.contraction_penalty(v, rate=50.0, norm=n))(w)
        leaf = w.clone().requires_grad_()
        (exact,) = torch.autograd.grad(functional.contraction_penalty(leaf, rate=50.0, norm=norm), leaf)
        assert_close(found, exact, 1e-13)
