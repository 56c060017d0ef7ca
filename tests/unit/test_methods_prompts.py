"""Prompt and adapter methods: frozen parameters, memory, and the prompts of an image, as each paper defines them."""

import copy
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, born, context, cpu, factory, image_stream, live, sgd, tiny_vit, trace
from matrices import folded
from running import run
from torch import Tensor, nn

from clrun.blocks.inject import Plan
from clrun.blocks.orthogonality import deviation, orthonormal
from clrun.blocks.selection import choose, cosines
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.method import Method
from clrun.methods.ease import similarity
from clrun.reporting.selection import draw_selection
from clrun.running import checkpoint
from clrun.running.accounting import parameter_counts
from clrun.running.evaluation import Evaluation
from clrun.running.prompt_selection import selection_counts
from clrun.system.errors import ConfigError

D, N, DEPTH, CLASSES = 32, 17, 4, 6
HEAD = CLASSES * (D + 1)
TASKS = 3
BATCHED = ("l2p", "dualprompt", "dap")
METHODS = ("vpt", "l2p", "dualprompt", "coda_prompt", "dap", "lae", "aper", "ease")

# Trained parameters after three tasks, by the formulas of the cards: method, options, number without frozen ones.
COUNTS: list[tuple[str, dict[str, Any], int]] = [
    ("vpt", {}, 5 * D + HEAD),
    ("vpt", {"depth": "deep", "length": 3}, DEPTH * 3 * D + HEAD),
    ("vpt", {"prompt_width": 7}, 5 * 7 + 7 * D + D + HEAD),
    ("l2p", {"length": 4}, 10 * 4 * D + 10 * D + HEAD),
    ("dualprompt", {}, 2 * 2 * 5 * D + 2 * 2 * 5 * D + D + HEAD),
    ("coda_prompt", {}, DEPTH * 5 * D * (8 + 2) + HEAD),
    ("dap", {}, DEPTH * (2 * D * 16 + 2 * D + 2 * D) + D + 16 + HEAD),
    ("lae", {}, DEPTH * (2 * D * 5 + 5 + D + 1) + HEAD),
    ("lae", {"module": "lora"}, DEPTH * (4 * D * 5 + 2) + HEAD),
    ("lae", {"module": "prefix"}, DEPTH * (2 * 10 * D + 2) + HEAD),
    ("aper", {}, 0),
    ("ease", {}, 0),
]
# What adapts in the first task, without the cosine head (C D + 1).
ADAPTED: list[tuple[str, dict[str, Any], int]] = [
    ("aper", {"adaptation": "vpt_shallow"}, 5 * D),
    ("aper", {"adaptation": "vpt_deep"}, DEPTH * 5 * D),
    ("aper", {"adaptation": "ssf"}, 22 * D * DEPTH + 4 * D),
    ("aper", {"adaptation": "adapter"}, DEPTH * (2 * D * 64 + 64 + D)),
    ("aper", {"adaptation": "finetune"}, sum(p.numel() for p in tiny_vit().parameters())),
    ("ease", {}, DEPTH * (2 * D * 64 + 64 + D)),
]
# Every way of injecting, for tests that all must pass.
WAYS: list[tuple[str, dict[str, Any]]] = [
    *((name, options) for name, options, _ in COUNTS),
    *(("aper", {"adaptation": a}) for a in ("finetune", "vpt_shallow", "vpt_deep", "ssf")),
    ("vpt", {"reinit": True}),
    ("l2p", {"use_prompt_mask": True, "pool_size": 15, "copy_prompts": True, "diversity": True}),
    ("l2p", {"keys": "queries", "top": 2}),
    ("dualprompt", {"keys": "mean", "copy_prompts": False, "g_blocks": [1], "e_blocks": [1, 2]}),
    ("coda_prompt", {"orthogonality": 0.1}),
    ("dap", {"skip_last_block": True, "task_logit_mask": True}),
    ("ease", {"recompute": False, "plain_weight": 0.5}),
]

RESUMED = [way for way in WAYS if way[0] in ("aper", "dap", "ease") or way[1]]
RESUMED = [*{name: (name, options) for name, options in RESUMED}.values(), ("lae", {}), ("lae", {"module": "lora"})]


def adam(**options: Any) -> Budget:
    """Return a budget with momentum and weight decay, which would move a parameter that should not move."""
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    return Budget(optimizer, **({"epochs": 1, "batch_size": 8} | options))


def make(name: str, setting: Any = "cil", **options: Any) -> tuple[Any, Stream]:
    method, stream = born(factory(name, **options), image_stream(setting))
    return method, stream


@cache
def _lived(name: str, options: str) -> tuple[Any, Stream, dict[str, Tensor], Tensor]:
    method, stream = make(name, **json.loads(options))
    before, query = copies(method.backbone), method.query(rows(stream)[:8])
    live(method, stream, budget=adam())
    return method, stream, before, query


def lived(name: str, options: dict[str, Any] | None = None) -> tuple[Any, Stream, dict[str, Tensor], Tensor]:
    """Return a method after three tasks (a copy), its stream, and the backbone and queries of before."""
    method, stream, before, query = _lived(name, json.dumps(options or {}))
    return copy.deepcopy(method), stream, before, query


def told_apart(name: str, options: dict[str, Any] | None = None) -> tuple[Any, Stream]:
    """Return a method after three tasks whose keys tell the tasks apart."""
    method, stream, _, _ = lived(name, options)
    if name != "l2p":
        with torch.no_grad():
            for key, task in zip(method.keys, stream.tasks, strict=True):
                key.copy_(method.mean_query(task))
    return method, stream


