"""The same comparison on a GPU: this package against PyTorch on the networks of the papers, verified, then timed.

    python bench/run.py --device cuda [--output bench/results]

writes ``gpu_<card>.csv``. Times are those of ``triton.testing.do_bench``; what takes less than a millisecond is
captured into a CUDA graph first, for every provider alike. Beside each row stands the share of the card's measured
matrix rate.
"""

from __future__ import annotations

import csv
import datetime
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robust_node_fast as rnf

from . import verify
from .providers import PlainFlow, Prepared, as_is, calling, stacked
from .registry import TIMED, Problem, Workload

VERIFIED = 16  # samples that are compared with float64: all of a large batch would not fit
SHORT_MS = 1.0
Timer = Callable[[Callable[[], Any]], tuple[float, float, float]]

WORKLOADS = tuple(
    Workload(f"{name}, B{batch}, {dtype}", "bars", batch, channels, size, size, steps, step_size=h, dtype=dtype)
    for name, channels, size, steps, h in (
        ("MNIST", 8, 28, 10, 0.01),
        ("C32", 32, 32, 10, 0.1),
        ("CIFAR", 128, 32, 16, 0.1),
    )
    for batch in (128, 1024)
    for dtype in ("float32", "bfloat16")
)


@dataclass
class GpuRow:
    """One provider on one workload and mode; ``status`` is ``ok`` or why there is no time."""

    card: str
    workload: str
    mode: str
    dtype: str
    provider: str
    status: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    best_pytorch_over_this: float | None = None
    eager_over_this: float | None = None
    matmul_share: float | None = None
    error: float | None = None
    torch: str = torch.__version__
    robust_node_fast: str = rnf.__version__
    time: str = ""


@dataclass(frozen=True)
class Way:
    """A provider: whose kernels, which layout, what the compiler does."""

    name: str
    ours: bool = False
    layout: torch.memory_format = torch.contiguous_format
    compiled: bool = False
    recompute: bool = True

    def prepare(self, problem: Problem, mode: str, device: torch.device) -> Prepared:
        input, weight, bias, grad = (t.to(device) for t in problem.tensors)
        input, grad = (t.to(memory_format=self.layout, copy=True) for t in (input, grad))
        trained, h = mode == "forward+backward", problem.work.step_size
        input.requires_grad_(mode != "forward")
        results: Callable[[Any], tuple[Tensor, ...]] = as_is
        if self.ours:
            parameters = [weight.requires_grad_(trained), bias.requires_grad_(trained)]

            def flow(z: Tensor) -> Tensor:
                return rnf.functional.euler_conv_flow(z, weight, bias, step_size=h, recompute=self.recompute)
        else:
            net: nn.Module = PlainFlow(weight, bias, h, trained).to(memory_format=self.layout)
            parameters = [getattr(conv, part) for part in ("weight", "bias") for conv in net.convs]  # type: ignore[union-attr]
            results = stacked(problem.work.n_steps)
            flow = torch.compile(net, mode="max-autotune-no-cudagraphs", dynamic=False) if self.compiled else net
        wanted = [t for t in (input, *parameters) if t.requires_grad]
        return Prepared(calling(flow, input, wanted, grad), results)


WAYS = (
    Way("eager"),
    Way("eager channels_last", layout=torch.channels_last),
    Way("torch.compile max-autotune", compiled=True),
    Way("torch.compile max-autotune channels_last", layout=torch.channels_last, compiled=True),
    Way("robust_node_fast", ours=True),
    Way("robust_node_fast channels_last", ours=True, layout=torch.channels_last),
    Way("robust_node_fast channels_last, recompute=False", ours=True, layout=torch.channels_last, recompute=False),
)


def do_bench(call: Callable[[], Any]) -> tuple[float, float, float]:
    """Milliseconds, 20th, 50th and 80th percentile; short work as a CUDA graph, so that no launches are timed."""
    import triton.testing

    quantiles = [0.5, 0.2, 0.8]
    median, low, high = triton.testing.do_bench(call, quantiles=quantiles)
    if median < SHORT_MS:
        median, low, high = triton.testing.do_bench_cudagraph(call, quantiles=quantiles)
    return low, median, high


def matmul_rate(device: torch.device, dtype: torch.dtype, timer: Timer, size: int = 8192) -> float:
    """Operations a second of ``torch.mm`` on square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (timer(lambda: torch.mm(a, b))[1] * 1e-3)


def poison(device: torch.device, elements: int) -> None:
    """Leaves NaN in memory that the next allocations will get, so that what a kernel does not write is seen."""
    blocks = [torch.full((elements,), torch.nan, device=device) for _ in range(8)]
    del blocks


def measure(work: Workload, mode: str, device: torch.device, timer: Timer, rate: float, card: str) -> list[GpuRow]:
    """One row a provider, verified first.

    Raises:
        verify.WrongResult: this package's kernels are wrong; nothing is reported then.
    """
    small = Problem(replace(work, batch=min(work.batch, VERIFIED)))
    exact = tuple(t.to(device) for t in verify.exact(small, mode))
    eager: tuple[float, ...] | None = None
    rows = []
    for way in WAYS:
        row = GpuRow(card, work.name, mode, work.dtype, way.name, "ok")
        row.time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        rows.append(row)
        try:
            poison(device, small.tensors[0].numel())
            prepared = way.prepare(small, mode, device)
            errors = verify.errors(prepared.results(prepared.call()), exact)
            eager = eager or errors
            verify.check(work.dtype, errors, eager)
            call = way.prepare(Problem(work), mode, device).call
            row.error = max(errors)
            row.p20_ms, row.p50_ms, row.p80_ms = timer(call)
            row.matmul_share = work.flop(mode) / (row.p50_ms * 1e-3) / rate
        except verify.WrongResult as wrong:
            if way.ours:
                raise verify.WrongResult(f"{way.name} is wrong on {work.name}, {mode}: {wrong}") from wrong
            row.status = f"wrong: {wrong}"
        except RuntimeError as error:  # out of memory, or a compiler that fails
            if way.ours:
                raise
            row.status = f"failed: {str(error).splitlines()[0][:200]}"
    pytorch = [row.p50_ms for row, way in zip(rows, WAYS, strict=True) if row.p50_ms and not way.ours]
    for row in rows:
        if row.p50_ms and pytorch and rows[0].p50_ms:
            row.best_pytorch_over_this, row.eager_over_this = min(pytorch) / row.p50_ms, rows[0].p50_ms / row.p50_ms
    return rows


def suite(device: torch.device, output: Path) -> Path:
    """All workloads and modes; the CSV's path."""
    torch.backends.cudnn.benchmark = True
    card = torch.cuda.get_device_name(device)
    rates = {name: matmul_rate(device, getattr(torch, name), do_bench) for name in ("float32", "bfloat16")}
    path = output / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', card)}.csv"
    rows: list[GpuRow] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", rnf.FallbackWarning)  # the reference must not be timed under our name
        for work in WORKLOADS:
            for mode in TIMED:
                torch.compiler.reset()
                rows += measure(work, mode, device, do_bench, rates[work.dtype], card)
                write(rows, path)  # what is there survives whatever comes next
                print("\n".join(lines(rows[-len(WAYS) :])), flush=True)
    return path


def lines(rows: list[GpuRow]) -> Iterator[str]:
    for row in rows:
        time = row.status if row.p50_ms is None else f"{row.p50_ms:9.3f} ms  {row.best_pytorch_over_this or 0:5.2f}x"
        yield f"{row.workload:24} {row.mode:17} {row.provider:48} {time}"


def write(rows: list[GpuRow], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(GpuRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
