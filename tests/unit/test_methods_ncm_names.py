"""The nearest mean of names and rows, against scores computed by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import born, factory, image_stream, live
from torch import Tensor

from clrun.data.captions import captions
from clrun.learning.method import Method
from clrun.learning.names import caption_features, class_text

OPTIONS: dict[str, Any] = {"weight": 1.0, "forget_tasks": [], "keep_task_statistics": False}


def expected(method: Method, stream: Any, weight: float, tasks: int) -> Tensor:
    """The prototypes [C, d] after some tasks, from names and rows one by one."""
    texts = caption_features(method.backbone, stream.captions, range(6))
    found = torch.zeros(6, method.width)
    for task in stream.tasks[:tasks]:
        for label in task.classes.tolist():
            rows = [batch.x[batch.y == label] for batch in task.train.batches(64)]
            units = F.normalize(method.backbone.joint.project(torch.cat(rows)), dim=1)
            found[label] = (weight * class_text(texts[label]) + units.sum(dim=0)) / (weight + len(units))
    return found.detach()


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_prototypes_are_means_of_names_and_rows(weight: float) -> None:
    method, stream = born(factory("ncm_names", weight=weight), image_stream())
    live(method, stream, until=2)
    prototypes = expected(method, stream, weight, 2)
    torch.testing.assert_close(method.head.prototypes, prototypes, rtol=1e-5, atol=1e-6)
    x = next(stream.tasks[0].test.batches(8)).x
    units = F.normalize(method.backbone.joint.project(x), dim=1)
    torch.testing.assert_close(method(x), units @ F.normalize(prototypes, dim=1).T, rtol=1e-4, atol=1e-5)
    assert not method(x)[:, 4:].any(), "the names of classes to come do not count yet"


def test_classes_without_rows_score_as_zero_shot_does() -> None:
    method, stream = born(factory("ncm_names"), image_stream())
    zero_shot, _ = born(factory("zero_shot"), image_stream())
    x = next(stream.tasks[0].test.batches(8)).x
    live(method, stream, until=1)
    for other in (method, zero_shot):
        other.meet(torch.arange(6))
    scale = zero_shot.backbone.joint.scale
    torch.testing.assert_close(method(x)[:, 2:], zero_shot(x)[:, 2:] / scale, rtol=1e-4, atol=1e-5)
    others = captions("x", ["horse", "tree"])
    torch.testing.assert_close(method.score_names(x, others), zero_shot.score_names(x, others) / scale)


def test_without_names_it_is_the_mean_of_unit_features() -> None:
    method, stream = born(factory("ncm_names", weight=0.0), image_stream())
    live(method, stream)
    plain = factory("simplecil", normalise_before_mean=True)(method.backbone, 6)
    plain.head = type(plain.head)(method.width, 6, metric="cosine")
    plain.width = method.width
    plain.features = lambda x: method.backbone.joint.project(x)
    live(plain, stream)
    x = next(stream.tasks[1].test.batches(8)).x
    torch.testing.assert_close(method(x), plain(x), rtol=1e-4, atol=1e-5)
