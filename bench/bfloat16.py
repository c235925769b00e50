"""Times the CIFAR flow in bfloat16 with each instruction set that has a way of its own to do it, and writes a CSV.

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
from robust_node_fast.bench.run import processor

BATCH, CHANNELS, SIZE, STEPS = 16, 128, 32, 16
WORKER = f"""
import sys, time, torch, robust_node_fast as rnf
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
for dtype in (torch.bfloat16, torch.float32):
    x = torch.randn({BATCH}, {CHANNELS}, {SIZE}, {SIZE}, dtype=dtype)
    w = (torch.randn({STEPS}, {CHANNELS}, {CHANNELS}, 3, 3) / (9 * {CHANNELS}) ** 0.5).to(dtype)
    b, g = torch.randn({STEPS}, {CHANNELS}, dtype=dtype), torch.randn_like(x)
    for mode, wanted in (("forward", 0), ("input gradient", 1), ("forward+backward", 3)):
        tensors = [t.detach().requires_grad_(i < wanted) for i, t in enumerate((x, w, b))]
        for timed in (False, True):
            start = time.perf_counter()
            out = rnf.functional.euler_conv_flow(*tensors, step_size=0.1)
            if wanted:
                torch.autograd.grad(out, tensors[:wanted], g)
            if timed:
                print(str(dtype).split(".")[1], mode, (time.perf_counter() - start) * 1e3, sep=",")
"""


def main(
    threads: Annotated[int, typer.Option(help="torch.set_num_threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Processes of each instruction set; the least time counts.")] = 5,
    output: Annotated[Path, typer.Option(help="CSV to write.")] = Path("bench/results/bfloat16.csv"),
) -> None:
    found = rnf.backend_info()["backends"]["cpu"].get("supported_isas", [])
    sets = [name for name in ("amx", "avx512_bf16", "avx512") if name in found]
    least: dict[tuple[str, str, str], float] = {}
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
                dtype, mode, cost = line.split(",")
                key = (name, dtype, mode)
                least[key] = min(least.get(key, float("inf")), float(cost))
    for (name, dtype, mode), ms in least.items():
        print(f"{name:12} {dtype:9} {mode:17} {ms:7.1f} ms")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction_set", "dtype", "mode", "ms", "machine", "threads", "torch", "version", "time"])
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        about = [processor(), threads, torch.__version__, rnf.__version__, now]
        writer.writerows([*key, round(ms, 1), *about] for key, ms in least.items())


if __name__ == "__main__":
    typer.run(main)
