"""Zubov-Net: a Neural ODE with K Lyapunov functions as its classifier; their regions become regions of attraction.

``ConvexLyapunov`` (the functions), ``value_and_derivative``, ``sample_boundary``, ``regions_that_meet``,
``zubov_losses``, ``ZubovNet`` and ``margin_radius`` (a certificate). ``reference`` has the straightforward versions.

Source: arXiv 2509.21879. Its equations are only known in outline; docstrings say what is our reading.
"""

from __future__ import annotations

from robust_node_fast.zubov import reference
from robust_node_fast.zubov.boundary import regions_that_meet, sample_boundary
from robust_node_fast.zubov.certificate import margin_certified, margin_radius
from robust_node_fast.zubov.derivative import value_and_derivative
from robust_node_fast.zubov.errors import Degenerate
from robust_node_fast.zubov.losses import zubov_losses, zubov_residual
from robust_node_fast.zubov.lyapunov import ConvexLyapunov
from robust_node_fast.zubov.network import DenseFlow, ZubovNet

__all__ = [
    "ConvexLyapunov",
    "Degenerate",
    "DenseFlow",
    "ZubovNet",
    "margin_certified",
    "margin_radius",
    "reference",
    "regions_that_meet",
    "sample_boundary",
    "value_and_derivative",
    "zubov_losses",
    "zubov_residual",
]
