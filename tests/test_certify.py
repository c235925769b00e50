"""Contract of rnf.certify: neither attack nor random search breaks a certificate; bounds against dense operators."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import COMPILED, LAYOUTS, assert_close, assert_layout_kept, needs_kernels, random_filters, random_state
from hypothesis import given, settings
from torch import Tensor, nn

import robust_node_fast as rnf
from robust_node_fast import certify, reference
from robust_node_fast.functional import activated_conv_bound, euler_conv_flow_bound


def small_network(seed: int = 0, *, gain: float = 1.0, step_size: float = 0.1, n_steps: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = rnf.models.MNISTNode(3, n_steps, step_size, image_size=6, num_classes=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model.eval()


def samples(count: int = 8, size: int = 6) -> Tensor:
    return torch.rand(count, 1, size, size)


def worst_found(model: nn.Module, x: Tensor, y: Tensor, eps: Tensor, steps: int = 30, p: str = "inf") -> Tensor:
    """Smallest margin that projected gradients and random corners find within ``eps``, in float64.

    In the 2-norm: gradients and random directions, of that length.
    """
    model, x = rnf.certify._network.in_float64(model), x.double()
    eps = eps.view(-1, 1, 1, 1).double()

    def length(z: Tensor) -> Tensor:
        return torch.linalg.vector_norm(z, dim=(1, 2, 3), keepdim=True).clamp_min(1e-300)

    def margin(z: Tensor) -> Tensor:
        return certify._network.margins(model(z), y).amin(1)

    worst = margin(x)
    for restart in range(6):
        delta = eps * (torch.rand_like(x) * 2 - 1 if restart % 2 else torch.randn_like(x).sign())
        if p == "2":
            delta = delta * (eps / length(delta))
        for _ in range(steps):
            delta.requires_grad_()
            (gradient,) = torch.autograd.grad(margin(x + delta).sum(), delta)
            if p == "2":
                delta = delta.detach() - 0.25 * eps * gradient / length(gradient)
                delta = delta * (eps / length(delta)).clamp_max(1.0)
            else:
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
def test_no_search_breaks_a_lipschitz_radius(seed: int, gain: float, p: str) -> None:
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
    if p != "1":
        assert (worst_found(model, x, y, radius.clamp_max(1e3), steps=10, p=p)[radius > 0] > 0).all()


def test_attacks_in_l2_come_close_to_a_radius_that_is_exact() -> None:
    """Of a linear network, whose radius the Lipschitz constant gives exactly: 1% beyond it every sample falls."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval()
    x = samples()
    y = model(x).argmax(1)
    radius = certify.l2_radius(model, x, y)
    assert (worst_found(model, x, y, radius, p="2") > 0).all()
    assert (worst_found(model, x, y, 1.01 * radius, p="2") < 0).all()


def test_only_the_2_norm_needs_spectral_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the dearest part of the constants."""
    model, x = small_network(), samples()
    y = model(x).argmax(1)
    computed = []
    for name in ("convolution_norm", "matrix_norm"):
        actual = getattr(certify.spectral, name)
        monkeypatch.setattr(
            *(certify.lipschitz.spectral, name),
            lambda weight, actual=actual: computed.append(1) or actual(weight),
        )
    found = {p: certify.lipschitz_radius(model, x, y, p=p) for p in ("inf", "1")}
    assert not computed
    certify.l2_radius(model, x, y)
    assert computed
    bounds = certify.layer_bounds(model)
    assert all(bound.two <= (bound.inf * bound.one) ** 0.5 for bound in bounds)
    for p, radius in found.items():  # the constants are those of layer_bounds
        product = torch.tensor([bound.of(p) for bound in bounds]).prod()
        double = certify._network.in_float64(model)
        head = certify._network.layers_of(double)[-1].weight
        gaps = torch.linalg.vector_norm(head[:, None] - head, {"inf": 1.0, "1": torch.inf}[p], dim=2)[y]
        margins = certify._network.margins(double(x.double()), y)
        expected = torch.where(gaps > 0, margins / (gaps * product), torch.inf).amin(1)
        torch.testing.assert_close(radius, expected, rtol=1e-5, atol=1e-9)


def matrix_of(layer: nn.Module, channels: int, size: int) -> Tensor:
    """A linear layer without bias as a dense operator."""
    basis = torch.eye(channels * size**2).double().view(-1, channels, size, size)
    return layer(basis).flatten(1).T.detach()


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
def test_bounds_of_a_convolution_against_its_dense_operator(kernel: int, padding_mode: str) -> None:
    conv = nn.Conv2d(3, 5, kernel, padding=kernel // 2, padding_mode=padding_mode, bias=False).double()
    matrix = matrix_of(conv, 3, 6)
    (bound,) = certify.lipschitz._bound(conv)
    assert torch.linalg.matrix_norm(matrix, torch.inf) <= bound.inf * (1 + 1e-12)
    assert torch.linalg.matrix_norm(matrix, 1) <= bound.one * (1 + 1e-12)
    assert torch.linalg.matrix_norm(matrix, 2) <= bound.of("2") * (1 + 1e-12)
    if kernel <= 3:  # a pixel in the middle sees the whole filter
        assert torch.linalg.matrix_norm(matrix, torch.inf).item() == pytest.approx(bound.inf)
    radius = torch.rand(2, 3, 6, 6).double()
    box = certify.interval._through(conv, certify.interval.Box(torch.zeros_like(radius), radius))
    spread = box.radius.flatten(1)
    if padding_mode in ("zeros", "circular") or kernel == 1:  # else two taps of a filter can meet in one pixel
        torch.testing.assert_close(spread, radius.flatten(1) @ matrix.abs().T)
    assert (spread >= (radius.flatten(1) @ matrix.abs().T) * (1 - 1e-12)).all()


def test_no_column_sum_bounds_a_convolution_that_reflects() -> None:
    """Why their 1-norm is infinite: the sum of a filter's column is exceeded."""
    for padding_mode in ("reflect", "replicate"):
        conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode=padding_mode, bias=False).double()
        with torch.no_grad():
            conv.weight.zero_()[0, 0, 0, 0] = 1.0
        assert torch.linalg.matrix_norm(matrix_of(conv, 1, 6), 1) == 4.0
        assert certify.lipschitz._bound(conv)[0].one == torch.inf
        assert certify.lipschitz._bound(conv)[0].inf == 1.0


