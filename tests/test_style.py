"""Formatting, lint and types of the whole repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def test_ruff_lint() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")


def test_ruff_format() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_mypy() -> None:
    run(sys.executable, "-m", "mypy")


def test_clang_format() -> None:
    sources = [
        str(path)
        for folder in (ROOT / "csrc", ROOT / "tests" / "native")
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".inc")
    ]
    run(str(BIN / "clang-format"), "--dry-run", "--Werror", *sources)
