"""``evaluate``: accuracy of a network on clean, noisy and attacked images, with checks that the numbers make sense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast._version import __version__
from robust_node_fast.robustness import auto_attack, checks
from robust_node_fast.robustness._inputs import check_batch, check_count, check_model, check_radius, predict
from robust_node_fast.robustness.report import Check, Example, Report, Result
from robust_node_fast.robustness.suite import BALLS, SUITES, Attack, transferred

__all__ = ["evaluate"]

SHOWN = 8  # images in the report

Batch = tuple[Tensor, Tensor]
Certify = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


@dataclass(eq=False)
class _Test:
    """One line of the report: its random numbers, what it counted so far, and the first images of it."""

    name: str
    strength: float = 0.0
    measure: str = ""
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, Any] = field(default_factory=dict)
    shown: bool = False
    example: Example | None = None

    def __post_init__(self) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.correct, self.seen = [0] * len(self.seeds), [0] * len(self.seeds)

    def classify(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
        """Which images ``(B,)`` the model gets right; counted."""
        predicted = predict(model, images, labels)
        if self.shown and self.example is None:
            few = slice(SHOWN)
            classes = tuple(labels[few].tolist()), tuple(predicted[few].tolist())
            self.example = Example(self.result().label, images[few].cpu(), *classes)
        return self.count(predicted == labels, seed)

    def count(self, right: Tensor, seed: int = 0) -> Tensor:
        self.correct[seed] += int(right.sum())
        self.seen[seed] += len(right)
        return right

    @property
    def accuracy(self) -> float:
        return self.result().mean

    def result(self) -> Result:
        per_seed = tuple(correct / max(1, seen) for correct, seen in zip(self.correct, self.seen, strict=True))
        return Result(self.name, self.strength, per_seed, self.settings, self.measure)


class _Ball:
    """All attacks of one radius in one norm, image by image."""

    def __init__(self, attacks: Sequence[Attack], norm: str, eps: float, seed: int, shown: bool) -> None:
        self.norm, self.eps, measure = norm, eps, BALLS[norm]
        self.attacks = [
            (attack, _Test(attack.name, eps, measure, (seed,), attack.settings(eps), shown))
            for attack in attacks
            if attack.norm == norm
        ]
        self.worst = _Test("worst case", eps, measure)
        self.certified = _Test("certified", eps, measure)
        # For the checks only: on the attacked images, which may be fewer than all.
        self.clean, self.iterative, self.white = _Test("clean"), _Test("iterative"), _Test("white box")
        self.tried = self.broken = 0  # certified images that were attacked, and those that fell

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, unharmed: Tensor) -> Tensor:
        """Which images survive everything; ``unharmed`` says which are classified rightly."""
        if not len(labels):
            return unharmed
        self.clean.count(unharmed)
        survives, iterative, white = unharmed, torch.ones_like(unharmed), torch.ones_like(unharmed)
        for attack, test in self.attacks:
            attacked = attack.run(attack.source or model, images, labels, self.eps, test.generators[0])
            right = test.classify(model, attacked, labels)
            survives = survives & right
            if attack.kind == "iterative":
                iterative = iterative & right
            if attack.kind != "black box":
                white = white & right
        self.iterative.count(iterative)
        self.white.count(white)
        return self.worst.count(survives)

    def certify(self, certified: Tensor, survives: Tensor) -> None:
        """``survives`` may hold fewer images: the first."""
        self.certified.count(certified)
        tried = certified[: len(survives)]
        self.tried += int(tried.sum())
        self.broken += int((tried & ~survives).sum())

    def tests(self, certify: Certify | None) -> list[_Test]:
        certified = [] if certify is None or self.norm != "inf" else [self.certified]
        return [*(test for _, test in self.attacks), self.worst, *certified]

    def checks(self, certify: Certify | None) -> Iterator[Check]:
        (single,) = (test.accuracy for attack, test in self.attacks if attack.kind == "single step")
        black = {attack.name: test.accuracy for attack, test in self.attacks if attack.kind == "black box"}
        name = f"{BALLS[self.norm]} {self.eps:g}"
        yield from checks.order(name, self.clean.accuracy, single, self.iterative.accuracy, self.white.accuracy, black)
        if self.certified in self.tests(certify):
            detail = f"{self.broken} of {self.tried} certified images fall to an attack"
            yield Check(f"certified <= attacked for every image at {name}", not self.broken, detail)


def evaluate(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    *,
    suite: str = "standard",
    eps: float | Sequence[float] = 0.1,
    eps_l2: float | Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    sources: Mapping[str, nn.Module] | None = None,
    certify: Certify | None = None,
    attack_samples: int | None = None,
    batch_size: int = 128,
    on_batch: Callable[[int], None] | None = None,
) -> Report:
    """Accuracy on clean images, under noise and under attack, and in the worst case over all attacks image by image.

    Noise is drawn for every seed and not clipped; attacks start from the first seed. The suites:

    - ``"quick"``: Gaussian noise of sigma 0.2; FGSM; PGD with 10 steps.
    - ``"standard"``: Gaussian noise of sigma 0.1, 0.2 and 0.3, salt-and-pepper noise on 5% and 20% of the pixels; FGSM;
      PGD with 40 steps.
    - ``"full"``: these, uniform and shot noise; PGD with 40 steps and 5 restarts, once on the cross-entropy and once on
      the margin; the Square attack with 1,000 queries (l_inf); AutoAttack, where its authors' code is installed.

    PGD takes steps of ``2.5 * eps / n_steps``. The checks of ``robustness.checks`` are run on the results.

    Args:
        model: in eval mode; images to logits ``(B, K)``. Runs on the device of its parameters.
        data: ``(images, labels)``, images ``(n, C, H, W)`` in [0, 1] and int64 labels ``(n,)``; or an iterable of such
            batches, which is read once.
        suite: ``"quick"``, ``"standard"`` or ``"full"``.
        eps: l_inf radius of the attacks, or several.
        eps_l2: l_2 radius, or several, or ``()`` for no attack in l_2; None: 0.5, 1 and 2 in the full suite, else none.
        seeds: of the noise; the spread over them is reported.
        sources: other models, on the same device, by name: the suite's PGD is run on each, and what it finds there is
            shown to ``model`` (transfer).
        certify: ``certify(model, images, labels, eps) -> (B,) bool``, true only where no image in the l_inf ball is
            classified otherwise (``rnf.certify.linf_certified``): reported, and checked against every attack.
        attack_samples: attacks take the first so many images, which the report says; noise and certificates take all.
            None: attacks do, too.
        batch_size: of a pair of tensors; batches are taken as they come.
        on_batch: called after every batch with the number of images done.

    Raises:
        TypeError, ValueError: ``model`` or a source is in training mode or has weights that are not finite; ``data`` is
            empty, its images and labels do not fit, are not finite or out of [0, 1], or a label is no class of the
            model; a radius is negative; ``seeds`` is empty; ``attack_samples`` is less than 1; unknown ``suite``;
            logits are not finite.
    """
    _checks.choice("suite", suite, tuple(SUITES))
    chosen, sources = SUITES[suite], sources or {}
    check_model(model)
    for name, source in sources.items():
        check_model(source, f"source {name!r}")
    radii = {"inf": _radii("eps", eps), "2": _radii("eps_l2", chosen.eps_l2 if eps_l2 is None else eps_l2)}
    if not radii["inf"]:
        raise ValueError("eps is empty, expected at least one radius")
    if not seeds:
        raise ValueError("seeds is empty, expected at least one seed")
    if attack_samples is not None:
        check_count("attack_samples", attack_samples)
    attacks = [attack for attack in (*chosen.attacks, *transferred(chosen, sources)) if radii[attack.norm]]
    notes = []
    if not auto_attack.available() and any(attack.kind == "AutoAttack" for attack in attacks):
        attacks = [attack for attack in attacks if attack.kind != "AutoAttack"]
        notes.append(f"{auto_attack.MISSING}.")

    clean = _Test("clean", shown=True)
    noises = [
        (noise, _Test(noise.name, by, noise.measure, tuple(seeds), shown=by == max(noise.strengths)))
        for noise in chosen.noises
        for by in noise.strengths
    ]
    balls = [
        _Ball(attacks, norm, radius, seeds[0], shown=radius == max(radii[norm]))
        for norm in BALLS
        for radius in radii[norm]
    ]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    probe: list[Batch] = []
    n_samples = 0
    for batch in _batches(data, batch_size):
        images, labels = (tensor.to(device) for tensor in batch)
        unharmed = clean.classify(model, images, labels)
        for noise, test in noises:
            for k, generator in enumerate(test.generators):
                test.classify(model, noise.apply(images, test.strength, generator), labels, k)
        few = slice(None if attack_samples is None else max(0, attack_samples - n_samples))
        for ball in balls:
            survives = ball.run(model, images[few], labels[few], unharmed[few])
            if certify is not None and ball.norm == "inf":
                ball.certify(_certified(certify, model, images, labels, ball.eps), survives)
        if n_samples < checks.PROBE:
            probe.append((images[: checks.PROBE - n_samples], labels[: checks.PROBE - n_samples]))
        n_samples += len(labels)
        if on_batch is not None:
            on_batch(n_samples)
    if n_samples == 0:
        raise ValueError("data is empty, expected at least one image")

    first_images, first_labels = (torch.cat(tensors) for tensors in zip(*probe, strict=True))
    ours = [attack for attack in attacks if attack.kind != "AutoAttack"]
    found = [check for ball in balls for check in ball.checks(certify)]
    found.append(checks.at_zero(model, ours, first_images, first_labels))
    found += checks.at_large_radius(model, ours, first_images, first_labels)
    if attack_samples is not None and attack_samples < n_samples:
        notes.append(f"Attacks ran on the first {attack_samples} of {n_samples} images.")
    tests = [clean, *(test for _, test in noises), *(test for ball in balls for test in ball.tests(certify))]
    settings = {
        "eps": radii["inf"],
        "eps_l2": radii["2"],
        "seeds": list(seeds),
        "sources": list(sources),
        "device": str(device),
        "torch": torch.__version__,
        "robust_node_fast": __version__,
    }
    return Report(
        suite,
        n_samples,
        results=tuple(test.result() for test in tests),
        checks=tuple(found),
        settings=settings,
        notes=tuple(notes),
        rates=_rates(model),
        examples=tuple(test.example for test in tests if test.example is not None),
    )


def _certified(certify: Certify, model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    found = certify(model, images, labels, eps)
    if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != labels.shape:
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"certify gives {what}, expected a bool tensor {tuple(labels.shape)}")
    return found.to(labels.device)


@torch.no_grad()
def _rates(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """Contraction rate of every Euler step in both norms, of a model that can say it."""
    rate = getattr(model, "contraction_rate", None)
    return {} if rate is None else {norm: tuple(rate(norm=norm).tolist()) for norm in ("2", "inf")}


def _batches(data: Batch | Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        images, labels = data
        check_batch(images, labels)
        yield from zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
        return
    for batch in data:
        images, labels = batch
        check_batch(images, labels)
        yield images, labels


def _radii(name: str, eps: float | Sequence[float]) -> list[float]:
    radii = [eps] if isinstance(eps, (int, float)) else list(eps)
    for radius in radii:
        check_radius(name, radius)
    return [float(radius) for radius in radii]
