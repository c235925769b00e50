"""``rnf reproduce``: the grid is what it should be, cells survive kills, altered files are refused, faults are said."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from robust_node_fast import cli, data, reproduce, robustness, training
from robust_node_fast.reproduce import cell as cell_module
from robust_node_fast.reproduce import claims, grid, plot, summary
from robust_node_fast.robustness import auto_attack, suite, tally
from robust_node_fast.training import TrainConfig, objective
from robust_node_fast.training.checkpoint import digest_of_json

TINY = ["--dataset", "digits", "--seeds", "1", "--epochs", "1", "--train-samples", "200", "--attack-samples", "8"]
ROWS = ("grid/identity/none", "grid/identity/2")  # partners of each other: two networks in all
ONLY = [word for row in ROWS for word in ("--only", row)]
# The children of a server that has PyTorch loaded: a kill costs no import. One server for the whole session, whatever
# it has loaded (tests/test_training.py).
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["robust_node_fast.cli", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"]  # all slow to import
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    forkserver.ensure_running()  # it loads PyTorch beside the first tests
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rnf(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments)])


def cnode(folder: Path) -> Result:
    return rnf("cnode", *TINY, *ONLY, "--out", folder)


def two_cells() -> list[reproduce.Cell]:
    return reproduce.cells("digits", seeds=1, only=ROWS, epochs=1, train_samples=200, attack_samples=8)


def without_times(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    for result in content["report"]["results"]:
        del result["seconds"]
    del content["train_seconds"], content["sha256"]
    return content


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted((folder / "cells").iterdir())}


# --- the grid ----------------------------------------------------------------------------------------------------


def test_the_grid_is_full() -> None:
    found = reproduce.cells("mnist")
    seeds = [cell.config.seed for cell in found]
    assert seeds == sorted(seeds)  # all rows of a seed first
    part = reproduce.cells("mnist", only=["grid"])
    assert part == [cell for cell in found if cell.row.startswith("grid/")]
    kinds = Counter((cell.config.init, grid.penalty_name(cell.config), cell.config.seed) for cell in part)
    inits, penalties = ("default", "authors", "identity"), ("none", "2", "2-sharp", "inf")
    assert kinds == Counter((init, penalty, seed) for init in inits for penalty in penalties for seed in range(3))
    rates = {cell.config.rate for cell in found if cell.row.startswith("rho/default/")}
    assert rates == {0.1, 0.5, 1, 2, 5, 10, 15}
    paper = TrainConfig.recipe("mnist", rate_margin=0.0, init="default", n_steps=10, step_size=0.01)
    assert next(cell for cell in found if cell.row == "grid/default/2").config == paper


def test_rows_are_asked_for_by_name() -> None:
    def rows(*only: str) -> list[str]:
        return [cell.row for cell in reproduce.cells("mnist", seeds=1, only=only)]

    assert rows("grid/identity/2") == ["grid/identity/2"]  # and not 2-sharp
    assert rows("grid/identity/", "gamma/1") == [
        *(f"grid/identity/{penalty}" for penalty in ("none", "2", "2-sharp", "inf")),
        "gamma/1",
    ]
    assert {row.split("/")[0] for row in rows()} == set(summary.PARTS)


def test_a_setting_makes_a_cell() -> None:
    found = reproduce.cells("mnist", seeds=2)
    names = {cell.name: cell.settings for cell in found}
    assert all(names[cell.name] == cell.settings for cell in found)
    (swept,) = (cell for cell in found if (cell.row, cell.config.seed) == ("rho/default/2", 0))
    same = [cell.row for cell in found if cell.name == swept.name]
    assert same == ["rho/default/2", "gamma/1", "steps/2/h 0.01, N 10"]
    assert [cell.row for cell in found if cell.config == swept.config] == [
        "grid/default/2",
        *same,
        "strict/default/2",
        "full/default/2",
    ]  # one network
    others = [
        reproduce.cells("fashionmnist", seeds=1),
        reproduce.cells("mnist", seeds=1, attack_samples=9),
        reproduce.cells("mnist", seeds=1, epochs=9),
        reproduce.cells("mnist", seeds=1, train_samples=9),
    ]
    for other in others:
        assert not names.keys() & {cell.name for cell in other}
    elsewhere = reproduce.cells("mnist", seeds=2, data_root="elsewhere")
    assert {cell.name for cell in elsewhere} == names.keys()


def test_the_full_suite_is_a_cell_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of another row, under more attacks; without AutoAttack there is none."""
    budget = {"epochs": 1, "train_samples": 100, "attack_samples": 4}
    cell, usual = (
        reproduce.cells("digits", seeds=1, only=[row], **budget)[0] for row in ("full/certified", "certified")
    )
    assert cell.config == usual.config
    assert (cell.suite, cell.name != usual.name) == ("full", True)
    digits = data.load("digits")
    with monkeypatch.context() as patch:
        patch.setattr(auto_attack, "available", lambda: False)
        with pytest.raises(training.RunError, match="AutoAttack was not run"):
            reproduce.compute(cell, tmp_path, digits, on_progress=lambda _: None)
    monkeypatch.setattr(auto_attack, "available", lambda: True)
    attacks = suite.SUITES["full"].attacks
    few = [attack for attack in attacks if attack.name in ("fgsm", "pgd", "square")]
    monkeypatch.setitem(suite.SUITES, "full", dataclasses.replace(suite.SUITES["full"], attacks=tuple(few)))
    result = reproduce.compute(cell, tmp_path, digits, on_progress=lambda _: None)
    assert reproduce.read(cell, tmp_path) == result
    assert {found.strength for found in result.report.results if found.name == "square"} == set(cell.eps)
    assert not [found for found in result.report.results if found.measure == "l_2 eps"]
    page = reproduce.markdown([cell], {cell.name: result})
    (heading,) = [line for line in page.splitlines() if line.startswith("| row |")]
    (line,) = [line for line in page.splitlines() if line.startswith("| full/certified | 1 |")]
    shown = dict(zip(heading.split(" | "), line.split(" | "), strict=True))
    assert shown["Square 0.1"] == f"{100 * result.report.accuracy('square', 0.1):.1f}"
    assert shown["AutoAttack 0.1"] == ""


