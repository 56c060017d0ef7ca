"""Omniglot: drawings of the characters of 50 alphabets, also in four rotations."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, grouped, labelled, load, torchvision
from clrun.data.reading.listing import class_folders, list_classes
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.reading.sequence import with_quarter_turns
from clrun.data.split import Split
from clrun.data.stream import Dataset
from clrun.system.errors import Range

DRAWINGS = 20  # of each character of Omniglot
CHARACTERS = 1200  # in the stream of rotations: 100 tasks of 12


@loader
def omniglot(reading: DownloadReading, *, test_drawings: Annotated[int, Range(minimum=1, maximum=19)]) -> Dataset:
    """Return Omniglot (Lake et al. 2015): 1623 characters of 50 alphabets, black on white, 20 drawings each, in memory.

    The background and the evaluation set together. Their classes differ, so that this published split cannot be used:
    training and test images are separated by the person who drew them. Group: "alphabet".

    Args:
        reading: the common options.
        test_drawings: drawings of each character that are test images, the last ones.

    Raises:
        ConfigError: files are missing.
    """
    benchmark = Benchmark(
        "omniglot",
        "omniglot-py/images_background and omniglot-py/images_evaluation, unpacked",
        Published(1623 * (DRAWINGS - test_drawings), 1623 * test_drawings, 1623),
        lambda home: _omniglot(home, DRAWINGS - test_drawings),
        torchvision("Omniglot", {"background": True}, {"background": False}),
        channels=1,
        mean=(0.9221,),
        std=(0.2681,),
        memory=True,
    )
    return load(benchmark, reading)


def _omniglot(home: Path, last: int) -> Content:
    """Return the drawings of every character; those with a number above `last` are test images."""
    place = home / "omniglot-py"
    found = sorted(
        (alphabet, character, part)
        for part in ("images_background", "images_evaluation")
        for alphabet in class_folders(place / part)
        for character in class_folders(place / part / alphabet)
    )
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, (alphabet, character, part) in enumerate(found):
        for name in list_classes(place / part / alphabet, [character], root=place).names:
            drawing = int(Path(name).stem.rpartition("_")[2])  # 0001_07.png is the 7th drawing
            (test if drawing > last else train).append((name, label))
    names = [f"{alphabet} {character.removeprefix('character')}" for alphabet, character, _ in found]
    groups = {"alphabet": grouped([alphabet for alphabet, _, _ in found])}
    return Content(labelled(place, train), labelled(place, test), names, groups)


@loader
def omniglot_rotation(
    reading: DownloadReading, *, test_drawings: Annotated[int, Range(minimum=1, maximum=19)]
) -> Dataset:
    """Return the first 1200 characters of Omniglot, each drawing in four rotations (APD, Yoon et al. 2020; WSN).

    Deviations: characters are numbered by alphabet, where the public code uses the order of the file system; and
    drawings are divided into training and test images before they are turned, where WSN tests on turned copies of
    training images.

    Args:
        reading: the common options.
        test_drawings: drawings of each character that are test images, the last of the 20.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """
    whole = omniglot(test_drawings=test_drawings, **vars(reading))

    def first(split: Split) -> Split:
        return split.select((split.y < CHARACTERS).nonzero()[:, 0])

    kept = replace(
        whole,
        name="omniglot_rotation",
        train=first(whole.train),
        test=first(whole.test),
        val=whole.val and first(whole.val),
        num_classes=CHARACTERS,
        class_names=whole.class_names[:CHARACTERS],
        groups={},
        captions=whole.captions and whole.captions.first(CHARACTERS),
    )
    return with_quarter_turns(kept)
