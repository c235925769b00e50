"""Images a second of the CIFAR networks: training, evaluation and adversarial training, and the memory of training.

    python -m robust_node_fast.bench.throughput [--minutes 40] [--output bench/results] [--page docs/throughput.md]

writes ``throughput.csv`` and ``throughput_memory.csv``, and their tables into the page. A training step is forward,
cross-entropy + contraction penalty, backward and SGD with momentum; an adversarial one attacks the batch by PGD first.
One process has two threads; two have one each, half of the batch each, and average their gradients over gloo. PyTorch's
networks are the reference's, with the vectorised penalty (not the authors' loop), which suits PyTorch better.

Everybody has the same weights and images. Before a time counts, results are compared: logits and gradients with float64
(what is compiled: the value of its first call with eager's). Within a row providers take turns. A row for which no
time or memory is left has a status that says so, as has what was slower than another PyTorch at the smallest batch.
"""

from __future__ import annotations

import datetime
import gc
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import robust_node_fast as rnf
from robust_node_fast._machine import machine
from robust_node_fast.bench import capability, memory, verify
from robust_node_fast.bench.gpu import Way
from robust_node_fast.bench.registry import OURS, RATE, SAVING
from robust_node_fast.bench.report import ratio, replace_tables, table
from robust_node_fast.bench.rows import read_as, write
from robust_node_fast.bench.together import Failed, together
from robust_node_fast.training import distributed

RESULTS, MEMORY_RESULTS = "throughput.csv", "throughput_memory.csv"
PGD_STEPS, EPS = 2, 8 / 255
TRAINING, EVALUATION, ADVERSARIAL = MODES = ("training step", "evaluation", f"PGD-{PGD_STEPS} training step")
PROCESSES = {1: 2, 2: 1}  # processes -> threads of each
BATCHES, MEMORY_BATCHES, BUDGETS = (128, 512, 2048), (64, 128), (4, 8, 16)  # budgets in GiB
WAYS = (
    Way("eager"),
    Way("eager channels_last", layout=torch.channels_last),
    Way("torch.compile", compiled=True),
    Way(OURS, ours=True),
    Way(SAVING, ours=True, recompute=False),
)
LR = 1e-4  # so small that the weights stay where they are
ROUNDS, ROW_SECONDS = 7, 20.0  # most rounds, and how long those of a row may take together
LONG, TOO_LONG = 10.0, 60.0  # a first call this long counts as a round; a step that would take longer is not run
TOO_LARGE = 16.0  # GiB


@dataclass(frozen=True)
class Net:
    """A network of ``models`` and ``reference``; channels and steps are those of the paper unless given."""

    name: str
    channels: int | tuple[int, ...] | None = None
    n_steps: int | None = None

    def build(self, way: Way) -> nn.Module:
        """The provider's network, with the same weights for every one of them; none is zero."""
        torch.manual_seed(0)
        sizes = {"channels": self.channels, "n_steps": self.n_steps}
        options = {name: size for name, size in sizes.items() if size is not None}
        fused = getattr(rnf.models, self.name)(**options)
        for _, flow in fused.flows():
            nn.init.normal_(flow.weight, std=(9 * flow.weight.shape[1]) ** -0.5)
            flow.recompute = way.recompute
        if way.ours:
            return fused
        plain = getattr(rnf.reference, self.name)(**options)
        plain.load_state_dict(fused.reference_state_dict())
        return plain.to(memory_format=way.layout)


NETS: tuple[Net, ...] = (Net("CIFARNode"), Net("StagedCIFARNode"))
SMOKE_NETS: tuple[Net, ...] = (Net("StagedCIFARNode", (8, 16, 16), 1),)


@dataclass
class Row:
    """One provider; ``None`` is an empty cell.

    Attributes:
        batch: of all processes together.
        threads: of each process.
        status: ``ok``, or why there is no time.
        rounds: turns that were timed; ``seconds`` is their median for one batch.
        best_pytorch_over_this, eager_over_this: ratios of seconds within the row's network, mode, batch and processes.
        expected_gib: memory of training at this batch, computed from ``throughput_memory.csv`` for one process.
    """

    net: str
    mode: str
    batch: int
    processes: int
    threads: int
    provider: str
    status: str
    rounds: int | None = None
    seconds: float | None = None
    images_per_s: float | None = None
    best_pytorch_over_this: float | None = None
    eager_over_this: float | None = None
    expected_gib: float | None = None
    machine: str = ""
    torch: str = torch.__version__
    robust_node_fast: str = rnf.__version__
    time: str = ""