def test_sweeps_are_small_unless_asked_otherwise() -> None:
    """Seeds and attacked images of every part."""

    def kinds(**asked: int) -> dict[tuple[int, int | None], set[str]]:
        found: dict[str, tuple[set[int], set[int | None]]] = {}
        for cell in reproduce.cells("mnist", **asked):
            seeds, attacked = found.setdefault(cell.row.split("/")[0], (set(), set()))
            seeds.add(cell.config.seed)
            attacked.add(cell.attack_samples)
        parts: dict[tuple[int, int | None], set[str]] = {}
        for part, (seeds, (images,)) in found.items():
            assert seeds == set(range(len(seeds)))
            parts.setdefault((len(seeds), images), set()).add(part)
        return parts

    whole, sweeps = {"grid", "certified"}, {"rho", "gamma", "steps", "jacobian"}
    assert kinds() == {(3, None): whole, (1, 1000): sweeps, (3, 1000): {"strict"}, (1, 500): {"full"}}
    assert kinds(seeds=2) == {(2, None): whole, (2, 1000): {*sweeps, "strict"}, (2, 500): {"full"}}
    assert kinds(attack_samples=9) == {(3, 9): {*whole, "strict"}, (1, 9): {*sweeps, "full"}}
    (cell,) = reproduce.cells("mnist", only=["gamma/10"])
    result = made_up(cell, lambda name, strength: 0.5)
    note = "Attacks ran on the first 1000 of 10000 images."
    noted = dataclasses.replace(result, report=dataclasses.replace(result.report, notes=(note,)))
    page = reproduce.markdown([cell], {cell.name: noted})
    assert note in next(part for part in page.split("### ") if "| gamma/10 | 1 | 50.0 |" in part)


def test_a_setting_that_is_newer_than_a_cell_has_its_default() -> None:
    cell = reproduce.cells("mnist", seeds=1)[0]
    before = json.loads(json.dumps(cell.settings))
    assert cell.has(before)
    del before["train"]["regularizer"], before["partner"]["grad_clip"]
    assert cell.has(before)
    for name, value in (("regularizer", "jacobian"), ("epochs", 6), ("unheard", 1)):
        assert not cell.has({**before, "train": {**before["train"], name: value}})
    assert not cell.has({**before, "protocol": 0})
    assert "regularizer" not in cell.config.departures()  # so its name does not hang on it


def test_partners_are_on_the_other_side_of_the_penalty() -> None:
    found = reproduce.cells("mnist", seeds=2)
    configs = [dataclasses.asdict(cell.config) for cell in found]
    for cell in found:
        own, other = cell.config, cell.partner
        assert dataclasses.asdict(other) in configs  # trained for a row of its own
        if cell.row in ("certified", "full/certified") or cell.row.startswith("strict/"):
            through = "default/2" if cell.row == "strict/default/none" else "default/none"  # nothing through itself
            assert other == next(c.config for c in found if (c.row, c.config.seed) == (f"grid/{through}", own.seed))
            continue
        assert {own.network, other.network} == {"vanilla", "contractive"}
        same = ("init", "seed", "n_steps", "step_size", "epochs", "dataset")
        assert all(getattr(own, name) == getattr(other, name) for name in same)


@pytest.mark.parametrize(
    ("init", "by_hand"),
    [
        # 10 steps * 8 channels * (rho + 2 a m + b (r + q)): every row and column holds 8 filters of three -5s.
        ("authors", 10 * 8 * (2.0 + 2 * 0.1 * -5.0 + 2 * (8 * 15.0 - 5.0))),
        ("identity", 0.0),
    ],
)
def test_starts(init: Any, by_hand: float) -> None:
    torch.manual_seed(3)
    model = TrainConfig("mnist", init=init).build_model()
    penalty = model.contraction_penalty(rate=2.0).item()
    assert penalty == pytest.approx(by_hand, rel=1e-6)
    torch.manual_seed(3)
    plain = TrainConfig("mnist", init="default").build_model()
    ours, theirs = model.state_dict(), plain.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == ["flow.weight"]
    if init == "authors":
        assert by_hand == pytest.approx(18480.0)
    else:
        assert model.contraction_penalty(rate=2.0 + 1e-4).item() > 0.0
        fast = TrainConfig("mnist", init=init, rate=5.0).build_model()
        assert fast.contraction_rate().tolist() == pytest.approx([5.0] * 10)


def test_jacobian_regulariser_slows_the_expansion(tmp_path: Path) -> None:
    images = data.load("digits")
    rates = {}
    for weight in (0.0, 10.0):
        config = TrainConfig.recipe(
            "digits",
            regularizer="jacobian",
            n_steps=1,
            epochs=1,
            train_samples=256,
            penalty_weight=weight,
            init="default",
        )
        run = tmp_path / str(weight)
        training.prepare(config, run)
        first: list[float] = []
        training.fit(run, images, on_step=lambda step, total, record, first=first: first.append(record["penalty"]))
        rates[weight] = first
    assert rates[0.0][0] == rates[10.0][0] > 0.0  # the same start
    assert rates[10.0][-1] < min(rates[10.0][0], rates[0.0][-1])


def test_jacobian_regulariser_leaves_the_logits_alone() -> None:
    model = TrainConfig("digits", n_steps=3).build_model()
    images = torch.rand(5, 1, 8, 8)
    logits, penalty = objective.with_jacobian_penalty(model, images, 2.0)
    torch.testing.assert_close(logits, model(images))
    # The largest eigenvalue of J + J' found can only fall short of what Gershgorin's discs allow.
    assert 0.0 < penalty.item() <= 2.0 - model.contraction_rate().min().item()


# --- running it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells, undisturbed."""
    folder = tmp_path_factory.mktemp("reproduce") / "done"
    result = cnode(folder)
    assert result.exit_code == 0, result.output
    assert "rnf: 0 of 2 cells are done" in result.stderr
    for number, row in enumerate(ROWS, start=1):
        assert row in result.stdout
        assert f"rnf: {number} of 2: {row}, seed 0, " in result.stderr
    return folder


def test_a_cell_says_all(done: Path) -> None:
    cell = two_cells()[1]
    assert files(done).keys() == {f"{cell.name}.json" for cell in two_cells()}
    content = json.loads((done / "cells" / f"{cell.name}.json").read_text())
    assert content["settings"] == cell.settings
    assert content["settings"]["train"]["train_samples"] == 200
    model, config = training.load_model(done / "networks" / grid.network_name(cell.config))
    assert config == cell.config
    assert content["rate"] == model.contraction_rate().min().item()
    assert content["penalty"] == model.contraction_penalty(rate=2.0).item()
    report = robustness.Report.from_json(json.dumps(content["report"]))
    assert report.n_samples == 360
    assert "Attacks ran on the first 8 of 360 images." in report.notes
    for eps in (0.02, 0.05, 0.1, 0.2, 0.3):
        names = ["fgsm", "pgd", *(["pgd on vanilla"] if eps >= 0.1 else [])]
        attacked = [report.accuracy(name, eps) for name in names]
        assert all(8 * accuracy == round(8 * accuracy) for accuracy in attacked)
        assert report.accuracy("certified", eps) <= report.accuracy("clean")
    images = data.load("digits")
    right = (model(images.test_images).argmax(1) == images.test_labels).double().mean().item()
    assert [report.accuracy("clean")] == content["accuracy_by_epoch"] == [pytest.approx(right)]
    found = reproduce.read(cell, done)
    assert found is not None
    timed = {result.name for result in found.report.results if result.seconds > 0}
    assert timed == {"clean", "gaussian", "salt_and_pepper", "fgsm", "pgd", "pgd on vanilla", "certified"}
    assert found.seconds > found.train_seconds > 0
    assert not list((done / "unfinished").iterdir())


class Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


