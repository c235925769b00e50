"""One cell: its networks are trained, the cell's own is evaluated, and what came out is one JSON file.

Killed at any moment, it goes on at the last checkpoint of a network in ``networks`` or of an evaluation in
``unfinished``; a file in ``cells`` appears whole or not at all.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from robust_node_fast import robustness, training
from robust_node_fast._version import __version__
from robust_node_fast.certify import linf_certified
from robust_node_fast.data import Dataset
from robust_node_fast.nn import EulerConvFlow
from robust_node_fast.reproduce.grid import Cell, network_name
from robust_node_fast.robustness import auto_attack
from robust_node_fast.training import CheckpointError, Outcome, RunError, TrainConfig
from robust_node_fast.training.checkpoint import digest_of_json, replace_file

__all__ = ["CellError", "CellResult", "compute", "load", "path_of", "read"]

OnProgress = Callable[[str], None]


class CellError(RuntimeError):
    """A cell's file cannot be used; the message is one sentence that names the file and says why."""


@dataclass(frozen=True)
class CellResult:
    """What a cell's file holds. ``rate`` and ``penalty`` are ``training.Outcome``'s."""

    version: str  # of this package
    settings: dict[str, Any]
    rate: float
    penalty: float
    accuracy_by_epoch: tuple[float, ...]  # on the test set
    train_seconds: float
    report: robustness.Report

    @property
    def seconds(self) -> float:
        return self.train_seconds + sum(result.seconds for result in self.report.results)

    def to_json(self) -> str:
        content = {
            "version": self.version,
            "settings": self.settings,
            "rate": self.rate,
            "penalty": self.penalty,
            "accuracy_by_epoch": self.accuracy_by_epoch,
            "train_seconds": self.train_seconds,
            "report": json.loads(self.report.to_json()),
        }
        return json.dumps({"sha256": digest_of_json(content), **content}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CellResult:
        """Inverse of ``to_json``.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: no such content, or not what its SHA-256 belongs to.
        """
        content = json.loads(text)
        if content.pop("sha256") != digest_of_json(content):
            raise ValueError("its content does not match its SHA-256")
        return cls(
            content["version"],
            content["settings"],
            content["rate"],
            content["penalty"],
            tuple(content["accuracy_by_epoch"]),
            content["train_seconds"],
            robustness.Report.from_json(json.dumps(content["report"])),
        )


def path_of(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def read(cell: Cell, folder: Path) -> CellResult | None:
    """The result of a cell, None where it has no file.

    Raises:
        CellError: the file is truncated, altered, or of other settings than its name stands for.
    """
    path = path_of(cell, folder)
    try:
        found = CellResult.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # bad UTF-8 and JSON are ValueErrors
        raise CellError(f"{path} is truncated or was altered ({type(error).__name__}: {error})") from error
    if not cell.has(found.settings):
        raise CellError(f"{path} has other settings than its name stands for")
    return found


def load(cell: Cell, folder: Path) -> CellResult | None:
    """As ``read``, but None for what is to be computed again: also what another version wrote. A warning says why."""
    try:
        found = read(cell, folder)
    except CellError as error:
        reason = str(error)
    else:
        if found is None or found.version == __version__:
            return found
        reason = f"{path_of(cell, folder)} was written by version {found.version}, this is {__version__}"
    warnings.warn(f"{reason}: this cell is computed again", stacklevel=2)
    return None


def compute(cell: Cell, folder: Path, dataset: Dataset, *, on_progress: OnProgress) -> CellResult:
    """Train what is not trained yet, evaluate on the full test set, write the cell's file.

    Raises:
        InUse: another process trains or evaluates one of the networks.
        CheckpointError, Interrupted, RunError: as ``training.fit``; or a run folder holds another network than its name
            stands for; or AutoAttack is not installed, for the full suite.
        ValueError: as ``robustness.evaluate``.
    """
    if cell.suite == "full" and not auto_attack.available():
        raise RunError(auto_attack.MISSING)
    run = _run_folder(cell.config, folder)
    with training.writing(run):
        run.mkdir(parents=True, exist_ok=True)
        with training.alone(run):  # before the partner is looked at, which costs a pass over the test set
            pass
    partner = _trained(cell.partner, folder, dataset, lambda what: on_progress(f"{cell.label}: partner {what}"))
    own = _trained(cell.config, folder, dataset, lambda what: on_progress(f"{cell.label}: {what}"))
    unfinished = folder / "unfinished" / f"{cell.name}.safetensors"
    with training.writing(folder), training.alone(own.folder):
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        report = robustness.evaluate(
            _to_attack(own.folder),
            (dataset.test_images, dataset.test_labels),
            suite=cell.suite,
            eps=cell.eps,
            eps_l2=(),
            seeds=(cell.config.seed,),  # the spread that matters is that of training
            sources={cell.partner.network: _to_attack(partner.folder)},
            transfer_eps=cell.transfer_eps,
            certify=linf_certified,
            attack_samples=cell.attack_samples,
            batch_size=256,  # attacks on the few images that are left of a smaller one waste time
            checkpoint=unfinished,
            on_batch=lambda done: on_progress(f"{cell.label}: evaluated {done} of {len(dataset.test_labels)} images"),
        )
        result = CellResult(
            version=__version__,
            settings=cell.settings,
            rate=own.rate,
            penalty=own.penalty,
            accuracy_by_epoch=training.accuracy_by_epoch(own.folder),
            train_seconds=own.seconds,
            report=report,
        )
        path = path_of(cell, folder)
        path.parent.mkdir(exist_ok=True)
        replace_file(path, result.to_json().encode())
        unfinished.unlink()
    return result


def _trained(config: TrainConfig, folder: Path, dataset: Dataset, on_progress: OnProgress) -> Outcome:
    """The network's run, brought to its end: from its start, from its checkpoint, or there already."""
    run = _run_folder(config, folder)
    with training.writing(run):
        run.mkdir(parents=True, exist_ok=True)
        with training.alone(run):
            if not (run / "config.json").exists():
                training.prepare(config, run)
    if network_name(training.load_config(run)) != run.name:
        raise RunError(
            f"{run / 'config.json'} describes another network than the folder's name stands for: delete {run}"
        )
    try:
        return training.fit(
            run,
            dataset,
            on_step=lambda step, total, record: on_progress(f"step {step} of {total}, loss {record['loss']:.3f}"),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {run} to train this network again") from error


def _run_folder(config: TrainConfig, folder: Path) -> Path:
    return folder / "networks" / network_name(config)


def _to_attack(run: Path) -> nn.Module:
    """The trained network, with states kept for the backward pass: the same gradients in less time."""
    model, _ = training.load_model(run)
    for module in model.modules():
        if isinstance(module, EulerConvFlow):
            module.recompute = False
    return model
