"""Experiment groups: runs whose configurations differ in seed, task order and keys that cannot change a result only.

The runs of a group have seen the same data (`clrun.reporting.data_groups`). Within a group orders and seeds vary;
statistics compare results on the same task id.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clrun.reporting.collect import Run
from clrun.reporting.data_groups import DataOfRuns
from clrun.reporting.tables import SETTINGS
from clrun.results import order_effects, robustness
from clrun.results.identity import config_hash, inside_hash
from clrun.results.metrics import Floats

WITHIN_GROUP = ("seed", "task_order", "name")  # may differ inside a group, as may the keys that cannot change a result
SEARCHED = (
    "orders were chosen by a search for the worst one: mean, standard deviation, interval and AOPD describe this "
    "search and not random orders."
)
Pair = tuple[tuple[int, ...], int]  # (order, seed)


def group_key(config: Mapping[str, object]) -> str:
    """Return the hash (8 hex digits) of a flattened configuration without the keys that may differ inside a group."""
    return config_hash({key: value for key, value in config.items() if not at_or_below(key, WITHIN_GROUP)})[:8]


@dataclass(frozen=True)
class Group:
    """The runs of one experiment.

    Attributes:
        key: hash of the configuration that they share.
        differing: keys and values that distinguish the group from others of the same method, backbone and data set.
        runs: the runs of the group.
        data: digest of the data that they have seen; "" when unknown.
    """

    key: str
    differing: Mapping[str, object]
    runs: list[Run]
    data: str = ""

    @property
    def triple(self) -> tuple[str, str, str]:
        """Return (method, backbone, dataset)."""
        return self.runs[0].method, self.runs[0].backbone, self.runs[0].dataset

    @property
    def searched(self) -> bool:
        """Return whether a search for the worst order chose the orders of the group."""
        return self.runs[0].searched

    @property
    def title(self) -> str:
        """Return the hash and the differing keys."""
        return " ".join([self.key, *(f"{key}={as_typed(value)}" for key, value in self.differing.items())])

    @property
    def settings(self) -> list[str]:
        """Return the settings in which its runs were evaluated; the configured one when none was."""
        configured = self.runs[0].config.get("scenario.setting")
        present = [setting for setting in SETTINGS if any(setting in run.finals for run in self.runs)]
        return present or [setting for setting in SETTINGS if setting == configured]

    @property
    def logme(self) -> float | None:
        """Return the mean LogME score of the frozen features over the runs that have one; None without any."""
        known = [run.logme for run in self.runs if run.logme is not None]
        return sum(known) / len(known) if known else None

    def complete(self, setting: str) -> dict[Pair, Run]:
        """Return the completed runs with all final accuracies in `setting` by (order, seed), without duplicates."""
        counted: dict[Pair, Run] = {}
        for run in self.runs:
            if run.status == "completed" and setting in run.finals:
                counted.setdefault((run.order, run.seed), run)
        return counted

    def missing(self, setting: str) -> list[dict[str, Any]]:
        """Return the runs excluded from the statistics, then the (order, seed) pairs without a run.

        When more than half of all combinations of orders and seeds were tried, the others count as missing. Otherwise
        each order is assumed to have its own seeds, and no combination is missing.
        """
        counted = self.complete(setting)
        missing = []
        for run in self.runs:
            if (run.order, run.seed) not in counted:
                reason = (
                    run.status
                    if run.status != "completed"
                    else f"some tasks were not evaluated in the setting {setting}"
                )
                missing.append({"order": list(run.order), "seed": run.seed, "reason": reason, "folder": run.label})
        tried = {(run.order, run.seed) for run in self.runs if run.order}
        orders, seeds = sorted({order for order, _ in tried}), sorted({seed for _, seed in tried})
        if 2 * len(tried) > len(orders) * len(seeds):
            absent = [(o, s) for o in orders for s in seeds if (o, s) not in tried]
            missing += [{"order": list(o), "seed": s, "reason": "no run", "folder": None} for o, s in absent]
        return missing

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries of the group in order_robustness.json, one per setting."""
        return [self._entry(setting) for setting in self.settings]

    def _entry(self, setting: str) -> dict[str, Any]:
        orders, tasks, finals = self.finals(setting)
        method, backbone, dataset = self.triple
        disparity = robustness.opd(finals) if tasks else None
        worst = robustness.worst_order(finals)
        return {
            "method": method,
            "backbone": backbone,
            "dataset": dataset,
            "group": self.title,
            "setting": setting,
            "opd": None if disparity is None else dict(zip(map(str, tasks), disparity.tolist(), strict=True)),
            "aopd": robustness.aopd(finals) if tasks else None,
            "mopd": robustness.mopd(finals) if tasks else None,
            "mean": robustness.mean(finals),
            "sd": robustness.sd(finals),
            "ci95": robustness.ci95(finals),
            "worst_order": None if worst is None else orders[worst],
            "n_orders": len(orders),
            "n_seeds": finals.shape[1],
            "orders": orders,
            "missing": self.missing(setting),
            **_further(orders, tasks, finals),
            **({"caveats": [SEARCHED[0].upper() + SEARCHED[1:]]} if self.searched else {}),
        }

    def finals(self, setting: str) -> tuple[list[tuple[int, ...]], list[int], Floats]:
        """Return (orders, task ids, finals [R, S, T]) of the completed runs; see `complete`."""
        return finals_of(self.complete(setting), setting)

    def forgetting(self, setting: str) -> float | None:
        """Return the mean forgetting over orders (seeds averaged first); None when a run has none."""
        by_order: dict[tuple[int, ...], list[float]] = {}
        for (order, _), run in self.complete(setting).items():
            value = run.metrics[setting]["forgetting"]
            by_order.setdefault(order, []).append(math.nan if value is None else value)
        value = float(np.mean([np.mean(values) for values in by_order.values()])) if by_order else math.nan
        return None if math.isnan(value) else value


