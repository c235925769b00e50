"""Contract of the cache of packed filters (csrc/cpu/filter_cache.h): no change of a weight is ever missed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from helpers import assert_close, kernels_in, needs_kernels, random_filters, random_state
from hypothesis import given, settings
from torch import Tensor, nn

import robust_node_fast as rnf
from robust_node_fast import functional, reference

pytestmark = needs_kernels
CHANNELS = [9, 25]  # Winograd in strips and in channels


def run(weight: Tensor, input: Tensor, module: object = functional, n_steps: int | None = None) -> list[Tensor]:
    """Result and gradient of the input: packed filters of both directions."""
    leaf = input.detach().requires_grad_()
    steps = n_steps if n_steps is not None or weight.dim() == 5 else 1
    with torch.enable_grad(), torch.inference_mode(False):
        result = module.euler_conv_flow(leaf, weight, step_size=0.5, n_steps=steps)  # type: ignore[attr-defined]
        (gradient,) = torch.autograd.grad(result.sum(), leaf)
    return [result.detach(), gradient]


class Fresh:
    """Results for a copy of the weight that no earlier call has seen: all copies stay alive, so does their memory."""

    def __init__(self) -> None:
        self.copies: list[Tensor] = []

    def check(self, weight: Tensor, input: Tensor) -> list[Tensor]:
        """What the weight itself gives, which must be the same to the bit."""
        self.copies.append(weight.detach().clone())
        found, exact = run(weight.detach(), input), run(self.copies[-1], input)
        for mine, other, truth in zip(found, exact, run(weight.detach(), input, reference), strict=True):
            assert torch.equal(mine, other)
            assert_close(mine, truth, 1e-4 if input.dtype == torch.float32 else 0.05)
        return found


def set_from_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[1, 2, 3, 0, 1] += 0.5


def exchange_banks(weight: Tensor) -> None:
    weight.data[[0, 2]] = weight.data[[2, 0]]


def rotate_memory(weight: Tensor) -> None:
    weight.data.copy_(weight.data.flatten().roll(1).view_as(weight))


def signs(*places: int) -> Callable[[Tensor], None]:
    def flip(weight: Tensor) -> None:
        weight.data.view(-1)[list(places)] *= -1

    return flip


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "data.add_": lambda w: w.data.add_(0.05),
    "data.copy_": lambda w: w.data.copy_(0.2 * torch.randn_like(w)),
    "data = other": lambda w: setattr(w, "data", w.data.flip(0).contiguous()),
    "clamp of one element": lambda w: w.data.view(-1)[-1:].clamp_(min=2.0),
    "the first element": lambda w: w.data.view(-1)[:1].add_(1.0),
    "numpy": set_from_numpy,
    "one bank": lambda w: w.data[1].mul_(1.5),
    "two banks exchanged": exchange_banks,
    "moved by one element": rotate_memory,
    "all signs": lambda w: w.data.neg_(),
    "zero": lambda w: w.data.zero_(),
    "one sign": signs(20),
    # Bits of different weight that a hash combines: neighbours, the same lane of other blocks, and both.
    **{f"two signs, {d} apart": signs(20, 20 + d) for d in (1, 2, 8, 16, 32, 64, 128, 256, 512)},
    **{f"three signs, 1 and {d} apart": signs(20, 21, 21 + d) for d in (16, 32, 64, 128, 256)},
    **{f"four signs, 1 and {d} apart": signs(20, 21, 20 + d, 21 + d) for d in (32, 64, 128)},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_change_between_two_calls(change: str, channels: int) -> None:
    input, fresh = random_state((2, channels, 5, 6)), Fresh()
    weight = nn.Parameter(random_filters(channels, 3, 3, False)[0])
    before = fresh.check(weight, input)
    CHANGES[change](weight)
    after = fresh.check(weight, input)
    assert not torch.equal(after[0], before[0])


@given(
    places=st.sets(st.integers(0, 9 * 17 * 17 - 1), min_size=1, max_size=6),
    bit=st.integers(0, 31),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=60)
def test_any_bits(places: set[int], bit: int, seed: int) -> None:
    """The same bit of up to six weights; results may be NaN, so bits are what is compared."""
    torch.manual_seed(seed)
    weight, input = random_filters(17, 3, None, False)[0], random_state((1, 17, 4, 4))
    run(weight, input)
    integers = weight.view(-1).view(torch.int32)
    integers[sorted(places)] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    copy = weight.clone()
    for mine, exact in zip(run(weight, input), run(copy, input), strict=True):
        assert torch.equal(mine.view(torch.int32), exact.view(torch.int32))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_changes_of_other_dtypes(channels: int, dtype: torch.dtype) -> None:
    input, fresh = random_state((1, channels, 5, 6), dtype=dtype), Fresh()
    weight, _ = random_filters(channels, 3, 2, False, dtype)
    for place in (0, 7, 200, -1):
        weight.view(-1)[place] *= -1
        fresh.check(weight, input)


@pytest.mark.parametrize("channels", CHANNELS)
def test_load_state_dict(channels: int) -> None:
    module, other = (rnf.nn.EulerConvFlow(channels, 3, 0.5, bias=False) for _ in range(2))
    input, fresh = random_state((2, channels, 5, 6)), Fresh()
    fresh.check(module.weight, input)
    address = module.weight.data_ptr()
    module.load_state_dict(other.state_dict())
    assert module.weight.data_ptr() == address
    found = fresh.check(module.weight, input)
    assert torch.equal(found[0], run(other.weight, input)[0])


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "foreach", "fused"])
def test_steps_of_optimizers(channels: int, optimizer: str) -> None:
    module, input, fresh = rnf.nn.EulerConvFlow(channels, 2, 0.5), random_state((2, channels, 5, 6)), Fresh()
    options = {optimizer: True} if optimizer in ("foreach", "fused") else {}
    kind = torch.optim.SGD if optimizer == "SGD" else torch.optim.Adam
    updates = kind(module.parameters(), lr=0.05, **options)
    for _ in range(3):
        before = module.weight.detach().clone()
        module(input).square().mean().backward()
        updates.step()
        updates.zero_grad()
        assert not torch.equal(module.weight, before)
        fresh.check(module.weight, input)


@pytest.mark.parametrize("channels", CHANNELS)
def test_change_between_forward_and_backward(channels: int) -> None:
    """A weight changed behind autograd's back: backward uses the new one, as PyTorch's convolution does."""
    weight, input = random_filters(channels, 3, 2, False)[0].requires_grad_(), random_state((2, channels, 5, 6))
    found = []
    for module in (functional, reference):
        w, x = weight.detach().clone().requires_grad_(), input.clone().requires_grad_()
        result = module.euler_conv_flow(x, w, step_size=0.5)
        for other in (functional, reference):  # the transposed filters are packed before the change as well
            run(w.detach(), input, other)
        w.data.mul_(-0.5)
        recomputed = functional.euler_conv_flow(x, w, step_size=0.5)
        found.append(torch.autograd.grad(recomputed if module is reference else result, x, torch.ones_like(result))[0])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("channels", CHANNELS)
def test_inference_mode(channels: int) -> None:
    """Its tensors count no versions."""
    input, fresh = random_state((2, channels, 5, 6)), Fresh()
    with torch.inference_mode():
        weight = random_filters(channels, 3, 2, False)[0]
        before = functional.euler_conv_flow(input, weight, step_size=0.5)
        weight[1, 0, 0, 1, 1] += 0.5
        after = functional.euler_conv_flow(input, weight, step_size=0.5)
        copy = weight.clone()
        assert torch.equal(after, functional.euler_conv_flow(input, copy, step_size=0.5))
        assert not torch.equal(after, before)
    parameter = nn.Parameter(random_filters(channels, 3, 2, False)[0])
    fresh.check(parameter, input)
    with torch.inference_mode():
        parameter.data.add_(0.1)
        inside = functional.euler_conv_flow(input, parameter, step_size=0.5)
    assert torch.equal(inside, fresh.check(parameter, input)[0])


@pytest.mark.parametrize("channels", CHANNELS)
def test_views(channels: int) -> None:
    """Parts of one weight, with the addresses of other parts, of other lengths, and with other strides."""
    weight, input, fresh = random_filters(channels, 3, 4, False)[0], random_state((2, channels, 5, 6)), Fresh()
    for _ in range(2):
        for part in (weight, weight[1:3], weight[1:], weight[:2], weight[1], weight[2:3], weight.flip(0)):
            fresh.check(part, input)
        for part in (weight.mT, weight.transpose(1, 2), weight[:1].expand(3, -1, -1, -1, -1), weight[::2]):
            fresh.check(part, input)
        weight[2, 1, 1, 1, 1] += 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("first", "second"),
    [((3, 1), (1, 3)), ((5, 1), (1, 5)), ((5, 3), (3, 5)), ((6, 1), (2, 3)), ((10, 1), (2, 5)), ((48, 1), (16, 3))],
)
def test_one_memory_as_filters_of_two_shapes(
    first: tuple[int, int], second: tuple[int, int], dtype: torch.dtype
) -> None:
    memory, fresh = 0.2 * torch.randn(2 * (first[0] * first[1]) ** 2, dtype=dtype), Fresh()
    with kernels_in("planes"):
        for channels, kernel in (first, second, first):
            weight = memory.view(2, channels, channels, kernel, kernel)
            fresh.check(weight, random_state((4, channels, 6, 7), dtype=dtype))  # fewer pixels are not packed


@pytest.mark.parametrize("channels", CHANNELS)
def test_layouts_do_not_mix(channels: int) -> None:
    weight, input, fresh = random_filters(channels, 3, 2, False)[0], random_state((4, channels, 6, 7)), Fresh()
    for layout in ("planes", "channels", "strips") * 2:
        with kernels_in(layout):
            fresh.check(weight, input)


@pytest.mark.parametrize("channels", CHANNELS)
def test_another_weight_at_the_same_address(channels: int) -> None:
    input, addresses = random_state((1, channels, 5, 6)), set()
    for _ in range(40):
        weight, _ = random_filters(channels, 3, 2, False)
        addresses.add(weight.data_ptr())
        for mine, truth in zip(run(weight, input), run(weight, input, reference), strict=True):
            assert_close(mine, truth, 1e-4)
        del weight
    assert len(addresses) < 40  # the allocator hands out memory again
    # And with certainty: other numbers of banks in one piece of memory.
    memory, fresh = torch.empty(4 * 9 * channels**2), Fresh()
    for steps in (2, 4, 1, 2):
        weight = memory[: steps * 9 * channels**2].view(steps, channels, channels, 3, 3)
        fresh.check(weight.copy_(random_filters(channels, 3, steps, False)[0]), input)


@pytest.mark.parametrize("channels", CHANNELS)
def test_threads_share_a_weight(channels: int) -> None:
    weight, _ = random_filters(channels, 3, 3, False)
    inputs = [random_state((3, channels, 9, 8)) for _ in range(3)]
    copy = weight.clone()
    expected = [run(copy, input) for input in inputs]
    start, wrong = threading.Barrier(len(inputs)), []

    def repeat(i: int) -> None:
        start.wait()
        for _ in range(40):
            found = run(weight, inputs[i])
            if not all(torch.equal(mine, exact) for mine, exact in zip(found, expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("channels", CHANNELS)
def test_threads_with_weights_of_their_own_that_change(channels: int) -> None:
    wrong: list[int] = []

    def train(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        input = torch.randn(2, channels, 6, 6, generator=generator)
        weight = torch.randn(2, channels, channels, 3, 3, generator=generator) / channels
        for _ in range(30):
            weight.view(-1)[torch.randint(weight.numel(), (3,), generator=generator)] *= -1
            found, copy = run(weight, input), weight.clone()
            if not all(torch.equal(mine, exact) for mine, exact in zip(found, run(copy, input), strict=True)):
                wrong.append(seed)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def grown(flows: str) -> float:
    """MiB that a fresh process holds more after all of ``flows`` than after the first."""
    code = f"""
