"""Files that survive a kill and a full disk, and are not written through links that someone has put in a folder."""

import json
import os
import resource
import stat
from contextlib import contextmanager

import pytest

from clrun.system.errors import ConfigError
from clrun.system.files import (
    TEMPORARY,
    append_text,
    csv_cell,
    csv_text,
    json_text,
    make_folder,
    open_own,
    refuse_links,
    remove_leftovers,
    replace_text,
    replacing,
    temporary_name,
)
from clrun.system.locks import locked


@contextmanager
def full_disk(room):
    """Let no file of this process grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_replacing_keeps_the_old_file_until_the_block_ends(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_replacing_leaves_nothing_behind_when_the_block_fails(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_one_clear_line_and_touches_nothing(tmp_path):
    replaced, appended = tmp_path / "a", tmp_path / "b"
    replaced.write_text("old")
    append_text(appended, "old\n")
    with full_disk(10):
        with pytest.raises(ConfigError, match=r"a: cannot be written \(File too large\)"), replacing(replaced) as file:
            file.write(b"x" * 100)
        with pytest.raises(ConfigError, match=r"b: cannot be written \(File too large\)"):
            append_text(appended, "x" * 100)
    assert replaced.read_text() == "old"
    assert appended.read_text() == "old\n"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Not a directory"), replacing(tmp_path / "file" / "a"):
        pass
    with pytest.raises(ConfigError, match="No such file or directory"), locked(tmp_path / "absent" / "lock"):
        pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("=1+1", "'=1+1"),
        ("@x", "'@x"),
        ("+x", "'+x"),
        ("-x", "'-x"),
        ("-1-1", "'-1-1"),
        ("\t=1", "'\t=1"),
        ("-1", "-1"),
        ("+.5e-3", "+.5e-3"),
        (-0.5, "-0.5"),
        (0.1 + 0.2, "0.30000000000000004"),
        (None, ""),
        ("a=b", "a=b"),
        ([0, 1], "[0, 1]"),
    ],
)
def test_cells_are_safe_in_a_spreadsheet_and_floats_complete(value, text):
    assert csv_cell(value) == text


def test_csv_quotes_what_would_break_it():
    assert csv_text([["a,b", 'say "x"', "two\nlines", 1]]) == '"a,b","say ""x""","two\nlines",1\n'


def test_json_has_no_nan():
    numpy = pytest.importorskip("numpy")
    value = {1: float("nan"), "x": [numpy.float64(0.1), numpy.int64(3), numpy.array([1.0, float("inf")])], "y": (1, 2)}
    assert json.loads(json_text(value)) == {"1": None, "x": [0.1, 3, [1.0, None]], "y": [1, 2]}


@pytest.fixture
def home(tmp_path):
    """A folder with a file, both of which belong to the user and must stay as they are."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("mine")
    yield tmp_path / "home"
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["secret"]
    assert (tmp_path / "home" / "secret").read_text() == "mine"


def test_a_link_with_the_final_name_is_replaced_and_its_target_kept(home, tmp_path):
    path = tmp_path / "run.json"
    path.symlink_to(home / "secret")
    replace_text(path, "new")
    assert path.read_text() == "new" and not path.is_symlink()


def test_links_with_the_name_of_a_temporary_file_are_not_followed(home, tmp_path):
    path = tmp_path / "run.json"
    path.with_name("run.json.tmp").symlink_to(home / "secret")
    replace_text(path, "new")
    assert path.read_text() == "new"
    found = {temporary_name("a") for _ in range(100)}
    assert len(found) == 100 and all(TEMPORARY.fullmatch(name) for name in found)


def test_a_temporary_file_that_is_there_already_is_not_opened(home, tmp_path, monkeypatch):
    monkeypatch.setattr("clrun.system.files.temporary_name", lambda name: "guessed")
    (tmp_path / "guessed").symlink_to(home / "secret")
    with pytest.raises(ConfigError, match="cannot be written"):
        replace_text(tmp_path / "run.json", "new")


@pytest.mark.parametrize("target", ["secret", "absent"])
def test_nothing_is_appended_through_a_link(home, tmp_path, target):
    path = tmp_path / "clrun.log"
    path.symlink_to(home / target)
    with pytest.raises(ConfigError, match=f"^{path}: is a symbolic link") as error:
        append_text(path, "text")
    assert len(str(error.value).splitlines()) == 1
    for how in ("lock", "update", "read"):
        with pytest.raises(ConfigError, match="is a symbolic link"):
            open_own(path, how)
    with pytest.raises(FileExistsError):
        open_own(path, "new")


def test_a_folder_that_is_a_link_is_refused_below_the_run_and_allowed_above_it(home, tmp_path):
    (tmp_path / "real").mkdir()
    run = tmp_path / "run"
    run.symlink_to(tmp_path / "real")
    (run / ".hydra").symlink_to(home)
    with pytest.raises(ConfigError, match=r"\.hydra: is a symbolic link"):
        replace_text(run / ".hydra" / "config.yaml", "a: 1", below=run)
    with pytest.raises(ConfigError, match=r"\.hydra: is a symbolic link"):
        make_folder(run / ".hydra" / "inner", below=run)
    with pytest.raises(ConfigError, match=r"\.hydra: is a symbolic link"):
        refuse_links(run / ".hydra")
    replace_text(run / "logits" / "after_1.npz", "1", below=run)
    assert (tmp_path / "real" / "logits" / "after_1.npz").read_text() == "1"


def test_pipes_and_second_names_of_a_file_are_refused(home, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ConfigError, match="pipe: cannot be written"):
        append_text(tmp_path / "pipe", "text")
    os.close(reader)
    with pytest.raises(ConfigError, match="pipe: cannot be written"):
        append_text(tmp_path / "pipe", "text")
    os.link(home / "secret", tmp_path / "clrun.log")
    with pytest.raises(ConfigError, match="hard link"):
        append_text(tmp_path / "clrun.log", "text")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_all_files_get_the_mode_that_the_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        replace_text(tmp_path / "a", "1")
        append_text(tmp_path / "b", "1")
        for how, name in (("new", "c"), ("lock", "d")):
            open_own(tmp_path / name, how).close()
        with locked(tmp_path / "lock"):
            assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}
    finally:
        os.umask(before)


def test_leftovers_of_killed_processes_are_removed_and_files_being_written_are_not(home, tmp_path):
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    left = [run / temporary_name("run.json"), run / ".hydra" / temporary_name("config.yaml")]
    for path in (*left, run / "notes.tmp", home / "secret"):
        path.write_text("mine")
    (run / "logits").symlink_to(home)
    (run / temporary_name("linked")).symlink_to(home / "secret")
    with replacing(run / "checkpoint.pt") as file:
        remove_leftovers(run, ".hydra", "logits", "absent")
        file.write(b"whole")
    assert not any(path.exists() for path in left)
    assert (run / "checkpoint.pt").read_bytes() == b"whole" and (run / "notes.tmp").exists()
