"""Every test starts from its own seed (``RNF_TEST_SEED`` shifts them all) and leaves the process as it found it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # it may hold code compiled for an earlier version of the ops
# Disabled, it still finds machine code by its source alone: code for another ATEN_CPU_CAPABILITY gave NaN and crashes.
_inductor = tempfile.TemporaryDirectory(prefix="rnf-inductor-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor.name

# No deadline: the examples of one test range from a single pixel to forty channels of forty by forty.
settings.register_profile("rnf", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rnf")


def pytest_configure(config: pytest.Config) -> None:
    # The suite must hold with and without the compiled library; test_backends.py asserts the warning itself.
    config.addinivalue_line("filterwarnings", "ignore::robust_node_fast.FallbackWarning")


@pytest.fixture(autouse=True)
def isolated(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("RNF_TEST_SEED", "0")))
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real data sets as torchvision lays them out: ``RNF_DATA_ROOT``, or unpacked from beside us."""
    if "RNF_DATA_ROOT" in os.environ:
        return Path(os.environ["RNF_DATA_ROOT"])
    prepare = Path(__file__).resolve().parents[2] / "shared" / "data" / "prepare.py"
    if not prepare.exists():
        pytest.skip("no real data: RNF_DATA_ROOT is not set and ../shared/data is not there")
    root = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(prepare), str(root)], check=True, capture_output=True, timeout=300)
    return root
