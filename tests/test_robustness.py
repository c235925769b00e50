"""Noise, attacks and ``evaluate``: exact values where they follow by hand, and errors that name the fault."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_node_fast import data, models, robustness
from robust_node_fast.robustness import attacks, auto_attack, suite, tally
from robust_node_fast.robustness.evaluate import NO_BLACK_BOX_IN_L2, NOT_TRANSFERRED


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Two classes; logit of class 1 minus that of class 0 is ``weight . x + bias``: the best attack is known."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, input: Tensor) -> Tensor:
        score = input.flatten(1) @ self.weight + self.bias
        return torch.stack([-score / 2, score / 2], 1)


def balanced(size: int, kind: type[Linear] = Linear, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Linear:
    """Of weights of both signs, none small; grey images are on the boundary, random ones on both sides."""
    weight = scale * (0.5 + torch.rand(size, dtype=dtype)) * (1 - 2 * (torch.arange(size) % 2))
    return kind(weight, -weight.sum().item() / 2).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture(scope="module")
def trained(digits: data.Dataset) -> nn.Module:
    """A small network after a few seconds of training: accurate, and easy to attack."""
    torch.manual_seed(0)
    model = models.MNISTNode(image_size=8, n_steps=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(6):
        for index in torch.randperm(len(digits.train_labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_images[index]), digits.train_labels[index]).backward()
            optimizer.step()
    return model.eval()


# --- noise -------------------------------------------------------------------------------------------------------

ADDED = (robustness.gaussian, robustness.uniform, robustness.shot)


def added(noise: Callable[..., Tensor], images: Tensor, strength: float, seed: int = 0, clip: bool = False) -> Tensor:
    return noise(images, strength, generator(seed), **({"clip": clip} if noise in ADDED else {}))


def test_gaussian_has_the_stated_moments_and_is_not_clipped() -> None:
    images = torch.full((200, 1, 16, 16), 0.5)
    noise = added(robustness.gaussian, images, 0.3) - images
    assert float(noise.mean()) == pytest.approx(0.0, abs=5e-3)
    assert float(noise.std()) == pytest.approx(0.3, rel=1e-2)
    assert bool((noise.abs() > 0.5).any())


def test_uniform_fills_its_interval() -> None:
    images = torch.full((200, 1, 16, 16), 0.5)
    noise = added(robustness.uniform, images, 0.7) - images
    assert float(noise.mean()) == pytest.approx(0.0, abs=1e-2)
    assert float(noise.std()) == pytest.approx(0.7 / 3**0.5, rel=1e-2)
    assert -0.7 <= float(noise.min()) < -0.69
    assert 0.69 < float(noise.max()) <= 0.7 + 1e-6


@pytest.mark.parametrize("intensity", [0.1, 0.9])
def test_shot_counts_photons(intensity: float) -> None:
    images = torch.full((200, 1, 16, 16), intensity)
    noisy = added(robustness.shot, images, 0.25)
    assert float(noisy.mean()) == pytest.approx(intensity, rel=1e-2)
    assert float(noisy.var()) == pytest.approx(0.25**2 * intensity, rel=3e-2)
    photons = noisy / 0.25**2
    torch.testing.assert_close(photons, photons.round())
    assert len(photons.unique()) > 5


def test_shot_of_the_extremes() -> None:
    assert torch.equal(added(robustness.shot, torch.zeros(1, 1, 8, 8), 0.3), torch.zeros(1, 1, 8, 8))  # black stays
    images = torch.rand(2, 3, 8, 8)
    nearly = added(robustness.shot, images, 2e-6)  # 2.5e11 photons
    torch.testing.assert_close(nearly, images, atol=2e-5, rtol=0)
    assert torch.equal(added(robustness.shot, images, 1e-30), images)
    with pytest.raises(ValueError, match=r"images go down to -0\.5, expected intensities >= 0"):
        added(robustness.shot, images - images.min() - 0.5, 0.3)


def test_salt_and_pepper_has_the_stated_fractions() -> None:
    images = torch.full((100, 3, 20, 20), 0.5)
    noisy = robustness.salt_and_pepper(images, 0.2, generator())
    assert float((noisy == 0).float().mean()) == pytest.approx(0.1, abs=5e-3)
    assert float((noisy == 1).float().mean()) == pytest.approx(0.1, abs=5e-3)
    assert set(noisy.unique().tolist()) == {0.0, 0.5, 1.0}
    assert torch.equal(noisy, noisy[:, :1].expand_as(noisy))  # a pixel with all its channels
    assert set(robustness.salt_and_pepper(images, 1.0, generator()).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("noise", ADDED)
def test_clipping_is_what_the_caller_says(noise: Callable[..., Tensor]) -> None:
    images = torch.rand(20, 1, 8, 8)
    free, clipped = added(noise, images, 0.6), added(noise, images, 0.6, clip=True)
    assert float(free.max()) > 1.0
    assert torch.equal(clipped, free.clamp(0, 1))
    with pytest.raises(TypeError, match="clip"):
        noise(images, 0.6, generator())


@pytest.mark.parametrize("noise", [*ADDED, robustness.salt_and_pepper])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_its_seed(noise: Callable[..., Tensor], dtype: torch.dtype) -> None:
    images = torch.rand(4, 1, 8, 8, dtype=dtype)
    assert added(noise, images, 0.3).dtype == dtype
    assert torch.equal(added(noise, images, 0.3, 1), added(noise, images, 0.3, 1))
    assert not torch.equal(added(noise, images, 0.3, 1), added(noise, images, 0.3, 2))
    assert torch.equal(added(noise, images, 0.0), images)


def test_noise_out_of_range() -> None:
    images = torch.rand(1, 1, 2, 2)
    for noise, name in ((robustness.gaussian, "sigma"), (robustness.uniform, "width"), (robustness.shot, "sigma")):
        with pytest.raises(ValueError, match=rf"{name}=-0\.1 is negative"):
            added(noise, images, -0.1)
        with pytest.raises(ValueError, match=f"{name}=nan is not finite"):
            added(noise, images, math.nan)
    with pytest.raises(ValueError, match=r"fraction=1\.5 is no probability"):
        robustness.salt_and_pepper(images, 1.5, generator())


# --- attacks -----------------------------------------------------------------------------------------------------


def best_attack(model: Linear, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    direction = model.weight.detach().sign().reshape(1, *images.shape[1:])
    return (images - eps * direction * (2 * labels - 1)[:, None, None, None]).clamp(0, 1)


def test_all_attacks_find_the_best_point_of_a_linear_model() -> None:
    model = balanced(12)
    images, labels = torch.rand(200, 3, 2, 2), torch.randint(2, (200,))
    best = best_attack(model, images, labels, 0.05)
    torch.testing.assert_close(robustness.fgsm(model, images, labels, 0.05), best)
    for loss in attacks.LOSSES:
        found = robustness.pgd(
            model, images, labels, 0.05, step_size=0.02, n_steps=10, loss=loss, generator=generator()
        )
        torch.testing.assert_close(found, best)
    unfooled = (model(best).argmax(1) == labels)[:, None, None, None]  # the search stops where the model is fooled
    found = robustness.square(model, images, labels, 0.05, n_queries=400, generator=generator())
    torch.testing.assert_close(torch.where(unfooled, found, best), best)
    assert bool(unfooled.any())


def test_l2_attacks_find_the_best_point_of_a_linear_model() -> None:
    model = balanced(12, dtype=torch.float64)
    images, labels = torch.rand(20, 3, 2, 2, dtype=torch.float64) / 2 + 0.25, torch.randint(2, (20,))
    direction = (model.weight / model.weight.norm()).detach().reshape(1, 3, 2, 2)
    best = images - 0.2 * direction * (2 * labels - 1)[:, None, None, None]  # no pixel reaches 0 or 1
    torch.testing.assert_close(robustness.fgsm(model, images, labels, 0.2, norm="2"), best)
    options: dict[str, Any] = {"step_size": 0.1, "n_steps": 300, "norm": "2", "generator": generator()}
    for loss in attacks.LOSSES:
        found = robustness.pgd(model, images, labels, 0.2, loss=loss, **options)
        torch.testing.assert_close(found, best, atol=1e-6, rtol=0)


def test_margin_is_what_is_missing_to_another_class() -> None:
    logits, labels = torch.randn(50, 7), torch.randint(7, (50,))
    expected = [max(f[j] for j in range(7) if j != y) - f[y] for f, y in zip(logits.tolist(), labels, strict=True)]
    torch.testing.assert_close(attacks.margin(logits, labels), torch.tensor(expected))
    assert torch.equal(attacks.margin(logits, labels) > 0, logits.argmax(1) != labels)


def test_attacks_see_where_the_cross_entropy_is_saturated() -> None:
    model = balanced(12, scale=1e4)
    images = torch.rand(40, 3, 2, 2)
    labels = model(images).argmax(1)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels), leaf)
    assert (gradient.flatten(1) == 0.0).all(1).sum() > 10
    options: dict[str, Any] = {"step_size": 0.05, "n_steps": 20, "generator": generator()}

    def accuracy(loss: str) -> float:
        attacked = robustness.pgd(model, images, labels, 0.3, loss=loss, **options)
        return float((model(attacked).argmax(1) == labels).double().mean())

    best = float((model(best_attack(model, images, labels, 0.3)).argmax(1) == labels).double().mean())
    assert accuracy("margin") == accuracy("cross-entropy") == best < 1.0
    single = robustness.fgsm(model, images, labels, 0.3)
    assert float((model(single).argmax(1) == labels).double().mean()) <= best + 0.2


def test_a_step_in_l2_is_of_its_length_whatever_the_gradient() -> None:
    """Squares of small entries vanish in float32: the step was as many times too long."""
    images, labels = 0.5 * torch.ones(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    for exponent in (0, -10, -20, -22, -30, -38):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
        with torch.no_grad():
            model[1].weight.copy_(10.0**exponent * torch.randn(2, 16))
            model[1].bias.zero_()
        for attacked in (
            robustness.fgsm(model, images, labels, 0.1, norm="2"),
            robustness.pgd(
                model, images, labels, 0.1, norm="2", step_size=0.05, n_steps=30, generator=torch.Generator()
            ),
        ):
            moved = torch.linalg.vector_norm((attacked - images).flatten(1), dim=1)
            torch.testing.assert_close(moved, 0.1 * torch.ones(8), rtol=1e-3, atol=0.0)


@given(
    norm=st.sampled_from(["inf", "2"]),
    loss=st.sampled_from(sorted(attacks.LOSSES)),
    eps=st.sampled_from([0.0, 1e-3, 0.3, 2.0]),
    step=st.sampled_from([0.0, 0.1, 5.0]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    scale=st.sampled_from([0.0, 1e-25, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_pgd_stays_in_the_ball_whatever_the_gradient(
    norm: str, loss: str, eps: float, step: float, shape: tuple[int, ...], scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    images, labels = torch.rand(shape), torch.randint(2, shape[:1])
    model = Linear(scale * torch.randn(math.prod(shape[1:]))).eval()
    options: dict[str, Any] = {"n_steps": 3, "n_restarts": 2, "norm": norm, "loss": loss, "generator": generator(seed)}
    attacked = robustness.pgd(model, images, labels, eps, step_size=step, **options)
    change = (attacked - images).double().flatten(1)
    lengths = change.abs().amax(1) if norm == "inf" else change.norm(dim=1)
    assert bool((lengths <= eps + 1e-6).all())
    assert float(attacked.min()) >= 0.0
    assert float(attacked.max()) <= 1.0


def test_l2_starts_are_uniform_in_the_ball() -> None:
    images = torch.full((4000, 1, 1, 3), 0.5)
    labels = torch.zeros(4000, dtype=torch.int64)
    start = robustness.pgd(
        Linear(torch.zeros(3)).eval(), images, labels, 0.4, step_size=0.0, n_steps=1, norm="2", generator=generator()
    )
    radius = (start - images).flatten(1).norm(dim=1) / 0.4
    assert float((radius**3).mean()) == pytest.approx(0.5, abs=0.02)  # the volume below a uniform point is uniform
    assert float((radius**3 < 0.25).float().mean()) == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close((start - images).mean(0), torch.zeros(1, 1, 3), atol=0.01, rtol=0)


def test_a_restart_leaves_alone_what_is_fooled() -> None:
    class Counted(Linear):
        seen: ClassVar[list[int]] = []

        def forward(self, input: Tensor) -> Tensor:
            self.seen.append(len(input))
            return super().forward(input)

    model = Counted(torch.ones(1)).eval()
    images = torch.tensor([0.05, 0.5, 0.9])[:, None, None, None]
    labels = torch.ones(3, dtype=torch.int64)
    model.bias = -0.45  # with eps 0.1 the first image is wrong already, the second falls, the third cannot
    robustness.pgd(model, images, labels, 0.1, step_size=0.2, n_steps=2, n_restarts=3, generator=generator())
    assert Counted.seen == [3, 3, 3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_pgd_stops_at_the_first_iterate_that_fools(norm: str, trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:100], digits.test_labels[:100]
    eps = {"inf": 0.1, "2": 0.5}[norm]
    options: dict[str, Any] = {"step_size": eps / 5, "n_steps": 12, "norm": norm}
    full = robustness.pgd(trained, images, labels, eps, generator=generator(), **options)
    found = robustness.pgd(trained, images, labels, eps, target=trained, generator=generator(), **options)
    fooled, lost = (trained(x).argmax(1) != labels for x in (found, full))
    assert 5 < int(fooled.sum()) < 95
    assert bool((fooled | ~lost).all())  # nothing that the end would have found is missed
    torch.testing.assert_close(found[~fooled], full[~fooled])  # all others took every step
    assert int((found != full).flatten(1).any(1).sum()) > 5


def test_an_iterate_that_fools_the_target_counts_where_the_end_would_not() -> None:
    class Climb(nn.Module):
        """Class 1 wins nowhere; the brighter, the closer it comes."""

        def forward(self, input: Tensor) -> Tensor:
            x = input.flatten(1).sum(1)
            return torch.stack([torch.full_like(x, 2.0), x], 1)

    class Band(nn.Module):
        """Class 1 only between 0.55 and 0.65."""

        def forward(self, input: Tensor) -> Tensor:
            x = input.flatten(1).sum(1)
            return torch.stack([torch.zeros_like(x), 0.05 - (x - 0.6).abs()], 1)

    images, labels = torch.full((50, 1, 1, 1), 0.4), torch.zeros(50, dtype=torch.int64)
    options: dict[str, Any] = {"step_size": 0.08, "n_steps": 9}
    source, target = Climb().eval(), Band().eval()
    end = robustness.pgd(source, images, labels, 0.5, generator=generator(), **options)
    assert bool((target(end).argmax(1) == 0).all())
    tried = robustness.pgd(source, images, labels, 0.5, target=target, generator=generator(), **options)
    start = robustness.pgd(source, images, labels, 0.5, step_size=0.0, n_steps=1, generator=generator())
    assert torch.equal(target(tried).argmax(1) == 1, start.flatten() <= 0.65)  # 0.08 is too short to leap the band
    with pytest.raises(ValueError, match=r"target is in training mode, expected target.eval\(\)"):
        robustness.pgd(source, images, labels, 0.5, target=Band(), generator=generator(), **options)


# --- the Square attack -------------------------------------------------------------------------------------------


class Rounded(Linear):
    """No gradient to the input, hardly any loss of accuracy: gradient masking in its simplest form."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((20 * input).round() / 20)


