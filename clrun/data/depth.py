"""Images with more than 8 bits per value: which files have them, which range their values have, and how they become 8.

Cameras, scanners and medical devices store 10, 12 or 14 bits in files of 16. Read as 16 bits such an image is nearly
black. The range of a data set is therefore the smallest of 8, 10, 12, 14 and 16 bits that holds every value of its
files, or the one that the option `dataset.images.range` names.

Shapes: `H`, `W` height and width, `C` channels.
"""

import io
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clrun.system import libraries

Pixels = NDArray[np.uint8]
Values = NDArray[Any]
BITS = (8, 10, 12, 14, 16)
Span = Literal["auto", 8, 10, 12, 14, 16] | list[float]
COLOUR = ("RGB", "RGBA", "LA")  # modes in which Pillow drops the lower 8 bits of a file with 16
WIDE_TIFF = "write the image with 8 bits per channel, or grey with 16"


def depth(image: Any) -> int:
    """Return the bits per value of an opened Pillow image: 8, 16 or 32."""
    if image.format == "PPM":
        return 16 if image.mode == "I" else 8
    if image.mode.startswith("I;16"):
        return 16
    if image.mode in ("I", "F"):
        return 16 if image.format == "PNG" else 32
    return 16 if image.mode in COLOUR and _wide(image) else 8


def declared(image: Any) -> bool:
    """Return whether the file itself says what its largest value is: PGM and PPM do, and Pillow scales to 16 bits."""
    return str(image.format) == "PPM"


def _wide(image: Any) -> bool:
    """Return whether a colour image has 16 bits per channel."""
    if image.format == "PNG":
        return any(str(tile[3]).find(";16") >= 0 for tile in image.tile)
    if image.format == "TIFF":
        return bool(max(image.tag_v2.get(258, (8,))) == 16)
    return False


def values(image: Any, file: Path | bytes) -> Values:
    """Return the values [H, W] or [H, W, C] of an image with more than 8 bits, alpha included.

    Args:
        image: the opened image.
        file: its path or content.

    Raises:
        ValueError: the image has colours that cannot be read with 16 bits.
    """
    if image.mode not in COLOUR:
        image.load()
        return np.asarray(image)
    if image.format == "PNG" and image.tile[0][3] == "LA;16B":  # four bytes per pixel, as RGBA has them
        four = _reread(file, "RGBA", "RGBA").astype(np.uint16)
        return four[..., 0::2] << 8 | four[..., 1::2]
    upper = "B" if image.format == "PNG" else _byte_order(image)
    lower = "L" if upper == "B" else "B"
    high, low = (_reread(file, image.mode, f"{image.mode};16{order}") for order in (upper, lower))
    return high.astype(np.uint16) << 8 | low


def _byte_order(image: Any) -> str:
    """Return "B" or "L" for the order of the bytes in which Pillow gets the values of a TIFF file."""
    order = str(image.tile[0][3][0])
    if order.endswith((";16B", ";16L")) and len(image.tile) == 1:
        return order[-1]
    if order.endswith(";16N") and len(image.tile) == 1:
        return "L" if sys.byteorder == "little" else "B"
    raise ValueError(f"16 bits per colour in this form of TIFF are not supported; {WIDE_TIFF}")


def _reread(file: Path | bytes, mode: str, raw: str) -> Pixels:
    """Return the bytes [H, W, C] of an image when its stored values are taken as the raw mode `raw`.

    Pillow has no mode for 16 bits per colour. It takes the upper byte of each value, or the lower one when the order of
    the bytes is said to be the other; two readings give both.
    """
    with libraries.load("PIL.Image").open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        image._mode = mode
        image.tile = [_as_raw(tile, raw) for tile in image.tile]
        image.load()
        return np.asarray(image)


def _as_raw(tile: Any, raw: str) -> Any:
    """Return a tile of a Pillow image with another raw mode."""
    options = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
    return tile._replace(args=options)


def bits_of(largest: int) -> int:
    """Return the smallest of the known ranges, in bits, that holds the value `largest`."""
    return next(bits for bits in BITS if largest < 2**bits or bits == BITS[-1])


def eight_bits(found: Values, span: Span) -> Pixels:
    """Return values scaled to 0..255: the upper 8 bits of a range of bits, or linear between two values.

    Args:
        found: values of any shape.
        span: bits of the range; or [lowest, highest], outside of which values are cut off; "auto" is read as 16.

    Raises:
        ValueError: values are not finite, or do not fit the range.
    """
    if isinstance(span, list):
        if not np.isfinite(found).all():
            raise ValueError("it holds NaN or infinite values")
        low, high = span
        scaled = (np.clip(found.astype(np.float64), low, high) - low) * (255 / (high - low))
        return np.rint(scaled).astype(np.uint8)
    bits = 16 if span == "auto" else span
    if np.issubdtype(found.dtype, np.floating) or found.min() < 0 or found.max() > 0xFFFF:
        raise ValueError(
            "32-bit values need a range: set dataset.images.range=[LOWEST,HIGHEST] or convert the image to 8 or 16 bits"
        )
    if found.max() >= 2**bits:
        raise ValueError(f"its value {found.max()} is outside dataset.images.range={bits} (bits)")
    return (found.astype(np.uint32) >> (bits - 8)).astype(np.uint8)


def picture(image: Any, file: Path | bytes, span: Span) -> Any:
    """Return an opened image with more than 8 bits as a Pillow image with 8, its transparent colour made white.

    Raises:
        ValueError: see `values` and `eight_bits`.
    """
    module = libraries.load("PIL.Image")
    found = values(image, file)
    span = 16 if declared(image) else span
    has_alpha = found.ndim == 3 and found.shape[2] in (2, 4)
    pixels = eight_bits(found[..., :-1] if has_alpha else found, span)
    made = module.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))
    alpha = None
    if has_alpha:
        alpha = _alpha(found[..., -1], span)
    elif (clear := image.info.get("transparency")) is not None:
        same = found == np.asarray(clear)
        alpha = np.where(same if same.ndim == 2 else same.all(axis=2), 0, 255).astype(np.uint8)
    if alpha is not None:
        made.putalpha(module.fromarray(alpha))
    return made


def _alpha(found: Values, span: Span) -> Pixels:
    """Return alpha [H, W] with 8 bits: in the range of the colours if it fits there, else of 16 bits."""
    bits = span if isinstance(span, int) and found.max() < 2**span else 16
    return (found >> (bits - 8)).astype(np.uint8)
