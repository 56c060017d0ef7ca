"""The kinds of data: images, texts and feature rows; nothing else in clrun asks which of them a data set holds.

Each class implements `clrun.data.stream.Modality`.

Shapes: `N` rows of a split, `C` channels, `H`, `W` height and width, `D` width of feature rows, `L` tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.data.augment import parse_augmentations
from clrun.data.reading.options import constants_problem
from clrun.data.schema import Stated
from clrun.data.shifts import Rotation, pixel_permutation, random_angle
from clrun.data.split import Batch, Plain, Split, TensorSplit, Transform
from clrun.data.stream import Dataset, Fitted, Modality, Samples, Shift, ShiftKind, ShownText
from clrun.data.texts import TextTransform, to_texts, tokenised
from clrun.data.tokens import Tokenizer
from clrun.data.transforms import ImageTransform, fit_transform
from clrun.system.errors import ConfigError

UNLIMITED = 10**9  # tokens


@dataclass(frozen=True)
class Images:
    """Images [N, C, H, W] uint8, in memory or in files; resized and normalised for the backbone."""

    unit: ClassVar[str] = "image"

    def fit(self, dataset: Dataset, backbone: nn.Module) -> Fitted:
        """Return the data set, and the transform of its images; see `clrun.data.transforms.fit_transform`.

        Raises:
            ConfigError: the backbone reads texts, an augmentation is unknown, or channels cannot be converted.
        """
        _refuse_text_backbone(dataset, backbone)
        transform, line = fit_transform(dataset, backbone)
        return Fitted(dataset, transform, line, self.unit)

    def blank(self, dataset: Dataset, backbone: nn.Module) -> Tensor:
        """Return a black image [1, C, H, W] of the size that the backbone takes."""
        return _zeros(dataset, backbone)

    def problem(self, split: Split, dataset: Dataset) -> str | None:
        """Return what is wrong with labels, normalisation constants or pixels."""
        found = _label_problem(split, dataset) or _spread_problem(dataset)
        found = found or constants_problem(dataset.mean, dataset.std) or _count_problem(split, self.unit)
        if found or not isinstance(split, TensorSplit):
            return found
        return _pixel_problem(split.images)

    def shifts(
        self, dataset: Dataset, n_tasks: int, kind: ShiftKind, *, identity_first: bool, max_angle: float
    ) -> list[tuple[str, Shift | None]]:
        """Return the permutation of the pixels, or the rotation, of each task id."""
        found: list[tuple[str, Shift | None]] = []
        for task in range(n_tasks):
            shift: Shift | None = None
            original = identity_first and task == 0
            angle = 0.0 if original else random_angle(max_angle, dataset.seed, task)
            if kind == "rotated" and angle:
                shift = Rotation(angle)
            elif kind == "permuted" and not original:
                shift = pixel_permutation(dataset.shape, dataset.seed, task)
            found.append((f"rot {angle:.0f}" if kind == "rotated" else f"perm {task}", shift))
        return found

    def samples(self, split: Split, rows: Tensor, transform: Transform, generator: torch.Generator) -> Samples | None:
        """Return the images as the network sees them, and once more as augmented, with the normalisation undone."""
        if not isinstance(transform, ImageTransform):
            return None
        raw: Batch = next(split.select(rows).batches(len(rows), view="raw"))
        augmented = transform.undo(transform.train(raw.x, generator)) if transform.augments else None
        return Samples(raw.y, transform.undo(transform.eval(raw.x)), augmented)


@dataclass(frozen=True)
class Texts:
    """Texts as rows of UTF-8 bytes [N, W] uint8 with zeros behind them, tokenised once for the backbone.

    A backbone for texts has `tokenizer` (`clrun.data.tokens.Tokenizer`) and `max_tokens`. It is given token ids [B, L]
    int64 with the padding id 0 behind each text; L is the same for all rows of a run.
    """

    unit: ClassVar[str] = "text"

    def fit(self, dataset: Dataset, backbone: nn.Module) -> Fitted:
        """Return the data set of token ids [N, L] int32, where L is at most `backbone.max_tokens`, and its transform.

        Raises:
            ConfigError: the backbone has no tokenizer, `dataset.augment` names augmentations of images, or a text does
                not suit the template of the schema.
        """
        tokenizer, limit = _tokenizer(dataset, backbone)
        parse_augmentations(dataset.augment, self.unit)
        stated = _stated(dataset)
        whole = (dataset, *dataset.parts)
        splits = [split for part in whole for split in (part.train, part.test, part.val) if split is not None]
        found = {id(split.images): tokenised(split.images, tokenizer, limit, stated) for split in splits}
        width = max(rows.ids.shape[1] for rows in found.values())
        ids = {key: F.pad(r.ids, (0, width - r.ids.shape[1]), value=tokenizer.pad) for key, r in found.items()}

        def read(part: Dataset) -> Dataset:
            train, test = (replace(split, images=ids[id(split.images)]) for split in (part.train, part.test))
            val = None if part.val is None else replace(part.val, images=ids[id(part.val.images)])
            return replace(part, train=train, test=test, val=val, shape=(width,), parts=tuple(map(read, part.parts)))

        lengths = torch.cat([rows.lengths for rows in found.values()])
        line = (
            f"texts, at most {width} tokens (mean {lengths.double().mean():.1f}; "
            f"{sum(rows.cut for rows in found.values())} rows cut at {limit}), {tokenizer.name}"
        )
        line = f"{line}: {dataset.reading}" if dataset.reading else line
        line = f"{line}; {dataset.schema.line}" if dataset.schema is not None and dataset.schema.line else line
        transform = TextTransform(tokenizer, width, limit, stated)
        return Fitted(read(dataset), transform, line, f"text of {width} tokens")

    def blank(self, dataset: Dataset, backbone: nn.Module) -> Tensor:
        """Return the ids [1, L] of a text of one letter; a row of padding alone is no legal text."""
        tokenizer, limit = _tokenizer(dataset, backbone)
        return torch.tensor([tokenizer.encode("a", limit)])

    def problem(self, split: Split, dataset: Dataset) -> str | None:
        """Return what is wrong with labels, the number of rows or their bytes."""
        if found := _label_problem(split, dataset) or _count_problem(split, self.unit):
            return found
        rows = split.images
        if not isinstance(rows, Tensor) or rows.dtype != torch.uint8 or rows.dim() != 2:
            return f"texts of {_described(rows)}, expected a tensor [N, W] of torch.uint8, UTF-8 with zeros behind it"
        if len(empty := (rows[:, 0] == 0).nonzero()):
            return f"an empty text (row {int(empty[0])}), expected at least one character in each"
        return None

    def shifts(
        self, dataset: Dataset, n_tasks: int, kind: ShiftKind, *, identity_first: bool, max_angle: float
    ) -> list[tuple[str, Shift | None]]:
        """Refuse: domains of texts come from the data.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"scenario=domain_shift: needs images, and {dataset.name} consists of texts; use another scenario, such as "
            "dataset_sequence for a data set with domains"
        )

    def samples(self, split: Split, rows: Tensor, transform: Transform, generator: torch.Generator) -> Samples | None:
        """Return the texts in the words of the schema and their tokens; the split has the rows as stored."""
        tokenizer = transform.tokenizer if isinstance(transform, TextTransform) else None
        if tokenizer is None or not isinstance(transform, TextTransform):
            return None
        chosen = split.select(rows)
        raw: Batch = next(chosen.batches(len(rows), view="raw"))
        texts = to_texts(raw.x)
        if transform.stated is not None and isinstance(chosen, TensorSplit) and chosen.rows is not None:
            texts = transform.stated.texts(texts, chosen.images, chosen.rows)
        shown = []
        for text in texts:
            ids = tokenizer.encode(text, transform.max_tokens)
            missing = len(tokenizer.encode(text, UNLIMITED)) - len(ids)
            shown.append(ShownText(text, tuple(tokenizer.tokens(ids)), missing))
        return Samples(raw.y, texts=tuple(shown))


