"""``rnf reproduce cifar``: the staged network on CIFAR-10, vanilla and contractive, as a page with curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from matplotlib.figure import Figure  # without pyplot: no global state, no display

from robust_node_fast.reproduce import claims
from robust_node_fast.reproduce.cell import CellResult
from robust_node_fast.reproduce.claims import Rows, accuracies
from robust_node_fast.reproduce.grid import CIFAR_EPS, Cell
from robust_node_fast.reproduce.summary import Columns, as_table, by_row, table

__all__ = ["cifar_markdown", "cifar_picture"]

COLUMNS: Columns = (
    ("clean", "clean", 0.0),
    ("Gauss 0.1", "gaussian", 0.1),
    ("S&P 0.2", "salt_and_pepper", 0.2),
    *((f"{name.upper()} {255 * eps:.0f}/255", name, eps) for name in ("fgsm", "pgd") for eps in CIFAR_EPS),
    ("transfer 8/255", claims.TRANSFER, CIFAR_EPS[-1]),
    ("certified 2/255", "certified", CIFAR_EPS[0]),
)


def _rows(cells: Sequence[Cell], results: Mapping[str, CellResult]) -> Rows:
    return {row: found for part in by_row(cells, results).values() for row, found in part.items()}


def cifar_markdown(cells: Sequence[Cell], results: Mapping[str, CellResult], picture: str) -> str:
    """The page; ``picture`` is the name of the curves' file beside it."""
    return "\n".join(_lines(cells, _rows(cells, results), picture)) + "\n"


def _lines(cells: Sequence[Cell], rows: Rows, picture: str) -> Iterator[str]:
    config = cells[0].config
    schedule = "along half a cosine" if config.schedule == "cosine" else f"times {config.lr_decay:g} an epoch"
    samples = cells[0].attack_samples
    yield from ("# CIFAR-10", "", "Written by `rnf reproduce cifar`.", "")
    yield (
        f"The staged network (`StagedCIFARNode`) on the 50,000 training images: {config.epochs} epochs of batches of "
        f"{config.batch_size}, `--recipe large-batch` but for batch, learning rate ({config.lr:g} for "
        f"{config.lr_batch_size} images, {schedule}) and warm-up; contractive: penalty at rate "
        f"{config.rate:g}. Accuracy in % on the 10,000 test images; attacks "
        f"{f'on the first {samples} of them' if samples else 'on all of them'}, by l_inf radius; PGD has 40 steps; "
        "transfer: PGD on the other network; certified: bound E."
    )
    yield from (
        "",
        *as_table(table(rows, spread=True, columns=COLUMNS)),
        "",
        f"![Accuracy by epoch and by radius]({picture})",
    )
    yield from _found(rows)
    if rows and not any(
        "square" in check.name for found in rows.values() for cell in found for check in cell.report.checks
    ):
        yield ""
        yield (
            "These cells are from before evaluations were checked by a black box (Square): their last check is "
            "accuracy near 0 at a large radius, and no attack that sees no gradient was tried on these networks."
        )
    for row, found in rows.items():
        minutes = statistics.fmean(cell.train_seconds for cell in found) / 60
        first, middle, last = (
            100 * statistics.fmean(cell.accuracy_by_epoch[at] for cell in found)
            for at in (0, len(found[0].accuracy_by_epoch) // 2, -1)
        )
        yield ""
        yield (
            f"`{row}`: {minutes:.0f} minutes of training by the clock, pauses of the process and other work on the "
            f"machine included; clean accuracy {first:.1f}% after the first epoch, {middle:.1f}% in the middle, "
            f"{last:.1f}% at the end."
        )
        for cell in found:
            if not cell.report.reliable:
                yield from ("", f"**{row}: {cell.report.verdict}**")


def _found(rows: Rows) -> Iterator[str]:
    """What the penalty gains and costs, column by column, and whether anything is certified."""
    gains = []
    for heading, name, strength in COLUMNS:
        found = claims.pairs(rows, "cifar/contractive", "cifar/vanilla", name, strength)
        if found:
            gains.append(f"{heading} {statistics.fmean(ours - theirs for ours, theirs in found):+.1f}")
    if gains:
        yield from ("", f"Contractive against vanilla, in points: {', '.join(gains)}.")
    most = [max(accuracies(found, "certified", CIFAR_EPS[0]).values(), default=0.0) for found in rows.values()]
    if most and max(most) == 0.0:
        yield from ("", "No image is certified, so that no attack could contradict a certificate.")


def cifar_picture(cells: Sequence[Cell], results: Mapping[str, CellResult], target: str | Path | IO[bytes]) -> None:
    """Clean accuracy over the epochs; what noise-free attacks leave over their radius."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    epochs, radii = figure.subplots(1, 2)
    for number, (row, found) in enumerate(_rows(cells, results).items()):
        label, color = row.removeprefix("cifar/"), f"C{number}"
        for cell in found:
            curve = [100 * value for value in cell.accuracy_by_epoch]
            epochs.plot(range(1, len(curve) + 1), curve, color=color, label=label)
        for test, style in (("fgsm", "--"), ("pgd", "-")):
            means = [statistics.fmean(accuracies(found, test, eps).values()) for eps in CIFAR_EPS]
            clean = statistics.fmean(accuracies(found, "clean").values())
            at = (0.0, *(255 * eps for eps in CIFAR_EPS))
            radii.plot(at, (clean, *means), style, marker="o", markersize=3.5, color=color, label=f"{label}, {test}")
    epochs.set(xlabel="epoch", ylabel="accuracy on the test set, %")
    radii.set(xlabel="l_inf radius times 255", ylim=(0, 100))
    for axis in (epochs, radii):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, handlelength=3.5)
    figure.savefig(target, dpi=120)