@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"), [(1, 1, 1), (3, 2, 1), (3, (1, 2), 1), (3, 3, 2), (3, (1, 2), 2)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_circles_that_overlap(kernel: int, padding: int | tuple[int, int], dilation: int, stride: int) -> None:
    """With more padding than the filter takes away a pixel counts more than once."""
    conv = nn.Conv2d(
        *(2, 3, kernel), stride, padding, dilation, padding_mode="circular", bias=False, dtype=torch.float64
    )
    matrix = matrix_of(conv, 2, 6)
    (bound,) = certify.lipschitz._bound(conv)
    assert torch.linalg.matrix_norm(matrix, torch.inf) <= bound.inf * (1 + 1e-12)
    assert torch.linalg.matrix_norm(matrix, 1) <= bound.one * (1 + 1e-12)
    assert (bound.one < torch.inf) == (dilation == 2 and padding == (1, 2))


class Hundredfold(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 100.0 * super().forward(input)


def test_layers_that_may_compute_something_else_are_refused() -> None:
    x, y = samples(), torch.zeros(8, dtype=torch.long)
    hooked, patched = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 3, padding=1)
    hooked.register_forward_hook(lambda module, inputs, output: 100.0 * output)
    patched.forward = lambda input: 100.0 * nn.Conv2d.forward(patched, input)  # type: ignore[method-assign]
    before = nn.Conv2d(1, 2, 3, padding=1)
    before.register_forward_pre_hook(lambda module, inputs: (100.0 * inputs[0],))
    for conv in (Hundredfold(1, 2, 3, padding=1), hooked, before, patched):
        for activation in (nn.ReLU(), rnf.nn.SmoothLeakyReLU()):
            model = nn.Sequential(conv, activation, nn.Flatten(), nn.Linear(72, 4)).eval()
            for certificate in (
                lambda model=model: certify.linf_certified(model, x, y, 0.1),
                lambda model=model: certify.linf_radius(model, x, y),
                lambda model=model: certify.l2_radius(model, x, y),
                lambda model=model: certify.layer_bounds(model),
            ):
                with pytest.raises(TypeError, match="no bound is known for"):
                    certificate()


def test_containers_that_may_compute_something_else_are_refused() -> None:
    """Where they differ is outside of what the samples show: a comparison on these would not notice."""

    class Clipped(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return torch.where(input.abs().amax((1, 2, 3))[:, None] > 3.0, -super().forward(input), 0.0)

    x, y = samples(), torch.zeros(8, dtype=torch.long)
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)]
    hooked, inner = nn.Sequential(*layers), nn.Sequential(nn.Sequential(*layers[:3]), layers[3])
    hooked.register_forward_hook(lambda module, inputs, output: -output if inputs[0].abs().max() > 3.0 else output)
    inner[0].register_forward_pre_hook(lambda module, inputs: (inputs[0].clamp(-3.0, 3.0),))
    for model in (Clipped(*layers).eval(), hooked.eval(), inner.eval()):
        for certificate in (
            lambda model=model: certify.linf_certified(model, x, y, 0.1),
            lambda model=model: certify.l2_radius(model, x, y),
        ):
            with pytest.raises(TypeError, match=r"no bound is known for|model is a Clipped"):
                certificate()


def test_a_forward_that_rounds_pixels_is_refused() -> None:
    """On images of 8 bits it equals its layers, and no perturbation within half a step shows that it does not."""

    def rounded(input: Tensor) -> Tensor:
        return (input * 255.0).round() / 255.0

    class Described(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))

        def layers(self) -> list[nn.Module]:
            return [self.body]

        def forward(self, input: Tensor) -> Tensor:
            return self.body(rounded(input))

    class Inherited(rnf.models.MNISTNode):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(rounded(input))

    class Renamed(rnf.models.MNISTNode):
        """Nothing of its own to compute."""

    for model, kind, said in (
        (Described(), ValueError, "does not compute what"),
        (Inherited(), TypeError, "Inherited has a forward of its own"),
        (nn.Sequential(Inherited()), TypeError, "Inherited has a forward of its own"),
    ):
        size = 6 if isinstance(model, Described) else 28
        x, y = torch.randint(256, (8, 1, size, size)) / 255.0, torch.zeros(8, dtype=torch.long)
        assert_close(model.eval()(rounded(x)), model(x), 1e-6)
        for certificate in (certify.linf_certified, lambda *args: certify.l2_radius(*args[:3])):
            with pytest.raises(kind, match=said):
                certificate(model, x, y, 0.1)
    images = torch.rand(2, 1, 28, 28)
    certify.linf_certified(Renamed().eval(), images, torch.zeros(2, dtype=torch.long), 0.1)


