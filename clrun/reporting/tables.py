"""Text tables of a run and of a sweep. Accuracies are printed in points (100 = all answers are correct).

Our own text is ASCII; names that come from elsewhere go through `printable`.
"""

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clrun.results.metrics import UNSEEN, zero_shot_degradation
from clrun.system.errors import printable

OVERRIDE = re.compile(r"(\+{0,2}|~)[A-Za-z_][\w./@-]*(=|$)")
WIDTH = 100
LISTED = 20  # most entries of a list
WIDE = 10  # with more tasks a row of the matrix shows a summary instead of every cell
AVERAGES = 24  # width of the averages of two settings
SETTINGS = {"cil": "class-incremental", "til": "task-incremental", "dil": "domain-incremental"}
EVALUATED = {**SETTINGS, "open": "all classes"}  # settings of evaluations; only the others are compared between runs
FINAL = {
    "average_accuracy": "average accuracy",
    "accuracy_at_5": "accuracy at 5",
    "average_incremental_accuracy": "average incremental accuracy",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "learning_accuracy": "learning accuracy",
    "worst_task": "worst task",
    "transfer": "transfer to unseen tasks",
    "matrix_average": "average of the matrix",
    "seen_accuracy": "accuracy on seen tasks",
    "unseen_accuracy": "accuracy on unseen tasks",
    "harmonic_accuracy": "harmonic mean of both",
}


def settings_of(present: Mapping[str, Any]) -> list[str]:
    """Return the settings among the keys of `present`, class-incremental first."""
    return [setting for setting in EVALUATED if setting in present]


def command(words: Sequence[str]) -> str | None:
    """Return the command `clrun` with these words quoted for a shell; None when a word is neither -m nor an override.

    The words may come from the files of somebody else. An override of Hydra's own options, of the class or function
    that a node names, or with characters that cannot be seen is never suggested.
    """
    for word in words:
        key, _, _ = word.partition("=")
        safe = word == "-m" or (OVERRIDE.match(word) and not key.lstrip("+~").startswith("hydra"))
        if not safe or not word.isprintable() or "_target_" in word:
            return None
    return shlex.join(["clrun", *words])


def interval_points(interval: Sequence[float] | None, *, lowest: float = 0.0) -> tuple[float, float] | None:
    """Return an interval of fractions in points, cut where no value can be; None for None.

    Args:
        interval: its ends.
        lowest: the lowest value: 0 for accuracies, -100 for differences between them; the highest is 100.
    """
    if interval is None:
        return None
    low, high = (min(max(100 * value, lowest), 100.0) for value in interval)
    return low, high


def points(value: float | None, width: int = 0) -> str:
    """Return a fraction in points with one decimal, right-aligned; a dash for None."""
    return ("-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}").rjust(width)


def matrix_header(run: Mapping[str, Any]) -> str:
    """Return the lines above the rows of the accuracy matrix; `run` is the content of run.json at any time."""
    order = run["task_order"]
    if len(order) > WIDE:
        what, columns = (
            "the newest task, the mean of the older ones, and the worst",
            f"{'new':>7}{'old':>7}{'worst':>7} (task)",
        )
    else:
        what, columns = "each task (column) after learning a task (row)", _joined(order)
    title = f"{SETTINGS[run['setting']]} accuracy in points on {what}"
    return f"{title}\n{'learned':<{_label_width(run)}}{columns} | averages"


def matrix_row(run: Mapping[str, Any]) -> str:
    """Return the row of the accuracy matrix after the last learned task, and the average accuracy in every setting.

    The row has every cell for up to 10 tasks; beyond, it has the newest task, the mean of the older ones and the worst.
    """
    order, learned, width = run["task_order"], len(run["cost"]["tasks"]), _label_width(run)
    rows = {s: run["accuracy_matrix"][s][learned - 1] for s in settings_of(run["accuracy_matrix"])}
    label = _shortened(_labels(run)[learned - 1], width).ljust(width)
    averages = " | " + "  ".join(f"{s} {points(_mean(row[:learned]), 5)}" for s, row in rows.items())
    cells = rows[run["setting"]]
    if len(order) <= WIDE:
        return label + _joined(["" if value is None else points(value) for value in cells]) + averages
    known = [(value, task) for value, task in zip(cells[:learned], order, strict=False) if value is not None]
    worst, task = min(known, default=(None, "-"))
    new, old = points(cells[learned - 1], 7), points(_mean(cells[: learned - 1]), 7)
    return f"{label}{new}{old}{points(worst, 7)} {f'({task})':<6}{averages}"


