"""What each CUDA kernel takes of a device: registers, spills, stack and static shared memory, as ptxas says.

``python bench/cuda_resources.py`` writes ``bench/results/cuda_resources.csv``; no device is needed. A test compares.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cuda_resources.csv"
ARCHITECTURES = (80, 90, 100)
# As setup.py compiles.
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v"]


@dataclass(frozen=True, order=True)
class Resources:
    """One kernel on one architecture. ``nvcc`` is the version that decided it."""

    kernel: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    nvcc: str


def compiler_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"V(\d+\.\d+\.\d+)", text)[-1]


def readable(symbol: str) -> str:
    """``flow_backward_kernel<3, 1>`` of a mangled name; hashes of files are left out."""
    match = re.search(r"\d([a-z][a-z_]*_kernel)(I(?:L[ib]\d+E)+E)?", symbol)
    if match is None:
        raise ValueError(f"{symbol} is not named like a kernel")
    values = re.findall(r"L[ib](\d+)E", match[2] or "")
    return match[1] + (f"<{', '.join(values)}>" if values else "")


def parse(log: str, version: str) -> list[Resources]:
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        symbol, architecture = re.findall(r"'([^']+)' for '([^']+)'", part)[0]

        def number(pattern: str, part: str = part) -> int:
            return sum(map(int, re.findall(pattern, part)))

        found.append(
            Resources(
                readable(symbol),
                architecture,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes spill (?:stores|loads)"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes smem"),
                version,
            )
        )
    return found


def measure(nvcc: str) -> list[Resources]:
    """All kernels on all architectures, two compilers side by side."""
    version = compiler_version(nvcc)

    def compile_one(job: tuple[Path, int]) -> list[Resources]:
        source, architecture = job
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        with TemporaryDirectory() as folder:
            command = [nvcc, *FLAGS, target, "-c", str(source), "-o", str(Path(folder) / "out.o")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        return parse(done.stderr + done.stdout, version)

    jobs = product(sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ARCHITECTURES)
    with ThreadPoolExecutor(2) as pool:
        return sorted(resources for found in pool.map(compile_one, jobs) for resources in found)


def recorded() -> list[Resources]:
    with RESULTS.open(newline="") as file:
        return [
            Resources(kernel, architecture, int(registers), int(spills), int(stack), int(shared), nvcc)
            for kernel, architecture, registers, spills, stack, shared, nvcc in list(csv.reader(file))[1:]
        ]


def main() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("no nvcc on the path")
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        for resources in measure(nvcc):
            writer.writerow(asdict(resources))
            print(*asdict(resources).values())


if __name__ == "__main__":
    main()
