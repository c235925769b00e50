"""Which instructions PyTorch's own kernels had best use on this machine: it must not lose by a poor choice.

``python -m robust_node_fast.bench.capability`` prints the value for ``ATEN_CPU_CAPABILITY``, which PyTorch (and what
``torch.compile`` writes) reads when it starts; ``make bench`` sets it. On AMD's processors softplus takes several times
longer with AVX-512 than with AVX2 (torch 2.14). Convolutions and this package's kernels choose for themselves. Mind
that Inductor's cache ignores the variable: code cached under one value gives NaN under another. A run of the benchmark
has a cache of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

CANDIDATES = ("avx2", "avx512")
_SECONDS = """
import time, torch
x = torch.randn(1 << 20)
def once():
    start = time.perf_counter()
    torch.nn.functional.softplus(x)
    return time.perf_counter() - start
print(torch.backends.cpu.get_cpu_capability(), min(once() for _ in range(20)))
"""


def best() -> str:
    """The candidate with which softplus, most of the time beside the convolutions, is fastest; empty if there is none.

    One that this processor does not have counts as what PyTorch takes in its place.
    """
    found: dict[str, tuple[str, float]] = {}
    for candidate in CANDIDATES:
        done = subprocess.run(
            [sys.executable, "-c", _SECONDS],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "ATEN_CPU_CAPABILITY": candidate},
        )
        name, seconds = done.stdout.split()
        found[candidate] = name, float(seconds)
    candidate = min(found, key=lambda candidate: found[candidate][1])
    return candidate if found[candidate][0].lower() == candidate else ""


def advice() -> str | None:
    """What to say when PyTorch runs with another one than the best, or ``None``."""
    wanted, taken = best(), torch.backends.cpu.get_cpu_capability()
    if not wanted or wanted == taken.lower():
        return None
    return f"PyTorch runs with {taken}; it is faster here, and the comparison fair, with ATEN_CPU_CAPABILITY={wanted}"


if __name__ == "__main__":
    print(best())
