"""The benchmark runs, covers what it says, and refuses a wrong kernel. How fast anything is, is no test."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import robust_node_fast as rnf
from robust_node_fast import cli
from robust_node_fast.bench import capability, memory, plot, providers, registry, report, rows, run, verify
from robust_node_fast.bench.registry import EAGER, OURS, Workload

# Compiling takes minutes; what torch.compile does to the reference is tested nowhere better than in a real run.
QUICK = ("eager", "eager channels_last", "torchdiffeq euler", "OpenVINO", "ONNX Runtime", OURS)
TINY = Workload("tiny", "bars", 2, 3, 5, 6, 2, providers=QUICK)
STEP = Workload("tiny step", "bars", 1, 16, 8, 8, 1, ("forward",), ("eager", "ncnn (convolution only)", OURS))
SCALING = Workload("tiny threads", "scaling", 4, 8, 8, 8, 2, threads=(1, 2), sweep="threads", providers=("eager", OURS))
PENALTY = dataclasses.replace(
    next(work for work in registry.WORKLOADS if work.kind == "penalty"),
    n_steps=2,
    providers=("eager", "penalty loop", OURS),
)


def measure(work: Workload, mode: str = "forward") -> list[rows.Row]:
    return run.measure(work, mode, threads=1, seconds=0.0, rounds=2)


@pytest.fixture(autouse=True, scope="module")
def no_machine_rates() -> Iterator[None]:
    """Measuring the machine takes seconds, and tells a test nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "machine_rates", lambda threads: (100.0, 10.0))
        yield


class Faulty(providers.Ours):
    """Our flow plus a fault; a competitor when it has another name."""

    def __init__(self, fault: Callable[[torch.Tensor], torch.Tensor], name: str = OURS) -> None:
        super().__init__(name, recompute=None)
        self.fault = fault

    def prepare(self, problem: registry.Problem, mode: str, threads: int) -> providers.Prepared:
        right = super().prepare(problem, mode, threads)
        return dataclasses.replace(right, results=lambda found: (*found[:-1], self.fault(found[-1])))


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["grid", "all"])
def test_every_listed_size_is_measured(group: str) -> None:
    works = [work for work, mode in registry.select(group) if mode == "forward"]
    assert {work.channels for work in works} >= set(registry.CHANNELS)
    assert {size for work in works for size in (work.height, work.width)} >= set(registry.SIZES)
    assert {work.batch for work in works} >= set(registry.BATCHES)
    assert {work.n_steps for work in works} >= set(registry.STEPS)


def test_the_registry_is_consistent() -> None:
    names = [work.name for work in registry.WORKLOADS]
    assert len(set(names)) == len(names)
    for work in registry.WORKLOADS:
        assert work.group in registry.GROUPS
        assert work.providers[0] == "eager" or work.modes == ("memory",)  # the measure of everyone's errors
        assert OURS in work.providers
        assert set(work.providers) <= set(providers.PROVIDERS)
        assert set(work.modes) <= set(work.covered_modes)


def test_selection() -> None:
    assert [work.name for work, _ in registry.select(only="mnist net, b1")] == ["MNIST net, B1"]  # and not B128
    assert {mode for _, mode in registry.select("grid", "C256", "input gradient")} == {"input gradient"}
    assert [mode for _, mode in registry.select(only="penalty")] == ["forward+backward"]
    with pytest.raises(ValueError, match="no workload of group 'bars' matches 'nothing'"):
        registry.select("bars", "nothing")


