"""``rnf reproduce``: the grid is what it should be, cells survive kills, broken files are refused, faults are said."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from robust_node_fast import cli, data, reproduce, robustness, training
from robust_node_fast.reproduce import cell as cell_module
from robust_node_fast.reproduce import grid, summary
from robust_node_fast.training import TrainConfig, trainer

# With ONLY two cells: "grid/identity/2" and "grid/identity/2-sharp".
TINY = ["--dataset", "digits", "--seeds", "1", "--epochs", "1", "--train-samples", "200", "--attack-samples", "8"]
ONLY = ["--only", "grid/identity/2"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rnf(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["reproduce", "cnode", *map(str, arguments)])


def two_cells() -> list[reproduce.Cell]:
    return reproduce.cells("digits", seeds=1, only=ONLY[1], epochs=1, train_samples=200, attack_samples=8)


def without_times(path: Path) -> bytes:
    content = json.loads(path.read_text())
    del content["seconds"]
    return json.dumps(content).encode()


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted((folder / "cells").iterdir())}


# --- the grid ----------------------------------------------------------------------------------------------------


def test_the_grid_is_full() -> None:
    found = reproduce.cells("mnist")
    assert [cell.config.seed for cell in found] == sorted([0, 1, 2] * (len(found) // 3))  # all rows of a seed first
    part = [cell for cell in found if cell.row.startswith("grid/")]
    kinds = Counter((cell.config.init, grid.penalty_name(cell.config), cell.config.seed) for cell in part)
    inits, penalties = ("default", "authors", "identity", "centered"), ("none", "2", "2-sharp", "inf")
    assert kinds == Counter((init, penalty, seed) for init in inits for penalty in penalties for seed in range(3))
    rates = {cell.config.rate for cell in found if cell.row.startswith("rho/default/")}
    assert rates == {0.1, 0.5, 1, 2, 5, 10, 15}
    paper = TrainConfig.recipe("mnist", rate_margin=0.0, init="default", n_steps=10, step_size=0.01)
    assert next(cell for cell in found if cell.row == "grid/default/2").config == paper


def test_a_setting_makes_a_cell() -> None:
    found = reproduce.cells("mnist")
    names = {cell.name: cell.settings for cell in found}
    assert all(names[cell.name] == cell.settings for cell in found)
    same = [cell.row for cell in found if cell.name == found[1].name]
    assert same == ["grid/default/2", "rho/default/2", "gamma/1", "steps/2/h 0.01, N 10"]
    others = [
        reproduce.cells("fashionmnist"),
        reproduce.cells("mnist", attack_samples=9),
        reproduce.cells("mnist", epochs=9),
        reproduce.cells("mnist", train_samples=9),
    ]
    for other in others:
        assert not names.keys() & {cell.name for cell in other}
    elsewhere = reproduce.cells("mnist", data_root="elsewhere")
    assert {cell.name for cell in elsewhere} == names.keys()


def test_partners_are_on_the_other_side_of_the_penalty() -> None:
    found = reproduce.cells("mnist", seeds=2)
    configs = [dataclasses.asdict(cell.config) for cell in found]
    for cell in found:
        own, other = cell.config, cell.partner
        assert {own.network, other.network} == {"vanilla", "contractive"}
        same = ("init", "seed", "n_steps", "step_size", "epochs", "dataset")
        assert all(getattr(own, name) == getattr(other, name) for name in same)
        assert dataclasses.asdict(other) in configs  # trained for a row of its own


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
    for weight in (0.0, 1.0):
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
    assert rates[0.0][0] == rates[1.0][0] > 0.0  # the same start
    assert rates[1.0][-1] < min(rates[1.0][0], rates[0.0][-1])


def test_jacobian_regulariser_leaves_the_logits_alone() -> None:
    model = TrainConfig("digits", n_steps=3).build_model()
    images = torch.rand(5, 1, 8, 8)
    logits, penalty = trainer._with_jacobian_penalty(model, images, 2.0)
    torch.testing.assert_close(logits, model(images))
    # The largest eigenvalue of J + J' found can only fall short of what Gershgorin's discs allow.
    assert 0.0 < penalty.item() <= 2.0 - model.contraction_rate().min().item()


# --- running it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells, undisturbed."""
    folder = tmp_path_factory.mktemp("reproduce") / "done"
    result = rnf(*TINY, *ONLY, "--out", folder)
    assert result.exit_code == 0, result.output
    assert "steps" not in result.stdout
    for row in ("grid/identity/2", "grid/identity/2-sharp"):
        assert row in result.stdout
        assert f"{row}, seed 0" in result.stderr
    return folder