def test_square_needs_no_gradient_and_stays_in_the_ball() -> None:
    model = balanced(2 * 5 * 7, Rounded)
    images = torch.rand(60, 2, 5, 7)
    labels = model(images).argmax(1)
    attacked = robustness.square(model, images, labels, 0.2, n_queries=60, generator=generator())
    assert float((attacked - images).abs().max()) == pytest.approx(0.2, abs=1e-6)
    assert float(attacked.min()) >= 0.0
    assert float(attacked.max()) <= 1.0
    on_a_corner = ((attacked - images).abs() - 0.2).abs() < 1e-6
    assert bool((on_a_corner | (attacked == 0) | (attacked == 1)).all())
    assert float((model(attacked).argmax(1) == labels).double().mean()) < 0.5
    assert torch.equal(robustness.fgsm(model, images, labels, 0.2), images)


def test_square_asks_no_more_than_it_may_and_never_gets_worse() -> None:
    class Counted(Linear):
        seen: ClassVar[list[int]] = []

        def forward(self, input: Tensor) -> Tensor:
            self.seen.append(len(input))
            return super().forward(input)

    model = balanced(36, Counted)
    images = torch.rand(30, 1, 6, 6)
    labels = model(images).argmax(1)
    Counted.seen.clear()
    margins = []
    for n_queries in (1, 10, 100):
        attacked = robustness.square(model, images, labels, 0.05, n_queries=n_queries, generator=generator())
        assert len(Counted.seen) <= n_queries
        assert Counted.seen == sorted(Counted.seen, reverse=True)  # only those not yet fooled
        margins.append(attacks.margin(model(attacked), labels).mean())
        Counted.seen.clear()
    assert margins[0] < margins[1] < margins[2]
    again = robustness.square(model, images, labels, 0.05, n_queries=100, generator=generator())
    assert torch.equal(again, attacked)


