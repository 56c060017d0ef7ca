"""Phase 1 of RanPAC: the adaptation it shares with APER, and what it changes and does not change."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, context, cpu, factory, image_stream, live, tiny_vit
from running import run
from torch import Tensor

from clrun.cli import main
from clrun.data.features import frozen_features
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.method import Method
from clrun.running import checkpoint
from clrun.running.accounting import parameter_counts
from clrun.running.evaluation import Evaluation
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all

D, DEPTH, CLASSES = 32, 4, 6
KINDS = ("adapter", "ssf", "vpt_shallow", "vpt_deep")
ADAPTED = {
    "adapter": DEPTH * (2 * D * 64 + 64 + D),
    "ssf": 22 * D * DEPTH + 4 * D,
    "vpt_shallow": 5 * D,
    "vpt_deep": DEPTH * 5 * D,
}


def budget(**options: Any) -> Budget:
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    return Budget(optimizer, **({"epochs": 1, "batch_size": 8} | options))


def make(name: str = "ranpac", **options: Any) -> Any:
    """Return a learner on a small transformer."""
    seed_all(0, "init")
    return factory(name, **(({"m": 100} if name == "ranpac" else {}) | options))(tiny_vit(), CLASSES)


def rows(stream: Stream) -> Tensor:
    tasks = sorted(stream.tasks, key=lambda task: task.id)
    return torch.cat([batch.x for task in tasks for batch in task.test.batches(100)])


def logits(method: Method, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return method.eval()(x)


def numbers(method: Method) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in [*method.named_parameters(), *method.named_buffers()]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_adaptation_of_aper_and_then_ridge_regression(kind: str) -> None:
    stream = image_stream()
    ranpac, aper = make(phase1=kind), make("aper", adaptation=kind)
    for method in (ranpac, aper):
        live(method, stream, budget=budget())
    assert same(numbers(ranpac.adaptation), numbers(aper.adaptation))
    x = rows(stream)
    with torch.inference_mode():
        adapted = aper.both(x)[:, D:]
    assert not torch.allclose(adapted, aper.query(x), atol=1e-2)
    features, y = [], []
    for task in stream.tasks:
        for batch in task.train.batches(256):
            with torch.inference_mode():
                features.append(aper.both(batch.x)[:, D:])
            y.append(batch.y)
    lifted = torch.cat([ranpac.lift(part) for part in features]).double()
    targets = torch.nn.functional.one_hot(torch.cat(y), CLASSES).double()
    strength = live(make(phase1=kind), stream, budget=budget()).logged[-1]["strength"]
    expected = torch.linalg.solve(lifted.t() @ lifted + strength * torch.eye(100), lifted.t() @ targets)
    torch.testing.assert_close(ranpac.head.weight, expected.t(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_and_what_stands_still(kind: str) -> None:
    method, stream = make(phase1=kind), image_stream()
    method.begin_task(stream.tasks[0], context(stream))
    assert parameter_counts(method)["trainable"] == ADAPTED[kind] + CLASSES * D + 1
    backbone = numbers(method.backbone)
    live(method, stream, budget=budget(), until=1)
    assert same(backbone, numbers(method.backbone)) and parameter_counts(method)["trainable"] == 0
    before = numbers(method.adaptation)
    live(method, stream, budget=budget(), learned=1)
    assert same(before, numbers(method.adaptation))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.backbone.modules())


@pytest.mark.parametrize("options", [{"phase1": "adapter"}, {"phase1": "ssf", "ssf_std": 0.0}], ids=str)
def test_without_training_it_is_the_method_without_phase_1(options: dict[str, Any]) -> None:
    rule = {"m": 100, "rule": "fixed", "strengths": [1.0]}
    method, stream = make(**options, **rule), image_stream(augment=())
    live(method, stream, budget=budget(epochs=0))
    seed_all(0, "init")
    featured, identity = frozen_features(stream, tiny_vit(), cpu())
    plain = factory("ranpac", **rule)(identity, CLASSES)
    live(plain, featured)
    torch.testing.assert_close(logits(method, rows(stream)), logits(plain, rows(featured)), rtol=1e-4, atol=1e-4)


def test_the_order_matters_through_the_first_task_and_only_through_it() -> None:
    ends = []
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2)):
        method, stream = make(phase1="adapter"), image_stream("cil", order)
        live(method, stream, budget=budget())
        ends.append(logits(method, rows(stream)))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_it_claims_no_order_invariance_and_reads_images() -> None:
    plain = factory("ranpac", m=100)(Net(), CLASSES)
    assert plain.order_invariant and plain.uses_frozen_features and plain.adaptation is None
    assert type(plain).reads_features({"phase1": "none"}) and not type(plain).reads_features({"phase1": "ssf"})
    with pytest.raises(AttributeError):
        plain.uses_frozen_features = False
    adapted = make(phase1="ssf")
    assert not adapted.order_invariant and not adapted.uses_frozen_features


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_after_every_task_bit_for_bit(kind: str, tmp_path: Path) -> None:
    method, fresh, stream = make(phase1=kind), make(phase1=kind), image_stream()
    known, path = checkpoint.fingerprints(method.backbone), tmp_path / "checkpoint.pt"
    stored: list[Method] = []

    def store(task: Task, method: Method, run_state: checkpoint.RunState) -> None:
        checkpoint.save(path, method, run_state, config_hash="h", backbone=known, hardware=cpu())
        stored.append(checkpoint.load(path, fresh, config_hash="h", hardware=cpu())[0])

    whole = live(method, stream, after=store, budget=budget())
    for learned, twin in enumerate(stored[:2], start=1):
        journal = live(twin, stream, learned=learned, budget=budget())
        assert same(numbers(method), numbers(twin))
        expected = [r | {"step": 0} for r in whole.recorded if r["position"] > learned]
        assert [r | {"step": 0} for r in journal.recorded] == expected
    assert torch.equal(logits(method, rows(stream)), logits(stored[2], rows(stream)))


def test_evaluations_read_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method, stream = make(phase1="adapter"), image_stream()
    read: list[int] = []
    features = type(method).features
    monkeypatch.setattr(type(method), "features", lambda self, x: read.append(len(x)) or features(self, x))
    journal = live(method, stream, budget=budget())
    images = sum(len(task.train) + len(task.test) for task in stream.tasks)
    assert sum(read) == images
    fresh = Evaluation(cpu(), "test", 64, None)(method, stream, 3)
    assert [row["correct"] for row in fresh] == [r["correct"] for r in journal.recorded if r["position"] == 3]


@pytest.mark.parametrize("setting", ["cil", "dil"])
def test_later_tasks_can_be_unlearned_and_the_first_cannot(setting: Any) -> None:
    stream = image_stream(setting)
    method = make(phase1="adapter", forget_tasks=[2])
    method.check(stream)
    live(method, stream, budget=budget())
    other = make(phase1="adapter")
    live(other, stream, budget=budget(), until=2)
    for part in method.statistics:
        gram = other.stats(part).gram()
        torch.testing.assert_close(method.stats(part).gram(), gram, rtol=1e-9, atol=1e-9 * float(gram.abs().max()))
    seen = 4 if setting == "cil" else 6
    ours, theirs = (logits(m, rows(stream))[:, :seen].argmax(1) for m in (method, other))
    assert torch.equal(ours, theirs)
    with pytest.raises(ConfigError, match=r"method\.forget_tasks: task 0 comes first"):
        make(phase1="adapter", forget_tasks=[0]).check(stream)


def test_other_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.phase1=ssf needs a transformer .* not Net"):
        factory("ranpac", phase1="ssf")(Net(), CLASSES)


def test_as_a_user_asks_for_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("method=ranpac", "method.m=50", "method.phase1=vpt_deep", "backbone=glyph_vit", "scenario.n_tasks=5")
    limits = ("job.max_steps=2", "job.max_tasks=2", "job.max_eval_rows=20")
    run(tmp_path / "r", *options, *limits)
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["status"] == "completed" and "logme" not in record and "features" not in record
    assert [cost["steps"] for cost in record["cost"]["tasks"]] == [2, 2]
    quiet = ("job.progress=false", "hardware.threads=1", f"hydra.run.dir={tmp_path / 'wrong'}")
    for wrong, line in (
        ("method.forget_tasks=[0]", "method.forget_tasks: task 0 comes first"),
        ("backbone=mlp", "method.phase1=vpt_deep needs a vision transformer"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*options, *limits, *quiet, wrong])
        assert end.value.code == 2 and line in capfd.readouterr().err
        assert not (tmp_path / "wrong").exists()