def _further(orders: list[tuple[int, ...]], tasks: list[int], finals: Floats) -> dict[str, Any]:
    """Return the keys of order_robustness.json that come from `clrun.results.order_effects`."""
    means = robustness.order_means(finals)
    spread, counted = robustness.sd(finals), int((~np.isnan(means)).sum())
    best = None if np.isnan(means).all() else int(np.nanargmax(means))
    per_task = finals if tasks else finals[:, :, :0]
    cell = order_effects.worst_cell(finals) if tasks else None
    bottom = order_effects.floor(finals) if tasks else None
    parts, task_parts = order_effects.accuracy_components(finals), order_effects.task_components(per_task)
    position = order_effects.position_effect(finals, orders) if tasks else None
    return {
        "order_means": means,
        "sd_ci95": None if spread is None else order_effects.sd_interval(spread, counted),
        "ci95_bootstrap": order_effects.bootstrap_interval(finals),
        "best_order": None if best is None else orders[best],
        "worst_order_mean": None if best is None else np.nanmin(means),
        "best_order_mean": None if best is None else np.nanmax(means),
        "worst_cell": cell and {"accuracy": cell[0], "order": orders[cell[1]], "task": tasks[cell[2]]},
        "task_sd": order_effects.task_sd(finals) if tasks else None,
        "aopd_normalised": order_effects.normalised_aopd(finals) if tasks else None,
        "aopd_floor": bottom and bottom.aopd,
        "aopd_floor_source": bottom and ("groups of seeds" if bottom.measured else "spread of seeds"),
        "order_effect": bottom and bottom.effect,
        "order_variance": parts and parts.order,
        "seed_variance": parts and parts.seed,
        "order_share": parts and parts.order_share,
        "task_order_variance": task_parts and task_parts.order,
        "task_seed_variance": task_parts and task_parts.seed,
        "task_order_share": task_parts and task_parts.order_share,
        "position_effect": position and asdict(position),
        "caveats": order_effects.caveats(finals),
    }


