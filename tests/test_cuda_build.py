"""The CUDA library as nvcc builds it: what the kernels take of a device, and what a machine without one is told."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from robust_node_fast import _backends, _cuda
from robust_node_fast.bench import cuda_resources

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on the path: the CUDA kernels are not compiled")
needs_library = pytest.mark.skipif(_cuda._native is None, reason=f"the CUDA library is missing: {_cuda._missing}")
without_device = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@needs_nvcc
def test_kernels_spill_nothing_and_take_the_registers_on_record() -> None:
    """One architecture, another in every run, while sources and compiler are those of the record; else all."""
    assert NVCC is not None
    seed = int(os.environ.get("RNF_TEST_SEED", time.time()))
    recorded = cuda_resources.recorded()
    versions, sources = {r.nvcc for r in recorded}, {r.digest for r in recorded}
    known = versions == {cuda_resources.compiler_version(NVCC)} and sources == {cuda_resources.digest()}
    architectures = cuda_resources.ARCHITECTURES
    found = cuda_resources.measure(NVCC, [architectures[seed % 3]] if known else architectures)
    compiled = {r.architecture for r in found}
    assert {r.architecture for r in recorded} == {f"sm_{number}" for number in architectures}
    assert len(compiled) == (1 if known else 3)
    assert [r for r in [*found, *recorded] if r.spill_bytes or r.stack_bytes] == []
    # All in the dynamic part, which a launch sizes and the check on the CPU fills with NaN.
    assert [r for r in found if r.static_shared_bytes] == []
    # So that blocks of 512 threads fit 65536 registers.
    assert [r for r in found if r.registers > 128] == []
    expected = [r for r in recorded if r.architecture in compiled]
    assert {(r.kernel, r.architecture) for r in found} == {(r.kernel, r.architecture) for r in expected}
    if versions != {found[0].nvcc}:
        pytest.skip(f"registers are on record for nvcc {recorded[0].nvcc}, this is {found[0].nvcc}")
    assert found == expected, "python -m robust_node_fast.bench.cuda_resources writes the table anew"


def test_a_changed_kernel_or_flag_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cuda_resources.digest()
    folder = Path(shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "csrc" / "cuda"))
    monkeypatch.setattr(cuda_resources, "ROOT", tmp_path)
    assert cuda_resources.digest() == before
    for name in ("penalty.cu", "convolve.cuh", "geometry.h"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("channels", "channel", 1))
        assert cuda_resources.digest() != before
        (folder / name).write_text(text)
    monkeypatch.setattr(cuda_resources, "FLAGS", ["-O2"])
    assert cuda_resources.digest() != before


@needs_library
def test_library_says_what_it_was_built_for() -> None:
    info = importlib.import_module("robust_node_fast._cuda_C").build_info()
    assert set(info["architectures"]) <= {"sm_80", "sm_90", "sm_100"}
    assert info["architectures"]
    assert float(info["cuda"]) >= 11


@needs_library
@without_device
def test_a_call_without_a_device_says_so() -> None:
    assert _cuda.missing() is None
    assert _cuda.refuses("euler_conv_flow", torch.float32, (0, 3, 4, 4), 3) == "finds no CUDA device"
    native = importlib.import_module("robust_node_fast._cuda_C")
    nowhere = (0, (1, 1, 1, 1))
    sizes = [1, 3, 4, 4, 3, 1]
    calls = (
        lambda: native.shared_memory_limit(0),
        lambda: native.flow_forward(0, 0, 0, sizes, False, 0.1, 0.1, nowhere, 0, None, nowhere, None, None),
        lambda: native.contraction_penalty(0, 0, 1, 1, 3, 3, 1.0, 0.1, 1.0, 0, 0, 0, 0, 0, lambda size: 0),
        lambda: native.contraction_penalty_backward(0, 0, 2, 1, 3, 3, 0, False, 0, 0, 0),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="there is no CUDA device that can be used: "):
            call()


def test_without_the_library_a_call_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_native", None)
    monkeypatch.setattr(_cuda, "_missing", "no module")
    reason = _cuda.missing()
    assert reason is not None
    assert "the CUDA library is missing (no module): reinstall with nvcc" in reason
    with pytest.raises(RuntimeError, match="the CUDA library is missing"):
        _cuda.contraction_penalty(torch.zeros(1, 3, 3, 3, 3), 1.0, 0.1, 1.0, "2", "sum")


@pytest.mark.parametrize(
    ("setting", "hidden", "line"),
    [
        ("auto", True, "robust_node_fast: no nvcc: the CUDA kernels are not built"),
        ("0", False, "robust_node_fast: RNF_CUDA=0 is set: the CUDA kernels are not built"),
        ("1", True, "robust_node_fast: no nvcc, and RNF_CUDA=1 asks for the CUDA kernels"),
    ],
)
def test_a_build_without_nvcc_says_so_or_fails(setting: str, hidden: bool, line: str, tmp_path: Path) -> None:
    """As far as the choice of what to build; the path still has a C++ compiler."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("c++", "g++", "clang++", "uname"):
        found = shutil.which(tool)
        if found is not None:
            (tools / tool).symlink_to(found)
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "RNF_BUILD")} | {"RNF_CUDA": setting}
    if hidden:
        environment["PATH"] = str(tools)
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert line in done.stderr
    assert (done.returncode != 0) == (setting == "1")


