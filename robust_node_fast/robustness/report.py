"""What an evaluation found, as a table, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Check", "Report", "Result"]


@dataclass(frozen=True)
class Result:
    """Accuracy under one corruption of one strength: per seed, with mean and (sample) standard deviation."""

    name: str  # "clean", "gaussian", "salt_and_pepper", "fgsm", "pgd"
    strength: float  # sigma, fraction or eps
    per_seed: tuple[float, ...]
    settings: dict[str, Any]

    @property
    def mean(self) -> float:
        return sum(self.per_seed) / len(self.per_seed)

    @property
    def std(self) -> float:
        """0 for a single seed."""
        if len(self.per_seed) == 1:
            return 0.0
        squares = sum((accuracy - self.mean) ** 2 for accuracy in self.per_seed)
        return float((squares / (len(self.per_seed) - 1)) ** 0.5)

    @property
    def label(self) -> str:
        return (
            self.name.replace("_", "-") if self.name == "clean" else f"{self.name.replace('_', '-')} {self.strength:g}"
        )


@dataclass(frozen=True)
class Check:
    """A relation that holds for every sound evaluation, and whether it held in this one."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """The results of ``evaluate``, the checks on them, and the settings that produced them."""

    suite: str
    n_samples: int
    results: tuple[Result, ...]
    checks: tuple[Check, ...]
    settings: dict[str, Any]

    def accuracy(self, name: str, strength: float = 0.0) -> float:
        """Mean accuracy of one result.

        Raises:
            KeyError: there is no such result.
        """
        for result in self.results:
            if result.name == name and result.strength == strength:
                return result.mean
        raise KeyError(f"no result {name!r} of strength {strength!r}, there are {[r.label for r in self.results]}")

    def to_markdown(self) -> str:
        lines = [
            f"Suite `{self.suite}`, {self.n_samples} images.",
            "",
            "| test | accuracy | spread over seeds | settings |",
            "|---|---|---|---|",
        ]
        for result in self.results:
            spread = f"{result.std:.2%} ({len(result.per_seed)} seeds)" if len(result.per_seed) > 1 else ""
            settings = ", ".join(f"{name} {_short(value)}" for name, value in result.settings.items())
            lines.append(f"| {result.label} | {result.mean:.2%} | {spread} | {settings} |")
        lines += ["", "| check | held | detail |", "|---|---|---|"]
        lines += [f"| {check.name} | {'yes' if check.passed else '**NO**'} | {check.detail} |" for check in self.checks]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        for entry, result in zip(content["results"], self.results, strict=True):
            entry |= {"mean": result.mean, "std": result.std}
        return json.dumps(content, indent=2)

    def plot(self, path: str | Path) -> None:
        """Accuracy against the strength of every noise and attack, as an image file; its suffix decides the format."""
        plot_accuracy({"": self}, path)


PANELS = (
    ("Gaussian sigma", ("gaussian",)),
    ("salt-and-pepper fraction", ("salt_and_pepper",)),
    ("eps", ("fgsm", "pgd")),
)


def plot_accuracy(reports: dict[str, Report], path: str | Path) -> None:
    """One panel per kind of corruption, one line per corruption and report; all lines start at the clean accuracy."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(4 * len(PANELS), 3.2), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (xlabel, names) in zip(axes, PANELS, strict=True):
        for number, (title, report) in enumerate(reports.items()):
            for name, style in zip(names, ("-", "--"), strict=False):
                points = [
                    (result.strength, result.mean, result.std) for result in report.results if result.name == name
                ]
                points = sorted({(0.0, report.accuracy("clean"), 0.0), *points})
                x, y, error = zip(*points, strict=True)
                label = " ".join(part for part in (title, name.replace("_", "-")) if part)
                axis.errorbar(x, y, error, label=label, linestyle=style, marker="o", color=f"C{number}", capsize=3)
        axis.set(xlabel=xlabel, ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("accuracy")
    figure.savefig(path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
