"""Peak memory of a call, and of training in a fresh process of its own.

    python -m robust_node_fast.bench.memory '<workload as JSON>' <provider> <threads>

The process warms the provider up on one sample and one step, so that libraries, thread stacks and code do not count,
then runs forward and backward once at full size.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .providers import PROVIDERS, Prepared
from .registry import Problem, Workload


def growth(call: Callable[[], Any]) -> float | None:
    """Megabytes by which the resident memory of this process exceeds, at most, what it was before the call.

    ``None`` where the system does not say (anything but Linux).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator holds would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
    except (OSError, AttributeError):
        return None
    del result
    return max(0.0, (peak - before) / 1024)


def resident() -> float:
    """Megabytes of this process that are in memory now. ``OSError`` on anything but Linux."""
    return _status("VmRSS") / 1024


def _status(key: str) -> float:
    """A line of ``/proc/self/status``, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def saved(prepared: Prepared) -> float:
    """Megabytes of distinct storage, parameters left out, that autograd saves during a call."""
    known = {p.untyped_storage().data_ptr() for p in prepared.parameters}
    kept: dict[int, Tensor] = {}  # holding the tensors: an address that is freed might come again

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prepared.call()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in known) / 2**20


def in_fresh_process(work: Workload, provider: str, threads: int) -> dict[str, float | None]:
    """``peak_mb`` and ``saved_mb`` of forward and backward.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    arguments = [json.dumps(dataclasses.asdict(work)), provider, str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "robust_node_fast.bench.memory", *arguments], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    found: dict[str, float | None] = json.loads(done.stdout)
    return found


def main(description: str, provider: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    work = Workload(**json.loads(description))
    small = dataclasses.replace(work, batch=1, n_steps=1)
    PROVIDERS[provider].prepare(Problem(small), "memory", int(threads)).call()
    prepared = PROVIDERS[provider].prepare(Problem(work), "memory", int(threads))
    print(json.dumps({"peak_mb": growth(prepared.call), "saved_mb": saved(prepared)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
