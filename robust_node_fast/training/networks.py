"""The networks that a configuration can name: how each is built, and what certifies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robust_node_fast import data, models
from robust_node_fast.certify import linf_certified
from robust_node_fast.nn import EulerConvFlow, authors_init_, contractive_init_
from robust_node_fast.zubov import contenders, margin_certified
from robust_node_fast.zubov.lyapunov import ConvexLyapunov
from robust_node_fast.zubov.network import DenseFlow, ZubovNet

if TYPE_CHECKING:
    from robust_node_fast.training.config import TrainConfig

__all__ = ["BACKBONES", "CONVOLUTIONAL", "NAMES", "build", "certificate"]

Certificate = Callable[[nn.Module, Tensor, Tensor, float], Tensor]

CONVOLUTIONAL = ("MNISTNode", "CIFARNode", "StagedCIFARNode", "StridedNode")
NAMES = (*CONVOLUTIONAL, *contenders.METHODS)
BACKBONES = ("identity", "mlp", "conv", "resnet18")  # the first two for points, the others for images


def build(config: TrainConfig) -> nn.Module:
    """A freshly initialised network for the inputs and classes of the data set."""
    time = {"n_steps": config.n_steps, "step_size": config.step_size}
    given = {name: value for name, value in time.items() if value is not None}
    return _convolutional(config, given) if config.is_convolutional else _on_vectors(config, given)


def certificate(model: nn.Module) -> Certificate | None:
    """``certify(model, inputs, labels, eps) -> (B,) bool`` for l_inf balls; None for networks without a bound."""
    if isinstance(model, models.Model):
        return linf_certified
    bounded = isinstance(model, ZubovNet) and isinstance(model.backbone, nn.Sequential)
    return margin_certified if bounded else None


def _convolutional(config: TrainConfig, given: dict[str, float]) -> models.Model:
    channels, image_size = data.IMAGES[config.dataset]
    network = getattr(models, config.model)
    classes = data.num_classes(config.dataset)
    model: models.Model = network(in_channels=channels, image_size=image_size, num_classes=classes, **given)
    if config.init == "centered":
        model.center_biases_()
    for _, flow in model.flows():
        if config.init == "identity":
            contractive_init_(flow, config.rate, config.norm)
        elif config.init == "authors":
            authors_init_(flow)
    return model


def _on_vectors(config: TrainConfig, given: dict[str, float]) -> nn.Module:
    """The backbone first: its weights are the same for all networks of a seed."""
    zubov, classes, image = config.zubov, data.num_classes(config.dataset), data.IMAGES.get(config.dataset)
    time: dict[str, Any] = {"n_steps": 6, "step_size": 0.5, **given}
    if config.model == "zubov" and zubov.dynamics == "conv":
        assert image is not None
        channels = zubov.dim // contenders.side(image[1]) ** 2
        backbone: nn.Module = contenders.convolutions(image[0], channels)
        flow: DenseFlow | EulerConvFlow = EulerConvFlow(channels, **time, shared_weights=zubov.shared_weights)
    else:
        if config.model == "resnet":  # two residual blocks
            time, shared = {"n_steps": 2, "step_size": 1.0}, False
        else:  # one right-hand side for all times, but for Zubov-Nets that are to have one for each
            shared = zubov.shared_weights or config.model != "zubov"
        backbone = contenders.backbone(zubov.backbone, image, zubov.dim)
        flow = DenseFlow(zubov.dim, **time, width=zubov.field_width, shared_weights=shared)
    if config.model == "zubov":
        return ZubovNet(backbone, flow, _lyapunov(config), temperature=zubov.temperature)
    assert isinstance(flow, DenseFlow)
    return contenders.FlowClassifier(backbone, flow, classes)


def _lyapunov(config: TrainConfig) -> ConvexLyapunov:
    """With equilibria where they start."""
    zubov, classes = config.zubov, data.num_classes(config.dataset)
    lyapunov = ConvexLyapunov(
        zubov.dim,
        classes,
        width=zubov.width,
        depth=zubov.depth,
        partial=zubov.attention == "partial",
        normalized=zubov.attention != "none",
        eps=zubov.eps,
        equilibria=torch.zeros(classes, zubov.dim) if zubov.equilibria == "fixed" else None,
    )
    start = contenders.spread_ if config.dataset in data.PLANE else contenders.apart_
    start(lyapunov)
    return lyapunov
