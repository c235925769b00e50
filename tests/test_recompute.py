"""Contract of ``recompute=False``: the same gradients to the bit, from states and slopes saved by the forward pass.

To the bit but for bfloat16 tensors: states and slopes are saved in bfloat16 then, and recomputed in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import (
    COMPILED,
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_layout_kept,
    kernels_in,
    needs_kernels,
    random_filters,
    random_state,
)
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import robust_node_fast as rnf
from robust_node_fast import functional

Tensors = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture(params=["compiled", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled" and not COMPILED:
        pytest.skip("the compiled CPU library is not there (or not chosen)")
    if request.param == "reference":
        rnf.set_backend("reference")
    yield request.param
    rnf.set_backend("auto")


def flow(tensors: Tensors, recompute: bool | None, n_steps: int = 3, **options: Any) -> Tensor:
    input, weight, bias = tensors
    steps = n_steps if weight.dim() == 4 else None
    options = {"step_size": 0.2, "n_steps": steps, "recompute": recompute, **options}
    return functional.euler_conv_flow(input, weight, bias, **options)


def leaves(tensors: Tensors, wanted: tuple[int, ...] = (0, 1, 2)) -> Tensors:
    """Detached, requiring gradients where wanted."""
    input, weight, bias = (None if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors))
    assert input is not None
    assert weight is not None
    return input, weight, bias


def poison_the_heap() -> None:
    """Free memory of many sizes full of NaN, for the next call to find: what it reads without writing shows."""
    for _ in range(2):
        junk = [torch.full((size,), torch.nan) for size in torch.logspace(1.5, 5, 150).int().tolist()]
        del junk


def result_and_gradients(
    tensors: Tensors, recompute: bool, grad_output: Tensor, wanted: tuple[int, ...] = (0, 1, 2), **options: Any
) -> list[Tensor]:
    mine = leaves(tensors, wanted)
    result = flow(mine, recompute, **options)
    poison_the_heap()
    asked = [t for t in mine if t is not None and t.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, asked, grad_output.to(result.dtype))]


def assert_same_gradients(
    tensors: Tensors, grad_output: Tensor, wanted: tuple[int, ...] = (0, 1, 2), **options: Any
) -> None:
    again, saved = (
        result_and_gradients(tensors, recompute, grad_output, wanted, **options) for recompute in (True, False)
    )
    # With AVX-512 the forward pass takes another table of the activation when its slope is wanted as well.
    info = torch.finfo(again[0].dtype)
    assert_close(saved[0], again[0], 2e-6 if again[0].dtype == torch.float32 else 2 * info.eps)
    for mine, exact in zip(saved[1:], again[1:], strict=True):
        assert mine.isfinite().all()
        assert mine.stride() == exact.stride()
        assert_close(mine, exact, 0.0 if tensors[0].dtype != torch.bfloat16 else 2 * info.eps)


@needs_kernels
@pytest.mark.parametrize("kernels", ["planes", "channels", "strips"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_same_bits(kernels: str, dtype: torch.dtype, layout: str, shared: bool, bias: bool) -> None:
    tensors = (random_state((5, 17, 7, 9), layout, dtype), *random_filters(17, 3, None if shared else 3, bias, dtype))
    with kernels_in(kernels):
        assert_same_gradients(tensors, torch.randn(5, 17, 7, 9))


@needs_kernels
@pytest.mark.parametrize("kernels", ["planes", "channels", "strips"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_of_any_subset(kernels: str, layout: str, wanted: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    tensors = (random_state((3, 9, 6, 11), layout), *random_filters(9, 3, 3, True))
    with kernels_in(kernels):
        assert_same_gradients(tensors, random_state((3, 9, 6, 11), "transposed"), wanted)


@needs_kernels
@pytest.mark.parametrize("kernels", ["planes", "channels"])
@pytest.mark.parametrize(("wanted", "shared"), [((0,), False), ((0, 1, 2), False), ((1,), True)])
def test_same_bits_of_many_steps(kernels: str, wanted: tuple[int, ...], shared: bool) -> None:
    """So many and so large that their states are computed again in segments (csrc/cpu/flow.inc)."""
    tensors = (random_state((3, 64, 24, 24)), *random_filters(64, 3, None if shared else 35, True))
    with kernels_in(kernels):
        assert_same_gradients(tensors, torch.randn(3, 64, 24, 24), wanted, n_steps=35)


@needs_kernels
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24)),
    kernel=st.sampled_from((1, 3, 5)),
    steps=st.integers(1, 4),
    shared=st.booleans(),
    bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    wanted=st.sampled_from(((0,), (1,), (0, 1), (0, 1, 2))),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=60)
def test_same_bits_for_any_shape(
    shape: tuple[int, ...],
    kernel: int,
    steps: int,
    shared: bool,
    bias: bool,
    layout: str,
    dtype: torch.dtype,
    wanted: tuple[int, ...],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    tensors = (
        random_state(shape, layout, dtype),
        *random_filters(shape[1], kernel, None if shared else steps, bias, dtype),
    )
    assert_same_gradients(tensors, torch.randn(shape), wanted, n_steps=steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1, 2)])
def test_reference_agrees(dtype: torch.dtype, wanted: tuple[int, ...]) -> None:
    """Where nothing else runs, what is saved is not used: PyTorch's own sums, in any order."""
    tensors = (random_state((2, 5, 6, 7), dtype=dtype), *random_filters(5, 3, 3, True, dtype))
    grad_output = torch.randn(2, 5, 6, 7)
    rnf.set_backend("reference")
    try:
        found = [result_and_gradients(tensors, recompute, grad_output, wanted) for recompute in (True, False)]
    finally:
        rnf.set_backend("auto")
    for mine, exact in zip(*found, strict=True):
        assert_close(mine, exact, 1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,)])
