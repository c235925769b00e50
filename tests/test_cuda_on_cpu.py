"""The CUDA kernels executed on the CPU: the .cu files as they are, over the stand-in in tests/native/cuda_shim.

What this cannot see: most races between blocks, which run one after another here, and anything that is about speed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import LAYOUTS, NORMS, REDUCTIONS, assert_close, far_apart, max_error, random_filters, random_state
from torch import Tensor

from robust_node_fast import _cuda, _ops, reference

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
NATIVE = ROOT / "tests" / "native"
KERNELS = sorted(CUDA.glob("*.cu"))
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # of nvcc
    "-fno-omit-frame-pointer",
    f"-I{NATIVE / 'cuda_shim'}",
]
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ULPS = 1
OPTIONS = "malloc_fill_byte=255:max_malloc_fill_size=4194304"


def build(folder: Path, sources: Sequence[Path], flags: Sequence[str], target: str, link: Sequence[str] = ()) -> Path:
    """Compile side by side, link; what an earlier call compiled in this folder is used again."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")

    def compile_one(source: Path) -> Path:
        compiled = folder / f"{source.stem}.o"
        if not compiled.exists():
            command = [compiler, *FLAGS, *flags, "-c", "-x", "c++", str(source), "-o", str(compiled)]
            subprocess.run(command, check=True, timeout=300)
        return compiled

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([compiler, *flags, *map(str, objects), "-o", str(folder / target), *link], check=True)
    return folder / target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    return build(folder, [*KERNELS, NATIVE / "check_cuda.cpp"], [], "check_cuda")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": OPTIONS}
    return subprocess.run(
        [str(program), *arguments], check=False, capture_output=True, text=True, timeout=300, env=environment
    )


def test_kernels_are_clean_and_right(tmp_path: Path) -> None:
    sanitized = build(tmp_path, [*KERNELS, NATIVE / "check_cuda.cpp"], SANITIZERS, "check_cuda")
    done = run(sanitized)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " 0 failures" in done.stdout


def test_kernels_are_right_in_the_other_order_of_threads_and_blocks(program: Path) -> None:
    done = run(program, "reverse")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " 0 failures" in done.stdout


def test_every_barrier_is_needed_and_missed(program: Path) -> None:
    """Without any one barrier the check fails in one order of the threads or the other."""
    sites = re.findall(r"^barrier (.*)$", run(program, "quick", "sites").stdout, re.MULTILINE)
    assert len(sites) == sum(path.read_text().count("__syncthreads();") for path in CUDA.iterdir())
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda site: any(run(program, "quick", f"skip={site}", *order).returncode for order in ([], ["reverse"])),
            sites,
        )
    assert [site for site, missed in zip(sites, found, strict=True) if not missed] == []


# ---------------------------------------------------------------------------------------------------------------------
# _cuda.py and the glue, with CPU tensors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module(folder: Path) -> object:
    pybind11 = pytest.importorskip("pybind11")
    flags = [
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_paths()['include']}",
        '-DRNF_CUDA_VERSION="none"',
        '-DRNF_CUDA_ARCHITECTURES="sm_80"',
    ]
    library = build(folder, [*KERNELS, NATIVE / "cuda_module.cpp"], flags, "_cuda_C.so", ["-shared"])
    spec = importlib.util.spec_from_file_location("_cuda_C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_cpu(module: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``_cuda`` works on CPU tensors; all memory it allocates is NaN at first."""
    monkeypatch.setattr(_cuda, "_native", module)
    monkeypatch.setattr(_cuda, "_queue", lambda tensor: (0, 0))
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def assert_as_reference(name: str, *args: object) -> None:
    """The op on the CUDA road against the reference in float64, in the layout that the contract promises.

    float32 to the rounding of its sums; 16 bits with at most twice the error that PyTorch makes in them.
    """
    found = _cuda.IMPLEMENTATIONS[name](*args)
    same_dtype = _ops._DIFFERENTIABLE[name](*args)
    exact = _ops._DIFFERENTIABLE[name](*(a.double() if isinstance(a, Tensor) else a for a in args))
    promised = _ops._FAKES[name](*args)
    if isinstance(found, Tensor):
        found, same_dtype, exact, promised = (found,), (same_dtype,), (exact,), (promised,)
    for actual, theirs, wanted, template in zip(found, same_dtype, exact, promised, strict=True):
        assert actual.shape == template.shape
        assert actual.stride() == template.stride()
        assert actual.dtype == template.dtype
        if actual.dtype == torch.float32 and args[0].dtype == torch.float32:
            assert_close(actual, wanted, 4e-6)
        else:
            scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
            allowed = 2 * max_error(theirs, wanted) + ULPS * torch.finfo(actual.dtype).eps * scale
            error = max_error(actual, wanted)
            assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
def test_flow_and_its_gradients(layout: str, shared: bool, dtype: torch.dtype) -> None:
    x = random_state((3, 17 if layout == "sliced" else 5, 6, 5), layout, dtype)
    steps = 3
    weight, bias = random_filters(x.shape[1], 3, None if shared else steps, not shared, dtype)
    settings = (0.1, 0.2, steps)
    trajectory = layout in ("contiguous", "expanded")
    assert_as_reference("euler_conv_flow", x, weight, bias, *settings, trajectory)
    grad = torch.randn(steps + 1, *x.shape).to(dtype) if trajectory else random_state(x.shape, layout, dtype)
    for mask in ([True, True, True], [True, False, False], [False, True, False], [False, False, True], [False] * 3):
        assert_as_reference("euler_conv_flow_backward", grad, x, weight, bias, *settings, trajectory, mask)
    expanded = torch.tensor(0.5, dtype=dtype).expand(grad.shape)
    assert_as_reference("euler_conv_flow_backward", expanded, x, weight, bias, *settings, trajectory, [True] * 3)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 18])
