import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import decoding, encoded, noise
from PIL import Image

from clrun.data.decode import FileList, decode
from clrun.system.errors import ConfigError

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone


def read(image: Image.Image | bytes, channels: int = 3, kind: str = "PNG", **changes: Any) -> np.ndarray:
    data = image if isinstance(image, bytes) else encoded(image, kind)
    return decode(data, "x.png", decoding(**({"size": 8} | changes)), channels)


# --- modes


def test_colour_and_grey_are_kept_or_converted() -> None:
    colour, grey = noise(8, 8, 3), noise(8, 8)
    assert np.array_equal(read(Image.fromarray(colour)), colour)
    assert np.array_equal(read(Image.fromarray(grey), channels=1)[:, :, 0], grey)
    assert np.array_equal(read(Image.fromarray(grey)), np.repeat(grey[:, :, None], 3, axis=2))
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(Image.fromarray(colour), channels=1)[:, :, 0] - luma).max() <= 1


def test_alpha_is_laid_over_white() -> None:
    pixels = noise(8, 8, 4)
    pixels[0, :4, 3], pixels[0, 4:, 3] = 0, 255
    alpha = pixels[:, :, 3:] / 255
    expected = pixels[:, :, :3] * alpha + 255 * (1 - alpha)
    found = read(Image.fromarray(pixels, "RGBA"))
    assert np.abs(found - expected).max() <= 1 and found.shape == (8, 8, 3)
    assert (found[0, :4] == 255).all() and np.array_equal(found[0, 4:], pixels[0, 4:, :3])
    two = Image.merge("LA", (Image.fromarray(pixels[:, :, 0]), Image.fromarray(pixels[:, :, 3])))
    grey = pixels[:, :, 0] * alpha[:, :, 0] + 255 * (1 - alpha[:, :, 0])
    assert np.abs(read(two, channels=1)[:, :, 0] - grey).max() <= 1


def test_palettes_and_their_transparent_colour() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    assert read(image)[0, 0].tolist() == [10, 20, 30] and read(image)[1, 1].tolist() == [40, 50, 60]
    found = read(encoded(image, transparency=1))
    assert found[0, 0].tolist() == [10, 20, 30] and (found[1, 1] == 255).all()


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (8, 8), dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        found = read(Image.fromarray(values), channels=1, kind=kind)[:, :, 0]
        assert np.array_equal(found, values >> 8), kind  # Pillow's own conversion cuts at 255
    header = b"P5 8 8 65535\n"
    assert np.array_equal(read(header + values.astype(">u2").tobytes(), channels=1)[:, :, 0], values >> 8)


def test_one_bit_and_four_inks() -> None:
    bits = noise(8, 8) > 127
    assert np.array_equal(read(Image.fromarray(bits), channels=1)[:, :, 0], np.where(bits, 255, 0))
    inks = Image.fromarray(np.full((8, 8, 4), (255, 0, 0, 0), dtype=np.uint8), "CMYK")
    assert read(inks, kind="TIFF")[4, 4].tolist() == [0, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_picture_of_several_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    data = encoded(first, kind, save_all=True, append_images=[second] * 3)
    assert np.abs(read(data)[4, 4].astype(int) - [200, 0, 0]).max() < 8


@pytest.mark.parametrize("values", [np.full((8, 8), 0.5, np.float32), np.full((8, 8), 70_000, np.int32)])
def test_more_than_sixteen_bits_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"^x.png: cannot be decoded \(32-bit values need a range"):
        read(Image.fromarray(values), kind="TIFF")


def test_orientation_is_followed_where_asked_for() -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: what is stored on top belongs to the right
    data = encoded(Image.fromarray(pixels), exif=exif)
    assert np.array_equal(read(data), pixels)
    turned = read(data, exif=True)
    assert (turned[:, 4:] == 255).all() and (turned[:, :4] == 0).all()