def test_backward_may_run_twice_and_the_result_may_change(wanted: tuple[int, ...], backend: str) -> None:
    """What is saved is neither changed by backward nor the result that the caller got."""
    mine = leaves((random_state((2, 16, 5, 6)), *random_filters(16, 3, 2, True)), wanted)
    asked = [t for t in mine if t is not None and t.requires_grad]
    grad_output = torch.randn(2, 16, 5, 6)
    result = flow(mine, recompute=False)
    first = torch.autograd.grad(result, asked, grad_output, retain_graph=True)
    with torch.no_grad():
        result.zero_()
    second = torch.autograd.grad(result, asked, grad_output)
    for a, b in zip(first, second, strict=True):
        assert_close(a, b, 0.0)


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck_and_gradgradcheck(shared: bool, backend: str) -> None:
    weight, bias = random_filters(2, 3, None if shared else 2, True, torch.float64)
    tensors = leaves((random_state((1, 2, 3, 4), dtype=torch.float64), weight, bias))

    def call(*t: Tensor) -> Tensor:
        return flow((t[0], t[1], t[2]), recompute=False, n_steps=2)

    assert gradcheck(call, tensors)
    assert gradgradcheck(call, tensors, fast_mode=True)  # in random directions: one by one takes minutes


def test_second_order_equals_that_of_recomputing() -> None:
    tensors = (random_state((2, 16, 5, 6)), *random_filters(16, 3, 2, True))
    found = []
    for recompute in (True, False):
        mine = leaves(tensors)
        first = torch.autograd.grad(flow(mine, recompute).sum(), mine, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), mine))
    for again, saved in zip(*found, strict=True):
        assert_close(saved, again, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# When and what is saved
# ---------------------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of this package's ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "robust_node_fast":
            self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def ops_of(tensors: Tensors, **options: Any) -> list[str]:
    with Calls() as calls:
        flow(tensors, **options)
    return calls.names


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
def test_saves_only_where_a_gradient_is_wanted(wanted: tuple[int, ...]) -> None:
    tensors = (random_state((2, 3, 5, 6)), *random_filters(3, 3, 3, True))
    mine = leaves(tensors, wanted)
    assert ops_of(mine, recompute=False) == ["euler_conv_flow_saving"]
    assert ops_of(mine, recompute=True) == ["euler_conv_flow"]
    assert ops_of(mine, recompute=None) == ["euler_conv_flow"]
    assert ops_of(mine, recompute=False, return_trajectory=True) == ["euler_conv_flow"]
    assert ops_of(leaves(tensors, ()), recompute=False) == ["euler_conv_flow"]
    with torch.no_grad():
        assert ops_of(mine, recompute=False) == ["euler_conv_flow"]
    with torch.inference_mode():
        assert ops_of(mine, recompute=False) == ["euler_conv_flow"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_single_step_saves_by_itself(wanted: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = (random_state((2, 3, 5, 6), dtype=dtype), *random_filters(3, 3, 1, True, dtype))
    mine = leaves(tensors, wanted)
    with Calls() as calls:
        result = functional.euler_conv_flow(*mine, step_size=0.2)
        step = functional.euler_conv_step(mine[0], mine[1][0], mine[2][0], step_size=0.2)
    assert calls.names == ["euler_conv_flow_saving"] * 2
    grad_output, asked = torch.randn_like(result), [mine[i] for i in wanted]
    expected = torch.autograd.grad(flow(mine, recompute=True, n_steps=1), asked, grad_output)
    for output in (result, step):
        for found, again in zip(torch.autograd.grad(output, asked, grad_output), expected, strict=True):
            assert_close(found, again, 0.0 if dtype in (torch.float32, torch.float64) else 0.01)


def saved_bytes(tensors: Tensors, **options: Any) -> int:
    """What autograd keeps between forward and backward."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flow(tensors, **options)
    return sum(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_is_that_of_the_input_or_grows_with_the_steps(dtype: torch.dtype) -> None:
    tensors = (random_state((2, 16, 7, 9), dtype=dtype), *random_filters(16, 3, None, True, dtype))
    given = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    state = tensors[0].numel() * tensors[0].element_size()
    everything, input_only = leaves(tensors), leaves(tensors, (0,))
    for steps in (1, 4, 16):
        for mine in (everything, input_only):
            assert saved_bytes(mine, recompute=True, n_steps=steps) == given
            assert saved_bytes(mine, recompute=False, n_steps=steps, return_trajectory=True) == given
            with torch.no_grad():
                assert saved_bytes(mine, recompute=False, n_steps=steps) == 0
        states = 0 if steps == 1 else steps * state  # of a single step, the input is all states
        assert saved_bytes(everything, recompute=False, n_steps=steps) == given + states + steps * state
        assert saved_bytes(input_only, recompute=False, n_steps=steps) == given + steps * state


def test_saved_tensors_are_freed_by_backward() -> None:
    mine = leaves((random_state((2, 16, 5, 6)), *random_filters(16, 3, 2, True)))
    result = flow(mine, recompute=False)
    result.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trajectory(layout: str, backend: str) -> None:
    tensors = (random_state((2, 16, 5, 6), layout), *random_filters(16, 3, 3, True))
    grad_output = torch.randn(4, 2, 16, 5, 6)
    found = [
        result_and_gradients(tensors, recompute, grad_output, return_trajectory=True) for recompute in (True, False)
    ]
    assert_layout_kept(found[1][0], tensors[0])
    for again, other in zip(*found, strict=True):
        assert_close(other, again, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# With PyTorch's transformations, and in the module
# ---------------------------------------------------------------------------------------------------------------------


def test_autocast() -> None:
    tensors = (random_state((2, 16, 5, 6)), *random_filters(16, 3, 2, True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [result_and_gradients(tensors, recompute, torch.ones(2, 16, 5, 6)) for recompute in (True, False)]
    assert found[1][0].dtype == torch.bfloat16
    assert_close(found[1][0], found[0][0], 2 * torch.finfo(torch.bfloat16).eps)
    for again, saved in zip(found[0][1:], found[1][1:], strict=True):
        assert saved.dtype == torch.float32
        assert_close(saved, again, 0.02)


@pytest.mark.parametrize("how", ["aot_eager", "inductor"])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,)])
def test_compiled(how: str, wanted: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(how)
    compiled = torch.compile(flow, fullgraph=True, backend=counter)
    weight, bias = random_filters(16, 3, 2, True)
    for batch in (3, 5, 2):
        tensors = leaves((random_state((batch, 16, 5, 6)), weight, bias), wanted)
        torch._dynamo.mark_dynamic(tensors[0], 0)
        grad_output = torch.randn(batch, 16, 5, 6)
        asked = [t for t in tensors if t is not None and t.requires_grad]
        results = [function(tensors, recompute=False) for function in (flow, compiled)]
        eager, found = (torch.autograd.grad(result, asked, grad_output) for result in results)
        assert_close(results[1].detach(), results[0].detach(), 0.0)
        for mine, exact in zip(found, eager, strict=True):
            assert_close(mine, exact, 0.0 if COMPILED else 1e-5)
    assert counter.frame_count == 1


def test_under_transforms_of_torch_func() -> None:
    tensors = (random_state((3, 4, 5, 6), dtype=torch.float64), *random_filters(4, 3, 2, True, torch.float64))
    found = torch.func.grad(lambda *t: flow(t, False).square().sum(), argnums=(0, 1, 2))(*tensors)
    mine = leaves(tensors)
    exact = torch.autograd.grad(flow(mine, False).square().sum(), mine)
    for a, b in zip(found, exact, strict=True):
        assert_close(a, b, 1e-12)
    many = torch.stack([tensors[0], 2 * tensors[0]])
    tangent = torch.randn_like(tensors[0])

    def call(x: Tensor) -> Tensor:
        return flow((x, *tensors[1:]), False)

    assert_close(torch.vmap(call)(many)[1], call(many[1]), 1e-12)
    _, moved = torch.func.jvp(call, (tensors[0],), (tangent,))
    (pulled,) = torch.func.vjp(call, tensors[0])[1](torch.ones_like(moved))
    assert_close(moved.sum(), (pulled * tangent).sum(), 1e-11)


def test_module() -> None:
    saving = rnf.nn.EulerConvFlow(16, 3, 0.1, recompute=False)
    again = rnf.nn.EulerConvFlow(16, 3, 0.1)
    again.load_state_dict(saving.state_dict())
    assert not copy.deepcopy(saving).recompute
    input = random_state((2, 16, 6, 7))
    with Calls() as calls:
        result = saving(input)
    assert calls.names == ["euler_conv_flow_saving"]
    grad_output = torch.randn_like(result)
    for module in (saving, again):
        module(input).backward(grad_output)
    for (name, mine), (_, other) in zip(saving.named_parameters(), again.named_parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert_close(mine.grad, other.grad, 0.0 if COMPILED else 1e-5), name
