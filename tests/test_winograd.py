"""Contract of Winograd's algorithm (float32, 3x3 filters, from 3 channels on): its errors, its switch, its NaNs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, gradients, kernels_in, max_error, needs_kernels, random_filters, random_state
from hypothesis import given, settings
from test_numerics import Problem, check_flow
from torch import Tensor

from robust_node_fast import backend_info, functional, reference

pytestmark = needs_kernels
EPS = torch.finfo(torch.float32).eps
TILE = 4


def step(module: Any, input: Tensor, weight: Tensor, bias: Tensor, size: float = 1.0) -> Tensor:
    return module.euler_conv_step(input, weight, bias, step_size=size)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

# Largest errors allowed in units of EPS times the size of what a tile sums, about three times the largest ones found
# (1.8, 15.4, 5.8; PyTorch's own: 0.9, 3.1, 1.9).
ERRORS = {"one huge pixel": 48.0, "channels of many sizes": 18.0}
SMALL_ERROR = 6.0


def difficult(kind: str, shape: tuple[int, ...]) -> Tensor:
    rows, columns = shape[2:]
    if kind == "one huge pixel":
        values = torch.randn(shape)
        values[0, shape[1] // 2, rows // 2, columns // 2] = 1e6
        return values
    return {
        "gaussian": lambda: torch.randn(shape),
        "pixels of many sizes": lambda: torch.randn(shape) * 10.0 ** (12 * torch.rand(shape[0], 1, rows, columns) - 6),
        "channels of many sizes": lambda: torch.randn(shape) * 10.0 ** (12 * torch.rand(1, shape[1], 1, 1) - 6),
        "all sizes": lambda: torch.randn(shape) * 10.0 ** (12 * torch.rand(shape) - 6),
        "constant": lambda: torch.full(shape, 3.7),
        "checkerboard": lambda: ((-1.0) ** (torch.arange(rows)[:, None] + torch.arange(columns))).expand(shape).clone(),
        "huge": lambda: 1e34 * torch.randn(shape),
        "tiny": lambda: 1e-30 * torch.randn(shape),
    }[kind]()


KINDS = (
    "gaussian", "pixels of many sizes", "channels of many sizes", "all sizes", "constant", "checkerboard", "huge",
    "tiny", "one huge pixel",
)  # fmt: skip


def around(values: Tensor) -> Tensor:
    """Largest magnitude that a pixel's tile may see: its 6x6 window lies within five pixels."""
    return F.max_pool2d(values.abs().double(), 11, stride=1, padding=5)


def assert_within(found: Tensor, exact: Tensor, scale: Tensor, bound: float, what: str) -> None:
    assert torch.isfinite(found).all(), what
    worst = ((found - exact).abs() / (EPS * scale)).nan_to_num(nan=0.0, posinf=torch.inf).max().item()
    assert worst <= bound, f"{what}: {worst:.2f}, allowed {bound}"


