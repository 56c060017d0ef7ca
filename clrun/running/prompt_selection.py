"""How often each prompt or component is chosen for the images of each task; shows when few of them are ever used."""

from typing import Any

import torch

from clrun.data.stream import Stream
from clrun.learning.method import Method
from clrun.running.evaluation import Evaluation


def selection_counts(method: Method, stream: Stream, evaluation: Evaluation) -> dict[str, Any]:
    """Return {"selection": {...}} for run.json, or {} for a method that chooses no components.

    `counts` is [T, M]: for the evaluated rows of each task, by position, how often each component was chosen; `used` is
    the number of components ever chosen, `entropy` the entropy of all choices relative to an even spread (0 to 1).
    """
    method.eval()
    counts: list[list[int]] = []
    with torch.inference_mode():
        for task in stream.tasks:
            total = None
            for batch in evaluation.rows(task).batches(evaluation.batch_size):
                chosen = method.choices(batch.x)
                if chosen is None:
                    return {}
                total = chosen.sum(dim=0) if total is None else total + chosen.sum(dim=0)
            counts.append([] if total is None else total.tolist())
    if any(not row for row in counts):
        return {}
    columns = torch.tensor(counts).sum(dim=0).double()
    share = columns[columns > 0] / columns.sum()
    even = torch.tensor(float(max(2, len(columns)))).log()
    entropy = float(-(share * share.log()).sum() / even)
    return {"selection": {"counts": counts, "used": int((columns > 0).sum()), "entropy": abs(entropy)}}
