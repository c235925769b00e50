"""Times of competing ways to do the same work on the CPU of a machine that may be busy with something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

__all__ = ["interleaved"]


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Seconds per call of each candidate: the least of ``rounds``, taken in turns so that drift hits all alike.

    Each is called once first, outside the measurement.
    """
    for function in candidates.values():
        function()
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, function in candidates.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