@dataclass
class MemoryRow:
    """Memory of a training step in a fresh process: of a batch, or the batch that fits.

    Attributes:
        status: ``measured``; ``computed``: the largest batch for ``budget_gib`` by the line through the two largest
            measured ones; or why there is nothing.
        resident_mb: of the process before the step: libraries, parameters, images.
        peak_mb: how much the step adds at most.
    """

    net: str
    provider: str
    status: str
    batch: int | None = None
    budget_gib: int | None = None
    resident_mb: float | None = None
    peak_mb: float | None = None
    machine: str = ""
    torch: str = torch.__version__
    robust_node_fast: str = rnf.__version__
    time: str = ""

    @property
    def gib(self) -> float:
        """Of the whole process."""
        return ((self.resident_mb or 0.0) + (self.peak_mb or 0.0)) / 1024


class Objective(nn.Module):
    """The network and what its training minimises: what torch.compile and DistributedDataParallel are given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self.model(images), labels)
        if hasattr(self.model, "contraction_penalty"):
            return loss + self.model.contraction_penalty(rate=RATE)  # type: ignore[operator]
        filters = [conv.weight for conv in self.model.conv]  # type: ignore[union-attr]
        return loss + rnf.reference.contraction_penalty(filters, rate=RATE)


def images_and_labels(batch: int, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Random ones, this process's share of the batch: speed and memory do not depend on what they show."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    return distributed.share(images).to(memory_format=layout, copy=True), distributed.share(labels).clone()


def work(net: Net, way: Way, mode: str, batch: int, *, averaged: bool = True) -> Callable[[], float]:
    """What is timed. It gives a number by which results can be compared: the objective, or the mean square logit.

    ``averaged=False`` leaves out the communication of several processes.
    """
    model = net.build(way)
    images, labels = images_and_labels(batch, way.layout)

    def compiled(module: nn.Module) -> nn.Module:
        return torch.compile(module, dynamic=False) if way.compiled else module  # type: ignore[return-value]

    network = compiled(model)

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        return float(network(images).square().mean())

    if mode == EVALUATION:
        return evaluate
    objective = compiled(Objective(model))
    if averaged and distributed.world_size() > 1:
        # Ours in what `rnf train` uses, the reference in what its users would.
        objective = distributed.parallel(objective) if way.ours else DistributedDataParallel(objective)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)

    def step(shown: Tensor) -> float:
        model.train()
        optimizer.zero_grad()
        loss = objective(shown, labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def adversarial_step() -> float:
        network.eval()
        generator, size = torch.Generator().manual_seed(2), 2.5 * EPS / PGD_STEPS
        shown = rnf.robustness.pgd(network, images, labels, EPS, step_size=size, n_steps=PGD_STEPS, generator=generator)
        network.train()
        return step(shown)

    return adversarial_step if mode == ADVERSARIAL else lambda: step(images)


# ---------------------------------------------------------------------------------------------------------------------
# Verification
# ---------------------------------------------------------------------------------------------------------------------


def results(net: Net, way: Way, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Logits of a few images, in evaluation mode, and the objective's gradients: for images, filters, both ends."""
    model = net.build(way).to(dtype).eval()
    images, labels = images_and_labels(4, way.layout)
    images = images.to(dtype).requires_grad_()
    logits = model(images)
    Objective(model)(images, labels).backward()
    ends = [model.get_parameter(name).grad for name in ("conv0.weight", "bn.weight", "fc1.weight")]
    if way.ours:
        filters = [bank for _, flow in model.flows() for bank in flow.weight.grad]  # type: ignore[operator]
    else:
        filters = [conv.weight.grad for conv in model.conv]  # type: ignore[union-attr]
    return tuple(t.detach() for t in (logits, images.grad, *ends, *filters) if t is not None)


def check(net: Net) -> None:
    """Every provider that is not compiled.

    Raises:
        verify.WrongResult: one is wrong.
    """
    exact = results(net, WAYS[0], torch.float64)
    eager = verify.errors(results(net, WAYS[0], torch.float32), exact)
    for way in WAYS[1:]:
        if not way.compiled:
            try:
                verify.check("float32", verify.errors(results(net, way, torch.float32), exact), eager)
            except verify.WrongResult as wrong:
                raise verify.WrongResult(f"{way.name} is wrong on {net.name}: {wrong}") from wrong


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Turns:
    """One provider's calls in this process; all processes make theirs together."""

    way: Way
    call: Callable[[], float]
    first: float = 0.0
    value: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def take(self) -> float:
        """Seconds, the same number in all processes: what comes next depends on it."""
        _wait()
        start = time.perf_counter()
        self.value = self.call()
        _wait()
        return distributed.largest(round(1e6 * (time.perf_counter() - start)), "cpu") / 1e6


