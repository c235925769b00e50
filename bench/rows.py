"""One row of the results and the CSV they are kept in."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

AnyRow = TypeVar("AnyRow")


@dataclass
class Row:
    """One provider on one workload, mode and number of threads. ``None`` is an empty cell.

    Attributes:
        status: ``ok``, or why there is no time: ``not installed: ...``, or ``wrong``, ``failed`` or ``skipped``.
        rounds: interleaved rounds; each is the mean of ``repeats`` calls.
        p20_ms, p50_ms, p80_ms: quantiles over the rounds, of one call.
        eager_over_this, best_pytorch_over_this: ratios of medians within the row's threads (of peaks for memory); the
            best PyTorch provider is that of the same run.
        gflops: floating-point operations of direct convolutions per time.
        gemm_share: the same over the machine's sgemm rate; Winograd and bfloat16 can exceed 1.
        compile_s: until the first result: preparing, compiling, first call. Compilers find kernels that earlier rows
            of the run compiled.
        peak_mb: growth of the resident memory during a call; for the mode ``memory`` in a fresh process.
        saved_mb: what autograd keeps for the backward pass, parameters left out (mode ``memory``).
        error: largest error against float64, relative to the largest value.
        gemm_gflops, bandwidth_gbs: the machine's, measured at the start of the run with the row's threads.
    """

    group: str
    workload: str
    mode: str
    dtype: str
    provider: str
    status: str
    sweep: str
    batch: int
    channels: int
    height: int
    width: int
    n_steps: int
    threads: int
    machine: str
    torch: str
    robust_node_fast: str
    provider_version: str
    time: str
    rounds: int | None = None
    repeats: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    eager_over_this: float | None = None
    best_pytorch_over_this: float | None = None
    gflops: float | None = None
    gemm_share: float | None = None
    compile_s: float | None = None
    peak_mb: float | None = None
    saved_mb: float | None = None
    error: float | None = None
    gemm_gflops: float | None = None
    bandwidth_gbs: float | None = None

    @property
    def cost(self) -> float | None:
        """What the ratios compare: milliseconds, or megabytes."""
        return self.peak_mb if self.mode == "memory" else self.p50_ms


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write(rows: Iterable[Any], path: Path, kind: type[Any] = Row) -> None:
    """Replaces the file in one go: an interrupted run leaves the old one. ``kind``: the rows' dataclass."""
    columns = [field.name for field in dataclasses.fields(kind)]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([_cell(getattr(row, name)) for name in columns] for row in rows)
    os.replace(partial, path)


def read(path: Path) -> list[Row]:
    """The rows of a CSV that ``write`` wrote.

    Raises:
        ValueError: a column is missing.
    """
    return read_as(Row, path)


def read_as(kind: type[AnyRow], path: Path) -> list[AnyRow]:
    """The same of rows of another dataclass, whose fields are text, integers and floats, empty or not."""
    types = get_type_hints(kind)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        lacking = set(types) - set(reader.fieldnames or ())
        if lacking:
            raise ValueError(f"{path} has no columns {', '.join(sorted(lacking))}: written by another version?")
        return [kind(**{name: _value(types[name], cells[name]) for name in types}) for cells in reader]


def _value(type_: Any, cell: str) -> Any:
    if type_ is str:
        return cell
    if not cell:
        return None
    return int(cell) if type_ in (int, int | None) else float(cell)
