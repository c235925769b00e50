"""Gradient attacks on images in [0, 1], in the l_inf or the l_2 ball around each.

Gradients go through the discrete Euler steps and only to the input: while an attack runs, no parameter requires a
gradient, so that the fused backward skips the weights. An attack on one model is a transfer attack on any other: what
``pgd(source, images, labels, ...)`` gives, another network can be asked to classify, at the end or on the way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.robustness import _inputs

__all__ = ["LOSSES", "fgsm", "margin", "pgd"]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{j != y} f_j - f_y``, ``(B,)``: positive where another class wins (Carlini & Wagner, arXiv 1608.04644)."""
    right = labels[:, None]
    return logits.scatter(1, right, -torch.inf).max(1).values - logits.gather(1, right)[:, 0]


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """``s = log sum_{j != y} exp(f_j) - f_y``, ``(B,)``: the cross-entropy is ``log(1 + exp(s))``.

    Both rise in the same direction. But in float32 the cross-entropy's own gradient, ``sigmoid(s)`` times that of
    ``s``, has no ``f_y`` in it any more once ``s < -17``, and is zero a little later: attacks that climb it get weaker
    the surer a network is of itself.
    """
    right = labels[:, None]
    return logits.scatter(1, right, -torch.inf).logsumexp(1) - logits.gather(1, right)[:, 0]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": _log_odds, "margin": margin}


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, norm: str = "inf") -> Tensor:
    """One step of length ``eps`` up the cross-entropy (Goodfellow et al., arXiv 1412.6572).

    ``clip(images + eps * sign(gradient), 0, 1)``; with ``norm="2"`` ``gradient / ||gradient||_2`` for the sign.

    Args:
        model: in eval mode; images to logits ``(B, K)``.
        images: ``(B, C, H, W)`` in [0, 1].
        labels: ``(B,)`` int64.
        eps: radius of the ball, >= 0.
        norm: of the ball, ``"inf"`` or ``"2"``.

    Returns:
        ``(B, C, H, W)``, in the ball and in [0, 1].

    Raises:
        TypeError, ValueError: the model is in training mode or has weights that are not finite; ``images`` and
            ``labels`` are empty, do not fit, or are out of range; ``eps`` is negative or not finite; unknown ``norm``.
    """
    _inputs.check_radius("eps", eps)
    _checks.choice("norm", norm, _inputs.NORMS)
    with _inputs.attacked(model, images, labels):
        gradient, _ = _gradient(model, images, labels, "cross-entropy")
    return _project(images + eps * _direction(gradient, norm), images, eps, norm)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    step_size: float,
    n_steps: int = 40,
    n_restarts: int = 1,
    norm: str = "inf",
    loss: str = "cross-entropy",
    target: nn.Module | None = None,
    generator: torch.Generator,
) -> Tensor:
    """``n_steps`` gradient steps from a random start, each projected to the ball and to [0, 1].

    ``x <- clip(project(x + step_size * sign(gradient)))`` in l_inf, ``gradient / ||gradient||_2`` for the sign in l_2
    (Madry et al., arXiv 1706.06083). Per image the end is kept that fools the model, and of several that do not the
    one with the largest loss; an image that fools is not attacked again by the restarts that follow.

    With ``target``, an image takes no further step from the first iterate that fools this network: what has lost on the
    way need not lose at the end. ``target=model`` is PGD that stops; another network makes a transfer attack in which
    every iterate is tried.

    Args:
        model, images, labels, eps, norm: as in ``fgsm``.
        step_size: length of a step in ``norm``, >= 0. It decides how strong the attack is and has no default.
        n_steps, n_restarts: at least 1.
        loss: that is climbed, ``"cross-entropy"`` (by way of ``_log_odds``) or ``"margin"``.
        target: in eval mode; decides what fools. None: ``model``, and all steps are taken.
        generator: on the CPU; of the random starts, uniform in the ball.

    Returns:
        ``(B, C, H, W)``, in the ball and in [0, 1].

    Raises:
        TypeError, ValueError: as ``fgsm``, and for ``step_size``, ``n_steps``, ``n_restarts``, ``loss`` and ``target``.
    """
    _inputs.check_radius("eps", eps)
    _inputs.check_radius("step_size", step_size)
    _checks.count("n_steps", n_steps)
    _checks.count("n_restarts", n_restarts)
    _checks.choice("norm", norm, _inputs.NORMS)
    _checks.choice("loss", loss, tuple(LOSSES))
    if target is not None:
        _inputs.check_model(target, "target")

    def fools(adversarial: Tensor, right: Tensor, logits: Tensor) -> Tensor:
        """``logits`` are ``model``'s."""
        if target is not None and target is not model:
            logits = _logits(target, adversarial, right)
        return logits.argmax(1) != right

    with _inputs.attacked(model, images, labels):
        best, best_loss = images.clone(), torch.full(labels.shape, -torch.inf, device=images.device)
        fooled = torch.zeros_like(labels, dtype=torch.bool)
        for _ in range(n_restarts):
            start = (images + eps * _in_unit_ball(images, norm, generator)).clamp(0.0, 1.0)
            left = (~fooled).nonzero()[:, 0]
            if not len(left):
                break
            clean, right, adversarial = images[left], labels[left], start[left]
            climbing = torch.arange(len(left), device=images.device)
            for _ in range(n_steps):
                gradient, logits = _gradient(model, adversarial[climbing], right[climbing], loss)
                if target is not None:
                    stands = ~fools(adversarial[climbing], right[climbing], logits)
                    climbing, gradient = climbing[stands], gradient[stands]
                    if not len(climbing):
                        break
                step = step_size * _direction(gradient, norm)
                adversarial[climbing] = _project(adversarial[climbing] + step, clean[climbing], eps, norm)
            logits = _logits(model, adversarial, right)
            height = LOSSES[loss](logits, right).to(best_loss)
            fooled[left] = fools(adversarial, right, logits)
            better = fooled[left] | (height > best_loss[left])
            best[left[better]], best_loss[left[better]] = adversarial[better], height[better]
    return best


