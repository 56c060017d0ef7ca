import os
import pickle
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clrun.data.reading import arrays
from clrun.data.reading.arrays import DIGIT_GROUPS
from clrun.data.reading.assemble import cut_validation
from clrun.data.reading.pickles import read_arrays
from clrun.data.sources.cifar import SUPERCLASSES, cifar10, cifar100
from clrun.data.sources.digits import digits
from clrun.data.sources.mnist import emnist, fashion_mnist, kmnist, mnist
from clrun.data.sources.stl10 import stl10
from clrun.data.sources.svhn import svhn
from clrun.data.sources.synthetic import prototypes, synthetic
from clrun.data.split import Batch
from clrun.system.errors import ConfigError, DataWarning, collecting_warnings

COMMON = dict(val_fraction=0.0, seed=0, augment=[])
SYNTHETIC = dict(
    num_classes=6,
    image_shape=[1, 8, 8],
    train_rows=20,
    test_rows=10,
    difficulty=1.0,
    similarity=0.0,
    period=2,
    **COMMON,
)


def images(split: Any) -> torch.Tensor:
    return Batch.cat(*split.batches(512, view="raw")).x


def same(a: Any, b: Any) -> bool:
    return torch.equal(images(a), images(b)) and torch.equal(a.y, b.y)


# --- digits


def test_digits_are_scikit_learns() -> None:
    data = digits(**COMMON)
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    assert data.shape == (1, 8, 8) and data.num_classes == 10 and data.class_names == tuple("0123456789")
    assert images(data.train).dtype == torch.uint8 and (len(data.train), len(data.test)) == (1442, 355)
    stored = torch.cat([images(data.train), images(data.test)]).float() * 16 / 255
    assert (stored - stored.round()).abs().max() < 0.04  # rounding to uint8 keeps the 17 levels apart
    key = {(*row.astype(int).tolist(), int(label)) for row, label in zip(raw.data, raw.target, strict=True)}
    ours = {
        (*row.tolist(), int(label))
        for row, label in zip(stored.round().int().flatten(1), torch.cat([data.train.y, data.test.y]), strict=True)
    }
    assert ours == key


def test_digits_split_is_stratified_and_the_same_for_every_seed() -> None:
    a, b = digits(**COMMON), digits(val_fraction=0.2, seed=7, augment=[])
    assert same(a.test, b.test) and a.val is None
    share = a.test.y.bincount() / (a.test.y.bincount() + a.train.y.bincount())
    assert share.min() > 0.19 and share.max() <= 0.2
    train = {tuple(x.tolist()) for x in images(a.train).flatten(1)}
    assert not train & {tuple(x.tolist()) for x in images(a.test).flatten(1)}


def test_digits_constants_are_those_of_the_training_images() -> None:
    pixels = images(digits(**COMMON).train).float() / 255
    assert digits(**COMMON).mean == (round(pixels.mean().item(), 4),)
    assert digits(**COMMON).std == (round(pixels.std().item(), 4),)


def test_groups_are_partitions() -> None:
    for groups, num_classes in ((DIGIT_GROUPS, 10), (SUPERCLASSES, 100)):
        for group in groups.values():
            assert sorted(label for classes in group for label in classes) == list(range(num_classes))
    assert all(len(classes) == 5 for classes in SUPERCLASSES["superclass"])


def test_arrays_are_read_once() -> None:
    assert digits(**COMMON).train.images is digits(val_fraction=0.5, seed=3, augment=[]).train.images


def test_an_unknown_augmentation_is_found_at_once() -> None:
    with pytest.raises(ConfigError, match="^dataset.augment: no augmentation named 'flop'; did you mean 'flip'"):
        digits(val_fraction=0.0, seed=0, augment=["flop"])


# --- validation rows


