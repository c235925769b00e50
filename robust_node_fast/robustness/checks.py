"""What must hold in every sound evaluation (Carlini et al., arXiv 1902.06705, section 5): where it does not, an attack
has failed, and the accuracies say nothing about the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from robust_node_fast.robustness._inputs import predict
from robust_node_fast.robustness.report import Check
from robust_node_fast.robustness.square_attack import square
from robust_node_fast.robustness.suite import BALLS, Attack

__all__ = ["at_large_radius", "at_zero", "black_box", "order"]

PROBE = 64  # images that the checks with runs of their own take
QUERIES = 500  # of the black box where the suite has none
CHANCE = 500  # one of so many images, or
FEW = 2  # of them, by which a stronger attack may fall behind a weaker one
NEAR_ZERO = 0.02


def order(ball: str, images: int, clean: int, single: int, iterative: int, black: Mapping[str, int]) -> Iterator[Check]:
    """A stronger attack never leaves more images, and what none of the white-box attacks breaks nothing does.

    Args:
        ball: where.
        images: that were attacked.
        clean, single, iterative: how many of them are classified rightly as they are and after these attacks.
        black: how many images each black-box attack breaks that survive every white-box attack. That an attack that
            knows less finds what those that know the network missed is what masked gradients look like.
    """
    allowed = _allowed(images)
    detail = ", ".join(f"{count / max(1, images):.2%}" for count in (iterative, single, clean))
    held = iterative <= single + allowed and single <= clean + allowed
    yield Check(f"iterative <= single step <= clean at {ball}", held, detail)
    for name, broken in black.items():
        yield _white_box(name, ball, broken, images)


def black_box(
    model: nn.Module, attacks: Sequence[Attack], images: Tensor, labels: Tensor, radii: Sequence[float]
) -> Iterator[Check]:
    """As ``order``, by Square on these images alone, at every radius: for a suite without a black box, in l_inf.

    At the largest radius alone it would see little: of a network that is not robust there, no image is left to try.
    """
    survives = predict(model, images, labels) == labels
    for eps in sorted(radii):
        for attack in attacks:
            if attack.norm == "inf" and attack.kind in ("single step", "iterative") and bool(survives.any()):
                attacked = _attacked(attack, model, images[survives], labels[survives], eps)
                survives[survives.clone()] = predict(model, attacked, labels[survives]) == labels[survives]
        broken = 0
        if bool(survives.any()):
            generator = torch.Generator().manual_seed(0)
            attacked = square(model, images[survives], labels[survives], eps, n_queries=QUERIES, generator=generator)
            broken = int((predict(model, attacked, labels[survives]) != labels[survives]).sum())
        left = f", which leave {int(survives.sum())}"
        yield _white_box("square", f"{BALLS['inf']} {eps:g}", broken, len(labels), left)


def _white_box(name: str, ball: str, broken: int, images: int, left: str = "") -> Check:
    detail = f"{broken} of {images} images fall to it and to no white-box attack{left}"
    return Check(f"white box <= {name} at {ball}", broken <= _allowed(images), detail)


def _allowed(images: int) -> int:
    return max(FEW, images // CHANCE)


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
