"""AutoAttack by its authors' code, where its release pyautoattack is installed. Nothing else here bears the name.

RobustBench requires that package too. The class of that name in torchattacks 3.5.1 is not used:
its APGD and FAB take 10 steps where the published ensemble takes 100.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.robustness import _inputs

__all__ = ["MISSING", "add_remark", "autoattack", "available", "refusal", "remarks"]

MISSING = "AutoAttack was not run: no release of its authors' code is installed (pip install pyautoattack)"
FEWEST_CLASSES = 4  # the targeted loss compares the largest logit with the third and fourth
SMALLEST_SIDE = 5  # Square divides by the side of a square of 0 pixels
LOGGER = "auto-attack"  # the authors'
_TAG = re.compile(r"l_\w+ eps \S+: ")  # what ``_tagged`` puts in front of a remark
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)(?: to (\d+(?:\.\d+)?))?")  # or a range of them


def available() -> bool:
    return importlib.util.find_spec("pyautoattack") is not None


@contextmanager
def remarks(found: list[str]) -> Iterator[list[str]]:
    """``found`` and what the authors' own checks find fault with inside: that gradients vanish, say.

    Each once: the checks run for every batch, and what differs from one to the next in numbers alone becomes one remark
    a radius, with the range of the numbers ("0.45 to 3.80%").
    """

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            add_remark(found, " ".join(record.getMessage().split()))

    logger, collector = logging.getLogger(LOGGER), Collector(logging.WARNING)
    logger.addHandler(collector)
    try:
        yield found
    finally:
        logger.removeHandler(collector)


def add_remark(found: list[str], remark: str) -> None:
    """Append it, or put it into one that differs in numbers alone."""
    for number, other in enumerate(found):
        if (both := _merged(other, remark)) is not None:
            found[number] = both
            return
    found.append(remark)


def _merged(one: str, other: str) -> str | None:
    """Two remarks as one, each number as the range from the least to the largest; None if more than numbers differ."""
    tags = [match[0] if (match := _TAG.match(remark)) else "" for remark in (one, other)]
    bodies = [remark.removeprefix(tag) for remark, tag in zip((one, other), tags, strict=True)]
    if tags[0] != tags[1] or _NUMBER.sub("#", bodies[0]) != _NUMBER.sub("#", bodies[1]):
        return None
    ranges: list[str] = []
    for pair in zip(*(_NUMBER.finditer(body) for body in bodies), strict=True):
        ends = sorted((end for match in pair for end in match.groups() if end is not None), key=float)
        ranges.append(ends[0] if float(ends[0]) == float(ends[-1]) else f"{ends[0]} to {ends[-1]}")
    each = iter(ranges)
    return tags[0] + _NUMBER.sub(lambda _: next(each), bodies[0])


@contextmanager
def _tagged(norm: str, eps: float) -> Iterator[None]:
    """What the authors' code logs inside begins with the ball that was attacked."""

    def tag(record: logging.LogRecord) -> bool:
        record.msg, record.args = f"l_{norm} eps {eps:g}: {record.getMessage()}", ()
        return True

    logger = logging.getLogger(LOGGER)
    logger.addFilter(tag)
    try:
        yield
    finally:
        logger.removeFilter(tag)


def autoattack(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, norm: str = "inf", generator: torch.Generator
) -> Tensor:
    """The standard version: APGD on the cross-entropy, targeted APGD, targeted FAB, Square (Croce & Hein, 2003.01690).

    The targeted attacks aim at nine other classes, or at all of them where there are fewer. What the authors' own
    checks find (a randomised defence, say) is logged as "auto-attack", with norm and radius in front; ``remarks``
    collects it.

    Args:
        model, images, labels, eps, norm: as in ``attacks.fgsm``; in float32, logits of at least four classes.
        generator: on the CPU; seeds the ensemble.

    Returns:
        ``(B, C, H, W)``, in the ball up to rounding and in [0, 1]; an image that no attack broke, or that is classified
        wrongly as it is, comes back unchanged.

    Raises:
        ModuleNotFoundError: the authors' code is not installed.
        TypeError, ValueError: as ``attacks.fgsm``; what ``refusal`` names.
    """
    _inputs.check_radius("eps", eps)
    _checks.choice("norm", norm, _inputs.NORMS)
    if not available():
        raise ModuleNotFoundError(MISSING)
    from pyautoattack import AutoAttack

    seed = int(torch.randint(2**31, (), generator=generator))
    tracer = sys.gettrace()
    # It seeds the global generators.
    with _inputs.attacked(model, images, labels), torch.random.fork_rng(), _tagged(norm, eps):
        with torch.no_grad():
            logits = model(images)
        _inputs.check_logits(logits, labels)
        if reason := refusal(images, logits.shape[1], norm):
            raise ValueError(reason)
        ensemble = AutoAttack(
            model, norm="Linf" if norm == "inf" else "L2", eps=eps, seed=seed, device=str(images.device)
        )
        targets = min(9, logits.shape[1] - 1)
        ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = targets
        try:
            attacked: Tensor = ensemble.run_standard_evaluation(images.contiguous(), labels, batch_size=len(images))[0]
        finally:
            sys.settrace(tracer)  # which it takes away
    return attacked.detach()


def refusal(images: Tensor, num_classes: int, norm: str) -> str:
    """Why the authors' code cannot attack such a network, in one sentence; empty where it can."""
    if images.dtype != torch.float32:
        return f"AutoAttack computes in torch.float32, images are {images.dtype}"
    if num_classes < FEWEST_CLASSES:
        return f"AutoAttack needs at least {FEWEST_CLASSES} classes, the model has {num_classes}"
    if norm == "2" and min(images.shape[2:]) < SMALLEST_SIDE:
        return f"AutoAttack in l_2 needs images of {SMALLEST_SIDE} pixels a side, these have {tuple(images.shape[2:])}"
    return ""
