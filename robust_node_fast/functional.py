"""The public functions. Each checks its arguments and calls one op of ``_ops.py``; nothing is decided here.

Under ``torch.func`` transforms (vmap, grad, jvp, ...) and forward-mode differentiation the reference decomposition runs
instead: its pieces have rules for all of them, the fused kernels do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from robust_node_fast import _checks, _ops, reference

__all__ = [
    "activated_conv_bound",
    "contraction_penalty",
    "contraction_rate",
    "euler_conv_flow",
    "euler_conv_flow_bound",
    "euler_conv_step",
    "euler_lipschitz_bound",
    "smooth_leaky_relu",
]


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def smooth_leaky_relu(input: Tensor, negative_slope: float = 0.1) -> Tensor:
    """``negative_slope * input + (1 - negative_slope) * log(1 + exp(input))``, element by element.

    The slope is ``negative_slope + (1 - negative_slope) * sigmoid(input)``; the result is finite wherever the input
    is, also beyond 88, where ``exp`` overflows float32.

    Args:
        input: any shape and layout, float16, bfloat16, float32 or float64, any device.
        negative_slope: slope at minus infinity, ``a`` in the paper.

    Returns:
        A tensor like ``input``.

    Raises:
        TypeError, ValueError: ``input`` is not a floating-point tensor; ``negative_slope`` is not a finite float.

    Source: arXiv 2508.11432, section III (smooth leaky ReLU, slope-restricted in ``[a, 1]``).
    """
    _checks.tensor("input", input)
    _checks.number("negative_slope", negative_slope)
    if _transformed():
        return reference.smooth_leaky_relu(input, negative_slope)
    return _ops.smooth_leaky_relu(input, negative_slope)


def euler_conv_step(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, step_size: float, negative_slope: float = 0.1
) -> Tensor:
    """``input + step_size * smooth_leaky_relu(conv2d(input, weight, bias, padding="same"), negative_slope)``.

    Args:
        input: ``(B, C, H, W)``, contiguous or channels_last (kept in the result); other strides give a contiguous one.
        weight: ``(C, C, k, k)``, ``k`` odd; dtype and device as ``input`` (under autocast dtypes may differ).
        bias: ``(C,)`` or ``None``.
        step_size: Euler step ``h``.
        negative_slope: of the activation.

    Returns:
        ``(B, C, H, W)``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: arXiv 2508.11432, forward Euler discretisation of the convolutional Neural ODE.
    """
    _checks.flow(input, weight, bias, (4,), step_size, negative_slope)
    if _transformed():
        return reference.euler_conv_step(input, weight, bias, step_size=step_size, negative_slope=negative_slope)
    if _differentiable(input, weight, bias):
        return _ops.euler_conv_flow_saving(input, weight, bias, step_size, negative_slope, 1, False)[0]
    return _ops.euler_conv_step(input, weight, bias, step_size, negative_slope)


def euler_conv_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    step_size: float,
    negative_slope: float = 0.1,
    n_steps: int | None = None,
    return_trajectory: bool = False,
    recompute: bool | None = None,
) -> Tensor:
    """``for k in range(N): input = euler_conv_step(input, weight[k], bias[k], ...)`` in one fused call.

    The gradients are the exact gradients of the discrete network (no adjoint ODE). By default only ``input``,
    ``weight`` and ``bias`` are saved for backward, however many steps there are, and states are recomputed in cache (by
    the Triton kernels in device memory, those of all steps at once); of a single step, its slopes ``(B, C, H, W)`` are
    saved too.

    Args:
        input: ``(B, C, H, W)``, contiguous or channels_last (kept in the result); other strides give a contiguous one.
        weight: ``(N, C, C, k, k)``, one filter bank per step; or ``(C, C, k, k)`` with ``n_steps``, shared. ``k`` odd.
        bias: ``(N, C)``, or ``(C,)`` when shared, or ``None``.
        step_size: Euler step ``h``.
        negative_slope: of the activation.
        n_steps: number of steps for shared weights; must be left out otherwise.
        return_trajectory: return all states ``(N + 1, B, C, H, W)``, the input first, instead of the last one.
        recompute: if false, save each step's slopes ``(N, B, C, H, W)`` for backward, and its states too when
            ``weight`` requires a gradient: the same gradients (in bfloat16 but for rounding) for more memory; faster
            with many channels and a small batch, slower otherwise. By default true for more than one step. A
            trajectory is always recomputed.

    Returns:
        ``(B, C, H, W)`` or the trajectory.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: arXiv 2508.11432, forward Euler discretisation with time-varying weights.
    """
    _checks.flow(input, weight, bias, (4, 5), step_size, negative_slope)
    _checks.steps(weight, n_steps)
    if _transformed():
        return reference.euler_conv_flow(
            input,
            weight,
            bias,
            step_size=step_size,
            negative_slope=negative_slope,
            n_steps=n_steps,
            return_trajectory=return_trajectory,
        )
    steps = weight.shape[0] if n_steps is None else n_steps
    saves = steps == 1 if recompute is None else not recompute
    if saves and not return_trajectory and _differentiable(input, weight, bias):
        save_states = weight.requires_grad and steps > 1  # the first state is the input
        return _ops.euler_conv_flow_saving(input, weight, bias, step_size, negative_slope, steps, save_states)[0]
    return _ops.euler_conv_flow(
        input,
        weight,
        bias,
        step_size,
        negative_slope,
        steps,
        return_trajectory,
    )


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_radius(input: Tensor, radius: Tensor) -> None:
    _checks.tensor("radius", radius)
    if input.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"input has dtype {input.dtype}, expected float32 or float64")
    if radius.shape != input.shape:
        raise ValueError(f"radius has shape {tuple(radius.shape)}, expected {tuple(input.shape)} as input")
    _checks.same_kind("radius", radius, input)
    seen = not torch.compiler.is_compiling() and not _transformed()  # else there is no value to look at
    seen = seen and not (input.is_cuda and torch.cuda.is_current_stream_capturing())  # nor one that could be waited for
    if seen and radius.numel() and bool(radius.amin() < 0):
        raise ValueError("radius has negative numbers, expected a radius >= 0")


def activated_conv_bound(
    input: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None = None, *, negative_slope: float = 0.1
) -> tuple[Tensor, Tensor]:
    """``f = smooth_leaky_relu(conv2d(input, weight, bias, padding="same"))``: a box that it stays in.

    As ``euler_conv_flow_bound`` for a network's first layer: ``|f(x) - z| <= r`` wherever ``|x - input| <= radius``, in
    exact arithmetic. ``u = W x + b`` changes by at most ``change = |W| radius``, so where the activation grows the ends
    are ``s(u - change)`` and ``s(u + change)``, and ``z`` is the middle; with a negative slope ``z = s(u)`` and ``r``
    is the largest slope times ``change``.

    Args:
        input, radius: ``(B, C, H, W)`` float32 or float64, any layout; ``radius`` not negative.
        weight: ``(D, C, k, k)``, ``k`` odd.
        bias: ``(D,)`` or ``None``.
        negative_slope: of the activation.

    Returns:
        ``z`` and ``r``, both ``(B, D, H, W)``, contiguous. Differentiable, by way of the reference.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: interval bounds, arXiv 1810.12715.
    """
    _checks.tensor("input", input)
    _checks.tensor("weight", weight)
    _checks.number("negative_slope", negative_slope)
    if input.dim() != 4:
        raise ValueError(f"input has shape {tuple(input.shape)}, expected (B, C, H, W)")
    shape = tuple(weight.shape)
    if weight.dim() != 4 or shape[1] != input.shape[1] or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"weight has shape {shape}, expected (D, {input.shape[1]}, k, k) with one odd kernel size k")
    _checks.same_kind("weight", weight, input)
    if bias is not None:
        _checks.tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {shape[:1]} for weight {shape}")
        _checks.same_kind("bias", bias, input)
    _check_radius(input, radius)
    bound = reference.activated_conv_bound if _transformed() else _ops.activated_conv_bound
    return bound(input, radius, weight, bias, negative_slope)


def euler_conv_flow_bound(
    input: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    step_size: float,
    negative_slope: float = 0.1,
    n_steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Bound E: ``z`` and ``r`` with ``|euler_conv_flow(x) - z| <= r`` wherever ``|x - input| <= radius``.

    Both for the flow in exact arithmetic: ``r`` covers the rounding of ``z`` as well.

    The box is carried from step to step, with the centre tap ``m`` of a channel, ``u`` the convolution of the centre,
    ``change = conv2d(r, |weight|)`` and ``t = s'(u)``::

        gap = max(s(u + change) - s(u) - t change, s(u - change) - s(u) + t change)    (a > 1: min)
        z <- z + h s(u) + h gap / 2
        r <- |1 + h t m| r + |h t| (change - |m| r) + |h gap| / 2

    Proof of a step, for a state x in the box: ``u' - u = W (x - z)``, at most ``change``. s is convex (``a <= 1``, else
    concave), so between ``u -+ change`` it lies on one side of its tangent at ``u``, and is farthest from it at an end:
    ``s(u') = s(u) + t (u' - u) + d`` with ``d`` between 0 and ``gap``. So ``x - z`` becomes ``(1 + h t m) (x - z)``,
    plus ``h t`` times the other taps' part of ``u' - u``, at most ``change - |m| r``, plus ``h d``, which is within
    ``|h gap| / 2`` of ``h gap / 2``.

    Args:
        input: ``(B, C, H, W)`` float32 or float64, any layout.
        radius: ``(B, C, H, W)``, not negative.
        weight, bias, step_size, negative_slope, n_steps: as in ``euler_conv_flow``.

    Returns:
        ``z`` and ``r``, both in the layout that ``euler_conv_flow`` gives. Differentiable, by way of the reference.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: derived for this project; one linear bound for each number, as in arXiv 1811.00866 for networks.
    """
    _checks.flow(input, weight, bias, (4, 5), step_size, negative_slope)
    _checks.steps(weight, n_steps)
    _check_radius(input, radius)
    steps = weight.shape[0] if n_steps is None else n_steps
    bound = reference.euler_conv_flow_bound if _transformed() else _ops.euler_conv_flow_bound
    return bound(input, radius, weight, bias, step_size, negative_slope, steps)


