"""The Triton back end without a device: its kernels in the interpreter, what torch.compile sees, the choice of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import robust_node_fast as rnf
from robust_node_fast import _backends

triton = pytest.importorskip("triton")
INTERPRETED = Path(__file__).parent / "interpreted_triton.py"
OPS = torch.ops.robust_node_fast


def test_every_kernel_in_the_interpreter() -> None:
    """In a process of its own: TRITON_INTERPRET must be set before Triton is imported, and changes it for good."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--no-header", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert re.search(r"[1-9]\d passed", summary), summary
    assert "skipped" not in summary


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Tensors without memory on a Hopper card that is not there."""
    from triton.backends.compiler import GPUTarget

    if not torch.cuda.is_available():
        driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setitem(_backends._BACKENDS, "cuda", _backends.Backend("cuda", ("cuda",), "not in this test"))
    _backends._resolved.clear()
    yield FakeTensorMode()
    _backends._resolved.clear()


def launches(
    mode: FakeTensorMode, function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of each launch in the graph that AOTAutograd gives to Inductor."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = function(*tensors)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    with mode:
        tensors = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
    graph = aot_export_joint_simple(call, tensors, trace_joint=False).graph
    found = []
    for node in graph.nodes:
        if node.op == "call_function":
            assert "robust_node_fast" not in str(node.target), f"{node.target} is opaque"
            if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
                name = getattr(kernel, "base_fn", kernel.fn).__name__
                found.append((name, {**constants, **node.kwargs["kwargs"]}))
    return found


STATE, WEIGHT, BIAS = (2, 16, 6, 6), (3, 16, 16, 3, 3), (3, 16)


def test_compile_sees_the_launches_of_every_op(pretended_device: FakeTensorMode) -> None:
    """Traced without a device, to the graph that Inductor gets; test_gpu.py runs what Inductor makes of it."""
    flow, penalty = (0.1, 0.1, 3), (2.0, 0.1, 1.0, "2", "sum")
    seen = {
        "flow": (lambda x, w, b: OPS.euler_conv_flow(x, w, b, *flow, False), (STATE, WEIGHT, BIAS)),
        "trajectory": (lambda x, w, b: OPS.euler_conv_flow(x, w, b, *flow, True), (STATE, WEIGHT, BIAS)),
        "saving": (lambda x, w, b: OPS.euler_conv_flow_saving(x, w, b, *flow, True), (STATE, WEIGHT, BIAS)),
        "backward": (
            lambda g, x, w, b: OPS.euler_conv_flow_backward(g, x, w, b, *flow, False, [True] * 3),
            (STATE, STATE, WEIGHT, BIAS),
        ),
        "step": (lambda x, w: OPS.euler_conv_step(x, w, None, 0.1, 0.1), (STATE, WEIGHT[1:])),
        "penalty": (lambda w: OPS.contraction_penalty(w, *penalty), (WEIGHT,)),
        "penalty's gradient": (OPS.contraction_penalty_backward, ((), WEIGHT, (3, 3, 16))),
        "activation": (lambda x: OPS.smooth_leaky_relu(x, 0.1), (STATE,)),
        "activation's gradient": (lambda g, x: OPS.smooth_leaky_relu_backward(g, x, 0.1), (STATE, STATE)),
    }
    found = {
        name: dict(Counter(kernel for kernel, _ in launches(pretended_device, function, *shapes)))
        for name, (function, shapes) in seen.items()
    }
    assert found == {
        "flow": {"euler_step": 3},
        "trajectory": {"euler_step": 3},
        "saving": {"euler_step": 3},
        "backward": {"euler_step": 3, "weight_gradient": 3, "gradient_step": 3},
        "step": {"euler_step": 1},
        "penalty": {"penalty": 1},
        "penalty's gradient": {"penalty_gradient": 1},
        "activation": {"smooth_leaky_relu": 1},
        "activation's gradient": {"smooth_leaky_relu_backward": 1},
    }


def backward(g: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
    return OPS.euler_conv_flow_backward(g, x, w, b, 0.1, 0.1, 3, False, [True] * 3)


@pytest.mark.parametrize(
    ("dtype", "switch", "exact", "expected"),
    [
        (torch.float32, "tf32", False, "tf32"),
        (torch.float32, "ieee", False, "ieee"),
        (torch.float32, "tf32", True, "ieee"),
        (torch.bfloat16, "tf32", False, "ieee"),  # of bfloat16 factors: products and sums in float32
    ],
)
def test_precision_of_the_products(
    pretended_device: FakeTensorMode,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    switch: str,
    exact: bool,
    expected: str,
) -> None:
    from robust_node_fast import _triton

    monkeypatch.setattr(_triton, "_EXACT", exact)  # RNF_PRECISION=exact
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = switch
    try:
        found = launches(pretended_device, backward, STATE, STATE, WEIGHT, BIAS, dtype=dtype)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert {(name, arguments["PRECISION"]) for name, arguments in found} == {
        (name, expected) for name in ("euler_step", "gradient_step", "weight_gradient")
    }


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_mode_adds_nothing_atomically(pretended_device: FakeTensorMode, deterministic: bool) -> None:
    large = (8, 16, 28, 28)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = launches(pretended_device, backward, large, large, WEIGHT, BIAS)
    finally:
        torch.use_deterministic_algorithms(False)
    atomic = [arguments["ATOMIC"] for name, arguments in found if name == "weight_gradient"]
    assert atomic == [not deterministic] * 3


def test_one_graph_of_launches_serves_all_batch_sizes(pretended_device: FakeTensorMode) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(backward, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()):
        weight, bias = torch.empty(WEIGHT, device="cuda"), torch.empty(BIAS, device="cuda")
        for batch in (4, 8, 20, 100):
            state = torch.empty(batch, 16, 28, 28, device="cuda")
            torch._dynamo.mark_dynamic(state, 0)
            grads = compiled(state, state, weight, bias)
            assert [grad.shape for grad in grads] == [state.shape, weight.shape, bias.shape]
    assert len(graphs) == 1
    assert sum("triton_kernel_wrapper" in str(node.target) for node in graphs[0].graph.nodes) == 9


def test_the_reference_stays_one_op_in_the_graph(pretended_device: FakeTensorMode) -> None:
    rnf.set_backend("reference")
    try:
        with pytest.raises(AssertionError, match=r"euler_conv_flow\S* is opaque"):
            launches(
                pretended_device, lambda x, w, b: OPS.euler_conv_flow(x, w, b, 0.1, 0.1, 3, False), STATE, WEIGHT, BIAS
            )
    finally:
        rnf.set_backend("auto")


def test_what_triton_takes_and_why_not_the_rest() -> None:
    backend = _backends._BACKENDS["triton"]

    def reason(device: str, dtype: torch.dtype, kernel_size: int | None) -> str | None:
        return backend.refuses(_backends.Call("euler_conv_flow", device, dtype, kernel_size))

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for kernel_size in (1, 3, 5):
            assert reason("cuda", dtype, kernel_size) is None
    assert "float64" in (reason("cuda", torch.float64, 3) or "")
    assert "7" in (reason("cuda", torch.float32, 7) or "")
    assert "not cpu" in (reason("cpu", torch.float32, 3) or "")
    # A certificate's bounds and what Lyapunov functions are made of run as PyTorch ops on a card.
    plain = {op for op in _backends._REFERENCE if op.endswith("_bound") or op.startswith("softplus_")}
    assert set(backend.implementations) == set(_backends._REFERENCE) - plain
    for op in plain:
        call = _backends.Call(op, "cuda", torch.float32, 3 if op.endswith("_bound") else None)
        assert backend.refuses(call) == f"has no kernel for {op}"


def test_a_triton_that_cannot_be_imported_is_unavailable() -> None:
    backend = _backends.Backend("triton", ("cuda",), None, module="robust_node_fast.there_is_no_such_module")
    assert "cannot be imported" in (backend.refuses(_backends.Call("penalty", "cuda", torch.float32, 3)) or "")
    assert "cannot be imported" in (backend.useless() or "")


def test_what_the_tuner_puts_back_and_when_it_does_not_tune() -> None:
    from robust_node_fast.kernels import configs

    card = torch.device("cuda:0")

    def tuned(kernel: str, channels: int = 64, **options: Any) -> Any:
        return configs.tuned(kernel, "16 bit", channels, card, **{"with_bias": True, "deterministic": False, **options})

    assert tuned("weight_gradient").restore_value == ["grad_weight", "grad_bias"]
    assert tuned("weight_gradient", with_bias=False).restore_value == ["grad_weight"]  # None has no copy
    assert tuned("gradient_step").restore_value == []
    for kernel in configs.BLOCKS:
        assert len(tuned(kernel).configs) > 1
        (only,) = tuned(kernel, deterministic=True).configs
        assert only.kwargs == tuned(kernel).configs[0].kwargs
        assert len(tuned(kernel, channels=16).configs) >= 1
    other = configs.tuned(*("gradient_step", "16 bit", 64, torch.device("cuda:1")), with_bias=True, deterministic=False)
    assert other is not tuned("gradient_step")  # unlike cards share no choice