def _wait() -> None:
    if distributed.is_parallel():
        dist.barrier()


def measure(net: Net, ways: Sequence[Way], mode: str, batch: int) -> list[tuple[str, list[float]]]:
    """Status and seconds of each provider, by interleaved turns in this process (and those that are joined to it)."""
    torch.compiler.reset()
    turns = [_Turns(way, work(net, way, mode, batch)) for way in ways]
    for each in turns:
        each.first = each.take()
        if each.first > LONG and not each.way.compiled:
            each.seconds.append(each.first)
    firsts = [each.value for each in turns]
    slow = max((each.first for each in turns if not each.way.compiled), default=LONG)
    rounds = max(1 if slow > LONG else 2, min(ROUNDS, int(ROW_SECONDS / (slow * len(turns)))))
    order, shuffle = list(turns), random.Random(0).shuffle
    gc.collect()
    for done in range(rounds):
        shuffle(order)
        for each in order:
            if slow < 2 * LONG or not each.seconds or (done == 0 and each.way.compiled):
                each.seconds.append(each.take())
    found = []
    for each, value in zip(turns, firsts, strict=True):
        near = abs(value - firsts[0]) <= 0.05 * abs(firsts[0])  # dropout's masks differ; NaN is not near
        status = "ok" if near else f"wrong: {value:.4g}, {turns[0].way.name} {firsts[0]:.4g}"
        found.append((status, each.seconds if near else []))
    return found


@dataclass
class Runner:
    """Fills the table until the time is over, the small batches first."""

    nets: Sequence[Net]
    ways: Sequence[Way]
    batches: Sequence[int]
    end: float
    memory: Sequence[MemoryRow]
    rows: list[Row] = field(default_factory=list)

    def run(self, report: Callable[[list[Row]], None]) -> list[Row]:
        queue = []
        for batch in self.batches:
            queue += [(batch, 1, net, mode) for net in self.nets for mode in MODES]
            queue += [(batch, 2, net, TRAINING) for net in self.nets]
        queue += [(self.batches[0], 2, net, mode) for net in self.nets for mode in MODES if mode != TRAINING]
        for batch, processes, net, mode in queue:
            found = self.row(net, mode, batch, processes)
            self.rows += found
            report(found)
        return self.rows

    def row(self, net: Net, mode: str, batch: int, processes: int) -> list[Row]:
        """Every provider's.

        Raises:
            verify.WrongResult: this package is wrong.
        """
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        common = Row(net.name, mode, batch, processes, PROCESSES[processes], "", "", machine=machine(), time=now)
        rows = [replace(common, provider=way.name, expected_gib=self._gib(net, way, batch, mode)) for way in self.ways]
        for row in rows:
            row.status = self.skipped(row)
        chosen = [way for way, row in zip(self.ways, rows, strict=True) if not row.status]
        running = iter(row for row in rows if not row.status)
        try:
            threads = PROCESSES[processes]
            if not chosen:
                found = []
            elif processes == 1:
                torch.set_num_threads(threads)
                found = measure(net, chosen, mode, batch)
            else:
                timeout = max(60.0, self.end - time.monotonic())
                found = together(measure, processes, net, chosen, mode, batch, threads=threads, timeout=timeout)[0]
        except Failed as failed:
            warnings.warn(f"{net.name}, {mode}, batch {batch}: {failed}", stacklevel=1)
            found = [(f"failed: {failed}", [])] * len(chosen)
        for row, (status, seconds) in zip(running, found, strict=True):
            row.status = status
            if status.startswith("wrong") and row.provider in (OURS, SAVING):
                raise verify.WrongResult(f"{row.provider} is {status} on {net.name}, {mode}, batch {batch}")
            if seconds:
                row.rounds, row.seconds = len(seconds), statistics.median(seconds)
                row.images_per_s = batch / row.seconds
        pytorch = [row.seconds for row in rows if row.seconds and row.provider not in (OURS, SAVING)]
        eager = [row.seconds for row in rows if row.seconds and row.provider == "eager"]
        for row in rows:
            if row.seconds:
                row.best_pytorch_over_this = min(pytorch) / row.seconds if pytorch else None
                row.eager_over_this = eager[0] / row.seconds if eager else None
        return rows

    def _gib(self, net: Net, way: Way, batch: int, mode: str) -> float | None:
        """Of training, several processes together about as much as one; adversarial training too, all else less."""
        line = Line.of(self.memory, net.name, way.name)
        return line.gib(batch) if line and mode != EVALUATION else None

    def skipped(self, row: Row) -> str:
        """Why this row is not run, or nothing."""
        if time.monotonic() > self.end:
            return "skipped: the minutes were over"
        if row.expected_gib and row.expected_gib > TOO_LARGE:
            return f"skipped: would need {row.expected_gib:.0f} GiB"
        before = [r for r in self.rows if (r.net, r.mode) == (row.net, row.mode) and r.seconds]
        smallest = [r for r in before if r.batch == self.batches[0] and r.processes == 1]
        if smallest and (row.batch, row.processes) != (smallest[0].batch, 1) and row.provider not in (OURS, SAVING):
            best = min((r for r in smallest if r.provider not in (OURS, SAVING)), key=lambda r: r.seconds or 0.0)
            if best.provider != row.provider:
                return f"skipped: slower than {best.provider} at batch {best.batch}"
        mine = [r for r in before if r.provider == row.provider]
        if mine:
            near = max(mine, key=lambda r: (r.batch, -r.processes))
            seconds = (near.seconds or 0.0) * row.batch / near.batch
            if seconds > TOO_LONG:
                return f"skipped: a step would take about {seconds:.0f} s"
            if seconds > self.end - time.monotonic():
                return "skipped: the minutes were over"
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def peak(net: Net, way: Way, batch: int) -> tuple[float, float]:
    """Megabytes that are resident before a training step, and that it adds at most. For a fresh process."""
    work(net, way, TRAINING, 2)()  # libraries, thread stacks and code do not count
    call = work(net, way, TRAINING, batch)
    if way.compiled:
        call()  # nor does the compiler, which has to have seen this very batch
    resident = memory.resident()
    grown = memory.growth(call)
    if grown is None:
        raise RuntimeError("this system does not report peak memory")
    return resident, grown


