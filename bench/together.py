"""Functions in fresh processes: one, to measure its memory, or several that torch.distributed joins on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch

from robust_node_fast.training import distributed


class Failed(RuntimeError):
    """A process did not give a result; the message says why."""


def together(
    function: Callable[..., Any], processes: int, *args: Any, threads: int = 1, timeout: float = 600.0
) -> list[Any]:
    """What ``function(*args)`` returns in each of the fresh processes; none of them outlives the call.

    Several are joined by gloo over the loopback interface; each computes with ``threads`` threads.

    Raises:
        Failed: one raised something, died or took longer than ``timeout`` seconds.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deadline = time.monotonic() + timeout
    started, ends = [], []
    try:
        for rank in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            where = (rank, processes, port, threads, timeout)
            process = context.Process(target=_work, args=(theirs, where, function, args), daemon=False)
            process.start()
            theirs.close()  # so that the end of a process that dies is seen
            started.append(process)
            ends.append(ours)
        return [_result(end, deadline, timeout) for end in ends]
    finally:
        for process in started:
            process.kill()
            process.join()


def _result(end: multiprocessing.connection.Connection, deadline: float, timeout: float) -> Any:
    if not end.poll(max(0.0, deadline - time.monotonic())):
        raise Failed(f"no result after {timeout:.0f} s")
    try:
        worked, result = end.recv()
    except EOFError:
        raise Failed("the process died: out of memory?") from None
    if not worked:
        raise Failed(result)
    return result


def _work(
    end: multiprocessing.connection.Connection,
    where: tuple[int, int, int, int, float],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    rank, processes, port, threads, timeout = where
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        try:
            if processes > 1:
                join = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in join.items()}, GLOO_SOCKET_IFNAME="lo")
                stack.enter_context(distributed.process_group("cpu", timeout))
            end.send((True, function(*args)))
        except Exception as error:  # whatever it is, the parent is to say it
            end.send((False, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"))
        end.close()
        os._exit(0)  # at once: gloo's threads may wait for a process that is gone
