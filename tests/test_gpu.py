"""The fused kernels on a real card, against the reference in float64: ``pytest -m gpu``. Skipped without a device.

Inputs are new in every run (the seed is printed), and every output starts as NaN, so that an element that no kernel
writes shows. The criterion is that of ``test_numerics.py``: at most twice the error that PyTorch makes in the same
dtype on the same card, and 16 units in the last place in float32, one in 16 bits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import (
    LAYOUTS,
    NORMS,
    REDUCTIONS,
    assert_close,
    assert_layout_kept,
    fresh,
    gradients,
    max_error,
    random_filters,
    random_state,
)
from torch import Tensor

import robust_node_fast as rnf
from robust_node_fast import functional, reference

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("triton", "cuda")
ULPS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each back end by itself and strictly: whatever it does not serve is skipped, not computed elsewhere."""
    state = rnf.backend_info()["backends"][request.param]
    if not state["available"]:
        pytest.skip(f"{request.param}: {state['reason']}")
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print(f"seed {seed}")
    rnf.set_backend(request.param)
    monkeypatch.setenv("RNF_STRICT", "1")
    try:
        yield request.param
    finally:
        rnf.set_backend("auto")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch's switch, which also fills all uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def poison() -> None:
    """What the allocator hands out next holds NaN."""
    blocks = [torch.full((2**size,), torch.nan, device=DEVICE) for size in range(8, 25) for _ in range(4)]
    del blocks


