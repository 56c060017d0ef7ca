"""How fast does clrun deliver augmented training batches, beside torchvision's data sets and a DataLoader?

    python scripts/bench_data.py [--rounds 5] [--threads N] [--keep FOLDER]

Images per second of one epoch in shuffled batches of normalised float32, measured in turns within one run, the best of
all rounds for each side; both may use 0, 1 or 2 workers, and the best of these counts. The data are made by the script:
pictures with the power spectrum of photographs, written as CIFAR-100's files and as a folder of JPEGs of 500x375.

32x32: CIFAR100 with RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize; the same of clrun.
224: ImageFolder with RandomResizedCrop(224), RandomHorizontalFlip, ToTensor, Normalize; the same of clrun, which cuts
from squares of 256 pixels, decoded from the files in every epoch, and once more read from its cache on disk.
"""

import argparse
import pickle
import platform
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import clrun  # noqa: F401 isort: skip (sets how threads wait, before torch is imported)
import numpy as np
import torch
import torchvision
from benchlib import Figure, finish
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T

from clrun.data.decode import Decoding
from clrun.data.images import ImageSplit
from clrun.data.sources.cifar import cifar100
from clrun.data.sources.folder import folder
from clrun.data.transforms import fit_transform
from clrun.system.errors import DataWarning

WORKERS = (0, 1, 2)
SMALL, LARGE = 10_000, 640  # images
QUICK = "--rounds 1 --only small"
BATCH = {"small": 128, "large": 64}
CIFAR = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DECODING = {"size": 256, "fit": "crop", "interpolation": "bilinear", "exif": False, "unreadable": "error"}


def pictures(count, height, width, rng):
    """Return [count, H, W, 3] uint8 noise whose power falls with the frequency as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = np.maximum(frequency, 1 / max(height, width)) ** -1.2
    found = np.empty((count, height, width, 3), dtype=np.uint8)
    for picture in found:
        noise = rng.normal(size=(2, 4, *amplitude.shape))
        spectra = (noise[0] + 1j * noise[1]) * amplitude
        waves = np.fft.irfft2(spectra[:1] + 0.4 * spectra[1:], s=(height, width))  # colours resemble each other
        waves = (waves - waves.mean()) / waves.std()
        picture[:] = np.clip(118 + 58 * waves, 0, 255).transpose(1, 2, 0)
    return found


def write_cifar(root, rng):
    """Write CIFAR-100's files with `SMALL` training images."""
    home = root / "cifar-100-python"
    home.mkdir()
    for name, count in (("train", SMALL), ("test", 100)):
        data = pictures(count, 32, 32, rng).transpose(0, 3, 1, 2).reshape(count, -1)
        labels = [k % 100 for k in range(count)]
        (home / name).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {k}" for k in range(100)]}))


def write_folder(root, rng):
    """Write train/ and test/ with ten folders of JPEGs, a quarter of them upright."""
    for part, count in (("train", LARGE), ("test", 10)):
        for k in range(count):
            home = root / "photos" / part / f"class{k % 10}"
            home.mkdir(parents=True, exist_ok=True)
            size = (500, 375) if k % 4 == 0 else (375, 500)
            Image.fromarray(pictures(1, *size, rng)[0]).save(home / f"{k:04d}.jpg", quality=90)


