"""Triton kernels of the smooth leaky ReLU, element by element, and the function that the convolutions share.

The oracle is ``robust_node_fast.reference``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activation(u, negative_slope):
    """``a u + (1 - a) softplus(u)`` and its derivative, from one exponential of ``-|u|``: nothing overflows."""
    e = tl.exp(-tl.abs(u))
    one = 1.0 + e
    sigmoid = tl.where(u >= 0, 1.0, e) / one
    # log1p(e): where 1 + e rounds e away, e itself is the logarithm.
    log1p = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
    softplus = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p
    return negative_slope * u + (1.0 - negative_slope) * softplus, negative_slope + (1.0 - negative_slope) * sigmoid


@triton.jit
def smooth_leaky_relu(input, output, count, negative_slope, BLOCK: tl.constexpr):
    """``output = s(input)`` for tensors of one memory order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(input + at, mask=at < count, other=0.0).to(tl.float32)
    value, _ = activation(u, negative_slope)
    tl.store(output + at, value.to(output.dtype.element_ty), mask=at < count)


@triton.jit
def smooth_leaky_relu_backward(grad_output, input, output, count, negative_slope, BLOCK: tl.constexpr):
    """``output = grad_output s'(input)`` for tensors of one memory order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(input + at, mask=at < count, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + at, mask=at < count, other=0.0).to(tl.float32)
    _, slope = activation(u, negative_slope)
    tl.store(output + at, (grad * slope).to(output.dtype.element_ty), mask=at < count)