def rows(stream: Stream, size: int = 100) -> Tensor:
    return torch.cat([batch.x for task in stream.tasks for batch in task.test.batches(size)])


def logits(method: Method, x: Tensor) -> Tensor:
    method.eval()
    with torch.inference_mode():
        return method(x, 0) if method.needs_task_id else method(x)


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what all have in common


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_backbone_and_queries_stay_as_they_are(name: str, options: dict[str, Any]) -> None:
    method, stream, before, query = lived(name, options)
    x = rows(stream)[:8]
    assert same(before, copies(method.backbone))
    assert torch.equal(method.query(x), query)
    assert not method.query(x).requires_grad
    assert method.query(x).untyped_storage().nbytes() == method.query(x).nbytes, "no view of the tokens of all places"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.backbone.modules())


@pytest.mark.parametrize(("name", "options", "count"), COUNTS, ids=str)
def test_trained_parameters_are_those_of_the_formula(name: str, options: dict[str, Any], count: int) -> None:
    method, _, _, _ = lived(name, options)
    assert parameter_counts(method)["trainable"] == count


@pytest.mark.parametrize(("name", "options", "count"), ADAPTED, ids=str)
def test_adapted_parameters_are_those_of_the_formula(name: str, options: dict[str, Any], count: int) -> None:
    method, stream = make(name, **options)
    method.begin_task(stream.tasks[0], context(stream))
    assert parameter_counts(method)["trainable"] == count + CLASSES * D + 1


@pytest.mark.parametrize(("name", "options"), RESUMED, ids=str)
def test_resumes_after_every_task_bit_for_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    method, stream = make(name, **options)
    known, path = checkpoint.fingerprints(method.backbone), tmp_path / "checkpoint.pt"
    fresh, _ = make(name, **options)
    stored: list[Method] = []

    def store(task: Task, method: Method, run_state: checkpoint.RunState) -> None:
        checkpoint.save(path, method, run_state, config_hash="h", backbone=known, hardware=cpu())
        stored.append(checkpoint.load(path, fresh, config_hash="h", hardware=cpu())[0])

    whole = live(method, stream, after=store, budget=adam())
    x = rows(stream)
    backbone = sum(p.numel() for p in method.backbone.parameters())
    others = sum(p.numel() for p in method.parameters()) - backbone
    assert path.stat().st_size < 4 * (others + backbone / 4) + 400_000
    for learned, twin in enumerate(stored[:2], start=1):
        journal = live(twin, stream, learned=learned, budget=adam())
        assert same(copies(method), copies(twin))
        expected = [r | {"step": 0} for r in whole.recorded if r["position"] > learned]
        assert [r | {"step": 0} for r in journal.recorded] == expected
    assert torch.equal(logits(method, x), logits(stored[2], x))


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_a_prediction_is_the_same_alone_and_among_others(name: str, options: dict[str, Any]) -> None:
    method, stream = told_apart(name, options) if name in BATCHED else lived(name, options)[:2]
    x = rows(stream)
    together = logits(method, x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(method, x[order]), together[order], rtol=1e-5, atol=1e-5)
    alone = torch.cat([logits(method, row[None]) for row in x[::4]])
    torch.testing.assert_close(alone, together[::4], rtol=1e-5, atol=1e-5)
    assert not method.depends_on_batch


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_learns_the_same(name: str) -> None:
    ends = []
    for checkpointing in (False, True):
        method, stream = make(name)
        method.backbone.set_grad_checkpointing(checkpointing)
        live(method, stream, until=1, budget=adam())
        ends.append(copies(method))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.backbone.modules())
    assert same(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_runs(name: str, tmp_path: Path) -> None:
    options = ("backbone=glyph_vit", "backbone.pretrained=false", "hardware.precision=bf16", "job=smoke")
    assert 0 <= run(tmp_path, f"method={name}", *options) <= 1


@pytest.mark.parametrize(("name", "options"), [w for w in WAYS if not w[1].get("reinit")], ids=str)
def test_a_task_that_is_not_asked_for_is_not_looked_at(name: str, options: dict[str, Any]) -> None:
    method, stream, _, _ = lived(name, options)
    x = rows(stream)[:8]
    method.eval()
    with torch.inference_mode():
        assert torch.equal(method(x), method(x, 10**6))
        constant = method.constant(x)
        assert constant is None or torch.equal(method.forward_with(constant, x), method.forward_with(constant, x, -7))


@pytest.mark.parametrize("name", BATCHED)
def test_choosing_for_a_batch_is_seen_and_said(name: str) -> None:
    """The test above can fail: under the vote of published code, the logits depend on the other images."""
    method, stream = told_apart(name, {"keys": "queries", "top": 2} if name == "l2p" else {})
    x = rows(stream)
    chosen = method.chosen(method.query(x))
    assert len(chosen.unique(dim=0)) > 1, "images of one choice would prove nothing"
    together = logits(method, x)
    method.selection = "batch"
    assert not torch.allclose(logits(method, x), together, atol=1e-4)
    assert make(name, selection="batch")[0].depends_on_batch


@pytest.mark.parametrize("name", METHODS)
def test_other_backbones_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"backbone: .* needs a .*transformer.*, not Net; use the backbones vit_"):
        factory(name)(Net(), CLASSES)


