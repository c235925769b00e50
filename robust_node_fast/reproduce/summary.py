"""The cells side by side, as a page: a table for every part, what initialisation and penalty do, the paper's claims."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robust_node_fast.reproduce import claims
from robust_node_fast.reproduce.cell import CellResult
from robust_node_fast.reproduce.claims import Rows, accuracies, pairs
from robust_node_fast.reproduce.grid import FULL_EPS, INITS, NORMS, SEEDS, STRICT_EPS, Cell
from robust_node_fast.robustness import auto_attack
from robust_node_fast.training import TrainConfig

__all__ = ["as_table", "by_row", "failed_at", "markdown", "table"]

# Heading, name of the result (or how it begins), strength.
Columns = tuple[tuple[str, str, float], ...]
COLUMNS: Columns = (
    ("clean", "clean", 0.0),
    ("Gauss 0.1", "gaussian", 0.1),
    ("Gauss 0.2", "gaussian", 0.2),
    ("Gauss 0.3", "gaussian", 0.3),
    ("S&P 0.2", "salt_and_pepper", 0.2),
    ("FGSM 0.1", "fgsm", 0.1),
    ("PGD 0.02", "pgd", 0.02),
    ("PGD 0.05", "pgd", 0.05),
    ("PGD 0.1", "pgd", 0.1),
    ("transfer 0.1", claims.TRANSFER, 0.1),
    ("worst case 0.1", "worst case", 0.1),
    ("certified 0.02", "certified", 0.02),
)
# Without transfer: rows on the two sides of the penalty are attacked through different networks.
CONTRASTED = tuple(
    column
    for column in COLUMNS
    if column[0] not in ("Gauss 0.1", "FGSM 0.1", "PGD 0.1", "transfer 0.1", "worst case 0.1")
)
COSTS = ("clean", "noise", "fgsm", "pgd", "transfer", "certified")
PARTS = {
    "grid": "Initialisation and penalty: `grid/INITIALISATION/PENALTY`",
    "rho": "The rate asked for: `rho/INITIALISATION/RHO`",
    "gamma": "The weight of the penalty: `gamma/WEIGHT`",
    "steps": "Step size and number of steps: `steps/PENALTY/...`",
    "jacobian": "The Jacobian regulariser",
    "certified": "Trained for certificates: `rnf train --recipe certified`",
    "strict": "The grid through the paper's vanilla network: `strict/INITIALISATION/PENALTY`",
    "full": "Stronger attacks (suite `full`): `full/NETWORK`",
}
# The last part again, with what it is for, beside the paper's recipe.
CERTIFIED_FOR = {"digits": 0.05, "mnist": 0.1, "fashionmnist": 0.05}  # l_inf radius
BEATEN = ("certified", "grid/authors/2", "grid/default/2", "grid/default/none")
STRONGER = (
    ("clean", "clean", 0.0),
    ("Gauss 0.1", "gaussian", 0.1),
    ("Gauss 0.2", "gaussian", 0.2),
    ("Gauss 0.3", "gaussian", 0.3),
    ("S&P 0.05", "salt_and_pepper", 0.05),
    ("S&P 0.2", "salt_and_pepper", 0.2),
    ("FGSM 0.1", "fgsm", 0.1),
    ("PGD 0.02", "pgd", 0.02),
    ("PGD 0.05", "pgd", 0.05),
    ("PGD 0.1", "pgd", 0.1),
    ("PGD 0.2", "pgd", 0.2),
    ("worst case 0.1", "worst case", 0.1),
    ("worst case 0.2", "worst case", 0.2),
    ("certified 0.05", "certified", 0.05),
    ("certified 0.1", "certified", 0.1),
    ("certified 0.2", "certified", 0.2),
)
STRICT: Columns = (
    ("clean", "clean", 0.0),
    *(
        (f"{heading} {eps:g}", name, eps)
        for heading, name in (
            ("PGD", "pgd"),
            ("transfer", claims.TRANSFER),
            ("worst case", "worst case"),
            ("certified", "certified"),
        )
        for eps in STRICT_EPS
    ),
)
# Of the full suite; PGD has five restarts there, on the cross-entropy and on the margin.
STRONGEST: Columns = (
    ("clean", "clean", 0.0),
    *((f"{heading} {by:g}", name, by) for heading, name, by in (("uniform", "uniform", 0.3), ("shot", "shot", 0.3))),
    *(
        (f"{heading} 0.1", name, 0.1)
        for heading, name in (
            ("FGSM", "fgsm"),
            ("PGD", "pgd"),
            ("margin PGD", "pgd_margin"),
            ("transfer", claims.TRANSFER),
            ("Square", "square"),
            ("AutoAttack", "autoattack"),
        )
    ),
    *((f"{name} {eps:g}", name, eps) for eps in FULL_EPS for name in ("worst case", "certified")),
)
LIMITED = "Attacks ran on the first "  # how the note of a report begins, see robustness.evaluate
# By how many points a network may fall behind one that it dominates, or has to be ahead.
CLEAN_MAY_LOSE = 0.5
DOMINATED = tuple(
    column for column in STRONGER if column[0] in ("Gauss 0.2", "Gauss 0.3", "PGD 0.1", "PGD 0.2", "certified 0.1")
)


def by_row(cells: Sequence[Cell], results: Mapping[str, CellResult]) -> dict[str, dict[str, list[CellResult]]]:
    """Part -> row -> the results there are, seed by seed, in the order of ``cells``; ``results`` by cells' names."""
    done = {cell.row for cell in cells if cell.name in results}
    parts: dict[str, dict[str, list[CellResult]]] = {}
    for cell in cells:
        if cell.row in done:
            found = parts.setdefault(cell.row.split("/")[0], {}).setdefault(cell.row, [])
            if cell.name in results:
                found.append(results[cell.name])
    return parts


