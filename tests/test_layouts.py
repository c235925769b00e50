"""Contract of the CPU layouts (csrc/cpu/flow.inc): same flow, same gradients, whichever runs; what each may change."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from helpers import gradients, max_error, random_filters, random_state
from torch import Tensor

import robust_node_fast as rnf
from robust_node_fast import functional, reference

pytestmark = pytest.mark.skipif(
    not rnf.backend_info()["backends"]["cpu"]["available"], reason="the compiled library is missing"
)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    from robust_node_fast import _cpu

    return lambda layout: monkeypatch.setattr(_cpu, "layout", layout)


def flow(input: Tensor, weight: Tensor, bias: Tensor | None = None, h: float = 0.1, recompute: bool = True) -> Tensor:
    shared = 2 if weight.dim() == 4 else None
    return functional.euler_conv_flow(input, weight, bias, step_size=h, n_steps=shared, recompute=recompute)


def adversarial_inputs(shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    signs = (-1.0) ** (torch.arange(shape[2])[:, None] + torch.arange(shape[3]))
    huge = torch.randn(shape)
    huge[0, 0, shape[2] // 2, shape[3] // 2] = 1e6
    return {
        "gaussian": torch.randn(shape),
        "dynamic range": torch.randn(shape) * 10.0 ** torch.empty(shape).uniform_(-6, 6),
        "channels of different size": torch.randn(shape) * 10.0 ** torch.empty(1, shape[1], 1, 1).uniform_(-4, 4),
        "constant": torch.ones(shape) * 3.7,
        "checkerboard": signs.expand(shape).contiguous(),
        "one huge pixel": huge,
    }


@pytest.mark.parametrize("channels", [16, 24, 64])
@pytest.mark.parametrize("kind", sorted(adversarial_inputs((1, 1, 3, 3))))
def test_winograd_error_of_a_step_is_bounded(channels: int, kind: str) -> None:
    """A step of size 1 is a convolution: error below 16 units in the last place of the largest sum of terms."""
    shape = (2, channels, 13, 18)
    input = adversarial_inputs(shape)[kind]
    weight, bias = random_filters(channels, 3, 1, True)
    assert bias is not None
    exact = reference.euler_conv_flow(input.double(), weight.double(), bias.double(), step_size=1.0)
    terms = torch.nn.functional.conv2d(
        input.abs().double(), weight[0].abs().double(), bias[0].abs().double(), padding=1
    )
    assert max_error(flow(input, weight, bias, 1.0), exact) <= 16 * torch.finfo(torch.float32).eps * terms.max().item()


def test_cifar_flow_within_four_times_the_error_of_pytorch() -> None:
    input, (weight, bias), grad = torch.randn(1, 128, 32, 32), random_filters(128, 3, 16, True), None
    grad = torch.randn_like(input)
    wide = [t.double() for t in (input, weight, bias) if t is not None]
    plain = lambda *t: reference.euler_conv_flow(*t, step_size=0.1)  # noqa: E731
    exact = gradients(plain, wide, grad.double())
    theirs = gradients(plain, (input, weight, bias), grad)
    ours = gradients(flow, (input, weight, bias), grad)
    for what, o, t, e in zip(("output", "input", "weight", "bias"), ours, theirs, exact, strict=True):
        assert max_error(o, e) <= 4 * max_error(t, e), what


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 3, 5), (5, 17, 7, 8), (1, 33, 33, 4), (70, 16, 2, 2), (0, 16, 4, 4)]
)
def test_layouts_agree(shape: tuple[int, int, int, int], use: Callable[[str], None]) -> None:
    """The Winograd layout also where the rule would not choose it; packs of one and of many samples."""
    input, (weight, bias), grad = random_state(shape), random_filters(shape[1], 3, 3, True), torch.randn(shape)
    found = {}
    for layout in ("planes", "channels"):
        use(layout)
        found[layout] = gradients(flow, (input, weight, bias), grad)
    for a, b in zip(found["planes"], found["channels"], strict=True):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        assert max_error(a, b.double()) <= 3e-5 * scale


def test_precision_switch() -> None:
    script = (
        "import torch, robust_node_fast as rnf; torch.manual_seed(0);"
        "x, w = torch.randn(2, 16, 9, 9), torch.randn(2, 16, 16, 3, 3) / 12;"
        "print(rnf.functional.euler_conv_flow(x, w, step_size=0.1).view(torch.int32).sum().item())"
    )

    def run(**env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **env}, check=True, capture_output=True, text=True
        )
        return done.stdout

    torch.manual_seed(0)
    x, w = torch.randn(2, 16, 9, 9), torch.randn(2, 16, 16, 3, 3) / 12
    from robust_node_fast import _cpu

    before = _cpu.layout
    try:
        _cpu.layout = "planes"
        direct = flow(x, w).view(torch.int32).sum().item()
    finally:
        _cpu.layout = before
    assert run(RNF_PRECISION="exact") == f"{direct}\n"
    assert run(RNF_PRECISION="") != f"{direct}\n"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_pixel_spoils_its_tiles_and_nothing_else(bad: float) -> None:
    weight, bias = random_filters(16, 3, 1, True)
    input = torch.randn(2, 16, 16, 20)
    input[0, 5, 7, 9] = bad  # in tile (1, 2); its window reaches tile (2, 2) below
    ours, theirs = flow(input, weight, bias), reference.euler_conv_flow(input, weight, bias, step_size=0.1)
    spoiled = ~torch.isfinite(ours)
    assert spoiled[~torch.isfinite(theirs)].all()
    assert not spoiled[1].any()
    inside = torch.zeros_like(spoiled)
    inside[0, :, 4:12, 8:12] = True
    assert not spoiled[~inside].any()


@pytest.mark.parametrize("layout", ["planes", "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_saving_gives_the_same_gradients(
    layout: str, dtype: torch.dtype, memory: str, use: Callable[[str], None]
) -> None:
    use(layout)
    input = random_state((5, 16, 7, 9), memory, dtype)
    grad = torch.randn(5, 16, 7, 9, dtype=dtype)
    for steps, with_bias in ((3, True), (None, False)):
        weight, bias = random_filters(16, 3, steps, with_bias, dtype)
        for wanted in ((0,), (1,), (0, 1, 2)):
            found = []
            for recompute in (True, False):
                leaves = [
                    t if t is None else t.detach().requires_grad_(i in wanted)
                    for i, t in enumerate((input, weight, bias))
                ]
                output = flow(leaves[0], leaves[1], leaves[2], recompute=recompute)  # type: ignore[arg-type]
                asked = [t for t in leaves if t is not None and t.requires_grad]
                found.append([output.detach(), *torch.autograd.grad(output, asked, grad)])
            outputs, *grads = zip(*found, strict=True)
            # With AVX-512 the activation is read from another table when its slope is wanted as well.
            torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
            assert all(torch.equal(a, b) for a, b in grads)


def saved_bytes(steps: int, recompute: bool, train: bool) -> int:
    input = torch.randn(2, 16, 8, 8, requires_grad=True)
    weight, _ = random_filters(16, 3, steps, False)
    weight.requires_grad_(train)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        flow(input, weight, recompute=recompute)
    return sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in (input.data_ptr(), weight.data_ptr()))


def test_what_is_saved() -> None:
    state = 2 * 16 * 8 * 8 * 4
    assert saved_bytes(3, True, True) == saved_bytes(12, True, True) == 0
    assert saved_bytes(3, False, False) == 3 * state
    assert saved_bytes(3, False, True) == 6 * state


def test_saving_elsewhere() -> None:
    """Trajectories, no gradients, torch.func, double backward, autocast, torch.compile, the module."""
    input, (weight, bias) = torch.randn(2, 16, 5, 6), random_filters(16, 3, 2, True)
    assert bias is not None
    call = lambda x, recompute: functional.euler_conv_flow(x, weight, bias, step_size=0.1, recompute=recompute)  # noqa: E731
    both = [torch.func.grad(lambda x, r=r: call(x, r).square().sum())(input) for r in (True, False)]
    torch.testing.assert_close(both[0], both[1])
    with torch.no_grad():
        assert torch.equal(call(input, True), call(input, False))
    trajectory = functional.euler_conv_flow(
        input.requires_grad_(), weight, bias, step_size=0.1, return_trajectory=True, recompute=False
    )
    assert trajectory.shape == (3, 2, 16, 5, 6)
    wide = [t.detach().double().requires_grad_() for t in (input, weight, bias)]
    second = []
    for recompute in (True, False):
        out = functional.euler_conv_flow(*wide[:2], wide[2], step_size=0.1, recompute=recompute)
        (first,) = torch.autograd.grad(out.square().sum(), wide[0], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), wide))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(input, False).dtype == torch.bfloat16
    compiled = torch.compile(lambda x: call(x, False), fullgraph=True)
    found = [torch.autograd.grad(f(input).sum(), input)[0] for f in (compiled, lambda x: call(x, False))]
    assert torch.equal(*found)
    module = rnf.nn.EulerConvFlow(16, 2, 0.1, recompute=False)
    module(input).sum().backward()


@pytest.mark.parametrize("save_states", [True, False])
def test_saving_op(save_states: bool) -> None:
    input, (weight, bias) = torch.randn(2, 16, 5, 6, requires_grad=True), random_filters(16, 3, 2, True)
    assert bias is not None
    weight.requires_grad_(save_states)
    op = torch.ops.robust_node_fast.euler_conv_flow_saving.default
    torch.library.opcheck(op, (input, weight, bias, 0.1, 0.2, 2, save_states))
    ours, theirs = (
        op(input, weight, bias, 0.1, 0.2, 2, save_states),
        reference.euler_conv_flow_saving(input, weight, bias, 0.1, 0.2, 2, save_states),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Packed filters are kept between calls: no change of a weight may be missed
# ---------------------------------------------------------------------------------------------------------------------


def flip_signs(weight: Tensor, count: int) -> None:
    for i in range(count):  # two in the same lane of the hash: the differences in the highest bits must not cancel
        weight.view(-1)[128 * i].neg_()


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.add_(0.1),
    "data": lambda w: w.data.mul_(1.5),
    "data copy": lambda w: w.data.copy_(torch.randn_like(w) / 12),
    "one element": lambda w: w.data.view(-1)[7].add_(0.25),
    "one sign": lambda w: flip_signs(w.data, 1),
    "two signs": lambda w: flip_signs(w.data, 2),
    "numpy": lambda w: w.detach().numpy().__setitem__((1, 2, 3, 1, 1), 0.75),
    "last bank": lambda w: w.data[-1].neg_(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("channels", [8, 16])
def test_a_changed_weight_is_noticed(change: str, channels: int) -> None:
    input, (weight, _) = torch.randn(2, channels, 8, 8), random_filters(channels, 3, 3, False)
    before = flow(input, weight)
    assert torch.equal(flow(input, weight), before)
    with torch.no_grad():
        CHANGES[change](weight)
    after = flow(input, weight)
    assert torch.equal(after, flow(input, weight.clone()))
    assert not torch.equal(after, before)


def test_another_weight_at_the_same_address() -> None:
    input, addresses = torch.randn(1, 16, 6, 6), set()
    for _ in range(20):
        weight, _ = random_filters(16, 3, 2, False)
        addresses.add(weight.data_ptr())
        exact = reference.euler_conv_flow(input.double(), weight.double(), step_size=0.1)
        assert max_error(flow(input, weight), exact) < 1e-5
        del weight
    assert len(addresses) < 20


def test_training_sees_every_update() -> None:
    module, plain = rnf.nn.EulerConvFlow(16, 2, 0.1), rnf.nn.EulerConvFlow(16, 2, 0.1)
    plain.load_state_dict(module.state_dict())
    input = torch.randn(2, 16, 6, 6)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (module, plain)]
    for _ in range(5):
        module(input).square().sum().backward()
        reference.euler_conv_flow(input, plain.weight, plain.bias, step_size=0.1).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(module(input), plain(input), rtol=1e-3, atol=1e-3)


def test_threads_share_a_weight() -> None:
    weight, bias = random_filters(16, 3, 3, True)
    inputs = [torch.randn(3, 16, 9, 9) for _ in range(4)]
    expected = [flow(x, weight.clone(), bias) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(30) if not torch.equal(flow(inputs[i], weight, bias), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
