"""From stored images to network input: augmentation, channels, size and normalisation, batched on the device.

Shapes: `B` batch, `C` channels, `H`, `W` height and width. Pixels stay in 0..255 until the last step, which converts
and normalises at once.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.data.augment import GREY, Augmentation, Crop, RandomResizedCrop, parse_augmentations, to_grey
from clrun.data.split import Transform
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError

Shape = tuple[int, int, int]
Interpolation = Literal["bilinear", "bicubic"]
BY_DATASET = "normalised by the data set"


class PerDevice:
    """A constant tensor, with a copy on each device that asked for one; copies are not pickled."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the tensor on `device`."""
        if device not in self._copies:
            self._copies[device] = self.value.to(device)
        return self._copies[device]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the copies."""
        return {"value": self.value, "_copies": {}}


class ImageTransform:
    """Turns stored images into network input.

    Where the network takes other channels, alpha is laid over white, RGB becomes grey by ITU-R BT.601, and grey is
    repeated. Images are resized with antialiasing, either as a whole or so that the network sees their middle.
    Augmentations come before that, at the stored size.

    Args:
        stored: (C, H, W) of the stored images, values 0..255.
        wanted: (C, H, W) of the network.
        mean: mean of each wanted channel, in [0, 1] units.
        std: standard deviation of each wanted channel, in [0, 1] units.
        augmentations: applied in order in the train view; after one that cuts out a part, the middle is not cut out
            again.
        crop: fraction of each side that the network sees: 0.875 for 224 pixels is Resize(256), CenterCrop(224).
        interpolation: how images are resized.
        by_dataset: whether `mean` and `std` are the data set's.
    """

    train_only = ("augmentations", "cuts")  # attributes that the eval view does not depend on

    def __init__(
        self,
        stored: Shape,
        wanted: Shape,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentations: tuple[Augmentation, ...],
        crop: float = 1.0,
        interpolation: Interpolation = "bilinear",
        by_dataset: bool = False,
    ) -> None:
        self.size = wanted[1:]
        self.resized = (round(self.size[0] / crop), round(self.size[1] / crop))  # the middle is cut from this
        self.interpolation = interpolation
        self.by_dataset = by_dataset
        self.cuts = any(isinstance(a, RandomResizedCrop) or isinstance(a, Crop) and a.size for a in augmentations)
        self.alpha = stored[0] != wanted[0] and stored[0] in (2, 4)
        self.grey = wanted[0] == 1 and stored[0] in (3, 4)
        self.augmentations = augmentations
        spread = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        self._scale = PerDevice((1 / (255 * spread)).float())
        self._offset = PerDevice((-torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1) / spread).float())

    @property
    def augments(self) -> bool:
        """Whether the train view differs from the eval view."""
        return bool(self.augmentations)

    @property
    def channels(self) -> int:
        """C of the network."""
        return len(self._scale.value)

    def eval(self, x: Tensor) -> Tensor:
        """Return stored images as prepared floats, deterministically and per sample."""
        return self._fit(over_white(x) if self.alpha else x, self.resized)

    def train(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return stored images as prepared, augmented floats; parameters are drawn from `generator`, on the CPU."""
        if self.alpha:
            x = over_white(x)
        for augmentation in self.augmentations:
            x = augmentation(x, self.size, generator)
        return self._fit(x, self.size if self.cuts else self.resized)

    def undo(self, x: Tensor) -> Tensor:
        """Return prepared images with their normalisation undone, values 0..255."""
        return (x - self._offset.on(x.device)) / self._scale.on(x.device)

    def _fit(self, x: Tensor, resized: tuple[int, int]) -> Tensor:
        """Resize images to `resized`, cut out the middle, convert the channels and normalise; x is not changed."""
        if x.shape[-2:] != resized:
            x = F.interpolate(x.float(), resized, mode=self.interpolation, antialias=True)
            if self.interpolation == "bicubic":
                x = x.clamp_(0, 255)  # bicubic interpolation overshoots at edges
        if resized != self.size:
            top, left = (round((a - b) / 2) for a, b in zip(resized, self.size, strict=True))  # as torchvision
            x = x[..., top : top + self.size[0], left : left + self.size[1]]
        if self.grey:
            x = to_grey(x)
        scale, offset = self._scale.on(x.device), self._offset.on(x.device)
        if len(scale) != x.shape[1]:
            return (x * scale).add_(offset)  # grey is repeated by broadcasting
        return x.to(torch.float32, copy=True).mul_(scale).add_(offset)


class SecondView:
    """Turns images that are prepared for one network into the input of another: both see the same augmented view.

    The images are not cut again. They have the pixels that the first network sees: details that were lost when they
    were made smaller for it do not come back.

    Args:
        first: prepares images for the first network.
        second: turns images of the first network's shape, values 0..255, into the input of the second.
    """

    def __init__(self, first: ImageTransform, second: ImageTransform) -> None:
        self.first, self.second = first, second

    def __call__(self, x: Tensor) -> Tensor:
        """Return the input of the second network for prepared images x of the first."""
        return self.second.eval(self.first.undo(x))


