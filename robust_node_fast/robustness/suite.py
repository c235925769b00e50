"""What a suite is made of: noises with their strengths, and attacks that are told their radius."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_node_fast.robustness import auto_attack, noise
from robust_node_fast.robustness.attacks import fgsm, pgd
from robust_node_fast.robustness.square_attack import square

__all__ = ["SUITES", "Attack", "Noise", "Suite", "transferred"]

PGD_STEP_SIZE = 2.5  # times eps / n_steps (Madry et al.): can cross the ball, and settle in it
BALLS = {"inf": "l_inf eps", "2": "l_2 eps"}  # what the radius of an attack measures, by norm


@dataclass(frozen=True)
class Noise:
    name: str
    measure: str  # what its strengths are
    strengths: tuple[float, ...]
    apply: Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Attack:
    name: str
    norm: str
    kind: str  # "single step", "iterative", "black box" or "AutoAttack"
    run: Callable[..., Tensor]  # model, images, labels, eps, generator; iterative ones also source=
    settings: Callable[[float], dict[str, Any]]  # at a radius


@dataclass(frozen=True)
class Suite:
    noises: tuple[Noise, ...]
    attacks: tuple[Attack, ...]
    eps_l2: tuple[float, ...] = ()  # radii in l_2 unless the caller names some


def transferred(suite: Suite, sources: Mapping[str, nn.Module]) -> tuple[Attack, ...]:
    """The suite's first iterative attack, on every source: what it passes there is shown to the model."""
    iterative = next(attack for attack in suite.attacks if attack.kind == "iterative")
    return tuple(
        dataclasses.replace(
            iterative,
            name=f"{iterative.name} on {name}",
            kind="black box",
            run=functools.partial(iterative.run, source=source),
        )
        for name, source in sources.items()
    )


def _noise(name: str, measure: str, strengths: tuple[float, ...]) -> Noise:
    """Not clipped, as in the paper."""
    function = getattr(noise, name)
    return Noise(name, measure, strengths, lambda images, by, generator: function(images, by, generator, clip=False))


def _salt_and_pepper(*fractions: float) -> Noise:
    return Noise("salt_and_pepper", "fraction of pixels", fractions, noise.salt_and_pepper)


def _fgsm(norm: str) -> Attack:
    def run(model: nn.Module, images: Tensor, labels: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        return fgsm(model, images, labels, eps, norm=norm)

    return Attack("fgsm", norm, "single step", run, lambda eps: {})


def _pgd(norm: str = "inf", loss: str = "cross-entropy", n_steps: int = 40, n_restarts: int = 1) -> Attack:
    def settings(eps: float) -> dict[str, Any]:
        step_size = PGD_STEP_SIZE * eps / n_steps
        return {"step_size": step_size, "n_steps": n_steps, "n_restarts": n_restarts, "loss": loss}

    def run(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        eps: float,
        generator: torch.Generator,
        source: nn.Module | None = None,
    ) -> Tensor:
        climbed = model if source is None else source
        return pgd(climbed, images, labels, eps, norm=norm, target=model, generator=generator, **settings(eps))

    return Attack("pgd" if loss == "cross-entropy" else f"pgd_{loss}", norm, "iterative", run, settings)


def _square(n_queries: int) -> Attack:
    def run(model: nn.Module, images: Tensor, labels: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        return square(model, images, labels, eps, n_queries=n_queries, generator=generator)

    return Attack("square", "inf", "black box", run, lambda eps: {"n_queries": n_queries})


def _autoattack(norm: str) -> Attack:
    def run(model: nn.Module, images: Tensor, labels: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        return auto_attack.autoattack(model, images, labels, eps, norm=norm, generator=generator)

    return Attack("autoattack", norm, "AutoAttack", run, lambda eps: {"version": "standard"})


SUITES = {
    "quick": Suite(
        (_noise("gaussian", "sigma", (0.2,)),),
        (_fgsm("inf"), _pgd(n_steps=10), _fgsm("2"), _pgd("2", n_steps=10)),
    ),
    "standard": Suite(
        (_noise("gaussian", "sigma", (0.1, 0.2, 0.3)), _salt_and_pepper(0.05, 0.2)),
        (_fgsm("inf"), _pgd(), _fgsm("2"), _pgd("2")),
    ),
    "full": Suite(
        (
            _noise("gaussian", "sigma", (0.1, 0.2, 0.3)),
            _noise("uniform", "half-width", (0.1, 0.3, 0.5)),
            _noise("shot", "sigma at intensity 1", (0.1, 0.2, 0.3)),
            _salt_and_pepper(0.05, 0.1, 0.2),
        ),
        (
            _fgsm("inf"),
            _pgd(n_restarts=5),
            _pgd(loss="margin", n_restarts=5),
            _square(1000),
            _autoattack("inf"),
            _fgsm("2"),
            _pgd("2", n_restarts=5),
            _pgd("2", "margin", n_restarts=5),
            _autoattack("2"),
        ),
        eps_l2=(0.5, 1.0, 2.0),
    ),
}
