"""One configuration for a training run, and the recipe of each data set as departures from the defaults."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from robust_node_fast import _checks, data, models, nn

__all__ = ["NETWORKS", "RECIPES", "TrainConfig"]

NETWORKS = ("vanilla", "contractive")
MODELS = ("MNISTNode", "CIFARNode", "StagedCIFARNode", "StridedNode")
WITHOUT_BATCH_NORM = ("MNISTNode", "StridedNode")
OPTIMIZERS = ("adam", "sgd")
INITS = ("centered", "default", "identity", "authors")
REGULARIZERS = ("filters", "jacobian")


def _field(default: Any, help: str) -> Any:
    if default is ...:
        return dataclasses.field(metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the final weights, and where the run looks for its data.

    The defaults are the paper's MNIST recipe (arXiv 2508.11432), but for ``rate_margin`` (0 in the paper) and ``init``
    ("default" there). ``TrainConfig.recipe`` gives that of each data set.

    Raises:
        TypeError, ValueError: a field out of its range; the message names it, its value and what was expected.
    """

    dataset: Literal["digits", "mnist", "fashionmnist", "cifar10"] = _field(..., "Data set.")
    data_root: str | None = _field(None, "torchvision's folder; else $RNF_DATA_ROOT, else ~/.cache/robust_node_fast.")
    network: Literal["vanilla", "contractive"] = _field("contractive", "With or without the contraction penalty.")
    model: Literal["MNISTNode", "CIFARNode", "StagedCIFARNode", "StridedNode"] = _field(
        "MNISTNode", "Network of rnf.models."
    )
    n_steps: int | None = _field(None, "Euler steps (per stage); else the model's own number.")
    step_size: float | None = _field(None, "Euler step h; else the model's own.")
    init: Literal["centered", "default", "identity", "authors"] = _field(
        "centered",
        "Start: default (PyTorch's, as in the paper); centered (biases by nn.center_bias_: black stays zero); identity "
        "(filters by nn.contractive_init_: the rate with equality); authors (by nn.authors_init_: -5 * eye(3) each).",
    )
    seed: int = _field(0, "Seed of the initial weights, the data order and dropout.")
    train_samples: int | None = _field(None, "First training images; else all.")
    epochs: int = _field(5, "Passes over the training set.")
    batch_size: int = _field(128, "Images per optimizer step.")
    optimizer: Literal["adam", "sgd"] = _field("adam", "Optimizer of torch.optim.")
    lr: float = _field(0.05, "Learning rate of the first epoch.")
    lr_decay: float = _field(0.7, "Factor on the learning rate after every epoch.")
    milestones: list[int] = dataclasses.field(
        default_factory=list,
        metadata={"help": "Epochs after which the learning rate drops to a tenth (repeat the option)."},
    )
    momentum: float = _field(0.0, "Momentum of SGD.")
    weight_decay: float = _field(0.0, "Weight decay.")
    grad_clip: float = _field(0.0, "Largest 2-norm of the gradient; 0: no clipping.")
    rate: float = _field(2.0, "Contraction rate rho that the contractive network is to satisfy.")
    rate_margin: float = _field(
        0.05,
        "The penalty asks for rate * (1 + rate_margin): its hinge stops at the boundary, and the margin keeps the "
        "optimizer's last steps on the right side of it. 0 is the paper's loss.",
    )
    norm: Literal["2", "2-sharp", "inf", "1"] = _field("2", "Norm of the contraction penalty.")
    penalty_weight: float = _field(1.0, "Weight of the penalty beside the cross-entropy.")
    regularizer: Literal["filters", "jacobian"] = _field(
        "filters",
        "What the penalty looks at: the filters, or the Jacobian (norm 2) at states of a batch's first 8 images.",
    )
    certified_eps: float = _field(
        0.0,
        "Train for certificates (bound E) up to this l_inf radius, which grows to it in the first half of the run; the "
        "cross-entropy of the worst-case logits then weighs as much as the clean one. 0: no.",
    )
    checkpoint_every: int = _field(200, "Steps between checkpoints (one more after every epoch).")
    device: str = _field("cpu", "Device to train on.")

    def __post_init__(self) -> None:
        for name, choices in (
            ("dataset", tuple(data.DATASETS)),
            ("network", NETWORKS),
            ("model", MODELS),
            ("optimizer", OPTIMIZERS),
            ("norm", _checks.NORMS),
            ("init", INITS),
            ("regularizer", REGULARIZERS),
        ):
            _checks.choice(name, getattr(self, name), choices)
        for name in ("seed", "epochs", "batch_size", "n_steps", "train_samples", "checkpoint_every"):
            value, least = getattr(self, name), int(name != "seed")
            if name in ("n_steps", "train_samples") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected an int")
            if value < least:
                raise ValueError(f"{name}={value!r} is too small, expected at least {least}")
        if any(not isinstance(epoch, int) or epoch < 1 for epoch in self.milestones):
            raise ValueError(f"milestones={self.milestones!r} is not a list of epochs, expected ints of at least 1")
        for name in ("lr", "lr_decay", "rate"):
            self._at_least_zero(name, positive=True)
        for name in ("momentum", "weight_decay", "grad_clip", "rate_margin", "penalty_weight", "certified_eps"):
            self._at_least_zero(name)
        if self.step_size is not None:
            self._at_least_zero("step_size", positive=True)
        if self.optimizer == "adam" and self.momentum:
            raise ValueError(f"momentum={self.momentum!r} belongs to SGD, expected 0 with optimizer='adam'")
        if self.certified_eps and self.model not in WITHOUT_BATCH_NORM:
            raise ValueError(
                f"certified_eps={self.certified_eps!r} does not fit model={self.model!r}: batch normalisation has no "
                f"bound while it trains, expected one of {WITHOUT_BATCH_NORM}"
            )

    def _at_least_zero(self, name: str, *, positive: bool = False) -> None:
        value = getattr(self, name)
        _checks.number(name, value)
        if value < 0 or (positive and value == 0):
            raise ValueError(f"{name}={value!r} is out of range, expected a number {'>' if positive else '>='} 0")

    @classmethod
    def recipe(cls, dataset: Any, recipe: str = "contractive", **changes: Any) -> TrainConfig:
        """A recipe of ``RECIPES`` for a data set, with fields replaced by ``changes``.

        Raises:
            TypeError, ValueError: there is no such recipe; else as ``TrainConfig``.
        """
        _checks.choice("recipe", recipe, tuple(RECIPES))
        known = RECIPES[recipe]
        if recipe != "contractive" and dataset not in known:
            raise ValueError(f"recipe={recipe!r} is there for {', '.join(known)}, not for dataset={dataset!r}")
        return cls(dataset, **{**known.get(dataset, {}), **changes})

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Inverse of ``to_json``.

        Raises:
            TypeError, ValueError: not JSON, unknown fields or values.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("the configuration is no JSON object")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @property
    def penalty_rate(self) -> float:
        """The rate that the penalty asks for."""
        return self.rate * (1.0 + self.rate_margin)

    def lr_factor(self, epoch: int) -> float:
        """Factor on ``lr`` in the epoch with this number, counted from 0."""
        return math.pow(self.lr_decay, epoch) * math.pow(0.1, sum(epoch >= milestone for milestone in self.milestones))

    def certified_share(self, progress: float) -> float:
        """How much of ``certified_eps`` is trained for when this share of the run is done: all of it from half on."""
        return min(1.0, 2.0 * progress)

    def build_model(self) -> models.Model:
        """A freshly initialised network for the images of the data set."""
        channels, image_size = data.DATASETS[self.dataset]
        given = {"n_steps": self.n_steps, "step_size": self.step_size}
        network = getattr(models, self.model)
        model: models.Model = network(
            in_channels=channels,
            image_size=image_size,
            num_classes=10,
            **{name: value for name, value in given.items() if value is not None},
        )
        if self.init == "centered":
            model.center_biases_()
        for _, flow in model.flows():
            if self.init == "identity":
                nn.contractive_init_(flow, self.rate, self.norm)
            elif self.init == "authors":
                nn.authors_init_(flow)
        return model


