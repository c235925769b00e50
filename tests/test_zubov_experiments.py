"""Contract of the Zubov-Net experiments: regions by simulation, training that resumes to the bit, rivals, commands."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import start
from torch import Tensor, nn
from typer.testing import CliRunner

from robust_node_fast import cli, data, robustness, training, zubov
from robust_node_fast.certify import linf_certified
from robust_node_fast.nn import EulerConvFlow
from robust_node_fast.robustness import auto_attack
from robust_node_fast.training import TrainConfig
from robust_node_fast.training.checkpoint import digest_of_json
from robust_node_fast.training.objective import objective_of
from robust_node_fast.zubov import contenders, curves, exact, experiments, losses, page, planar
from robust_node_fast.zubov.attraction import attracted_to, overlap, plane

DIGITS = data.load("digits")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "zubov"
run = CliRunner()


# ---------------------------------------------------------------------------------------------------------------------
# Regions
# ---------------------------------------------------------------------------------------------------------------------


def test_simulated_region_of_the_exact_system_is_the_unit_disc() -> None:
    """And outside of it states run away until they overflow, which is no convergence."""
    grid = plane(torch.tensor([-1.5, -1.5]), torch.tensor([1.5, 1.5]), 81)
    found = attracted_to(exact.field, grid, torch.zeros(1, 2)).nearest == 0
    disc = grid.square().sum(1) < 1.0
    assert overlap(found, disc) == 1.0
    assert 0 < int(disc.sum()) < len(disc)


def test_the_exact_system_is_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a picture; and a field that is a little another one does not pass."""

    def errors(folder: Path) -> dict[str, Any]:
        (cell,) = experiments.cells(only=["plane/exact system"], steps=2)
        found = experiments.compute(cell, folder, tmp_path, on_progress=lambda _: None)
        assert experiments.path_of(cell, folder).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert experiments.read(cell, folder) is not None
        return found

    found = errors(tmp_path / "right")
    assert max(found[name] for name in ("value_error", "residual", "decay_error")) <= 1e-6
    assert found["iou"] == found["iou_with_the_disc"] == [1.0]
    field = exact.field
    monkeypatch.setattr(exact, "field", lambda x: 1.01 * field(x))
    found = errors(tmp_path / "wrong")
    assert min(found["residual"], found["decay_error"]) > 1e-3


def test_a_state_at_rest_elsewhere_or_passing_by_is_not_attracted() -> None:
    points = torch.tensor([[0.05, 0.0], [3.0, 0.0]])
    found = attracted_to(torch.zeros_like, points, torch.zeros(1, 2))
    assert (found.nearest.tolist(), found.moving.tolist(), found.time) == ([0, -1], [False, False], 100.0)
    passing = attracted_to(lambda x: torch.full_like(x, 5e-3), torch.tensor([[-0.5, -0.5]]), torch.zeros(1, 2))
    assert passing.nearest.tolist() == [-1]  # within the radius after 100 units of time, at a speed of 5e-3
    assert passing.moving.tolist() == [True]
    both = attracted_to(lambda x: x - x**3, torch.tensor([[0.1], [-0.1]]), torch.tensor([[-1.0], [1.0]]))
    assert both.nearest.tolist() == [1, 0]


def test_states_that_arrive_late_are_waited_for() -> None:
    """At half the speed twice as long; and one that leaves an equilibrium in the end does not count."""
    points = torch.tensor([[1.0, 0.0], [0.2, 0.0]])
    for rate, time in ((1.0, 100.0), (0.1, 200.0), (0.04, 400.0)):
        found = attracted_to(lambda x: -rate * x, points, torch.zeros(1, 2))  # noqa: B023
        assert (found.nearest.tolist(), found.time) == ([0, 0], time)
    saddle = torch.tensor([-1.0, 0.1])
    found = attracted_to(lambda x: saddle * x, torch.tensor([[1.0, 1e-6], [1.0, 0.0]]), torch.zeros(1, 2))
    assert found.nearest.tolist() == [-1, 0]  # both look arrived at first


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"radius": 0.0}, "radius=0.0"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"equilibria": torch.zeros(1, 3)}, "equilibria"),
    ],
)
def test_bad_arguments_of_the_simulation(change: dict[str, object], match: str) -> None:
    options = {"points": torch.zeros(4, 2), "equilibria": torch.zeros(1, 2), **change}
    with pytest.raises(ValueError, match=match):
        attracted_to(exact.field, **options)  # type: ignore[arg-type]


