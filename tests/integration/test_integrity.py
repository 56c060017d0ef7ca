"""Damaged files are refused by name: checkpoints, of which the generation before is used, and files of weights."""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import THREADS, flip, rewrite, run, run_interrupted

from clrun import api
from clrun.backbones.weights import read_weights
from clrun.data import feature_cache
from clrun.data.feature_cache import FeatureCache
from clrun.running import checkpoint_file
from clrun.running.restoring import _unshared
from clrun.system.checksums import BLANK, SEAL, broken_seal, seal
from clrun.system.errors import ConfigError

pytestmark = pytest.mark.records  # files, and bits of runs of one layout

OPTIONS = ("method=er", "method.capacity=8", "job.max_tasks=3", "budget.epochs=1", "job.max_steps=2")
OPTIONS += ("job.max_eval_rows=16",)
FACTS: dict[str, Any] = {"config_hash": "0f" * 8, "learned": 0, "steps": 0, "rows": [], "costs": [], "referenced": {}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The accuracy.csv of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    run(out, *OPTIONS)
    return (out / "accuracy.csv").read_bytes()


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted after its second task, with two generations of its checkpoint."""
    out = tmp_path_factory.mktemp("twice")
    run_interrupted(out, *OPTIONS, at=2)
    return out


@pytest.fixture
def stopped(twice: Path, tmp_path: Path) -> Path:
    """A copy of `twice`."""
    shutil.copytree(twice, tmp_path / "run")
    return tmp_path / "run"


def bits(content: bytes) -> list[int]:
    """Return the numbers of all bits of the first 30 bytes, and of every seventh bit after them."""
    return [*range(8 * 30), *range(8 * 30, 8 * len(content), 7)]


def test_flipped_bits_and_cuts_of_a_checkpoint_are_found(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint_file.write(path, FACTS, [b"first method", b"second"], flush=False)
    assert checkpoint_file.read(path, rank=1)[1] == b"second"
    intact = path.read_bytes()
    for bit in bits(intact):
        path.write_bytes(intact)
        flip(path, bit)
        with pytest.raises(checkpoint_file.Damaged, match=r"checkpoint\.pt: refused"):
            checkpoint_file.read(path)
    for wrong in (*(intact[:size] for size in range(0, len(intact), 3)), intact + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(checkpoint_file.Damaged, match=r"checkpoint\.pt: refused"):
            checkpoint_file.read(path)


@pytest.mark.parametrize("damage", ["header", "method", "cut", "empty"])
def test_the_generation_before_a_damaged_one_is_used(
    damage: str, stopped: Path, whole: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = stopped / "checkpoint.pt"
    content = path.read_bytes()
    if damage in ("header", "method"):
        flip(path, 8 * (100 if damage == "header" else len(content) - 5000))
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    with pytest.warns(UserWarning, match=r"checkpoint\.pt: refused .* goes on from checkpoint\.previous\.pt"):
        run_interrupted(stopped, *OPTIONS)  # after the second task again
    assert sorted(file.name for file in stopped.glob("*.pt*")) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert [checkpoint_file.read(file)[0].learned for file in checkpoint_file.generations(path)] == [2, 1]
    run(stopped, *OPTIONS)
    assert (stopped / "accuracy.csv").read_bytes() == whole
    notes = json.loads((stopped / "run.json").read_text())["notes"]
    assert re.match(
        r"resumed after 1 tasks from checkpoint\.previous\.pt, because checkpoint\.pt was refused \(", notes[0]
    )
    assert notes[1:] == ["resumed after 2 tasks"]
    assert not list(stopped.glob("*.pt*"))


def test_two_damaged_generations_are_refused_by_name(stopped: Path) -> None:
    for file in checkpoint_file.generations(stopped / "checkpoint.pt"):
        flip(file, 4000)
    with pytest.raises(ConfigError) as refused:
        run(stopped, *OPTIONS)
    first, second = str(refused.value).splitlines()
    assert "/checkpoint.pt: " in first and "/checkpoint.previous.pt: refused" in second


def test_killed_between_two_generations(stopped: Path, whole: bytes) -> None:
    """The moment at which the file was moved aside and the new one has not its name yet."""
    (stopped / "checkpoint.pt").unlink()
    run(stopped, *OPTIONS)
    assert (stopped / "accuracy.csv").read_bytes() == whole


def test_at_no_moment_more_than_two_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, most, replace = tmp_path / "checkpoint.pt", 0, os.replace

    def counting(*args: Any, **kwargs: Any) -> None:
        nonlocal most
        most = max(most, len(list(tmp_path.iterdir())))
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", counting)
    for learned in range(4):
        checkpoint_file.write(path, FACTS | {"steps": learned}, [b"x"], flush=False)
    assert most == 2
    assert [checkpoint_file.read(file)[0].steps for file in checkpoint_file.generations(path)] == [3, 2]


COST = {"task": 0, "position": 0, "steps": 2, "train_seconds": 1.0, "eval_seconds": 1.0, "images": 9}
COST |= {"peak_memory_bytes": 9, "parameters": {}, "state_bytes": {}}
WRONG: list[tuple[str, Any]] = [
    ("learned", -1),
    ("learned", 4),
    ("learned", True),
    ("learned", "2"),
    ("learned", 1.0),
    ("steps", -1),
    ("steps", 5),
    ("steps", None),
    ("config_hash", 7),
    ("rows", None),
    ("rows", []),
    ("rows", [[0] * 12]),
    ("rows", [{"step": 0}]),
    ("costs", []),
    ("costs", {"0": COST, "1": COST}),
    ("costs", [COST, COST]),
    ("costs", [COST, COST | {"position": 1, "steps": 1}]),
    ("costs", [COST, COST | {"position": 1, "train_seconds": "1"}]),
    ("referenced", []),
    ("referenced", {"weight": "short"}),
    ("world", 0),
    ("world", "1"),
    ("methods", []),
    ("methods", [[1, 2], [1, 2]]),
    ("methods", [[1]]),
    ("methods", [[-1, 0]]),
    ("schema", 1),
    ("schema", "\x1b[31m"),
    ("surplus", 1),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_wrong_field_is_one_line(name: str, value: Any, stopped: Path) -> None:
    rewrite(stopped / "checkpoint.pt", **{name: value})
    with pytest.raises(ConfigError) as refused:
        checkpoint_file.read(stopped / "checkpoint.pt", tasks=3)
    text = str(refused.value)
    assert re.search(rf"checkpoint\.pt: the field {name}\b.* of its header is .*, and must be .+; delete it to", text)
    assert len(text.splitlines()) == 1 and text.isprintable()


@pytest.mark.parametrize("name", [*FACTS, "world", "methods", "schema"])
def test_a_missing_field_is_one_line(name: str, stopped: Path) -> None:
    rewrite(stopped / "checkpoint.pt", remove=name)
    with pytest.raises(ConfigError, match=rf"^.*checkpoint\.pt: the field {name} of its header is None, and must be "):
        checkpoint_file.read(stopped / "checkpoint.pt", tasks=3)


@pytest.mark.parametrize("column", checkpoint_file.COLUMNS)
@pytest.mark.parametrize("value", ["x", -2, 2.5, None, []])
def test_a_wrong_cell_is_one_line(column: str, value: Any, stopped: Path) -> None:
    if column == "nll" and isinstance(value, float):
        pytest.skip("a number is what must be there")
    place = checkpoint_file.COLUMNS.index(column)
    header = checkpoint_file.read(stopped / "checkpoint.pt")[0]
    rows = [[row[name] for name in checkpoint_file.COLUMNS] for row in header.rows]
    rows[1][place] = value
    rewrite(stopped / "checkpoint.pt", rows=rows)
    with pytest.raises(
        ConfigError, match=rf"^.*checkpoint\.pt: the field rows\[1\]\.{column} of its header is .*; delete"
    ):
        checkpoint_file.read(stopped / "checkpoint.pt")


def test_the_advice_is_right(stopped: Path, whole: bytes) -> None:
    rewrite(stopped / "checkpoint.pt", learned=-1)
    with pytest.raises(ConfigError, match=r"; delete it to go on from checkpoint\.previous\.pt$"):
        run(stopped, *OPTIONS)
    (stopped / "checkpoint.pt").unlink()
    rewrite(stopped / "checkpoint.previous.pt", learned=-1)
    with pytest.raises(ConfigError, match="; delete it to start the run again$"):
        run(stopped, *OPTIONS)
    (stopped / "checkpoint.previous.pt").unlink()
    run(stopped, *OPTIONS)
    assert (stopped / "accuracy.csv").read_bytes() == whole


def test_a_new_beginning_leaves_no_checkpoint_of_an_earlier_run(stopped: Path) -> None:
    run_interrupted(stopped, *OPTIONS, "job.resume=false")
    assert [file.name for file in stopped.glob("*.pt")] == ["checkpoint.pt"]


# --- model.safetensors


def sealed(state: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return bytes(seal(save(state, metadata={SEAL: BLANK + "[[1.0]]"})))


def test_flipped_bits_of_a_file_of_weights_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    intact = sealed({"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3)})
    path.write_bytes(intact)
    assert broken_seal(path, required=True) is None
    assert read_weights(path).state["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for bit in bits(intact):
        path.write_bytes(intact)
        flip(path, bit)
        assert broken_seal(path, required=True) is not None
        with pytest.raises(ConfigError, match=r"backbone\.weights: .*model\.safetensors"):
            read_weights(path)


def test_files_of_other_programs_have_no_checksum(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "theirs.safetensors")
    assert read_weights(tmp_path / "theirs.safetensors").state["weight"].tolist() == [1, 1]
    assert broken_seal(tmp_path / "theirs.safetensors", required=True) == "its checksum is missing"


def test_shared_tensors_are_stored_as_safetensors_stores_them(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_model

    module = torch.nn.Module()
    module.a = torch.nn.Linear(3, 3)
    module.b = torch.nn.Linear(3, 3)
    module.b.weight = module.a.weight
    module.register_buffer("part", module.a.weight.data[1:])
    save_model(module, str(tmp_path / "theirs.safetensors"))
    tensors, metadata = _unshared(module.state_dict())
    with safe_open(str(tmp_path / "theirs.safetensors"), framework="pt") as file:
        assert sorted(file.keys()) == sorted(tensors)
        assert file.metadata() == metadata


def test_a_learner_is_not_restored_from_damaged_files(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, *OPTIONS, "job.save_model=true", "job.keep_checkpoint=true", "job.max_tasks=1")
    assert not (out / "checkpoint.previous.pt").exists()
    assert api.load(out).learner() is not None
    flip(out / "checkpoint.pt", 9000)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: refused.*; delete it to restore .* model\.safetensors$"):
        api.load(out).learner()
    (out / "checkpoint.pt").unlink()
    assert api.load(out).learner() is not None
    flip(out / "model.safetensors", 8 * (out / "model.safetensors").stat().st_size - 100)
    with pytest.raises(ConfigError, match=r"model\.safetensors: refused \(its checksum does not match its content\); "):
        api.load(out).learner()


# --- another number of processes


def test_another_number_of_processes_is_refused(stopped: Path) -> None:
    _, data = checkpoint_file.read(stopped / "checkpoint.pt")
    rewrite(stopped / "checkpoint.pt", world=2, methods=[[len(data), zlib.crc32(data)]] * 2)
    with (stopped / "checkpoint.pt").open("ab") as file:
        file.write(data)
    expected = r"checkpoint\.pt: the state of the run is divided among 2 processes, and now there is 1 process; "
    expected += (
        r"start it with torchrun and 2 processes in all to go on, or choose another hydra\.run\.dir to begin anew$"
    )
    with pytest.raises(ConfigError, match=expected):
        run(stopped, *OPTIONS)


@pytest.mark.slow
def test_torchrun_with_another_number_of_processes(tmp_path: Path, whole: bytes) -> None:
    """Both directions, and the advice followed."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    options = (*OPTIONS, "backbone=cnn", "hardware=cpu", "job.progress=false", "job.picture=false", THREADS)

    def end(out: str, world: int, what: tuple[str, ...] = ("-m", "clrun", *options)) -> tuple[int, str]:
        start = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", "--master-port=29541"] if world else []
        done = subprocess.run(
            [sys.executable, *start, *what, *((f"hydra.run.dir={tmp_path / out}",) if "-m" in what else ())],
            env=env, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr

    assert end("two", 2)[0] == 0
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
from running import run_interrupted
run_interrupted(__import__("pathlib").Path({str(tmp_path / "cut")!r}), *{(*OPTIONS, "hardware=cpu")!r})
"""
    (tmp_path / "start.py").write_text(script)
    assert end("cut", 2, (str(tmp_path / "start.py"),))[0] == 0
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["versions"]["processes"] == 2
    code, text = end("cut", 0)
    assert code == 2 and len(text.splitlines()) == 1 and "divided among 2 processes, and now there is 1 process" in text
    assert "divided among 2 processes, and now there are 3 processes" in end("cut", 3)[1]
    assert end("cut", 2)[0] == 0
    assert (tmp_path / "cut" / "accuracy.csv").read_bytes() == (tmp_path / "two" / "accuracy.csv").read_bytes()
    run_interrupted(tmp_path / "one", *OPTIONS, "hardware=cpu")
    code, text = end("one", 2)
    assert code != 0 and "divided among 1 process, and now there are 2 processes; start it without torchrun" in text
    assert end("one", 0)[0] == 0
    assert (tmp_path / "one" / "accuracy.csv").read_bytes() == whole


# --- cached features


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_flipped_bits_of_cached_features_are_found(suffix: str, tmp_path: Path) -> None:
    """They are computed again, or the damaged part of their description plays no part in what is read."""
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)

    def features() -> np.ndarray:
        found = FeatureCache(tmp_path).get(
            {"of": "rows"}, shape=(4, 3), compute=lambda: [rows], agrees=lambda found: True, about={"dataset": "rows"}
        )
        return found.take(np.arange(4))

    features()
    [stored] = tmp_path.glob(f"*{suffix}")
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for bit in range(0, 8 * len(files[stored]), 13):
        for file, content in files.items():
            file.write_bytes(content)
        flip(stored, bit)
        feature_cache._intact.clear()  # as in another process
        assert np.array_equal(features(), rows), bit