def test_gradients_from_what_was_saved(channels: int, dtype: torch.dtype) -> None:
    x = random_state((2, channels, 4, 5), dtype=dtype)
    weight, bias = random_filters(channels, 3, 2, True, dtype)
    for save_states in (True, False):
        assert_as_reference("euler_conv_flow_saving", x, weight, bias, 0.1, 0.2, 2, save_states)
    _, states, slopes = _cuda.euler_conv_flow_saving(x, weight, bias, 0.1, 0.2, 2, True)
    args = torch.randn_like(x), x, weight, bias, 0.1, 0.2, 2, False
    assert_as_reference("euler_conv_flow_backward", *args, [True, True, True], states, slopes)
    assert_as_reference("euler_conv_flow_backward", *args, [True, False, True], None, slopes)
    with pytest.raises(ValueError, match="takes the states"):
        _cuda.euler_conv_flow_backward(*args, [True, True, True], None, slopes)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", _cuda.DTYPES)
def test_the_state_of_a_single_step_may_be_its_input(dtype: torch.dtype) -> None:
    x, (weight, bias) = random_state((3, 6, 7, 5), dtype=dtype), random_filters(6, 3, 1, True, dtype)
    args, grad = (x, weight, bias, 0.1, 0.2, 1), torch.randn(x.shape).to(dtype)
    _, states, slopes = _cuda.euler_conv_flow_saving(*args, True)
    saved, given = (
        _cuda.euler_conv_flow_backward(grad, *args, False, [True] * 3, kept, slopes) for kept in (states, x[None])
    )
    assert all(map(torch.equal, saved, given))


@pytest.mark.usefixtures("on_cpu")
def test_elements_further_apart_than_32_bits_can_count(tmp_path: Path) -> None:
    x = far_apart(tmp_path)
    weight, bias = random_filters(3, 3, 2, True, x.dtype)
    assert_as_reference("euler_conv_flow", x, weight, bias, 0.1, 0.2, 2, True)
    assert_as_reference("euler_conv_flow_backward", x, x, weight, bias, 0.1, 0.2, 2, False, [True] * 3)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("kernel", "dtype"), [(1, torch.float32), (5, torch.float32), *((3, d) for d in DTYPES)])