def served(function: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The results of the back end, on poisoned memory; skipped where it has no kernel for them."""
    poison()
    try:
        return function()
    except RuntimeError as error:
        if "RNF_STRICT" not in str(error):
            raise
        pytest.skip(str(error))


def assert_as_accurate(ours: list[Tensor], same_dtype: list[Tensor], exact: list[Tensor]) -> None:
    for i, (mine, theirs, truth) in enumerate(zip(ours, same_dtype, exact, strict=True)):
        assert mine.dtype == theirs.dtype, i
        scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
        allowed = 2 * max_error(theirs, truth) + ULPS[mine.dtype] * torch.finfo(mine.dtype).eps * scale
        assert max_error(mine, truth) <= allowed, f"result {i}: {max_error(mine, truth):.3e}, allowed {allowed:.3e}"


def moved(*tensors: Tensor | None) -> list[Tensor | None]:
    """On the device, with the strides they have."""
    return [None if t is None else t.to(DEVICE) for t in tensors]


def compare(
    shape: tuple[int, ...], kernel: int, steps: int, dtype: torch.dtype, layout: str = "contiguous", **options: bool
) -> None:
    """Result and gradients of a flow three ways: this back end, PyTorch in the same dtype, PyTorch in float64."""
    shared, trajectory = options.pop("shared", False), options.get("return_trajectory", False)
    weight, bias = random_filters(shape[1], kernel, None if shared else steps, options.pop("bias", True), dtype)
    tensors = moved(random_state(shape, layout, dtype), weight, bias)
    grad_output = torch.randn(steps + 1, *shape, device=DEVICE) if trajectory else torch.randn(shape, device=DEVICE)
    n_steps = steps if shared else None

    def ours(*args: Tensor | None) -> Tensor:
        return functional.euler_conv_flow(*args, step_size=0.1, n_steps=n_steps, **options)

    def theirs(*args: Tensor | None) -> Tensor:
        return reference.euler_conv_flow(*args, step_size=0.1, n_steps=n_steps, return_trajectory=trajectory)

    found = served(lambda: gradients(ours, tensors, grad_output))
    assert_layout_kept(found[0], tensors[0])
    wide = [None if t is None else t.double() for t in tensors]
    assert_as_accurate(found, gradients(theirs, tensors, grad_output), gradients(theirs, wide, grad_output))


SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 8, 28, 28), (2, 17, 9, 33), (4, 64, 16, 16), (2, 130, 12, 10)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_flow_and_gradients(shape: tuple[int, ...], kernel: int, dtype: torch.dtype, layout: str) -> None:
    compare(shape, kernel, 3, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trajectory", [False, True])
def test_every_layout(layout: str, trajectory: bool) -> None:
    compare((3, 19, 8, 11), 3, 3, torch.float32, layout, return_trajectory=trajectory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["shared", "bias", "recompute"])
def test_options(dtype: torch.dtype, option: str) -> None:
    compare((2, 24, 14, 14), 3, 4, dtype, **{option: option == "shared"})


@pytest.mark.parametrize("shape", [(64, 8, 28, 28), (16, 64, 32, 32)])
def test_weight_gradients_are_the_same_to_the_bit_when_deterministic(
    shape: tuple[int, ...], deterministic: None
) -> None:
    tensors = moved(random_state(shape), *random_filters(shape[1], 3, 2, True))
    grad_output = torch.randn(shape, device=DEVICE)

    def run() -> list[Tensor]:
        return gradients(lambda *args: functional.euler_conv_flow(*args, step_size=0.1), tensors, grad_output)

    first = served(run)
    for _ in range(5):
        assert all(map(torch.equal, first, run()))
    compare(shape, 3, 2, torch.float32)  # and right, with every uninitialised element NaN


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (17, 5), (128, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty(norm: str, reduction: str, channels: int, kernel: int, dtype: torch.dtype) -> None:
    weight = moved(random_filters(channels, kernel, 3, False, dtype)[0])
    options = {"rate": 2.0, "norm": norm, "reduction": reduction}
    shape = (3, channels) if reduction == "none" else ()
    grad_output = torch.randn(shape, device=DEVICE)
    found = served(lambda: gradients(lambda w: functional.contraction_penalty(w, **options), weight, grad_output))
    wide = [weight[0].double()]
    theirs, truth = (
        gradients(lambda w: reference.contraction_penalty(w, **options), t, grad_output) for t in (weight, wide)
    )
    if dtype == torch.float32:
        for mine, exact in zip(found, truth, strict=True):
            assert_close(mine, exact, 2e-6)
    else:
        assert_as_accurate(found, theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(dtype: torch.dtype) -> None:
    tensors = moved(50 * random_state((3, 5, 17, 19), "channels_last", dtype))
    grad_output = torch.randn(3, 5, 17, 19, device=DEVICE)
    found = served(lambda: gradients(functional.smooth_leaky_relu, tensors, grad_output))
    wide = [tensors[0].double()]
    ours = [gradients(reference.smooth_leaky_relu, t, grad_output) for t in (tensors, wide)]
    assert_as_accurate(found, *ours)


def test_float32_is_exact_on_request(backend: str) -> None:
    """In a fresh process, since RNF_PRECISION is read at import."""
    code = """
import torch, robust_node_fast as r
torch.manual_seed(0)
args = [t.cuda() for t in (torch.randn(2, 64, 16, 16), torch.randn(3, 64, 64, 3, 3) / 24, torch.randn(3, 64))]
found = r.functional.euler_conv_flow(*args, step_size=0.1)
truth = r.reference.euler_conv_flow(*(t.double() for t in args), step_size=0.1)
print((found - truth).abs().max().item())
"""
    environment = {**os.environ, "RNF_PRECISION": "exact", "RNF_BACKEND": backend, "RNF_STRICT": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mnist_flow_is_one_launch_under_autocast(backend: str, dtype: torch.dtype) -> None:
    if backend != "cuda":
        pytest.skip("Triton launches a kernel a step")
    flow = rnf.nn.EulerConvFlow(8, 10, step_size=0.01).to(DEVICE)
    x = torch.randn(16, 8, 28, 28, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, dtype):
        assert flow(x).dtype == dtype
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            flow(x)
            torch.cuda.synchronize()
    launched = {event.key: event.count for event in profile.key_averages() if "flow_forward_kernel" in event.key}
    assert sum(launched.values()) == 1, launched


def test_a_cuda_graph_captures_forward_and_backward() -> None:
    """Nothing waits for the device: what was captured gives, for other inputs, what running it gives."""
    tensors = moved(random_state((8, 16, 14, 14)), *random_filters(16, 3, 3, True))
    static = [t.detach().requires_grad_() for t in tensors]

    def run() -> list[Tensor]:
        result = functional.euler_conv_flow(*static, step_size=0.1)
        loss = result.square().sum() + functional.contraction_penalty(static[1], rate=2.0)
        return [result, *torch.autograd.grad(loss, static)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # Triton tunes here
            served(run)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        with torch.no_grad():
            for tensor in static:
                tensor.copy_(torch.randn_like(tensor) * tensor.std())
        graph.replay()
        for mine, truth in zip(captured, run(), strict=True):
            assert_close(mine, truth, 1e-4)  # atomic additions in another order


def test_compiled_training_step_equals_eager() -> None:
    """For several batch sizes, of which the compiled code learns only when it runs."""
    torch._dynamo.reset()
    model = rnf.models.MNISTNode(channels=16, n_steps=3, step_size=0.1, image_size=14).to(DEVICE)

    def objective(images: Tensor) -> Tensor:
        return model(images).square().mean() + model.contraction_penalty(rate=2.0)

    compiled = torch.compile(objective, fullgraph=True)
    for batch in (32, 48, 3):
        images = torch.rand(batch, 1, 14, 14, device=DEVICE)
        torch._dynamo.mark_dynamic(images, 0)
        results = []
        for function in (objective, compiled):
            model.zero_grad()
            loss = served(lambda f=function, x=images: [f(x)])[0]
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        for eager, mine in zip(*results, strict=True):
            assert_close(mine, eager, 2e-3)  # TensorFloat-32 in blocks of other sizes


def test_more_elements_than_32_bits_can_count() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB")
    shape = (2**31 // (64 * 128 * 128) + 3, 64, 128, 128)
    input = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    weight, bias = moved(*random_filters(64, 1, 1, True, torch.bfloat16))
    (found,) = served(lambda: [functional.euler_conv_flow(input, weight, bias, step_size=0.1)])
    for part in (slice(0, 2), slice(-2, None)):
        args = (input[part], weight, bias)
        truth = reference.euler_conv_flow(*(t.double() for t in args), step_size=0.1)
        assert_as_accurate([found[part]], [reference.euler_conv_flow(*args, step_size=0.1)], [truth])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device only")
def test_tensors_of_another_device_than_the_current_one() -> None:
    tensors = [t.to("cuda:1") for t in (random_state((2, 8, 9, 9)), *random_filters(8, 3, 2, True))]
    with torch.cuda.device(0):
        leaves = fresh(*tensors)
        result = served(lambda: [functional.euler_conv_flow(*leaves, step_size=0.1)])[0]
        result.sum().backward()
    truth = reference.euler_conv_flow(*(t.double() for t in tensors), step_size=0.1)
    assert_close(result.detach(), truth, 2e-3)
    assert all(leaf.grad.device == torch.device("cuda:1") and leaf.grad.isfinite().all() for leaf in leaves)