def a_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> SimpleNamespace:
    """What the back end asks the library and PyTorch about a card."""
    info = {"architectures": ["sm_80", "sm_90", "sm_100"]}
    card = SimpleNamespace(shared_memory_limit=lambda device: 166_912, build_info=lambda: info)
    card.flow_shared_bytes = lambda *_: 1
    _cuda._unusable.cache_clear()
    monkeypatch.setattr(_cuda, "_native", card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return card


def test_a_card_that_the_library_has_no_code_for_or_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton may know it, and PyTorch's driver be older than the toolkit of this build."""

    def choice(op: str) -> tuple[str, str]:
        sizes = (0, 8, 28, 28) if op.startswith("euler") else (0,)
        name, why_not = _backends._resolve(_backends.Call(op, "cuda", torch.float32, 3, sizes))
        return name, why_not.get("cuda", "")

    pytest.importorskip("triton")
    for op in ("euler_conv_flow", "contraction_penalty"):
        a_card(monkeypatch, (7, 5))
        assert choice(op) == ("triton", "has code from sm_80 on, the device is sm_75")
        card = a_card(monkeypatch)
        assert choice(op) == ("cuda", "")

        def refuse(device: int) -> int:
            raise RuntimeError("robust_node_fast: CUDA driver version is insufficient\nand more")

        _cuda._unusable.cache_clear()
        card.shared_memory_limit = refuse
        expected = "cannot use device 0 (robust_node_fast: CUDA driver version is insufficient)"
        assert choice(op) == ("triton", expected)
    _cuda._unusable.cache_clear()


@needs_library
@pytest.mark.parametrize(
    ("op", "sizes", "dtype", "kernel_size", "expected"),
    [
        ("euler_conv_flow", (0, 8, 28, 28), torch.float32, 3, "cuda"),
        ("euler_conv_flow_backward", (0, 8, 28, 28), torch.float32, 3, "cuda"),
        ("euler_conv_flow", (0, 8, 28, 28), torch.bfloat16, 3, "cuda"),
        ("euler_conv_flow_backward", (0, 8, 28, 28), torch.float16, 3, "cuda"),
        ("euler_conv_flow", (0, 8, 28, 28), torch.float32, 5, "cuda"),
        ("euler_conv_flow", (0, 8, 28, 28), torch.bfloat16, 5, "triton"),
        ("euler_conv_flow", (0, 8, 28, 28), torch.float16, 1, "triton"),
        ("euler_conv_flow", (0, 32, 32, 32), torch.float32, 3, "triton"),
        ("euler_conv_flow", (0, 32, 32, 32), torch.bfloat16, 3, "triton"),  # shared memory holds float32
        ("euler_conv_flow", (0, 128, 8, 8), torch.float32, 3, "triton"),
        ("contraction_penalty", (0, 128, 128, 3, 3), torch.float32, 3, "cuda"),
        ("contraction_penalty_backward", (0, 128, 128, 5, 5), torch.bfloat16, 5, "cuda"),
        ("smooth_leaky_relu", (0, 8, 28, 28), torch.float32, None, "triton"),
        ("euler_conv_flow", (0, 8, 28, 28), torch.float64, 3, "reference"),
    ],
)
def test_who_runs_on_a_device_with_the_shared_memory_of_an_a100(
    op: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    kernel_size: int | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    bytes_of = importlib.import_module("robust_node_fast._cuda_C").flow_shared_bytes
    card = a_card(monkeypatch)
    monkeypatch.setattr(card, "flow_shared_bytes", bytes_of)
    name, why_not = _backends._resolve(_backends.Call(op, "cuda", dtype, kernel_size, sizes))
    assert name == expected
    assert name not in why_not
    if expected == "triton" and dtype != torch.float32 and kernel_size != 3:
        assert "in 16 bits with k = 3, not of (8, 28, 28)" in why_not["cuda"]
    if sizes == (0, 32, 32, 32):
        assert "bytes of shared memory for (32, 32, 32), 166912 there are" in why_not["cuda"]
