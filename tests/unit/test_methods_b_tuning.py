"""B-Tuning: golden values, the weights of teachers, what a teacher may look like, and runs with teachers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Identity, born, context, factory, image_stream, live, row_stream
from running import configuration, run, run_interrupted
from test_blocks_logme import FEATURES, LABELS
from test_blocks_statistics import measured
from torch import Tensor, nn

from clrun.blocks.logme import logme, read_out
from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.data.transforms import SecondView, second_transform
from clrun.learning.networks import FrozenNetwork
from clrun.methods.b_tuning import BTuning, teacher_weights
from clrun.running import checkpoint_file
from clrun.system.errors import ConfigError

SECOND = torch.tensor([[1.0, 0], [1, 0.5], [0, 1], [1, 1], [0, 2], [2, 0]])
ALONE = {"self_teacher": "none", "head_std": None, "head_lr_factor": 1.0}


class Table(nn.Module):
    """A network that gives stored features for each of the rows that it knows."""

    def __init__(self, rows: Tensor, features: Tensor) -> None:
        super().__init__()
        self.num_features = features.shape[1]
        self.register_buffer("rows", rows)
        self.register_buffer("features", features)

    def forward(self, x: Tensor) -> Tensor:
        return self.features[torch.cdist(x, self.rows).argmin(dim=1)]  # type: ignore[index, arg-type]


def learner(stream: Stream, teachers: list[nn.Module], width: int = 2, **options: Any) -> BTuning:
    """Return a method at the beginning of the first task, on rows that are features, with these teachers."""
    method = factory("b_tuning", **(ALONE | options))(Identity(width), stream.num_classes)
    assert isinstance(method, BTuning)
    method.receive({str(k): FrozenNetwork(f"teacher {k}", network) for k, network in enumerate(teachers)})
    method.begin_task(stream.tasks[0], context(stream))
    return method


def distance(method: BTuning, stream: Stream, rows: slice = slice(None), index: int = 0) -> float:
    """Return the mean squared distance of the read-outs, which the loss adds `strength` times."""
    batch = next(stream.tasks[index].train.batches(100))
    part = Batch(batch.x[rows], batch.y[rows], batch.t[rows], batch.i[rows])
    ctx, losses = context(stream, index), []
    for strength in (0.0, 1.0):
        method.strength = strength
        losses.append(float(method.loss(part, ctx).detach()))
    return losses[1] - losses[0]


GOLDEN = row_stream([(FEATURES, LABELS)], 2)


def test_golden_values() -> None:
    score, weights = read_out(measured(FEATURES, LABELS, 2))
    expected = torch.tensor([[0.22314096, 0.02345854], [0.03788375, 0.45863864]]).double()
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-7)
    assert score == logme(measured(FEATURES, LABELS, 2)) == pytest.approx(-0.94520823, abs=1e-7)
    other = logme(measured(SECOND, LABELS, 2))
    assert other == pytest.approx(-0.79009549, abs=1e-7)
    assert teacher_weights([score, other], 3, 0.1) == pytest.approx([0.1749235, 0.8250765], abs=1e-6)
    method = learner(GOLDEN, [Table(FEATURES, FEATURES), Table(FEATURES, SECOND)])
    assert distance(method, GOLDEN, slice(0, 2)) == pytest.approx(0.02785806, abs=1e-6)
    method.reduction = "sum_classes"
    assert distance(method, GOLDEN, slice(0, 2)) == pytest.approx(2 * 0.02785806, abs=1e-6)


def test_weights_of_teachers() -> None:
    scores = [0.1, 0.5, 0.3, 0.5]
    assert teacher_weights(scores, 4, 1e9) == pytest.approx([0.25] * 4)
    assert teacher_weights([0.1, 0.6, 0.3], 3, 1e-4) == pytest.approx([0, 1, 0])
    assert teacher_weights(scores, 1, 0.1) == [0, 1, 0, 0]
    assert sum(teacher_weights(scores, 2, 0.1)) == pytest.approx(1) and teacher_weights(scores, 2, 0.1)[0] == 0


@pytest.mark.parametrize("own", ["initial", "previous"])
def test_a_teacher_that_is_the_student_does_not_pull(own: str) -> None:
    method, stream = born(factory("b_tuning", self_teacher=own), image_stream(augment=[]))
    assert isinstance(method, BTuning)
    method.eval()
    ctx = context(stream)
    method.begin_task(stream.tasks[0], ctx)
    batch = next(stream.tasks[0].train.batches(100))
    gradients = []
    for strength in (0.0, 1e4):
        method.zero_grad()
        method.strength = strength
        if not strength:
            plain = copy.copy(method.read_outs)
            method.read_outs = None
        method.loss(batch, ctx).backward()
        method.read_outs = plain
        gradients.append([p.grad.clone() for p in method.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def gaussian(classes: tuple[tuple[int, ...], ...]) -> Stream:
    draw, tasks = torch.Generator().manual_seed(0), []
    for labels in classes:
        y = torch.tensor(labels).repeat_interleave(15)
        tasks.append((torch.eye(4, 5)[y] + 0.5 * torch.randn(len(y), 5, generator=draw), y))
    return row_stream(tasks, 4)


def linear_net(seed: int, width: int) -> nn.Module:
    layer = nn.Linear(5, width)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    layer.num_features = width  # type: ignore[assignment]
    return layer


def test_rotations_and_the_order_of_teachers_do_not_matter() -> None:
    stream, nets = gaussian(((0, 1), (2, 3))), [linear_net(1, 7), linear_net(2, 3)]
    plain = learner(stream, nets, 5)
    turned = copy.deepcopy(nets)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(3))).Q
    with torch.no_grad():
        turned[0].weight.copy_(rotation @ turned[0].weight)  # type: ignore[operator, union-attr]
        turned[0].bias.copy_(rotation @ turned[0].bias)  # type: ignore[operator, union-attr]
    expected = distance(plain, stream)
    assert expected > 1e-4
    assert distance(learner(stream, turned, 5), stream) == pytest.approx(expected, rel=1e-3)
    assert distance(learner(stream, nets[::-1], 5), stream) == pytest.approx(expected, rel=1e-5)


def test_anchor_seen_remembers_the_read_outs_of_earlier_tasks() -> None:
    stream, found = gaussian(((0, 1), (2, 3))), {}
    for anchor in ("current", "seen"):
        method = learner(stream, [linear_net(1, 7)], 5, anchor=anchor)
        first = distance(method, stream)
        assert method.read_outs is not None
        rows = method.read_outs.of_teachers().clone()
        method.end_task(stream.tasks[0], context(stream))
        method.begin_task(stream.tasks[1], context(stream, 1))
        assert method.read_outs is not None
        found[anchor] = first, rows, method.read_outs.known.tolist()
        if anchor == "seen":
            assert torch.equal(method.read_outs.of_teachers()[:2], rows)
    assert found["seen"][0] == found["current"][0]
    assert found["current"][2] == [False, False, True, True] and all(found["seen"][2])


def test_stored_answers_are_those_computed_anew_and_teachers_stay_as_they_are() -> None:
    stream, net = gaussian(((0, 1), (2, 3))), linear_net(1, 7)
    before = copy.deepcopy(net.state_dict())
    method = learner(stream, [net], 5)
    stored = distance(method, stream)
    method.answers = None
    assert distance(method, stream) == pytest.approx(stored, abs=1e-6)
    method.strength = 1.0
    live(method, stream)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert copy.deepcopy(method).teachers[0] is method.teachers[0]


def test_the_head_is_small_and_learns_faster() -> None:
    method, stream = born(factory("b_tuning"), image_stream())
    method.begin_task(stream.tasks[0], context(stream))
    rows = method.head.weight[stream.tasks[0].classes].detach()  # type: ignore[index]
    assert 0.005 < float(rows.std()) < 0.02 and not method.head.bias.any()  # type: ignore[union-attr, operator]
    body, head = method.trainable()
    assert "lr_factor" not in body and head["lr_factor"] == 10.0  # type: ignore[operator, index, call-overload]


# --- teachers of the configuration


CNN = "{_target_:clrun.backbones.small.cnn,_partial_:true,width:4,depth:1,weights:null,weights_key:null}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.teachers=[glyph_vit]", "method.teachers: in each item expected a node"),
        ("method.teachers=[{width:4}]", "method.teachers: in each item expected a node with a _target_"),
        (f"method.teachers=[{CNN.replace('cnn', 'nothing')}]", "method.teachers[0]._target_: cannot import"),
        (
            f"method.teachers=[{CNN.replace('depth:1', 'depth:1,deep:1')}]",
            "method.teachers[0].deep: unknown option of cnn",
        ),
        (f"method.teachers=[{CNN.replace('width:4', 'width:0')}]", "method.teachers[0].width: must be at least 1"),
        ("method.teachers=[{_target_:os.getcwd}]", "method.teachers[0]._target_: 'os.getcwd' is not a torch.nn"),
        (f"+method.teachers.a={CNN.replace('depth:1,', '')}", "method.teachers.a.depth: is missing"),
        (
            f"method.teachers=[{CNN.replace('_partial_:true,', '')}]",
            "method.teachers[0].shape: is missing; cnn needs it: add _partial_: true to the node",
        ),
    ],
)
def test_bad_nodes_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configuration("method=b_tuning", override)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


QUICK = ("method=b_tuning", "backbone=cnn", "dataset=synthetic", "job.max_tasks=3", "budget.epochs=1")
TEACHERS = (f"+method.teachers.small={CNN}", "+backbone@method.teachers.letters=glyph_vit", "method.strength=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("method.self_teacher=none",), "method.teachers: there are none; list backbones, or set"),
        (("method.self_teacher=previous", "method.anchor=seen"), "method.self_teacher=previous: the student before"),
        (
            (f"method.teachers=[{CNN.replace('weights:null', 'weights:no.pt')}]",),
            "method.teachers[0].weights: there is no file no.pt",
        ),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_a_file_is_written(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "run", *QUICK, *options)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_run_records_its_teachers_and_resumes_without_storing_them(tmp_path: Path) -> None:
    value = run(tmp_path / "whole", *QUICK, *TEACHERS)
    stored = json.loads((tmp_path / "whole" / "run.json").read_text())
    networks = stored["networks"]
    assert set(networks) == {"method.teachers.small", "method.teachers.letters"}
    assert networks["method.teachers.letters"]["features"] == 96
    assert networks["method.teachers.letters"]["input"].endswith("normalised by the backbone")
    assert stored["config"]["method"]["teachers"]["small"]["width"] == 4
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    weights = [line["weight"] for line in lines if line["phase"] == "teachers"]
    assert len(weights) == 9 and sum(weights) == pytest.approx(3)  # three teachers, the initial student among them
    run_interrupted(tmp_path / "cut", *QUICK, *TEACHERS)
    file = next(iter(checkpoint_file.generations(tmp_path / "cut" / "checkpoint.pt")))
    referenced = checkpoint_file.read(file)[0].referenced
    assert {name.partition(":")[0] for name in referenced if ":" in name} == {"teacher 0", "teacher 1", "teacher 2"}
    assert run(tmp_path / "cut", *QUICK, *TEACHERS) == value
    for name in ("accuracy.csv", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_teacher_sees_the_augmented_pixels_of_the_student() -> None:
    from helpers import configured

    from clrun.data.transforms import fit_transform

    dataset = configured("dataset", "synthetic", image_shape=[1, 8, 8], augment=["crop"])
    student, other = nn.Identity(), nn.Identity()
    student.input_size, student.mean, student.std = (1, 12, 12), (0.2,), (0.5,)  # type: ignore[assignment]
    other.input_size, other.mean, other.std = (3, 12, 12), (0.1, 0.2, 0.3), (1.0, 1.0, 2.0)  # type: ignore[assignment]
    first, _ = fit_transform(dataset, student)
    second, text = second_transform(dataset, first, other)
    assert text == "12x12x1 -> 12x12x3: grey repeated, normalised by the backbone"
    x = first.train(next(dataset.train.batches(4, view="raw")).x, torch.Generator().manual_seed(0))
    pixels = x * 0.5 + 0.2
    expected = torch.cat([pixels - 0.1, pixels - 0.2, (pixels - 0.3) / 2], dim=1)
    torch.testing.assert_close(SecondView(first, second)(x), expected, rtol=1e-4, atol=1e-5)
