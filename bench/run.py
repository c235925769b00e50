"""Runs workloads: verifies every provider, times them in interleaved rounds, computes the ratios.

Within a round every provider takes its turn, in an order drawn anew each time, so that drift of the machine hits all
alike. Ratios within one run are what counts; absolute times drift between machines and days.

``python bench/run.py`` is ``rnf bench``.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

import robust_node_fast as rnf
from robust_node_fast._machine import machine
from robust_node_fast.bench import memory, verify
from robust_node_fast.bench.providers import PROVIDERS, Prepared, Provider
from robust_node_fast.bench.registry import OURS, SAVING, Problem, Workload
from robust_node_fast.bench.rows import Row

MIN_ROUNDS, MAX_ROUNDS = 7, 400
# Calls are repeated until a turn takes this long: what the first ones after another provider's turn take longer (the
# processor has to learn the code anew) is then small, as in a loop over batches.
TURN = 10e-3
# Calls shorter than this are run once untimed at the start of a turn: caches are then the provider's own, and the
# threads of the provider before have stopped spinning.
SHORT = 20e-3
SECONDS = {"bars": 5.0, "scaling": 1.0, "grid": 1.0}  # of rounds per row, unless seven rounds take longer


@dataclass
class Contender:
    """A provider with a number of threads, ready to run."""

    provider: Provider
    threads: int
    prepared: Prepared
    compile_s: float
    errors: tuple[float, ...]
    peak_mb: float | None = None
    repeats: int = 1
    warm_up: bool = True
    seconds: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        if self.warm_up:
            self.prepared.call()
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.prepared.call()
        self.seconds.append((time.perf_counter() - start) / self.repeats)


def set_threads(threads: int) -> None:
    """``torch.set_num_threads``; when it changes, the new team is started outside any measurement."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
        torch.ones(1 << 20).add_(1.0)


def suite(
    pairs: Sequence[tuple[Workload, str]], *, threads: int, minutes: float, on_rows: Callable[[list[Row]], None]
) -> list[Row]:
    """The rows of all (workload, mode) pairs, in their order, within about ``minutes``.

    What no time is left for has a row ``skipped``. ``on_rows`` is called after each pair.

    Raises:
        verify.WrongResult: this package's kernel is wrong; nothing is reported then.
    """
    from torch._inductor.utils import fresh_cache  # here: whoever imports this module would wait for it

    end = time.monotonic() + 60 * minutes
    rows: list[Row] = []
    with warnings.catch_warnings(), fresh_cache():  # of compiled kernels: compile_s is that of a first run
        warnings.simplefilter("error", rnf.FallbackWarning)  # the reference must not be timed under our name
        warnings.filterwarnings("ignore", module="torch")  # about itself
        for count in {threads, *(count for work, _ in pairs for count in work.threads)}:
            machine_rates(count)
        if any(name.startswith("torch.compile") for work, _ in pairs for name in work.providers):
            _start_compiler()
        for i, (work, mode) in enumerate(pairs):
            left = end - time.monotonic()
            if left > 0:
                seconds = min(SECONDS[work.group], left / (len(pairs) - i))
                found = measure(work, mode, threads=threads, seconds=seconds)
            else:
                found = [skipped(work, mode, threads, f"{minutes:g} minutes were over")]
            rows += found
            on_rows(found)
    return rows


def _start_compiler() -> None:
    """torch.compile's look at the machine, half a minute in an empty cache, kept out of the first row's compile_s."""
    with contextlib.suppress(Exception):  # each row will say what is wrong
        torch.compile(torch.sin)(torch.ones(64))


def measure(work: Workload, mode: str, *, threads: int, seconds: float, rounds: int = MIN_ROUNDS) -> list[Row]:
    """The rows of a workload in a mode; providers that cannot run or are wrong have a row that says so.

    Args:
        work, mode: of the registry.
        threads: where the workload does not fix them.
        seconds: for the rounds, all providers together.
        rounds: the least number, however long they take.

    Raises:
        verify.WrongResult: this package's kernel is wrong.
    """
    providers = [PROVIDERS[name] for name in work.providers if PROVIDERS[name].covers(work, mode)]
    counts = work.threads or (threads,)
    if mode == "memory":
        return _ratios([_memory_row(work, provider, counts[-1]) for provider in providers])
    torch.compiler.reset()
    problem = Problem(work)
    rows: list[Row] = []
    contenders: list[Contender] = []
    for count in counts:
        set_threads(count)
        for provider in providers:
            try:
                contenders.append(_prepare(problem, mode, provider, count, contenders))
            except _Excluded as reason:
                rows.append(_row(work, mode, provider, count, str(reason)))
    gc.collect()
    gc.disable()  # a collection would hit whoever's turn it is
    try:
        _calibrate(contenders)
        _take_turns(contenders, seconds, rounds)
    finally:
        gc.enable()
    return _ratios(rows + [_timed_row(work, mode, contender) for contender in contenders])


