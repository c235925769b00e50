"""The benchmark runs and refuses a wrong kernel. How fast anything is, is no test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import robust_node_fast as rnf


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_run", Path(__file__).parent.parent / "bench" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_run"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def without_compile(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, flow: Any) -> None:
    contiguous = torch.contiguous_format
    table = {"eager": (rnf.reference.euler_conv_flow, contiguous), "robust_node_fast": (flow, contiguous)}
    monkeypatch.setattr(bench, "providers", lambda: table)


def test_rows_are_complete(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compile(bench, monkeypatch, rnf.functional.euler_conv_flow)
    work = bench.Workload("tiny", 2, 3, 5, 2, 0.1)
    for mode in bench.MODES:
        rows = bench.measure(work, mode, rounds=3)
        assert [row["provider"] for row in rows] == ["eager", "robust_node_fast"]
        assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows)


@pytest.mark.parametrize("fault", [float("nan"), 1e-3])
def test_a_wrong_kernel_gets_no_time(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: float) -> None:
    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return rnf.functional.euler_conv_flow(*args, **kwargs) + fault

    without_compile(bench, monkeypatch, wrong)
    with pytest.raises(SystemExit, match="is wrong on tiny"):
        bench.measure(bench.Workload("tiny", 2, 3, 5, 2, 0.1), "forward", rounds=3)


@pytest.mark.parametrize("backward", [False, True])
def test_digits_flow(benchmark: Any, backward: bool) -> None:
    flow = rnf.nn.EulerConvFlow(8, 10, 0.01)
    x = torch.randn(64, 8, 8, 8)

    def run() -> None:
        out = flow(x)
        if backward:
            out.sum().backward()

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