import resource, torch
from robust_node_fast import functional

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
{flows}
first, *others = calls
flow(first)
before = resident()
for each in others:
    flow(each)
print((resident() - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return float(done.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see the memory in use")


@needs_proc
def test_memory_is_bounded() -> None:
    """240 weights of 4.5 MiB of packed filters, 1 GiB: at most 256 MiB of them stay, and little scratch memory."""
    found = grown("""
calls, size = range(240), 4 * 64 * 64 * 9
memory, input = torch.randn(size + 16 * 240) / 24, torch.randn(1, 64, 12, 12, requires_grad=True)

def flow(i):
    weight = memory[16 * i : 16 * i + size].view(4, 64, 64, 3, 3)
    functional.euler_conv_flow(input, weight, step_size=0.1).sum().backward()
""")
    assert 64 < found < 256 + 32, f"{found:.0f} MiB"


@needs_proc
def test_memory_of_what_was_saved_is_bounded() -> None:
    """What 24 flows saved, 51 to 63 MiB each and no two alike, 1.3 GiB: at most 512 MiB stay."""
    found = grown("""
calls, weight = [1, *range(102, 126)], torch.randn(8, 16, 16, 3, 3) / 12

def flow(batch):
    input = torch.zeros(batch, 16, 32, 32, requires_grad=True)
    functional.euler_conv_flow(input, weight, step_size=0.1, recompute=False).sum().backward()
""")
    assert found < 512 + 64, f"{found:.0f} MiB"