# Departures from TrainConfig's defaults. Digits: 690 steps, as 5 epochs of its 12 batches of 128 would not let the
# centre taps travel to the -10 that rate 2 needs; constant steps to get there, two small ones to settle.
_CONTRACTIVE: Mapping[str, Mapping[str, Any]] = {
    "digits": {"epochs": 30, "batch_size": 64, "lr_decay": 1.0, "milestones": [22, 27]},
    "cifar10": {
        "model": "CIFARNode",
        "init": "default",
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-2,
        "epochs": 100,
        "lr_decay": 1.0,
        "milestones": [50, 70, 80],
        "grad_clip": 0.5,
    },
}

# For certificates (docs/certify.md); no penalty: a bound that is to stay small asks for contraction by itself.
_CERTIFIED: Mapping[str, Mapping[str, Any]] = {
    dataset: {
        "network": "vanilla",
        "model": "StridedNode",
        "init": "default",
        "lr": 4e-3,
        "lr_decay": 1.0,
        "milestones": [25, 32],
        "epochs": 36,
        "grad_clip": 5.0,
        "certified_eps": eps,
        **own,
    }
    for dataset, eps, own in (
        ("digits", 0.05, {"lr": 1e-2, "batch_size": 32}),
        ("mnist", 0.105, {}),
        ("fashionmnist", 0.0525, {}),
    )
}
RECIPES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"contractive": _CONTRACTIVE, "certified": _CERTIFIED}