def test_a_hook_on_all_modules_is_refused() -> None:
    x, y = samples(), torch.zeros(8, dtype=torch.long)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with pytest.raises(TypeError, match="while a hook is registered for all modules"):
            certify.linf_certified(small_network(), x, y, 0.1)
    finally:
        hook.remove()
    certify.linf_certified(small_network(), x, y, 0.1)


def test_certificates_leave_the_samples_alone() -> None:
    x = samples().double() - 0.5
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)).double().eval()
    before, y = x.clone(), model(x.clone()).argmax(1)
    certify.l2_radius(model, x, y)
    certify.linf_certified(model, x, y, 0.01)
    assert torch.equal(x, before)


def test_parametrised_weights_count_as_they_are() -> None:
    x = samples()
    model = small_network()
    plain = certify.linf_radius(model, x, model(x).argmax(1))
    for name, module in model.named_children():
        if name in ("conv0", "fc1"):
            torch.nn.utils.parametrizations.weight_norm(module)
    normed = certify.linf_radius(model.eval(), x, model(x).argmax(1))
    assert plain.max() > 0
    assert_close(normed, plain, 1e-3)
    assert type(model.get_submodule("conv0")).__name__ == "ParametrizedConv2d"  # of the user's, nothing is taken away


def cancelling(kind: str) -> nn.Module:
    """``2^60 - 0.25 - 2^60 + 0.1`` for class 0, in different layers: float64 loses the 0.25, and with it the sign."""
    huge = torch.tensor([2.0**60, 1.0, -(2.0**60)])
    head = nn.Linear(2, 2)
    body: list[nn.Module] = [nn.Flatten()]
    if kind == "linear":
        layer: nn.Module = nn.Linear(3, 2)
        body += [layer]
    elif kind == "flow":  # the other layers hand on a number each
        layer = rnf.nn.EulerConvFlow(2, 1, 1.0, kernel_size=7, negative_slope=1.0)
        body = [layer, nn.Flatten()]
        head = nn.Linear(6, 2)
    else:
        strided = kind == "strided"
        layer = nn.Conv2d(1, 2, (1, 3), stride=2 if strided else 1, padding=(0, 0))
        body = [layer, *([nn.BatchNorm2d(2)] if kind == "batch norm" else []), nn.Flatten()]
    model = nn.Sequential(*body, head).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        if kind == "flow":  # the pixel in the middle: 0.3 + 2^60 - 0.9 - 2^60
            layer.weight[0, 0, 0, 3, 2:5] = torch.tensor([2.0**60, -3.0, -(2.0**60)])
            head.weight[0, 1] = 1.0
        else:
            layer.weight[0] = huge.view(layer.weight[0].shape)
            layer.bias[0] = 0.1
            head.weight.copy_(torch.eye(2))
        if kind == "batch norm":
            body[1].weight.fill_(1.0)
    return model


