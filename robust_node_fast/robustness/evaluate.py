"""``evaluate``: accuracy of a network on clean, noisy and attacked images, with checks that the numbers make sense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.robustness import attacks, noise
from robust_node_fast.robustness.report import Check, Report, Result

__all__ = ["evaluate"]

SUITES = ("standard",)
SIGMAS = (0.1, 0.2, 0.3)
FRACTIONS = (0.05, 0.2)
PGD_STEPS = 40
PGD_STEP_SIZE = 2.5  # times eps / PGD_STEPS (Madry et al.): can cross the ball, and settle in it

Batch = tuple[Tensor, Tensor]
Corrupt = Callable[[Tensor, Tensor, torch.Generator], Tensor]


@dataclass
class _Test:
    """One line of the suite, its random numbers, and what it counted so far."""

    name: str
    strength: float
    corrupt: Corrupt
    seeds: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.correct = [0] * len(self.seeds)

    def result(self, n_samples: int) -> Result:
        per_seed = tuple(correct / n_samples for correct in self.correct)
        return Result(self.name, self.strength, per_seed, self.settings)


def evaluate(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    *,
    suite: str = "standard",
    eps: float | Sequence[float] = 0.1,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 128,
    on_batch: Callable[[int], None] | None = None,
) -> Report:
    """Accuracy on clean images, under noise and under attack.

    The suite ``"standard"``: Gaussian noise of sigma 0.1, 0.2 and 0.3 (not clipped), salt-and-pepper noise on 5% and
    20% of the pixels, both for every seed; FGSM and PGD in the l_inf ball of every ``eps``, PGD with 40 steps of
    ``2.5 * eps / 40`` from one random start (the first seed's). The checks compare the results with one another:
    PGD <= FGSM <= clean, and eps 0 leaves every prediction as it is.

    Args:
        model: in eval mode; images to logits ``(B, K)``. Runs on the device of its parameters.
        data: ``(images, labels)``, images ``(n, C, H, W)`` in [0, 1] and int64 labels ``(n,)``; or an iterable of such
            batches, which is read once.
        suite: ``"standard"``.
        eps: radius of the attacks, or several.
        seeds: of the noise; the spread over them is reported.
        batch_size: of a pair of tensors; batches are taken as they come.
        on_batch: called after every batch with the number of images done.

    Raises:
        TypeError, ValueError: ``model`` is in training mode or has weights that are not finite; ``data`` is empty, its
            images and labels do not fit, are not finite or out of [0, 1], or a label is no class of the model; ``eps``
            is negative; ``seeds`` is empty; unknown ``suite``.
    """
    _checks.choice("suite", suite, SUITES)
    _check_model(model)
    radii = _radii(eps)
    if not seeds:
        raise ValueError("seeds is empty, expected at least one seed")
    tests = _standard(model, radii, tuple(seeds))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    n_samples = unchanged = 0
    for batch in _batches(data, batch_size):
        images, labels = (tensor.to(device) for tensor in batch)
        clean = _predict(model, images, labels)
        for test in tests:
            for k, generator in enumerate(test.generators):
                predicted = _predict(model, test.corrupt(images, labels, generator), labels)
                test.correct[k] += int((predicted == labels).sum())
        nowhere = attacks.pgd(model, images, labels, 0.0, step_size=0.0, n_steps=1, generator=torch.Generator())
        for attacked in (attacks.fgsm(model, images, labels, 0.0), nowhere):
            unchanged += int((_predict(model, attacked, labels) == clean).sum())
        n_samples += len(labels)
        if on_batch is not None:
            on_batch(n_samples)
    if n_samples == 0:
        raise ValueError("data is empty, expected at least one image")
    results = tuple(test.result(n_samples) for test in tests)
    settings = {
        "eps": radii,
        "seeds": list(seeds),
        "pgd_steps": PGD_STEPS,
        "pgd_step_size": f"{PGD_STEP_SIZE} eps / {PGD_STEPS}",
    }
    checks = (*_order_checks(results, radii), _zero_check(unchanged, 2 * n_samples))
    return Report(suite, n_samples, results, checks, settings)


def _standard(model: nn.Module, radii: list[float], seeds: tuple[int, ...]) -> list[_Test]:
    tests = [_Test("clean", 0.0, lambda images, labels, generator: images, seeds[:1])]
    for sigma in SIGMAS:
        tests.append(_Test("gaussian", sigma, _noise(noise.gaussian, sigma), seeds))
    for fraction in FRACTIONS:
        tests.append(_Test("salt_and_pepper", fraction, _noise(noise.salt_and_pepper, fraction), seeds))
    for eps in radii:
        tests.append(_Test("fgsm", eps, _fgsm(model, eps), seeds[:1]))
        settings = {"step_size": PGD_STEP_SIZE * eps / PGD_STEPS, "n_steps": PGD_STEPS, "n_restarts": 1}
        tests.append(_Test("pgd", eps, _pgd(model, eps, settings), seeds[:1], settings))
    return tests


def _noise(function: Callable[[Tensor, float, torch.Generator], Tensor], strength: float) -> Corrupt:
    return lambda images, labels, generator: function(images, strength, generator)


def _fgsm(model: nn.Module, eps: float) -> Corrupt:
    return lambda images, labels, generator: attacks.fgsm(model, images, labels, eps)


def _pgd(model: nn.Module, eps: float, settings: dict[str, Any]) -> Corrupt:
    return lambda images, labels, generator: attacks.pgd(model, images, labels, eps, generator=generator, **settings)


def _order_checks(results: tuple[Result, ...], radii: list[float]) -> Iterator[Check]:
    """A stronger attack never leaves a higher accuracy."""
    accuracy = {(result.name, result.strength): result.mean for result in results}
    clean = accuracy["clean", 0.0]
    for eps in radii:
        fgsm, pgd = accuracy["fgsm", eps], accuracy["pgd", eps]
        detail = f"{pgd:.2%}, {fgsm:.2%}, {clean:.2%}"
        yield Check(f"PGD <= FGSM <= clean at eps {eps:g}", pgd <= fgsm <= clean, detail)


def _zero_check(unchanged: int, total: int) -> Check:
    return Check("eps 0 = clean", unchanged == total, f"{unchanged} of {total} predictions under attack unchanged")


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = model(images)
    if logits.dim() != 2 or len(logits) != len(labels):
        raise ValueError(f"model gives {tuple(logits.shape)} for {len(labels)} images, expected logits (B, K)")
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"data has label {int(labels.max())}, expected labels below the model's {logits.shape[1]} classes"
        )
    return logits.argmax(1)


def _batches(data: Batch | Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        images, labels = data
        _check_batch(images, labels)
        yield from zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
        return
    for batch in data:
        images, labels = batch
        _check_batch(images, labels)
        yield images, labels


def _check_batch(images: object, labels: object) -> None:
    _checks.tensor("data's images", images)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"data's labels are {kind}, expected an int64 tensor")
    assert isinstance(images, Tensor)
    if images.dim() != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"data has images {tuple(images.shape)} and labels {tuple(labels.shape)}, expected (n, C, H, W) and (n,)"
        )
    if not len(labels):
        raise ValueError("data is empty, expected at least one image")
    if not (float(images.min()) >= 0.0 and float(images.max()) <= 1.0):  # false for NaN as well
        raise ValueError(
            f"data has images from {float(images.min())} to {float(images.max())}, expected values in [0, 1]"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"data has label {int(labels.min())}, expected labels >= 0")


def _check_model(model: nn.Module) -> None:
    if model.training:
        raise ValueError("model is in training mode, expected model.eval()")
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"model has values that are not finite in {name}, expected finite weights")


def _radii(eps: float | Sequence[float]) -> list[float]:
    radii = [eps] if isinstance(eps, (int, float)) else list(eps)
    if not radii:
        raise ValueError("eps is empty, expected at least one radius")
    for radius in radii:
        _checks.number("eps", radius)
        if radius < 0:
            raise ValueError(f"eps={radius!r} is negative, expected a radius >= 0")
    return [float(radius) for radius in radii]