def finals_of(complete: Mapping[Pair, Run], setting: str) -> tuple[list[tuple[int, ...]], list[int], Floats]:
    """Return (orders, task ids, finals [R, S, T]) for `clrun.results.robustness`; S is the most seeds of any order.

    Orders that cover different tasks (`job.max_tasks`) have no disparity of a task: there are no ids then, and finals
    is [R, S, 1], the average accuracy.
    """
    orders = sorted({order for order, _ in complete})
    tasks = sorted(orders[0]) if orders else []
    same = all(sorted(order) == tasks for order in orders)
    seeds: dict[tuple[int, ...], list[int]] = {order: [] for order in orders}
    for order, seed in sorted(complete):
        seeds[order].append(seed)
    finals = np.full((len(orders), max(map(len, seeds.values()), default=0), len(tasks) if same else 1), np.nan)
    for r, order in enumerate(orders):
        for s, seed in enumerate(seeds[order]):
            values = complete[order, seed].finals[setting]
            finals[r, s] = [values[task] for task in tasks] if same else np.mean(list(values.values()))
    return orders, tasks if same else [], finals


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Sort runs into experiment groups, in order of first appearance.

    Runs whose order was chosen by a search for the worst one form groups of their own, and so do runs on other data and
    those that went on from another run with another length of the budget (`job.start_from`).
    """
    members: dict[tuple[str, ...], list[Run]] = {}
    data = DataOfRuns(runs)
    for run in runs:
        chosen = "searched" if run.searched else ""
        shared = (run.method, run.backbone, run.dataset, group_key(run.config), chosen, data.of(run), run.start)
        members.setdefault(shared, []).append(run)
    alike: dict[tuple[str, ...], list[Mapping[str, object]]] = {}
    for key, group in members.items():
        alike.setdefault(key[:3], []).append(group[0].config)
    names = {key: differing(configs, WITHIN_GROUP) for key, configs in alike.items()}
    groups = []
    for key, group in members.items():
        values = {name: group[0].config.get(name) for name in names[key[:3]]}
        values |= {"orders": key[4]} if key[4] else {}
        values |= {"start": key[6]} if key[6] else {}
        values |= {"data": label} if (label := data.label(group[0])) else {}
        groups.append(Group(key[3], values, group, key[5]))
    return groups


def labels(groups: Sequence[Group]) -> list[str]:
    """Return a short name of each group: its method and the choices in which the groups differ."""
    varies = [len({group.triple[part] for group in groups}) > 1 for part in (1, 2)]
    found = []
    for group in groups:
        names = [group.triple[0], *(name for name, shown in zip(group.triple[1:], varies, strict=True) if shown)]
        names += _choices(group.differing)
        found.append(" ".join(names))
    return found


def _choices(differing: Mapping[str, object]) -> Iterator[str]:
    """Yield "option=value" for each differing option; where the class differs, its name and the options that it has."""
    for key, value in differing.items():
        node, _, last = key.rpartition(".")
        if last == "_target_":
            yield f"{node}={str(value).rpartition('.')[2]}"
        elif value is not None or f"{node}._target_" not in differing:
            yield f"{last_part(key, differing)}={as_typed(value)}"


def as_typed(value: object) -> str:
    """Return a value of a configuration as it is typed on the command line: null, true, false."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def differing(configs: Sequence[Mapping[str, object]], without: Iterable[str]) -> list[str]:
    """Return the keys that can change a result and in which flattened configurations differ, sorted.

    A key that is absent in some of them differs. Keys at or below one of `without` are left out.
    """
    first, absent = configs[0] if configs else {}, object()
    keys: set[str] = set()
    for config in configs[1:]:
        keys |= {key for key in first.keys() | config.keys() if first.get(key, absent) != config.get(key, absent)}
    return sorted(key for key in keys if inside_hash(key) and not at_or_below(key, without))


def at_or_below(key: str, prefixes: Iterable[str]) -> bool:
    """Return whether a dotted key is one of `prefixes` or below one of them."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def last_part(key: str, others: Iterable[str]) -> str:
    """Return the last part of a dotted key, or the whole key when another one has the same last part."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in others) == 1 else key
