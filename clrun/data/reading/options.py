"""The options that loaders of data sets have in common: declared, documented and checked once.

A loader takes them as one object, `reading`, followed by the options that it alone has. `loader` turns it into a
function of plain options, so that configurations stay flat: `dataset.val_fraction=0.1`. The defaults are in
`conf/dataset/_options/`.
"""

import codecs
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_type_hints

from clrun.data.augment import parse_augmentations
from clrun.data.captions import check_templates
from clrun.data.decode import Decoding
from clrun.data.reading.class_names import Sort
from clrun.data.schema import Schema
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, Fraction, PositiveInt

ESCAPES = ("idna", "punycode", "raw-unicode-escape", "unicode-escape")  # no encodings of files


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The options of every data set.

    Attributes:
        val_fraction: fraction of the training rows of each class that is set aside for validation; 0 for none. In data
            sets of several domains: of each class of each domain. Or fractions by the names of classes, such as {cat:
            0.5, dog: 0, others: 0.1}, where "others" stands for every class that is not named, with 0 by default.
        seed: seed of the validation rows, of permutations and rotations, and of generated images.
        augment: training augmentations, as `clrun.data.augment` describes them.
        templates: sentences with one "{}" for the name of a class, for backbones with a text tower; None for the
            published ones of the data set (`clrun.data.captions`).
        class_names: file with the words by which a text tower knows the classes, one line per class with its name in
            the data set and its words ("n01440764 tench"); None for the names in the data set, cleaned.

    Raises:
        ConfigError: an augmentation is unknown or has unknown options, or a template has no place for a name.
    """

    val_fraction: Fraction | dict[str, Fraction]
    seed: int
    augment: list[Any]
    templates: list[str] | None = None
    class_names: str | None = None

    def __post_init__(self) -> None:
        """Refuse wrong augmentations and templates before any file is read."""
        parse_augmentations(self.augment)
        check_templates(self.templates)


@dataclass(frozen=True, kw_only=True)
class StoredReading(Reading):
    """The options of a published data set, which lies in a folder.

    Attributes:
        root: folder that holds all published data sets; "~" stands for the user's home.
    """

    root: str

    @property
    def home(self) -> Path:
        """`root` as a path."""
        return user_path(self.root, "dataset.root")


@dataclass(frozen=True, kw_only=True)
class ArrayReading(StoredReading):
    """The options of a published data set that is stored as arrays.

    Attributes:
        download: fetch missing files into `root`.
    """

    download: bool


@dataclass(frozen=True, kw_only=True)
class ImageReading(StoredReading):
    """The options of a published data set of image files that are put into `root` by hand.

    Attributes:
        images: how image files are decoded.
    """

    images: Decoding


@dataclass(frozen=True, kw_only=True)
class DownloadReading(ImageReading):
    """The options of a published data set of image files that can be downloaded.

    Attributes:
        download: fetch missing files into `root`.
    """

    download: bool


@dataclass(frozen=True, kw_only=True)
class TextReading(Reading):
    """The options of every data set of texts.

    Attributes:
        schema: how the task is put into words; None for texts and names of classes as they are.

    Raises:
        ConfigError: `augment` names an augmentation of images, or both `class_names` and the schema name the classes.
    """

    schema: Schema | None = None

    def __post_init__(self) -> None:
        """Refuse what does not suit texts before any file is read."""
        super().__post_init__()
        parse_augmentations(self.augment, "text")
        if self.schema is not None and self.schema.verbaliser is not None and self.class_names is not None:
            raise ConfigError(
                "dataset.class_names: conflicts with dataset.schema.verbaliser (both put the classes into words); set "
                "one of them to null"
            )


@dataclass(frozen=True, kw_only=True)
class PackageReading(TextReading):
    """The options of a published data set of texts that is read from an installed Python package.

    Attributes:
        root: the published file, or a folder that holds it; None for the one in the package.
    """

    root: str | None


@dataclass(frozen=True, kw_only=True)
class OwnReading(Reading):
    """The options of the user's own images.

    Attributes:
        test_fraction: fraction of test images where the data have no test part. A hash of each image's name decides,
            so that images added later do not move others between the parts.
        channels: 3 for colour, 1 for grey.
        images: how images are decoded.
        mean: mean of each channel, in [0, 1] units; [] leaves pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        empty_classes: "error" refuses classes without training images, "drop" leaves them out.

    Raises:
        ConfigError: a mean or a standard deviation is none of values in [0, 1], or `mean` and `std` differ in length.
    """

    test_fraction: Fraction
    channels: Literal[1, 3]
    images: Decoding
    mean: list[float]
    std: list[float]
    empty_classes: Literal["error", "drop"]

    def __post_init__(self) -> None:
        """Refuse constants that cannot normalise images."""
        super().__post_init__()
        if problem := constants_problem(self.mean, self.std):
            raise ConfigError(f"dataset.{problem}; [] leaves pixels in [0, 1]")
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, 1, 3):
            raise ConfigError(
                f"dataset.mean: mean and std need one value per channel (1 or 3), or none; got {self.mean} and "
                f"{self.std}"
            )


@dataclass(frozen=True, kw_only=True)
class OwnTextReading(TextReading):
    """The options of the user's own texts.

    Attributes:
        test_fraction: fraction of test texts where the data have no test part. A hash of each text in lower case and
            without punctuation decides, so that a text is never in both parts.
        max_bytes: a text is cut to so many bytes in UTF-8; no character is cut in two.
        empty: "error" refuses texts without a visible character, "skip" leaves them out.
        empty_classes: "error" refuses classes without training texts, "drop" leaves them out.
        encoding: encoding of the files, which is never guessed.
        sort: order of the names of classes: "text" by code point, "natural" with numbers in names as numbers.

    Raises:
        ConfigError: there is no such encoding.
    """

    test_fraction: Fraction
    max_bytes: PositiveInt
    empty: Literal["error", "skip"]
    empty_classes: Literal["error", "drop"]
    encoding: str
    sort: Sort

    def __post_init__(self) -> None:
        """Refuse an unknown encoding before any file is read."""
        super().__post_init__()
        try:
            if codecs.lookup(self.encoding).name in ESCAPES:
                raise LookupError
            "".encode(self.encoding)
        except (LookupError, ValueError) as error:
            raise ConfigError(
                f"dataset.encoding: there is no encoding {self.encoding!r}; use one of Python, such as utf-8 or latin-1"
            ) from error


@dataclass(frozen=True, kw_only=True)
class FolderReading(OwnReading):
    """The options of the user's own folders of images.

    Attributes:
        name: name of the data set. It is part of the identity of a run; `root` is not.
        root: folder with the images.
        splits: names of the folders of the parts, such as {train: a, test: b, val: c}; null finds them by their names,
            {} reads every folder as a class.
        classes: "top" makes one class of each folder in a part, with the folders in it; "path" makes one class of each
            folder that holds images, named by its path.
        sort: order of the folders of classes, domains and data sets, and with it of ids: "text" by code point (1, 10,
            2), as torchvision's ImageFolder; "natural" with numbers in names as numbers (1, 2, 10).
    """

    name: str
    root: str
    splits: dict[str, str | None] | None
    classes: Literal["top", "path"]
    sort: Sort

    @property
    def home(self) -> Path:
        """`root` as a path."""
        return user_path(self.root, "dataset.root")


def constants_problem(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """Return the problem of normalisation constants of images, which are in [0, 1] units; None without one."""
    if not all(math.isfinite(value) and value > 0 for value in std):
        return f"std: every value must be above 0, got {list(std)}"
    for name, values in (("mean", mean), ("std", std)):
        if not all(0 <= value <= 1 for value in values):
            return (
                f"{name}: every value must be from 0 to 1, got {list(values)}; constants of pixels from 0 to 255 are "
                "divided by 255"
            )
    return None


def user_path(text: str, key: str) -> Path:
    """Return a path that the user has named; "~" stands for the user's home.

    Args:
        text: the path.
        key: the option that names it, for messages.

    Raises:
        ConfigError: the path is empty, or the home of no user.
    """
    if not text.strip():
        raise ConfigError(f"{key}: is empty; set it to a path (. is the present folder)")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: {text} names the home of an unknown user; write the whole path") from error


Kind = TypeVar("Kind", bound=Reading)
Options = ParamSpec("Options")


def loader(load: Callable[Concatenate[Kind, Options], Dataset]) -> Callable[..., Dataset]:
    """Return a loader as a function of keyword arguments alone: the fields of its reading, then its own options.

    The signature and the annotations of the returned function list all of them, so that configurations are checked
    against it like against any other target. In a direct call, fields with a default may be left out.

    Args:
        load: a function whose first parameter, `reading`, is annotated with `Reading` or a subclass; its other
            parameters are keyword-only.
    """
    hints = get_type_hints(load, include_extras=True)
    kind = hints.pop("reading")
    common = get_type_hints(kind, include_extras=True)
    names = [field.name for field in fields(kind)]
    omissible = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    own = [name for name in inspect.signature(load).parameters if name != "reading"]

    @wraps(load)
    def flat(**options: Any) -> Dataset:
        options = omissible | options
        signature.bind(**options)  # a TypeError names the function's options that are missing or unknown
        reading = kind(**{name: options.pop(name) for name in names})
        return load(reading, **options)  # type: ignore[call-arg]

    annotations = {name: common[name] for name in names} | {name: hints[name] for name in own}
    signature = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotations[name]) for name in annotations],
        return_annotation=Dataset,
    )
    flat.__annotations__ = annotations | {"return": Dataset}
    flat.__signature__ = signature  # type: ignore[attr-defined]
    return flat
