"""One configuration for a training run; ``recipes`` has those of the data sets."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from robust_node_fast import _checks, data
from robust_node_fast.training import augment, networks
from robust_node_fast.training.recipes import CHOSEN, RECIPES
from robust_node_fast.zubov import contenders

__all__ = ["NETWORKS", "TrainConfig", "ZubovConfig"]

NETWORKS = ("vanilla", "contractive")
WITHOUT_BATCH_NORM = ("MNISTNode", "StridedNode")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("step", "cosine")
INITS = ("centered", "default", "identity", "authors")
REGULARIZERS = ("filters", "jacobian")
# What belongs to convolutional networks only, and what it is for the others.
_CONVOLUTIONAL_ONLY = {
    "network": "vanilla",
    "regularizer": "filters",
    "noise": 0.0,
    "certified_eps": 0.0,
    "autocast": False,
    "compile": False,
}
BESIDE_ZUBOV = ("backbone", "dim", "field_width")  # fields of ZubovConfig that the networks beside Zubov-Nets have, too
_CHANGE_NO_NUMBER = ("data_root", "checkpoint_every")
_SEEDS = 2**32  # times the numbers of steps and processes they are to fit 64 bits
_WARMUP_START = 0.01  # of the learning rate


def _field(default: Any, section: str, help: str) -> Any:
    """A field of the configuration, with its help and the section of docs/training.md it stands in."""
    metadata = {"help": help, "section": section}
    return (
        dataclasses.field(metadata=metadata)
        if default is ...
        else dataclasses.field(default=default, metadata=metadata)
    )


_NETWORK, _DATA, _OPTIMIZER = "Network", "Data", "Optimizer"
_CONTRACTION, _RUN = "Contraction and certificates", "Speed and safety"
_ZUBOV = "Zubov-Nets and the networks beside them"


@dataclass(frozen=True)
class ZubovConfig:
    """What ``model="zubov"`` and the networks that it is compared with have beyond ``TrainConfig``.

    The weights and options of the losses are those of ``zubov.zubov_losses``, whose ``rate`` is ``TrainConfig.rate``.

    Raises:
        TypeError, ValueError: as ``TrainConfig``.
    """

    backbone: Literal["identity", "mlp", "conv", "resnet18"] = _field(
        "conv", _ZUBOV, "From an input to the first state: identity or mlp for points, conv or resnet18 for images."
    )
    dim: int = _field(32, _ZUBOV, "Numbers in a state.")
    dynamics: Literal["dense", "conv"] = _field(
        "dense",
        _ZUBOV,
        "Of a Zubov-Net: DenseFlow, or EulerConvFlow behind the convolutions of backbone conv alone, of 2x2 pixels in "
        "digits, else 7x7 (8x8 in colour): dim is a multiple of that.",
    )
    shared_weights: bool = _field(True, _ZUBOV, "Of a Zubov-Net: one f for all steps, not one for each.")
    field_width: int = _field(64, _ZUBOV, "Hidden units of the right-hand side f (dynamics dense).")
    equilibria: Literal["learned", "fixed"] = _field("learned", _ZUBOV, "Learned, or fixed where they start.")
    width: int = _field(32, _ZUBOV, "Units in each layer of the Lyapunov functions.")
    depth: int = _field(2, _ZUBOV, "Layers of the Lyapunov functions.")
    attention: Literal["full", "partial", "none"] = _field(
        "full",
        _ZUBOV,
        "Partial: with a context network, which sees x*; none: an ordinary input-convex network, rows not normalised.",
    )
    eps: float = _field(0.05, _ZUBOV, "Coefficient of the term eps |x - x*|^2 in every Lyapunov function.")
    consistency: float = _field(1.0, _ZUBOV, "Weight of the loss: Zubov's equation; 0: none.")
    classification: float = _field(1.0, _ZUBOV, "Weight of the loss: cross-entropy; 0: none.")
    separation: float = _field(1.0, _ZUBOV, "Weight of the loss: regions apart from each other; 0: none.")
    spacing: float = _field(0.0, _ZUBOV, "Weight of the loss: regions apart between their equilibria; 0: none.")
    containment: float = _field(0.0, _ZUBOV, "Weight of the loss: first states well within their regions; 0: none.")
    exclusion: float = _field(
        0.0, _ZUBOV, "Weight of the loss: first states outside the other classes' regions; 0: none."
    )
    arrival: float = _field(0.0, _ZUBOV, "Weight of the loss: the equation close to x*, relative to V; 0: none.")
    temperature: float = _field(1.0, _ZUBOV, "Temperature of the logits -V / temperature.")
    margin: float = _field(0.1, _ZUBOV, "How far above 1 another V is to be on a region's boundary.")
    n_rays: int = _field(16, _ZUBOV, "Rays of each class, for points on and inside its boundary.")
    reach: float = _field(0.25, _ZUBOV, "The equation is asked for up to 1 + reach times the way to the boundary.")
    floor: float | None = _field(None, _ZUBOV, "Residuals are divided by V + floor.")

    def __post_init__(self) -> None:
        _checks.choice("zubov.backbone", self.backbone, networks.BACKBONES)
        _checks.choice("zubov.attention", self.attention, ("full", "partial", "none"))
        _checks.choice("zubov.dynamics", self.dynamics, ("dense", "conv"))
        _checks.choice("zubov.equilibria", self.equilibria, ("learned", "fixed"))
        if not isinstance(self.shared_weights, bool):
            raise TypeError(f"zubov.shared_weights={self.shared_weights!r} is no bool, expected one")
        for name in ("dim", "field_width", "width", "depth", "n_rays"):
            _checks.count(f"zubov.{name}", getattr(self, name))
        weights = ("consistency", "classification", "separation", "spacing", "containment", "exclusion", "arrival")
        for name in (*weights, "margin", "reach"):
            _at_least_zero(f"zubov.{name}", getattr(self, name))
        for name in ("eps", "temperature", *(() if self.floor is None else ("floor",))):
            _at_least_zero(f"zubov.{name}", getattr(self, name), positive=True)
        if not any(getattr(self, name) for name in weights):
            raise ValueError("zubov's weights are all 0, expected a loss to minimise")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the final weights, and where the run looks for its data.

    The defaults are the paper's MNIST recipe (arXiv 2508.11432), but for ``rate_margin`` (0 in the paper) and ``init``
    ("default" there). ``TrainConfig.recipe`` gives that of each data set.

    Raises:
        TypeError, ValueError: a field out of its range; the message names it, its value and what was expected.
    """

    dataset: Literal[
        "digits", "mnist", "fashionmnist", "cifar10", "cifar100", "svhn", "moons", "rings", "blobs", "blobs3"
    ] = _field(..., _DATA, "Data set; the last four are points in the plane, for Zubov-Nets.")
    data_root: str | None = _field(
        None, _DATA, "torchvision's folder; else $RNF_DATA_ROOT, else ~/.cache/robust_node_fast."
    )
    network: Literal["vanilla", "contractive"] = _field(
        "contractive", _NETWORK, "With or without the contraction penalty."
    )
    model: Literal[
        "MNISTNode",
        "CIFARNode",
        "StagedCIFARNode",
        "StridedNode",
        "zubov",
        "resnet",
        "node",
        "contractive-node",
        "lyanet",
    ] = _field("MNISTNode", _NETWORK, "Network of rnf.models, a Zubov-Net, or one that is compared with it.")
    n_steps: int | None = _field(None, _NETWORK, "Euler steps (per stage); else the model's own number.")
    step_size: float | None = _field(None, _NETWORK, "Euler step h; else the model's own.")
    init: Literal["centered", "default", "identity", "authors"] = _field(
        "centered",
        _NETWORK,
        "Start: PyTorch's with nn.center_bias_, PyTorch's (the paper's), nn.contractive_init_, or nn.authors_init_.",
    )
    seed: int = _field(0, _NETWORK, "Seed of weights, data order, augmentation, dropout.")
    train_samples: int | None = _field(None, _DATA, "First training images; else all.")
    epochs: int = _field(5, _OPTIMIZER, "Passes over the training set.")
    steps: int | None = _field(None, _OPTIMIZER, "Optimizer steps, in the place of epochs.")
    batch_size: int = _field(128, _OPTIMIZER, "Images per optimizer step, over all processes.")
    accumulate: int = _field(1, _OPTIMIZER, "Parts of a batch, computed one after another to save memory.")
    augmentation: Literal["none", "crop", "crop-flip", "crop-flip-cutout"] = _field(
        "none", _DATA, "Shift by up to 4 pixels; flip: and mirror; cutout: and a black square."
    )
    noise: float = _field(
        0.0,
        _DATA,
        "Gaussian noise on training images, each with a sigma between 0 and this; the worst-case loss has none.",
    )
    label_smoothing: float = _field(0.0, _OPTIMIZER, "Share of a label spread over all classes.")
    optimizer: Literal["adam", "adamw", "sgd"] = _field("adam", _OPTIMIZER, "Optimizer of torch.optim.")
    lr: float = _field(0.05, _OPTIMIZER, "Learning rate of the first epoch.")
    lr_batch_size: int | None = _field(None, _OPTIMIZER, "Batch size that lr is meant for: it is scaled in proportion.")
    schedule: Literal["step", "cosine"] = _field(
        "step", _OPTIMIZER, "Learning rate: by lr_decay and milestones, or to 0 along half a cosine."
    )
    warmup_epochs: int = _field(0, _OPTIMIZER, "First epochs, in which the learning rate grows.")
    lr_decay: float = _field(0.7, _OPTIMIZER, "Factor on the learning rate after every epoch (schedule step).")
    milestones: list[int] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Epochs after which lr drops to a tenth (schedule step).",
            "section": _OPTIMIZER,
        },
    )
    momentum: float = _field(0.0, _OPTIMIZER, "Momentum of SGD.")
    nesterov: bool = _field(False, _OPTIMIZER, "Nesterov's momentum.")
    weight_decay: float = _field(0.0, _OPTIMIZER, "Weight decay.")
    grad_clip: float = _field(0.0, _OPTIMIZER, "Largest 2-norm of the gradient; 0: any.")
    ema_decay: float = _field(0.0, _OPTIMIZER, "Decay of the average of the weights that is tested and kept; 0: none.")
    rate: float = _field(
        2.0, _CONTRACTION, "Rate asked for: of contraction (rho), or at which Lyapunov functions decay."
    )
    rate_margin: float = _field(
        0.05,
        _CONTRACTION,
        "The penalty asks for rate * (1 + rate_margin), to end inside its hinge; 0 is the paper's loss.",
    )
    norm: Literal["2", "2-sharp", "inf", "1"] = _field("2", _CONTRACTION, "Norm of the contraction penalty.")
    penalty_weight: float = _field(1.0, _CONTRACTION, "Weight of the penalty beside the cross-entropy.")
    regularizer: Literal["filters", "jacobian"] = _field(
        "filters",
        _CONTRACTION,
        "What is penalised: filters, or the Jacobian (norm 2) of the first 8 images of every process.",
    )
    certified_eps: float = _field(
        0.0,
        _CONTRACTION,
        "Train for certificates (bound E) up to this l_inf radius, reached half-way; 0: no.",
    )
    certified_weight: float = _field(
        0.5, _CONTRACTION, "Weight of the worst-case loss once that radius is reached; the clean loss has the rest."
    )
    track_eps: float = _field(
        0.0, _CONTRACTION, "After every epoch, the share of 256 test images certified at this l_inf radius; 0: no."
    )
    checkpoint_every: int = _field(200, _RUN, "Steps between checkpoints (one more after every epoch).")
    device: str = _field("cpu", _RUN, "Device to train on.")
    channels_last: bool = _field(False, _RUN, "Images and states in channels_last.")
    autocast: bool = _field(False, _RUN, "The network in bfloat16 by torch.autocast; weights and losses in float32.")
    compile: bool = _field(False, _RUN, "torch.compile the network with its losses.")
    shard: bool = _field(
        False, _RUN, "Of several processes, each keeps a part of weights, gradients and optimizer state (FSDP2)."
    )
    zubov: ZubovConfig = dataclasses.field(default_factory=ZubovConfig, metadata={"help": "", "section": _ZUBOV})

    def __post_init__(self) -> None:
        if isinstance(self.zubov, Mapping):  # as JSON and recipes have it
            object.__setattr__(self, "zubov", ZubovConfig(**self.zubov))
        for name, choices in (
            ("dataset", data.NAMES),
            ("network", NETWORKS),
            ("model", networks.NAMES),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("norm", _checks.NORMS),
            ("init", INITS),
            ("regularizer", REGULARIZERS),
            ("augmentation", augment.AUGMENTATIONS),
        ):
            _checks.choice(name, getattr(self, name), choices)
        for field in dataclasses.fields(self):
            name, kind = field.name, field.type
            value, least = getattr(self, name), int(name not in ("seed", "warmup_epochs"))
            if kind == "bool" and not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected a bool")
            if kind not in ("int", "int | None") or (kind == "int | None" and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected an int")
            if value < least:
                raise ValueError(f"{name}={value!r} is too small, expected at least {least}")
        if self.seed >= _SEEDS:
            raise ValueError(f"seed={self.seed!r} is too large, expected less than 2^32")
        if any(not isinstance(epoch, int) or epoch < 1 for epoch in self.milestones):
            raise ValueError(f"milestones={self.milestones!r} is not a list of epochs, expected ints of at least 1")
        for name in ("lr", "lr_decay", "rate"):
            _at_least_zero(name, getattr(self, name), positive=True)
        for name in ("momentum", "weight_decay", "grad_clip", "rate_margin", "penalty_weight", "noise"):
            _at_least_zero(name, getattr(self, name))
        _at_least_zero("certified_eps", self.certified_eps)
        _at_least_zero("track_eps", self.track_eps)
        _at_least_zero("certified_weight", self.certified_weight)
        if self.certified_weight > 1:
            raise ValueError(f"certified_weight={self.certified_weight!r} is out of range, expected a number <= 1")
        for name in ("label_smoothing", "ema_decay"):
            _at_least_zero(name, getattr(self, name))
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range, expected a number < 1")
        if self.step_size is not None:
            _at_least_zero("step_size", self.step_size, positive=True)
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"momentum={self.momentum!r} belongs to SGD, expected 0 with optimizer={self.optimizer!r}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True asks for a momentum, expected optimizer='sgd' and a momentum > 0")
        if self.compile and self.certified_eps:
            raise ValueError("compile=True does not fit certified_eps: its radius, new in every step, is compiled in")
        if self.compile and self.shard:
            raise ValueError("compile=True does not fit shard=True: weights that come and go are not compiled in")
        if self.autocast and self.regularizer == "jacobian":
            raise ValueError("autocast=True does not fit regularizer='jacobian', whose products are float32")
        self._check_network()

    def _check_network(self) -> None:
        """That model and data set fit each other and the settings."""
        if self.is_convolutional:
            if self.dataset in data.PLANE:
                raise ValueError(f"model={self.model!r} takes images, expected model='zubov' for {self.dataset!r}")
            if self.certified_eps and self.model not in WITHOUT_BATCH_NORM:
                raise ValueError(
                    f"certified_eps={self.certified_eps!r} does not fit model={self.model!r}: batch normalisation has "
                    f"no bound while it trains, expected one of {WITHOUT_BATCH_NORM}"
                )
            return
        for name, value in _CONVOLUTIONAL_ONLY.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not fit model={self.model!r}, expected {value!r}"
                )
        if self.model == "zubov" and self.label_smoothing:
            raise ValueError(f"label_smoothing={self.label_smoothing!r} does not fit model='zubov', expected 0")
        allowed = networks.BACKBONES[:2] if self.dataset in data.PLANE else networks.BACKBONES[2:]
        if self.zubov.backbone not in allowed:
            raise ValueError(
                f"zubov.backbone={self.zubov.backbone!r} does not fit dataset={self.dataset!r}, expected one of "
                f"{', '.join(map(repr, allowed))}"
            )
        if self.dataset in data.PLANE and not self.zubov.shared_weights:
            raise ValueError(
                "zubov.shared_weights=False has no regions of attraction to draw, expected True in the plane"
            )
        if self.zubov.dynamics == "conv":
            pixels = 0 if self.dataset in data.PLANE else contenders.side(data.IMAGES[self.dataset][1]) ** 2
            if self.zubov.backbone != "conv" or self.zubov.dim % pixels:
                raise ValueError(
                    f"zubov.dynamics='conv' does not fit zubov.backbone={self.zubov.backbone!r} and "
                    f"zubov.dim={self.zubov.dim!r}, expected 'conv' and, for {self.dataset!r}, a multiple of {pixels}"
                )
        if self.zubov.backbone == "identity" and self.zubov.dim != 2:
            raise ValueError(f"zubov.dim={self.zubov.dim!r} does not fit zubov.backbone='identity', expected 2")
        if self.dataset in data.PLANE and (self.augmentation != "none" or self.channels_last or self.track_eps):
            raise ValueError(f"augmentation, channels_last and track_eps are for images, not for {self.dataset!r}")

    @classmethod
    def recipe(cls, dataset: Any, recipe: str | None = None, **changes: Any) -> TrainConfig:
        """A recipe of ``RECIPES`` for a data set, with fields replaced by ``changes``.

        Args:
            dataset: as the field.
            recipe: None: "zubov" for the networks that are not convolutional and in the plane, else "contractive".
            changes: ``zubov`` may be a mapping with a few of its fields.

        Raises:
            TypeError, ValueError: there is no such recipe; else as ``TrainConfig``.
        """
        if recipe is None:
            others = changes.get("model", "MNISTNode") not in networks.CONVOLUTIONAL or dataset in data.PLANE
            recipe = "zubov" if others else "contractive"
        _checks.choice("recipe", recipe, tuple(RECIPES))
        _checks.choice("dataset", dataset, data.NAMES)
        known = RECIPES[recipe]
        if dataset not in known:
            raise ValueError(f"recipe={recipe!r} is there for {', '.join(known)}, not for dataset={dataset!r}")
        model = changes.get("model", known[dataset].get("model", ""))
        chosen = CHOSEN.get((dataset, model), {}) if recipe == "zubov" else {}
        settings = {**known[dataset], **chosen, **changes}
        if not isinstance(settings.get("zubov"), ZubovConfig):
            own = known[dataset].get("zubov", {})
            if settings.get("model") != "zubov":  # the networks beside it have no Lyapunov functions
                own = {name: own[name] for name in BESIDE_ZUBOV if name in own}
            settings["zubov"] = {**own, **changes.get("zubov", {})}
        return cls(dataset, **settings)

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

    def settings(self) -> dict[str, Any]:
        """All fields but those that change no number."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _CHANGE_NO_NUMBER}

    def departures(self) -> dict[str, Any]:
        """The data set, and the settings that are not the defaults."""
        found = {}
        for field in dataclasses.fields(self):
            if field.name in ("dataset", *_CHANGE_NO_NUMBER):
                continue
            default = field.default_factory() if callable(field.default_factory) else field.default
            if (value := getattr(self, field.name)) != default:
                found[field.name] = value
        if "zubov" in found:
            usual = dataclasses.asdict(ZubovConfig())
            own = dataclasses.asdict(self.zubov)
            found["zubov"] = {name: value for name, value in own.items() if value != usual[name]}
        return {"dataset": self.dataset, **found}

    @property
    def is_convolutional(self) -> bool:
        """Whether the model is one of ``rnf.models``."""
        return self.model in networks.CONVOLUTIONAL

    @property
    def title(self) -> str:
        """What the network is called beside others: vanilla or contractive, or the model where there is but one."""
        return self.network if self.is_convolutional else self.model

    @property
    def penalty_rate(self) -> float:
        """The rate that the penalty asks for."""
        return self.rate * (1.0 + self.rate_margin)

    @property
    def scaled_lr(self) -> float:
        """``lr`` for this batch size, by the linear scaling rule (arXiv 1706.02677)."""
        return self.lr if self.lr_batch_size is None else self.lr * self.batch_size / self.lr_batch_size

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of a run on so many training samples."""
        return self.epochs * math.ceil(samples / self.batch_size) if self.steps is None else self.steps

    def lr_factor(self, epochs: float, progress: float = 0.0) -> float:
        """Factor on ``scaled_lr`` after so many epochs, when this share of the run is done.

        With the schedule "step" it changes within an epoch only while that is warm-up.
        """
        epoch = math.floor(epochs)
        warm = min(1.0, epochs / self.warmup_epochs) if self.warmup_epochs else 1.0
        if self.schedule == "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            drops = sum(epoch >= milestone for milestone in self.milestones)
            factor = math.pow(self.lr_decay, epoch) * math.pow(0.1, drops)
        return (_WARMUP_START + (1.0 - _WARMUP_START) * warm if warm < 1.0 else 1.0) * factor

    def certified_share(self, progress: float) -> float:
        """How much of ``certified_eps`` is trained for when this share of the run is done: all of it from half on.

        The cross-entropy of the worst-case logits then weighs as much as the clean one.
        """
        return min(1.0, 2.0 * progress)

    def build_model(self) -> torch.nn.Module:
        """A freshly initialised network for the data set."""
        return networks.build(self)

    def initial_model(self) -> torch.nn.Module:
        """The network that a run starts with; seeds PyTorch's random numbers."""
        torch.manual_seed(self.seed)
        return self.build_model()


def _at_least_zero(name: str, value: Any, *, positive: bool = False) -> None:
    _checks.number(name, value)
    if value < 0 or (positive and value == 0):
        raise ValueError(f"{name}={value!r} is out of range, expected a number {'>' if positive else '>='} 0")
