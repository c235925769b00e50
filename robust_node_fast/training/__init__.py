"""Training runs: one configuration, resumable to the bit, in a folder of JSON, JSON lines and safetensors."""

from robust_node_fast.training.checkpoint import CheckpointError
from robust_node_fast.training.config import NETWORKS, RECIPES, TrainConfig
from robust_node_fast.training.errors import Interrupted, RunError
from robust_node_fast.training.folder import accuracy_by_epoch, load_config, load_model, prepare, writing
from robust_node_fast.training.trainer import RATE_TOLERANCE, Outcome, check_device, fit, rate_sentence

__all__ = [
    "NETWORKS",
    "RATE_TOLERANCE",
    "RECIPES",
    "CheckpointError",
    "Interrupted",
    "Outcome",
    "RunError",
    "TrainConfig",
    "accuracy_by_epoch",
    "check_device",
    "fit",
    "load_config",
    "load_model",
    "prepare",
    "rate_sentence",
    "writing",
]
