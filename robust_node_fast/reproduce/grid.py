"""What is trained and compared, as data: rows, and one cell for each of their seeds.

A penalty and an initialisation are easily taken for one another (the authors' code gives its contractive network
another start as well), so the first part is a full grid of the two. The other parts vary one setting of it each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robust_node_fast.training import TrainConfig

__all__ = ["EPS", "INITS", "NORMS", "RATES", "SEEDS", "SUITE", "TRANSFER_EPS", "Cell", "cells", "cifar_cells"]

PROTOCOL = 3  # raised by every change of what a cell's numbers mean: the cells of before are then no longer looked for
SUITE = "standard"  # Gaussian and salt-and-pepper noise; FGSM and PGD-40
EPS = (0.02, 0.05, 0.1, 0.2, 0.3)
TRANSFER_EPS = (0.1, 0.2, 0.3)  # at the smaller ones most images survive, which is dear to find and says little

INITS = ("default", "authors", "identity")
NORMS = ("2", "2-sharp", "inf")
RATES = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0)
WEIGHTS = (0.01, 0.1, 1.0, 10.0)
STEPS = ((0.01, 5), (0.01, 10), (0.01, 20), (0.05, 10), (0.1, 10))  # h, N
SEEDS = 3
# The grid's networks once more: the attacks that see the gradients at small radii, and through the paper's vanilla one.
STRICT, STRICT_ATTACK_SAMPLES, STRICT_EPS = "default/none", 1000, (0.02, 0.05, 0.1)
# Parts in which a setting is swept: small enough to run, one seed and attacks on the first test images.
SWEEPS, SWEEP_SEEDS, SWEEP_ATTACK_SAMPLES = ("rho", "gamma", "steps", "jacobian"), 1, 1000
# The networks that the conclusions are about, once more under everything there is: an hour for one that resists.
FULL, FULL_SEEDS, FULL_ATTACK_SAMPLES = ("certified", "authors/2", "default/2", "default/none"), 1, 500
FULL_EPS = (0.05, 0.1, 0.2)
# CIFAR-10 within hours on a CPU: the recipe for large batches with smaller ones, which give few epochs enough steps.
CIFAR: dict[str, Any] = {
    "recipe": "large-batch",
    "epochs": 40,
    "batch_size": 256,
    "lr": 1e-3,
    "warmup_epochs": 1,
    "schedule": "cosine",
}
CIFAR_EPS = (2 / 255, 4 / 255, 8 / 255)
PAPER: dict[str, Any] = {"rate_margin": 0.0, "n_steps": 10, "step_size": 0.01}  # beyond TrainConfig's defaults


@dataclass(frozen=True)
class Cell:
    """One network: how it is trained, and which other network's attacks it is shown (transfer).

    Two cells with the same settings are the same cell, whatever their rows are called.
    """

    row: str  # part/.../what varies
    config: TrainConfig
    partner: TrainConfig
    attack_samples: int | None
    eps: tuple[float, ...] = EPS
    transfer_eps: tuple[float, ...] = TRANSFER_EPS
    suite: str = SUITE

    @property
    def label(self) -> str:
        return f"{self.row}, seed {self.config.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the numbers, as JSON has it."""
        return {
            "protocol": PROTOCOL,
            "train": self.config.settings(),
            "partner": self.partner.settings(),
            "suite": self.suite,
            "eps": list(self.eps),
            "transfer_eps": list(self.transfer_eps),
            "attack_samples": self.attack_samples,
        }

    @property
    def name(self) -> str:
        """For its file; other settings give another name, a setting that is new and at its default does not."""
        settings = {**self.settings, "train": self.config.departures(), "partner": self.partner.departures()}
        return _name(self.config, settings)

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether these are its settings; training settings that they do not know yet count as the defaults."""
        try:
            known = {name: TrainConfig(**settings[name]).settings() for name in ("train", "partner")}
        except (KeyError, TypeError, ValueError):
            return False
        return {**settings, **known} == self.settings


def network_name(config: TrainConfig) -> str:
    """For the run folder of a network, which several cells may share."""
    return _name(config, config.departures())


def penalty_name(config: TrainConfig) -> str:
    if config.certified_eps:
        return "certified"
    if config.network == "vanilla":
        return "none"
    return config.norm if config.regularizer == "filters" else config.regularizer


def cells(
    dataset: str,
    *,
    seeds: int | None = None,
    only: Sequence[str] = (),
    attack_samples: int | None = None,
    **budget: Any,
) -> list[Cell]:
    """The cells of the rows that ``only`` asks for, seed by seed.

    Args:
        dataset: as in ``TrainConfig``.
        seeds: their number. None: 3, and 1 for the sweeps and the full suite.
        only: rows, or what some begin with: "grid", "grid/identity", "grid/identity/2", "rho", ... None given: all.
        attack_samples: attacks take the first so many test images. None: all, 1000 for the sweeps, 500 for the full
            suite.
        budget: fields of ``TrainConfig`` for all cells.

    Raises:
        TypeError, ValueError: a field out of its range; a name in ``only`` fits no row.
    """
    rows = dict(_rows())
    for wanted in only:
        if not any(_belongs(row, wanted) for row in rows):
            raise ValueError(f"only={wanted!r} fits no row, expected one of {', '.join(rows)}, or what some begin with")
    rows = {row: changes for row, changes in rows.items() if not only or any(_belongs(row, name) for name in only)}
    found = []
    for seed in range(SEEDS if seeds is None else seeds):
        for row, changes in rows.items():
            usual, attacked, more = _usual(row.split("/")[0])
            if seeds is None and seed >= usual:
                continue
            own, other = (
                _config(dataset, {**budget, **fields, "seed": seed}) for fields in (changes, _partner(row, changes))
            )
            found.append(Cell(row, own, other, attacked if attack_samples is None else attack_samples, **more))
    return found


def cifar_cells(*, seeds: int = 1, attack_samples: int | None = None, **budget: Any) -> list[Cell]:
    """The staged network on CIFAR-10, vanilla and contractive from the same start, each attacked through the other too.

    Args and errors: as ``cells``.
    """
    found = []
    for seed in range(seeds):
        own, other = (
            TrainConfig.recipe("cifar10", **{**CIFAR, **budget, "network": network, "seed": seed})
            for network in ("vanilla", "contractive")
        )
        for row, config, partner in (("cifar/vanilla", own, other), ("cifar/contractive", other, own)):
            found.append(Cell(row, config, partner, attack_samples, CIFAR_EPS, CIFAR_EPS[-1:]))
    return found


def _usual(part: str) -> tuple[int, int | None, dict[str, Any]]:
    """Seeds and attacked images of a part, and what else its cells have of their own."""
    if part == "full":
        return FULL_SEEDS, FULL_ATTACK_SAMPLES, {"suite": "full", "eps": FULL_EPS, "transfer_eps": FULL_EPS}
    if part == "strict":
        return SEEDS, STRICT_ATTACK_SAMPLES, {"eps": STRICT_EPS, "transfer_eps": STRICT_EPS}
    return (SWEEP_SEEDS, SWEEP_ATTACK_SAMPLES, {}) if part in SWEEPS else (SEEDS, None, {})


def _config(dataset: str, fields: dict[str, Any]) -> TrainConfig:
    if "recipe" in fields:
        return TrainConfig.recipe(dataset, **fields)
    return TrainConfig.recipe(dataset, **{**PAPER, **fields})


def _belongs(row: str, wanted: str) -> bool:
    return f"{row}/".startswith(f"{wanted.rstrip('/')}/")


def _rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of every row."""
    grid: dict[str, dict[str, Any]] = {}
    for init in INITS:
        grid[f"{init}/none"] = {"init": init, "network": "vanilla"}
        grid |= {f"{init}/{norm}": {"init": init, "norm": norm} for norm in NORMS}
    yield from ((f"grid/{name}", changes) for name, changes in grid.items())
    for init in INITS:
        for rate in RATES:
            yield f"rho/{init}/{rate:g}", {"init": init, "rate": rate}
    for weight in WEIGHTS:
        yield f"gamma/{weight:g}", {"init": "default", "penalty_weight": weight}
    for penalty, network in (("none", "vanilla"), ("2", "contractive")):
        for step_size, n_steps in STEPS:
            changes = {"init": "default", "network": network, "step_size": step_size, "n_steps": n_steps}
            yield f"steps/{penalty}/h {step_size:g}, N {n_steps}", changes
    yield "jacobian/default", {"init": "default", "regularizer": "jacobian"}
    certified = {"recipe": "certified"}
    yield "certified", certified
    yield from ((f"strict/{name}", changes) for name, changes in grid.items())
    yield from ((f"full/{name}", {**grid, "certified": certified}[name]) for name in FULL)


def _partner(row: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The network on the other side of the penalty (the paper's, if it is to have one): same start, same steps.

    That of another recipe is the paper's vanilla one, and so it is for all in "strict" but for itself.
    """
    if "recipe" in changes or (row.startswith("strict/") and row != f"strict/{STRICT}"):
        return {"init": "default", "network": "vanilla"}
    same: dict[str, Any] = {name: changes[name] for name in ("init", "step_size", "n_steps") if name in changes}
    return {**same, "network": "contractive" if changes.get("network") == "vanilla" else "vanilla"}


def _name(config: TrainConfig, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    return f"{config.dataset}-{config.init}-{penalty_name(config)}-seed{config.seed}-{digest}"