def test_validation_rows_are_cut_per_class_and_by_seed() -> None:
    data = digits(val_fraction=0.1, seed=0, augment=[])
    assert data.val is not None
    whole, held_out = digits(**COMMON).train.y.bincount(), data.val.y.bincount()
    assert held_out.tolist() == [round(0.1 * count) for count in whole.tolist()]
    assert torch.equal(torch.cat([data.train.rows, data.val.rows]).sort().values, torch.arange(1442))
    again, other = (digits(val_fraction=0.1, seed=seed, augment=[]).val for seed in (0, 1))
    assert same(data.val, again) and not same(data.val, other)


def test_small_fractions_leave_at_least_one_row() -> None:
    labels = torch.tensor([0] * 10 + [1] * 30)
    kept, held_out = cut_validation(labels, 0.01, 0)
    assert held_out is not None and labels[held_out].tolist() == [0, 1] and len(kept) == 38


@pytest.mark.parametrize("fraction", [0.99, 1.0])
def test_a_class_without_training_rows_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"^dataset.val_fraction: .* leaves class 1 no training rows \(it has 2\)"):
        cut_validation(torch.tensor([0] * 300 + [1] * 2), fraction if fraction < 1 else 0.9, 0)
    with pytest.raises(ConfigError, match="^dataset.val_fraction"):
        cut_validation(torch.tensor([0, 0]), fraction, 0)


def test_classes_may_have_fractions_of_their_own() -> None:
    labels, names = torch.tensor([0] * 10 + [1] * 10 + [2]), ("cat", "caf\u00e9", "7")
    kept, held_out = cut_validation(labels, {"cat": 0.5, "others": 0.2, "7": 0}, 0, class_names=names)
    assert held_out is not None and labels[held_out].bincount().tolist() == [5, 2] and len(kept) == 14
    _, one = cut_validation(labels, {"cafe\u0301": 0.3}, 0, class_names=names)  # others: none
    assert one is not None and labels[one].tolist() == [1, 1, 1]
    _, same = cut_validation(labels, {"others": 0.2, "cat": 0.2, "7": 0}, 0, class_names=names)
    with pytest.warns(DataWarning, match="no validation rows of 7, with one training row"):
        _, plain = cut_validation(labels, 0.2, 0, class_names=names)
    assert same is not None and plain is not None and torch.equal(same, plain)
    assert cut_validation(labels, {"cat": 0}, 0, class_names=names)[1] is None
    with pytest.raises(ConfigError, match="^dataset.val_fraction: there is no class 'cta'; did you mean 'cat'"):
        cut_validation(labels, {"cta": 0.5}, 0, class_names=names)
    large = torch.cat([labels, torch.ones(90).long()])  # 10, 100 and 1
    with pytest.raises(ConfigError, match="leaves class cat no training rows .*{cat: 0, others: 0.96}") as raised:
        cut_validation(large, 0.96, 0, class_names=names)
    assert "\n" not in str(raised.value)
    with pytest.warns(DataWarning, match="no validation rows of 7"):  # the advice, followed
        assert cut_validation(large, {"cat": 0, "others": 0.96}, 0, class_names=names)[1] is not None
    with pytest.raises(ConfigError, match="leaves class cat and 1 more classes no training rows .* fraction$"):
        cut_validation(labels, 0.96, 0, class_names=names)
    with pytest.raises(ConfigError, match="choose a smaller fraction$"):  # the command line cannot write this name
        cut_validation(labels[10:20], 0.96, 0, class_names=names)


# --- synthetic


def test_synthetic_shapes_and_labels() -> None:
    data = synthetic(**(SYNTHETIC | dict(image_shape=[3, 5, 9])))
    assert data.shape == (3, 5, 9) == images(data.train).shape[1:] and images(data.train).dtype == torch.uint8
    assert data.train.y.bincount().tolist() == [20] * 6 and data.test.y.bincount().tolist() == [10] * 6
    pixels = images(data.train).float() / 255
    assert torch.tensor(data.mean) == pytest.approx(pixels.mean(dim=(0, 2, 3)), abs=1e-5)
    assert len(data.std) == 3 and data.class_names[5] == "c5"


