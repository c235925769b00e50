"""What ``rnf reproduce zubov`` computes: cells, each one JSON file (and a picture in the plane), resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_node_fast import data as image_data
from robust_node_fast import robustness
from robust_node_fast._version import __version__
from robust_node_fast.training import RunError, writing
from robust_node_fast.training.checkpoint import replace_file
from robust_node_fast.zubov import contenders, picture, planar
from robust_node_fast.zubov.certificate import margin_radius
from robust_node_fast.zubov.network import ZubovNet
from robust_node_fast.zubov.planar import BEST, Planar
from robust_node_fast.zubov.training import Budget, ZubovObjective, accuracy, fit

__all__ = ["PARTS", "Images", "Plane", "cells", "compute", "path_of", "read"]

PARTS = ("plane", "digits", "mnist")
OnProgress = Callable[[str], None]
EPS = {"digits": (0.05, 0.1, 0.2), "mnist": (0.05, 0.1, 0.2)}
ATTACKED = {"digits": None, "mnist": 500}  # first test images, for attacks only
BUDGETS = {
    "digits": Budget(steps=500, batch_size=128, lr=3e-3),
    "mnist": Budget(steps=1500, batch_size=128, lr=3e-3),
}
# Weight decay so strong that the backbone's layers shrink to nothing, and all states become the same.
COLLAPSING = ZubovObjective(consistency=0.0, separation=0.0, rate=1.0)
DECAY = Budget(steps=400, batch_size=64, optimizer="sgd", weight_decay=10.0, grad_clip=1.0)


@dataclass(frozen=True)
class Plane:
    """A network in the plane, before and after training."""

    row: str
    config: Planar
    seed: int = 0

    @property
    def part(self) -> str:
        return "plane"

    @property
    def settings(self) -> dict[str, Any]:
        return {"row": self.row, **dataclasses.asdict(self.config)}

    @property
    def steps(self) -> int:
        return self.config.budget.steps


@dataclass(frozen=True)
class Images:
    """A method on a data set."""

    part: str
    row: str  # the method
    seed: int
    budget: Budget
    attacked: int | None

    @property
    def settings(self) -> dict[str, Any]:
        goal = contenders.objective(self.row)
        return {
            "dataset": self.part,
            "method": self.row,
            "objective": repr(goal),
            "seed": self.seed,
            "budget": dataclasses.asdict(self.budget),
            "attacked": self.attacked,
            "eps": list(EPS[self.part]),
        }

    @property
    def steps(self) -> int:
        return self.budget.steps


Cell = Plane | Images


def cells(*, seeds: int = 3, only: Sequence[str] = (), steps: int | None = None) -> list[Cell]:
    """All of them, in the order in which they are computed.

    Args:
        seeds: of training, for the parts on images.
        only: parts, or ``part/row`` (or how it begins).
        steps: of training, instead of each part's own number.

    Raises:
        ValueError: an element of ``only`` fits nothing.
    """
    found: list[Cell] = [*_in_the_plane(), *_on_images(seeds)]
    for wanted in only:
        if not any(f"{cell.part}/{cell.row}".startswith(wanted) for cell in found):
            names = ", ".join(dict.fromkeys(f"{cell.part}/{cell.row}" for cell in found))
            raise ValueError(f"only={wanted!r} fits no row, expected one of {names}, or how they begin")
    if only:
        found = [cell for cell in found if f"{cell.part}/{cell.row}".startswith(tuple(only))]
    return found if steps is None else [_with_steps(cell, steps) for cell in found]


def _in_the_plane() -> Iterator[Plane]:
    base = Planar()
    change = dataclasses.replace
    yield Plane("blobs", base)
    yield Plane("moons, mlp", change(base, problem="moons", backbone="mlp"))
    yield Plane("blobs3", change(base, problem="blobs3"))
    yield Plane("rings, mlp", change(base, problem="rings", backbone="mlp"))
    # What follows is shorter. Of the last problem a row differs from "blobs3, short" in one thing each.
    short = change(base, budget=change(base.budget, steps=800))
    yield Plane("moons, identity", change(short, problem="moons"))
    yield Plane("rings, identity", change(short, problem="rings"))
    three = change(short, problem="blobs3")
    yield Plane("blobs3, short", three)
    yield Plane("blobs3, partial attention", change(three, attention="partial"))
    for loss in ("consistency", "classification", "separation"):
        yield Plane(f"blobs3, no {loss}", change(three, objective=change(BEST, **{loss: 0.0})))
    yield Plane("blobs3, no reach", change(three, objective=change(BEST, reach=0.0)))
    yield Plane("blobs3, no floor", change(three, objective=change(BEST, floor=None)))
    collapsing = change(base, problem="moons", backbone="mlp", objective=COLLAPSING)
    for decay in (10.0, 0.0):
        yield Plane(f"collapse, weight decay {decay:g}", change(collapsing, budget=change(DECAY, weight_decay=decay)))


def _on_images(seeds: int) -> Iterator[Images]:
    for part in ("digits", "mnist"):
        for seed in range(seeds):
            for method in contenders.METHODS:
                yield Images(part, method, seed, BUDGETS[part], ATTACKED[part])


def _with_steps(cell: Cell, steps: int) -> Cell:
    if isinstance(cell, Plane):
        budget = dataclasses.replace(cell.config.budget, steps=steps)
        return dataclasses.replace(cell, config=dataclasses.replace(cell.config, budget=budget))
    return dataclasses.replace(cell, budget=dataclasses.replace(cell.budget, steps=steps))


def path_of(cell: Cell, folder: Path) -> Path:
    """The cell's file; its name has the row, the seed and a digest of the settings."""
    digest = hashlib.sha256(json.dumps(cell.settings, sort_keys=True).encode()).hexdigest()[:8]
    row = cell.row.replace(", ", "-").replace(" ", "_")
    return folder / cell.part / f"{row}-seed{cell.seed}-{digest}.json"


