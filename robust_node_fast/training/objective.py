"""What a step minimises: cross-entropy, the contraction penalty, and the loss of certified training."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast.certify import worst_case_logits
from robust_node_fast.jacobian import jacobian_penalty
from robust_node_fast.models import Model
from robust_node_fast.nn import EulerConvFlow
from robust_node_fast.training.config import TrainConfig

__all__ = ["Objective", "with_jacobian_penalty"]

# The Jacobian regulariser takes so many images of a batch and so many Lanczos iterations. All 128 images and
# jacobian_penalty's 24 iterations are 48 times the work, and these are already most of a step's.
_JACOBIAN_IMAGES, _JACOBIAN_ITERATIONS = 8, 8


class Objective(nn.Module):
    """A network and the loss it is trained with, as one module: what DistributedDataParallel and torch.compile wrap."""

    def __init__(self, model: Model, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, images: Tensor, labels: Tensor, certified_share: float = 0.0) -> tuple[Tensor, Tensor]:
        """The objective, mean over the images, and ``(loss, penalty, rate)`` without gradients.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            labels: ``(B,)``.
            certified_share: how much of ``config.certified_eps`` is trained for.
        """
        config = self.config
        contractive = config.network == "contractive"
        if contractive and config.regularizer == "jacobian":
            logits, penalty = with_jacobian_penalty(self.model, images, config.penalty_rate)
        else:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.autocast):
                logits = self.model(images)
            with torch.set_grad_enabled(contractive):
                penalty = self.model.contraction_penalty(rate=config.penalty_rate, norm=config.norm)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        if config.certified_eps:
            worst = worst_case_logits(self.model, images, labels, certified_share * config.certified_eps)
            worst_loss = F.cross_entropy(worst, labels, label_smoothing=config.label_smoothing)
            loss = (1.0 - 0.5 * certified_share) * loss + 0.5 * certified_share * worst_loss
        objective = loss + config.penalty_weight * penalty if contractive else loss
        with torch.no_grad():
            rate = self.model.contraction_rate(norm=config.norm).min()
        return objective, torch.stack([loss.detach(), penalty.detach(), rate])


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
