"""Archives from untrusted sources: unpacked into a new folder and nowhere else, after a comparison of the checksum."""

import gzip
import hashlib
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from clrun.system.errors import ConfigError
from clrun.system.files import exclusive, writing

# What the libraries raise on damaged or encrypted archives.
BROKEN: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error)
BROKEN += (lzma.LZMAError, EOFError, RuntimeError, NotImplementedError, ValueError)


@dataclass(frozen=True)
class Member:
    """A file or folder in an archive.

    Attributes:
        name: path within the archive, with slashes.
        kind: "file", "folder", "link" or "device".
        size: bytes after unpacking.
        info: the archive library's own record of the member.
    """

    name: str
    kind: str
    size: int
    info: Any


class Archive(Protocol):
    """An open archive."""

    def members(self) -> list[Member]:
        """Return the members of the archive."""

    def open(self, member: Member) -> IO[bytes]:
        """Open a file of the archive."""


@dataclass(frozen=True)
class Zip:
    """An open zip file."""

    file: zipfile.ZipFile

    def members(self) -> list[Member]:
        """Return the members of the archive. The Unix mode in the upper half of the attributes marks links."""
        link = 0o120000
        found = []
        for info in self.file.infolist():
            kind = "folder" if info.is_dir() else "link" if (info.external_attr >> 16) & 0o170000 == link else "file"
            found.append(Member(info.filename, kind, info.file_size, info))
        return found

    def open(self, member: Member) -> IO[bytes]:
        """Open a file of the archive."""
        return self.file.open(member.info)


@dataclass(frozen=True)
class Tar:
    """An open tar file, compressed or not."""

    file: tarfile.TarFile

    def members(self) -> list[Member]:
        """Return the members of the archive."""
        found = []
        for info in self.file.getmembers():
            link = "link" if info.issym() or info.islnk() else "device"
            kind = "folder" if info.isdir() else "file" if info.isfile() else link
            found.append(Member(info.name, kind, info.size, info))
        return found

    def open(self, member: Member) -> IO[bytes]:
        """Open a file of the archive."""
        found = self.file.extractfile(member.info)
        assert found is not None, "only files are opened"
        return found


def unpack(archive: Path, folder: Path, *, sha256: str | None) -> None:
    """Unpack a zip or tar file into a new folder; do nothing if the folder exists.

    If the archive has a single folder at its top, as most have, its content is unpacked without that folder. Processes
    that unpack into the same folder wait for each other. The folder gets its name when it is complete.

    Args:
        archive: .zip, .tar, .tar.gz, .tgz, .tar.bz2 or .tar.xz.
        folder: the new folder.
        sha256: checksum that the archive must have, hexadecimal; None to skip the comparison.

    Raises:
        ConfigError: the archive is missing, damaged or has another checksum; a member would be written outside the
            folder, or is a link or a device; the disk is too small or cannot be written.
    """
    if folder.exists():
        return
    _check(archive, sha256)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return
        temporary = folder.with_name(f"{folder.name}.unpacking")
        shutil.rmtree(temporary, ignore_errors=True)
        with _opened(archive) as content:
            members = content.members()
            _refuse_unsafe(archive, members)
            _refuse_too_large(archive, folder.parent, sum(member.size for member in members))
            with writing(folder):
                _write(content, members, temporary)
                temporary.rename(folder)


def _check(archive: Path, sha256: str | None) -> None:
    """Refuse an archive that is missing or has another checksum."""
    if not archive.is_file():
        raise ConfigError(f"dataset.archive: there is no file {archive}; set it to a zip or tar file, or to null")
    if sha256 is None:
        return
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise ConfigError(
            f"{archive}: its sha256 is {found}, not {sha256} (dataset.sha256); download the archive again, or correct "
            "dataset.sha256"
        )


@contextmanager
def _opened(archive: Path) -> Iterator[Archive]:
    """Open an archive by its content; turn errors of its library about damage into a `ConfigError`."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield Zip(file)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                yield Tar(tar)
        else:
            raise ConfigError(f"{archive}: is neither a zip nor a tar file; dataset.archive must name one")
    except BROKEN as error:
        raise ConfigError(f"{archive}: cannot be unpacked ({error}); download it again") from error


def _refuse_unsafe(archive: Path, members: Sequence[Member]) -> None:
    """Refuse an archive with a member that would be written outside the folder, or leads outside of it."""
    for member in members:
        path = PurePosixPath(member.name.replace("\\", "/"))
        outside = path.is_absolute() or ".." in path.parts or ":" in (path.parts or ("",))[0]
        if outside or "\0" in member.name:
            raise ConfigError(f"{archive}: refused, its member {member.name!r} would be written outside the folder")
        if member.kind not in ("file", "folder"):
            raise ConfigError(f"{archive}: refused, its member {member.name!r} is a {member.kind}")


def _refuse_too_large(archive: Path, folder: Path, size: int) -> None:
    """Refuse an archive that does not fit on the disk when unpacked."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ConfigError(
            f"{archive}: needs {size / 1e9:.1f} GB when unpacked, and {folder} has {free / 1e9:.1f} GB; free some space"
        )


def _write(content: Archive, members: Sequence[Member], folder: Path) -> None:
    """Write the files of an archive into `folder`, without a single folder at the top."""
    files = [member for member in members if member.kind == "file"]
    parts = [PurePosixPath(member.name).parts for member in files]
    tops = {path[0] for path in parts}
    start = 1 if len(tops) == 1 and min(map(len, parts)) > 1 else 0
    folder.mkdir(parents=True)
    for member, path in zip(files, parts, strict=True):
        target = folder.joinpath(*path[start:])
        target.parent.mkdir(parents=True, exist_ok=True)
        with content.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