def test_a_kill_at_any_write_loses_nothing(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is moved into place by ``os.replace``: each dies once right before and once right after a move.

    What is on the disk at that moment is what the next one finds: nothing that an exception flushes on its way out.
    """
    monkeypatch.setattr(tally, "SAVE_SECONDS", 0.0)
    folder, left = tmp_path / "run", tmp_path / "left"
    move, kills = os.replace, Counter[Path]()

    def die() -> None:
        shutil.copytree(folder, left)
        raise Killed

    def replace(source: Path, target: Path) -> None:
        kills[target] += 1
        if kills[target] == 1:
            die()
        move(source, target)
        if kills[target] == 2:
            die()

    monkeypatch.setattr(os, "replace", replace)
    images, cell = data.load("digits"), two_cells()[1]
    while reproduce.load(cell, folder) is None:
        with contextlib.suppress(Killed):
            reproduce.compute(cell, folder, images, on_progress=lambda what: None)
        if left.exists():
            shutil.rmtree(folder)
            left.rename(folder)
    names = Counter(path.suffix if path.parent.name in ("cells", "unfinished") else path.name for path in kills)
    networks = {"config.json": 2, "metrics.jsonl": 2, "checkpoint.safetensors": 2, "model.safetensors": 2}
    assert names == networks | {".safetensors": 1, ".json": 1}
    assert min(kills.values()) >= 2
    ((name, path),) = files(folder).items()
    assert without_times(path) == without_times(files(done)[name])


def _child(folder: Path) -> None:
    torch.set_num_threads(1)
    tally.SAVE_SECONDS = 0.0
    cli.app(["reproduce", "cnode", *TINY, *ONLY, "--out", str(folder)])


def test_sigkill_loses_no_cell(done: Path, tmp_path: Path) -> None:
    """Killed in the second evaluation."""
    process = SERVER.Process(target=_child, args=(tmp_path,))
    process.start()
    try:
        deadline = time.monotonic() + 60
        second = f"unfinished/{two_cells()[1].name}.safetensors"
        while process.is_alive() and time.monotonic() < deadline and not (tmp_path / second).exists():
            time.sleep(0.002)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    (finished,) = files(tmp_path).values()
    before = finished.read_bytes(), finished.stat().st_mtime_ns
    result = cnode(tmp_path)
    assert result.exit_code == 0, result.output
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before
    assert "rnf: 1 of 2 cells are done" in result.stderr
    assert ROWS[0] not in result.stderr
    for name, path in files(tmp_path).items():
        assert without_times(path) == without_times(files(done)[name])


def test_two_processes_share_the_work(done: Path, tmp_path: Path) -> None:
    """The same command twice: every network is trained once, every cell evaluated once, and both end in peace."""
    processes = [SERVER.Process(target=_child, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(files(tmp_path)) == 2
    for name, path in files(tmp_path).items():
        assert without_times(path) == without_times(files(done)[name])
    for metrics in tmp_path.glob("networks/*/metrics.jsonl"):
        steps = [record["step"] for record in map(json.loads, metrics.read_text().splitlines()) if "loss" in record]
        assert steps == list(range(1, len(steps) + 1))


def copied(done: Path, folder: Path) -> tuple[reproduce.Cell, Path]:
    """A finished cell in a folder of its own."""
    cell = two_cells()[0]
    path = folder / "cells" / f"{cell.name}.json"
    path.parent.mkdir()
    path.write_bytes(files(done)[path.name].read_bytes())
    return cell, path


def signed(content: dict[str, Any]) -> bytes:
    del content["sha256"]
    return json.dumps({"sha256": digest_of_json(content), **content}).encode()


HARMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda text: text[:-20], "is truncated or was altered"),
    "empty": (lambda text: b"", "is truncated or was altered"),
    "bytes": (lambda text: b"\xff" + text[1:], "is truncated or was altered"),
    "list": (lambda text: b"[1, 2]", "is truncated or was altered"),
    "field": (lambda text: text.replace(b'"penalty"', b'"penality"'), "its content does not match its SHA-256"),
    "number": (lambda text: text.replace(b'"mean": 0.', b'"mean": 0.9'), "its content does not match its SHA-256"),
    "settings": (lambda text: text.replace(b'"epochs": 1', b'"epochs": 2'), "its content does not match its SHA-256"),
    "other settings": (
        lambda text: signed(json.loads(text.replace(b'"epochs": 1', b'"epochs": 2'))),
        "has other settings than its name stands for",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_an_altered_cell_is_refused_and_computed_again(harm: str, done: Path, tmp_path: Path) -> None:
    cell, path = copied(done, tmp_path)
    content, (change, message) = path.read_bytes(), HARMS[harm]
    whole = reproduce.read(cell, tmp_path)
    assert whole is not None
    assert whole.to_json().encode() == content
    assert change(content) != content
    path.write_bytes(change(content))
    with pytest.raises(reproduce.CellError, match=message) as refused:
        reproduce.read(cell, tmp_path)
    assert str(path) in str(refused.value)
    with pytest.warns(UserWarning, match=f"{message}.*: this cell is computed again"):
        assert reproduce.load(cell, tmp_path) is None


def test_a_cell_of_another_version_is_computed_again_but_summed_up(done: Path, tmp_path: Path) -> None:
    cell, path = copied(done, tmp_path)
    path.write_bytes(signed({**json.loads(path.read_bytes()), "version": "0.0.1"}))
    with pytest.warns(UserWarning, match=r"was written by version 0\.0\.1, this is .*: this cell is computed again"):
        assert reproduce.load(cell, tmp_path) is None
    found = reproduce.read(cell, tmp_path)
    assert found is not None
    assert "Computed with robust_node_fast 0.0.1 and PyTorch" in reproduce.markdown([cell], {cell.name: found})


def test_an_altered_cell_on_the_command_line(done: Path, tmp_path: Path) -> None:
    """Computed again from its network, and the reason said."""
    for name in ("cells", "networks"):
        shutil.copytree(done / name, tmp_path / name)
    path = next(iter(files(tmp_path).values()))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    result = cnode(tmp_path)
    assert result.exit_code == 0, result.output
    (note,) = [line for line in result.stderr.splitlines() if "truncated" in line]
    assert note.startswith(f"rnf: note: {path} is truncated")
    assert "rnf: 1 of 2 cells are done" in result.stderr
    assert without_times(path) == without_times(files(done)[path.name])


def test_a_network_that_was_altered_is_refused(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "networks", tmp_path / "networks")
    run = tmp_path / "networks" / grid.network_name(two_cells()[1].config)
    weights, config = run / "checkpoint.safetensors", run / "config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8] + b"altered!")
    result = cnode(tmp_path)
    assert result.exit_code == 1
    assert f"does not match its SHA-256; delete {run} to train this network again" in result.stderr
    weights.write_bytes(content)
    config.write_text(config.read_text().replace('"lr": 0.05', '"lr": 0.04'))
    result = cnode(tmp_path)
    assert result.exit_code == 1
    assert f"describes another network than the folder's name stands for: delete {run}" in result.stderr


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise training.Interrupted(signal.SIGTERM, 3, 4)

    monkeypatch.setattr(cell_module.training, "fit", stop)
    result = cnode(tmp_path)
    assert result.exit_code == 128 + signal.SIGTERM
    assert result.stderr.endswith("rnf: stopped by SIGTERM after step 3 of 4; the same command goes on\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only", "gri"], 2, "only='gri' fits no row"),
        (["--epochs", "0"], 2, "epochs=0 is too small"),
        (["--train-samples", "0"], 2, "train_samples=0 is too small"),
        (["--attack-samples", "0"], 2, "--attack-samples"),
        (["--seeds", "0"], 2, "--seeds"),
        (["--dataset", "cifar10"], 2, "cifar10"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.app, ["reproduce", "cnode", "--out", str(tmp_path / "x"), *arguments], env={"COLUMNS": "300"}
    )
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "x").exists()


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cnode(tmp_path / "file" / "x")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "file/x cannot be written" in line


# --- CIFAR-10 ----------------------------------------------------------------------------------------------------


def test_cifar_on_real_images(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both networks trained, attacked through each other, and a page of what came out; then nothing is left to do."""
    if not (data_root / "cifar-10-batches-py").is_dir():
        pytest.skip("cifar-10-batches-py is not in the folder with the real data")
    whole = data.load("cifar10", data_root)
    few = dataclasses.replace(whole, test_images=whole.test_images[:48], test_labels=whole.test_labels[:48])
    monkeypatch.setattr(cli.data, "load", lambda *_: few)
    tiny = ("--epochs", "2", "--train-samples", "512", "--attack-samples", "4")
    arguments = ("cifar", *tiny, "--out", tmp_path / "x", "--page", tmp_path / "page.md")
    result = rnf(*arguments)
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "page.md").read_text()
    cells = [path.read_text() for path in (tmp_path / "x" / "cells").iterdir()]
    assert len(cells) == 2
    for text in cells:
        report = json.loads(text)["report"]
        tested = {(found["name"], found["strength"]) for found in report["results"]}
        assert {(name, eps) for name in ("fgsm", "pgd") for eps in (2 / 255, 4 / 255, 8 / 255)} <= tested
    assert page.count("| cifar/") == 2
    assert "![Accuracy by epoch and by radius](page.png)" in page
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    assert rnf(*arguments).exit_code == 0
    assert (tmp_path / "page.md").read_text() == page
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "x" / "cells").iterdir()}.items() <= before.items()