@dataclass(frozen=True)
class Vectors:
    """Rows of numbers [N, D] that are network input as they are stored: features, or token ids of a user's own."""

    unit: ClassVar[str] = "row"

    def fit(self, dataset: Dataset, backbone: nn.Module) -> Fitted:
        """Return the data set, and the transform that changes nothing.

        Raises:
            ConfigError: `dataset.augment` names augmentations of images.
        """
        if dataset.augment:
            raise ConfigError("dataset.augment: this data set has no images; set dataset.augment=[]")
        return Fitted(dataset, Plain(), f"{'x'.join(map(str, dataset.shape))} features, as stored", self.unit)

    def blank(self, dataset: Dataset, backbone: nn.Module) -> Tensor:
        """Return a row of zeros [1, D], of the type of the stored rows."""
        stored = dataset.train.images
        kind = stored.dtype if isinstance(stored, Tensor) else torch.float32
        return _zeros(dataset, backbone).to(kind)

    def problem(self, split: Split, dataset: Dataset) -> str | None:
        """Return what is wrong with labels, deviations or the number of rows."""
        found = _label_problem(split, dataset) or _spread_problem(dataset) or _count_problem(split, self.unit)
        if found or len(dataset.shape) == 1 or not isinstance(split, TensorSplit):
            return found
        return _pixel_problem(split.images)

    def shifts(
        self, dataset: Dataset, n_tasks: int, kind: ShiftKind, *, identity_first: bool, max_angle: float
    ) -> list[tuple[str, Shift | None]]:
        """Refuse: pixels are permuted and images are rotated.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"scenario=domain_shift: needs images, and {dataset.name} has none; use another scenario")

    def samples(self, split: Split, rows: Tensor, transform: Transform, generator: torch.Generator) -> Samples | None:
        """Return None: rows of numbers show nothing."""
        return None


def modality_of(dataset: Dataset) -> Modality:
    """Return what kind of data a data set holds: as its loader says, else images for (C, H, W), and rows otherwise."""
    return dataset.modality or (Images() if len(dataset.shape) == 3 else Vectors())


def _tokenizer(dataset: Dataset, backbone: nn.Module) -> tuple[Tokenizer, int]:
    """Return the tokenizer of a backbone, and the number of tokens that it takes at most.

    Raises:
        ConfigError: it has none.
    """
    tokenizer: Tokenizer | None = getattr(backbone, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            f"backbone: {type(backbone).__name__} reads no texts, and {dataset.name} consists of texts; choose a "
            "backbone with a tokenizer, such as bert_tiny"
        )
    return tokenizer, int(backbone.max_tokens)  # type: ignore[arg-type]


def _stated(dataset: Dataset) -> Stated | None:
    """Return what puts the rows of a data set into the words of its schema; None where they stay as they are."""
    if dataset.schema is None or dataset.schema.plain:
        return None
    part_of: dict[int, Tensor] = {}
    for k, part in enumerate(dataset.parts if dataset.schema.by_part else ()):
        for split in (part.train, part.test, part.val):
            if isinstance(split, TensorSplit) and split.rows is not None:
                own = part_of.setdefault(id(split.images), torch.full((len(split.images),), -1))
                own[split.rows] = k
    return Stated(dataset.schema, tuple(part.name for part in dataset.parts), part_of)


def _refuse_text_backbone(dataset: Dataset, backbone: nn.Module) -> None:
    """Raise if a backbone reads texts.

    Raises:
        ConfigError: see above.
    """
    if getattr(backbone, "tokenizer", None) is not None:
        raise ConfigError(
            f"backbone: {type(backbone).__name__} reads texts, and {dataset.name} consists of images; choose another "
            "backbone, such as cnn"
        )


def _zeros(dataset: Dataset, backbone: nn.Module) -> Tensor:
    """Return one row of zeros, of the size that the backbone names, else of the stored one."""
    return torch.zeros(1, *(getattr(backbone, "input_size", None) or dataset.shape))


# --- what can be wrong with the rows of a user's loader


def _label_problem(split: Split, dataset: Dataset) -> str | None:
    labels = split.labels
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        return f"labels of {_described(labels)}, expected a tensor [N] of torch.int64"
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < dataset.num_classes:
        found = f"labels from {int(labels.min())} to {int(labels.max())}"
        return f"{found}, expected 0 to {dataset.num_classes - 1} (num_classes is {dataset.num_classes})"
    return None


def _spread_problem(dataset: Dataset) -> str | None:
    if not all(spread > 0 for spread in dataset.std):
        return f"the standard deviations {dataset.std}, expected numbers above 0"
    return None


def _count_problem(split: Split, unit: str) -> str | None:
    if len(split.labels) != len(split.images):
        return f"{len(split.images)} {unit}s and {len(split.labels)} labels, expected one label per {unit}"
    return None


def _pixel_problem(images: Any) -> str | None:
    wrong = not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4
    if wrong or images.shape[1] > 4 >= images.shape[3]:  # channels last
        return f"images of {_described(images)}, expected a tensor [N, C, H, W] of torch.uint8, 0 to 255"
    return None


def _described(value: Any) -> str:
    """Return shape and type of a tensor, or the type of anything else."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
