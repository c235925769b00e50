"""A small training loop for the experiments: any module, any objective; killed and started again, the same bits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.training import CheckpointError, RunError
from robust_node_fast.training.checkpoint import load, save
from robust_node_fast.zubov.losses import zubov_losses
from robust_node_fast.zubov.network import ZubovNet

__all__ = ["Budget", "Objective", "ZubovObjective", "accuracy", "fit", "load_weights"]

Objective = Callable[[nn.Module, Tensor, Tensor, torch.Generator], dict[str, Tensor]]
Augment = Callable[[Tensor, torch.Generator], Tensor]
OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Budget:
    """How long and how fast: the learning rate falls from ``lr`` to 0 along half a cosine."""

    steps: int
    batch_size: int = 128
    lr: float = 1e-2
    optimizer: str = "adam"
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0
    grad_clip: float = 0.0  # largest 2-norm of the gradient; 0: no clipping

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            _checks.count(name, getattr(self, name))
        for name in ("lr", "momentum", "weight_decay", "grad_clip"):
            _checks.number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r} is negative, expected a float >= 0")
        _checks.choice("optimizer", self.optimizer, ("adam", "sgd"))

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )


@dataclass(frozen=True)
class ZubovObjective:
    """``zubov_losses`` of a ``ZubovNet`` with these options."""

    consistency: float = 1.0
    classification: float = 1.0
    separation: float = 1.0
    rate: float = 4.0
    temperature: float = 1.0
    margin: float = 0.1
    n_rays: int = 16
    reach: float = 0.0
    floor: float | None = None

    def __call__(self, net: nn.Module, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(net, ZubovNet)
        options = dataclasses.asdict(self)
        trajectory = net.trajectory(inputs)
        return zubov_losses(net.lyapunov, net.vector_field, trajectory, labels, **options, generator=generator)


def fit(
    model: nn.Module,
    objective: Objective,
    inputs: Tensor,
    labels: Tensor,
    budget: Budget,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 200,
    augment: Augment | None = None,
    on_step: OnStep | None = None,
) -> dict[str, float]:
    """Train ``model`` where it is, in train mode, and leave it in eval mode.

    With the same arguments, versions and machine the weights are the same to the bit, also when a run was killed and
    the call is made again with a freshly initialised model and the same ``checkpoint``.

    Args:
        model: its parameters are on one device, where batches are moved to.
        objective: terms whose sum is minimised.
        inputs, labels: the training set, in memory.
        budget: steps and optimizer.
        seed: of the order of the data, and of what ``objective`` and ``augment`` draw.
        checkpoint: a safetensors file, written every so many steps and at the end.
        every: steps between checkpoints.
        augment: changes a batch of inputs.
        on_step: called after every step with its number, the number of steps, and the terms.

    Returns:
        The terms of the last step, 0 steps having been left: those of the checkpoint.

    Raises:
        RunError: the objective is not finite, or one of its guards refuses; the message says at which step.
        CheckpointError: ``checkpoint`` is corrupted or of another run.
    """
    _checks.count("every", every)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = budget.build(model)
    run = json.dumps([dataclasses.asdict(budget), repr(objective), seed, list(inputs.shape), torch.__version__])
    done, terms = _restore(checkpoint, run, model, optimizer, generator)
    model.train()
    per_epoch = math.ceil(len(labels) / budget.batch_size)
    for step in range(done, budget.steps):
        epoch, number = divmod(step, per_epoch)
        if step == done or number == 0:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        index = order[number * budget.batch_size : (number + 1) * budget.batch_size]
        batch, target = inputs[index].to(device), labels[index].to(device)
        if augment is not None:
            batch = augment(batch, generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * budget.lr * (1.0 + math.cos(math.pi * step / budget.steps))
        try:
            losses = objective(model, batch, target, generator)
        except ValueError as error:
            raise RunError(f"step {step + 1}: {error}") from error
        total = torch.stack(list(losses.values())).sum()
        terms = {name: float(value.detach()) for name, value in losses.items()}
        if not math.isfinite(sum(terms.values())):
            raise RunError(f"step {step + 1}: the objective is not finite ({terms}); a smaller learning rate may help")
        optimizer.zero_grad()
        torch.autograd.backward(total)
        if budget.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), budget.grad_clip)
        optimizer.step()
        if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == budget.steps):
            _store(checkpoint, run, model, optimizer, generator, step + 1, terms)
        if on_step is not None:
            on_step(step + 1, budget.steps, terms)
    model.eval()
    return terms


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, *, batch_size: int = 512) -> float:
    """The share that is classified rightly; in eval mode, on the device of the parameters."""
    device = next(model.parameters()).device
    model.eval()
    parts = zip(torch.split(inputs, batch_size), torch.split(labels, batch_size), strict=True)
    return sum(int((model(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in parts) / len(labels)


def _store(
    path: Path,
    run: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    step: int,
    terms: dict[str, float],
) -> None:
    state = optimizer.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, values in state["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items() if value is not None}
    tensors["generator"] = generator.get_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, tensors, {"run": run, "step": step, "terms": terms, "groups": state["param_groups"]})


def _restore(
    path: Path | None, run: str, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> tuple[int, dict[str, float]]:
    """The steps that were done, and the terms of the last one."""
    if path is None or not path.exists():
        return 0, {}
    tensors, state = load(path)
    if state.get("run") != run:
        raise CheckpointError(f"{path} is of another run: delete it to train again")
    load_weights(path, model, tensors)
    per_parameter: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            per_parameter.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": per_parameter, "param_groups": state["groups"]})
    generator.set_state(tensors["generator"])
    return int(state["step"]), state["terms"]


def load_weights(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Of a checkpoint of ``fit``.

    Raises:
        CheckpointError: the tensors are not those of the model.
    """
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network ({' '.join(str(error).split())})") from error
