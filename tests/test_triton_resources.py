"""No Triton kernel spills registers or outgrows a target, low precision runs on tensor cores, the table is up to date.

``RNF_TRITON_RESOURCES=all`` compiles everything, ten minutes on two cores; otherwise every 13th kernel is compiled,
which comes past every target in turn, and ``RNF_TEST_SEED`` says where to begin.
"""

from __future__ import annotations

import os

import pytest

from robust_node_fast.bench import resources

triton = pytest.importorskip("triton")
EVERY = 1 if os.environ.get("RNF_TRITON_RESOURCES") == "all" else 13


@pytest.fixture(scope="module")
def committed() -> dict[resources.Job, resources.Resources]:
    jobs, rows = resources.jobs(), resources.read(resources.RESULTS)
    assert len(jobs) == len(rows), "run python -m robust_node_fast.bench.resources"
    return dict(zip(jobs, rows, strict=True))


def test_the_table_holds_every_kernel(committed: dict[resources.Job, resources.Resources]) -> None:
    for job, row in committed.items():
        kind = (row.kernel, row.configuration, row.dtype, row.precision, row.channels, row.target)
        assert kind == (job.kernel, resources.configuration(job), *job[2:])
    assert [problem for row in committed.values() for problem in resources.problems(row)] == []


def test_every_configuration_is_in_the_table(committed: dict[resources.Job, resources.Resources]) -> None:
    from robust_node_fast.kernels import configs

    tuned = {
        (kernel, str(blocks)) for kernel, kinds in configs.BLOCKS.items() for of in kinds.values() for blocks in of
    }
    assert tuned <= {(row.kernel, row.configuration) for row in committed.values()}
    assert {row.target for row in committed.values()} == set(resources.TARGETS)
    for channels in (1, 8, 16, 17, 100, 1000):  # whatever the width, something remains to run
        for kernel, kinds in configs.BLOCKS.items():
            assert all(configs.serving(kernel, products, channels) for products in kinds)


def test_kernels_compiled_again_take_what_the_table_says(committed: dict[resources.Job, resources.Resources]) -> None:
    jobs = list(committed)[int(os.environ.get("RNF_TEST_SEED", "0")) % EVERY :: EVERY]
    found = resources.table(jobs, min(2, os.cpu_count() or 1))
    assert {job.target for job in jobs} == set(resources.TARGETS)
    assert [problem for row in found for problem in resources.problems(row)] == []
    for job, row in zip(jobs, found, strict=True):
        if committed[job].triton == triton.__version__:  # another version allocates registers in its own way
            assert row == committed[job], "if this is intended, run python -m robust_node_fast.bench.resources"
