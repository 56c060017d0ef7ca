"""Folders from someone else, with links where clrun writes: no file outside the folder is made or changed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import run

from clrun.system.errors import ConfigError
from clrun.system.locks import folder_locked

TINY = ("method=finetune", "job.max_tasks=2", "job.max_steps=1", "budget.epochs=1", "job.max_eval_rows=8")
SWEEP = ("-m", *TINY, "backbone=cnn", "hardware.threads=1", "job.picture=false", "job.progress=false")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder outside the folders of runs, which stays as it is."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert (folder / "mine").read_text() == "mine"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out, *TINY)
    return out


WRITTEN = ("sweep.csv", "report.html", "order_robustness.json", "method_comparison.json", "run/accuracy_matrix.png")


@pytest.mark.parametrize("target", ["mine", "absent"])
def test_a_report_replaces_links_by_files(finished: Path, home: Path, tmp_path: Path, command, target: str) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(finished, folder / "run")
    for name in WRITTEN:
        (folder / name).symlink_to(home / target)
        (folder / f"{name}.tmp").symlink_to(home / target)
    assert command("report", str(folder))[0] == 0
    replaced = WRITTEN if target == "absent" else WRITTEN[:-1]  # a picture that is there is not drawn again
    assert not [name for name in replaced if (folder / name).is_symlink()]


@pytest.mark.parametrize(("name", "target"), [(".lock", "mine"), (".lock", "absent"), ("report", "")])
def test_a_report_refuses_other_links_in_one_line(
    finished: Path, home: Path, tmp_path: Path, command, name: str, target: str
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(finished, folder / "run")
    (folder / name).symlink_to(home / target)
    code, _, err = command("report", str(folder))
    assert (code, err.count("\n")) == (2, 1) and f"{folder / name}: is a symbolic link" in err


@pytest.mark.parametrize("name", [".hydra", "logits", "tensorboard", "clrun.log", "metrics.jsonl", "lock"])
def test_a_run_refuses_links_before_it_writes(home: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / name).symlink_to(home / "mine" if name in ("clrun.log", "metrics.jsonl", "lock") else home)
    with pytest.raises(ConfigError, match="is a symbolic link") as error:
        run(out, *TINY, "job.save_logits=final")
    assert len(str(error.value).splitlines()) == 1
    assert os.listdir(out) == [name]


@pytest.mark.parametrize("target", ["mine", "absent"])
def test_a_run_replaces_links_by_files(home: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    names = ("config.yaml", "accuracy.csv", "model.safetensors")
    for name in (*names, "checkpoint.pt.tmp", "run.json.tmp", "accuracy.csv.tmp"):
        (out / name).symlink_to(home / target)
    run(out, *TINY, "job.save_model=true", "job.keep_checkpoint=true")
    assert not [name for name in (*names, "checkpoint.pt", "run.json") if (out / name).is_symlink()]
    made = {name: (out / name).stat().st_mode & 0o777 for name in (*names, "checkpoint.pt", "run.json", "clrun.log")}
    assert set(made.values()) == {0o666 & ~_umask()}, made


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", ["clrun.log", ".hydra/config.yaml"])
def test_files_that_hydra_writes_on_request_are_no_links(home: Path, tmp_path: Path, command, name: str) -> None:
    out = tmp_path / "run"
    (out / ".hydra").mkdir(parents=True)
    (out / name).symlink_to(home / "mine")
    logging = ("hydra/job_logging=default", "hydra.output_subdir=.hydra")
    code, _, err = command(*SWEEP[1:], *logging, f"hydra.run.dir={out}")
    assert (code, err.count("\n")) == (2, 1) and f"{out / name}: is a symbolic link" in err
    code, _, err = command(*SWEEP, *logging, f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=run")
    assert (code, err.count("\n")) == (2, 1) and f"{out / name}: is a symbolic link" in err


def test_a_second_sweep_in_a_folder_is_refused_before_anything_starts(tmp_path: Path, command) -> None:
    folder = tmp_path / "s"
    with folder_locked(folder, "sweep.lock"):
        code, _, err = command(*SWEEP, "seed=0,1", f"hydra.sweep.dir={folder}")
        assert (code, err.count("\n")) == (2, 1) and f"{folder}: in use by process {os.getpid()}" in err
        assert os.listdir(folder) == ["sweep.lock"]
    assert not folder.exists()


def test_a_sweep_leaves_links_alone(home: Path, tmp_path: Path, command) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "seed=0").symlink_to(home)
    options = (*SWEEP, "seed=0", f"hydra.sweep.dir={folder}", "hydra.sweep.subdir='seed=${seed}'")
    code, _, err = command(*options)
    assert (code, err.count("\n")) == (2, 1) and "seed=0: is a symbolic link" in err
    (folder / "seed=0").unlink()
    (folder / "multirun.yaml").symlink_to(home / "mine")
    assert command(*options)[0] == 0
    assert not (folder / "multirun.yaml").is_symlink() and (folder / "multirun.yaml").stat().st_size
    assert not (folder / "sweep.lock").exists()
