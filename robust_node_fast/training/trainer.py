"""``fit``: train a run in its folder, from its checkpoint or from the start where there is none.

A run that was stopped or killed at any moment and is fitted again ends with the bits of the undisturbed run: the
checkpoint holds weights, optimizer, step and PyTorch's random state, and the order of the data, their augmentation and
the learning rate follow from seed and step.

Where torch.distributed is initialised, its processes train as one: see ``distributed``. They share every batch, and
rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robust_node_fast import _backends, data
from robust_node_fast.data import Dataset, to_float
from robust_node_fast.training import augment, checkpoint, distributed, networks, sharding
from robust_node_fast.training import folder as run_folder
from robust_node_fast.training.batch_norm import synchronize_batch_norm_
from robust_node_fast.training.checkpoint import CheckpointError
from robust_node_fast.training.config import TrainConfig
from robust_node_fast.training.errors import Interrupted, Refused, RunError
from robust_node_fast.training.locks import alone
from robust_node_fast.training.metrics import Metrics
from robust_node_fast.training.objective import objective_of
from robust_node_fast.training.signals import StopSignals
from robust_node_fast.zubov.errors import Degenerate

__all__ = ["RATE_TOLERANCE", "Outcome", "check_device", "fit", "rate_sentence"]

OnStep = Callable[[int, int, dict[str, float]], None]
_Tensors = tuple[Tensor, ...] | list[Tensor]

RATE_TOLERANCE = 1e-2  # the contractive network satisfies its rate if it reaches (1 - 1e-2) * rate
_TRACKED = 256  # test images whose certificates are tracked
_ENVIRONMENT_OF_OLD = {"processes": 1}  # what checkpoints did not say before it could differ


@dataclass(frozen=True)
class Outcome:
    """What a finished run reached; ``final`` is what its objective says of the network beside the accuracy."""

    folder: Path
    config: TrainConfig
    steps: int
    accuracy: float
    final: dict[str, float]
    seconds: float  # spent training, over all sittings
    seconds_per_epoch: float

    @property
    def rate(self) -> float:
        """Of a convolutional network: the contraction rate guaranteed for every Euler step (negative: none is)."""
        return self.final["rate"]

    @property
    def penalty(self) -> float:
        """Of a convolutional network: the contraction penalty at ``config.rate`` without the margin."""
        return self.final["penalty"]

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


def fit(folder: Path, dataset: Dataset, *, on_step: OnStep | None = None, tensorboard: bool = False) -> Outcome:
    """Train the run in ``folder`` to its end.

    SIGINT and SIGTERM finish the current step, write a checkpoint and raise ``Interrupted``; a second one acts at once.
    Where torch.distributed is initialised, all of its processes are to call this together.

    Args:
        folder: made by ``prepare``.
        dataset: the one that the configuration names.
        on_step: called after every step with its number (from 1), the number of steps, and the step's metrics.
        tensorboard: also write the metrics to ``folder/tensorboard``.

    Raises:
        InUse: another process trains there.
        RunError: no run there, the folder cannot be written, no such device, TensorBoard is not installed, batches are
            too small to be shared, or another process is lost.
        Refused: loss or gradient are not finite, or a guard of the objective refuses to go on.
        CheckpointError: the checkpoint is corrupted or belongs to another configuration.
        Interrupted: see above.
        TypeError, ValueError: ``dataset`` is another one, or as ``data.check``.
    """
    config = run_folder.load_config(folder)
    if dataset.name != config.dataset:
        raise ValueError(f"dataset.name={dataset.name!r} does not fit the run, expected {config.dataset!r}")
    data.check(dataset)
    check_device(config.device)
    with distributed.collectives(), run_folder.writing(folder), contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            stack.enter_context(alone(folder))
        trainer = _Trainer(config, dataset, folder)
        trainer.resume()
        stop = stack.enter_context(StopSignals())
        if distributed.rank() == 0:
            path = folder / run_folder.METRICS
            trainer.metrics = stack.enter_context(Metrics(path, trainer.step, tensorboard=tensorboard))
        trainer.train(stop, on_step)
        trainer.save_model()
        return trainer.outcome()


class _Trainer:
    def __init__(self, config: TrainConfig, dataset: Dataset, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.metrics: Metrics | None = None  # rank 0 alone has them
        self.train_images = dataset.train_images[: config.train_samples].to(config.device)
        self.train_labels = dataset.train_labels[: config.train_samples].to(config.device)
        self.test_images = distributed.share(dataset.test_images).to(config.device)
        self.test_labels = distributed.share(dataset.test_labels).to(config.device)
        self.n_test = len(dataset.test_labels)
        self.tracked: _Tracked | None = None
        if config.track_eps:
            self.tracked = _Tracked(config, dataset.test_images[:_TRACKED], dataset.test_labels[:_TRACKED])
        self.model = config.initial_model().to(config.device)
        torch.manual_seed(config.seed)  # again: what steps draw is not to depend on what the network's start drew
        self.averaged: AveragedModel | None = None
        if config.ema_decay:
            # Buffers too: statistics of batch normalisation are to fit the averaged weights.
            self.averaged = AveragedModel(self.model, multi_avg_fn=_average(config.ema_decay), use_buffers=True)
        if distributed.world_size() > 1:
            synchronize_batch_norm_(self.model, config.device)
        self.objective = objective_of(self.model, config)
        if config.compile:
            # Never dynamic: a run that is resumed compiles what the undisturbed run did.
            self.objective.compile(dynamic=False)
        self.sharded = config.shard and distributed.world_size() > 1
        if self.sharded:
            self.parallel = sharding.shard(self.objective, config.device)
            if self.averaged is not None:  # only for its parameters to be parts too
                sharding.shard(self.averaged, config.device)
        else:
            self.parallel = distributed.parallel(self.objective, reaches_all=self.objective.reaches_all)
        self.optimizer = _optimizer(config, self.model)
        self.steps_per_epoch = math.ceil(len(self.train_labels) / config.batch_size)
        self.total = config.total_steps(len(self.train_labels))
        self.step = 0  # optimizer steps done; with the seed it gives the place in the data
        self.saved = 0  # the step of the checkpoint
        self.seconds = 0.0  # spent training up to this step, over all sittings
        smallest = len(self.train_labels) - (self.steps_per_epoch - 1) * config.batch_size
        if smallest < distributed.world_size() * config.accumulate:
            raise RunError(
                f"a batch of {smallest} images is too small for {distributed.world_size()} processes that take it in "
                f"{config.accumulate} parts: choose another --batch-size"
            )

    def train(self, stop: StopSignals, on_step: OnStep | None) -> None:
        """From the current step to the last."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: self.config.lr_factor(step / self.steps_per_epoch, step / self.total),
            last_epoch=self.step - 1,
        )
        start = time.perf_counter() - self.seconds
        while self.step < self.total:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            draws = self._draws(epoch)
            for index in torch.split(self._order(epoch), self.config.batch_size)[done:]:
                lr = self.optimizer.param_groups[0]["lr"]
                values = self._step(index, draws)
                scheduler.step()
                self.step += 1
                self.seconds = time.perf_counter() - start
                record = {"step": self.step, "epoch": epoch, "lr": lr, **values}
                self._write(record)
                if on_step is not None:
                    on_step(self.step, self.total, record)
                # One decision for all processes: one that stopped alone would leave the others waiting for it.
                number = distributed.largest(stop.signal or 0, self.config.device)
                if self.step % self.steps_per_epoch == 0 or self.step == self.total:
                    model = self._final_model()
                    tested = {"test_accuracy": self._accuracy(model)}
                    if self.tracked is not None:
                        tested["test_certified"] = self.tracked.certified(model)
                    start = time.perf_counter() - self.seconds  # the clock stands still while testing
                    self._write({"step": self.step, "epoch": epoch, **tested, "seconds": self.seconds})
                    self._save()
                elif number or self.step % self.config.checkpoint_every == 0:
                    self._save()
                if number:
                    raise Interrupted(number, self.step, self.total)
                if self.step == self.total:  # which may be in the middle of an epoch
                    return

    def _order(self, epoch: int) -> Tensor:
        """The order of the training set in an epoch, the same for every network with this seed."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.train_labels), generator=generator).to(self.config.device)

    def _draws(self, epoch: int) -> Tensor | None:
        """The random numbers of an epoch's augmentation, if there is any."""
        if self.config.augmentation == "none":
            return None
        return augment.draw(len(self.train_labels), seed=self.config.seed, epoch=epoch).to(self.config.device)

    def _inputs(self, index: Tensor, draws: Tensor | None) -> Tensor:
        images = self.train_images[index]
        if draws is not None:
            parts = self.config.augmentation.split("-")
            images = augment.augment(images, draws[index], flip="flip" in parts, cutout="cutout" in parts)
        return self._as_input(images)

    def _as_input(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return to_float(images).contiguous(memory_format=layout)

    def _step(self, batch: Tensor, draws: Tensor | None) -> dict[str, float]:
        """One optimizer step on the images of these numbers, of which this process takes its share."""
        config, world_size = self.config, distributed.world_size()
        if world_size > 1:
            # Dropout, rays: others in every process, and none whose generator a checkpoint would have to hold.
            torch.manual_seed((config.seed * 1_000_003 + self.step) * world_size + distributed.rank())
        self.parallel.train()
        self.optimizer.zero_grad()
        self.objective.progress = self.step / self.total
        parts = [distributed.share(part) for part in torch.tensor_split(batch, config.accumulate)]
        values = torch.zeros(len(self.objective.metrics), device=config.device)
        for number, index in enumerate(parts, start=1):
            # Weights that give the mean over the whole batch (and count the penalty once), however it is shared.
            weight = len(index) / len(batch)
            with distributed.gradients_averaged(self.parallel, number == len(parts)):
                try:
                    objective, found = self.parallel(self._inputs(index, draws), self.train_labels[index])
                except Degenerate as error:  # a guard of the objective
                    raise Refused(f"step {self.step + 1}: {error}") from error
                torch.autograd.backward(world_size * weight * objective)  # world_size: then averaged over processes
            values += weight * found
        distributed.total(values)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if config.grad_clip:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        else:
            norm = nn.utils.get_total_norm(gradients)
        *found_values, norm_value = torch.cat([values, sharding.whole(norm).reshape(1)]).tolist()
        self._check_finite(found_values, norm_value)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return dict(zip(self.objective.metrics, found_values, strict=True))

    def _check_finite(self, values: list[float], norm: float) -> None:
        if all(map(math.isfinite, [*values, norm])):
            return
        what, value = ("gradient", norm) if all(map(math.isfinite, values)) else ("loss", values[0])
        kept = f"; the checkpoint of step {self.saved} is kept" if self.saved else ""
        raise Refused(f"the {what} is not finite at step {self.step + 1}: {value}; a smaller --lr may help{kept}")

    def _write(self, record: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def _save(self) -> None:
        optimizer = self.optimizer.state_dict()
        tensors = {f"{run_folder.WEIGHTS}{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.averaged is not None:
            averaged = self.averaged.state_dict()
            tensors.update({f"{run_folder.AVERAGED}{name}": tensor for name, tensor in averaged.items()})
        for index, values in optimizer["state"].items():
            tensors.update({f"optimizer.{index}.{key}": value for key, value in values.items() if value is not None})
        tensors = sharding.gathered(tensors, keep=distributed.rank() == 0)

        def write() -> None:
            self._write_checkpoint(tensors, optimizer["param_groups"])

        distributed.on_rank_0(run_folder.writing(self.folder)(write))
        self.saved = self.step

    def save_model(self) -> None:
        weights, state = self._final_model().state_dict(), {"config": dataclasses.asdict(self.config)}

        def write() -> None:
            checkpoint.save(self.folder / run_folder.MODEL, weights, state)

        distributed.on_rank_0(run_folder.writing(self.folder)(write))

    def _write_checkpoint(self, tensors: dict[str, Tensor], param_groups: list[dict[str, Any]]) -> None:
        if self.metrics is not None:
            self.metrics.sync()  # first: a checkpoint without its metrics would lose lines
        tensors["rng.cpu"] = torch.get_rng_state()
        if self._on_cuda:
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.config.device)
        state = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "param_groups": param_groups,
            "environment": _environment(self.config.device),
        }
        checkpoint.save(self.folder / run_folder.CHECKPOINT, tensors, state)

    def resume(self) -> None:
        """Go to the state of the checkpoint, if there is one."""
        path = self.folder / run_folder.CHECKPOINT
        if path.exists():
            self._load_checkpoint(path)
        first, last = (sign * distributed.largest(sign * self.step, self.config.device) for sign in (-1, 1))
        if first != last:
            raise RunError(
                f"{path} is not the same file for all processes (steps {first} to {last}): they need one run folder"
            )

    def _load_checkpoint(self, path: Path) -> None:
        tensors, state = checkpoint.load(path)
        run_folder.check_belongs(path, state, self.config)
        if "step" not in state:
            raise CheckpointError(f"{path} holds weights only, no training that could go on")
        run_folder.load_weights(path, self.model, tensors, run_folder.WEIGHTS)
        if self.averaged is not None:
            run_folder.load_weights(path, self.averaged, tensors, run_folder.AVERAGED)
        per_parameter: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.model.parameters())
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                parameter = parameters[int(index)]
                # What is as large as the parameter is kept like it; the number of steps is not.
                kept = sharding.part_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
                per_parameter.setdefault(int(index), {})[key] = kept
        self.optimizer.load_state_dict({"state": per_parameter, "param_groups": state["param_groups"]})
        torch.set_rng_state(tensors["rng.cpu"])
        if self._on_cuda:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.config.device)
        self.step, self.saved, self.seconds = state["step"], state["step"], state["seconds"]
        then, now = {**_ENVIRONMENT_OF_OLD, **state["environment"]}, _environment(self.config.device)
        changes = [f"{key} was {then.get(key)} and is {now[key]}" for key in now if then.get(key) != now[key]]
        if changes:
            warnings.warn(
                f"{self.folder} continues in a changed environment ({'; '.join(changes)}): the weights may differ in "
                f"their last bits from those of an undisturbed run",
                stacklevel=4,
            )

    @property
    def _on_cuda(self) -> bool:
        return torch.device(self.config.device).type == "cuda"

    def _final_model(self) -> nn.Module:
        """The network that training is for, averaged if it is averaged. All processes are to call this together."""
        model: nn.Module = self.model if self.averaged is None else self.averaged.module
        if not self.sharded:
            return model
        # Another one, with whole weights: the parts of this one come together for training steps alone.
        found = self.config.build_model().to(self.config.device)
        found.load_state_dict(sharding.gathered(model.state_dict()))
        return found

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        """Of the final model on the whole test set, of which every process evaluates a part."""
        model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.config.device)
        for x, y in zip(torch.split(self.test_images, 512), torch.split(self.test_labels, 512), strict=True):
            if len(y):  # fewer images than processes
                correct += (model(self._as_input(x)).argmax(1) == y).sum()
        return int(distributed.total(correct)) / self.n_test

    def outcome(self) -> Outcome:
        model = self._final_model()
        return Outcome(
            folder=self.folder,
            config=self.config,
            steps=self.step,
            accuracy=self._accuracy(model),
            final=self.objective.final(model),
            seconds=self.seconds,
            seconds_per_epoch=self.seconds / (self.total / self.steps_per_epoch),
        )