SHAPES = (
    (2, 4, 13, 18), (1, 8, 9, 7), (2, 12, 8, 31), (1, 15, 1, 1), (1, 9, 6, 3),
    (2, 16, 13, 18), (1, 24, 9, 7), (2, 64, 8, 11), (1, 17, 1, 1), (1, 33, 6, 3),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_error_of_a_step_and_its_gradients(kind: str, shape: tuple[int, ...]) -> None:
    """A step of size 1 is little more than its convolution. Large values spoil no results but those of their tiles."""
    (weight, bias), bound = random_filters(shape[1], 3, None, True), ERRORS.get(kind, SMALL_ERROR)
    assert bias is not None
    size = weight.double().abs().sum((2, 3))[:, :, None, None]
    wide = [weight.double(), bias.double()]

    z, g = difficult(kind, shape), torch.randn(shape)
    result = step(functional, z, weight, bias)
    exact = step(reference, z.double(), *wide)
    scale = F.conv2d(around(z), size, wide[1].abs()) + z.abs() + 1.0
    assert_within(result, exact, scale, bound, "result")
    largest = max(exact.abs().max().item(), 1.0)
    assert max_error(result, exact) <= 48 * EPS * largest  # the largest found is 14, PyTorch's own 5

    z, g = torch.randn(shape), difficult(kind, shape)
    found = gradients(lambda *t: step(functional, *t), [z, weight, bias], g)[1:]
    truth = gradients(lambda *t: step(reference, *t), [z.double(), *wide], g.double())[1:]
    input_scale = F.conv2d(around(g), size.transpose(0, 1)) + g.abs()
    weight_scale = torch.einsum("bohw,bchw->oc", around(g), around(z))[:, :, None, None]
    assert_within(found[0], truth[0], input_scale, bound, "gradient of the input")
    assert_within(found[1], truth[1], weight_scale, SMALL_ERROR, "gradient of the weight")
    assert_within(found[2], truth[2], g.abs().double().sum((0, 2, 3)), 12.0, "gradient of the bias")


def test_network_for_cifar() -> None:
    """16 steps of 128 channels: result and gradients within four times the error of PyTorch; 1.3 is what is found."""
    input, grad_output = torch.randn(1, 128, 32, 32), torch.randn(1, 128, 32, 32)
    tensors = [input, *random_filters(128, 3, 16, True)]

    def run(module: Any, dtype: torch.dtype) -> list[Tensor]:
        wide = [None if t is None else t.to(dtype) for t in tensors]
        return gradients(lambda x, w, b: module.euler_conv_flow(x, w, b, step_size=0.1), wide, grad_output.to(dtype))

    exact, theirs = run(reference, torch.float64), run(reference, torch.float32)
    ours = run(functional, torch.float32)
    for mine, other, truth, what in zip(ours, theirs, exact, ("result", "input", "weight", "bias"), strict=True):
        error, allowed = max_error(mine, truth), 4.0 * max_error(other, truth)
        assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


@st.composite
def problems(draw: Any) -> Problem:
    size = st.integers(1, 20)
    return Problem(
        shape=(draw(st.integers(0, 5)), draw(st.integers(1, 70)), draw(size), draw(size)),
        kernel=3,
        steps=draw(st.integers(1, 3)),
        shared=draw(st.booleans()),
        bias=draw(st.booleans()),
        trajectory=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=torch.float32,
        negative_slope=draw(st.floats(0.01, 1.0)),
        step_size=draw(st.floats(-0.5, 1.0, allow_subnormal=False)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@given(problems())
@settings(max_examples=150)
def test_flow_and_its_gradients(p: Problem) -> None:
    """Every layout, for any number of channels: also where the rule chooses another one."""
    check_flow(p, {"channels": 4.0, "strips": 4.0, "planes": 2.0})


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs
# ---------------------------------------------------------------------------------------------------------------------


def bits(layout: str | None, channels: int, kernel: int, dtype: torch.dtype, size: int = 9) -> list[Tensor]:
    """Result and gradients of one flow, in a layout or in that which is set."""
    generator = torch.Generator().manual_seed(7)
    state = (2, channels, size, size + 1)
    shapes = (state, (2, channels, channels, kernel, kernel), (2, channels), state)
    x, w, b, g = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)

    def run() -> list[Tensor]:
        return gradients(lambda *t: functional.euler_conv_flow(*t, step_size=0.1), [x, w, b], g)

    if layout is None:
        return run()
    with kernels_in(layout):
        return run()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("channels", "kernel", "dtype", "layout"),
    [
        (16, 3, torch.float32, "channels"),
        (33, 3, torch.float32, "channels"),
        (23, 3, torch.float32, "channels"),
        (22, 3, torch.float32, "strips"),
        (15, 3, torch.float32, "strips"),
        (3, 3, torch.float32, "strips"),
        (2, 3, torch.float32, "planes"),
        (16, 5, torch.float32, "planes"),
        (8, 1, torch.float32, "planes"),
        (16, 3, torch.float64, "planes"),
        (8, 3, torch.float64, "planes"),
    ],
)
def test_what_it_is_chosen_for(channels: int, kernel: int, dtype: torch.dtype, layout: str) -> None:
    found = {name: bits(name, channels, kernel, dtype) for name in ("best", "planes", "channels", "strips")}
    assert same(found["best"], found[layout])
    winograd_takes_it = kernel == 3 and dtype == torch.float32
    for name in ("channels", "strips"):
        assert same(found["planes"], found[name]) != winograd_takes_it


@pytest.mark.skipif(
    backend_info()["backends"]["cpu"].get("isa") != "avx512_bf16",
    reason="the processor multiplies no pairs of bfloat16",
)
@pytest.mark.parametrize(
    ("channels", "kernel", "size", "layout"),
    [
        (2, 3, 12, "planes"),
        (8, 3, 12, "planes"),
        (8, 3, 9, "strips"),
        (14, 3, 12, "planes"),
        (15, 3, 12, "channels"),
        (17, 3, 12, "planes"),
        (19, 3, 12, "channels"),
        (48, 3, 7, "channels"),
        (2, 5, 12, "planes"),
        (16, 1, 12, "planes"),
    ],
)
def test_what_products_of_pairs_are_chosen_for(channels: int, kernel: int, size: int, layout: str) -> None:
    found = {n: bits(n, channels, kernel, torch.bfloat16, size) for n in ("best", "planes", "channels", "strips")}
    assert same(found["best"], found[layout])
    others = [name for name in ("planes", "channels", "strips") if name != layout and kernel == 3]
    assert not any(same(found["best"], found[name]) for name in others)


@pytest.mark.parametrize(("channels", "layout"), [(8, "strips"), (16, "channels")])
@pytest.mark.parametrize("precision", ["exact", None])
def test_environment_asks_for_the_direct_kernels(
    precision: str | None, channels: int, layout: str, tmp_path: Path
) -> None:
    code = f"import sys, torch, test_winograd as t; torch.save(t.bits(None, {channels}, 3, torch.float32), sys.argv[1])"
    env = {name: value for name, value in os.environ.items() if name != "RNF_PRECISION"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), env.get("PYTHONPATH"))))
    if precision is not None:
        env["RNF_PRECISION"] = precision
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "bits")], check=True, env=env, timeout=120)
    found = torch.load(tmp_path / "bits")
    direct, winograd = (bits(name, channels, 3, torch.float32) for name in ("planes", layout))
    assert same(found, direct if precision == "exact" else winograd)
    assert not torch.equal(direct[0], winograd[0])


