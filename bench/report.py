"""The results as Markdown: one line a row of this package, and the figures that the project is judged by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .registry import OURS, SAVING, TIMED
from .rows import Row

NCNN = "ncnn (convolution only)"


def markdown(rows: Sequence[Row]) -> str:
    """Both tables, then what was not measured and why."""
    ours = [row for row in rows if row.provider in (OURS, SAVING) and row.cost]
    lines = table(
        ("workload", "mode", "dtype", "threads", "ours", "eager / ours", "best PyTorch / ours", "sgemm share", "error"),
        (
            (
                row.workload,
                row.mode + row.provider.removeprefix(OURS),
                row.dtype,
                str(row.threads),
                f"{row.cost:.4g} {'MB' if row.mode == 'memory' else 'ms'}",
                ratio(row.eager_over_this),
                ratio(row.best_pytorch_over_this),
                ratio(row.gemm_share),
                "" if row.error is None else f"{row.error:.1e}",
            )
            for row in ours
        ),
    )
    lines += ["", *table(("the project's figures", "ratio"), ((name, ratio(value)) for name, value in figures(rows)))]
    excluded = [row for row in rows if row.status != "ok"]
    reasons = dict.fromkeys(
        f"{row.workload}, {row.mode}" if row.status.startswith("skipped") else f"{row.provider}: {row.status}"
        for row in excluded
    )
    if excluded:
        lines += ["", f"{len(excluded)} rows without a measurement:", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join(lines)


def figures(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    """Name and ratio of every bar that these rows have: the other's time over ours, unless the name says otherwise."""
    ours = {(r.workload, r.mode, r.threads): r for r in rows if r.provider == OURS and r.cost}
    saving = {(r.workload, r.mode, r.threads): r for r in rows if r.provider == SAVING and r.cost}
    costs = {(r.workload, r.mode, r.threads, r.provider): r.cost for r in rows if r.cost}
    for (name, mode, threads), row in ours.items():
        against: dict[str, float | None] = {}
        if row.group == "bars" and mode in TIMED:
            if row.n_steps > 1 and row.batch > 1:
                against["best PyTorch"] = row.best_pytorch_over_this
            for peer in ("penalty loop", NCNN, *(("eager",) if name == "MNIST net, B1" else ())):
                cost = costs.get((name, mode, threads, peer))
                against[peer] = cost and row.cost and cost / row.cost
            if (name, mode, threads) in saving and mode in TIMED:
                against["best PyTorch, recompute=False"] = saving[name, mode, threads].best_pytorch_over_this
        if row.sweep == "threads" and threads > 1:
            one = costs.get((name, mode, 1, OURS))
            against[f"1 thread over {threads}"] = one and row.cost and one / row.cost
        yield from ((f"{name}, {mode}: {peer}", ratio) for peer, ratio in against.items() if ratio)
    rates = {row.threads: row.gemm_gflops for row in rows if row.sweep == "threads" and row.gemm_gflops}
    yield from ((f"sgemm, 1 thread over {n}", rate / rates[1]) for n, rate in rates.items() if n > 1 and 1 in rates)
    peaks = {key[0]: row.cost for key, row in ours.items()}
    for batch in (32, 512):
        few, many = peaks.get(f"memory, B{batch} N8"), peaks.get(f"memory, B{batch} N64")
        if few and many:
            yield f"training memory of {batch} samples, N=64 over N=8 (less is better)", many / few
    ratios = {key: row.best_pytorch_over_this for key, row in ours.items() if key[1] in TIMED}
    known = {key: ratio for key, ratio in ratios.items() if ratio}
    if known:
        name, mode, threads = worst = min(known, key=lambda key: known[key])
        yield f"worst row ({name}, {mode}, {threads} threads): best PyTorch", known[worst]


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def replace_tables(page: Path, tables: Mapping[str, Sequence[str]]) -> None:
    """Puts the lines of each table between ``<!-- NAME -->`` and ``<!-- end -->`` of the page.

    Raises:
        ValueError: the page has no place for one.
    """
    text = page.read_text()
    for name, lines in tables.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        if found is None:
            raise ValueError(f"{page} has no place for the table {name}")
        text = text[: found.start(1)] + "\n".join(["", *lines, "", ""]) + text[found.end(1) :]
    page.write_text(text)