@dataclass(frozen=True)
class Line:
    """Memory of training over the batch: ``fixed + each * batch`` megabytes, through two measured points.

    The two largest: what an image takes is not the same for few of them.
    """

    fixed: float
    each: float

    @classmethod
    def of(cls, rows: Sequence[MemoryRow], net: str, provider: str) -> Line | None:
        """Of one provider, if there are two."""
        points = sorted((row.batch, 1024 * row.gib) for row in measured(rows, net, provider) if row.batch)
        if len(points) < 2:
            return None
        (few, low), (many, high) = points[-2:]
        each = (high - low) / (many - few)
        return cls(low - few * each, each)

    def gib(self, batch: int) -> float:
        return (self.fixed + batch * self.each) / 1024

    def largest(self, gib: float) -> int:
        return int((1024 * gib - self.fixed) / self.each)


def measured(rows: Sequence[MemoryRow], net: str, provider: str) -> list[MemoryRow]:
    return [row for row in rows if (row.net, row.provider, row.status) == (net, provider, "measured")]


def memory_rows(
    nets: Sequence[Net], ways: Sequence[Way], batches: Sequence[int], far: bool, end: float
) -> list[MemoryRow]:
    """Measured at two batches and, if ``far``, at what should fit the smallest budget; computed for every budget."""
    rows: list[MemoryRow] = []

    def one(net: Net, way: Way, batch: int) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        row = MemoryRow(net.name, way.name, "measured", batch, machine=machine(), time=now)
        try:
            if time.monotonic() > end:
                row.status = "skipped: the minutes were over"
            else:
                ((row.resident_mb, row.peak_mb),) = together(peak, 1, net, way, batch, threads=PROCESSES[1])
        except Failed as failed:
            row.status = f"failed: {failed}"
        print(f"memory: {net.name:16} B{batch:<5} {way.name:34} {row.status} {row.gib:.2f} GiB", flush=True)
        rows.append(row)

    for net in nets:
        for way in ways:
            for batch in batches:
                one(net, way, batch)
            line = Line.of(rows, net.name, way.name)
            if far and not way.compiled and line is not None and line.each > 0:  # compiling once more takes a minute
                one(net, way, line.largest(BUDGETS[0]))
                line = Line.of(rows, net.name, way.name)
            if line is None or line.each <= 0:
                continue
            rows += [
                replace(
                    rows[-1], status="computed", batch=line.largest(gib), budget_gib=gib, resident_mb=None, peak_mb=None
                )
                for gib in BUDGETS
            ]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row], memory_: Sequence[MemoryRow]) -> dict[str, list[str]]:
    """Name -> lines in Markdown of the tables in the page."""
    names = list(dict.fromkeys(row.provider for row in rows))
    groups: dict[tuple[str, str, int, int], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.net, row.mode, row.processes, row.batch), {})[row.provider] = row

    def cell(row: Row) -> str:
        return f"{row.images_per_s:.4g}" if row.images_per_s else "-"

    speed = []
    for (net, mode, processes, batch), found in groups.items():
        ours = max(
            (ratio(found[n].best_pytorch_over_this) for n in (OURS, SAVING) if n in found), key=lambda r: float(r or 0)
        )
        rounds = [row.rounds for row in found.values() if row.rounds]
        turns = f"{min(rounds)}" + (f" to {max(rounds)}" if max(rounds) > min(rounds) else "") if rounds else "-"
        speed.append((net, mode, str(processes), str(batch), *(cell(found[n]) for n in names), ours, turns))
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "ok" and not row.status.startswith("skipped: slower"):
            where = f"{row.provider}, {row.net}, {row.mode}, batch {row.batch}, {row.processes} process(es)"
            reasons.setdefault(row.status, []).append(where)
    fits = []
    for net in dict.fromkeys(row.net for row in memory_):
        largest = {
            (row.provider, row.budget_gib): row.batch
            for row in memory_
            if row.net == net and row.status == "computed" and row.batch
        }
        for name in dict.fromkeys(row.provider for row in memory_):
            line, eager = Line.of(memory_, net, name), largest.get(("eager", BUDGETS[-1]))
            if line is None:
                continue
            most = max(measured(memory_, net, name), key=lambda row: row.batch or 0)
            batches = [largest.get((name, gib), 0) for gib in BUDGETS]
            fits.append(
                (
                    net,
                    name,
                    f"{line.each:.3g}",
                    *map(str, batches),
                    ratio(batches[-1] / eager if eager else None),
                    f"{most.gib:.2f} GiB, {most.batch} images",
                )
            )
    first = rows[0]
    return {
        "speed": table(("network", "mode", "processes", "batch", *names, "best PyTorch / ours", "rounds"), speed),
        "reasons": [f"- {reason}: {'; '.join(where)}" for reason, where in reasons.items()],
        "memory": table(
            (
                "network",
                "provider",
                "MB an image",
                *(f"{gib} GiB" for gib in BUDGETS),
                "over eager",
                "largest measured",
            ),
            fits,
        ),
        "conditions": [f"{first.machine}, torch {first.torch}, {first.time[:10]}."],
    }