def table(rows: Rows, *, spread: bool, columns: Columns = COLUMNS) -> list[list[str]]:
    """Headings, then a line for every row: accuracies in %, means over its seeds (and their standard deviation)."""
    lines = [["row", "seeds", *(heading for heading, _, _ in columns), "rate", "penalty"]]
    for row, cells in rows.items():
        found = [_mean(list(accuracies(cells, name, by).values()), spread) for _, name, by in columns]
        rate, penalty = (statistics.fmean(getattr(cell, name) for cell in cells) for name in ("rate", "penalty"))
        lines.append([row, str(len(cells)), *found, f"{rate:.3g}", f"{penalty:.3g}"])
    return lines


def markdown(cells: Sequence[Cell], results: Mapping[str, CellResult]) -> str:
    """The page. ``cells`` are those that it is about, of one or more data sets; it names the ones without a result."""
    lines = [
        "# The paper's experiments, reproduced",
        "",
        "Written by `rnf reproduce`; `docs/reproduce.md` says what is compared and how it is measured.",
        "",
        "Accuracy in % on the full test set (under attack on fewer images where it says so above a table), mean and "
        "standard deviation over training seeds. Noises by their "
        "strength, attacks by their l_inf radius, where an image that fell at a smaller radius has fallen: accuracies "
        "under PGD cannot rise with it; FGSM's can, as its step may turn a wrong answer right. PGD has 40 steps from "
        "one random start (suite `standard`); transfer: PGD on the network of the same initialisation and seed on the "
        "other side of the penalty (in `strict`: on default/none), every iterate of it; worst case: images that "
        "survive all of these attacks, which are the weaker ones: no margin loss, no restarts, no black box "
        "(docs/robustness.md); certified: bound E. "
        "Nowhere is the whole test set under everything: the margin loss, restarts, Square and AutoAttack are in "
        "`full` alone, on the first images, and attacks in l_2 in none of these tables. "
        "Rate: the least over the Euler steps that the filters guarantee, in the norm of the row's penalty; penalty: "
        "its value at the rate asked for (the certified recipe asks for none).",
    ]
    found = [results[cell.name] for cell in cells if cell.name in results]
    if found:
        versions = (
            sorted({result.version for result in found}),
            sorted({result.report.settings["torch"] for result in found}),
        )
        lines += ["", "Computed with robust_node_fast {} and PyTorch {}.".format(*map(", ".join, versions))]
    for dataset, group in itertools.groupby(cells, key=lambda cell: cell.config.dataset):
        lines += _dataset(dataset, list(group), results)
    return "\n".join(lines) + "\n"


