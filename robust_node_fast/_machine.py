"""What a figure was measured on, in words."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch

from robust_node_fast import _backends

__all__ = ["machine", "processor"]


@lru_cache
def machine() -> str:
    """Processor, our kernels' instructions and PyTorch's own, e.g. ``AMD EPYC, avx512_bf16, PyTorch AVX2``."""
    isa = _backends.backend_info()["backends"]["cpu"].get("isa", "no compiled kernels")
    return f"{processor()}, {isa}, PyTorch {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