@pytest.mark.parametrize("kind", ["linear", "convolution", "strided", "batch norm", "flow"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_certificate_rests_on_numbers_that_cancel(kind: str, backend: str) -> None:
    """In float64 this sample is classified rightly, in exact arithmetic it is not."""
    model = cancelling(kind)
    row = torch.tensor([1.0, -0.25, 1.0], dtype=torch.float64)
    middle = torch.tensor([[1.0, 0.3, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    x = middle.view(1, 2, 1, 3) if kind == "flow" else row.view(1, 1, 1, 3)
    y = torch.zeros(1, dtype=torch.long)
    rnf.set_backend(backend)
    try:
        assert model(x).argmax(1) == 0
        assert not certify.linf_certified(model, x, y, 0.0).any()
        assert not certify.l2_radius(model, x, y).any()
        assert not certify.lipschitz_radius(model, x, y, p="inf").any()
    finally:
        rnf.set_backend("auto")


@pytest.mark.parametrize("shift", [2.0**60, -(2.0**60)])
def test_a_shift_that_cancels_is_no_certificate(shift: float) -> None:
    """``(0 - mean) scale + bias`` with a mean and a bias that are the same but for what the sum loses."""
    norm = nn.BatchNorm2d(1, eps=0.0).double()
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(1, 2).double()).eval()
    with torch.no_grad():
        norm.running_mean.fill_(shift)
        norm.bias.fill_(shift)
        model[2].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[2].bias.zero_()
    x, y = torch.full((1, 1, 1, 1), 1e-3, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    assert not certify.linf_certified(model, x, y, 0.0).any()
    assert not certify.l2_radius(model, x, y).any()


def test_errors_count_as_much_as_the_next_layers_enlarge_them() -> None:
    """The first layer loses 2^-44, 2^-55 of what it adds up; the second multiplies that by 2^42."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 1), nn.Linear(1, 1), nn.Linear(1, 2)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[1].weight.copy_(torch.tensor([[2.0**10, -(2.0**-44), -(2.0**10)]], dtype=torch.float64))
        model[2].weight.fill_(2.0**42)
        model[3].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[3].bias.copy_(torch.tensor([0.125, 0.0]))  # exactly, 0.125 - 0.25
    x, y = torch.ones(1, 1, 1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    assert model(x).argmax(1) == 0
    assert not certify.linf_certified(model, x, y, 0.0).any()
    for p in ("inf", "1", "2"):
        assert not certify.lipschitz_radius(model, x, y, p=p).any()


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 2),
    padding_mode=st.sampled_from(("zeros", "circular")),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40)
def test_spectral_norm_of_a_convolution_against_its_dense_operator(
    shape: tuple[int, int, int, int], stride: int, padding_mode: str, seed: int
) -> None:
    torch.manual_seed(seed)
    out, into, *kernel = shape
    padding = tuple((k - 1) // 2 for k in kernel)
    conv = nn.Conv2d(into, out, kernel, stride, padding, bias=False, padding_mode=padding_mode, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix_of(conv, into, 9), 2).item()
    bound = certify.spectral.convolution_norm(conv.weight).item()
    assert exact <= bound
    if stride == 1 and padding_mode == "circular" and kernel == [3, 3]:
        assert bound <= 1.15 * exact  # of all frequencies, a ninth is in the picture


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.sampled_from((1e-150, 1.0, 1e150)))
@settings(max_examples=30)
def test_spectral_norm_of_a_matrix(rows: int, columns: int, scale: float) -> None:
    matrix = scale * torch.randn(rows, columns, dtype=torch.float64)
    exact, bound = torch.linalg.matrix_norm(matrix, 2).item(), certify.spectral.matrix_norm(matrix).item()
    assert exact <= bound <= 1.02 * exact
    assert certify.spectral.matrix_norm(torch.zeros(rows, columns)) == 0.0


def test_what_is_not_finite_has_no_small_norm() -> None:
    matrix = torch.eye(3)
    matrix[0, 0] = torch.nan
    assert certify.spectral.matrix_norm(matrix).isnan()


@pytest.mark.parametrize("step_size", [-0.4, 0.1, 0.9])
@pytest.mark.parametrize("negative_slope", [-0.2, 0.1, 1.5])
def test_spectral_norm_of_an_euler_step(step_size: float, negative_slope: float) -> None:
    """Against the Jacobian with slopes drawn between the two that the activation has, and at its ends."""
    flow = rnf.nn.EulerConvFlow(3, 2, step_size, negative_slope=negative_slope).double()
    low, high = sorted((negative_slope, 1.0))
    bounds = certify.lipschitz._euler_norm(flow.weight, step_size, (low, high))
    for weight, bound in zip(flow.weight, bounds.tolist(), strict=True):
        conv = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
        conv.weight.data.copy_(weight)
        matrix = matrix_of(conv, 3, 6)
        for _ in range(20):
            share = torch.rand(len(matrix), 1).double()
            slopes = low + (high - low) * (share if torch.rand(()) < 0.5 else share.round())
            step = torch.eye(len(matrix)).double() + step_size * slopes * matrix
            assert torch.linalg.matrix_norm(step, 2) <= bound


def test_the_finest_search_ends() -> None:
    model, x = small_network(), samples(2)
    y = model(x).argmax(1)
    assert_close(certify.linf_radius(model, x, y, tolerance=1e-18), certify.linf_radius(model, x, y), 1e-3)


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.BatchNorm2d(3).eval(),
        rnf.nn.PadChannels(7),
        nn.Dropout(0.5).eval(),
        nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=1),
        rnf.nn.SmoothLeakyReLU(),
        rnf.nn.SmoothLeakyReLU(-0.4),
        rnf.nn.SmoothLeakyReLU(1.6),
        nn.ReLU(),
    ],
    ids=str,
)
def test_no_sample_leaves_the_box_of_a_layer(layer: nn.Module) -> None:
    layer = layer.double()
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_mean, layer.running_var = torch.randn(3).double(), torch.rand(3).double() + 0.1
        nn.init.normal_(layer.weight)
    z, radius = torch.randn(2, 3, 6, 6).double(), torch.rand(2, 3, 6, 6).double()
    with torch.no_grad():
        box = certify.interval._through(layer, certify.interval.Box(z, radius))
        if isinstance(layer, nn.ReLU | rnf.nn.SmoothLeakyReLU) and getattr(layer, "negative_slope", 0.0) >= 0.0:
            torch.testing.assert_close(box.centre + box.radius, layer(z + radius))
            torch.testing.assert_close(box.centre - box.radius, layer(z - radius))
        else:
            torch.testing.assert_close(box.centre, layer(z))
        for i in range(100):
            corner = torch.randn_like(z).sign() if i % 2 else torch.rand_like(z) * 2 - 1
            assert ((layer(z + corner * radius) - box.centre).abs() <= box.radius + 1e-12).all()


def test_input_normalisation_counts() -> None:
    """As a BatchNorm2d in front: the same certificates as for the network on inputs that are scaled."""
    model, x = small_network(), samples()
    normalise = nn.BatchNorm2d(1, affine=False, eps=0.0)
    normalise.running_mean, normalise.running_var = torch.full((1,), 0.3), torch.full((1,), 0.25)
    whole = nn.Sequential(normalise, model).eval()
    y = whole(x).argmax(1)
    inner = (x - 0.3) / 0.5
    torch.testing.assert_close(
        certify.linf_radius(whole, x, y, tolerance=1e-6),
        0.5 * certify.linf_radius(model, inner, y, tolerance=1e-6),
        rtol=1e-4,
        atol=0.0,
    )
    torch.testing.assert_close(
        certify.l2_radius(whole, x, y), 0.5 * certify.l2_radius(model, inner, y), rtol=1e-4, atol=0
    )


def test_layers_without_a_bound_say_so() -> None:
    x, y = torch.rand(4, 3, 6, 6), torch.zeros(4, dtype=torch.long)

    def network(*layers: nn.Module) -> nn.Module:
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(layers[0](x).flatten(1).shape[1], 4))
        return model.eval()

    with pytest.raises(ValueError, match="uses the statistics of its batch"):
        certify.linf_certified(network(nn.BatchNorm2d(3, track_running_stats=False)), x, y, 0.1)
    with pytest.raises(ValueError, match="uses the statistics of its batch"):
        certify.l2_radius(network(nn.BatchNorm2d(3, track_running_stats=False)), x, y)
    with pytest.raises(ValueError, match="overlaps, pads or has its own divisor"):
        certify.l2_radius(network(nn.AvgPool2d(4, ceil_mode=True)), x, y)
    with pytest.raises(ValueError, match="negative divisor"):
        certify.linf_certified(network(nn.AvgPool2d(2, divisor_override=-3)), x, y, 0.1)
    partly = network(nn.Dropout(0.5))
    partly[0].train()
    with pytest.raises(ValueError, match="in training mode"):
        certify.linf_certified(partly, x, y, 0.1)


@pytest.mark.parametrize("step_size", [-0.3, 0.1, 0.7])
@pytest.mark.parametrize("shared", [False, True])
def test_bound_of_a_flow_contains_what_is_sampled(step_size: float, shared: bool) -> None:
    z, radius = torch.randn(2, 3, 5, 6).double(), torch.rand(2, 3, 5, 6).double() * 0.5
    weight = 0.4 * torch.randn(*(() if shared else (4,)), 3, 3, 3, 3).double()
    bias = torch.randn(*weight.shape[:-3]).double()
    steps = 4 if shared else None
    centre, bound = euler_conv_flow_bound(z, radius, weight, bias, step_size=step_size, n_steps=steps)

    def flow(start: Tensor) -> Tensor:
        return rnf.reference.euler_conv_flow(start, weight, bias, step_size=step_size, n_steps=steps)

    start, nothing = euler_conv_flow_bound(z, torch.zeros_like(z), weight, bias, step_size=step_size, n_steps=steps)
    torch.testing.assert_close(start, flow(z))
    assert (nothing <= 1e-9 * (1 + start.abs().amax())).all()
    for i in range(200):
        corner = torch.randn_like(z).sign() if i % 2 else torch.rand_like(z) * 2 - 1
        assert ((flow(z + corner * radius) - centre).abs() <= bound * (1 + 1e-12)).all()


@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7), st.integers(1, 21)),
    kernel=st.sampled_from((1, 3, 5)),
    steps=st.integers(1, 4),
    shared=st.booleans(),
    bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    step_size=st.sampled_from((-0.4, 0.01, 0.1, 0.7, 2.0)),
    negative_slope=st.sampled_from((-0.3, 0.0, 0.1, 0.5, 1.0, 1.7)),
    gain=st.sampled_from((0.1, 1.0, 5.0)),
    size=st.sampled_from((0.0, 1e-3, 0.1, 3.0)),
)
@settings(max_examples=150)
def test_float32_never_claims_more_than_float64(
    seed: int,
    shape: tuple[int, int, int, int],
    kernel: int,
    steps: int,
    shared: bool,
    bias: bool,
    layout: str,
    step_size: float,
    negative_slope: float,
    gain: float,
    size: float,
) -> None:
    torch.manual_seed(seed)
    z, radius = random_state(shape, layout), size * random_state(shape, "contiguous").abs()
    weight, b = random_filters(shape[1], kernel, None if shared else steps, bias)
    weight = gain * weight
    options = {"step_size": step_size, "negative_slope": negative_slope, "n_steps": steps if shared else None}
    centre, bound = euler_conv_flow_bound(z, radius, weight, b, **options)
    assert_layout_kept(centre, z)
    assert_layout_kept(bound, z)
    double = [None if t is None else t.double() for t in (z, radius, weight, b)]
    exact, exact_bound = reference.bound_e(*double, step_size, negative_slope, steps)
    wide, wide_bound = euler_conv_flow_bound(*double, **options)
    if steps == 1:  # of several, each has its own tangents
        assert ((centre - exact).abs() + exact_bound <= bound.double()).all()
    # What rounding costs: less than a ten-thousandth of the states more in the beginning, which a contractive flow
    # makes small again, and a tenth of that, of the largest state on the way, in the end.
    states = reference.euler_conv_flow(*double[:1], *double[2:], **options, return_trajectory=True)
    scale = max(exact.abs().amax().item(), states.abs().amax().item())
    _, loose = reference.bound_e(double[0], double[1] + 1e-4 * scale, *double[2:], step_size, negative_slope, steps)
    widest = loose.amax().item()
    assert bound.amax() <= widest * (1 + 1e-2) + 1e-5 * scale
    assert (wide_bound - exact_bound).amax() <= 1e-7 * widest + 1e-12 * scale
    assert (wide - exact).abs().amax() <= 1e-9 * (scale + widest)
    if COMPILED and steps == 1:  # the reference leaves out its own rounding
        assert ((wide - exact).abs() + exact_bound <= wide_bound * (1 + 1e-14)).all()
    for corner in (torch.zeros(shape).double(), *(torch.randn(shape).sign().double() for _ in range(4))):
        moved = reference.euler_conv_flow(double[0] + corner * double[1], double[2], double[3], **options)
        assert ((moved - centre).abs() <= bound).all()


@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 21)),
    outputs=st.integers(1, 11),
    kernel=st.sampled_from((1, 3, 5)),
    bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    negative_slope=st.sampled_from((-1.3, 0.0, 0.1, 1.0, 1.7)),
    gain=st.sampled_from((0.1, 1.0, 9.0)),
    size=st.sampled_from((0.0, 1e-3, 0.1, 3.0)),
)
@settings(max_examples=100)
def test_first_layer_in_float32_never_claims_more_than_in_float64(
    seed: int,
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: int,
    bias: bool,
    layout: str,
    negative_slope: float,
    gain: float,
    size: float,
) -> None:
    torch.manual_seed(seed)
    x, radius = random_state(shape, layout), size * random_state(shape).abs()
    weight, b = gain * torch.randn(outputs, shape[1], kernel, kernel), torch.randn(outputs) if bias else None
    centre, bound = activated_conv_bound(x, radius, weight, b, negative_slope=negative_slope)
    double = [None if t is None else t.double() for t in (x, radius, weight, b)]
    exact, exact_bound = reference.bound_of_activated_conv(*double, negative_slope)
    wide, wide_bound = activated_conv_bound(*double, negative_slope=negative_slope)
    assert centre.shape == bound.shape == exact.shape
    assert (bound >= exact_bound).all()
    assert ((centre - exact).abs() + exact_bound <= bound.double()).all()
    if not len(x):
        return
    scale = exact_bound.amax() + F.conv2d(double[0].abs(), double[2].abs(), double[3], padding=kernel // 2).abs().amax()
    assert (bound - exact_bound).amax() <= 1e-4 * (scale + 1)
    assert (wide_bound - exact_bound).abs().amax() <= 1e-12 * (scale + 1)
    assert (wide - exact).abs().amax() <= 1e-12 * (scale + 1)
    for _ in range(4):
        moved = double[0] + torch.randn(shape).sign().double() * double[1]
        changed = reference.smooth_leaky_relu(
            F.conv2d(moved, double[2], double[3], padding=kernel // 2), negative_slope
        )
        assert ((changed - centre).abs() <= bound).all()


def test_float32_and_float64_agree_on_the_mnist_network() -> None:
    model = rnf.models.MNISTNode().eval()
    x = torch.rand(20, 1, 28, 28)
    flow, start = model.flow, model.activation(model.conv0(x)).detach()
    radius = torch.full_like(start, 0.1)
    _, bound = model_bound(flow, start, radius)
    _, exact = model_bound(flow.double(), start.double(), radius.double())
    assert (bound >= exact).all()
    assert (bound <= exact * (1 + 1e-4)).all()


def model_bound(flow: rnf.nn.EulerConvFlow, z: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return euler_conv_flow_bound(z, radius, flow.weight, flow.bias, step_size=flow.step_size)


@pytest.mark.parametrize("negative_slope", [0.0, 0.1, 0.5, 1.0, 1.9])
@pytest.mark.parametrize("step_size", [0.01, 1.0])
def test_rounding_of_the_activation_is_covered_everywhere(negative_slope: float, step_size: float) -> None:
    """A flow that is the activation alone: without radius the bound is what rounding is said to be."""
    z = torch.cat([torch.linspace(-120, 120, 400_001), torch.linspace(-2, 2, 100_001), torch.randn(99) * 1e30])
    z = z.view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, 1)
    options = {"step_size": step_size, "negative_slope": negative_slope}
    for radius in (torch.zeros_like(z), torch.rand_like(z), 30 * torch.rand_like(z)):
        centre, bound = euler_conv_flow_bound(z, radius, one, **options)
        exact, exact_bound = reference.bound_e(
            z.double(), radius.double(), one.double(), None, step_size, negative_slope, 1
        )
        assert ((centre - exact).abs() <= bound).all()
        assert (bound >= exact_bound).all()
        assert (bound <= (1 + 1e-4) * exact_bound + 1e-5 * (1 + z.abs())).all()


@needs_kernels
@pytest.mark.parametrize("fault", ["slope", "gamma"])
def test_a_bound_that_forgets_its_rounding_is_noticed(fault: str) -> None:
    """That the tests above can fail: the formula in float32, which rounds to nearest, claims too much somewhere."""
    z, radius = torch.randn(4, 8, 9, 9), torch.zeros(4, 8, 9, 9) if fault == "gamma" else torch.rand(4, 8, 9, 9)
    weight, bias = random_filters(8, 3, 3, bias=True)
    _, bound = reference.bound_e(z, radius, weight, bias, 0.5, 0.1, 3)
    exact, exact_bound = reference.bound_e(z.double(), radius.double(), weight.double(), bias.double(), 0.5, 0.1, 3)
    centre = reference.euler_conv_flow(z, weight, bias, step_size=0.5)
    assert not ((centre - exact).abs() <= bound).all() or not (bound >= exact_bound).all()


def test_gradients_of_the_bound() -> None:
    z, radius = torch.randn(2, 3, 4, 5).double(), torch.rand(2, 3, 4, 5).double()
    weight, bias = random_filters(3, 3, 2, bias=True, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (z, radius, weight, bias)]
    assert torch.autograd.gradcheck(lambda *tensors: euler_conv_flow_bound(*tensors, step_size=0.3), leaves)
    x, first = torch.randn(2, 2, 4, 5).double(), torch.randn(3, 2, 3, 3).double()
    leaves = [t.requires_grad_() for t in (x, torch.rand_like(x), first, torch.randn(3).double())]
    assert torch.autograd.gradcheck(activated_conv_bound, leaves)


def test_bad_arguments_of_the_bound() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(3, 4, 3, 3\), expected \(D, 2, k, k\)"):
        activated_conv_bound(torch.ones(1, 2, 5, 5), torch.ones(1, 2, 5, 5), torch.ones(3, 4, 3, 3))
    with pytest.raises(ValueError, match=r"bias has shape \(2,\), expected \(3,\)"):
        activated_conv_bound(torch.ones(1, 2, 5, 5), torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3), torch.ones(2))
    with pytest.raises(ValueError, match="input has shape"):
        activated_conv_bound(torch.ones(2, 5, 5), torch.ones(2, 5, 5), torch.ones(3, 2, 3, 3))
    z, (weight, bias) = torch.randn(2, 3, 4, 4), random_filters(3, 3, 2, bias=True)
    with pytest.raises(ValueError, match="radius has negative numbers"):
        euler_conv_flow_bound(z, -torch.ones_like(z), weight, bias, step_size=0.1)
    with pytest.raises(ValueError, match=r"radius has shape \(2, 3, 4\), expected \(2, 3, 4, 4\)"):
        euler_conv_flow_bound(z, torch.ones(2, 3, 4), weight, bias, step_size=0.1)
    with pytest.raises(TypeError, match=r"radius has dtype torch.float64"):
        euler_conv_flow_bound(z, torch.ones_like(z).double(), weight, bias, step_size=0.1)
    with pytest.raises(TypeError, match=r"input has dtype torch.bfloat16, expected float32 or float64"):
        euler_conv_flow_bound(z.bfloat16(), z.bfloat16(), weight.bfloat16(), step_size=0.1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_certifies_nothing(value: float) -> None:
    z, radius, (weight, bias) = torch.randn(1, 3, 5, 5), torch.rand(1, 3, 5, 5), random_filters(3, 3, 1, bias=True)
    z[0, 1, 2, 2] = value
    _, bound = euler_conv_flow_bound(z, radius, weight, bias, step_size=0.1)
    assert not (bound[:, :, 1:4, 1:4] < 1e30).any()
    assert bound[:, :, :1].isfinite().all()  # and does not leak


@pytest.mark.parametrize("step_size", [-0.3, 0.1, 1.7])
def test_bound_of_one_step_is_reached(step_size: float) -> None:
    """In a small box a step is linear: the corner against one of its numbers reaches that number's bound."""
    z, weight = torch.randn(1, 3, 5, 6).double().requires_grad_(), 0.4 * torch.randn(1, 3, 3, 3, 3).double()
    small = torch.full_like(z, 1e-7)
    centre, bound = euler_conv_flow_bound(z, small, weight, step_size=step_size)
    (gradient,) = torch.autograd.grad(centre[0, 1, 2, 3], z)
    moved = rnf.reference.euler_conv_flow(z + small * gradient.sign(), weight, step_size=step_size)
    change = (moved - centre)[0, 1, 2, 3].abs()
    torch.testing.assert_close(change, bound[0, 1, 2, 3], rtol=1e-5, atol=0.0)


def test_without_steps_between_pixels_the_bound_is_exact() -> None:
    """Centre taps alone: every number is by itself, and the interval's ends are reached."""
    weight = torch.zeros(2, 3, 3, 3, 3).double()
    weight[:, range(3), range(3), 1, 1] = torch.randn(2, 3).double()
    z, radius = torch.randn(1, 3, 4, 4).double(), torch.rand(1, 3, 4, 4).double() * 1e-6
    centre, bound = euler_conv_flow_bound(z, radius, weight, step_size=0.3)
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


def test_worst_case_logits_are_those_of_the_certificate() -> None:
    model, x = small_network(), samples()
    y = model(x).argmax(1)
    torch.testing.assert_close(certify.worst_case_logits(model, x, y, 0.0), model(x), atol=1e-4, rtol=1e-4)
    for eps in (0.01, 0.05, 0.2):
        logits = certify.worst_case_logits(model, x, y, eps)
        assert torch.equal(logits.argmax(1) == y, certify.linf_certified(model, x, y, eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_makes_no_radius_negative(dtype: torch.dtype) -> None:
    """Computed, s(z + R) can be below s(z) where R is below the rounding error of s."""
    z = torch.empty(1, 1, 100, 1000, dtype=dtype).uniform_(-30, 30)
    box = certify.interval.Box(z, (1e-3 * torch.finfo(dtype).eps * z.abs()).clamp(min=torch.finfo(dtype).tiny))
    near = certify.interval.Box(z, (torch.nextafter(z, z + 1) - z) * torch.randint(1, 3, z.shape))
    activation = rnf.nn.SmoothLeakyReLU()
    assert (activation(z + near.radius) < activation(z)).any()  # that it happens
    for tried in (box, near):
        assert (certify.interval._through(activation, tried).radius >= 0).all()


def test_gradients_of_worst_case_logits() -> None:
    model, x = small_network().double(), samples(3).double()
    y = torch.tensor([0, 3, 1])
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*tensors: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(model, dict(zip(names, tensors, strict=True))):
            return F.cross_entropy(certify.worst_case_logits(model, x, y, 0.05), y)

    assert torch.autograd.gradcheck(loss, parameters)


def test_dropout_drops_the_same_numbers_of_a_box() -> None:
    z, radius = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    box = certify.interval._through(nn.Dropout(0.5).train(), certify.interval.Box(z, radius))
    assert torch.equal(box.centre, box.radius)
    assert set(box.radius.unique().tolist()) == {0.0, 2.0}


def test_certified_training_raises_certified_accuracy() -> None:
    dataset = rnf.data.load("digits")
    x, y = dataset.train_images[:512], dataset.train_labels[:512]
    test_x, test_y = dataset.test_images[:200], dataset.test_labels[:200]
    eps, found = 0.05, {}
    for certified in (False, True):
        torch.manual_seed(0)
        model = rnf.models.MNISTNode(4, 2, 0.1, image_size=8)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for step in range(60):
            batch = torch.randint(len(x), (64,))
            if certified:
                logits = certify.worst_case_logits(model, x[batch], y[batch], eps * min(1.0, step / 30))
            else:
                logits = model(x[batch])
            optimizer.zero_grad()
            F.cross_entropy(logits, y[batch]).backward()
            optimizer.step()
        found[certified] = certify.linf_certified(model.eval(), test_x, test_y, eps).double().mean().item()
    assert found[True] > found[False] + 0.2
    assert found[True] > 0.4


def test_float32_is_used_where_it_is_exact_and_never_certifies_more() -> None:
    """A model in float64 with other weights takes the float64 kernels; the radii agree, from below."""
    model, x = small_network(), samples(16)
    y = model(x).argmax(1)
    narrow = certify.interval._deployed(model, x)
    assert [type(layer).__name__ for layer in narrow] == ["ActivatedConv", "EulerConvFlow", "Flatten", "Linear"]
    assert [layer.weight.dtype for layer in (narrow[0], narrow[1])] == [torch.float32] * 2
    double = small_network().double()
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.mul_(1 + 1e-12)  # no float32 numbers any more
    wide = certify.interval._deployed(double, x)
    assert [layer.weight.dtype for layer in (wide[0], wide[1])] == [torch.float64] * 2
    least, most = (certify.linf_radius(m, x, y, tolerance=1e-7) for m in (model, double))
    assert (least <= most * (1 + 1e-6)).all()
    assert (least >= most * (1 - 2e-4)).all()


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
    with pytest.raises(ValueError, match=r"y has shape \(3,\), x \(8, 1, 6, 6\)"):
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
        certify.l2_radius(Forgetful().eval(), torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="does not compute what"):
        certify.linf_certified(Forgetful().eval(), torch.randn(5, 4), torch.zeros(5, dtype=torch.long), 0.1)
    with pytest.raises(TypeError, match=r"expected an nn.Sequential or a module with layers\(\)"):
        certify.linf_certified(nn.Linear(4, 2).eval(), torch.randn(5, 4), torch.zeros(5, dtype=torch.long), 0.1)


def test_empty_batch() -> None:
    model, x, y = small_network(), samples(0), torch.zeros(0, dtype=torch.long)
    assert certify.linf_certified(model, x, y, 0.1).shape == (0,)
    assert certify.linf_radius(model, x, y).shape == (0,)


@pytest.mark.parametrize("negative_slope", [-0.5, 0.0])
def test_activations_that_fall_have_all_certificates(negative_slope: float) -> None:
    flow = rnf.nn.EulerConvFlow(2, 2, 0.1, negative_slope=negative_slope)
    conv, activation = nn.Conv2d(1, 2, 3, padding=1), rnf.nn.SmoothLeakyReLU(negative_slope)
    model = nn.Sequential(conv, activation, flow, nn.Flatten(), nn.Linear(72, 4)).eval()
    x = samples()
    y = model(x).argmax(1)
    radius = certify.linf_radius(model, x, y)
    assert (radius > 0).all()
    assert (worst_found(model, x, y, radius, steps=10) > 0).all()
    assert (certify.l2_radius(model, x, y) > 0).all()


def test_in_l2_the_better_of_both_bounds_counts() -> None:
    """Bound E's radius holds in l_2, as no perturbation is larger in l_inf than in l_2; neither bound always wins."""
    for gain, steps in ((0.2, 1), (1.0, 3)):
        model, x = small_network(gain=gain, n_steps=steps), samples(32)
        y = model(x).argmax(1)
        by_constants, by_box = certify.l2_radius(model, x, y), certify.linf_radius(model, x, y)
        better = torch.maximum(by_constants, by_box)
        eps = float(better.median())
        found = certify.summarise(model, x, y, eps=(eps,), norm="l2")
        assert found.radius_mean == pytest.approx(float(better.mean()))
        assert found.certified[eps] >= 0.5
        assert found.radius_mean > max(float(by_constants.mean()), float(by_box.mean())) - 1e-9
        assert (worst_found(model, x, y, better, p="2") > 0).all()