# --- the page ----------------------------------------------------------------------------------------------------


def made_up(
    cell: reproduce.Cell, accuracy: Callable[[str, float], float], rate: float | None = None
) -> reproduce.CellResult:
    """With a given accuracy in every column and claim; None: what the filters guarantee is the rate asked for."""
    tests = {(name, strength) for _, name, strength in (*summary.COLUMNS, *summary.STRONGER)}
    tests |= {
        *claims.NOISES,
        *claims.ATTACKS,
        *((name, eps) for name in ("worst case", "certified") for eps in grid.EPS),
        *((claims.TRANSFER, eps) for eps in cell.transfer_eps),
    }
    if cell.row.split("/")[0] in claims.AGAIN:
        tests.add(("clean, attacked images", 0.0))
    results = [
        robustness.Result(f"{name}vanilla" if name.endswith(" ") else name, strength, (accuracy(name, strength),))
        for name, strength in sorted(tests)
    ]
    notes = () if cell.attack_samples is None else (f"Attacks ran on the first {cell.attack_samples} of 10000 images.",)
    report = robustness.Report("standard", 10000, tuple(results), (), {"torch": "2", "threads": 3}, notes)
    curve = (random.Random(cell.name).random(), 0.6, 0.7, 0.75, 0.8)  # each network has its own
    guaranteed = cell.config.rate if rate is None else rate
    return reproduce.CellResult("1", cell.settings, guaranteed, 0.25, curve, 60.0, report)