def contraction_penalty(
    weight: Tensor | Sequence[Tensor],
    *,
    rate: float,
    slope: tuple[float, float] = (0.1, 1.0),
    norm: str = "2",
    reduction: str = "sum",
) -> Tensor:
    """Hinge that is zero exactly when every step contracts at ``rate`` by the Gershgorin condition of ``norm``.

    With centre tap ``m_d``, off-centre row sum ``r_d`` and column sum ``q_d`` of absolute values and slopes ``a, b``,
    per channel ``d`` the positive part of

    - ``"2"``: ``rate + 2 (a + b) m_d + b (2 |m_d| + r_d + q_d)`` (the paper's; 2-norm rate ``rate / 2``)
    - ``"2-sharp"``: ``rate + max_{t in {a, b}} t (2 m_d + r_d) + b q_d`` (the same guarantee, weaker demand)
    - ``"inf"``: ``rate / 2 + a (m_d + r_d)`` (matrix measure of the infinity norm at most ``-rate / 2``)
    - ``"1"``: ``rate / 2 + a m_d + b q_d`` (matrix measure of the 1-norm at most ``-rate / 2``)

    It is a statement about the differential equation; see ``euler_lipschitz_bound`` for the discrete network.

    Args:
        weight: ``(C, C, k, k)``, ``(N, C, C, k, k)``, or a sequence of ``(C_i, C_i, k, k)``; ``k`` odd.
        rate: wanted contraction rate ``rho``, in 1 / (unit of time).
        slope: smallest and largest slope ``(a, b)`` of the activation.
        norm: one of the four above.
        reduction: ``"sum"`` or ``"mean"`` over steps and channels, or ``"none"``: ``(C,)``, ``(N, C)``, or for a
            sequence all channels in one row.

    Returns:
        A tensor of the weight's dtype. Sub-gradients as in PyTorch: 0 at ``|0|`` and at ``relu(0)``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: arXiv 2508.11432, Theorem 1, Lemma 1 and Eq. (14) for ``"2"``; the other three are this project's.
    """
    _checks.number("rate", rate)
    _checks.slope(slope)
    _checks.choice("norm", norm, _checks.NORMS)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if isinstance(weight, Tensor):
        _checks.filters(weight, (4, 5))
        if _transformed() or not weight.numel():  # no filters at all: no kernel is launched for them
            return reference.contraction_penalty(weight, rate=rate, slope=slope, norm=norm, reduction=reduction)
        return _ops.contraction_penalty(weight, rate, slope[0], slope[1], norm, reduction)
    if not isinstance(weight, Sequence):
        raise TypeError(f"weight is a {type(weight).__name__}, expected a torch.Tensor or a sequence of them")
    if not weight:
        raise ValueError("weight is an empty sequence, expected at least one (C, C, k, k)")
    for bank in weight:
        _checks.filters(bank, (4,))
    each = [contraction_penalty(bank, rate=rate, slope=slope, norm=norm, reduction="none") for bank in weight]
    excess = torch.cat(each)
    if reduction == "none":
        return excess
    return excess.mean() if reduction == "mean" else excess.sum()