# --- bad inputs --------------------------------------------------------------------------------------------------


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": robustness.fgsm,
    "pgd": lambda *arguments: robustness.pgd(*arguments, step_size=0.1, n_steps=1, generator=generator()),
    "square": lambda *arguments: robustness.square(*arguments, n_queries=2, generator=generator()),
}


@pytest.mark.parametrize("name", [*ATTACKS, "autoattack"])
def test_attacks_name_the_fault(name: str, trained: nn.Module) -> None:
    if name == "autoattack" and not auto_attack.available():
        pytest.skip(auto_attack.MISSING)
    attack = ATTACKS.get(name, lambda *arguments: robustness.autoattack(*arguments, generator=generator()))
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    for arguments, message in (
        ((trained, images, labels, -0.1), r"eps=-0\.1 is negative, expected a radius >= 0"),
        ((trained, images, labels, math.inf), "eps=inf is not finite"),
        ((trained, images[:0], labels[:0], 0.1), "data is empty"),
        ((trained, images, labels + 9, 0.1), "data has label 10, expected labels below the 10 classes of model"),
        ((trained, images, labels - 1, 0.1), "data has label -1"),
        ((trained, images + 1, labels, 0.1), r"expected values in \[0, 1\]"),
        ((trained, images, labels[:1], 0.1), r"labels \(1,\), expected"),
        ((models.MNISTNode(image_size=8), images, labels, 0.1), r"model is in training mode, expected model.eval\(\)"),
        ((with_nan(trained), images, labels, 0.1), "model has values that are not finite in flow.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(*arguments)


def test_pgd_takes_the_steps_it_is_told(trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:30], digits.test_labels[:30]
    start = robustness.pgd(trained, images, labels, 0.1, step_size=0.0, n_steps=1, generator=generator())
    one = robustness.pgd(trained, images, labels, 0.1, step_size=0.01, n_steps=1, generator=generator())
    low, high = (images - 0.1).clamp(min=0), (images + 0.1).clamp(max=1)
    draw = torch.rand(images.shape, generator=generator())
    torch.testing.assert_close(start, (images + 0.1 * (2 * draw - 1)).clamp(low, high))
    x = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(trained(x), labels, reduction="sum"), x)
    torch.testing.assert_close(one, (start + 0.01 * gradient.sign()).clamp(low, high))


def test_attacks_stay_in_the_ball_and_the_box(trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:64], digits.test_labels[:64]
    for attacked in (
        robustness.fgsm(trained, images, labels, 0.15),
        robustness.pgd(trained, images, labels, 0.15, step_size=0.05, n_steps=5, generator=generator()),
    ):
        assert float((attacked - images).abs().max()) == pytest.approx(0.15, abs=1e-6)
        assert float(attacked.min()) >= 0.0
        assert float(attacked.max()) <= 1.0
        assert not attacked.requires_grad
        assert F.cross_entropy(trained(attacked), labels) > F.cross_entropy(trained(images), labels)


def test_more_steps_and_restarts_are_stronger(trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:128], digits.test_labels[:128]

    def accuracy(n_steps: int, n_restarts: int) -> float:
        options: dict[str, Any] = {"step_size": 0.02, "n_steps": n_steps, "n_restarts": n_restarts}
        attacked = robustness.pgd(trained, images, labels, 0.1, generator=generator(), **options)
        return float((trained(attacked).argmax(1) == labels).float().mean())

    weak, strong, stronger = accuracy(1, 1), accuracy(20, 1), accuracy(20, 3)
    clean = float((trained(images).argmax(1) == labels).float().mean())
    assert stronger <= strong < weak < clean


def test_restarts_keep_what_fooled_the_model() -> None:
    # Class 1 only in a narrow band: a gradient step may leave it again, a restart that ended there must be kept.
    class Band(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            x = input.flatten(1).sum(1)
            return torch.stack([torch.zeros_like(x), 0.01 - (x - 0.55).abs()], 1)

    images, labels = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.int64)
    options: dict[str, Any] = {"step_size": 1e-4, "n_steps": 1, "generator": generator()}
    ends = [robustness.pgd(Band().eval(), images, labels, 0.1, **options) for _ in range(60)]
    assert any(Band()(end).argmax() == 1 for end in ends)
    assert any(Band()(end).argmax() == 0 for end in ends)
    kept = robustness.pgd(
        Band().eval(), images, labels, 0.1, step_size=1e-4, n_steps=1, n_restarts=60, generator=generator()
    )
    assert Band()(kept).argmax() == 1


def test_attacks_ask_for_no_weight_gradient_and_restore_the_parameters(digits: data.Dataset) -> None:
    class Watched(models.MNISTNode):
        seen: ClassVar[list[bool]] = []

        def forward(self, input: Tensor) -> Tensor:
            self.seen.append(any(parameter.requires_grad for parameter in self.parameters()))
            return super().forward(input)

    model = Watched(image_size=8, n_steps=1).eval()
    model.conv0.bias.requires_grad_(False)
    images, labels = digits.test_images[:4], digits.test_labels[:4]
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():  # the attack needs gradients, whatever its caller does
        robustness.fgsm(model, images, labels, 0.1)
        robustness.pgd(model, images, labels, 0.1, step_size=0.1, n_steps=2, generator=generator())
    assert len(Watched.seen) == 1 + 2 + 1
    assert not any(Watched.seen)
    with pytest.raises(ValueError, match="data has label"):
        robustness.fgsm(model, images, labels + 100, 0.1)
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attack_arguments(trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:2], digits.test_labels[:2]
    with pytest.raises(TypeError, match="step_size"):
        attacks.pgd(trained, images, labels, 0.1, generator=generator())  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="step_size=inf is not finite"):
        attacks.pgd(trained, images, labels, 0.1, step_size=math.inf, generator=generator())
    for change, message in (
        ({"n_steps": 0}, "n_steps=0 is too small"),
        ({"n_restarts": 0}, "n_restarts=0 is too small"),
        ({"norm": "1"}, "norm='1' is unknown"),
        ({"loss": "dlr"}, "loss='dlr' is unknown"),
    ):
        options: dict[str, Any] = {"step_size": 0.1, "generator": generator(), **change}
        with pytest.raises(ValueError, match=message):
            attacks.pgd(trained, images, labels, 0.1, **options)
    with pytest.raises(ValueError, match="norm='1' is unknown"):
        attacks.fgsm(trained, images, labels, 0.1, norm="1")
    with pytest.raises(ValueError, match="n_queries=0 is too small"):
        robustness.square(trained, images, labels, 0.1, n_queries=0, generator=generator())


