"""Checksums of files: CRC-32, computed while a file is read; a safetensors file carries its own in its metadata.

CRC-32 finds every change within 32 neighbouring bits, hence every single flipped bit, and others with a probability of
1 - 2^-32. It guards against damage by disks, memory and transfers, not against a person who changes a file on purpose.
It reads about 1 GB per second.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BLOCK = 2**20  # bytes read at once
RULE = 2  # how `clrun.data.contents` digests data; digests of another rule cannot be compared with them
SEAL = "clrun.probes"  # the key among the metadata of a safetensors file whose value begins with the checksum
BLANK = "crc32:00000000 "  # what stands for "crc32:", the checksum and a space while the checksum is computed
SEALED = re.compile(rb'"clrun\.probes":"crc32:([0-9a-f]{8}) ')
TRACES = (b'"clrun.probes"', b'"crc32:')  # one of them is left when a single bit of the beginning is damaged
LARGEST_HEADER = 100_000_000  # bytes, as in safetensors


def blocks(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    """Yield the next `size` bytes of an open file, or its rest, in blocks; fewer where the file ends before."""
    while size is None or size > 0:
        block = file.read(BLOCK if size is None else min(BLOCK, size))
        if not block:
            return
        size = None if size is None else size - len(block)
        yield block


def crc_of(file: BinaryIO, size: int | None = None, *, crc: int = 0) -> int:
    """Return the CRC-32 of the next `size` bytes of an open file, or of its rest, continued from `crc`."""
    for block in blocks(file, size):
        crc = zlib.crc32(block, crc)
    return crc


def seal(data: bytes) -> bytearray:
    """Return a safetensors file with its checksum.

    Args:
        data: the file; the value of the key `SEAL` of its metadata begins with `BLANK`.
    """
    sealed = bytearray(data)
    found = SEALED.search(data, 0, 8 + int.from_bytes(data[:8], "little"))
    assert found is not None, "the metadata have a blank seal"
    sealed[found.start(1) : found.end(1)] = f"{zlib.crc32(data):08x}".encode()
    return sealed


def broken_seal(path: Path, *, required: bool) -> str | None:
    """Return why the checksum of a safetensors file is wrong; None when it is right.

    Args:
        path: the file.
        required: whether a file without a checksum is wrong, too; files of other programs have none.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        header = bytearray(file.read(min(int.from_bytes(prefix, "little"), LARGEST_HEADER)))
        found = SEALED.search(header)
        if found is None:
            ours = required or any(trace in header for trace in TRACES)
            return "its checksum is missing" if ours else None
        stored = int(found.group(1), 16)
        header[found.start(1) : found.end(1)] = b"0" * 8
        crc = crc_of(file, crc=zlib.crc32(header, zlib.crc32(prefix)))
    return None if crc == stored else "its checksum does not match its content"
