"""Tables and curves of docs/zubov.md, from the committed results alone; what was not run is said to be not measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_node_fast.zubov import curves, experiments
from robust_node_fast.zubov.experiments import Cell, Exact, Images, Plane

__all__ = ["draw", "markdown"]

MISSING = "not measured"
Columns = tuple[tuple[str, str, float], ...]
Results = Sequence[Mapping[str, Any]]  # what cells' files hold


def _columns(part: str) -> Columns:
    """Heading, name of the result in a cell's file, strength."""
    small, middle, _ = experiments.EPS[part]
    low, mid = (f"{255 * eps:.0f}/255" if part == "cifar10" else f"{eps:g}" for eps in (small, middle))
    return (
        ("clean", "clean", 0.0),
        ("Gauss 0.2", "gaussian", 0.2),
        ("S&P 0.2", "salt_and_pepper", 0.2),
        (f"FGSM {mid}", "fgsm", middle),
        (f"PGD {low}", "pgd", small),
        (f"PGD {mid}", "pgd", middle),
        (f"margin PGD {mid}", "margin", middle),
        (f"AutoAttack {mid}", "autoattack", middle),
        (f"bare backbone {mid}", "pgd on bare backbone", middle),
        (f"worst of FGSM, PGD, transfer {mid}", "worst case", middle),
    )


ATTACKS = {"fgsm": "FGSM", "pgd": "PGD", "margin": "PGD on the margin"}


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """A PNG in ``folder`` for every part on images, and one for what is changed: those of which there are results."""
    drawn = []
    for part in experiments.PARTS[1:]:
        images = [cell for cell in cells if isinstance(cell, Images) and cell.part == part]
        rows = {row: _ended(images, row, folder) for row in dict.fromkeys(cell.row for cell in images)}
        methods = {row: found for row, found in rows.items() if found and ", " not in row}
        if methods:
            radii = (0.0, *experiments.EPS[part])
            series = {
                attack: {
                    method: [_all(found, *(("clean", 0.0) if eps == 0.0 else (name, eps))) for eps in radii]
                    for method, found in methods.items()
                }
                for name, attack in ATTACKS.items()
            }
            strongest = {method: _all(found, "autoattack", radii[2]) for method, found in methods.items()}
            drawn.append(folder / f"{part}.png")
            curves.over_radius(part, radii, series, {"AutoAttack": (radii[2], strongest)}, drawn[-1])
        of_zubov_nets = {row: found for row, found in rows.items() if found and row.split(", ")[0] == "zubov"}
        changed = {row.partition(", ")[2] or "all of it": found for row, found in of_zubov_nets.items()}
        if len(changed) > 2:
            chosen = [column for column in _columns(part) if column[1] in ("clean", "autoattack", "pgd")]
            bars = {heading: {row: _all(f, name, at) for row, f in changed.items()} for heading, name, at in chosen}
            drawn.append(folder / f"{part}_changed.png")
            curves.bars(f"Zubov-Nets on {part} with one thing changed", bars, drawn[-1])
    return drawn


def _ended(cells: Sequence[Images], row: str, folder: Path) -> Results:
    found = _found([cell for cell in cells if cell.row == row], folder)
    return [result for result in found if not result["refused"]]


def _all(found: Results, name: str, strength: float) -> list[float]:
    """In %, of every seed."""
    return [100.0 * value for result in found if (value := _value(result, name, strength)) is not None]


def markdown(cells: Sequence[Cell], folder: Path) -> str:
    """The tables of these cells, one below the other."""
    parts = []
    for cell in cells:
        if isinstance(cell, Exact):
            parts.append(["### A system that is solved", "", *_exact(cell, folder)])
    plane = [cell for cell in cells if isinstance(cell, Plane)]
    if plane:
        parts.append(["### In the plane", "", *_plane(plane, folder)])
    methods = [cell for cell in cells if isinstance(cell, Images) and not cell.change]
    if methods:
        parts.append(["### Learning rates and weights", "", *_settings(methods)])
    for part in experiments.PARTS[1:]:
        images = [cell for cell in cells if isinstance(cell, Images) and cell.part == part]
        chosen = [cell for cell in methods if cell.part == part]
        if chosen:
            parts.append([f"### {part}", "", *_images(chosen, folder)])
        if len(images) > len(chosen):
            changed = [cell for cell in images if cell.config.model == "zubov"]
            parts.append([f"### {part}, with one thing changed", "", *_images(changed, folder)])
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _exact(cell: Exact, folder: Path) -> Iterator[str]:
    yield "| | V, relative error | residual of the equation | V(t), error | IoU | IoU of simulated and disc |"
    yield "|---" * 6 + "|"
    found = experiments.read(cell, folder)
    numbers = [MISSING] * 5
    if found is not None:
        errors = [f"{found[name]:.0e}" for name in ("value_error", "residual", "decay_error")]
        numbers = [*errors, _iou(found["iou"]), _iou(found["iou_with_the_disc"])]
    yield f"| {cell.row} | {' | '.join(numbers)} |"


