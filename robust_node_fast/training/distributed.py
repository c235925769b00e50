"""Several processes that train as one, on torch.distributed; where there is only one, everything here is trivial.

``process_group`` joins the processes that ``torchrun`` started. A batch is the same however many processes share it:
each takes a part (``share``), sums go over all of them (``total``), and rank 0 alone writes (``on_rank_0``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robust_node_fast.training.errors import RunError

__all__ = [
    "collectives",
    "gradients_averaged",
    "is_parallel",
    "largest",
    "local_rank",
    "on_rank_0",
    "parallel",
    "process_group",
    "rank",
    "share",
    "total",
    "wait_for_all",
    "world_size",
]


def is_parallel() -> bool:
    """Whether this process belongs to a process group, be it the only one."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_parallel() else 0


def local_rank() -> int:
    """Among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if is_parallel() else 1


@contextmanager
def process_group(device: str, timeout: float) -> Iterator[None]:
    """The process group that ``torchrun`` describes in the environment, if it started this process.

    Args:
        device: ``"cuda"`` (NCCL; each process takes the card of its local rank), or another one (gloo).
        timeout: seconds after which a process that waits for another one gives up.

    Raises:
        RunError: the processes do not find each other, or all would use the same card.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    cuda = torch.device(device).type == "cuda"
    if cuda and torch.device(device).index is not None:
        raise RunError(f"device {device!r} is one card for all processes: choose --device cuda, a card for each")
    if cuda:
        _take_card()
    try:
        _init("nccl" if cuda else "gloo", timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:  # ValueError: incomplete environment
        raise RunError(f"the processes do not find each other ({_reason(error)})") from error
    with collectives():
        yield
    dist.destroy_process_group()  # not after a failure: it would wait for processes that may be gone


def _take_card() -> None:
    if "LOCAL_RANK" not in os.environ and os.environ["WORLD_SIZE"] != "1":
        raise RunError("LOCAL_RANK is not set, all processes would use the same card: start them with torchrun")
    card = local_rank()
    try:
        torch.cuda.set_device(card)
    except (AssertionError, RuntimeError) as error:  # AssertionError: PyTorch built without CUDA
        raise RunError(f"card {card} cannot be used ({_reason(error)})") from error


def _init(backend: str, timeout: timedelta) -> None:
    environment = os.environ
    one_machine = environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]
    if one_machine and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives its processes. New ones would find the addresses of the dead in it, were it not for
        # the prefix (https://github.com/pytorch/pytorch/issues/135712; on several machines the counts may differ).
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        agent = dist.TCPStore(address, port, timeout=timeout)  # type: ignore[attr-defined]
        store = dist.PrefixStore(  # type: ignore[attr-defined]
            f"restart {environment['TORCHELASTIC_RESTART_COUNT']}", agent
        )
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, timeout=timeout)


@contextmanager
def collectives() -> Iterator[None]:
    """A ``RunError`` for a process that is lost, or silent for longer than the timeout."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors are plain RuntimeErrors; ours have a type of their own, and may name a file of any name.
        if is_parallel() and (
            isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
        ):
            raise RunError(f"another process is lost or hangs ({_reason(error)})") from error
        raise


def _reason(error: Exception) -> str:
    """The first sentence: what comes after it is advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def parallel(module: nn.Module, *, reaches_all: bool = True) -> nn.Module:
    """``module`` in DistributedDataParallel, which averages its gradients over the processes; alone, ``module``.

    ``reaches_all``: whether every parameter has a gradient.
    """
    if world_size() == 1:
        return module
    replicas = DistributedDataParallel(module, gradient_as_bucket_view=True, find_unused_parameters=not reaches_all)
    replicas.register_comm_hook(None, lambda _, bucket: _average_each(bucket))
    return replicas


def _average_each(bucket: Any) -> torch.futures.Future[Tensor]:
    """Average the gradients of a ``dist.GradBucket`` one by one.

    The order in which three or more numbers are added depends on their place in the tensor, and DDP arranges its
    buckets anew after the first step: averaged as a whole, a resumed run would end with other last bits.
    """
    works = [dist.all_reduce(gradient.div_(world_size()), async_op=True) for gradient in bucket.gradients()]
    done = torch.futures.collect_all([work.get_future() for work in works])

    def finish(all_done: torch.futures.Future[list[torch.futures.Future[Any]]]) -> Tensor:
        for each in all_done.wait():
            each.wait()  # for a failure to be one; and with NCCL, whose futures are done before the work is
        return bucket.buffer()

    return done.then(finish)


def gradients_averaged(module: nn.Module, now: bool) -> AbstractContextManager[object]:
    """A forward and backward pass of what ``parallel`` or ``shard`` gave: gradients are averaged now or later."""
    if hasattr(module, "set_requires_gradient_sync"):  # sharded
        module.set_requires_gradient_sync(now)  # type: ignore[operator]
        return nullcontext()
    return nullcontext() if now or not isinstance(module, DistributedDataParallel) else module.no_sync()


def share(batch: Tensor) -> Tensor:
    """This process's part of a batch."""
    return torch.tensor_split(batch, world_size())[rank()]


def total(values: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if is_parallel():
        dist.all_reduce(values)
    return values


def largest(value: int, device: str) -> int:
    """Maximum over the processes."""
    if not is_parallel():
        return value
    found = torch.tensor([value], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def wait_for_all() -> None:
    if is_parallel():
        dist.barrier()


def on_rank_0(action: Callable[[], object]) -> None:
    """Run ``action`` on rank 0 while the others wait; if it fails, all fail.

    Raises:
        RunError: on the others, with the message of what rank 0 raised.
    """
    if not is_parallel():
        action()
        return
    failure = None
    if rank() == 0:
        try:
            action()
        except Exception as error:  # raised again below, once the others know
            failure = error
    message: list[str | None] = [None if failure is None else str(failure)]
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[0] is not None:
        raise RunError(message[0])
