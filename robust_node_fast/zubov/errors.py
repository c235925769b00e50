"""What can make Lyapunov functions or states useless."""

from __future__ import annotations

__all__ = ["Degenerate"]


class Degenerate(ValueError):
    """Nothing can be learned from these any more: states, f or V are not finite, V is flat, or all the same.

    The trainer ends a run of which a loss says so; any other ``ValueError`` is a mistake in a call.
    """