def _dataset(dataset: str, cells: Sequence[Cell], results: Mapping[str, CellResult]) -> Iterator[str]:
    parts = by_row(cells, results)
    rows = {row: found for part in parts.values() for row, found in part.items()}
    names = {cell.name for cell in cells}
    found = [results[name] for name in sorted(names & results.keys())]
    yield from ("", f"## {dataset}", "", f"{len(found)} of {len(names)} cells.")
    yield from _older_checks(found)
    yield from (line for sentence in _in_short(rows, dataset) for line in ("", f"- {sentence}"))
    if found:
        verdicts = [
            (verdict.claim, verdict.compared, str(verdict.seeds), verdict.found, _emphasised(verdict))
            for verdict in claims.verdicts(rows, dataset)
        ]
        headings = ("claim", "compared", "seeds", "found", "verdict")
        yield from ("", "### The paper's claims", "", *as_table((headings, *verdicts)), "", claims.RULES)
        why = [f"- {reason}" for reason in claims.reasons(rows)]
        yield from ("", "### Why", "", *why) if why else ()
    for part, members in parts.items():
        compared = {row: rows[row] for row in BEATEN if row in rows} if part == "certified" else members
        columns = {"certified": STRONGER, "strict": STRICT, "full": STRONGEST}.get(part, COLUMNS)
        limited = _limited(compared)
        yield from ("", f"### {PARTS[part]}", "")
        yield from (limited, "") if limited else ()
        yield from as_table(table(compared, spread=True, columns=columns))
        if part == "certified":
            yield from (line for paper in BEATEN[1:3] for line in _dominance(rows, paper))
            yield from _refuted(rows)
        yield from (line for note in _notes(members, said=limited) for line in ("", note))
        for row, cell in ((row, cell) for row, cells in members.items() for cell in cells if not cell.report.reliable):
            yield from ("", f"**{row}, seed {cell.settings['train']['seed']}: {cell.report.verdict}**")
        if part == "grid":
            yield from (
                "",
                "### What the penalty does, and what the initialisation does",
                "",
                *as_table(_contrasts(members)),
            )
            yield from (
                "",
                "Differences in points between rows that differ in this alone (in the row of the paper: in both), "
                "seed by seed: the mean over the other setting, in brackets the least and the most of its means.",
            )
    if found:
        yield from ("", "### Cost and epochs", "", *_cost(found))
    yield from _missing(cells, parts, results)


def _in_short(rows: Rows, dataset: str) -> Iterator[str]:
    """What the tables come to, as far as there are cells."""
    against = [("authors/2", "default"), ("authors/none", "default"), *((f"{init}/2", init) for init in INITS)]
    gains = [
        [ours - theirs for ours, theirs in pairs(rows, f"grid/{row}", f"grid/{init}/none", "pgd", 0.02)]
        for row, init in against
    ]
    if all(gains):
        paper, start, *penalties = map(statistics.fmean, gains)
        alone = ", ".join(f"{gain:+.1f} from {init}" for gain, init in zip(penalties, INITS, strict=True))
        yield (
            "Accuracy under PGD at 0.02, in points against a vanilla network of PyTorch's initialisation: the paper's "
            f"network {paper:+.1f}, its initialisation alone {start:+.1f}. Its penalty alone, against a vanilla "
            f"network of the same initialisation: {alone}."
        )
    ours = rows.get("certified", ())
    if ours:
        eps = CERTIFIED_FOR[dataset]
        clean, kept, held = (
            statistics.fmean(accuracies(ours, name, at).values())
            for name, at in (("clean", 0.0), ("pgd", eps), ("certified", eps))
        )
        yield (
            f"Trained for certificates: {clean:.1f}% clean, {kept:.1f}% under PGD at {eps:g}, {held:.1f}% certified "
            "there, by a larger network and in more epochs. Its settings were chosen with test accuracies in sight "
            "(docs/certify.md)."
        )
    unreliable = sum(not cell.report.reliable for found in rows.values() for cell in found)
    if unreliable:
        yield f"Evaluations with a check that failed, which are named below their tables: {unreliable}."


def _dominance(rows: Rows, paper: str) -> Iterator[str]:
    """Whether the certified network is as good as the paper's on clean images, and better at everything harder."""
    clean, *gains = (
        [ours - theirs for ours, theirs in pairs(rows, "certified", paper, name, by)]
        for _, name, by in (COLUMNS[0], *DOMINATED)
    )
    if not clean:
        return
    behind = ["clean"] if statistics.fmean(clean) < -CLEAN_MAY_LOSE else []
    behind += [heading for (heading, _, _), gain in zip(DOMINATED, gains, strict=True) if statistics.fmean(gain) <= 0.0]
    found = [f"{heading} {_range(gain)}" for (heading, _, _), gain in zip(DOMINATED, gains, strict=True)]
    verdict = f"does not dominate it: behind at {', '.join(behind)}" if behind else "dominates it"
    yield ""
    gained = ", ".join([f"clean {_range(clean)}", *found])
    lower = [f"{heading} {_range(gain)}" for heading, gain in _others(rows, paper) if statistics.fmean(gain) < 0.0]
    yield (
        f"Against `{paper}`, in points ({len(clean)} of {SEEDS} seeds): {gained}. The certified network {verdict} "
        f"(clean within {CLEAN_MAY_LOSE:g} points, the others higher, by their means). "
        + (f"Not asked for there, and lower: {', '.join(lower)}." if lower else "Nothing else in the table is lower.")
    )


