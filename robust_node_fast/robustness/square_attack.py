"""The Square attack: a random search that only asks for logits. No gradient, so nothing that could mask one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.robustness import _inputs
from robust_node_fast.robustness.attacks import margin

__all__ = ["square"]

# Share of the pixels in the first squares, and when it is halved, out of 10,000 queries: as in the authors' code and in
# AutoAttack (section 3.2 of arXiv 1912.00049 leaves out the halving at 500).
SHARE = 0.8
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@torch.no_grad()
def square(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, n_queries: int, generator: torch.Generator
) -> Tensor:
    """Random search in the corners of the l_inf ball (Andriushchenko et al., arXiv 1912.00049, Algorithms 1 and 2).

    The start is vertical stripes of ``+-eps``. Every query sets a random square of an image, smaller and smaller ones,
    to one ``+-eps`` per channel, clips to [0, 1], and is kept where the margin ``max_{j != y} f_j - f_y`` grew. Images
    that fool the model are left alone.

    Args:
        model, images, labels, eps: as in ``attacks.fgsm``.
        n_queries: logits asked for per image at most, at least 1; the paper has 10,000, AutoAttack 5,000.
        generator: on the CPU.

    Returns:
        ``(B, C, H, W)``, in the ball and in [0, 1].

    Raises:
        TypeError, ValueError: as ``attacks.fgsm``, and for ``n_queries``.
    """
    _inputs.check_radius("eps", eps)
    _checks.count("n_queries", n_queries)
    with _inputs.attacked(model, images, labels):
        return _search(model, images, labels, eps, n_queries, generator)


def _search(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, n_queries: int, generator: torch.Generator
) -> Tensor:
    count, channels, height, width = images.shape

    def signs(*shape: int) -> Tensor:
        return (2.0 * torch.randint(2, shape, generator=generator) - 1.0).to(images)

    best = (images + eps * signs(count, channels, 1, width)).clamp(0.0, 1.0)
    logits = model(best)
    _inputs.check_logits(logits, labels)
    best_margin = margin(logits, labels)
    for query in range(1, n_queries):
        left = (best_margin <= 0).nonzero()[:, 0]
        if not len(left):
            break
        share = SHARE / 2 ** sum(10_000 * query / n_queries > limit for limit in HALVED_AT)
        side = max(1, min(round((share * height * width) ** 0.5), height, width))
        inside = _interval(height, side, len(left), generator)[:, None, :, None]
        inside = inside & _interval(width, side, len(left), generator)[:, None, None, :]
        corner = images[left] + eps * signs(len(left), channels, 1, 1)
        tried = torch.where(inside.to(images.device), corner, best[left]).clamp(0.0, 1.0)
        tried_margin = margin(model(tried), labels[left])
        better = tried_margin > best_margin[left]
        best[left[better]], best_margin[left[better]] = tried[better], tried_margin[better]
    return best


def _interval(length: int, side: int, count: int, generator: torch.Generator) -> Tensor:
    """``(count, length)`` bool: ``side`` neighbours in a random place, one interval a row."""
    first = torch.randint(length - side + 1, (count, 1), generator=generator)
    position = torch.arange(length)
    return (position >= first) & (position < first + side)