def test_synthetic_depends_on_its_seed_only() -> None:
    torch.manual_seed(1)
    a = synthetic(**SYNTHETIC)
    tv_cache_miss = synthetic(**(SYNTHETIC | dict(num_classes=4)))
    assert torch.equal(images(tv_cache_miss.train), images(a.train)[:80])  # a class has the same images among fewer
    assert not torch.equal(images(a.train), images(synthetic(**(SYNTHETIC | dict(seed=1))).train))


def nearest_mean_accuracy(**changes: Any) -> float:
    data = synthetic(**(SYNTHETIC | dict(train_rows=200, test_rows=200, num_classes=10) | changes))
    x, y = images(data.train).flatten(1).float(), data.train.y
    means = torch.stack([x[y == label].mean(dim=0) for label in range(10)])
    predicted = torch.cdist(images(data.test).flatten(1).float(), means).argmin(dim=1)
    return (predicted == data.test.y).float().mean().item()


def test_difficulty_is_monotone_and_independent_of_the_resolution() -> None:
    easy, middle, hard = (nearest_mean_accuracy(difficulty=d) for d in (0.3, 1.5, 4.0))
    assert easy == 1.0 > middle > hard > 0.1
    assert nearest_mean_accuracy(difficulty=1.5, image_shape=[1, 32, 32]) == pytest.approx(middle, abs=0.03)


def test_planted_similarity_decays_with_the_distance() -> None:
    means = prototypes(4000, (1, 4, 4), similarity=0.6, period=1, seed=0).flatten(1)
    for distance in (1, 2, 3):
        correlation = (means[distance:] * means[:-distance]).mean().item()
        assert correlation == pytest.approx(0.6**distance, abs=0.02)
    assert means.std().item() == pytest.approx(1, abs=0.02)
    apart = prototypes(4000, (1, 4, 4), similarity=0.6, period=2, seed=0).flatten(1)
    assert abs((apart[1:] * apart[:-1]).mean().item()) < 0.02
    assert (apart[2:] * apart[:-2]).mean().item() == pytest.approx(0.6, abs=0.02)


def test_total_similarity_makes_classes_equal() -> None:
    means = prototypes(6, (1, 4, 4), similarity=1.0, period=2, seed=0)
    assert torch.equal(means[0], means[4]) and not torch.equal(means[0], means[1])


@pytest.mark.parametrize("shape", [[8, 8], [1, 8, 8, 8], [1, 0, 8]])
def test_synthetic_shape_must_be_three_positive_integers(shape: list[int]) -> None:
    with pytest.raises(ConfigError, match="^dataset.image_shape: must be three positive integers"):
        synthetic(**(SYNTHETIC | dict(image_shape=shape)))


# --- torchvision, through its own readers


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, folder: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (20, 28, 28)), rng.integers(0, 256, (10, 28, 28))
    for name, array in (
        ("train-images-idx3-ubyte", train),
        ("train-labels-idx1-ubyte", np.arange(20) % 10),
        ("t10k-images-idx3-ubyte", test),
        ("t10k-labels-idx1-ubyte", np.arange(10)[::-1]),
    ):
        write_idx(root / folder / "raw" / name, array)
    return train, test


