"""Compiles every configuration of every Triton kernel for every target, without a device, and reads what it takes.

``python -m robust_node_fast.bench.resources`` writes ``bench/results/triton_resources.csv``: registers, spilled bytes,
shared memory, tensor-core instructions. Each row holds a digest of everything that its code depends on, and only rows
whose digest changed are compiled again; without the file all are. ``tests/test_triton_resources.py`` compares.
"""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results" / "triton_resources.csv"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a block may take
TENSOR_CORES = {
    "sm_80": r"\bmma\.sync[\w.]*",
    "sm_90": r"\b(?:wgmma\.mma_async|mma\.sync)[\w.]*",
    "sm_100": r"\b(?:tcgen05\.mma|mma\.sync)[\w.]*",
    "gfx942": r"\bv_mfma\w*",
}
# dtype and the precision of its products; only float32 with "ieee" runs without tensor cores.
PRODUCTS = (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee"))
ELEMENTS = (("bf16", ""), ("fp16", ""), ("fp32", ""))  # of kernels without products
CONVOLUTIONS = ("euler_step", "gradient_step", "weight_gradient", "weight_gradient atomic")
PENALTIES = ("penalty", "penalty_gradient")
ACTIVATIONS = ("smooth_leaky_relu", "smooth_leaky_relu_backward")
KERNEL_SIZES = (1, 3, 5)
UNIT_STRIDES = ("in_channel", "out_channel", "slope_channel", "channel", "below_channel", "state_channel")
POINTERS = (
    *("input", "filters", "bias", "output", "slopes", "v", "grad", "extra", "grad_below", "v_below", "state"),
    *("grad_output", "weight", "excess", "coefficients", "grad_weight", "grad_bias"),
)
FLOATS = ("step_size", "negative_slope", "rate", "a", "b", "scale")
UNALIGNED = ("B", "H", "W", "pixels_per_split")  # integers that are never known to be multiples of 16


@dataclass(frozen=True)
class Resources:
    """One kernel, compiled; a row of the table."""

    kernel: str
    configuration: str
    kernel_size: int  # 0 for the activation
    dtype: str
    precision: str
    channels: str  # "multiple of 16" and side by side in memory, or "any" number at any stride
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instruction: str  # the most frequent one; empty if there is none
    triton: str  # version
    digest: str


class Job(NamedTuple):
    kernel: str
    blocks: int  # which ones
    kernel_size: int
    dtype: str
    precision: str
    channels: str
    target: str


def _blocks(kernel: str, dtype: str, precision: str, channels: str) -> tuple[Any, ...]:
    """The block sizes of a convolution, those of the tuner; one None for every other kernel."""
    from robust_node_fast.kernels import configs

    if kernel not in CONVOLUTIONS:
        return (None,)
    products = precision if dtype == "fp32" else "16 bit"
    return configs.BLOCKS[kernel.split()[0]]["any channels" if channels == "any" else products]


def configuration(job: Job) -> str:
    return str(_blocks(job.kernel, job.dtype, job.precision, job.channels)[job.blocks] or "")


def jobs() -> list[Job]:
    return [
        Job(kernel, blocks, kernel_size, dtype, precision, channels, target)
        for kernel in (*CONVOLUTIONS, *PENALTIES, *ACTIVATIONS)
        for kernel_size in ((0,) if kernel in ACTIVATIONS else KERNEL_SIZES)
        for dtype, precision in (PRODUCTS if kernel in CONVOLUTIONS else ELEMENTS)
        for channels in (("multiple of 16", "any") if kernel in CONVOLUTIONS else ("any",))
        for blocks in range(len(_blocks(kernel, dtype, precision, channels)))
        for target in TARGETS
    ]


def _function_and_constants(job: Job) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """What is compiled, with every optional tensor present."""
    from robust_node_fast.kernels import activation, configs, contraction_penalty, euler_conv

    name = job.kernel.split()[0]
    blocks = _blocks(job.kernel, job.dtype, job.precision, job.channels)[job.blocks]
    if blocks is not None:
        constants = {
            **configs.constants(name, blocks),
            "KERNEL": job.kernel_size,
            "PRECISION": job.precision,
            "WIDEN": False,
        }
        if name == "weight_gradient":
            constants["ATOMIC"] = job.kernel.endswith(" atomic")
        return getattr(euler_conv, name), constants, {"num_warps": blocks.warps, "num_stages": blocks.stages}
    if name.startswith("penalty"):
        special = {"NORM": 1} if name == "penalty" else {"PER_CHANNEL": True}
        return getattr(contraction_penalty, name), {**special, "TAPS": job.kernel_size**2, **configs.PENALTY}, {}
    return getattr(activation, name), {"BLOCK": configs.ELEMENTS}, {}


def _type(name: str, job: Job) -> str:
    if (name in ("grad_weight", "grad_bias") and job.kernel in CONVOLUTIONS) or name == "excess":
        return "*fp32"
    if name == "slopes" and job.dtype == "fp16":
        return "*fp32"
    if name in POINTERS:
        return f"*{job.dtype}"
    return "fp32" if name in FLOATS else "i32"


def _source(job: Job) -> tuple[Any, Any, dict[str, int]]:
    """What Triton's compiler is given: the kernel with its types and constants, the target, warps and stages."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, constants, options = _function_and_constants(job)
    vectors = job.channels != "any"
    if vectors:
        constants |= {name: 1 for name in UNIT_STRIDES if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else _type(name, job) for name in function.arg_names}
    aligned = [
        name
        for name, type_ in signature.items()
        if type_.startswith("*") or (vectors and type_ == "i32" and name not in UNALIGNED)
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("hip", job.target, 64) if job.target[:3] == "gfx" else GPUTarget("cuda", int(job.target[3:]), 32)
    return source, target, options


def digest(job: Job) -> str:
    """Of what the compiled code depends on: the key under which Triton would look for it in its cache.

    That covers the kernel's source, those of the functions it calls, where in the file it begins, types and constants;
    the compiler is told apart by its version.
    """
    import triton

    source, target, options = _source(job)
    return hashlib.sha256(f"{source.hash()} {target} {options} {triton.__version__}".encode()).hexdigest()[:16]


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: these kernels have no arrays, what is there was spilled."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", log)
    assert found is not None, log
    return int(found[1]), int(found[2]) + int(found[3])


def _of_amdgcn(code: str) -> tuple[int, int]:
    """Registers and bytes of scratch memory. Scalars that move to lanes of vector registers touch no memory."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None, name
        return int(found[1])

    return number("vgpr_count"), number("private_segment_fixed_size")


def resources(job: Job) -> Resources:
    import triton

    source, target, options = _source(job)
    kernel = triton.compile(source, target=target, options=options)
    amd = job.target.startswith("gfx")
    code = kernel.asm["amdgcn" if amd else "ptx"]
    registers, spilled = _of_amdgcn(code) if amd else _of_cubin(kernel.asm["cubin"])
    found = re.findall(TENSOR_CORES[job.target], code)
    return Resources(
        job.kernel,
        configuration(job),
        job.kernel_size,
        job.dtype,
        job.precision,
        job.channels,
        job.target,
        registers,
        spilled,
        kernel.metadata.shared,
        max(sorted(set(found)), key=found.count) if found else "",
        triton.__version__,
        digest(job),
    )


def problems(row: Resources) -> Iterator[str]:
    """What must not be: spills, more shared memory than there is, low precision without tensor cores."""
    name = (
        f"{row.kernel} {row.configuration} k{row.kernel_size} {row.dtype} {row.precision} {row.channels} {row.target}"
    )
    if row.spilled_bytes:
        yield f"{name}: {row.spilled_bytes} bytes spilled"
    if row.shared_bytes > SHARED_LIMIT[row.target]:
        yield f"{name}: {row.shared_bytes} bytes of shared memory, {SHARED_LIMIT[row.target]} there are"
    low = row.precision and (row.dtype, row.precision) != ("fp32", "ieee")
    if low and not row.tensor_core_instruction:
        yield f"{name}: no tensor-core instruction"


def _ignore_cache() -> None:
    import triton

    triton.knobs.compilation.always_compile = True


def table(wanted: Iterable[Job], processes: int) -> list[Resources]:
    # Not forked: whoever calls may have threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _ignore_cache) as pool:
        return list(pool.map(resources, wanted))


def write(rows: Iterable[Resources], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def read(path: Path) -> list[Resources]:
    rows: list[dict[str, Any]] = []
    with path.open() as file:
        for row in csv.DictReader(file):
            rows.append({f.name: int(row[f.name]) if f.type == "int" else row[f.name] for f in fields(Resources)})
    return [Resources(**row) for row in rows]


def main() -> None:
    known = {row.digest: row for row in read(RESULTS)} if RESULTS.exists() else {}
    wanted = {job: digest(job) for job in jobs()}
    changed = [job for job, key in wanted.items() if key not in known]
    known |= {row.digest: row for row in table(changed, min(2, os.cpu_count() or 1))}
    rows = [known[key] for key in wanted.values()]
    write(rows, RESULTS)
    wrong = [problem for row in rows for problem in problems(row)]
    print("\n".join(wrong) or f"{len(rows)} kernels, {len(changed)} of them compiled anew, none spills")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
