"""How a network holds under noise and attacks: ``evaluate`` runs a suite and gives a ``Report``."""

from robust_node_fast.robustness.attacks import fgsm, pgd
from robust_node_fast.robustness.evaluate import evaluate
from robust_node_fast.robustness.noise import gaussian, salt_and_pepper
from robust_node_fast.robustness.report import Check, Report, Result

__all__ = ["Check", "Report", "Result", "evaluate", "fgsm", "gaussian", "pgd", "salt_and_pepper"]
