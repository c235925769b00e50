"""What a step minimises, network by network; ``objective_of`` picks.

Every objective is a module of the network and its losses: what DistributedDataParallel and torch.compile wrap.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast.certify import worst_case_logits
from robust_node_fast.jacobian import jacobian_penalty
from robust_node_fast.models import Model
from robust_node_fast.nn import EulerConvFlow
from robust_node_fast.training.config import TrainConfig
from robust_node_fast.zubov.contenders import FlowClassifier
from robust_node_fast.zubov.losses import zubov_losses
from robust_node_fast.zubov.network import ZubovNet

__all__ = [
    "ContractionObjective",
    "CrossEntropyObjective",
    "LyapunovObjective",
    "NodeObjective",
    "Objective",
    "ZubovObjective",
    "noisy",
    "objective_of",
    "with_jacobian_penalty",
]

# The Jacobian regulariser takes so many images of a batch and so many Lanczos iterations. All 128 images and
# jacobian_penalty's 24 iterations are 48 times the work, and these are already most of a step's.
_JACOBIAN_IMAGES, _JACOBIAN_ITERATIONS = 8, 8
_JACOBIAN_VECTORS = 16  # of a batch, for networks on vectors: states of 32 numbers are cheap


class Objective(nn.Module):
    """A network and the loss it is trained with.

    Attributes:
        metrics: names of what ``forward`` gives beside the objective; the first one is the loss.
        progress: the share of the run that is done; the trainer sets it before every step.
        reaches_all: whether every parameter has a gradient.
    """

    metrics: tuple[str, ...]
    reaches_all = True

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.config, self.progress = model, config, 0.0

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, a mean over the batch, and the values of ``metrics`` without gradients.

        Args:
            inputs: images ``(B, C, H, W)`` in [0, 1], or points ``(B, 2)``.
            labels: ``(B,)``.

        Raises:
            Degenerate: a guard refuses to go on; the message says why.
        """
        raise NotImplementedError

    def final(self, model: nn.Module) -> dict[str, float]:
        """What is to be said of a trained network beside its accuracy."""
        return {}


def objective_of(model: nn.Module, config: TrainConfig) -> Objective:
    """The objective of ``config.model``."""
    own: dict[str, type[Objective]] = {
        "zubov": ZubovObjective,
        "contractive-node": NodeObjective,
        "lyanet": LyapunovObjective,
    }
    default = ContractionObjective if config.is_convolutional else CrossEntropyObjective
    return own.get(config.model, default)(model, config)


class ContractionObjective(Objective):
    """Of convolutional networks: cross-entropy, the contraction penalty, and the loss of certified training."""

    metrics = ("loss", "penalty", "rate")
    model: Model

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Objective``; the loss is without the penalty, the rate what every Euler step is guaranteed to have."""
        config = self.config
        contractive = config.network == "contractive"
        seen = noisy(inputs, config.noise) if config.noise else inputs
        if contractive and config.regularizer == "jacobian":
            logits, penalty = with_jacobian_penalty(self.model, seen, config.penalty_rate)
        else:
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.autocast):
                logits = self.model(seen)
            with torch.set_grad_enabled(contractive):
                penalty = self.model.contraction_penalty(rate=config.penalty_rate, norm=config.norm)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        if config.certified_eps:
            share = config.certified_share(self.progress)
            worst = worst_case_logits(self.model, inputs, labels, share * config.certified_eps)
            worst_loss = F.cross_entropy(worst, labels, label_smoothing=config.label_smoothing)
            weight = share * config.certified_weight
            loss = (1.0 - weight) * loss + weight * worst_loss
        objective = loss + config.penalty_weight * penalty if contractive else loss
        with torch.no_grad():
            rate = self.model.contraction_rate(norm=config.norm).min()
        return objective, torch.stack([loss.detach(), penalty.detach(), rate])

    @torch.no_grad()
    def final(self, model: nn.Module) -> dict[str, float]:
        """The smallest guaranteed rate (negative: not contractive), and the penalty without the margin."""
        assert isinstance(model, Model)
        config = self.config
        return {
            "rate": float(model.contraction_rate(norm=config.norm).min()),
            "penalty": float(model.contraction_penalty(rate=config.rate, norm=config.norm)),
        }


class ZubovObjective(Objective):
    """The losses of a Zubov-Net, each with its weight; points on rays come from PyTorch's random numbers."""

    metrics = ("loss", "consistency", "classification", "separation", "spacing", "containment", "exclusion", "arrival")
    model: ZubovNet

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__(model, config)
        options = dataclasses.asdict(config.zubov)
        others = ("temperature", "margin", "n_rays", "reach", "floor")
        self.options = {"rate": config.rate, **{name: options[name] for name in (*self.metrics[1:], *others)}}
        self.reaches_all = bool(config.zubov.consistency or config.zubov.classification)  # separation: V alone

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Objective``; the guards are those of ``zubov_losses``."""
        net = self.model
        terms = torch.stack(
            list(zubov_losses(net.lyapunov, net.vector_field, net.trajectory(inputs), labels, **self.options).values())
        )
        return terms.sum(), torch.cat([terms.sum().reshape(1), terms]).detach()


class CrossEntropyObjective(Objective):
    """Cross-entropy alone, of any network."""

    metrics = ("loss",)

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(self.model(inputs), labels, label_smoothing=self.config.label_smoothing)
        return loss, loss.detach().reshape(1)


class NodeObjective(Objective):
    """Cross-entropy, and what the flow lacks of contracting at ``penalty_rate`` along its trajectories."""

    metrics = ("loss", "penalty")
    model: FlowClassifier

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        net, config = self.model, self.config
        states = net.trajectory(inputs)
        visited = states[:-1, :_JACOBIAN_VECTORS].flatten(0, 1)
        penalty = jacobian_penalty(
            net.vector_field, visited[None], rate=config.penalty_rate, n_iter=_JACOBIAN_ITERATIONS
        )
        loss = F.cross_entropy(net.head(states[-1]), labels, label_smoothing=config.label_smoothing)
        return loss + config.penalty_weight * penalty, torch.stack([loss, penalty]).detach()


class LyapunovObjective(Objective):
    """Cross-entropy ``E`` at the end, and the mean of ``relu(dE/dt + rate E)`` over the trajectory."""

    metrics = ("loss", "penalty")
    model: FlowClassifier

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        net, config = self.model, self.config
        states = net.trajectory(inputs)
        visited, target = states[:-1].flatten(0, 1), labels.repeat(len(states) - 1)

        def energy(x: Tensor) -> Tensor:
            return F.cross_entropy(net.head(x), target, reduction="none")

        found = torch.func.jvp(energy, (visited,), (net.vector_field(visited),))
        penalty = (found[1] + config.rate * found[0]).relu().mean()
        loss = F.cross_entropy(net.head(states[-1]), labels, label_smoothing=config.label_smoothing)
        return loss + config.penalty_weight * penalty, torch.stack([loss, penalty]).detach()


def noisy(images: Tensor, largest: float) -> Tensor:
    """Gaussian noise on every image, of a sigma of its own, uniform from 0 to ``largest``; not clipped."""
    sigma = largest * torch.rand((len(images), 1, 1, 1), dtype=images.dtype, device=images.device)
    return images + sigma * torch.randn_like(images)


def with_jacobian_penalty(model: Model, images: Tensor, rate: float) -> tuple[Tensor, Tensor]:
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