def page_lines(text: str, start: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {start}")]


def test_summary_of_what_was_run(done: Path) -> None:
    text = (done / "summary.md").read_text()
    clean = [100 * without_times(path)["report"]["results"][0]["mean"] for path in files(done).values()]
    rows = page_lines(text, "grid/identity/")
    assert sorted(row[:2] for row in rows) == sorted([row, "1"] for row in ROWS)
    assert Counter(row[2] for row in rows) == Counter(f"{accuracy:.1f}" for accuracy in clean)
    assert "Attacks ran on the first 8 of 360 images." in text
    assert "2 of 2 cells." in text
    assert "missing" not in text


def test_start_and_penalty_are_told_apart() -> None:
    """Accuracies are a sum of known effects; the page has to find these, also where a part of the grid is missing."""
    starts = {"default": 0.0, "authors": 0.20, "identity": 0.10}
    penalties = {"none": 0.0, "2": 0.05, "2-sharp": 0.03, "inf": -0.02}

    def result(cell: reproduce.Cell) -> reproduce.CellResult:
        _, start, penalty = cell.row.split("/")
        level = 0.3 + starts[start] + penalties[penalty] + 0.01 * cell.config.seed
        if (start, penalty) == ("identity", "2"):
            level -= 0.12  # here the penalty harms
        return made_up(cell, lambda name, strength: level)

    cells = reproduce.cells("mnist", only=["grid"])
    results = {cell.name: result(cell) for cell in cells}
    text = reproduce.markdown(cells, results)
    assert page_lines(text, "grid/authors/2 ")[0][:3] == ["grid/authors/2", "3", "56.0 ± 1.0"]
    by_change = {line[0]: line[1:] for line in page_lines(text, "")}
    assert by_change["penalty 2 instead of none"] == ["3 of 3", *["+1.0 (-7.0 to +5.0)"] * len(summary.CONTRASTED)]
    assert by_change["penalty inf instead of none"][1] == "-2.0 (-2.0 to -2.0)"
    assert by_change["initialisation authors instead of default"][1] == "+20.0 (+20.0 to +20.0)"
    assert by_change["initialisation identity instead of default"][1] == "+7.0 (-2.0 to +10.0)"
    assert by_change["in the paper: authors/2 instead of default/none"][1] == "+25.0"
    assert by_change["of this, the initialisation: authors/none instead of default/none"][1] == "+20.0"
    assert by_change["of this, the penalty: authors/2 instead of authors/none"][1] == "+5.0"
    assert "36 of 36 cells." in text
    assert "0.6 hours by the clock for these cells," in text
    assert "included, on 3 threads. Medians, in seconds: training 60, clean 0," in text
    assert "Of 36 networks trained for 5 epochs: " in text
    assert "exceeds that after epoch 3 by +10.0 (+10.0 to +10.0) points; 0 were" in text

    again = {**results, "full": results[cells[0].name]}  # a network in two rows
    assert "Of 36 networks trained for 5 epochs: " in "\n".join(summary._cost(list(again.values())))

    part = {name: found for name, found in results.items() if "authors-none" not in name and "seed2" not in name}
    text = reproduce.markdown(cells, part)
    by_change = {line[0]: line[1:] for line in page_lines(text, "")}
    assert by_change["penalty 2 instead of none"][:2] == ["2 of 3", "-1.0 (-7.0 to +5.0)"]
    assert set(by_change["of this, the initialisation: authors/none instead of default/none"]) <= {"0 of 1", ""}
    assert "22 of 36 cells." in text
    assert "- `grid/authors/none`: seed 0, 1, 2" in text
    assert "- `grid/authors/2`: seed 2" in text


NEITHER = "no (contractive {:.1f}, vanilla 40.0)"


@pytest.mark.parametrize(
    ("clean", "gain", "transfer", "verdicts"),
    [
        (0.98, 0.34, 0.60, ["holds", "holds (gaussian 0.1)", "holds (pgd 0.05)", NEITHER.format(74.0), "holds"]),
        (0.95, 0.31, 0.48, ["holds", "holds (gaussian 0.1)", "holds (pgd 0.05)", NEITHER.format(71.0), "holds"]),
        (0.94, 0.10, 0.46, ["no", "in part (gaussian 0.1)", "in part (pgd 0.05)", NEITHER.format(50.0), "no"]),
        (0.94, 0.063, 0.46, ["no", "no", "in part (pgd 0.05)", NEITHER.format(46.3), "no"]),  # a fifth of 30, not of 34
        (0.94, 0.05, 0.10, ["no", "no", "no", NEITHER.format(45.0), "no"]),
        (0.94, -0.2, 0.10, ["no", "no", "no", "no (contractive 20.0, vanilla 20.0)", "no"]),
    ],
)
def test_claims(clean: float, gain: float, transfer: float, verdicts: list[str]) -> None:
    def result(cell: reproduce.Cell) -> reproduce.CellResult:
        def accuracy(name: str, strength: float) -> float:
            if name == "clean":
                return clean
            if name == claims.TRANSFER:
                return transfer
            best = (name, strength) in (("gaussian", 0.1), ("pgd", 0.05))
            own = gain + 0.01 * (cell.config.seed - 1) if gain > 0 else gain
            return 0.4 + (own if best and cell.config.network == "contractive" else min(0.0, gain))

        return made_up(cell, accuracy)

    cells = reproduce.cells("mnist", only=["grid/authors/2", "grid/default"])
    rows = reproduce.by_row(cells, {cell.name: result(cell) for cell in cells})["grid"]
    found = list(claims.verdicts(rows, "mnist"))
    assert [verdict.verdict for verdict in found] == [*verdicts, *verdicts, *["not measured"] * 11]
    assert len({(verdict.claim, verdict.compared) for verdict in found}) == len(found)
    assert all(verdict.seeds == 3 for verdict in found[:10])
    if gain > 0:
        best = f"{100 * gain:+.1f} ± 1.0 (gaussian 0.1: {40 + 100 * gain:.1f}% against 40.0%)"
        assert found[1].found == f"{best}; the smallest of 5: +0.0 ± 0.0 (gaussian 0.2: 40.0% against 40.0%)"
        assert found[2].found.startswith(f"{100 * gain:+.1f} ± 1.0 (pgd 0.05: ")
        assert best in summary.markdown(cells, {cell.name: result(cell) for cell in cells})
    assert len(list(claims.verdicts(rows, "fashionmnist"))) == 14  # those that are about MNIST are left out


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (0.94, 0.65, "holds"),
        (0.969, 0.621, "holds"),
        (0.965, 0.906, "no (vanilla 90.6)"),
        (0.90, 0.66, "no (contractive 90.0)"),
        (0.90, 0.61, "no (contractive 90.0, vanilla 61.0)"),  # the claimed gain, elsewhere
    ],
)
def test_a_claim_of_two_accuracies_asks_for_both(ours: float, theirs: float, verdict: str) -> None:
    cells = reproduce.cells("mnist", only=["grid/authors/2", "grid/default/none"])
    results = {
        cell.name: made_up(cell, (lambda *_: ours) if cell.config.network == "contractive" else (lambda *_: theirs))
        for cell in cells
    }
    rows = reproduce.by_row(cells, results)["grid"]
    found, *others = [v for v in claims.verdicts(rows, "mnist") if v.claim.startswith("94% against 65%")]
    assert (found.found, found.verdict) == (f"{100 * ours:.1f}% against {100 * theirs:.1f}%", verdict)
    assert {other.verdict for other in others} == {"not measured"}


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((35.0, 33.0, 40.0), "holds"),
        ((35.0, -1.0, 80.0), "within the spread of seeds"),
        ((15.0, 12.0, 1.0), "in part"),
        ((15.0, 12.0, 0.0), "within the spread of seeds"),
        ((6.9, 6.9, 6.9), "in part"),
        ((6.7, 6.7, 6.7), "no"),
        ((-5.0, 9.0), "no"),
        ((35.0,), "one seed only"),
        ((1.0,), "no"),
    ],
)
def test_a_gain_has_to_be_there_in_every_seed(gains: tuple[float, ...], verdict: str) -> None:
    """In the test with the largest gain, which is neither the first nor the last."""
    cells = reproduce.cells("mnist", seeds=len(gains), only=["grid/authors/2", "grid/default/none"])

    def result(cell: reproduce.Cell) -> reproduce.CellResult:
        gain = gains[cell.config.seed] if cell.row == "grid/authors/2" else 0.0
        return made_up(cell, lambda name, by: 0.1 + gain / 100.0 if (name, by) == ("gaussian", 0.3) else 0.1 * (by < 1))

    rows = reproduce.by_row(cells, {cell.name: result(cell) for cell in cells})["grid"]
    (found,) = [v for v in claims.verdicts(rows, "mnist") if v.claim.startswith("up to 34") and v.seeds]
    where = " (gaussian 0.3)" if verdict in ("holds", "in part") else ""
    assert (found.seeds, found.verdict) == (len(gains), verdict + where)
    assert "at least a fifth of it" in claims.RULES
    assert "a gain in each of them" in claims.RULES


