"""Set-up of all tests: the number of CPU threads, a temporary cache, and the marker `numeric`.

CLRUN_TEST_THREADS (1 when it is not set) is the number of threads of the tests and of the runs that they start.
Threads that wait for others sleep, so that parallel tests do not take the cores from each other.

The collector of garbage does not run while thousands of tests are collected, and leaves alone afterwards what was made
until then: going through these objects again and again took a tenth of the time of all tests.
"""

import gc
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is imported
import torch  # noqa: E402

THREADS = os.environ.setdefault("CLRUN_TEST_THREADS", "1")
torch.set_num_threads(int(THREADS))
# What a test file imports when it computes with tensors or runs configurations.
COMPUTES = re.compile(r"^import torch\b|^from (?:torch|helpers)\b|^from running import .*\brun", re.MULTILINE)


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()
    config.clrun_cache = os.environ["CLRUN_CACHE"] = tempfile.mkdtemp(prefix="clrun-tests-")
    os.mkdir(os.path.join(config.clrun_cache, "features"))  # clrun says once where it makes this folder


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.clrun_cache, ignore_errors=True)


def pytest_report_header() -> str:
    return f"numbers: {torch.backends.cpu.get_cpu_capability()} kernels, {THREADS} threads per process"


@cache
def computes(file: Path) -> bool:
    """Return whether the tests of a file compute with tensors, so that they may depend on the CPU.

    Those of the command line check messages and files.
    """
    return file.parent.name != "cli" and COMPUTES.search(file.read_text()) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if computes(item.path) and not (item.get_closest_marker("records") or item.get_closest_marker("exact")):
            item.add_marker("numeric")