# ---------------------------------------------------------------------------------------------------------------------
# NaN and infinity
# ---------------------------------------------------------------------------------------------------------------------


def reached(places: set[int], size: int) -> set[int]:
    """Rows (or columns) that a step spoils: those of the same tiles, and the next one at the edge of a tile."""
    found = set()
    for place in places:
        first = place // TILE * TILE
        last = first + TILE - 1
        found |= set(range(first - (place == first), last + (place == last) + 1))
    return {place for place in found if 0 <= place < size}


def neighbours(places: set[int], size: int) -> set[int]:
    return {place + by for place in places for by in (-1, 0, 1) if 0 <= place + by < size}


def reached_area(shape: tuple[int, ...], sample: int, row: int, column: int, steps: int, layout: str) -> Tensor:
    rows, columns = {row}, {column}
    for _ in range(steps):
        rows = reached(rows, shape[2])
        columns = (reached if layout == "channels" else neighbours)(columns, shape[3])
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[sample, :, min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
    return mask


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 6), (7, 8), (12, 17), (4, 3), (8, 16)])
@pytest.mark.parametrize(("channels", "layout"), [(33, "channels"), (17, "strips"), (8, "strips")])
def test_non_finite_pixels_spoil_their_tiles_and_nothing_else(
    value: float, steps: int, row: int, column: int, channels: int, layout: str
) -> None:
    """PyTorch spoils the 3x3 pixels around one; here it is its 4x4 tile, and what of them lies outside of it.

    In strips a tile is one column of four. So nothing that is not finite in PyTorch is finite here, and no other sample
    nor any tile farther away is touched.
    """
    shape = (3, channels, 13, 18)
    input, grad_output = random_state(shape), random_state(shape)
    weight, bias = random_filters(channels, 3, steps, True)

    def run(module: Any, x: Tensor, g: Tensor) -> list[Tensor]:
        return gradients(lambda *t: module.euler_conv_flow(*t, step_size=0.1), [x, weight, bias], g)

    clean = run(functional, input, grad_output)
    area = reached_area(shape, 1, row, column, steps, layout)

    spoiled = input.clone()
    spoiled[1, 2, row, column] = value
    ours, theirs = run(functional, spoiled, grad_output), run(reference, spoiled, grad_output)
    assert torch.equal(~ours[0].isfinite(), area)
    assert torch.equal(ours[0][~area], clean[0][~area])
    for mine, other in zip(ours, theirs, strict=True):
        assert not mine.isfinite()[~other.isfinite()].any()
    for sample in (0, 2):
        assert torch.equal(ours[1][sample], clean[1][sample])

    spoiled = grad_output.clone()
    spoiled[1, 2, row, column] = value
    ours, theirs = run(functional, input, spoiled), run(reference, input, spoiled)
    assert torch.equal(ours[0], clean[0])
    assert torch.equal(~ours[1].isfinite(), area)
    assert torch.equal(ours[1][~area], clean[1][~area])
    for mine, other in zip(ours, theirs, strict=True):
        assert not mine.isfinite()[~other.isfinite()].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channels", [8, 16])
def test_non_finite_filters_never_vanish(value: float, channels: int) -> None:
    """In PyTorch a tap does not reach the pixels whose neighbour it would take from outside the image; here it may."""
    input = random_state((2, channels, 7, 9))
    weight, bias = random_filters(channels, 3, 2, True)
    weight[0, 3, 5, 0, 2] = value
    ours, theirs = (m.euler_conv_flow(input, weight, bias, step_size=0.1) for m in (functional, reference))
    assert not theirs.isfinite().all()
    assert not ours.isfinite()[~theirs.isfinite()].any()
    first = functional.euler_conv_step(input, weight[0], None, step_size=0.1)
    clean = torch.arange(channels) != 3
    assert first[:, clean].isfinite().all()
    assert not first[:, 3].isfinite().any()
