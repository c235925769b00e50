"""A network as the list of its layers, which every bound walks through; what a certificate asks of its arguments."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize

from robust_node_fast import _checks, reference
from robust_node_fast.nn import EulerConvFlow, PadChannels, SmoothLeakyReLU

# Of a last comparison in float64, relative to what is compared: far above what its sums can lose, far below any margin
# that matters. What the layers before it lose is followed through the network (``rounding_of``).
ROUNDING = 1e-9

_COMPARED = 16  # samples on which the layers are compared with the model, and near which
_NEAR = 0.01  # of the samples' range
_KNOWN: tuple[type[nn.Module], ...] = (
    *(EulerConvFlow, PadChannels, SmoothLeakyReLU),
    *(nn.AvgPool2d, nn.BatchNorm2d, nn.Conv2d, nn.Dropout, nn.Flatten, nn.Identity, nn.Linear, nn.ReLU),
)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers whose composition is ``model.forward``, the linear head last.

    ``nn.Sequential`` (no subclass, which may have a forward of its own) and modules with ``layers()`` are taken apart,
    also inside one another.

    Raises:
        TypeError: the model does not say what its layers are.
        ValueError: the last one is no ``nn.Linear``.
    """
    layers = flattened(model)
    if layers == [model]:
        raise TypeError(
            f"model is a {type(model).__name__}, expected an nn.Sequential or a module with layers(), the list of "
            "layers whose composition is its forward"
        )
    if not layers or not isinstance(layers[-1], nn.Linear):
        raise ValueError("model does not end with an nn.Linear, expected a linear head")
    return layers


def flattened(module: nn.Module) -> list[nn.Module]:
    """The layers of a network or of a part of one, itself if it does not say what they are."""
    if type(module) is nn.Sequential:
        return [layer for child in module for layer in flattened(child)]
    layers = getattr(module, "layers", None)
    if callable(layers):
        forward, described = (_defined_in(type(module), name) for name in ("forward", "layers"))
        if forward is not described and issubclass(forward, described):
            raise TypeError(
                f"no bound is known for a {type(module).__name__}: {forward.__name__} has a forward of its own, "
                f"layers() is {described.__name__}'s"
            )
        return [layer for child in layers() for layer in flattened(child)]
    return [module]


def _defined_in(kind: type, name: str) -> type:
    return next((each for each in kind.__mro__ if name in vars(each)), kind)


def check_known(layers: Sequence[nn.Module]) -> None:
    """That the layers are what bounds are known for: a subclass may compute something else.

    Raises:
        TypeError: one is not.
    """
    for layer in layers:
        if type(layer) not in _KNOWN:
            raise TypeError(f"no bound is known for the layer {type(layer).__name__}")


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of the model in float64, for a certificate whose rounding errors do not count.

    Parametrised weights (``torch.nn.utils.parametrize``) become plain ones with the values that they have.

    Raises:
        TypeError: the model is no module; it, or a module in it, has a hook or a forward of its own, or all modules
            have a hook: they may compute something else than their class says.
        ValueError: it is in training mode, or a parameter or buffer is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        raise TypeError("no bound is known while a hook is registered for all modules")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            where = f"model's {name}" if name else "model"
            kind = type(module).__name__
            raise TypeError(f"no bound is known for {where}, a {kind} with a hook or a forward of its own")
    if any(module.training for module in model.modules()):
        raise ValueError("model is in training mode, expected model.eval(): a certificate is about what is deployed")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"model's {name} is not finite, expected finite weights")
    found = copy.deepcopy(model)
    for module in list(found.modules()):
        if parametrize.is_parametrized(module):
            # Not by remove_parametrizations: it changes the class, which is the user's model's too.
            parametrized = module._modules.pop("parametrizations")
            module.__class__ = type(module).__bases__[0]
            for name, each in parametrized.named_children():  # type: ignore[union-attr]
                module.register_parameter(name, nn.Parameter(each().detach()))
    return found.double().requires_grad_(False)


