"""The GPU benchmark's own logic, on the CPU with a clock of its own: verification, ratios, the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from robust_node_fast.bench import gpu, verify
from robust_node_fast.bench.registry import TIMED, Workload

WORK = Workload("tiny", "bars", 2, 4, 6, 5, 2)
CPU = torch.device("cpu")


def timer(call: Callable[[], Any]) -> tuple[float, float, float]:
    call()
    return 1.0, 2.0, 3.0


@pytest.fixture
def eager_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WAYS", tuple(way for way in gpu.WAYS if not way.compiled))


@pytest.mark.usefixtures("eager_ways")
@pytest.mark.parametrize("mode", TIMED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_is_verified_and_timed(mode: str, dtype: str, tmp_path: Path) -> None:
    rows = gpu.measure(replace(WORK, dtype=dtype), mode, CPU, timer, rate=1e9, card="none")
    assert [row.status for row in rows] == ["ok"] * len(gpu.WAYS)
    for row in rows:
        assert row.error is not None
        assert row.p50_ms == 2.0
        assert row.best_pytorch_over_this == row.eager_over_this == 1.0
        assert row.matmul_share == pytest.approx(WORK.flop(mode) / 2e-3 / 1e9)
    gpu.write(rows, tmp_path / "gpu.csv")
    assert len((tmp_path / "gpu.csv").read_text().splitlines()) == len(rows) + 1


@pytest.mark.usefixtures("eager_ways")
@pytest.mark.parametrize("ours", [True, False])
def test_a_wrong_result_gets_no_time(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = gpu.Way.prepare

    def wrong(self: gpu.Way, *args: Any) -> Any:
        prepared = prepare(self, *args)
        broken = self.ours if ours else self.name == "eager channels_last"
        return replace(prepared, call=lambda: tuple(t * 1.001 for t in prepared.call())) if broken else prepared

    monkeypatch.setattr(gpu.Way, "prepare", wrong)
    if ours:
        with pytest.raises(verify.WrongResult, match="robust_node_fast is wrong on tiny, forward"):
            gpu.measure(WORK, "forward", CPU, timer, rate=1e9, card="none")
    else:
        rows = gpu.measure(WORK, "forward", CPU, timer, rate=1e9, card="none")
        assert [row.provider for row in rows if row.status.startswith("wrong")] == ["eager channels_last"]
        assert all(row.p50_ms is None for row in rows if row.status != "ok")
