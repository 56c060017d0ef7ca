"""Measure the shipped models on `digits` and `glyphs`: prints a table and writes it into the model cards.

    python scripts/measure_glyphs.py

Through the project's own splits and transforms, features frozen. Columns, in percent of the test images:
nearest mean: class of the nearest class mean of the training features, by cosine and by Euclidean distance;
5-shot: nearest mean by cosine from 5 training images a class, mean and standard deviation of 20 draws;
linear probe: logistic regression on standardised training features (scikit-learn, C = 1);
zero-shot: glyph_clip only, cosine to the mean embedding of the captions of each digit; no training image is used.
Rows: the trained model, the same network with random weights, and the raw pixels of the stored images.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from clrun.backbones.glyph import FOLDER, MEAN, SIZE, STD, glyph_vit
from clrun.data.sources.digits import digits
from clrun.data.sources.glyphs import glyphs
from clrun.data.stream import Dataset
from clrun.data.transforms import fit_transform
from clrun.system import libraries
from clrun.system.seeding import generator, seed_all

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("{}", "a {}", "image of {}", "a photo of {}", "a drawing of a {}", "written {}", "a handwritten {}")
HEADER = ("features", "data", "nearest mean, cosine", "Euclidean", "5-shot, cosine", "linear probe", "zero-shot")
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"
DRAWS = 20


class ImageTower(nn.Module):
    """The image side of glyph_clip as a backbone: embeddings [B, 64] of prepared images."""

    input_size, mean, std = (3, SIZE, SIZE), MEAN * 3, STD * 3

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings."""
        return self.model.encode_image(x)


def glyph_clip(pretrained: bool) -> tuple[Any, Any]:
    """Return glyph_clip as open_clip opens it, with trained or random weights, and its tokenizer."""
    open_clip = libraries.load("open_clip")
    name = f"local-dir:{FOLDER / 'glyph_clip'}"
    model = open_clip.create_model(name, load_weights=pretrained)
    return model.eval(), open_clip.get_tokenizer(name, bpe_path=str(FOLDER / "glyph_clip" / "merges.txt.gz"))


def features(dataset: Dataset, backbone: nn.Module | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training features and labels, test features and labels; without a backbone the pixels are the features."""
    found = []
    for split in (dataset.train, dataset.test):
        for batch in split.batches(len(split), view="raw"):
            if backbone is None:
                found += [batch.x.float().flatten(1) / 255, batch.y]
                continue
            transform, _ = fit_transform(dataset, backbone)
            with torch.no_grad():
                parts = [backbone.eval()(transform.eval(x)) for x in batch.x.split(256)]
            found += [torch.cat(parts), batch.y]
    return found[0], found[1], found[2], found[3]


def means(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """Return class means [C, D]."""
    return torch.stack([x[y == label].mean(dim=0) for label in range(classes)])


def by_cosine(x: Tensor, centres: Tensor) -> Tensor:
    """Return the nearest centre of each row."""
    return (F.normalize(x, dim=1) @ F.normalize(centres, dim=1).T).argmax(dim=1)


def percent(guess: Tensor, y: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * (guess == y).double().mean().item()


def few_shot(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, classes: int) -> tuple[float, float]:
    """Return mean and standard deviation of the accuracy from 5 images a class."""
    scores = []
    for draw in range(DRAWS):
        mixed = torch.randperm(len(y), generator=generator(0, "5-shot", draw))
        rows = torch.cat([mixed[y[mixed] == label][:5] for label in range(classes)])
        scores.append(percent(by_cosine(test_x, means(x[rows], y[rows], classes)), test_y))
    values = torch.tensor(scores)
    return values.mean().item(), values.std().item()


def probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Return the accuracy of a linear probe."""
    scaler = StandardScaler().fit(x.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raw pixels do not always converge in 300 iterations
        model = LogisticRegression(max_iter=300).fit(scaler.transform(x.numpy()), y.numpy())
    return 100 * float(model.score(scaler.transform(test_x.numpy()), test_y.numpy()))


def measure(
    name: str, dataset: Dataset, backbone: nn.Module | None, zero_shot: float | None, linear: bool
) -> list[str]:
    """Return one row of the table."""
    x, y, test_x, test_y = features(dataset, backbone)
    classes = dataset.num_classes
    centres = means(x, y, classes)
    shot, spread = few_shot(x, y, test_x, test_y, classes)
    return [
        name,
        dataset.name,
        f"{percent(by_cosine(test_x, centres), test_y):.1f}",
        f"{percent(torch.cdist(test_x, centres).argmin(dim=1), test_y):.1f}",
        f"{shot:.1f} ± {spread:.1f}",
        f"{probe(x, y, test_x, test_y):.1f}" if linear else "",
        "" if zero_shot is None else f"{zero_shot:.1f}",
    ]


def zero_shot(model: nn.Module, tokenizer: Callable[[list[str]], Tensor], dataset: Dataset) -> float:
    """Return the accuracy on digits of captions alone, over all 1797 images: none is used for training."""
    x, y, test_x, test_y = features(dataset, ImageTower(model))
    with torch.no_grad():
        texts = [
            F.normalize(model.encode_text(tokenizer([c.format(f"digit {d}") for c in CAPTIONS])), dim=1) for d in DIGITS
        ]
    centres = torch.stack([text.mean(dim=0) for text in texts])
    return percent(by_cosine(torch.cat([x, test_x]), centres), torch.cat([y, test_y]))


def table(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table."""
    lines = [HEADER, tuple("---" for _ in HEADER), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write(card: str, text: str) -> None:
    """Put a table between the marks of a model card."""
    path = FOLDER / card
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")


def twins(name: str) -> list[tuple[str, nn.Module, float | None]]:
    """Return the trained model and its random-initialised twin as backbones, with their zero-shot accuracy."""
    pair = []
    for pretrained in (True, False):
        seed_all(0, "twin")
        label = name if pretrained else f"{name}, random weights"
        if name == "glyph_vit":
            pair.append((label, glyph_vit((1, SIZE, SIZE), pretrained=pretrained), None))
            continue
        model, tokenizer = glyph_clip(pretrained)
        score = zero_shot(model, tokenizer, digits(val_fraction=0.0, seed=0, augment=[]))
        pair.append((label, ImageTower(model), score))
    return pair


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the shipped models.")
    parser.add_argument("--quick", action="store_true", help="without linear probes, and cards left as they are")
    parser.add_argument("--models", nargs="+", default=["glyph_vit", "glyph_clip"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    data = [load(val_fraction=0.0, seed=0, augment=[]) for load in (digits, glyphs)]
    pixels = [measure("raw pixels", dataset, None, None, not options.quick) for dataset in data]
    for name in options.models:
        rows = [
            measure(label, dataset, backbone, score if dataset.name == "digits" else None, not options.quick)
            for label, backbone, score in twins(name)
            for dataset in data
        ]
        text = table(rows + pixels)
        print(text)
        if not options.quick:
            write({"glyph_vit": "glyph_vit.md", "glyph_clip": "glyph_clip/README.md"}[name], text)
    print(f"{(time.process_time() - begun) / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
