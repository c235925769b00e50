"""What an evaluation found: as a table, as JSON, as a plot and as a page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Check", "Example", "Report", "Result"]


@dataclass(frozen=True)
class Result:
    """Accuracy under one corruption of one strength: per seed, with mean and (sample) standard deviation."""

    name: str  # "clean", a noise, an attack, "worst case" over clean and all attacks, "certified"
    strength: float
    per_seed: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    measure: str = ""  # what the strength is: "sigma", "l_inf eps", ...
    seconds: float = field(default=0.0, compare=False)  # that it took, over all images and seeds

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
        name = self.name.replace("_", "-")
        return f"{name}, {self.measure} {self.strength:g}" if self.measure else name


@dataclass(frozen=True)
class Check:
    """A relation that holds for every sound evaluation, and whether it held in this one."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Example:
    """A few images under one corruption ``(n, C, H, W)``, their labels, and what the model took them for."""

    test: str  # a result's label
    images: Tensor
    labels: tuple[int, ...]
    predicted: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """The results of ``evaluate``, the checks on them, and the settings that produced them."""

    suite: str
    n_samples: int
    results: tuple[Result, ...]
    checks: tuple[Check, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()  # what was left out, and why
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)  # contraction rate of every step, by norm
    examples: tuple[Example, ...] = field(default=(), compare=False)

    @property
    def reliable(self) -> bool:
        """Every check held. Otherwise the attacks may have failed rather than the model resisted."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        failed = [check.name for check in self.checks if not check.passed]
        if failed:
            return f"UNRELIABLE: {len(failed)} of {len(self.checks)} checks failed ({'; '.join(failed)})."
        return f"All {len(self.checks)} checks held."

    def accuracy(self, name: str, strength: float = 0.0, measure: str | None = None) -> float:
        """Mean accuracy of one result; ``measure`` tells apart attacks of one name in two norms.

        Raises:
            KeyError: there is no such result, or more than one.
        """
        found = [
            result.mean
            for result in self.results
            if (result.name, result.strength) == (name, strength) and measure in (None, result.measure)
        ]
        if len(found) != 1:
            what = "no result" if not found else "more than one result"
            raise KeyError(f"{what} {name!r} of strength {strength!r}, there are {[r.label for r in self.results]}")
        return found[0]

    def to_markdown(self) -> str:
        verdict = self.verdict if self.reliable else f"**{self.verdict}**"
        lines = [
            f"Suite `{self.suite}`, {self.n_samples} images. {verdict}",
            "",
            "| test | accuracy | spread over seeds | settings |",
            "|---|---|---|---|",
        ]
        for result in self.results:
            lines.append(f"| {result.label} | {result.mean:.2%} | {spread(result)} | {settings(result)} |")
        lines += ["", "| check | held | detail |", "|---|---|---|"]
        lines += [f"| {check.name} | {'yes' if check.passed else '**NO**'} | {check.detail} |" for check in self.checks]
        if self.rates:
            lines += ["", "| contraction rate of step | " + " | ".join(f"norm {norm}" for norm in self.rates) + " |"]
            lines += ["|---" * (len(self.rates) + 1) + "|"]
            for step, rates in enumerate(zip(*self.rates.values(), strict=True), start=1):
                lines.append(f"| {step} | " + " | ".join(f"{rate:.4g}" for rate in rates) + " |")
        lines += [line for note in self.notes for line in ("", note)]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of ``to_json``, which keeps no example images.

        Raises:
            KeyError, TypeError, ValueError: not such a report.
        """
        content = json.loads(text)
        results = [
            Result(r["name"], r["strength"], tuple(r["per_seed"]), r["settings"], r["measure"], r["seconds"])
            for r in content["results"]
        ]
        return cls(
            content["suite"],
            content["n_samples"],
            tuple(results),
            tuple(Check(**check) for check in content["checks"]),
            content["settings"],
            tuple(content["notes"]),
            {norm: tuple(rates) for norm, rates in content["rates"].items()},
        )

    def to_json(self) -> str:
        content = {
            "suite": self.suite,
            "n_samples": self.n_samples,
            "reliable": self.reliable,
            "results": [asdict(result) | {"mean": result.mean, "std": result.std} for result in self.results],
            "checks": [asdict(check) for check in self.checks],
            "settings": self.settings,
            "notes": self.notes,
            "rates": self.rates,
        }
        return json.dumps(content, indent=2)

    def to_html(self, title: str = "Robustness report") -> str:
        """One page that needs nothing else: curves, tables, checks, example images."""
        from robust_node_fast.robustness import page

        return page.render(self, title)

    def plot(self, path: str | Path) -> None:
        """Accuracy against the strength of every noise and attack, as an image file; its suffix decides the format."""
        from robust_node_fast.robustness import curves

        curves.plot_accuracy({"": self}, path)


def spread(result: Result) -> str:
    return f"{result.std:.2%} ({len(result.per_seed)} seeds)" if len(result.per_seed) > 1 else ""


def settings(result: Result) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.settings.items()
    )
