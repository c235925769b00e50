"""Times flows in bfloat16 with each instruction set that has a way of its own to do it, and writes a CSV.

    python bench/bfloat16.py [--threads 2] [--rounds 5] [--output bench/results/bfloat16.csv]

The set is chosen once a process, so every set has one, and they take turns. float32 is in it for comparison.
"""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

import robust_node_fast as rnf
from robust_node_fast._machine import processor

# Batch, channels, height and width, steps, kernel: one for each layout that multiplies in bfloat16, and for what it
# does with channels that do not fill its vectors.
FLOWS = {
    "CIFAR": (16, 128, 32, 16, 3),
    "MNIST": (128, 8, 28, 10, 3),
    "C16": (32, 16, 32, 10, 3),
    "C20": (32, 20, 32, 10, 3),
    "C48": (32, 48, 32, 10, 3),
    "C64 7x7": (64, 64, 7, 10, 3),
    "C32 5x5 filters": (16, 32, 32, 10, 5),
    "C64 1x1 filters": (32, 64, 32, 10, 1),
}
WORKER = f"""
import sys, time, torch, robust_node_fast as rnf
torch.set_num_threads(int(sys.argv[1]))
for name, (batch, channels, size, steps, kernel) in {FLOWS}.items():
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        x = torch.randn(batch, channels, size, size, dtype=dtype)
        w = torch.randn(steps, channels, channels, kernel, kernel) / (kernel * kernel * channels) ** 0.5
        w, b, g = w.to(dtype), torch.randn(steps, channels, dtype=dtype), torch.randn_like(x)
        for mode, wanted in (("forward", 0), ("input gradient", 1), ("forward+backward", 3)):
            tensors = [t.detach().requires_grad_(i < wanted) for i, t in enumerate((x, w, b))]
            for timed in (False, True, True, True):
                start = time.perf_counter()
                out = rnf.functional.euler_conv_flow(*tensors, step_size=0.1)
                if wanted:
                    torch.autograd.grad(out, tensors[:wanted], g)
                if timed:
                    print(name, str(dtype).split(".")[1], mode, (time.perf_counter() - start) * 1e3, sep=",")
"""


def main(
    threads: Annotated[int, typer.Option(help="torch.set_num_threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Processes of each instruction set; the least time counts.")] = 5,
    output: Annotated[Path, typer.Option(help="CSV to write.")] = Path("bench/results/bfloat16.csv"),
) -> None:
    found = rnf.backend_info()["backends"]["cpu"].get("supported_isas", [])
    sets = [name for name in ("amx", "avx512_bf16", "avx512") if name in found]
    least: dict[tuple[str, ...], float] = {}
    for _ in range(rounds):
        for name in sets:
            done = subprocess.run(
                [sys.executable, "-c", WORKER, str(threads)],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "RNF_CPU_ISA": name},
            )
            for line in done.stdout.splitlines():
                *what, cost = line.split(",")
                key = (name, *what)
                least[key] = min(least.get(key, float("inf")), float(cost))
    for (name, flow, dtype, mode), ms in least.items():
        print(f"{flow:15} {name:12} {dtype:9} {mode:17} {ms:7.2f} ms")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["instruction_set", "flow", "dtype", "mode", "ms", "machine", "threads", "torch", "version", "time"]
        )
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        about = [processor(), threads, torch.__version__, rnf.__version__, now]
        writer.writerows([*key, round(ms, 2), *about] for key, ms in least.items())


if __name__ == "__main__":
    typer.run(main)
