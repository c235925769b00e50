"""Compiles every configuration of every Triton kernel for every target, without a device, and reads what it takes.

``python -m robust_node_fast.bench.resources`` writes ``bench/results/triton_resources.csv``: registers, spilled bytes,
shared memory, tensor-core instructions. ``tests/test_triton_resources.py`` compiles again and compares.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "triton_resources.csv"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# dtype and the precision of its products; only float32 with "ieee" runs without tensor cores.
PRECISIONS = (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee"))
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a block may take
TENSOR_CORES = {
    "sm_80": r"\bmma\.sync[\w.]*",
    "sm_90": r"\b(?:wgmma\.mma_async|mma\.sync)[\w.]*",
    "sm_100": r"\b(?:tcgen05\.mma|mma\.sync)[\w.]*",
    "gfx942": r"\bv_mfma\w*",
}


@dataclass(frozen=True)
class Resources:
    """One kernel, compiled; a row of the table."""

    kernel: str
    configuration: str
    dtype: str
    precision: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instruction: str  # the most frequent one; empty if there is none


@dataclass(frozen=True)
class Job:
    kernel: str
    index: int  # of the configuration
    dtype: str
    precision: str
    target: str


POINTERS = {
    "euler_step": ("input", "filters", "bias", "output", "slopes"),
    "gradient_step": ("v", "filters", "grad", "extra", "slopes", "grad_below", "v_below"),
    "weight_gradient": ("state", "v"),
}
FLAGS = {
    "euler_step": {"HAS_BIAS": True, "SAVE_SLOPES": True},
    "gradient_step": {"HAS_EXTRA": True, "HAS_BELOW": True},
    "weight_gradient": {"HAS_BIAS": True, "ATOMIC": False},
}
UNIT_STRIDES = ("in_channel", "out_channel", "channel", "state_channel")  # channels last


def jobs() -> list[Job]:
    from robust_node_fast.kernels import configs

    return [
        Job(name, index, dtype, precision, target)
        for name in POINTERS
        for index in range(len(getattr(configs, name).configs))
        for dtype, precision in PRECISIONS
        for target in TARGETS
    ]


def compiled(job: Job) -> Any:
    """The kernel for 3x3 filters, channels-last tensors and a multiple of 16 channels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from robust_node_fast.kernels import configs

    tuned = getattr(configs, job.kernel)
    config, function = tuned.configs[job.index], tuned.fn
    constants = {**config.kwargs, **FLAGS[job.kernel], "KERNEL": 3, "PRECISION": job.precision, "WIDEN": False}
    constants |= {name: 1 for name in UNIT_STRIDES if name in function.arg_names}
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS[job.kernel]:
            signature[name] = f"*{job.dtype}"
        elif name in ("grad_weight", "grad_bias"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in ("step_size", "negative_slope") else "i32"
    aligned = [name for name in function.arg_names if signature[name] != "constexpr" and name not in ("B", "H", "W")]
    aligned = [name for name in aligned if signature[name] != "fp32"]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("hip", job.target, 64) if job.target[:3] == "gfx" else GPUTarget("cuda", int(job.target[3:]), 32)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options=options)


def _of_ptx(ptx: str, target: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, as ptxas sees them."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = folder / ("ptxas-blackwell" if int(target[3:]) >= 100 else "ptxas")
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", f"-arch={architecture[1]}", file.name, "-o", os.devnull]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        assert found is not None, log
        return int(found[1])

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return number(r"Used (\d+) registers"), spilled


def _of_amdgcn(code: str) -> tuple[int, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None, name
        return int(found[1])

    return number("vgpr_count"), 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))


def resources(job: Job) -> Resources:
    from robust_node_fast.kernels import configs

    kernel = compiled(job)
    amd = job.target.startswith("gfx")
    code = kernel.asm["amdgcn" if amd else "ptx"]
    registers, spilled = _of_amdgcn(code) if amd else _of_ptx(code, job.target)
    found = re.findall(TENSOR_CORES[job.target], code)
    config = getattr(configs, job.kernel).configs[job.index]
    sizes = "x".join(str(config.kwargs[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return Resources(
        job.kernel,
        f"{sizes} w{config.num_warps} s{config.num_stages}",
        job.dtype,
        job.precision,
        job.target,
        registers,
        spilled,
        kernel.metadata.shared,
        max(sorted(set(found)), key=found.count) if found else "",
    )


def problems(row: Resources) -> Iterator[str]:
    """What must not be: spills, more shared memory than there is, low precision without tensor cores."""
    name = f"{row.kernel} {row.configuration} {row.dtype}/{row.precision} {row.target}"
    if row.spilled_bytes:
        yield f"{name}: {row.spilled_bytes} bytes spilled"
    if row.shared_bytes > SHARED_LIMIT[row.target]:
        yield f"{name}: {row.shared_bytes} bytes of shared memory, {SHARED_LIMIT[row.target]} there are"
    if (row.dtype, row.precision) != ("fp32", "ieee") and not row.tensor_core_instruction:
        yield f"{name}: no tensor-core instruction"


def table(processes: int) -> list[Resources]:
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(resources, jobs(), chunksize=4))


def write(rows: list[Resources], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def read(path: Path) -> list[Resources]:
    with path.open() as file:
        return [
            Resources(**{f.name: int(row[f.name]) if f.type == "int" else row[f.name] for f in fields(Resources)})
            for row in csv.DictReader(file)
        ]


if __name__ == "__main__":
    found = table(os.cpu_count() or 1)
    write(found, RESULTS)
    wrong = [problem for row in found for problem in problems(row)]
    print("\n".join(wrong) or f"{len(found)} kernels, none spills")
    sys.exit(bool(wrong))
