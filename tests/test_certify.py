"""Contract of rnf.certify: neither attack nor random search breaks a certificate; bounds against dense operators."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import robust_node_fast as rnf
from robust_node_fast import certify


def small_network(seed: int = 0, *, gain: float = 1.0, step_size: float = 0.1, n_steps: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = rnf.models.MNISTNode(3, n_steps, step_size, image_size=6, num_classes=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model.eval()


def samples(count: int = 8, size: int = 6) -> Tensor:
    return torch.rand(count, 1, size, size)


def worst_found(model: nn.Module, x: Tensor, y: Tensor, eps: Tensor, steps: int = 30) -> Tensor:
    """Smallest margin that projected gradients and random corners find within ``eps``, in float64."""
    model, x = rnf.certify._network.in_float64(model), x.double()
    eps = eps.view(-1, 1, 1, 1).double()

    def margin(z: Tensor) -> Tensor:
        return certify._network.margins(model(z), y).amin(1)

    worst = margin(x)
    for restart in range(6):
        delta = eps * (torch.rand_like(x) * 2 - 1 if restart % 2 else torch.randn_like(x).sign())
        for _ in range(steps):
            delta.requires_grad_()
            (gradient,) = torch.autograd.grad(margin(x + delta).sum(), delta)
            delta = (delta.detach() - 0.25 * eps * gradient.sign()).clamp(-eps, eps)
            worst = torch.minimum(worst, margin(x + delta).detach())
    return worst


@given(
    seed=st.integers(0, 10**6),
    gain=st.floats(0.3, 4.0),
    step_size=st.sampled_from((-0.2, 0.01, 0.1, 0.5, 1.5)),
    eps=st.floats(1e-4, 0.3),
)
@settings(max_examples=25)
def test_no_attack_breaks_a_certificate(seed: int, gain: float, step_size: float, eps: float) -> None:
    model, x = small_network(seed, gain=gain, step_size=step_size), samples()
    y = model(x).argmax(1)
    certified = certify.linf_certified(model, x, y, eps)
    assert (worst_found(model, x, y, torch.full((len(x),), eps), steps=10)[certified] > 0).all()
    radius = certify.linf_radius(model, x, y)
    assert torch.equal(certify.linf_certified(model, x, y, 0.0), radius > 0)
    assert (worst_found(model, x, y, radius, steps=10)[radius > 0] > 0).all()


@given(seed=st.integers(0, 10**6), gain=st.floats(0.3, 3.0), p=st.sampled_from(("inf", "1", "2")))
@settings(max_examples=25)
def test_no_random_search_breaks_a_lipschitz_radius(seed: int, gain: float, p: str) -> None:
    model, x = small_network(seed, gain=gain), samples()
    y = model(x).argmax(1)
    radius = certify.lipschitz_radius(model, x, y, p=p)
    double = certify._network.in_float64(model)
    order = float(p)
    for _ in range(50):
        delta = torch.randn(x.shape, dtype=torch.float64)
        if p == "1" and torch.rand(()) < 0.5:  # the corners of its ball: one pixel
            delta = F.one_hot(torch.randint(36, (len(x),)), 36).view(x.shape).double()
        norm = torch.linalg.vector_norm(delta.flatten(1), order, dim=1)
        moved = x + delta * (radius.clamp_max(1e3) / norm).view(-1, 1, 1, 1)
        assert torch.equal(double(moved).argmax(1)[radius > 0], y[radius > 0])


def dense(weight: Tensor, size: int) -> Tensor:
    """The convolution with zero padding as a matrix."""
    channels = weight.shape[1]
    basis = torch.eye(channels * size**2, dtype=weight.dtype).view(-1, channels, size, size)
    return F.conv2d(basis, weight, padding=weight.shape[-1] // 2).flatten(1).T


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_constants_of_a_layer_bound_those_of_its_matrix(kernel: int) -> None:
    conv = nn.Conv2d(3, 5, kernel, padding=kernel // 2).double()
    matrix = dense(conv.weight.detach(), 6)
    (bound,) = certify.lipschitz._bound(conv)
    assert torch.linalg.matrix_norm(matrix, torch.inf) <= bound.inf * (1 + 1e-12)
    assert torch.linalg.matrix_norm(matrix, 1) <= bound.one * (1 + 1e-12)
    assert torch.linalg.matrix_norm(matrix, 2) <= bound.of("2") * (1 + 1e-12)
    if kernel <= 3:  # a pixel in the middle sees the whole filter
        assert torch.linalg.matrix_norm(matrix, torch.inf).item() == pytest.approx(bound.inf)


@pytest.mark.parametrize("step_size", [-0.3, 0.1, 0.7])
@pytest.mark.parametrize("shared", [False, True])
def test_bound_of_a_flow_contains_what_is_sampled(step_size: float, shared: bool) -> None:
    z, radius = torch.randn(2, 3, 5, 6).double(), torch.rand(2, 3, 5, 6).double() * 0.5
    weight = 0.4 * torch.randn(*(() if shared else (4,)), 3, 3, 3, 3).double()
    bias = torch.randn(*weight.shape[:-3]).double()
    steps = 4 if shared else None
    centre, bound = certify.flow_radius(z, radius, weight, bias, step_size=step_size, n_steps=steps)

    def flow(start: Tensor) -> Tensor:
        return rnf.reference.euler_conv_flow(start, weight, bias, step_size=step_size, n_steps=steps)

    torch.testing.assert_close(centre, flow(z))
    for i in range(200):
        corner = torch.randn_like(z).sign() if i % 2 else torch.rand_like(z) * 2 - 1
        assert ((flow(z + corner * radius) - centre).abs() <= bound * (1 + 1e-12)).all()


@pytest.mark.parametrize("step_size", [-0.3, 0.1, 1.7])
def test_bound_of_one_step_is_reached(step_size: float) -> None:
    """In a small box a step is linear: the corner against one of its numbers reaches that number's bound."""
    z, weight = torch.randn(1, 3, 5, 6).double().requires_grad_(), 0.4 * torch.randn(1, 3, 3, 3, 3).double()
    small = torch.full_like(z, 1e-7)
    centre, bound = certify.flow_radius(z, small, weight, step_size=step_size)
    (gradient,) = torch.autograd.grad(centre[0, 1, 2, 3], z)
    moved = rnf.reference.euler_conv_flow(z + small * gradient.sign(), weight, step_size=step_size)
    change = (moved - centre)[0, 1, 2, 3].abs()
    torch.testing.assert_close(change, bound[0, 1, 2, 3], rtol=1e-5, atol=0.0)