@pytest.mark.parametrize(
    ("near", "far", "far_on_all", "through_paper", "seeds", "verdict"),
    [
        (0.6, 0.5, 0.5, 0.5, 3, "**holds**"),
        (0.6, 0.3, 0.5, 0.5, 2, "in part: holds at 0.02, 0.05, not at 0.1"),  # two seeds decide: not in bold
        (0.6, 0.5, 0.3, 0.5, 3, "**in part: holds at 0.02, 0.05, not at 0.1**"),
        (0.6, 0.5, 0.5, 0.4, 3, "**in part: holds at 0.02, 0.05, not at 0.1**"),
        (0.42, 0.3, 0.3, 0.5, 2, "in part: holds at 0.02, not at 0.05, 0.1"),
    ],
)
def test_transfer_is_judged_at_every_radius(
    near: float, far: float, far_on_all: float, through_paper: float, seeds: int, verdict: str
) -> None:
    """90% are right of all images, 86% of the first 500: half of these is what has to be left."""
    levels = {"clean": 0.9, "clean, attacked images": 0.86}

    def result(cell: reproduce.Cell) -> reproduce.CellResult:
        left = {
            "grid": {0.1: far_on_all},
            "strict": {0.02: 0.81, 0.05: 0.70, 0.1: through_paper},
            "full": {0.05: near, 0.1: far},
        }[cell.row.split("/")[0]]
        return made_up(cell, lambda name, by: left.get(by, 0.0) if name == claims.TRANSFER else levels.get(name, 0.5))

    cells = reproduce.cells("mnist", seeds=3, only=["grid/authors/2"])
    cells += reproduce.cells("mnist", seeds=3, only=["strict/authors/2"])
    cells += reproduce.cells("mnist", seeds=2, only=["full/authors/2"])
    page = reproduce.markdown(cells, {cell.name: result(cell) for cell in cells})
    found, *others = page_lines(page, "attacks found on the vanilla network")
    assert found[1:3] == ["authors/2, attacked through authors/none and default/none", str(seeds)]
    half = {True: "holds", False: "no"}
    own, paper = "through authors/none", "through default/none"
    assert found[3] == (
        f"0.02: 81.0% of 86.0% left ({paper}, first 1000 images, 3 seeds): holds; "
        f"0.05: 70.0% of 86.0% left ({paper}, first 1000 images, 3 seeds), "
        f"{100 * near:.1f}% of 86.0% left ({own}, first 500 images, 2 seeds): {half[near >= 0.43]}; "
        f"0.1: {100 * far_on_all:.1f}% of 90.0% left ({own}, all images, 3 seeds), "
        f"{100 * through_paper:.1f}% of 86.0% left ({paper}, first 1000 images, 3 seeds), "
        f"{100 * far:.1f}% of 86.0% left ({own}, first 500 images, 2 seeds): "
        f"{half[far_on_all >= 0.45 and far >= 0.43 and through_paper >= 0.43]}"
    )
    assert found[4] == verdict
    assert [line[4] for line in others] == ["**not measured**"] * 2

    alone = reproduce.by_row(cells[:3], {cell.name: result(cell) for cell in cells})["grid"]
    (found_alone, *_) = [v for v in claims.verdicts(alone, "mnist") if v.claim.startswith("attacks found")]
    assert found_alone.found.startswith("0.02: not measured; 0.05: not measured; 0.1: ")
    assert (found_alone.seeds, found_alone.verdict) == (3, half[far_on_all >= 0.45])


def test_the_page_counts_cells_with_older_checks() -> None:
    """And says how many of their networks others have under the present ones."""
    cells = reproduce.cells("mnist", seeds=1, only=["grid/authors", "strict/authors/2", "strict/authors/none"])
    kinds = {  # checks at the radii of part strict
        "now": [("square", eps, "1 of 64 images fall to it, which leave 9") for eps in grid.STRICT_EPS],
        "at the largest": [("square", 0.1, "0 of 64 images fall to it")],
        "before": [("transfer", 0.1, "white box 10.0%, transfer 20.0%")],
    }

    def result(cell: reproduce.Cell, kind: str) -> reproduce.CellResult:
        found = made_up(cell, lambda name, by: 0.5)
        said = kinds[kind] * (2 if kind == "now" and cell.row.startswith("grid/") else 1)
        checks = tuple(robustness.Check(f"white box <= {by} at l_inf eps {eps}", True, what) for by, eps, what in said)
        return dataclasses.replace(found, report=dataclasses.replace(found.report, checks=checks))

    def page(**kind: str) -> str:
        results = {cell.name: result(cell, kind.get(cell.row.split("/")[0], "now")) for cell in cells}
        return " ".join(reproduce.markdown(cells, results).split("### ")[0].split())

    assert "checks" not in page().split("## mnist")[1]
    before = page(grid="before")
    assert " 4 of them are from before" in before
    assert "black box was tried at" not in before
    assert "The networks of 2 of these were tried again under the present checks, in another part." in before
    largest = page(grid="at the largest")
    assert "stricter" not in largest
    assert "On 4 a black box was tried at the largest radius alone" in largest
    assert "The networks of 2 of these were" in largest
    both = page(grid="before", strict="at the largest")
    assert "4 of them are from before" in both
    assert "On 2 a black box was tried at" in both
    assert "The networks of 0 of these were" in both


def test_tables_say_which_columns_are_of_the_first_images() -> None:
    cells = reproduce.cells("mnist", seeds=1, only=["grid/authors/2", "rho/default", "full/authors/2"])
    page = reproduce.markdown(cells, {cell.name: made_up(cell, lambda name, by: 0.5) for cell in cells})
    parts = {part.splitlines()[0]: part for part in page.split("### ")}
    for name, few in (("rho", 1000), ("full", 500)):
        lines = [line for line in parts[summary.PARTS[name]].splitlines() if line]
        said = [
            number for number, line in enumerate(lines) if f"Attacks ran on the first {few} of 10000 images." in line
        ]
        assert said == [1]  # once, right above the table
        assert lines[1].endswith("these images alone; clean accuracy, noises and certified are of all 10000.")
        assert lines[2].startswith("| row |")
    assert "Attacks ran" not in parts[summary.PARTS["grid"]]
    # Where it is so for some rows only, a note below names these.
    (few,) = reproduce.cells("mnist", seeds=1, only=["grid/authors/2"], attack_samples=8)
    (whole,) = reproduce.cells("mnist", seeds=1, only=["grid/authors/none"])
    page = reproduce.markdown([few, whole], {cell.name: made_up(cell, lambda name, by: 0.5) for cell in (few, whole)})
    assert "\ngrid/authors/2, seed 0: Attacks ran on the first 8 of 10000 images.\n" in page
    assert "these images alone" not in page


def why(page: str) -> list[str]:
    return [
        line
        for part in page.split("### ")
        if part.startswith("Why\n")
        for line in part.splitlines()
        if line[:2] == "- "
    ]


