"""Locks: one holder at a time, who is known to live or to have ended across containers, machines and clocks."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from clrun.system import files, locks
from clrun.system.errors import ConfigError, DataWarning
from clrun.system.locks import exclusive, folder_locked, lock_holder, locked

HOLD = """
import sys, time
from pathlib import Path
from clrun.system.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
TAKE = """
import sys
from pathlib import Path
from clrun.system.errors import ConfigError
from clrun.system.locks import locked
try:
    with locked(Path(sys.argv[1])):
        print("held")
except ConfigError as error:
    print(error)
"""
CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]


def record(**changes):
    """The record of this process in a lock file, as a holder on a file system without locks writes it."""
    return {**locks._identity(), "flock": False, "device": 0, **changes}


@pytest.fixture
def elsewhere(tmp_path):
    """A lock file of a process that runs in another Python process; (path, process)."""
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.wait()


@pytest.fixture
def lockless(monkeypatch):
    """A file system without locks."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)


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
    path.write_text(json.dumps(record(started="long ago")))
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
    path.write_text(json.dumps({**record(), "pid": 1, "host": "another", "boot": "another"}))
    with pytest.raises(ConfigError, match="process 1 on another, last seen"), locked(path):
        pass
    silent = time.time() - locks.SILENCE - 1
    os.utime(path, (silent, silent))
    assert lock_holder(path) is None
    with locked(path):
        assert json.loads(path.read_text())["host"] == socket.gethostname()
    assert not path.exists()


def test_a_held_lock_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
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
        path.write_text(json.dumps(record(pid=2**22 + 1)))
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


# --- identity: containers, machines, clocks


def age(path, seconds):
    """Let the last heartbeat of a lock lie so many seconds in the past."""
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_lock_without_a_known_machine_counts_by_its_heartbeat(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": "1"}))
    with pytest.raises(ConfigError, match="last seen"), locked(path):
        pass
    age(path, locks.SILENCE + 1)
    with locked(path):
        pass


@pytest.mark.parametrize("flock", [True, False])
def test_the_same_host_name_and_pid_on_another_machine_is_another_process(tmp_path, flock):
    path = tmp_path / "lock"
    path.write_text(json.dumps(record(boot="another", flock=flock, device=tmp_path.stat().st_dev)))
    with pytest.raises(ConfigError, match=r"last seen \d s ago"), locked(path):
        pass


def test_another_pid_namespace_counts_by_its_heartbeat_where_there_are_no_locks(tmp_path, lockless):
    path = tmp_path / "lock"
    path.write_text(json.dumps(record(namespace="pid:[1]", pid=1, started="1")))
    with pytest.raises(ConfigError, match="process 1 .*last seen"), locked(path):
        pass
    assert "process 1 " in lock_holder(path)
    age(path, locks.SILENCE + 1)
    assert lock_holder(path) is None
    with locked(path):
        assert json.loads(path.read_text())["flock"] is False


def test_a_holder_in_another_namespace_that_had_the_lock_of_the_file_has_ended_when_it_is_free(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps(record(namespace="pid:[1]", pid=1, flock=True, device=tmp_path.stat().st_dev)))
    assert lock_holder(path) is None
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_without_locks_of_the_file_system_a_process_of_this_namespace_is_looked_up(tmp_path, lockless):
    path = tmp_path / "lock"
    with locked(path):
        assert lock_holder(path) == f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match="in use by process"), locked(path):
            pass
    path.write_text(json.dumps(record(started="1")))
    with locked(path):
        pass


def test_a_process_whose_proc_is_another_namespaces_does_not_look_processes_up(tmp_path, lockless, monkeypatch):
    path = tmp_path / "lock"
    path.write_text(json.dumps(record(namespace=None, started="1")))
    monkeypatch.setattr(locks, "_namespace", lambda: None)
    with pytest.raises(ConfigError, match="last seen"), locked(path):
        pass


def test_a_lock_from_the_future_gives_way_after_the_silence_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SILENCE", 0.3)
    path = tmp_path / "lock"
    path.write_text(json.dumps(record(boot="another")))
    age(path, -3600)
    begin = time.monotonic()
    with pytest.warns(DataWarning) as said, locked(path):
        assert time.monotonic() - begin >= 0.3
        assert json.loads(path.read_text())["boot"] == locks._boot()
    assert ["watching it" in str(said[0].message), "taken over" in str(said[1].message)] == [True, True]


def test_a_lock_from_the_future_that_is_touched_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SILENCE", 5.0)
    path = tmp_path / "lock"
    path.write_text(json.dumps(record(boot="another")))
    age(path, -3600)
    timer = threading.Timer(0.2, lambda: age(path, -3000))
    timer.start()
    with pytest.warns(DataWarning, match="watching"), pytest.raises(ConfigError, match="in use by"), locked(path):
        pass
    timer.join()


def test_ages_are_measured_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.write_text(json.dumps(record(boot="another")))
    later = time.time() + 1e6
    monkeypatch.setattr(locks.time, "time", lambda: later)  # the clock of this machine is wrong
    with pytest.raises(ConfigError, match=r"last seen \d s ago"), locked(path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock"]


def test_a_reader_that_looks_at_a_free_lock_does_not_make_it_look_taken(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.touch()
    file = files.open_own(path, "read")
    files.lock(file, shared=True)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: file.close())
    with locked(path):
        assert file.closed and json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("name", ["lock", ".lock"])
def test_a_lock_file_that_is_a_link_is_refused(tmp_path, name):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "mine")
    hold = locked if name == "lock" else exclusive
    with pytest.raises(ConfigError, match=f"/{name}: is a symbolic link"), hold(tmp_path / name):
        pass
    assert (tmp_path / "mine").read_text() == "mine" and lock_holder(tmp_path / name) is None


def test_a_folder_is_locked_and_cleaned(tmp_path):
    folder = tmp_path / "a" / "b"
    with folder_locked(folder, "lock", cleaned=("inner",)):
        assert (folder / "lock").exists()
        with pytest.raises(ConfigError, match="b: in use by"), folder_locked(folder, "lock"):
            pass
    assert not (tmp_path / "a").exists()
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / files.temporary_name("x")).touch()
    with folder_locked(folder, "lock", cleaned=("inner",)):
        assert not list((folder / "inner").iterdir())


def container(code, path):
    """Run code in a pid namespace of its own, in which it has the process id 1, as in a container."""
    return subprocess.Popen([*CONTAINER, sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def containers():
    """Skip where this machine makes no pid namespaces."""
    if shutil.which("unshare") is None or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("no pid namespaces: unshare is missing or not permitted")


def test_two_containers_with_one_host_name_and_pid_do_not_share_a_folder(containers, tmp_path):
    path = tmp_path / "lock"
    first = container(HOLD, path)
    assert first.stdout.readline() == "held\n"
    assert json.loads(path.read_text())["pid"] == 1
    assert "in use by process 1 on" in container(TAKE, path).communicate()[0]
    with pytest.raises(ConfigError, match="in use by process 1 on"), locked(path):
        pass
    first.kill()
    first.wait()
    deadline = time.monotonic() + 10
    while lock_holder(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert container(TAKE, path).communicate()[0] == "held\n"
