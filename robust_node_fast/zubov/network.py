"""``ZubovNet``: backbone, flow, and K Lyapunov functions of its last state as the classifier."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.nn import EulerConvFlow
from robust_node_fast.zubov.lyapunov import ConvexLyapunov

__all__ = ["DenseFlow", "ZubovNet"]


class DenseFlow(nn.Module):
    """``n_steps`` forward Euler steps ``x + step_size * f(x)``, ``f(x) = W2 tanh(W1 x + b1) + b2``, of vectors.

    Args:
        dim: of a state.
        n_steps: N.
        step_size: Euler step ``h``; the flow covers the time ``N * h``.
        width: hidden units.
        shared_weights: one f for all steps instead of one per step.
        device, dtype: of the parameters.

    Attributes:
        weight1 ``(N, width, dim)``, bias1 ``(N, width)``, weight2 ``(N, dim, width)``, bias2 ``(N, dim)``; N is 1 when
            shared. Initialised as ``nn.Linear`` does.

    Input ``(B, dim)``; output ``(B, dim)``, or the trajectory ``(N + 1, B, dim)``.

    Raises:
        TypeError, ValueError: a size that is not a positive int, a step size that is 0 or not finite; an input of
            another shape.

    Source: arXiv 2509.21879 has a Neural ODE on features; this right-hand side is our reading.
    """

    def __init__(
        self,
        dim: int,
        n_steps: int,
        step_size: float,
        *,
        width: int = 64,
        shared_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("n_steps", n_steps), ("width", width)):
            _checks.count(name, value)
        _checks.number("step_size", step_size)
        if step_size == 0:
            raise ValueError("step_size=0 is no step, expected another number")
        self.dim, self.n_steps, self.step_size = dim, n_steps, step_size
        self.width, self.shared_weights = width, shared_weights
        steps = 1 if shared_weights else n_steps

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight1, self.bias1 = parameter(steps, width, dim), parameter(steps, width)
        self.weight2, self.bias2 = parameter(steps, dim, width), parameter(steps, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for fan_in, parameters in ((self.dim, (self.weight1, self.bias1)), (self.width, (self.weight2, self.bias2))):
            for parameter in parameters:
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, input: Tensor, return_trajectory: bool = False) -> Tensor:
        _checks.tensor("input", input)
        if input.dim() != 2 or input.shape[1] != self.dim:
            raise ValueError(f"input has shape {tuple(input.shape)}, expected (B, {self.dim})")
        states = [input]
        for n in range(self.n_steps):
            states.append(states[-1] + self.step_size * self._step(0 if self.shared_weights else n, states[-1]))
        return torch.stack(states) if return_trajectory else states[-1]

    def vector_field(self, t: Tensor | float, x: Tensor) -> Tensor:
        """``f`` of the step that the time t belongs to, the last one's for ever: ``(B, dim) -> (B, dim)``."""
        n = math.floor(float(t) / self.step_size + 0.25)  # as EulerConvFlow.vector_field
        return self._step(0 if self.shared_weights else min(max(n, 0), self.n_steps - 1), x)

    def fields(self, states: Tensor) -> Tensor:
        """Row n by the right-hand side of step n: ``(N, M, dim) -> (N, M, dim)``, any N where weights are shared."""
        if not self.shared_weights and len(states) != self.n_steps:
            raise ValueError(
                f"states has shape {tuple(states.shape)}, expected ({self.n_steps}, M, {self.dim}): a row for each step"
            )
        hidden = torch.tanh(states @ self.weight1.mT + self.bias1[:, None])
        return hidden @ self.weight2.mT + self.bias2[:, None]

    def _step(self, n: int, x: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(x, self.weight1[n], self.bias1[n]))
        return nn.functional.linear(hidden, self.weight2[n], self.bias2[n])

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, n_steps={self.n_steps}, step_size={self.step_size}, width={self.width}, "
            f"shared_weights={self.shared_weights}"
        )


