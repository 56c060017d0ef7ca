"""Training augmentations: batched, with parameters drawn for each sample, on the batch's device.

Shapes: `B` batch, `C` channels, `H`, `W` height and width. Images hold values in 0..255, as uint8 or float. Parameters
are drawn on the CPU from an explicit generator.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clrun.system.errors import ConfigError, did_you_mean

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
LARGE = 2000  # values per image from which on a loop over the images is faster on the CPU


class Augmentation(Protocol):
    """A random change of images."""

    def __call__(self, x: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return changed images of x [B, C, H, W]; `size` is (height, width) of the network's input."""


@dataclass(frozen=True)
class Crop:
    """Random crop after padding with black.

    Attributes:
        pad: padding on each side in pixels; None: an eighth of the shorter side (4 for 32 pixels).
        size: height and width of the crop; None takes those of the stored image.
    """

    pad: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        _require(self.pad is None or self.pad >= 0, "crop", "pad must be at least 0")
        _require(self.size is None or self.size >= 1, "crop", "size must be at least 1")

    def check(self, height: int, width: int) -> None:
        """Refuse stored images that the crop does not fit in."""
        room = min(height, width) + 2 * (max(1, min(height, width) // 8) if self.pad is None else self.pad)
        fits = self.size is None or self.size <= room
        _require(fits, "crop", f"size {self.size} exceeds the {room} pixels of the padded images")

    def __call__(self, x: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return the cropped images: each row of pixels is copied in one piece."""
        batch, channels = x.shape[:2]
        pad = max(1, min(x.shape[-2:]) // 8) if self.pad is None else self.pad
        tall, wide = x.shape[-2] + 2 * pad, x.shape[-1] + 2 * pad
        height, width = x.shape[-2:] if self.size is None else (self.size, self.size)
        flat = F.pad(x, (pad, pad, pad, pad)).flatten()
        runs = flat.as_strided((flat.numel() - width + 1, width), (1, 1))  # row s is the `width` pixels from s on
        top = torch.randint(tall - height + 1, (batch, 1, 1), generator=generator).to(x.device)
        left = torch.randint(wide - width + 1, (batch, 1, 1), generator=generator).to(x.device)
        plane = torch.arange(batch * channels, device=x.device).view(batch, channels, 1) * tall
        start = (plane + top + torch.arange(height, device=x.device)) * wide + left
        return runs.index_select(0, start.flatten()).view(batch, channels, height, width)


@dataclass(frozen=True)
class Flip:
    """Horizontal flip.

    Attributes:
        p: probability.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        """Check the option."""
        _require(0 <= self.p <= 1, "flip", "p must be between 0 and 1")

    def __call__(self, x: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return the images, flipped or not."""
        flip = torch.rand(len(x), generator=generator) < self.p
        if not one_by_one(x):
            return torch.where(flip.to(x.device).view(-1, 1, 1, 1), x.flip(-1), x)
        out = x.clone()
        for row in flip.nonzero()[:, 0].tolist():
            out[row] = x[row].flip(-1)
        return out


@dataclass(frozen=True)
class RandomResizedCrop:
    """Random part of the image, resized to the network's input (Szegedy et al., CVPR 2015).

    The box is drawn as torchvision draws it: ten attempts at an area and a log-uniform aspect ratio, then the largest
    centred box of an allowed ratio. It is cut from the stored image and resampled by a bilinear antialiasing filter.
    Large uint8 images on the CPU stay uint8, rounded as torchvision rounds them; others become float.

    Attributes:
        scale: smallest and largest fraction of the area.
        ratio: smallest and largest width / height.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            good = isinstance(pair, Sequence) and len(pair) == 2 and 0 < pair[0] <= pair[1]
            _require(good, "random_resized_crop", f"{name} must be two positive numbers, ascending")
        _require(self.scale[1] <= 1, "random_resized_crop", "scale must not exceed 1")

    def __call__(self, x: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return images of `size`."""
        boxes = self.boxes(len(x), x.shape[-2], x.shape[-1], generator)
        if one_by_one(x):
            return cut_one_by_one(x, boxes, size)
        top, left, height, width = boxes.to(x.device)
        rows = resampling(top, height, x.shape[-2], size[0])[:, None]
        columns = resampling(left, width, x.shape[-1], size[1])[:, None]
        with torch.autocast(x.device.type, enabled=False):
            return rows @ x.float() @ columns.transpose(-1, -2)

    def boxes(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return [4, count] long on the CPU: top, left, height and width of one box per image."""
        draw = torch.rand(2, count, 10, generator=generator, dtype=torch.float64)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * draw[0])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * draw[1])
        w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
        first = fits.int().argmax(dim=1, keepdim=True)
        w, h, fits = (t.gather(1, first)[:, 0] for t in (w, h, fits))
        nearest = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = torch.where(fits, w, min(width, round(height * nearest)))
        h = torch.where(fits, h, min(height, round(width / nearest)))
        place = torch.rand(2, count, generator=generator, dtype=torch.float64)
        top = torch.where(fits, (place[0] * (height - h + 1)).long(), (height - h) // 2)
        left = torch.where(fits, (place[1] * (width - w + 1)).long(), (width - w) // 2)
        return torch.stack([top, left, h, w])


def one_by_one(x: Tensor) -> bool:
    """Return whether a loop over the images is faster than one operation on the batch: on the CPU, for large images."""
    return x.device.type == "cpu" and x.shape[1:].numel() >= LARGE


def cut_one_by_one(x: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a box ([4, B] long: top, left, height, width) of each image of x resized to `size`, antialiased."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    out = torch.empty(*x.shape[:2], *size, dtype=x.dtype, memory_format=layout)
    for row, (top, left, height, width) in enumerate(boxes.T.tolist()):
        piece = x[row : row + 1, :, top : top + height, left : left + width]
        out[row] = F.interpolate(piece, size, mode="bilinear", antialias=True)[0]
    return out


def resampling(start: Tensor, length: Tensor, stored: int, wanted: int) -> Tensor:
    """Return [B, wanted, stored], the weights that resize `length` pixels from `start` on ([B] long) to `wanted`.

    Bilinear with antialiasing: a triangle as wide as the larger of an input and an output pixel, cut at the ends of the
    piece and normalised; what `F.interpolate(mode="bilinear", antialias=True)` applies to the piece alone.
    """
    start, length = start.float().view(-1, 1, 1), length.float().view(-1, 1, 1)
    step = length / wanted
    centre = start + (torch.arange(wanted, device=start.device).view(1, -1, 1) + 0.5) * step
    pixel = torch.arange(stored, device=start.device).view(1, 1, -1) + 0.5
    weights = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > start) & (pixel < start + length))
    return weights / weights.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Jitter:
    """Random brightness, contrast, saturation and hue, as torchvision's ColorJitter.

    Factors are uniform in [max(0, 1 - v), 1 + v], the change of the hue in [-hue, hue]. The four changes are applied in
    random order. Deliberate deviation: one order per batch, where torchvision draws one per image.

    Attributes:
        brightness: v for the brightness.
        contrast: v for the contrast, the distance to the image's mean grey.
        saturation: v for the distance to the grey image; no effect on grey images.
        hue: largest change of the hue, at most 0.5 (half the circle); no effect on grey images.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        _require(min(self.brightness, self.contrast, self.saturation) >= 0, "jitter", "strengths must be at least 0")
        _require(0 <= self.hue <= 0.5, "jitter", "hue must be between 0 and 0.5")

    def __call__(self, x: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return changed float images."""
        strengths = (self.brightness, self.contrast, self.saturation)
        low = torch.tensor([*(max(0.0, 1 - v) for v in strengths), -self.hue])
        high = torch.tensor([*(1 + v for v in strengths), self.hue])
        draw = torch.rand(len(x), 4, generator=generator)
        factors = (low + (high - low) * draw).to(x.device).view(-1, 4, 1, 1, 1)
        order = torch.randperm(4, generator=generator).tolist()
        changes = (adjust_brightness, adjust_contrast, adjust_saturation, turn_hue)
        x = x.float()
        for kind in order:
            if (*strengths, self.hue)[kind]:
                x = changes[kind](x, factors[:, kind])
        return x


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Return x times `factor` ([B, 1, 1, 1]), within 0..255."""
    return (x * factor).clamp_(0, 255)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Return x with its distance to the image's mean grey scaled by `factor` ([B, 1, 1, 1])."""
    return _blend(x, to_grey(x).mean(dim=(2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Return x with its distance to the grey image scaled by `factor` ([B, 1, 1, 1])."""
    return _blend(x, to_grey(x), factor)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return factor * x + (1 - factor) * other, within 0..255."""
    return (x * factor + other * (1 - factor)).clamp_(0, 255)


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Return RGB images with the hue moved by `turn` ([B, 1, 1, 1], in full circles); grey images as they are.

    HSV with value V, chroma C and hue H in sextants: channel n = 5, 3, 1 (red, green, blue) is
    V - C * max(0, min(k, 4 - k, 1)) with k = (n + H) mod 6.
    """
    if x.shape[1] != 3:
        return x
    red, green, blue = x.unbind(dim=1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    unit = chroma.clamp(min=1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / unit,
        torch.where(value == green, 2 + (blue - red) / unit, 4 + (red - green) / unit),
    )
    n = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = (n + hue[:, None] + 6 * turn) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def to_grey(x: Tensor) -> Tensor:
    """Return [B, 1, H, W] float, the luma of RGB images by ITU-R BT.601; grey images as they are."""
    if x.shape[1] == 1:
        return x
    weights = torch.tensor(GREY, device=x.device).view(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True)


AUGMENTATIONS: Mapping[str, type] = {
    "crop": Crop,
    "flip": Flip,
    "random_resized_crop": RandomResizedCrop,
    "jitter": Jitter,
}


def parse_augmentations(spec: Sequence[Any], unit: str = "image") -> dict[str, Augmentation]:
    """Return the augmentations named in `dataset.augment`, in order, by name.

    Args:
        spec: names ("crop") and mappings of a name to its options ({"crop": {"pad": 2}}).
        unit: what one row of the data set is called; only images can be augmented.

    Raises:
        ConfigError: unknown name or option, an option out of range, a name twice, or the rows are no images.
    """
    found: dict[str, Augmentation] = {}
    for entry in spec:
        named = entry if isinstance(entry, Mapping) else {str(entry): {}}
        for name, options in named.items():
            _require(name not in found, str(name), "named twice")
            found[name] = _augmentation(name, options)
            _require(unit == "image", str(name), f"is for images, not for {unit}s; set dataset.augment=[]")
    return found


def _augmentation(name: Any, options: Any) -> Augmentation:
    """Return the augmentation called `name`."""
    if name not in AUGMENTATIONS:
        known = ", ".join(AUGMENTATIONS)
        hint = did_you_mean(str(name), AUGMENTATIONS)
        raise ConfigError(f"dataset.augment: no augmentation named '{name}'{hint} (available: {known})")
    kind = AUGMENTATIONS[name]
    known_options = [field.name for field in fields(kind)]
    _require(isinstance(options, Mapping), name, f"options must be a mapping, got {options!r}")
    for key in options:
        hint = did_you_mean(str(key), known_options)
        _require(key in known_options, name, f"no option '{key}'{hint} (has: {', '.join(known_options)})")
    try:
        augmentation: Augmentation = kind(**options)
    except TypeError as error:
        raise ConfigError(f"dataset.augment: {name}: options must be numbers, got {dict(options)}") from error
    return augmentation


def _require(condition: bool, name: str, problem: str) -> None:
    """Raise a `ConfigError` for the augmentation `name` unless the condition holds."""
    if not condition:
        raise ConfigError(f"dataset.augment: {name}: {problem}")
