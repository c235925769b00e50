"""Parameters of which each process holds a part (FSDP2), and their tensors: to a part, and back to the whole.

Where nothing is sharded, every function here gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from robust_node_fast.nn import EulerConvFlow
from robust_node_fast.training.distributed import is_parallel, world_size

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["gathered", "local", "part_like", "parts_of", "shard", "whole"]


def shard(module: nn.Module, device: str) -> nn.Module:
    """Leave every process a part of each parameter on this device, of its gradient and its optimizer's state; in place.

    The parts come together for each step, those of a flow when the step reaches it, and stay together until backward is
    through with them: penalties read the filters behind the forward pass. Gradients are averaged.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    for part in (*(child for child in module.modules() if isinstance(child, EulerConvFlow)), module):
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    return module


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. All processes are to call this together."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """``whole`` of each, one after another and to the CPU, if there is anything to gather; for ``keep`` only.

    All processes are to call this together.
    """
    found = {}
    for name, tensor in tensors.items():
        all_of_it = whole(tensor)
        if keep:
            found[name] = all_of_it if all_of_it is tensor else all_of_it.cpu()
    return found


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def part_like(tensor: Tensor, other: Tensor | None) -> Tensor:
    """The part of a whole tensor that this process holds of ``other``."""
    if other is None or not _is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # No rank sends: every process has read the whole one.
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def parts_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a whole state dict that this process holds of the module's."""
    own = module.state_dict()
    return {name: part_like(tensor, own.get(name)) for name, tensor in tensors.items()}


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    if not is_parallel():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
