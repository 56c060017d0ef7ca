"""What has changed between two records of the data of a run, in words. `clrun.data.identity` makes the records.

Rows are compared by name where both sides have names; the validation rows count as training rows, from which they were
cut. Otherwise numbers of rows and digests are compared per class.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clrun.system.checksums import RULE

SHOWN = 3  # examples in a message
COMPARED = 10_000  # pairs of classes up to which renamed ones are looked for
PARTS = (("training", ("train", "val")), ("test", ("test",)))
Record = Mapping[str, Any]


@dataclass(frozen=True)
class NamedRows:
    """The rows of one part ("train", "test" or "val") whose names are known.

    Attributes:
        names: N names.
        contents: N digests.
        labels: N class ids.
    """

    names: Sequence[str]
    contents: Sequence[int]
    labels: Sequence[int]


@dataclass
class Changes:
    """What has changed.

    Attributes:
        classes: about the classes and to which of them rows belong, one phrase each.
        added: about rows that were not there before.
        gone: about rows that are no longer there.
        contents: about rows whose contents differ.
        order: about the order of rows or classes, and names of rows.
        gone_rows: names of all rows that are no longer there, as far as names are known.
    """

    classes: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    gone_rows: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything has changed."""
        return bool(self.phrases)

    @property
    def phrases(self) -> list[str]:
        """All of it, one phrase each."""
        return [*self.classes, *self.gone, *self.added, *self.contents, *self.order]

    @property
    def text(self) -> str:
        """All of it in one line, at most eight phrases."""
        more = f"; and {len(self.phrases) - 8} more changes" if len(self.phrases) > 8 else ""
        return "; ".join(self.phrases[:8]) + more


def data_digest(run: Mapping[str, Any]) -> str:
    """Return the digest of the data that a run has seen, from run.json; "" when there is none of the present rule."""
    data = run.get("data")
    found = data.get("digest") if isinstance(data, Mapping) and is_comparable(data) else None
    return found if isinstance(found, str) else ""


def is_comparable(record: Record) -> bool:
    """Return whether the digests of a record were computed by the present rule; a record without `rule` has rule 1."""
    return bool(record.get("rule", 1) == RULE)


def data_changes(
    before: Record,
    now: Record,
    rows_before: Mapping[str, NamedRows] | None = None,
    rows_now: Mapping[str, NamedRows] | None = None,
) -> Changes:
    """Return what has changed from one record of run.json to another; of records of different rules, only the classes.

    Args:
        before: the earlier record.
        now: the present one.
        rows_before: rows of the earlier data by part, as far as their names are known.
        rows_now: rows of the present data, likewise.
    """
    changes = Changes()
    if before["digest"] == now["digest"]:
        return changes
    common = _compare_classes(before, now, changes)
    if not (is_comparable(before) and is_comparable(now)):
        return changes
    for title, parts in PARTS:
        old, new = (_named(parts, record, rows, common) for record, rows in ((before, rows_before), (now, rows_now)))
        if old is not None and new is not None:
            _compare_rows(title, old, new, changes)
        else:
            _compare_counts(title, parts, before, now, common, changes)
    if not changes:
        changes.order.append("the rows are in another order")
    return changes


def _compare_classes(before: Record, now: Record, changes: Changes) -> set[str]:
    """Add what has changed about the classes; return the names that both sides have."""
    old, new = before["classes"]["names"], now["classes"]["names"]
    gone, added = ([n for n in a if n not in set(b)] for a, b in ((old, new), (new, old)))
    for name in list(gone) if len(gone) * len(added) <= COMPARED else ():
        twin = next((other for other in added if _is_renamed(before, name, now, other)), None)
        if twin is not None:
            changes.classes.append(f"the class {name} is now called {twin}")
            gone.remove(name)
            added.remove(twin)
    if added:
        changes.classes.append(f"{_number(len(added), 'class')} added ({_some(added)})")
    if gone:
        changes.classes.append(f"{_number(len(gone), 'class')} gone ({_some(gone)})")
    if not changes.classes and old != new:
        changes.order.append("the classes are in another order")
    return set(old) & set(new)