@pytest.mark.parametrize("name", ["vpt", "l2p", "dualprompt", "coda_prompt", "dap", "lae"])
def test_classes_outside_the_task_get_no_gradient(name: str) -> None:
    method, stream = make(name)
    live(method, stream, until=2)
    task, ctx = stream.tasks[1], context(stream, 1)
    batch = next(task.train.batches(8))
    method.train()
    method.loss(batch, ctx).backward()
    others = torch.ones(CLASSES, dtype=torch.bool)
    others[task.classes] = False
    assert not method.head.weight.grad[others].any()
    assert not method.head.bias.grad[others].any()
    assert method.head.weight.grad[~others].abs().min() > 0


def test_the_loss_of_a_task_is_that_of_its_columns_alone() -> None:
    method, stream = make("vpt")
    live(method, stream, until=2)
    task = stream.tasks[1]
    batch = next(task.train.batches(8))
    method.train()
    columns = method(batch.x)[:, task.classes]
    expected = F.cross_entropy(columns, torch.searchsorted(task.classes, batch.y))
    torch.testing.assert_close(method.loss(batch, context(stream, 1)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["vpt", "l2p", "dualprompt", "coda_prompt", "dap", "lae"])
def test_compete_seen_lets_earlier_classes_compete(name: str) -> None:
    method, stream = make(name, compete="seen")
    live(method, stream, until=2)
    method.loss(next(stream.tasks[1].train.batches(8)), context(stream, 1)).backward()
    assert method.head.weight.grad[stream.tasks[0].classes].any()


def test_lr_scale_is_a_larger_learning_rate() -> None:
    ends = []
    for lr, scale in ((0.1, 1.0), (0.02, 5.0)):
        method, stream = make("vpt", lr_scale=scale)
        live(method, stream, budget=sgd(lr=lr))
        ends.append(copies(method))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dualprompt", "dap"])
def test_a_given_task_is_the_inferred_one_where_they_agree(name: str) -> None:
    method, stream = told_apart(name)
    x = rows(stream)
    inferred, chosen = logits(method, x), method.chosen(method.query(x))[:, 0]
    method.needs_task_id = True
    for task in range(TASKS):
        with torch.inference_mode():
            given = method(x, task)
        assert (chosen == task).any()
        torch.testing.assert_close(given[chosen == task], inferred[chosen == task], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(given[chosen != task], inferred[chosen != task], atol=1e-4)


@pytest.mark.parametrize("name", ["vpt", "dualprompt", "dap", "ease"])
def test_learners_that_are_given_the_task_are_read_with_it(name: str) -> None:
    options = {"reinit": True} if name == "vpt" else {"task_id": "given"}
    method, stream = make(name, "til", **options)
    method.check(stream)
    assert {row["setting"] for row in live(method, stream).recorded} == {"til"}


MISFITS: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "l2p",
        {"use_prompt_mask": True, "top": 2, "pool_size": 5},
        "cil",
        r".* need method\.pool_size=6, not 5",
    ),
    ("coda_prompt", {"components": 11}, "cil", r"components: 3 tasks of 11 .* 33 .* 32; take at most 10"),
    ("vpt", {"reinit": True}, "dil", r"reinit: needs the task id .* scenario\.setting=dil"),
    *((name, {"task_id": "given"}, "cil", r"task_id=given: .*=cil cannot") for name in ("dualprompt", "dap", "ease")),
]


@pytest.mark.parametrize(("name", "options", "setting", "message"), MISFITS, ids=str)
def test_options_that_do_not_suit_the_tasks(name: str, options: dict[str, Any], setting: str, message: str) -> None:
    method, stream = make(name, setting, **options)
    with pytest.raises(ConfigError, match=rf"^method\.{message}"):
        method.check(stream)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("setting", ["til", "cil", "dil"])
def test_defaults_suit_every_setting(name: str, setting: str) -> None:
    method, stream = make(name, setting)
    assert setting in method.settings
    method.check(stream)  # raises where an option does not suit the setting


@pytest.mark.parametrize(
    ("option", "message"),
    [("method.components=50", r"take at most 32$"), ("hardware.compile=true", r"set it to false$")],
)
def test_a_misfit_leaves_no_folder(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(
            tmp_path / "run",
            "method=coda_prompt",
            "backbone=glyph_vit",
            "backbone.pretrained=false",
            "job=smoke",
            option,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "adaptation"), [("ease", None), ("aper", "adapter"), ("aper", "ssf"), ("aper", "finetune")]
)
def test_adapters_and_scales_take_rotary_transformers_too(name: str, adaptation: str | None) -> None:
    from timm.models.eva import Eva

    torch.manual_seed(0)
    eva: Any = Eva(img_size=8, patch_size=2, in_chans=1, embed_dim=D, depth=2, num_heads=2, num_classes=0)
    stream = image_stream()
    method = factory(name, **({"adaptation": adaptation} if adaptation else {}))(eva, CLASSES)
    live(method, stream, budget=adam())
    assert logits(method, rows(stream)).isfinite().all()
    with pytest.raises(ConfigError, match="not Eva"):
        factory("aper", adaptation="vpt_deep")(eva, CLASSES)


# --- frozen components


OLD = {
    "dualprompt": lambda m, t: [m.expert[t], m.keys[t]],
    "coda_prompt": lambda m, t: [m.prompts[t], m.keys[t], m.attention[t]],
    "dap": lambda m, t: [m.keys[t], m.embeddings[t], *(g.mixer.weight for g in m.generators)],
    "ease": lambda m, t: list(m.subspaces[t].adapters.parameters()),
}


