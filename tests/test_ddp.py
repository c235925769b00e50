"""Contract with DistributedDataParallel: two processes give the gradients of one."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_close, parameter_gradients
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import robust_node_fast as rnf

WORLD, TIMEOUT = 2, 120


def model_and_batch() -> tuple[rnf.models.MNISTNode, Tensor, Tensor]:
    torch.manual_seed(11)
    model = rnf.models.MNISTNode(channels=4, n_steps=3, step_size=0.1, image_size=12)
    return model, torch.rand(8, 1, 12, 12), torch.randint(10, (8,))


def loss_of(model: torch.nn.Module, flow: rnf.models.MNISTNode, images: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model(images), labels) + flow.contraction_penalty(rate=2.0)


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=TIMEOUT),
    )
    try:
        model, images, labels = model_and_batch()
        share = slice(4 * rank, 4 * (rank + 1))
        parallel = DistributedDataParallel(model)
        loss_of(parallel, model, images[share], labels[share]).backward()
        torch.save(parameter_gradients(model), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo")
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    model, images, labels = model_and_batch()
    loss_of(model, model, images, labels).backward()
    expected = parameter_gradients(model)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.spawn(worker, args=(port, str(tmp_path)), nprocs=WORLD, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=5):  # True once all have ended well; raises what a worker raised
            assert time.monotonic() < deadline, "the workers hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            assert_close(found[name], gradient, 1e-5)
