"""`task_order=adversarial`: searches for the worst order; each order is a run in a folder below that of the search.

order_search.json records the search: every order tried, its accuracy, the order it was made from, and whether it was
run or reused from an earlier run.
"""

import math
import shlex
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clrun.config.compose import slug
from clrun.config.environment import digests
from clrun.config.job import JobInfo
from clrun.data.identity import identify
from clrun.data.order_search import Order, OrderSearch, Proposal
from clrun.data.orders import canonical
from clrun.data.split import Plain
from clrun.data.stream import Stream
from clrun.reporting import refresh
from clrun.reporting.collect import Run, collect
from clrun.reporting.groups import at_or_below
from clrun.reporting.searches import RECORD, SCHEMA, read_search
from clrun.results.data_record import data_changes
from clrun.results.identity import config_hash, flatten, with_digests
from clrun.results.records import RunFolder
from clrun.running.build import build_stream
from clrun.running.parts import Config, Parts, options_of
from clrun.system.errors import ConfigError
from clrun.system.files import json_text, make_folder, replace_text
from clrun.system.processes import under_torchrun

RunOrder = Callable[[Parts, Path, JobInfo], float]
HIDDEN = ("task_order.budget",)  # options that may change when a search is continued


def search_worst_order(parts: Parts, out: Path, job: JobInfo, *, run: RunOrder) -> float:
    """Search in the folder `out`, or continue the search that is there; write the record, then tables and report.html.

    The search goes on when a run fails, whose order then has no accuracy; it ends when the first run fails.

    Args:
        parts: of the configuration; its task order is `clrun.data.order_search.adversarial`.
        out: the folder of the search.
        job: how the search was started.
        run: runs one configuration in one folder and returns its final average accuracy.

    Returns:
        The lowest accuracy found; NaN when no run has one.

    Raises:
        ConfigError: a mistake of the user.
        Exception: the first error that ended a run, after the search.
    """
    if under_torchrun():
        raise ConfigError("task_order=adversarial: starts many runs; set hardware.processes instead of using torchrun")
    if parts.job.max_tasks is not None:
        raise ConfigError("job.max_tasks: with a limit, orders would differ in the learned tasks; set it to null")
    dataset = parts.load_dataset()
    stream = build_stream(parts, dataset, canonical, Plain())
    data = identify(dataset, stream).record
    del dataset
    folder = RunFolder(out)
    stored = read_search(out / RECORD) if parts.job.resume and (out / RECORD).exists() else None
    if stored is not None and stored["config_hash"] != _hash(parts.config, HIDDEN):
        raise ConfigError(f"{out}: holds a search with another configuration; choose another hydra.run.dir")
    if stored is not None and (earlier := stored.get("data")) and (changes := data_changes(earlier, data)):
        raise ConfigError(
            f"{out}: the data are no longer those of this search: {changes.text}; put them back, or choose another "
            "hydra.run.dir to begin a search with the data as they are"
        )
    with folder.locked():
        searcher = _Searcher(parts, out, job, stream, run, data)
        try:
            searcher.search(stored)
        finally:
            text = refresh(out).text
    if parts.job.progress:
        print(f"\n{text}\n\nresults: {out}")
    if searcher.error is not None:
        raise searcher.error
    return searcher.lowest()


