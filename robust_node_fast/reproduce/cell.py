"""One cell: its networks are trained, the cell's own is evaluated, and what came out is one JSON file.

A stopped or killed run loses no finished cell and no training beyond the last checkpoint: networks have run folders of
their own in ``networks``, a file in ``cells`` appears whole or not at all.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_node_fast import robustness, training
from robust_node_fast.certify import linf_certified
from robust_node_fast.data import Dataset
from robust_node_fast.reproduce.grid import EPS, SUITE, Cell, network_name
from robust_node_fast.training import Outcome, TrainConfig
from robust_node_fast.training.checkpoint import replace_file

__all__ = ["Stored", "compute", "stored"]

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Stored:
    """What a cell's file holds. ``rate`` and ``penalty`` are ``training.Outcome``'s."""

    settings: dict[str, Any]
    rate: float
    penalty: float
    seconds: dict[str, float]  # "train", "evaluate"
    report: robustness.Report

    def to_json(self) -> str:
        content = {
            "settings": self.settings,
            "rate": self.rate,
            "penalty": self.penalty,
            "seconds": self.seconds,
            "report": json.loads(self.report.to_json()),
        }
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Stored:
        """Inverse of ``to_json``.

        Raises:
            KeyError, TypeError, ValueError: no such content.
        """
        content = json.loads(text)
        seconds = {name: float(content["seconds"][name]) for name in ("train", "evaluate")}
        report = robustness.Report.from_json(json.dumps(content["report"]))
        return cls(content["settings"], float(content["rate"]), float(content["penalty"]), seconds, report)


def stored(cell: Cell, folder: Path) -> Stored | None:
    """The result of a cell that is done already; a file that cannot be it is warned about and counts as none."""
    path = _path(cell, folder)
    try:
        found = Stored.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # bad UTF-8 and JSON are ValueErrors
        reason = f"{type(error).__name__}: {error}"
    else:
        if found.settings == cell.settings:
            return found
        reason = "its settings are not those that its name stands for"
    warnings.warn(f"{path} is truncated or corrupted ({reason}): this cell is computed again", stacklevel=2)
    return None


def compute(cell: Cell, folder: Path, dataset: Dataset, *, on_progress: OnProgress) -> Stored:
    """Train what is not trained yet, evaluate on the full test set, write the cell's file.

    Raises:
        CheckpointError, Interrupted, RunError: as ``training.fit``.
        ValueError: as ``robustness.evaluate``.
    """
    partner = _trained(cell.partner, folder, dataset, lambda what: on_progress(f"{cell.label}: partner {what}"))
    own = _trained(cell.config, folder, dataset, lambda what: on_progress(f"{cell.label}: {what}"))
    begin = time.perf_counter()
    report = robustness.evaluate(
        training.load_model(own.folder)[0],
        (dataset.test_images, dataset.test_labels),
        suite=SUITE,
        eps=EPS,
        seeds=(cell.config.seed,),  # the spread that matters is that of training
        sources={cell.partner.network: training.load_model(partner.folder)[0]},
        certify=linf_certified,
        attack_samples=cell.attack_samples,
        on_batch=lambda done: on_progress(f"{cell.label}: evaluated {done} of {len(dataset.test_labels)} images"),
    )
    seconds = {
        "train": own.seconds_per_epoch * own.config.epochs,
        "evaluate": time.perf_counter() - begin,
    }
    result = Stored(cell.settings, own.rate, own.penalty, seconds, report)
    path = _path(cell, folder)
    with training.writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, result.to_json().encode())
    return result


def _trained(config: TrainConfig, folder: Path, dataset: Dataset, on_progress: OnProgress) -> Outcome:
    """The network's run, brought to its end: from its start, from its checkpoint, or there already."""
    run = folder / "networks" / network_name(config)
    if not (run / "config.json").exists():
        training.prepare(config, run)
    return training.fit(
        run,
        dataset,
        on_step=lambda step, total, record: on_progress(f"step {step} of {total}, loss {record['loss']:.3f}"),
    )


def _path(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name}.json"
