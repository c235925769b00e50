"""Batch normalisation over the batches of all processes, on the CPU too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robust_node_fast.training.distributed import total

__all__ = ["SyncBatchNorm2d", "synchronize_batch_norm_"]


def synchronize_batch_norm_(model: nn.Module, device: str) -> None:
    """Let every ``nn.BatchNorm2d`` take its statistics over all processes, in place; the state dict stays the same."""
    for name, child in model.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            synchronize_batch_norm_(child, device)
        elif torch.device(device).type == "cuda":
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
        else:
            synchronized = SyncBatchNorm2d(child.num_features, child.eps, child.momentum)
            synchronized.load_state_dict(child.state_dict())
            setattr(model, name, synchronized)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` for the CPU, where that one refuses to run.

    Mean, then variance, are sums over all processes in float64, through which gradients flow. Input ``(B, C, H, W)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x, over = input.float(), (0, 2, 3)
        count = total(torch.tensor(input.numel() // input.shape[1]))
        mean = _Total.apply(x.sum(over, dtype=torch.float64)) / count
        centred = x - mean.float()[:, None, None]
        var = _Total.apply(centred.square().sum(over, dtype=torch.float64)) / count
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean.float(), momentum)  # type: ignore[union-attr]
            self.running_var.lerp_((var * count / (count - 1)).float(), momentum)  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        scale = self.weight * (var + self.eps).rsqrt().float()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class _Total(torch.autograd.Function):
    """``total`` of a copy; its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return total(input.clone())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return total(grad_output.clone())
