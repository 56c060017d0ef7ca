"""The augmentations against torchvision.transforms.v2: equal distributions, and equal pixels for equal draws."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from clrun.data import augment
from clrun.data.augment import Crop, Flip, Jitter, RandomResizedCrop
from clrun.data.transforms import ImageTransform

v2 = pytest.importorskip("torchvision.transforms.v2")
DRAWS = 3000
TOLERANCE = 1e-3 * 255  # images hold 0..255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeded(9))


def drawn(transform: Any, image: Tensor, count: int = DRAWS) -> Tensor:
    """Return `count` results of torchvision's transform of an image."""
    torch.manual_seed(0)
    return torch.stack([transform(image) for _ in range(count)])


def keys(images: Tensor) -> Counter[bytes]:
    return Counter(bytes(image.flatten().tolist()) for image in images)


def alike(ours: Counter[bytes], theirs: Counter[bytes]) -> float:
    """Return the chi-square statistic of two samples of equal size over the same outcomes."""
    assert ours.keys() == theirs.keys()
    return sum((ours[key] - theirs[key]) ** 2 / (ours[key] + theirs[key]) for key in ours)


# --- draws


def test_crop_offsets_are_distributed_as_torchvisions() -> None:
    image = torch.arange(1, 37, dtype=torch.uint8).view(1, 6, 6)
    ours = Crop(pad=1)(image.expand(DRAWS, -1, -1, -1), (6, 6), seeded())
    statistic = alike(keys(ours), keys(drawn(v2.RandomCrop(6, padding=1), image)))
    assert statistic < 26.1  # 8 degrees of freedom: exceeded once in 1000


def test_crops_of_another_size_are_distributed_as_torchvisions() -> None:
    image = torch.arange(1, 31, dtype=torch.uint8).view(1, 5, 6)
    ours = Crop(pad=0, size=4)(image.expand(DRAWS, -1, -1, -1), (4, 4), seeded())
    assert alike(keys(ours), keys(drawn(v2.RandomCrop(4), image))) < 20.5  # 5 degrees of freedom


@pytest.mark.parametrize("p", [0.5, 0.2])
@pytest.mark.parametrize("side", [3, 30])
def test_flip_rates_are_torchvisions(p: float, side: int) -> None:
    image = pictures(3, side, side)
    count = DRAWS if side == 3 else 400
    ours = Flip(p)(image.expand(count, -1, -1, -1), (side, side), seeded())
    theirs = drawn(v2.RandomHorizontalFlip(p), image, count)
    assert ours.unique(dim=0).shape[0] == 2 and keys(ours).keys() == keys(theirs).keys()
    rates = [(images == image.flip(-1)).flatten(1).all(dim=1).float().mean() for images in (ours, theirs)]
    assert abs(rates[0] - p) < 3.3 * math.sqrt(p * (1 - p) / count)
    assert abs(rates[0] - rates[1]) < 3.3 * math.sqrt(2 * p * (1 - p) / count)


def test_colour_factors_are_distributed_as_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "turn_hue")
    for name in names:
        record = seen.setdefault(name, [])
        monkeypatch.setattr(augment, name, lambda x, factor, record=record: record.append(factor.flatten()) or x)
    Jitter(0.4, 0.3, 1.5, 0.2)(pictures(DRAWS, 3, 1, 1), (1, 1), seeded())
    torch.manual_seed(0)
    jitter = v2.ColorJitter(0.4, 0.3, 1.5, 0.2)
    theirs = {name: [] for name in names}
    for _ in range(DRAWS):
        params = jitter.make_params([])
        for name, key in zip(names, ("brightness", "contrast", "saturation", "hue"), strict=True):
            theirs[name].append(float(params[f"{key}_factor"]))
    for name in names:
        mine, other = torch.cat(seen[name]).double(), torch.tensor(theirs[name], dtype=torch.float64)
        width = other.max() - other.min()
        assert abs(mine.mean() - other.mean()) < 3.3 * width * math.sqrt(2 / (12 * DRAWS)), name
        assert abs(mine.std() / other.std() - 1) < 0.06, name
        assert abs(mine.min() - other.min()) < 0.01 * width and abs(mine.max() - other.max()) < 0.01 * width, name


# --- pixels


@pytest.mark.parametrize("shape", [(3, 80, 120), (1, 64, 50), (3, 20, 30), (1, 9, 9)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_resized_crops_have_torchvisions_pixels(shape: tuple[int, int, int], layout: torch.memory_format) -> None:
    crop = RandomResizedCrop(scale=(0.1, 0.9))
    for x in (pictures(12, *shape), pictures(12, *shape).float()):
        found = crop(x.contiguous(memory_format=layout), (24, 20), seeded(4))
        rounded = math.prod(shape) >= augment.LARGE and not x.is_floating_point()
        assert found.is_floating_point() != rounded and found.shape == (12, shape[0], 24, 20)
        for image, result, box in zip(x, found, crop.boxes(12, *shape[1:], seeded(4)).T.tolist(), strict=True):
            expected = v2.functional.resized_crop(image if rounded else image.float(), *box, [24, 20], antialias=True)
            torch.testing.assert_close(result, expected, atol=0 if rounded else TOLERANCE, rtol=0)


def test_a_chain_of_colour_changes_has_torchvisions_pixels() -> None:
    x = pictures(5, 3, 9, 9).float()
    found = Jitter(0.4, 0.4, 0.4, 0.1)(x, (9, 9), seeded(3))
    generator = seeded(3)
    draw, order = torch.rand(5, 4, generator=generator), torch.randperm(4, generator=generator).tolist()
    low, high = torch.tensor([0.6, 0.6, 0.6, -0.1]), torch.tensor([1.4, 1.4, 1.4, 0.1])
    changes = [getattr(v2.functional, f"adjust_{name}") for name in ("brightness", "contrast", "saturation", "hue")]
    for image, result, factors in zip(x / 255, found, (low + (high - low) * draw).tolist(), strict=True):
        for kind in order:
            image = changes[kind](image, factors[kind])
        torch.testing.assert_close(result, image * 255, atol=TOLERANCE, rtol=0)


def test_windows_of_the_padded_image_are_torchvisions() -> None:
    image = pictures(3, 7, 9)
    padded = v2.functional.pad(image, [2, 2])
    windows = {bytes(v2.functional.crop(padded, i, j, 7, 9).flatten().tolist()) for i in range(5) for j in range(5)}
    assert keys(Crop(pad=2)(image.expand(800, -1, -1, -1), (7, 9), seeded())).keys() == windows


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("stored", "wanted", "crop"), [(40, 28, 0.875), (32, 28, 0.875), (8, 24, 1.0), (50, 20, 1.0)])
def test_the_eval_view_is_resize_center_crop_and_normalize(
    interpolation: Any, stored: int, wanted: int, crop: float
) -> None:
    x = pictures(3, 3, stored, stored)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shapes = (3, stored, stored), (3, wanted, wanted)
    ours = ImageTransform(*shapes, mean=mean, std=std, augmentations=(), crop=crop, interpolation=interpolation)
    usual = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize(round(wanted / crop), v2.InterpolationMode(interpolation), antialias=True),
            v2.CenterCrop(wanted),
        ]
    )
    expected = v2.functional.normalize(usual(x).clamp(0, 1), mean, std)
    torch.testing.assert_close(ours.eval(x), expected, atol=1e-3, rtol=0)


def test_large_and_small_images_are_augmented_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x = pictures(9, 3, 40, 40)
    for change, tolerance in ((RandomResizedCrop(), 1.1), (Flip(), 0)):
        results = []
        for large in (0, 10**9):
            monkeypatch.setattr(augment, "LARGE", large)
            results.append(change(x, (32, 32), seeded(2)).float())
        assert (results[0] - results[1]).abs().max() <= tolerance
