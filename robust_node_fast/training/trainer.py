"""A training run in a folder: ``config.json``, ``metrics.jsonl``, ``checkpoint.safetensors``, ``model.safetensors``.

``prepare`` opens the folder, ``fit`` trains in it from its checkpoint, or from the start where there is none. A run
that was stopped or killed at any moment and is fitted again ends with the bits of the undisturbed run: the checkpoint
holds weights, optimizer, scheduler, step and PyTorch's random state, and the order of the data follows from seed and
epoch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast import _backends, models
from robust_node_fast.certify import worst_case_logits
from robust_node_fast.data import Dataset
from robust_node_fast.jacobian import jacobian_penalty
from robust_node_fast.nn import EulerConvFlow
from robust_node_fast.training import checkpoint
from robust_node_fast.training.checkpoint import CheckpointError
from robust_node_fast.training.config import TrainConfig

__all__ = [
    "RATE_TOLERANCE",
    "Interrupted",
    "Outcome",
    "RunError",
    "accuracy_by_epoch",
    "check_device",
    "fit",
    "load_config",
    "load_model",
    "prepare",
    "rate_sentence",
    "writing",
]

Model = models.Model
OnStep = Callable[[int, int, dict[str, float]], None]

RATE_TOLERANCE = 1e-2  # the contractive network satisfies its rate if it reaches (1 - 1e-2) * rate
# The Jacobian regulariser takes so many images of a batch and so many Lanczos iterations. All 128 images and
# jacobian_penalty's 24 iterations are 48 times the work, and these are already most of a step's.
_JACOBIAN_IMAGES, _JACOBIAN_ITERATIONS = 8, 8
_CHECKPOINT, _MODEL, _CONFIG, _METRICS = "checkpoint.safetensors", "model.safetensors", "config.json", "metrics.jsonl"


class RunError(RuntimeError):
    """A run cannot go on; the message is one sentence that says why."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM ended ``fit`` after a checkpoint; ``signal`` is its number."""

    def __init__(self, number: int, step: int, total: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step} of {total}")
        self.signal = number


@dataclass(frozen=True)
class Outcome:
    """What a finished run reached.

    ``rate`` is the contraction rate guaranteed for every Euler step (the smallest over the steps; negative: not
    contractive), ``penalty`` the contraction penalty at ``config.rate`` without the margin.
    """

    folder: Path
    config: TrainConfig
    steps: int
    accuracy: float
    rate: float
    penalty: float
    seconds_per_epoch: float

    @property
    def satisfied(self) -> bool:
        """Whether the network contracts at ``config.rate``, up to ``RATE_TOLERANCE``."""
        return self.rate >= (1.0 - RATE_TOLERANCE) * self.config.rate


def rate_sentence(outcome: Outcome) -> str:
    """Whether the contractive network is contractive, in words."""
    verdict = "satisfies" if outcome.satisfied else "does NOT satisfy"
    return (
        f"The contractive network {verdict} its rate: {outcome.rate:.4g} guaranteed (norm {outcome.config.norm}), "
        f"{outcome.config.rate:g} asked, tolerance {RATE_TOLERANCE:.0%}."
    )


def prepare(config: TrainConfig, folder: Path, *, replace: bool = False) -> None:
    """Create the folder of a new run.

    Args:
        config: of the run.
        folder: created where it is missing.
        replace: forget the run that the folder holds.

    Raises:
        RunError: it holds a run already and ``replace`` is false, or it cannot be written.
    """
    if (folder / _CONFIG).exists() and not replace:
        raise RunError(f"{folder} holds a run already: continue it with --resume {folder}, or choose another --out")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (_CHECKPOINT, _MODEL, _METRICS):
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


def load_model(folder: Path) -> tuple[Model, TrainConfig]:
    """The network of the run in ``folder``, in eval mode on the CPU: the final one, or that of the last checkpoint.

    Raises:
        RunError: no run, or nothing saved yet.
        CheckpointError: the file is corrupted or does not fit the configuration.
    """
    config = load_config(folder)
    model = config.build_model()
    if (folder / _MODEL).exists():
        path, prefix = folder / _MODEL, ""
    elif (folder / _CHECKPOINT).exists():
        path, prefix = folder / _CHECKPOINT, "model."
    else:
        raise RunError(f"{folder} has no weights yet: continue the run with --resume {folder}")
    tensors, state = checkpoint.load(path)
    _check_belongs(path, state, config)
    _load_weights(path, model, tensors, prefix)
    return model.eval(), config


def accuracy_by_epoch(folder: Path) -> tuple[float, ...]:
    """Accuracy on the test set after every epoch so far of the run in ``folder``."""
    lines = map(json.loads, (folder / _METRICS).read_text().splitlines())
    return tuple(line["test_accuracy"] for line in lines if "test_accuracy" in line)


