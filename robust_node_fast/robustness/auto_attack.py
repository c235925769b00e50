"""AutoAttack by its authors' code, where that can be imported. Nothing else here bears the name.

The class of that name in torchattacks 3.5.1 is not used: its APGD and FAB take 10 steps where the published ensemble
takes 100.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.robustness import _inputs

__all__ = ["MISSING", "autoattack", "available"]

MISSING = (
    "AutoAttack was not run: the package autoattack, its authors' code (github.com/fra31/auto-attack), is not installed"
)


def available() -> bool:
    return importlib.util.find_spec("autoattack") is not None


def autoattack(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, norm: str = "inf", generator: torch.Generator
) -> Tensor:
    """The standard version: APGD on the cross-entropy, targeted APGD, targeted FAB, Square (Croce & Hein, 2003.01690).

    Args:
        model, images, labels, eps, norm: as in ``attacks.fgsm``.
        generator: on the CPU; seeds the ensemble.

    Returns:
        ``(B, C, H, W)``, in the ball and in [0, 1].

    Raises:
        ModuleNotFoundError: the authors' code is not installed.
        TypeError, ValueError: as ``attacks.fgsm``.
    """
    _inputs.check_radius("eps", eps)
    _checks.choice("norm", norm, _inputs.NORMS)
    if not available():
        raise ModuleNotFoundError(MISSING)
    from autoattack import AutoAttack

    seed = int(torch.randint(2**31, (), generator=generator))
    with _inputs.attacked(model, images, labels), torch.random.fork_rng():  # it seeds the global generators
        ensemble = AutoAttack(
            model, norm="Linf" if norm == "inf" else "L2", eps=eps, seed=seed, verbose=False, device=str(images.device)
        )
        attacked: Tensor = ensemble.run_standard_evaluation(images, labels, bs=len(images))
    return attacked.detach()
