"""Random overrides through the command: a run ends well, or in one line that says what is wrong; never otherwise.

Keys and values come from the files in conf/ and the signatures of what these name. `CLRUN_FUZZ=N` tries N examples of
another seed each time; the default run tries a few, always the same.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from running import member

from clrun.cli import main
from clrun.config.signature import locate, parameters
from clrun.system.errors import Range

CONF = Path(__file__).parents[2] / "conf"
EXAMPLES = int(os.environ.get("CLRUN_FUZZ", 0))
# Three tasks of two classes, two steps each; what a drawn override names again is changed by it.
TINY = {
    "job": "smoke",
    "job.picture": "false",
    "job.progress": "false",
    "job.max_eval_rows": "8",
    "dataset": "synthetic",
    "scenario": "class_split",
    "budget": "sgd",
    "budget.batch_size": "8",
    "hardware": "cpu",
    "hardware.threads": "1",
}
SIZES = {
    "synthetic": {"num_classes": "6", "image_shape": "[1,8,8]", "train_rows": "8", "test_rows": "4"},
    "text_synthetic": {"num_classes": "6", "train_rows": "8", "test_rows": "4"},
    "class_split": {"n_tasks": "3"},
    "domain_shift": {"n_tasks": "3"},
    "fixed_groups": {"groups": "[[0,1],[2,3]]"},
    "listed": {"tasks": "[2,0,1]"},
    "ranpac": {"m": "20"},
    "mer": {"draws": "1"},
}
# Members that need nothing but this machine, and little of it; of the others there is a table of bad inputs.
MEMBERS = {
    "dataset": ["synthetic"] * 6 + ["text_synthetic"] * 2 + ["digits", "mnist"],
    "scenario": ["class_split"] * 6 + ["fixed_groups", "domain_shift", "domain_shift", "dataset_sequence"],
    "task_order": ["canonical", "listed", "random", "reverse", "rotation", "williams", "exhaustive", "edge"] * 3
    + ["cifar100_split", "five_datasets"],
    "backbone": ["cnn", "mlp", "lenet", "glyph_vit", "glyph_vit", "glyph_clip", "bert_tiny", "t5_tiny"],
    "method": sorted(file.stem for file in (CONF / "method").glob("*.yaml")),
    "compress": ["none"] * 8 + sorted(file.stem for file in (CONF / "compress").glob("*.yaml")),
    "budget": ["sgd"] * 4 + sorted(file.stem for file in (CONF / "budget").glob("*.yaml")),
    "hardware": ["cpu", "auto"],
    "logger": ["console"],
    "job": ["smoke"] * 6 + ["stability_decay_smoke", "dry_run", "preview"],
}
# Options whose value is how often something is done: large ones are allowed, and would keep the test waiting.
LOOPS = {"n_tasks", "draws", "sequences", "sweeps", "shrinkages", "max_attempts", "repeats", "steps", "epochs"}
LOOPS |= {
    "max_steps",
    "max_tasks",
    "train_rows",
    "test_rows",
    "num_classes",
    "gradients",
    "period",
    "processes",
    "rounds",
}
NONSENSE = [None, -1, 0, 1.5, True, "wrong", "", [], [0, 0], ["x"], {"x": 1}, float("nan"), float("inf")]


def plausible(hint: Any, option: str, range_: Range | None = None) -> list[Any]:
    """Values that an annotation may allow, its ends included, and some just beyond them."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return plausible(args[0], option, next((x for x in args[1:] if isinstance(x, Range)), None))
    if origin in (Union, UnionType):
        return [value for arg in args for value in plausible(arg, option)]
    if origin is Literal:
        return list(args)
    if hint is type(None):
        return [None]
    if hint is bool:
        return [True, False]
    if hint is int:
        return [0, 1, 2, 3, 5, 10 if option in LOOPS else 10**15, *([] if range_ else [-1])]
    if hint is float:
        ends = [x for x in (range_ or Range()).__dict__.values() if x is not None]
        return [*map(float, ends), 1e-30, 1e-3, 0.1, 0.5, 0.9, 2.0, 1e3, 1e30, *([] if range_ else [-0.5])]
    if origin is list:
        items = plausible(args[0], option)
        return [[], *([item] for item in items), items[:2], [*items[:2], *items[:2]], list(reversed(items[:3]))]
    return []


