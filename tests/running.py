"""Helpers of the tests that run configurations in this process."""

import csv
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig

from clrun.config.check import check
from clrun.config.compose import Composer, plain_config
from clrun.config.job import JobInfo
from clrun.running import checkpoint
from clrun.running.run import run_config


def configuration(*overrides: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the resolved configuration and the choice of each group, as the command line composes them."""
    with Composer.of(config_path=None, config_name=None, config_dir=None) as composer:
        cfg = composer.compose(["hydra.run.dir=unused", *overrides])
        plain = plain_config(cfg)
        choices = {
            str(k): str(v) for k, v in HydraConfig.get().runtime.choices.items() if not str(k).startswith("hydra")
        }
    check(plain, choices)
    return plain, choices


@cache
def quiet(*overrides: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the configuration of a run that prints and draws nothing unless told otherwise, on one thread.

    The backbone is the small CNN unless another or an experiment is named.
    """
    small = () if any(o.startswith(("backbone=", "experiment=")) for o in overrides) else ("backbone=cnn",)
    return configuration("job.progress=false", "job.picture=false", "hardware.threads=1", *small, *overrides)


def run(out: Path, *overrides: str) -> float:
    """Run a configuration in `out`, quietly unless told otherwise, on one thread."""
    config, choices = quiet(*overrides)
    return run_config(config, out, job=JobInfo(None, 1, choices, False, list(overrides), {}))


def run_interrupted(out: Path, *overrides: str) -> None:
    """Run a configuration in `out` as `run` does, and interrupt it when its first checkpoint is written."""
    save = checkpoint.save

    def saving(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("clrun.running.checkpoint.save", saving)
        run(out, *overrides)


def cells(out: Path, setting: str = "cil") -> dict[tuple[int, int], tuple[int, int]]:
    """Return {(position, task id): (correct, total)} of the rows at the ends of tasks."""
    with (out / "accuracy.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["setting"] == setting and row["phase"] == "end"]
    return {(int(r["position"]), int(r["task"])): (int(r["correct"]), int(r["total"])) for r in rows}
