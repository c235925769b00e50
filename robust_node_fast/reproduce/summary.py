"""The cells side by side: a table for every part, all numbers in one CSV file, a picture for every group of rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from robust_node_fast import training
from robust_node_fast.reproduce.cell import Stored
from robust_node_fast.robustness import Report
from robust_node_fast.training.checkpoint import replace_file

__all__ = ["by_part", "table", "write"]

Rows = Mapping[str, Sequence[Stored]]  # a row's cells, one for each seed

# Heading, name of the result (its start), strength.
COLUMNS = (
    ("clean", "clean", 0.0),
    ("Gauss 0.1", "gaussian", 0.1),
    ("Gauss 0.2", "gaussian", 0.2),
    ("Gauss 0.3", "gaussian", 0.3),
    ("S&P 0.2", "salt_and_pepper", 0.2),
    ("FGSM 0.1", "fgsm", 0.1),
    ("PGD 0.02", "pgd", 0.02),
    ("PGD 0.05", "pgd", 0.05),
    ("PGD 0.1", "pgd", 0.1),
    ("PGD 0.2", "pgd", 0.2),
    ("transfer 0.1", "pgd on ", 0.1),
    ("certified 0.02", "certified", 0.02),
)
FIELDS = ("init", "network", "regularizer", "norm", "rate", "penalty_weight", "step_size", "n_steps", "seed")
DRAWN = ("clean", "gaussian", "salt_and_pepper", "pgd", "certified")


def by_part(rows: Rows) -> Mapping[str, Rows]:
    """The rows of "grid", of "rho", ..."""
    parts: dict[str, dict[str, Sequence[Stored]]] = {}
    for row, cells in rows.items():
        parts.setdefault(row.split("/")[0], {})[row] = cells
    return parts


def table(rows: Rows, *, spread: bool) -> list[list[str]]:
    """Headings, then a line for every row: accuracies in %, means over its seeds (and their standard deviation)."""
    lines = [["row", *(heading for heading, _, _ in COLUMNS), "rate", "penalty", "seconds"]]
    for row, cells in rows.items():
        report = _merged(cells)
        accuracies = [
            f"{100 * result.mean:.1f}" + (f" ± {100 * result.std:.1f}" if spread and len(cells) > 1 else "")
            for _, name, strength in COLUMNS
            for result in report.results
            if result.strength == strength and _is(result.name, name)
        ]
        means = [
            statistics.fmean(values)
            for values in zip(*((cell.rate, cell.penalty, sum(cell.seconds.values())) for cell in cells), strict=True)
        ]
        lines.append([row, *accuracies, f"{means[0]:.3g}", f"{means[1]:.3g}", f"{means[2]:.0f}"])
    return lines


def write(rows: Rows, folder: Path, title: str) -> list[Path]:
    """``summary.md``, ``summary.csv`` and a picture for every group of rows (those that differ in their last word)."""
    from robust_node_fast.robustness.curves import plot_accuracy  # matplotlib takes a second to import

    with training.writing(folder):
        written = [folder / "summary.md", folder / "summary.csv"]
        pictures = []
        reports = {row: _merged(cells) for row, cells in rows.items()}
        for group, members in itertools.groupby(reports, key=lambda row: row.rpartition("/")[0]):
            pictures.append(f"{group.replace('/', '-')}.png")
            plot_accuracy({row.rpartition("/")[2]: _drawn(reports[row]) for row in members}, folder / pictures[-1])
        replace_file(written[0], _markdown(rows, title, pictures).encode())
        replace_file(written[1], _csv(rows).encode())
    return [*written, *(folder / picture for picture in pictures)]


def _is(name: str, wanted: str) -> bool:
    """A transferred attack's name ends with that of the network that it was found on."""
    return name.startswith(wanted) if wanted.endswith(" ") else name == wanted


def _merged(cells: Sequence[Stored]) -> Report:
    """One report for a row, with the training seeds in the place of the noise's."""
    first = cells[0].report
    tests = zip(*(cell.report.results for cell in cells), strict=True)
    return dataclasses.replace(
        first,
        results=tuple(dataclasses.replace(test[0], per_seed=tuple(result.mean for result in test)) for test in tests),
        checks=tuple(check for cell in cells for check in cell.report.checks),
    )


def _drawn(report: Report) -> Report:
    return dataclasses.replace(report, results=tuple(result for result in report.results if result.name in DRAWN))


def _markdown(rows: Rows, title: str, pictures: Sequence[str]) -> str:
    first = next(iter(rows.values()))
    lines = [
        f"# {title}",
        "",
        f"Accuracy in %, {first[0].report.n_samples} test images, mean and standard deviation over {len(first)} "
        "training seeds. Attacks by their l_inf radius; transfer: PGD found on the network of the same start and seed "
        "on the other side of the penalty; certified: bound E. Rate: the least over the Euler steps that the filters "
        "guarantee, in the norm of the row's penalty; penalty: at the rate asked for. Seconds: to train and evaluate.",
    ]
    lines += [line for note in first[0].report.notes for line in ("", note)]
    for part, members in by_part(rows).items():
        headings, *body = table(members, spread=True)
        lines += ["", f"## {part}", ""]
        lines += [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *body)]
        reports = {row: _merged(cells) for row, cells in members.items()}
        lines += [f"\n**{row}: {report.verdict}**" for row, report in reports.items() if not report.reliable]
    lines += ["", *(f"![{picture}]({picture})" for picture in pictures)]
    return "\n".join(lines) + "\n"


def _csv(rows: Rows) -> str:
    """One line for every row, seed and test; ``init`` to ``seed`` are fields of ``TrainConfig``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measured = ("test", "measure", "strength", "accuracy", "guaranteed_rate", "penalty", "train_seconds")
    writer.writerow(["row", *FIELDS, *measured])
    for row, cells in rows.items():
        for cell in cells:
            settings = [cell.settings["train"][name] for name in FIELDS]
            for result in cell.report.results:
                found = [result.name, result.measure, result.strength, result.mean]
                writer.writerow([row, *settings, *found, cell.rate, cell.penalty, cell.seconds["train"]])
    return text.getvalue()