def final_table(run: Mapping[str, Any]) -> str:
    """Return the table of the metrics of a finished run, one column per setting, and of its cost.

    Args:
        run: content of run.json.
    """
    settings = settings_of(run["metrics"])
    lines = [" " * 30 + "".join(f"{EVALUATED[setting]:>20}" for setting in settings)]
    for key, label in FINAL.items():
        values = [run["metrics"][setting].get(key) for setting in settings]
        if key in ("forward_transfer", "accuracy_at_5", *UNSEEN) and all(value is None for value in values):
            continue
        lines.append(f"{label:<30}" + "".join(points(value, 20) for value in values))
    lines += _held_out_lines(run)
    parameters, stored, seconds = cost_totals(run.get("cost") or {})
    lines.append(f"{'parameters':<30}{_count(parameters):>20}")
    lines.append(f"{'stored bytes':<30}{_count(stored):>20}")
    lines += _compression_lines(run)
    lines.append(f"{'training seconds':<30}{'-' if seconds is None else f'{seconds:.1f}':>20}")
    return "\n".join([*lines, *_tuning_lines(run)])


def network_bytes(cost: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the bytes of the backbone, dense and as its last compression stores it; None without compression."""
    for task in reversed(cost.get("tasks") or []):
        found = task.get("compression") or {}
        if "stored_bytes" in found:
            return found["dense_bytes"], found["stored_bytes"]
    return None


def _compression_lines(run: Mapping[str, Any]) -> list[str]:
    """Return the bytes of the compressed backbone and the accuracy just before its last compression."""
    cost = run.get("cost") or {}
    sizes = network_bytes(cost)
    if sizes is None:
        return []
    dense, stored = sizes
    before = next(t["compression"] for t in reversed(cost["tasks"]) if t.get("compression")).get("before") or {}
    settings = settings_of(run["metrics"])
    means = [_mean(list(before[setting].values())) if before.get(setting) else None for setting in settings]
    return [
        f"{'accuracy before compression':<30}" + "".join(points(value, 20) for value in means),
        f"{'bytes of the network, dense':<30}{_count(dense):>20}",
        f"{'compressed':<30}{_count(stored):>20}  ({stored / max(1, dense):.3f} of them)",
    ]


def _held_out_lines(run: Mapping[str, Any]) -> list[str]:
    """Return the accuracy on each data set of `job.eval_extra` before and after all tasks, and the loss."""
    counts = run.get("held_out") or []
    if len(counts) < 2:
        return []
    lines = []
    for name, (right, total) in counts[-1].items():
        first, _ = counts[0][name]
        values = points(first / total, 20) + points(right / total, 20)
        lines.append(f"{printable(f'{name}, before and after'):<30}{values}")
    return [*lines, f"{'zero-shot degradation':<30}{points(zero_shot_degradation(counts), 20)}"]


def _tuning_lines(run: Mapping[str, Any]) -> list[str]:
    """Return the hyper-parameters that `job.tuning` chose for each task, with accuracies on validation rows."""
    tasks, width = [cost for cost in (run.get("cost") or {}).get("tasks") or [] if "tuning" in cost], _label_width(run)
    lines = [
        "",
        "hyper-parameters chosen on validation rows; * accuracy not reached, options decay once more for the next task",
        f"{'':<{width}}{'lr':>8}{'finetuned':>11}{'wanted':>8}{'reached':>9}{'trainings':>11}{'seconds':>9}  options",
    ]
    for label, cost in zip(_labels(run), tasks, strict=False):
        first, second = cost["tuning"]["plasticity"], cost["tuning"]["stability"]
        line = f"{_shortened(label, width).ljust(width)}{first['lr']:>8g}{points(first['accuracy'], 11)}"
        attempts = second["attempts"] if second else []
        wanted = points(second["threshold"], 8) + points(attempts[-1]["accuracy"], 9) if second else f"{'-':>8}{'-':>9}"
        seconds = first["seconds"] + (second["seconds"] if second else 0.0)
        knobs = ", ".join(f"{name} {value:g}" for name, value in second["trained"].items()) if second else "none"
        mark = "" if not second or second["converged"] else " *"
        trainings = f"{len(first['grid'])}+{len(attempts)}"
        lines.append(f"{line}{wanted}{trainings:>11}{seconds:>9.1f}  {knobs}{mark}")
    return lines if tasks else []


def cost_totals(cost: Mapping[str, Any]) -> tuple[int | None, int | None, float | None]:
    """Return (parameters, bytes of state, training seconds) of a run, which may be unfinished; None where unknown."""
    tasks = cost.get("tasks") or [{}]
    parameters, stored = (cost.get(key) or tasks[-1].get(key) or {} for key in ("parameters", "state_bytes"))
    seconds = [task["train_seconds"] for task in tasks if task.get("train_seconds") is not None]
    return parameters.get("total"), stored.get("total"), sum(seconds) if seconds else None


@dataclass(frozen=True)
class Standing:
    """Results of one experiment group in one setting, as fractions; None where the runs do not determine them.

    Attributes:
        accuracy: mean over orders of the final average accuracy.
        sd: standard deviation of the accuracy over orders.
        aopd: mean over tasks of the range of a task's final accuracy over orders.
        mopd: largest range of a task.
        forgetting: mean forgetting over orders.
    """

    accuracy: float | None
    sd: float | None
    aopd: float | None
    mopd: float | None
    forgetting: float | None


@dataclass(frozen=True)
class Line:
    """One line of the comparison table.

    Attributes:
        label: method, and the choices in which it differs from other lines.
        standings: results by setting.
        orders: number of orders in the statistics.
        seeds: number of seeds of each order.
        missing: number of runs that failed, are unfinished or were never started.
        logme: mean LogME score of the frozen features; None for methods without them.
    """

    label: str
    standings: Mapping[str, Standing]
    orders: int
    seeds: int
    missing: int
    logme: float | None = None


BLOCK = 31  # width of the columns of one setting


def comparison_table(lines: Sequence[Line]) -> str:
    """Return the table of a sweep, best first, at most 100 characters wide; long labels are wrapped.

    Lines are sorted by class-incremental accuracy, else by domain- or task-incremental accuracy.
    """
    settings = [setting for setting in SETTINGS if any(setting in line.standings for line in lines)]
    missing, scored = any(line.missing for line in lines), any(line.logme is not None for line in lines)
    tail = 9 + (8 if missing else 0) + (8 if scored else 0)
    room = WIDTH - tail - len(settings) * (BLOCK + 2)
    labels = [textwrap.wrap(printable(line.label), room) or [""] for line in lines]
    width = max(len("method"), *(len(part) for label in labels for part in label))
    head = " " * width + "".join(f"  {f' {SETTINGS[setting]} ':-^{BLOCK}}" for setting in settings) + "   orders"
    names = f"  {'acc +- sd':>12} {'AOPD':>5} {'MOPD':>5} {'forget':>6}" * len(settings)
    table = [
        head,
        f"{'method':<{width}}{names}  x seeds" + ("   LogME" if scored else "") + (" missing" if missing else ""),
    ]
    ranked = sorted(zip(lines, labels, strict=True), key=lambda pair: _rank(pair[0]))
    for line, label in ranked:
        blocks = "".join("  " + _block(line.standings.get(setting)) for setting in settings)
        runs = f"{line.orders} x {line.seeds}"
        score = (f" {line.logme:7.3f}" if line.logme is not None else " " * 8) if scored else ""
        lacking = f" {line.missing or '':>7}" if missing else ""
        table.append(f"{label[0]:<{width}}{blocks} {runs:>8}{score}{lacking}".rstrip())
        table += label[1:]
    table.append("acc: final average accuracy in points; sd: standard deviation over orders (seeds averaged first).")
    table.append("AOPD, MOPD: mean and largest range of a task's final accuracy over the orders; lower is better.")
    if scored:
        table.append("LogME: log evidence per training row of a linear model on the frozen features; higher is better;")
        table.append("comparable for the same rows and labels only.")
    return "\n".join(table)


def listing(title: str, entries: Sequence[tuple[str, str]]) -> str:
    """Return a list of (folder, reason) with a title; each reason is wrapped below its folder."""
    lines = [f"{title} ({len(entries)}):"]
    for folder, reason in entries[:LISTED]:
        lines.append(f"  {printable(folder)}")
        lines += textwrap.wrap(
            printable(reason), WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4, max_lines=3, placeholder=" ..."
        )
    if len(entries) > LISTED:
        lines.append(f"  and {len(entries) - LISTED} more")
    return "\n".join(lines)


def _block(standing: Standing | None) -> str:
    """Return the columns of one setting."""
    if standing is None:
        return " " * BLOCK
    spread = " " * 7 if standing.sd is None else f" +-{points(standing.sd, 4)}"
    rest = f"{points(standing.aopd, 5)} {points(standing.mopd, 5)} {points(standing.forgetting, 6)}"
    return f"{points(standing.accuracy, 5)}{spread} {rest}"


def _rank(line: Line) -> tuple[bool, float, str]:
    """Return a sort key: the best line first, lines without accuracy last."""
    for setting in ("cil", "dil", "til"):
        standing = line.standings.get(setting)
        if standing is not None and standing.accuracy is not None:
            return False, -standing.accuracy, line.label
    return True, 0.0, line.label


def _joined(cells: Sequence[Any]) -> str:
    return "".join(f"{cell:>6}" for cell in cells)


def _labels(run: Mapping[str, Any]) -> list[str]:
    """Return the label of the row at each position: number of learned tasks, task id and name."""
    order, names = run["task_order"], run["task_names"]
    tasks = [f"{i}" if str(i) == name else f"{i}: {printable(str(name))}" for i, name in zip(order, names, strict=True)]
    return [f"{count}/{len(order)} task {task}" for count, task in enumerate(tasks, start=1)]


def _label_width(run: Mapping[str, Any]) -> int:
    """Return the width of the row labels: that of the longest one, limited by the width of the table."""
    cells = 28 if len(run["task_order"]) > WIDE else 6 * len(run["task_order"])
    return min(max(map(len, _labels(run))), WIDTH - AVERAGES - cells)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None without values or when one is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
