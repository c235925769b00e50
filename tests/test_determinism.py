"""Contract of reproducibility: the same bits in every run and for every number of threads, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_finite, gradients, needs_kernels, random_filters, random_state
from torch import Tensor

from robust_node_fast import _ops, functional

# needs_kernels: what the reference runs on, PyTorch's convolution, splits its weight gradient by threads.


def flow(shared: bool, trajectory: bool, recompute: bool = True) -> Any:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.euler_conv_flow(
            input,
            weight,
            bias,
            step_size=0.1,
            n_steps=3 if shared else None,
            return_trajectory=trajectory,
            recompute=recompute,
        )

    return call


def same_bits(runs: list[list[Tensor]]) -> None:
    assert_finite(*runs[0])
    for other in runs[1:]:
        for mine, first in zip(other, runs[0], strict=True):
            assert torch.equal(mine, first)


@needs_kernels
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 16, 17])
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "layout", "dtype", "shared", "trajectory"),
    [
        (8, 28, 3, "contiguous", torch.float32, False, False),
        (8, 28, 3, "channels_last", torch.float32, False, True),
        (32, 32, 3, "contiguous", torch.float32, False, False),
        (20, 24, 5, "contiguous", torch.float32, True, False),
        (16, 30, 1, "channels_last", torch.float32, False, False),
        (8, 20, 3, "contiguous", torch.float64, True, True),
        (8, 20, 3, "contiguous", torch.bfloat16, False, False),
        (32, 20, 3, "contiguous", torch.bfloat16, False, False),
        (8, 20, 3, "contiguous", torch.float16, False, False),
    ],
)
@pytest.mark.parametrize("recompute", [True, False])
def test_flow_for_any_number_of_threads(
    batch: int,
    channels: int,
    size: int,
    kernel: int,
    layout: str,
    dtype: torch.dtype,
    shared: bool,
    trajectory: bool,
    recompute: bool,
) -> None:
    input = random_state((batch, channels, size, size), layout, dtype)
    weight, bias = random_filters(channels, kernel, None if shared else 3, True, dtype)
    grad_output = torch.randn(*((4,) if trajectory else ()), batch, channels, size, size).to(dtype)
    runs = []
    for threads in (1, 2, 4, 3, 2):
        torch.set_num_threads(threads)
        runs.append(gradients(flow(shared, trajectory, recompute), [input, weight, bias], grad_output))
    same_bits(runs)


@needs_kernels
@pytest.mark.parametrize("batch", range(1, 18))
@pytest.mark.parametrize(
    ("channels", "size"), [(2, 28), (8, 28), (9, 6), (16, 11), (33, 6)]
)  # direct, and Winograd in packs of samples
def test_a_sample_does_not_depend_on_its_batch(channels: int, size: int, batch: int) -> None:
    """Forward and input gradient of every sample are those of a batch of one."""
    torch.set_num_threads(2)
    shape = (batch, channels, size, size)
    input, grad_output = random_state(shape), random_state(shape)
    weight, bias = random_filters(channels, 3, 3, True)
    result, grad_input, *_ = gradients(flow(False, False), [input, weight, bias], grad_output)
    for i in {0, batch // 2, batch - 1}:
        alone = gradients(flow(False, False), [input[i : i + 1], weight, bias], grad_output[i : i + 1])
        assert torch.equal(alone[0][0], result[i])
        assert torch.equal(alone[1][0], grad_input[i])


@needs_kernels
def test_activation_and_penalty_for_any_number_of_threads() -> None:
    input, weight = torch.randn(300_001), random_filters(64, 3, 6, False)[0]
    runs = []
    for threads in (1, 2, 4, 1):
        torch.set_num_threads(threads)
        activation = gradients(functional.smooth_leaky_relu, [input], torch.ones_like(input))
        penalty = gradients(lambda w: functional.contraction_penalty(w, rate=2.0), [weight], torch.tensor(1.0))
        runs.append([*activation, *penalty])
    same_bits(runs)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 37, 900])
@pytest.mark.parametrize("op", [_ops.softplus_increment, _ops.softplus_increment_and_tangent])
def test_increment_for_any_number_of_threads(op: Any, rows: int) -> None:
    input, anchor, grad_output = torch.randn(2, rows, 66), torch.randn(2, rows, 1), torch.randn(2, rows, 66)
    runs = []
    for threads in (1, 2, 4, 3, 1):
        torch.set_num_threads(threads)
        runs.append(gradients(op, [input, anchor], grad_output))
    same_bits(runs)


@pytest.mark.parametrize("trajectory", [False, True])
def test_from_run_to_run(trajectory: bool) -> None:
    input, (weight, bias) = random_state((9, 8, 28, 28)), random_filters(8, 3, 3, True)
    grad_output = torch.randn(*((4,) if trajectory else ()), 9, 8, 28, 28)
    same_bits([gradients(flow(False, trajectory), [input, weight, bias], grad_output) for _ in range(4)])
