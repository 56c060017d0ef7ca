"""Run folders of other people, as a generator: copies of a completed run in which one file is not what it should be."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ESCAPE = "\x1b[2J\x1b]0;title\x07"
FORMULA = '=HYPERLINK("http://example.invalid")'
VALUES: tuple[Any, ...] = (None, -1, 2**70, 1e400, "", ESCAPE, FORMULA, "x" * 100_000, [], [[]], {}, {"": None}, True)
FILES = ("run.json", "accuracy.csv", "config.yaml", "metrics.jsonl")


def hostile_folders(completed: Path, into: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Yield names and folders without end; each folder is a copy of `completed` with one change.

    Args:
        completed: folder of a completed run.
        into: where the copies are made; each is removed before the next one is made.
        seed: of the changes.
    """
    draw, number = random.Random(seed), 0
    changes: list[Callable[[Path, random.Random], str]] = [_field, _cell, _kind, _bytes, _nested, _long]
    while True:
        for change in changes:
            number += 1
            folder = into / f"hostile-{number}"
            shutil.copytree(completed, folder)
            try:
                yield change(folder, draw), folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def _field(folder: Path, draw: random.Random) -> str:
    """Give a field of run.json, at any depth, another value."""
    run = json.loads((folder / "run.json").read_text())
    place, where = run, []
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
        where.append(str(key))
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.4:
            break
        place = place[key]
    place[key] = draw.choice(VALUES)
    (folder / "run.json").write_text(json.dumps(run))
    return f"run.json: {'.'.join(where)} = {ascii(place[key])[:30]}"


def _cell(folder: Path, draw: random.Random) -> str:
    """Give a cell of accuracy.csv another value."""
    lines = (folder / "accuracy.csv").read_text().splitlines()
    row = draw.randrange(len(lines))
    cells = lines[row].split(",")
    column = draw.randrange(len(cells))
    cells[column] = str(draw.choice(VALUES))
    lines[row] = ",".join(cells)
    (folder / "accuracy.csv").write_text("\n".join(lines) + "\n")
    return f"accuracy.csv: line {row + 1}, column {column + 1} = {ascii(cells[column])[:30]}"


def _kind(folder: Path, draw: random.Random) -> str:
    """Put a pipe, a link to an endless device, a folder, or a file of a gigabyte without blocks in place of a file."""
    name, kind = draw.choice(FILES), draw.choice(("pipe", "endless", "folder", "gigabyte", "nothing"))
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "gigabyte":
        with path.open("wb") as file:
            file.truncate(2**30)
    return f"{name}: {kind}"


def _bytes(folder: Path, draw: random.Random) -> str:
    """Overwrite some bytes of a file."""
    name = draw.choice([name for name in FILES if (folder / name).exists()])
    content = bytearray((folder / name).read_bytes())
    start = draw.randrange(len(content))
    content[start : start + draw.choice((1, 20, 10_000))] = draw.randbytes(draw.choice((0, 1, 20)))
    (folder / name).write_bytes(content)
    return f"{name}: bytes from {start}"


def _nested(folder: Path, draw: random.Random) -> str:
    """Nest brackets deeper than a parser may recurse."""
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    depth = draw.choice((2_000, 200_000))
    text = opening * depth + "0" + closing * depth
    (folder / "run.json").write_text('{"schema": 1, "config": ' + text + "}")
    return f"run.json: {depth} times {opening}"


def _long(folder: Path, draw: random.Random) -> str:
    """Claim many tasks."""
    run = json.loads((folder / "run.json").read_text())
    run["task_order"] = list(range(draw.choice((100, 6_000))))
    (folder / "run.json").write_text(json.dumps(run))
    return f"run.json: {len(run['task_order'])} tasks"
