"""InfLoRA: low-rank updates in directions that old inputs do not use (Liang and Li, CVPR 2024, arXiv 2404.00228).

The public code is liangyanshuo/InfLoRA (MIT). Memory between tasks, for T tasks and n fused layers of width D with g of
the parts q, k, v: with fold=true the folded weights, 12 n D^2 bytes, else 4 T n (1 + g) D r; and the basis of protected
directions, at most 4 n D^2 bytes (8 n D^2 with basis=keep); and 8 C bytes that say which task a class belongs to. With
an alignment also its Gaussians, as in `slca`. Task id: not needed.

Deviations: the schedule of epsilon in the public code reaches eps + (eps_final - eps) (T - 1) / T, as here; directions
whose singular values are rounding are 0 instead of arbitrary ones, which may be protected; with basis=dual a first task
that needs more than half of all directions stores the rest of them (the public code stores the directions themselves);
bases are computed in float64. The moments of the train view are drawn from a generator of their own.

Verified: A has rows of length 1/sqrt(3) outside the protected directions, old inputs have the same keys and values
before and after, old updates and rows of the head stand still bit for bit, both bases give one projection, folded
weights give the same logits, ranks and singular values equal those computed by hand (test_methods_inflora,
test_blocks_input_space).
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.gaussian import Alignment
from clrun.blocks.inject import Plan
from clrun.blocks.input_space import Energy, InputSpace
from clrun.blocks.lora import linear_at
from clrun.blocks.moments import second_moments
from clrun.blocks.params import eval_mode
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.methods.updated import Updated
from clrun.system.errors import Count, Fraction, NonNegative, PositiveInt

ROWS = 64  # images per pass over the inputs of layers


class Inflora(Updated):
    """Choose A_t in closed form outside the inputs of old tasks, and train B_t alone.

        h = W x + b + sum_(i<=t) B_i A_i x            for keys and values, which share A_t [r, D]; queries are unchanged
        C_t = mean of x x' over the tokens of task t, with the updates of tasks before t
        A_t = U' / sqrt(3), U the first r left singular vectors of (I - P) C_t; of C_0 for the first task

    P projects onto the protected directions, those that take the share eps_t of the energy of the inputs x of old tasks
    (`clrun.blocks.input_space.InputSpace`). A_t is frozen, so that a change of B_t leaves the outputs for inputs in
    these directions as they are. After a task the inputs of its rows, with its own update, are measured again, and
    further directions are protected. eps_t = eps + (eps_final - eps) t / T grows with the position t of T tasks.

    Each task trains the rows of its classes in one head by the cross-entropy over these classes; older rows stand
    still. The backbone is in eval mode. Predictions take one pass and no task id.

    With `alignment`, all rows of the head are trained after each task but the first on Gaussians of all classes
    (InfLoRA+CA in the public code), as in `slca`, whose options these are; the next task starts from the aligned head.

    Args:
        backbone: a transformer with numbered blocks, frozen.
        num_classes: C.
        parts: of queries, keys and values, those with updates; published "kv". They share A in a fused `qkv`.
        layers: patterns of the paths of further linear layers with updates, such as "*.mlp.fc1".
        blocks: numbers of the blocks with updates; null for all. The variant InfLoRA-b5 has [0, 1, 2, 3, 4].
        rank: r.
        eps: share of the energy that is protected after the first task.
        eps_final: where this share tends to with the last task; equal to `eps` for a constant share, which needs no
            number of tasks.
        energy: "squared", as the public code computes the share, or "plain", as GPM defines it.
        basis: "dual" stores the smaller one of a basis and of its complement (DualGPM); "keep" the basis (GPM).
        moment_view: the images whose inputs are measured: "train", augmented as in training (public code), or "eval".
        fold: store the sum of W and all finished updates as one weight per layer, and A and B of none. A pass then
            costs the same for any number of tasks. false keeps all A_i and B_i.
        lr_scale: learning rate of B_t, relative to that of the budget, which is the head's.
        alignment: options of an alignment of the head, see `clrun.blocks.gaussian.Alignment`; null for none.
        mean_shrink: largest reduction of the means of old classes in the alignment.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    latest: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        parts: str,
        layers: list[str],
        blocks: list[Count] | None,
        rank: PositiveInt,
        eps: Fraction,
        eps_final: Fraction,
        energy: Energy,
        basis: Literal["dual", "keep"],
        moment_view: Literal["train", "eval"],
        fold: bool,
        lr_scale: NonNegative,
        alignment: Alignment | None,
        mean_shrink: Fraction,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone, num_classes, parts=parts, layers=layers, blocks=blocks, lr_scale=lr_scale, compete=compete
        )
        self.rank, self.eps, self.eps_final, self.fold = rank, eps, eps_final, fold
        self.depends_on_task_count = eps != eps_final
        self.moment_view: Literal["train", "eval"] = moment_view
        spaces = (
            InputSpace(layer.in_features, energy=energy, dual=basis == "dual", at_least=1)
            for layer in self.layers().values()
        )
        self.spaces = nn.ModuleList(spaces)
        self.folded = nn.ParameterList()  # W and all finished updates, of each layer; empty before there is one
        self.alignment, self.mean_shrink = alignment, mean_shrink
        self.replay = None if alignment is None else alignment.replay(int(backbone.num_features), num_classes)  # type: ignore[arg-type]
        self.register_buffer("latest", torch.full((num_classes,), -1))  # position of the task of each class

    def layers(self) -> dict[str, nn.Linear]:
        """Return the layers with updates, by their paths; the state of the method does not contain them."""
        return {path: linear_at(self.backbone, path, type(self).__name__) for path in self.sites}

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        moments = self.moments(task, ctx)
        self.grow_updates(self.rank, share_down=True)
        for (path, update), space in zip(self.newest().items(), self.by_site(), strict=True):
            rows = space.leading(moments[path], self.rank) / 3**0.5
            with torch.no_grad():
                update.down.copy_(rows.expand_as(update.down))
            update.trains(down=False, up=True)

    def by_site(self) -> list[InputSpace]:
        """Return the protected directions of each layer, in the order of `sites`."""
        return list(self.spaces)  # type: ignore[arg-type]

    def moments(self, task: Task, ctx: Context) -> dict[str, Tensor]:
        """Return the second moments [D, D] float64 of the inputs of each layer, by its path, as the method is now."""
        shuffle = ctx.generator("moments") if self.moment_view == "train" else None

        def images() -> Iterator[Tensor]:
            for batch in task.train.batches(ROWS, view=self.moment_view, shuffle=shuffle):
                yield ctx.hardware.layout(batch.x)

        with eval_mode(self):
            found = second_moments(self.backbone, self.layers(), images(), bias=False, forward=self.features)
        return {path: found[path].mean() for path in self.sites}

    def plan(self) -> Plan:
        plan = super().plan()
        return Plan(parallel=plan.parallel, weights=dict(zip(self.sites, self.folded, strict=False)))

    def share(self, ctx: Context) -> float:
        """Return eps_t, the share of the energy of inputs that is protected after this task."""
        return self.eps + (self.eps_final - self.eps) * ctx.task.index / len(ctx.stream.tasks)

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        moments = self.moments(task, ctx)
        for path, space in zip(self.sites, self.by_site(), strict=True):
            space.update(moments[path], self.share(ctx))
        kept = {f"protected.{path}": space.dimension for path, space in zip(self.sites, self.by_site(), strict=True)}
        ctx.log({"phase": "input_space", "share": self.share(ctx), **kept})
        freeze(self.sums)
        if self.fold:
            self._fold()
        self.latest[task.classes.to(self.latest.device)] = task.index
        if self.replay is not None:
            self._align(task, ctx)

    @torch.no_grad()
    def _fold(self) -> None:
        """Add the newest update of each layer to its folded weight, and drop it."""
        before = list(self.folded) or [layer.weight for layer in self.layers().values()]
        deltas = [total.delta() for total in self.by_path().values()]
        self.folded = nn.ParameterList(
            nn.Parameter(weight + delta.to(weight), requires_grad=False)
            for weight, delta in zip(before, deltas, strict=True)
        )
        for total in self.by_path().values():
            total.updates = nn.ModuleList()

    def _align(self, task: Task, ctx: Context) -> None:
        """Add the Gaussians of the classes of the task and, from the second task on, align the head to all of them."""
        assert self.replay is not None and self.alignment is not None
        with torch.no_grad(), eval_mode(self):
            self.replay.add(self.replay.measured(self.features, task.train))
        if task.index:
            self.alignment.fit(self, self.head, ctx, draw=self._replayed(ctx), groups=self.latest)

    def _replayed(self, ctx: Context) -> Callable[[], Tensor]:
        """Return a function that draws features [k, N, D] of all classes so far."""
        assert self.replay is not None and self.alignment is not None
        classes, rows = self.replay.classes, self.alignment.rows_per_class
        ages = (ctx.task.index - self.latest[classes]).double()
        draw = self.replay.aged(classes, ages, ctx, shrink=self.mean_shrink)
        return lambda: draw(rows)
