"""Fast, robust convolutional Neural ODEs: fused Euler flows, contraction penalties, exact discrete gradients."""

from __future__ import annotations

import importlib
from types import ModuleType

from robust_node_fast import certify, functional, jacobian, models, nn, reference, zubov
from robust_node_fast._backends import FallbackWarning, backend_info, set_backend
from robust_node_fast._version import __version__

__all__ = [
    "FallbackWarning",
    "__version__",
    "backend_info",
    "certify",
    "data",
    "functional",
    "jacobian",
    "models",
    "nn",
    "reference",
    "robustness",
    "set_backend",
    "training",
    "zubov",
]

# Imported at their first use: they need packages that an importer of the layers alone should not pay for.
_LAZY = ("data", "robustness", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
