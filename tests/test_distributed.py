"""Training on several processes: the run of one process, to the bit after any restart, and no failure that hangs.

All of them are on this machine, gloo over the loopback interface.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import records, start
from torch import nn
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from robust_node_fast import cli, data, training
from robust_node_fast.training import TrainConfig, checkpoint, distributed
from robust_node_fast.training.batch_norm import SyncBatchNorm2d

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)

DIGITS = data.load("digits")
TIMEOUT, KILLS = 60, 2
# As in test_training.py: forked from a server, a process costs milliseconds instead of seconds of imports.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["robust_node_fast.training", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"]
)
VECTORS = {"steps": None, "n_steps": 2, "lr": 0.01}
NO_RAYS = {"consistency": 0.0, "separation": 0.0, "arrival": 0.0}  # random ones, others in every process
Hook = Callable[[int, int], None]  # (rank, step)


def tiny(**changes: Any) -> TrainConfig:
    few = {"epochs": 2, "train_samples": 150, "batch_size": 32, "n_steps": 2, "milestones": [], "checkpoint_every": 2}
    return TrainConfig.recipe("digits", **{**few, **changes})


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    for name in ("model.safetensors", "checkpoint.safetensors"):
        ours, theirs = (checkpoint.load(run / name)[0] for run in (folder, undisturbed))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert records(folder) == records(undisturbed)


# --- processes ---------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def nothing(rank: int, step: int) -> None:
    pass


def work(rank: int, world_size: int, port: int, folders: Sequence[Path], timeout: float, hook: Hook) -> None:
    """One process of a run; what it says at the end lies in ``<folder>.<rank>``."""
    torch.set_num_threads(1)
    where = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()}, GLOO_SOCKET_IFNAME="lo")
    folder = folders[rank % len(folders)]
    try:
        with distributed.process_group("cpu", timeout):
            training.fit(folder, DIGITS, on_step=lambda step, total, record: hook(rank, step))
        said = "done"
    except (training.RunError, training.CheckpointError, training.Interrupted) as error:
        said = f"{type(error).__name__}: {error}"
    folders[0].with_suffix(f".{rank}").write_text(said)
    os._exit(0 if said == "done" else 1)  # at once, whatever gloo's threads are waiting for


@contextmanager
def processes(
    folders: Sequence[Path], world_size: int, timeout: float, hook: Hook
) -> Iterator[list[multiprocessing.process.BaseProcess]]:
    port = free_port()
    started = [
        SERVER.Process(target=work, args=(rank, world_size, port, folders, timeout, hook)) for rank in range(world_size)
    ]
    for process in started:
        process.start()
    try:
        yield list(started)
    finally:
        for process in started:
            process.kill()
            process.join()


def together(
    *folders: Path, world_size: int = 2, timeout: float = TIMEOUT, hook: Hook = nothing, but: int | None = None
) -> list[str]:
    """What each process says once it has ended (``but``: the number of one that never does)."""
    deadline = time.monotonic() + TIMEOUT
    for path in folders[0].parent.glob(f"{folders[0].name}.*"):
        path.unlink()
    with processes(folders, world_size, timeout, hook) as started:
        for rank, process in enumerate(started):
            if rank != but:
                process.join(deadline - time.monotonic())
                assert process.exitcode is not None, "the processes hang"
    paths = [folders[0].with_suffix(f".{rank}") for rank in range(world_size)]
    return [path.read_text() if path.exists() else "" for path in paths]


# --- the same run ------------------------------------------------------------------------------------------------

STAGED = {"model": "StagedCIFARNode", "n_steps": 1, "rate": 0.1, "optimizer": "sgd", "momentum": 0.9, "lr": 0.02}
EVERYTHING = {
    **STAGED,
    "augmentation": "crop-flip-cutout",
    "nesterov": True,
    "warmup_epochs": 1,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "grad_clip": 0.5,
    "channels_last": True,
    "track_eps": 0.01,
}


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({"lr": 0.01}, 2),
        ({**STAGED, "model": "MNISTNode", "accumulate": 3, "batch_size": 40}, 3),  # 40 in 3 parts, each in 3
        (EVERYTHING, 2),  # batch normalisation over both processes
        ({**STAGED, "accumulate": 2}, 2),
        ({**STAGED, "model": "StridedNode", "network": "vanilla", "certified_eps": 0.05}, 2),
        ({**VECTORS, "model": "lyanet"}, 2),
        ({**VECTORS, "model": "zubov", "zubov": {**NO_RAYS, "spacing": 10.0}}, 2),
        ({**STAGED, "model": "MNISTNode", "accumulate": 2, "shard": True}, 2),
        ({**EVERYTHING, "shard": True}, 2),
        ({**STAGED, "model": "StridedNode", "network": "vanilla", "certified_eps": 0.05, "shard": True}, 3),
        ({**VECTORS, "model": "zubov", "zubov": NO_RAYS, "shard": True}, 2),
    ],
    ids=[
        *("penalty", "accumulated", "everything", "batch norm", "certified", "lyanet", "zubov"),
        *(f"sharded, {what}" for what in ("accumulated", "everything", "certified", "zubov")),
    ],
)
def test_several_processes_train_like_one(changes: dict[str, Any], world_size: int, tmp_path: Path) -> None:
    config = tiny(**changes)
    training.fit(start(tmp_path / "one", config), DIGITS)
    folder = start(tmp_path / "several", config)
    assert together(folder, world_size=world_size) == ["done"] * world_size
    expected, found = records(tmp_path / "one"), records(folder)
    assert [record.keys() for record in found] == [record.keys() for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ours:
            tolerance = 0.0 if name.startswith("test_") else 1e-5
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (name, theirs["step"])
    ours, theirs = (checkpoint.load(run / "model.safetensors")[0] for run in (folder, tmp_path / "one"))
    for name, tensor in theirs.items():  # in the mean: Adam makes a whole step of a gradient that is rounding alone
        assert (ours[name] - tensor).double().norm() <= 2e-3 * tensor.double().norm() + 1e-6


@pytest.mark.parametrize(
    "changes", [{**STAGED, "model": "MNISTNode", "regularizer": "jacobian"}, {**VECTORS, "model": "contractive-node"}]
)
def test_shards_train_like_replicas(changes: dict[str, Any], tmp_path: Path) -> None:
    """Objectives that look at the first images of every process."""
    folders = [start(tmp_path / str(shard), tiny(**changes, epochs=1, shard=shard)) for shard in (False, True)]
    for folder in folders:
        assert together(folder) == ["done"] * 2
    replicas, shards = map(records, folders)
    assert len(shards) == len(replicas) > 1
    for ours, theirs in zip(shards, replicas, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def tell_the_share(rank: int, step: int) -> None:
    if step == 2:
        objects = [found for found in gc.get_objects() if isinstance(found, DTensor)]
        held, whole = (sum(each(found) for found in objects) for each in (lambda t: t.to_local().numel(), torch.numel))
        raise training.RunError(f"{len(objects)} tensors, share {held / whole:.2f}")


def test_a_shard_is_a_part(tmp_path: Path) -> None:
    """Else the tests above would pass if nothing were sharded."""
    said = together(start(tmp_path / "run", tiny(model="CIFARNode", shard=True)), hook=tell_the_share)
    for sentence in said:
        found = re.fullmatch(r"RunError: (\d+) tensors, share (.*)", sentence)
        assert found, sentence
        assert int(found[1]) > 30  # weights, and two tensors of Adam for each
        assert float(found[2]) == pytest.approx(0.5, abs=0.1)


def tell_the_seed(rank: int, step: int) -> None:
    if step == 2:
        raise training.RunError(f"seed {torch.initial_seed()}")


def test_dropout_differs_between_processes(tmp_path: Path) -> None:
    said = together(start(tmp_path / "run", tiny()), hook=tell_the_seed)
    assert all(re.fullmatch(r"RunError: seed \d+", sentence) for sentence in said), said
    assert len(set(said)) == 2


def exit_at_5(rank: int, step: int) -> None:
    if step == 5:
        os._exit(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "CIFARNode", "ema_decay": 0.5, "augmentation": "crop-flip"},  # dropout and batch normalisation
        {**VECTORS, "model": "zubov"},  # random rays
        {**VECTORS, "model": "zubov", "zubov": {"consistency": 0.0, "classification": 0.0}},  # no gradient for f
        {"model": "StagedCIFARNode", "ema_decay": 0.5, "shard": True},
    ],
    ids=["CIFARNode", "zubov", "separation alone", "sharded"],
)
def test_three_processes_resume_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    """Three: sums of two numbers know no order."""
    config = tiny(**{"n_steps": 1, "train_samples": 64, "batch_size": 16, **changes})
    undisturbed, stopped = start(tmp_path / "undisturbed", config), start(tmp_path / "stopped", config)
    assert together(undisturbed, world_size=3) == ["done"] * 3
    together(stopped, world_size=3, hook=exit_at_5)
    assert checkpoint.load(stopped / "checkpoint.safetensors")[1]["step"] == 4
    assert together(stopped, world_size=3) == ["done"] * 3
    assert_same_run(stopped, undisturbed)


@pytest.mark.parametrize("shard", [False, True])
def test_another_number_of_processes_is_said(shard: bool, tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny(shard=shard, model="StagedCIFARNode", n_steps=1, ema_decay=0.5))
    together(folder, hook=exit_at_5)
    with pytest.warns(UserWarning, match="processes was 2 and is 1"):
        training.fit(folder, DIGITS)


# --- restarts ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_torchrun_restarts_killed_workers_and_loses_nothing(tmp_path: Path) -> None:
    options = {"n_steps": 2, "epochs": 30, "train_samples": 150, "lr": 0.01, "checkpoint_every": 7}
    config = TrainConfig.recipe("digits", **options, batch_size=32)
    undisturbed, killed, log = start(tmp_path / "undisturbed", config), tmp_path / "killed", tmp_path / "log"
    assert together(undisturbed) == ["done"] * 2
    flat = [
        word
        for name in ("n_steps", "train_samples", "checkpoint_every")
        for word in ("--set", f"{name}={options[name]}")
    ]
    flat += ["--epochs", "30", "--lr", "0.01", "--batch-size", "32"]
    arguments = ["train", "--network", "contractive", "--out", killed, *flat]
    chance = random.Random(os.environ.get("RNF_TEST_SEED", "0"))
    saved, seen, kills, deadline = killed / "checkpoint.safetensors", 0, [], time.monotonic() + 2 * TIMEOUT
    with torchrun(*arguments, log=log, restarts=10) as agent:
        while agent.poll() is None and len(kills) < KILLS and time.monotonic() < deadline:
            now = saved.stat().st_mtime_ns if saved.exists() else 0
            if now != seen:  # it trains: a moment later one of them dies
                time.sleep(chance.uniform(0.0, 0.6))
                os.kill(chance.choice(children(agent.pid)), signal.SIGKILL)
                kills.append(checkpoint.load(saved)[1]["step"])
                # Those that are left may still write: what counts is the checkpoint of those that come after them.
                time.sleep(1.0)
                seen = saved.stat().st_mtime_ns
            time.sleep(0.02)
        assert agent.wait(TIMEOUT) == 0, log.read_text()
    print(f"killed after the checkpoints of steps {kills}\n{log.read_text()}")
    assert len(kills) == KILLS
    assert kills == sorted(kills)
    assert kills[-1] < 150
    assert log.read_text().count("another process is lost or hangs") + log.read_text().count("exitcode: -9") >= KILLS
    assert training.load_config(killed) == config
    assert_same_run(killed, undisturbed)


@contextmanager
def torchrun(*arguments: str | Path, log: Path, restarts: int) -> Iterator[subprocess.Popen[bytes]]:
    options = ["--nnodes", "1", "--nproc-per-node", "2", "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *where, "-m", "robust_node_fast", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(log, "wb") as file:
        agent = subprocess.Popen([str(word) for word in command], env=environment, stdout=file, stderr=file)
    try:
        yield agent
    finally:
        if agent.poll() is None:
            for worker in children(agent.pid):
                os.kill(worker, signal.SIGKILL)
            agent.kill()
            agent.wait()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_under_torchrun_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*changes: str) -> Any:
        where = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for name, value in {**where, "GLOO_SOCKET_IFNAME": "lo"}.items():
            monkeypatch.setenv(name, value)
        few = ["--set", "n_steps=1", "--epochs", "1", "--set", "train_samples=64", "--network", "vanilla"]
        try:
            return CliRunner().invoke(cli.app, ["train", "--out", str(tmp_path / "run"), *few, *changes])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    first = run()
    assert first.exit_code == 0, first.output
    again = run()
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    other = run("--seed", "1")
    assert other.exit_code == 1
    assert "holds a run already" in other.stderr


# --- failures ----------------------------------------------------------------------------------------------------


def hang(rank: int, step: int) -> None:
    if rank == 1 and step == 3:
        signal.pause()


def test_a_hung_process_is_given_up(tmp_path: Path) -> None:
    folder, begin = start(tmp_path / "run", tiny()), time.monotonic()
    said, _ = together(folder, timeout=2, hook=hang, but=1)
    assert 2 < time.monotonic() - begin < 20
    assert said.startswith("RunError: another process is lost or hangs (")
    assert "\n" not in said
    assert checkpoint.load(folder / "checkpoint.safetensors")[1]["step"] == 2
    assert together(folder) == ["done"] * 2


def die(rank: int, step: int) -> None:
    if rank == 0 and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_process_is_noticed(tmp_path: Path) -> None:
    _, said = together(start(tmp_path / "run", tiny()), hook=die)
    assert said.startswith("RunError: another process is lost or hangs (")
    assert "\n" not in said


def terminate(rank: int, step: int) -> None:
    if rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny(checkpoint_every=100))
    said = together(folder, hook=terminate)
    step = checkpoint.load(folder / "checkpoint.safetensors")[1]["step"]
    assert step in (3, 4)  # Python runs the handler a moment later
    assert said == [f"Interrupted: stopped by SIGTERM after step {step} of 10"] * 2
    assert together(folder) == ["done"] * 2
    training.prepare(tiny(checkpoint_every=100), tmp_path / "undisturbed")
    assert together(tmp_path / "undisturbed") == ["done"] * 2
    assert_same_run(folder, tmp_path / "undisturbed")


def fill_the_disk(rank: int, step: int) -> None:
    if rank == 0 and step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_disk_that_is_full_for_one_stops_all(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())
    said = together(folder, hook=fill_the_disk)
    sentence = f"RunError: the run folder {folder} cannot be written ([Errno 27] File too large)"
    assert said == [sentence] * 2
    assert checkpoint.load(folder / "checkpoint.safetensors")[1]["step"] == 2
    assert together(folder) == ["done"] * 2


def forbid_writing(folder: Path, rank: int, step: int) -> None:
    if rank == 0 and step == 3:
        folder.chmod(0o555)
        # Root may write anywhere, unless it gives up its capabilities: version 3, this process; none of 64.
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_folder_that_becomes_read_only_stops_all(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())
    for sentence in together(folder, hook=functools.partial(forbid_writing, folder)):
        assert sentence.startswith(f"RunError: the run folder {folder} cannot be written ([Errno 13] Permission denied")
        assert "\n" not in sentence
    folder.chmod(0o755)
    assert checkpoint.load(folder / "checkpoint.safetensors")[1]["step"] == 2
    assert together(folder) == ["done"] * 2


def test_a_loss_that_is_not_finite_stops_all(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny(optimizer="sgd", lr=1e15, checkpoint_every=1))
    said = together(folder)
    assert said[0] == said[1]
    assert said[0].startswith("Refused: the loss is not finite at step ")
    kept = checkpoint.load(folder / "checkpoint.safetensors")[1]["step"]
    assert said[0].endswith(f"; the checkpoint of step {kept} is kept")
    assert f"at step {kept + 1}:" in said[0]


def test_a_truncated_checkpoint_stops_all(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())
    together(folder, hook=exit_at_5)
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    for sentence in together(folder):
        assert sentence.startswith(f"CheckpointError: {path} is truncated, corrupted or no safetensors file")


def test_processes_with_folders_of_their_own(tmp_path: Path) -> None:
    ahead, behind = start(tmp_path / "ahead", tiny()), start(tmp_path / "behind", tiny())
    together(ahead, hook=exit_at_5)
    for sentence in together(ahead, behind):
        assert sentence.startswith("RunError: ")
        assert "is not the same file for all processes (steps 0 to 4): they need one run folder" in sentence


def test_batches_too_small_to_be_shared(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny(train_samples=33))
    message = "a batch of 1 images is too small for 2 processes that take it in 1 parts: choose another --batch-size"
    assert together(folder) == [f"RunError: {message}"] * 2


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with (
        pytest.raises(training.RunError, match="the processes do not find each other"),
        distributed.process_group("cpu", 1),
    ):
        pass
    monkeypatch.delenv("MASTER_PORT")
    with (
        pytest.raises(training.RunError, match=r"do not find each other .*MASTER_PORT"),
        distributed.process_group("cpu", 1),
    ):
        pass


def test_cards_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with (
        pytest.raises(training.RunError, match="LOCAL_RANK is not set, all processes would use the same card"),
        distributed.process_group("cuda", 1),
    ):
        pass
    monkeypatch.setenv("LOCAL_RANK", "99")
    with (
        pytest.raises(training.RunError, match=r"^card 99 cannot be used \([^\n]*\)$"),
        distributed.process_group("cuda", 1),
    ):
        pass


def test_a_gradient_that_is_not_averaged_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """``collect_all`` itself says nothing of what became of the futures."""

    class Work:
        def get_future(self) -> torch.futures.Future[Any]:
            found: torch.futures.Future[Any] = torch.futures.Future()
            found.set_exception(RuntimeError("lost"))
            return found

    class Bucket:
        def gradients(self) -> list[torch.Tensor]:
            return [torch.ones(2)]

        def buffer(self) -> torch.Tensor:
            return torch.ones(2)

    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: Work())
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    with pytest.raises(RuntimeError, match="lost"):
        distributed._average_each(Bucket()).wait()


# --- batch normalisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sync_batch_norm_alone_is_batch_norm(dtype: torch.dtype) -> None:
    plain, ours = nn.BatchNorm2d(5), SyncBatchNorm2d(5)
    x = (3.0 * torch.randn(6, 5, 4, 3) + 100.0).to(dtype)
    found = []
    for layer in (plain, ours):
        torch.manual_seed(0)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        input = x.clone().requires_grad_()
        output = layer(input)
        assert output.dtype == dtype
        output.backward(torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(dtype))
        found.append([output, input.grad, layer.weight.grad, layer.bias.grad, *layer.state_dict().values()])
        found[-1].append(layer.eval()(x))
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for ours_, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=tolerance, atol=tolerance)
    assert ours.state_dict().keys() == plain.state_dict().keys()