def main(
    minutes: Annotated[float, typer.Option(help="Time for everything; what is left over is skipped.")] = 40.0,
    output: Annotated[Path, typer.Option(help="Folder of the CSVs.")] = Path("bench/results"),
    page: Annotated[Path | None, typer.Option(help="Page whose tables are replaced.")] = None,
    smoke: Annotated[bool, typer.Option(help="Tiny networks, no compiler: that it runs.")] = False,
) -> None:
    from torch._inductor.utils import (
        fresh_cache,
    )  # here: the import would double what each fresh process takes to start

    end = time.monotonic() + 60 * minutes
    nets, batches, memory_batches = (SMOKE_NETS, (8,), (32, 128)) if smoke else (NETS, BATCHES, MEMORY_BATCHES)
    ways = tuple(way for way in WAYS if not smoke or way.name in ("eager", OURS))
    if not smoke and (advice := capability.advice()):
        print(advice, file=sys.stderr)
    rows: list[Row] = []
    with warnings.catch_warnings(), fresh_cache():  # which the other processes share
        warnings.simplefilter("error", rnf.FallbackWarning)  # the reference must not be timed under our name
        torch.set_num_threads(PROCESSES[1])
        for net in nets:
            check(net)
        taken = memory_rows(nets, ways, memory_batches, far=not smoke, end=end)
        write(taken, output / MEMORY_RESULTS, MemoryRow)

        def report(found: list[Row]) -> None:
            rows.extend(found)
            write(rows, output / RESULTS, Row)  # what is there survives whatever comes next
            for row in found:
                figures = (
                    f"{row.images_per_s:9.4g} images/s {row.best_pytorch_over_this or 0:5.2f}x"
                    if row.images_per_s
                    else ""
                )
                where = f"{row.net:16} {row.mode:20} B{row.batch:<5} {row.processes} x {row.threads}"
                print(f"{where} {row.provider:34} {figures or row.status}", flush=True)

        Runner(nets, ways, batches, end, taken).run(report)
    if page:
        replace_tables(page, tables(read_as(Row, output / RESULTS), read_as(MemoryRow, output / MEMORY_RESULTS)))


if __name__ == "__main__":
    typer.run(main)