def read(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """What a cell's file holds; None where there is none, or none that can be used, which a warning says."""
    path = path_of(cell, folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["settings"] == json.loads(json.dumps(cell.settings)):
            return content
        reason = "has other settings than its name stands for"
    except FileNotFoundError:
        return None
    except (KeyError, OSError, TypeError, ValueError) as error:
        reason = f"is truncated or was altered ({type(error).__name__}: {error})"
    warnings.warn(f"{path} {reason}: this cell is computed again", stacklevel=2)
    return None


def compute(
    cell: Cell, folder: Path, work: Path, *, on_progress: OnProgress, data_root: Path | None = None
) -> dict[str, Any]:
    """Train and evaluate, and write the cell's file.

    Args:
        cell: one of ``cells``.
        folder: of the results.
        work: of checkpoints: a killed run goes on from there.
        on_progress: told where the cell is.
        data_root: of the images.

    Raises:
        CheckpointError, RunError, DataError: as ``fit`` and ``data.load``; a folder cannot be written.
    """
    path = path_of(cell, folder)
    checkpoint = work / f"{cell.part}-{path.stem}.safetensors"
    start = time.perf_counter()
    with writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(cell, Plane):
        found = _plane(cell, path.with_suffix(".png"), checkpoint, on_progress)
    else:
        found = _images(cell, checkpoint, on_progress, data_root)
    content = {
        "command": f"rnf reproduce zubov --only '{cell.part}/{cell.row}' --seeds {cell.seed + 1}",
        "settings": cell.settings,
        "versions": {"robust_node_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        **found,
    }
    with writing(folder):
        replace_file(path, json.dumps(content, indent=1).encode())
    return content


def _plane(cell: Plane, image: Path, checkpoint: Path, on_progress: OnProgress) -> dict[str, Any]:
    config = cell.config
    points, labels = planar.data(config.problem, config.samples, config.seed)
    fresh_points, fresh_labels = planar.data(config.problem, 1000, config.seed + 1)
    net = config.build()
    before = planar.regions(net, points)
    found: dict[str, Any] = {"before": _describe(before), "refused": None}
    try:
        start = time.perf_counter()
        found["terms"] = fit(
            net,
            config.objective,
            points,
            labels,
            config.budget,
            seed=config.seed,
            checkpoint=checkpoint,
            on_step=lambda step, total, _: on_progress(f"{cell.row}: step {step} of {total}"),
        )
        found["train_seconds"] = time.perf_counter() - start
    except RunError as error:  # a guard: what it says is the result
        return {**found, "refused": str(error)}
    after = planar.regions(net, points)
    with torch.no_grad():
        own = net.lyapunov(net.features(fresh_points)).gather(1, fresh_labels[:, None])
    found["after"] = {
        **_describe(after),
        "iou_in_the_networks_steps": planar.regions(net, points, step_size=config.step_size).overlaps,
        "accuracy": accuracy(net, fresh_points, fresh_labels),
        "in_own_region": float((own < 1.0).float().mean()),
    }
    untrained = config.build()
    picture.before_and_after(cell.row, [(untrained, before), (net, after)], points, labels, image)
    return found


def _describe(regions: planar.Regions) -> dict[str, Any]:
    return {
        "iou": regions.overlaps,
        "prescribed_cells": regions.prescribed.sum(1).tolist(),
        "attracted_cells": regions.attracted.sum(1).tolist(),
        "shared": regions.shared,
    }


def _images(cell: Images, checkpoint: Path, on_progress: OnProgress, data_root: Path | None) -> dict[str, Any]:
    dataset = image_data.load(cell.part, data_root)
    channels, size = image_data.DATASETS[cell.part]
    net = contenders.build(cell.row, channels, size, 10, cell.seed)
    start = time.perf_counter()
    terms = fit(
        net,
        contenders.objective(cell.row),
        dataset.train_images,
        dataset.train_labels,
        cell.budget,
        seed=cell.seed,
        checkpoint=checkpoint,
        on_step=lambda step, total, _: on_progress(f"{cell.part}/{cell.row}, seed {cell.seed}: step {step} of {total}"),
    )
    seconds = time.perf_counter() - start
    bare = contenders.bare_backbone(net, dataset.train_images, dataset.train_labels, 10, seed=cell.seed)
    test = (dataset.test_images, dataset.test_labels)
    report = robustness.evaluate(
        net,
        test,
        suite="standard",
        eps=EPS[cell.part],
        seeds=(cell.seed,),
        sources={"bare backbone": bare},
        certify=_certified if isinstance(net, ZubovNet) else None,
        attack_samples=cell.attacked,
        batch_size=256,
        on_batch=lambda done: on_progress(f"{cell.part}/{cell.row}, seed {cell.seed}: {done} images evaluated"),
    )
    images, labels = (tensor[: cell.attacked] for tensor in test)
    margin = {str(eps): _margin_attack(net, images, labels, eps, cell.seed) for eps in EPS[cell.part]}
    return {
        "terms": terms,
        "train_seconds": seconds,
        "bare_accuracy": accuracy(bare, *test),
        "margin": margin,
        "report": json.loads(report.to_json()),
    }


def _certified(net: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    assert isinstance(net, ZubovNet)
    return margin_radius(net, images, labels) > eps


def _margin_attack(net: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> float:
    """Accuracy under PGD that climbs the difference of two logits: of two V, straight on, in a Zubov-Net."""
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for part, target in zip(torch.split(images, 256), torch.split(labels, 256), strict=True):
        found = robustness.pgd(
            net, part, target, eps, step_size=2.5 * eps / 40, n_steps=40, loss="margin", target=net, generator=generator
        )
        with torch.no_grad():
            right += int((net(found).argmax(1) == target).sum())
    return right / len(labels)
