"""Generated images whose difficulty and similarity between tasks are known, because they are options."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from clrun.data.reading.assemble import Rows, assemble
from clrun.data.reading.options import Reading, loader
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, Fraction, NonNegative, PositiveInt
from clrun.system.seeding import generator

GRID = 4  # side of the field that carries the class: independent of the resolution


@loader
def synthetic(
    reading: Reading,
    *,
    num_classes: PositiveInt,
    image_shape: list[int],
    train_rows: PositiveInt,
    test_rows: PositiveInt,
    difficulty: NonNegative,
    similarity: Fraction,
    period: PositiveInt,
) -> Dataset:
    """Return images of smooth random patterns: one prototype per class plus noise of the same kind.

    Prototype and noise are Gaussian on a grid of C x 4 x 4 values (fewer for smaller images), enlarged to the image by
    bilinear interpolation. The prototypes of classes c and c + k * period have the correlation similarity^k: with tasks
    of `period` classes, the tasks resemble each other the more the closer their ids are, which plants an order effect.

    Args:
        reading: the common options; the seed also determines prototypes and noise.
        num_classes: C.
        image_shape: [channels, height, width].
        train_rows: training images of each class.
        test_rows: test images of each class.
        difficulty: standard deviation of the noise, in units of the prototypes' (1: nearly separable, 2: hard).
        similarity: correlation between the prototypes of classes that lie `period` apart.
        period: distance of similar classes, normally the classes of a task.

    Raises:
        ConfigError: `image_shape` is not three positive integers.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ConfigError(
            f"dataset.image_shape: must be three positive integers [channels, height, width], got {image_shape}"
        )
    shape = (image_shape[0], image_shape[1], image_shape[2])
    rows = _generate(num_classes, shape, (train_rows, test_rows), difficulty, similarity, period, reading.seed)
    pixels = rows[0][0].double() / 255
    return assemble(
        "synthetic",
        rows[0],
        rows[1],
        class_names=[f"c{label}" for label in range(num_classes)],
        mean=tuple(pixels.mean(dim=(0, 2, 3)).tolist()),
        std=tuple(pixels.std(dim=(0, 2, 3)).clamp(min=1e-3).tolist()),
        groups={},
        reading=reading,
    )


@lru_cache(maxsize=8)
def _generate(
    num_classes: int,
    shape: tuple[int, int, int],
    counts: tuple[int, int],
    difficulty: float,
    similarity: float,
    period: int,
    seed: int,
) -> tuple[Rows, Rows]:
    """Return training and test rows, made once per process."""
    means = prototypes(num_classes, shape, similarity=similarity, period=period, seed=seed)
    parts = []
    for part, count in zip(("train", "test"), counts, strict=True):
        noise = [
            torch.randn(count, *mean.shape, generator=generator(seed, "synthetic", part, label))
            for label, mean in enumerate(means)
        ]
        fields = (means[:, None] + difficulty * torch.stack(noise)) / math.sqrt(1 + difficulty**2)
        smooth = F.interpolate(fields.flatten(0, 1), shape[1:], mode="bilinear")
        images = (127.5 + 50 * smooth).round().clamp(0, 255).to(torch.uint8)
        parts.append((images, torch.arange(num_classes).repeat_interleave(count)))
    return parts[0], parts[1]


def prototypes(num_classes: int, shape: tuple[int, int, int], *, similarity: float, period: int, seed: int) -> Tensor:
    """Return [C, channels, grid height, grid width], the class means: autoregressive over classes `period` apart."""
    grid = (shape[0], min(GRID, shape[1]), min(GRID, shape[2]))
    means: list[Tensor] = []
    for label in range(num_classes):
        own = torch.randn(grid, generator=generator(seed, "synthetic", "prototype", label))
        if label >= period:
            own = similarity * means[label - period] + math.sqrt(1 - similarity**2) * own
        means.append(own)
    return torch.stack(means)