def contraction_rate(weight: Tensor, *, slope: tuple[float, float] = (0.1, 1.0), norm: str = "2") -> Tensor:
    """``max {rate : contraction_penalty(weight[k], rate=rate, norm=norm) == 0}`` for every step ``k``.

    Args:
        weight: ``(C, C, k, k)`` or ``(N, C, C, k, k)``, ``k`` odd.
        slope: smallest and largest slope ``(a, b)`` of the activation.
        norm: as in ``contraction_penalty``.

    Returns:
        ``()`` or ``(N,)``. Negative: the condition holds for no positive rate (the value is then not a growth bound).

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: arXiv 2508.11432, Theorem 1, solved for the rate.
    """
    _checks.filters(weight, (4, 5))
    _checks.slope(slope)
    _checks.choice("norm", norm, _checks.NORMS)
    return reference.contraction_rate(weight, slope=slope, norm=norm)


def euler_lipschitz_bound(
    weight: Tensor, *, step_size: float, slope: tuple[float, float] = (0.1, 1.0), p: str = "inf"
) -> Tensor:
    """Upper bound of the Lipschitz constant of each Euler step in the p-norm, sound for the discrete network.

    - ``p="inf"``: ``max_d max_{t in {a, b}} |1 + h t m_d| + |h t| r_d``
    - ``p="1"``: ``max_d max_{t in {a, b}} |1 + h t m_d| + |h| max(|a|, |b|) q_d``
    - ``p="2"``: the geometric mean of the two (``||M||_2 <= sqrt(||M||_1 ||M||_inf)``)

    Args:
        weight: ``(C, C, k, k)`` or ``(N, C, C, k, k)``, ``k`` odd; use float64 for a certificate.
        step_size: Euler step ``h`` of the deployed network.
        slope: smallest and largest slope ``(a, b)`` of the activation, negative ones too.
        p: ``"inf"``, ``"1"`` or ``"2"``.

    Returns:
        ``()`` or ``(N,)``; the product over steps bounds the flow.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: derived for this project (row and column sums of ``I + h D W``).
    """
    _checks.filters(weight, (4, 5))
    _checks.number("step_size", step_size)
    _checks.slope(slope, rising=False)
    _checks.choice("p", p, _checks.DUALS)
    return reference.euler_lipschitz_bound(weight, step_size=step_size, slope=slope, p=p)
