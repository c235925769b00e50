"""The model of the GPU kernels: its counts against PyTorch itself, and what must hold for any model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robust_node_fast.bench import model
from robust_node_fast.bench.providers import PlainFlow
from robust_node_fast.bench.resources import RESULTS, read

STATE = (3, 8, 6, 6)  # as many numbers as no filter has


class Counter(TorchDispatchMode):
    """States that each operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        found = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor) and t.shape == STATE]
        self.states.append((function.overloadpacket.__name__, len(found)))
        return result


def test_states_that_eager_pytorch_moves() -> None:
    steps = 3
    net = PlainFlow(torch.randn(steps, 8, 8, 3, 3), torch.randn(steps, 8), 0.1, trained=True)
    input, grad = torch.randn(STATE, requires_grad=True), torch.randn(STATE)
    with Counter() as forward:
        output = net(input)
    with Counter() as backward:
        torch.autograd.grad(output, [input, *net.parameters()], grad)
    counted = {"forward": sum(count for _, count in forward.states)}
    # One operation that is three kernels: two convolutions, and the sum that is the bias's gradient.
    convolution = sum(kernel.states for kernel in (model.CONVOLUTION, model.CONVOLUTION, model.Kernel(1)))
    others = sum(count for name, count in backward.states if name != "convolution_backward")
    assert sum(name == "convolution_backward" for name, _ in backward.states) == steps
    counted["training"] = counted["forward"] + others + steps * convolution
    for mode, found in counted.items():
        assert found == steps * sum(kernel.states for kernel in model.PASSES[mode]["eager"])


@pytest.fixture(scope="module")
def rows() -> list[model.Prediction]:
    return list(model.predictions(read(RESULTS)))


def test_nothing_is_faster_than_its_roofline(rows: list[model.Prediction]) -> None:
    assert len(rows) > 500
    for row in rows:
        assert row.ms > 0
        assert 0 < row.roofline_fraction <= 1, row


def test_twice_the_batch_takes_no_less_and_at_most_a_little_over_twice_as_long(rows: list[model.Prediction]) -> None:
    by = {(r.card, r.shape, r.dtype, r.mode, r.provider, r.batch): r.ms for r in rows}
    for (*key, batch), ms in by.items():
        twice = by.get((*key, 2 * batch))
        if twice is not None:
            assert ms * 0.999 <= twice <= 2.6 * ms, (key, batch)


def test_committed_table_is_the_model_of_now(rows: list[model.Prediction]) -> None:
    committed = RESULTS.with_name("gpu_model.csv").read_text().splitlines()[1:]
    now = [",".join(str(value) for value in vars(row).values()) for row in rows]
    assert [line.replace('"', "") for line in committed] == now
