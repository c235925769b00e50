"""The folder of a run: ``config.json``, ``metrics.jsonl``, ``checkpoint.safetensors``, ``model.safetensors``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robust_node_fast.training import checkpoint
from robust_node_fast.training.checkpoint import CheckpointError
from robust_node_fast.training.config import TrainConfig
from robust_node_fast.training.errors import RunError
from robust_node_fast.training.sharding import parts_of

__all__ = [
    "CHECKPOINT",
    "METRICS",
    "MODEL",
    "accuracy_by_epoch",
    "check_belongs",
    "last_step",
    "load_config",
    "load_model",
    "load_weights",
    "prepare",
    "writing",
]

CHECKPOINT, MODEL, METRICS = "checkpoint.safetensors", "model.safetensors", "metrics.jsonl"
_CONFIG = "config.json"
# Names of a checkpoint's tensors begin with these; the averaged weights, where there are any, are the ones to use.
WEIGHTS, AVERAGED = "model.", "ema."


def prepare(config: TrainConfig, folder: Path, *, replace: bool = False, resume: bool = False) -> None:
    """Create the folder of a new run.

    Args:
        config: of the run.
        folder: created where it is missing.
        replace: forget the run that the folder holds.
        resume: leave a run of the same configuration as it is.

    Raises:
        RunError: it holds a run already and neither applies, or it cannot be written.
    """
    if (folder / _CONFIG).exists() and not replace:
        if resume and load_config(folder) == config:
            return
        raise RunError(f"{folder} holds a run already: continue it with --resume {folder}, or choose another --out")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, MODEL, METRICS):
            (folder / name).unlink(missing_ok=True)
        checkpoint.replace_file(folder / _CONFIG, config.to_json().encode())


def load_config(folder: Path) -> TrainConfig:
    """The configuration of the run in ``folder``.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    path = folder / _CONFIG
    try:
        return TrainConfig.from_json(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{folder} is no run folder: it has no {_CONFIG}") from None
    except (OSError, TypeError, ValueError) as error:
        raise RunError(f"{path} is no configuration of a run ({error})") from error


def load_model(folder: Path) -> tuple[nn.Module, TrainConfig]:
    """The network of the run in ``folder``, in eval mode on the CPU: the final one, or that of the last checkpoint.

    With ``ema_decay`` both are the averaged weights.

    Raises:
        RunError: no run, or nothing saved yet.
        CheckpointError: the file is corrupted or does not fit the configuration.
    """
    config = load_config(folder)
    model = config.build_model()
    if (folder / MODEL).exists():
        path, prefix = folder / MODEL, ""
    elif (folder / CHECKPOINT).exists():
        path, prefix = folder / CHECKPOINT, f"{AVERAGED}module." if config.ema_decay else WEIGHTS
    else:
        raise RunError(f"{folder} has no weights yet: continue the run with --resume {folder}")
    tensors, state = checkpoint.load(path)
    check_belongs(path, state, config)
    load_weights(path, model, tensors, prefix)
    if prefix:
        warnings.warn(f"{folder} is not finished: this is its network at the last checkpoint", stacklevel=2)
    return model.eval(), config


def accuracy_by_epoch(folder: Path) -> tuple[float, ...]:
    """Accuracy on the test set after every epoch so far of the run in ``folder``.

    Raises:
        OSError, ValueError: there are no metrics yet, or no JSON lines.
    """
    lines = map(json.loads, (folder / METRICS).read_text().splitlines())
    return tuple(line["test_accuracy"] for line in lines if "test_accuracy" in line)


def last_step(folder: Path) -> dict[str, float]:
    """The metrics of the last step so far of the run in ``folder``.

    Raises:
        IndexError, OSError, ValueError: there are none yet, or no JSON lines.
    """
    lines = map(json.loads, (folder / METRICS).read_text().splitlines())
    return [line for line in lines if "loss" in line][-1]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A ``RunError`` for what cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"the run folder {folder} cannot be written ({error})") from error


def check_belongs(path: Path, state: dict[str, Any], config: TrainConfig) -> None:
    """A ``CheckpointError`` for a checkpoint of another configuration; fields it does not have yet are the defaults."""
    try:
        same = TrainConfig(**state["config"]) == config
    except (KeyError, TypeError, ValueError):
        same = False
    if not same:
        raise CheckpointError(f"{path} does not belong to the run that {path.parent / _CONFIG} describes")


def load_weights(path: Path, model: Any, tensors: dict[str, Tensor], prefix: str) -> None:
    """Load the tensors whose names begin with ``prefix`` into a module; a ``CheckpointError`` if they do not fit."""
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(parts_of(model, weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} does not fit the network that {path.parent / _CONFIG} describes ({reason})"
        ) from error
