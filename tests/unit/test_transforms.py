import colorsys
import copy
import math
import pickle
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clrun.data import augment
from clrun.data.augment import Crop, Flip, Jitter, RandomResizedCrop, parse_augmentations, resampling
from clrun.data.modality import Vectors
from clrun.data.split import Plain, TensorSplit
from clrun.data.stream import Dataset
from clrun.data.transforms import ImageTransform, fit_transform
from clrun.system.errors import ConfigError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeded(9))


def dataset(shape: tuple[int, ...], **changes: Any) -> Dataset:
    rows = TensorSplit(torch.zeros(1, *shape, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    facts = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.5)} if shape[0] == 3 else {"mean": (0.3,), "std": (0.4,)}
    return replace(Dataset("d", rows, rows, 1, ("c",), shape, **facts), **changes)


def backbone(size: tuple[int, ...] | None, mean: Any = None, std: Any = None) -> Any:
    return SimpleNamespace(input_size=size, mean=mean, std=std)


def fitted(
    stored: tuple[int, ...], wanted: tuple[int, ...] | None = None, mean: Any = None, std: Any = None, **changes
):
    return fit_transform(dataset(stored, **changes), backbone(wanted, mean, std))


# --- preparing


def test_pixels_are_normalised_per_channel() -> None:
    x = pictures(5, 3, 4, 4)
    transform, line = fitted((3, 4, 4))
    mean, std = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(transform.eval(x), (x.double() / 255 - mean) / std, check_dtype=False, atol=1e-5, rtol=0)
    assert transform.eval(x).dtype == torch.float32
    assert line == "4x4x3: normalised by the data set"


def test_without_constants_pixels_lie_between_0_and_1() -> None:
    transform, line = fit_transform(dataset((1, 2, 2), mean=(), std=()), backbone(None))
    x = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    torch.testing.assert_close(transform.eval(x).flatten(), torch.tensor([0, 0.2, 0.4, 1]))
    assert line == "2x2x1: scaled to [0, 1]"


