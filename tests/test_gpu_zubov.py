"""Zubov-Nets on a real card, against themselves on the CPU in float64: ``pytest -m gpu``. Skipped without a device."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from robust_node_fast import data, training, zubov
from robust_node_fast.training import TrainConfig

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
BOTH = pytest.mark.parametrize("partial", [False, True], ids=["convex", "partial"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def pair(partial: bool, dtype: torch.dtype) -> tuple[zubov.ConvexLyapunov, zubov.ConvexLyapunov]:
    """The same functions on the card and, in float64, on the CPU."""
    here = zubov.ConvexLyapunov(8, 10, width=16, depth=2, partial=partial, dtype=dtype)
    return copy.deepcopy(here).to(DEVICE), here.double()


@DTYPES
@BOTH
def test_values_derivatives_and_their_gradients(partial: bool, dtype: torch.dtype) -> None:
    there, here = pair(partial, dtype)
    states, field = torch.randn(64, 8, dtype=dtype), torch.randn(64, 8, dtype=dtype)
    found, expected = [], []
    for results, lyapunov, inputs in (
        (found, there, (states.to(DEVICE), field.to(DEVICE))),
        (expected, here, (states.double(), field.double())),
    ):
        value, derivative = zubov.value_and_derivative(lyapunov, *inputs)
        gradients = torch.autograd.grad((value + derivative).square().mean(), tuple(lyapunov.parameters()))
        results += [value, derivative, *gradients]
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.device.type, ours.dtype) == (DEVICE, dtype)
        scale = float(exact.detach().abs().max())
        assert_close(ours.cpu().double() / scale, exact / scale, 1e-4 if dtype == torch.float32 else 1e-11)


@DTYPES
@BOTH
def test_boundary_within_the_stated_tolerance(partial: bool, dtype: torch.dtype) -> None:
    there, here = pair(partial, dtype)
    points = zubov.sample_boundary(there, 50, generator=torch.Generator(DEVICE).manual_seed(3))
    again = zubov.sample_boundary(there, 50, generator=torch.Generator(DEVICE).manual_seed(3))
    assert torch.equal(points, again)
    error = (here.per_class(points.detach().cpu().double()) - 1).abs().max()
    assert error <= (1e-6 if dtype == torch.float32 else 1e-12)


def test_the_losses_that_draw_nothing_are_those_of_the_cpu() -> None:
    there, here = pair(False, torch.float64)
    trajectory, labels = torch.randn(3, 32, 8, dtype=torch.float64), torch.arange(32) % 10

    def losses(lyapunov: zubov.ConvexLyapunov, device: str) -> dict[str, Tensor]:
        return zubov.zubov_losses(
            lyapunov,
            torch.tanh,
            trajectory.to(device),
            labels.to(device),
            consistency=0.0,
            separation=0.0,
            spacing=1.0,  # all pairs: there are more rays than classes
            containment=1.0,
            exclusion=1.0,
        )

    found, expected = losses(there, DEVICE), losses(here, "cpu")
    for name in ("classification", "spacing", "containment", "exclusion"):
        assert float(expected[name].detach()) > 0.0
        assert_close(found[name].cpu(), expected[name], 1e-11)


def test_training_and_certificate(tmp_path: Path) -> None:
    """The recipe for digits, with every loss; no corner of a certified box is another class."""
    digits = data.load("digits")
    config = TrainConfig.recipe("digits", "zubov", steps=200, device=DEVICE)
    (tmp_path / "run").mkdir()
    training.prepare(config, tmp_path / "run")
    outcome = training.fit(tmp_path / "run", digits)
    assert outcome.accuracy > 0.8
    last = training.last_step(tmp_path / "run")
    assert all(math.isfinite(value) for value in last.values())
    assert last["classification"] < 0.5 * math.log(10.0)
    net = training.load_model(tmp_path / "run")[0].to(DEVICE).eval()
    images, labels = digits.test_images[:32].to(DEVICE), digits.test_labels[:32].to(DEVICE)
    radius = zubov.margin_radius(net, images, labels)
    assert float(radius.max()) > 0.0
    noise = torch.randn_like(images).sign() * radius.view(-1, 1, 1, 1).float()
    held = radius > 0
    with torch.no_grad():
        assert (net(images + noise).argmax(1)[held] == labels[held]).all()
