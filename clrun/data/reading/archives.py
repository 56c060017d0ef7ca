"""Archives from untrusted sources: unpacked into a new folder and nowhere else, after a comparison of the checksum.

Some archives are made to fill a disk or the memory. Therefore the size after unpacking is bounded by an option, by
RATIO times the size of the archive, and by the free space; the number of members by MEMBERS.
"""

import bz2
import glob
import gzip
import hashlib
import lzma
import secrets
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast

from clrun.data.reading.listing import IMAGES, hidden
from clrun.system.errors import ConfigError, first_line
from clrun.system.files import make_folder, open_own, writing
from clrun.system.locks import exclusive

# What the libraries raise on damaged or encrypted archives.
BROKEN: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error)
BROKEN += (lzma.LZMAError, EOFError, RuntimeError, NotImplementedError, ValueError)
RATIO = 200  # size after unpacking in multiples of the archive's size; images hardly shrink, texts about fivefold
SMALL = 10**8  # bytes that every archive may have after unpacking, whatever its ratio
MEMBERS = 10**7  # files and folders of one archive
BLOCK = 2**24  # bytes that are read at once; only a forged header of a tar file asks for more
OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"]\0\0": lzma.open}


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


@dataclass(frozen=True)
class Bound:
    """The bound on the size of an archive after unpacking.

    Attributes:
        archive: the file.
        limit_gb: the option, in GB.
    """

    archive: Path
    limit_gb: float

    def check(self, size: int) -> None:
        """Raise a ConfigError if `size` bytes are too many for the archive."""
        if size > self.limit_gb * 1e9:
            raise ConfigError(
                f"{self.archive}: refused, it has more than {self.limit_gb:g} GB when unpacked; raise "
                "dataset.archive_limit_gb if you trust it"
            )
        if size > max(SMALL, RATIO * self.archive.stat().st_size):
            raise ConfigError(
                f"{self.archive}: refused, it has more than {RATIO} times its size when unpacked, as if it were "
                "made to fill a disk; unpack it yourself if you trust it"
            )

    def check_count(self, members: int) -> None:
        """Raise a ConfigError if the archive has too many members."""
        if members > MEMBERS:
            raise ConfigError(f"{self.archive}: refused, it has more than {MEMBERS} members; unpack it yourself")


@dataclass(frozen=True)
class Bounded:
    """The unpacked content of a compressed tar file, up to a bound."""

    file: IO[bytes]
    bound: Bound

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        if size > BLOCK:
            raise tarfile.ReadError(f"a header of {size} bytes")
        try:
            data = self.file.read(size)
        except OSError as error:  # of bz2 for a damaged file
            raise tarfile.ReadError(first_line(error)) from None
        self.bound.check(self.file.tell())
        return data

    def seek(self, position: int) -> int:
        """Go to a position, which in compressed files means to unpack up to there."""
        self.bound.check(position)
        return self.file.seek(position)

    def tell(self) -> int:
        """Return the position."""
        return self.file.tell()


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
    bound: Bound

    def members(self) -> list[Member]:
        """Return the members of the archive."""
        found: list[Member] = []
        for info in self.file:
            self.bound.check_count(len(found))
            link = "link" if info.issym() or info.islnk() else "device"
            kind = "folder" if info.isdir() else "file" if info.isfile() else link
            found.append(Member(info.name, kind, info.size, info))
        return found

    def open(self, member: Member) -> IO[bytes]:
        """Open a file of the archive."""
        found = self.file.extractfile(member.info)
        assert found is not None, "only files are opened"
        return found