def test_the_backbones_constants_come_first() -> None:
    transform, line = fitted((3, 4, 4), (3, 4, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    x = pictures(2, 3, 4, 4)
    torch.testing.assert_close(transform.eval(x), x.float() / 127.5 - 1)
    assert line == "4x4x3: normalised by the backbone"


def test_grey_is_repeated_and_normalised_per_channel() -> None:
    transform, line = fitted((1, 4, 4), (3, 4, 4), (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    x = pictures(2, 1, 4, 4)
    repeated, _ = fitted((3, 4, 4), (3, 4, 4), (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    torch.testing.assert_close(transform.eval(x), repeated.eval(x.expand(-1, 3, -1, -1)))
    assert line == "4x4x1 -> 4x4x3: grey repeated, normalised by the backbone"


def test_rgb_becomes_grey_by_itu_601() -> None:
    transform, line = fitted((3, 1, 1), (1, 1, 1))
    x = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8).view(4, 3, 1, 1)
    mean = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    std = 0.299 * 0.1 + 0.587 * 0.2 + 0.114 * 0.5
    expected = (torch.tensor([0.299, 0.587, 0.114, 1.0]) - mean) / std
    torch.testing.assert_close(transform.eval(x).flatten(), expected)
    assert line == "1x1x3 -> 1x1x1: RGB to grey, normalised by the data set"


@pytest.mark.parametrize(("stored", "wanted"), [(4, 3), (4, 1), (2, 1), (2, 3)])
def test_alpha_is_laid_over_white(stored: int, wanted: int) -> None:
    colour = torch.full((3, stored, 1, 1), 100, dtype=torch.uint8)
    colour[:, -1, 0, 0] = torch.tensor([255, 0, 51])
    transform, line = fitted((stored, 1, 1), (wanted, 1, 1), mean=(0.0,) * wanted, std=(1.0,) * wanted)
    expected = torch.tensor([100, 255, 0.2 * 100 + 0.8 * 255]) / 255
    prepared = transform.eval(colour)
    assert prepared.shape == (3, wanted, 1, 1) and "alpha over white" in line
    torch.testing.assert_close(prepared[:, :, 0, 0], expected[:, None].expand(3, wanted))
    torch.testing.assert_close(transform.train(colour, seeded()), prepared)


def test_images_are_resized_with_antialiasing() -> None:
    x = pictures(2, 1, 8, 8)
    for side in (32, 4):
        transform, line = fitted((1, 8, 8), (1, side, side), (0.0,), (1.0,))
        expected = F.interpolate(x.float(), (side, side), mode="bilinear", antialias=True) / 255
        torch.testing.assert_close(transform.eval(x), expected)
        assert line == f"8x8x1 -> {side}x{side}x1: resized, normalised by the backbone"
    assert fitted((1, 8, 8), (1, 32, 32))[1] == "8x8x1 -> 32x32x1: resized, normalised by the data set"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_backbone_may_see_the_middle_only(interpolation: str) -> None:
    x = pictures(2, 3, 40, 40)
    wants = SimpleNamespace(
        input_size=(3, 28, 28), mean=(0.0,) * 3, std=(1.0,) * 3, crop=0.875, interpolation=interpolation
    )
    transform, line = fit_transform(dataset((3, 40, 40)), wants)
    resized = F.interpolate(x.float(), (32, 32), mode=interpolation, antialias=True).clamp(0, 255)
    torch.testing.assert_close(transform.eval(x), resized[..., 2:30, 2:30] / 255)
    torch.testing.assert_close(transform.train(x, seeded()), transform.eval(x))
    how = "resized" if interpolation == "bilinear" else "resized (bicubic)"
    assert line == f"40x40x3 -> 28x28x3: {how}, central 0.875 of the sides, normalised by the backbone"


def test_the_middle_agrees_with_torchvision() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    x = pictures(3, 3, 50, 50)
    wants = SimpleNamespace(
        input_size=(3, 21, 21), mean=(0.0,) * 3, std=(1.0,) * 3, crop=0.875, interpolation="bicubic"
    )
    transform, _ = fit_transform(dataset((3, 50, 50)), wants)
    theirs = v2.Compose([v2.Resize(24, interpolation=3, antialias=True), v2.CenterCrop(21)])(x.float())
    assert (transform.eval(x) - theirs.clamp(0, 255) / 255).abs().max() < 1e-3


@pytest.mark.parametrize("spec", ["random_resized_crop", {"crop": {"pad": 0, "size": 28}}])
def test_nothing_more_is_cut_off_what_an_augmentation_has_cut_out(spec: Any) -> None:
    wants = SimpleNamespace(input_size=(1, 28, 28), mean=(0.0,), std=(1.0,), crop=0.5, interpolation="bilinear")
    transform, _ = fit_transform(dataset((1, 32, 32), augment=(spec,)), wants)
    [augmentation] = parse_augmentations([spec]).values()
    x = pictures(4, 1, 32, 32)
    expected = augmentation(x, (28, 28), seeded(3)).float() / 255
    torch.testing.assert_close(transform.train(x, seeded(3)), expected)


def test_a_crop_larger_than_the_images_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="^dataset.augment: crop: size 41 exceeds the 40 pixels of the padded images"):
        fitted((3, 32, 60), augment=({"crop": {"size": 41}},))
    fitted((3, 32, 60), augment=({"crop": {"size": 40}},))


def test_normalisation_can_be_undone() -> None:
    for stored, wanted in (((3, 6, 6), (3, 6, 6)), ((1, 6, 6), (3, 6, 6))):
        transform, _ = fitted(stored, wanted, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
        x = pictures(2, *stored)
        torch.testing.assert_close(
            transform.undo(transform.eval(x)), x.float().expand(-1, 3, -1, -1), atol=1e-3, rtol=0
        )


def test_a_large_colour_image_fits_a_small_grey_network() -> None:
    transform, line = fitted((3, 64, 64), (1, 16, 16))
    assert transform.eval(pictures(2, 3, 64, 64)).shape == (2, 1, 16, 16)
    assert line == "64x64x3 -> 16x16x1: resized, RGB to grey, normalised by the data set"


@pytest.mark.parametrize("wanted", [(3, 8, 8), (1, 8, 8), (3, 20, 12)])
def test_preparation_does_not_depend_on_the_rest_of_the_batch(wanted: tuple[int, ...]) -> None:
    x = pictures(9, 3, 8, 8)
    transform, _ = fitted((3, 8, 8), wanted)
    alone = torch.cat([transform.eval(x[i : i + 1]) for i in range(len(x))])
    assert torch.equal(transform.eval(x), alone)


def test_the_stored_images_are_left_alone() -> None:
    for x in (pictures(2, 1, 4, 4), pictures(2, 1, 4, 4).float()):
        before = x.clone()
        transform, _ = fitted((1, 4, 4), augment=("crop", "flip", "jitter"))
        transform.eval(x), transform.train(x, seeded())
        assert torch.equal(x, before)


def test_without_augmentation_both_views_agree() -> None:
    transform, line = fitted((3, 4, 4))
    x = pictures(2, 3, 4, 4)
    assert not transform.augments and torch.equal(transform.train(x, seeded()), transform.eval(x))
    augmented, line = fitted((3, 4, 4), augment=["crop", {"flip": {"p": 1.0}}])
    assert augmented.augments and torch.equal(augmented.eval(x), transform.eval(x))
    assert line == "4x4x3: normalised by the data set; training: crop, flip"


def test_copies_behave_the_same_and_carry_no_cache() -> None:
    transform, _ = fitted((3, 8, 8), augment=["crop", "random_resized_crop", "jitter"])
    fresh = pickle.dumps(transform)
    x = pictures(4, 3, 8, 8)
    expected = transform.train(x, seeded(2))
    for twin in (copy.deepcopy(transform), pickle.loads(fresh), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(twin.train(x, seeded(2)), expected)
    assert len(pickle.dumps(transform)) == len(fresh)


def test_augmentation_follows_the_generator() -> None:
    transform, _ = fitted((3, 8, 8), augment=["crop", "flip", "jitter"])
    x = pictures(16, 3, 8, 8)
    a, b, c = (transform.train(x, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_features_pass_through() -> None:
    stored = dataset((9,))
    found, transform, line, _ = Vectors().fit(stored, backbone(None))
    assert found is stored and isinstance(transform, Plain) and line == "9 features, as stored"
    with pytest.raises(ConfigError, match="^dataset.augment: this data set has no images"):
        Vectors().fit(dataset((9,), augment=("flip",)), backbone(None))


def test_channels_without_a_rule_are_refused() -> None:
    with pytest.raises(ConfigError, match="^backbone: takes images of 3 channels, and those of the data set have 13"):
        fitted((13, 4, 4), (3, 4, 4), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ConfigError, match="^dataset: 2 normalisation constants do not fit 3 channels"):
        fit_transform(dataset((3, 4, 4), mean=(0.1, 0.2), std=(1.0, 1.0)), backbone(None))


# --- augmentations


def test_every_crop_is_a_window_of_the_padded_image() -> None:
    image = torch.arange(1, 1 + 2 * 8 * 8, dtype=torch.uint8).view(1, 2, 8, 8)
    padded = F.pad(image, (1, 1, 1, 1))
    windows = {bytes(padded[0, :, i : i + 8, j : j + 8].flatten().tolist()): (i, j) for i in range(3) for j in range(3)}
    crops = Crop(pad=1)(image.expand(2000, -1, -1, -1), (8, 8), seeded())
    counts = Counter(windows[bytes(crop.flatten().tolist())] for crop in crops)
    statistic = sum((count - 2000 / 9) ** 2 / (2000 / 9) for count in counts.values())
    assert len(counts) == 9
    assert statistic < 26.1  # chi-square with 8 degrees of freedom: exceeded once in 1000 draws


def test_crop_pads_four_at_32_pixels_and_a_pixel_at_least() -> None:
    for side, pad in ((32, 4), (28, 3), (8, 1), (4, 1)):
        crops = Crop()(torch.ones(4000, 1, side, side, dtype=torch.uint8), (side, side), seeded())
        assert (crops[:, 0, side // 2] == 0).sum(dim=1).max() == pad
        assert (crops[:, 0, :, side // 2] == 0).sum(dim=1).max() == pad
    assert torch.equal(Crop(pad=0)(pictures(3, 1, 4, 4), (4, 4), seeded()), pictures(3, 1, 4, 4))


def test_crop_keeps_images_apart_whatever_the_shape() -> None:
    x = torch.arange(1, 7, dtype=torch.float32).view(6, 1, 1, 1).expand(6, 3, 5, 9)
    crops = Crop(pad=3)(x, (5, 9), seeded())
    for index, crop in enumerate(crops):
        assert set(crop.unique().tolist()) <= {0.0, index + 1.0} and crop.max() == index + 1


def test_flip() -> None:
    x = pictures(3000, 1, 2, 3)
    flipped = Flip()(x, (2, 3), seeded())
    turned = (flipped == x.flip(-1)).flatten(1).all(dim=1)
    kept = (flipped == x).flatten(1).all(dim=1)
    assert torch.all(turned | kept)
    assert abs(turned.float().mean() - 0.5) < 3.3 * 0.5 / math.sqrt(3000)
    assert torch.equal(Flip(p=1.0)(x, (2, 3), seeded()), x.flip(-1))
    assert torch.equal(Flip(p=0.0)(x, (2, 3), seeded()), x)


@pytest.mark.parametrize(("length", "wanted"), [(5, 11), (12, 4), (7, 7), (1, 3), (12, 12)])
def test_resampling_is_what_interpolate_does_to_the_piece(length: int, wanted: int) -> None:
    row = torch.rand(1, 1, 1, 12, generator=seeded())
    for start in range(12 - length + 1):
        weights = resampling(torch.tensor([start]), torch.tensor([length]), 12, wanted)
        piece = row[..., start : start + length]
        expected = F.interpolate(piece, (1, wanted), mode="bilinear", antialias=True)
        torch.testing.assert_close((weights @ row[0, 0, 0])[0], expected[0, 0, 0])


def test_a_resized_crop_is_its_box_resized() -> None:
    x = pictures(6, 3, 20, 30)
    crop = RandomResizedCrop(scale=(0.1, 0.9))
    found = crop(x, (8, 8), seeded(4))
    for index, (top, left, height, width) in enumerate(crop.boxes(6, 20, 30, seeded(4)).T.tolist()):
        piece = x[index : index + 1, :, top : top + height, left : left + width].float()
        expected = F.interpolate(piece, (8, 8), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(found[index], expected, atol=1e-3, rtol=0)


def test_boxes_lie_inside_and_have_the_area_and_ratio_asked_for() -> None:
    top, left, height, width = RandomResizedCrop(scale=(0.2, 0.5)).boxes(5000, 400, 300, seeded())
    assert min(top.min(), left.min()) >= 0 and (top + height).max() <= 400 and (left + width).max() <= 300
    share, ratio = height * width / (400 * 300), width / height
    assert share.min() > 0.197 and share.max() < 0.503  # sides are rounded to whole pixels
    assert ratio.min() > 0.74 and ratio.max() < 1.345
    assert abs(share.mean() - 0.35) < 3.3 * 0.3 / math.sqrt(12 * 5000)
    assert abs(ratio.log().mean()) < 3.3 * math.log(16 / 9) / math.sqrt(12 * 5000)


def test_boxes_that_never_fit_fall_back_to_the_centre() -> None:
    boxes = RandomResizedCrop(scale=(1.0, 1.0)).boxes(50, 100, 10, seeded())
    assert set(map(tuple, boxes.T.tolist())) == {(43, 0, 13, 10)}  # ratio 3/4 at full width


def test_boxes_are_distributed_as_torchvisions() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    image = torch.zeros(3, 40, 60)
    drawn = [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = torch.tensor(drawn, dtype=torch.float64)
    ours = RandomResizedCrop().boxes(3000, 40, 60, seeded()).T.double()
    standard_error = ((theirs.var(dim=0) + ours.var(dim=0)) / 3000).sqrt()
    assert torch.all((theirs.mean(dim=0) - ours.mean(dim=0)).abs() < 3.5 * standard_error)
    assert torch.all((theirs.std(dim=0) / ours.std(dim=0) - 1).abs() < 0.06)


def test_hue_turns_as_colorsys_says() -> None:
    x = pictures(5, 3, 3, 3).float()
    x[0, :, 0, 0] = 77  # grey has no hue
    for turn in (-0.5, -0.1, 0.0, 0.3):
        found = augment.turn_hue(x, torch.full((5, 1, 1, 1), turn))
        for pixel, turned in zip(x.movedim(1, -1).reshape(-1, 3), found.movedim(1, -1).reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1, s, v)) * 255
            torch.testing.assert_close(turned, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_changes_agree_with_torchvision(name: str) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    x = pictures(3, 3, 6, 6).float()
    factors = torch.tensor([0.0, 0.6, 1.4]).view(3, 1, 1, 1)
    found = getattr(augment, f"adjust_{name}")(x, factors) / 255
    for index, factor in enumerate(factors.flatten().tolist()):
        expected = getattr(functional, f"adjust_{name}")(x[index] / 255, factor)
        torch.testing.assert_close(found[index], expected, atol=1e-3, rtol=0)


def test_jitter_draws_factors_in_range_and_per_sample() -> None:
    x = torch.full((4000, 1, 1, 1), 100.0)
    found = Jitter(brightness=0.4, contrast=0.0, saturation=0.0)(x, (1, 1), seeded()).flatten() / 100
    assert 0.6 <= found.min() < 0.61 and 1.39 < found.max() <= 1.4
    assert abs(found.mean() - 1) < 3.3 * 0.8 / math.sqrt(12 * 4000)
    strong = Jitter(brightness=3.0, contrast=0.0, saturation=0.0)(x, (1, 1), seeded()).flatten() / 100
    assert 0 <= strong.min() < 0.01  # never negative, as torchvision's range is cut at 0


def test_jitter_of_no_strength_and_on_grey_images() -> None:
    x = pictures(4, 3, 5, 5)
    still = Jitter(brightness=0.0, contrast=0.0, saturation=0.0)(x, (5, 5), seeded())
    assert torch.equal(still, x.float())
    grey = pictures(4, 1, 5, 5)
    coloured = Jitter(brightness=0.0, contrast=0.0, saturation=0.9, hue=0.5)(grey, (5, 5), seeded())
    torch.testing.assert_close(coloured, grey.float())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (["cropp"], "no augmentation named 'cropp'; did you mean 'crop'?"),
        ([3], "no augmentation named '3'"),
        ([{"crop": {"padding": 2}}], "crop: no option 'padding'; did you mean 'pad'? (has: pad, size)"),
        ([{"crop": 2}], "crop: options must be a mapping, got 2"),
        ([{"crop": {"pad": -1}}], "crop: pad must be at least 0"),
        ([{"crop": {"pad": "x"}}], "crop: options must be numbers"),
        ([{"flip": {"p": 1.5}}], "flip: p must be between 0 and 1"),
        ([{"random_resized_crop": {"scale": [0.5, 2.0]}}], "random_resized_crop: scale must not exceed 1"),
        ([{"random_resized_crop": {"ratio": [2, 1]}}], "random_resized_crop: ratio must be two positive numbers"),
        ([{"random_resized_crop": {"ratio": 1}}], "random_resized_crop: ratio must be two positive numbers"),
        ([{"jitter": {"hue": 0.6}}], "jitter: hue must be between 0 and 0.5"),
        ([{"jitter": {"contrast": -0.1}}], "jitter: strengths must be at least 0"),
        (["flip", {"flip": {}}], "flip: named twice"),
    ],
)
def test_mistakes_in_the_augmentation_are_refused(spec: list[Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_augmentations(spec)
    assert str(error.value).startswith("dataset.augment: ") and said in str(error.value)


def test_augmentations_keep_their_order_and_options() -> None:
    parsed = parse_augmentations([{"flip": {"p": 0.2}}, "crop", {"random_resized_crop": {"scale": [0.3, 0.7]}}])
    assert list(parsed) == ["flip", "crop", "random_resized_crop"]
    assert (
        parsed["flip"] == Flip(0.2) and parsed["crop"] == Crop() and parsed["random_resized_crop"].scale == [0.3, 0.7]
    )


def test_random_resized_crop_goes_straight_to_the_wanted_size() -> None:
    transform, _ = fitted((3, 8, 8), (3, 20, 24), augment=["flip", "random_resized_crop", "jitter"])
    assert isinstance(transform, ImageTransform)
    assert transform.train(pictures(4, 3, 8, 8), seeded()).shape == (4, 3, 20, 24)