# --- evaluate ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(trained: nn.Module, digits: data.Dataset) -> robustness.Report:
    done: list[int] = []
    pair = (digits.test_images[:200], digits.test_labels[:200])
    found = robustness.evaluate(trained, pair, eps=(0.05, 0.15), seeds=(3, 4), on_batch=done.append)
    assert done == [128, 200]
    return found


def test_standard_suite_has_every_test(report: robustness.Report) -> None:
    assert [result.label for result in report.results] == [
        "clean",
        "gaussian, sigma 0.1",
        "gaussian, sigma 0.2",
        "gaussian, sigma 0.3",
        "salt-and-pepper, fraction of pixels 0.05",
        "salt-and-pepper, fraction of pixels 0.2",
        "fgsm, l_inf eps 0.05",
        "pgd, l_inf eps 0.05",
        "worst case, l_inf eps 0.05",
        "fgsm, l_inf eps 0.15",
        "pgd, l_inf eps 0.15",
        "worst case, l_inf eps 0.15",
    ]
    assert report.n_samples == 200
    assert [len(result.per_seed) for result in report.results] == [1, 2, 2, 2, 2, 2, *[1] * 6]
    expected = {"step_size": pytest.approx(2.5 * 0.15 / 40), "n_steps": 40, "n_restarts": 1, "loss": "cross-entropy"}
    assert report.results[-2].settings == expected


def test_accuracies_are_those_of_the_parts(report: robustness.Report, trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:200], digits.test_labels[:200]

    def right(attacked: Tensor) -> Tensor:
        with torch.no_grad():
            return trained(attacked).argmax(1) == labels

    def accuracy(attacked: Tensor) -> float:
        return int(right(attacked).sum()) / 200

    assert report.accuracy("clean") == accuracy(images) > 0.85
    fgsm = robustness.fgsm(trained, images, labels, 0.15)
    assert report.accuracy("fgsm", 0.15) == accuracy(fgsm)
    stands = right(images)
    for eps in (0.05, 0.15):  # what lost before is spared
        start, found = tally.random_numbers(3, "pgd", "l_inf eps", eps), []
        for x, y, left in zip(images.split(128), labels.split(128), stands.split(128), strict=True):
            options: dict[str, Any] = {"step_size": 2.5 * eps / 40, "target": trained, "generator": start}
            found.append(
                x.index_copy(0, left.nonzero()[:, 0], robustness.pgd(trained, x[left], y[left], eps, **options))
            )
        stands = stands & right(torch.cat(found))
        assert report.accuracy("pgd", eps) == int(stands.sum()) / 200
    assert report.accuracy("worst case", 0.15) == int((right(fgsm) & stands).sum()) / 200
    for k, seed in enumerate((3, 4)):
        noise = tally.random_numbers(seed, "gaussian", "sigma", 0.3)
        noisy = torch.cat([robustness.gaussian(x, 0.3, noise, clip=False) for x in images.split(128)])
        assert report.results[3].per_seed[k] == accuracy(noisy)


def test_attacks_from_several_seeds_are_told_apart(trained: nn.Module, digits: data.Dataset, tmp_path: Path) -> None:
    """Each runs by itself; the first is the one that runs alone by default; the worst case is that of all of them."""
    pair = digits.test_images[:200], digits.test_labels[:200]
    options: dict[str, Any] = {"eps": (0.05, 0.1), "seeds": (4, 5, 6), "sources": {"other": trained}}
    alone = robustness.evaluate(trained, pair, **options)
    for path in (None, tmp_path / "evaluation"):  # with a checkpoint nothing changes
        found = robustness.evaluate(trained, pair, **options, attack_seeds=3, checkpoint=path)
        assert found.settings["attack_seeds"] == 3
        spreads = []
        for one, three in zip(alone.results, found.results, strict=True):
            assert (one.name, one.strength) == (three.name, three.strength)
            several = one.name.startswith(("pgd", "gaussian", "salt"))
            assert len(three.per_seed) == (3 if several else 1), one.name
            if one.name != "worst case":
                assert one.per_seed[0] == three.per_seed[0]
            if one.name.startswith("pgd"):
                spreads.append(three.std)
                worst = found.accuracy("worst case", one.strength)
                assert worst <= min(three.per_seed)
                assert worst <= alone.accuracy("worst case", one.strength)
        assert max(spreads) > 0.0
        assert len({round(spread, 9) for spread in spreads}) > 1
    for wrong, message in ((4, "more than there are seeds"), (0, "attack_seeds=0"), (True, "attack_seeds")):
        with pytest.raises((TypeError, ValueError), match=message):
            robustness.evaluate(trained, pair, **options, attack_seeds=wrong)


def test_strength_costs_accuracy_and_the_checks_hold(report: robustness.Report) -> None:
    gaussian = [report.accuracy("gaussian", sigma) for sigma in (0.1, 0.2, 0.3)]
    assert report.accuracy("clean") >= gaussian[0] > gaussian[1] > gaussian[2]
    assert report.accuracy("pgd", 0.15) < report.accuracy("pgd", 0.05) < report.accuracy("clean")
    assert [(check.name, check.passed) for check in report.checks] == [
        ("iterative <= single step <= clean at l_inf eps 0.05", True),
        ("iterative <= single step <= clean at l_inf eps 0.15", True),
        ("eps 0 = clean", True),
        ("accuracy near 0 at l_inf eps 1", True),
        ("white box <= square at l_inf eps 0.05", True),
        ("white box <= square at l_inf eps 0.15", True),
    ]
    assert report.checks[-4].detail == "128 of 128 predictions under attack unchanged"
    assert report.checks[-3].detail == "0 of the first 64 images survive"
    left = []
    for check in report.checks[-2:]:
        what, _, number = check.detail.partition(", which leave ")
        assert what.endswith(" of 64 images fall to it and to no white-box attack")
        left.append(int(number))
    assert 64 > left[0] > left[1]
    assert report.reliable
    assert report.verdict == "All 6 checks held."
    with pytest.raises(KeyError, match="no result 'square'"):
        report.accuracy("square", 0.1)


def test_a_linear_model_has_the_accuracy_that_its_margins_say() -> None:
    model = balanced(16)
    images, labels = torch.rand(300, 1, 4, 4), torch.randint(2, (300,))
    found = robustness.evaluate(model, (images, labels), eps=0.1, seeds=[0])
    with torch.no_grad():
        exact = int((model(best_attack(model, images, labels, 0.1)).argmax(1) == labels).sum()) / 300
    assert found.accuracy("fgsm", 0.1) == found.accuracy("pgd", 0.1) == found.accuracy("worst case", 0.1) == exact
    assert found.reliable