def write_cifar(root: Path, fine: bool) -> np.ndarray:
    rng = np.random.default_rng(1)
    names = ["train", "test"] if fine else [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    blocks = []
    for name in names:
        data = rng.integers(0, 256, (4, 3072)).astype(np.uint8)
        blocks.append(data)
        labels = {"fine_labels": [99, 0, 5, 7]} if fine else {"labels": [9, 0, 5, 7]}
        (folder / name).write_bytes(pickle.dumps({"data": data, **labels}))
    meta = (
        {"fine_label_names": [f"f{k}" for k in range(100)]} if fine else {"label_names": [f"n{k}" for k in range(10)]}
    )
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta))
    return np.concatenate(blocks)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small files be read in spite of their checksums."""
    for name in ("utils", "svhn", "stl10"):
        module = pytest.importorskip(f"torchvision.datasets.{name}")
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


IDX = [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST"), (kmnist, "KMNIST")]
# Small copies do not have the published size.
small = pytest.mark.filterwarnings("ignore::clrun.system.errors.DataWarning")


@small
@pytest.mark.parametrize(("loader", "folder"), IDX)
def test_idx_files_are_read(tmp_path: Path, loader: Any, folder: str) -> None:
    pytest.importorskip("torchvision")
    train, test = write_mnist(tmp_path, folder)
    data = loader(root=str(tmp_path), download=False, **COMMON)
    assert data.shape == (1, 28, 28) and data.num_classes == 10
    assert np.array_equal(images(data.train)[:, 0].numpy(), train)
    assert np.array_equal(images(data.test)[:, 0].numpy(), test)
    assert data.train.y.tolist() == [k % 10 for k in range(20)] and data.test.y.tolist() == list(range(9, -1, -1))
    first = {"MNIST": ("0", "1"), "FashionMNIST": ("T-shirt/top", "Trouser"), "KMNIST": ("o", "ki")}
    assert data.class_names[:2] == first[folder]
    again = loader(root=str(tmp_path), download=False, val_fraction=0.5, seed=1, augment=["flip"])
    assert again.train.images is data.train.images and again.augment == ("flip",)


def test_the_size_is_compared_with_the_published_one(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    write_mnist(tmp_path, "MNIST")
    with collecting_warnings(notes := []):
        mnist(root=str(tmp_path), download=False, **(COMMON | {"val_fraction": 0.5}))
    assert notes == [
        f"dataset=mnist: 20 training images in {tmp_path}, published with 60000",
        f"dataset=mnist: 10 test images in {tmp_path}, published with 10000",
    ]


@small
@pytest.mark.parametrize(("split", "first", "names"), [("letters", 1, "abc"), ("balanced", 0, "012")])
def test_emnist_stands_upright_and_counts_from_zero(tmp_path: Path, split: str, first: int, names: str) -> None:
    pytest.importorskip("torchvision")
    images_of = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    for part in ("train", "test"):
        stem = tmp_path / "EMNIST" / "raw" / f"emnist-{split}-{part}"
        write_idx(stem.with_name(f"{stem.name}-images-idx3-ubyte"), images_of)
        write_idx(stem.with_name(f"{stem.name}-labels-idx1-ubyte"), np.arange(5) + first)
    data = emnist(root=str(tmp_path), split=split, download=False, **COMMON)
    assert np.array_equal(images(data.train)[:, 0].numpy(), images_of.transpose(0, 2, 1))
    assert data.train.y.tolist() == [0, 1, 2, 3, 4] and data.class_names[:3] == tuple(names)
    assert data.num_classes == {"letters": 26, "balanced": 47}[split]


@small
def test_svhn_files_are_read(tmp_path: Path, unchecked: None) -> None:
    matlab = pytest.importorskip("scipy.io")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    for part in ("train", "test"):
        matlab.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [9], [10]])})
    data = svhn(root=str(tmp_path), download=False, **COMMON)
    assert np.array_equal(images(data.train).numpy(), pixels.transpose(3, 2, 0, 1))
    assert data.test.y.tolist() == [0, 1, 9, 0] and data.class_names == tuple("0123456789")
    file = tmp_path / "test_32x32.mat"
    file.write_bytes(file.read_bytes()[:1000])
    arrays._load.cache_clear()
    with pytest.raises(ConfigError, match="^dataset.root: SVHN cannot be read"):
        svhn(root=str(tmp_path), download=False, **COMMON)


@small
def test_stl10_files_are_read(tmp_path: Path, unchecked: None) -> None:
    home = tmp_path / "stl10_binary"
    home.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96)).astype(np.uint8)  # columns first
    for part in ("train", "test"):
        (home / f"{part}_X.bin").write_bytes(pixels.tobytes())
        (home / f"{part}_y.bin").write_bytes(np.array([1, 10, 3], dtype=np.uint8).tobytes())
    for name in ("unlabeled_X.bin", "fold_indices.txt"):
        (home / name).touch()
    (home / "class_names.txt").write_text("airplane\nbird\n" + "\n".join(f"c{k}" for k in range(8)))
    data = stl10(root=str(tmp_path), download=False, **COMMON)
    assert np.array_equal(images(data.train).numpy(), pixels.transpose(0, 1, 3, 2))
    assert data.train.y.tolist() == [0, 9, 2] and data.class_names[:2] == ("airplane", "bird")


class Malice:
    """An object that writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_cifar_pickles_run_no_code(tmp_path: Path, unchecked: None) -> None:
    write_cifar(tmp_path, False)
    for file in ("test_batch", "batches.meta"):
        (tmp_path / "cifar-10-batches-py" / file).write_bytes(pickle.dumps({"data": Malice(tmp_path / "run")}))
        with pytest.raises(
            ConfigError, match=r"^dataset.root: CIFAR10 .*which is not part of an array; nothing was run"
        ):
            cifar10(root=str(tmp_path), download=False, **COMMON)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickled_arrays_are_read_whatever_wrote_them(tmp_path: Path, protocol: int) -> None:
    content = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2], "name": "x"}
    data = pickle.dumps(content, protocol=protocol)
    for old in (data, data.replace(b"numpy._core", b"numpy.core")):
        if protocol == 0 or old is data:  # the length of names is part of later protocols
            (tmp_path / "batch").write_bytes(old)
            found = read_arrays(tmp_path / "batch")
            assert np.array_equal(found.pop("data"), content["data"]) and found == {"labels": [1, 2], "name": "x"}


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    write_cifar(tmp_path, True)
    with pytest.raises(ConfigError, match=r"^dataset.root: CIFAR100 .*\(train is missing or has another checksum\)"):
        cifar100(root=str(tmp_path), download=False, **COMMON)


