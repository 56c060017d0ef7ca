"""Helpers of the tests that run configurations in this process."""

import csv
import json
import os
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from clrun.config.check import check
from clrun.config.compose import Composer, plain_config
from clrun.config.job import JobInfo
from clrun.config.signature import locate
from clrun.running import checkpoint, checkpoint_file
from clrun.running.run import run_config
from clrun.system.yaml_files import conf_dir

# Options of methods that make their runs cheap; no promise depends on them.
CHEAP = {"mer": ("method.draws=1", "method.chunk=10"), "ranpac": ("method.m=100",), "rail": ("method.m=100",)}
THREADS = f"hardware.threads={os.environ['CLRUN_TEST_THREADS']}"


def member(file: Path) -> dict[str, Any]:
    """Return the options of a YAML file with those of the files that it includes from a folder `_options`."""
    node = yaml.safe_load(file.read_text())
    found: Any = {}
    for entry in node.pop("defaults", ["_self_"]):
        path, _, package = entry.partition("@")
        part = node if entry == "_self_" else member(file.parent / f"{path}.yaml")
        found = OmegaConf.merge(found, part if package in ("", "_here_") else {package: part})
    return OmegaConf.to_container(found)  # type: ignore[return-value]


def source(name: str) -> Callable[..., Any]:
    """Return the loader of `dataset=NAME`."""
    return locate(member(conf_dir() / "dataset" / f"{name}.yaml")["_target_"])


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
    """Return the configuration of a run that prints and draws nothing unless told otherwise.

    It uses the number of threads of the tests (CLRUN_TEST_THREADS).

    The backbone is the small CNN unless another or an experiment is named.
    """
    small = () if any(o.startswith(("backbone=", "experiment=")) for o in overrides) else ("backbone=cnn",)
    return configuration("job.progress=false", "job.picture=false", THREADS, *small, *overrides)


def learner(method: str) -> Any:
    """Return the class of `method=NAME`."""
    return locate(member(conf_dir() / "method" / f"{method}.yaml")["_target_"])


def fitting(method: str) -> tuple[str, ...]:
    """Return a setting and a backbone that a method works with (the defaults where it can), and options that are cheap.

    A transformer and two towers take long to evaluate, so that they see few test images.
    """
    cls = learner(method)
    setting = "cil" if "cil" in cls.settings else min(cls.settings)
    if cls.needs_decoder:
        return (f"scenario.setting={setting}", "dataset=text_synthetic", "backbone=t5_tiny", *CHEAP.get(method, ()))
    backbone = "glyph_clip" if cls.needs_text else "glyph_vit" if cls.needs_vit else None
    few = (f"backbone={backbone}", "job.max_eval_rows=8") if backbone else ()
    return (f"scenario.setting={setting}", *few, *CHEAP.get(method, ()))


def run(out: Path, *overrides: str) -> float:
    """Run a configuration in `out`, quietly unless told otherwise."""
    config, choices = quiet(*overrides)
    return run_config(config, out, job=JobInfo(None, 1, choices, False, list(overrides), {}))


def run_interrupted(out: Path, *overrides: str, at: int = 1) -> None:
    """Run a configuration in `out` as `run` does, and interrupt it when its first (`at`) checkpoint is written."""
    save, saved = checkpoint.save, 0

    def saving(*args: Any, **kwargs: Any) -> None:
        nonlocal saved
        save(*args, **kwargs)
        saved += 1
        if saved == at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("clrun.running.checkpoint.save", saving)
        run(out, *overrides)


def rewrite(path: Path, *, method: bytes | None = None, remove: str | None = None, **changed: Any) -> None:
    """Change a checkpoint and make its checksums right again: the pickled method, or fields of its header."""
    content = path.read_bytes()
    length = checkpoint_file.PREFIX.unpack_from(content)[2]
    start = checkpoint_file.PREFIX.size
    header, data = json.loads(content[start : start + length]), content[start + length :]
    if method is not None:
        header["methods"], data = [[len(method), zlib.crc32(method)]], method
    text = json.dumps({key: value for key, value in (header | changed).items() if key != remove}).encode()
    path.write_bytes(checkpoint_file.PREFIX.pack(checkpoint_file.MAGIC, zlib.crc32(text), len(text)) + text + data)


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cells(out: Path, setting: str = "cil") -> dict[tuple[int, int], tuple[int, int]]:
    """Return {(position, task id): (correct, total)} of the rows at the ends of tasks."""
    with (out / "accuracy.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["setting"] == setting and row["phase"] == "end"]
    return {(int(r["position"]), int(r["task"])): (int(r["correct"]), int(r["total"])) for r in rows}
