"""The CPU kernels under AddressSanitizer and UBSan, against straightforward loops, without PyTorch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from robust_node_fast import backend_info

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer"]
# Without the parts of UBSan for what AddressSanitizer sees anyway: they take a third of the compiler's time.
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
]
# A processor without a tile unit gets one in software.
HAS_TILE_UNIT = "amx" in backend_info()["backends"]["cpu"].get("supported_isas", [])
TILE_UNIT_SHIM = (
    []
    if HAS_TILE_UNIT or platform.machine() != "x86_64"
    else ["-DTILE_UNIT_SHIM", "-include", str(ROOT / "tests/native/tile_unit_shim.h")]
)
# New memory is all ones, which is NaN: what is read before it is written shows in the results.
OPTIONS = "malloc_fill_byte=255:max_malloc_fill_size=4194304"


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found


def build(folder: Path, sources: list[Path]) -> Path:
    """Compile side by side, link."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        flags = [*FLAGS, *SANITIZERS, *(TILE_UNIT_SHIM if "amx" in source.stem or "check" in source.stem else [])]
        subprocess.run([compiler(), *flags, "-c", str(source), "-o", str(target)], check=True, timeout=300)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "check_kernels"
    subprocess.run([compiler(), *SANITIZERS, *map(str, objects), "-o", str(program), "-lpthread"], check=True)
    return program


def test_kernels_are_clean_and_right(tmp_path: Path) -> None:
    sources = [ROOT / "tests/native/check_kernels.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    done = subprocess.run(
        [str(build(tmp_path, sources))],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ASAN_OPTIONS": OPTIONS},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " 0 failures" in done.stdout
