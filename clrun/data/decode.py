"""From an image file to a stored image: accepted formats, orientation, channels, size, and errors.

Shapes: `M` files, `S` side of the stored square, `C` channels.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clrun.data.contents import StoredRows
from clrun.system import libraries
from clrun.system.errors import ConfigError, Count, Range, first_line, one_line

Pixels = NDArray[np.uint8]
PIXEL_LIMIT = 178_956_970  # Pillow refuses larger images by itself
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none of Pillow's formats that start other programs
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112  # EXIF tag
ELONGATED = 3  # images longer than 3 times their shorter side lose their ends before they are resized


@dataclass(frozen=True)
class Decoding:
    """How image files become stored images: uint8 squares, grey or RGB.

    Alpha (also of palettes) is laid over white. 16-bit images keep their upper 8 bits, and of animations and
    multi-page files the first picture is taken. A JPEG more than twice as large as needed is decoded at a fraction of
    its size that is still twice the wanted one.

    Attributes:
        size: S in pixels.
        fit: "crop" scales the shorter side to S and keeps the middle square; "squash" scales both sides to S.
        interpolation: method of the resizing, which is antialiased.
        exif: rotate images as their EXIF orientation says. Published data sets are read without, as by torchvision.
        max_pixels: images with more pixels are refused before they are decoded; the error names the file.
        unreadable: "error" stops at the first file that cannot be decoded; "skip" decodes every file once before the
            run and leaves out those that fail.
        memory: megabytes of decoded images that may stay in memory; a data set that fits is decoded once per process.
        cache: folder for decoded images on disk; true for the user's cache folder, false for no cache.
    """

    size: Annotated[int, Range(minimum=1, maximum=4096)]
    fit: Literal["crop", "squash"]
    interpolation: Literal["bilinear", "bicubic"]
    exif: bool
    max_pixels: Annotated[int, Range(minimum=1, maximum=PIXEL_LIMIT)]
    unreadable: Literal["error", "skip"]
    memory: Count
    cache: bool | str

    @property
    def recipe(self) -> str:
        """The options that determine the stored pixels, as text."""
        return f"{self.size} {self.fit} {self.interpolation} {self.exif}"


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
    image_module = libraries.load("PIL.Image")
    try:
        with image_module.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            _check_size(image, name, options)
            image.draft(None, (2 * options.size, 2 * options.size))
            image.load()
            return fitted(image, options, channels)
    except ConfigError:
        raise
    except Exception as error:  # decoders of damaged files raise almost anything
        raise ConfigError(
            f"{name}: cannot be decoded ({_reason(file, error)}); repair or remove it, or set "
            "dataset.images.unreadable=skip"
        ) from error


def fitted(image: Any, options: Decoding, channels: int) -> Pixels:
    """Return the stored image [S, S, C] of a Pillow image that is in memory.

    Raises:
        ValueError: it has values of 32 bits.
    """
    return _stored(_converted(_turned(image, options), channels), options)


def _check_size(image: Any, name: str, options: Decoding) -> None:
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


def _converted(image: Any, channels: int) -> Pixels:
    """Return the pixels [H, W, C] of a loaded image of any mode."""
    module = libraries.load("PIL.Image")
    if image.mode == "F":
        raise ValueError("32-bit values are not supported; convert the image to 8 or 16 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = module.fromarray(_eight_bits(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colour = image.convert("RGBA")
        image = module.alpha_composite(module.new("RGBA", colour.size, "white"), colour)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    content = bytearray(image.tobytes())  # twice as fast as np.array(image), and writable as torch wants it
    return np.frombuffer(content, dtype=np.uint8).reshape(image.height, image.width, channels)


def _eight_bits(values: NDArray[Any]) -> Pixels:
    """Return the upper 8 of 16 bits."""
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit values are not supported; convert the image to 8 or 16 bits per channel")
    return (values.astype(np.uint32) >> 8).astype(np.uint8)


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
