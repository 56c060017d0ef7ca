"""Archives that are made to fill the disk or the memory are refused, and a failure leaves nothing on the disk."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from clrun.data.reading import archives
from clrun.data.reading.archives import unpack
from clrun.system.errors import ConfigError

Opener = Callable[[Path, str], IO[bytes]]
OPENERS: dict[str, Opener] = {"tgz": gzip.open, "tbz": bz2.open, "txz": lzma.open, "tar": open}  # type: ignore[dict-item]


def tar(path: Path, *members: tuple[str, int], opener: Opener = gzip.open, **attributes: object) -> Path:  # type: ignore[assignment]
    """Write a tar file whose members hold so many zero bytes; its end may be missing, as in a forged file."""
    with opener(path, "wb") as file:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            for key, value in attributes.items():
                setattr(info, key, value)
            file.write(info.tobuf())
            file.write(bytes(-(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE))
    return path


def listed(folder: Path) -> list[str]:
    """The names in a folder, without the lock that all who unpack share."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("kind", OPENERS)
def test_an_archive_beyond_the_option_is_refused(tmp_path: Path, kind: str) -> None:
    archive = tar(tmp_path / "a", ("a/1.png", 2**20), ("a/2.png", 2**20), opener=OPENERS[kind])
    with pytest.raises(ConfigError, match=r"a: refused, it has more than 0.001 GB .*dataset.archive_limit_gb"):
        unpack(archive, tmp_path / "out", sha256=None, limit_gb=0.001)
    assert listed(tmp_path) == ["a"]
    unpack(archive, tmp_path / "out", sha256=None, limit_gb=0.01)
    assert listed(tmp_path / "out") == ["1.png", "2.png"]


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_an_archive_that_grows_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(archives, "SMALL", 2**20)
    archive = tmp_path / f"bomb.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a/1.png", bytes(2**22))
    else:
        tar(archive, ("a/1.png", 2**22))
    with pytest.raises(ConfigError, match=r"refused, it has more than 200 times its size when unpacked"):
        unpack(archive, tmp_path / "out", sha256=None, limit_gb=500)
    assert listed(tmp_path) == [archive.name]


def test_a_zip_file_cannot_hide_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "SMALL", 2**20)
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1.png", bytes(2**22))
    size = (2**22).to_bytes(4, "little")
    archive.write_bytes(archive.read_bytes().replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "out", sha256=None, limit_gb=500)
    assert listed(tmp_path) == ["bomb.zip"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_forged_header_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes) -> None:
    monkeypatch.setattr(archives, "BLOCK", 2**20)
    archive = tar(tmp_path / "a.tgz", ("a", 2**22), type=kind)
    with pytest.raises(ConfigError, match=r"a.tgz: (cannot be unpacked|is neither)"):
        unpack(archive, tmp_path / "out", sha256=None, limit_gb=500)
    archive = tar(tmp_path / "b.tgz", ("first", 0), ("a", 2**22), type=kind)
    with pytest.raises(ConfigError, match=r"b.tgz: (cannot be unpacked|is neither)"):
        unpack(archive, tmp_path / "out", sha256=None, limit_gb=500)


def test_the_number_of_members_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MEMBERS", 3)
    archive = tar(tmp_path / "a.tgz", *((f"a/{number}.png", 0) for number in range(4)))
    with pytest.raises(ConfigError, match="a.tgz: refused, it has more than 3 members"):
        unpack(archive, tmp_path / "out", sha256=None, limit_gb=500)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for number in range(4):
            file.writestr(f"a/{number}.png", b"")
    with pytest.raises(ConfigError, match="a.zip: refused, it has more than 3 members"):
        unpack(tmp_path / "a.zip", tmp_path / "out", sha256=None, limit_gb=500)
    assert listed(tmp_path) == ["a.tgz", "a.zip"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_unpacking_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    archive = tar(tmp_path / "a.tgz", ("a/1.png", 10), ("a/2.png", 10))
    copy, copied = archives.shutil.copyfileobj, []

    def failing(source: IO[bytes], target: IO[bytes]) -> None:
        copied.append(listed(tmp_path))
        if len(copied) == 2:
            raise error
        copy(source, target)

    monkeypatch.setattr(archives.shutil, "copyfileobj", failing)
    with pytest.raises((ConfigError, KeyboardInterrupt)):
        unpack(archive, tmp_path / "out", sha256=None, limit_gb=500)
    assert len(copied[0]) == 2 and listed(tmp_path) == ["a.tgz"]


def test_what_a_killed_process_has_left_is_removed_and_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "out.unpacking").symlink_to(tmp_path / "home")
    (tmp_path / "out.0123456789abcdef.unpacking").mkdir()
    (tmp_path / "out.0123456789abcdef.unpacking" / "old.png").touch()
    unpack(tar(tmp_path / "a.tgz", ("a/1.png", 10)), tmp_path / "out", sha256=None, limit_gb=500)
    assert listed(tmp_path) == ["a.tgz", "home", "out", "out.unpacking"]
    assert os.listdir(tmp_path / "out") == ["1.png"] and not os.listdir(tmp_path / "home")


def test_of_two_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for content in (b"first", b"second"):
            info = tarfile.TarInfo("a/1.txt")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    unpack(tmp_path / "a.tar", tmp_path / "out", sha256=None, limit_gb=500)
    assert (tmp_path / "out" / "1.txt").read_bytes() == b"second"