def _gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Of every image's loss to the image, ``(B, C, H, W)``, and the logits.

    Zero where none arrives, as behind a rounding: attacks then stand still, and the checks of an evaluation fail.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images)
        _inputs.check_logits(logits, labels)
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(LOSSES[loss](logits, labels).sum(), images, allow_unused=True)
    return torch.zeros_like(images) if gradient is None else gradient, logits.detach()


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = model(images)
    _inputs.check_logits(logits, labels)
    return logits


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """The steepest ascent of length 1 in the norm; no step where the gradient is zero."""
    if norm == "inf":
        return gradient.sign()
    # First by the largest entry: squares of small ones would vanish, and the length with them.
    largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
    return gradient / largest / _lengths(gradient / largest)


def _project(adversarial: Tensor, images: Tensor, eps: float, norm: str) -> Tensor:
    """To the ball, then to [0, 1]; as the images lie there, the second does not leave the ball."""
    if norm == "inf":
        return adversarial.clamp((images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0))
    change = adversarial - images
    return (images + change * (eps / _lengths(change)).clamp(max=1.0)).clamp(0.0, 1.0)


def _in_unit_ball(images: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """Uniform in the ball: in l_2 a normal vector's direction at radius ``u^(1/d)``."""
    if norm == "inf":
        return 2.0 * torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device) - 1.0
    normal = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    radius = torch.rand((len(images), 1, 1, 1), generator=generator, dtype=images.dtype) ** (1 / images[0].numel())
    return (radius * normal / _lengths(normal)).to(images.device)


def _lengths(images: Tensor) -> Tensor:
    """l_2 norms ``(B, 1, 1, 1)``, never zero: a zero divided by it stays zero."""
    lengths = torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
    return lengths.clamp(min=torch.finfo(images.dtype).tiny)
