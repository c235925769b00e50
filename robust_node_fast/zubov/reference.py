"""The straightforward versions: a loop over classes with ``autograd.grad``, a loop over rays with bisection.

The oracle of the tests and what the benchmark compares with. Nothing of the fast versions is used but the parameters,
and nothing in it is clever; but what does not depend on the state is worked out once for a class, as anyone would.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_node_fast.zubov.lyapunov import ConvexLyapunov

__all__ = ["ClassValue", "sample_boundary", "value", "value_and_derivative"]


class _Network:
    """``g`` of one class, with attention and biases worked out."""

    def __init__(self, lyapunov: ConvexLyapunov, k: int) -> None:
        depth, width = lyapunov.depth, lyapunov.width
        self.equilibrium = lyapunov.equilibria[k]
        self.weights = torch.split(lyapunov.input_weight[k], width)
        anchors, keys = list(lyapunov.anchor[k]), list(lyapunov.key[k])
        if lyapunov.partial:
            context = self.equilibrium
            for i in range(depth):
                context = torch.tanh(lyapunov.context[i](context))
                anchors[i] = anchors[i] + lyapunov.context_anchor[i](context)
                keys[i] = keys[i] * (1.0 + lyapunov.context_gate[i](context))
        queries = [*(() if lyapunov.query is None else lyapunov.query[k]), lyapunov.readout_query[k]]
        scores = [q @ key.T / key.shape[1] ** 0.5 for q, key in zip(queries, keys, strict=True)]
        attention = [torch.softmax(s, 1) if lyapunov.normalized else F.softplus(s) / width for s in scores]
        self.attention, self.readout = attention[:-1], attention[-1][0] * lyapunov.log_scale[k].exp()
        self.biases = [anchor - weight @ self.equilibrium for anchor, weight in zip(anchors, self.weights, strict=True)]
        for i in range(1, depth):
            self.biases[i] = self.biases[i] - self.attention[i - 1] @ F.softplus(anchors[i - 1], threshold=40.0)

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, dim) -> (B,)``."""
        z = F.softplus(F.linear(x, self.weights[0], self.biases[0]), threshold=40.0)
        for weight, bias, attention in zip(self.weights[1:], self.biases[1:], self.attention, strict=True):
            z = F.softplus(z @ attention.T + F.linear(x, weight, bias), threshold=40.0)
        return z @ self.readout


def value(lyapunov: ConvexLyapunov, x: Tensor) -> Tensor:
    """``g(x) - g(x*) - grad g(x*).(x - x*) + eps |x - x*|^2``, class by class: ``(B, K)``."""
    return torch.stack([class_value(lyapunov, k, x) for k in range(lyapunov.num_classes)], 1)


class ClassValue:
    """``V_k``, with all that does not depend on the state worked out: ``(B, dim) -> (B,)``."""

    def __init__(self, lyapunov: ConvexLyapunov, k: int) -> None:
        with torch.enable_grad():
            self.g, self.equilibrium, self.eps = _Network(lyapunov, k), lyapunov.equilibria[k], lyapunov.eps
            point = self.equilibrium.clone()
            if not point.requires_grad:
                point.requires_grad_()
            self.base = self.g(point[None])
            (self.gradient,) = torch.autograd.grad(self.base, point, create_graph=True)

    def __call__(self, x: Tensor) -> Tensor:
        offset = x - self.equilibrium
        return self.g(x) - self.base - offset @ self.gradient + self.eps * offset.square().sum(1)


def class_value(lyapunov: ConvexLyapunov, k: int, x: Tensor) -> Tensor:
    """``V_k`` at ``(B, dim)``: ``(B,)``."""
    return ClassValue(lyapunov, k)(x)


def value_and_derivative(lyapunov: ConvexLyapunov, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Of each class the gradient by a backward pass, times ``dx``: ``(B, K)`` twice."""
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    values, derivatives = [], []
    for k in range(lyapunov.num_classes):
        v = class_value(lyapunov, k, x)
        (gradient,) = torch.autograd.grad(v.sum(), x, create_graph=True)
        values.append(v)
        derivatives.append((gradient * dx).sum(1))
    return torch.stack(values, 1), torch.stack(derivatives, 1)


def sample_boundary(
    lyapunov: ConvexLyapunov, n_rays: int, *, level: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Ray by ray: double the radius until V is larger than the level, then bisect: ``(K, n_rays, dim)``.

    The same rays as the fast version's for the same generator. Bisects as long as there are numbers in between.
    """
    like = lyapunov.equilibria
    shape = (lyapunov.num_classes, n_rays, lyapunov.dim)
    directions = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    directions = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    points = []
    for k in range(lyapunov.num_classes):
        own = ClassValue(lyapunov, k)
        for u in directions[k]:
            with torch.no_grad():
                low, high = 0.0, 1.0
                while own((like[k] + high * u)[None]) <= level:
                    low, high = high, 2.0 * high
                for _ in range(24 if like.dtype == torch.float32 else 53):
                    middle = 0.5 * (low + high)
                    inside = bool(own((like[k] + middle * u)[None]) <= level)
                    low, high = (middle, high) if inside else (low, middle)
            x = like[k] + high * u
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(own(leaf[None]).sum(), leaf, retain_graph=True)
            v = own(x[None]).squeeze()
            points.append(x - u * (v - v.detach()) / (gradient @ u))  # the implicit function theorem
    return torch.stack(points).view(shape)