class _Tracked:
    """The first test images, certified after every epoch; each process takes a part of them."""

    def __init__(self, config: TrainConfig, images: Tensor, labels: Tensor) -> None:
        self.eps, self.n = config.track_eps, len(labels)
        self.images = distributed.share(images).to(config.device)
        self.labels = distributed.share(labels).to(config.device)
        self.model = config.build_model().to(config.device).eval()  # without layers that are there for training only
        certify = networks.certificate(self.model)
        if certify is None:
            raise RunError(f"track_eps={config.track_eps!r}: there is no certificate for model={config.model!r}")
        self.certify = certify

    def certified(self, model: nn.Module) -> float:
        self.model.load_state_dict(model.state_dict())
        count = torch.zeros((), dtype=torch.int64, device=self.labels.device)
        if len(self.labels):
            count += self.certify(self.model, self.images, self.labels, self.eps).sum()
        return int(distributed.total(count)) / self.n


def _average(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """For ``AveragedModel``: the exponential moving average, of the parts that this process holds."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(averaged: _Tensors, current: _Tensors, number: Tensor | int) -> None:
        average([*map(sharding.local, averaged)], [*map(sharding.local, current)], number)

    return update


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters, lr, weight_decay = model.parameters(), config.scaled_lr, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=config.momentum, weight_decay=weight_decay, nesterov=config.nesterov
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=weight_decay)


def check_device(device: str) -> None:
    """A ``RunError`` for a device that PyTorch does not know or this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # AssertionError: PyTorch built without CUDA
        raise RunError(f"device {device!r} cannot be used ({str(error).splitlines()[0]})") from error


def _environment(device: str) -> dict[str, Any]:
    """What the last bits of a result depend on."""
    info = _backends.backend_info()
    kind = torch.device(device).type
    implementations = sorted({op[kind]["implementation"] for op in info["ops"].values()})
    return {
        "robust_node_fast": info["robust_node_fast"],
        "torch": info["torch"],
        "device": device,
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "runs on": implementations,
    }
