"""Several processes in one folder: who holds a run's folder, and work that they share out among themselves."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from robust_node_fast.training.errors import InUse

try:
    import fcntl
except ImportError:  # Windows: two processes in a folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "shared_out"]

_PAUSE = 2.0  # seconds until work that others had is asked for again

Work = TypeVar("Work")
Found = TypeVar("Found")


@contextmanager
def alone(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder; given back when the process ends, however that comes about. Nothing is written.

    Where the system has no locks on folders, nothing is held.

    Raises:
        InUse: another holder has it, and this one is not to ``wait``.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InUse(f"{folder} is in use: another process works there") from None
        except OSError:  # some network file systems
            pass
        yield
    finally:
        os.close(descriptor)


def shared_out(
    works: Iterable[Work], done: Callable[[Work], Found | None], compute: Callable[[Work], Found]
) -> Iterator[tuple[Work, Found]]:
    """Every work with what was found, in the order in which it is there; other processes may take from the same works.

    Args:
        works: to do.
        done: what another process has found in the meantime, or None.
        compute: raises ``InUse`` where another process is at it: then the others come first.
    """
    left, busy = deque(works), 0
    while left:
        work = left.popleft()
        found = done(work)
        if found is None:
            try:
                found = compute(work)
            except InUse:
                left.append(work)
                busy += 1
                if busy >= len(left):
                    time.sleep(_PAUSE)
                    busy = 0
                continue
        busy = 0
        yield work, found
