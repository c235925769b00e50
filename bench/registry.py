"""Every workload that is measured, in one table; the only place where shapes are chosen.

- ``bars``: the rows that the project is judged by, against every provider, and training memory.
- ``scaling``: one size swept at a time (batch B, steps N, channels C, threads), without ``torch.compile``.
- ``grid``: each of ``CHANNELS``, ``SIZES``, ``BATCHES`` and ``STEPS`` at least once, against the cheaper providers.

A flow is ``N`` Euler steps with filter banks of their own, 3x3, on ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHANNELS = (1, 3, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
SIZES = (7, 8, 14, 20, 28, 32, 33, 56, 224)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STEPS = (1, 2, 4, 8, 10, 16, 32, 64)

GROUPS = ("bars", "scaling", "grid")
TIMED = ("forward", "input gradient", "forward+backward")
MODES = (*TIMED, "memory")

RATE = 2.0  # of the penalty; the paper's

OURS = "robust_node_fast"
SAVING = "robust_node_fast, recompute=False"
EAGER = ("eager", "eager channels_last")
COMPILED = ("torch.compile", "torch.compile channels_last", "torch.compile freezing")
EVERYONE = (*EAGER, *COMPILED, "torchdiffeq euler", "OpenVINO", "ONNX Runtime", OURS, SAVING)
CHEAPER = (*EAGER, "torch.compile channels_last", OURS)


@dataclass(frozen=True)
class Workload:
    """One line of the table; ``name`` is unique.

    Attributes:
        modes: what is measured unless a mode is asked for.
        kind: ``"flow"``, or ``"penalty"``: the contraction penalty of the flow's filters.
        threads: numbers of threads to compare in one interleaved run; empty: the run's own.
        sweep: which size a ``scaling`` row varies.
    """

    name: str
    group: str
    batch: int
    channels: int
    height: int
    width: int
    n_steps: int
    modes: tuple[str, ...] = TIMED
    providers: tuple[str, ...] = EVERYONE
    step_size: float = 0.1
    dtype: str = "float32"
    kind: str = "flow"
    threads: tuple[int, ...] = ()
    sweep: str = ""

    def flop(self, mode: str) -> float:
        """Of direct convolutions: one for the output, one for the input gradient, one for the weight gradient."""
        if self.kind == "penalty":
            return 0.0
        convolutions = {"forward": 1, "input gradient": 2}.get(mode, 3)
        pixels = self.batch * self.height * self.width
        return convolutions * 2.0 * 9 * self.channels**2 * pixels * self.n_steps

    @property
    def covered_modes(self) -> tuple[str, ...]:
        return MODES if self.kind == "flow" else ("forward+backward",)


def compulsory_bytes(batch: int, channels: int, pixels: int, n_steps: int, itemsize: int) -> float:
    """Traffic that no implementation of a flow's forward pass can avoid: read input and parameters, write output."""
    return itemsize * (2.0 * batch * channels * pixels + n_steps * channels * (9 * channels + 1))


