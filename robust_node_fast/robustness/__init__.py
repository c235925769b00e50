"""How a network holds under noise and attacks: ``evaluate`` runs a suite and gives a ``Report``."""

from robust_node_fast.robustness.attacks import fgsm, pgd
from robust_node_fast.robustness.auto_attack import autoattack
from robust_node_fast.robustness.evaluate import evaluate
from robust_node_fast.robustness.noise import gaussian, salt_and_pepper, shot, uniform
from robust_node_fast.robustness.report import Check, Example, Report, Result
from robust_node_fast.robustness.square_attack import square

__all__ = [
    "Check",
    "Example",
    "Report",
    "Result",
    "autoattack",
    "evaluate",
    "fgsm",
    "gaussian",
    "pgd",
    "salt_and_pepper",
    "shot",
    "square",
    "uniform",
]
