"""Fast, robust convolutional Neural ODEs: fused Euler flows, contraction penalties, exact discrete gradients."""

from robust_node_fast._version import __version__  # isort: skip  (the back ends report it)
from robust_node_fast import functional, models, nn, reference
from robust_node_fast._backends import FallbackWarning, backend_info, set_backend

__all__ = [
    "FallbackWarning",
    "__version__",
    "backend_info",
    "functional",
    "models",
    "nn",
    "reference",
    "set_backend",
]