def test_without_steps_between_pixels_the_bound_is_exact() -> None:
    """Centre taps alone: every number is by itself, and the interval's ends are reached."""
    weight = torch.zeros(2, 3, 3, 3, 3).double()
    weight[:, range(3), range(3), 1, 1] = torch.randn(2, 3).double()
    z, radius = torch.randn(1, 3, 4, 4).double(), torch.rand(1, 3, 4, 4).double() * 1e-6
    centre, bound = certify.flow_radius(z, radius, weight, step_size=0.3)
    moved = rnf.reference.euler_conv_flow(z + radius, weight, step_size=0.3)
    torch.testing.assert_close((moved - centre).abs(), bound, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("build", [rnf.models.CIFARNode, rnf.models.StagedCIFARNode])
def test_every_network_of_the_package_has_certificates(build: type[nn.Module]) -> None:
    channels = 6 if build is rnf.models.CIFARNode else (4, 6, 9)
    model = build(channels, n_steps=2, image_size=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for _ in range(3):
            model(torch.randn(16, 3, 8, 8))
    model.eval()
    x = torch.rand(6, 3, 8, 8)
    y = model(x).argmax(1)
    radius = certify.linf_radius(model, x, y)
    assert (radius > 0).all()
    assert (worst_found(model, x, y, radius, steps=10) > 0).all()
    assert (radius >= certify.lipschitz_radius(model, x, y, p="inf")).all()
    assert (certify.l2_radius(model, x, y) > 0).all()


def test_misclassified_samples_have_no_radius() -> None:
    model, x = small_network(), samples()
    wrong = (model(x).argmax(1) + 1) % 4
    assert not certify.linf_certified(model, x, wrong, 0.0).any()
    for radius in (certify.linf_radius(model, x, wrong), certify.l2_radius(model, x, wrong)):
        assert radius.dtype == torch.float64
        assert not radius.any()


def test_bisection_ends_at_the_bound() -> None:
    model, x = small_network(), samples()
    y = model(x).argmax(1)
    radius = certify.linf_radius(model, x, y, tolerance=1e-6)
    for i in range(len(x)):
        one, label = x[i : i + 1], y[i : i + 1]
        assert certify.linf_certified(model, one, label, radius[i].item() * (1 - 1e-6)).all()
        assert not certify.linf_certified(model, one, label, radius[i].item() * (1 + 1e-5)).any()


def test_worst_case_logits_train() -> None:
    model, x = small_network(), samples()
    y = model(x).argmax(1)
    torch.testing.assert_close(certify.worst_case_logits(model, x, y, 0.0), model(x))
    logits = certify.worst_case_logits(model, x, y, 0.05)
    assert torch.equal(logits.argmax(1) == y, certify.linf_certified(model, x, y, 0.05))
    F.cross_entropy(logits, y).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


class Forgetful(nn.Module):
    """Whose layers are not what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def layers(self) -> list[nn.Module]:
        return [self.body, self.head]

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.body(input).relu())


def test_bad_arguments_are_named() -> None:
    model, x = small_network(), samples()
    y = model(x).argmax(1)
    with pytest.raises(ValueError, match=r"model is in training mode, expected model.eval\(\)"):
        certify.linf_certified(small_network().train(), x, y, 0.1)
    with pytest.raises(ValueError, match=r"eps=-0\.1 is negative"):
        certify.linf_certified(model, x, y, -0.1)
    with pytest.raises(ValueError, match="eps=nan is not finite"):
        certify.linf_certified(model, x, y, float("nan"))
    with pytest.raises(ValueError, match=r"y lies in \[7, 7\], expected labels from 0 to 3"):
        certify.linf_radius(model, x, torch.full_like(y, 7))
    with pytest.raises(ValueError, match=r"y has shape \(3,\), expected \(8,\)"):
        certify.l2_radius(model, x, y[:3])
    with pytest.raises(ValueError, match="x is not finite"):
        certify.linf_certified(model, x * torch.nan, y, 0.1)
    broken = small_network()
    with torch.no_grad():
        broken.get_parameter("flow.weight")[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model's flow.weight is not finite"):
        certify.linf_certified(broken, x, y, 0.1)
    with pytest.raises(TypeError, match="no bound is known for the layer GELU"):
        certify.linf_certified(
            nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.GELU(), nn.Linear(4, 4)).eval(), x, y, 0.1
        )
    with pytest.raises(ValueError, match="does not compute what"):
        certify.linf_certified(Forgetful().eval(), torch.randn(5, 4), torch.zeros(5, dtype=torch.long), 0.1)
    with pytest.raises(TypeError, match=r"expected an nn.Sequential or a module with layers\(\)"):
        certify.linf_certified(nn.Linear(4, 2).eval(), torch.randn(5, 4), torch.zeros(5, dtype=torch.long), 0.1)


def test_empty_batch() -> None:
    model, x, y = small_network(), samples(0), torch.zeros(0, dtype=torch.long)
    assert certify.linf_certified(model, x, y, 0.1).shape == (0,)
    assert certify.linf_radius(model, x, y).shape == (0,)
