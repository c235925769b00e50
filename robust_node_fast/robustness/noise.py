"""Random corruptions of images ``(B, C, H, W)``, drawn from a generator on the CPU: the same noise on any device.

Whether the result is clipped to [0, 1] is said in every call: it changes the accuracies, and papers differ in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust_node_fast import _checks

__all__ = ["gaussian", "salt_and_pepper", "shot", "uniform"]


def gaussian(images: Tensor, sigma: float, generator: torch.Generator, *, clip: bool) -> Tensor:
    """``images + sigma * n`` with ``n`` standard normal; the paper does not clip it.

    Raises:
        TypeError, ValueError: ``sigma`` is not a finite number >= 0.
    """
    _check_strength("sigma", sigma, "a standard deviation")
    return _clipped(images + sigma * _drawn(torch.randn, images, generator), clip)


def uniform(images: Tensor, width: float, generator: torch.Generator, *, clip: bool) -> Tensor:
    """``images + u`` with ``u`` uniform in ``[-width, width]``: a random point of the l_inf ball of that radius.

    Raises:
        TypeError, ValueError: ``width`` is not a finite number >= 0.
    """
    _check_strength("width", width, "a half-width")
    return _clipped(images + width * (2.0 * _drawn(torch.rand, images, generator) - 1.0), clip)


def shot(images: Tensor, sigma: float, generator: torch.Generator, *, clip: bool) -> Tensor:
    """``sigma^2 * Poisson(images / sigma^2)``: counted photons, ``sigma^-2`` of them on average where an image is 1.

    The mean is ``images``, the standard deviation ``sigma * sqrt(images)``; black stays black.

    Args:
        images: >= 0.

    Raises:
        TypeError, ValueError: ``sigma`` is not a finite number >= 0; a pixel is negative or NaN.
    """
    _check_strength("sigma", sigma, "a standard deviation")
    if images.numel() and not float(images.min()) >= 0.0:
        raise ValueError(f"images go down to {float(images.min())}, expected intensities >= 0")
    if sigma**2 < 1e-12:  # more photons than float64 counts well, and a noise that float32 images do not show
        return _clipped(images, clip)
    photons = torch.poisson(images.cpu().double() / sigma**2, generator)
    return _clipped((sigma**2 * photons).to(images), clip)


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


def _drawn(draw: Callable[..., Tensor], images: Tensor, generator: torch.Generator) -> Tensor:
    return draw(images.shape, generator=generator, dtype=images.dtype).to(images.device)


def _clipped(images: Tensor, clip: bool) -> Tensor:
    return images.clamp(0.0, 1.0) if clip else images


def _check_strength(name: str, value: float, what: str) -> None:
    _checks.number(name, value)
    if value < 0:
        raise ValueError(f"{name}={value!r} is negative, expected {what} >= 0")
