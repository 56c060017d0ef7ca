"""Images as users have them - arrays, tensors, Pillow images, files - as the images that a data set stores.

Shapes: `N` images, `C` channels, `H`, `W` stored height and width, `D` width of feature rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clrun.data.decode import PIXEL_LIMIT, Decoding, decode, fitted
from clrun.system import libraries
from clrun.system.errors import ConfigError, first_line


@dataclass(frozen=True)
class Reader:
    """Turns what a user has into stored images.

    Images of the stored size are taken as they are; others are resized as `decoding` says, to a square. Grey and RGB
    are converted into each other as the data set's channels ask.

    Attributes:
        shape: (C, H, W) of the stored images, or (D,) of feature rows.
        decoding: how the data set reads image files; None when it has none: then the shorter side is scaled and the
            middle square is kept, after the image was turned as its EXIF data ask.
    """

    shape: tuple[int, ...]
    decoding: Decoding | None = None

    def batches(self, images: Any, size: int) -> Iterator[Tensor]:
        """Yield stored images [at most `size`, C, H, W] uint8, or feature rows [at most `size`, D] float, in order.

        Args:
            images: an array or tensor uint8 of [N, C, H, W], [N, H, W, C], [N, H, W] (grey) or of one image; a Pillow
                image or the path of an image file; a list of images, each of any of these kinds; or rows [N, D] float
                where the data set stores features.
            size: images per batch.

        Raises:
            ConfigError: an image cannot be read or does not fit the data set; the message says which.
        """
        if isinstance(images, np.ndarray | Tensor):
            everything = self._array(_tensor(images))
            yield from (everything[start : start + size] for start in range(0, len(everything), size))
            return
        items = list(images) if isinstance(images, Sequence | Iterator) and not isinstance(images, str) else [images]
        for start in range(0, len(items), size):
            part = [self._one(item, start + k) for k, item in enumerate(items[start : start + size])]
            yield torch.cat(part)

    def _array(self, x: Tensor) -> Tensor:
        """Return an array of images or of rows as the data set stores them."""
        if len(self.shape) == 1:
            return self._rows(x)
        if x.dtype != torch.uint8:
            advice = "multiply values in [0, 1] by 255 and round" if x.is_floating_point() else "convert them"
            raise ConfigError(f"images: expected values 0..255 of uint8, got {_kind(x)}; {advice}")
        planes = self._planes(x)
        if tuple(planes.shape[1:]) == self.shape:
            return planes
        return torch.cat([self._resized(image, number) for number, image in enumerate(planes)])

    def _rows(self, x: Tensor) -> Tensor:
        """Return feature rows [N, D]."""
        x = x[None] if x.dim() == 1 else x
        if x.dim() != 2 or x.shape[1] != self.shape[0] or not x.is_floating_point():
            raise ConfigError(f"images: this data set has rows of {self.shape[0]} features, float; got {_kind(x)}")
        return x.float()

    def _planes(self, x: Tensor) -> Tensor:
        """Return images [N, c, h, w], c any number of channels that an image has.

        Raises:
            ConfigError: the axes cannot be told apart.
        """
        channels, height, width = self.shape
        if x.dim() == 2:
            x = x[None, None]
        elif x.dim() == 3 and x.shape in (self.shape, (height, width, channels)):
            x = x[None]
        elif x.dim() == 3:
            x = x[:, None] if x.shape[0] not in (1, 3, 4) and x.shape[2] not in (1, 3, 4) else x[None]
        if x.dim() == 4 and tuple(x.shape[1:]) == self.shape:
            return x
        if x.dim() == 4 and tuple(x.shape[1:]) == (height, width, channels):
            return x.permute(0, 3, 1, 2)
        first, last = x.dim() == 4 and x.shape[1] in (1, 3, 4), x.dim() == 4 and x.shape[3] in (1, 3, 4)
        if first == last:
            wanted = f"[N, {channels}, {height}, {width}] or [N, {height}, {width}, {channels}]"
            raise ConfigError(f"images: expected {wanted}, got {_kind(x)}")
        return x if first else x.permute(0, 3, 1, 2)

    def _one(self, item: Any, number: int) -> Tensor:
        """Return one item of a list as [1, C, H, W] (or [1, D]).

        Raises:
            ConfigError: it is no image, or more than one.
        """
        if isinstance(item, np.ndarray | Tensor):
            found = self._array(_tensor(item))
            if len(found) != 1:
                raise ConfigError(f"images[{number}]: expected one image, got {_kind(_tensor(item))}")
            return found
        if isinstance(item, str | Path):
            return self._file(Path(item).expanduser(), number)
        if isinstance(item, libraries.load("PIL.Image").Image):
            return self._pillow(item, f"images[{number}]")
        kinds = "an array, a tensor, a Pillow image or a path"
        raise ConfigError(f"images[{number}]: expected {kinds}, got {type(item).__name__}")

    def _file(self, path: Path, number: int) -> Tensor:
        """Return the image in a file.

        Raises:
            ConfigError: there is none, or it cannot be decoded.
        """
        if path.is_dir():
            raise ConfigError(
                f"images[{number}]: {path} is a folder; give the files in it, sorted(folder.glob('*.png'))"
            )
        if not path.is_file():
            raise ConfigError(f"images[{number}]: no such file: {path}")
        if self._square:
            return _batch(decode(path, str(path), self._options, self.shape[0]))
        image = libraries.load("PIL.Image")
        try:
            with image.open(path) as opened:
                return self._pillow(opened, str(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be decoded ({first_line(error)})") from error

    def _pillow(self, image: Any, name: str) -> Tensor:
        """Return a Pillow image, converted and resized.

        Raises:
            ConfigError: it does not fit and cannot be fitted.
        """
        if len(self.shape) == 1 or self.shape[0] not in (1, 3):
            raise ConfigError(f"{name}: this data set stores {_shape(self.shape)}; give arrays of that shape")
        channels, height, width = self.shape
        if not self._square:
            if (image.height, image.width) != (height, width):
                raise ConfigError(f"{name}: expected {width} x {height} pixels, got {image.width} x {image.height}")
            return _batch(np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(height, width, channels))
        try:
            return _batch(fitted(image, self._options, channels))
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error

    def _resized(self, planes: Tensor, number: int) -> Tensor:
        """Return one image [c, h, w] of an array, converted and resized."""
        pixels = planes.permute(1, 2, 0).contiguous().cpu().numpy()
        picture = libraries.load("PIL.Image").fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return self._pillow(picture, f"images[{number}]")

    @property
    def _square(self) -> bool:
        return len(self.shape) == 3 and self.shape[0] in (1, 3) and self.shape[1] == self.shape[2]

    @property
    def _options(self) -> Decoding:
        """How image files and images of other sizes are read."""
        if self.decoding is not None:
            return replace(self.decoding, size=self.shape[1])
        return Decoding(self.shape[1], "crop", "bilinear", True, PIXEL_LIMIT, "error", 0, False, "auto", "none")


def decoding_node(dataset: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the node of a data set's configuration that says how image files are read; None without one."""
    if str(dataset.get("_target_", "")).endswith(".Decoding"):
        return dataset
    found = (decoding_node(value) for value in dataset.values() if isinstance(value, Mapping))
    return next((node for node in found if node is not None), None)


def _tensor(x: Any) -> Tensor:
    """Return an array or tensor as a tensor on the CPU."""
    if isinstance(x, Tensor):
        return x.detach().cpu()
    try:
        return torch.from_numpy(np.ascontiguousarray(x))
    except TypeError as error:
        raise ConfigError(f"images: an array of {x.dtype} holds no pixels; expected uint8") from error


def _batch(pixels: Any) -> Tensor:
    """Return pixels [H, W, C] as a batch [1, C, H, W]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]


def _kind(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _shape(shape: Sequence[int]) -> str:
    return f"rows of {shape[0]} features" if len(shape) == 1 else f"images of {shape[0]} channels"
