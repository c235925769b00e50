"""THE contract: every op's schema, fake kernel, autograd and autocast rule in one file.

One road: ``functional`` -> these ops -> dispatcher -> the implementation that ``_backends`` picks (compiled library or
``reference``); backward is an op on the same road. The package works without any compiled library.

Shapes: B batch, C channels, N steps, k odd kernel. ``weight`` is ``(N, C, C, k, k)``, or ``(C, C, k, k)`` for shared
weights; ``n_steps`` is always given. An output that ``output_mask`` does not want is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from robust_node_fast import _backends, _layout, reference

NAMESPACE = "robust_node_fast"

_SCHEMAS = {
    "smooth_leaky_relu": "(Tensor input, float negative_slope) -> Tensor",
    "smooth_leaky_relu_backward": "(Tensor grad_output, Tensor input, float negative_slope) -> Tensor",
    "euler_conv_step": "(Tensor input, Tensor weight, Tensor? bias, float step_size, float negative_slope) -> Tensor",
    "euler_conv_step_backward": (
        "(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, float step_size, float negative_slope, "
        "bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
    ),
    "euler_conv_flow": (
        "(Tensor input, Tensor weight, Tensor? bias, float step_size, float negative_slope, SymInt n_steps, "
        "bool return_trajectory) -> Tensor"
    ),
    # Output, then for the backward op the states that enter the steps (empty unless asked for; a single step's is the
    # input) and h s'(u).
    "euler_conv_flow_saving": (
        "(Tensor input, Tensor weight, Tensor? bias, float step_size, float negative_slope, SymInt n_steps, "
        "bool save_states) -> (Tensor, Tensor, Tensor)"
    ),
    # states and slopes: what euler_conv_flow_saving saved; without them they are computed again.
    "euler_conv_flow_backward": (
        "(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, float step_size, float negative_slope, "
        "SymInt n_steps, bool return_trajectory, bool[3] output_mask, Tensor? states=None, Tensor? slopes=None) -> "
        "(Tensor, Tensor, Tensor)"
    ),
    # Centre and radius of bound E.
    "euler_conv_flow_bound": (
        "(Tensor input, Tensor radius, Tensor weight, Tensor? bias, float step_size, float negative_slope, "
        "SymInt n_steps) -> (Tensor, Tensor)"
    ),
    "activated_conv_bound": (
        "(Tensor input, Tensor radius, Tensor weight, Tensor? bias, float negative_slope) -> (Tensor, Tensor)"
    ),
    "contraction_penalty": (
        "(Tensor weight, float rate, float slope_low, float slope_high, str norm, str reduction) -> (Tensor, Tensor)"
    ),
    "contraction_penalty_backward": "(Tensor grad_output, Tensor weight, Tensor coefficients) -> Tensor",
    # (..., N) and an anchor (..., 1); `both` is (..., 2 N), deltas and then tangents. The gradients of both inputs.
    "softplus_increment": "(Tensor delta, Tensor anchor) -> Tensor",
    "softplus_increment_backward": "(Tensor grad_output, Tensor delta, Tensor anchor) -> (Tensor, Tensor)",
    "softplus_increment_and_tangent": "(Tensor both, Tensor anchor) -> Tensor",
    "softplus_increment_and_tangent_backward": ("(Tensor grad_output, Tensor both, Tensor anchor) -> (Tensor, Tensor)"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Reference implementations with the ops' positional signatures and the ops' output layouts
# ---------------------------------------------------------------------------------------------------------------------


def _reference_flow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    n_steps: int,
    all_: bool,
) -> Tensor:
    return reference.euler_conv_flow(
        input,
        weight,
        bias,
        step_size=step_size,
        negative_slope=negative_slope,
        n_steps=n_steps,
        return_trajectory=all_,
    )


def _reference_flow_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.euler_conv_flow_backward(*args[:9])  # computes everything again: what was saved is not needed


def _reference_step(
    input: Tensor, weight: Tensor, bias: Tensor | None, step_size: float, negative_slope: float
) -> Tensor:
    return reference.euler_conv_step(input, weight, bias, step_size=step_size, negative_slope=negative_slope)


def _reference_step_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_size: float,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.euler_conv_flow_backward(
        grad_output, input, weight, bias, step_size, negative_slope, 1, False, output_mask
    )


def _reference_penalty(
    weight: Tensor, rate: float, slope_low: float, slope_high: float, norm: str, reduction: str
) -> tuple[Tensor, Tensor]:
    return reference.penalty_coefficients(weight, rate, (slope_low, slope_high), norm, reduction)


_DIFFERENTIABLE: dict[str, Callable[..., Any]] = {
    "smooth_leaky_relu": reference.smooth_leaky_relu,
    "smooth_leaky_relu_backward": reference.smooth_leaky_relu_backward,
    "euler_conv_step": _reference_step,
    "euler_conv_step_backward": _reference_step_backward,
    "euler_conv_flow": _reference_flow,
    "euler_conv_flow_saving": reference.euler_conv_flow_saving,
    "euler_conv_flow_backward": _reference_flow_backward,
    "euler_conv_flow_bound": reference.bound_e,
    "activated_conv_bound": reference.bound_of_activated_conv,
    "contraction_penalty": _reference_penalty,
    "contraction_penalty_backward": reference.contraction_penalty_backward,
    "softplus_increment": reference.softplus_increment,
    "softplus_increment_backward": reference.softplus_increment_backward,
    "softplus_increment_and_tangent": reference.softplus_increment_and_tangent,
    "softplus_increment_and_tangent_backward": reference.softplus_increment_and_tangent_backward,
}


# What runs is what is differentiated, but for a bound: it has to hold whatever was rounded.
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    **_DIFFERENTIABLE,
    "euler_conv_flow_bound": reference.euler_conv_flow_bound,
    "activated_conv_bound": reference.activated_conv_bound,
}


def _in_fake_layout(name: str, *args: Any) -> Any:
    """The reference's result, copied where PyTorch chose other strides than the contract promises."""
    results: Any = _IMPLEMENTATIONS[name](*args)
    templates = _FAKES[name](*args)
    single = isinstance(results, Tensor)
    placed = [
        result if result.stride() == template.stride() and not _aliases(result, args) else template.copy_(result)
        for result, template in zip(
            (results,) if single else results, (templates,) if single else templates, strict=True
        )
    ]
    return placed[0] if single else tuple(placed)


