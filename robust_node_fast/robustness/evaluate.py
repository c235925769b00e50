"""``evaluate``: accuracy of a network on clean, noisy and attacked images, with checks that the numbers make sense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast._machine import machine
from robust_node_fast._version import __version__
from robust_node_fast.robustness import auto_attack, checks
from robust_node_fast.robustness._inputs import (
    check_batch,
    check_classes,
    check_logits,
    check_model,
    check_radius,
    predict,
)
from robust_node_fast.robustness.report import Check, Report
from robust_node_fast.robustness.suite import BALLS, SUITES, Attack, transferred
from robust_node_fast.robustness.tally import Progress, Tally
from robust_node_fast.training.checkpoint import digest

__all__ = ["evaluate"]

NOT_TRANSFERRED = "No transfer attack was run: no other network was given to find attacks on."
NO_BLACK_BOX_IN_L2 = "No attack without gradients was run in l_2: masked gradients were not looked for there."

Batch = tuple[Tensor, Tensor]
Certify = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
# By norm, attack and random start: images, and what the model takes them for.
_Found = dict[tuple[str, str, int], tuple[Tensor, Tensor]]


class _Ball:
    """All attacks of one radius in one norm, image by image."""

    def __init__(self, attacks: Sequence[Attack], norm: str, eps: float, seeds: Sequence[int], shown: bool) -> None:
        self.norm, self.eps, measure = norm, eps, BALLS[norm]
        self.attacks = [
            (attack, Tally(attack.name, eps, measure, _starts(attack, seeds), attack.settings(eps), shown))
            for attack in attacks
            if attack.norm == norm
        ]
        self.worst = Tally("worst case", eps, measure)
        self.certified = Tally("certified", eps, measure)
        # For the checks only, on the attacked images, which may be fewer than all.
        self.clean, self.iterative = Tally("clean"), Tally("iterative")
        black = [attack.name for attack, _ in self.attacks if attack.kind == "black box"]
        self.missed = {name: Tally(f"missed by every white box, broken by {name}") for name in black}
        self.certified_attacked = Tally("certified, under attack")

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, unharmed: Tensor, found: _Found) -> Tensor:
        """Which images survive everything; ``unharmed`` says which are classified rightly.

        ``found`` has what every attack made of the images in the smaller balls of this norm, and is brought up to date.
        """
        if not len(labels):
            return unharmed
        self.clean.count(unharmed)
        survives, iterative, white = unharmed, torch.ones_like(unharmed), unharmed
        broken = {}
        for attack, tally in self.attacks:
            right = torch.ones_like(unharmed)  # whatever it starts from
            for k, generator in enumerate(tally.generators):
                adversarial, predicted = found[self.norm, attack.name, k]
                with tally.timed():
                    left = predicted == labels
                    if attack.kind == "single step":
                        left = left | ~unharmed  # that it helps none is one of the checks
                    if bool(left.any()):
                        adversarial[left] = attack.run(model, images[left], labels[left], self.eps, generator)
                        predicted[left] = predict(model, adversarial[left], labels[left])
                right = right & tally.classified(adversarial, labels, predicted, k)
            survives = survives & right
            if attack.kind == "iterative":
                iterative = iterative & right
            if attack.kind in ("single step", "iterative"):  # AutoAttack has a black box in it
                white = white & right
            if attack.kind == "black box":
                broken[attack.name] = ~right
        self.iterative.count(iterative)
        for name, tally in self.missed.items():
            tally.count(white & broken[name])
        return self.worst.count(survives)

    def certify(self, certified: Tensor, survives: Tensor) -> None:
        """``survives`` may hold fewer images: the first."""
        self.certified.count(certified)
        self.certified_attacked.count(survives[certified[: len(survives)]])

    def lines(self, certify: Certify | None) -> list[Tally]:
        """Those of the report."""
        certified = [] if certify is None or self.norm != "inf" else [self.certified]
        return [*(tally for _, tally in self.attacks), self.worst, *certified]

    def tallies(self) -> list[Tally]:
        """All of them."""
        mine = [self.worst, self.certified, self.clean, self.iterative, self.certified_attacked]
        return [*(tally for _, tally in self.attacks), *mine, *self.missed.values()]

    def checks(self, certify: Certify | None) -> Iterator[Check]:
        (single,) = (tally.correct[0] for attack, tally in self.attacks if attack.kind == "single step")
        black = {name: tally.correct[0] for name, tally in self.missed.items()}
        name, images = f"{BALLS[self.norm]} {self.eps:g}", self.clean.seen[0]
        yield from checks.order(name, images, self.clean.correct[0], single, self.iterative.correct[0], black)
        if self.certified in self.lines(certify):
            (tried,), (held,) = self.certified_attacked.seen, self.certified_attacked.correct
            detail = f"{tried - held} of {tried} certified images fall to an attack"
            yield Check(f"certified <= attacked for every image at {name}", tried == held, detail)


def evaluate(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    *,
    suite: str = "standard",
    eps: float | Sequence[float] = 0.1,
    eps_l2: float | Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    attack_seeds: int = 1,
    sources: Mapping[str, nn.Module] | None = None,
    transfer_eps: Sequence[float] | None = None,
    certify: Certify | None = None,
    attack_samples: int | None = None,
    batch_size: int = 128,
    checkpoint: Path | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Report:
    """Accuracy on clean images, under noise and under attack, and in the worst case over all attacks image by image.

    Noise is drawn for every seed and not clipped; attacks start from the first seed, or the first few. The suites:

    - ``"quick"``: Gaussian noise of sigma 0.2; FGSM; PGD with 10 steps.
    - ``"standard"``: Gaussian noise of sigma 0.1, 0.2 and 0.3, salt-and-pepper noise on 5% and 20% of the pixels; FGSM;
      PGD with 40 steps.
    - ``"full"``: these, uniform and shot noise; PGD with 40 steps and 5 restarts, once on the cross-entropy and once on
      the margin; the Square attack with 1,000 queries (l_inf); AutoAttack, where its authors' code is installed.

    PGD takes steps of ``2.5 * eps / n_steps`` and leaves an image alone once an iterate is classified wrongly. An image
    that an attack broke has lost to it at every larger radius, whose ball contains the smaller; one that is classified
    wrongly as it is has lost to all attacks, and only the single step is tried on it. A certificate is sought at a
    radius only for images certified at the smaller ones. With the same random starts no accuracy can be higher for it.
    The checks of ``robustness.checks`` are run on the results.

    Args:
        model: in eval mode; images to logits ``(B, K)``. Runs on the device of its parameters.
        data: ``(images, labels)``, images ``(n, C, H, W)`` in [0, 1] and int64 labels ``(n,)``; or an iterable of such
            batches, which is read once.
        suite: ``"quick"``, ``"standard"`` or ``"full"``.
        eps: l_inf radius of the attacks, or several; taken in ascending order.
        eps_l2: l_2 radius, or several, or ``()`` for no attack in l_2; None: 0.5, 1 and 2 in the full suite, else none.
        seeds: of the noise; the spread over them is reported.
        attack_seeds: how many of them attacks with random starts run with, each for itself: the spread is reported, and
            in the worst case an image has fallen that falls to one of them. FGSM has no random start, and AutoAttack
            has restarts of its own: they run once.
        sources: other models, on the same device, by name: the suite's PGD climbs the loss of each, and ``model`` is
            shown every iterate (transfer).
        transfer_eps: those radii in ``eps`` at which it does. None: all.
        certify: ``certify(model, images, labels, eps) -> (B,) bool``, true only where no image in the l_inf ball is
            classified otherwise (``rnf.certify.linf_certified``): reported, and checked against every attack.
        attack_samples: attacks take the first so many images, which the report says; noise and certificates take all.
            None: attacks do, too.
        batch_size: of a pair of tensors; batches are taken as they come.
        checkpoint: a file written every few seconds, from which the same call goes on after a kill; the caller removes
            it. ``data`` is then a pair. A file of another evaluation or a broken one is warned about and not used.
        on_batch: called after every batch with the number of images done.

    Raises:
        TypeError, ValueError: ``model`` or a source is in training mode or has weights that are not finite; ``data`` is
            empty, its images and labels do not fit, are not finite or out of [0, 1], or a label is no class of the
            model; a radius is negative; ``seeds`` is empty; ``transfer_eps`` names another radius than ``eps``;
            ``attack_seeds``, ``attack_samples`` or ``batch_size`` is no int of at least 1, or there are more
            ``attack_seeds`` than seeds; ``seeds`` names one twice; unknown ``suite``;
            logits are not finite; ``checkpoint`` without a pair.
        OSError: ``checkpoint`` cannot be written.
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
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)} names one twice, expected different ones: the spread over them counts")
    _checks.count("batch_size", batch_size)
    _checks.count("attack_seeds", attack_seeds)
    if attack_seeds > len(seeds):
        raise ValueError(f"attack_seeds={attack_seeds} is more than there are seeds, expected at most {len(seeds)}")
    if attack_samples is not None:
        _checks.count("attack_samples", attack_samples)
    transfer_radii = radii["inf"] if transfer_eps is None else _radii("transfer_eps", transfer_eps)
    if not set(transfer_radii) <= set(radii["inf"]):
        raise ValueError(f"transfer_eps={list(transfer_eps or ())} names a radius that is not in eps={radii['inf']}")
    if _is_pair(data):  # now rather than at the batch that has it
        check_batch(*data)
        for name, network in {"model": model, **{f"source {name!r}": net for name, net in sources.items()}}.items():
            logits = _first_logits(network, data[0])
            check_logits(logits, data[1][:1].cpu(), name)
            check_classes(data[1], logits.shape[1], name)
    attacks = [attack for attack in chosen.attacks if radii[attack.norm]]
    shown = transferred(chosen, sources)
    notes = [NOT_TRANSFERRED] if suite == "full" and not sources else []
    for attack in [attack for attack in attacks if attack.kind == "AutoAttack"]:
        reason = auto_attack.MISSING if not auto_attack.available() else _refusal(model, data, attack.norm)
        if reason:
            attacks.remove(attack)
            notes += [f"{reason}."] if f"{reason}." not in notes else []
    if radii["2"] and not any(attack.kind == "AutoAttack" and attack.norm == "2" for attack in attacks):
        notes.append(NO_BLACK_BOX_IN_L2)

    clean = Tally("clean", shown=True)
    attacked = Tally("clean, attacked images")
    noises = [
        (noise, Tally(noise.name, by, noise.measure, tuple(seeds), shown=by == max(noise.strengths)))
        for noise in chosen.noises
        for by in noise.strengths
    ]
    every = (*attacks, *shown)
    balls = [
        _Ball(
            (*attacks, *(shown if radius in transfer_radii else ())),
            norm,
            radius,
            seeds[:attack_seeds],
            shown=radius == max(radii[norm]),
        )
        for norm in BALLS
        for radius in radii[norm]
    ]
    device = _device_of(model)
    progress, done = None, 0
    if checkpoint is not None:
        networks = {"model": model, **{f"source {name}": source for name, source in sources.items()}}
        names = [attack.name for attack in every]  # AutoAttack may have been installed in between
        certificate: str = getattr(certify, "__qualname__", type(certify).__qualname__)
        counted = [
            clean,
            attacked,
            *(tally for _, tally in noises),
            *(tally for ball in balls for tally in ball.tallies()),
        ]
        lines_of = [(tally.name, tally.strength, tally.settings) for tally in counted]
        randomness = (tuple(seeds), attack_seeds)
        run = (suite, names, radii, transfer_radii, *randomness, certificate, attack_samples, batch_size, lines_of)
        evaluation = _digest((__version__, torch.__version__, *run), networks, data, certify, radii["inf"])
        progress = Progress(checkpoint, counted, evaluation)
        done = progress.restore()
    probe: list[Batch] = []
    n_samples = 0
    with auto_attack.remarks(progress.remarks if progress else []) as remarks:
        for batch in _batches(data, batch_size):
            images, labels = (tensor.to(device) for tensor in batch)
            if n_samples < checks.PROBE:
                probe.append((images[: checks.PROBE - n_samples], labels[: checks.PROBE - n_samples]))
            n_samples += len(labels)
            if n_samples <= done:
                continue
            with clean.timed():
                predicted = predict(model, images, labels)
            unharmed = clean.classified(images, labels, predicted)
            few = slice(None if attack_samples is None else max(0, attack_samples - n_samples + len(labels)))
            attacked.count(unharmed[few])
            for noise, tally in noises:
                for k, generator in enumerate(tally.generators):
                    with tally.timed():
                        noisy = noise.apply(images, tally.strength, generator)
                        tally.classified(noisy, labels, predict(model, noisy, labels), k)
            found = {
                (attack.norm, attack.name, k): (images[few].clone(), predicted[few].clone())
                for attack in every
                for k in range(attack_seeds)
            }
            certified = torch.ones_like(unharmed)
            for ball in balls:
                survives = ball.run(model, images[few], labels[few], unharmed[few], found)
                if certify is not None and ball.norm == "inf":
                    with ball.certified.timed():
                        certified = _certified(certify, model, images, labels, ball.eps, certified)
                    ball.certify(certified, survives)
            if progress is not None:
                progress.save(n_samples)
            if on_batch is not None:
                on_batch(n_samples)
    if n_samples == 0:
        raise ValueError("data is empty, expected at least one image")
    if progress is not None:
        progress.save(n_samples, now=True)

    first_images, first_labels = (torch.cat(tensors) for tensors in zip(*probe, strict=True))
    ours = [attack for attack in every if attack.kind != "AutoAttack"]
    held = [check for ball in balls for check in ball.checks(certify)]
    held.append(checks.at_zero(model, ours, first_images, first_labels))
    held += checks.at_large_radius(model, ours, first_images, first_labels)
    if not any(attack.name == "square" for attack in ours):
        held += checks.black_box(model, attacks, first_images, first_labels, radii["inf"])
    notes += [f"AutoAttack's own checks: {remark}" for remark in remarks]
    if attack_samples is not None and attack_samples < n_samples:
        notes.append(f"Attacks ran on the first {attack_samples} of {n_samples} images.")
    settings = {
        "eps": radii["inf"],
        "eps_l2": radii["2"],
        "seeds": list(seeds),
        "attack_seeds": attack_seeds,
        "sources": list(sources),
        "transfer_eps": transfer_radii if sources else [],
        "attack_samples": attack_samples,
        "batch_size": batch_size if _is_pair(data) else None,
        "device": str(device),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "robust_node_fast": __version__,
    }
    lines = [clean, *([attacked] if attacked.seen[0] < n_samples else []), *(tally for _, tally in noises)]
    lines += [tally for ball in balls for tally in ball.lines(certify)]
    return Report(
        suite,
        n_samples,
        results=tuple(tally.result() for tally in lines),
        checks=tuple(held),
        settings=settings,
        notes=tuple(notes),
        rates=_rates(model),
        examples=tuple(tally.example for tally in lines if tally.example is not None),
    )