def _plane(cells: Sequence[Plane], folder: Path) -> Iterator[str]:
    headings = (
        "run",
        "seed",
        "steps",
        "IoU before",
        "IoU after",
        "in the network's steps",
        "shared",
        "accuracy",
        "in own region",
        "simulated to",
        "still moving",
    )
    yield f"| {' | '.join(headings)} | s |"
    yield "|---" * (len(headings) + 1) + "|"
    rows = list(dict.fromkeys(cell.row for cell in cells))
    for cell in sorted(cells, key=lambda cell: rows.index(cell.row)):  # the seeds of a run one below the other
        found = experiments.read(cell, folder)
        if found is None:
            values = [MISSING] * 9
        elif found["refused"]:
            values = [_iou(found["before"]["iou"]), f"stopped: {found['refused']}", *[""] * 6, _seconds(found)]
        else:
            after = found["after"]
            values = [
                _iou(found["before"]["iou"]),
                _iou(after["iou"]),
                _iou(after["iou_in_the_networks_steps"]),
                f"{after['shared']:.1%}",
                f"{after['accuracy']:.1%}",
                f"{after['in_own_region']:.1%}",
                f"{after['time']:g}",
                f"{after['moving']:.1%}",
                _seconds(found),
            ]
        yield f"| {cell.row} | {cell.config.seed} | {cell.config.steps} | {' | '.join(values)} |"


def _settings(cells: Sequence[Images]) -> Iterator[str]:
    """What was chosen on images that were held out."""
    parts = list(dict.fromkeys(cell.part for cell in cells))
    yield f"| method, weight of | {' | '.join(parts)} |"
    yield "|---" * (len(parts) + 1) + "|"
    names = {"contractive-node": "penalty", "lyanet": "penalty", "zubov": "consistency"}
    for method in dict.fromkeys(cell.row for cell in cells):
        found: dict[str, str] = {}
        for config in (cell.config for cell in cells if cell.row == method):
            weight = config.zubov.consistency if method == "zubov" else config.penalty_weight
            found[config.dataset] = f"{config.lr:g}" + (f", {weight:g}" if method in names else "")
        heading = f"{method}, {names[method]}" if method in names else method
        yield f"| {heading} | {' | '.join(found.get(part, '') for part in parts)} |"


def _images(cells: Sequence[Images], folder: Path) -> Iterator[str]:
    """Accuracies, what the states of Zubov-Nets do, and which rows have no results."""
    rows = {
        row: _found([cell for cell in cells if cell.row == row], folder) for row in dict.fromkeys(c.row for c in cells)
    }
    ended = {row: results for row, results in rows.items() if results}
    if ended:
        yield from _accuracies(ended, _columns(cells[0].part))
    found = {row: [result for result in results if result.get("regions")] for row, results in ended.items()}
    found = {row: results for row, results in found.items() if results}
    if found:
        yield from ("", *_regions(found))
    if missing := "; ".join(row for row in rows if row not in ended):
        yield from (*([""] if ended else []), f"Not measured: {missing}.")


def _accuracies(rows: Mapping[str, Results], columns: Columns) -> Iterator[str]:
    yield f"| method | seeds | {' | '.join(heading for heading, _, _ in columns)} | checks held |"
    yield "|---" * (len(columns) + 3) + "|"
    for method, ended in rows.items():
        found = [result for result in ended if not result["refused"]]
        if not found:
            what = f"stopped: {ended[0]['refused']}"
            yield f"| {method} | 0 | {' | '.join([what, *[MISSING] * len(columns)])} |"
            continue
        stopped = f" ({len(ended) - len(found)} stopped)" if len(ended) > len(found) else ""
        values = [_percent([v for r in found if (v := _value(r, name, at)) is not None]) for _, name, at in columns]
        held = sum(r["report"]["reliable"] for r in found)
        yield f"| {method} | {len(found)}{stopped} | {' | '.join(values)} | {held} of {len(found)} |"


def _regions(rows: Mapping[str, Results]) -> Iterator[str]:
    """What ``experiments`` says of a Zubov-Net's states and of its certificate, mean over seeds."""
    shares = {
        "inside_first": "x(0) in own region",
        "inside_others": "x(0) in another's region",
        "inside_last": "x(T) in own region",
        "falls": "steps in which own V falls",
        "stays": "in own region at time 200",
        "arrives": "own V < 0.1 at time 200",
    }
    of_the_network = (
        "x* with stable df/dx | pairs of regions that meet between their equilibria | median certified radius"
    )
    yield f"| states of a Zubov-Net | {' | '.join(shares.values())} | {of_the_network} |"
    yield "|---" * (len(shares) + 4) + "|"
    for row, found in rows.items():
        of_all = " | ".join(_percent([result[name] for result in found]) for name in ("attracting", "meeting"))
        radius = f"{statistics.fmean(result['certified']['median'] for result in found):.1e}"
        for name in ("train", "test"):
            values = [_percent([result["regions"][name][share] for result in found]) for share in shares]
            of = f"{row}, {name} images" if len(rows) > 1 else f"of {name} images"
            yield f"| {of} | {' | '.join(values)} | {of_all} | {radius if name == 'test' else ''} |"


def _found(cells: Sequence[Cell], folder: Path) -> Results:
    return [result for cell in cells if (result := experiments.read(cell, folder)) is not None]


def _value(found: Mapping[str, Any], name: str, strength: float) -> float | None:
    if name in ("margin", "autoattack"):
        return float(found[name][str(strength)])
    for result in found["report"]["results"]:
        if (result["name"], result["strength"]) == (name, strength):
            return float(result["mean"])
    return None


def _percent(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    return _number([100.0 * value for value in values])


def _number(percent: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(percent):.1f}" if percent[1:] else ""
    return f"{statistics.fmean(percent):.1f}{spread}"


def _iou(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _seconds(found: dict[str, Any]) -> str:
    return f"{found['seconds']:.0f}"
