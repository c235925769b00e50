"""Training runs: they learn, contract, resume to the bit after SIGKILL, and never leave or accept a broken file."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import records, start
from safetensors.torch import load_file, save_file

from robust_node_fast import data, training
from robust_node_fast.certify import linf_certified, worst_case_logits
from robust_node_fast.training import checkpoint, trainer
from robust_node_fast.training.config import TrainConfig
from robust_node_fast.training.objective import noisy, objective_of

DIGITS = data.load("digits")
ZUBOV = {"model": "zubov", "network": "vanilla"}
FEW = dataclasses.replace(  # for the wide network
    DIGITS,
    train_images=DIGITS.train_images[:64],
    train_labels=DIGITS.train_labels[:64],
    test_images=DIGITS.test_images[:16],
    test_labels=DIGITS.test_labels[:16],
)
# A fork inherits PyTorch's loaded library but not its threads: the children are forked from a server that computes
# nothing, and use one thread. That makes a kill cost milliseconds instead of seconds of imports.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["robust_node_fast.training", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"]  # all slow to import
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and lose much on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig.recipe("digits", **{"epochs": 2, "milestones": [1], "lr_decay": 0.5, "n_steps": 3, **changes})


def vectors(model: str, **changes: Any) -> TrainConfig:
    """A Zubov-Net, or what it is compared with; the last of its epochs is cut short."""
    return TrainConfig.recipe("digits", model=model, **{"steps": 15, "batch_size": 256, **changes})


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    ours, _ = checkpoint.load(folder / "checkpoint.safetensors")
    theirs, _ = checkpoint.load(undisturbed / "checkpoint.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert records(folder) == records(undisturbed)


class Stop(Exception):
    pass


def stop_at(step: int) -> trainer.OnStep:
    def on_step(done: int, total: int, record: dict[str, float]) -> None:
        if done == step:
            raise Stop

    return on_step


# --- what training reaches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, training.Outcome]:
    folder = tmp_path_factory.mktemp("recipe")
    for network in training.NETWORKS:
        start(folder / network, TrainConfig.recipe("digits", network=network))
    return {network: training.fit(folder / network, DIGITS) for network in training.NETWORKS}


def test_digits_recipe_learns(outcomes: dict[str, training.Outcome]) -> None:
    for outcome in outcomes.values():
        assert outcome.accuracy >= 0.95
        assert outcome.steps == 30 * 23


def test_only_the_contractive_network_contracts(outcomes: dict[str, training.Outcome]) -> None:
    contractive, vanilla = outcomes["contractive"], outcomes["vanilla"]
    assert contractive.satisfied
    assert contractive.rate >= (1 - training.RATE_TOLERANCE) * 2.0
    assert contractive.penalty <= 1e-2
    assert not vanilla.satisfied
    assert vanilla.rate < 0 < vanilla.penalty
    assert "satisfies its rate" in training.rate_sentence(contractive)
    assert "does NOT satisfy its rate" in training.rate_sentence(vanilla)
    model, _ = training.load_model(contractive.folder)
    # The guarantee itself, from the weights in float64: 2 a m + b (r + q) <= -rate where m < 0.
    weight = model.double().flow.weight.detach()
    centre = weight[..., 1, 1].diagonal(dim1=-2, dim2=-1)
    magnitude = weight.abs().sum((-2, -1))
    off_centre = magnitude.sum(-1) + magnitude.sum(-2) - 2 * centre.abs()
    assert bool((centre < 0).all())
    rate = float(-(0.2 * centre + off_centre).max())
    assert rate == pytest.approx(contractive.rate, rel=1e-4)


def test_metrics_show_the_way(outcomes: dict[str, training.Outcome]) -> None:
    for outcome in outcomes.values():
        steps = [record for record in records(outcome.folder) if "loss" in record]
        epochs = [record for record in records(outcome.folder) if "test_accuracy" in record]
        assert [record["step"] for record in steps] == list(range(1, outcome.steps + 1))
        assert [record["step"] for record in epochs] == list(range(23, outcome.steps + 1, 23))
        assert epochs[-1]["test_accuracy"] == outcome.accuracy
        assert sum(record["loss"] for record in steps[-23:]) < 0.1 * sum(record["loss"] for record in steps[:23])
        lr = {record["epoch"]: record["lr"] for record in steps}
        assert [lr[epoch] for epoch in (0, 21, 22, 26, 27, 29)] == pytest.approx([0.05, 0.05, 5e-3, 5e-3, 5e-4, 5e-4])


def test_both_networks_start_alike(tmp_path: Path) -> None:
    firsts = []
    for network in training.NETWORKS:
        folder = start(tmp_path / network, tiny(network=network))
        with pytest.raises(Stop):
            training.fit(folder, DIGITS, on_step=stop_at(1))
        firsts.append(records(folder)[0])
    assert firsts[0]["loss"] == firsts[1]["loss"]  # same weights and same batch
    assert firsts[0]["penalty"] == firsts[1]["penalty"] > 0


# --- resuming ----------------------------------------------------------------------------------------------------


def train_in_child(folder: str) -> None:
    torch.set_num_threads(1)
    training.fit(Path(folder), DIGITS)


def run_child(folder: Path, kill_after: float | None = None) -> int:
    process = SERVER.Process(target=train_in_child, args=(str(folder),))
    process.start()
    try:
        process.join(kill_after)
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_files_are_on_the_disk_before_others_rely_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in a file, then its name, then its folder; metrics before the checkpoint that counts on them."""
    calls: list[tuple[str, str]] = []
    sync, move = os.fsync, os.replace

    def fsync(number: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        sync(number)

    def replace(source: Path, target: Path) -> None:
        calls.append(("move", Path(target).name))
        move(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    training.fit(start(tmp_path / "run", tiny(epochs=1, batch_size=16, checkpoint_every=2)), FEW)
    moved = [i for i, (what, _) in enumerate(calls) if what == "move"]
    names = [calls[i][1] for i in moved]
    assert names.count("checkpoint.safetensors") > 1
    assert {"config.json", "metrics.jsonl", "model.safetensors"} <= set(names)
    for i in moved:
        name = calls[i][1]
        assert calls[i - 1] == ("sync", f".{name}.part")
        assert calls[i + 1] == ("sync", "run")
        if name == "checkpoint.safetensors":
            assert calls[i - 2] == ("sync", "metrics.jsonl")


# A checkpoint after every step: most of the time goes into writing them, and many kills hit a write.
@pytest.mark.parametrize(
    "config",
    [
        tiny(checkpoint_every=1, epochs=3),
        TrainConfig.recipe("digits", model="zubov", steps=69, batch_size=64, checkpoint_every=1),
    ],
    ids=["contractive", "zubov"],
)
def test_sigkill_at_random_moments_loses_nothing(config: TrainConfig, tmp_path: Path) -> None:
    undisturbed = start(tmp_path / "undisturbed", config)
    killed = start(tmp_path / "killed", config)
    run_child(tmp_path)  # fails at once; the server has forked once and is warm
    begin = time.perf_counter()
    assert run_child(undisturbed) == 0
    whole = time.perf_counter() - begin
    moments = random.Random(os.environ.get("RNF_TEST_SEED", "0"))
    kills, steps = 0, [0]
    for _ in range(100):
        code = run_child(killed, kill_after=moments.uniform(0.1, 0.4) * whole)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        if (killed / "checkpoint.safetensors").exists():
            _, state = checkpoint.load(killed / "checkpoint.safetensors")
            steps.append(state["step"])
    assert code == 0
    assert kills >= 2
    assert any(0 < step < 69 for step in steps), steps  # killed half-way, not only before the start
    assert steps == sorted(steps)
    assert_same_run(killed, undisturbed)


@pytest.mark.parametrize(
    ("config", "dataset"),
    [
        (tiny(epochs=3, network="vanilla", checkpoint_every=5), DIGITS),
        (tiny(epochs=3, checkpoint_every=23), DIGITS),  # on the boundary of an epoch
        (
            tiny(
                epochs=3, optimizer="sgd", momentum=0.9, lr=1e-3, weight_decay=1e-2, grad_clip=0.5, checkpoint_every=7
            ),
            DIGITS,
        ),
        (
            tiny(epochs=3, model="CIFARNode", n_steps=1, batch_size=16, checkpoint_every=3),
            FEW,
        ),  # dropout and batch norm
        (tiny(epochs=3, model="StridedNode", n_steps=1, batch_size=16, certified_eps=0.05, checkpoint_every=3), FEW),
        (vectors("zubov", checkpoint_every=5, ema_decay=0.9, grad_clip=1.0), DIGITS),
        (
            vectors("zubov", checkpoint_every=4, optimizer="sgd", lr=1e-4, momentum=0.9, nesterov=True, accumulate=2),
            DIGITS,
        ),
        (vectors("contractive-node", checkpoint_every=5), DIGITS),
        (vectors("lyanet", checkpoint_every=5), DIGITS),
    ],
    ids=["adam", "epoch", "sgd", "dropout", "certified", "zubov", "zubov-sgd", "contractive-node", "lyanet"],
)
def test_resumes_to_the_bit_from_any_step(config: TrainConfig, dataset: data.Dataset, tmp_path: Path) -> None:
    undisturbed = start(tmp_path / "undisturbed", config)
    total = training.fit(undisturbed, dataset).steps
    stopped = start(tmp_path / "stopped", config)
    for step in sorted({total // 2, *random.Random(0).sample(range(1, total), 3)}):  # half: in the second of 3 epochs
        with pytest.raises(Stop):
            training.fit(stopped, dataset, on_step=stop_at(step))
        torch.randn(5)  # the caller's random numbers do not matter
    training.fit(stopped, dataset)
    assert_same_run(stopped, undisturbed)


def test_seeds_and_networks_differ(tmp_path: Path) -> None:
    runs = {"a": tiny(), "b": tiny(seed=1), "c": tiny(network="vanilla")}
    weights = []
    for name, config in runs.items():
        training.fit(start(tmp_path / name, config), DIGITS)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert len(set(weights)) == 3


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny(checkpoint_every=10))
    with pytest.raises(Stop):
        training.fit(folder, DIGITS, on_step=stop_at(17))
    assert [record["step"] for record in records(folder)] == list(range(1, 18))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "lo')  # a line that a kill tore
    training.fit(folder, DIGITS)
    assert [record["step"] for record in records(folder) if "loss" in record] == list(range(1, 47))


def test_fitting_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())
    first = training.fit(folder, DIGITS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert training.fit(folder, DIGITS) == first
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_changed_environment_is_said(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny(checkpoint_every=5))
    with pytest.raises(Stop):
        training.fit(folder, DIGITS, on_step=stop_at(6))
    tensors, state = checkpoint.load(folder / "checkpoint.safetensors")
    state["environment"]["torch"] = "1.0"
    checkpoint.save(folder / "checkpoint.safetensors", tensors, state)
    with pytest.warns(UserWarning, match=r"torch was 1\.0 and is .* may differ in their last bits"):
        training.fit(folder, DIGITS)


def test_a_setting_that_is_newer_than_a_run_has_its_default(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())
    first = training.fit(folder, DIGITS)
    content = json.loads((folder / "config.json").read_text())
    del content["regularizer"]
    (folder / "config.json").write_text(json.dumps(content))
    for name in ("checkpoint.safetensors", "model.safetensors"):
        tensors, state = checkpoint.load(folder / name)
        del state["config"]["regularizer"]
        checkpoint.save(folder / name, tensors, state)
    assert training.load_model(folder)[1] == first.config
    assert training.fit(folder, DIGITS) == first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(number: signal.Signals, tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())
    before = signal.getsignal(number)

    def on_step(step: int, total: int, record: dict[str, float]) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(training.Interrupted, match=rf"stopped by {number.name} after step [45] of 46") as stopped:
        training.fit(folder, DIGITS, on_step=on_step)
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    _, state = checkpoint.load(folder / "checkpoint.safetensors")
    assert state["step"] in (4, 5)  # Python runs the handler a moment later
    assert len(records(folder)) == state["step"]
    training.fit(folder, DIGITS)
    training.fit(start(tmp_path / "undisturbed", tiny()), DIGITS)
    assert_same_run(folder, tmp_path / "undisturbed")


def test_second_sigint_acts_at_once(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())

    def on_step(step: int, total: int, record: dict[str, float]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            training.fit(folder, DIGITS, on_step=on_step)
    finally:
        signal.signal(signal.SIGINT, before)


def test_fit_outside_the_main_thread(tmp_path: Path) -> None:
    folder, done = start(tmp_path / "run", tiny(epochs=1)), []
    thread = threading.Thread(target=lambda: done.append(training.fit(folder, DIGITS)))
    thread.start()
    thread.join()
    assert done[0].steps == 23


# --- checkpoints -------------------------------------------------------------------------------------------------


def saved(path: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 2),
        "half": torch.randn(4).bfloat16(),
        "strided": torch.randn(4, 6).t(),
    }
    checkpoint.save(path, tensors, {"step": 3, "lr": 0.1, "nested": {"list": [1, 2]}})
    return tensors


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    tensors = saved(path)
    loaded, state = checkpoint.load(path)
    assert state == {"step": 3, "lr": 0.1, "nested": {"list": [1, 2]}}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert load_file(path).keys() == tensors.keys()  # anyone can read it


def test_a_checkpoint_that_is_replaced_meanwhile_is_read_whole(tmp_path: Path) -> None:
    """As by `rnf evaluate` beside a training that goes on: the old one or the new one, never parts of both."""
    path = tmp_path / "checkpoint.safetensors"
    writer = """
import itertools, sys, torch
from pathlib import Path
from robust_node_fast.training import checkpoint
for k in itertools.count():
    checkpoint.save(Path(sys.argv[1]), {"a": torch.full((2000,), float(k))}, {"step": k})
"""
    process = subprocess.Popen([sys.executable, "-c", writer, str(path)])
    try:
        deadline = time.monotonic() + 60.0
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        steps = set()
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            tensors, state = checkpoint.load(path)
            assert bool((tensors["a"] == state["step"]).all())
            steps.add(state["step"])
    finally:
        process.kill()
        process.wait()
    assert len(steps) > 10


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    saved(path)
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(checkpoint.CheckpointError) as error:
            checkpoint.load(path)
        assert str(path) in str(error.value), f"byte {position} of {len(content)}"
        assert "\n" not in str(error.value), f"byte {position} of {len(content)}"


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    saved(path)
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(checkpoint.CheckpointError, match="truncated, corrupted or no safetensors file"):
            checkpoint.load(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(checkpoint.CheckpointError, match="truncated, corrupted"):
        checkpoint.load(tmp_path)  # a folder
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="not one that robust_node_fast wrote"):
        checkpoint.load(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    saved(path)
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, no_space)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    checkpoint.save(path, {"a": torch.zeros(2)}, {})  # what the failure left behind is in nobody's way
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.safetensors"]


def test_disk_full_while_training_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = start(tmp_path / "run", tiny(checkpoint_every=5))

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", no_space)
    with pytest.raises(training.RunError, match=r"the run folder .* cannot be written .*No space left"):
        training.fit(folder, DIGITS)


def stopped_run(folder: Path) -> Path:
    start(folder, tiny(checkpoint_every=5))
    with pytest.raises(Stop):
        training.fit(folder, DIGITS, on_step=stop_at(6))
    return folder


@pytest.mark.parametrize("load", [training.load_model, lambda folder: training.fit(folder, DIGITS)])
def test_broken_checkpoints_are_refused(load: Any, tmp_path: Path) -> None:
    folder = stopped_run(tmp_path / "run")
    path = folder / "checkpoint.safetensors"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-1000] ^= 0x40
    path.write_bytes(flipped)
    with pytest.raises(checkpoint.CheckpointError, match="does not match its SHA-256"):
        load(folder)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(checkpoint.CheckpointError, match="truncated, corrupted"):
        load(folder)
    path.write_bytes(content)
    load(folder)


def test_mismatching_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = stopped_run(tmp_path / "run")
    (folder / "config.json").write_text(tiny(checkpoint_every=5, n_steps=4).to_json())
    with pytest.raises(checkpoint.CheckpointError, match="does not belong to the run"):
        training.fit(folder, DIGITS)
    with pytest.raises(checkpoint.CheckpointError, match="does not belong to the run"):
        training.load_model(folder)
    path = folder / "checkpoint.safetensors"
    tensors, state = checkpoint.load(path)
    checkpoint.save(path, tensors, {**state, "config": {**state["config"], "n_steps": 4}})
    with pytest.raises(checkpoint.CheckpointError, match=r"does not fit the network .*\[3, 8, 8, 3, 3\]"):
        training.load_model(folder)


def test_weights_are_no_checkpoint(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())
    training.fit(folder, DIGITS)
    (folder / "model.safetensors").replace(folder / "checkpoint.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="holds weights only, no training that could go on"):
        training.fit(folder, DIGITS)


# --- folders and configurations ----------------------------------------------------------------------------------


def test_load_model_gives_the_final_weights_or_the_last_checkpoint(tmp_path: Path) -> None:
    folder = stopped_run(tmp_path / "run")
    with pytest.warns(UserWarning, match="run is not finished: this is its network at the last checkpoint"):
        model, config = training.load_model(folder)
    tensors, state = checkpoint.load(folder / "checkpoint.safetensors")
    assert state["step"] == 5
    assert config == tiny(checkpoint_every=5)
    assert not model.training
    assert torch.equal(model.flow.weight, tensors["model.flow.weight"])
    training.fit(folder, DIGITS)
    final, _ = training.load_model(folder)
    assert torch.equal(final.flow.weight, load_file(folder / "model.safetensors")["flow.weight"])
    assert not torch.equal(final.flow.weight, model.flow.weight)


def test_folders(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())
    with pytest.raises(training.RunError, match="has no weights yet"):
        training.load_model(folder)
    with pytest.raises(training.RunError, match="holds a run already"):
        training.prepare(tiny(), folder)
    training.fit(folder, DIGITS)
    training.prepare(tiny(seed=7), folder, replace=True)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert training.load_config(folder).seed == 7
    with pytest.raises(training.RunError, match="is no run folder"):
        training.fit(tmp_path, DIGITS)
    (tmp_path / "file").write_text("")
    with pytest.raises(training.RunError, match="cannot be written"):
        training.prepare(tiny(), tmp_path / "file" / "run")
    for text in ("not json", "[]", '{"dataset": "digits", "colour": 1}', '{"dataset": "digits", "lr": -1}', "{}"):
        (folder / "config.json").write_text(text)
        with pytest.raises(training.RunError, match="is no configuration of a run"):
            training.load_config(folder)


def test_wrong_data_set(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", TrainConfig("mnist"))
    with pytest.raises(ValueError, match=r"dataset.name='digits' does not fit the run, expected 'mnist'"):
        training.fit(folder, DIGITS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": DIGITS.train_images[:0], "train_labels": DIGITS.train_labels[:0]}, "train_images is empty"),
        ({"test_images": DIGITS.test_images[:0], "test_labels": DIGITS.test_labels[:0]}, "test_images is empty"),
        ({"train_labels": DIGITS.train_labels + 1}, "train_labels has labels from 1 to 10, expected 0 to 9"),
        ({"test_labels": DIGITS.test_labels - 1}, "test_labels has labels from -1 to 8, expected 0 to 9"),
        ({"train_labels": DIGITS.train_labels[:100]}, r"train_images has 1437 and train_labels \(100,\), expected"),
        ({"train_labels": DIGITS.train_labels.float()}, "train_labels are torch.float32, expected int64"),
        (
            {"train_images": DIGITS.train_images * 255},
            r"train_images has values from 0\.0 to 255\.0, expected \[0, 1\]",
        ),
        ({"test_images": DIGITS.test_images * torch.nan}, "test_images has values from nan to nan"),
        ({"test_images": DIGITS.test_images.double()}, "test_images are torch.float64, expected float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_data_sets_are_refused(changes: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny())
    with pytest.raises((TypeError, ValueError), match=message):
        training.fit(folder, dataclasses.replace(DIGITS, **changes))
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_unknown_device(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny(device="abacus"))
    with pytest.raises(training.RunError, match="device 'abacus' cannot be used"):
        training.fit(folder, DIGITS)


def test_divergence_is_one_sentence(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", tiny(optimizer="sgd", lr=1e30))
    with pytest.raises(training.Refused, match="the loss is not finite at step"):
        training.fit(folder, DIGITS)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = start(tmp_path / "run", tiny(epochs=1))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(training.RunError, match="--tensorboard needs the package tensorboard"):
            training.fit(folder, DIGITS, tensorboard=True)
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training.fit(folder, DIGITS, tensorboard=True)
    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("loss")
    expected = [(record["step"], record["loss"]) for record in records(folder) if "loss" in record]
    assert [(event.step, pytest.approx(event.value)) for event in events] == expected


def test_recipes() -> None:
    paper = TrainConfig.recipe("mnist")
    assert paper == TrainConfig("mnist")
    assert (paper.optimizer, paper.lr, paper.lr_decay, paper.epochs, paper.batch_size) == ("adam", 0.05, 0.7, 5, 128)
    assert (paper.rate, paper.norm, paper.penalty_weight, paper.model) == (2.0, "2", 1.0, "MNISTNode")
    assert dataclasses.replace(paper, dataset="fashionmnist") == TrainConfig.recipe("fashionmnist")
    assert paper.penalty_rate == pytest.approx(2.1)
    assert [paper.lr_factor(epoch) for epoch in range(3)] == pytest.approx([1.0, 0.7, 0.49])
    cifar = TrainConfig.recipe("cifar10")
    assert (cifar.optimizer, cifar.momentum, cifar.weight_decay, cifar.grad_clip) == ("sgd", 0.9, 1e-2, 0.5)
    assert [cifar.lr_factor(epoch) for epoch in (49, 50, 69, 70, 80, 99)] == pytest.approx(
        [1, 0.1, 0.1, 1e-2, 1e-3, 1e-3]
    )
    for dataset in ("digits", "mnist", "fashionmnist", "cifar10"):
        channels, image_size = data.IMAGES[dataset]
        config = TrainConfig.recipe(dataset, n_steps=1)
        images = torch.rand(2, channels, image_size, image_size)
        assert config.build_model().eval()(images).shape == (2, 10)
        assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="recipe='contractive' is there for mnist, fashionmnist, digits, cifar10, not"):
        TrainConfig.recipe("svhn")


def test_zubov_recipes() -> None:
    for dataset in data.NAMES:
        config = TrainConfig.recipe(dataset, model="zubov")
        assert config == TrainConfig.recipe(dataset, "zubov")
        inputs = torch.rand(2, 2) if dataset in data.PLANE else torch.rand(2, data.IMAGES[dataset][0], 32, 32)
        if dataset in data.IMAGES:
            inputs = inputs[..., : data.IMAGES[dataset][1], : data.IMAGES[dataset][1]]
        assert config.initial_model().eval()(inputs).shape == (2, data.num_classes(dataset))
        assert TrainConfig.from_json(config.to_json()) == config
        assert TrainConfig(**config.departures()) == config
    digits = TrainConfig.recipe("digits", model="zubov")
    assert [digits.lr_factor(0, progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert (digits.total_steps(1437), TrainConfig.recipe("digits").total_steps(1437)) == (1500, 30 * 23)
    changed = TrainConfig.recipe("moons", zubov={"consistency": 0.0})
    assert (changed.zubov.consistency, changed.zubov.n_rays) == (0.0, 240)  # the others stay the recipe's


def test_an_epoch_that_is_cut_short_is_tested(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", vectors("node", steps=8))  # 6 steps an epoch
    outcome = training.fit(folder, DIGITS)
    found = records(folder)
    assert [record["step"] for record in found if "test_accuracy" in record] == [6, 8]
    assert found[-1]["test_accuracy"] == outcome.accuracy
    assert outcome.seconds_per_epoch == pytest.approx(outcome.seconds * 6 / 8)
    assert training.last_step(folder) == found[-2]


def test_weights_of_zubov_losses_can_be_zero(tmp_path: Path) -> None:
    others = ("consistency", "separation", "containment", "spacing", "exclusion", "arrival")
    config = vectors("zubov", steps=2, zubov=dict.fromkeys(others, 0.0))
    folder = start(tmp_path / "run", config)
    training.fit(folder, DIGITS)
    last = training.last_step(folder)
    assert [last[name] for name in others] == [0.0] * len(others)
    assert last["loss"] == last["classification"] > 0.0


def test_certified_recipes() -> None:
    for dataset in ("digits", "mnist", "fashionmnist"):
        config = TrainConfig.recipe(dataset, "certified")
        assert (config.model, config.network) == ("StridedNode", "vanilla")
        assert [config.certified_share(done) for done in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
        assert sum(parameter.numel() for parameter in config.build_model().parameters()) < 100_000
    with pytest.raises(ValueError, match="recipe='certified' is there for digits, mnist, fashionmnist, not for"):
        TrainConfig.recipe("cifar10", "certified")
    with pytest.raises(ValueError, match="recipe='best' is unknown"):
        TrainConfig.recipe("mnist", "best")


def test_noise_has_a_sigma_for_each_image() -> None:
    images = torch.rand(300, 1, 28, 28)
    noise = (noisy(images, 0.3) - images).double()
    sigma = noise.std((1, 2, 3))
    assert 0.28 < float(sigma.max()) < 0.32
    for share in (0.25, 0.5, 0.75):
        assert float(sigma.quantile(share)) == pytest.approx(0.3 * share, abs=0.04)
    white = (noise / sigma[:, None, None, None]).flatten()
    for share, limit in ((0.1587, -1.0), (0.5, 0.0), (0.9772, 2.0)):
        assert float((white < limit).double().mean()) == pytest.approx(share, abs=0.005)


def test_loss_of_certified_training() -> None:
    """The worst case is of the images as they are, whatever noise the other loss has."""
    config = TrainConfig.recipe("digits", "certified", noise=0.5, certified_weight=0.3)
    model = config.initial_model()
    objective = objective_of(model, config)
    objective.progress = 0.25  # half the radius, half the weight
    images, labels = DIGITS.train_images[:32], DIGITS.train_labels[:32]
    torch.manual_seed(7)
    found, _ = objective(images, labels)
    torch.manual_seed(7)
    clean = F.cross_entropy(model(noisy(images, 0.5)), labels)
    worst = F.cross_entropy(worst_case_logits(model, images, labels, 0.5 * config.certified_eps), labels)
    assert float(found) == pytest.approx(float(0.85 * clean + 0.15 * worst), rel=1e-5)


def test_certified_training_pays(tmp_path: Path) -> None:
    """The same network and budget, with and without: certified accuracy."""
    found = {}
    for eps in (0.0, 0.05):
        config = TrainConfig.recipe("digits", "certified", epochs=10, milestones=[7, 9], certified_eps=eps)
        training.fit(start(tmp_path / str(eps), config), DIGITS)
        model, _ = training.load_model(tmp_path / str(eps))
        certified = linf_certified(model, DIGITS.test_images, DIGITS.test_labels, 0.05)
        found[eps] = certified.double().mean().item()
    assert found[0.05] > found[0.0] + 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 is out of range, expected a number > 0"),
        ({"lr": float("nan")}, "lr=nan is not finite"),
        ({"rate": 0.0}, "rate=0.0 is out of range"),
        ({"grad_clip": -0.5}, "grad_clip=-0.5 is out of range, expected a number >= 0"),
        ({"epochs": 0}, "epochs=0 is too small, expected at least 1"),
        ({"seed": 2**32}, "seed=4294967296 is too large"),
        ({"n_steps": 0}, "n_steps=0 is too small"),
        ({"train_samples": 0}, "train_samples=0 is too small"),
        ({"init": "zero"}, "init='zero' is unknown, expected one of 'centered', 'default', 'identity', 'authors'"),
        ({"regularizer": "hessian"}, "regularizer='hessian' is unknown"),
        ({"step_size": 0.0}, "step_size=0.0 is out of range"),
        ({"milestones": [0]}, r"milestones=\[0\] is not a list of epochs"),
        ({"norm": "3"}, "norm='3' is unknown, expected one of"),
        ({"model": "ResNet"}, "model='ResNet' is unknown"),
        ({"momentum": 0.9}, "momentum=0.9 belongs to SGD"),
        ({"noise": -0.1}, "noise=-0.1 is out of range, expected a number >= 0"),
        ({"certified_weight": 1.5}, "certified_weight=1.5 is out of range, expected a number <= 1"),
        ({"certified_eps": -0.1}, "certified_eps=-0.1 is out of range, expected a number >= 0"),
        ({"certified_eps": 0.1, "model": "CIFARNode"}, "certified_eps=0.1 does not fit model='CIFARNode'"),
        ({"steps": 0}, "steps=0 is too small"),
        ({"schedule": "linear"}, "schedule='linear' is unknown"),
        ({"dataset": "moons"}, "model='MNISTNode' takes images, expected model='zubov' for 'moons'"),
        ({"model": "zubov"}, "network='contractive' does not fit model='zubov', expected 'vanilla'"),
        ({**ZUBOV, "compile": True}, "compile=True does not fit model='zubov'"),
        ({**ZUBOV, "label_smoothing": 0.1}, "label_smoothing=0.1 does not fit model='zubov'"),
        (
            {**ZUBOV, "dataset": "moons"},
            "zubov.backbone='conv' does not fit dataset='moons', expected one of 'identity'",
        ),
        ({**ZUBOV, "zubov": {"backbone": "mlp"}}, "zubov.backbone='mlp' does not fit dataset='mnist'"),
        ({**ZUBOV, "dataset": "moons", "zubov": {"backbone": "identity"}}, "zubov.dim=32 does not fit"),
        (
            {**ZUBOV, "dataset": "moons", "zubov": {"backbone": "mlp"}, "augmentation": "crop-flip"},
            "augmentation, channels_last and track_eps are for images, not for 'moons'",
        ),
        ({"zubov": {"n_rays": 0}}, "zubov.n_rays=0 is too small"),
        ({"zubov": {"reach": -0.1}}, "zubov.reach=-0.1 is out of range, expected a number >= 0"),
        ({"zubov": {"floor": 0.0}}, "zubov.floor=0.0 is out of range, expected a number > 0"),
        ({"zubov": {"attention": "some"}}, "zubov.attention='some' is unknown"),
        ({"zubov": dict.fromkeys(("consistency", "classification", "separation"), 0.0)}, "zubov's weights are all 0"),
    ],
)
def test_configurations_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"dataset": "mnist", **changes})
    with pytest.raises(TypeError, match=r"batch_size=1.5 is a float, expected an int"):
        TrainConfig("mnist", batch_size=1.5)  # type: ignore[arg-type]


def test_exports() -> None:
    assert set(trainer.__all__) <= set(training.__all__)
