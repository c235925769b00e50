"""Every setting of a run does what its name says, or at least something: none is read and forgotten."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import start
from torch import Tensor

from robust_node_fast import data, training
from robust_node_fast.training import TrainConfig, ZubovConfig
from robust_node_fast.training.objective import objective_of

_DIGITS = data.load("digits")
FEW = dataclasses.replace(
    _DIGITS,
    train_images=_DIGITS.train_images[:96],
    train_labels=_DIGITS.train_labels[:96],
    test_images=_DIGITS.test_images[:16],
    test_labels=_DIGITS.test_labels[:16],
)
BASE: dict[str, Any] = {"n_steps": 2, "epochs": 2, "batch_size": 32, "lr": 0.01}
ZUBOV: dict[str, Any] = {"model": "zubov", "steps": 3, "batch_size": 32, "lr": 0.01}
SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9}
# Long enough for the penalty to be 0: its gradient does not depend on the rate while it is not.
SATISFIED: dict[str, Any] = {"n_steps": 1, "epochs": 30, "lr": 0.1, "rate": 0.01}
# Setting -> another value, and what else both runs have.
EFFECTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "network": ("vanilla", {}),
    "model": ("StridedNode", {"init": "default"}),
    "n_steps": (3, {}),
    "step_size": (0.05, {}),
    "init": ("default", {}),
    "seed": (1, {}),
    "train_samples": (64, {}),
    "epochs": (3, {}),
    "steps": (4, {}),
    "batch_size": (48, {}),
    "noise": (0.3, {}),
    "label_smoothing": (0.2, {}),
    "optimizer": ("adamw", {"weight_decay": 0.1}),
    "lr": (0.02, {}),
    "lr_batch_size": (16, {}),
    "schedule": ("cosine", {}),
    "warmup_epochs": (1, {}),
    "lr_decay": (0.1, {}),
    "milestones": ([1], {}),
    "momentum": (0.5, SGD),
    "nesterov": (True, SGD),
    "weight_decay": (0.1, {}),
    "grad_clip": (0.01, SGD),
    "ema_decay": (0.5, {}),
    "rate": (0.1, SATISFIED),
    "rate_margin": (9.0, SATISFIED),
    "norm": ("inf", {}),
    "penalty_weight": (3.0, {}),
    "regularizer": ("jacobian", {}),
    "certified_eps": (0.05, {"network": "vanilla"}),
    "certified_weight": (0.2, {"network": "vanilla", "certified_eps": 0.05}),
    "zubov.dim": (8, ZUBOV),
    "zubov.dynamics": ("conv", ZUBOV),
    "zubov.shared_weights": (False, ZUBOV),
    "zubov.field_width": (8, ZUBOV),
    "zubov.equilibria": ("fixed", ZUBOV),
    "zubov.width": (8, ZUBOV),
    "zubov.depth": (3, ZUBOV),
    "zubov.attention": ("partial", ZUBOV),
    "zubov.eps": (0.5, ZUBOV),
    "zubov.consistency": (3.0, ZUBOV),
    "zubov.classification": (3.0, ZUBOV),
    "zubov.separation": (3.0, {**ZUBOV, "zubov": {"margin": 3.0}}),
    "zubov.spacing": (3.0, {**ZUBOV, "zubov": {"margin": 3.0}}),
    "zubov.containment": (3.0, ZUBOV),
    "zubov.arrival": (3.0, ZUBOV),
    "zubov.exclusion": (3.0, {**ZUBOV, "zubov": {"margin": 3.0}}),
    "zubov.temperature": (2.0, ZUBOV),
    "zubov.margin": (3.0, ZUBOV),
    "zubov.n_rays": (30, ZUBOV),
    "zubov.reach": (1.0, ZUBOV),
    "zubov.floor": (1.0, ZUBOV),
}
# These change no number, or rounding alone, or are for other data, and have tests of their own.
OTHERS = {
    *("dataset", "data_root", "augmentation", "accumulate", "track_eps", "checkpoint_every", "device", "channels_last"),
    *("autocast", "compile", "shard", "zubov", "zubov.backbone"),
}


def trained(folder: Path, **changes: Any) -> dict[str, Tensor]:
    training.fit(start(folder, TrainConfig.recipe("digits", **changes)), FEW)
    return training.load_model(folder)[0].state_dict()


def test_no_setting_is_left_out() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    names |= {f"zubov.{field.name}" for field in dataclasses.fields(ZubovConfig)}
    assert EFFECTS.keys() | OTHERS == names


@pytest.mark.parametrize("name", EFFECTS)
def test_a_setting_changes_the_trained_network(name: str, tmp_path: Path) -> None:
    value, common = EFFECTS[name]
    options = common if "model" in common else {**BASE, **common}
    own = name.removeprefix("zubov.")
    changed = {**options, own: value} if own == name else {**options, "zubov": {**options.get("zubov", {}), own: value}}
    before, after = trained(tmp_path / "before", **options), trained(tmp_path / "after", **changed)
    assert before.keys() != after.keys() or any(
        before[key].shape != after[key].shape or not torch.equal(before[key], after[key]) for key in before
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam", "weight_decay": 0.1},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd", "weight_decay": 0.1},
        {"optimizer": "sgd", "grad_clip": 0.05},
    ],
    ids=str,
)
def test_a_step_is_torch_optims(changes: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig.recipe("digits", **{**BASE, **changes, "epochs": 1, "steps": 1, "batch_size": 96})
    found = trained(tmp_path / "run", **{**BASE, **changes, "epochs": 1, "steps": 1, "batch_size": 96})
    model = config.initial_model()
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = {
        "adam": lambda: torch.optim.Adam(parameters, 0.01, weight_decay=config.weight_decay),
        "adamw": lambda: torch.optim.AdamW(parameters, 0.01, weight_decay=config.weight_decay),
        "sgd": lambda: torch.optim.SGD(parameters, 0.01, weight_decay=config.weight_decay),
    }[config.optimizer]()
    objective_of(model, config)(FEW.train_images, FEW.train_labels)[0].backward()
    if config.grad_clip:
        assert float(torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)) > 2.0 * config.grad_clip
    first = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer.step()
    for key, expected in model.state_dict().items():
        moved = float((expected - first[key]).abs().max())
        assert float((found[key] - expected).abs().max()) <= 0.02 * moved + 1e-7, key