def _refuted(rows: Rows) -> Iterator[str]:
    """Where suite ``full`` failed a check on the certified network: PGD's accuracies say too much there."""
    full = rows.get("full/certified", ())
    failed = sorted(eps for eps in failed_at(full) if eps in FULL_EPS)
    if failed:
        left = ", ".join(
            f"{_mean(list(accuracies(full, 'worst case', eps).values()), False)}% at {eps:g}" for eps in failed
        )
        yield ""
        yield (
            f"PGD's accuracies of the certified network say too much at {', '.join(f'{eps:g}' for eps in failed)}: "
            f"there a check of suite `full` failed, under which it keeps {left} (of the first "
            f"{full[0].settings['attack_samples']} images, seeds: {len(full)})."
        )


def failed_at(found: Sequence[CellResult]) -> set[float]:
    """The l_inf radii at which a check of one of the reports failed."""
    return {
        float(at[1])
        for cell in found
        for check in cell.report.checks
        if not check.passed and (at := re.search(r" at l_inf eps (\S+)$", check.name))
    }


def _others(rows: Rows, paper: str) -> Iterator[tuple[str, list[float]]]:
    """What the certified network gains in the columns that the verdict leaves out."""
    for heading, name, by in STRONGER[1:]:
        gain = [ours - theirs for ours, theirs in pairs(rows, "certified", paper, name, by)]
        if gain and (heading, name, by) not in DOMINATED:
            yield heading, gain


def _emphasised(verdict: claims.Verdict) -> str:
    return f"**{verdict.verdict}**" if verdict.seeds >= SEEDS or not verdict.seeds else verdict.verdict


def _compares_accuracies(cell: CellResult) -> bool:
    return any(check.name.startswith("white box") and "%" in check.detail for check in cell.report.checks)


def _at_largest_alone(cell: CellResult) -> bool:
    """Whether a black box was tried at one of several radii."""
    tried = sum(check.name.startswith("white box <= square") for check in cell.report.checks)
    return 0 < tried < len(cell.settings["eps"])


def _network(cell: CellResult) -> dict[str, Any]:
    """Its training settings; those that a cell does not know yet are at their defaults."""
    return TrainConfig(**cell.settings["train"]).settings()


def _older_checks(found: Sequence[CellResult]) -> Iterator[str]:
    """Which cells have milder checks for masked gradients than the present ones; how many networks are tried again."""
    by_accuracy, at_largest = (list(filter(kind, found)) for kind in (_compares_accuracies, _at_largest_alone))
    said = []
    if by_accuracy:
        said.append(
            f"{len(by_accuracy)} of them are from before the checks for masked gradients were made stricter: theirs "
            "compare accuracies under white box and transfer instead of images, and no black box was tried on them."
        )
    if at_largest:
        said.append(
            f"On {len(at_largest)} a black box was tried at the largest radius alone, where often hardly an image is "
            "left to break."
        )
    if said:
        older = [*by_accuracy, *at_largest]
        checked = [_network(cell) for cell in found if cell not in older]
        again = sum(_network(cell) in checked for cell in older)
        said.append(f"The networks of {again} of these were tried again under the present checks, in another part.")
        yield from ("", " ".join(said))


def _limited(rows: Rows) -> str:
    """Which columns of a table are of the first images only, if those of all its rows are."""
    cells = [cell for found in rows.values() for cell in found]
    shared = set.intersection(*(set(cell.report.notes) for cell in cells))
    note = next((note for note in shared if note.startswith(LIMITED)), "")
    return note and (
        f"{note} In this table the attacks and the worst case are of these images alone; clean accuracy, noises and "
        f"certified are of all {cells[0].report.n_samples}."
    )


