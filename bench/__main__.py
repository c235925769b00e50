"""``python -m robust_node_fast.bench`` is ``rnf bench``."""

from __future__ import annotations

import sys

from robust_node_fast.cli import app

app(["bench", *sys.argv[1:]], prog_name="rnf")