@dataclass(frozen=True)
class Problem:
    """The tensors of a workload: the same numbers for every provider, rounded to the workload's dtype, never zeros."""

    work: Workload

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``input``, ``weight (N, C, C, 3, 3)``, ``bias (N, C)`` and the gradient of the output."""
        work, generator = self.work, torch.Generator().manual_seed(0)
        dtype: torch.dtype = getattr(torch, work.dtype)
        state = (work.batch, work.channels, work.height, work.width)
        filters = (work.n_steps, work.channels, work.channels, 3, 3)
        scale = (9 * work.channels) ** -0.5
        sizes = ((state, 1.0), (filters, scale), (filters[:2], 1.0), (state, 1.0))
        input, weight, bias, grad = ((torch.randn(s, generator=generator) * c).to(dtype) for s, c in sizes)
        return input, weight, bias, grad


def _bars() -> Iterator[Workload]:
    providers: tuple[str, ...]
    yield Workload("MNIST net, B128", "bars", 128, 8, 28, 28, 10, step_size=0.01)
    yield Workload("C32, B32", "bars", 32, 32, 32, 32, 10)
    yield Workload("CIFAR net, B16", "bars", 16, 128, 32, 32, 16)
    providers = (*EAGER, *COMPILED, "OpenVINO", OURS, SAVING)
    yield Workload("CIFAR net, B16, bf16", "bars", 16, 128, 32, 32, 16, providers=providers, dtype="bfloat16")
    yield Workload("MNIST net, B1", "bars", 1, 8, 28, 28, 10, ("forward",), step_size=0.01)
    for channels in (64, 128):
        name, providers = f"one step, C{channels}, B1", (*EVERYONE, "ncnn (convolution only)")
        yield Workload(name, "bars", 1, channels, 32, 32, 1, ("forward",), providers, threads=(1,))
    providers = ("eager", "torch.compile", "penalty loop", OURS)
    yield Workload("MNIST penalty", "bars", 0, 8, 0, 0, 10, ("forward+backward",), providers, kind="penalty")
    for batch in (32, 512):
        # Of 512 samples the others would save 23 GB.
        providers = (*EAGER, "torchdiffeq euler", OURS, SAVING) if batch == 32 else (OURS,)
        for steps in (8, 64):
            yield Workload(f"memory, B{batch} N{steps}", "bars", batch, 32, 32, 32, steps, ("memory",), providers)


def _scaling() -> Iterator[Workload]:
    few, both = (*EAGER, OURS), ("forward", "forward+backward")
    for batch in (1, 4, 16, 64, 256, 1024):
        yield Workload(f"B sweep, B{batch}", "scaling", batch, 8, 28, 28, 10, ("forward",), few, 0.01, sweep="B")
    for steps in (1, 2, 4, 8, 16, 32, 64):
        yield Workload(f"N sweep, N{steps}", "scaling", 8, 32, 28, 28, steps, both, few, sweep="N")
    for channels in CHANNELS:
        yield Workload(f"C sweep, C{channels}", "scaling", 4, channels, 28, 28, 4, ("forward",), few, sweep="C")
    for work in list(_bars())[:3]:
        # A backward pass of the CIFAR net on one thread takes seconds: too much for 20 minutes.
        modes = ("forward",) if work.channels == 128 else both
        shape = (work.batch, work.channels, work.height, work.width, work.n_steps)
        name, providers = f"threads, {work.name}", ("eager", OURS)
        yield Workload(name, "scaling", *shape, modes, providers, work.step_size, threads=(1, 2), sweep="threads")


def _grid() -> Iterator[Workload]:
    yield Workload("digits net, B64", "grid", 64, 8, 8, 8, 10, TIMED, CHEAPER, step_size=0.01)
    # Few steps: what torch.compile takes grows with their number, and the ratios hardly depend on it.
    shapes = (
        (1, 1, 224, 224, 2),
        (1024, 1, 7, 7, 8),
        (4, 3, 224, 224, 4),
        (1024, 3, 8, 8, 2),
        (1, 8, 224, 224, 1),
        (4, 8, 20, 33, 4),
        (512, 8, 14, 14, 4),
        (1, 12, 20, 20, 4),
        (128, 12, 28, 28, 2),
        (8, 16, 33, 33, 4),
        (256, 16, 14, 14, 2),
        (1, 24, 56, 56, 2),
        (16, 24, 28, 28, 4),
        (1, 32, 32, 32, 16),
        (2, 32, 56, 56, 4),
        (128, 32, 7, 7, 8),
        (4, 48, 33, 33, 2),
        (32, 48, 14, 14, 4),
        (1, 64, 7, 7, 2),
        (2, 64, 14, 28, 2),
        (8, 64, 32, 32, 4),
        (64, 64, 8, 8, 2),
        (2, 96, 20, 20, 4),
        (16, 96, 14, 14, 2),
        (1, 128, 7, 7, 2),
        (4, 128, 28, 28, 2),
        (1, 256, 7, 7, 1),
        (8, 256, 14, 14, 1),
        (4, 8, 28, 28, 32),
        (2, 16, 20, 20, 64),
    )
    for i, (batch, channels, height, width, steps) in enumerate(shapes):
        # Compiling a backward pass takes longest, that of many steps a minute: every second row has one.
        modes = ("forward",) if i % 2 or steps > 16 else ("forward", "forward+backward")
        name = f"grid, B{batch} C{channels} {height}x{width} N{steps}"
        yield Workload(name, "grid", batch, channels, height, width, steps, modes, CHEAPER)


WORKLOADS = (*_bars(), *_scaling(), *_grid())


def select(group: str = "all", only: str = "", mode: str | None = None) -> list[tuple[Workload, str]]:
    """The (workload, mode) pairs of a group whose name is, or else contains, ``only``.

    Args:
        group: one of ``GROUPS`` or ``"all"``.
        only: of a name, in any case.
        mode: the only one, also where the table leaves it out.

    Raises:
        ValueError: nothing is left; the message lists the names.
    """
    works = [work for work in WORKLOADS if group in ("all", work.group) and only.lower() in work.name.lower()]
    works = [work for work in works if work.name.lower() == only.lower()] or works
    pairs = [
        (work, m)
        for work in works
        for m in ((mode,) if mode in work.covered_modes else work.modes if mode is None else ())
    ]
    if not pairs:
        names = "; ".join(work.name for work in WORKLOADS if group in ("all", work.group))
        raise ValueError(
            f"no workload of group {group!r} matches {only!r} in mode {mode or 'any'!r}; there are: {names}"
        )
    return pairs
