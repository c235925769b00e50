"""What must hold in every sound evaluation (Carlini et al., arXiv 1902.06705, section 5): where it does not, an attack
has failed, and the accuracies say nothing about the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from robust_node_fast.robustness._inputs import predict
from robust_node_fast.robustness.report import Check
from robust_node_fast.robustness.suite import BALLS, Attack

__all__ = ["at_large_radius", "at_zero", "order"]

PROBE = 64  # images that the checks with runs of their own take
CHANCE = 0.002  # share of the images, or
FEW = 2  # of them, by which a stronger attack may fall behind a weaker one
NEAR_ZERO = 0.02


def order(
    ball: str, images: int, clean: float, single: float, iterative: float, black: Mapping[str, int]
) -> Iterator[Check]:
    """A stronger attack never leaves a higher accuracy, and what none of the white-box attacks breaks nothing does.

    Args:
        ball: where.
        images: that were attacked.
        clean, single, iterative: accuracies.
        black: how many images each black-box attack breaks that survive every white-box attack. That an attack that
            knows less finds what those that know the network missed is what masked gradients look like.
    """
    chance = max(CHANCE, FEW / max(1, images))
    detail = f"{iterative:.2%}, {single:.2%}, {clean:.2%}"
    held = iterative <= single + chance and single <= clean + chance
    yield Check(f"iterative <= single step <= clean at {ball}", held, detail)
    for name, broken in black.items():
        detail = f"{broken} of {images} images fall to it and to no white-box attack"
        yield Check(f"white box <= {name} at {ball}", broken <= chance * images, detail)


def at_zero(model: nn.Module, attacks: Sequence[Attack], images: Tensor, labels: Tensor) -> Check:
    """Every attack with radius 0 leaves every prediction as it is."""
    clean = predict(model, images, labels)
    unchanged = sum(
        int((predict(model, _attacked(attack, model, images, labels, 0.0), labels) == clean).sum())
        for attack in attacks
    )
    total = len(attacks) * len(labels)
    return Check("eps 0 = clean", unchanged == total, f"{unchanged} of {total} predictions under attack unchanged")


def at_large_radius(model: nn.Module, attacks: Sequence[Attack], images: Tensor, labels: Tensor) -> Iterator[Check]:
    """Where the ball holds all of [0, 1]^d, iterative attacks leave next to nothing: any image may become any other."""
    for norm, ball in BALLS.items():
        iterative = [attack for attack in attacks if attack.norm == norm and attack.kind == "iterative"]
        if not iterative:
            continue
        radius = 1.0 if norm == "inf" else images[0].numel() ** 0.5
        survives = torch.ones_like(labels, dtype=torch.bool)
        for attack in iterative:
            survives &= predict(model, _attacked(attack, model, images, labels, radius), labels) == labels
        detail = f"{int(survives.sum())} of the first {len(labels)} images survive"
        yield Check(f"accuracy near 0 at {ball} {radius:g}", float(survives.double().mean()) <= NEAR_ZERO, detail)


def _attacked(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    return attack.run(model, images, labels, eps, torch.Generator().manual_seed(0))