# --- sizes


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 37), (5, 9), (8, 20), (33, 33)])
def test_crop_is_torchvisions_resize_and_center_crop(interpolation: str, height: int, width: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    pixels = noise(height, width, 3)
    mode = transforms.InterpolationMode(interpolation)
    published = transforms.Compose([transforms.Resize(8, mode, antialias=True), transforms.CenterCrop(8)])
    expected = published(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    found = read(Image.fromarray(pixels), interpolation=interpolation)
    assert np.array_equal(found, expected)
    through_pillow = np.array(published(Image.fromarray(pixels)))
    assert np.abs(found.astype(int) - through_pillow).max() <= 2  # it rounds between rows and columns


def test_squash_keeps_the_whole_image() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    pixels = noise(30, 50, 3)
    expected = functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), [8, 8], antialias=True)
    assert np.array_equal(read(Image.fromarray(pixels), fit="squash"), expected.permute(1, 2, 0).numpy())


def test_an_image_ten_thousand_pixels_wide() -> None:
    pixels = np.zeros((20, 10_000, 3), dtype=np.uint8)
    pixels[:, 4_990:5_010] = 255
    found = read(Image.fromarray(pixels))
    assert (found[:, 1:-1] == 255).all()  # the middle square; no image of 8 x 4000 was made on the way
    assert np.array_equal(read(Image.fromarray(pixels.transpose(1, 0, 2))), found.transpose(1, 0, 2))
    assert read(Image.fromarray(pixels), fit="squash").shape == (8, 8, 3)


def test_a_large_photograph_is_decoded_at_a_fraction_of_its_size() -> None:
    smooth = np.asarray(Image.fromarray(noise(12, 18, 3)).resize((600, 400), Image.Resampling.BICUBIC))
    data = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    whole = read(Image.fromarray(np.asarray(Image.open(io.BytesIO(data)))), size=16)
    found = read(data, size=16)
    assert np.abs(found.astype(int) - whole).mean() < 1 and not np.array_equal(found, whole)


# --- refusals, all of which name the file


def test_images_above_the_limit_are_refused_by_their_header() -> None:
    data = encoded(Image.fromarray(noise(30, 50, 3)))
    with pytest.raises(ConfigError, match="^x.png: 50 x 30 pixels are more than dataset.images.max_pixels=1499;"):
        decode(data[:60], "x.png", decoding(max_pixels=1499), 3)  # the pixels are not even there
    assert read(data, max_pixels=1500).shape == (8, 8, 3)


def test_a_header_that_promises_gigabytes() -> None:
    with pytest.raises(ConfigError, match="^x.png: cannot be decoded .*exceeds limit"):
        read(b"P6 60000 60000 255\n" + bytes(100))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_truncated_files(kind: str, share: float) -> None:
    data = encoded(Image.fromarray(noise(64, 64, 3)), kind)
    with pytest.raises(ConfigError, match=r"^x.png: cannot be decoded \(.*dataset.images.unreadable=skip$"):
        read(data[: int(share * len(data))])


def test_corrupt_empty_missing_and_foreign_files(tmp_path: Path) -> None:
    data = bytearray(encoded(Image.fromarray(noise(64, 64, 3))))
    data[100:400] = bytes(300)
    for name, content in (("corrupt", bytes(data)), ("empty", b""), ("text", b"not an image"), ("eps", b"%!PS-Adobe")):
        (tmp_path / f"{name}.jpg").write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    reasons = {
        "corrupt": "",
        "empty": "the file is empty",
        "text": "not an image of a known format",
        "eps": "not an image of a known format",  # Pillow would start Ghostscript
        "folder": "Is a directory",
        "dangling": "No such file",
        "missing": "No such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(ConfigError) as error:
            decode(tmp_path / f"{name}.jpg", f"{name}.jpg", decoding(), 3)
        assert str(error.value).startswith(f"{name}.jpg: cannot be decoded (") and reason in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.fromarray(noise(8, 8, 3))))

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match=r"^a.png: cannot be decoded \(.*Permission denied"):
        decode(file, "a.png", decoding(), 3)


def test_a_list_of_files(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"12345")
    os.utime(tmp_path / "b.png", ns=(1, 77))
    files = FileList(tmp_path, ("b.png", "gone.png"))
    assert len(files) == 2 and files.content(0) == tmp_path / "b.png" and files.name(0) == str(tmp_path / "b.png")
    assert files.stamp(0) == (5, 77)
    with pytest.raises(ConfigError, match="gone.png: cannot be read"):
        files.stamp(1)