def test_overlap() -> None:
    a, b = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert (overlap(a, b), overlap(a, a), overlap(~a, a), overlap(b & ~b, b & ~b)) == (0.5, 1.0, 0.0, 1.0)


def test_consistency_loss_shrinks_the_difference_of_the_regions() -> None:
    """The field of the exact system is fixed; V starts as a quarter of the solution: a disc of radius 2."""
    lyapunov = zubov.ConvexLyapunov(2, 1, width=16, depth=2, eps=0.25, equilibria=torch.zeros(1, 2))
    with torch.no_grad():
        lyapunov.log_scale.fill_(-3.0)
    grid = plane(torch.tensor([-2.5, -2.5]), torch.tensor([2.5, 2.5]), 61)
    attracted = attracted_to(exact.field, grid, torch.zeros(1, 2)).nearest == 0
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(lyapunov.parameters(), 3e-2)
    differences = []
    for step in range(201):
        if step % 100 == 0:
            differences.append(int(((lyapunov(grid)[:, 0] < 1.0) ^ attracted).sum()))
        states = 0.3 * torch.randn(2, 1, 2, generator=generator).expand(2, 1, 2)
        losses = zubov.zubov_losses(
            lyapunov, exact.field, states, torch.zeros(1, dtype=torch.int64), classification=0.0, separation=0.0,
            rate=2.0, n_rays=64, reach=0.25, generator=generator,
        )  # fmt: skip
        optimizer.zero_grad()
        losses["consistency"].backward()
        optimizer.step()
    assert differences[0] > differences[1] > differences[2]
    assert differences[2] < differences[0] / 4


def test_training_in_the_plane_aligns_the_regions(tmp_path: Path) -> None:
    few = {"consistency": 3.0, "n_rays": 60, "floor": 0.1}
    config = TrainConfig.recipe("blobs", steps=500, zubov=few)
    dataset = data.load("blobs")
    found = []
    training.fit(start(tmp_path / "run", config), dataset)
    for net in (config.initial_model(), training.load_model(tmp_path / "run")[0]):
        found.append(planar.regions(net, dataset.train_images, side=41, step_size=0.1).overlaps)
    before, after = found
    assert min(after) > max(before) + 0.3, (before, after)


# ---------------------------------------------------------------------------------------------------------------------
# Reach and floor of the consistency loss
# ---------------------------------------------------------------------------------------------------------------------


def test_reach_and_floor_of_the_consistency_loss() -> None:
    """The equation holds inside the disc of radius 1 and not outside; only reach notices. floor weighs the centre."""
    lyapunov = zubov.ConvexLyapunov(2, 1, width=3, eps=1.0, equilibria=torch.zeros(1, 2), dtype=torch.float64)
    nn.init.zeros_(lyapunov.input_weight)

    def consistency(field: object, **options: object) -> float:
        states = torch.tensor([0.1, 0.0], dtype=torch.float64).expand(2, 1, 2)
        found = zubov.zubov_losses(
            lyapunov, field, states, torch.zeros(1, dtype=torch.int64), classification=0.0, separation=0.0, rate=2.0,
            n_rays=64, generator=torch.Generator().manual_seed(0), **options,
        )  # type: ignore[arg-type]  # fmt: skip
        return float(found["consistency"].detach())

    def leaking(x: Tensor) -> Tensor:
        return torch.where(x.norm(dim=-1, keepdim=True) > 1.001, -x, exact.field(x))

    assert consistency(leaking) < 1e-20
    assert consistency(leaking, reach=0.2) > 1e-2
    at_rest = torch.zeros_like  # the residual is rate V (1 - V), divided by V + floor it is larger near the centre
    assert consistency(at_rest, floor=0.01) > 2.0 * consistency(at_rest)
    for name in ("reach", "floor"):
        with pytest.raises(ValueError, match=f"{name}=-1.0"):
            consistency(exact.field, **{name: -1.0})


