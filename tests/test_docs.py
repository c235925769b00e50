"""Every Python block in the README and docs/ runs as written, page by page."""

from __future__ import annotations

import csv
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
    results = ROOT / "bench" / "results"
    with (results / "flow.csv").open() as file:
        flow = {
            (row["workload"], row["mode"]): row for row in csv.DictReader(file) if row["provider"] == "robust_node_fast"
        }
    with (results / "mnist_epoch.csv").open() as file:
        epoch = {row["provider"]: float(row["seconds_per_epoch"]) for row in csv.DictReader(file)}
    ours, plain = epoch["robust_node_fast"], epoch["plain PyTorch"]
    forward, attack = flow["MNIST net, B128", "forward"], flow["MNIST net, B128", "input gradient"]

    def ratio(row: dict[str, str], key: str, digits: int = 1) -> str:
        return f"{float(row[key]):.{digits}f}"

    c32 = sorted(
        ratio(flow["C32, B32", mode], "best_pytorch_over_this", 2) for mode in ("forward+backward", "input gradient")
    )
    eager, best = "eager_over_this", "best_pytorch_over_this"
    text = " ".join((ROOT / "README.md").read_text().split())
    for sentence in (
        f"**{plain / ours:.1f} times faster training**",
        f"takes {ours:.1f} s instead of {plain:.1f} s",
        f"**{ratio(forward, eager)} times faster flow, {ratio(attack, eager)} times faster attacks**",
        f"{ratio(forward, best)} and {ratio(attack, best)} times against the best",
        f"is {c32[0]} to {c32[1]} times as fast as `torch.compile`",
        f"at 128 channels {ratio(flow['CIFAR net, B16', 'input gradient'], 'best_pytorch_over_this', 2)} (same file)",
    ):
        assert sentence in text, sentence