def test_why_is_said_of_the_cells_there_are() -> None:
    """Accuracies that depend on the seed by a shift: only what is of the same seeds may be compared."""
    at_horizons = {
        ("2", 0.1): {"pgd": 0.2, "certified": 0.1},
        ("2", 1.0): {"pgd": 0.4, "certified": 0.5},
        ("none", 0.1): {"pgd": 0.05, "certified": 0.0},
        ("none", 1.0): {"pgd": 0.35, "certified": 0.0},
    }
    at_starts = {"default/none": 0.1, "authors/none": 0.4, "authors/2": 0.5, "default/2": 0.15, "identity/2": 0.05}

    def result(cell: reproduce.Cell) -> reproduce.CellResult:
        part, penalty, *_ = cell.row.split("/")
        if part == "grid":
            level = at_starts.get(cell.row.removeprefix("grid/"), 0.2)
            return made_up(cell, lambda name, by: level, -400.0 if cell.row == "grid/authors/none" else 2.0)
        time = round(cell.config.step_size * cell.config.n_steps, 2)
        levels = at_horizons.get((penalty, time), {"pgd": 0.3})
        return made_up(cell, lambda name, by: levels.get(name, 0.5) + 0.02 * cell.config.seed)

    cells = reproduce.cells("mnist", seeds=2, only=["grid", "steps"])
    # Of one of the rows the second seed is missing.
    late = [cell for cell in cells if cell.row == "steps/none/h 0.1, N 10" and cell.config.seed == 1]
    results = {cell.name: result(cell) for cell in cells if cell not in late}
    horizon, measured, between, start, depends = why(reproduce.markdown(cells, results))
    assert "asks for rho = 2." in horizon
    assert "0.905 for T = 0.1 (10 steps of 0.01) and 0.368 for T = 1 (10 steps of 0.1)" in horizon
    assert "(1 seed): pgd 0.05 20.0% at T = 0.1 and 40.0% at T = 1 with the penalty, 5.0% and 35.0% without" in measured
    assert "certified 0.02 10.0% at T = 0.1 and 50.0% at T = 1 with the penalty, 0.0% and 0.0% without" in measured
    assert measured.endswith(
        "What the penalty adds grows with T for certified 0.02 (+10.0 points at T = 0.1, +50.0 at T = 1), and "
        "does not grow with T for pgd 0.05 (+15.0 points at T = 0.1, +5.0 at T = 1)."
    )
    assert (
        "31.0, 21.0, 31.0, 31.0, 41.0% at T = 0.05, 0.1, 0.2, 0.5, 1 (steps of 0.01, 0.01, 0.01, 0.05, 0.1; 2 seeds)"
        in (between)
    )
    assert "gaussian 0.2 +40.0 (+30.0 and +10.0), pgd 0.02 +40.0 (+30.0 and +10.0)" in start
    assert start.endswith(
        "the larger part of all of them. No contraction is guaranteed without the penalty (rate -400)."
    )
    assert depends.endswith("pgd 0.02, in points: +5.0 from default, +10.0 from authors, -15.0 from identity.")

    # Nothing is said of what is missing.
    of_grid = {name: found for name, found in results.items() if found.settings["train"]["step_size"] == 0.01}
    without_long = why(reproduce.markdown(cells, of_grid))
    assert len(without_long) == 3
    assert "0.905 for T = 0.1 (10 steps of 0.01); the paper's" in without_long[0]
    few = [cell for cell in cells if cell.row == "grid/default/none"]
    assert why(reproduce.markdown(few, results)) == []
    assert "### Why" not in reproduce.markdown(few, results)


def test_rates_that_are_not_reached_are_named_beside_the_verdict() -> None:
    cells = reproduce.cells("mnist", seeds=2, only=["rho/default"])
    results = {
        cell.name: made_up(cell, lambda name, by: 0.8, min(cell.config.rate * 0.9999, 8.0 + 0.1 * cell.config.seed))
        for cell in cells
    }
    (line, *_) = page_lines(reproduce.markdown(cells, results), "insensitive to rho")
    assert line[3].endswith(
        ". Rows whose filters guarantee less than the rate asked for (how much): `rho/default/10` (8.05), "
        "`rho/default/15` (8.05)"
    )
    reached = {cell.name: made_up(cell, lambda name, by: 0.8) for cell in cells}
    (line, *_) = page_lines(reproduce.markdown(cells, reached), "insensitive to rho")
    assert line[3].endswith("points apart")


