"""Networks over the fused flow: the papers' three and ``StridedNode``. State dicts convert to the reference's and back.

Images are ``(B, in_channels, image_size, image_size)``, logits ``(B, num_classes)``, on any device, float32 as built.
``channels``, ``n_steps`` and ``step_size`` are the flow's; networks with stages take a width for each, and have as
many steps in all of them. Sizes that are no positive ints raise a ``TypeError`` or ``ValueError``.

Source: arXiv 2508.11432 and its authors' published settings; plain counterparts in ``robust_node_fast.reference``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.nn import EulerConvFlow, PadChannels, SmoothLeakyReLU, center_bias_

__all__ = ["CIFARNode", "MNISTNode", "StagedCIFARNode", "StridedNode"]


class _Node(nn.Module):
    """What the networks share: their flows, the penalty over all of them, and the reference's state dict."""

    _first_key: int  # number of the first Euler convolution in the reference's keys
    _key: str  # its keys: "conv" -> conv1.weight, "conv." -> conv.0.weight

    def layers(self) -> list[nn.Module]:
        """The layers whose composition is ``forward``, the linear head last: what a certificate walks through."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers():
            input = layer(input)
        return input

    def flows(self) -> list[tuple[str, EulerConvFlow]]:
        """Name and module of every flow, in the order of evaluation."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, EulerConvFlow)]

    def contraction_penalty(self, *, rate: float, norm: str = "2", reduction: str = "sum") -> Tensor:
        """``functional.contraction_penalty`` over all Euler steps' filters; ``"none"``: all channels in a row."""
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        flows = [flow for _, flow in self.flows()]
        if len(flows) == 1 and reduction != "none":
            return flows[0].contraction_penalty(rate=rate, norm=norm, reduction=reduction)
        excess = torch.cat(
            [flow.contraction_penalty(rate=rate, norm=norm, reduction="none").flatten() for flow in flows]
        )
        if reduction in ("sum", "mean"):
            return excess.mean() if reduction == "mean" else excess.sum()
        return excess

    def contraction_rate(self, *, norm: str = "2") -> Tensor:
        """``functional.contraction_rate`` of every Euler step, in the order of evaluation."""
        return torch.cat([flow.contraction_rate(norm=norm) for _, flow in self.flows()])

    def center_biases_(self) -> None:
        """``nn.center_bias_`` for every bias that an activation follows: a zero image starts as, and stays, zero."""
        for _, flow in self.flows():
            if flow.bias is not None:
                center_bias_(flow.bias, flow.negative_slope)

    def _reference_names(self) -> dict[str, tuple[str, int]]:
        """Reference key -> (own parameter, step) for every parameter of a flow."""
        names: dict[str, tuple[str, int]] = {}
        number = self._first_key
        for name, flow in self.flows():
            for step in range(flow.n_steps):
                for parameter in ("weight", "bias"):
                    names[f"{self._key}{number}.{parameter}"] = (f"{name}.{parameter}", step)
                number += 1
        return names

    def reference_state_dict(self) -> dict[str, Tensor]:
        """The state dict in the reference's layout: one convolution per Euler step."""
        own = self.state_dict()
        per_step = self._reference_names()
        stacked = {name for name, _ in per_step.values()}
        result = {name: value for name, value in own.items() if name not in stacked}
        result.update({key: own[name][step] for key, (name, step) in per_step.items()})
        return result

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a state dict in the reference's layout.

        Raises:
            ValueError: keys are missing or not expected, or a shape differs; the message names them. Nothing is
                loaded then.
        """
        own = self.state_dict()
        expected = self.reference_state_dict()
        # The authors' batch norm statistics may lack the batch counter, which evaluation does not use.
        missing = [key for key in expected if key not in state_dict and not key.endswith("num_batches_tracked")]
        unexpected = [key for key in state_dict if key not in expected]
        if missing or unexpected:
            raise ValueError(f"state_dict does not fit: missing {missing}, unexpected {unexpected}")
        wrong = [
            f"{key} has shape {tuple(state_dict[key].shape)}, expected {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state_dict and state_dict[key].shape != value.shape
        ]
        if wrong:
            raise ValueError(f"state_dict does not fit: {'; '.join(wrong)}")
        per_step = self._reference_names()
        with torch.no_grad():
            for key, value in state_dict.items():
                if key in per_step:
                    name, step = per_step[key]
                    own[name][step].copy_(value)
                else:
                    own[key].copy_(value)


class MNISTNode(_Node):
    """``fc1(flatten(flow(smooth_leaky_relu(conv0(x)))))``: 3x3 stem, ``n_steps`` Euler steps, linear head.

    Images in [0, 1].
    """

    _first_key, _key = 1, "conv"

    def __init__(
        self,
        channels: int = 8,
        n_steps: int = 10,
        step_size: float = 0.01,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.flow = EulerConvFlow(channels, n_steps, step_size)
        self.activation = SmoothLeakyReLU(self.flow.negative_slope)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(channels * image_size**2, num_classes)

    def layers(self) -> list[nn.Module]:
        return [self.conv0, self.activation, self.flow, self.flatten, self.fc1]

    def center_biases_(self) -> None:
        super().center_biases_()
        if self.conv0.bias is not None:
            center_bias_(self.conv0.bias, self.flow.negative_slope)


class CIFARNode(_Node):
    """``fc1(dropout(flatten(flow(dropout(bn(conv0(x)))))))``: one stage at full resolution."""

    _first_key, _key = 0, "conv."

    def __init__(
        self,
        channels: int = 128,
        n_steps: int = 16,
        step_size: float = 0.1,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.drop0 = nn.Dropout(0.1)
        self.flow = EulerConvFlow(channels, n_steps, step_size)
        self.flatten = nn.Flatten()
        self.drop1 = nn.Dropout(0.2)
        self.fc1 = nn.Linear(channels * image_size**2, num_classes)

    def layers(self) -> list[nn.Module]:
        return [self.conv0, self.bn, self.drop0, self.flow, self.flatten, self.drop1, self.fc1]


class StagedCIFARNode(_Node):
    """``bn(conv0(x))``, then stages of Euler steps; between them 2x2 average pooling and zero-padded channels.

    The filters of the flows start at zero.
    """

    _first_key, _key = 0, "conv."

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 112),
        n_steps: int = 6,
        step_size: float = 0.1,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.bn = nn.BatchNorm2d(channels[0])
        self.stages = nn.ModuleList(EulerConvFlow(width, n_steps, step_size) for width in channels)
        for _, flow in self.flows():
            nn.init.zeros_(flow.weight)
        self.pool = nn.AvgPool2d(2)
        self.pads = nn.ModuleList(PadChannels(width) for width in channels[1:])
        side = image_size // 2 ** (len(channels) - 1)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(channels[-1] * side**2, num_classes)

    def layers(self) -> list[nn.Module]:
        first, *later = self.stages
        between = [layer for pad, stage in zip(self.pads, later, strict=True) for layer in (self.pool, pad, stage)]
        return [self.conv0, self.bn, first, *between, self.flatten, self.fc1]


class StridedNode(_Node):
    """``fc1(s(fc0(flatten(z))))`` behind stages ``z = flow(s(conv(z)))`` whose convolutions halve the image.

    Without batch normalisation, so that bound E can be trained. Images in [0, 1].

    Source: this project's, for certified training (docs/certify.md).
    """

    _first_key, _key = 0, "conv."

    def __init__(
        self,
        channels: Sequence[int] = (16, 32),
        n_steps: int = 1,
        step_size: float = 1.0,
        hidden_features: int = 48,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        before = (in_channels, *channels[:-1])
        pairs = zip(before, channels, strict=True)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.stages = nn.ModuleList(EulerConvFlow(width, n_steps, step_size) for width in channels)
        self.activation = SmoothLeakyReLU()
        side = image_size
        for _ in channels:
            side = (side + 1) // 2
        self.flatten = nn.Flatten()
        self.fc0 = nn.Linear(channels[-1] * side**2, hidden_features)
        self.fc1 = nn.Linear(hidden_features, num_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with intervals as wide behind a layer as in front of it, and biases 0.

        With ``std = sqrt(2 pi) / fan_in`` the magnitudes of a row's weights add up to 2, and an activation halves what
        a ReLU would. Flows, which add to the state, start with a third of that. The first layer has four times as much,
        as smooth leaky ReLU is nearly linear at small numbers; the last one takes it back.

        Source: arXiv 2103.17268 for the first sentence; the rest by experiment.
        """
        for layer in (*self.downs, *self.stages, self.fc0, self.fc1):
            if isinstance(layer, EulerConvFlow):
                scale, fan_in = 0.3 / layer.n_steps, layer.weight[0, 0].numel()
            else:
                scale = {self.downs[0]: 4.0, self.fc1: 0.25}.get(layer, 1.0)
                fan_in = layer.weight[0].numel()
            layer.weight.normal_(0.0, scale * math.sqrt(2.0 * math.pi) / fan_in)
            layer.bias.zero_()

    def layers(self) -> list[nn.Module]:
        pairs = zip(self.downs, self.stages, strict=True)
        stages = [layer for down, flow in pairs for layer in (down, self.activation, flow)]
        return [*stages, self.flatten, self.fc0, self.activation, self.fc1]


Model = MNISTNode | CIFARNode | StagedCIFARNode | StridedNode