def _is_renamed(before: Record, old: str, now: Record, new: str) -> bool:
    """Whether two classes have equal numbers of rows in every part, and in one part equal contents."""
    pairs = [(_class_rows(parts, before, old), _class_rows(parts, now, new)) for _, parts in PARTS]
    return all(a[0] == b[0] for a, b in pairs) and any(a[0] and a[2] == b[2] for a, b in pairs)


def _named(
    parts: Iterable[str], record: Record, rows: Mapping[str, NamedRows] | None, common: set[str]
) -> dict[str, tuple[int, str]] | None:
    """Return digest and class of each row by name, of the classes in `common`; None where names are not known."""
    classes = record["classes"]["names"]
    found: dict[str, tuple[int, str]] = {}
    for part in parts:
        if not record.get(part):
            continue
        if not rows or part not in rows:
            return None
        own = rows[part]
        every = zip(own.names, own.contents, own.labels, strict=True)
        found |= {name: (content, classes[label]) for name, content, label in every if classes[label] in common}
    return found


def _compare_rows(
    title: str, old: Mapping[str, tuple[int, str]], new: Mapping[str, tuple[int, str]], changes: Changes
) -> None:
    """Add what has changed about the rows of a part whose names are known."""
    gone, added = ([name for name in a if name not in b] for a, b in ((old, new), (new, old)))
    changes.gone_rows += gone
    if gone:
        changes.gone.append(f"{_number(len(gone), f'{title} row')} gone ({_some(gone)})")
    if added:
        changes.added.append(f"{_number(len(added), f'{title} row')} added ({_some(added)})")
    both = [name for name in old if name in new]
    contents = [name for name in both if old[name][0] != new[name][0]]
    if contents:
        changes.contents.append(f"the contents of {_number(len(contents), f'{title} row')} changed ({_some(contents)})")
    labels = [name for name in both if old[name][1] != new[name][1]]
    if labels:
        changes.classes.append(f"the class of {_number(len(labels), f'{title} row')} changed ({_some(labels)})")


def _compare_counts(
    title: str, parts: Sequence[str], before: Record, now: Record, common: set[str], changes: Changes
) -> None:
    """Add what has changed about the rows of a part, by class."""
    more: list[tuple[str, int]] = []
    fewer: list[tuple[str, int]] = []
    names, contents = [], []
    for label in sorted(common):
        (old, *old_digests), (new, *new_digests) = (_class_rows(parts, record, label) for record in (before, now))
        if old != new:
            (more if new > old else fewer).append((label, abs(new - old)))
        elif old_digests[1] != new_digests[1]:
            contents.append(label)
        elif old_digests[0] != new_digests[0]:
            names.append(label)
    for found, where, word in ((fewer, changes.gone, "gone"), (more, changes.added, "added")):
        if found:
            rows = _number(sum(number for _, number in found), f"{title} row")
            where.append(f"{rows} {word} (of {_classes([label for label, _ in found])})")
    if contents:
        changes.contents.append(f"the contents of {title} rows of {_classes(contents)} changed")
    if names:
        changes.order.append(f"{title} rows of {_classes(names)} have other names")


def _class_rows(parts: Iterable[str], record: Record, label: str) -> tuple[int, int, int]:
    """Return number of rows of a class in several parts together, digests of their names and of their contents."""
    index = record["classes"]["names"].index(label)
    texts = [record[part]["by_class"][index].split() for part in parts if record.get(part)]
    names, contents = (sum(int(text[k], 16) for text in texts) % 2**64 for k in (1, 2))
    return sum(int(text[0]) for text in texts), names, contents


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'the classes'} {_some(names)}"


def _number(count: int, what: str) -> str:
    """Return a number with its noun, "1 class" or "2 classes"."""
    plural = "es" if what.endswith("s") else "s"
    return f"{count} {what}{'' if count == 1 else plural}"


def _some(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name.encode(errors="surrogateescape").decode(errors="replace") for name in names[:SHOWN]) + more
