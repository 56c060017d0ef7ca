"""From an image file to a stored image: accepted formats, orientation, channels, size, and errors.

Shapes: `M` files, `S` side of the stored square, `C` channels.
"""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clrun.data.contents import StoredRows
from clrun.data.depth import Span, depth, picture
from clrun.system import libraries
from clrun.system.errors import ConfigError, Count, Range, first_line, one_line

Pixels = NDArray[np.uint8]
PIXEL_LIMIT = 178_956_970  # Pillow refuses larger images by itself
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none of Pillow's formats that start other programs
SUFFIXES: tuple[str, ...] = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
)
SUFFIXES += (".tiff", ".webp")
ORIENTATION = 0x0112  # EXIF tag
ELONGATED = 3  # images longer than 3 times their shorter side lose their ends before they are resized


@dataclass(frozen=True)
class Decoding:
    """How image files become stored images: uint8 squares, grey or RGB.

    Alpha (also of palettes) is laid over white. Images with more than 8 bits per value are scaled as `clrun.data.depth`
    describes, and of animations and multi-page files the first picture is taken. A JPEG more than twice as large as
    needed is decoded at a fraction of its size that is still twice the wanted one.

    Attributes:
        size: S in pixels.
        fit: "crop" scales the shorter side to S and keeps the middle square; "squash" scales both sides to S.
        interpolation: method of the resizing, which is antialiased.
        exif: rotate images as their EXIF orientation says. Published data sets are read without, as by torchvision.
        max_pixels: images with more pixels are refused before they are decoded; the error names the file.
        unreadable: "error" stops at files that cannot be decoded; "skip" decodes every file once before the run and
            leaves out those that fail.
        memory: megabytes of decoded images that may stay in memory; a data set that fits is decoded once per process.
        cache: folder for decoded images on disk; true for the user's cache folder, false for no cache.
        range: what black and white are in files with more than 8 bits per value: the bits that they use, "auto" for the
            smallest range that holds all values found, or [lowest, highest]. Files of floats need the latter.
        verify: what is tried of every file before the run: "headers" (is it an image, how large, how many bits),
            "decode" (can all of it be decoded) or "none"; with "none", "auto" stands for 16 bits.
    """

    size: Annotated[int, Range(minimum=1, maximum=4096)]
    fit: Literal["crop", "squash"]
    interpolation: Literal["bilinear", "bicubic"]
    exif: bool
    max_pixels: Annotated[int, Range(minimum=1, maximum=PIXEL_LIMIT)]
    unreadable: Literal["error", "skip"]
    memory: Count
    cache: bool | str
    range: Span
    verify: Literal["headers", "decode", "none"]

    def __post_init__(self) -> None:
        """Refuse a range without extent.

        Raises:
            ConfigError: see above.
        """
        if isinstance(self.range, list) and not (len(self.range) == 2 and self.range[0] < self.range[1]):
            raise ConfigError(
                f"dataset.images.range: expected auto, 8, 10, 12, 14, 16 or [LOWEST,HIGHEST], got {self.range}"
            )

    @property
    def recipe(self) -> str:
        """The options that determine the stored pixels, as text."""
        span = "" if self.range in ("auto", 16) else f" {self.range}"
        return f"{self.size} {self.fit} {self.interpolation} {self.exif}{span}"


class Files(Protocol):
    """Encoded images, one per row. `FileList` is the implementation for the files of a folder."""

    @property
    def place(self) -> str:
        """Where the images are; the same for every selection of them."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Return the unique name of a file, for messages and the cache."""

    def content(self, row: int) -> Path | bytes:
        """Return a file's path or its content."""

    def stamp(self, row: int) -> tuple[int, int]:
        """Return size and time of the last change (ns) of a file.

        Raises:
            ConfigError: the file no longer exists.
        """

    def stored_rows(self) -> StoredRows:
        """Return names and digests of the contents, which depend neither on the place nor on times."""


@dataclass(frozen=True)
class FileList:
    """Image files of a folder.

    Attributes:
        root: the folder.
        names: paths from there, with slashes.
    """

    root: Path
    names: tuple[str, ...]

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.root.absolute())

    def __len__(self) -> int:
        """Return the number of files M."""
        return len(self.names)

    def name(self, row: int) -> str:
        """Return the whole path of a file."""
        return str(self.root / self.names[row])

    def content(self, row: int) -> Path:
        """Return the path of a file."""
        return self.root / self.names[row]

    def stamp(self, row: int) -> tuple[int, int]:
        """Return size and time of the last change (ns) of a file.

        Raises:
            ConfigError: the file no longer exists.
        """
        try:
            state = (self.root / self.names[row]).stat()
        except OSError as error:
            raise ConfigError(f"{self.name(row)}: cannot be read ({first_line(error)})") from error
        return state.st_size, state.st_mtime_ns

    def stored_rows(self) -> StoredRows:
        """Return paths from the folder on and digests of the contents.

        Raises:
            ConfigError: a file cannot be read.
        """
        return StoredRows.of_files(self.place, self.names)