def unpack(archive: Path, folder: Path, *, sha256: str | None, limit_gb: float) -> None:
    """Unpack a zip or tar file into a new folder; do nothing if the folder exists.

    If the archive has a single folder at its top, as most have, its content is unpacked without that folder; see
    `placed`. Processes that unpack into the same folder wait for each other. The folder gets its name when it is
    complete.

    Args:
        archive: .zip, .tar, .tar.gz, .tgz, .tar.bz2 or .tar.xz.
        folder: the new folder.
        sha256: checksum that the archive must have, hexadecimal; None to skip the comparison.
        limit_gb: largest size after unpacking in GB.

    Raises:
        ConfigError: the archive is missing, damaged or has another checksum; a member would be written outside the
            folder, or is a link or a device; it is too large; the disk is too small or cannot be written. Nothing of
            it is left on the disk then.
    """
    if folder.exists():
        return
    _check(archive, sha256)
    make_folder(folder.parent)
    with exclusive(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return
        for left in folder.parent.glob(f"{glob.escape(folder.name)}.*.unpacking"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary, bound = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.unpacking"), Bound(archive, limit_gb)
        try:
            with _opened(archive, bound) as content:
                members = content.members()
                _refuse_unsafe(archive, members)
                _refuse_too_large(bound, folder.parent, members)
                with writing(folder):
                    _write(content, members, archive, temporary)
                    temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


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
def _opened(archive: Path, bound: Bound) -> Iterator[Archive]:
    """Open an archive by its content; turn errors of its library about damage into a `ConfigError`."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield Zip(file)
        else:
            with archive.open("rb") as stored:
                start = stored.read(6)
            opener = next((found for magic, found in OPENERS.items() if start.startswith(magic)), open)
            with opener(archive, "rb") as unpacked, _tar(archive, Bounded(unpacked, bound)) as tar:
                yield Tar(tar, bound)
    except BROKEN as error:
        raise ConfigError(f"{archive}: cannot be unpacked ({error}); download it again") from error


def _tar(archive: Path, content: Bounded) -> tarfile.TarFile:
    """Return the tar file with this content."""
    try:
        return tarfile.TarFile(fileobj=cast(Any, content))
    except tarfile.ReadError:
        raise ConfigError(f"{archive}: is neither a zip nor a tar file; dataset.archive must name one") from None


def _refuse_unsafe(archive: Path, members: Sequence[Member]) -> None:
    """Refuse an archive with a member that would be written outside the folder, or leads outside of it."""
    for member in members:
        path = PurePosixPath(member.name.replace("\\", "/"))
        outside = path.is_absolute() or ".." in path.parts or ":" in (path.parts or ("",))[0]
        if outside or "\0" in member.name:
            raise ConfigError(f"{archive}: refused, its member {member.name!r} would be written outside the folder")
        if member.kind not in ("file", "folder"):
            raise ConfigError(f"{archive}: refused, its member {member.name!r} is a {member.kind}")


def _refuse_too_large(bound: Bound, folder: Path, members: Sequence[Member]) -> None:
    """Refuse an archive that is too large when unpacked, or does not fit on the disk."""
    bound.check_count(len(members))
    size, free = sum(member.size for member in members), shutil.disk_usage(folder).free
    bound.check(size)
    if size > free:
        raise ConfigError(
            f"{bound.archive}: needs {size / 1e9:.1f} GB when unpacked, and {folder} has {free / 1e9:.1f} GB; free "
            "some space"
        )


def _write(content: Archive, members: Sequence[Member], archive: Path, folder: Path) -> None:
    """Write the files of an archive into `folder`; see `placed`."""
    make_folder(folder)
    for member, path in placed(archive, members):
        target = folder.joinpath(*path)
        make_folder(target.parent)
        target.unlink(missing_ok=True)  # of two members of one name the last counts
        with content.open(member) as source, open_own(target, "new") as file:
            shutil.copyfileobj(source, file)


def placed(archive: Path, members: Sequence[Member]) -> list[tuple[Member, tuple[str, ...]]]:
    """Return the files of an archive that are written, each with its path in the new folder.

    Backslashes count as slashes, as Windows programs write them. Hidden files, and those that archive programs add for
    themselves (`__MACOSX`), are left out. If all images lie in a single folder at the top, that folder is left out of
    the paths; files beside it, such as a README, stay at the top.

    Args:
        archive: the file, for messages.
        members: what the archive holds.

    Raises:
        ConfigError: no file is left, or a member is both a file and a folder.
    """
    files = [(m, PurePosixPath(m.name.replace("\\", "/")).parts) for m in members if m.kind == "file"]
    files = [(member, path) for member, path in files if path and not any(map(hidden, path))]
    if not files:
        raise ConfigError(f"{archive}: holds no files, or hidden ones alone")
    tops = {path[0] for _, path in files if len(path) > 1}
    loose = any(IMAGES.has(path[0]) for _, path in files if len(path) == 1)
    if len(tops) == 1 and not loose:
        below = {path[1:] for _, path in files if len(path) > 1}
        files = [(m, path[1:] if len(path) > 1 else path) for m, path in files if len(path) > 1 or path not in below]
    folders = {path[:end] for _, path in files for end in range(1, len(path))}
    for member, path in files:
        if path in folders:
            raise ConfigError(f"{archive}: refused, its member {member.name!r} is both a file and a folder")
    return files
