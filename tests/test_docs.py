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
        flow = {(row["workload"], row["mode"], row["provider"]): row for row in csv.DictReader(file)}
    with (results / "mnist_epoch.csv").open() as file:
        epoch = {row["provider"]: float(row["seconds_per_epoch"]) for row in csv.DictReader(file)}
    ours, plain = epoch["robust_node_fast"], epoch["plain PyTorch"]

    def ratio(workload: str, mode: str, saving: bool = False, to: str = "best_pytorch_over_this") -> str:
        provider = "robust_node_fast, recompute=False" if saving else "robust_node_fast"
        return f"{float(flow[workload, mode, provider][to]):.1f}"

    mnist, cifar, eager = "MNIST net, B128", "CIFAR net, B16", "eager_over_this"
    forward, attack = ratio(mnist, "forward"), ratio(mnist, "input gradient", True)
    text = " ".join((ROOT / "README.md").read_text().split())
    for sentence in (
        f"**{plain / ours:.1f} times faster training**",
        f"takes {ours:.1f} s instead of {plain:.1f} s",
        f"**{forward} times faster flow, {attack} times faster attacks** than the best",
        f"{ratio(mnist, 'forward', to=eager)} and {ratio(mnist, 'input gradient', True, eager)} times against eager",
        f"batch 16: {ratio(cifar, 'forward')} and {ratio(cifar, 'input gradient', True)} times, "
        f"training {ratio(cifar, 'forward+backward', True)} times",
    ):
        assert sentence in text, sentence
