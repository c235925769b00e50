"""The metrics of a run: JSON lines, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from robust_node_fast.training import checkpoint
from robust_node_fast.training.errors import RunError

__all__ = ["Metrics"]


class Metrics:
    """``metrics.jsonl`` (and TensorBoard), cut back to ``step`` when opened so that no step is written twice."""

    def __init__(self, path: Path, step: int, *, tensorboard: bool) -> None:
        self._writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise RunError(
                    f"--tensorboard needs the package tensorboard, which is not installed ({error})"
                ) from error
            self._writer = SummaryWriter(str(path.parent / "tensorboard"), purge_step=step + 1)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        checkpoint.replace_file(path, b"".join(line for line in lines if _step_of(line) <= step))
        self._file = open(path, "a")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, record: dict[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name in record.keys() - {"step"}:
                self._writer.add_scalar(name, record[name], record["step"])

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity for a line that a killed run left unfinished."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf
