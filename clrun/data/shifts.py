"""Shifts of stored images that make a domain: picklable, and applied batch by batch.

At most one pixel-index tensor is kept in memory.

Shapes: `B` batch, `C` channels, `H`, `W` height and width.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clrun.data.transforms import PerDevice
from clrun.system.seeding import derive


@dataclass(frozen=True)
class PixelPermutation:
    """Moves the pixels of stored images; the channels of a pixel stay together.

    Attributes:
        source: [H * W] long, where each pixel comes from.
    """

    source: PerDevice

    def __call__(self, x: Tensor) -> Tensor:
        """Return permuted images of x [B, C, H, W]."""
        return x.flatten(2).index_select(2, self.source.on(x.device)).view(x.shape)


def pixel_permutation(shape: tuple[int, ...], seed: int, task: int) -> PixelPermutation:
    """Return the permutation of a task id, drawn by (seed, task) with the frozen stream of NumPy's RandomState."""
    source = np.random.RandomState(derive(seed, "permutation", task) % 2**32).permutation(shape[1] * shape[2])
    return PixelPermutation(PerDevice(torch.from_numpy(source)))


@dataclass(frozen=True)
class Rotation:
    """Turns stored images about their centre: bilinear, black outside, rounded to uint8.

    Attributes:
        degrees: angle, counter-clockwise.
    """

    degrees: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return rotated images of x [B, C, H, W] uint8."""
        height, width = x.shape[-2:]
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        # The inverse map in units of half the image's sides; the ratios keep angles in images that are not square.
        theta = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]], device=x.device)
        grid = F.affine_grid(theta, [1, 1, height, width], align_corners=False).expand(len(x), -1, -1, -1)
        turned = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return turned.round_().to(torch.uint8)


def random_angle(maximum: float, seed: int, task: int) -> float:
    """Return the angle of a task id, uniform in [0, maximum) and drawn by (seed, task)."""
    return maximum * derive(seed, "rotation", task) / 2**63


@dataclass(frozen=True)
class Standardised:
    """Gives stored images of one data set the mean and the deviation of another, without rounding.

    The transform then subtracts that mean and divides by that deviation. Each data set of a sequence is thus normalised
    by its own constants, although all of them use the same transform.

    Attributes:
        scale: factor of each channel.
        offset: number that is added to each channel, in units of 0..255.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def of(
        cls, mean: tuple[float, ...], std: tuple[float, ...], to_mean: tuple[float, ...], to_std: tuple[float, ...]
    ) -> "Standardised":
        """Return the change from `mean` and `std` to `to_mean` and `to_std`, [C] each, in [0, 1] units."""
        scale = tuple(new / old for old, new in zip(std, to_std, strict=True))
        offset = tuple(255 * (new - k * old) for old, new, k in zip(mean, to_mean, scale, strict=True))
        return cls(scale, offset)

    def __call__(self, x: Tensor) -> Tensor:
        """Return float images of x [B, C, H, W]; values may leave 0..255."""
        scale, offset = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (self.scale, self.offset))
        return x * scale + offset
