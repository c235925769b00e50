"""Wheel and pure-Python installs in folders of their own, and what importing the package costs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, *, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter outside the checkout; with `path`, that package instead of the installed one.

    -S leaves out the .pth files, and with them the editable install, whose finder would fill in missing submodules.
    """
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), sysconfig.get_path("purelib")])
    return subprocess.run(
        [sys.executable, *(["-S"] if path else []), "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env=env,
    )


def install(folder: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the tracked sources and unpack it into `folder`."""
    source = folder / "source"
    source.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        cwd=ROOT,
    ).stdout
    for name in archive.decode().split("\0"):
        if name and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(pip, check=True, timeout=300, env={**os.environ, **environment}, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled without optimisation, which takes most of the minutes: what is asked here is whether it is all there."""
    folder = tmp_path_factory.mktemp("wheel")
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    quick = folder / "quick_compiler"
    quick.write_text(f'#!/bin/sh\nexec {command} "$@" -O0\n')
    quick.chmod(0o755)
    return install(folder, RNF_BUILD="1", RNF_CUDA="0", CXX=str(quick))  # nvcc takes a minute


@pytest.fixture(scope="module")
def pure_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("pure"), PATH="/nonexistent", CXX="/nonexistent/c++")


CHECK = """
import warnings, torch
import robust_node_fast as rnf
import robust_node_fast.kernels
x, w, b = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, 3) / 5, torch.randn(4, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ours = rnf.functional.euler_conv_flow(x, w, b, step_size=0.1)
        rnf.functional.contraction_penalty(w, rate=1.0)
torch.testing.assert_close(ours, rnf.reference.euler_conv_flow(x, w, b, step_size=0.1))
print(rnf.__file__)
print(rnf.backend_info()["ops"]["euler_conv_flow"]["cpu"]["implementation"])
print(len([c for c in caught if issubclass(c.category, rnf.FallbackWarning)]))
"""


def test_wheel_holds_the_compiled_library(wheel_site: Path) -> None:
    done = run(CHECK, path=wheel_site, RNF_STRICT="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(wheel_site / "robust_node_fast/__init__.py"), "cpu", "0"]
    assert (wheel_site / "robust_node_fast/py.typed").exists()
    assert (wheel_site / "robust_node_fast/kernels/__init__.py").exists()
    assert not (wheel_site / "kernels").exists()  # would collide with a package of that name


def test_editable_install_runs_the_compiled_library() -> None:
    done = run(CHECK, RNF_STRICT="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["cpu", "0"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on this machine to list a library's symbols with")
@pytest.mark.parametrize("name", ["_C", "_cuda_C"])
def test_only_the_stable_interface_of_pytorch_is_linked(name: str) -> None:
    """So that one build serves several versions of PyTorch: no symbol of its C++ classes, only C functions."""
    spec = importlib.util.find_spec(f"robust_node_fast.{name}")
    if spec is None or spec.origin is None:
        pytest.skip(f"robust_node_fast.{name} was not built")
    listed = subprocess.run(
        ["nm", "-DC", "--undefined-only", spec.origin], check=True, capture_output=True, text=True
    ).stdout
    wanted = [line.split(maxsplit=1)[-1] for line in listed.splitlines()]
    assert [symbol for symbol in wanted if re.search(r"\b(at|c10|caffe2|torch)::", symbol)] == []
    assert any(symbol.startswith("aoti_torch_") for symbol in wanted) == (name == "_C")  # the other takes addresses
    assert any("std::runtime_error::" in symbol for symbol in wanted)  # names were taken apart, so the first would show


def test_without_a_compiler_everything_runs_on_the_reference_and_says_so_once(pure_site: Path) -> None:
    assert not list(pure_site.glob("robust_node_fast/_C*.so"))
    done = run(CHECK, path=pure_site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(pure_site / "robust_node_fast/__init__.py"), "reference", "1"]
    strict = run(CHECK, path=pure_site, RNF_STRICT="1")
    assert strict.returncode == 1
    assert "the compiled library is missing" in strict.stderr


def test_a_build_that_must_compile_fails_without_a_compiler(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as raised:
        install(tmp_path, PATH="/nonexistent", CXX="/nonexistent/c++", RNF_BUILD="1")
    assert "RNF_BUILD=1 asks for the compiled library" in f"{raised.value.stdout}{raised.value.stderr}"


def test_import_pulls_in_nothing_heavy() -> None:
    done = run(
        "import torch, sys; before = set(sys.modules); import robust_node_fast; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert done.returncode == 0, done.stderr
    heavy = {"matplotlib", "sklearn", "torchvision", "typer", "rich", "triton", "torchmetrics", "scipy", "pandas"}
    assert not heavy & set(done.stdout.split())


def test_requirements_never_pin_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '"torch>=2.10"' in text
    assert '"torch==' not in text
