"""Text tables: of a run while it lives, of its end, and of a sweep. Accuracies are printed in points (100 = all right).

Everything printed is ASCII of ours; names that come from elsewhere go through `printable`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 100
LISTED = 20  # entries of a list that are shown
WIDE = 10  # tasks up to which a matrix row shows every cell
AVERAGES = 24  # characters of the averages of two settings
SETTINGS = {"cil": "class-incremental", "til": "task-incremental", "dil": "domain-incremental"}
FINAL = {
    "average_accuracy": "average accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "learning_accuracy": "learning accuracy",
    "worst_task": "worst task",
}


def settings_of(present: Mapping[str, Any]) -> list[str]:
    """Return the settings among the keys of `present`, class-incremental first."""
    return [setting for setting in SETTINGS if setting in present]


def printable(text: str) -> str:
    """Return `text` on one line, control characters (a terminal would obey them) written as escapes."""
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)


def points(value: float | None, width: int = 0) -> str:
    """Return a fraction in points with one decimal, right-aligned; a dash for None."""
    return ("-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}").rjust(width)


def matrix_header(run: Mapping[str, Any]) -> str:
    """Return the lines above the rows of the accuracy matrix; `run` is the content of run.json, at any stage."""
    order = run["task_order"]
    if len(order) > WIDE:
        what, columns = "the task just learned, those before it, the worst", f"{'new':>7}{'old':>7}{'worst':>7} (task)"
    else:
        what, columns = "each task, after learning a task", _joined(order)
    title = f"{SETTINGS[run['setting']]} accuracy in points on {what}"
    return f"{title}\n{'learned':<{_label_width(run)}}{columns} | averages"


def matrix_row(run: Mapping[str, Any]) -> str:
    """Return the row of the accuracy matrix after the task learned last, in the run's setting, and all averages.

    Every cell up to 10 tasks; beyond, the new task, the mean of the old ones and the worst.
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
    """Return the metrics of a finished run, a column a setting, and what it cost; `run` is the content of run.json."""
    settings = settings_of(run["metrics"])
    lines = [" " * 30 + "".join(f"{SETTINGS[setting]:>20}" for setting in settings)]
    for key, label in FINAL.items():
        values = [run["metrics"][setting].get(key) for setting in settings]
        if key == "forward_transfer" and all(value is None for value in values):
            continue
        lines.append(f"{label:<30}" + "".join(points(value, 20) for value in values))
    parameters, stored, seconds = cost_totals(run.get("cost") or {})
    lines.append(f"{'parameters':<30}{_count(parameters):>20}")
    lines.append(f"{'stored bytes':<30}{_count(stored):>20}")
    lines.append(f"{'train seconds':<30}{'-' if seconds is None else f'{seconds:.1f}':>20}")
    return "\n".join([*lines, *_tuning_lines(run)])


def _tuning_lines(run: Mapping[str, Any]) -> list[str]:
    """Return what `job.tuning` chose for each task, accuracies on validation rows; nothing without it."""
    tasks, width = [cost for cost in (run.get("cost") or {}).get("tasks") or [] if "tuning" in cost], _label_width(run)
    lines = [
        "",
        "hyper-parameters chosen on validation rows; * accuracy not reached, knobs decayed once more for the next task",
        f"{'':<{width}}{'lr':>8}{'finetuned':>11}{'wanted':>8}{'reached':>9}{'trainings':>11}{'seconds':>9}  knobs",
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
    """Return (parameters, bytes of state, seconds of training) of a run, unfinished ones included."""
    tasks = cost.get("tasks") or [{}]
    parameters, stored = (cost.get(key) or tasks[-1].get(key) or {} for key in ("parameters", "state_bytes"))
    seconds = [task["train_seconds"] for task in tasks if task.get("train_seconds") is not None]
    return parameters.get("total"), stored.get("total"), sum(seconds) if seconds else None


@dataclass(frozen=True)
class Standing:
    """How one experiment group did in one setting, in fractions; None where that cannot be said.

    Attributes:
        accuracy: mean over orders of the final average accuracy.
        sd: its standard deviation over orders.
        aopd: mean range over orders of a task's final accuracy.
        mopd: largest range.
        forgetting: mean over orders.
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
        label: method, and what else tells the line from the others.
        standings: by setting.
        orders: orders counted.
        seeds: seeds of each order.
        missing: runs that should have counted and do not.
        logme: mean score of the frozen features; None for learners without.
    """

    label: str
    standings: Mapping[str, Standing]
    orders: int
    seeds: int
    missing: int
    logme: float | None = None


BLOCK = 31  # characters of the columns of one setting


def comparison_table(lines: Sequence[Line]) -> str:
    """Return the table of a sweep, best first (class-incremental, else domain-, else task-incremental accuracy).

    At most 100 columns wide; long labels are wrapped.
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
        lack = f" {line.missing or '':>7}" if missing else ""
        table.append(f"{label[0]:<{width}}{blocks} {runs:>8}{score}{lack}".rstrip())
        table += label[1:]
    table.append("acc: final average accuracy in points, mean and sd over orders (seeds averaged first, ddof 1).")
    table.append("AOPD, MOPD: mean and largest range of a task's final accuracy over the orders; lower is better.")
    if scored:
        table.append(
            "LogME: log evidence per training image of a linear model on the frozen features; higher is better,"
        )
        table.append("comparable for the same images and labels.")
    return "\n".join(table)


def listing(title: str, entries: Sequence[tuple[str, str]]) -> str:
    """Return a titled list of (folder, reason), reasons wrapped under their folders."""
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
    """Return a key that sorts the best line first and lines without accuracy last."""
    for setting in ("cil", "dil", "til"):
        standing = line.standings.get(setting)
        if standing is not None and standing.accuracy is not None:
            return False, -standing.accuracy, line.label
    return True, 0.0, line.label


def _joined(cells: Sequence[Any]) -> str:
    return "".join(f"{cell:>6}" for cell in cells)


def _labels(run: Mapping[str, Any]) -> list[str]:
    """Return count, id and name of the task at each position."""
    order, names = run["task_order"], run["task_names"]
    tasks = [f"{i}" if str(i) == name else f"{i}: {printable(str(name))}" for i, name in zip(order, names, strict=True)]
    return [f"{count}/{len(order)} task {task}" for count, task in enumerate(tasks, start=1)]


def _label_width(run: Mapping[str, Any]) -> int:
    """Return the width of the longest label of a matrix row, as far as there is room."""
    cells = 28 if len(run["task_order"]) > WIDE else 6 * len(run["task_order"])
    return min(max(map(len, _labels(run))), WIDTH - AVERAGES - cells)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None for no values or a missing one."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