def fit(folder: Path, dataset: Dataset, *, on_step: OnStep | None = None, tensorboard: bool = False) -> Outcome:
    """Train the run in ``folder`` to its end.

    SIGINT and SIGTERM finish the current step, write a checkpoint and raise ``Interrupted``; a second one acts at once.

    Args:
        folder: made by ``prepare``.
        dataset: the one that the configuration names.
        on_step: called after every step with its number (from 1), the number of steps, and the step's metrics.
        tensorboard: also write the metrics to ``folder/tensorboard``.

    Raises:
        RunError: no run there, the folder cannot be written, no such device, TensorBoard is not installed, or the loss
            is not finite.
        CheckpointError: the checkpoint is corrupted or belongs to another configuration.
        Interrupted: see above.
    """
    config = load_config(folder)
    if dataset.name != config.dataset:
        raise ValueError(f"dataset.name={dataset.name!r} does not fit the run, expected {config.dataset!r}")
    check_device(config.device)
    trainer = _Trainer(config, dataset, folder)
    with writing(folder):
        trainer.resume()
        with _StopSignals() as stop, _Metrics(folder, trainer.step, tensorboard) as metrics:
            trainer.train(stop, metrics, on_step)
        checkpoint.save(folder / _MODEL, trainer.model.state_dict(), {"config": dataclasses.asdict(config)})
    return trainer.outcome()


