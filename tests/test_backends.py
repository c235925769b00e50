"""The choice of an implementation: information, switches, loud fall-backs, instruction sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

import robust_node_fast as rnf
from robust_node_fast import _backends

F = rnf.functional
compiled = pytest.mark.skipif(
    _backends._BACKENDS["cpu"].unavailable is not None, reason=f"{_backends._BACKENDS['cpu'].unavailable}"
)


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    _backends._warned.clear()
    yield
    rnf.set_backend("auto")
    _backends._warned.clear()


def call(kernel_size: int = 3, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    x = torch.randn(2, 3, 6, 6, dtype=dtype, device=device)
    w = torch.randn(2, 3, 3, kernel_size, kernel_size, dtype=dtype, device=device) / 9
    return F.euler_conv_flow(x, w, step_size=0.1)


def fallbacks(**kwargs: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(**kwargs)  # type: ignore[arg-type]
    return [str(c.message) for c in caught if issubclass(c.category, rnf.FallbackWarning)]


@compiled
def test_covered_calls_do_not_warn() -> None:
    for k in (1, 3, 5):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert fallbacks(kernel_size=k, dtype=dtype) == []


@compiled
def test_an_uncovered_kernel_size_warns_once_and_is_right() -> None:
    (message,) = fallbacks(kernel_size=7)
    assert "7" in message
    assert "euler_conv_flow" in message
    assert fallbacks(kernel_size=7) == []
    x, w = torch.randn(1, 2, 9, 9), torch.randn(1, 2, 2, 7, 7) / 10
    torch.testing.assert_close(
        F.euler_conv_flow(x, w, step_size=0.1), rnf.reference.euler_conv_flow(x, w, step_size=0.1)
    )


@compiled
def test_strict_raises_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNF_STRICT", "1")
    with pytest.raises(RuntimeError, match="RNF_STRICT"):
        call(kernel_size=7)
    call(kernel_size=3)


def test_the_reference_on_request_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNF_STRICT", "1")
    rnf.set_backend("reference")
    assert fallbacks(kernel_size=7) == []
    assert rnf.backend_info()["ops"]["euler_conv_flow"]["cpu"]["implementation"] == "reference"


def test_unknown_and_unusable_backends_are_refused() -> None:
    with pytest.raises(ValueError, match=r"backend='gpu' is unknown.*'auto'"):
        rnf.set_backend("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"triton.*(no CUDA or ROCm device|not installed|cannot be imported)"):
            rnf.set_backend("triton")
    assert rnf.backend_info()["backend"] == "auto"


def test_info_names_every_op_and_why_others_were_passed_over() -> None:
    info = rnf.backend_info()
    json.dumps(info)
    assert {"euler_conv_flow", "euler_conv_flow_backward", "euler_conv_step", "contraction_penalty"} <= set(info["ops"])
    assert info["backends"]["cuda"]["dtypes"] == ["float32", "float16", "bfloat16"]
    for name, backend in info["backends"].items():
        assert backend["available"] == (backend["reason"] is None), name
    cuda = info["ops"]["euler_conv_flow"]["cuda"]
    assert cuda["implementation"] in {"cuda", "triton", "reference"}
    assert cuda["implementation"] not in cuda["why_not"]
    assert cuda["why_not"]["cpu"] == "serves cpu tensors, not cuda"


def test_environment_sets_the_backend() -> None:
    code = "import robust_node_fast as r; print(r.backend_info()['backend'])"
    for name in ("reference", "auto"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "RNF_BACKEND": name},
        )
        assert done.stdout.strip() == name


@compiled
@pytest.mark.parametrize("isa", rnf.backend_info()["backends"]["cpu"].get("supported_isas", []))
def test_every_instruction_set_agrees(isa: str) -> None:
    """In a fresh process, since the set is chosen once; float64 leaves no room for another algorithm's rounding.

    In bfloat16 the error is at most twice PyTorch's.
    """
    code = """
import torch, robust_node_fast as r
print(r.backend_info()["backends"]["cpu"]["isa"])
torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
    for c, k in ((1, 3), (8, 3), (13, 5), (4, 1), (35, 3)):
        args = [torch.randn(3, c, 11, 9), torch.randn(3, c, c, k, k) / (c * k * k) ** 0.5, torch.randn(3, c)]
        grads = []
        for f in (r.functional.euler_conv_flow, r.reference.euler_conv_flow):
            tensors = [t.to(dtype).requires_grad_() for t in args]
            out = f(*tensors, step_size=0.1)
            grads.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        for a, b in zip(*grads):
            assert a.isfinite().all() and (a - b).abs().max() <= tolerance * b.abs().max(), (dtype, c, k)
for c in (32, 64):
    args = [torch.randn(3, c, 11, 9), torch.randn(3, c, c, 3, 3) / (9 * c) ** 0.5, torch.randn(3, c)]
    grads = []
    for f, dtype in ((r.functional.euler_conv_flow, torch.bfloat16), (r.reference.euler_conv_flow, torch.bfloat16),
                     (r.reference.euler_conv_flow, torch.float64)):
        tensors = [t.bfloat16().to(dtype).requires_grad_() for t in args]
        out = f(*tensors, step_size=0.1)
        grads.append([t.double() for t in (out, *torch.autograd.grad(out.sum(), tensors))])
    for ours, theirs, exact in zip(*grads):
        assert ours.isfinite().all() and (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max(), c
"""
    env = {**os.environ, "RNF_CPU_ISA": isa, "RNF_STRICT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@compiled
def test_an_unknown_instruction_set_counts_as_none() -> None:
    code = "import robust_node_fast as r; print(r.backend_info()['backends']['cpu']['isa'])"
    env = {name: value for name, value in os.environ.items() if name != "RNF_CPU_ISA"}
    chosen = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=each).stdout
        for each in (env, {**env, "RNF_CPU_ISA": "avx9000"}, {**env, "RNF_CPU_ISA": ""})
    }
    assert len(chosen) == 1
