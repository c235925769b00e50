"""Our attacks against those of independent libraries on the same network: step by step, or by what survives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_node_fast import models, robustness


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """In float64: no rounding error then decides the sign of a gradient. Half of the images are classified wrongly."""
    torch.manual_seed(0)
    model = models.MNISTNode(in_channels=2, image_size=8, n_steps=2).double().eval()
    images = torch.rand(40, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::2] = torch.randint(10, (20,))
    return model, images, labels


def foolbox_model(foolbox: Any, model: nn.Module) -> Any:
    return foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_fgsm_is_foolboxs(norm: str, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed (requirements-dev.txt)")
    model, images, labels = problem
    attack = {"inf": foolbox.attacks.LinfFastGradientAttack, "2": foolbox.attacks.L2FastGradientAttack}[norm]
    for eps in (0.03, 0.5):
        theirs = attack(random_start=False).run(foolbox_model(foolbox, model), images, labels, epsilon=eps)
        torch.testing.assert_close(robustness.fgsm(model, images, labels, eps, norm=norm), theirs)


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize(("eps", "step_size"), [(0.05, 0.02), (0.6, 0.25)])
def test_pgd_is_foolboxs(norm: str, eps: float, step_size: float, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    """The same nine steps from our random start."""
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed (requirements-dev.txt)")
    import eagerpy

    model, images, labels = problem
    options: dict[str, Any] = {"norm": norm}
    start = robustness.pgd(
        model, images, labels, eps, step_size=0.0, n_steps=1, generator=torch.Generator().manual_seed(1), **options
    )
    base = {"inf": foolbox.attacks.LinfPGD, "2": foolbox.attacks.L2PGD}[norm]

    class FromOurStart(base):  # type: ignore[valid-type, misc]
        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            return eagerpy.astensor(start)

    theirs = FromOurStart(abs_stepsize=step_size, steps=9).run(
        foolbox_model(foolbox, model), images, labels, epsilon=eps
    )
    ours = robustness.pgd(
        model,
        images,
        labels,
        eps,
        step_size=step_size,
        n_steps=9,
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    torch.testing.assert_close(ours, theirs)
    assert float((ours - start).abs().max()) > 0.01


def test_square_is_as_strong_as_that_of_torchattacks(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    torchattacks = pytest.importorskip(
        "torchattacks", reason="torchattacks is not installed (it pins an old requests): pip install --no-deps"
    )
    model, images, _ = problem
    images = torch.rand(120, 2, 8, 8, dtype=torch.float64)
    labels = model(images).argmax(1)
    eps, n_queries = 0.1, 200

    def survivors(attacked: Tensor) -> int:
        assert float((attacked - images).abs().max()) <= eps + 1e-6
        return int((model(attacked).argmax(1) == labels).sum())

    ours = survivors(robustness.square(model, images, labels, eps, n_queries=n_queries, generator=torch.Generator()))
    with torch.random.fork_rng():  # it seeds the global generator
        theirs = survivors(torchattacks.Square(model, eps=eps, n_queries=n_queries, seed=0)(images, labels))
    assert 0 < theirs < 120
    assert abs(ours - theirs) <= 12, (ours, theirs)
