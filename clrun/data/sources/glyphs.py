"""The embedded data set of rendered characters; `scripts/make_glyphs.py` says how it was made."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

from clrun.data.reading.assemble import Groups, Rows, assemble
from clrun.data.reading.options import Reading, loader
from clrun.data.stream import Dataset

FILE = Path(__file__).parents[1] / "assets" / "glyphs.npz"


@loader
def glyphs(reading: Reading) -> Dataset:
    """Return rendered Greek, Cyrillic and kana characters: 72 classes, 5760 + 1800 grey 28x28 images, white on black.

    Training and test images come from different font families. No class looks like another one, a Latin letter or a
    digit, and the pre-trained models that ship with the package have seen none of them. Classes are named by Unicode
    ("greek capital delta"). Groups: "script" (Greek, Cyrillic, hiragana, katakana).
    """
    train, test, names = _glyphs()
    return assemble(
        "glyphs",
        train,
        test,
        class_names=names,
        mean=(0.1409,),
        std=(0.3075,),
        groups=_scripts(names),
        reading=reading,
    )


@cache
def _glyphs() -> tuple[Rows, Rows, tuple[str, ...]]:
    """Return training rows, test rows and class names, read once per process."""
    with np.load(FILE) as stored:
        names = tuple(json.loads(stored["facts"].tobytes())["classes"])
        parts = [torch.from_numpy(stored[part]).unsqueeze(1) for part in ("train", "test")]
    labels = [torch.arange(len(names)).repeat_interleave(len(part) // len(names)) for part in parts]
    return (parts[0], labels[0]), (parts[1], labels[1]), names


def _scripts(names: tuple[str, ...]) -> Groups:
    """Return the classes of each script, the first word of the class names."""
    scripts = [name.split()[0] for name in names]
    found = dict.fromkeys(scripts)
    return {"script": tuple(tuple(k for k, own in enumerate(scripts) if own == script) for script in found)}
