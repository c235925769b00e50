"""What a Zubov-Net is compared with: the same backbone, then no equation, a plain one, or one that is regularised.

``resnet``: two residual blocks with weights of their own. ``node``: a Neural ODE and a linear head. ``contractive``:
the same with the Jacobian regulariser of arXiv 2508.11432. ``lyanet``: the same with a Lyapunov loss in the manner of
LyaNet (arXiv 2202.02526): the cross-entropy of the head, as a function of the state, is to decay exponentially along f.
They are our versions on our backbone, not their authors' networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.jacobian import jacobian_penalty
from robust_node_fast.zubov.lyapunov import ConvexLyapunov
from robust_node_fast.zubov.network import DenseFlow, ZubovNet
from robust_node_fast.zubov.training import Budget, Objective, ZubovObjective, fit

__all__ = ["METHODS", "FlowClassifier", "bare_backbone", "build", "objective", "small_backbone"]

METHODS = ("resnet", "node", "contractive", "lyanet", "zubov")
DIM = 32  # of a state


class FlowClassifier(nn.Module):
    """``head(dynamics(backbone(input)))``."""

    def __init__(self, backbone: nn.Module, dynamics: DenseFlow, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.dynamics = backbone, dynamics
        self.head = nn.Linear(dynamics.dim, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.dynamics(self.backbone(input)))


@dataclass(frozen=True)
class CrossEntropy:
    def __call__(self, net: nn.Module, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"classification": F.cross_entropy(net(inputs), labels)}


@dataclass(frozen=True)
class Contractive:
    """Cross-entropy, and what the flow lacks of contracting at ``rate`` along its trajectories."""

    rate: float = 1.0
    weight: float = 1.0
    samples: int = 16  # of a batch, for the penalty

    def __call__(self, net: nn.Module, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(net, FlowClassifier)
        states = net.dynamics(net.backbone(inputs), return_trajectory=True)
        visited = states[:-1, : self.samples].flatten(0, 1)
        penalty = jacobian_penalty(_field(net), visited[None], rate=self.rate, n_iter=8, generator=generator)
        return {
            "classification": F.cross_entropy(net.head(states[-1]), labels),
            "contraction": self.weight * penalty,
        }


@dataclass(frozen=True)
class Lyapunov:
    """Cross-entropy ``E`` at the end, and the mean of ``relu(dE/dt + rate E)`` over the trajectory."""

    rate: float = 1.0
    weight: float = 1.0

    def __call__(self, net: nn.Module, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(net, FlowClassifier)
        states = net.dynamics(net.backbone(inputs), return_trajectory=True)
        visited = states[:-1].flatten(0, 1)
        target = labels.repeat(len(states) - 1)

        def energy(x: Tensor) -> Tensor:
            return F.cross_entropy(net.head(x), target, reduction="none")

        found = torch.func.jvp(energy, (visited,), (_field(net)(visited),))
        return {
            "classification": F.cross_entropy(net.head(states[-1]), labels),
            "lyapunov": self.weight * (found[1] + self.rate * found[0]).relu().mean(),
        }


def small_backbone(channels: int, image_size: int) -> nn.Sequential:
    """Two convolutions of stride 2 and a linear layer, to states of 32 numbers."""
    side = (image_size + 3) // 4
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, DIM),
    )


def build(method: str, channels: int, image_size: int, num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised network; the backbone's weights are the same for all methods of a seed."""
    _checks.choice("method", method, METHODS)
    torch.manual_seed(seed)
    backbone = small_backbone(channels, image_size)
    if method == "resnet":
        return FlowClassifier(backbone, DenseFlow(DIM, 2, 1.0), num_classes)
    flow = DenseFlow(DIM, 6, 0.5, shared_weights=True)
    if method == "zubov":
        return ZubovNet(backbone, flow, ConvexLyapunov(DIM, num_classes, width=32, depth=2, eps=0.05))
    return FlowClassifier(backbone, flow, num_classes)


def objective(method: str) -> Objective:
    """What the method minimises."""
    _checks.choice("method", method, METHODS)
    if method == "zubov":
        return ZubovObjective(rate=1.0, reach=0.25)
    if method == "contractive":
        return Contractive()
    return Lyapunov() if method == "lyanet" else CrossEntropy()


def bare_backbone(net: nn.Module, inputs: Tensor, labels: Tensor, num_classes: int, *, seed: int) -> nn.Module:
    """The trained backbone, frozen, with a linear head of its own: the network without its equation, to attack."""
    assert isinstance(net, FlowClassifier | ZubovNet)
    with torch.no_grad():
        states = torch.cat([net.backbone(part) for part in torch.split(inputs, 512)])
    torch.manual_seed(seed)
    head = nn.Linear(states.shape[1], num_classes)
    fit(head, CrossEntropy(), states, labels, Budget(steps=500, batch_size=256), seed=seed)
    return nn.Sequential(net.backbone, head).eval()


def _field(net: FlowClassifier) -> Callable[[Tensor], Tensor]:
    """The one right-hand side of a flow with shared weights."""
    return lambda x: net.dynamics.fields(x[None])[0]
