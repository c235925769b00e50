"""What ``rnf reproduce zubov`` computes: cells, each one JSON file (and a picture in the plane), resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_node_fast import data, robustness, training
from robust_node_fast._machine import machine
from robust_node_fast._version import __version__
from robust_node_fast.robustness import auto_attack
from robust_node_fast.training import CheckpointError, Outcome, Refused, RunError, TrainConfig, writing
from robust_node_fast.training.checkpoint import digest_of_json, replace_file
from robust_node_fast.zubov import contenders, exact, picture, planar
from robust_node_fast.zubov.attraction import overlap, plane
from robust_node_fast.zubov.boundary import regions_that_meet
from robust_node_fast.zubov.certificate import margin_radius
from robust_node_fast.zubov.derivative import value_and_derivative
from robust_node_fast.zubov.following import Followed, followed
from robust_node_fast.zubov.losses import zubov_residual
from robust_node_fast.zubov.lyapunov import ConvexLyapunov
from robust_node_fast.zubov.network import ZubovNet

__all__ = ["PARTS", "Exact", "Images", "Plane", "cells", "compute", "label", "margin_attack", "path_of", "read"]

PROTOCOL = 5  # raised by every change of what a cell's numbers mean
PARTS = ("plane", "digits", "mnist", "fashionmnist", "cifar10")
OnProgress = Callable[[str], None]
EPS = {**dict.fromkeys(("digits", "mnist", "fashionmnist"), (0.05, 0.1, 0.2)), "cifar10": (2 / 255, 4 / 255, 8 / 255)}
ATTACKED = {"digits": None, "mnist": 500, "fashionmnist": 500, "cifar10": 500}  # first test images, for attacks only
LOOKED_AT = 512  # images whose states are followed, and whose certified radii are given
# CIFAR-10 on a CPU: the small networks of the other parts in the place of ResNet-18 and its, and 13 epochs.
SMALL: dict[str, Any] = {
    "steps": 5000,
    "optimizer": "adam",
    "momentum": 0.0,
    "nesterov": False,
    "lr": 3e-3,
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "zubov": {"backbone": "conv", "dim": 16, "field_width": 128, "width": 32, "depth": 2, "n_rays": 16},
}
# Where other values were the best on training images that were held out: bench/choose.py.
SMALL_CHOSEN: dict[str, dict[str, Any]] = {
    "contractive-node": {"penalty_weight": 0.001},
    "lyanet": {"penalty_weight": 0.1},
    "zubov": {"zubov": {"consistency": 3.0}},
}
# Weight decay so strong that the backbone's layers shrink to nothing, and all states become the same.
COLLAPSING: dict[str, Any] = {
    "steps": 400,
    "optimizer": "sgd",
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 10.0,
    "grad_clip": 1.0,
    "zubov": {
        "backbone": "mlp",
        "consistency": 0.0,
        "separation": 0.0,
        "n_rays": 16,
        "reach": 0.0,
        "floor": None,
    },
}

# Of the short runs in the plane, one thing each.
SHORT: dict[str, dict[str, Any]] = {
    "partial attention": {"attention": "partial"},
    "no attention": {"attention": "none"},
    "no consistency": {"consistency": 0.0},
    "no classification": {"classification": 0.0},
    "no separation": {"separation": 0.0},
    "no reach": {"reach": 0.0},
    "no floor": {"floor": None},
}
# Of the Zubov-Net, by data set, one thing each; on MNIST also the weights of before there was the loss for arrival.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {
        "no consistency": {"consistency": 0.0},
        "no arrival": {"arrival": 0.0},
        "no consistency, no arrival": {"consistency": 0.0, "arrival": 0.0},
        "no classification": {"classification": 0.0},
        "no separation, no spacing": {"separation": 0.0, "spacing": 0.0},
        "no containment": {"containment": 0.0},
        "no exclusion": {"exclusion": 0.0},
        "partial attention": {"attention": "partial"},
        "no attention": {"attention": "none"},
        "fixed equilibria": {"equilibria": "fixed"},
        "f of each step": {"shared_weights": False},
        "convolutional flow": {"dynamics": "conv"},
    },
    "mnist": {
        "no arrival": {"arrival": 0.0},
        "consistency 100, no arrival": {"consistency": 100.0, "arrival": 0.0},
    },
    "fashionmnist": {"no arrival": {"arrival": 0.0}},
}


@dataclass(frozen=True)
class Exact:
    """The system whose regions and decay are known in closed form, no network: the unit disc."""

    row = "exact system"
    part = "plane"

    @property
    def settings(self) -> dict[str, Any]:
        return {"row": self.row}


@dataclass(frozen=True)
class Plane:
    """A network in the plane, before and after training."""

    row: str
    config: TrainConfig

    @property
    def part(self) -> str:
        return "plane"

    @property
    def settings(self) -> dict[str, Any]:
        return {"row": self.row, "train": self.config.settings()}


@dataclass(frozen=True)
class Images:
    """A method on a data set."""

    config: TrainConfig
    attacked: int | None
    eps: tuple[float, ...]
    change: str = ""  # what is different from the recipe

    @property
    def part(self) -> str:
        return self.config.dataset

    @property
    def row(self) -> str:
        """The method."""
        return f"{self.config.model}, {self.change}" if self.change else self.config.model

    @property
    def settings(self) -> dict[str, Any]:
        return {"train": self.config.settings(), "attacked": self.attacked, "eps": list(self.eps)}

    @property
    def middle(self) -> float:
        """The radius that AutoAttack is given: some 7,000 passes for each image that survives."""
        return self.eps[len(self.eps) // 2]


Cell = Exact | Plane | Images


def cells(*, seeds: int = 3, only: Sequence[str] = (), steps: int | None = None) -> list[Cell]:
    """All of them, in the order in which they are computed.

    Args:
        seeds: of training, but for those rows in the plane that have one.
        only: parts, or ``part/row``, or how some begin.
        steps: of training, instead of each part's own number.

    Raises:
        ValueError: an element of ``only`` fits nothing.
    """
    found: list[Cell] = [*_in_the_plane(seeds), *_on_images(seeds)]
    names = list(dict.fromkeys(f"{cell.part}/{cell.row}" for cell in found))
    chosen: set[str] = set()
    for wanted in only:
        fitting = {wanted} & set(names) or {name for name in names if name.startswith(wanted)}
        if not fitting:
            raise ValueError(f"only={wanted!r} fits no row, expected one of {', '.join(names)}, or how they begin")
        chosen |= fitting
    if only:
        found = [cell for cell in found if f"{cell.part}/{cell.row}" in chosen]
    return found if steps is None else [_with_steps(cell, steps) for cell in found]


def _in_the_plane(seeds: int) -> Iterator[Exact | Plane]:
    def row(name: str, dataset: str, steps: int = 4000, seed: int = 0, **zubov: Any) -> Plane:
        return Plane(name, TrainConfig.recipe(dataset, "zubov", steps=steps, seed=seed, zubov=zubov))

    yield Exact()
    for seed in range(seeds):
        yield row("blobs", "blobs", seed=seed)
        yield row("moons, mlp", "moons", seed=seed, backbone="mlp")
        yield row("blobs3", "blobs3", seed=seed)
        yield row("rings, mlp", "rings", seed=seed, backbone="mlp")
        yield row("moons, identity", "moons", seed=seed, backbone="identity")
        yield row("moons, identity, no separation", "moons", seed=seed, backbone="identity", separation=0.0)
    yield row("moons, mlp, no separation", "moons", backbone="mlp", separation=0.0)
    yield row("rings, mlp, no separation", "rings", backbone="mlp", separation=0.0)
    yield row("rings, identity", "rings", backbone="identity")
    # What follows is shorter. A row differs from the first in one thing each.
    for change, zubov in {"short": {}, **SHORT}.items():
        for seed in range(seeds):
            yield row(f"blobs3, {change}", "blobs3", 800, seed, **zubov)
    for decay in (10.0, 0.0):
        config = TrainConfig.recipe("moons", "zubov", **{**COLLAPSING, "weight_decay": decay})
        yield Plane(f"collapse, weight decay {decay:g}", config)


def _on_images(seeds: int) -> Iterator[Images]:
    for part in PARTS[1:]:
        for seed in range(seeds):
            for method in contenders.METHODS:
                yield Images(_recipe(part, method, seed), ATTACKED[part], EPS[part])
    for part, changes in CHANGES.items():
        for change, zubov in changes.items():
            for seed in range(seeds):
                yield Images(_recipe(part, "zubov", seed, zubov), ATTACKED[part], EPS[part], change)


def _recipe(part: str, method: str, seed: int, zubov: Mapping[str, Any] | None = None) -> TrainConfig:
    small, chosen = (SMALL, SMALL_CHOSEN.get(method, {})) if part == "cifar10" else ({}, {})
    own = {**small.get("zubov", {}), **chosen.get("zubov", {}), **(zubov or {})}
    return TrainConfig.recipe(part, "zubov", **{**small, **chosen, "zubov": own}, model=method, seed=seed)


def _with_steps(cell: Cell, steps: int) -> Cell:
    return (
        cell
        if isinstance(cell, Exact)
        else dataclasses.replace(cell, config=dataclasses.replace(cell.config, steps=steps))
    )


def path_of(cell: Cell, folder: Path) -> Path:
    """The cell's file; a network's name has the row, the seed and a digest of the settings.

    Other settings give another name, a setting that is new and at its default does not.
    """
    row = cell.row.replace(", ", "-").replace(" ", "_")
    if isinstance(cell, Exact):
        return folder / cell.part / f"{row}.json"
    settings = {**cell.settings, "train": cell.config.departures()}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return folder / cell.part / f"{row}-seed{cell.config.seed}-{digest}.json"


def label(cell: Cell) -> str:
    """What a cell is called while it is computed."""
    return f"{cell.part}/{cell.row}" + ("" if isinstance(cell, Exact) else f", seed {cell.config.seed}")


def _command(cell: Cell) -> str:
    of_a_network = "" if isinstance(cell, Exact) else f" --seeds {cell.config.seed + 1} --steps {cell.config.steps}"
    return f"rnf reproduce zubov --only '{cell.part}/{cell.row}'{of_a_network}"


def read(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """What a cell's file holds; None where there is none, or none that can be used, which a warning says."""
    path = path_of(cell, folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("sha256") != digest_of_json(content):
            reason = "was altered: its content does not match its SHA-256"
        elif content["protocol"] != PROTOCOL:
            reason = f"is of protocol {content['protocol']}, this is {PROTOCOL}"
        elif not _has(cell, content["settings"]):
            reason = "has other settings than its name stands for"
        else:
            return content
    except FileNotFoundError:
        return None
    except (KeyError, OSError, TypeError, ValueError) as error:
        reason = f"is truncated or was altered ({type(error).__name__}: {error})"
    warnings.warn(f"{path} {reason}: this cell is computed again", stacklevel=2)
    return None


def _has(cell: Cell, settings: dict[str, Any]) -> bool:
    """Whether these are the cell's settings; training settings that they do not know yet count as the defaults."""
    if isinstance(cell, Exact):
        return settings == cell.settings
    return {**settings, "train": TrainConfig(**settings["train"]).settings()} == {
        **json.loads(json.dumps(cell.settings)),
        "train": cell.config.settings(),
    }


def compute(
    cell: Cell, folder: Path, work: Path, *, on_progress: OnProgress, data_root: Path | None = None
) -> dict[str, Any]:
    """Train and evaluate, and write the cell's file.

    Args:
        cell: one of ``cells``.
        folder: of the results.
        work: of run folders: a killed run goes on from there.
        on_progress: told where the cell is.
        data_root: of the images.

    Raises:
        CheckpointError, Interrupted, RunError, DataError: as ``training.fit`` and ``data.load``; a folder cannot be
            written; AutoAttack is not installed.
    """
    path = path_of(cell, folder)
    if isinstance(cell, Images) and not auto_attack.available():
        raise RunError(auto_attack.MISSING)
    start = time.perf_counter()
    with writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
    found = _exact(cell, path) if isinstance(cell, Exact) else _of_a_network(cell, path, work, on_progress, data_root)
    content = {
        "protocol": PROTOCOL,
        "command": _command(cell),
        "settings": cell.settings,
        "versions": {"robust_node_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        **found,
    }
    with writing(folder):
        replace_file(path, json.dumps({"sha256": digest_of_json(content), **content}, indent=1).encode())
    return content


def _exact(cell: Exact, path: Path) -> dict[str, Any]:
    """How far ours are from the closed form, in float64: V, dV/dt, V(t) and the regions; draws the last."""
    lyapunov, rate = exact.lyapunov(), exact.RATE
    states = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, derivative = value_and_derivative(lyapunov, states, exact.field(states))
    square = states.square().sum(1, keepdim=True)
    residual = zubov_residual(value, derivative, rate=rate).detach()
    regions = planar.regions_of(lyapunov, exact.field, states[:0])
    grid = plane(regions.low, regions.high, regions.side)
    picture.side_by_side(cell.row, {"": regions}, torch.zeros(0, dtype=torch.int64), path.with_suffix(".png"))
    return {
        "refused": None,
        "value_error": float((value.detach() / square - 1.0).abs().max()),
        "residual": float((residual / (square * (1.0 + square))).abs().max()),
        "decay_error": exact.decay_error(lyapunov),
        "iou": regions.overlaps,
        "iou_with_the_disc": [overlap(found, grid.square().sum(1) < 1.0) for found in regions.attracted],
    }


def _of_a_network(
    cell: Plane | Images, path: Path, work: Path, on_progress: OnProgress, data_root: Path | None
) -> dict[str, Any]:
    dataset = data.load(cell.config.dataset, data_root)
    run = work / f"{cell.part}-{path.stem}"
    before = _before(cell, dataset) if isinstance(cell, Plane) else None
    found: dict[str, Any] = {"refused": None} if before is None else {"before": _describe(before), "refused": None}
    try:
        net, outcome = _trained(cell, run, dataset, on_progress)
    except Refused as error:  # what a guard says is the result
        found["refused"] = str(error)
    else:
        found |= {"last_step": training.last_step(run), "train_seconds": outcome.seconds}
        with training.alone(run):
            if isinstance(cell, Images):
                found |= _evaluated(cell, net, dataset, path.with_suffix(".png"), on_progress)
            else:
                assert before is not None
                found["after"] = _after(cell, before, net, outcome, dataset, path.with_suffix(".png"))
    return found


def _trained(
    cell: Plane | Images, run: Path, dataset: data.Dataset, on_progress: OnProgress
) -> tuple[nn.Module, Outcome]:
    """The network of the cell's run, brought to its end: from its start, from its checkpoint, or there already."""
    with training.writing(run):
        run.mkdir(parents=True, exist_ok=True)
        with training.alone(run):
            training.prepare(cell.config, run, resume=True)
    try:
        outcome = training.fit(
            run, dataset, on_step=lambda step, total, _: on_progress(f"{label(cell)}: step {step} of {total}")
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {run} to train this network again") from error
    return training.load_model(run)[0], outcome


def _before(cell: Plane, dataset: data.Dataset) -> planar.Regions:
    untrained = cell.config.initial_model()
    assert isinstance(untrained, ZubovNet)
    return planar.regions(untrained, dataset.train_images)


def _after(
    cell: Plane,
    before: planar.Regions,
    net: nn.Module,
    outcome: Outcome,
    dataset: data.Dataset,
    image: Path,
) -> dict[str, Any]:
    """What the trained network's regions are; draws them."""
    assert isinstance(net, ZubovNet)
    points = dataset.train_images
    regions = planar.regions(net, points)
    with torch.no_grad():
        own = net.lyapunov(net.features(dataset.test_images)).gather(1, dataset.test_labels[:, None])
    rows = {"before training": before, "after training": regions}
    picture.side_by_side(cell.row, rows, dataset.train_labels, image)
    return {
        **_describe(regions),
        "iou_in_the_networks_steps": planar.regions(net, points, step_size=net.dynamics.step_size).overlaps,
        "accuracy": outcome.accuracy,
        "in_own_region": float((own < 1.0).float().mean()),
    }


def _describe(regions: planar.Regions) -> dict[str, Any]:
    prescribed = regions.prescribed.any(0)
    return {
        "iou": regions.overlaps,
        "prescribed_cells": regions.prescribed.sum(1).tolist(),
        "attracted_cells": regions.attracted.sum(1).tolist(),
        "time": regions.time,
        "moving": int((regions.moving & prescribed).sum()) / max(1, int(prescribed.sum())),
        "shared": regions.shared,
    }


def _evaluated(
    cell: Images, net: nn.Module, dataset: data.Dataset, image: Path, on_progress: OnProgress
) -> dict[str, Any]:
    seed = cell.config.seed
    bare = contenders.bare_backbone(net, dataset.train_images, dataset.train_labels, data.num_classes(cell.part))
    test = (dataset.test_images, dataset.test_labels)
    report = robustness.evaluate(
        net,
        test,
        suite="standard",
        eps=cell.eps,
        seeds=(seed,),
        sources={"bare backbone": bare},
        certify=training.certificate(net),
        attack_samples=cell.attacked,
        batch_size=256,
        on_batch=lambda done: on_progress(f"{label(cell)}: {done} images evaluated"),
    )
    images, labels = (tensor[: cell.attacked] for tensor in test)
    with torch.no_grad():
        right = [bare(x).argmax(1) == y for x, y in zip(*(torch.split(part, 512) for part in test), strict=True)]
    of_a_zubov_net: dict[str, Any] = dict.fromkeys(("regions", "meeting", "attracting", "certified"))
    if isinstance(net, ZubovNet):
        regions, further = _regions(net, dataset)
        picture.over_time(label(cell), further, image)
        of_a_zubov_net = {
            "regions": regions,
            "meeting": _meeting(net.lyapunov),
            "attracting": _attracting(net),
            "certified": _certified(net, images, labels, seed),
        }
    return {
        **of_a_zubov_net,
        "bare_accuracy": float(torch.cat(right).double().mean()),
        "margin": {str(radius): margin_attack(net, images, labels, radius, seed) for radius in cell.eps},
        "autoattack": {str(cell.middle): _autoattack(net, images, labels, cell, on_progress)},
        "report": json.loads(report.to_json()),
    }


def _certified(net: ZubovNet, images: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Of the first images: quantiles of ``margin_radius`` in l_inf, and how many certified at the median one fall."""
    images, labels = images[:LOOKED_AT], labels[:LOOKED_AT]
    radius = margin_radius(net, images, labels)
    median = float(radius.median())
    held = radius >= median
    left = margin_attack(net, images[held], labels[held], median, seed) if median > 0 else 1.0
    return {
        "median": median,
        "tenth": float(radius.quantile(0.1)),
        "most": float(radius.max()),
        "fall": round((1.0 - left) * int(held.sum())),
    }


def margin_attack(net: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> float:
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


def _autoattack(net: nn.Module, images: Tensor, labels: Tensor, cell: Images, on_progress: OnProgress) -> float:
    """Accuracy under AutoAttack on the first images."""
    on_progress(f"{label(cell)}: AutoAttack")
    generator = torch.Generator().manual_seed(cell.config.seed)
    found = robustness.autoattack(net, images, labels, cell.middle, generator=generator)
    with torch.no_grad():
        return float((net(found).argmax(1) == labels).double().mean())


def _meeting(lyapunov: ConvexLyapunov) -> float:
    """The share of pairs of regions that meet on the segment between their equilibria."""
    pairs = lyapunov.num_classes * (lyapunov.num_classes - 1)
    return float(regions_that_meet(lyapunov).sum()) / pairs


def _attracting(net: ZubovNet) -> float:
    """The share of equilibria at which all eigenvalues of df/dx have negative real parts, of the last f."""
    dynamics, centres = net.dynamics, net.lyapunov.equilibria.detach()
    end = dynamics.n_steps * dynamics.step_size
    jacobian = torch.autograd.functional.jacobian
    each: Tensor = jacobian(lambda x: net.field_at(end, x).sum(0), centres)  # type: ignore[no-untyped-call]
    largest = torch.linalg.eigvals(each.movedim(1, 0)).real.amax(1)
    return float((largest < 0).double().mean())


@torch.no_grad()
def _regions(net: ZubovNet, dataset: data.Dataset) -> tuple[dict[str, dict[str, float]], Followed]:
    """Whether states do what Zubov's equation says, of the first images of either set, and those of the test set.

    ``inside_first``, ``inside_last``: the share of states x(0) and x(T) in the own class's region; ``inside_others``:
    of x(0) in another class's, whatever its own. ``falls``: of the network's steps in which the own V falls. Simulated
    on, for 200 units of time (``following``): ``stays``, the share of images whose states are in the own region then,
    ``arrives``: where the own V has fallen below 0.1.
    """
    found = {}
    for name, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        input, own = data.to_float(images[:LOOKED_AT]), labels[:LOOKED_AT]
        value = torch.stack([net.lyapunov(state).gather(1, own[:, None])[:, 0] for state in net.trajectory(input)])
        further = followed(net, input, own)
        shares = {
            "inside_first": value[0] < 1.0,
            "inside_last": value[-1] < 1.0,
            "inside_others": further.other[0] < 1.0,
            "falls": value[1:] < value[:-1],
            "stays": further.own[-1] < 1.0,
            "arrives": further.own[-1] < 0.1,
        }
        found[name] = {key: float(share.double().mean()) for key, share in shares.items()}
    return found, further
