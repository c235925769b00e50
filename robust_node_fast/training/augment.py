"""Augmentation of whole batches: crops, flips and holes that follow from seed, epoch and the number of the image.

Every image has a row of random numbers of its own in every epoch, drawn ahead. What becomes of an image is therefore
the same whatever batch it is in, however many processes share the batch, and wherever a run is resumed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AUGMENTATIONS", "PADDING", "augment", "draw"]

AUGMENTATIONS = ("none", "crop", "crop-flip", "crop-flip-cutout")
PADDING = 4


def draw(n: int, *, seed: int, epoch: int) -> Tensor:
    """The random numbers of ``n`` images in an epoch: ``(n, 5)`` float64 in [0, 1). More images: the same, and more."""
    # 2^40 on top: the order of the images is drawn from the generator without it.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + 2**40)
    return torch.rand(n, 5, generator=generator, dtype=torch.float64)


def augment(images: Tensor, draws: Tensor, *, flip: bool = True, cutout: bool = False) -> Tensor:
    """Each image shifted by up to ``PADDING`` pixels, black moving in, and every second one mirrored.

    Args:
        images: ``(B, C, S, S)``, uint8 or floating-point.
        draws: their rows of ``draw``'s table, ``(B, 5)``.
        flip: mirror; a mirrored digit is none.
        cutout: also blacken a square of half the image's side, its centre anywhere in the image.

    Returns:
        Images of the same shape and dtype, in channels_last.

    Source: arXiv 1512.03385, section 4.2; for ``cutout`` arXiv 1708.04552.
    """
    size = images.shape[-1]
    steps = torch.arange(size, device=images.device)
    top, left = ((2 * PADDING + 1) * draws[:, :2]).long().unbind(1)
    mirrored = (draws[:, 2, None] >= 0.5) & flip
    columns = torch.where(mirrored, size - 1 - steps, steps)
    padded = F.pad(images, (PADDING,) * 4)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # Indices on both sides of a slice: their dimensions come first, (B, S, S, C), which is channels_last.
    result = padded[batch, :, (top[:, None] + steps)[:, :, None], (left[:, None] + columns)[:, None, :]]
    if cutout:
        side = size // 2
        first = (size * draws[:, 3:]).long() - side // 2
        hole = (steps >= first[..., None]) & (steps < first[..., None] + side)  # (B, 2, S)
        result = result.masked_fill((hole[:, 0, :, None] & hole[:, 1, None, :])[..., None], 0)
    return result.permute(0, 3, 1, 2)