@pytest.mark.parametrize("name", sorted(OLD))
def test_components_of_earlier_tasks_stand_still(name: str) -> None:
    method, stream = make(name)
    read = OLD[name]
    found = trace(
        lambda m: [[p.detach().clone() for p in read(m, t)] for t in range(3) if t < tasks(m)],
        method,
        stream,
        budget=adam(),
    )
    for later in found[1:]:
        for task, at_its_end in enumerate(found[0]):
            assert all(torch.equal(a, b) for a, b in zip(at_its_end, later[task], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[1][1], found[2][1], strict=True))
    if name != "dap":  # whose mixers are those of the first task
        assert not any(torch.equal(a, b) for a, b in zip(found[1][0], found[1][1], strict=True))


def tasks(method: Any) -> int:
    """Tasks the method has components of."""
    return len(method.subspaces) if hasattr(method, "subspaces") else len(method.keys)


# --- the plain model inside


def linear(method: Any, x: Tensor) -> Tensor:
    """Head on the features of the plain backbone."""
    with torch.inference_mode():
        return method.head(method.backbone(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vpt", {"length": 0}),
        ("vpt", {"length": 0, "depth": "deep"}),
        ("dualprompt", {"g_length": 0, "e_length": 0}),
        ("coda_prompt", {"length": 0}),
    ],
    ids=str,
)
def test_prompts_of_no_length_are_the_plain_model(name: str, options: dict[str, Any]) -> None:
    method, stream = make(name, **options)
    live(method, stream)
    assert torch.equal(logits(method, rows(stream)), linear(method, rows(stream)))


@pytest.mark.parametrize("module", ["adapter", "lora"])
def test_lae_begins_as_the_plain_model(module: str) -> None:
    method, stream = make("lae", module=module)
    method.begin_task(stream.tasks[0], context(stream))
    assert torch.equal(logits(method, rows(stream)), linear(method, rows(stream)))


