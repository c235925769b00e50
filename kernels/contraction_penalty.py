"""Triton kernels of the Gershgorin penalty of all steps' filters and its gradient, each in one launch.

One program holds a block of channels of one step; the oracle is ``robust_node_fast.reference``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sign(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def penalty(
    weight, excess, coefficients, C, rate, a, b, scale,
    NORM: tl.constexpr, TAPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Each channel's positive part, and ``scale`` times its derivatives for centre tap, row sum and column sum.

    ``weight``: (N, C, C, TAPS); ``excess``: (N, C); ``coefficients``: (N, 3, C). NORM indexes ``_checks.NORMS``.
    """
    n = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    bank = weight + n.to(tl.int64) * C * C * TAPS
    row = tl.zeros((BLOCK_D,), dtype=tl.float32)
    column = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, C * TAPS, BLOCK_E):
        at = first + tl.arange(0, BLOCK_E)
        mask = (d < C)[:, None] & (at < C * TAPS)[None, :]
        # d's filters lie in one piece; what reads channel d, in TAPS pieces of each output's filters
        own = (d * (C * TAPS))[:, None] + at[None, :]
        readers = (at // TAPS * (C * TAPS) + at % TAPS)[None, :] + (d * TAPS)[:, None]
        row += tl.sum(tl.abs(tl.load(bank + own, mask=mask, other=0.0).to(tl.float32)), axis=1)
        column += tl.sum(tl.abs(tl.load(bank + readers, mask=mask, other=0.0).to(tl.float32)), axis=1)
    m = tl.load(bank + d * (C * TAPS) + d * TAPS + TAPS // 2, mask=d < C, other=0.0).to(tl.float32)
    r, q = row - tl.abs(m), column - tl.abs(m)
    if NORM == 0:
        argument = rate + 2 * (a + b) * m + b * (2 * tl.abs(m) + r + q)
        dm = 2 * (a + b) + 2 * b * sign(m)
        dr = b + tl.zeros_like(m)
        dq = b + tl.zeros_like(m)
    elif NORM == 1:
        argument = rate + tl.maximum(a * (2 * m + r), b * (2 * m + r), propagate_nan=tl.PropagateNan.ALL) + b * q
        dr = 0.5 * (a + b) + 0.5 * (b - a) * sign(2 * m + r)  # where the slopes tie each counts half
        dm = 2 * dr
        dq = b + tl.zeros_like(m)
    elif NORM == 2:
        argument = 0.5 * rate + a * (m + r)
        dm = a + tl.zeros_like(m)
        dr = a + tl.zeros_like(m)
        dq = tl.zeros_like(m)
    else:
        argument = 0.5 * rate + a * m + b * q
        dm = a + tl.zeros_like(m)
        dr = tl.zeros_like(m)
        dq = b + tl.zeros_like(m)
    active = (argument <= 0) == 0  # NaN counts, as in PyTorch's relu
    factor = tl.where(active, scale, 0.0)
    tl.store(excess + n * C + d, tl.where(active, argument, 0.0).to(excess.dtype.element_ty), mask=d < C)
    to = coefficients + n * 3 * C + d
    tl.store(to, (dm * factor).to(coefficients.dtype.element_ty), mask=d < C)
    tl.store(to + C, (dr * factor).to(coefficients.dtype.element_ty), mask=d < C)
    tl.store(to + 2 * C, (dq * factor).to(coefficients.dtype.element_ty), mask=d < C)


@triton.jit
def penalty_gradient(
    grad_output, weight, coefficients, grad_weight, C, PER_CHANNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``grad_weight`` of a block of output channels; ``grad_output`` is one number, or (N, C) with PER_CHANNEL."""
    n = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    bank = n.to(tl.int64) * C * C * TAPS
    slopes = coefficients + n * 3 * C
    outer = tl.load(grad_output + (n * C + d if PER_CHANNEL else d * 0), mask=d < C, other=0.0).to(tl.float32)
    dm = tl.load(slopes + d, mask=d < C, other=0.0).to(tl.float32) * outer
    dr = tl.load(slopes + C + d, mask=d < C, other=0.0).to(tl.float32) * outer
    for first in range(0, C * TAPS, BLOCK_E):
        at = first + tl.arange(0, BLOCK_E)
        e, tap = at // TAPS, at % TAPS
        mask = (d < C)[:, None] & (e < C)[None, :]
        outer_e = tl.load(grad_output + (n * C + e if PER_CHANNEL else e * 0), mask=e < C, other=0.0).to(tl.float32)
        dq = tl.load(slopes + 2 * C + e, mask=e < C, other=0.0).to(tl.float32) * outer_e
        own = bank + (d * (C * TAPS))[:, None] + at[None, :]
        w = tl.load(weight + own, mask=mask, other=0.0).to(tl.float32)
        result = sign(w) * (dr[:, None] + dq[None, :])
        result = tl.where(w == w, result, w)  # a NaN filter gives a NaN gradient
        centre = (d[:, None] == e[None, :]) & (tap == TAPS // 2)[None, :]
        result = tl.where(centre, dm[:, None] + tl.zeros_like(result), result)
        tl.store(grad_weight + own, result.to(grad_weight.dtype.element_ty), mask=mask)
