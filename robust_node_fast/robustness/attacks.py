"""White-box attacks in the l_inf ball around images in [0, 1], on the cross-entropy.

Gradients go through the discrete Euler steps and only to the input: while an attack runs, no parameter requires a
gradient, so that the fused backward skips the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast import _checks

__all__ = ["fgsm", "pgd"]


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """One step ``clip(images + eps * sign(gradient), 0, 1)`` (Goodfellow et al., arXiv 1412.6572).

    Args:
        model: in eval mode; images to logits ``(B, K)``.
        images: ``(B, C, H, W)`` in [0, 1].
        labels: ``(B,)`` int64.
        eps: radius of the ball, >= 0.

    Raises:
        TypeError, ValueError: ``eps`` is negative or not finite, or the model is in training mode.
    """
    _check_radius("eps", eps)
    with _input_gradient_only(model):
        gradient = _loss_gradient(model, images, labels)
    return (images + eps * gradient.sign()).clamp(0.0, 1.0).detach()


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    step_size: float,
    n_steps: int = 40,
    n_restarts: int = 1,
    generator: torch.Generator,
) -> Tensor:
    """``n_steps`` signed gradient steps from a random start, each projected to the ball and to [0, 1].

    Of the restarts' ends a misclassified one is kept, then that with the largest cross-entropy (Madry et al., arXiv
    1706.06083).

    Args:
        model, images, labels, eps: as in ``fgsm``.
        step_size: of a signed step, >= 0.
        n_steps, n_restarts: at least 1.
        generator: on the CPU; of the random starts, uniform in the ball.

    Raises:
        TypeError, ValueError: as ``fgsm``, and for ``step_size``, ``n_steps`` and ``n_restarts``.
    """
    _check_radius("eps", eps)
    _check_radius("step_size", step_size)
    for name, value in (("n_steps", n_steps), ("n_restarts", n_restarts)):
        if value < 1:
            raise ValueError(f"{name}={value!r} is too small, expected at least 1")
    low, high = (images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0)
    best, best_loss = images, torch.full(labels.shape, -torch.inf, device=images.device)
    best_fools = torch.zeros_like(labels, dtype=torch.bool)
    with _input_gradient_only(model):
        for _ in range(n_restarts):
            start = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
            adversarial = (images + eps * (2.0 * start - 1.0)).clamp(low, high)
            for _ in range(n_steps):
                gradient = _loss_gradient(model, adversarial, labels)
                adversarial = (adversarial + step_size * gradient.sign()).clamp(low, high)
            with torch.no_grad():
                logits = model(adversarial)
            fools, loss = logits.argmax(1) != labels, F.cross_entropy(logits, labels, reduction="none")
            better = (fools & ~best_fools) | ((fools == best_fools) & (loss > best_loss))
            best = torch.where(better[:, None, None, None], adversarial, best)
            best_loss, best_fools = torch.where(better, loss, best_loss), best_fools | fools
    return best


def _loss_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy of every image, ``(B, C, H, W)``."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        loss = F.cross_entropy(model(images), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
    return gradient


@contextmanager
def _input_gradient_only(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; what did before does again afterwards."""
    if model.training:
        raise ValueError(
            "model is in training mode, expected model.eval(): dropout and batch norm would blur the attack"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _check_radius(name: str, value: float) -> None:
    _checks.number(name, value)
    if value < 0:
        raise ValueError(f"{name}={value!r} is negative, expected a number >= 0")
