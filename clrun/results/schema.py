"""Forms of the JSON files in a run's folder: keys, types and sizes are checked before anything else sees the values.

A form is a function of a value and its place in the file; it returns one line about the first problem, or None.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Form = Callable[[Any, str], str | None]

DEEPEST = 40  # levels of lists and mappings inside each other
LONGEST = 100_000  # characters of a text
LARGEST = 2**63 - 1  # absolute value of a whole number
TASKS = 100_000  # most tasks of a run
LISTED = 100_000  # most entries of a list or mapping of texts
OPTIONS = 20_000  # most keys of a configuration, those of inner mappings included


def text(value: Any, place: str) -> str | None:
    """Accept a text."""
    return None if isinstance(value, str) else f"{place}: expected a text"


def whole(value: Any, place: str) -> str | None:
    """Accept a whole number."""
    return None if type(value) is int else f"{place}: expected a whole number"


def count(value: Any, place: str) -> str | None:
    """Accept a whole number of at least 0."""
    return None if type(value) is int and value >= 0 else f"{place}: expected a whole number of at least 0"


def number(value: Any, place: str) -> str | None:
    """Accept a finite number."""
    fits = type(value) in (int, float) and math.isfinite(value)
    return None if fits else f"{place}: expected a number"


def amount(value: Any, place: str) -> str | None:
    """Accept a finite number of at least 0."""
    return None if number(value, place) is None and value >= 0 else f"{place}: expected a number of at least 0"


def fraction(value: Any, place: str) -> str | None:
    """Accept a number from 0 to 1."""
    return None if number(value, place) is None and 0 <= value <= 1 else f"{place}: expected a number from 0 to 1"


def flag(value: Any, place: str) -> str | None:
    """Accept true and false."""
    return None if isinstance(value, bool) else f"{place}: expected true or false"


def plain(value: Any, place: str) -> str | None:
    """Accept a text, a number, true, false or null."""
    return f"{place}: expected a text or a number" if isinstance(value, list | dict) else None


def anything(value: Any, place: str) -> str | None:
    """Accept every value."""


def nullable(form: Form) -> Form:
    """Accept null and what `form` accepts."""
    return lambda value, place: None if value is None else form(value, place)


def unless_empty(form: Form) -> Form:
    """Accept null, an empty list or mapping, and what `form` accepts."""
    return lambda value, place: form(value, place) if value else None


def one_of(*choices: str) -> Form:
    """Accept one of these texts."""
    said = ", ".join(choices)
    return lambda value, place: None if value in choices else f"{place}: expected one of {said}"


def listed(form: Form, most: int = LISTED) -> Form:
    """Accept a list of at most `most` values that `form` accepts."""

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, list):
            return f"{place}: expected a list"
        if len(value) > most:
            return f"{place}: has {len(value):,} entries, at most {most:,} are read"
        problems = (form(item, f"{place}[{i}]") for i, item in enumerate(value))
        return next((problem for problem in problems if problem), None)

    return check


def mapping(form: Form, most: int = LISTED) -> Form:
    """Accept a mapping of at most `most` keys to values that `form` accepts."""

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return f"{place}: expected a mapping"
        if len(value) > most:
            return f"{place}: has {len(value):,} keys, at most {most:,} are read"
        problems = (form(item, f"{place}.{key}") for key, item in value.items())
        return next((problem for problem in problems if problem), None)

    return check


def record(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None) -> Form:
    """Accept a mapping with the required keys; other keys than the optional ones may be there and are not looked at."""

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return f"{place}: expected a mapping" if place else "expected a mapping"
        dot = f"{place}." if place else ""
        if missing := [key for key in required if key not in value]:
            return f"{dot}{missing[0]}: is missing"
        forms = {**required, **(optional or {})}
        problems = (form(value[key], f"{dot}{key}") for key, form in forms.items() if key in value)
        return next((problem for problem in problems if problem), None)

    return check


def options(value: Any, place: str) -> str | None:
    """Accept the nested mappings of a configuration."""
    if not isinstance(value, dict):
        return f"{place}: expected a mapping"
    found, rest = 0, [value]
    while rest and found <= OPTIONS:
        node = rest.pop()
        found += len(node)
        rest += [item for item in node.values() if isinstance(item, dict)]
    return f"{place}: has more than {OPTIONS:,} keys" if found > OPTIONS else None


def unsound(value: Any) -> str | None:
    """Return what is wrong with a whole JSON value: depth, length of a text, size of a number, half a character."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for node in level:
            items = [*node, *node.values()] if isinstance(node, dict) else node if isinstance(node, list) else [node]
            if problem := _unsound_items(items):
                return problem
            inner += [item for item in items if isinstance(item, list | dict)]
        if not inner:
            return None
        level = inner
    return f"it has more than {DEEPEST} levels of lists and mappings"


def _unsound_items(items: list[Any]) -> str | None:
    """Return what is wrong with the texts and whole numbers among `items`."""
    kinds = set(map(type, items))
    if int in kinds and any(type(item) is int and abs(item) > LARGEST for item in items):
        return "it has a whole number beyond 64 bits"
    if str not in kinds:
        return None
    texts = [item for item in items if isinstance(item, str)]
    if max(map(len, texts)) > LONGEST:
        return f"it has a text of more than {LONGEST:,} characters"
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return "it has half a character (a lone surrogate)"
    return None


