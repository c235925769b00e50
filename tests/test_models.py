"""Contract of modules and models: the authors' networks, their state dicts in both directions, the penalty."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchdiffeq
from helpers import NORMS, assert_close, assert_finite
from torch import Tensor, nn

import robust_node_fast as rnf

SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "MNISTNode": ({"channels": 4, "n_steps": 3, "step_size": 0.1, "image_size": 9}, (2, 1, 9, 9)),
    "CIFARNode": ({"channels": 6, "n_steps": 2, "image_size": 8}, (3, 3, 8, 8)),
    "StagedCIFARNode": ({"channels": (4, 7, 9), "n_steps": 2, "image_size": 12}, (3, 3, 12, 12)),
    "StridedNode": ({"channels": (4, 7), "n_steps": 2, "hidden_features": 6, "image_size": 9}, (2, 1, 9, 9)),
}


def pair(name: str) -> tuple[Any, Any, Tensor]:
    """The fused model and the reference with the same random weights, in float64, and a batch."""
    options, shape = SMALL[name]
    oracle = getattr(rnf.reference, name)(**options).double().eval()
    with torch.no_grad():
        for parameter in oracle.parameters():  # the staged network starts from zero filters
            parameter.copy_(0.3 * torch.randn_like(parameter))
        for buffer in oracle.buffers():
            if buffer.is_floating_point():
                buffer.copy_(0.5 + torch.rand_like(buffer))
    model = getattr(rnf.models, name)(**options).double().eval()
    model.load_reference_state_dict(oracle.state_dict())
    return model, oracle, torch.rand(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", SMALL)
def test_forward_and_gradients_equal_the_reference(name: str) -> None:
    model, oracle, images = pair(name)
    results = []
    for network in (model, oracle):
        x = images.clone().requires_grad_()
        logits = network(x)
        logits.square().sum().backward()
        results.append((logits.detach(), x.grad))
    for mine, exact in zip(*results, strict=True):
        assert_close(mine, exact, 1e-11)
    # The gradients in the reference's layout: the fused model's parameters replaced by their gradients.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    found = model.reference_state_dict()
    for key, parameter in oracle.named_parameters():
        assert parameter.grad.abs().max() > 0
        assert_close(found[key], parameter.grad, 1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_training_mode_equals_the_reference(name: str) -> None:
    """Same dropout masks from the same seed; batch norm updates the same statistics."""
    model, oracle, images = pair(name)
    logits = []
    for network in (model.train(), oracle.train()):
        torch.manual_seed(3)
        logits.append(network(images).detach())
    assert_close(*logits, 1e-11)
    found = model.reference_state_dict()
    for key, value in oracle.state_dict().items():
        assert_close(found[key].double(), value.double(), 1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_state_dicts_make_the_round_trip(name: str) -> None:
    model, oracle, _ = pair(name)
    exported = model.reference_state_dict()
    assert set(exported) == set(oracle.state_dict())
    for key, value in oracle.state_dict().items():
        assert torch.equal(exported[key], value)
    oracle.load_state_dict(exported)
    other = getattr(rnf.models, name)(**SMALL[name][0]).double()
    other.load_reference_state_dict(exported)
    own = model.state_dict()
    assert list(other.state_dict()) == list(own)
    for key, value in other.state_dict().items():
        assert torch.equal(value, own[key])
    third = getattr(rnf.models, name)(**SMALL[name][0]).double()
    third.load_state_dict(own)
    for key, value in third.state_dict().items():
        assert torch.equal(value, own[key])


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("MNISTNode", "conv1", "conv10"), ("CIFARNode", "conv.0", "conv.15"), ("StagedCIFARNode", "conv.0", "conv.17")],
)
def test_documented_keys_of_the_full_size_models(name: str, first: str, last: str) -> None:
    with torch.device("meta"):
        model = getattr(rnf.models, name)()
        keys = model.reference_state_dict()
        oracle = getattr(rnf.reference, name)().state_dict()
    assert {k: v.shape for k, v in keys.items()} == {k: v.shape for k, v in oracle.items()}
    for prefix in ("conv0", first, last, "fc1"):
        assert {f"{prefix}.weight", f"{prefix}.bias"} <= set(keys)
    shape = {"MNISTNode": (10, 6272), "CIFARNode": (10, 131072), "StagedCIFARNode": (10, 7168)}[name]
    assert keys["fc1.weight"].shape == shape


def test_documented_parameters_of_the_flow() -> None:
    stacked = rnf.nn.EulerConvFlow(5, 4, 0.1, kernel_size=5)
    assert {k: tuple(v.shape) for k, v in stacked.state_dict().items()} == {"weight": (4, 5, 5, 5, 5), "bias": (4, 5)}
    shared = rnf.nn.EulerConvFlow(5, 4, 0.1, shared_weights=True, bias=False)
    assert {k: tuple(v.shape) for k, v in shared.state_dict().items()} == {"weight": (5, 5, 3, 3)}
    assert shared.bias is None
    half = rnf.nn.EulerConvFlow(5, 4, 0.1, dtype=torch.bfloat16, device="meta")
    assert half.weight.dtype == torch.bfloat16
    assert half.weight.device.type == "meta"


def test_wrong_state_dicts_are_named_and_nothing_is_loaded() -> None:
    model, oracle, _ = pair("MNISTNode")
    before = copy.deepcopy(model.state_dict())
    good = {key: torch.randn_like(value) for key, value in oracle.state_dict().items()}

    def without(key: str) -> dict[str, Tensor]:
        return {k: v for k, v in good.items() if k != key}

    cases = [
        (without("conv2.bias"), ["state_dict", "missing", "conv2.bias"]),
        ({**good, "conv9.weight": good["conv1.weight"]}, ["state_dict", "unexpected", "conv9.weight"]),
        ({**without("fc1.bias"), "fc2.bias": good["fc1.bias"]}, ["missing", "fc1.bias", "unexpected", "fc2.bias"]),
        ({**good, "conv1.weight": torch.zeros(4, 4, 5, 5)}, ["conv1.weight", "(4, 4, 5, 5)", "expected (4, 4, 3, 3)"]),
        ({**good, "fc1.weight": torch.zeros(2, 2)}, ["fc1.weight", "(2, 2)", "expected (10, 324)"]),
    ]
    for state_dict, says in cases:
        with pytest.raises(ValueError, match="state_dict") as raised:
            model.load_reference_state_dict(state_dict)
        for part in says:
            assert part in str(raised.value)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_from_convs(bias: bool, kernel: int) -> None:
    convs = [nn.Conv2d(4, 4, kernel, padding="same", bias=bias).double() for _ in range(3)]
    flow = rnf.nn.EulerConvFlow.from_convs(convs, 0.2, negative_slope=0.3)
    assert flow.weight.requires_grad
    assert flow.weight.is_leaf
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    z = x
    for conv in convs:
        z = z + 0.2 * rnf.reference.smooth_leaky_relu(conv(z), 0.3)
    assert_close(flow(x), z, 1e-13)
    with torch.no_grad():
        flow.weight.zero_()
    assert all(conv.weight.abs().max() > 0 for conv in convs)  # copied, not shared


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_contractive_init_meets_the_condition_with_equality(norm: str, shared: bool, kernel: int) -> None:
    flow = rnf.nn.EulerConvFlow(6, 3, 0.1, kernel_size=kernel, shared_weights=shared)
    assert flow.bias is not None
    bias = flow.bias.detach().clone()
    assert rnf.nn.contractive_init_(flow, 2.0, norm) is flow
    assert torch.equal(flow.bias, bias)
    rates = flow.contraction_rate(norm=norm)
    assert rates.shape == ((1,) if shared else (3,))
    assert_close(rates, torch.full_like(rates, 2.0), 1e-6)
    assert flow.contraction_penalty(rate=2.0, norm=norm).item() == 0.0
    assert flow.contraction_penalty(rate=2.0 + 1e-4, norm=norm).item() > 0.0


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_authors_init_is_a_diagonal_in_every_filter(shared: bool, kernel: int) -> None:
    flow = rnf.nn.EulerConvFlow(6, 3, 0.1, kernel_size=kernel, shared_weights=shared)
    assert flow.bias is not None
    bias = flow.bias.detach().clone()
    assert rnf.nn.authors_init_(flow) is flow
    assert torch.equal(flow.bias, bias)
    assert torch.equal(flow.weight, -5.0 * torch.eye(kernel).expand(flow.weight.shape))
    row = 6 * kernel * 5.0 - 5.0  # the sum of a row, and of a column, without its centre
    by_hand = (1 if shared else 3) * 6 * (2.0 - 2 * 0.1 * 5.0 + 2 * row)
    assert flow.contraction_penalty(rate=2.0).item() == pytest.approx(by_hand, rel=1e-6)
    with pytest.raises(TypeError, match="flow is a Conv2d, expected an EulerConvFlow"):
        rnf.nn.authors_init_(torch.nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_steps", "step_size"), [(10, 0.01), (16, 0.1), (7, 1 / 3)])
def test_vector_field_under_torchdiffeq_gives_the_same_states(
    shared: bool, dtype: torch.dtype, n_steps: int, step_size: float
) -> None:
    flow = rnf.nn.EulerConvFlow(3, n_steps, step_size, shared_weights=shared, dtype=dtype)
    z0 = torch.randn(2, 3, 5, 4, dtype=dtype)
    times = step_size * torch.arange(n_steps + 1, dtype=dtype)
    with torch.no_grad():
        solution = torchdiffeq.odeint(flow.vector_field, z0, times, method="euler")
        assert_close(solution, flow(z0, return_trajectory=True), 1e-5 if dtype == torch.float32 else 1e-13)
        # Outside of the interval the first and the last filters are held.
        assert torch.equal(flow.vector_field(-1.0, z0), flow.vector_field(0.0, z0))
        assert torch.equal(flow.vector_field(99.0, z0), flow.vector_field((n_steps - 1) * step_size, z0))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SMALL)
def test_penalty_of_a_model_is_the_sum_by_hand(name: str, norm: str) -> None:
    model, oracle, _ = pair(name)
    others = ("conv0", "downs.")
    convs = [m for key, m in oracle.named_modules() if isinstance(m, nn.Conv2d) and not key.startswith(others)]
    channels = torch.cat(
        [rnf.reference.contraction_penalty(c.weight, rate=9.0, norm=norm, reduction="none") for c in convs]
    )
    for reduction, expected in (("sum", channels.sum()), ("mean", channels.mean()), ("none", channels)):
        found = model.contraction_penalty(rate=9.0, norm=norm, reduction=reduction)
        assert_close(found, expected, 1e-12)
    with pytest.raises(ValueError, match="reduction='summ' is unknown"):
        model.contraction_penalty(rate=9.0, norm=norm, reduction="summ")
    rates = torch.stack([rnf.reference.contraction_rate(c.weight, norm=norm) for c in convs])
    assert_close(model.contraction_rate(norm=norm), rates, 1e-12)
    # Its gradient reaches every Euler step and nothing else.
    model.contraction_penalty(rate=9.0, norm=norm).backward()
    channels.sum().backward()
    flows = {id(flow.weight) for _, flow in model.flows()}
    for parameter in model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in flows)
    weights = torch.cat([flow.weight.grad.flatten() for _, flow in model.flows()])
    assert_close(weights, torch.cat([c.weight.grad.flatten() for c in convs]), 1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_pickles_are_independent_and_equal(name: str) -> None:
    model, _, images = pair(name)
    expected = model(images).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
        assert torch.equal(model(images), expected)


def test_models_say_what_they_are() -> None:
    text = repr(rnf.models.MNISTNode())
    assert "n_steps=10" in text
    assert "step_size=0.01" in text
    assert "negative_slope=0.2" in repr(rnf.nn.SmoothLeakyReLU(0.2))


def test_full_size_models_run() -> None:
    for model, shape in ((rnf.models.MNISTNode(), (2, 1, 28, 28)), (rnf.models.StagedCIFARNode(), (2, 3, 32, 32))):
        logits = model(torch.rand(shape))
        assert logits.shape == (2, 10)
        (logits.square().mean() + model.contraction_penalty(rate=2.0)).backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None for g in gradients)
        assert_finite(logits, *(g for g in gradients if g is not None))
