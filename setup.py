"""Builds the CPU kernels if a C++17 compiler is there; without one the package installs as pure Python.

The compiled library uses PyTorch's stable ABI only: it is built against whichever torch is found and loads into every
torch >= 2.10. RNF_BUILD=0 asks for the pure-Python package; RNF_BUILD=1 turns a missing compiler into an error.

The CUDA kernels are a library of their own, without PyTorch, built if nvcc is there; no device is needed. RNF_CUDA=0
leaves them out; RNF_CUDA=1 turns a missing nvcc into an error.
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
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
TORCH_TARGET = (2, 10)  # oldest torch whose stable ABI has everything that csrc/ uses
WANTED = os.environ.get("RNF_BUILD", "auto")
CUDA_WANTED = os.environ.get("RNF_CUDA", "auto")
CUDA_ARCHITECTURES = (80, 90, 100)  # of those, what nvcc knows; newer devices compile the last one's PTX


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


def find_nvcc() -> str | None:
    """CUDA's compiler, on the path or in the toolkit that CUDA_HOME names."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def decline_cuda(reason: str) -> None:
    if CUDA_WANTED == "1":
        sys.exit(f"robust_node_fast: {reason}, and RNF_CUDA=1 asks for the CUDA kernels")
    print(f"robust_node_fast: {reason}: the CUDA kernels are not built", file=sys.stderr)


def decline(reason: str) -> None:
    if WANTED == "1":
        sys.exit(f"robust_node_fast: {reason}, and RNF_BUILD=1 asks for the compiled library")
    print(
        f"robust_node_fast: WARNING: {reason}: installing without the compiled library; "
        "everything runs on the PyTorch reference path",
        file=sys.stderr,
    )


class CudaExtension(Extension):
    """Compiled and linked by nvcc; may be missing after the build."""

    def __init__(self, name: str, sources: list[str], compiler: str, **options: Any) -> None:
        super().__init__(name, sources, optional=True, **options)
        self.compiler = compiler


class OptionalBuild(build_ext):
    """Compiles the sources side by side with ninja; a build that fails leaves the pure-Python package."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever went wrong, the reference path still works
            decline(f"the compiled library could not be built ({error})")

    def build_extension(self, ext: Extension) -> None:
        if isinstance(ext, CudaExtension):
            try:
                self._build_with_ninja(ext)
            except subprocess.CalledProcessError as error:  # the CPU library stands on its own
                decline_cuda(f"nvcc failed ({error})")
        else:
            self._build_with_ninja(ext)

    def _build_with_ninja(self, ext: Extension) -> None:
        objects_in = Path(self.build_temp).resolve() / ext.name
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
            f"cxx = {ext.compiler if isinstance(ext, CudaExtension) else find_compiler()}",
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


def cuda_extensions(include_dirs: list[str]) -> list[Extension]:
    """The CUDA kernels, for all architectures that they are written for and nvcc knows."""
    if CUDA_WANTED == "0":
        decline_cuda("RNF_CUDA=0 is set")
        return []
    nvcc = find_nvcc()
    if nvcc is None:
        decline_cuda("no nvcc")
        return []
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=False, capture_output=True, text=True).stdout.split()
    release = subprocess.run([nvcc, "--version"], check=False, capture_output=True, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", release)
    known = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in listed]
    if not known or version is None:
        decline_cuda(f"{nvcc} knows none of the architectures {CUDA_ARCHITECTURES}")
        return []
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    targets.append(f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}")
    folder = HERE / "csrc" / "cuda"
    return [
        CudaExtension(
            "robust_node_fast._cuda_C",
            sources=[
                str(path.relative_to(HERE)) for pattern in ("*.cu", "*.cpp") for path in sorted(folder.glob(pattern))
            ],
            compiler=nvcc,
            depends=[str(path.relative_to(HERE)) for pattern in ("*.h", "*.cuh") for path in folder.glob(pattern)],
            include_dirs=include_dirs,
            define_macros=[
                ("RNF_CUDA_VERSION", f'\\"{version.group(1)}\\"'),
                ("RNF_CUDA_ARCHITECTURES", "'\"" + " ".join(f"sm_{number}" for number in known) + "\"'"),
            ],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                *targets,
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden,-Wall,-Wextra",
            ],
            # Of its own, so that it meets neither a missing nor another runtime.
            extra_link_args=["-cudart", "static"],
        )
    ]


def extensions() -> tuple[list[Extension], list[str]]:
    """The extension modules, and what the build still has to fetch for them."""
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
    cpu = HERE / "csrc" / "cpu"
    python_headers = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    return [
        Extension(
            "robust_node_fast._C",
            sources=["csrc/registration.cpp", *(str(path.relative_to(HERE)) for path in sorted(cpu.glob("*.cpp")))],
            depends=[str(path.relative_to(HERE)) for pattern in ("*.h", "*.inc") for path in cpu.glob(pattern)],
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
        ),
        *([] if darwin else cuda_extensions(python_headers)),
    ], []


modules, fetch = extensions()
setup(ext_modules=modules, setup_requires=fetch, cmdclass={"build_ext": OptionalBuild})
