"""``summarise``: how much of a data set is certified, at given radii and at which radius each sample is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.certify.interval import linf_certified, linf_radius
from robust_node_fast.certify.lipschitz import l2_radius

__all__ = ["Summary", "summarise"]

NORMS = ("linf", "l2")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_BATCH = 128


@dataclass(frozen=True)
class Summary:
    """What ``summarise`` found; fractions of all samples."""

    norm: str
    n_samples: int
    clean: float
    certified: dict[float, float]  # eps -> fraction that no perturbation of norm eps can turn
    radius_mean: float
    radius_quantiles: dict[float, float]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


@torch.no_grad()
def summarise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[float] = (0.1,),
    norm: str = "linf",
    tolerance: float = 0.01,
    radius: Callable[[Tensor, Tensor], Tensor] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Summary:
    """Clean and certified accuracy, and the certified radii of all samples (0 where the prediction is wrong).

    Args:
        model: as in ``linf_certified``.
        images, labels: ``(n, ...)`` and ``(n,)``.
        eps: radii at which to certify.
        norm: ``"linf"`` (bound E), or ``"l2"``: for each sample the better of Lipschitz constants and bound E, whose
            radius holds in l_2 too, as no perturbation is larger in l_inf than in l_2.
        tolerance: relative, of the radii by bound E.
        radius: ``radius(x, y) -> (B,)``, below which a perturbation in that norm changes nothing, instead of the
            bounds here (``zubov.margin_radius`` of a Zubov-Net).
        on_batch: called with the number of samples done.

    Raises:
        TypeError, ValueError: as ``linf_certified``; no sample; unknown ``norm``; no ``eps``.
    """
    _checks.choice("norm", norm, NORMS)
    if not len(eps):
        raise ValueError("eps is empty, expected at least one radius")
    for value in eps:
        _checks.number("eps", value)
        if value < 0:
            raise ValueError(f"eps={value!r} is negative, expected a radius")
    if not len(images):
        raise ValueError("data is empty, expected at least one image")
    radii, correct, counts = [], 0, dict.fromkeys(map(float, eps), 0)
    for x, y in zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True):
        if radius is not None:
            found = radius(x, y)
        else:
            found = linf_radius(model, x, y, tolerance=tolerance)
            if norm == "l2":
                by_constants = l2_radius(model, x, y)
                found = torch.maximum(found, by_constants)
        for value in counts:
            if radius is not None:
                certified = found > value
            else:
                certified = linf_certified(model, x, y, value)
                if norm == "l2":
                    certified = certified | (by_constants >= value)
            counts[value] += int((certified & (found > 0)).sum())
        correct += int((model(x).argmax(1) == y).sum())
        radii.append(found)
        if on_batch is not None:
            on_batch(sum(map(len, radii)))
    found, n = torch.cat(radii), len(labels)
    quantiles = torch.quantile(found, torch.tensor(QUANTILES, dtype=found.dtype, device=found.device)).tolist()
    return Summary(
        norm,
        n,
        correct / n,
        {value: count / n for value, count in counts.items()},
        found.mean().item(),
        dict(zip(QUANTILES, quantiles, strict=True)),
    )