class _Trainer:
    def __init__(self, config: TrainConfig, dataset: Dataset, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.train_images, self.train_labels, self.test_images, self.test_labels = (
            tensor.to(config.device)
            for tensor in (
                dataset.train_images[: config.train_samples],
                dataset.train_labels[: config.train_samples],
                dataset.test_images,
                dataset.test_labels,
            )
        )
        torch.manual_seed(config.seed)
        self.model = config.build_model().to(config.device)
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        else:
            self.optimizer = torch.optim.SGD(
                self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, config.lr_factor)
        self.steps_per_epoch = math.ceil(len(self.train_labels) / config.batch_size)
        self.total = config.epochs * self.steps_per_epoch
        self.step = 0  # optimizer steps done; with the seed it gives the place in the data
        self.seconds = 0.0  # spent training up to this step, over all sittings

    def train(self, stop: _StopSignals, metrics: _Metrics, on_step: OnStep | None) -> None:
        """From the current step to the last."""
        start = time.perf_counter() - self.seconds
        while self.step < self.total:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            for index in torch.split(self._order(epoch), self.config.batch_size)[done:]:
                values = self._step(self.train_images[index], self.train_labels[index])
                self.step += 1
                self.seconds = time.perf_counter() - start
                record = {"step": self.step, "epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"], **values}
                metrics.write(record)
                if on_step is not None:
                    on_step(self.step, self.total, record)
                if self.step % self.steps_per_epoch == 0:
                    self.scheduler.step()
                    accuracy = _accuracy(self.model, self.test_images, self.test_labels)
                    start = time.perf_counter() - self.seconds  # the clock stands still while testing
                    metrics.write(
                        {"step": self.step, "epoch": epoch, "test_accuracy": accuracy, "seconds": self.seconds}
                    )
                    self._save(metrics)
                elif stop.signal or self.step % self.config.checkpoint_every == 0:
                    self._save(metrics)
                if stop.signal:
                    raise Interrupted(stop.signal, self.step, self.total)

    def _order(self, epoch: int) -> Tensor:
        """The order of the training set in an epoch, the same for every network with this seed."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.train_labels), generator=generator).to(self.config.device)

    def _step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        config = self.config
        self.model.train()
        self.optimizer.zero_grad()
        contractive = config.network == "contractive"
        if contractive and config.regularizer == "jacobian":
            logits, penalty = _with_jacobian_penalty(self.model, images, config.penalty_rate)
        else:
            logits = self.model(images)
            with torch.set_grad_enabled(contractive):
                penalty = self.model.contraction_penalty(rate=config.penalty_rate, norm=config.norm)
        loss = F.cross_entropy(logits, labels)
        if config.certified_eps:
            share = config.certified_share(self.step / self.total)
            worst = worst_case_logits(self.model, images, labels, share * config.certified_eps)
            loss = (1.0 - 0.5 * share) * loss + 0.5 * share * F.cross_entropy(worst, labels)
        objective = loss + config.penalty_weight * penalty if contractive else loss
        with torch.no_grad():
            rate = self.model.contraction_rate(norm=config.norm).min()
        values = torch.stack([loss.detach(), penalty.detach(), rate]).tolist()
        if not all(map(math.isfinite, values)):
            raise RunError(f"the loss is not finite at step {self.step + 1}: {values[0]}; a smaller --lr may help")
        torch.autograd.backward(objective)
        if config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        return dict(zip(("loss", "penalty", "rate"), values, strict=True))

    def _save(self, metrics: _Metrics) -> None:
        metrics.sync()  # first: a checkpoint without its metrics would lose lines
        optimizer = self.optimizer.state_dict()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in optimizer["state"].items():
            tensors.update({f"optimizer.{index}.{key}": value for key, value in values.items() if value is not None})
        tensors["rng.cpu"] = torch.get_rng_state()
        if self._on_cuda:
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.config.device)
        state = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "param_groups": optimizer["param_groups"],
            "scheduler": self.scheduler.state_dict(),
            "environment": _environment(self.config.device),
        }
        checkpoint.save(self.folder / _CHECKPOINT, tensors, state)

    def resume(self) -> None:
        """Go to the state of the checkpoint, if there is one."""
        path = self.folder / _CHECKPOINT
        if not path.exists():
            return
        tensors, state = checkpoint.load(path)
        _check_belongs(path, state, self.config)
        if "step" not in state:
            raise CheckpointError(f"{path} holds weights only, no training that could go on")
        _load_weights(path, self.model, tensors, "model.")
        per_parameter: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                per_parameter.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": per_parameter, "param_groups": state["param_groups"]})
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self._on_cuda:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.config.device)
        self.step, self.seconds = state["step"], state["seconds"]
        then, now = state["environment"], _environment(self.config.device)
        changes = [f"{key} was {then.get(key)} and is {now[key]}" for key in now if then.get(key) != now[key]]
        if changes:
            warnings.warn(
                f"{self.folder} continues in a changed environment ({'; '.join(changes)}): the weights may differ in "
                f"their last bits from those of an undisturbed run",
                stacklevel=3,
            )

    @property
    def _on_cuda(self) -> bool:
        return torch.device(self.config.device).type == "cuda"

    @torch.no_grad()
    def outcome(self) -> Outcome:
        config = self.config
        return Outcome(
            folder=self.folder,
            config=config,
            steps=self.step,
            accuracy=_accuracy(self.model, self.test_images, self.test_labels),
            rate=float(self.model.contraction_rate(norm=config.norm).min()),
            penalty=float(self.model.contraction_penalty(rate=config.rate, norm=config.norm)),
            seconds_per_epoch=self.seconds / config.epochs,
        )


class _Metrics:
    """``metrics.jsonl`` (and TensorBoard), cut back to ``step`` when opened so that no step is written twice."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._path, self._writer = folder / _METRICS, None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise RunError(
                    f"--tensorboard needs the package tensorboard, which is not installed ({error})"
                ) from error
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        checkpoint.replace_file(self._path, b"".join(line for line in lines if _step_of(line) <= step))
        self._file = open(self._path, "a")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, record: dict[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name in record.keys() - {"step"}:
                self._writer.add_scalar(name, record[name], record["step"])

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity for a line that a killed run left unfinished."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf


class _StopSignals:
    """Notes the first SIGINT or SIGTERM instead of acting on it, and steps aside for the second."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A ``RunError`` for what cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"the run folder {folder} cannot be written ({error})") from error


def check_device(device: str) -> None:
    """A ``RunError`` for a device that PyTorch does not know or this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # AssertionError: PyTorch built without CUDA
        raise RunError(f"device {device!r} cannot be used ({str(error).splitlines()[0]})") from error


def _check_belongs(path: Path, state: dict[str, Any], config: TrainConfig) -> None:
    """A ``CheckpointError`` for a checkpoint of another configuration; fields it does not have yet are the defaults."""
    try:
        same = TrainConfig(**state["config"]) == config
    except (KeyError, TypeError, ValueError):
        same = False
    if not same:
        raise CheckpointError(f"{path} does not belong to the run that {path.parent / _CONFIG} describes")


def _load_weights(path: Path, model: Model, tensors: dict[str, Tensor], prefix: str) -> None:
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} does not fit the network that {path.parent / _CONFIG} describes ({reason})"
        ) from error


def _with_jacobian_penalty(model: Model, images: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """``model(images)``, and ``jacobian_penalty`` along the trajectories of its flows, summed over these."""
    penalties, state = [], images
    for layer in model.layers():
        if isinstance(layer, EulerConvFlow):
            states = layer(state, return_trajectory=True)
            fields = [functools.partial(layer.vector_field, k * layer.step_size) for k in range(layer.n_steps)]
            few = states[:-1, :_JACOBIAN_IMAGES]
            penalties.append(jacobian_penalty(fields, few, rate=rate, n_iter=_JACOBIAN_ITERATIONS))
            state = states[-1]
        else:
            state = layer(state)
    return state, torch.stack(penalties).sum()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    batches = zip(torch.split(images, 512), torch.split(labels, 512), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(labels)


def _environment(device: str) -> dict[str, Any]:
    """What the last bits of a result depend on."""
    info = _backends.backend_info()
    kind = torch.device(device).type
    implementations = sorted({op[kind]["implementation"] for op in info["ops"].values()})
    return {
        "robust_node_fast": info["robust_node_fast"],
        "torch": info["torch"],
        "device": device,
        "threads": torch.get_num_threads(),
        "runs on": implementations,
    }
