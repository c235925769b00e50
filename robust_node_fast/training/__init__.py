"""Training runs: one configuration, resumable to the bit, in a folder of JSON, JSON lines and safetensors."""

from robust_node_fast.training.checkpoint import CheckpointError
from robust_node_fast.training.config import NETWORKS, TrainConfig, ZubovConfig
from robust_node_fast.training.errors import Interrupted, InUse, Refused, RunError
from robust_node_fast.training.folder import accuracy_by_epoch, last_step, load_config, load_model, prepare, writing
from robust_node_fast.training.locks import alone, shared_out
from robust_node_fast.training.networks import NAMES as MODELS
from robust_node_fast.training.networks import certificate
from robust_node_fast.training.recipes import RECIPES
from robust_node_fast.training.trainer import RATE_TOLERANCE, Outcome, check_device, fit, rate_sentence

__all__ = [
    "MODELS",
    "NETWORKS",
    "RATE_TOLERANCE",
    "RECIPES",
    "CheckpointError",
    "InUse",
    "Interrupted",
    "Outcome",
    "Refused",
    "RunError",
    "TrainConfig",
    "ZubovConfig",
    "accuracy_by_epoch",
    "alone",
    "certificate",
    "check_device",
    "fit",
    "last_step",
    "load_config",
    "load_model",
    "prepare",
    "rate_sentence",
    "shared_out",
    "writing",
]
