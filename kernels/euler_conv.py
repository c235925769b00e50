"""Triton kernels of the Euler step ``z + h s(conv(z) + b)`` and its gradients: convolutions as matrix products.

The matrices are never built. Rows of the product are the pixels of the whole batch, columns the output channels; the
sum runs over filter taps and input channels. Any strides, any number of channels, any odd filter. Filters come packed:
``(taps, C_in, C_out)``.
States, gradients and filters have one dtype, sums are in float32. The oracle is ``robust_node_fast.reference``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robust_node_fast.kernels.activation import activation


@triton.jit
def block_of_program(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of this program's block. Groups of GROUP row blocks share their pixels and filters in L2."""
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP * blocks_n)
    size = tl.minimum(blocks_m - group * GROUP, GROUP)
    inside = program % (GROUP * blocks_n)
    return (group * GROUP + inside % size) * BLOCK_M, (inside // size) * BLOCK_N


@triton.jit
def pixel_of(index, H, W):
    """Sample, row and column of the pixels of a batch."""
    return index // (H * W), index // W % H, index % W


@triton.jit
def places(b, y, x, channels, batch, channel, line, column):
    """Where a block of pixels (rows) and channels (columns) lies. Only the sample's offset can exceed 32 bits."""
    return (b.to(tl.int64) * batch + y * line + x * column)[:, None] + (channels * channel)[None, :]


@triton.jit
def convolve(
    input, filters, rows, columns, B, C, H, W, batch, channel, line, column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    KERNEL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sums of a block: ``sum over tap, c of input[pixel + tap, c] filters[tap, c, o]``, in float32."""
    b, y, x = pixel_of(rows, H, W)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    inside = rows < B * H * W
    blocks_k = tl.cdiv(C, BLOCK_K)
    for step in range(KERNEL * KERNEL * blocks_k):
        tap = step // blocks_k
        c = step % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
        i = y + tap // KERNEL - KERNEL // 2
        j = x + tap % KERNEL - KERNEL // 2
        valid = inside & (i >= 0) & (i < H) & (j >= 0) & (j < W)
        values = tl.load(
            input + places(b, i, j, c, batch, channel, line, column),
            mask=valid[:, None] & (c < C)[None, :],
            other=0.0,
        )
        weights = tl.load(
            filters + ((tap * C + c) * C)[:, None] + columns[None, :],
            mask=(c < C)[:, None] & (columns < C)[None, :],
            other=0.0,
        )
        if WIDEN:  # the interpreter multiplies bfloat16 wrongly
            values, weights = values.to(tl.float32), weights.to(tl.float32)
        sums = tl.dot(values, weights, sums, input_precision=PRECISION)
    return sums


@triton.jit
def finish_step(u, rows, columns, pointers, sizes, strides, step_size, negative_slope):
    """What an Euler step does with the sums of its convolution."""
    input, bias, output, slopes = pointers
    B, C, H, W = sizes
    of_input, of_output, of_slopes = strides
    if bias is not None:
        u += tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    value, slope = activation(u, negative_slope)
    b, y, x = pixel_of(rows, H, W)
    mask = (rows < B * H * W)[:, None] & (columns < C)[None, :]
    if slopes is not None:  # first, so that their registers are free for the state
        target = slopes + places(b, y, x, columns, of_slopes[0], of_slopes[1], of_slopes[2], of_slopes[3])
        tl.store(target, (step_size * slope).to(slopes.dtype.element_ty), mask=mask)
    source = input + places(b, y, x, columns, of_input[0], of_input[1], of_input[2], of_input[3])
    state = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    target = output + places(b, y, x, columns, of_output[0], of_output[1], of_output[2], of_output[3])
    tl.store(target, (state + step_size * value).to(output.dtype.element_ty), mask=mask)


@triton.jit
def finish_halves(u, rows, first_column, pointers, sizes, strides, step_size, negative_slope):
    """The same for one half of the channels after the other: together they would not fit into the registers."""
    HALF: tl.constexpr = u.shape[1] // 2
    left, right = u.reshape(u.shape[0], 2, HALF).permute(0, 2, 1).split()
    columns = first_column + tl.arange(0, HALF)
    finish_step(left, rows, columns, pointers, sizes, strides, step_size, negative_slope)
    finish_step(right, rows, columns + HALF, pointers, sizes, strides, step_size, negative_slope)


@triton.jit
def euler_step(
    input, filters, bias, output, slopes, step_size, negative_slope, B, C, H, W,
    in_batch, in_channel, in_line, in_column, out_batch, out_channel, out_line, out_column,
    slope_batch, slope_channel, slope_line, slope_column,
    KERNEL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``output = input + h s(u)`` and ``slopes = h s'(u)`` with ``u = conv(input) + bias``.

    ``bias`` and ``slopes`` may be None.
    """
    first_row, first_column = block_of_program(B * H * W, C, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    u = convolve(
        input, filters, rows, columns, B, C, H, W, in_batch, in_channel, in_line, in_column,
        BLOCK_M, BLOCK_N, BLOCK_K, KERNEL, PRECISION, WIDEN,
    )  # fmt: skip
    pointers, sizes = (input, bias, output, slopes), (B, C, H, W)
    strides = (
        (in_batch, in_channel, in_line, in_column),
        (out_batch, out_channel, out_line, out_column),
        (slope_batch, slope_channel, slope_line, slope_column),
    )
    if BLOCK_M * BLOCK_N < 128 * 128:
        finish_step(u, rows, columns, pointers, sizes, strides, step_size, negative_slope)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = u.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        finish_halves(left, rows, first_column, pointers, sizes, strides, step_size, negative_slope)
        finish_halves(right, rows, first_column + HALF, pointers, sizes, strides, step_size, negative_slope)


@triton.jit
def gradient_step(
    v, filters, grad, extra, slopes, grad_below, v_below, B, C, H, W,
    batch, channel, line, column, below_batch, below_channel, below_line, below_column,
    KERNEL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``grad_below = grad + conv'(v) + extra`` with flipped, transposed filters; ``v_below = slopes * grad_below``.

    ``slopes`` are those of the step below, whose gradient is next, and None for the first step; ``extra`` is what a
    trajectory's state gets from outside, or None. Only ``grad_below`` has strides of its own.
    """
    first_row, first_column = block_of_program(B * H * W, C, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    sums = convolve(
        v, filters, rows, columns, B, C, H, W, batch, channel, line, column,
        BLOCK_M, BLOCK_N, BLOCK_K, KERNEL, PRECISION, WIDEN,
    )  # fmt: skip
    b, y, x = pixel_of(rows, H, W)
    mask = (rows < B * H * W)[:, None] & (columns < C)[None, :]
    at = places(b, y, x, columns, batch, channel, line, column)
    total = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) + sums
    if extra is not None:
        total += tl.load(extra + at, mask=mask, other=0.0).to(tl.float32)
    target = grad_below + places(b, y, x, columns, below_batch, below_channel, below_line, below_column)
    tl.store(target, total.to(grad_below.dtype.element_ty), mask=mask)
    if slopes is not None:
        slope = tl.load(slopes + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(v_below + at, (slope * total).to(v_below.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient(
    state, v, grad_weight, grad_bias, B, C, H, W, pixels_per_split,
    state_batch, state_channel, state_line, state_column, batch, channel, line, column,
    ATOMIC: tl.constexpr, KERNEL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``grad_weight[split, tap, c, o] = sum over the split's pixels of state[pixel + tap, c] v[pixel, o]``, in float32.

    ``grad_bias[split, o]``, which may be None, is the sum of ``v``. With ATOMIC all splits add to the first one, in
    any order.
    """
    blocks_c, blocks_o = tl.cdiv(C, BLOCK_M), tl.cdiv(C, BLOCK_N)
    program, split = tl.program_id(0), tl.program_id(1)
    tap = program // (blocks_c * blocks_o)
    c = program // blocks_o % blocks_c * BLOCK_M + tl.arange(0, BLOCK_M)
    o = program % blocks_o * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    end = tl.minimum((split + 1) * pixels_per_split, B * H * W)
    for first in range(split * pixels_per_split, end, BLOCK_K):
        index = first + tl.arange(0, BLOCK_K)
        b, y, x = pixel_of(index, H, W)
        i = y + tap // KERNEL - KERNEL // 2
        j = x + tap % KERNEL - KERNEL // 2
        inside = index < end
        valid = inside & (i >= 0) & (i < H) & (j >= 0) & (j < W)
        values = tl.load(
            state + places(b, i, j, c, state_batch, state_channel, state_line, state_column),
            mask=valid[:, None] & (c < C)[None, :],
            other=0.0,
        )
        gradients = tl.load(
            v + places(b, y, x, o, batch, channel, line, column), mask=inside[:, None] & (o < C)[None, :], other=0.0
        )
        if WIDEN:  # the interpreter multiplies bfloat16 wrongly
            values, gradients = values.to(tl.float32), gradients.to(tl.float32)
        sums = tl.dot(tl.trans(values), gradients, sums, input_precision=PRECISION)
        if grad_bias is not None:
            total += tl.sum(gradients.to(tl.float32), axis=0)
    at = ((tap * C + c) * C)[:, None] + o[None, :]
    mask = (c < C)[:, None] & (o < C)[None, :]
    of_bias = (o < C) & (program < blocks_o)  # the programs of the first tap and channels add up the bias
    if ATOMIC:
        tl.atomic_add(grad_weight + at, sums, mask=mask, sem="relaxed")
        if grad_bias is not None:
            tl.atomic_add(grad_bias + o, total, mask=of_bias, sem="relaxed")
    else:
        tl.store(grad_weight + split.to(tl.int64) * KERNEL * KERNEL * C * C + at, sums, mask=mask)
        if grad_bias is not None:
            tl.store(grad_bias + split * C + o, total, mask=of_bias)