@small
@pytest.mark.parametrize("fine", [False, True])
def test_cifar_files_are_read(tmp_path: Path, unchecked: None, fine: bool) -> None:
    blocks = write_cifar(tmp_path, fine)
    data = (cifar100 if fine else cifar10)(root=str(tmp_path), download=False, **COMMON)
    stored = torch.cat([images(data.train), images(data.test)])
    assert np.array_equal(stored.numpy(), blocks.reshape(-1, 3, 32, 32))  # the files hold channels first
    assert stored.is_contiguous() and data.num_classes == (100 if fine else 10)
    assert data.test.y.tolist() == ([99, 0, 5, 7] if fine else [9, 0, 5, 7])
    assert data.class_names[7] == ("f7" if fine else "n7")


@pytest.mark.parametrize(
    ("loader", "layout"),
    [
        (mnist, "MNIST/raw/"),
        (fashion_mnist, "FashionMNIST/raw/"),
        (cifar10, "cifar-10-batches-py/"),
        (cifar100, "cifar-100-python/"),
        (kmnist, "KMNIST/raw/"),
        (partial(emnist, split="letters"), "EMNIST/raw/ with emnist-letters-train-images-idx3-ubyte"),
        (svhn, "train_32x32.mat"),
        (stl10, "stl10_binary/"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, loader: Any, layout: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ConfigError) as error:
        loader(root=str(tmp_path), download=False, **COMMON)
    text = str(error.value)
    assert text.startswith("dataset.root: ") and layout in text and "dataset.download=true" in text and "\n" not in text
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    write_mnist(tmp_path, "MNIST")
    images_file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images_file.write_bytes(images_file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="^dataset.root: MNIST cannot be read"):
        mnist(root=str(tmp_path), download=False, **COMMON)


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torchvision.datasets.mnist")

    def offline(url: str, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(module, "download_and_extract_archive", offline)
    with pytest.raises(ConfigError, match="^dataset.root: MNIST cannot be read .*downloading failed"):
        mnist(root=str(tmp_path), download=True, **COMMON)
