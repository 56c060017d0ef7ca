"""What the columns of a table say beside row and label: parts of the data set, domains, and groups of classes."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from clrun.data.reading.assemble import Domains
from clrun.data.reading.class_names import Sort, composed, in_order
from clrun.data.reading.layout import found_parts, given_parts
from clrun.data.reading.listing import in_test
from clrun.data.reading.text import some
from clrun.system.errors import ConfigError, warn


def row_parts(
    file: str,
    splits: Sequence[str],
    names: Sequence[str],
    given: Mapping[str, str | None] | None,
    fraction: float,
    unit: str = "image",
) -> tuple[dict[str, list[int]], str]:
    """Return the numbers of the rows of each part, and a word on what is tested on where it is not simply a test part.

    Args:
        file: the table, for messages.
        splits: the name of the part of each row; "" without such a column.
        names: what decides by its hash whether a row is a test row, where there is no test part.
        given: names of the parts, as `dataset.splits`; None to find them.
        fraction: expected fraction of test rows then.
        unit: what one row is called, for messages.

    Raises:
        ConfigError: it is unclear which rows are training rows.
    """
    known = tuple(dict.fromkeys(split for split in splits if split))
    if not known and given:
        raise ConfigError(f"dataset.splits: {file} has no column of splits; add one, or set dataset.splits=null")
    chosen = found_parts(known, file, unit) if given is None else given_parts(given, known, file)
    if known and not chosen and given is None:
        raise ConfigError(
            f"{file}: the splits {some(known)} are unclear; name them, as in dataset.splits={{train: {known[0]}, "
            "test: NAME}"
        )
    ignored = [split for split in splits if chosen and split not in chosen.values()]
    if ignored:
        warn(f"{file}: {len(ignored)} rows of other splits are ignored: {some(sorted(set(ignored)))}")
    parts = {part: [k for k, split in enumerate(splits) if split == title] for part, title in chosen.items()}
    train = parts.get("train", list(range(len(splits))))
    if "test" not in parts:
        tested = {k for k in train if in_test(names[k], fraction)}
        parts["train"], parts["test"] = [k for k in train if k not in tested], sorted(tested)
    return parts, "" if chosen.get("test") in (None, "test") else f"tested on {chosen['test']}"


def row_domains(parts: Mapping[str, Sequence[str]]) -> Domains | None:
    """Return the domains of the rows of each part, by sorted name; None without a column of domains.

    Args:
        parts: the domain of each row of "train", "test" and perhaps "val"; "" without such a column.
    """
    names = sorted({domain for own in parts.values() for domain in own if domain})
    if not names:
        return None
    numbers = {part: torch.tensor([names.index(domain) for domain in own]) for part, own in parts.items()}
    return Domains(names, **numbers)


def class_groups(
    file: str, rows: Iterable[tuple[int, str, str]], classes: Sequence[str], sort: Sort
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and the class ids of each group of classes, by sorted name; [] without a column of groups.

    Args:
        file: the table, for messages.
        rows: number of the line, class and group of each row; "" for no group.
        classes: C names; the position is the class id.
        sort: order of the names of groups.

    Raises:
        ConfigError: a class is in two groups.
    """
    group_of: dict[str, str] = {}
    for line, label, group in rows:
        if group and (other := group_of.setdefault(composed(label), group)) != group:
            raise ConfigError(
                f"{file}, line {line}: the class {label} is in the tasks {other} and {group}; name the "
                "column domain if all tasks have the same classes"
            )
    members = {
        group: tuple(k for k, name in enumerate(classes) if group_of.get(name) == group)
        for group in in_order(set(group_of.values()), sort)
    }
    return [(group, own) for group, own in members.items() if own]
