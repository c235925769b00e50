"""The report as one HTML page that loads nothing: pictures are data URIs, styles are inline, there are no scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor
from torchvision.io import encode_png

from robust_node_fast.robustness import curves
from robust_node_fast.robustness.report import Example, Report, settings, spread

__all__ = ["render"]

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
.verdict { padding: .6rem 1rem; border-left: .4rem solid #2a7d46; background: #eaf6ee; }
.verdict.unreliable { border-color: #b3261e; background: #fdecea; font-weight: bold; }
.wide { overflow-x: auto; }
img.curves { max-width: 100%; }
table { border-collapse: collapse; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.failed, .fooled { color: #b3261e; font-weight: bold; }
.examples td { text-align: center; padding: .2rem; }
.examples img { width: 4.5rem; image-rendering: pixelated; display: block; margin: 0 auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="verdict{{ '' if report.reliable else ' unreliable' }}">{{ report.verdict }}</p>
<p>Suite {{ report.suite }}, {{ report.n_samples }} images.{% for note in report.notes %} {{ note }}{% endfor %}</p>
<h2>Accuracy against strength</h2>
<p><img class="curves" alt="accuracy against eps and sigma" src="{{ curves }}"></p>
<h2>Accuracies</h2>
<div class="wide"><table class="results">
<thead><tr><th>test</th><th>accuracy</th><th>spread over seeds</th><th>settings</th></tr></thead>
<tbody>
{% for result in report.results %}
<tr><td>{{ result.label }}</td><td class="number">{{ percent(result.mean) }}</td><td>{{ spread(result) }}</td>
<td>{{ settings(result) }}</td></tr>
{% endfor %}
</tbody></table></div>
<h2>Checks</h2>
<div class="wide"><table class="checks">
<thead><tr><th>check</th><th>held</th><th>detail</th></tr></thead>
<tbody>
{% for check in report.checks %}
<tr><td>{{ check.name }}</td><td{% if not check.passed %} class="failed"{% endif %}>
{{ 'yes' if check.passed else 'NO' }}</td><td>{{ check.detail }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if report.rates %}
<h2>Contraction rate of every step</h2>
<div class="wide"><table class="rates">
<thead><tr><th>step</th>{% for norm in report.rates %}<th>norm {{ norm }}</th>{% endfor %}</tr></thead>
<tbody>
{% for rates in steps %}
<tr><td>{{ loop.index }}</td>
{% for rate in rates %}<td class="number">{{ '%.4g' % rate }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p>The largest rate for which the filters of a step satisfy the contraction condition; negative: not contractive.</p>
{% endif %}
{% if examples %}
<h2>Examples</h2>
<p>The first images, each test at its largest strength; below each its class and what the model sees, red where wrong.
An image that an attack broke at a smaller radius is shown as it was there, one that was wrong from the start as it is.
Images are drawn clipped to [0, 1].</p>
<div class="wide"><table class="examples">
{% for test, cells in examples %}
<tr><th>{{ test }}</th>
{% for source, predicted, label in cells %}
<td><img alt="class {{ label }}" src="{{ source }}">
<span{% if predicted != label %} class="fooled"{% endif %}>{{ label }} → {{ predicted }}</span></td>
{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
<h2>Settings</h2>
<table class="settings"><tbody>
{% for name, value in report.settings.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table>
</body>
</html>
"""


def render(report: Report, title: str) -> str:
    picture = io.BytesIO()
    curves.plot_accuracy({"": report}, picture)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    content: dict[str, Any] = {
        "curves": _data_uri(picture.getvalue()),
        "steps": list(zip(*report.rates.values(), strict=True)),
        "examples": [(example.test, list(_cells(example))) for example in report.examples],
        "percent": "{:.2%}".format,
        "spread": spread,
        "settings": settings,
    }
    return environment.from_string(TEMPLATE).render(title=title, report=report, **content)


def _cells(example: Example) -> Iterator[tuple[str, int, int]]:
    for image, predicted, label in zip(example.images, example.predicted, example.labels, strict=True):
        yield _data_uri(_png(image)), predicted, label


def _png(image: Tensor) -> bytes:
    """Of ``(C, H, W)``: grey or RGB, other numbers of channels as the grey of their mean."""
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    return bytes(encode_png((255 * image.clamp(0, 1)).round().to(torch.uint8)).numpy())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