class ZubovNet(nn.Module):
    """``logits = -V_k(x(T)) / temperature`` with ``x(T) = dynamics(backbone(input))``.

    Training adds the other losses:

        losses = zubov_losses(
            net.lyapunov, net.vector_field, net.trajectory(images), labels, temperature=net.temperature
        )

    Equilibria are learned or fixed, as ``lyapunov`` has them. That ``f(x*) = 0`` is no part of the architecture (our
    reading): it is a term of the consistency loss.

    Args:
        backbone: maps the input to the first state, ``(B, dim)``, or ``(B, C, H, H)`` for an ``EulerConvFlow``.
        dynamics: a ``DenseFlow`` or an ``EulerConvFlow``.
        lyapunov: of states, flattened: ``dim = C H H``.
        temperature: > 0.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: arXiv 2509.21879; v2 for the Lyapunov functions as the classifier.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dynamics: DenseFlow | EulerConvFlow,
        lyapunov: ConvexLyapunov,
        *,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(dynamics, DenseFlow | EulerConvFlow):
            raise TypeError(f"dynamics is a {type(dynamics).__name__}, expected a DenseFlow or an EulerConvFlow")
        if not isinstance(lyapunov, ConvexLyapunov):
            raise TypeError(f"lyapunov is a {type(lyapunov).__name__}, expected a ConvexLyapunov")
        if lyapunov.num_classes < 2:
            raise ValueError(f"lyapunov has {lyapunov.num_classes} class, expected two or more: one per class")
        if isinstance(dynamics, DenseFlow) and dynamics.dim != lyapunov.dim:
            raise ValueError(f"lyapunov has dim={lyapunov.dim}, expected {dynamics.dim} as dynamics")
        if isinstance(dynamics, EulerConvFlow) and lyapunov.dim != dynamics.channels * _side(lyapunov, dynamics) ** 2:
            raise ValueError(
                f"lyapunov has dim={lyapunov.dim}, expected {dynamics.channels} H H (dynamics' channels, square states)"
            )
        _checks.number("temperature", temperature)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature!r} is not positive, expected a float > 0")
        self.backbone, self.dynamics, self.lyapunov, self.temperature = backbone, dynamics, lyapunov, temperature

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``(B, K)``."""
        return -self.lyapunov(self.dynamics(self.features(input)).flatten(1)) / self.temperature

    def features(self, input: Tensor) -> Tensor:
        """``x(0)``, as the backbone gives it."""
        return self.backbone(input)

    def trajectory(self, input: Tensor) -> Tensor:
        """All states, flattened: ``(N + 1, B, dim)``.

        Raises:
            ValueError: the states of an ``EulerConvFlow`` are not square.
        """
        states = self.dynamics(self.features(input), return_trajectory=True)
        if states.dim() == 5 and states.shape[-1] != states.shape[-2]:  # from numbers in a row their shape is not known
            raise ValueError(f"backbone gives {tuple(states.shape[1:])}, expected square states (B, C, H, H)")
        return states.flatten(2)

    def vector_field(self, states: Tensor) -> Tensor:
        """Row n by the right-hand side of time step n, ``(N, M, dim) -> (N, M, dim)``.

        Raises:
            ValueError: weights are not shared, and there are more or fewer rows than steps.
        """
        flow = self.dynamics
        if isinstance(flow, DenseFlow):
            return flow.fields(states)
        if flow.shared_weights:
            return self.field_at(0.0, states.flatten(0, 1)).view_as(states)
        if len(states) != flow.n_steps:
            raise ValueError(
                f"states has shape {tuple(states.shape)}, expected ({flow.n_steps}, M, {self.lyapunov.dim}): a row "
                "for each step"
            )
        return torch.stack([self.field_at(n * flow.step_size, state) for n, state in enumerate(states)])

    def field_at(self, t: float, states: Tensor) -> Tensor:
        """The right-hand side of the step that the time t belongs to, the last one's for ever: ``(M, dim)`` twice."""
        flow = self.dynamics
        if isinstance(flow, DenseFlow):
            return flow.vector_field(t, states)
        side = _side(self.lyapunov, flow)
        return flow.vector_field(t, states.reshape(-1, flow.channels, side, side)).flatten(1)


def _side(lyapunov: ConvexLyapunov, flow: EulerConvFlow) -> int:
    return math.isqrt(lyapunov.dim // flow.channels)