def second_transform(dataset: Dataset, first: Transform, network: nn.Module) -> tuple[ImageTransform, str]:
    """Return what turns images of the shape that `first` gives, values 0..255, into the input of another network.

    Args:
        dataset: has the normalisation constants of networks that bring none.
        first: the transform of the network that the images are prepared for.
        network: the other one.

    Returns:
        The transform, and one line that describes it.

    Raises:
        ConfigError: the rows are no images, or have channels that cannot be converted.
    """
    if not isinstance(first, ImageTransform):
        raise ConfigError("reads images, and this data set has none; leave it out")
    shape = (first.channels, *first.size)
    wanted: Shape = tuple(getattr(network, "input_size", None) or shape)
    steps = _channel_steps(shape, wanted)
    mean, std, source = _normalisation(dataset, network, wanted[0])
    how: Interpolation = getattr(network, "interpolation", "bilinear")
    line = _shape(shape) if shape == wanted else f"{_shape(shape)} -> {_shape(wanted)}"
    transform = ImageTransform(shape, wanted, mean=mean, std=std, augmentations=(), interpolation=how)
    return transform, f"{line}: {', '.join([*steps, source])}"


def over_white(x: Tensor) -> Tensor:
    """Return float images without their last channel, the alpha (0..255), laid over white."""
    alpha = x[:, -1:].float() / 255
    return x[:, :-1] * alpha + 255 * (1 - alpha)


def fit_transform(dataset: Dataset, backbone: nn.Module) -> tuple[ImageTransform, str]:
    """Return the transform that turns a data set's images into a backbone's input, and one line that describes it.

    The backbone's `mean` and `std` are used for the normalisation if it has them, else those of the data set; without
    either, pixels are scaled to [0, 1].

    Args:
        dataset: of images; has the stored shape, the normalisation constants and the augmentations.
        backbone: may have `input_size` (C, H, W), `mean` and `std`, where None takes the data set's; and `crop` and
            `interpolation`, see `ImageTransform`.

    Raises:
        ConfigError: unknown augmentation, or channels that cannot be converted.
    """
    augmentations = parse_augmentations(dataset.augment)
    channels, height, width = dataset.shape
    for augmentation in augmentations.values():
        if isinstance(augmentation, Crop):
            augmentation.check(height, width)
    stored = (channels, height, width)
    wanted: Shape = tuple(getattr(backbone, "input_size", None) or stored)
    mean, std, source = _normalisation(dataset, backbone, wanted[0])
    crop: float = getattr(backbone, "crop", 1.0)
    interpolation: Interpolation = getattr(backbone, "interpolation", "bilinear")
    transform = ImageTransform(
        stored,
        wanted,
        mean=mean,
        std=std,
        augmentations=tuple(augmentations.values()),
        crop=crop,
        interpolation=interpolation,
        by_dataset=source == BY_DATASET,
    )
    resizing = ["resized" if interpolation == "bilinear" else f"resized ({interpolation})"]
    steps = [dataset.reading] if dataset.reading else []
    steps += resizing if transform.resized != stored[1:] else []
    steps += [f"central {crop:g} of the sides"] if crop < 1 else []
    if source == BY_DATASET and len({(part.mean, part.std) for part in dataset.parts}) > 1:
        source = "each part normalised by its own constants"
    steps += [*_channel_steps(stored, wanted), source]
    line = _shape(stored) if stored == wanted else f"{_shape(stored)} -> {_shape(wanted)}"
    training = f"; training: {', '.join(augmentations)}" if augmentations else ""
    return transform, f"{line}: {', '.join(steps)}{training}"


def _channel_steps(stored: Shape, wanted: Shape) -> list[str]:
    """Return the conversions of the channels, in words.

    Raises:
        ConfigError: channels that cannot be converted.
    """
    if stored[0] == wanted[0]:
        return []
    if stored[0] not in (1, 2, 3, 4) or wanted[0] not in (1, 3):
        raise ConfigError(
            f"backbone: takes images of {wanted[0]} channels, and those of the data set have {stored[0]}; "
            "clrun converts grey and RGB images, with or without alpha, to grey or RGB; choose another backbone"
        )
    steps = ["alpha over white"] if stored[0] in (2, 4) else []
    if wanted[0] == 1 and stored[0] > 2:
        steps.append("RGB to grey")
    elif wanted[0] == 3 and stored[0] < 3:
        steps.append("grey repeated")
    return steps


def _normalisation(
    dataset: Dataset, backbone: nn.Module, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Return mean and standard deviation of each wanted channel, and the words for where they come from."""
    mean, std = getattr(backbone, "mean", None), getattr(backbone, "std", None)
    if mean is not None and std is not None:
        return _match(tuple(mean), channels), _match(tuple(std), channels), "normalised by the backbone"
    if dataset.mean and dataset.std:
        colours = dataset.shape[0] - (dataset.shape[0] in (2, 4) and channels != dataset.shape[0])
        return _match(dataset.mean[:colours], channels), _match(dataset.std[:colours], channels), BY_DATASET
    return (0.0,) * channels, (1.0,) * channels, "scaled to [0, 1]"


def _match(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one value per wanted channel: repeated from grey, or weighted from RGB by ITU-R BT.601.

    The weighted standard deviation assumes fully correlated colours, which natural images nearly have.
    """
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    if len(values) == 3 and channels == 1:
        return (sum(w * v for w, v in zip(GREY, values, strict=True)),)
    raise ConfigError(f"dataset: {len(values)} normalisation constants do not fit {channels} channels")


def _shape(shape: Shape) -> str:
    """Return "HxWxC"."""
    return f"{shape[1]}x{shape[2]}x{shape[0]}"
