"""SD-LoRA: low-rank directions of finished tasks stand still, their magnitudes are trained on (Wu et al., ICLR 2025).

arXiv 2501.13198; the public code is WuYichen-97/SD-Lora-CL (MIT). Memory between tasks, of T tasks: in a fused `qkv`
8 T D r bytes for each of the chosen parts (and 8 r T for other layers m + n instead of 2 D), a number per task, and per
layer T k + T G for the k pairs that are kept and the G parts. Task id: not needed.

Deviations: a direction without length (B = 0) counts as 0. With carry=true the directions of a task are divided by one
number, the root mean square of their norms over all layers, which alpha is multiplied by: one alpha per task could not
take up a different factor for each layer. With merge_below a pair is dropped if all parts of its layer are below the
threshold, and alpha of its task stays a trained number that multiplies what stands for the pair.

Verified: the first task is LoRA with a trained scale, directions have the norms of the paper or of the public code and
stand still while magnitudes move, carried magnitudes leave the logits at a boundary, and a dependent direction is
dropped without a change of the outputs (test_methods_sd_lora, test_methods_lora).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.lora import Summed
from clrun.blocks.params import rate_groups
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.methods.updated import Updated
from clrun.system.errors import ConfigError, Count, NonNegative, Positive, PositiveInt

Norm = Literal["factors", "product"]


class Directions(Summed):
    """The sum of updates whose gains are the magnitudes of the tasks over the norms of the updates.

    Args:
        magnitudes: alpha, one number per task; only referred to.

    Attributes:
        mix: [T, k, G], how much of each of the k updates stands for each of the T tasks, by part; 1 where an update is
            that of the task, coefficients where the task's own has been dropped.
        inverse: [k, G], the factor of each update.
    """

    mix: Tensor
    inverse: Tensor

    def __init__(self, magnitudes: nn.ParameterList, parts: int) -> None:
        super().__init__()
        self._magnitudes = (magnitudes,)
        self.register_buffer("mix", torch.zeros(0, 0, parts))
        self.register_buffer("inverse", torch.zeros(0, parts))

    def begin(self, magnitudes: nn.ParameterList) -> None:
        """Make room for the update of a new task, whose gain is its magnitude."""
        self._magnitudes = (magnitudes,)
        tasks, kept, parts = self.mix.shape
        mix = self.mix.new_zeros(tasks + 1, kept + 1, parts)
        mix[:tasks, :kept] = self.mix
        mix[tasks, kept] = 1
        self.mix, self.inverse = mix, torch.cat([self.inverse, self.inverse.new_ones(1, parts)])

    def gains(self) -> Sequence[Tensor]:
        """Return g_i [G] of each of the k updates."""
        alphas = torch.stack([*self._magnitudes[0]])
        return (torch.einsum("t,tkg->kg", alphas, self.mix) * self.inverse).unbind()

    def norms(self, norm: Norm) -> Tensor:
        """Return the norms [G] of the newest update."""
        down, up = self.updates[-1].factors()  # type: ignore[operator]
        if norm == "factors":
            found: Tensor = down.flatten(1).norm(dim=1) * up.flatten(1).norm(dim=1)
            return found
        return products(down, up, down, up).clamp(min=0).sqrt().to(down)

    def drop_if_dependent(self, threshold: float) -> bool:
        """Drop the newest update if older ones stand for its direction, and return whether they do.

        The direction of each part is regressed on the older ones by least squares; the squared norm of what is left
        must be below the threshold in each part.
        """
        updates = list(self)
        if len(updates) < 2:
            return False
        factors = [update.factors() for update in updates]
        gram = torch.stack([torch.stack([products(*a, *b) for b in factors]) for a in factors])  # [k, k, G]
        gram = gram * self.inverse.double()[:, None] * self.inverse.double()[None]
        found = []
        for part in gram.unbind(dim=2):
            weights = torch.linalg.lstsq(part[:-1, :-1], part[:-1, -1:], driver="gelsd").solution[:, 0]
            left = part[-1, -1] - 2 * weights @ part[:-1, -1] + weights @ part[:-1, :-1] @ weights
            if not float(left) < threshold:
                return False
            found.append(weights)
        self.updates = nn.ModuleList(updates[:-1])
        self.mix = self.mix[:, :-1].clone()
        self.mix[-1] = torch.stack(found, dim=1).to(self.mix)
        self.inverse = self.inverse[:-1].clone()
        return True


def products(down: Tensor, up: Tensor, other_down: Tensor, other_up: Tensor) -> Tensor:
    """Return the inner products [G] float64 of B A and B' A' of each part, from their factors.

    Args:
        down: A [G, r, n].
        up: B [G, m, r].
        other_down: A' [G, s, n].
        other_up: B' [G, m, s].
    """
    ups = up.detach().double().transpose(1, 2) @ other_up.detach().double()
    downs = down.detach().double() @ other_down.detach().double().transpose(1, 2)
    return (ups * downs).sum(dim=(1, 2))


class SdLora(Updated):
    """A pair A_t, B_t per task, the older ones as frozen directions of unit size, and a trained magnitude per task.

        h = W x + b + alpha_t B_t A_t x + sum_(i<t) alpha_i B_i A_i x / n_i

    alpha_i is one number per task, for all layers and parts. n_i is the norm of the direction: |B_i|_F |A_i|_F in the
    public code ("factors"), |B_i A_i|_F in the paper ("product"). The first one is larger, so that a direction is
    shorter than 1, about r^(-1/2) for random factors. The newest term is not normalised while it is trained. Each task
    trains its pair, all alpha_i and the head, whose rows of classes that do not compete stand still.

    In the public code all alpha begin anew at every task: what was learned of them is lost, and at the boundary the
    newest term jumps from alpha_t B_t A_t to magnitude B_t A_t / n_t. carry=true keeps them, and the function is
    continuous. The paper's variants are SD-LoRA-RR (`later_ranks`), whose rank falls in later tasks, and SD-LoRA-KD
    (`merge_below`), which drops pairs whose directions older ones can stand for.

    Args:
        backbone: a transformer with numbered blocks, frozen.
        num_classes: C.
        parts: of queries, keys and values, those with updates; published "qv".
        layers: patterns of the paths of further linear layers with updates, such as "*.mlp.fc1".
        blocks: numbers of the blocks with updates; null for all.
        rank: r.
        later_ranks: pairs [position, rank]: tasks from this position on have this rank. Published for SD-LoRA-RR
            [[4, 8], [8, 6]].
        magnitude: initial alpha.
        norm: "factors" or "product"; see above.
        carry: whether alpha_i keep their values at the beginning of a task.
        merge_below: drop the pair of a task if regressing its directions of unit size on older ones leaves a squared
            norm below this; published for SD-LoRA-KD 0.0009. null for never.
        lr_scale: learning rate of pairs and magnitudes, relative to that of the budget, which is the head's.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        parts: str,
        layers: list[str],
        blocks: list[Count] | None,
        rank: PositiveInt,
        later_ranks: list[list[Count]],
        magnitude: float,
        norm: Norm,
        carry: bool,
        merge_below: Positive | None,
        lr_scale: NonNegative,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone, num_classes, parts=parts, layers=layers, blocks=blocks, lr_scale=lr_scale, compete=compete
        )
        for pair in later_ranks:
            if len(pair) != 2 or pair[1] < 1:
                raise ConfigError(f"method.later_ranks: {pair} is no pair [position, rank] with a rank of at least 1")
        self.rank, self.later_ranks = rank, sorted(list(pair) for pair in later_ranks)
        self.magnitude, self.carry, self.merge_below = magnitude, carry, merge_below
        self.norm: Norm = norm
        self.magnitudes = nn.ParameterList()
        self.sums = nn.ModuleList(Directions(self.magnitudes, len(p or "w")) for p in self.sites.values())

    def directions(self) -> Iterator[Directions]:
        """Yield the sum of the updates of each layer."""
        return iter(self.sums)  # type: ignore[arg-type]

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index:
            self._settle(ctx)
        before = list(self.magnitudes) if self.carry else []
        values = [float(alpha.detach()) for alpha in before] or [self.magnitude] * task.index
        self.magnitudes = nn.ParameterList(nn.Parameter(torch.tensor(v)) for v in [*values, self.magnitude])
        for total in self.directions():
            total.begin(self.magnitudes)
        self.grow_updates(self.rank_of(task.index))

    def rank_of(self, position: int) -> int:
        """Return the rank of the task at a position."""
        return [self.rank, *(rank for start, rank in self.later_ranks if start <= position)][-1]

    @torch.no_grad()
    def _settle(self, ctx: Context) -> None:
        """Turn the newest update of each layer into a direction, and drop those that older ones can stand for."""
        norms = [total.norms(self.norm) for total in self.directions()]
        if self.carry:
            common = torch.cat(norms).square().mean().sqrt()
            self.magnitudes[-1].mul_(common)
            norms = [common.expand_as(norm) for norm in norms]
        dropped = 0
        for total, norm in zip(self.directions(), norms, strict=True):
            total.inverse[-1] = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
            dropped += self.merge_below is not None and total.drop_if_dependent(self.merge_below)
        if self.merge_below is not None:
            ctx.log({"phase": "merge", "dropped": dropped, "layers": len(norms)})

    def trainable(self) -> list[dict[str, Any]]:
        own = [*self.sums.parameters(), *self.magnitudes]
        return rate_groups((own, self.lr_scale), (self.head.parameters(), 1.0))

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        freeze(self.sums)
        freeze(self.magnitudes)
        ctx.log(
            {"phase": "magnitudes", **{f"alpha.{i}": float(alpha.detach()) for i, alpha in enumerate(self.magnitudes)}}
        )
