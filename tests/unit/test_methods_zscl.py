"""ZSCL: distillation on reference data, the ensemble and the consolidation of weights, and the data sets it names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CONF, assert_same, born, context, factory, image_stream, live, sgd, state
from omegaconf import OmegaConf
from running import run
from torch import Tensor

from clrun.blocks.params import select
from clrun.blocks.reference import read_texts
from clrun.data.stream import Stream
from clrun.learning.context import Context
from clrun.methods.zscl import Zscl, divergence
from clrun.running.accounting import state_bytes
from clrun.system.errors import ConfigError

OTHERS = {
    **OmegaConf.to_container(OmegaConf.load(CONF / "dataset" / "synthetic.yaml")),  # type: ignore[dict-item]
    "_partial_": True,
    **{"num_classes": 5, "image_shape": [1, 8, 8], "train_rows": 4, "test_rows": 1, "val_fraction": 0.0, "seed": 7},
    **{"augment": [], "templates": ["a {}.", "the {}."], "class_names": None},
}
OTHERS.pop("defaults")
OFF = {"image_strength": 0.0, "text_strength": 0.0, "consolidation": 0.0, "average_every": None}


def learner(stream: Stream | None = None, **options: Any) -> tuple[Zscl, Stream]:
    method, stream = born(factory("zscl", **({"reference": [OTHERS]} | options)), stream or image_stream())
    assert isinstance(method, Zscl)
    return method, stream


def begun(**options: Any) -> tuple[Zscl, Context]:
    method, stream = learner(**options)
    ctx = context(stream)
    method.begin_task(stream.tasks[0], ctx)
    return method.train(), ctx


def perturb(method: Zscl) -> None:
    with torch.no_grad():
        for parameter in select(method.backbone).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


def test_without_its_terms_it_is_finetuning_bit_for_bit() -> None:
    plain, stream = born(factory("clip_finetune", label_smoothing=0.2), image_stream())
    live(plain, stream)
    method, stream = learner(**OFF)
    live(method, stream)
    assert_same(state(plain), {key: value for key, value in state(method).items() if key in state(plain)})


@pytest.mark.parametrize("option", [{"image_strength": 1.0}, {"text_strength": 1.0}, {"consolidation": 0.1}])
def test_each_term_changes_what_is_learned(option: dict[str, float]) -> None:
    ends = []
    for options in (OFF, OFF | option):
        method, stream = learner(**options)
        live(method, stream, until=1)
        ends.append(method.backbone.joint.image_projection.weight.detach().clone())  # type: ignore[union-attr]
    assert not torch.equal(*ends)


def test_distillation_is_zero_at_the_model_as_loaded_and_reaches_the_image_tower_alone() -> None:
    method, ctx = begun()
    rows = torch.arange(10)
    value = method.distillation(rows, ctx)
    value.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in method.backbone.named_parameters()}
    assert abs(float(value.detach())) < 1e-4
    text = [n for n in found if n.startswith("joint.") and not n.startswith("joint.image_projection")]
    assert all(found[name] is None for name in text)
    assert all(float(g.abs().max()) < 1e-3 for g in found.values() if g is not None)
    perturb(method)
    assert float(method.distillation(rows, ctx).detach()) > 1e-2


def test_distillation_by_hand() -> None:
    method, ctx = begun(image_strength=0.7, text_strength=0.3, tau=2.0)
    assert method.teacher is not None
    rows = torch.tensor([3, 0, 19])
    x = method.reference.take(rows)
    with torch.no_grad():
        before = F.normalize(method.backbone.encode_image(x), dim=1)  # type: ignore[operator]
        texts = F.normalize(method.backbone.joint.encode_texts(list(method.reference.texts)), dim=1)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(method.teacher.images[rows], before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(method.teacher.texts, texts, rtol=1e-5, atol=1e-5)
        perturb(method)
        now = F.normalize(method.backbone.encode_image(x), dim=1)  # type: ignore[operator]
        kappa = method.backbone.joint.scale  # type: ignore[union-attr]
        target, student = kappa * before @ texts.T, kappa * now @ texts.T
        found = method.distillation(rows, ctx)

    def kd(a: Tensor, b: Tensor) -> Tensor:
        p, q = (a / 2).softmax(dim=1), (b / 2).softmax(dim=1)
        return 4 * (p * (p.log() - q.log())).sum(dim=1).mean()

    torch.testing.assert_close(found, 0.7 * kd(target, student) + 0.3 * kd(target.T, student.T), rtol=1e-3, atol=1e-4)


def test_the_gradient_of_the_divergence() -> None:
    student = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    target = torch.randn(4, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad(divergence(student, target, 2.0), student)
    expected = 2.0 * ((student / 2).softmax(dim=1) - (target / 2).softmax(dim=1)) / 4
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("every", [1, 3, 100])
def test_the_ensemble_is_the_mean_of_start_and_snapshots(every: int) -> None:
    method, stream = learner(**(OFF | {"average_every": every}))
    seen: list[dict[str, Tensor]] = []
    after_step = method.after_step

    def watched(ctx: Context) -> None:
        after_step(ctx)
        if ctx.progress.step % every == 0:
            seen.append({name: p.detach().clone() for name, p in select(method.backbone).items()})

    method.after_step = watched  # type: ignore[method-assign]
    start = {name: p.detach().clone() for name, p in select(method.backbone).items()}
    live(method, stream, until=1, budget=sgd(epochs=None, steps=7))
    assert len(seen) == {1: 7, 3: 3, 100: 1}[every]
    for name, parameter in select(method.backbone).items():
        mean = torch.stack([start[name], *(s[name] for s in seen)]).mean(dim=0)
        torch.testing.assert_close(parameter.detach(), mean, rtol=1e-5, atol=1e-6)


def test_a_strong_consolidation_keeps_the_weights_of_the_task_before() -> None:
    moved = []
    for strength in (0.0, 50.0):
        method, stream = learner(**(OFF | {"consolidation": strength}))
        live(method, stream, until=1, budget=sgd(lr=1e-3))
        start = {name: p.detach().clone() for name, p in select(method.backbone).items()}
        live(method, stream, learned=1, until=2, budget=sgd(lr=1e-3))
        moved.append(sum(float((p.detach() - start[n]).square().sum()) for n, p in select(method.backbone).items()))
    assert moved[1] < 0.5 * moved[0]


class TestReference:
    def test_rows_are_drawn_once_and_each_epoch_has_each_of_them_once(self) -> None:
        method, ctx = begun(reference_rows=12)
        assert len(method.reference) == 12 and len(method.reference.texts) == 10
        batches = []
        for ctx.progress.step in range(6):
            batches.append(method.reference.sample(4, ctx))
        for epoch in (batches[:3], batches[3:]):
            assert torch.cat(epoch).sort().values.tolist() == list(range(12))
        assert not torch.equal(batches[0], batches[3])
        order = torch.tensor([7, 2, 11])
        alone = torch.cat([method.reference.take(row[None]) for row in order])
        assert torch.equal(method.reference.take(order), alone)

    def test_memory_between_tasks_is_that_of_the_docstring(self) -> None:
        method, stream = learner()
        live(method, stream)
        size, images, texts, classes = method.backbone.joint.dim, 20, 10, 6  # type: ignore[union-attr]
        own = {name: size for name, size in state_bytes(method).items() if name not in ("total", "backbone", "head")}
        assert own == {"teacher": 4 * size * (images + texts)}
        assert method.head.weight.nbytes == 4 * classes * size

    def test_several_data_sets_follow_one_another(self) -> None:
        method, _ = begun(reference=[OTHERS, OTHERS | {"seed": 8, "train_rows": 1}])
        assert len(method.reference) == 25 and len(method.teacher.images) == 25  # type: ignore[union-attr]
        mixed = method.reference.take(torch.tensor([24, 0, 20]))
        assert torch.equal(mixed[1:2], method.reference.take(torch.tensor([0])))
        assert torch.equal(mixed[:1], method.reference.take(torch.tensor([24])))

    def test_the_data_set_that_is_learned_is_refused(self) -> None:
        own = OTHERS | {"num_classes": 6, "train_rows": 16, "test_rows": 8, "seed": 0}
        method, stream = learner(image_stream(augment=[]), reference=[own])
        with pytest.raises(ConfigError, match=r"^method.reference\[0\]: synthetic is the data set that is learned"):
            method.check(stream)

    def test_texts_of_a_file(self, tmp_path: Any) -> None:
        file = tmp_path / "captions.txt"
        file.write_text("a cat on a mat\n\n two dogs \n")
        assert read_texts(str(file)) == ("a cat on a mat", "two dogs")
        method, _ = begun(reference_texts=str(file))
        assert method.teacher is not None and len(method.teacher.texts) == 2
        file.write_text("\n")
        with pytest.raises(ConfigError, match=r"^method.reference_texts: .* has no text"):
            read_texts(str(file))

    def test_a_run_without_reference_data_is_refused_in_one_line(self, tmp_path: Any) -> None:
        quick = ("method=zscl", "backbone=glyph_clip", "dataset=digits", "job.max_tasks=1", "job.max_steps=1")
        with pytest.raises(ConfigError, match=r"^method.reference: names no data set"):
            run(tmp_path / "a", *quick, "method.reference=[]")
        with pytest.raises(ConfigError, match=r"^method.reference: no dataset named 'glyph'"):
            run(tmp_path / "b", *quick, "method.reference=[glyph]")

    def test_a_run_reads_reference_data_by_name(self, tmp_path: Any) -> None:
        options = ("method.reference=[glyphs]", "method.reference_rows=8", "job.max_eval_rows=8")
        quick = ("method=zscl", "backbone=glyph_clip", "dataset=digits", "job.max_tasks=2", "job.max_steps=2")
        assert 0 <= run(tmp_path / "run", *quick, *options) <= 1