class _Searcher:
    """Runs the orders that the search proposes and writes its record."""

    def __init__(
        self, parts: Parts, out: Path, job: JobInfo, stream: Stream, run: RunOrder, data: dict[str, Any]
    ) -> None:
        self.parts, self.out, self.job, self.run, self.setting = parts, out, job, run, stream.setting
        self.options = options_of(parts.task_order)
        self.numbers: dict[Order, int] = {}
        self.error: Exception | None = None
        self.state = OrderSearch(
            len(stream.tasks), **{key: self.options[key] for key in ("starts", "patience", "seed")}
        )
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "name": (job.recorded or parts.config)["name"],
            "choices": job.choices,
            "config_hash": _hash(parts.config, HIDDEN),
            "command": shlex.join(["clrun", *job.overrides]),
            "again": self._again(),
            "setting": self.setting,
            "seed": parts.seed,
            "n_tasks": len(stream.tasks),
            "data": data,
            "budget": self.options["budget"],
            "started": 0,
            "status": "running",
            "worst": None,
            "trials": [],
        }

    def search(self, stored: Config | None) -> None:
        """Take over the accuracies of earlier runs, then run orders until the budget is spent or all are tried."""
        earlier = self._earlier() if stored is None else [t for t in stored["trials"] if t["source"] == "earlier run"]
        for trial in earlier:
            self._note(trial | {"order": tuple(trial["order"])})
            self.state.add_known(tuple(trial["order"]), _number(trial["accuracy"]))
        self._write()
        self._say(f"search for the worst order of {self.record['n_tasks']} tasks: {self.options['budget']} runs")
        while self.record["started"] < self.options["budget"] and (proposal := self.state.propose()):
            self._try(proposal)
        done = self.record["started"] < self.options["budget"]
        self.record["status"] = "every order tried" if done else "budget spent"
        self._write()

    def lowest(self) -> float:
        """Return the lowest accuracy so far; NaN without one."""
        worst = self.state.worst()
        return math.nan if worst is None else self.state.accuracies[worst]

    def _try(self, proposal: Proposal) -> None:
        tasks = list(proposal.order)
        folder = self.out / "orders" / slug([f"tasks={tasks}"])
        make_folder(folder, below=self.out)
        order = {"_target_": "clrun.data.orders.listed", "_partial_": True, "tasks": tasks}
        whole = self.parts.config
        changes = {"task_order": order, "job": {**whole["job"], "progress": False}}
        parts = Parts({**whole, **changes})
        written = None if self.job.recorded is None else {**self.job.recorded, **changes}
        overrides = [o for o in self.job.overrides if not o.startswith("task_order")]
        overrides += ["task_order=listed", f"task_order.tasks=[{','.join(map(str, tasks))}]"]
        status, accuracy = "completed", math.nan
        try:
            accuracy = _rounded(
                self.run(parts, folder, replace(self.job, overrides=overrides, hydra={}, recorded=written))
            )
        except ConfigError:
            raise
        except Exception as error:
            if self.state.worst() is None:
                raise  # this configuration fails in any order
            traceback.print_exc()
            status, self.error = "failed", self.error or error
        parent = None if proposal.parent is None else self.numbers[proposal.parent]
        self.state.add_result(proposal, accuracy)
        self.record["started"] += 1
        self._note(
            {
                "order": proposal.order,
                "accuracy": accuracy,
                "source": proposal.source,
                "parent": parent,
                "move": proposal.move,
                "reused": False,
                "status": status,
                "folder": folder.relative_to(self.out).as_posix(),
            }
        )
        self._write()
        trial = self.record["trials"][-1]
        came = f"{trial['move']} in #{parent}" if parent else trial["source"]
        shown = "failed" if math.isnan(accuracy) else f"{100 * accuracy:.1f}"
        worst = f"worst {100 * self.lowest():.1f}"
        count = f"{self.record['started']}/{self.options['budget']}"
        self._say(f"{count:>7}  #{trial['number']:<4} {shown:>6}  ({worst})  {' '.join(map(str, tasks))}  {came}")

    def _note(self, trial: dict[str, Any]) -> None:
        number = len(self.record["trials"]) + 1
        self.numbers[trial["order"]] = number
        self.record["trials"].append({"number": number, **trial})

    def _write(self) -> None:
        worst = self.state.worst()
        if worst is not None:
            accuracy = self.state.accuracies[worst]
            self.record["worst"] = {"number": self.numbers[worst], "order": worst, "accuracy": accuracy}
        replace_text(self.out / RECORD, json_text(self.record, indent=1))

    def _earlier(self) -> list[dict[str, Any]]:
        """Return completed runs of the same configuration in any task order as trials; one run per order.

        Runs on other data are left out. One that does not record its data counts as one on these.
        """
        written = self.job.recorded or self.parts.config
        own = _hash(with_digests(written, digests(written, self.parts.config)), ("task_order",))
        found = dict[Order, dict[str, Any]]()
        runs = collect([Path(folder) for folder in self.options["reuse"]])[0]
        for run in sorted(runs, key=lambda one: str(one.folder)):
            accuracy = run.metrics.get(self.setting, {}).get("average_accuracy")
            if accuracy is not None and self._is_comparable(run, own):
                trial = {"order": run.order, "accuracy": _rounded(accuracy), "source": "earlier run"}
                trial |= {"parent": None, "move": "", "reused": True, "status": "completed", "folder": str(run.folder)}
                found.setdefault(run.order, trial)
        return list(found.values())

    def _is_comparable(self, run: Run, own: str) -> bool:
        complete = run.status == "completed" and len(run.order) == self.state.n_tasks
        if not complete or _hash(run.config, ("task_order",)) != own:
            return False
        if run.data in ("", self.record["data"]["digest"]):
            return True
        self._say(f"not reused, because its data were others: {run.folder}")
        return False

    def _again(self) -> str:
        """Return the command that repeats an order with other seeds; the order itself is to be added."""
        words = [o for o in self.job.overrides if not o.startswith(("task_order", "seed=", "hydra."))]
        return shlex.join(["clrun", "-m", *words, "seed=range(1,6)", "task_order=listed"])

    def _say(self, line: str) -> None:
        if self.parts.job.progress:
            print(line, flush=True)


def _hash(config: Config, without: tuple[str, ...]) -> str:
    """Return the hash of a configuration, flattened or not, without some keys."""
    return config_hash({key: value for key, value in flatten(config).items() if not at_or_below(key, without)})


def _rounded(accuracy: float) -> float:
    """Return a mean over tasks rounded to 12 digits, so that the order of its sum does not matter."""
    return round(accuracy, 12)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