@pytest.mark.parametrize(
    "options",
    [{"adaptation": "adapter"}, {"adaptation": "vpt_deep", "length": 0}, {"adaptation": "ssf", "ssf_std": 0.0}],
    ids=str,
)
def test_aper_without_adaptation_is_simplecil(options: dict[str, Any]) -> None:
    method, stream = make("aper", **options)
    live(method, stream, budget=sgd(epochs=0))
    x = rows(stream)
    with torch.inference_mode():
        f = method.backbone(x)
    means = torch.stack([method.stats.means()[c, :D].float() for c in range(CLASSES)])
    expected = F.linear(F.normalize(f, dim=1), F.normalize(means, dim=1))
    torch.testing.assert_close(logits(method, x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(method.both(x)[:, :D], method.both(x)[:, D:])


# --- vpt


def test_vpt_prompts_go_on_being_trained_and_can_begin_anew() -> None:
    method, stream = make("vpt")
    found = trace(lambda m: m.prompts[0].detach().clone(), method, stream)
    assert not torch.equal(found[0], found[1])
    assert found[0].shape == (1, 5, D)
    method, stream = make("vpt", reinit=True)
    found = trace(lambda m: [p.detach().clone() for p in m.prompts], method, stream, budget=adam())
    assert [len(f) for f in found] == [1, 2, 3]
    assert torch.equal(found[0][0], found[2][0])


def test_vpt_prompts_begin_within_the_bound_of_their_paper() -> None:
    method, stream = make("vpt", length=50)
    method.begin_task(stream.tasks[0], context(stream))
    bound = (6 / (3 * 2 * 2 + D)) ** 0.5
    assert 0.9 * bound < method.prompts[0].abs().max() <= bound


# --- l2p


def test_l2p_reads_the_outputs_of_the_prompts_alone() -> None:
    method, stream = make("l2p", top=2)
    live(method, stream)
    x = rows(stream)[:5]
    with (
        torch.inference_mode(),
        method.injector.use(
            method.backbone,
            Plan(tokens={0: method.prompts[method.chosen(method.query(x))].flatten(1, 2)}, keep_tokens=True),
        ),
    ):
        z = method.backbone.forward_features(x)
        assert z.shape[1] == N + 2 * 5
        expected = method.head(z[:, 1 : 1 + 2 * 5].mean(dim=1))
    assert torch.equal(logits(method, x), expected)


def test_l2p_keys_learn_from_the_pull_alone() -> None:
    method, stream = make("l2p", top=2, pull=0.3)
    live(method, stream, until=1)
    batch, ctx = next(stream.tasks[0].train.batches(8)), context(stream)
    method.loss(batch, ctx).backward()
    chosen, query = method.chosen(method.query(batch.x)), method.query(batch.x)
    keys = method.keys.detach().clone().requires_grad_(True)
    cos = F.cosine_similarity(query[:, None], keys[chosen], dim=2)
    (-0.3 * cos.sum(dim=1).mean()).backward()
    torch.testing.assert_close(method.keys.grad, keys.grad, rtol=1e-4, atol=1e-6)
    touched = (method.keys.grad != 0).any(dim=1)
    assert touched.nonzero()[:, 0].tolist() == chosen.unique().tolist()
    method, stream = make("l2p", top=2, pull=0.0)
    before = method.keys.detach().clone()
    live(method, stream, budget=adam())
    assert torch.equal(before, method.keys), "no weight decay either"


def test_l2p_with_all_prompts_chosen_does_not_depend_on_keys() -> None:
    method, stream = make("l2p", pool_size=4, top=4)
    live(method, stream)
    x = rows(stream)
    before = logits(method, x)
    with torch.no_grad():
        method.keys.neg_()
    torch.testing.assert_close(logits(method, x), before, rtol=1e-4, atol=1e-5)


def test_l2p_prompts_of_a_task_are_its_own_with_the_mask() -> None:
    options = {"use_prompt_mask": True, "pool_size": 6, "top": 2}
    method, stream = make("l2p", **options)
    found = trace(lambda m: m.prompts.detach().clone(), method, stream)
    assert torch.equal(found[0][:2], found[2][:2])
    assert torch.equal(found[0][4:], found[1][4:])
    assert not torch.equal(found[1][4:], found[2][4:])
    method, stream = make("l2p", **options)
    live(method, stream, until=1)
    assert method.chosen(method.query(rows(stream))).max() < 2, "prompts of later tasks are not chosen"
    with pytest.raises(ConfigError, match=r"method\.top"):
        make("l2p", pool_size=3, top=4)
    with pytest.raises(ConfigError, match=r"method\.copy_prompts"):
        make("l2p", copy_prompts=True)


def test_l2p_keys_from_queries_spread_the_selection() -> None:
    method, stream = make("l2p", keys="queries", pool_size=5, top=1)
    method.begin_task(stream.tasks[0], context(stream))
    queries = torch.cat([method.query(b.x) for b in stream.tasks[0].train.batches(100)])
    assert cosines(method.keys, queries).max(dim=1).values.min() > 1 - 1e-5
    assert len(method.chosen(method.query(rows(stream))).unique()) >= 3


def test_l2p_diversity_turns_from_prompts_chosen_often() -> None:
    options: dict[str, Any] = {"pool_size": 6, "top": 1, "keys": "queries"}
    used = []
    for diversity in (False, True):
        method, stream = make("l2p", diversity=diversity, **options)
        live(method, stream, budget=sgd(epochs=3))
        used.append(method.counts.float() / method.counts.sum())
    assert used[1].max() < used[0].max()


def test_l2p_can_train_its_backbone_and_queries_stay() -> None:
    method, stream = make("l2p", train_backbone=True)
    x = rows(stream)
    query, before = method.query(x), copies(method.backbone)
    live(method, stream)
    assert torch.equal(query, method.query(x))
    assert not same(before, copies(method.backbone))


# --- dualprompt


def test_dualprompt_keys_go_to_the_mean_direction_of_the_queries() -> None:
    method, stream = born(factory("dualprompt"), image_stream(augment=()))
    live(method, stream, until=1)
    task, key = stream.tasks[0], method.keys[0]
    batch, found = next(task.train.batches(100)), []
    for start in (torch.ones(D), method.mean_query(task)):
        with torch.no_grad():
            key.copy_(start / start.norm())
        found.append(torch.autograd.grad(method.loss(batch, context(stream)), key)[0])
    assert found[1].norm() < 1e-6, "the loss is stationary there"
    assert found[0] @ method.mean_query(task) < -1e-2, "and falls towards it"
    mean, stream = make("dualprompt", keys="mean")
    live(mean, stream)
    assert all(torch.equal(key, mean.mean_query(task)) for task, key in zip(stream.tasks, mean.keys, strict=True))


def test_dualprompt_copies_the_last_prompts_and_trains_those_of_the_task() -> None:
    method, stream = make("dualprompt")
    live(method, stream, until=1)
    method.begin_task(stream.tasks[1], context(stream, 1))
    assert torch.equal(method.expert[0], method.expert[1])
    method.loss(next(stream.tasks[1].train.batches(4)), context(stream, 1)).backward()
    assert method.expert[0].grad is None
    assert method.keys[0].grad is None
    assert method.expert[1].grad.abs().min() > 0
    assert method.general.grad.any()


def test_dualprompt_gives_each_image_the_prompts_of_its_task() -> None:
    method, stream = told_apart("dualprompt")
    x = rows(stream)
    found, chosen = logits(method, x), method.chosen(method.query(x))[:, 0]
    assert len(chosen.unique()) == TASKS
    for task in range(TASKS):
        with torch.inference_mode():
            alone = method._logits(x[chosen == task], method.expert[task])
        torch.testing.assert_close(alone, found[chosen == task], rtol=1e-5, atol=1e-5)


# --- coda-prompt


def test_coda_weights_are_the_cosines_of_the_paper() -> None:
    method, stream = make("coda_prompt", components=3)
    live(method, stream, budget=adam())
    q = method.query(rows(stream)[:5])
    weights = method.weights(q)
    assert weights.shape == (5, DEPTH, 9)
    attention, keys = torch.cat([*method.attention], dim=1), torch.cat([*method.keys], dim=1)
    expected = F.cosine_similarity(q[:, None, None] * attention, keys[None], dim=3)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.weights(7 * q), weights, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        method.keys[0].neg_()
    torch.testing.assert_close(method.weights(q)[..., :3], -weights[..., :3])
    with torch.no_grad():
        method.keys[0].neg_()
        before = logits(method, rows(stream))
        for pool in (method.prompts, method.keys, method.attention):
            pool[0].copy_(pool[0].flip(1))
    torch.testing.assert_close(logits(method, rows(stream)), before, rtol=1e-4, atol=1e-5)


def test_coda_components_begin_orthonormal_to_trained_ones() -> None:
    method, stream = make("coda_prompt")
    live(method, stream, until=2, budget=adam(epochs=5))
    method.begin_task(stream.tasks[2], context(stream, 2))
    for pool in (method.prompts, method.keys, method.attention):
        old, new = torch.cat([pool[0], pool[1]], dim=1), pool[2]
        assert not torch.allclose(old[0] @ old[0].t(), torch.eye(10), atol=1e-3), "trained rows are not orthonormal"
        assert (new @ old.transpose(1, 2)).abs().max() < 1e-5
        assert (new @ new.transpose(1, 2) - torch.eye(5)).abs().max() < 1e-5
    assert orthonormal(torch.zeros(0, 4), 4).shape == (4, 4)


def test_coda_needs_an_even_length() -> None:
    with pytest.raises(ConfigError, match=r"method\.length: must be even"):
        make("coda_prompt", length=5)


def test_coda_penalty_is_the_mean_square_deviation() -> None:
    rows_ = torch.randn(2, 3, 8)
    expected = sum(((r @ r.t() - torch.eye(3)) ** 2).mean() for r in rows_)
    torch.testing.assert_close(deviation(rows_), expected)
    plain, stream = make("coda_prompt")
    strict, _ = make("coda_prompt", orthogonality=10.0)
    ends = []
    for method in (plain, strict):
        live(method, stream, budget=adam(epochs=4))
        ends.append(float(deviation(torch.cat([*method.keys], dim=1)).detach()))
    assert ends[1] < ends[0] / 2


# --- dap


def test_dap_prompts_begin_the_same_for_all_images() -> None:
    method, stream = make("dap")
    method.begin_task(stream.tasks[0], context(stream))
    generator, embedding = method.generators[0], method.embeddings[0][None]
    prompts = generator(torch.randn(4, N, D), embedding)
    beta = generator.film(embedding).chunk(2, dim=1)[1][0]
    torch.testing.assert_close(prompts, (beta / beta.norm()).expand(4, 10, D))


def test_dap_prompts_are_the_formula_of_the_paper() -> None:
    method, stream = make("dap", length=3)
    live(method, stream, budget=adam())
    generator, x = method.generators[1], torch.randn(2, N, D)
    embeddings = torch.stack([method.embeddings[0], method.embeddings[2]])
    mixed = torch.einsum("ln,bnd->bld", generator.mixer.weight, generator.norm(x)) + generator.mixer.bias[None, :, None]
    gamma, beta = generator.film(embeddings).chunk(2, dim=1)
    expected = (gamma / gamma.norm(dim=1, keepdim=True))[:, None] * mixed + (beta / beta.norm(dim=1, keepdim=True))[
        :, None
    ]
    torch.testing.assert_close(generator(x, embeddings), expected)
    with torch.no_grad():
        generator.film.weight.mul_(3)
        generator.film.bias.mul_(3)
    torch.testing.assert_close(generator(x, embeddings), expected)


def test_dap_can_restrict_logits_to_the_inferred_task_and_does_not_by_default() -> None:
    method, stream = told_apart("dap")
    x = rows(stream)
    assert method.depends_on_batch is False
    assert method.task_logit_mask is False
    plain = logits(method, x)
    method.task_logit_mask = True
    won = logits(method, x).argmax(dim=1)
    owner = {c: task.index for task in stream.tasks for c in task.classes.tolist()}
    assert [owner[c] for c in won.tolist()] == method.chosen(method.query(x))[:, 0].tolist()
    assert not torch.equal(won, plain.argmax(dim=1))


# --- lae


def test_lae_copy_is_the_closed_form_average() -> None:
    method, stream = make("lae", decay=0.9, decay_batch=None, head_only=1.0)
    found = trace(lambda m: (copies(m.online), copies(m.offline)), method, stream, budget=sgd(epochs=2, batch_size=8))
    assert not found[0][1]
    for name, first in found[0][0].items():
        assert torch.equal(found[2][0][name], first), "only the head learns"
        torch.testing.assert_close(found[2][1][name], first)
    with torch.no_grad():
        for parameter in method.online.parameters():
            parameter.add_(1.0)
    start, target = copies(method.offline), copies(method.online)
    for _ in range(5):
        method.after_step(context(stream, 2))
    for name, tensor in copies(method.offline).items():
        torch.testing.assert_close(tensor, 0.9**5 * start[name] + (1 - 0.9**5) * target[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", ["adapter", "lora", "prefix"])
def test_lae_decay_of_one_holds_and_of_zero_follows(module: str) -> None:
    method, stream = make("lae", module=module, decay=1.0)
    found = trace(lambda m: (copies(m.online), copies(m.offline)), method, stream)
    assert same(found[0][0], found[2][1])
    assert not same(found[2][0], found[2][1])
    method, stream = make("lae", module=module, decay=0.0)
    live(method, stream)
    assert same(copies(method.online), copies(method.offline))
    assert not any(p.requires_grad for p in method.offline.parameters())
    x = rows(stream)
    with torch.inference_mode():
        online = method.logits(x, method.online).log_softmax(dim=1)
    torch.testing.assert_close(logits(method, x), online)


def test_lae_decay_has_its_horizon_in_images() -> None:
    method, stream = make("lae", decay=0.99, decay_batch=24)
    method.begin_task(stream.tasks[0], context(stream, budget=sgd(batch_size=48)))
    assert method.step_decay == pytest.approx(0.99**2)


def test_lae_answers_with_the_larger_probability() -> None:
    method, stream = make("lae", decay=0.5)
    live(method, stream, until=2, budget=adam())
    x = rows(stream)
    seen = method.head.initialised
    with torch.inference_mode():
        both = [method.logits(x, m)[:, seen].softmax(dim=1) for m in (method.online, method.offline)]
    found = logits(method, x)
    torch.testing.assert_close(found[:, seen].exp(), torch.maximum(*both), rtol=1e-5, atol=1e-7)
    assert not found[:, ~seen].any()


def test_lae_lora_in_the_weights_answers_the_same() -> None:
    method, stream = make("lae", module="lora")
    live(method, stream, budget=adam())
    x = rows(stream)
    merged = folded(method.backbone, method.plan(method.online)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(method.head(merged(x)), method.logits(x, method.online), rtol=1e-4, atol=1e-5)


def test_lae_head_learns_alone_in_the_first_steps_of_later_tasks() -> None:
    method, stream = make("lae", head_only=0.5)
    moved: list[bool] = []
    budget = adam(epochs=2)
    live(method, stream, until=1, budget=budget)
    step = method.after_step
    before = copies(method.online)
    method.after_step = lambda ctx: (moved.append(not same(before, copies(method.online))), step(ctx))
    live(method, stream, learned=1, until=2, budget=budget)
    assert moved == [False, False, False, False, True, True, True, True]


# --- aper and ease


def test_aper_changes_nothing_but_sums_after_the_first_task() -> None:
    for adaptation in ("finetune", "ssf", "vpt_deep"):
        method, stream = make("aper", adaptation=adaptation)
        live(method, stream, until=1, budget=adam())
        before = {name: p.detach().clone() for name, p in method.named_parameters()}
        assert not any(p.requires_grad for p in method.parameters())
        live(method, stream, learned=1, budget=adam())
        assert same(before, dict(method.named_parameters()))


def test_aper_prototypes_do_not_depend_on_the_order_of_later_tasks() -> None:
    ends = []
    for order in ((0, 1, 2), (0, 2, 1)):
        method, stream = born(factory("aper"), image_stream("cil", order))
        live(method, stream, budget=adam())
        ends.append(method.head.prototypes.clone())
    assert torch.equal(*ends)


def test_aper_scores_are_cosines_with_class_means() -> None:
    method, stream = born(factory("aper", adaptation="ssf"), image_stream(augment=()))
    live(method, stream, budget=adam())
    batches = [b for task in stream.tasks for b in task.train.batches(100)]
    with torch.inference_mode():
        phi, y = torch.cat([method.both(b.x) for b in batches]), torch.cat([b.y for b in batches])
        means = torch.stack([phi[y == c].mean(dim=0) for c in range(CLASSES)])
        x = method.both(rows(stream))
    assert not torch.allclose(x[:, :D], x[:, D:], atol=1e-2)
    expected = F.cosine_similarity(x[:, None], means[None], dim=2)
    torch.testing.assert_close(logits(method, rows(stream)), expected, rtol=1e-5, atol=1e-5)
    merged = folded(method.backbone, method.adaptation.plan()).eval()
    torch.testing.assert_close(merged(rows(stream)), x[:, D:], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def ease() -> tuple[Any, Stream]:
    method, stream = make("ease", adapter_scale=1.0, cosine_scale=10.0)
    live(method, stream, budget=adam(epochs=3))
    return method, stream


def ease_parts(method: Any, stream: Stream) -> tuple[list[Tensor], list[Tensor]]:
    """Class means [C, D] of real images in each subspace, whatever the task, and test features [n, D]."""
    means, features = [], []
    with torch.inference_mode():
        for place in range(TASKS):
            batches = [b for task in stream.tasks for b in task.train.batches(256)]
            f, y = torch.cat([method.inside(place, b.x) for b in batches]), torch.cat([b.y for b in batches])
            means.append(torch.stack([f[y == c].mean(dim=0) for c in range(CLASSES)]))
            features.append(method.inside(place, rows(stream)))
    return means, features


def test_ease_prototypes_and_scores_are_those_of_the_paper(ease: tuple[Any, Stream]) -> None:
    method, stream = ease
    means, features = ease_parts(method, stream)
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    assert [t.classes.tolist() for t in stream.tasks] == [[0, 1], [2, 3], [4, 5]]
    expected = [m.clone() for m in means]
    for place in range(TASKS):
        for old in range(place):
            real = owner >= place
            weights = F.cosine_similarity(means[old][owner == old][:, None], means[old][real][None], dim=2).softmax(
                dim=1
            )
            expected[place][owner == old] = weights @ means[place][real]
    for place in range(TASKS):
        torch.testing.assert_close(method.space(place).head.prototypes, expected[place], rtol=1e-4, atol=1e-4)
    scores = torch.zeros(len(features[0]), CLASSES)
    for place in range(TASKS):
        cosine = F.cosine_similarity(features[place][:, None], expected[place][None], dim=2)
        scores += torch.where(owner == place, 1.0, 0.1 / 2) * cosine
    torch.testing.assert_close(logits(method, rows(stream)), scores, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(features[0], features[1], atol=1e-2)


def test_ease_without_other_subspaces_scores_in_its_own(ease: tuple[Any, Stream]) -> None:
    method, stream = copy.deepcopy(ease[0]), ease[1]
    method.alpha = 0.0
    x = rows(stream)
    found = logits(method, x)
    method.needs_task_id = True
    with torch.inference_mode():
        for task in stream.tasks:
            torch.testing.assert_close(found[:, task.classes], method(x, task.index)[:, task.classes])


def test_ease_similarities_are_distributions() -> None:
    weights = similarity(torch.randn(3, D), torch.randn(5, D))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    assert weights.max() / weights.min() < torch.e**2 + 1e-3


def test_ease_adapters_at_their_start_are_the_plain_model() -> None:
    method, stream = make("ease")
    live(method, stream, budget=sgd(epochs=0))
    x = rows(stream)
    assert all(torch.equal(method.inside(place, x), method.query(x)) for place in range(TASKS))


def test_ease_takes_one_pass_a_task(ease: tuple[Any, Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    method, stream = ease
    passes = []
    forward = type(method.backbone).forward
    monkeypatch.setattr(type(method.backbone), "forward", lambda self, x: (passes.append(len(x)), forward(self, x))[1])
    logits(method, rows(stream))
    assert passes == [len(rows(stream))] * TASKS


def test_ease_averages_domains() -> None:
    method, stream = make("ease", "dil")
    live(method, stream, budget=adam())
    assert [int(method.space(k).stats.total()) for k in range(TASKS)] == [
        sum(len(task.train) for task in stream.tasks[k:]) for k in range(TASKS)
    ]
    x = rows(stream)
    with torch.inference_mode():
        expected = sum(method._cosines(method.space(k), x) for k in range(TASKS))
    torch.testing.assert_close(logits(method, x), expected)


# --- selection


def test_choosing_for_images_and_for_a_batch() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    assert choose(scores, 2, "instance").tolist() == [[0, 1], [1, 2], [3, 2]]
    assert choose(scores, 2, "batch").tolist() == [[1, 2]] * 3
    assert choose(scores[:1].expand(2, -1).flip(1), 1, "batch").tolist() == [[3], [3]]
    assert choose(torch.eye(3), 2, "batch")[0].tolist()[0] == 0, "the smallest index among equals"


def test_cosines_do_not_lose_precision_under_autocast() -> None:
    q, k = torch.randn(4, D), torch.randn(5, D)
    expected = F.cosine_similarity(q[:, None], k[None], dim=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cosines(q, k), expected, rtol=1e-5, atol=1e-6)


# --- queries are computed once


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda_prompt", "dap"])
def test_cached_queries_are_the_computed_ones(name: str) -> None:
    method, stream = told_apart(name) if name in BATCHED else lived(name)[:2]
    evaluation = Evaluation(cpu(), "test", 5, None)
    passes = counted(method.backbone)
    method.eval()
    with torch.inference_mode():
        first = [z for task in stream.tasks for z, _ in evaluation.logits(method, task)]
        images = len(rows(stream))
        assert sum(passes) == 2 * images
        again = [z for task in stream.tasks for z, _ in evaluation.logits(method, task)]
        assert sum(passes) == 3 * images, "the second time without queries"
        direct = [method(b.x) for task in stream.tasks for b in task.test.batches(5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.cat(first), torch.cat(direct))


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda_prompt", "dap"])
@pytest.mark.parametrize("augment", [(), ("crop",)], ids=["plain", "augmented"])
def test_training_queries_are_computed_once_when_nothing_is_augmented(name: str, augment: tuple[str, ...]) -> None:
    method, stream = born(factory(name), image_stream(augment=augment))
    task, ctx = stream.tasks[0], context(stream, budget=sgd(epochs=3))
    method.begin_task(task, ctx)
    passes = counted(method.backbone)
    method.learn(task, ctx)
    assert sum(passes) == len(task.train) * (6 if augment else 4)
    assert method.stored_queries is None
    for batch in task.train.batches(7):
        method.stored_queries = torch.cat([method.query(b.x) for b in task.train.batches(256)])
        torch.testing.assert_close(method.training_query(batch), method.query(batch.x), rtol=1e-5, atol=1e-5)


def counted(backbone: nn.Module) -> list[int]:
    """Return a list that grows by the images of each pass."""
    passes: list[int] = []
    backbone.patch_embed.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    return passes


# --- what is chosen


@pytest.mark.parametrize("name", BATCHED)
def test_choices_are_counted_by_true_task(name: str) -> None:
    method, stream = told_apart(name, {"keys": "queries", "top": 2} if name == "l2p" else {})
    found = selection_counts(method, stream, Evaluation(cpu(), "test", 5, None))["selection"]
    columns = 10 if name == "l2p" else TASKS
    expected = torch.zeros(TASKS, columns, dtype=torch.long)
    for task in stream.tasks:
        for batch in task.test.batches(100):
            for row in method.chosen(method.query(batch.x)).tolist():
                for component in row:
                    expected[task.index, component] += 1
    assert found["counts"] == expected.tolist()
    assert found["used"] == int((expected.sum(dim=0) > 0).sum())
    assert 0 < found["entropy"] < 1


def test_a_collapsed_selection_has_no_entropy_and_others_none_to_report() -> None:
    method, stream, _, _ = lived("dualprompt")
    with torch.no_grad():
        method.keys[0].copy_(method.mean_query(stream.tasks[0]))
        for key in list(method.keys)[1:]:
            key.copy_(-method.keys[0])
    found = selection_counts(method, stream, Evaluation(cpu(), "test", 5, None))["selection"]
    assert (found["used"], found["entropy"]) == (1, 0)
    for name in ("vpt", "coda_prompt"):
        method, stream, _, _ = lived(name)
        assert selection_counts(method, stream, Evaluation(cpu(), "test", 5, None)) == {}


def test_the_picture_of_choices(tmp_path: Path) -> None:
    run = {"name": "l2p", "selection": {"counts": [[5, 0, 3], [0, 0, 8]], "used": 2, "entropy": 0.4}}
    draw_selection(run, tmp_path / "selection.png")
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
