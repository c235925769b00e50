"""Upper bounds of 2-norms: of matrices, and of convolutions of any image size.

A matrix, by Gram iteration: ``||A||_2 <= ||(A* A)^(2^k)||_F^(1 / 2^(k+1))``, which falls to ``||A||_2``. Power
iteration would come from below.

A convolution with zero padding is a block of the convolution of an endless plane, and one with circular padding has
some of its frequencies; a stride leaves outputs out. So its norm is at most that of the plane's, the largest
``||S(w)||_2`` over all frequencies w in two dimensions, ``S(w) = sum_t W[:, :, t] exp(i w.t)``. On a grid of N x N
frequencies it is found but for a factor: with unit vectors u, v that attain the maximum, ``Re u* S(w) v`` is a
trigonometric polynomial of degree ``d = (k - 1) / 2`` in each of both frequencies (up to a factor of modulus one), and
such a polynomial is at least ``cos(d t)`` of its maximum where a frequency is at most ``t <= pi / (2 d)`` away from it
(M. Riesz). The grid has a point within ``pi / N`` in each: the largest norm on the grid, divided by ``cos(pi d /
N)^2``, is an upper bound.

Everything is in float64, and what its sums can lose is added (``_SLACK``).

Source: Gram iteration arXiv 2305.16173; norms on a grid of frequencies arXiv 1805.10408, there of the grid alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["convolution_norm", "matrix_norm"]

_SQUARINGS = 8  # of Gram matrices: 2% above for 64 equal singular values, the worst case
_FREQUENCIES = 32  # at least 16 for each degree: at most 2% above
_SLACK = 1.0 + 1e-9


def matrix_norm(matrix: Tensor) -> Tensor:
    """At least ``||A||_2``: ``(..., m, n) -> (...)`` float64, real or complex."""
    matrix = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    largest = matrix.abs().amax((-2, -1))
    largest = torch.where(largest == 0, 1.0, largest)  # squares of what is tiny would be zero
    matrix = matrix / largest[..., None, None]
    gram = matrix.mH @ matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix @ matrix.mH
    log, power = largest.log(), 2.0
    for _ in range(_SQUARINGS):  # gram, times exp(power log), is (A* A)^(power / 2)
        size = torch.linalg.matrix_norm(gram)
        size = torch.where(size == 0, 1.0, size)
        log = log + size.log() / power
        gram = gram / size[..., None, None]
        gram, power = gram @ gram, 2.0 * power
    size = torch.linalg.matrix_norm(gram)
    return torch.where(size == 0, 0.0, (log + size.log() / power).exp() * _SLACK)


def convolution_norm(weight: Tensor) -> Tensor:
    """At least the 2-norm of the convolution, zero or circular padding, any stride: ``(..., D, C, k, l) -> (...)``."""
    height, width = weight.shape[-2:]
    degree = max(height, width) - 1 if (height * width) % 2 == 0 else (max(height, width) - 1) // 2
    count = max(_FREQUENCIES, 16 * degree)
    # Real filters: the other half of the frequencies has the complex conjugates.
    symbol = torch.fft.rfft2(weight.double(), (count, count)).movedim((-2, -1), (0, 1))
    most = matrix_norm(symbol).flatten(0, 1).amax(0)
    return most / math.cos(math.pi * degree / count) ** 2