def test_checks_can_fail() -> None:
    class Masked(nn.Module):
        """Its gradient points the wrong way: a single step makes the model better, the hallmark of a broken attack."""

        def forward(self, input: Tensor) -> Tensor:
            x = input.flatten(1).sum(1) - 0.5
            return torch.stack([torch.zeros_like(x), x.detach() * 2 - x], 1)

    images, labels = torch.full((10, 1, 1, 1), 0.45), torch.ones(10, dtype=torch.int64)
    found = robustness.evaluate(Masked().eval(), (images, labels), eps=0.1)
    assert found.accuracy("clean") == 0.0
    assert found.accuracy("fgsm", 0.1) == 1.0
    assert found.accuracy("worst case", 0.1) == 0.0  # what is wrong already need not be attacked
    assert [check.passed for check in found.checks] == [False, True, False, True]
    assert not found.reliable
    assert "**UNRELIABLE: 2 of 4 checks failed (iterative <= single step <= clean at l_inf" in found.to_markdown()
    assert "| **NO** |" in found.to_markdown()
    assert json.loads(found.to_json())["reliable"] is False


def test_masked_gradients_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounding hides the gradient: white-box attacks find nothing, the black box does, the report says so."""
    model = balanced(36, Rounded)
    images = torch.rand(40, 1, 6, 6)
    labels = model(images).argmax(1)
    few = suite.Suite((), (suite._fgsm("inf"), suite._pgd(n_steps=2), suite._square(300)))
    monkeypatch.setitem(suite.SUITES, "full", few)
    found = robustness.evaluate(model, (images, labels), suite="full", eps=0.1)
    assert found.accuracy("fgsm", 0.1) == 1.0
    assert found.accuracy("worst case", 0.1) <= found.accuracy("square", 0.1) < 0.5
    failed = [check.name for check in found.checks if not check.passed]
    assert failed == ["white box <= square at l_inf eps 0.1", "accuracy near 0 at l_inf eps 1"]


class Decoy(nn.Module):
    """Its gradient is another network's, so that only black boxes find where it is weak."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.decoy = Linear(torch.ones(36), -18.0)  # the network's weights alternate in sign

    def forward(self, input: Tensor) -> Tensor:
        decoy = self.decoy(input)
        return self.network(input).detach() + 1e-3 * (decoy - decoy.detach())


@pytest.mark.parametrize("name", ["quick", "standard"])
def test_suites_without_a_black_box_find_masked_gradients_as_well(name: str) -> None:
    model = Decoy(balanced(36)).eval()
    images = torch.rand(30, 1, 6, 6)
    labels = model(images).argmax(1)
    found = robustness.evaluate(model, (images, labels), suite=name, eps=(0.05, 0.1))
    assert found.accuracy("worst case", 0.1) > 0.5
    check = found.checks[-1]
    assert (check.name, check.passed) == ("white box <= square at l_inf eps 0.1", False)
    assert int(check.detail.split()[0]) > 10


def test_masked_gradients_are_found_where_no_image_survives_the_largest_radius() -> None:
    """At 1 the white box breaks everything, and there is nothing left for a black box to show."""
    network = balanced(36)

    class FarSighted(nn.Module):
        """Its gradients point the right way far from the image only."""

        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = Decoy(network), network

        def forward(self, input: Tensor) -> Tensor:
            extreme = ((input - 0.5).abs() > 0.499).double().mean((1, 2, 3)) > 0.3
            return torch.where(extreme[:, None], self.far(input), self.near(input))

    model = FarSighted().eval()
    images = 0.3 + 0.4 * torch.rand(30, 1, 6, 6)
    labels = model(images).argmax(1)
    found = robustness.evaluate(model, (images, labels), suite="quick", eps=(0.1, 1.0))
    assert found.accuracy("worst case", 1.0) == 0.0
    near, far = found.checks[-2:]
    assert (near.name, near.passed) == ("white box <= square at l_inf eps 0.1", False)
    assert (far.name, far.passed) == ("white box <= square at l_inf eps 1", True)
    assert far.detail.endswith("which leave 0")