SETTINGS = ("til", "cil", "dil", "open")
SPLITS = ("test", "val")
STATES = ("running", "completed", "failed", "interrupted")
_TOTALS = nullable(mapping(count))
_BYTES = {"dense_bytes": count, "stored_bytes": count}
_ACCURACIES = mapping(mapping(fraction))
_COMPRESSION = record(
    {"kind": text, "target": text, "layers": mapping(record(_BYTES))},
    {
        **_BYTES,
        "seconds": nullable(amount),
        "finetune_seconds": nullable(amount),
        "peak_memory_bytes": nullable(count),
        "before": _ACCURACIES,
        "directly_after": _ACCURACIES,
    },
)
"""What a stage of compression has done (`clrun.running.compression`)."""
_COST_OF_TASK = record(
    {},
    {
        "task": whole,
        "position": count,
        "steps": nullable(count),
        "train_seconds": nullable(amount),
        "eval_seconds": nullable(amount),
        "parameters": _TOTALS,
        "state_bytes": _TOTALS,
        "tuning": mapping(anything),
        "modules": mapping(count),
        "compression": _COMPRESSION,
    },
)
_COST = record(
    {},
    {
        "tasks": nullable(listed(_COST_OF_TASK, TASKS)),
        "train_seconds": nullable(amount),
        "eval_seconds": nullable(amount),
        "parameters": _TOTALS,
        "state_bytes": _TOTALS,
        "flops_per_image": nullable(count),
    },
)
_ROWS_OF_CLASS = re.compile(r"\d{1,15} [0-9a-f]{16} [0-9a-f]{16}")


def _rows_of_class(value: Any, place: str) -> str | None:
    """Accept the number of rows of a class and the digests of their names and contents."""
    sound = isinstance(value, str) and _ROWS_OF_CLASS.fullmatch(value)
    return None if sound else f"{place}: expected a number of rows and two digests"


_PART = nullable(record({"rows": count, "digest": text, "by_class": listed(_rows_of_class)}))
_DATA = record(
    {
        "digest": text,
        "classes": record({"count": count, "digest": text, "names": listed(text)}),
        "per_task": mapping(text),
    }
    | dict.fromkeys(("train", "test", "val"), _PART),
    {"rule": count},
)


def data(value: Any, place: str) -> str | None:
    """Accept a record of the data of a run (`clrun.results.data_record`)."""
    if problem := _DATA(value, place):
        return problem
    names = len(value["classes"]["names"])
    for part in ("train", "test", "val"):
        if value[part] is not None and len(value[part]["by_class"]) != names:
            return f"{place}.{part}.by_class: expected one entry per class, of {names}"
    return None


def _pair(value: Any, place: str) -> str | None:
    """Accept a list of two plain values."""
    two = isinstance(value, list) and len(value) == 2
    return listed(plain)(value, place) if two else f"{place}: expected a list of two values"


EXTRA = listed(mapping(listed(count, 2)), TASKS + 1)
"""Numbers of correct answers and of samples on each held-out data set, before the first task and after each."""

START = record(
    {
        "folder": text,
        "learned": count,
        "config_hash": text,
        "changed": mapping(_pair),
        "identical": flag,
    }
)
"""The run that another one went on from."""
RUN = record(
    {"status": one_of(*STATES), "seed": whole, "config": options},
    {
        "name": text,
        "error": nullable(text),
        "choices": nullable(mapping(plain)),
        "overrides": nullable(listed(text)),
        "config_hash": text,
        "environment": nullable(mapping(text, OPTIONS)),
        "task_order": nullable(listed(whole, TASKS)),
        "task_names": nullable(listed(text, TASKS)),
        "task_classes": nullable(listed(listed(whole), TASKS)),
        "setting": nullable(one_of(*SETTINGS)),
        "notes": nullable(listed(text)),
        "held_out": nullable(EXTRA),
        "accuracy_matrix": nullable(mapping(anything)),  # only its figure reads it, and checks it
        "metrics": nullable(mapping(mapping(nullable(number)), len(SETTINGS))),
        "cost": unless_empty(_COST),
        "versions": nullable(mapping(plain)),
        "logme": nullable(record({}, {"all": nullable(number)})),
        "started": nullable(text),
        "finished": nullable(text),
        "data": nullable(data),
        "started_from": nullable(START),
    },
)
"""run.json; keys that are not named here may be there."""


def run_problem(run: Any) -> str | None:
    """Return what is wrong with the content of a run.json; None for nothing."""
    if problem := unsound(run) or RUN(run, ""):
        return problem
    order = run.get("task_order")
    if order is None:
        return None
    if len(set(order)) < len(order):
        return "task_order: has a task twice"
    for key in ("task_names", "task_classes"):
        if run.get(key) is not None and len(run[key]) != len(order):
            return f"{key}: has {len(run[key])} entries for {len(order)} tasks"
    return None


_TRIAL = record(
    {
        "number": count,
        "order": listed(whole, TASKS),
        "accuracy": nullable(fraction),
        "source": text,
        "parent": nullable(count),
        "move": nullable(text),
        "reused": flag,
        "status": text,
        "folder": text,
    }
)
SEARCH = record(
    {
        "name": text,
        "choices": mapping(plain),
        "config_hash": text,
        "setting": one_of(*SETTINGS),
        "budget": whole,
        "started": whole,
        "status": text,
        "worst": nullable(record({"order": listed(whole, TASKS), "accuracy": nullable(fraction)})),
        "trials": listed(_TRIAL),
        "again": text,
    },
    {"overrides": listed(text), "command": text, "data": data},
)
"""order_search.json."""


def search_problem(search: Any) -> str | None:
    """Return what is wrong with the content of an order_search.json; None for nothing."""
    return unsound(search) or SEARCH(search, "")
