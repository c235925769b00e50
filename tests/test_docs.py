"""Every Python block in the README and docs/ runs as written, page by page."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named = re.findall(r"`((?:csrc|tests|bench|examples|docs|robust_node_fast)/[\w./]+)`", text)
    missing = [name for name in linked if not (page.parent / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing, missing


def test_figures_of_the_readme_come_from_the_committed_results() -> None:
    results, mnist, cifar = ROOT / "bench" / "results", "MNIST net, B128", "CIFAR net, B16"
    saving = "robust_node_fast, recompute=False"

    def epoch(folder: Path) -> tuple[float, float]:
        with (folder / "mnist_epoch.csv").open() as file:
            seconds = {row["provider"]: float(row["seconds_per_epoch"]) for row in csv.DictReader(file)}
        return seconds["robust_node_fast"], seconds["plain PyTorch"]

    def ratios(folder: Path, column: str, *of: tuple[str, str, str]) -> list[str]:
        with (folder / "flow.csv").open() as file:
            rows = {(row["workload"], row["mode"], row["provider"]): row for row in csv.DictReader(file)}
        return [f"{float(rows[which][column]):.1f}" for which in of]

    def of_mnist(attack: str) -> tuple[tuple[str, str, str], ...]:
        return (mnist, "forward", "robust_node_fast"), (mnist, "input gradient", attack)

    of_cifar = (
        (cifar, "forward", "robust_node_fast"),
        (cifar, "input gradient", saving),
        (cifar, "forward+backward", saving),
    )
    best = "best_pytorch_over_this"
    ours, plain = epoch(results)
    forward, attack, *wide = ratios(results, best, *of_mnist("robust_node_fast"), *of_cifar)
    to_eager = ratios(results, "eager_over_this", *of_mnist("robust_node_fast"))
    intel = results / "intel_amx"
    old_ours, old_plain = epoch(intel)
    old = ratios(intel, best, *of_mnist(saving), *of_cifar)
    cells = ROOT / "docs" / "results" / "mnist" / "cells"

    def accuracies(row: str) -> dict[tuple[str, float], str]:
        (path,) = cells.glob(f"mnist-default-{row}-seed0-*.json")
        found = json.loads(path.read_text())["report"]["results"]
        return {(result["name"], result["strength"]): f"{100 * result['mean']:.1f}%" for result in found}

    certified, paper = accuracies("certified"), accuracies("2")
    text = " ".join((ROOT / "README.md").read_text().split())
    for sentence in (
        f"classifies {certified['clean', 0.0]} of the clean images, {certified['pgd', 0.1]} under PGD-40",
        f"{certified['certified', 0.1]} are certified there; of the paper's recipe PGD leaves {paper['pgd', 0.1]}",
        f"**{plain / ours:.1f} times faster training**",
        f"takes {ours:.1f} s instead of {plain:.1f} s",
        f"**{forward} times faster flow, {attack} times faster attacks** than the best",
        f"{to_eager[0]} and {to_eager[1]} times against eager",
        f"batch 16: {wide[0]} and {wide[1]} times, training {wide[2]} times",
        f"AMX: {old_plain / old_ours:.1f} times; {old[0]} and {old[1]}; {old[2]}, {old[3]} and {old[4]}",
    ):
        assert sentence in text, sentence
