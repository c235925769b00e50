"""Throughput and scaling: the commands run, say what they leave out, and the pages hold the figures of the files."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import needs_kernels

from robust_node_fast.bench import scaling, throughput, verify
from robust_node_fast.bench.registry import OURS
from robust_node_fast.bench.report import replace_tables
from robust_node_fast.bench.rows import read_as
from robust_node_fast.bench.throughput import MemoryRow, Row
from robust_node_fast.bench.together import Failed, together
from robust_node_fast.models import CIFARNode, StagedCIFARNode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)


# --- processes ---------------------------------------------------------------------------------------------------


def rank_and_sum() -> tuple[int, float, int]:
    total = torch.ones(2)
    dist.all_reduce(total)
    return dist.get_rank(), float(total[0]), torch.get_num_threads()


def fail(how: str) -> None:
    if how == "raise":
        raise ValueError("no such thing\nand more")
    if how == "die":
        os._exit(3)
    time.sleep(60)


@needs_gloo
def test_processes_are_joined() -> None:
    assert together(rank_and_sum, 2, threads=2, timeout=120) == [(0, 2.0, 2), (1, 2.0, 2)]


@pytest.mark.parametrize(
    ("how", "said"), [("raise", "ValueError: no such thing$"), ("die", "the process died"), ("hang", "no result after")]
)
def test_a_process_without_a_result_is_said(how: str, said: str) -> None:
    with pytest.raises(Failed, match=said):
        together(fail, 1, how, timeout=6 if how == "hang" else 120)


# --- throughput --------------------------------------------------------------------------------------------------


@needs_kernels
@needs_gloo
def test_the_command_runs(tmp_path: Path) -> None:
    throughput.main(minutes=5, output=tmp_path, smoke=True)
    rows, memory = (
        read_as(kind, tmp_path / name)
        for kind, name in ((Row, throughput.RESULTS), (MemoryRow, throughput.MEMORY_RESULTS))
    )
    assert {(row.mode, row.processes, row.provider) for row in rows} == {
        (mode, processes, name) for mode in throughput.MODES for processes in (1, 2) for name in ("eager", OURS)
    }
    for row in rows:
        assert row.status == "ok", row
        assert row.machine
        assert row.time
        assert row.rounds >= 2
        assert row.images_per_s == pytest.approx(row.batch / row.seconds, rel=1e-2)
    assert {row.status for row in memory} <= {"measured", "computed"}
    measured = [row for row in memory if row.status == "measured"]
    assert len(measured) == 4
    assert all(row.peak_mb > 0 and row.resident_mb > 50 for row in measured)
    assert all(len(lines) > 0 for name, lines in throughput.tables(rows, memory).items() if name != "reasons")


@pytest.mark.parametrize("net", throughput.SMOKE_NETS)
def test_a_wrong_network_is_seen(net: throughput.Net, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput.check(net)
    build = throughput.Net.build

    def wrong(self: throughput.Net, way: Any) -> Any:
        network = build(self, way)
        if way.ours:
            with torch.no_grad():
                network.get_parameter("fc1.bias")[0] += 1e-2
        return network

    monkeypatch.setattr(throughput.Net, "build", wrong)
    with pytest.raises(verify.WrongResult, match=f"{OURS} is wrong on {net.name}"):
        throughput.check(net)


def row(provider: str, batch: int, seconds: float) -> Row:
    return Row("n", throughput.TRAINING, batch, 1, 2, provider, "ok", seconds=seconds)


def runner(end: float = math.inf) -> throughput.Runner:
    rows = [row("eager", 128, 3.0), row("torch.compile", 128, 2.0), row(OURS, 128, 1.0)]
    return throughput.Runner(throughput.NETS, throughput.WAYS, (128, 512, 8192), end, [], rows)


@pytest.mark.parametrize(
    ("provider", "batch", "gib", "why"),
    [
        (OURS, 512, None, ""),
        ("torch.compile", 512, 15.0, ""),
        ("eager", 512, None, "skipped: slower than torch.compile at batch 128"),
        ("torch.compile", 8192, None, "skipped: a step would take about 128 s"),
        (OURS, 8192, None, "skipped: a step would take about 64 s"),
        (OURS, 512, 17.0, "skipped: would need 17 GiB"),
    ],
)
def test_what_is_skipped_and_why(provider: str, batch: int, gib: float | None, why: str) -> None:
    asked = dataclasses.replace(row(provider, batch, 0.0), expected_gib=gib)
    assert runner().skipped(asked) == why
    assert runner(end=0.0).skipped(asked) == "skipped: the minutes were over"


def test_the_largest_batch_is_on_the_line_through_the_measured_ones() -> None:
    rows = [
        MemoryRow("n", "p", "measured", batch, resident_mb=100.0, peak_mb=24.0 + 10.0 * batch) for batch in (16, 64)
    ]
    assert throughput.Line.of(rows[:1], "n", "p") is None
    rows.append(MemoryRow("n", "p", "computed", 390, 4, 100.0, 3000.0))  # is no point of the line
    line = throughput.Line.of(rows, "n", "p")
    assert line == throughput.Line(124.0, 10.0)
    rows.append(MemoryRow("n", "p", "measured", 8, resident_mb=90.0, peak_mb=24.0))  # nor is a smaller batch
    assert throughput.Line.of(rows, "n", "p") == line
    assert line.largest(4) == 397
    assert line.gib(397) <= 4 < line.gib(398)


# --- scaling -----------------------------------------------------------------------------------------------------

NETWORKS = [scaling.Network.of(CIFARNode()), scaling.Network.of(StagedCIFARNode())]


@pytest.mark.parametrize("algorithm", ["ring", "tree"])
def test_all_reduce(algorithm: str) -> None:
    assert scaling.all_reduce(1, 1e9, algorithm) == 0.0
    times = [scaling.all_reduce(cards, 1e6, algorithm) for cards in scaling.CARDS]
    assert times == sorted(times)
    far = scaling.all_reduce(1024, 1e12, algorithm)  # bandwidth alone: everything goes out and comes in once
    assert far == pytest.approx(2e12 / (scaling.BUS * scaling.NODE * scaling.NETWORK), rel=0.2)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
@pytest.mark.parametrize("plan", scaling.PLANS, ids=lambda plan: plan.name)
def test_gradients_are_sent_once_and_in_order(network: scaling.Network, plan: scaling.Plan) -> None:
    backward = [3.0, 2.0, 1.0][: len(network.flows)]
    ready = scaling.gradients(network, plan, backward)
    assert sum(size for _, size in ready) == pytest.approx(plan.itemsize * network.parameters)
    moments = [moment for moment, _ in ready]
    assert moments == sorted(moments)
    assert moments[0] == 0.0  # the head
    assert moments[-1] == sum(backward)  # the stem
    assert network.gradients[0] == (
        next(iter(CIFARNode().parameters())).numel() // 128 * network.flows[0].channels,
        0,
        False,
    )


def test_what_backward_hides() -> None:
    def second(size: float) -> float:
        return 1.0

    assert scaling.exposed([(0.0, 1.0)], second, end=2.0) == (1.0, 0.0)
    assert scaling.exposed([(0.0, 1.0), (2.0, 1.0)], second, end=2.0) == (2.0, 1.0)
    assert scaling.exposed([(0.0, 1.0)] * 5, second, end=2.0) == (5.0, 3.0)


def test_efficiency_begins_at_one_and_communication_never_helps() -> None:
    rows = scaling.predictions()
    for found in rows:
        assert 0 <= found.exposed_ms <= found.communication_ms + 1e-9
        if found.cards == 1:
            assert found.communication_ms == 0
            assert found.efficiency >= (1 if found.plan != "4 batches a step" else 0.9)
    assert {found.cards for found in rows} == set(scaling.CARDS)


@needs_kernels
@needs_gloo
def test_one_and_two_processes_are_measured() -> None:
    checks = scaling.measure(smoke=True)
    assert [check.processes for check in checks if check.network] == [1, 2]
    assert all(check.measured_ms > 0 and check.predicted_ms > 0 and check.machine for check in checks)


# --- pages -------------------------------------------------------------------------------------------------------


def test_committed_scaling_table_is_the_model_of_now(tmp_path: Path) -> None:
    scaling.write(scaling.predictions(), tmp_path / "now.csv", scaling.Prediction)
    assert (RESULTS / scaling.RESULTS).read_text() == (tmp_path / "now.csv").read_text()


@pytest.mark.parametrize("name", ["throughput", "scaling"])
def test_tables_of_the_page_come_from_the_committed_results(name: str, tmp_path: Path) -> None:
    if name == "throughput":
        tables = throughput.tables(
            read_as(Row, RESULTS / throughput.RESULTS), read_as(MemoryRow, RESULTS / throughput.MEMORY_RESULTS)
        )
    else:
        tables = scaling.tables(
            read_as(scaling.Prediction, RESULTS / scaling.RESULTS), read_as(scaling.Check, RESULTS / scaling.MEASURED)
        )
    page, again = ROOT / "docs" / f"{name}.md", tmp_path / "page.md"
    again.write_text(page.read_text())
    replace_tables(again, tables)
    assert again.read_text() == page.read_text()
    with pytest.raises(ValueError, match="has no place for the table other"):
        replace_tables(again, {"other": []})
