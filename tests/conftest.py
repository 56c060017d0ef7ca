"""Puts this folder on the path, for `helpers` and `running`; tests run on one thread, so that sums do not vary.

Features of frozen backbones go to a temporary cache.
"""

import os
import shutil
import tempfile

import torch

torch.set_num_threads(1)


def pytest_configure(config) -> None:
    config.clrun_cache = os.environ["CLRUN_CACHE"] = tempfile.mkdtemp(prefix="clrun-tests-")


def pytest_unconfigure(config) -> None:
    shutil.rmtree(config.clrun_cache, ignore_errors=True)
