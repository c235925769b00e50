"""Certificates: perturbations that provably do not change a network's prediction. No attack can break one.

``linf_certified`` and ``linf_radius`` follow each sample's own bound through the network (``interval``), ``l2_radius``
multiplies Lipschitz constants (``lipschitz``), ``worst_case_logits`` train for a certificate. All work on the discrete
network as it is deployed: the same step size, the same number of steps.
"""

from __future__ import annotations

from robust_node_fast.certify.interval import linf_certified, linf_radius, worst_case_logits
from robust_node_fast.certify.lipschitz import LayerBound, l2_radius, layer_bounds, lipschitz_radius
from robust_node_fast.certify.summary import Summary, summarise

__all__ = [
    "LayerBound",
    "Summary",
    "l2_radius",
    "layer_bounds",
    "linf_certified",
    "linf_radius",
    "lipschitz_radius",
    "summarise",
    "worst_case_logits",
]
