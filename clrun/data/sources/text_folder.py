"""The user's own texts in folders: one folder per class, one text file per text."""

from pathlib import Path

from clrun.data.reading.class_names import in_order
from clrun.data.reading.image_files import say_left_out, with_note
from clrun.data.reading.layout import tree
from clrun.data.reading.listing import TEXTS, list_classes
from clrun.data.reading.options import OwnTextReading, loader, user_path
from clrun.data.reading.text_files import read_text
from clrun.data.reading.text_rows import Intake, from_texts
from clrun.data.stream import Dataset


@loader
def text_folder(reading: OwnTextReading, *, name: str, root: str, splits: dict[str, str | None] | None) -> Dataset:
    """Return the texts of a folder: train/ and test/ with one folder per class each, or only one folder per class.

    Each file with the suffix .txt is one text; blanks and line ends around it are dropped. The parts are found by their
    names as those of folders of images (`clrun.data.reading.layout`). Without parts, the hash of each text in lower
    case and without punctuation decides whether it is a test text, so that no text is in both parts.

    Args:
        reading: the common options.
        name: name of the data set, part of the identity of a run.
        root: the folder.
        splits: names of the folders of the parts, as {train: a, test: b, val: c}; None to find them, {} for no parts.

    Raises:
        ConfigError: no texts, a class that is only in test/, two classes that differ only in case or blanks, or a file
            that is empty or in another encoding; names the file or folder.
    """
    home = user_path(root, "dataset.root")
    found = tree(home, splits, "top", files=TEXTS)
    classes = in_order(found.classes, reading.sort)
    places = {part: getattr(found, part) for part in ("train", "test", "val") if getattr(found, part) is not None}
    listings = {part: list_classes(place, classes, root=found.home, files=TEXTS) for part, place in places.items()}
    say_left_out(name, list(listings.values()), "texts")
    names = [path for listing in listings.values() for path in listing.names]
    taken = Intake(reading, str(found.home), lambda row: str(found.home / names[row]))
    parted = len(listings) > 1
    for part, listing in listings.items():
        for path, label in zip(listing.names, listing.labels, strict=True):
            text = read_text(found.home / path, reading.encoding).strip()
            taken.add(len(taken.rows) + len(taken.empty), text, classes[label], split=part if parted else "")
    chosen = {part: part for part in listings} if parted else None
    return with_note(from_texts(Path(name).name or "text_folder", taken, splits=chosen), found.said)