def samples(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``y``, checked.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    _checks.tensor("x", x)
    if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"y is {y!r:.60}, expected an integer tensor of labels")
    if y.dim() != 1 or x.dim() < 2 or len(y) != len(x):
        raise ValueError(
            f"y has shape {tuple(y.shape)}, x {tuple(x.shape)}, expected (B,) and (B, ...): one label for each sample"
        )
    if not x.isfinite().all():
        raise ValueError("x is not finite, expected finite samples")
    head = layers_of(model)[-1]
    assert isinstance(head, nn.Linear)
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < head.out_features):
        raise ValueError(
            f"y lies in [{int(y.min())}, {int(y.max())}], expected labels from 0 to {head.out_features - 1}"
        )
    return x, y.long()


def same_function(model: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> None:
    """That the layers compute what the model does: a certificate about another function would be worthless.

    Compared at the first samples of ``x`` and at points near them, within their range: where pixels are multiples of
    1/255, a forward that rounds to these would not show.

    Raises:
        TypeError: as ``check_known``.
        ValueError: they do not.
    """
    check_known(layers)
    x = x[:_COMPARED].double()
    if len(x) == 0:
        return
    low, high = torch.aminmax(x)
    step = _NEAR * (2.0 * torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)) - 1.0)
    x = torch.cat([x, torch.clamp(x + (high - low) * step.to(x.device), low, high)])
    deployed = model(x.clone())  # layers may work in place
    composed = x.clone()
    for layer in layers:
        composed = layer(composed)
    if deployed.shape != composed.shape or not torch.allclose(
        deployed, composed, rtol=1e-6, atol=1e-6 * (1.0 + deployed.abs().max().item())
    ):
        raise ValueError("model.layers() does not compute what model.forward() does: no certificate is possible")


def rounding_of(layer: nn.Module) -> float:
    """A relative error in float64 that none of the sums and functions in a layer exceeds."""
    if isinstance(layer, nn.AvgPool2d):
        size = layer.kernel_size
        return reference.rounding_of_sums(size * size if isinstance(size, int) else math.prod(size))
    weight = getattr(layer, "weight", None)
    # An Euler flow has filters of its own for every step, a linear layer rows.
    shared = isinstance(layer, EulerConvFlow) and weight is not None and weight.dim() == 5
    terms = 1 if weight is None or weight.dim() == 1 else math.prod(weight.shape[2 if shared else 1 :])
    return reference.rounding_of_sums(terms)


def summed_in(layer: nn.Module, z: Tensor) -> Tensor:
    """At least what any number that a layer computes of ``z`` adds up, in magnitude: ``(B, 1)`` float64."""
    low, high = torch.aminmax(z.flatten(1), dim=1, keepdim=True)
    found = torch.maximum(high, -low).double()
    if isinstance(layer, nn.BatchNorm2d):
        scale, shift = normalisation_of(layer)
        return found * scale.max() + shift.max()
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return found
    bias = 0.0 if layer.bias is None else layer.bias.abs().max()
    return found * layer.weight.abs().flatten(1).sum(1).max() + bias


def normalisation_of(layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """``scale`` and ``|mean| scale + |bias|`` of every channel.

    Raises:
        ValueError: it uses the statistics of its batch.
    """
    if layer.training or layer.running_var is None or layer.running_mean is None:
        raise ValueError("a BatchNorm2d uses the statistics of its batch, expected it in eval mode with running ones")
    scale = (layer.running_var + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight.abs()
    shift = layer.running_mean.abs() * scale
    return scale, shift if layer.bias is None else shift + layer.bias.abs()


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """``f_y - f_j`` for all classes j, ``inf`` at ``j = y``: ``(B, K)``."""
    margin = logits.gather(1, y[:, None]) - logits
    return margin.scatter(1, y[:, None], torch.inf)
