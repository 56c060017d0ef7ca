"""Every kind of image file that people have, each with the grey or colour that is right."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import decoding, encoded
from PIL import Image
from running import member

from clrun.api.learner import _range
from clrun.data import survey as surveys
from clrun.data.decode import FileList, decode
from clrun.data.images import FileImages, ImageSplit, JoinedImages
from clrun.data.survey import ranged, survey
from clrun.system.errors import ConfigError
from clrun.system.yaml_files import conf_dir

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone

SIDE = 8
GREY = np.full((SIDE, SIDE), 136, dtype=np.uint8)
RED = np.full((SIDE, SIDE, 3), (200, 40, 24), dtype=np.uint8)
MIDDLE = (slice(2, 6), slice(2, 6))


class Content:
    """Files in memory, as `survey` takes them."""

    place = "memory"

    def __init__(self, *content: bytes) -> None:
        self.contents = content

    def __len__(self) -> int:
        return len(self.contents)

    def name(self, row: int) -> str:
        return f"{row}.img"

    def content(self, row: int) -> bytes:
        return self.contents[row]

    def stamp(self, row: int) -> tuple[int, int]:
        return len(self.contents[row]), zlib.crc32(self.contents[row])


def read(*content: bytes, channels: int = 3, **options: Any) -> tuple[np.ndarray, str]:
    """The first of some files as it is stored, and the word on its range."""
    wanted = decoding(**({"size": SIDE, "verify": "headers"} | options))
    found = survey(Content(*content), wanted, channels)
    if found.problems:
        raise ConfigError(found.problems[0])
    wanted, said = ranged(wanted, [found])
    return decode(content[0], "x", wanted, channels), said


def png(values: np.ndarray, *, bits: int = 16, clear: tuple[int, ...] = (), interlaced: bool = False) -> bytes:
    """A PNG file of [H, W, C] values, which Pillow cannot write with 16 bits per colour."""
    values = values if values.ndim == 3 else values[..., None]
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = [b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values]
    if interlaced:  # Adam7 passes
        steps = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
        passes = [values[top::down, left::right] for top, down, left, right in steps]
        rows = [b"\0" + row.astype(">u2").tobytes() for part in passes if part.size for row in part]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, int(interlaced))
    transparent = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + transparent + data + chunk(b"IEND", b"")


def tiff(values: np.ndarray, order: str = "<", sample: int = 1) -> bytes:
    """An uncompressed TIFF file of [H, W, C] values; `sample` is 1 for whole numbers, 3 for floats."""
    values = values if values.ndim == 3 else values[..., None]
    height, width, channels = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(order + "H" * channels, *[8 * values.itemsize] * channels)
    entries = [(256, 4, width), (257, 4, height), (258, 3, None), (259, 3, 1), (262, 3, 2 if channels > 2 else 1)]
    entries += [(273, 4, None), (277, 3, channels), (278, 4, height), (279, 4, len(data)), (339, 3, None)]
    entries += [(338, 3, 2)] if channels in (2, 4) else []
    entries.sort()
    after = 8 + 2 + 12 * len(entries) + 4
    kinds = struct.pack(order + "H" * channels, *[sample] * channels)
    out = (
        (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + struct.pack(order + "H", len(entries))
    )
    for tag, kind, value in entries:
        several = tag in (258, 339)
        out += struct.pack(order + "HHI", tag, kind, channels if several else 1)
        if several and 2 * channels <= 4:
            out += (bits if tag == 258 else kinds).ljust(4, b"\0")
        elif several:
            out += struct.pack(order + "I", after if tag == 258 else after + len(bits))
        elif tag == 273:
            out += struct.pack(order + "I", after + len(bits) + len(kinds))
        else:
            out += struct.pack(order + ("HH" if kind == 3 else "I"), *((value, 0) if kind == 3 else (value,)))
    return out + struct.pack(order + "I", 0) + bits + kinds + data


def deep(bits: int, values: np.ndarray = GREY) -> np.ndarray:
    """8-bit values as a device with so many bits stores them; one pixel is white."""
    found = values.astype(np.uint16) << (bits - 8)
    found[0, 0] = 2**bits - 1
    return found


def alpha(colour: np.ndarray, value: int) -> np.ndarray:
    return np.concatenate([colour, np.full((SIDE, SIDE, 1), value, dtype=colour.dtype)], axis=2)


def grey3(value: int) -> tuple[int, int, int]:
    return (value, value, value)


Kind = tuple[Callable[[], bytes], tuple[int, int, int], int]  # content, colour in the middle, tolerance
KINDS: dict[str, Kind] = {}


def kind(name: str, content: Callable[[], bytes], colour: tuple[int, int, int], tolerance: int = 0) -> None:
    KINDS[name] = (content, colour, tolerance)


def saved(image: np.ndarray | Image.Image, form: str, **options: Any) -> Callable[[], bytes]:
    made = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return lambda: encoded(made, form, **options)


RED3 = (200, 40, 24)
for form in ("PNG", "BMP", "PPM", "TIFF"):
    kind(f"{form} colour", saved(RED, form), RED3)
    kind(f"{form} grey", saved(GREY, form), grey3(136))
    kind(f"{form} two colours", saved(Image.fromarray(GREY > 100), form), grey3(255))
for form in ("JPEG", "WEBP"):
    kind(f"{form} colour", saved(RED, form, quality=95), RED3, 6)
kind("JPEG grey", saved(GREY, "JPEG"), grey3(136), 2)
kind("JPEG progressive", saved(RED, "JPEG", progressive=True, quality=95), RED3, 6)
kind("JPEG four inks", saved(Image.fromarray(RED).convert("CMYK"), "JPEG", quality=95), RED3, 6)
kind("JPEG 4:2:0", saved(RED, "JPEG", subsampling=2, quality=95), RED3, 6)
kind("WEBP lossless", saved(RED, "WEBP", lossless=True), RED3)
kind("WEBP with alpha", saved(alpha(RED, 255), "WEBP", lossless=True), RED3)
kind("WEBP transparent", saved(alpha(RED, 0), "WEBP", lossless=True), grey3(255))
kind("GIF colour", saved(Image.fromarray(RED).quantize(8), "GIF"), RED3)
kind("GIF grey", saved(GREY, "GIF"), grey3(136))
kind("GIF transparent", saved(Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)), "GIF", transparency=0), grey3(255))
kind("GIF animated", saved(RED, "GIF", save_all=True, append_images=[Image.fromarray(GREY)]), RED3, 8)
kind("PNG animated", saved(RED, "PNG", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]), RED3)
kind("PNG palette", saved(Image.fromarray(RED).quantize(4), "PNG"), RED3)
kind("PNG opaque", saved(alpha(RED, 255), "PNG"), RED3)
kind("PNG half transparent", saved(alpha(RED, 128), "PNG"), (227, 147, 139), 1)
kind("PNG transparent", saved(alpha(RED, 0), "PNG"), grey3(255))
kind("PNG grey with alpha", saved(alpha(GREY[..., None], 255), "PNG"), grey3(136))
kind("PNG grey transparent", saved(alpha(GREY[..., None], 0), "PNG"), grey3(255))
kind("PNG transparent grey", saved(GREY, "PNG", transparency=136), grey3(255))
kind("PNG another transparent grey", saved(GREY, "PNG", transparency=135), grey3(136))
kind("PNG transparent colour", saved(RED, "PNG", transparency=RED3), grey3(255))
kind("PNG 2 bits", saved(Image.fromarray(GREY).convert("L").quantize(2), "PNG", bits=2), grey3(136))
kind("PNG 4 bits", saved(Image.fromarray(RED).quantize(4), "PNG", bits=4), RED3)
kind("TIFF compressed", saved(RED, "TIFF", compression="tiff_lzw"), RED3)
kind("TIFF deflate", saved(RED, "TIFF", compression="tiff_adobe_deflate"), RED3)
kind("TIFF fax", saved(Image.fromarray(GREY > 100), "TIFF", compression="group4"), grey3(255))
kind("TIFF pages", saved(RED, "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]), RED3)
kind("TIFF four inks", saved(Image.fromarray(RED).convert("CMYK"), "TIFF"), RED3)
kind("TIFF with alpha", saved(alpha(RED, 255), "TIFF"), RED3)
kind("PGM 12 bits", lambda: b"P5 8 8 4095\n" + (GREY.astype("u2") << 4).astype(">u2").tobytes(), grey3(135), 1)
kind("PGM 16 bits", lambda: b"P5 8 8 65535\n" + (GREY.astype("u2") << 8).astype(">u2").tobytes(), grey3(136))
kind("PPM 10 bits", lambda: b"P6 8 8 1023\n" + (RED.astype("u2") << 2).astype(">u2").tobytes(), RED3, 1)
kind("PBM text", lambda: b"P1 8 8\n" + b"0 " * 64, grey3(255))
kind("PGM text", lambda: b"P2 8 8 255\n" + b"136 " * 64, grey3(136))
for bits in (8, 10, 12, 14, 16):
    kind(f"PNG grey, {bits} bits in 16", lambda bits=bits: png(deep(bits)), grey3(136))
    kind(f"PNG colour, {bits} bits in 16", lambda bits=bits: png(deep(bits, RED)), RED3)
    kind(f"TIFF grey, {bits} bits in 16", saved(deep(bits), "TIFF"), grey3(136))
    kind(f"TIFF colour, {bits} bits in 16", lambda bits=bits: tiff(deep(bits, RED)), RED3)
kind("TIFF grey 16, compressed", saved(deep(12), "TIFF", compression="tiff_adobe_deflate"), grey3(136))
kind("TIFF grey 16, other byte order", lambda: tiff(deep(12), ">"), grey3(136))
kind("TIFF colour 16, other byte order", lambda: tiff(deep(12, RED), ">"), RED3)
kind("PNG colour 16, interlaced", lambda: png(deep(12, RED), interlaced=True), RED3)
kind("PNG 16 with alpha", lambda: png(deep(12, alpha(RED, 255))), RED3)
kind("PNG grey 16 with alpha", lambda: png(np.stack([deep(12), np.full_like(deep(12), 65535)], 2)), grey3(136))
kind("PNG grey 16 transparent", lambda: png(np.stack([deep(12), np.zeros_like(deep(12))], 2)), grey3(255))
kind("PNG 16 with a transparent grey", lambda: png(deep(12), clear=(136 << 4,)), grey3(255))
kind("PNG 16 with another transparent grey", lambda: png(deep(12), clear=((136 << 4) + 1,)), grey3(136))
kind("PNG 16 with a transparent colour", lambda: png(deep(12, RED), clear=tuple(v << 4 for v in RED3)), grey3(255))
kind("TIFF 32 bits with small values", lambda: tiff(deep(12).astype(np.int32), sample=2), grey3(136))


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_images(name: str) -> None:
    content, colour, tolerance = KINDS[name]
    found, _ = read(content())
    assert found.shape == (SIDE, SIDE, 3)
    assert np.abs(found[MIDDLE].astype(int) - colour).max() <= tolerance
    grey, _ = read(content(), channels=1)
    weighted = 0.299 * found[MIDDLE][..., 0] + 0.587 * found[MIDDLE][..., 1] + 0.114 * found[MIDDLE][..., 2]
    assert np.abs(grey[MIDDLE][..., 0].astype(float) - weighted).max() <= 1.5


def test_the_table_has_at_least_sixty_kinds() -> None:
    assert len(KINDS) >= 60


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_range_is_that_of_all_files_and_is_said(bits: int) -> None:
    dark = np.full((SIDE, SIDE), 5, dtype=np.uint16)
    found, said = read(png(dark), png(deep(bits)), encoded(Image.fromarray(GREY)))
    assert said == f"16-bit files read as {bits} bits, as found" and (found == 5 >> (bits - 8)).all()
    assert read(encoded(Image.fromarray(GREY)))[1] == ""


@pytest.mark.parametrize("name", ["PNG grey", "PNG colour", "TIFF grey"])
def test_a_range_may_be_given(name: str) -> None:
    content = KINDS[f"{name}, 12 bits in 16"][0]()
    found, said = read(content, range=16)
    expected = (np.array(KINDS[f"{name}, 12 bits in 16"][1]) << 4) >> 8
    assert (found[MIDDLE] == expected).all() and said == "16-bit files read as 16 bits, as set"
    with pytest.raises(ConfigError, match=r"cannot be decoded \(its value 4095 is outside dataset.images.range=10"):
        read(content, range=10)
    low, high = 0.0, 8190.0
    found, said = read(content, range=[low, high])
    scaled = np.rint((np.array(KINDS[f"{name}, 12 bits in 16"][1]) << 4) * (255 / high))
    assert (found[MIDDLE] == scaled).all() and said == "values 0 to 8190 as black to white"


def test_a_range_given_or_found_is_part_of_how_images_are_stored() -> None:
    plain = decoding().recipe
    assert decoding(range=16).recipe == plain and len({plain, decoding(range=12).recipe, decoding(range=8).recipe}) == 3


@pytest.mark.parametrize("span", [[-1.0, 1.0], [0.0, 1.0]])
def test_floats_need_a_range(span: list[float]) -> None:
    content = tiff(np.full((SIDE, SIDE), 0.25, dtype=np.float32), sample=3)
    with pytest.raises(ConfigError, match=r"32-bit values need a range: set dataset.images.range="):
        read(content)
    found, said = read(content, range=span)
    assert (found == round((0.25 - span[0]) / (span[1] - span[0]) * 255)).all() and "as black to white" in said
    with pytest.raises(ConfigError, match="it holds NaN or infinite values"):
        read(tiff(np.full((SIDE, SIDE), np.nan, dtype=np.float32), sample=3), range=span, verify="decode")


def test_numbers_below_zero_need_a_range() -> None:
    content = tiff(np.full((SIDE, SIDE), -500, dtype=np.int32), sample=2)
    with pytest.raises(ConfigError, match="32-bit values need a range"):
        read(content)
    assert (read(content, range=[-1000.0, 1000.0])[0] == 64).all()


@pytest.mark.parametrize("span", [[], [1.0], [2.0, 2.0], [3.0, 1.0], [0.0, 1.0, 2.0]])
def test_a_range_has_an_extent(span: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"^dataset.images.range: expected auto, 8, 10, 12, 14, 16 or"):
        decoding(range=span)


@pytest.mark.parametrize(("verify", "found"), [("headers", {0}), ("decode", {0, 1}), ("none", set())])
def test_files_are_looked_at_as_asked(verify: str, found: set[int]) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    files = Content(b"no image", whole[: len(whole) // 2], whole)
    assert set(survey(files, decoding(verify=verify), 3).problems) == found
    assert set(survey(files, decoding(verify=verify, unreadable="skip"), 3).problems) == {0, 1}


def test_files_to_predict_are_read_in_the_range_of_the_run(tmp_path: Path) -> None:
    stored = FileImages(FileList(tmp_path, ("x.png",)), decoding(range=12), channels=1, part="test")
    split = ImageSplit(stored, torch.zeros(1))
    for images in (split.images, JoinedImages([split])):
        stream: Any = SimpleNamespace(tasks=[SimpleNamespace(test=SimpleNamespace(images=images))])
        assert _range(stream, decoding()) == 12


def test_files_that_were_looked_at_are_opened_again_only_when_one_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(surveys, "STORED", 2)
    looked: list[int] = []
    plain = surveys._look
    monkeypatch.setattr(surveys, "_look", lambda *args: looked.append(args[1]) or plain(*args))
    for k in range(3):
        Image.fromarray(np.full((8, 8), 1000 + k, dtype=np.uint16)).save(tmp_path / f"{k}.png")
        os.utime(tmp_path / f"{k}.png", (1, 1))
    files, options = FileList(tmp_path, ("0.png", "1.png", "2.png")), decoding(verify="headers")

    def found() -> tuple[dict[int, str], dict[int, int], int]:
        looked.clear()
        surveys._known.clear()  # as another process
        survey = surveys.survey(files, options, 1)
        return survey.problems, survey.largest, len(looked)

    first = {0: 1000, 1: 1001, 2: 1002}
    assert found() == ({}, first, 3) and found() == ({}, first, 0)
    [stored] = (tmp_path / "cache" / "surveys").iterdir()
    stored.write_text("nonsense")
    assert found() == ({}, first, 3) and found() == ({}, first, 0)
    (tmp_path / "1.png").write_bytes(b"no image")
    for _ in range(2):  # a survey with a problem is not kept: the permissions of a file may change without its time
        problems, largest, opened = found()
        assert set(problems) == {1} and largest == {0: 1000, 2: 1002} and opened == 3


def test_every_published_data_set_of_files_looks_at_them_first() -> None:
    for file in (conf_dir() / "dataset").glob("*.yaml"):
        images = member(file).get("images")
        assert images is None or images["verify"] == "headers", file.stem
