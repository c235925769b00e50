"""Random corruptions of images ``(B, C, H, W)``, drawn from a generator on the CPU: the same noise on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_node_fast import _checks

__all__ = ["gaussian", "salt_and_pepper"]


def gaussian(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """``images + sigma * n`` with ``n`` standard normal; not clipped, as in the paper.

    Raises:
        TypeError, ValueError: ``sigma`` is not a finite number >= 0.
    """
    _checks.number("sigma", sigma)
    if sigma < 0:
        raise ValueError(f"sigma={sigma!r} is negative, expected a standard deviation >= 0")
    return images + sigma * torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)


def salt_and_pepper(images: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Every pixel, all its channels together, becomes 0 or 1 with probability ``fraction / 2`` each.

    Raises:
        TypeError, ValueError: ``fraction`` is not a number in [0, 1].
    """
    _checks.number("fraction", fraction)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction!r} is no probability, expected a number in [0, 1]")
    draw = torch.rand((len(images), 1, *images.shape[2:]), generator=generator).to(images.device)
    return images.masked_fill(draw < fraction / 2, 0.0).masked_fill(draw >= 1 - fraction / 2, 1.0)
