"""What a Zubov-Net is compared with: the same backbone, then no equation, a plain one, or one that is regularised.

``resnet``: two residual blocks with weights of their own. ``node``: a Neural ODE and a linear head.
``contractive-node``: the same with the Jacobian regulariser of arXiv 2508.11432. ``lyanet``: the same with a Lyapunov
loss in the manner of LyaNet (arXiv 2202.02526): the cross-entropy of the head, as a function of the state, is to decay
exponentially along f.
They are our versions on our backbone, not their authors' networks. What each is trained for: ``training.objective``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast import data
from robust_node_fast.zubov.lyapunov import ConvexLyapunov
from robust_node_fast.zubov.network import DenseFlow, ZubovNet

__all__ = ["METHODS", "FlowClassifier", "apart_", "backbone", "bare_backbone", "convolutions", "side", "spread_"]

METHODS = ("resnet", "node", "contractive-node", "lyanet", "zubov")


class FlowClassifier(nn.Module):
    """``head(dynamics(backbone(input)))``: logits ``(B, num_classes)``.

    Args:
        backbone: from an input to the first state, ``(B, dim)``.
        dynamics: of states ``(B, dim)``.
        num_classes: logits, of a linear head on the last state.
    """

    def __init__(self, backbone: nn.Module, dynamics: DenseFlow, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.dynamics = backbone, dynamics
        self.head = nn.Linear(dynamics.dim, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.dynamics(self.backbone(input)))

    def trajectory(self, input: Tensor) -> Tensor:
        """All states: ``(N + 1, B, dim)``."""
        return self.dynamics(self.backbone(input), return_trajectory=True)

    def vector_field(self, states: Tensor) -> Tensor:
        """The one right-hand side of a flow with shared weights: ``(B, dim) -> (B, dim)``."""
        return self.dynamics.fields(states[None])[0]


def backbone(name: str, image: tuple[int, int] | None, dim: int) -> nn.Module:
    """From an input to a state ``(B, dim)``.

    Args:
        name: ``"identity"``; ``"mlp"``, of two hidden layers, for points ``(B, 2)``; ``"conv"``, two convolutions of
            stride 2 and a linear layer; ``"resnet18"``, torchvision's with a first convolution for small images and
            without the pooling behind it.
        image: channels and size of images; None for points.
        dim: of a state.
    """
    if name == "identity":
        return nn.Identity()
    if image is None:
        return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, dim))
    channels, size = image
    if name == "resnet18":
        from torchvision.models import resnet18

        network = resnet18(num_classes=dim)
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        return network
    return nn.Sequential(*convolutions(channels, 32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * side(size) ** 2, dim))


def convolutions(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two of stride 2: from images of ``S`` pixels a side to states of ``side(S)``."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, out_channels, 3, stride=2, padding=1),
    )


def side(image_size: int) -> int:
    """Pixels a side of what ``convolutions`` give."""
    return (image_size + 3) // 4


@torch.no_grad()
def apart_(lyapunov: ConvexLyapunov) -> None:
    """Equilibria as far from each other that no two regions can meet; they are learned from there on.

    ``V_k >= eps |x - x*_k|^2``, so that a region lies within ``eps^(-1/2)`` of its equilibrium: twice that is enough.
    All are as far apart, the corners of a regular simplex, where there are no more classes than corners; else they are
    drawn, and the closest are.
    """
    count, dim = lyapunov.equilibria.shape
    drawn = torch.randn(dim, count).to(lyapunov.equilibria)
    distance = 2.0 * (1.0 + 1e-6) * lyapunov.eps**-0.5  # rounded, it must not be less
    if count == 1:
        return
    if count <= dim + 1:
        corners = torch.linalg.svd(torch.eye(count).to(drawn) - 1.0 / count).U[:, :-1]  # sqrt(2) apart
        axes = torch.linalg.qr(drawn[:, :-1]).Q
        lyapunov.equilibria.copy_(distance / math.sqrt(2.0) * corners @ axes.T)
    else:
        closest = torch.pdist(drawn.T).min()
        lyapunov.equilibria.copy_(distance / closest * drawn.T)


@torch.no_grad()
def spread_(lyapunov: ConvexLyapunov) -> None:
    """Equilibria in the plane apart from the start, evenly on a circle; they are learned from there on."""
    angle = 2.0 * torch.pi * torch.arange(lyapunov.num_classes) / lyapunov.num_classes
    lyapunov.equilibria[:, :2] = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)


def bare_backbone(net: nn.Module, inputs: Tensor, labels: Tensor, num_classes: int) -> nn.Module:
    """The trained backbone, frozen, with a linear head of its own: the network without its equation, to attack.

    The head is a logistic regression on the backbone's states, which is convex: L-BFGS finds it. A little ridge keeps
    logits of classes that can be separated from growing for ever, and with them gradients from vanishing.

    Args:
        net: trained; its backbone is taken as it is and shared, not copied.
        inputs: of training, ``(M, ...)``, float32 or bytes (images, which become 0 to 1).
        labels: ``(M,)`` int64.
        num_classes: logits.

    Returns:
        In eval mode, on ``inputs``' device: ``(B, ...) -> (B, num_classes)``.
    """
    assert isinstance(net, FlowClassifier | ZubovNet)
    with torch.no_grad():
        states = torch.cat([net.backbone(data.to_float(part)).flatten(1) for part in torch.split(inputs, 512)])
    head = nn.Linear(states.shape[1], num_classes, device=states.device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(head(states), labels) + 1e-4 * head.weight.square().sum()
        torch.autograd.backward(found)
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return nn.Sequential(net.backbone, nn.Flatten(), head).eval()
