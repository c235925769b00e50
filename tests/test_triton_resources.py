"""No Triton kernel spills registers or outgrows a target, low precision runs on tensor cores, the table is up to date.

Compiled again are the kernels whose digest (of source, configuration, types, target and Triton's version) is not the
table's, and of the others, which can only come out as they did, every 73rd; where it begins changes from run to run,
and ``RNF_TEST_SEED`` repeats a run. ``RNF_TRITON_RESOURCES=all`` compiles every kernel: six minutes on two cores of a
Zen 5, up to half an hour on slower ones. Another version of Triton than the table's allocates registers in its own way:
only what must hold anywhere is asked of it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from robust_node_fast.bench import resources

triton = pytest.importorskip("triton")
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
EVERY = 1 if os.environ.get("RNF_TRITON_RESOURCES") == "all" else 73
REGENERATE = "if this is intended, run python -m robust_node_fast.bench.resources"


@pytest.fixture(scope="module")
def committed() -> list[resources.Resources]:
    return resources.read(resources.RESULTS)


def digests() -> dict[resources.Job, str]:
    return {job: resources.digest(job) for job in resources.jobs()}


def test_the_table_holds_every_kernel(committed: list[resources.Resources]) -> None:
    kinds = [(job.kernel, resources.configuration(job), *job[2:]) for job in resources.jobs()]
    rows = [(r.kernel, r.configuration, r.kernel_size, r.dtype, r.precision, r.channels, r.target) for r in committed]
    assert rows == kinds, REGENERATE
    assert [problem for row in committed for problem in resources.problems(row)] == []


def test_every_configuration_is_in_the_table(committed: list[resources.Resources]) -> None:
    from robust_node_fast.kernels import configs

    tuned = {
        (kernel, str(blocks), size)
        for kernel, kinds in configs.BLOCKS.items()
        for of in kinds.values()
        for blocks in of
        for size in resources.KERNEL_SIZES
    }
    assert tuned <= {(row.kernel, row.configuration, row.kernel_size) for row in committed}
    for kernel in configs.BLOCKS:
        found = {(r.kernel_size, r.dtype, r.precision, r.channels, r.target) for r in committed if r.kernel == kernel}
        assert len(found) == 3 * len(resources.PRODUCTS) * 2 * len(resources.TARGETS)
    for channels in (1, 8, 16, 17, 100, 1000):  # whatever the width, something remains to run
        for kernel, kinds in configs.BLOCKS.items():
            assert all(configs.serving(kernel, products, channels) for products in kinds)


@pytest.mark.timeout(3600)
def test_kernels_compiled_again_take_what_the_table_says(committed: list[resources.Resources]) -> None:
    seed = int(os.environ.get("RNF_TEST_SEED", time.time()))
    print(f"RNF_TEST_SEED={seed}")
    known = {row.digest for row in committed}
    jobs = resources.jobs()
    wanted = [job for i, job in enumerate(jobs) if i % EVERY == seed % EVERY or resources.digest(job) not in known]
    assert {job.target for job in wanted} == set(resources.TARGETS)
    found = resources.table(wanted, min(2, os.cpu_count() or 1))
    assert [problem for row in found for problem in resources.problems(row)] == []
    if {row.triton for row in committed} == {triton.__version__}:
        assert [row for row in found if row not in committed] == [], f"RNF_TEST_SEED={seed}; {REGENERATE}"


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("configs.py", "Block sizes", "Block sizes", set()),  # a copy elsewhere is no change
        ("activation.py", "e = tl.exp(", "e = tl.exp(1.0 * ", {"euler_step", *resources.ACTIVATIONS}),
        ("euler_conv.py", "index // (H * W)", "index // (W * H)", {*resources.CONVOLUTIONS}),
        ("euler_conv.py", "tl.trans(values)", "values.trans()", {"weight_gradient", "weight_gradient atomic"}),
        ("contraction_penalty.py", "w == w, result, w", "w != w, w, result", {"penalty_gradient"}),
        ("configs.py", "Blocks(128, 128, 64, 8, 3)", "Blocks(128, 128, 64, 8, 4)", {"euler_step", "gradient_step"}),
        ("configs.py", '"BLOCK_D": 16', '"BLOCK_D": 32', {*resources.PENALTIES}),
    ],
)
def test_a_change_of_source_or_configuration_changes_the_digests(
    file: str, old: str, new: str, changed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the kernels that depend on it, called functions included, and of no others."""
    before = digests()
    folder = Path(shutil.copytree(KERNELS, tmp_path / "kernels"))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    name = "robust_node_fast.kernels"
    for module in [module for module in sys.modules if module.startswith(name)]:
        monkeypatch.delitem(sys.modules, module)
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    monkeypatch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
    try:
        after = digests()
    finally:  # what the copy's modules imported of each other
        for module in [module for module in sys.modules if module.startswith(f"{name}.")]:
            del sys.modules[module]
    assert {job.kernel for job in before if before[job] != after[job]} == changed


def test_another_type_or_compiler_changes_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests()
    monkeypatch.setattr(resources, "UNALIGNED", ("B", "H"))
    assert any(before[job] != key for job, key in digests().items())
    monkeypatch.undo()
    assert digests() == before
    monkeypatch.setattr(triton, "__version__", "0")
    assert all(before[job] != key for job, key in digests().items())
