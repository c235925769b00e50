"""What attacks and evaluation ask of a model and its data: every fault is one sentence that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robust_node_fast import _checks

NORMS = ("inf", "2")


def check_radius(name: str, value: object) -> None:
    _checks.number(name, value)
    assert isinstance(value, (int, float))
    if value < 0:
        raise ValueError(f"{name}={value!r} is negative, expected a radius >= 0")


def check_model(model: nn.Module, name: str = "model") -> None:
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{name} is in training mode, expected {name}.eval(): dropout and batch norm would blur an attack"
        )
    for key, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that are not finite in {key}, expected finite weights")


def check_batch(images: object, labels: object) -> None:
    _checks.tensor("data's images", images)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"data's labels are {kind}, expected an int64 tensor")
    assert isinstance(images, Tensor)
    if images.dim() != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"data has images {tuple(images.shape)} and labels {tuple(labels.shape)}, expected (n, C, H, W) and (n,)"
        )
    if not images.numel():
        raise ValueError("data is empty, expected at least one image")
    if not (float(images.min()) >= 0.0 and float(images.max()) <= 1.0):  # false for NaN as well
        raise ValueError(
            f"data has images from {float(images.min())} to {float(images.max())}, expected values in [0, 1]"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"data has label {int(labels.min())}, expected labels >= 0")


def check_logits(logits: Tensor, labels: Tensor, name: str = "model") -> None:
    if logits.dim() != 2 or len(logits) != len(labels):
        raise ValueError(f"{name} gives {tuple(logits.shape)} for {len(labels)} images, expected logits (B, K)")
    check_classes(labels, logits.shape[1], name)
    if not bool(torch.isfinite(logits).all()):  # argmax would call a NaN the largest
        raise ValueError(f"{name} gives logits that are not finite, expected finite logits on finite images")


def check_classes(labels: Tensor, classes: int, name: str = "model") -> None:
    if int(labels.max()) >= classes:
        raise ValueError(f"data has label {int(labels.max())}, expected labels below the {classes} classes of {name}")


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Classes ``(B,)``; the labels are only checked to be among the model's.

    Raises:
        ValueError: as ``check_logits``.
    """
    logits = model(images)
    check_logits(logits, labels)
    return logits.argmax(1)


@contextmanager
def attacked(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[None]:
    """Checks everything; no parameter requires a gradient inside, what did before does again afterwards."""
    if torch.is_inference_mode_enabled():
        raise ValueError("attacks need gradients, which torch.inference_mode() forbids: call them outside of it")
    check_model(model)
    check_batch(images, labels)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
