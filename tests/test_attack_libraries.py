"""Our attacks against those of independent libraries on the same network: step by step, or by what survives."""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_node_fast import models, robustness
from robust_node_fast.robustness import auto_attack, suite
from robust_node_fast.robustness.evaluate import NOT_TRANSFERRED


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
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
@pytest.mark.parametrize(("eps", "step_size"), [(0.05, 0.02), (0.6, 0.25)])
def test_pgd_is_foolboxs(
    norm: str, loss: str, eps: float, step_size: float, problem: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """The same nine steps from our random start; the margin as their attack of Carlini and Wagner defines it."""
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed (requirements-dev.txt)")
    import eagerpy
    from foolbox.attacks.carlini_wagner import best_other_classes

    model, images, labels = problem
    options: dict[str, Any] = {"norm": norm, "loss": loss}
    start = robustness.pgd(
        model, images, labels, eps, step_size=0.0, n_steps=1, generator=torch.Generator().manual_seed(1), **options
    )
    base = {"inf": foolbox.attacks.LinfPGD, "2": foolbox.attacks.L2PGD}[norm]

    class FromOurStart(base):  # type: ignore[valid-type, misc]
        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            return eagerpy.astensor(start)

        def get_loss_fn(self, model: Any, labels: Any) -> Any:
            if loss == "cross-entropy":
                return super().get_loss_fn(model, labels)

            def margin(inputs: Any) -> Any:
                logits, rows = model(inputs), range(len(labels))
                others = best_other_classes(logits, labels)
                return (logits[rows, others] - logits[rows, labels]).sum()

            return margin

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


def test_square_is_as_strong_as_its_authors(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (requirements-dev.txt)")
    from pyautoattack.square import SquareAttack

    model, images, labels = float32(problem, 120)
    eps, n_queries = 0.1, 200

    def survivors(attacked: Tensor) -> int:
        assert float((attacked - images).abs().max()) <= eps + 1e-6
        with torch.no_grad():
            return int((model(attacked).argmax(1) == labels).sum())

    ours = survivors(robustness.square(model, images, labels, eps, n_queries=n_queries, generator=torch.Generator()))
    with torch.random.fork_rng(), torch.no_grad():  # it seeds the global generator
        authors = SquareAttack(model, norm="Linf", n_queries=n_queries, eps=eps, p_init=0.8, seed=0, device="cpu")
        theirs = survivors(authors.perturb(images, labels))
    assert 0 < theirs < 120
    assert abs(ours - theirs) <= 12, (ours, theirs)


def float32(problem: tuple[nn.Module, Tensor, Tensor], n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in float32, and images that it classifies rightly."""
    model = copy.deepcopy(problem[0]).float()
    images = torch.rand(n, 2, 8, 8)
    with torch.no_grad():
        return model, images, model(images).argmax(1)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_autoattack_is_the_authors_ensemble(norm: str, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    """In the ball, repeatable, and nothing of the caller's is disturbed. Here its first attack breaks every image.

    For how strong it is, see ``test_robustness.test_full_suite``.
    """
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (requirements-dev.txt)")
    model, images, labels = float32(problem, 16)
    labels[0] = (labels[0] + 1) % 10  # classified wrongly as it is: has lost, and is left as it is
    eps = {"inf": 0.5, "2": 4.0}[norm]

    def run(seed: int) -> Tensor:
        return robustness.autoattack(
            model, images, labels, eps, norm=norm, generator=torch.Generator().manual_seed(seed)
        )

    def trace(*_: object) -> None:
        return None

    state, tracer = torch.get_rng_state(), sys.gettrace()
    sys.settrace(trace)
    try:
        found = run(1)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(tracer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(found[0], images[0])
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    change = (found - images).flatten(1)
    size = change.abs().amax(1) if norm == "inf" else change.norm(dim=1)
    assert 0.9 * eps < float(size.max()) <= eps + 1e-5
    with torch.no_grad():
        assert bool((model(found).argmax(1) != labels).all())
    assert torch.equal(run(1), found)
    assert not torch.equal(run(2), found)


def test_autoattack_refuses_what_its_code_cannot_do(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (requirements-dev.txt)")
    model, images, labels = problem
    three = models.MNISTNode(image_size=8, n_steps=2, num_classes=3).eval()
    small = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval()
    for network, x, y, norm, match in (
        (model, images, labels, "inf", r"AutoAttack computes in torch\.float32, images are torch\.float64"),
        (three, torch.rand(2, 1, 8, 8), labels[:2] % 3, "inf", "AutoAttack needs at least 4 classes, the model has 3"),
        (small, torch.rand(2, 1, 4, 4), labels[:2] % 5, "2", "AutoAttack in l_2 needs images of 5 pixels a side"),
        (small, torch.rand(2, 1, 4, 4), torch.tensor([0, 5]), "inf", "data has label 5"),
    ):
        with pytest.raises(ValueError, match=match):
            robustness.autoattack(network, x, y, 0.1, norm=norm, generator=torch.Generator())
    with torch.no_grad():
        small[1].bias.add_(torch.inf)
    with pytest.raises(ValueError, match=r"not finite"):
        robustness.autoattack(small, torch.rand(2, 1, 4, 4), torch.zeros(2).long(), 0.1, generator=torch.Generator())


def test_the_full_suite_leaves_autoattack_out_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (requirements-dev.txt)")
    few = suite.Suite((), (suite._fgsm("inf"), suite._pgd(n_steps=2), suite._autoattack("inf")))
    monkeypatch.setitem(suite.SUITES, "full", few)
    three = models.MNISTNode(image_size=8, n_steps=2, num_classes=3).eval()
    found = robustness.evaluate(three, (torch.rand(4, 1, 8, 8), torch.arange(4) % 3), suite="full", eps=0.1)
    assert found.notes == (NOT_TRANSFERRED, "AutoAttack needs at least 4 classes, the model has 3.")
    assert "autoattack" not in {result.name for result in found.results}


def test_autoattack_of_fewer_than_ten_classes() -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (requirements-dev.txt)")
    torch.manual_seed(3)
    model = models.MNISTNode(image_size=8, n_steps=2, num_classes=4).eval()
    images = torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    # None falls at the small radius, so that every attack of the ensemble runs; all at the large one.
    for eps, fooled in ((0.003, 0), (1.0, len(labels))):
        found = robustness.autoattack(model, images, labels, eps, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert int((model(found).argmax(1) != labels).sum()) == fooled


def test_remarks_that_differ_in_numbers_become_one_a_radius() -> None:
    logger = logging.getLogger("auto-attack")
    with auto_attack.remarks(["l_inf eps 0.1: Square lowered it by 1.10 to 3.80%. See it."]) as found:
        for norm, eps, by in (("inf", 0.1, 0.45), ("inf", 0.2, 2.0), ("inf", 0.1, 2.0), ("2", 0.1, 5.0)):
            with auto_attack._tagged(norm, eps):
                logger.warning(f"Square lowered it by\n{by:.2f}%. See it.")
        for points in (7, 12, 3):
            logger.warning("%d points with zero gradient", points)
        logger.warning("a randomised defence")
        logger.warning("a randomised defence")
    assert found == [
        "l_inf eps 0.1: Square lowered it by 0.45 to 3.80%. See it.",
        "l_inf eps 0.2: Square lowered it by 2.00%. See it.",
        "l_2 eps 0.1: Square lowered it by 5.00%. See it.",
        "3 to 12 points with zero gradient",
        "a randomised defence",
    ]
    assert not logger.handlers
    assert not logger.filters


def test_remarks_of_the_authors_code_name_the_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (requirements-dev.txt)")
    torch.manual_seed(3)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Softmax(1)).eval()  # probabilities: they remark upon it
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        labels = linear(images).argmax(1)
    with auto_attack.remarks([]) as found:
        robustness.autoattack(linear, images, labels, 0.5, generator=torch.Generator().manual_seed(0))
    assert found
    assert all(remark.startswith("l_inf eps 0.5: ") for remark in found), found
