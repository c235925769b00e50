"""What can end a training run."""

from __future__ import annotations

import signal

__all__ = ["InUse", "Interrupted", "Refused", "RunError"]


class RunError(RuntimeError):
    """A run cannot go on; the message is one sentence that says why."""


class InUse(RunError):
    """Another process works in the folder."""


class Refused(RunError):
    """A guard ended training: a loss or gradient is not finite, or the objective says why it cannot go on."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM ended ``fit`` after a checkpoint; ``signal`` is its number."""

    def __init__(self, number: int, step: int, total: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step} of {total}")
        self.signal = number
