"""method_comparison.json: the methods of a sweep compared on the same orders and seeds.

Groups are compared when their data set, the data that they have seen and their scenario are equal. Two methods are
compared on the (order, seed) pairs that both have completed, and the ranking of all methods uses the pairs that all of
them have completed. Seeds of an order are averaged first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from clrun.reporting.collect import Run
from clrun.reporting.groups import Group, Pair, at_or_below, labels
from clrun.reporting.tables import SETTINGS
from clrun.results.comparison import caveats, holm, paired, ranking
from clrun.results.identity import config_hash
from clrun.results.metrics import Floats

COMPARED_WITHIN = ("dataset", "scenario")  # keys that must be equal for a comparison


def compare(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return one entry for each data set, scenario and setting in which at least two groups can be compared."""
    names = dict(zip(map(id, groups), labels(groups), strict=True))
    comparable: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        if group.searched:
            continue  # its orders were chosen because they are bad for this one method
        config = group.runs[0].config
        shared = config_hash({key: value for key, value in config.items() if at_or_below(key, COMPARED_WITHIN)})
        comparable.setdefault((shared, group.data), []).append(group)
    entries = []
    for members in comparable.values():
        for setting in SETTINGS:
            runs = {names[id(group)]: complete for group in members if (complete := group.complete(setting))}
            if len(runs) > 1:
                entries.append(_entry(members[0].triple[2], setting, runs))
    return entries


def _entry(dataset: str, setting: str, runs: Mapping[str, Mapping[Pair, Run]]) -> dict[str, Any]:
    pairs = []
    for a, b in combinations(runs, 2):
        orders, values = _shared(setting, [runs[a], runs[b]])
        if orders:
            pairs.append({"a": a, "b": b, **asdict(paired(values[:, 0], values[:, 1]))})
    for pair, adjusted in zip(pairs, holm([pair["p_wilcoxon"] for pair in pairs]), strict=True):
        pair["p_holm"] = adjusted
    orders, values = _shared(setting, list(runs.values()))
    found = asdict(ranking(values)) if len(orders) > 1 else {}
    return {
        "dataset": dataset,
        "setting": setting,
        "methods": list(runs),
        "n_orders": len(orders),
        "orders": orders,
        "kendall_w": found.get("kendall_w"),
        "p_friedman": found.get("p_friedman"),
        "mean_ranks": found.get("mean_ranks"),
        "critical_difference": found.get("critical_difference"),
        "caveats": caveats([pair["n"] for pair in pairs]) if pairs else [],
        "pairs": pairs,
    }


def _shared(setting: str, runs: Sequence[Mapping[Pair, Run]]) -> tuple[list[tuple[int, ...]], Floats]:
    """Return the orders that all have with the same seeds, and the accuracies [orders, methods] averaged over seeds."""
    common = sorted(set(runs[0]).intersection(*runs[1:]))
    orders = sorted({order for order, _ in common})
    values = np.empty((len(orders), len(runs)))
    for r, order in enumerate(orders):
        seeds = [seed for o, seed in common if o == order]
        for k, of in enumerate(runs):
            values[r, k] = np.mean([_average(of[order, seed], setting) for seed in seeds])
    return orders, values


def _average(run: Run, setting: str) -> float:
    finals = run.finals[setting]
    return sum(finals[task] for task in sorted(finals)) / len(finals)