def test_step_and_empty_batch(kernel: int, dtype: torch.dtype) -> None:
    weight, bias = random_filters(4, kernel, None, True, dtype)
    for batch in (2, 0):
        x = random_state((batch, 4, 5, 3), dtype=dtype)
        assert_as_reference("euler_conv_step", x, weight, bias, 0.1, 0.2)
        assert_as_reference("euler_conv_step_backward", torch.randn_like(x), x, weight, bias, 0.1, 0.2, [True] * 3)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_those_of_float32_rounded_once(dtype: torch.dtype) -> None:
    """To the bit: nothing between a tensor and another one is in 16 bits. PyTorch rounds what float32 gives."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(64, 1, 32, 32)  # NaN and infinity too
    identity = torch.zeros(1, 1, 1, 3, 3)
    identity[..., 1, 1] = 1.0
    flow = _cuda.euler_conv_flow
    for step_size in (0.37, 1e-6):
        args = every, identity.to(dtype), None, step_size, 0.1, 1, False
        wide = flow(every.float(), identity, *args[2:]).to(dtype)
        assert torch.equal(flow(*args).nan_to_num(12.0, 3.0, 4.0), wide.nan_to_num(12.0, 3.0, 4.0))
    x, (weight, bias) = random_state((3, 6, 7, 5), "sliced", dtype), random_filters(6, 3, 3, True, dtype)
    args = x, weight, bias, 0.3, 0.1, 3
    wide_args = *(t.float() for t in args[:3]), *args[3:]
    for trajectory in (False, True):
        assert torch.equal(flow(*args, trajectory), flow(*wide_args, trajectory).to(dtype))
    saved = _cuda.euler_conv_flow_saving(*args, True)
    for mine, wide in zip(saved, _cuda.euler_conv_flow_saving(*wide_args, True), strict=True):
        assert torch.equal(mine, wide.to(mine.dtype))
    grad = torch.randn(x.shape).to(dtype)
    again = _cuda.euler_conv_flow_backward(grad, *args, False, [True] * 3)
    kept = _cuda.euler_conv_flow_backward(grad, *args, False, [True] * 3, *saved[1:])
    assert all(map(torch.equal, again, kept))  # what is computed again is kept as if it had been saved
    if dtype == torch.float16:  # keeps it in float32
        wide_grads = _cuda.euler_conv_flow_backward(grad.float(), *wide_args, False, [True] * 3)
        assert all(torch.equal(mine, wide.to(dtype)) for mine, wide in zip(again, wide_grads, strict=True))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_penalty_and_its_gradient(norm: str, reduction: str, dtype: torch.dtype) -> None:
    for steps in (3, None):
        weight = random_filters(9, 3, steps, False, dtype)[0].transpose(-1, -2)  # not contiguous
        args = weight, 0.5, 0.1, 1.0, norm, reduction
        assert_as_reference("contraction_penalty", *args)
        value, coefficients = reference.penalty_coefficients(weight, 0.5, (0.1, 1.0), norm, reduction)
        assert_as_reference("contraction_penalty_backward", torch.rand_like(value), weight, coefficients)


@pytest.mark.usefixtures("on_cpu")
def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _cuda._unusable.cache_clear()
    for dtype in DTYPES:
        assert _cuda.refuses("euler_conv_flow", dtype, (0, 8, 28, 28), 3) is None
        assert _cuda.refuses("contraction_penalty", dtype, (0,), 5) is None
        for state in ((32, 64, 64), (33, 4, 4)):
            assert str(state) in (_cuda.refuses("euler_conv_flow", dtype, (0, *state), 3) or "")
        for sizes in ((0, 8, 28, 28), ()):
            refused = _cuda.refuses("euler_conv_flow", dtype, sizes, 5)
            assert refused is None if dtype == torch.float32 else "in 16 bits with k = 3" in (refused or "")
    weight, _ = random_filters(3, 5, 1, False, torch.bfloat16)
    with pytest.raises(ValueError, match="no CUDA kernel for this shape and dtype"):
        _cuda.euler_conv_flow(random_state((1, 3, 4, 4), dtype=weight.dtype), weight, None, 0.1, 0.1, 1, False)
    weight, _ = random_filters(33, 3, 1, bias=False)
    with pytest.raises(ValueError, match="no CUDA kernel for this shape and dtype"):
        _cuda.euler_conv_flow(random_state((1, 33, 4, 4)), weight, None, 0.1, 0.1, 1, False)
    weight, _ = random_filters(32, 3, 1, bias=False)
    with pytest.raises(ValueError, match="does not fit into the shared memory"):
        _cuda.euler_conv_flow(random_state((1, 32, 32, 32)), weight, None, 0.1, 0.1, 1, False)
    weight, _ = random_filters(3, 3, 1, bias=False)
    half = random_state((1, 3, 4, 4), dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="weight has dtype float32, expected bfloat16"):
        _cuda.euler_conv_flow(half, weight, None, 0.1, 0.1, 1, False)
    with pytest.raises(TypeError, match="expected one of float32, float16, bfloat16"):
        _cuda.euler_conv_flow(random_state((1, 3, 4, 4), dtype=torch.float64), weight, None, 0.1, 0.1, 1, False)
    with pytest.raises(ValueError, match="does not fit 4 channels"):
        _cuda.euler_conv_flow(random_state((1, 4, 4, 4)), weight, None, 0.1, 0.1, 1, False)
    grad, x = torch.zeros(1, 3, 4, 5), random_state((1, 3, 4, 4))
    with pytest.raises(ValueError, match="grad_output has shape"):
        _cuda.euler_conv_flow_backward(grad, x, weight, None, 0.1, 0.1, 1, False, [True] * 3)
