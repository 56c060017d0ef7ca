"""Small image files for tests of data sets that lie in files."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clrun.data.decode import Decoding

PLAIN = Decoding(
    size=6,
    fit="crop",
    interpolation="bilinear",
    exif=False,
    max_pixels=80_000_000,
    unreadable="error",
    memory=0,
    cache=False,
    range="auto",
    verify="none",
)


def decoding(**changes: Any) -> Decoding:
    """Return how images of 6 x 6 pixels are stored as they are, with some options changed."""
    return replace(PLAIN, **changes)


def noise(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    """Return random pixels [H, W] or [H, W, C]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image as a file of this kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, *, seed: int = 0, side: int = 6, grey: bool = False) -> None:
    """Write an image of random pixels; folders are made, the suffix decides the kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(side, side, *(() if grey else (3,)), seed=seed)).save(path)
