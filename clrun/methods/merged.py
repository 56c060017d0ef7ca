"""The base of methods that train a network per task and predict with the merge of all of them."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.curvature import Labels
from clrun.blocks.merging import Ema, Evidence, Merge, estimate_statistics, evidence_of, linear_weights
from clrun.blocks.params import Params, clone, select
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import Method
from clrun.system.errors import ConfigError

Start = Literal["initial", "previous", "merged", "runs"]
Sums = Literal["exact", "single"]


class Merged(Method):
    """When a task ends, its network is added to a rule, and the backbone becomes the merge of all networks so far.

    Predictions use the merge. Only the trained parameters of the backbone are merged. A row of the head is the one that
    was trained with its task, unless earlier classes compete in the loss: with compete=current the rows of other
    classes are as before when a task ends, also where weight decay has moved them. In class-incremental evaluations
    rows of different tasks compete that were never compared in training; with two towers and `backbone.head=fixed` the
    rows are texts, and there is nothing to merge. Running statistics of batch normalisation are estimated anew on the
    task's rows whenever the merge differs from the trained network; integer buffers are those of the newest network.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        rule: an unused rule.
        train_from: the weights that a task starts from: "initial", so that every network is trained independently;
            "previous", those at the end of the previous training, before the merge; "merged"; "runs" is what
            `clrun merge` writes for networks of finished runs, and cannot be trained.
        labels: how the labels of the Fisher information are chosen, see `clrun.blocks.curvature.estimate`.
        samples: number of rows of the task for Fisher information and second moments; None for all.
        modules: shell-style patterns; parameters of the backbone are trained and merged if their name, or that of their
            module, matches one. All others stay as they are.
        sums: "exact", so that a rule which commutes gives the same bits for every order of tasks; or "single".
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        rule: Merge,
        train_from: Start,
        labels: Labels,
        samples: int | None,
        modules: Sequence[str],
        sums: Sums,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        train_only(backbone, modules)
        self.rule, self.train_from, self.labels, self.samples = rule, train_from, labels, samples
        self.rule.begin(
            select(backbone),
            linear=linear_weights(backbone),
            keep=train_from == "initial",
            exact=sums == "exact",
        )
        self.start: Params = {}  # buffers, and with train_from=previous parameters, that a task starts from
        if train_from == "initial":
            self.start = clone(dict(backbone.named_buffers()))
        normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
        self.order_invariant = (
            rule.commutes and sums == "exact" and train_from == "initial" and compete == "current" and not normalised
        )

    def check(self, stream: Stream) -> None:
        super().check(stream)
        if stream.setting == "dil":
            self.order_invariant = False  # all tasks train the same rows of the head, one after the other

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.start = {name: value.to(ctx.hardware.device) for name, value in self.start.items()}
        if task.index and self.train_from != "merged":
            self.set_backbone(self.start | self._initial())

    def learn(self, task: Task, ctx: Context) -> None:
        before = clone(dict(self.head.named_parameters()))
        super().learn(task, ctx)
        if self.compete == "current":
            others = torch.ones(self.num_classes, dtype=torch.bool, device=ctx.hardware.device)
            others[task.classes.to(others.device)] = False
            with torch.no_grad():
                for name, parameter in self.head.named_parameters():
                    parameter[others] = before[name][others]

    def after_step(self, ctx: Context) -> None:
        super().after_step(ctx)
        if isinstance(self.rule, Ema):
            self.rule.extend(ctx.progress.total)
            self.rule.add(select(self.backbone))

    def end_task(self, task: Task, ctx: Context) -> None:
        trained = select(self.backbone)
        if not self.rule.every_step:
            found = evidence_of(self.rule.needs, self, task.train, ctx, labels=self.labels, samples=self.samples)
            merged = self.merge(trained, found, task)
        else:
            merged = self.rule.value(trained)
        if self.train_from == "previous":
            self.start = clone(trained | dict(self.backbone.named_buffers()))
        if any(not torch.equal(value, trained[name]) for name, value in merged.items()):
            self.set_backbone(merged)
            estimate_statistics(self.backbone, task.train)

    def merge(self, trained: Mapping[str, Tensor], found: Evidence, task: Task) -> Params:
        """Add the parameters of the network that `task` has trained to the rule, and return the merge."""
        self.rule.add(trained, found, key=task.id)
        return self.rule.value(trained)

    def _initial(self) -> Params:
        """Return the initial parameters where tasks start from them."""
        return self.rule.params(self.rule.initial) if self.train_from == "initial" else {}

    def set_backbone(self, values: Params) -> None:
        """Set parameters and buffers of the backbone by name."""
        own = dict(self.backbone.named_parameters()) | dict(self.backbone.named_buffers())
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)


def train_only(backbone: nn.Module, modules: Sequence[str]) -> None:
    """Stop the training of the parameters that no pattern matches; see `Merged`.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    found = select(backbone)
    names = {name: (name, name.rpartition(".")[0]) for name in found}
    for pattern in modules:
        if pattern != "*" and not any(fnmatchcase(n, pattern) for pair in names.values() for n in pair):
            known = ", ".join(dict.fromkeys(module or name for name, module in names.values()))
            raise ConfigError(f"method.modules: no trained parameter matches '{pattern}' (modules: {known})")
    for name, parameter in found.items():
        parameter.requires_grad_(any(fnmatchcase(n, pattern) for n in names[name] for pattern in modules))
