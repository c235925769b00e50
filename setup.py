"""Builds the CPU kernels if a C++17 compiler is there; without one the package installs as pure Python.

The compiled library uses PyTorch's stable ABI only: it is built against whichever torch is found and loads into every
torch >= 2.10. RNF_BUILD=0 asks for the pure-Python package; RNF_BUILD=1 turns a missing compiler into an error.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
TORCH_TARGET = (2, 10)  # oldest torch whose stable ABI has everything that csrc/ uses
WANTED = os.environ.get("RNF_BUILD", "auto")


def find_torch() -> Path | None:
    """The folder of an installed torch: this interpreter's, or that of the environment a build is isolated from."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    # -I leaves out the paths that an isolated build puts in front and shows the environment's own packages.
    for flags in ([], ["-I"]):
        found = subprocess.run(
            [sys.executable, *flags, "-c", code], check=False, capture_output=True, text=True
        ).stdout.strip()
        if found and (Path(found) / "include" / "torch" / "csrc" / "stable").is_dir():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (Path(found) / "version.py").read_text())
            if version and tuple(map(int, version.groups())) >= TORCH_TARGET:
                return Path(found)
    return None


def find_compiler() -> str | None:
    """A C++ compiler that accepts C++17, as setuptools would call it."""
    command = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
    candidates = [command[0], "c++", "g++", "clang++"]
    for candidate in candidates:
        if shutil.which(candidate):
            test = subprocess.run(
                [candidate, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"],
                input="#include <optional>\nstd::optional<int> x;\n",
                check=False,
                capture_output=True,
                text=True,
            )
            if test.returncode == 0:
                return candidate
    return None


def decline(reason: str) -> None:
    if WANTED == "1":
        sys.exit(f"robust_node_fast: {reason}, and RNF_BUILD=1 asks for the compiled library")
    print(
        f"robust_node_fast: WARNING: {reason}: installing without the compiled library; "
        "everything runs on the PyTorch reference path",
        file=sys.stderr,
    )


class OptionalBuild(build_ext):
    """Compiles the sources side by side with ninja; a build that fails leaves the pure-Python package."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever went wrong, the reference path still works
            decline(f"the compiled library could not be built ({error})")

    def build_extension(self, ext: Extension) -> None:
        objects_in = Path(self.build_temp).resolve()
        objects_in.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        self._write_ninja(ext, objects_in, target)
        import ninja

        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(objects_in)], check=True)

    def _write_ninja(self, ext: Extension, objects_in: Path, target: Path) -> None:
        def escape(path: object) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        compile_flags = " ".join(
            [*(f"-isystem {escape(path)}" for path in ext.include_dirs), *(f"-D{k}={v}" for k, v in ext.define_macros)]
        )
        flags = " ".join(ext.extra_compile_args)
        link = " ".join([*(f"-L{escape(path)}" for path in ext.library_dirs), *(f"-l{lib}" for lib in ext.libraries)])
        lines = [
            f"cxx = {find_compiler()}",
            f"rule compile\n  command = $cxx -MMD -MF $out.d {compile_flags} {flags} -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = $cxx -shared {' '.join(ext.extra_link_args)} $in -o $out {link}",
        ]
        objects = []
        for source in ext.sources:
            output = objects_in / (re.sub(r"\W", "_", source) + ".o")
            objects.append(escape(output))
            lines.append(f"build {escape(output)}: compile {escape(HERE / source)}")
        lines.append(f"build {escape(target)}: link {' '.join(objects)}\n")
        (objects_in / "build.ninja").write_text("\n".join(lines))


def extensions() -> tuple[list[Extension], list[str]]:
    """The extension module, and what the build still has to fetch for it."""
    if WANTED == "0":
        decline("RNF_BUILD=0 is set")
        return [], []
    if platform.system() not in ("Linux", "Darwin"):
        decline(f"{platform.system()} is not supported by the build")
        return [], []
    if find_compiler() is None:
        decline("no C++17 compiler was found")
        return [], []
    torch = find_torch()
    if torch is None:  # an isolated build in an environment without torch: setuptools fetches it and asks again
        return [], ["torch>={}.{}".format(*TORCH_TARGET)]
    import pybind11

    target = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
    darwin = platform.system() == "Darwin"
    return [
        Extension(
            "robust_node_fast._C",
            sources=[str(path.relative_to(HERE)) for path in sorted((HERE / "csrc").rglob("*.cpp"))],
            depends=[
                str(path.relative_to(HERE)) for pattern in ("*.h", "*.inc") for path in (HERE / "csrc").rglob(pattern)
            ],
            # pybind11 first: the copy that some torch releases ship refuses to be used with the stable ABI.
            include_dirs=[pybind11.get_include(), str(torch / "include"), sysconfig.get_paths()["include"]],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu", "c10"],
            define_macros=[
                ("TORCH_TARGET_VERSION", f"{target:#018x}ULL"),
                ("RNF_TORCH_TARGET", '\\"{}.{}\\"'.format(*TORCH_TARGET)),
            ],
            extra_compile_args=["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=["-undefined", "dynamic_lookup"] if darwin else ["-Wl,--as-needed"],
        )
    ], []


modules, fetch = extensions()
setup(ext_modules=modules, setup_requires=fetch, cmdclass={"build_ext": OptionalBuild})