@pytest.mark.parametrize("hide", [torch.no_grad(), torch.inference_mode()], ids=["no_grad", "inference_mode"])
def test_a_network_without_gradients_is_found_out(hide: Any) -> None:
    """Attacks stand still instead of crashing."""
    network = balanced(36)

    class Quantised(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            with hide:
                found = network(input)
            return found.clone()

    images = torch.rand(30, 1, 6, 6)
    labels = network(images).argmax(1)
    found = robustness.evaluate(Quantised().eval(), (images, labels), suite="quick", eps=0.1)
    assert found.accuracy("fgsm", 0.1) == 1.0
    failed = [check.name for check in found.checks if not check.passed]
    assert failed == ["accuracy near 0 at l_inf eps 1", "white box <= square at l_inf eps 0.1"]
    with torch.inference_mode(), pytest.raises(ValueError, match=r"which torch.inference_mode\(\) forbids"):
        robustness.fgsm(network, images.clone(), labels.clone(), 0.1)


def test_autoattack_does_not_hide_that_gradients_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with Square: what it breaks says nothing about gradients."""
    model = Decoy(balanced(36)).eval()
    images = torch.rand(30, 1, 6, 6)
    labels = model(images).argmax(1)

    def by_square(model: nn.Module, images: Tensor, labels: Tensor, eps: float, **_: Any) -> Tensor:
        return robustness.square(model, images, labels, eps, n_queries=300, generator=generator())

    monkeypatch.setattr(auto_attack, "autoattack", by_square)
    monkeypatch.setattr(auto_attack, "available", lambda: True)
    monkeypatch.setattr(auto_attack, "refusal", lambda *_: "")  # of two classes
    few = suite.Suite((), (suite._fgsm("inf"), suite._pgd(n_steps=2), suite._square(300), suite._autoattack("inf")))
    monkeypatch.setitem(suite.SUITES, "full", few)
    found = robustness.evaluate(model, (images, labels), suite="full", eps=0.1)
    assert found.accuracy("autoattack", 0.1) < found.accuracy("pgd", 0.1) - 0.1
    assert "white box <= square at l_inf eps 0.1" in [check.name for check in found.checks if not check.passed]


@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0, 1e4])
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_attacks_are_as_strong_where_a_network_is_sure_of_itself(
    scale: float, norm: str, trained: nn.Module, digits: data.Dataset
) -> None:
    """Larger logits are the same decisions: gradients of the cross-entropy vanish with them, attacks must not."""

    class Scaled(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return scale * trained(input)

    images, labels = digits.test_images[:150], digits.test_labels[:150]
    eps, step_size = {"inf": (0.1, 0.01), "2": (0.8, 0.1)}[norm]
    survives = []
    for model in (trained, Scaled().eval()):
        options: dict[str, Any] = {"norm": norm, "step_size": step_size, "n_steps": 20, "generator": generator()}
        for attacked in (
            robustness.fgsm(model, images, labels, eps, norm=norm),
            robustness.pgd(model, images, labels, eps, **options),
        ):
            with torch.no_grad():
                survives.append(int((trained(attacked).argmax(1) == labels).sum()))
    assert survives[1] < survives[0] < 150
    assert survives[2] <= survives[0] + 8
    assert survives[3] <= survives[1] + 8


def test_one_image_more_or_less_is_no_failed_check() -> None:
    """And 0.2% of many images are none either, but more than two of a few are."""
    many = [(10000, 20)] + [(images, 2) for images in range(3, 1000)]  # as divisions they are rounded, either way
    for images, allowed in many:
        for more, held in ((0, True), (1, False)):
            counts = (images, images - allowed - 1, images - 1 + more, {"square": allowed + more})
            order, black = robustness.checks.order("l_inf eps 0.1", images, *counts)
            assert (order.passed, black.passed) == (held, held), images


def test_a_label_out_of_range_is_found_before_anything_is_attacked() -> None:
    model = balanced(36)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    labels = torch.zeros(200, dtype=torch.long)
    labels[-1] = 7
    with pytest.raises(ValueError, match="data has label 7"):
        robustness.evaluate(model, (torch.rand(200, 1, 6, 6), labels), suite="quick")
    assert len(calls) == 1


def test_full_suite_says_that_nothing_was_transferred(monkeypatch: pytest.MonkeyPatch) -> None:
    model = balanced(36)
    images = torch.rand(4, 1, 6, 6)
    few = suite.Suite((), (suite._fgsm("inf"), suite._pgd(n_steps=2)))
    monkeypatch.setitem(suite.SUITES, "full", few)
    labels = model(images).argmax(1)
    alone = robustness.evaluate(model, (images, labels), suite="full")
    with_other = robustness.evaluate(model, (images, labels), suite="full", sources={"other": balanced(36)})
    assert alone.notes == (NOT_TRANSFERRED,)
    assert with_other.notes == ()


def test_what_autoattack_finds_fault_with_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = balanced(36)
    images = torch.rand(6, 1, 6, 6)
    labels = model(images).argmax(1)

    def complains(model: nn.Module, images: Tensor, labels: Tensor, eps: float, **_: Any) -> Tensor:
        logging.getLogger("auto-attack").warning("there are zero gradients\nsomewhere")
        return images.clone()

    monkeypatch.setattr(auto_attack, "autoattack", complains)
    monkeypatch.setattr(auto_attack, "available", lambda: True)
    monkeypatch.setattr(auto_attack, "refusal", lambda *_: "")
    few = suite.Suite((), (suite._fgsm("inf"), suite._pgd(n_steps=2), suite._autoattack("inf")))
    monkeypatch.setitem(suite.SUITES, "full", few)
    found = robustness.evaluate(model, (images, labels), suite="full", batch_size=2)
    assert found.notes.count("AutoAttack's own checks: there are zero gradients somewhere") == 1

    monkeypatch.setattr(tally, "SAVE_SECONDS", 0.0)
    options: dict[str, Any] = {"suite": "full", "batch_size": 2, "checkpoint": tmp_path / "evaluation.safetensors"}

    def kill(done: int) -> None:
        monkeypatch.setattr(auto_attack, "autoattack", lambda model, images, *_, **__: images.clone())  # no complaint
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        robustness.evaluate(model, (images, labels), on_batch=kill, **options)
    assert robustness.evaluate(model, (images, labels), **options) == found
    assert not logging.getLogger("auto-attack").handlers


def test_transfer_from_another_model(trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:60], digits.test_labels[:60]
    other = models.MNISTNode(image_size=8, n_steps=1).eval()
    sources = {"itself": trained, "other": other}
    found = robustness.evaluate(trained, (images, labels), suite="quick", eps=0.2, sources=sources)
    own, again = found.accuracy("pgd", 0.2), found.accuracy("pgd on itself", 0.2)  # from other random starts
    assert abs(own - again) <= 3 / 60
    assert own < found.accuracy("pgd on other", 0.2)
    right = trained(images).argmax(1) == labels
    start = tally.random_numbers(0, "pgd on other", "l_inf eps", 0.2)
    options: dict[str, Any] = {"step_size": 2.5 * 0.2 / 10, "n_steps": 10, "target": trained, "generator": start}
    attacked = robustness.pgd(other, images[right], labels[right], 0.2, **options)
    stands = int((trained(attacked).argmax(1) == labels[right]).sum())
    assert found.accuracy("pgd on other", 0.2) == stands / 60 <= int(right.sum()) / 60
    assert "white box <= pgd on other at l_inf eps 0.2" in [check.name for check in found.checks]
    assert found.settings["sources"] == ["itself", "other"]
    some = robustness.evaluate(
        trained, (images, labels), suite="quick", eps=(0.1, 0.2), sources={"other": other}, transfer_eps=[0.2]
    )
    assert [result.strength for result in some.results if result.name == "pgd on other"] == [0.2]
    with pytest.raises(ValueError, match=r"transfer_eps=\[0.3\] names a radius that is not in eps=\[0.1, 0.2\]"):
        robustness.evaluate(trained, (images, labels), eps=(0.1, 0.2), sources={"other": other}, transfer_eps=[0.3])
    with pytest.raises(ValueError, match="source 'other' is in training mode"):
        robustness.evaluate(trained, (images, labels), sources={"other": other.train()})


def test_what_has_lost_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float, list[float]]] = []

    def recorded(attack: suite.Attack) -> suite.Attack:
        def run(model: nn.Module, images: Tensor, labels: Tensor, eps: float, generator: torch.Generator) -> Tensor:
            asked.append((attack.name, eps, images.flatten().tolist()))
            return attack.run(model, images, labels, eps, generator)

        return dataclasses.replace(attack, run=run)

    attacks = recorded(suite._fgsm("inf")), recorded(suite._pgd(n_steps=10))
    monkeypatch.setitem(suite.SUITES, "quick", suite.Suite((), attacks))
    wrong, falls_at_1, falls_at_4, stands = pixels = [0.25, 0.5625, 0.75, 1.0]
    images, labels = torch.tensor(pixels)[:, None, None, None], torch.ones(4, dtype=torch.int64)
    model = Linear(torch.ones(1), bias=-0.5).eval()
    found = robustness.evaluate(model, (images, labels), suite="quick", eps=(0.4, 0.1), seeds=[0])
    assert asked[:4] == [
        ("fgsm", 0.1, pixels),
        ("pgd", 0.1, [falls_at_1, falls_at_4, stands]),
        ("fgsm", 0.4, [wrong, falls_at_4, stands]),  # that it helps nobody is a check
        ("pgd", 0.4, [falls_at_4, stands]),
    ]
    for name in ("fgsm", "pgd", "worst case"):
        assert [found.accuracy(name, eps) for eps in (0.1, 0.4)] == [0.5, 0.25]


def test_certificates_are_sought_where_the_smaller_radius_has_one() -> None:
    asked: list[tuple[float, int]] = []

    def certify(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        asked.append((eps, len(images)))
        return images.flatten(1)[:, 0] > (0.9 if eps == 0.01 else 0.5)  # more at the larger radii: nonsense

    images, labels = torch.linspace(0, 1, 21)[:, None, None, None], torch.ones(21, dtype=torch.int64)
    model = Linear(torch.ones(1), bias=1.0).eval()
    found = robustness.evaluate(model, (images, labels), eps=(0.02, 0.01, 0.03), certify=certify, seeds=[0])
    assert asked == [(0.01, 21), (0.02, 2), (0.03, 2)]
    assert [found.accuracy("certified", eps) for eps in (0.01, 0.02, 0.03)] == [2 / 21] * 3


def few_certified(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    return labels < 1


@pytest.mark.parametrize(
    "broken",
    [
        None,
        "truncated",
        "another model",
        "another attribute of the model",
        "another source",
        "other images",
        "other labels",
        {"eps": 0.2},
        {"seeds": (1,)},
        {"certify": few_certified},
        {"certify": None},
        {"attack_samples": 12},
        {"batch_size": 10},
    ],
    ids=str,
)
def test_an_evaluation_goes_on_where_it_was_killed(
    broken: str | dict[str, Any] | None,
    trained: nn.Module,
    digits: data.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tally, "SAVE_SECONDS", 0.0)
    path = tmp_path / "evaluation.safetensors"
    other = models.MNISTNode(image_size=8, n_steps=1).eval()
    options: dict[str, Any] = {"suite": "quick", "eps": (0.05, 0.2), "sources": {"other": other}, "batch_size": 5}
    options |= {"certify": lambda model, images, labels, eps: labels < 2, "attack_samples": 13}
    pair = (digits.test_images[:20], digits.test_labels[:20])
    whole = robustness.evaluate(trained, pair, **options)
    for killed_at in (5, 15):

        def kill(done: int, killed_at: int = killed_at) -> None:
            if done == killed_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            robustness.evaluate(trained, pair, checkpoint=path, on_batch=kill, **options)
    model, expected, left = trained, whole, [20]
    if broken is not None:
        left = [5, 10, 15, 20]
    if isinstance(broken, dict):
        options |= broken
        left = [10, 20] if "batch_size" in broken else left
        expected = robustness.evaluate(trained, pair, **options)
    if broken == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif broken == "another model":
        model = models.MNISTNode(image_size=8, n_steps=2).eval()
        expected = robustness.evaluate(model, pair, **options)
    elif broken == "another attribute of the model":
        model = copy.deepcopy(trained)
        model.get_submodule("flow").negative_slope = 0.3
        expected = robustness.evaluate(model, pair, **options)
    elif broken == "another source":
        options["sources"] = {"other": models.MNISTNode(image_size=8, n_steps=1).eval()}
        expected = robustness.evaluate(trained, pair, **options)
    elif broken in ("other images", "other labels"):
        images, labels = pair
        pair = (images.flip(3), labels) if broken == "other images" else (images, (labels + 1) % 10)
        expected = robustness.evaluate(trained, pair, **options)
    done: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = robustness.evaluate(model, pair, checkpoint=path, on_batch=done.append, **options)
    assert done == left
    assert found == expected
    for ours, theirs in zip(found.examples, expected.examples, strict=True):
        assert (ours.test, ours.labels, ours.predicted) == (theirs.test, theirs.labels, theirs.predicted)
        assert torch.equal(ours.images, theirs.images)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (broken is not None)
    assert all("evaluation.safetensors is " in sentence for sentence in said)
    with pytest.raises(ValueError, match="checkpoint needs data as a pair"):
        robustness.evaluate(trained, [pair], checkpoint=path, **options)


def test_an_evaluation_does_not_go_on_with_another_certificate(
    trained: nn.Module, digits: data.Dataset, tmp_path: Path
) -> None:
    def certificate(largest: int) -> Callable[..., Tensor]:
        return lambda model, images, labels, eps: labels <= largest

    def by_partial(largest: int, model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        return labels <= largest

    pair = (digits.test_images[:20], digits.test_labels[:20])
    options: dict[str, Any] = {"suite": "quick", "checkpoint": tmp_path / "evaluation.safetensors"}
    for certify in (certificate(9), certificate(1), functools.partial(by_partial, 1), functools.partial(by_partial, 9)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is of another evaluation")
            found = robustness.evaluate(trained, pair, certify=certify, **options)
        few = pair[1] <= 1
        expected = certify(trained, *pair, 0.1)
        assert found.accuracy("certified", 0.1) == int(expected.sum()) / 20 in (int(few.sum()) / 20, 1.0)


def test_certificates_are_held_against_every_attack() -> None:
    model = balanced(16)
    images, labels = torch.rand(300, 1, 4, 4), torch.randint(2, (300,))

    def exact(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        return attacks.margin(model(best_attack(model, images, labels, eps)), labels) < 0

    found = robustness.evaluate(model, (images, labels), eps=(0.02, 0.1), certify=exact)
    for eps in (0.02, 0.1):
        assert 0 < found.accuracy("certified", eps) == found.accuracy("worst case", eps) < found.accuracy("clean")
    names = [check.name for check in found.checks]
    assert names.count("certified <= attacked for every image at l_inf eps 0.02") == 1
    assert found.reliable

    def wrong(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        certified = exact(model, images, labels, eps)
        certified[(~certified).nonzero()[0]] = True
        return certified

    found = robustness.evaluate(model, (images, labels), eps=0.1, certify=wrong, batch_size=300)
    assert [check.name for check in found.checks if not check.passed] == [
        "certified <= attacked for every image at l_inf eps 0.1"
    ]
    with pytest.raises(TypeError, match=r"certify gives torch.float32 \(128,\), expected a bool tensor \(128,\)"):
        robustness.evaluate(model, (images, labels), certify=lambda model, x, y, eps: torch.ones(len(x)))


def test_l2_has_results_and_checks_of_its_own(trained: nn.Module, digits: data.Dataset) -> None:
    pair = (digits.test_images[:60], digits.test_labels[:60])
    found = robustness.evaluate(trained, pair, suite="quick", eps=0.1, eps_l2=(0.1, 0.5))
    assert [result.label for result in found.results[-6:]] == [
        f"{name}, l_2 eps {eps}" for eps in (0.1, 0.5) for name in ("fgsm", "pgd", "worst case")
    ]
    assert found.accuracy("pgd", 0.5) < found.accuracy("pgd", 0.1, "l_2 eps")
    with pytest.raises(KeyError, match=r"more than one result 'pgd' of strength 0\.1"):
        found.accuracy("pgd", 0.1)
    assert [check.name for check in found.checks][1:] == [
        "iterative <= single step <= clean at l_2 eps 0.1",
        "iterative <= single step <= clean at l_2 eps 0.5",
        "eps 0 = clean",
        "accuracy near 0 at l_inf eps 1",
        "accuracy near 0 at l_2 eps 8",
        "white box <= square at l_inf eps 0.1",
    ]
    assert found.notes == (NO_BLACK_BOX_IN_L2,)
    assert found.reliable


# --- the full suite and AutoAttack -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(trained: nn.Module, digits: data.Dataset) -> robustness.Report:
    pair = (digits.test_images[:24], digits.test_labels[:24])
    return robustness.evaluate(trained, pair, suite="full", eps=0.1, eps_l2=())


def test_full_suite(full: robustness.Report) -> None:
    attacked = {result.name: result.settings for result in full.results if result.measure == "l_inf eps"}
    step = pytest.approx(2.5 * 0.1 / 40)
    assert attacked["pgd"] == {"step_size": step, "n_steps": 40, "n_restarts": 5, "loss": "cross-entropy"}
    assert attacked["pgd_margin"] == {"step_size": step, "n_steps": 40, "n_restarts": 5, "loss": "margin"}
    assert attacked["square"] == {"n_queries": 1000}
    every = ["pgd", "pgd_margin", "square"]
    if auto_attack.available():
        assert attacked["autoattack"] == {"version": "standard"}
        assert full.notes == (NOT_TRANSFERRED,)
        every.append("autoattack")
        # As strong as PGD with five restarts, one image of luck aside.
        assert full.accuracy("autoattack", 0.1) <= min(full.accuracy(name, 0.1) for name in every) + 1.01 / 24
    assert full.accuracy("worst case", 0.1) <= min(full.accuracy(name, 0.1) for name in every)
    assert {result.name for result in full.results} >= {"gaussian", "uniform", "shot", "salt_and_pepper"}
    assert full.reliable, full.verdict
    norms = [(attack.name, attack.norm) for attack in suite.SUITES["full"].attacks]
    assert {("pgd", "2"), ("pgd_margin", "2"), ("autoattack", "inf"), ("autoattack", "2")} <= set(norms)
    assert suite.SUITES["full"].eps_l2 == (0.5, 1.0, 2.0)


def test_autoattack_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, trained: nn.Module, digits: data.Dataset
) -> None:
    monkeypatch.setattr(auto_attack, "available", lambda: False)
    images, labels = digits.test_images[:4], digits.test_labels[:4]
    with pytest.raises(ModuleNotFoundError, match=r"AutoAttack was not run: .*pip install pyautoattack"):
        robustness.autoattack(trained, images, labels, 0.1, generator=generator())
    few = suite.Suite((), (suite._fgsm("inf"), suite._pgd(n_steps=2), suite._autoattack("inf")))
    monkeypatch.setitem(suite.SUITES, "full", few)
    report = robustness.evaluate(trained, (images, labels), suite="full", eps=0.1)
    assert report.notes == (NOT_TRANSFERRED, f"{auto_attack.MISSING}.")
    assert report.notes[1] in report.to_markdown()
    assert "autoattack" not in {result.name for result in report.results}


# --- reports -----------------------------------------------------------------------------------------------------


def test_batches_of_an_iterable_are_read_once(trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:60], digits.test_labels[:60]
    stream = iter([(images[:25], labels[:25]), (images[25:], labels[25:])])
    found = robustness.evaluate(trained, stream, eps=0.1)
    whole = robustness.evaluate(trained, (images, labels), eps=0.1)
    assert found.n_samples == 60
    for name, strength in (("clean", 0.0), ("fgsm", 0.1)):
        assert found.accuracy(name, strength) == whole.accuracy(name, strength)


def test_evaluate_is_its_seeds(trained: nn.Module, digits: data.Dataset) -> None:
    pair = (digits.test_images[:20], digits.test_labels[:20])
    assert robustness.evaluate(trained, pair) == robustness.evaluate(trained, pair)
    assert robustness.evaluate(trained, pair).results != robustness.evaluate(trained, pair, seeds=(7, 8, 9)).results


def test_mean_and_spread() -> None:
    result = robustness.Result("gaussian", 0.1, (0.5, 0.7, 0.9), {})
    assert result.mean == pytest.approx(0.7)
    assert result.std == pytest.approx(0.2)
    assert robustness.Result("clean", 0.0, (0.5,), {}).std == 0.0


def test_a_report_is_read_back(report: robustness.Report) -> None:
    again = robustness.Report.from_json(report.to_json())
    assert again == report
    assert again.to_markdown() == report.to_markdown()
    assert again.examples == ()


@pytest.mark.parametrize("attack_samples", [1, 30, 50, 70])
def test_attacks_of_the_first_images_only(attack_samples: int, trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:60], digits.test_labels[:60]

    def certify(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        return labels < 4

    def found(n: int, attacked: int | None) -> robustness.Report:
        pair = (images[:n], labels[:n])
        return robustness.evaluate(
            trained, pair, suite="quick", eps=0.1, certify=certify, attack_samples=attacked, batch_size=20
        )

    few, alone, whole = found(60, attack_samples), found(min(60, attack_samples), None), found(60, None)
    for name, strength in (("clean", 0.0), ("gaussian", 0.2), ("certified", 0.1)):
        assert few.accuracy(name, strength) == whole.accuracy(name, strength)
    for name in ("fgsm", "pgd", "worst case"):
        assert few.accuracy(name, 0.1) == alone.accuracy(name, 0.1)
    said = [note for note in few.notes if note.startswith("Attacks ran on")]
    assert said == ([] if attack_samples > 60 else [f"Attacks ran on the first {attack_samples} of 60 images."])
    assert few.settings["attack_samples"] == attack_samples
    if attack_samples < 60:  # what the accuracies under attack are to be compared with
        assert few.accuracy("clean, attacked images") == alone.accuracy("clean")
    else:
        assert [result.name for result in few.results] == [result.name for result in whole.results]


def test_report_formats(report: robustness.Report, trained: models.MNISTNode, tmp_path: Path) -> None:
    table = report.to_markdown()
    for result in report.results:
        assert f"| {result.label} | {result.mean:.2%} |" in table
    content = json.loads(report.to_json())
    assert content["n_samples"] == 200
    assert content["settings"]["seeds"] == [3, 4]
    assert [entry["mean"] for entry in content["results"]] == [result.mean for result in report.results]
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    rates = trained.contraction_rate(norm="inf")
    assert content["rates"]["inf"] == pytest.approx(rates.tolist())
    assert f"| 2 | {trained.contraction_rate()[1].item():.4g} | {rates[1].item():.4g} |" in table


def with_nan(model: nn.Module) -> nn.Module:
    copy = models.MNISTNode(image_size=8, n_steps=2).eval()
    copy.load_state_dict(model.state_dict())
    copy.flow.bias.data[0, 0] = math.nan
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "autoattack"}, "suite='autoattack' is unknown"),
        ({"eps_l2": [0.1, -2.0]}, r"eps_l2=-2\.0 is negative, expected a radius >= 0"),
        ({"eps": -0.1}, r"eps=-0\.1 is negative, expected a radius >= 0"),
        ({"eps": math.nan}, "eps=nan is not finite"),
        ({"eps": ()}, "eps is empty"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (0, 1, 0)}, r"seeds=\[0, 1, 0\] names one twice"),
        ({"attack_samples": 0}, "attack_samples=0 is too small"),
        (
            {"sources": {"other": models.MNISTNode(image_size=8, num_classes=2).eval()}},
            "data has label [2-9], expected labels below the 2 classes of source 'other'",
        ),
        ({"data": (torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))}, "data is empty"),
        ({"data": []}, "data is empty"),
        ({"data": (torch.rand(2, 1, 8, 8), torch.tensor([0, 10]))}, "data has label 10, expected labels below .* 10"),
        ({"data": (torch.rand(2, 1, 8, 8), torch.tensor([0, -1]))}, "data has label -1"),
        ({"data": (torch.rand(2, 1, 8, 8), torch.tensor([0]))}, r"data has images \(2, 1, 8, 8\) and labels \(1,\)"),
        ({"data": (torch.rand(2, 64), torch.tensor([0, 1]))}, r"data has images \(2, 64\)"),
        (
            {"data": (torch.full((1, 1, 8, 8), 255.0), torch.tensor([0]))},
            r"from 255\.0 to 255\.0, expected .* \[0, 1\]",
        ),
        ({"data": (torch.full((1, 1, 8, 8), math.nan), torch.tensor([0]))}, r"expected values in \[0, 1\]"),
    ],
)
def test_errors_name_the_fault(change: dict[str, Any], message: str, trained: nn.Module, digits: data.Dataset) -> None:
    arguments = {"data": (digits.test_images[:4], digits.test_labels[:4]), **change}
    with pytest.raises(ValueError, match=message):
        robustness.evaluate(trained, arguments.pop("data"), **arguments)
    with pytest.raises(TypeError, match=r"attack_samples=10\.5 is a float, expected an int"):
        robustness.evaluate(trained, (digits.test_images[:4], digits.test_labels[:4]), attack_samples=10.5)


def test_models_that_cannot_be_evaluated(trained: nn.Module, digits: data.Dataset) -> None:
    pair = (digits.test_images[:4], digits.test_labels[:4])
    with pytest.raises(ValueError, match=r"model is in training mode, expected model.eval\(\)"):
        robustness.evaluate(models.MNISTNode(image_size=8), pair)
    partly = nn.Sequential(trained, nn.Dropout(0.5)).eval()
    partly[1].train()
    with pytest.raises(ValueError, match="model is in training mode"):
        robustness.evaluate(partly, pair)
    with pytest.raises(ValueError, match="batch_size=0 is too small"):
        robustness.evaluate(trained, pair, batch_size=0)
    as_loaders_give_it = robustness.evaluate(trained, list(pair), suite="quick")  # type: ignore[arg-type]
    assert as_loaders_give_it.n_samples == 4
    with pytest.raises(ValueError, match=r"model has values that are not finite in flow.bias"):
        robustness.evaluate(with_nan(trained), pair)
    with pytest.raises(TypeError, match=r"data's labels are torch.float32, expected an int64 tensor"):
        robustness.evaluate(trained, (pair[0], pair[1].float()))
    with pytest.raises(ValueError, match=r"model gives \(1, 1, 8, 8\) for 1 images"):
        robustness.evaluate(nn.Identity().eval(), pair)

    class Overflow(Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 1e38 * 1e38

    with pytest.raises(ValueError, match="model gives logits that are not finite"):
        robustness.evaluate(Overflow(torch.ones(64)).eval(), (pair[0], pair[1] * 0))
