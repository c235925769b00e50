"""Noise, attacks and ``evaluate``: exact values where they follow by hand, and errors that name the fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast import data, models, robustness
from robust_node_fast.robustness import attacks
from robust_node_fast.robustness.evaluate import PGD_STEPS


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


def test_gaussian_has_the_stated_moments_and_is_not_clipped() -> None:
    images = torch.full((200, 1, 16, 16), 0.5)
    noise = robustness.gaussian(images, 0.3, generator()) - images
    assert float(noise.mean()) == pytest.approx(0.0, abs=5e-3)
    assert float(noise.std()) == pytest.approx(0.3, rel=1e-2)
    assert bool((noise.abs() > 0.5).any())
    assert torch.equal(robustness.gaussian(images, 0.0, generator()), images)


def test_salt_and_pepper_has_the_stated_fractions() -> None:
    images = torch.full((100, 3, 20, 20), 0.5)
    noisy = robustness.salt_and_pepper(images, 0.2, generator())
    assert float((noisy == 0).float().mean()) == pytest.approx(0.1, abs=5e-3)
    assert float((noisy == 1).float().mean()) == pytest.approx(0.1, abs=5e-3)
    assert set(noisy.unique().tolist()) == {0.0, 0.5, 1.0}
    assert torch.equal(noisy, noisy[:, :1].expand_as(noisy))  # a pixel with all its channels
    assert torch.equal(robustness.salt_and_pepper(images, 0.0, generator()), images)
    assert set(robustness.salt_and_pepper(images, 1.0, generator()).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("noise", [robustness.gaussian, robustness.salt_and_pepper])
def test_noise_is_its_seed(noise: Callable[..., Tensor]) -> None:
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(noise(images, 0.3, generator(1)), noise(images, 0.3, generator(1)))
    assert not torch.equal(noise(images, 0.3, generator(1)), noise(images, 0.3, generator(2)))


def test_noise_out_of_range() -> None:
    images = torch.rand(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"sigma=-0\.1 is negative"):
        robustness.gaussian(images, -0.1, generator())
    with pytest.raises(ValueError, match=r"fraction=1\.5 is no probability"):
        robustness.salt_and_pepper(images, 1.5, generator())
    with pytest.raises(ValueError, match="sigma=nan is not finite"):
        robustness.gaussian(images, math.nan, generator())


# --- attacks -----------------------------------------------------------------------------------------------------


def best_attack(model: Linear, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    direction = model.weight.detach().sign().reshape(1, *images.shape[1:])
    return (images - eps * direction * (2 * labels - 1)[:, None, None, None]).clamp(0, 1)


def test_both_attacks_find_the_best_point_of_a_linear_model() -> None:
    model = Linear(torch.randn(12)).eval()
    images, labels = torch.rand(20, 3, 2, 2), torch.randint(2, (20,))
    best = best_attack(model, images, labels, 0.2)
    torch.testing.assert_close(robustness.fgsm(model, images, labels, 0.2), best)
    found = robustness.pgd(model, images, labels, 0.2, step_size=0.05, n_steps=10, generator=generator())
    torch.testing.assert_close(found, best)


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
    with pytest.raises(IndexError):
        robustness.fgsm(model, images, labels + 100, 0.1)
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attack_arguments(trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:2], digits.test_labels[:2]
    with pytest.raises(ValueError, match=r"eps=-0\.1 is negative"):
        attacks.fgsm(trained, images, labels, -0.1)
    with pytest.raises(ValueError, match="step_size=inf is not finite"):
        attacks.pgd(trained, images, labels, 0.1, step_size=math.inf, generator=generator())
    for name in ("n_steps", "n_restarts"):
        with pytest.raises(ValueError, match=f"{name}=0 is too small"):
            attacks.pgd(trained, images, labels, 0.1, step_size=0.1, generator=generator(), **{name: 0})
    with pytest.raises(ValueError, match="model is in training mode"):
        attacks.fgsm(models.MNISTNode(image_size=8), images, labels, 0.1)


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
        "gaussian 0.1",
        "gaussian 0.2",
        "gaussian 0.3",
        "salt-and-pepper 0.05",
        "salt-and-pepper 0.2",
        "fgsm 0.05",
        "pgd 0.05",
        "fgsm 0.15",
        "pgd 0.15",
    ]
    assert report.n_samples == 200
    assert [len(result.per_seed) for result in report.results] == [1, 2, 2, 2, 2, 2, 1, 1, 1, 1]
    pgd = report.results[-1]
    assert pgd.settings == {"step_size": pytest.approx(2.5 * 0.15 / 40), "n_steps": 40, "n_restarts": 1}


def test_accuracies_are_those_of_the_parts(report: robustness.Report, trained: nn.Module, digits: data.Dataset) -> None:
    images, labels = digits.test_images[:200], digits.test_labels[:200]

    def accuracy(attacked: Tensor) -> float:
        with torch.no_grad():
            return int((trained(attacked).argmax(1) == labels).sum()) / 200

    assert report.accuracy("clean") == accuracy(images) > 0.85
    assert report.accuracy("fgsm", 0.15) == accuracy(robustness.fgsm(trained, images, labels, 0.15))
    start = generator(3)
    parts = [
        robustness.pgd(trained, x, y, 0.15, step_size=2.5 * 0.15 / PGD_STEPS, generator=start)
        for x, y in zip(images.split(128), labels.split(128), strict=True)
    ]
    assert report.accuracy("pgd", 0.15) == accuracy(torch.cat(parts))
    for k, seed in enumerate((3, 4)):
        noise = generator(seed)
        noisy = torch.cat([robustness.gaussian(x, 0.3, noise) for x in images.split(128)])
        assert report.results[3].per_seed[k] == accuracy(noisy)


def test_strength_costs_accuracy_and_the_checks_hold(report: robustness.Report) -> None:
    gaussian = [report.accuracy("gaussian", sigma) for sigma in (0.1, 0.2, 0.3)]
    assert report.accuracy("clean") >= gaussian[0] > gaussian[1] > gaussian[2]
    assert report.accuracy("pgd", 0.15) < report.accuracy("pgd", 0.05) < report.accuracy("clean")
    assert len(report.checks) == 3
    assert all(check.passed for check in report.checks)
    assert report.checks[-1].detail == "400 of 400 predictions under attack unchanged"
    with pytest.raises(KeyError, match="no result 'square'"):
        report.accuracy("square", 0.1)


def test_a_linear_model_has_the_accuracy_that_its_margins_say() -> None:
    model = Linear(torch.randn(16), 0.3).eval()
    images, labels = torch.rand(300, 1, 4, 4), torch.randint(2, (300,))
    found = robustness.evaluate(model, (images, labels), eps=0.1, seeds=[0])
    with torch.no_grad():
        exact = int((model(best_attack(model, images, labels, 0.1)).argmax(1) == labels).sum()) / 300
    assert found.accuracy("fgsm", 0.1) == found.accuracy("pgd", 0.1) == exact
    assert all(check.passed for check in found.checks)


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
    assert [check.passed for check in found.checks] == [False, True]
    assert "**NO**" in found.to_markdown()


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


def test_report_formats(report: robustness.Report, tmp_path: Path) -> None:
    table = report.to_markdown()
    for result in report.results:
        assert f"| {result.label} | {result.mean:.2%} |" in table
    content = json.loads(report.to_json())
    assert content["n_samples"] == 200
    assert content["settings"]["seeds"] == [3, 4]
    assert [entry["mean"] for entry in content["results"]] == [result.mean for result in report.results]
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def with_nan(model: nn.Module) -> nn.Module:
    copy = models.MNISTNode(image_size=8, n_steps=2).eval()
    copy.load_state_dict(model.state_dict())
    copy.flow.bias.data[0, 0] = math.nan
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "autoattack"}, "suite='autoattack' is unknown"),
        ({"eps": -0.1}, r"eps=-0\.1 is negative, expected a radius >= 0"),
        ({"eps": math.nan}, "eps=nan is not finite"),
        ({"eps": ()}, "eps is empty"),
        ({"seeds": ()}, "seeds is empty"),
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


def test_models_that_cannot_be_evaluated(trained: nn.Module, digits: data.Dataset) -> None:
    pair = (digits.test_images[:4], digits.test_labels[:4])
    with pytest.raises(ValueError, match=r"model is in training mode, expected model.eval\(\)"):
        robustness.evaluate(models.MNISTNode(image_size=8), pair)
    with pytest.raises(ValueError, match=r"model has values that are not finite in flow.bias"):
        robustness.evaluate(with_nan(trained), pair)
    with pytest.raises(TypeError, match=r"data's labels are torch.float32, expected an int64 tensor"):
        robustness.evaluate(trained, (pair[0], pair[1].float()))
    with pytest.raises(ValueError, match=r"model gives \(4, 1, 8, 8\) for 4 images"):
        robustness.evaluate(nn.Identity().eval(), pair)