def loaders(dataset, batch):
    """Yield a function that runs an epoch for each number of workers of a torch DataLoader, workers kept alive."""
    for workers in WORKERS:
        loader = DataLoader(dataset, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        yield f"{workers} workers", lambda loader=loader: sum(len(x) for x, _ in loader)


def streams(dataset, batch, size):
    """Yield a function that runs an epoch for each number of workers of clrun."""
    network = SimpleNamespace(input_size=(3, size, size), mean=None, std=None)
    transform, _ = fit_transform(dataset, network)
    generator = torch.Generator().manual_seed(0)
    for workers in WORKERS if isinstance(dataset.train, ImageSplit) else (0,):
        split = type(dataset.train)(dataset.train.images, dataset.train.labels, transform=transform)
        split = split.to("cpu", workers=workers)
        yield (
            f"{workers} workers",
            lambda split=split: sum(len(b) for b in split.batches(batch, view="train", shuffle=generator)),
        )


def measure(sides, rounds):
    """Return the best images per second of each side and its number of workers; sides take turns.

    Args:
        sides: {name: iterable of (label, epoch)}.
        rounds: epochs of each, after one that is not counted.
    """
    runs = [(side, label, epoch) for side, epochs in sides.items() for label, epoch in epochs]
    best = {side: (0.0, "") for side in sides}
    for turn in range(rounds + 1):
        for side, label, epoch in runs:
            start = time.perf_counter()
            images = epoch()
            rate = images / (time.perf_counter() - start)
            if turn:
                best[side] = max(best[side], (rate, label))
    return best


def show(best, demanded, what):
    """Print the sides, and yield the ratio of each to torchvision."""
    theirs, label = best.pop("torchvision")
    print(f"  {'torchvision':<24}{theirs:9.0f} images/s  ({label})")
    for side, (rate, workers) in best.items():
        figure = Figure(f"images per second, {what}, {side}", rate / theirs, demanded[side], unit="x")
        print(f"  {side:<24}{rate:9.0f} images/s  ({workers})  {figure}")
        yield figure


def small(root, rounds):
    """Measure 32x32 images in memory; return figures."""
    for module in (torchvision.datasets.cifar, torchvision.datasets.utils):
        module.check_integrity = lambda path, md5=None: Path(path).is_file()  # the files are our own
    usual = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*CIFAR)])
    theirs = torchvision.datasets.CIFAR100(root, transform=usual)
    ours = cifar100(root=str(root), download=False, val_fraction=0.0, seed=0, augment=["crop", "flip"])
    batch = BATCH["small"]
    print(f"32x32 in memory, {SMALL} images, batch {batch}: RandomCrop(32, padding=4), flip, normalise")
    sides = {"torchvision": loaders(theirs, batch), "clrun": streams(ours, batch, 32)}
    return list(show(measure(sides, rounds), {"clrun": 4}, "32x32 in memory"))


def large(root, rounds):
    """Measure 224x224 images from files; return figures."""
    home = root / "photos"
    usual = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*IMAGENET)])
    theirs = torchvision.datasets.ImageFolder(str(home / "train"), transform=usual)
    batch = BATCH["large"]

    def ours(cache):
        decoding = Decoding(**DECODING, max_pixels=10**8, memory=0, cache=cache)
        options = {
            "archive": None,
            "sha256": None,
            "archive_limit_gb": 1,
            "test_fraction": 0.2,
            "channels": 3,
            "images": decoding,
        }
        options |= {"mean": list(IMAGENET[0]), "std": list(IMAGENET[1])}
        augment = ["random_resized_crop", "flip"]
        return folder(name="photos", root=str(home), **options, val_fraction=0.0, seed=0, augment=augment)

    print(f"224x224 from {LARGE} JPEGs of 500x375, batch {batch}: RandomResizedCrop(224), flip, normalise")
    sides = {
        "torchvision": loaders(theirs, batch),
        "clrun": streams(ours(False), batch, 224),
        "clrun, cached on disk": streams(ours(str(root / "cache")), batch, 224),
    }
    return list(show(measure(sides, rounds), {"clrun": 1, "clrun, cached on disk": 3}, "224x224 from files"))


def main(words=None):
    """Measure, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each side")
    parser.add_argument("--threads", type=int, help="threads of torch; default: one a core")
    parser.add_argument("--only", choices=("small", "large"))
    parser.add_argument("--keep", type=Path, help="folder for the data, used again when it is there")
    args = parser.parse_args(words)
    warnings.simplefilter("ignore", DataWarning)  # the data have not the published size
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"torchvision {torchvision.__version__}; the best of {args.rounds} epochs and of {WORKERS} workers")
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or Path(temporary)
        if not (root / "photos").exists():
            root.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(0)
            write_cifar(root, rng)
            write_folder(root, rng)
        for kind, work in (("small", small), ("large", large)):
            if args.only in (None, kind):
                figures += work(root, args.rounds)
    return figures


if __name__ == "__main__":
    finish(main())
