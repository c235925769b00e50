"""Times the fused flow against plain PyTorch on the same work, in interleaved rounds, and writes one CSV.

    python bench/run.py [--rounds 20] [--threads 2] [--output bench/results/flow.csv]

Every provider is checked against float64 first; a wrong kernel gets no time. Compilation and warm-up are not counted.
Ratios within one run are what counts; absolute times drift between machines and days.
"""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import robust_node_fast as rnf


@dataclass(frozen=True)
class Workload:
    """A flow of ``n_steps`` separate 3x3 filter banks on ``(batch, channels, size, size)``, float32."""

    name: str
    batch: int
    channels: int
    size: int
    n_steps: int
    step_size: float


WORKLOADS = (
    Workload("MNIST net, B128", 128, 8, 28, 10, 0.01),
    Workload("MNIST net, B1", 1, 8, 28, 10, 0.01),
    Workload("digits net, B64", 64, 8, 8, 10, 0.01),
    Workload("C32, B32", 32, 32, 32, 10, 0.1),
    Workload("CIFAR net, B16", 16, 128, 32, 16, 0.1),
)
MODES = ("forward", "forward+backward", "input gradient")
# Output and gradients against float64: at most this many times the error of plain PyTorch in float32.
ERROR_RATIO = 2.0

Flow = Callable[..., Tensor]


def providers() -> dict[str, tuple[Flow, torch.memory_format]]:
    """Name -> function and layout. torch.compile gets the reference, as a user would write it."""
    plain = rnf.reference.euler_conv_flow
    return {
        "eager": (plain, torch.contiguous_format),
        "eager channels_last": (plain, torch.channels_last),
        "torch.compile": (torch.compile(plain, dynamic=False), torch.contiguous_format),
        "torch.compile channels_last": (torch.compile(plain, dynamic=False), torch.channels_last),
        "robust_node_fast": (rnf.functional.euler_conv_flow, torch.contiguous_format),
    }


def task(flow: Flow, mode: str, work: Workload, tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: a call that returns its results."""
    input, weight, bias, grad = tensors
    trained = mode == "forward+backward"
    input = input.detach().requires_grad_(mode != "forward")
    weight, bias = weight.detach().requires_grad_(trained), bias.detach().requires_grad_(trained)
    wanted = (input, weight, bias) if trained else (input,)

    def run() -> tuple[Tensor, ...]:
        output = flow(input, weight, bias, step_size=work.step_size)
        return (output,) if mode == "forward" else torch.autograd.grad(output, wanted, grad)

    return run


def make_tensors(work: Workload, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    state = (work.batch, work.channels, work.size, work.size)
    scale = 1.0 / (9 * work.channels) ** 0.5
    filters = (work.n_steps, work.channels, work.channels, 3, 3)
    input, grad = (torch.randn(state, generator=generator).to(dtype, memory_format=layout) for _ in range(2))
    weight = (torch.randn(filters, generator=generator) * scale).to(dtype)
    return input, weight, torch.randn(filters[:2], generator=generator).to(dtype), grad


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Largest error relative to the largest value, over all results; NaN is infinitely wrong."""
    worst = max(((f.double() - e).abs().max() / e.abs().max()).item() for f, e in zip(found, exact, strict=True))
    return worst if worst == worst else float("inf")


def measure(work: Workload, mode: str, rounds: int) -> list[dict[str, object]]:
    exact_work = task(
        rnf.reference.euler_conv_flow, mode, work, make_tensors(work, torch.float64, torch.contiguous_format)
    )
    exact = exact_work()
    tasks = {
        name: task(flow, mode, work, make_tensors(work, torch.float32, layout))
        for name, (flow, layout) in providers().items()
    }
    errors = {name: error(run(), exact) for name, run in tasks.items()}  # also compiles and warms up
    for name, found in errors.items():
        if not found <= ERROR_RATIO * errors["eager"] + 4 * torch.finfo(torch.float32).eps:
            raise SystemExit(f"{name} is wrong on {work.name}, {mode}: error {found:.2e}, eager {errors['eager']:.2e}")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, run in tasks.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    best = min(statistics.median(times) for name, times in seconds.items() if name != "robust_node_fast")
    rows = []
    for name, times in seconds.items():
        p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] * 1e3 for i in (1, 4, 7))
        rows.append(
            {
                "workload": work.name,
                "mode": mode,
                "provider": name,
                "p20_ms": round(p20, 4),
                "p50_ms": round(p50, 4),
                "p80_ms": round(p80, 4),
                "eager_over_this": round(statistics.median(seconds["eager"]) / statistics.median(times), 3),
                "best_pytorch_over_this": round(best / statistics.median(times), 3),
                "error": f"{errors[name]:.2e}",
            }
        )
    return rows


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds per workload and mode.")] = 20,
    threads: Annotated[int, typer.Option(help="torch.set_num_threads.")] = 2,
    output: Annotated[Path, typer.Option(help="CSV to write.")] = Path("bench/results/flow.csv"),
) -> None:
    torch.set_num_threads(threads)
    cpu = rnf.backend_info()["backends"]["cpu"]
    if not cpu["available"]:
        raise SystemExit(f"nothing to measure: {cpu['reason']}")
    about = {
        "machine": f"{processor()}, {cpu['isa']}",
        "threads": threads,
        "torch": torch.__version__,
        "robust_node_fast": rnf.__version__,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    table = Table("workload", "mode", "provider", "p50 ms", "eager / this", "best PyTorch / this", "error")
    rows = []
    for work in WORKLOADS:
        for mode in MODES:
            torch.compiler.reset()
            for row in measure(work, mode, rounds):
                rows.append({**row, **about})
                keys = ("workload", "mode", "provider", "p50_ms", "eager_over_this", "best_pytorch_over_this", "error")
                table.add_row(*(str(row[key]) for key in keys))
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