def options(node: Any, path: str) -> Iterator[tuple[str, list[Any]]]:
    """Every option of a node and of those within, with the values that its annotation may allow."""
    if not node:  # compress=none
        return
    takes = parameters(locate(node["_target_"]))
    for key, value in node.items():
        if key in takes and key != "compile":  # takes too long
            if values := plausible(takes[key].annotation, key):
                yield f"{path}.{key}", values
            if isinstance(value, dict) and "_target_" in value:
                yield from options(value, f"{path}.{key}")


KEYS = {
    (group, name): list(options(node, group)) if "_target_" in node else []
    for group, names in MEMBERS.items()
    for name in sorted(set(names))
    for node in [member(CONF / group / f"{name}.yaml")]
}


def text(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {text(item)}" for key, item in value.items()) + "}"
    return json.dumps(value) if not isinstance(value, float) or abs(value) < float("inf") else repr(value)


@st.composite
def command_lines(draw: Callable[..., Any]) -> list[str]:
    """A member of each group, and two to four options of these."""
    chosen = {group: draw(st.sampled_from(names), label=group) for group, names in MEMBERS.items()}
    given = TINY | chosen
    for group, name in chosen.items():
        given |= {f"{group}.{key}": value for key, value in SIZES.get(name, {}).items()}
    learner: Any = locate(OmegaConf.load(CONF / "method" / f"{chosen['method']}.yaml")["_target_"])
    if chosen["scenario"] != "dataset_sequence" and "cil" not in learner.settings:
        given["scenario.setting"] = "til"
    if learner.needs_vit:
        given["backbone"] = chosen["backbone"] = "glyph_vit"
    if chosen["dataset"] == "text_synthetic" and draw(st.booleans()):
        given["backbone"] = chosen["backbone"] = "t5_tiny" if learner.needs_decoder else "bert_tiny"
    own = [option for group, name in chosen.items() for option in KEYS[group, name]]
    drawn = draw(st.lists(st.sampled_from(own + KEYS["method", chosen["method"]] * 4), min_size=2, max_size=4))
    for key, values in drawn:
        given[key] = text(draw(st.sampled_from(values)))
    if draw(st.integers(0, 5)) == 0:
        given[drawn[0][0]] = text(draw(st.sampled_from(NONSENSE)))
    return [f"{key}={value}" for key, value in given.items()]


def outcome(argv: list[str]) -> tuple[int, list[str], list[str], str | None]:
    """Exit code, lines on standard error but warnings, files left, status in run.json: of a run in an empty folder."""
    folder, err = Path(tempfile.mkdtemp(prefix="clrun-fuzz-")), io.StringIO()
    try:
        with chdir(folder), redirect_stderr(err), redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
            main([*argv, "hydra.run.dir=out"])
        left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        run = folder / "out" / "run.json"
        status = json.loads(run.read_text())["status"] if run.exists() else None
    finally:
        shutil.rmtree(folder)
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("clrun: warning: ")]
    return int(end.value.code or 0), lines, left, status


def assert_declared(argv: list[str]) -> None:
    """A run ends in one of the ways that the command declares, and leaves what belongs to that."""
    note("clrun " + " ".join(f"'{argument}'" for argument in argv))
    code, lines, left, status = outcome(argv)
    note("\n".join(lines))
    if code == 0:
        assert lines == []
        assert status in ("completed", None)
        return
    assert lines and all(line.startswith("clrun: ") for line in lines)
    if code == 1:
        assert len(lines) == 1 and lines[0].startswith(("clrun: the loss is ", "clrun: out of memory ("))
    else:
        assert code == 2
        assert len(lines) <= len(argv)  # one line for each mistake
    assert left == [] or status == "failed"  # found in the data, late: the run says so itself


@settings(
    max_examples=EXAMPLES or 12,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(command_lines())
def test_random_overrides_end_well_or_in_one_line(argv):
    assert_declared(argv)
