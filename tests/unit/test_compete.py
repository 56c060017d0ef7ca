"""The option `compete`: which classes compete in the training loss, in every method with a cross-entropy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import born, context, factory, image_stream, live, sgd
from running import configuration, quiet, run
from torch import Tensor

from clrun.blocks.curvature import diagonal_fisher
from clrun.data.split import Batch
from clrun.learning.losses import Compete
from clrun.learning.method import Method
from clrun.running.run import preflight
from clrun.system.errors import ConfigError, DataWarning
from clrun.system.seeding import seed_all

VALUES: tuple[Compete, ...] = ("current", "seen", "all")
# Options under which the cross-entropy on the current task's rows is the only term that reaches the head.
ALONE: dict[str, dict[str, Any]] = {
    "a_gem": {},
    "blip": {},
    "coda_prompt": {},
    "cofima": {},
    "coma": {},
    "dap": {},
    "der": {"alpha": 0.0, "beta": 0.0},
    "dualprompt": {},
    "ebll": {"strength": 0.0, "code_strength": 0.0},
    "er": {},
    "ewc": {},
    "finetune": {},
    "gem": {},
    "gpm": {},
    "hide_prompt": {"tii": {"budget": {"epochs": 0}}},
    "icarl": {"loss": "ce", "strength": 0.0},
    "inflora": {},
    "joint": {},
    "kfac_ewc": {"solver": "grad"},
    "l2": {},
    "l2p": {},
    "lae": {"head_only": 0.0},
    "linear_probe": {},
    "lora": {},
    "lwf": {"strength": 0.0},
    "mas": {},
    "mer": {"draws": 1, "chunk": 5},
    "mos": {},
    "ncl": {},
    "o_lora": {"orthogonality": 0.0},
    "qr": {},
    "replay_finetune": {"per_task": 0},
    "sd_lora": {},
    "sema": {"rd": {"epochs": 0}},
    "si": {},
    "slca": {},
    "slca_pp": {},
    "tuna": {},
    "vit_pad": {"strength": 0.0, "map_strength": 0.0},
    "vpt": {},
}
LABELLED = [
    name
    for name in ALONE
    if name not in ("coda_prompt", "dap", "dualprompt", "hide_prompt", "l2p", "lae", "mos", "sema", "slca_pp", "tuna")
]


def second_task(name: str, compete: Compete, setting: Any = "cil") -> tuple[Method, Batch, Any]:
    """Return a method that has begun its second task, a batch of it, and the context."""
    method, stream = born(factory(name, compete=compete, **ALONE[name]), image_stream(setting, train_rows=8))
    live(method, stream, until=1, budget=sgd(epochs=1))
    ctx = context(stream, 1)
    seed_all(0, "begin")
    method.begin_task(stream.tasks[1], ctx)
    method.train()
    ctx.progress.total = 100  # the first step of many, in which der stores nothing
    return method, next(stream.tasks[1].train.batches(8)), ctx


def expected(compete: Compete, setting: str) -> list[int]:
    """Return the classes that compete with rows of the second of three tasks of two classes."""
    if compete == "all":
        return [0, 1, 2, 3, 4, 5]
    return [2, 3] if compete == "current" or setting == "til" else [0, 1, 2, 3]


@pytest.mark.parametrize("compete", VALUES)
@pytest.mark.parametrize("name", ALONE)
def test_rows_of_classes_out_of_competition_receive_exactly_no_gradient(name: str, compete: Compete) -> None:
    for setting in ("cil", "til"):
        method, batch, ctx = second_task(name, compete, setting)
        method.loss(batch, ctx).backward()
        rows = method.head.weight.grad.abs().sum(dim=1)
        assert rows.nonzero()[:, 0].tolist() == expected(compete, setting)


@pytest.mark.parametrize("name", LABELLED)
def test_all_is_a_plain_softmax_cross_entropy(name: str) -> None:
    method, batch, ctx = second_task(name, "all")
    method.eval()
    value, logits = method.loss(batch, ctx), method(batch.x)
    assert (logits[:, 4:] != 0).all(), "classes that have not come yet have rows too"
    penalty = method.strength * method.penalty(method.backbone) if name in ("ewc", "kfac_ewc", "l2", "mas") else 0.0
    torch.testing.assert_close(value, F.cross_entropy(logits, batch.y) + penalty)


@pytest.mark.parametrize("name", ["coda_prompt", "dap", "dualprompt", "l2p", "lae"])
def test_all_is_a_plain_softmax_cross_entropy_in_prompt_methods(name: str) -> None:
    method, batch, ctx = second_task(name, "all")
    logits = torch.randn(len(batch), 6, generator=torch.Generator().manual_seed(0))
    value = method.classification_loss(logits, batch, ctx)
    torch.testing.assert_close(value, F.cross_entropy(logits, batch.y))


@pytest.mark.parametrize("compete", VALUES)
def test_a_replayed_row_is_judged_among_the_classes_of_its_own_task_or_of_all(compete: Compete) -> None:
    method, stream = born(factory("er", compete=compete), image_stream())
    ctx = context(stream, 2)
    t = torch.tensor([0, 1, 2])
    found = [row.nonzero()[:, 0].tolist() for row in method.competing(t, ctx)]
    seen = {"current": [[0, 1], [2, 3], [4, 5]], "seen": [[0, 1, 2, 3, 4, 5]] * 3, "all": [[0, 1, 2, 3, 4, 5]] * 3}
    assert found == seen[compete]
    earlier = [row.nonzero()[:, 0].tolist() for row in method.competing(t[:2], context(stream, 1))]
    assert (
        earlier == {"current": [[0, 1], [2, 3]], "seen": [[0, 1, 2, 3]] * 2, "all": [[0, 1, 2, 3, 4, 5]] * 2}[compete]
    )


@pytest.mark.parametrize("name", ["finetune", "joint", "er"])
def test_all_initialises_every_row_once_and_from_the_start(name: str) -> None:
    method, stream = born(factory(name, compete="all"), image_stream())
    seed_all(0, "task", 0)
    method.begin_task(stream.tasks[0], context(stream, 0))
    first = method.head.weight.detach().clone()
    bound = 1 / first.shape[1] ** 0.5
    assert method.head.initialised.all() and (first != 0).all() and (first.abs() <= bound).all()
    if name != "joint":  # which begins each task anew
        method.begin_task(stream.tasks[1], context(stream, 1))
        assert torch.equal(method.head.weight, first)


def test_predictions_are_among_the_candidates_of_the_setting_whatever_competes() -> None:
    method, stream = born(factory("finetune", compete="all"), image_stream())
    with torch.no_grad():  # a class that has not come yet has the largest logit of all
        method.begin_task(stream.tasks[0], context(stream, 0))
        method.head.bias[5] = 1e4
    frozen = method.head.bias.detach().clone()
    journal = live(method, stream, until=1)
    assert method.head.bias[5] > frozen[5] / 2
    correct = [row["correct"] / row["total"] for row in journal.recorded if row["setting"] == "cil"]
    assert correct and min(correct) > 0, "class 5 is no candidate after the first task"


@pytest.mark.parametrize(
    ("compete", "rows"), [("current", [2, 3]), ("seen", [0, 1, 2, 3]), ("all", [0, 1, 2, 3, 4, 5])]
)
def test_the_fisher_information_is_that_of_the_loss_that_is_trained(compete: Compete, rows: list[int]) -> None:
    method, _, ctx = second_task("ewc", compete)
    fisher = diagonal_fisher(method, ctx.task.train, ctx, of=method.head, labels="exact", samples=None)
    values = fisher.params(fisher.values)["weight"].sum(dim=1)
    assert values.nonzero()[:, 0].tolist() == rows


def test_progress_and_compress_learns_and_distils_among_the_classes_that_compete() -> None:
    for compete in VALUES:
        method, stream = born(factory("progress_compress", compete=compete), image_stream())
        live(method, stream, until=1)
        ctx = context(stream, 1)
        method.begin_task(stream.tasks[1], ctx)
        batch = next(stream.tasks[1].train.batches(8))
        method.progress_loss(batch, ctx).backward()
        assert rows_of(method.active.head.weight.grad) == expected(compete, "cil")
        target = torch.randn(len(batch), 6, generator=torch.Generator().manual_seed(0))
        method.compress_loss(batch, target, ctx).backward()
        assert rows_of(method.head.weight.grad) == expected(compete, "cil")


def rows_of(gradient: Tensor) -> list[int]:
    """Return the classes whose rows have a gradient."""
    return gradient.abs().sum(dim=1).nonzero()[:, 0].tolist()


def test_dgc_judges_rows_as_its_host_does() -> None:
    for compete, classes in (("current", 2), ("seen", 4), ("all", 6)):
        method, stream = born(factory("dgc", host={"compete": compete}), image_stream())
        live(method, stream, until=1)
        ctx = context(stream, 1)
        method.begin_task(stream.tasks[1], ctx)
        assert method.competing(torch.tensor([1]), ctx).sum() == classes
        assert method.competed.sum(dim=1).tolist() == [6 if compete == "all" else 2, classes]


def test_der_compares_real_logits_of_classes_to_come_when_all_compete() -> None:
    stored = {}
    for compete in VALUES:
        method, stream = born(factory("der", compete=compete, match="fixed"), image_stream())
        live(method, stream, until=1)
        stored[compete] = method.memory.logits[: len(method.memory), 2:]
    assert not stored["seen"].any() and not stored["current"].any()
    assert (stored["all"] != 0).all()


@pytest.mark.parametrize(
    ("method", "old"), [("finetune", "heads=current"), ("lwf", "heads=all"), ("vpt", "mask_loss=seen")]
)
def test_the_former_options_are_unknown(method: str, old: str) -> None:
    with pytest.raises(ConfigError, match=rf"method.*'?{old.split('=')[0]}'?"):
        configuration(f"method={method}", f"method.{old}")


def test_a_wrong_value_is_refused_with_the_right_ones() -> None:
    with pytest.raises(ConfigError, match="compete.*current.*seen.*all"):
        configuration("method=er", "method.compete=future")


WARNED = ("method=der", "method.match=seen", "method.beta=0")


def test_der_warns_when_nothing_holds_down_later_classes(tmp_path: Path) -> None:
    with pytest.warns(DataWarning, match=r"^method\.match=seen with method\.beta=0 ends at the level of finetuning"):
        preflight(quiet(*WARNED)[0])
    run(tmp_path, *WARNED, "job.max_tasks=1", "job.max_steps=1")
    notes = json.loads((tmp_path / "run.json").read_text())["notes"]
    assert sum(note.startswith("method.match=seen with method.beta=0") for note in notes) == 1


@pytest.mark.parametrize("options", [("method.beta=0.5",), ("method.match=fixed",), ("method.alpha=0",)])
def test_der_does_not_warn_otherwise(options: tuple[str, ...], recwarn: pytest.WarningsRecorder) -> None:
    preflight(quiet(*WARNED, *options)[0])
    assert not [warning for warning in recwarn if issubclass(warning.category, DataWarning)]


def test_dgc_passes_on_the_warning_of_its_host() -> None:
    host = "{_target_: clrun.methods.der.Der, _partial_: true, capacity: 9, replay_size: null, alpha: 1.0, beta: 0.0, "
    host += "store: last_epoch, match: seen, compete: seen}"
    with pytest.warns(DataWarning, match="ends at the level of finetuning"):
        preflight(quiet("method=dgc", f"+method.host={host}")[0])