def test_tensors_are_the_same_for_everyone_and_never_zeros() -> None:
    for dtype in ("float32", "bfloat16"):
        work = dataclasses.replace(TINY, dtype=dtype)
        for a, b in zip(registry.Problem(work).tensors, registry.Problem(work).tensors, strict=True):
            assert torch.equal(a, b)
            assert a.dtype == getattr(torch, dtype)
            assert (a != 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Providers and their verification
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", registry.TIMED)
def test_every_quick_provider_is_right_and_has_a_row(mode: str, dtype: str) -> None:
    work = dataclasses.replace(TINY, dtype=dtype)
    found = measure(work, mode)
    assert {row.provider for row in found} == {n for n in QUICK if providers.PROVIDERS[n].covers(work, mode)}
    for row in found:
        if row.status.startswith("not installed"):
            assert row.p50_ms is None
            continue
        assert row.status == "ok", (row.provider, row.status)
        assert row.p20_ms is not None
        assert row.p50_ms is not None
        assert row.p80_ms is not None
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.rounds == 2
        assert row.eager_over_this is not None
        assert row.best_pytorch_over_this is not None
        assert row.best_pytorch_over_this <= row.eager_over_this


def test_ncnn_does_the_bare_convolution() -> None:
    row = next(row for row in measure(STEP) if row.provider == "ncnn (convolution only)")
    assert row.status in ("ok", "not installed: ncnn")
    assert not providers.PROVIDERS["ncnn (convolution only)"].covers(TINY, "forward")


def test_the_loop_computes_the_penalty() -> None:
    assert {row.provider: row.status for row in measure(PENALTY, "forward+backward")} == dict.fromkeys(
        PENALTY.providers, "ok"
    )


def test_threads_are_compared_in_one_run() -> None:
    found = measure(SCALING)
    assert sorted((row.provider, row.threads) for row in found) == [
        ("eager", 1),
        ("eager", 2),
        (OURS, 1),
        (OURS, 2),
    ]
    assert all(row.eager_over_this == 1 for row in found if row.provider == "eager")


def test_freezing_is_for_inference_and_compilers_have_no_memory_row() -> None:
    frozen, compiled = (providers.PROVIDERS[f"torch.compile{suffix}"] for suffix in (" freezing", ""))
    assert [mode for mode in registry.MODES if frozen.covers(TINY, mode)] == ["forward"]
    assert [mode for mode in registry.MODES if compiled.covers(TINY, mode)] == list(registry.TIMED)


FAULTS = {
    "off": lambda result: result + 1e-3,
    "nan": lambda result: result * float("nan"),
    "one element": lambda result: result.index_put((torch.tensor(0),), result[0] + 1e-2),
    "shape": lambda result: result[:1],
}


@pytest.mark.parametrize("mode", registry.TIMED)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_our_wrong_kernel_stops_the_run(
    mode: str, fault: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(providers.PROVIDERS, OURS, Faulty(fault))
    with pytest.raises(verify.WrongResult, match=f"{OURS} is wrong on tiny, "):
        measure(TINY, mode)


def test_a_wrong_competitor_gets_no_time_and_no_ratio() -> None:
    work = dataclasses.replace(TINY, providers=("eager", "eager channels_last", OURS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(providers.PROVIDERS, "eager channels_last", Faulty(FAULTS["off"], "eager channels_last"))
        with pytest.warns(UserWarning, match="eager channels_last is wrong on tiny, forward"):
            found = {row.provider: row for row in measure(work)}
    wrong = found["eager channels_last"]
    assert wrong.status.startswith("wrong: error ")
    assert wrong.p50_ms is None
    assert found[OURS].best_pytorch_over_this == found[OURS].eager_over_this


def test_a_missing_or_failing_competitor_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(providers.OnnxRuntime):
        package = "no_such_package"

    class Failing(providers.OpenVINO):
        package = "torch"

        def missing(self) -> None:
            return None

        def prepare(self, *_: Any) -> providers.Prepared:
            raise RuntimeError("no such processor\nand more")

    monkeypatch.setitem(providers.PROVIDERS, "ONNX Runtime", Missing())
    monkeypatch.setitem(providers.PROVIDERS, "OpenVINO", Failing())
    with pytest.warns(UserWarning, match="OpenVINO failed on tiny, forward: no such processor"):
        found = {row.provider: row.status for row in measure(TINY)}
    assert found["ONNX Runtime"] == "not installed: no_such_package"
    assert found["OpenVINO"] == "failed: no such processor"


def test_the_reference_is_never_timed_under_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rnf.set_backend("reference")
    try:
        done = CliRunner().invoke(cli.app, ["bench", "--only", "tiny"])
    finally:
        rnf.set_backend("auto")
    assert done.exit_code == 1
    assert "nothing to measure: this package runs the reference" in " ".join(done.stderr.split())


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def test_growth_sees_what_a_call_needs() -> None:
    grown = memory.growth(lambda: torch.ones(1 << 24).sum())
    if grown is None:
        pytest.skip("this system does not report peak memory")
    assert 60 < grown < 80


def test_eager_saves_every_step_and_ours_only_the_input() -> None:
    work = dataclasses.replace(TINY, batch=4, channels=8, height=28, width=28, n_steps=6)
    saved = {}
    for name in ("eager", OURS):
        saved[name] = memory.saved(providers.PROVIDERS[name].prepare(registry.Problem(work), "memory", 1))
    state = 4 * 8 * 28 * 28 * 4 / 2**20
    assert saved[OURS] == pytest.approx(state)
    assert saved["eager"] >= 2 * 6 * state


def test_memory_is_measured_in_a_fresh_process() -> None:
    work = dataclasses.replace(TINY, batch=8, channels=16, height=32, width=32, providers=("eager", OURS))
    found = {row.provider: row for row in measure(work, "memory")}
    assert {row.status for row in found.values()} == {"ok"}
    assert all(row.saved_mb for row in found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> list[rows.Row]:
    """A tiny run with something for every plot and every figure; no memory process, which has its own test."""
    quick = dataclasses.replace(TINY, name="tiny bar", providers=("eager", OURS))
    sweep = [dataclasses.replace(quick, name=f"tiny N{n}", group="scaling", sweep="N", n_steps=n) for n in (1, 2)]
    measured = [measure(work, mode) for work in (quick, SCALING, STEP, *sweep) for mode in work.modes[:2]]
    measured.append(measure(PENALTY, "forward+backward"))
    measured.append([run.skipped(TINY, "forward", 2, "2 minutes were over")])
    return [row for found in measured for row in found]


def test_csv_plots_and_table(results: list[rows.Row], tmp_path: Path) -> None:
    path = tmp_path / "flow.csv"
    rows.write(results, path)
    assert path.read_text().splitlines()[0].split(",") == list(rows.COLUMNS)
    again = rows.read(path)
    assert [row.provider for row in again] == [row.provider for row in results]
    for row in again:
        assert row.machine
        assert row.time
        assert row.torch == torch.__version__
        measured = (row.rounds, row.p50_ms, row.gemm_share, row.compile_s, row.error, row.best_pytorch_over_this)
        if row.status == "ok" and row.batch:
            assert None not in measured, row

    drawn = plot.draw(path, tmp_path / "plots")
    assert [image.name for image in drawn] == ["bench_ratios.png", "bench_roofline.png", "bench_scaling.png"]
    assert all(1000 < image.stat().st_size < 150_000 for image in drawn)

    text = report.markdown(again)
    figures = dict(report.figures(again))
    assert "| tiny bar | forward | float32 | 1 |" in text
    assert "tiny, forward" in text  # skipped, and said so
    assert "MNIST penalty, forward+backward: penalty loop" in figures
    assert "tiny threads, forward: 1 thread over 2" in figures
    assert any(name.startswith("worst row") for name in figures)
    if importlib.util.find_spec("ncnn"):
        assert "tiny step, forward: ncnn (convolution only)" in figures


def test_plots_of_what_is_there(results: list[rows.Row], tmp_path: Path) -> None:
    rows.write([row for row in results if row.group == "scaling"], tmp_path / "flow.csv")
    names = [image.name for image in plot.draw(tmp_path / "flow.csv", tmp_path)]
    assert names == ["bench_roofline.png", "bench_scaling.png"]
    (tmp_path / "old.csv").write_text("workload,mode\n")
    with pytest.raises(ValueError, match="has no columns"):
        plot.draw(tmp_path / "old.csv", tmp_path)


def test_no_time_left_is_said() -> None:
    work = dataclasses.replace(TINY, providers=("eager", OURS))
    seen: list[list[rows.Row]] = []
    found = run.suite([(work, "forward")] * 2, threads=1, minutes=0.0, on_rows=seen.append)
    assert [row.status for row in found] == ["skipped: 0 minutes were over"] * 2
    assert len(seen) == 2


def test_the_command_writes_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = dataclasses.replace(TINY, providers=(*EAGER, OURS))
    monkeypatch.setattr(registry, "WORKLOADS", (work,))
    monkeypatch.setattr(run, "SECONDS", {"bars": 0.0})
    monkeypatch.setattr(capability, "best", lambda: "another")
    command = ["bench", "--group", "bars", "--only", "tin", "--mode", "forward", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, [*command, "--plots", str(tmp_path), "--threads", "1"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("| workload | mode |")
    assert "the comparison fair, with ATEN_CPU_CAPABILITY=another" in " ".join(done.stderr.split())
    assert {row.workload for row in rows.read(tmp_path / "out" / "flow.csv")} == {"tiny"}
    assert (tmp_path / "bench_ratios.png").exists()

    monkeypatch.setitem(providers.PROVIDERS, OURS, Faulty(FAULTS["off"]))
    before = (tmp_path / "out" / "flow.csv").read_bytes()
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 1
    assert "nothing is reported: robust_node_fast is wrong on tiny, forward" in " ".join(done.stderr.split())
    assert not done.stdout
    assert (tmp_path / "out" / "flow.csv").read_bytes() == before

    done = CliRunner().invoke(cli.app, ["bench", "--only", "nothing"])
    assert done.exit_code == 2


# ---------------------------------------------------------------------------------------------------------------------
# The smoke set: that it runs, in pytest-benchmark's own table
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", registry.TIMED)
@pytest.mark.parametrize("name", ["eager", OURS])
def test_smoke(benchmark: Any, name: str, mode: str) -> None:
    work = next(work for work in registry.WORKLOADS if work.name == "digits net, B64")
    prepared = providers.PROVIDERS[name].prepare(registry.Problem(work), mode, torch.get_num_threads())
    found = benchmark.pedantic(prepared.call, rounds=1, warmup_rounds=1)
    assert len(prepared.results(found)) == {"forward": 1, "input gradient": 2, "forward+backward": 4}[mode]


def test_smoke_penalty(benchmark: Any) -> None:
    prepared = providers.PROVIDERS[OURS].prepare(registry.Problem(PENALTY), "forward+backward", 1)
    value, gradient = benchmark.pedantic(prepared.call, rounds=1, warmup_rounds=1)
    assert value.dim() == 0
    assert gradient.shape == (2, 8, 8, 3, 3)
