"""The HTML report: well formed, complete, and in need of nothing but itself, which a real browser confirms."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from robust_node_fast import cli, robustness
from robust_node_fast.robustness import Check, Example, Report, Result

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"br", "img", "meta"}


def report(passed: bool = True) -> Report:
    images = torch.linspace(-0.5, 1.5, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)  # not clipped, as noise leaves them
    return Report(
        suite="full",
        n_samples=2,
        results=(
            Result("clean", 0.0, (0.9,)),
            Result("gaussian", 0.2, (0.5, 0.7), measure="sigma"),
            Result("salt_and_pepper", 0.2, (0.6, 0.6), measure="fraction of pixels"),
            Result("pgd", 0.1, (0.25,), {"step_size": 0.00625, "n_steps": 40}, measure="l_inf eps"),
            Result("pgd on <b>&", 0.1, (0.75,), measure="l_inf eps"),
            Result("worst case", 0.1, (0.25,), measure="l_inf eps"),
        ),
        checks=(Check("eps 0 = clean", passed, "2 of 2"),),
        settings={"eps": [0.1]},
        notes=("AutoAttack was not run.",),
        rates={"2": (-1.5, 2.25), "inf": (0.5, 3.125)},
        examples=(
            Example("clean", images.clamp(0, 1), (3, 4), (3, 4)),
            Example("gaussian, sigma 0.2", images[:, :1], (3, 4), (3, 7)),
            Example("pgd, l_inf eps 0.1", images[:, :2], (3, 4), (8, 9)),
        ),
    )


class Strict(HTMLParser):
    """Every element is closed in order; collects attributes and the text of every element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.setdefault(self.open[-1], []).append(data.strip())


def test_page_is_well_formed_and_needs_nothing_else() -> None:
    page = report().to_html("mnist <script>")
    parsed = Strict(page)
    assert parsed.text["title"] == ["mnist <script>"]
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in parsed.found)
    sources = [attributes["src"] for _, attributes in parsed.found if "src" in attributes]
    assert len(sources) == 1 + 6  # the curves, three examples of two images
    for source in sources:
        assert source is not None
        kind, content = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    assert not any({"href", "srcset", "data", "action", "onload"} & attributes.keys() for _, attributes in parsed.found)
    assert not re.search(r"https?:|url\(|@import|src=.?//", page)
    assert "default-src 'none'" in page  # the browser would refuse anything else


def test_page_says_everything() -> None:
    text = Strict(report().to_html()).text
    assert text["h1"] == ["Robustness report"]
    assert text["h2"] == [
        "Accuracy against strength",
        "Accuracies",
        "Checks",
        "Contraction rate of every step",
        "Examples",
        "Settings",
    ]
    for cell in (
        "salt-and-pepper, fraction of pixels 0.2",
        "60.00%",
        "14.14% (2 seeds)",
        "step_size 0.00625, n_steps 40",
        "pgd on <b>&, l_inf eps 0.1",
        "eps 0 = clean",
        "3.125",
    ):
        assert cell in text["td"], cell
    assert text["span"] == ["3 → 3", "4 → 4", "3 → 3", "4 → 7", "3 → 8", "4 → 9"]
    assert any("AutoAttack was not run." in words for words in text["p"])
    assert "All 1 checks held." in text["p"]


def test_page_shouts_where_a_check_failed() -> None:
    page = report(passed=False).to_html()
    (verdict,) = (
        attributes for tag, attributes in Strict(page).found if attributes.get("class", "").startswith("verd")
    )
    assert verdict["class"] == "verdict unreliable"
    assert "UNRELIABLE: 1 of 1 checks failed (eps 0 = clean)." in page
    assert report().to_html().count("unreliable") == 1  # in the style alone


def test_page_without_rates_and_examples() -> None:
    bare = Report("quick", 1, (Result("clean", 0.0, (1.0,)), Result("pgd", 0.1, (0.5,), measure="l_inf eps")), (), {})
    assert Strict(bare.to_html()).text["h2"] == ["Accuracy against strength", "Accuracies", "Checks", "Settings"]


def evaluated_by_the_command(tmp_path: Path) -> str:
    """What ``rnf evaluate --suite full`` writes about a network of a run on digits."""
    run = tmp_path / "run"
    train = ["train", "--dataset", "digits", "--network", "vanilla", "--set", "steps=2", "--out", str(run)]
    evaluate = ["evaluate", str(run), "--suite", "full", "--samples", "4", "--eps", "0.5", "--eps-l2", "4"]
    for command in (train, evaluate):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, done.output
    (page,) = run.rglob("report.html")
    return page.read_text(encoding="utf-8")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine: the page was only parsed")
@pytest.mark.parametrize(
    ("write", "pictures", "cell"),
    [
        (lambda _: report().to_html(), 7, "salt-and-pepper, fraction of pixels 0.2"),
        (evaluated_by_the_command, None, "pgd-margin, l_2 eps 4"),
    ],
)
def test_page_in_a_browser(write: Callable[[Path], str], pictures: int | None, cell: str, tmp_path: Path) -> None:
    """A copy counts its own pictures once they are loaded; no request leaves the page, whatever it might ask for."""
    assert BROWSER is not None
    page = write(tmp_path)
    policy, count = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>"), "document.images"
    script = (
        f"onload = () => document.title = [...{count}].filter(i => i.naturalWidth).length + ' of ' + {count}.length"
    )
    changed, number = policy.subn("", page)
    assert number == 1
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "counted.html").write_text(changed.replace("</head>", f"<script>{script}</script></head>"), "utf-8")

    def browse(*options: str) -> subprocess.CompletedProcess[str]:
        common = ("--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")
        command = [BROWSER, *common, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    dom = browse("--dump-dom", (tmp_path / "counted.html").as_uri()).stdout
    expected = pictures or page.count("<img ")
    assert expected > 5
    assert f"<title>{expected} of {expected}</title>" in dom
    assert cell in dom
    shot = browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=800,600", (tmp_path / "page.html").as_uri())
    assert "Content Security Policy" not in shot.stderr  # nothing on the page as shipped was refused
    from torchvision.io import decode_image

    assert len(decode_image(str(tmp_path / "page.png")).flatten(1).unique(dim=1).T) > 50  # colours: no blank page


def test_report_of_an_evaluation_shows_its_first_images() -> None:
    class Bright(torch.nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            mean = input.mean((1, 2, 3))
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    images = torch.rand(12, 1, 5, 5)
    labels = (images.mean((1, 2, 3)) > 0.5).long()
    found = robustness.evaluate(Bright().eval(), (images, labels), suite="quick", eps=(0.1, 1.0), seeds=[0])
    assert [example.test for example in found.examples] == [
        "clean",
        "gaussian, sigma 0.2",
        "fgsm, l_inf eps 1",
        "pgd, l_inf eps 1",
    ]
    clean, _, fgsm, _ = found.examples
    assert torch.equal(clean.images, images[:8])
    assert clean.predicted == clean.labels == tuple(labels[:8].tolist())
    assert fgsm.predicted == tuple((1 - labels[:8]).tolist())
    sign = torch.where(labels[:8, None, None, None] == 0, 1.0, -1.0)
    near, far = ((images[:8] + eps * sign).clamp(0.0, 1.0) for eps in (0.1, 1.0))
    fell = (near.mean((1, 2, 3)) > 0.5).long() != labels[:8]
    # An image is shown as the smallest radius broke it.
    assert torch.equal(fgsm.images, torch.where(fell[:, None, None, None], near, far))
