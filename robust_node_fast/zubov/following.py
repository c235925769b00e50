"""States of a Zubov-Net followed far beyond its last step: do they stay in their regions and come to rest there?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robust_node_fast.zubov.network import ZubovNet

__all__ = ["Followed", "followed"]

TIMES = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
STEP_SIZE = 0.025


class Followed(NamedTuple):
    """``own``: V of the own class, ``other``: the smallest other V, ``(T, B)`` each, at the ``times``."""

    times: tuple[float, ...]
    own: Tensor
    other: Tensor


@torch.no_grad()
def followed(net: ZubovNet, input: Tensor, labels: Tensor) -> Followed:
    """V along ``dx/dt = f(x)`` from x(0) on, by Euler steps of 1/40; by the last f where each step has its own.

    Args:
        net: of two classes or more.
        input: ``(B, ...)``, as the backbone takes it.
        labels: ``(B,)`` int64.
    """
    state, own, other, step = net.features(input).flatten(1), [], [], 0
    for time in TIMES:
        while step < round(time / STEP_SIZE):
            state = state + STEP_SIZE * net.field_at(STEP_SIZE * step, state)
            step += 1
        value = net.lyapunov(state)
        own.append(value.gather(1, labels[:, None])[:, 0])
        other.append(value.scatter(1, labels[:, None], torch.inf).amin(1))
    return Followed(TIMES, torch.stack(own), torch.stack(other))