def _notes(rows: Rows, said: str) -> Iterator[str]:
    """Notes of the reports that were not ``said``, with the networks' names where not all have it.

    Of a network, what differs in numbers alone is one note: AutoAttack's remarks, which older reports have by radius.
    """
    notes: dict[str, list[str]] = {}
    for row, cells in rows.items():
        for cell in cells:
            mine = notes.setdefault(f"{row}, seed {cell.settings['train']['seed']}", [])
            for note in cell.report.notes:
                auto_attack.add_remark(mine, note)
    for note in sorted({note for mine in notes.values() for note in mine if note not in said}):
        having = [name for name, mine in notes.items() if note in mine]
        yield note if len(having) == len(notes) else f"{'; '.join(having)}: {note}"


def _missing(cells: Sequence[Cell], parts: Mapping[str, Rows], results: Mapping[str, CellResult]) -> Iterator[str]:
    """Seeds without a result by row, or by part where it has none at all."""
    seeds: dict[str, set[int]] = {}
    for cell in cells:
        part = cell.row.split("/")[0]
        missing = seeds.setdefault(cell.row if part in parts else f"{part}, every row", set())
        if cell.name not in results:
            missing.add(cell.config.seed)
    seeds = {row: missing for row, missing in seeds.items() if missing}
    if seeds:
        yield from ("", "### Cells that are missing", "")
        yield from (f"- `{row}`: seed {', '.join(map(str, sorted(missing)))}" for row, missing in seeds.items())


def _contrasts(rows: Rows) -> list[list[str]]:
    """Of the full grid: one line for every change of a setting, averaged over the other one."""
    penalties = ("none", *NORMS)
    changes = {
        f"penalty {norm} instead of none": [(f"grid/{init}/{norm}", f"grid/{init}/none") for init in INITS]
        for norm in NORMS
    }
    changes |= {
        f"initialisation {init} instead of default": [
            (f"grid/{init}/{name}", f"grid/default/{name}") for name in penalties
        ]
        for init in INITS[1:]
    }
    changes |= {
        "in the paper: authors/2 instead of default/none": [("grid/authors/2", "grid/default/none")],
        "of this, the initialisation: authors/none instead of default/none": [
            ("grid/authors/none", "grid/default/none")
        ],
        "of this, the penalty: authors/2 instead of authors/none": [("grid/authors/2", "grid/authors/none")],
    }
    lines = [["change", "pairs", *(heading for heading, _, _ in CONTRASTED)]]
    for change, compared in changes.items():
        gains = [
            [statistics.fmean(ours - theirs for ours, theirs in seeds) for seeds in column if seeds]
            for column in ([pairs(rows, *pair, name, by) for pair in compared] for _, name, by in CONTRASTED)
        ]
        lines.append([change, f"{len(gains[0])} of {len(compared)}", *map(_range, gains)])
    return lines


def _cost(found: Sequence[CellResult]) -> Iterator[str]:
    """Where the time went, and what fewer epochs would have reached."""
    seconds = {
        "training": statistics.median(cell.train_seconds for cell in found),
        **{kind: statistics.median(_seconds(cell, kind) for cell in found) for kind in COSTS},
    }
    total = sum(cell.seconds for cell in found)
    parts = ", ".join(f"{kind} {value:.0f}" for kind, value in seconds.items())
    threads = " or ".join(map(str, sorted({cell.report.settings["threads"] for cell in found})))
    yield f"{total / 3600:.1f} hours by the clock for these cells, pauses of the process and other work on the machine"
    yield f"included, on {threads} threads. Medians, in seconds: {parts}."
    curves = {cell.accuracy_by_epoch for cell in found}  # rows may share a network
    for last in sorted({len(curve) for curve in curves if len(curve) > 3}):
        short = [100.0 * (curve[-1] - curve[2]) for curve in curves if len(curve) == last]
        within = sum(value <= 0.3 for value in short)
        yield ""
        yield (
            f"Of {len(short)} networks trained for {last} epochs: clean accuracy at the end exceeds that after epoch 3 "
            f"by {_range(short)} points; {within} were within 0.3 points after epoch 3."
        )


def _seconds(cell: CellResult, kind: str) -> float:
    return sum(result.seconds for result in cell.report.results if _kind(result.name, result.measure) == kind)


def _kind(name: str, measure: str) -> str:
    if name.startswith(claims.TRANSFER):
        return "transfer"
    return "noise" if measure and not measure.endswith("eps") else name


def _mean(values: Sequence[float], spread: bool) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if spread and values[1:] else "")


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):+.1f}" + (f" ({min(values):+.1f} to {max(values):+.1f})" if values[1:] else "")


def as_table(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Headings and lines as Markdown."""
    headings, *body = lines
    for line in (headings, ["---"] * len(headings), *body):
        yield f"| {' | '.join(line)} |"
