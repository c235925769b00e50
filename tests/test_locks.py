"""Folders that one process holds, and work that several share."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from helpers import start

from robust_node_fast import data, training
from robust_node_fast.training import InUse, TrainConfig, alone, locks, shared_out

pytestmark = pytest.mark.skipif(locks.fcntl is None, reason="this system has no locks on folders")


def _hold(folder: Path, pipe: Connection) -> None:
    with alone(folder):
        pipe.send("held")
        pipe.recv()


def test_a_folder_is_held_until_its_holder_is_gone(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, theirs))
    holder.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == "held"
        with pytest.raises(InUse, match=f"^{tmp_path} is in use: another process works there$"), alone(tmp_path):
            pass
        with alone(tmp_path.parent):  # the folder itself, not what is around it
            pass
    finally:
        holder.kill()  # not a word to anyone
        holder.join()
    with alone(tmp_path):
        assert not list(tmp_path.iterdir())  # nothing is written
    with alone(tmp_path):
        pass


def _wait(folder: Path, pipe: Connection) -> None:
    pipe.send("here")
    with alone(folder, wait=True):
        pipe.send("held")


def test_one_that_waits_has_the_folder_next(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    waiting = multiprocessing.get_context("spawn").Process(target=_wait, args=(tmp_path, theirs))
    try:
        with alone(tmp_path):
            waiting.start()
            assert ours.poll(60)
            assert ours.recv() == "here"
            assert not ours.poll(0.3)
        assert ours.poll(60)
        assert ours.recv() == "held"
    finally:
        waiting.kill()
        waiting.join()


def test_an_error_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone(tmp_path):
        raise ZeroDivisionError
    with alone(tmp_path):
        pass


def test_no_two_train_in_a_folder(tmp_path: Path) -> None:
    run = start(tmp_path / "run", TrainConfig.recipe("digits", n_steps=1, steps=2))
    with alone(run), pytest.raises(InUse, match="another process works there"):
        training.fit(run, data.load("digits"))
    assert training.fit(run, data.load("digits")).accuracy > 0.0


def test_what_others_do_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(locks.time, "sleep", pauses.append)
    asked: list[int] = []

    def compute(work: int) -> str:
        asked.append(work)
        if work in (1, 2) and asked.count(work) < 3:
            raise InUse("another process works there")
        return f"{work} here"

    def done(work: int) -> str | None:
        return f"{work} there" if work == 2 and asked.count(2) == 2 else None

    found = list(shared_out([1, 2, 3, 4], done, compute))
    assert found == [(3, "3 here"), (4, "4 here"), (1, "1 here"), (2, "2 there")]
    assert asked == [1, 2, 3, 4, 1, 2, 1]
    assert len(pauses) == 1  # when nothing was left but what others had
