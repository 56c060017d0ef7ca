"""Files that survive a kill and a full disk; locks that a dead process does not keep."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from clrun.system import files
from clrun.system.errors import ConfigError
from clrun.system.files import (
    append_text,
    csv_cell,
    csv_text,
    exclusive,
    json_text,
    lock_holder,
    locked,
    read_json,
    replacing,
)

HOLD = """
import sys, time
from pathlib import Path
from clrun.system.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def full_disk(room):
    """Let no file of this process grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def elsewhere(tmp_path):
    """A lock file of a process that runs in another Python process; (path, process)."""
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.wait()


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


def test_a_lock_is_held_and_released(tmp_path):
    path = tmp_path / "lock"
    with locked(path):
        assert lock_holder(path) == f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"), locked(path):
            pass
    assert not path.exists()
    assert lock_holder(path) is None


def test_a_lock_is_released_by_an_error(tmp_path):
    with pytest.raises(OSError, match="own"), locked(tmp_path / "lock"):
        raise OSError("own")
    assert not (tmp_path / "lock").exists()


def test_a_living_process_keeps_its_lock_and_a_killed_one_does_not(elsewhere):
    path, process = elsewhere
    with pytest.raises(ConfigError, match=f"in use by process {process.pid}"), locked(path):
        pass
    process.kill()  # not waited for: a zombie is dead too
    deadline = time.monotonic() + 10
    while lock_holder(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    with locked(path):
        assert f"process {os.getpid()} " in lock_holder(path)


def test_a_later_process_of_the_same_id_is_not_the_holder(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": "long ago"}))
    assert lock_holder(path) is None
    with locked(path):
        assert json.loads(path.read_text())["started"] != "long ago"
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '"lock"'])
def test_an_empty_or_foreign_lock_file_holds_nothing(tmp_path, content):
    path = tmp_path / "lock"
    path.write_text(content)
    assert lock_holder(path) is None
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid(), "the file names its new holder"
    assert not path.exists()


def test_a_lock_of_another_machine_is_kept_while_it_shows_signs_of_life(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": 1, "host": "another", "started": "1"}))
    with pytest.raises(ConfigError, match="process 1 on another, last seen"), locked(path):
        pass
    silent = time.time() - files.SILENCE - 1
    os.utime(path, (silent, silent))
    assert lock_holder(path) is None
    with locked(path):
        assert json.loads(path.read_text())["host"] == socket.gethostname()
    assert not path.exists()


def test_a_held_lock_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BEAT", 0.01)
    path = tmp_path / "lock"
    with locked(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 60


def test_a_lock_taken_over_meanwhile_is_not_removed(tmp_path):
    path = tmp_path / "lock"
    with locked(path):
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_one_of_many_takes_over_a_stale_lock(tmp_path):
    path = tmp_path / "lock"
    for _ in range(20):
        path.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "started": "1"}))
        barrier, done, outcomes = threading.Barrier(6), threading.Barrier(6), []

        def take(barrier=barrier, done=done, outcomes=outcomes):
            barrier.wait()
            try:
                with locked(path):
                    outcomes.append("held")
                    done.wait()
            except ConfigError:
                outcomes.append("refused")
                done.wait()

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["held"] + ["refused"] * 5


def test_exclusive_waits_for_its_holder(tmp_path):
    path, seen = tmp_path / ".lock", []

    def wait():
        with exclusive(path):
            seen.append("second")

    with exclusive(path):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive() and seen == []
        seen.append("first")
    thread.join()
    assert seen == ["first", "second"]


def test_only_regular_json_files_are_read(tmp_path):
    (tmp_path / "good").write_text('{"a": 1}')
    assert read_json(tmp_path / "good", remedy="remove it") == {"a": 1}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bad").write_text("{")
    (tmp_path / "deep").write_text("[" * 100_000)
    for name, reason in (
        ("pipe", "not a regular file"),
        ("absent", "no such file"),
        ("bad", "Expecting"),
        ("deep", ""),
    ):
        with pytest.raises(ConfigError, match=rf"/{name}: cannot be read \(.*{reason}.*\); remove it$"):
            read_json(tmp_path / name, remedy="remove it")