def test_a_guard_of_the_objective_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight decay shrinks the backbone until all points have the same state. The same run without decay learns;
    without the guard, the first one goes on with equal logits for all points."""

    def fit(name: str, **changes: Any) -> training.Outcome:
        config = TrainConfig.recipe("moons", **{**experiments.COLLAPSING, **changes})
        return training.fit(start(tmp_path / name, config), data.load("moons"))

    with pytest.raises(training.Refused, match=r"^step \d+: V is the same for all states"):
        fit("guarded")
    assert fit("sound", weight_decay=0.0).accuracy > 0.8
    monkeypatch.setattr(losses, "_check_collapse", lambda *_: None)
    found = fit("unguarded", steps=100)
    assert found.accuracy == pytest.approx(0.5, abs=0.01)
    assert training.last_step(found.folder)["classification"] == pytest.approx(math.log(2.0), abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Rivals
# ---------------------------------------------------------------------------------------------------------------------


def test_rivals_share_the_backbone_and_learn(tmp_path: Path) -> None:
    first = TrainConfig.recipe("digits", model="node", seed=5).initial_model().backbone.state_dict()
    for method in contenders.METHODS:
        config = TrainConfig.recipe("digits", model=method, seed=5, steps=60, batch_size=64, lr=1e-2)
        net = config.initial_model()
        assert all(torch.equal(first[name], value) for name, value in net.backbone.state_dict().items())
        goal = objective_of(net, config)
        value, metrics = goal(DIGITS.train_images[:32], DIGITS.train_labels[:32])
        value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters()), method
        training.fit(start(tmp_path / method, config), DIGITS)
        name = "classification" if method == "zubov" else "loss"
        before = dict(zip(goal.metrics, metrics.tolist(), strict=True))[name]
        assert training.last_step(tmp_path / method)[name] < 0.7 * before, method


def test_bare_backbone_is_the_trained_one_with_a_head_of_its_own() -> None:
    net = TrainConfig.recipe("digits", model="zubov").initial_model()
    bare = contenders.bare_backbone(net, DIGITS.train_images, DIGITS.train_labels, 10)
    found = (bare(DIGITS.test_images).argmax(1) == DIGITS.test_labels).float().mean()
    assert bare[0] is net.backbone
    assert found > 0.7  # of random features; chance is 0.1


def test_lyapunov_rival_charges_for_energy_that_does_not_fall() -> None:
    config = TrainConfig.recipe("digits", model="lyanet", rate=2.0)
    net = config.initial_model()
    with torch.no_grad():
        net.dynamics.weight2.zero_()
        net.dynamics.bias2.zero_()
    _, (loss, penalty) = objective_of(net, config)(torch.rand(6, 1, 8, 8), torch.arange(6))
    assert float(penalty) == pytest.approx(2.0 * float(loss), rel=1e-5)  # f = 0


def test_certificates_are_there_where_a_bound_is() -> None:
    def found(**changes: Any) -> object:
        return training.certificate(TrainConfig.recipe(**changes).build_model())

    assert found(dataset="digits") is linf_certified
    assert found(dataset="digits", model="zubov") is zubov.margin_certified
    assert found(dataset="digits", model="node") is None
    assert found(dataset="cifar10", model="zubov") is None  # a ResNet has blocks, no list of layers


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def test_train_evaluate_and_certify_digits(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["train", "--model", "zubov", "--dataset", "digits", "--set", "steps=120", "--out", str(folder)]
    done = run.invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "consistency" in done.output
    assert training.load_config(folder) == TrainConfig.recipe("digits", "zubov", steps=120)
    before = (folder / "model.safetensors").read_bytes()
    assert run.invoke(cli.app, ["train", "--resume", str(folder)]).exit_code == 0  # goes on where nothing is left
    assert (folder / "model.safetensors").read_bytes() == before
    done = run.invoke(cli.app, ["evaluate", str(folder), "--suite", "quick", "--samples", "40"])
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "report.json").read_text())
    assert report["results"][0]["mean"] > 0.8  # clean
    assert "certified" in [result["name"] for result in report["results"]]
    done = run.invoke(cli.app, ["certify", str(folder), "--samples", "10", "--eps", "0"])
    assert done.exit_code == 0, done.output
    content = json.loads((folder / "certificate_linf.json").read_text())
    net, _ = training.load_model(folder)
    radius = zubov.margin_radius(net, DIGITS.test_images[:10], DIGITS.test_labels[:10])
    assert content["radius_mean"] == pytest.approx(float(radius.mean()))
    assert content["certified"]["0.0"] == content["clean"]


def test_no_attack_breaks_certificates_of_a_trained_network(tmp_path: Path) -> None:
    """Straight on the margin, on the cross-entropy, and transferred from the bare backbone; at a radius not tiny."""
    folder = tmp_path / "run"
    training.prepare(TrainConfig.recipe("digits", "zubov", steps=120), folder)
    training.fit(folder, DIGITS)
    net, _ = training.load_model(folder)
    images, labels = DIGITS.test_images[:100], DIGITS.test_labels[:100]
    radius = zubov.margin_radius(net, images, labels)
    certified = radius > 0.2 * radius.max()
    eps = float(radius[certified].min())
    assert certified.sum() > 50
    assert eps > 1e-6
    assert torch.equal(zubov.margin_certified(net, images, labels, 0.999 * eps)[certified], certified[certified])
    images, labels = images[certified], labels[certified]
    bare = contenders.bare_backbone(net, DIGITS.train_images, DIGITS.train_labels, 10)
    for attacked, loss in ((net, "margin"), (net, "cross-entropy"), (bare, "cross-entropy")):
        found = robustness.pgd(
            *(attacked, images, labels, eps),
            step_size=eps / 4,
            n_steps=20,
            loss=loss,
            target=net,
            generator=torch.Generator().manual_seed(0),
        )
        assert not torch.equal(found, images)
        with torch.no_grad():
            assert torch.equal(net(found).argmax(1), labels)


def test_the_full_recipe_learns_from_batches_of_real_images(data_root: Path, tmp_path: Path) -> None:
    """ResNet-18 with all losses and the recipe's augmentation: what a GPU runs for 78,200 steps, for eight."""
    if not (data_root / "cifar-10-batches-py").is_dir():
        pytest.skip("cifar-10-batches-py is not in the folder with the real data")
    whole = data.load("cifar10", data_root)
    few = dataclasses.replace(whole, test_images=whole.test_images[:32], test_labels=whole.test_labels[:32])
    config = TrainConfig.recipe("cifar10", "zubov", steps=8, batch_size=32, train_samples=32, lr=0.02)
    assert config.zubov.backbone == "resnet18"
    folder = tmp_path / "run"
    training.prepare(config, folder)
    records: list[dict[str, float]] = []
    outcome = training.fit(folder, few, on_step=lambda step, total, record: records.append(dict(record)))
    assert outcome.steps == 8
    assert len(records) == 8
    assert all(math.isfinite(record["loss"]) for record in records)
    assert all(records[0][loss] > 0 for loss in ("consistency", "classification", "containment"))
    assert records[-1]["loss"] < records[0]["loss"]  # the same 32 images in every step