def test_certified_training_beside_the_paper(tmp_path: Path) -> None:
    cells = reproduce.cells("mnist", seeds=2, only=["certified", "grid/authors/2"])
    cells += reproduce.cells("fashionmnist", seeds=1, only=["grid/authors/2"])
    results = {
        cell.name: made_up(cell, lambda name, strength, level=0.9 if cell.row == "certified" else 0.3: level)
        for cell in cells
    }
    page = reproduce.markdown(cells, results)
    (heading,) = [line for line in page.splitlines() if line.startswith("| row") and "PGD 0.2" in line]
    assert next(part for part in page.split("### ") if heading in part).startswith(summary.PARTS["certified"])
    assert "| certified | 2 | 90.0 ± 0.0 |" in page
    picture = tmp_path / "picture.png"
    assert reproduce.attacked_and_certified(cells, results, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    others = [cell for cell in cells if cell.row != "certified"]
    assert not reproduce.attacked_and_certified(others, results, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("clean", "noise", "verdict"),
    [(-0.4, 1.0, "dominates it ("), (-0.6, 1.0, "behind at clean ("), (0.0, 0.0, "behind at Gauss 0.2, Gauss 0.3 (")],
)
def test_what_dominates(clean: float, noise: float, verdict: str) -> None:
    """On clean images by no less than 0.5 points, and better at everything else."""
    cells = reproduce.cells("mnist", seeds=2, only=["certified", "grid/authors/2"])
    gains = {"clean": clean, "gaussian": noise}
    results = {
        cell.name: made_up(
            cell,
            lambda name, strength, ours=cell.row == "certified": 0.5 + ours * gains.get(name, 5.0) / 100.0,
        )
        for cell in cells
        if cell.row == "certified" or cell.config.seed == 0
    }
    (line,) = (line for line in summary.markdown(cells, results).splitlines() if line.startswith("Against `grid/"))
    gained = f"clean {clean:+.1f}, Gauss 0.2 {noise:+.1f},"
    assert line.startswith(f"Against `grid/authors/2`, in points (1 of 3 seeds): {gained}")
    assert verdict in line
    assert line.endswith("Nothing else in the table is lower.")


def test_what_a_dominating_network_is_worse_at_is_named() -> None:
    cells = reproduce.cells("mnist", seeds=1, only=["certified", "grid/authors/2"])
    losses = {("salt_and_pepper", 0.2): -3.0, ("pgd", 0.02): -0.5}
    results = {
        cell.name: made_up(
            cell,
            lambda name, by, ours=cell.row == "certified": 0.5 + ours * losses.get((name, by), 5.0) / 100.0,
        )
        for cell in cells
    }
    (line,) = (line for line in summary.markdown(cells, results).splitlines() if line.startswith("Against `grid/"))
    assert "dominates it (" in line
    assert line.endswith("Not asked for there, and lower: S&P 0.2 -3.0, PGD 0.02 -0.5.")


def test_verdicts_compare_the_same_seeds_and_are_bold_with_three() -> None:
    """Seed 1, which is easier, is there for one rate only: no effect of the rate may come out of that."""
    cells = reproduce.cells("mnist", seeds=2, only=["rho/default"])
    cells = [cell for cell in cells if cell.config.seed == 0 or cell.row == "rho/default/2"]
    results = {
        cell.name: made_up(cell, lambda name, strength, level=0.8 + 0.08 * cell.config.seed: level) for cell in cells
    }
    (found,) = [v for v in claims.verdicts(reproduce.by_row(cells, results)["rho"], "mnist") if v.seeds]
    assert (found.seeds, found.verdict) == (1, "holds")
    assert "points apart | holds |" in reproduce.markdown(cells, results)
    cells = reproduce.cells("mnist", seeds=3, only=["rho/default"])
    results = {cell.name: made_up(cell, lambda name, strength: 0.8) for cell in cells}
    assert "points apart | **holds** |" in reproduce.markdown(cells, results)


@pytest.mark.parametrize(
    ("step", "noisy", "verdict"),
    [
        (0.004, 0.004, "holds"),
        (0.004, 0.006, "in part (clean)"),
        (0.006, 0.004, "in part (gaussian 0.2)"),
        (0.006, 0.006, "no"),
    ],
)
def test_claim_about_the_rate(step: float, noisy: float, verdict: str) -> None:
    cells = reproduce.cells("mnist", seeds=1, only=["rho/default"])
    results = {
        cell.name: made_up(
            cell, lambda name, strength, number=number: 0.9 - number * (noisy if name == "gaussian" else step)
        )
        for number, cell in enumerate(cells)
    }
    (found,) = [v for v in claims.verdicts(reproduce.by_row(cells, results)["rho"], "mnist") if v.seeds]
    assert found.claim == "insensitive to rho from 0.1 to 15"
    assert found.verdict == verdict
    assert found.found.startswith(f"clean: {600 * step:.1f} points apart")


def test_unreliable_cells_are_marked() -> None:
    (cell,) = reproduce.cells("mnist", seeds=1, only=["grid/default/2"])
    result = made_up(cell, lambda name, strength: 0.5)
    check = robustness.Check("eps 0 = clean", False, "")
    failed = dataclasses.replace(result, report=dataclasses.replace(result.report, checks=(check,)))
    text = reproduce.markdown([cell], {cell.name: failed})
    assert "**grid/default/2, seed 0: UNRELIABLE: 1 of 1 checks failed (eps 0 = clean).**" in text
    assert "UNRELIABLE" not in reproduce.markdown([cell], {cell.name: result})


def test_summary_command(tmp_path: Path) -> None:
    cells = reproduce.cells("mnist", seeds=1, only=["grid/default/2", "grid/default/none"])
    other = reproduce.cells("mnist", seeds=1, only=["grid/default/2"], epochs=1)[0]
    for folder, cell in (("a", cells[0]), ("b", cells[1]), ("b", other)):
        path = cell_module.path_of(cell, tmp_path / folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made_up(cell, lambda name, strength: 0.5).to_json())
    page = tmp_path / "docs" / "page.md"
    result = rnf("summary", tmp_path / "a", tmp_path / "b", "--seeds", "2", "--output", page)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert [row[:3] for row in page_lines(text, "grid/")] == [
        ["grid/default/none", "1", "50.0"],
        ["grid/default/2", "1", "50.0"],
    ]
    unique = {cell.name for cell in reproduce.cells("mnist", seeds=2)}
    assert f"2 of {len(unique)} cells." in text
    assert f"0 of {len(unique)} cells." in text  # FashionMNIST
    assert "- `grid/default/2`: seed 1\n" in text
    assert "- `jacobian, every row`: seed 0, 1\n" in text
    assert f"note: 1 cells of other settings are left out, {cell_module.path_of(other, tmp_path / 'b')}" in (
        result.stderr
    )
    sweep = reproduce.cells("mnist", seeds=3, only=["gamma/10"])
    for cell in (sweep[0], sweep[2]):  # the one seed of a sweep that there is to be, and one more
        cell_module.path_of(cell, tmp_path / "a").write_text(made_up(cell, lambda name, strength: 0.5).to_json())
    result = rnf("summary", tmp_path / "a", tmp_path / "b", "--output", page)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert [row[:2] for row in page_lines(text, "gamma/")] == [["gamma/10", "2"]]
    usual = {cell.name for cell in reproduce.cells("mnist")}
    assert f"4 of {len(usual) + 1} cells." in text
    assert f"0 of {len(usual)} cells." in text
    assert "seed 1, 2" in text  # of the grid
    assert "note: 1 cells of other settings are left out" in result.stderr
    path = cell_module.path_of(cells[0], tmp_path / "a")
    path.write_text(path.read_text().replace('"penalty": 0.25', '"penalty": 0.5'))
    result = rnf("summary", tmp_path / "a", "--output", page)
    assert result.exit_code == 1
    assert f"{path} is truncated or was altered (ValueError: its content does not match its SHA-256)" in result.stderr
    assert page.read_text() == text


def test_the_committed_page_is_what_the_committed_cells_say(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    folders = [root / "docs" / "results" / dataset for dataset in ("mnist", "fashionmnist")]
    result = rnf("summary", *folders, "--output", tmp_path / "results.md")
    assert result.exit_code == 0, result.output
    assert "left out" not in result.stderr
    assert (tmp_path / "results.md").read_text() == (root / "docs" / "results.md").read_text()


def test_the_committed_page_on_cifar_is_what_the_committed_cells_say() -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    cells = reproduce.cifar_cells(attack_samples=1000)
    found = {cell.name: reproduce.read(cell, docs / "results" / "cifar10") for cell in cells}
    results = {name: result for name, result in found.items() if result is not None}
    assert len(results) == len(cells)
    assert reproduce.cifar_markdown(cells, results, "cifar.png") == (docs / "cifar.md").read_text()


def test_the_picture_draws_hollow_where_a_check_failed() -> None:
    """At the radius that the check names; those at the smaller ones stay full."""
    (cell,) = reproduce.cells("mnist", seeds=1, only=["certified"])
    result = made_up(cell, lambda name, strength: 0.9)
    checks = (
        robustness.Check("white box <= square at l_inf eps 0.3", False, ""),
        robustness.Check("white box <= pgd on vanilla at l_inf eps 0.2", True, ""),
        robustness.Check("eps 0 = clean", False, ""),
    )
    failed = dataclasses.replace(result, report=dataclasses.replace(result.report, checks=checks))
    assert summary.failed_at([result, failed]) == {0.3}


def test_the_page_says_where_suite_full_refutes_what_stands_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the picture's line is hollow there as well, not only the cross."""
    cells = reproduce.cells("mnist", seeds=1, only=["certified", "full/certified"])
    results = {cell.name: made_up(cell, lambda name, strength: 0.9 - strength) for cell in cells}
    assert "say too much" not in reproduce.markdown(cells, results)
    faces: list[list[float]] = []
    monkeypatch.setattr(plot, "_markers", lambda axis, radii, heights, failed, *_: faces.append(sorted(failed)))
    assert plot.attacked_and_certified(cells, results, io.BytesIO())
    assert faces == [[], []]
    full = next(cell for cell in cells if cell.row == "full/certified")
    checks = (robustness.Check("white box <= square at l_inf eps 0.2", False, ""),)
    report = dataclasses.replace(results[full.name].report, checks=checks)
    results[full.name] = dataclasses.replace(results[full.name], report=report)
    assert (
        "PGD's accuracies of the certified network say too much at 0.2: there a check of suite `full` failed, under "
        "which it keeps 70.0% at 0.2 (of the first 500 images, seeds: 1)."
    ) in reproduce.markdown(cells, results)
    assert plot.attacked_and_certified(cells, results, io.BytesIO())
    assert faces[2:] == [[0.2], [0.2]]
