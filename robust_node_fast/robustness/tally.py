"""What an evaluation counts, line by line of its report, and the file from which a killed one goes on."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_node_fast.robustness.report import Example, Result
from robust_node_fast.training import checkpoint

__all__ = ["Progress", "Tally"]

SHOWN = 8  # images in the report
SAVE_SECONDS = 5.0


@dataclass(eq=False)
class Tally:
    """One line of the report: its random numbers, what it counted so far, and the first images of it."""

    name: str
    strength: float = 0.0
    measure: str = ""
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, Any] = field(default_factory=dict)
    shown: bool = False
    example: Example | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.generators = [random_numbers(seed, self.name, self.measure, self.strength) for seed in self.seeds]
        self.correct, self.seen = [0] * len(self.seeds), [0] * len(self.seeds)

    def classified(self, images: Tensor, labels: Tensor, predicted: Tensor, seed: int = 0) -> Tensor:
        """Which images ``(B,)`` were classified rightly; counted, and the first of them kept to be shown."""
        if self.shown and self.example is None:
            few = slice(SHOWN)
            classes = tuple(labels[few].tolist()), tuple(predicted[few].tolist())
            self.example = Example(self.result().label, images[few].cpu(), *classes)
        return self.count(predicted == labels, seed)

    def count(self, right: Tensor, seed: int = 0) -> Tensor:
        self.correct[seed] += int(right.sum())
        self.seen[seed] += len(right)
        return right

    @contextmanager
    def timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    @property
    def accuracy(self) -> float:
        return self.result().mean

    def result(self) -> Result:
        per_seed = tuple(correct / max(1, seen) for correct, seen in zip(self.correct, self.seen, strict=True))
        return Result(self.name, self.strength, per_seed, self.settings, self.measure, self.seconds)


def random_numbers(seed: int, name: str, measure: str, strength: float) -> torch.Generator:
    """Of a line of a report, its own: attacks with random starts shall not all begin at the same ones."""
    digest = hashlib.sha256(f"{seed} {name} {measure} {strength}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


class Progress:
    """All tallies of an evaluation in one file, whole at any moment and verified when read.

    Args:
        path: of the file.
        tallies: in an order that is the same each time.
        evaluation: a digest of all that decides what they count; a file with another one is not used.
    """

    def __init__(self, path: Path, tallies: Sequence[Tally], evaluation: str) -> None:
        self._path, self._tallies, self._evaluation = path, tallies, evaluation
        self._saved = time.monotonic()
        self.remarks: list[str] = []  # what AutoAttack's own checks found

    def restore(self) -> int:
        """Set the tallies to what the file says; the number of images it covers, 0 without a file that can be used."""
        if not self._path.exists():
            return 0
        try:
            tensors, state = checkpoint.load(self._path)
        except checkpoint.CheckpointError as error:
            warnings.warn(f"{error}: the evaluation starts again", stacklevel=3)
            return 0
        if state.get("evaluation") != self._evaluation:
            warnings.warn(f"{self._path} is of another evaluation: this one starts from the beginning", stacklevel=3)
            return 0
        for number, (tally, content) in enumerate(zip(self._tallies, state["tallies"], strict=True)):
            tally.correct, tally.seen, tally.seconds = content["correct"], content["seen"], content["seconds"]
            for seed, generator in enumerate(tally.generators):
                generator.set_state(tensors[f"{number}.generator.{seed}"])
            if content["example"] is not None:
                test, labels, predicted = content["example"]
                tally.example = Example(test, tensors[f"{number}.images"], tuple(labels), tuple(predicted))
        self.remarks[:] = state["remarks"]
        return int(state["images"])

    def save(self, images: int, *, now: bool = False) -> None:
        """Write the file, if the last time was ``SAVE_SECONDS`` ago or it must be ``now``."""
        if not now and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        tensors: dict[str, Tensor] = {}
        contents = []
        for number, tally in enumerate(self._tallies):
            for seed, generator in enumerate(tally.generators):
                tensors[f"{number}.generator.{seed}"] = generator.get_state()
            example = None
            if tally.example is not None:
                tensors[f"{number}.images"] = tally.example.images
                example = (tally.example.test, tally.example.labels, tally.example.predicted)
            contents.append(
                {"correct": tally.correct, "seen": tally.seen, "seconds": tally.seconds, "example": example}
            )
        state = {"evaluation": self._evaluation, "images": images, "tallies": contents, "remarks": self.remarks}
        checkpoint.save(self._path, tensors, state)
        self._saved = time.monotonic()