class _Excluded(Exception):
    """Why a provider has no time."""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _prepare(problem: Problem, mode: str, provider: Provider, threads: int, before: Sequence[Contender]) -> Contender:
    """A verified contender; the first of them is PyTorch eager, whose errors are the measure of the others'."""
    reason = provider.missing()
    if reason is not None:
        raise _Excluded(reason)
    try:
        start = time.perf_counter()
        prepared = provider.prepare(problem, mode, threads)
        found = prepared.call()
        compile_s = time.perf_counter() - start
        errors = verify.errors(prepared.results(found), verify.exact(problem, mode, provider.convolution_only))
        verify.check(problem.work.dtype, errors, before[0].errors if before else errors)
        return Contender(provider, threads, prepared, compile_s, errors)
    except verify.WrongResult as wrong:
        message = f"{provider.name} is wrong on {problem.work.name}, {mode}: {wrong}"
        if provider.name in (OURS, SAVING):
            raise verify.WrongResult(message) from wrong
        warnings.warn(message, stacklevel=1)
        raise _Excluded(f"wrong: {wrong}") from wrong
    except Exception as error:
        # A competitor that does not work here must not cost the run, and must be seen.
        if provider.name in (OURS, SAVING, "eager"):
            raise
        warnings.warn(f"{provider.name} failed on {problem.work.name}, {mode}: {_first_line(error)}", stacklevel=1)
        raise _Excluded(f"failed: {_first_line(error)}") from error


def _calibrate(contenders: Sequence[Contender]) -> None:
    """A second call for the peak memory and, if it is short, more to know how often a call must be repeated."""
    for contender in contenders:
        set_threads(contender.threads)
        start = time.perf_counter()
        contender.peak_mb = memory.growth(contender.prepared.call)
        call = time.perf_counter() - start
        if call < SHORT:
            call = statistics.median(_seconds(contender.prepared.call) for _ in range(5))
        contender.repeats = max(1, math.ceil(TURN / call))
        contender.warm_up = call < SHORT


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _take_turns(contenders: Sequence[Contender], seconds: float, rounds: int) -> None:
    order, shuffle = list(contenders), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= rounds and time.perf_counter() > end:
            break
        shuffle(order)
        for contender in order:
            set_threads(contender.threads)
            contender.take_turn()


def _row(work: Workload, mode: str, provider: Provider, threads: int, status: str, **measured: Any) -> Row:
    gemm, bandwidth = machine_rates(threads)
    return Row(
        group=work.group,
        workload=work.name,
        mode=mode,
        dtype=work.dtype,
        provider=provider.name,
        status=status,
        sweep=work.sweep,
        batch=work.batch,
        channels=work.channels,
        height=work.height,
        width=work.width,
        n_steps=work.n_steps,
        threads=threads,
        machine=machine(),
        torch=torch.__version__,
        robust_node_fast=rnf.__version__,
        provider_version="" if status.startswith("not installed") else provider.version(),
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        gemm_gflops=gemm,
        bandwidth_gbs=bandwidth,
        **measured,
    )


def _timed_row(work: Workload, mode: str, contender: Contender) -> Row:
    p20, p50, p80 = (statistics.quantiles(contender.seconds, n=10, method="inclusive")[i] for i in (1, 4, 7))
    flop = work.flop("forward" if contender.provider.convolution_only else mode)
    gflops = flop / p50 * 1e-9 if flop else None
    return _row(
        work,
        mode,
        contender.provider,
        contender.threads,
        "ok",
        rounds=len(contender.seconds),
        repeats=contender.repeats,
        p20_ms=p20 * 1e3,
        p50_ms=p50 * 1e3,
        p80_ms=p80 * 1e3,
        gflops=gflops,
        gemm_share=gflops and gflops / machine_rates(contender.threads)[0],
        compile_s=contender.compile_s,
        peak_mb=contender.peak_mb,
        error=max(contender.errors),
    )


def _memory_row(work: Workload, provider: Provider, threads: int) -> Row:
    reason = provider.missing()
    if reason is None:
        try:
            return _row(
                work, "memory", provider, threads, "ok", **memory.in_fresh_process(work, provider.name, threads)
            )
        except RuntimeError as error:
            reason = f"failed: {_first_line(error)}"
            warnings.warn(f"{provider.name} failed on {work.name}, memory: {_first_line(error)}", stacklevel=1)
    return _row(work, "memory", provider, threads, reason)


def _ratios(rows: list[Row]) -> list[Row]:
    """Fills the ratio columns, each within its number of threads."""
    for row in rows:
        peers = [other for other in rows if other.threads == row.threads and other.cost]
        eager = [other.cost for other in peers if other.provider == "eager" and other.cost]
        best = [other.cost for other in peers if PROVIDERS[other.provider].is_pytorch and other.cost]
        if row.cost:
            row.eager_over_this = eager[0] / row.cost if eager else None
            row.best_pytorch_over_this = min(best) / row.cost if best else None
    return rows


def skipped(work: Workload, mode: str, threads: int, reason: str) -> Row:
    """The row of a workload that was not run."""
    return _row(work, mode, PROVIDERS[OURS], (work.threads or (threads,))[-1], f"skipped: {reason}")


@lru_cache
def machine_rates(threads: int) -> tuple[float, float]:
    """What the machine does with this many threads: GFLOP/s of ``torch.mm`` in float32, GB/s of copying 256 MB."""
    set_threads(threads)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    gemm = min(_seconds(lambda: torch.mm(a, b)) for _ in range(20))
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * 1024**3 / gemm * 1e-9, 2 * source.nbytes / copy * 1e-9


if __name__ == "__main__":
    from robust_node_fast.cli import app

    app(["bench", *sys.argv[1:]], prog_name="rnf")
