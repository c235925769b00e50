"""The numerics, before any time is taken: every provider's results against float64, with the callable that is timed.

The criterion, for each result by itself, with errors relative to its largest exact value:
``error <= 2 * error(PyTorch eager in the same dtype) + ULPS * eps``. The second term is what a Winograd convolution in
float32 may lose (8e-6); PyTorch's direct one loses less. NaN and infinity are infinitely wrong.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

import robust_node_fast as rnf

from .registry import RATE, Problem

ULPS = {"float32": 64.0, "bfloat16": 0.5}


class WrongResult(RuntimeError):
    """A provider's results are wrong: it gets no time."""


def exact(problem: Problem, mode: str, convolution_only: bool = False) -> tuple[Tensor, ...]:
    """In float64 from the workload's rounded tensors: the output, then the gradients that the mode asks for."""
    if convolution_only:
        input, weight, bias, _ = (t.double() for t in problem.tensors)
        return (F.conv2d(input, weight[0], bias[0], padding=1),)
    return _forward(problem) if mode == "forward" else _gradients(problem)[: 2 if mode == "input gradient" else None]


@lru_cache(maxsize=1)
def _forward(problem: Problem) -> tuple[Tensor, ...]:
    input, weight, bias, _ = (t.double() for t in problem.tensors)
    return (rnf.reference.euler_conv_flow(input, weight, bias, step_size=problem.work.step_size),)


@lru_cache(maxsize=1)
def _gradients(problem: Problem) -> tuple[Tensor, ...]:
    leaves = input, weight, bias, grad = [t.double().requires_grad_() for t in problem.tensors]
    if problem.work.kind == "penalty":
        value = rnf.reference.contraction_penalty(weight, rate=RATE)
        return (value.detach(), *torch.autograd.grad(value, weight))
    output = rnf.reference.euler_conv_flow(input, weight, bias, step_size=problem.work.step_size)
    return (output.detach(), *torch.autograd.grad(output, leaves[:3], grad))


def errors(found: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> tuple[float, ...]:
    """Largest error of each result, relative to its largest exact value.

    Raises:
        WrongResult: results are missing or have another shape.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (found, true)]
    if shapes[0] != shapes[1]:
        raise WrongResult(f"results of shapes {shapes[0]}, expected {shapes[1]}")
    each = [((f.double() - t).abs().max() / t.abs().max()).item() for f, t in zip(found, true, strict=True)]
    return tuple(e if e == e else float("inf") for e in each)


def check(dtype: str, found: tuple[float, ...], eager: tuple[float, ...]) -> None:
    """Judges the errors ``found``, given those of PyTorch eager.

    Raises:
        WrongResult: one of them is beyond the criterion, or not finite.
    """
    rounding = ULPS[dtype] * torch.finfo(getattr(torch, dtype)).eps
    for error, reference in zip(found, eager, strict=False):
        if not (error <= 2.0 * reference + rounding and math.isfinite(error)):
            raise WrongResult(f"error {error:.2e}, allowed {2.0 * reference + rounding:.2e}")