def test_evaluate_takes_rivals_and_certify_says_why_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["train", "--model", "node", "--set", "steps=2", "--out", str(folder)]
    assert run.invoke(cli.app, command).exit_code == 0
    done = run.invoke(cli.app, ["evaluate", str(folder), "--suite", "quick", "--samples", "10"])
    assert done.exit_code == 0, done.output
    assert "certified" not in done.output
    done = run.invoke(cli.app, ["certify", str(folder)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "cannot be certified" in done.stderr


def test_train_and_plot(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["train", "--dataset", "moons", "--set", "zubov.backbone=mlp", "--set", "steps=3", "--out", str(folder)]
    done = run.invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    done = run.invoke(cli.app, ["zubov", "plot", str(folder), "--side", "9"])
    assert done.exit_code == 0, done.output
    assert "IoU" in done.output
    assert (folder / "regions.png").read_bytes().startswith(b"\x89PNG")
    done = run.invoke(cli.app, ["evaluate", str(folder)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "cannot be evaluated" in done.stderr


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    done = run.invoke(cli.app, ["zubov", "plot", str(tmp_path)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "no run folder" in done.stderr
    for name, config, match in (
        ("resnet", TrainConfig.recipe("digits", "zubov", model="resnet", steps=1), "expected 'zubov'"),
        ("wide", TrainConfig.recipe("moons", "zubov", steps=1, zubov={"dim": 3}), "have 3 numbers, expected 2"),
    ):
        training.fit(start(tmp_path / name, config), data.load(config.dataset))
        done = run.invoke(cli.app, ["zubov", "plot", str(tmp_path / name)])
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert match in done.stderr
    done = run.invoke(cli.app, ["reproduce", "zubov", "--only", "nowhere"])
    assert done.exit_code == 2
    assert "nowhere" in done.stderr


def test_reproduce_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planar, "regions", functools.partial(planar.regions, side=9, step_size=0.5))
    out = tmp_path / "results"
    command = [
        "reproduce",
        "zubov",
        "--only",
        "plane/blob",
        "--steps",
        "2",
        "--out",
        str(out),
        "--work",
        str(tmp_path),
    ]
    done = run.invoke(cli.app, [*command, "--max-cells", "1"])
    assert done.exit_code == 0, done.output
    (first,) = out.glob("plane/*.json")
    before = first.read_bytes()
    table = (out / "tables.md").read_text()
    assert table.count(page.MISSING) > 7  # the other rows
    assert run.invoke(cli.app, [*command, "--max-cells", "1"]).exit_code == 0
    assert len(list(out.glob("plane/*.json"))) == 2
    assert first.read_bytes() == before
    for altered, why in (
        (before[:-20], "is truncated or was altered"),
        (before.replace(b'"threads": ', b'"threads": 1'), "was altered: its content does not match its SHA-256"),
    ):
        assert altered != before
        first.write_bytes(altered)
        with pytest.warns(UserWarning, match=f"{why}.*: this cell is computed again"):
            assert experiments.read(experiments.cells(only=["plane/blob"], steps=2)[0], out) is None
    first.write_bytes(before)
    written = experiments.PROTOCOL
    monkeypatch.setattr(experiments, "PROTOCOL", 99)
    with pytest.warns(UserWarning, match=f"is of protocol {written}, this is 99: this cell is computed again"):
        assert experiments.read(experiments.cells(only=["plane/blob"], steps=2)[0], out) is None


def test_a_setting_that_is_new_renames_no_cell(tmp_path: Path) -> None:
    """Files written before there was a setting stand for its default, and for nothing else."""
    cell = experiments.cells(only=["digits/zubov"], seeds=1)[0]
    before = json.loads(json.dumps(cell.settings))
    del before["train"]["noise"], before["train"]["zubov"]["containment"]
    content = {"protocol": experiments.PROTOCOL, "settings": before, "refused": None}

    def written(for_cell: experiments.Cell) -> experiments.Cell:
        path = experiments.path_of(for_cell, tmp_path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"sha256": digest_of_json(content), **content}))
        return for_cell

    with pytest.warns(UserWarning, match="has other settings than its name stands for"):  # containment is 10 there
        assert experiments.read(written(cell), tmp_path) is None
    usual = dataclasses.replace(cell.config, zubov=dataclasses.replace(cell.config.zubov, containment=0.0))
    assert experiments.read(written(dataclasses.replace(cell, config=usual)), tmp_path) is not None
    names = {experiments.path_of(each, tmp_path).name for each in (cell, dataclasses.replace(cell, config=usual))}
    assert len(names) == 2


def test_what_concerns_lyapunov_functions_names_no_rival(tmp_path: Path) -> None:
    """Rivals keep their files when a recipe of Zubov-Nets changes."""
    for cell in experiments.cells(only=["digits"], seeds=1):
        if cell.change:
            continue
        usual = TrainConfig.recipe("digits", "zubov", model=cell.row, zubov={}).zubov
        assert (cell.config.zubov.containment == 0.0) == (cell.row != "zubov")
        assert usual == cell.config.zubov
        content = {"protocol": experiments.PROTOCOL, "settings": json.loads(json.dumps(cell.settings)), "refused": None}
        path = experiments.path_of(cell, tmp_path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"sha256": digest_of_json(content), **content}))
        assert experiments.read(cell, tmp_path) is not None
        content["settings"]["train"]["zubov"]["dim"] = 99
        path.write_text(json.dumps({"sha256": digest_of_json(content), **content}))
        with pytest.warns(UserWarning, match="has other settings"):
            assert experiments.read(cell, tmp_path) is None


@pytest.mark.parametrize(("classes", "dim"), [(10, 16), (10, 9), (2, 16), (100, 64), (1, 2)])
def test_equilibria_so_far_apart_that_no_regions_meet(classes: int, dim: int) -> None:
    lyapunov = zubov.ConvexLyapunov(dim, classes, eps=0.05)
    contenders.apart_(lyapunov)
    distance = torch.pdist(lyapunov.equilibria.detach())
    assert not zubov.regions_that_meet(lyapunov).any()
    if 1 < classes <= dim + 1:
        torch.testing.assert_close(distance, torch.full_like(distance, 2.0 / 0.05**0.5), rtol=1e-4, atol=0)
    first = lyapunov.equilibria.detach().clone()
    contenders.apart_(lyapunov)
    assert classes == 1 or not torch.equal(first, lyapunov.equilibria)  # turned another way


def test_networks_for_images_start_with_regions_that_do_not_meet() -> None:
    for dataset in ("mnist", "cifar100"):
        net = TrainConfig.recipe(dataset, "zubov").initial_model()
        assert isinstance(net, zubov.ZubovNet)
        assert not zubov.regions_that_meet(net.lyapunov).any()


def test_only_what_a_guard_says_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that cannot be written is no network that collapsed."""
    monkeypatch.setattr(planar, "regions", functools.partial(planar.regions, side=9, step_size=0.5))
    cells = experiments.cells(only=["plane/collapse, weight decay 10"])
    found = experiments.compute(cells[0], tmp_path / "a", tmp_path / "work", on_progress=lambda _: None)
    assert "V is the same for all states" in found["refused"]

    def vanish(_: str) -> None:
        shutil.rmtree(tmp_path / "other", ignore_errors=True)

    (sound,) = experiments.cells(only=["plane/collapse, weight decay 0"], steps=3)
    with pytest.raises(training.RunError, match="cannot be written"):
        experiments.compute(sound, tmp_path / "b", tmp_path / "other", on_progress=vanish)
    assert not list((tmp_path / "b").glob("plane/*.json"))


def test_image_cell_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (requirements-dev.txt)")
    (cell,) = experiments.cells(seeds=1, only=["digits/zubov"], steps=3)
    # At a middle radius of 1/2 the first attack of AutoAttack breaks every image.
    cell = dataclasses.replace(cell, attacked=8, eps=(0.05, 0.5, 1.0))
    found = experiments.compute(cell, tmp_path, tmp_path, on_progress=lambda _: None)
    written = json.loads(experiments.path_of(cell, tmp_path).read_text())
    del written["sha256"]
    assert written == json.loads(json.dumps(found))
    assert experiments.read(cell, tmp_path) is not None
    checks = {check["name"]: check["passed"] for check in found["report"]["checks"]}
    assert any("certified" in name for name in checks)
    assert found["margin"].keys() == {"0.05", "0.5", "1.0"}
    assert found["autoattack"] == {"0.5": 0.0}
    assert found["margin"]["0.5"] <= 0.25
    for shares in found["regions"].values():
        assert shares.keys() == {"inside_first", "inside_last", "inside_others", "falls", "stays", "arrives"}
        assert 0.0 <= min(shares.values()) <= max(shares.values()) <= 1.0
    assert 0.0 <= found["meeting"] <= 1.0
    assert 0.0 <= found["attracting"] <= 1.0
    assert experiments.path_of(cell, tmp_path).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert found["certified"]["fall"] == 0
    assert found["certified"]["tenth"] <= found["certified"]["median"] <= found["certified"]["most"]
    assert f" | {found['certified']['median']:.1e} |" in "\n".join(page._regions({"zubov": [found]}))


@pytest.mark.parametrize("change", experiments.CHANGES["digits"])
def test_what_is_changed_on_digits_trains_and_is_looked_at(change: str, tmp_path: Path) -> None:
    (cell,) = experiments.cells(seeds=1, only=[f"digits/zubov, {change}"], steps=2)
    usual = TrainConfig.recipe("digits", model="zubov", steps=2)
    differ = {
        name for name, value in dataclasses.asdict(cell.config.zubov).items() if value != getattr(usual.zubov, name)
    }
    assert differ == experiments.CHANGES["digits"][change].keys()
    run_folder = start(tmp_path / "run", cell.config)
    training.fit(run_folder, DIGITS)
    net, _ = training.load_model(run_folder)
    few = dataclasses.replace(
        DIGITS,
        train_images=DIGITS.train_images[:20],
        train_labels=DIGITS.train_labels[:20],
        test_images=DIGITS.test_images[:20],
        test_labels=DIGITS.test_labels[:20],
    )
    assert isinstance(net, zubov.ZubovNet)
    assert 0.0 <= experiments._regions(net, few)[0]["test"]["stays"] <= 1.0
    assert experiments._certified(net, few.test_images, few.test_labels, 0)["fall"] == 0
    learned = dict(net.named_parameters())
    assert ("lyapunov.equilibria" in learned) == (change != "fixed equilibria")
    assert isinstance(net.dynamics, EulerConvFlow if change == "convolutional flow" else zubov.DenseFlow)
    assert net.dynamics.shared_weights == (change != "f of each step")


@pytest.mark.parametrize(
    ("dataset", "changes", "match"),
    [
        ("digits", {"dynamics": "conv", "dim": 18}, "expected 'conv' and, for 'digits', a multiple of 4"),
        ("mnist", {"dynamics": "conv"}, "expected 'conv' and, for 'mnist', a multiple of 49"),
        ("cifar10", {"dynamics": "conv"}, "does not fit zubov.backbone='resnet18'"),
        ("moons", {"dynamics": "conv"}, "zubov.dynamics='conv' does not fit zubov.backbone='mlp'"),
        ("moons", {"shared_weights": False}, "has no regions of attraction to draw"),
        ("digits", {"dynamics": "sparse"}, "zubov.dynamics='sparse' is unknown"),
        ("digits", {"equilibria": "none"}, "zubov.equilibria='none' is unknown"),
        ("digits", {"shared_weights": 1}, "zubov.shared_weights=1 is no bool"),
    ],
)
def test_networks_that_cannot_be(dataset: str, changes: dict[str, object], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        TrainConfig.recipe(dataset, model="zubov", zubov=changes)


def test_spacing_drives_regions_apart_in_many_dimensions() -> None:
    torch.manual_seed(0)
    lyapunov = zubov.ConvexLyapunov(16, 10, width=16, depth=2, eps=0.05)
    assert bool((zubov.regions_that_meet(lyapunov) | torch.eye(10, dtype=torch.bool)).all())
    optimizer = torch.optim.Adam(lyapunov.parameters(), 0.05)
    nothing = torch.zeros(2, 0, 16), torch.zeros(0, dtype=torch.int64)
    for _ in range(150):
        weights = {"consistency": 0.0, "classification": 0.0, "separation": 0.0, "spacing": 1.0}
        loss = zubov.zubov_losses(lyapunov, torch.tanh, *nothing, **weights)["spacing"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not zubov.regions_that_meet(lyapunov).any()


def test_what_is_said_of_states_is_what_they_do() -> None:
    """x' = -x to the one equilibrium of three that is there: only its class arrives."""
    net = TrainConfig.recipe("digits", model="zubov", seed=3).initial_model()
    net.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
    nn.init.zeros_(net.dynamics.weight1)
    nn.init.zeros_(net.dynamics.bias1)
    nn.init.zeros_(net.dynamics.weight2)
    nn.init.zeros_(net.dynamics.bias2)
    field = net.field_at
    net.field_at = lambda t, states: field(t, states) - states  # type: ignore[method-assign]
    with torch.no_grad():
        net.lyapunov.equilibria.add_(50.0)[4] = 0.0
    found = experiments._regions(net, DIGITS)[0]["test"]
    share = float((DIGITS.test_labels == 4).double().mean())
    assert found["stays"] == pytest.approx(share)
    assert found["arrives"] == pytest.approx(share)
    assert found["falls"] == 0.0  # the network's own steps stand still


def test_equilibria_that_attract_are_counted() -> None:
    net = TrainConfig.recipe("digits", model="zubov").initial_model()
    assert isinstance(net, zubov.ZubovNet)
    with torch.no_grad():
        net.dynamics.weight1.zero_()[0, :16] = torch.eye(16)
        net.dynamics.weight2.zero_()[0, :, :16] = -torch.eye(16)  # f(x) = -tanh(x + b): attracts anywhere
        assert experiments._attracting(net) == 1.0
        net.dynamics.weight2[0, 3, 3] = 1.0
        assert experiments._attracting(net) == 0.0


def test_plot_of_an_image_run(tmp_path: Path) -> None:
    training.fit(start(tmp_path / "run", TrainConfig.recipe("digits", "zubov", steps=2)), DIGITS)
    done = run.invoke(cli.app, ["zubov", "plot", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "at time 200; wrote" in done.stdout
    assert (tmp_path / "run" / "regions.png").read_bytes().startswith(b"\x89PNG")


def test_an_image_run_that_a_guard_stops_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise training.Refused("loss is nan at step 3")

    monkeypatch.setattr(training, "fit", refuse)
    monkeypatch.setattr(auto_attack, "available", lambda: True)
    (cell,) = experiments.cells(seeds=1, only=["digits/lyanet"])
    experiments.compute(cell, tmp_path, tmp_path, on_progress=lambda _: None)
    assert "| lyanet | 0 | stopped: loss is nan at step 3 |" in page.markdown([cell], tmp_path)


def test_image_cells_need_autoattack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_attack, "available", lambda: False)
    command = ["reproduce", "zubov", "--only", "digits/node", "--steps", "2", "--out", str(tmp_path)]
    done = run.invoke(cli.app, command)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 2)  # how many cells are done, and why not this one
    assert "pip install pyautoattack" in done.stderr


def test_every_method_has_what_was_best_on_held_out_images() -> None:
    """Learning rate and weight, by the file that bench/choose.py wrote: the most robust of what is nearly as clean."""
    with (ROOT / "bench" / "results" / "choices.csv").open() as file:
        rows = list(csv.DictReader(file))
    for cell in experiments.cells(seeds=1):
        if not isinstance(cell, experiments.Images) or "consistency" in cell.change:
            continue
        config = cell.config
        weight = {"zubov": config.zubov.consistency, "resnet": 0.0, "node": 0.0}.get(
            config.model, config.penalty_weight
        )
        seeds: dict[tuple[float, float], list[tuple[float, float]]] = {}
        for row in rows:
            if (row["part"], row["method"]) == (cell.part, config.model):
                found = float(row["clean"]), float(row["pgd_margin"])
                seeds.setdefault((float(row["lr"]), float(row["weight"])), []).append(found)
        assert {len(found) for found in seeds.values()} == {3 if cell.part == "digits" else 1}
        means = {tried: [statistics.fmean(each) for each in zip(*found, strict=True)] for tried, found in seeds.items()}
        cleanest = max(clean for clean, _ in means.values())
        near = {tried: kept for tried, (clean, kept) in means.items() if clean >= cleanest - 0.01}
        assert max(near, key=lambda tried: near[tried]) == (config.lr, weight), (cell.part, config.model)
        assert len(means) >= 5


def test_pictures_show_what_the_tables_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(curves, "over_radius", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr(curves, "bars", lambda *arguments: drawn.append(arguments))
    paths = page.draw(experiments.cells(), RESULTS)
    assert [path.name for path in paths] == [
        "digits.png", "digits_changed.png", "mnist.png", "mnist_changed.png", "fashionmnist.png", "cifar10.png",
    ]  # fmt: skip
    assert page.draw(experiments.cells(), tmp_path) == []  # no results, no pictures
    table = page.markdown(experiments.cells(only=["digits"]), RESULTS)
    (title, radii, attacks, single, _), (_, panels, _), *_ = drawn
    assert (title, radii) == ("digits", (0.0, 0.05, 0.1, 0.2))
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in table.splitlines() if " | " in row}
    for method in contenders.METHODS:
        clean, low, middle = (page._number(attacks["PGD"][method][n]) for n in range(3))
        assert [clean, low, middle] == [rows[method][n] for n in (2, 6, 7)]
        assert page._number(single["AutoAttack"][1][method]) == rows[method][9]
    assert page._number(panels["AutoAttack 0.1"]["all of it"]) == rows["zubov"][9]
    for change in experiments.CHANGES["digits"]:
        assert page._number(panels["AutoAttack 0.1"][change]) == rows[f"zubov, {change}"][9]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    curves.over_radius(
        "a",
        (0.0, 0.1),
        {"PGD": {"node": [[90.0, 92.0], [40.0]]}},
        {"Auto": (0.1, {"node": [30.0]})},
        tmp_path / "a.png",
    )
    curves.bars("b", {"clean": {"one": [90.0, 91.0], "other": [80.0]}}, tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


def test_tables_of_the_page_are_those_of_the_committed_results() -> None:
    text = (RESULTS.parent.parent / "zubov.md").read_text()
    for part in page.markdown(experiments.cells(), RESULTS).split("\n\n"):
        assert part.strip() in text, part
