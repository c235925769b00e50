"""Contract of the Zubov-Net experiments: regions by simulation, training that resumes to the bit, rivals, commands."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from robust_node_fast import cli, zubov
from robust_node_fast.training import CheckpointError, RunError
from robust_node_fast.zubov import contenders, experiments, page, planar, recipe
from robust_node_fast.zubov import training as zubov_training
from robust_node_fast.zubov.attraction import attracted_to, overlap, plane
from robust_node_fast.zubov.training import Budget, fit

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "zubov"
run = CliRunner()


def circle_field(x: Tensor) -> Tensor:
    return -x * (1.0 - x.square().sum(-1, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# Regions
# ---------------------------------------------------------------------------------------------------------------------


def test_simulated_region_of_the_exact_system_is_the_unit_disc() -> None:
    """And outside of it states run away until they overflow, which is no convergence."""
    grid = plane(torch.tensor([-1.5, -1.5]), torch.tensor([1.5, 1.5]), 81)
    found = attracted_to(circle_field, grid, torch.zeros(1, 2)) == 0
    disc = grid.square().sum(1) < 1.0
    assert overlap(found, disc) == 1.0
    assert 0 < int(disc.sum()) < len(disc)


def test_a_state_at_rest_elsewhere_or_passing_by_is_not_attracted() -> None:
    points = torch.tensor([[0.05, 0.0], [3.0, 0.0]])
    assert attracted_to(torch.zeros_like, points, torch.zeros(1, 2)).tolist() == [0, -1]
    passing = attracted_to(lambda x: torch.full_like(x, 1e-2), torch.tensor([[-0.5, -0.5]]), torch.zeros(1, 2))
    assert passing.tolist() == [-1]  # within the radius after 50 units of time, at a speed of 1e-2
    both = attracted_to(lambda x: x - x**3, torch.tensor([[0.1], [-0.1]]), torch.tensor([[-1.0], [1.0]]))
    assert both.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "match"),
    [({"radius": 0.0}, "radius=0.0"), ({"n_steps": 0}, "n_steps=0"), ({"equilibria": torch.zeros(1, 3)}, "equilibria")],
)
def test_bad_arguments_of_the_simulation(change: dict[str, object], match: str) -> None:
    options = {"points": torch.zeros(4, 2), "equilibria": torch.zeros(1, 2), **change}
    with pytest.raises(ValueError, match=match):
        attracted_to(circle_field, **options)  # type: ignore[arg-type]


def test_overlap() -> None:
    a, b = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert (overlap(a, b), overlap(a, a), overlap(~a, a), overlap(b & ~b, b & ~b)) == (0.5, 1.0, 0.0, 1.0)


def test_consistency_loss_shrinks_the_difference_of_the_regions() -> None:
    """The field of the exact system is fixed; V starts as a quarter of the solution: a disc of radius 2."""
    lyapunov = zubov.ConvexLyapunov(2, 1, width=16, depth=2, eps=0.25, equilibria=torch.zeros(1, 2))
    with torch.no_grad():
        lyapunov.log_scale.fill_(-3.0)
    grid = plane(torch.tensor([-2.5, -2.5]), torch.tensor([2.5, 2.5]), 61)
    attracted = attracted_to(circle_field, grid, torch.zeros(1, 2)) == 0
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(lyapunov.parameters(), 3e-2)
    differences = []
    for step in range(201):
        if step % 100 == 0:
            differences.append(int(((lyapunov(grid)[:, 0] < 1.0) ^ attracted).sum()))
        states = 0.3 * torch.randn(2, 1, 2, generator=generator).expand(2, 1, 2)
        losses = zubov.zubov_losses(
            lyapunov, circle_field, states, torch.zeros(1, dtype=torch.int64), classification=0.0, separation=0.0,
            rate=2.0, n_rays=64, reach=0.25, generator=generator,
        )  # fmt: skip
        optimizer.zero_grad()
        losses["consistency"].backward()
        optimizer.step()
    assert differences[0] > differences[1] > differences[2]
    assert differences[2] < differences[0] / 4


def test_training_in_the_plane_aligns_the_regions() -> None:
    goal = zubov_training.ZubovObjective(consistency=3.0, rate=1.0, n_rays=60, reach=0.25, floor=0.1)
    config = planar.Planar(objective=goal, budget=Budget(steps=500, batch_size=64))
    points, labels = planar.data("blobs", config.samples, 0)
    net = config.build()
    before = planar.regions(net, points, side=41, step_size=0.1).overlaps
    fit(net, goal, points, labels, config.budget)
    after = planar.regions(net, points, side=41, step_size=0.1).overlaps
    assert min(after) > max(before) + 0.3, (before, after)


def test_data_of_the_plane() -> None:
    for problem, classes in planar.PROBLEMS.items():
        points, labels = planar.data(problem, 60, 3)
        assert points.shape == (60, 2)
        assert labels.unique().tolist() == list(range(classes))
        assert points.std() == pytest.approx(1.0, abs=0.02)
        assert torch.equal(points, planar.data(problem, 60, 3)[0])
        assert not torch.equal(points, planar.data(problem, 60, 4)[0])


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
        return torch.where(x.norm(dim=-1, keepdim=True) > 1.001, -x, circle_field(x))

    assert consistency(leaking) < 1e-20
    assert consistency(leaking, reach=0.2) > 1e-2
    at_rest = torch.zeros_like  # the residual is rate V (1 - V), divided by V + floor it is larger near the centre
    assert consistency(at_rest, floor=0.01) > 2.0 * consistency(at_rest)
    for name in ("reach", "floor"):
        with pytest.raises(ValueError, match=f"{name}=-1.0"):
            consistency(circle_field, **{name: -1.0})


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill_at(step: int):  # type: ignore[no-untyped-def]
    def on_step(now: int, total: int, terms: dict[str, float]) -> None:
        if now == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path, optimizer: str) -> None:
    config = planar.Planar("blobs3", budget=Budget(steps=12, batch_size=100, optimizer=optimizer, grad_clip=1.0))
    points, labels = planar.data("blobs3", 250, 0)

    def train(path: Path | None, **options: object) -> dict[str, Tensor]:
        net = config.build()
        fit(net, config.objective, points, labels, config.budget, checkpoint=path, every=5, **options)  # type: ignore[arg-type]
        return net.state_dict()

    whole = train(None)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        train(path, on_step=kill_at(8))  # after the checkpoint of step 5, in the middle of an epoch
    resumed = train(path)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    fresh = config.build().state_dict()
    assert not all(torch.equal(whole[name], fresh[name]) for name in whole)
    again = train(path)  # finished: nothing is left to do
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(CheckpointError, match="another run"):
        fit(config.build(), config.objective, points, labels, config.budget, seed=1, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        train(path)


def test_guard_stops_a_run_whose_states_collapse() -> None:
    """Without the guard it would go on with the same logits for all points; without the weight decay it learns."""
    points, labels = planar.data("moons", 256, 0)
    config = planar.Planar("moons", "mlp", objective=experiments.COLLAPSING, budget=experiments.DECAY)
    with pytest.raises(RunError, match=r"step \d+: V is the same for all states"):
        fit(config.build(), config.objective, points, labels, config.budget)
    net = config.build()
    fit(net, config.objective, points, labels, dataclasses.replace(config.budget, weight_decay=0.0))
    assert zubov_training.accuracy(net, points, labels) > 0.8


def test_objective_that_is_not_finite_stops_the_run() -> None:
    def broken(net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": net(x).sum() * torch.inf}

    with pytest.raises(RunError, match="step 1: the objective is not finite"):
        fit(nn.Linear(2, 2), broken, torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), Budget(steps=2))


@pytest.mark.parametrize(
    ("change", "match"),
    [({"steps": 0}, "steps=0"), ({"lr": -1.0}, "lr=-1.0"), ({"optimizer": "adagrad"}, "optimizer='adagrad'")],
)
def test_budgets_that_make_no_sense(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Budget(**{"steps": 1, **change})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Rivals
# ---------------------------------------------------------------------------------------------------------------------


def test_rivals_share_the_backbone_and_learn() -> None:
    from robust_node_fast import data

    digits = data.load("digits")
    first = contenders.build("node", 1, 8, 10, seed=5).backbone.state_dict()
    for method in contenders.METHODS:
        net = contenders.build(method, 1, 8, 10, seed=5)
        assert all(torch.equal(first[name], value) for name, value in net.backbone.state_dict().items())
        goal = contenders.objective(method)
        generator = torch.Generator().manual_seed(0)
        terms = goal(net, digits.train_images[:32], digits.train_labels[:32], generator)
        torch.stack(list(terms.values())).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters()), method
        last = fit(net, goal, digits.train_images, digits.train_labels, Budget(steps=60, batch_size=64))
        assert last["classification"] < 0.7 * terms["classification"].item(), method


def test_bare_backbone_is_the_trained_one_with_a_head_of_its_own() -> None:
    from robust_node_fast import data

    digits = data.load("digits")
    net = contenders.build("zubov", 1, 8, 10, seed=0)
    bare = contenders.bare_backbone(net, digits.train_images, digits.train_labels, 10, seed=0)
    found = (bare(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    assert bare[0] is net.backbone
    assert found > 0.5  # of random features; chance is 0.1


def test_lyapunov_rival_charges_for_energy_that_does_not_fall() -> None:
    net = contenders.build("lyanet", 1, 8, 10, seed=0)
    with torch.no_grad():
        net.dynamics.weight2.zero_()
        net.dynamics.bias2.zero_()
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    terms = contenders.Lyapunov(rate=2.0)(net, images, labels, torch.Generator())
    assert float(terms["lyapunov"]) == pytest.approx(2.0 * float(terms["classification"]), rel=1e-5)  # f = 0


# ---------------------------------------------------------------------------------------------------------------------
# The full recipe
# ---------------------------------------------------------------------------------------------------------------------


def write_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (8, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        content = {"data": images, "fine_labels": [0, 99, 5, 7, 1, 2, 3, 4]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))


def write_svhn(root: Path) -> None:
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": np.array([[10], [1], [2], [3], [9], [10]])})


@pytest.mark.parametrize(("name", "write"), [("cifar100", write_cifar100), ("svhn", write_svhn)])
def test_recipe_runs_on_stubs_of_the_files_format(
    name: str, write: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision import datasets

    write(tmp_path)  # type: ignore[operator]
    for source in (datasets.CIFAR100, datasets.SVHN):  # the stub's checksums are its own
        monkeypatch.setattr(source, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    images, labels = recipe.load(name, tmp_path, train=True)
    assert images.shape[1:] == (3, 32, 32)
    assert 0.0 <= images.min() < images.max() <= 1.0
    assert labels.tolist()[:2] == ([0, 99] if name == "cifar100" else [0, 1])
    recipe.main(
        [name, "--device", "cpu", "--steps", "1", "--batch-size", "4", "--data-root", str(tmp_path), "--out",
         str(tmp_path / "out"), "--test-samples", "4"]
    )  # fmt: skip
    assert "accuracy" in capsys.readouterr().out


def test_crop_and_flip_only_moves_pixels() -> None:
    images = torch.rand(64, 3, 32, 32)
    moved = recipe.crop_and_flip(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    centre = images[:, :, 12:20, 12:20].flatten(1).sort(1).values
    hits = 0
    for k in range(64):
        known = set(images[k].flatten().tolist()) | {0.0}
        assert set(moved[k].flatten().tolist()) <= known
        hits += int(set(centre[k].tolist()) <= set(moved[k].flatten().tolist()))
    assert hits == 64  # a shift by four at most does not lose the middle
    assert not torch.equal(moved, images)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def test_train_and_plot(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train = ["zubov", "train", "--problem", "moons", "--backbone", "mlp", "--steps", "3", "--side", "9"]
    train += ["--out", str(folder)]
    done = run.invoke(cli.app, train)
    assert done.exit_code == 0, done.output
    assert "IoU" in done.output
    assert run.invoke(cli.app, train).exit_code == 0  # goes on where nothing is left
    done = run.invoke(cli.app, [*train, "--seed", "1"])
    assert done.exit_code == 1
    assert "another run" in done.stderr
    assert run.invoke(cli.app, ["zubov", "plot", str(folder), "--side", "9"]).exit_code == 0
    assert (folder / "regions.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    done = run.invoke(cli.app, ["zubov", "plot", str(tmp_path)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "no run folder" in done.stderr
    (tmp_path / "config.json").write_text('{"objective": {}, "budget": {"steps": 1}, "problem": "torus"}')
    done = run.invoke(cli.app, ["zubov", "plot", str(tmp_path)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "torus" in done.stderr
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
        "plane/blobs",
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
    first.write_bytes(before[:-20])
    with pytest.warns(UserWarning, match="computed again"):
        assert experiments.read(experiments.cells(only=["plane/blobs"], steps=2)[0], out) is None


def test_image_cell_end_to_end(tmp_path: Path) -> None:
    (cell,) = experiments.cells(seeds=1, only=["digits/zubov"], steps=3)
    cell = dataclasses.replace(cell, attacked=8)
    found = experiments.compute(cell, tmp_path, tmp_path, on_progress=lambda _: None)
    assert json.loads(experiments.path_of(cell, tmp_path).read_text()) == json.loads(json.dumps(found))
    assert experiments.read(cell, tmp_path) is not None
    checks = {check["name"]: check["passed"] for check in found["report"]["checks"]}
    assert any("certified" in name for name in checks)
    assert found["margin"].keys() == {"0.05", "0.1", "0.2"}


def test_tables_of_the_page_are_those_of_the_committed_results() -> None:
    text = (RESULTS.parent.parent / "zubov.md").read_text()
    for part in page.markdown(experiments.cells(), RESULTS).split("\n\n"):
        assert part.strip() in text, part