def _starts(attack: Attack, seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds that an attack runs with: one, if it has no random start or restarts of its own."""
    return tuple(seeds[:1] if attack.kind in ("single step", "AutoAttack") else seeds)


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _refusal(model: nn.Module, data: Batch | Iterable[Batch], norm: str) -> str:
    """Why AutoAttack cannot be run; what can only be known from a pair is not asked of an iterable."""
    if not _is_pair(data):
        return ""
    images, _ = data
    return auto_attack.refusal(images, _first_logits(model, images).shape[1], norm)


@torch.no_grad()
def _first_logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images[:1].to(_device_of(model))).cpu()


def _certified(
    certify: Certify, model: nn.Module, images: Tensor, labels: Tensor, eps: float, candidates: Tensor
) -> Tensor:
    """Which of the ``candidates`` ``(B,)``, those certified at a smaller radius, are certified at ``eps`` as well."""
    left = candidates.nonzero()[:, 0]
    if not len(left):
        return candidates
    found = certify(model, images[left], labels[left], eps)
    if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != left.shape:
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"certify gives {what}, expected a bool tensor {tuple(left.shape)}")
    certified = torch.zeros_like(candidates)
    certified[left] = found.to(labels.device)
    return certified


def _digest(
    settings: Sequence[object],
    networks: Mapping[str, nn.Module],
    data: Batch | Iterable[Batch],
    certify: Certify | None,
    radii: Sequence[float],
) -> str:
    """Of all that decides the results of an evaluation."""
    if not _is_pair(data):
        raise ValueError(
            "checkpoint needs data as a pair of tensors: what an iterable will give is not known beforehand"
        )
    tensors = {
        f"{name}.{key}": tensor for name, network in networks.items() for key, tensor in network.state_dict().items()
    }
    images, labels = data
    with torch.no_grad():  # a module's plain attributes decide as well, and show in its logits alone
        for name, network in networks.items():
            tensors[f"{name}, logits"] = network(images[:8].to(_device_of(network)))
    if certify is not None:  # its name alone does not tell two closures of one function apart
        model = networks["model"]
        few = images[:8].to(_device_of(model)), labels[:8].to(_device_of(model))
        for eps in radii:
            candidates = torch.ones_like(few[1], dtype=torch.bool)
            tensors[f"certified, {eps}"] = _certified(certify, model, *few, eps, candidates)
    return digest({**tensors, "images": images, "labels": labels}, repr([*settings, networks]))


def _is_pair(data: Batch | Iterable[Batch]) -> TypeGuard[Batch]:
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(each, Tensor) for each in data)


@torch.no_grad()
def _rates(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """Contraction rate of every Euler step in both norms, of a model that can say it."""
    rate = getattr(model, "contraction_rate", None)
    return {} if rate is None else {norm: tuple(rate(norm=norm).tolist()) for norm in ("2", "inf")}


def _batches(data: Batch | Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    if _is_pair(data):
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
    return sorted({float(radius) for radius in radii})