def decode(file: Path | bytes, name: str, options: Decoding, channels: int) -> Pixels:
    """Return the stored image [S, S, C] of an image file.

    Args:
        file: path of the file, or its content.
        name: name of the file for error messages.
        options: how to decode it.
        channels: C, 1 or 3.

    Raises:
        ConfigError: the file cannot be opened or decoded, or is too large; the message names it.
    """
    try:
        with opened(file, name) as image:
            check_size(image, name, options)
            if depth(image) > 8:
                return fitted(_narrow(image, file, options), options, channels)
            image.draft(None, (2 * options.size, 2 * options.size))
            image.load()
            return fitted(image, options, channels)
    except ConfigError:
        raise
    except Exception as error:  # decoders of damaged files raise almost anything
        raise undecodable(file, name, error) from error


def opened(file: Path | bytes, name: str) -> Any:
    """Return an image file as Pillow opens it: its header is read and nothing is decoded.

    Args:
        file: path of the file, or its content.
        name: name of the file for error messages.

    Raises:
        ConfigError: it is a pipe, a socket or a device, which is not opened.
        OSError: it cannot be read, or is no image.
    """
    if isinstance(file, Path) and not (stat.S_ISREG(mode := os.stat(file).st_mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f"{name}: cannot be decoded (it is a pipe or a device and was not opened); remove it")
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    return libraries.load("PIL.Image").open(source, formats=FORMATS)


def undecodable(file: Path | bytes, name: str, error: Exception) -> ConfigError:
    """Return the error for a file that a decoder has refused."""
    return ConfigError(
        f"{name}: cannot be decoded ({_reason(file, error)}); repair it, or set dataset.images.unreadable=skip"
    )


def _narrow(image: Any, file: Path | bytes, options: Decoding) -> Any:
    """Return an image with more than 8 bits per value as one with 8, which has the same EXIF orientation."""
    made = picture(image, file, options.range)
    if options.exif and (turn := image.getexif().get(ORIENTATION, 1)) != 1:
        made.getexif()[ORIENTATION] = turn
    return made


def fitted(image: Any, options: Decoding, channels: int) -> Pixels:
    """Return the stored image [S, S, C] of a Pillow image that is in memory.

    Raises:
        ValueError: its values do not fit `options.range`.
    """
    return _stored(_converted(_turned(image, options), options, channels), options)


def check_size(image: Any, name: str, options: Decoding) -> None:
    """Refuse an image that is too large, judged by its header alone."""
    width, height = image.size
    if width * height > options.max_pixels:
        raise ConfigError(
            f"{name}: {width} x {height} pixels are more than dataset.images.max_pixels={options.max_pixels}; "
            "shrink the image or raise the limit"
        )


def _reason(file: Path | bytes, error: Exception) -> str:
    """Return why a file could not be decoded."""
    try:
        if not (len(file) if isinstance(file, bytes) else file.stat().st_size):
            return "the file is empty"
    except OSError as unreadable:
        return first_line(unreadable)
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not an image of a known format: {', '.join(FORMATS)}"
    return one_line(error)


def _turned(image: Any, options: Decoding) -> Any:
    """Return the image in the orientation of its EXIF data if `options.exif` is set."""
    if options.exif and image.getexif().get(ORIENTATION, 1) != 1:
        return libraries.load("PIL.ImageOps").exif_transpose(image)
    return image


def _converted(image: Any, options: Decoding, channels: int) -> Pixels:
    """Return the pixels [H, W, C] of a loaded image of any mode."""
    module = libraries.load("PIL.Image")
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = picture(image, b"", options.range)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colour = image.convert("RGBA")
        image = module.alpha_composite(module.new("RGBA", colour.size, "white"), colour)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    content = bytearray(image.tobytes())  # twice as fast as np.array(image), and writable as torch wants it
    return np.frombuffer(content, dtype=np.uint8).reshape(image.height, image.width, channels)


def _stored(pixels: Pixels, options: Decoding) -> Pixels:
    """Return pixels [H, W, C] as a square [S, S, C]."""
    side = options.size
    if pixels.shape[:2] == (side, side):
        return pixels
    if options.fit == "squash":
        return _resized(pixels, side, side, options.interpolation)
    height, width = pixels.shape[:2]
    pixels = _middle(pixels, min(height, ELONGATED * width), min(width, ELONGATED * height))
    height, width = pixels.shape[:2]
    if height <= width:
        resized = _resized(pixels, side, int(side * width / height), options.interpolation)
    else:
        resized = _resized(pixels, int(side * height / width), side, options.interpolation)
    return _middle(resized, side, side)


def _resized(pixels: Pixels, height: int, width: int, interpolation: str) -> Pixels:
    """Return pixels [H, W, C] resized, antialiased, rounded to uint8."""
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # torch, too, sees the channels-last layout
    resized: Tensor = F.interpolate(planes, (height, width), mode=interpolation, antialias=True)
    found: Pixels = resized[0].permute(1, 2, 0).numpy()
    return found


def _middle(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return the middle part of pixels [H, W, C]; the offset is rounded as in torchvision's CenterCrop."""
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]