def _aliases(result: Tensor, args: Sequence[Any]) -> bool:
    return any(isinstance(arg, Tensor) and result.data_ptr() == arg.data_ptr() != 0 for arg in args)


# ---------------------------------------------------------------------------------------------------------------------
# Fake kernels: shapes, dtypes and true strides
# ---------------------------------------------------------------------------------------------------------------------


def _fake_like_input(input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


def _fake_like_second(_: Tensor, input: Tensor, *__: Any) -> Tensor:
    return torch.empty_like(input)


def _fake_step(input: Tensor, *_: Any) -> Tensor:
    return _layout.empty_state(input)


def _fake_flow(
    input: Tensor, weight: Tensor, bias: Tensor | None, h: float, a: float, n_steps: int, all_: bool
) -> Tensor:
    return _layout.empty_trajectory(input, n_steps + 1) if all_ else _layout.empty_state(input)


def _fake_flow_saving(
    input: Tensor, weight: Tensor, bias: Tensor | None, h: float, a: float, n_steps: int, save_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    states, slopes = _layout.empty_saved(input, n_steps, save_states, input.dtype)
    return _layout.empty_state(input), states, slopes


def _fake_flow_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mask = next(value for value in reversed(rest) if isinstance(value, (list, tuple)))
    return (
        _layout.empty_state(input) if mask[0] else input.new_empty(0),
        weight.new_empty(weight.shape) if mask[1] else input.new_empty(0),
        weight.new_empty(weight.shape[:-3]) if mask[2] else input.new_empty(0),
    )


def _fake_flow_bound(input: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _layout.empty_state(input), _layout.empty_state(input)


def _fake_conv_bound(input: Tensor, radius: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (input.shape[0], weight.shape[0], *input.shape[2:])
    return input.new_empty(shape), input.new_empty(shape)


def _fake_penalty(
    weight: Tensor, rate: float, slope_low: float, slope_high: float, norm: str, reduction: str
) -> tuple[Tensor, Tensor]:
    per_channel = weight.shape[:-3]
    value = weight.new_empty(per_channel if reduction == "none" else ())
    return value, weight.new_empty((*per_channel[:-1], 3, per_channel[-1]))


def _fake_penalty_backward(grad_output: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


def _fake_increment(input: Tensor, anchor: Tensor) -> Tensor:
    return input.new_empty(input.shape)


def _fake_increment_backward(grad_output: Tensor, input: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), anchor.new_empty(anchor.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "smooth_leaky_relu": _fake_like_input,
    "smooth_leaky_relu_backward": _fake_like_second,
    "euler_conv_step": _fake_step,
    "euler_conv_step_backward": _fake_flow_backward,
    "euler_conv_flow": _fake_flow,
    "euler_conv_flow_saving": _fake_flow_saving,
    "euler_conv_flow_backward": _fake_flow_backward,
    "euler_conv_flow_bound": _fake_flow_bound,
    "activated_conv_bound": _fake_conv_bound,
    "contraction_penalty": _fake_penalty,
    "contraction_penalty_backward": _fake_penalty_backward,
    "softplus_increment": _fake_increment,
    "softplus_increment_backward": _fake_increment_backward,
    "softplus_increment_and_tangent": _fake_increment,
    "softplus_increment_and_tangent_backward": _fake_increment_backward,
}


# ---------------------------------------------------------------------------------------------------------------------
# Registration: schema, kernel, fake kernel
# ---------------------------------------------------------------------------------------------------------------------


def _deciding(name: str) -> tuple[int, int | None]:
    """Which arguments decide on the implementation: one for device and dtype, one for the kernel size."""
    data = 1 if name.endswith("_backward") else 0
    if name.endswith("_bound"):
        return data, 2
    if name.startswith(("smooth", "softplus")):  # element-wise
        return data, None
    return data, data if name.startswith("contraction") else data + 1


def _kernel(name: str) -> Callable[..., Any]:
    """The op's one kernel: hands over to the implementation chosen for the tensors at hand."""
    data, weight = _deciding(name)

    def kernel(*args: Any) -> Any:
        kernel_size = None if weight is None else args[weight].shape[-1]
        return _backends.implementation(name, args[data], kernel_size)(*args)

    return kernel


def _seen_through(name: str) -> Callable[..., Any]:
    """Where Triton serves the call, torch.compile records its launches in place of the op.

    This is what ``torch.library.triton_op`` registers for an op that has no other implementation: Inductor then tunes
    the kernels for the shapes it knows and plans their memory. torch.export keeps the op, which any machine can run.
    """
    data, weight = _deciding(name)
    plain = (Tensor, torch.nn.Parameter, FunctionalTensor, FakeTensor)

    def rule(mode: Any, op: Any, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kernel_size = None if weight is None else args[weight].shape[-1]
        if (
            kwargs
            or torch.compiler.is_exporting()
            or not all(issubclass(t, plain) for t in types)
            or not _backends.is_traceable(name, args[data], kernel_size)
        ):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        size = None if kernel_size is None else int(kernel_size)  # a kernel is compiled for it
        with mode:
            return _backends.implementation(name, args[data], size)(*args)

    return rule


def _reference_implementation(name: str) -> Callable[..., Any]:
    return lambda *args: _in_fake_layout(name, *args)


for _name, _schema in _SCHEMAS.items():
    _qualified = f"{NAMESPACE}::{_name}"
    torch.library.define(_qualified, _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_qualified, "CompositeExplicitAutograd")(_kernel(_name))
    torch.library.register_fake(_qualified)(_FAKES[_name])
    torch.library.register_torch_dispatch(_qualified, FunctionalTensorMode, _seen_through(_name))
    _backends.register_reference(_name, _reference_implementation(_name))

_OPS = torch.ops.robust_node_fast
smooth_leaky_relu = _OPS.smooth_leaky_relu.default
euler_conv_step = _OPS.euler_conv_step.default
euler_conv_flow = _OPS.euler_conv_flow.default
euler_conv_flow_saving = _OPS.euler_conv_flow_saving.default
euler_conv_flow_bound = _OPS.euler_conv_flow_bound.default
activated_conv_bound = _OPS.activated_conv_bound.default
softplus_increment = _OPS.softplus_increment.default
softplus_increment_and_tangent = _OPS.softplus_increment_and_tangent.default
_contraction_penalty = _OPS.contraction_penalty.default


_PLAIN = torch._C._dispatch_keys(torch.empty(0)).raw_repr()


def _is_plain(*args: Any) -> bool:
    """Whether PyTorch's dispatcher would do nothing below autograd but call the op's kernel.

    So it is for strided CPU tensors (no subclass, no tracing, no pending negation), where a call costs as much as the
    penalty or a flow of one small image.
    """
    for arg in args:  # not all(...): a generator would take as long as the rest
        if isinstance(arg, Tensor) and torch._C._dispatch_keys(arg).raw_repr() != _PLAIN:
            return False
    return torch._C._len_torch_dispatch_stack() == 0


def _below_autograd(name: str) -> Callable[..., Any]:
    """The op for callers whom nobody will ask for its gradient."""
    op, kernel = getattr(_OPS, name).default, _kernel(name)

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args) if _is_plain(*args) else op(*args)

    return run


def _gradient_op(name: str) -> Callable[..., Any]:
    """The backward op of ``name`` as backward calls it: differentiable only with ``create_graph=True``."""
    op = getattr(_OPS, f"{name}_backward").default
    once = _below_autograd(f"{name}_backward")
    return lambda *args: op(*args) if torch.is_grad_enabled() else once(*args)


_smooth_leaky_relu_backward = _gradient_op("smooth_leaky_relu")
_euler_conv_step_backward = _gradient_op("euler_conv_step")
_euler_conv_flow_backward = _gradient_op("euler_conv_flow")
_contraction_penalty_backward = _gradient_op("contraction_penalty")


def contraction_penalty(
    weight: Tensor, rate: float, slope_low: float, slope_high: float, norm: str, reduction: str
) -> Tensor:
    """The op's first output; the second exists for its gradient."""
    return _contraction_penalty(weight, rate, slope_low, slope_high, norm, reduction)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Autograd. First order: the backward op. Second order and beyond: autograd through the reference of the backward op.
# ---------------------------------------------------------------------------------------------------------------------


def _register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None]
) -> None:
    """What ``torch.library.register_autograd`` does, without its 50 microseconds a call: the penalty takes 10."""
    below = _below_autograd(name)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = below(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{name}_autograd", (torch.autograd.Function,), methods)

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)  # type: ignore[attr-defined]
        return below(*args)

    torch.library.impl(f"{NAMESPACE}::{name}", "Autograd")(kernel)


def _saves(*tensors: int) -> Callable[[Any, tuple[Any, ...], Any], None]:
    """These inputs, and in ``ctx.scalars`` all inputs with ``None`` for tensors."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(inputs[i] for i in tensors))
        ctx.scalars = tuple(None if isinstance(value, Tensor) else value for value in inputs)

    return setup_context


def _smooth_leaky_relu_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (input,) = ctx.saved_tensors
    return _smooth_leaky_relu_backward(grad, input, ctx.scalars[1]), None


def _wanted(ctx: Any, count: int) -> list[bool]:
    return [bool(ctx.needs_input_grad[i]) for i in range(count)]


def _step_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    mask = _wanted(ctx, 3)
    grads = _euler_conv_step_backward(grad, *ctx.saved_tensors, *ctx.scalars[3:], mask)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None, None


def _flow_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    mask = _wanted(ctx, 3)
    grads = _euler_conv_flow_backward(grad, *ctx.saved_tensors, *ctx.scalars[3:], mask)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None, None, None, None


def _save_flow(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, states, slopes = output
    ctx.save_for_backward(*inputs[:3], states, slopes)
    ctx.mark_non_differentiable(states, slopes)
    ctx.set_materialize_grads(False)  # no zeros as large as what was saved
    ctx.scalars = inputs[3:6]
    ctx.has_states = inputs[6]


def _saving_flow_gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    mask = _wanted(ctx, 3)
    input, weight, bias, states, slopes = ctx.saved_tensors
    if not ctx.has_states:
        states = input.unsqueeze(0) if ctx.scalars[2] == 1 else None  # of a single step, the input is all states
    saved = (states, slopes)
    grads = _euler_conv_flow_backward(grad, input, weight, bias, *ctx.scalars, False, mask, *saved)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None, None, None, None


def _save_penalty(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    coefficients = output[1]
    ctx.save_for_backward(inputs[0], coefficients)
    ctx.mark_non_differentiable(coefficients)  # constant wherever the penalty has a gradient
    ctx.set_materialize_grads(False)


def _penalty_gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    weight, coefficients = ctx.saved_tensors
    return _contraction_penalty_backward(grad, weight, coefficients), None, None, None, None, None


def _increment_gradient(name: str) -> Callable[..., Any]:
    gradient = _gradient_op(name)
    return lambda ctx, grad: gradient(grad, *ctx.saved_tensors)


def _through_reference(name: str, tensors: int) -> Callable[..., Any]:
    """Gradient of an op without a fused one, backward ops among them: differentiate its reference."""

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()  # the caller wants to differentiate this result too
        wanted = _wanted(ctx, tensors)
        with torch.enable_grad():
            inputs = [
                t if not want else t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()
                for t, want in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            outputs = _DIFFERENTIABLE[name](*inputs, *ctx.scalars[tensors:])
            pairs = [
                (output, grad)
                for output, grad in zip((outputs,) if isinstance(outputs, Tensor) else outputs, grads, strict=True)
                if output.requires_grad and grad is not None
            ]
            variables = [t for t, want in zip(inputs, wanted, strict=True) if want]
            if pairs:
                found: Iterator[Tensor | None] = iter(
                    torch.autograd.grad(
                        [output for output, _ in pairs],
                        variables,
                        [grad for _, grad in pairs],
                        create_graph=again,
                        allow_unused=True,
                    )
                )
            else:
                found = iter([None] * len(variables))
        return *(next(found) if want else None for want in wanted), *(None for _ in ctx.scalars[tensors:])

    return backward


_register_autograd("smooth_leaky_relu", _smooth_leaky_relu_gradient, _saves(0))
_register_autograd("euler_conv_step", _step_gradient, _saves(0, 1, 2))
_register_autograd("euler_conv_flow", _flow_gradient, _saves(0, 1, 2))
_register_autograd("euler_conv_flow_saving", _saving_flow_gradient, _save_flow)
_register_autograd("contraction_penalty", _penalty_gradient, _save_penalty)
for _name in ("softplus_increment", "softplus_increment_and_tangent"):
    _register_autograd(_name, _increment_gradient(_name), _saves(0, 1))
for _name, _tensors in (
    ("euler_conv_flow_bound", 4),
    ("activated_conv_bound", 4),
    ("smooth_leaky_relu_backward", 2),
    ("euler_conv_step_backward", 4),
    ("euler_conv_flow_backward", 4),
    ("contraction_penalty_backward", 3),
    ("softplus_increment_backward", 3),
    ("softplus_increment_and_tangent_backward", 3),
):
    _register_autograd(_name, _through_reference(_name, _tensors), _saves(*range(_tensors)))


# ---------------------------------------------------------------------------------------------------------------------
# Autocast: the convolutions run in the autocast dtype, as nn.Conv2d does; the penalty, a sum of many terms, in float32
# ---------------------------------------------------------------------------------------------------------------------


def _register_autocast(name: str, device: str, dtype: Callable[[], torch.dtype]) -> None:
    op = getattr(_OPS, name).default
    key = f"Autocast{device.upper()}"
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(dtype())
        return value

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            return op(*map(cast, args))

    torch.library.impl(f"{NAMESPACE}::{name}", key)(kernel)


for _device in ("cpu", "cuda"):
    for _name in ("euler_conv_step", "euler_conv_flow", "euler_conv_flow_saving"):
        _register_autocast(_name, _device, partial(torch.get_autocast_dtype, _device))
    _register_autocast("contraction_penalty", _device, lambda: torch.float32)