def test_a_cell_says_all(done: Path) -> None:
    cells = two_cells()
    assert files(done).keys() == {f"{cell.name}.json" for cell in cells}
    content = json.loads((done / "cells" / f"{cells[0].name}.json").read_text())
    assert content["settings"] == cells[0].settings
    assert content["settings"]["train"]["train_samples"] == 200
    assert min(content["seconds"].values()) > 0
    model, config = training.load_model(done / "networks" / grid.network_name(cells[0].config))
    assert config == cells[0].config
    assert content["rate"] == model.contraction_rate().min().item()
    assert content["penalty"] == model.contraction_penalty(rate=2.0).item()
    report = robustness.Report.from_json(json.dumps(content["report"]))
    assert report.n_samples == 360
    assert "Attacks ran on the first 8 of 360 images." in report.notes
    for eps in (0.02, 0.05, 0.1, 0.2, 0.3):
        attacked = [report.accuracy(name, eps) for name in ("fgsm", "pgd", "pgd on vanilla")]
        assert all(8 * accuracy == round(8 * accuracy) for accuracy in attacked)
        assert report.accuracy("certified", eps) <= report.accuracy("clean")
    images = data.load("digits")
    right = (model(images.test_images).argmax(1) == images.test_labels).double().mean().item()
    assert report.accuracy("clean") == pytest.approx(right)


def test_summary(done: Path) -> None:
    with (done / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    stored = [json.loads(path.read_text())["report"]["results"] for path in files(done).values()]
    assert len(lines) == sum(map(len, stored))
    clean = [float(line["accuracy"]) for line in lines if line["test"] == "clean"]
    assert sorted(clean) == sorted(results[0]["mean"] for results in stored)
    assert {(line["init"], line["norm"], line["seed"]) for line in lines} == {
        ("identity", "2", "0"),
        ("identity", "2-sharp", "0"),
    }
    text = (done / "summary.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| grid/identity/2")]
    assert [row.split(" | ")[1] for row in rows] == [f"{100 * accuracy:.1f}" for accuracy in clean]
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "![grid-identity.png](grid-identity.png)" in text
    assert (done / "grid-identity.png").read_bytes().startswith(b"\x89PNG")
    assert "Attacks ran on the first 8 of 360 images." in text


def test_rows_of_several_seeds() -> None:
    def stored(clean: float) -> reproduce.Stored:
        columns = summary.COLUMNS
        names = [(f"{name}vanilla" if name.endswith(" ") else name, strength) for _, name, strength in columns]
        results = [robustness.Result(name, strength, (clean,)) for name, strength in names]
        report = robustness.Report("standard", 10, tuple(results), (), {})
        return reproduce.Stored({}, 2.0 * clean, 0.0, {"train": 1.0, "evaluate": 2.0}, report)

    for spread, text in ((True, "60.0 ± 14.1"), (False, "60.0")):
        headings, line = reproduce.table({"grid/default/2": [stored(0.5), stored(0.7)]}, spread=spread)
        assert len(headings) == len(line)
        assert line[:2] == ["grid/default/2", text]
        assert line[-3:] == ["1.2", "0", "3"]


def test_sigkill_loses_no_cell(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    arguments = [*TINY, *ONLY, "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "robust_node_fast", "reproduce", "cnode", *arguments],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    second = "digits-identity-2-sharp-*/metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline and not list((folder / "networks").glob(second)):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (finished,) = files(folder).values()  # the second cell had begun and was not done
    before = finished.read_bytes(), finished.stat().st_mtime_ns
    result = rnf(*arguments)
    assert result.exit_code == 0, result.output
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before
    assert "grid/identity/2, seed 0" not in result.stderr  # not computed again
    assert "2 of 2: grid/identity/2-sharp, seed 0" in result.stderr
    assert files(folder).keys() == files(done).keys()
    for name, path in files(folder).items():
        assert without_times(path) == without_times(files(done)[name])


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:-20],
        lambda content: b"",
        lambda content: b"\xff" + content[1:],
        lambda content: b"[1, 2]",
        lambda content: content.replace(b'"n_samples"', b'"n_simples"'),
        lambda content: content.replace(b'"epochs": 1', b'"epochs": 2'),
    ],
    ids=["truncated", "empty", "bytes", "list", "field", "settings"],
)
def test_a_broken_cell_counts_as_none(harm: Any, done: Path, tmp_path: Path) -> None:
    cell = two_cells()[0]
    content = (done / "cells" / f"{cell.name}.json").read_bytes()
    path = tmp_path / "cells" / f"{cell.name}.json"
    path.parent.mkdir()
    path.write_bytes(content)
    whole = reproduce.stored(cell, tmp_path)
    assert whole is not None
    assert whole.to_json().encode() == content
    assert harm(content) != content
    path.write_bytes(harm(content))
    with pytest.warns(UserWarning, match=r"json is truncated or corrupted \(.*\): this cell is computed again"):
        assert reproduce.stored(cell, tmp_path) is None


def test_a_broken_cell_is_computed_again(done: Path) -> None:
    path = next(iter(files(done).values()))
    before, content = without_times(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    result = rnf(*TINY, *ONLY, "--out", done)
    assert result.exit_code == 0, result.output
    (note,) = [line for line in result.stderr.splitlines() if "corrupted" in line]
    assert note.startswith("rnf: note: ")
    assert without_times(path) == before


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise training.Interrupted(signal.SIGTERM, 3, 4)

    monkeypatch.setattr(cell_module.training, "fit", stop)
    result = rnf(*TINY, *ONLY, "--out", tmp_path)
    assert result.exit_code == 128 + signal.SIGTERM
    assert result.stderr == "rnf: stopped by SIGTERM after step 3 of 4; the same command goes on\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only", "alpha"], 2, "only='alpha' fits no row"),
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
    result = rnf(*TINY, "--out", tmp_path / "file" / "x")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "file/x cannot be written" in line
