"""ESN: isolated stage classifiers, anchored energies, temperature voting (Wang et al., AAAI 2023, arXiv 2211.15969).

Memory between tasks: the classifiers and the temperatures. For features of width D and k classes of a task a classifier
has k (D + 1) floats; head=mlp adds w (D + 1) and replaces D by the width w, and head=cab adds 5 D^2 + 10.5 D. Prompts
have L D floats. Task id: not needed.

Verified: golden values of confidences and loss, the limits of the routing (small temperatures, one stage, shifted
logits, the largest log-sum-exp for T = 1), earlier stages keep their bits, a class-attention block does not depend on
the order of the tokens, and with vote=single and without prompts the order of the tasks does not matter
(test_methods_esn, test_methods).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Injector, Plan, require_vit
from clrun.blocks.params import eval_mode
from clrun.blocks.stages import ClassAttention, Stage, StageHeads, routes
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.method import Method, freeze
from clrun.system.errors import ConfigError, Count, NonNegative, Positive, PositiveInt

Kind = Literal["linear", "mlp", "cab"]


class Esn(Method):
    """Each task (a stage) trains a classifier of its own on a frozen backbone; at test time a vote chooses the stage.

    With the logits h of stage s for its own classes and the energy F_T(h) = -T log sum_y exp(h_y / T), a stage is
    trained on its own rows by CE(h, y) + anchor_weight (F_1(h) - anchor)^2, so that the energies of stages that have
    never seen each other's rows can be compared. A temperature T chooses the stage with the largest confidence -F_T.
    When a task but the first ends, the temperature at which most of its training rows choose its own stage (among
    equals the smallest) joins the pool; the pool starts with the first candidate. The stage that most temperatures of
    the pool choose gives the prediction; among equals the oldest one. A temperature votes once, however often it was
    chosen.

    `forward` returns the logits of the chosen stage as they are, and those of each other stage moved as a whole so that
    its largest one lies 1 below the largest one of the chosen stage: the order within each stage, which alone counts in
    task-incremental streams, does not change. In domain-incremental streams every stage has all classes, and the logits
    are those of the chosen stage; in task-incremental streams whose tasks share classes those of the given task.

    Heads linear and mlp without prompts read features of the frozen backbone, which are computed once from images
    without augmentation. head=cab is a class-attention block (Touvron et al., ICCV 2021): a token of the stage, which
    begins as the transformer's class token, attends to all tokens after the last block and before the last
    normalisation. Prompts enter after the position embedding and go from stage to stage.

    Deviations: in the published code the prompt keeps training by accident (`freeze_prompt=false` does the same), the
    anchor has the other sign (`energy_sign=repo`), and all tasks must have equally many classes.

    Args:
        backbone: maps prepared images to features [B, D], frozen; a timm vision transformer for head=cab and prompts.
        num_classes: C.
        head: classifier of a stage: "linear", "mlp" (one hidden layer with GELU) or "cab".
        mlp_width: w, units of the hidden layer of head=mlp; None for D / 2.
        anchor: Delta.
        anchor_weight: lambda.
        energy_sign: "paper": F_1 as above. "repo": -log sum_y exp(-h_y), which anchors the smallest logits instead.
        temperatures: the candidates, ascending.
        vote: "pool", or "single": the first of the `temperatures` alone, without a search.
        prompt_tokens: L, number of prompts.
        freeze_prompt: train the prompts in the first task only, so that the features of earlier stages do not change.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        head: Kind,
        mlp_width: PositiveInt | None,
        anchor: float,
        anchor_weight: NonNegative,
        energy_sign: Literal["paper", "repo"],
        temperatures: list[Positive],
        vote: Literal["pool", "single"],
        prompt_tokens: Count,
        freeze_prompt: bool,
    ) -> None:
        if not temperatures or list(temperatures) != sorted(set(temperatures)):
            raise ConfigError(f"method.temperatures: expected at least one, ascending, got {list(temperatures)}")
        if head == "cab" or prompt_tokens:
            require_vit(backbone, "esn with method.head=cab or prompts")
        super().__init__(backbone, num_classes)
        freeze(backbone)
        self.kind, self.mlp_width = head, mlp_width
        self.prompt_tokens, self.freeze_prompt = prompt_tokens, freeze_prompt
        self.anchor, self.anchor_weight, self.energy_sign = anchor, anchor_weight, energy_sign
        self.temperatures, self.vote = list(temperatures), vote
        self.hooks_backbone = head == "cab" or prompt_tokens > 0
        self.order_invariant = vote == "single" and not prompt_tokens
        self.head: StageHeads = StageHeads(num_classes, temperatures)
        self.injector = Injector()
        width = int(backbone.num_features)  # type: ignore[arg-type]
        self.prompt = nn.Parameter((2 * torch.rand(prompt_tokens, width) - 1) / width**0.5)

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        kind = options.get("kind") or options["head"]  # an instance has another attribute `head`
        return kind != "cab" and not options["prompt_tokens"]

    def check(self, stream: Stream) -> None:
        shared = bool((stream.members.sum(dim=0) > 1).any())
        self.needs_task_id = stream.setting == "til" and shared

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        freeze(self.head)
        self.head.stages.append(self._stage(task.classes))
        self.prompt.requires_grad_(bool(self.prompt_tokens) and not (task.index and self.freeze_prompt))

    def _stage(self, classes: Tensor) -> Stage:
        """Return a new classifier of `classes` [k]."""
        width = int(self.backbone.num_features)  # type: ignore[arg-type]
        if self.kind == "linear":
            return Stage(nn.Identity(), width, classes)
        if self.kind == "mlp":
            units = self.mlp_width or width // 2
            return Stage(nn.Sequential(nn.Linear(width, units), nn.GELU()), units, classes)
        vit: Any = self.backbone
        if vit.cls_token is None:
            raise ConfigError("method.head=cab: starts from the class token, which this backbone does not have")
        return Stage(ClassAttention(vit.cls_token[0, 0], vit.blocks[0].attn.num_heads), width, classes)

    def end_task(self, task: Task, ctx: Context) -> None:
        if task.index and self.vote == "pool":
            best = self.best_temperature(task, ctx)
            self.head.voting[best] = True
            ctx.log({"phase": "vote", "temperature": self.temperatures[best], "pool": len(self.head.pool)})

    def best_temperature(self, task: Task, ctx: Context) -> int:
        """Return the number of the temperature at which most training rows of `task` choose its stage."""
        # Of equals the first one, hence the smallest temperature, is taken.
        newest, wins = len(self.head.stages) - 1, torch.zeros(len(self.temperatures), dtype=torch.long)
        with torch.no_grad(), eval_mode(self):
            for batch in task.train.batches(256):
                with ctx.hardware.autocast():
                    logits = self.head.own(self.inputs(ctx.hardware.layout(batch.x)))
                wins += (routes(logits, self.temperatures) == newest).sum(dim=0).cpu()
        return int(wins.argmax())

    # --- a step

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        stage = self.head.stages[-1]
        assert isinstance(stage, Stage)
        own: Tensor = stage(self.inputs(batch.x)).float()
        true = own.gather(1, (batch.y[:, None] == stage.classes).long().argmax(dim=1, keepdim=True))[:, 0]
        total = own.logsumexp(dim=1)
        loss = (total - true).mean()  # the cross-entropy over the classes of the stage
        if not self.anchor_weight:
            return loss
        energy = -total if self.energy_sign == "paper" else -(-own).logsumexp(dim=1)
        return loss + self.anchor_weight * (energy - self.anchor).square().mean()

    def after_step(self, ctx: Context) -> None:
        self.injector.release()

    # --- prediction

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        inputs = self.inputs(x)
        if self.needs_task_id and task is not None:
            return self.head.given(inputs, task)
        logits: Tensor = self.head(inputs)
        return logits

    def choices(self, x: Tensor) -> Tensor | None:
        return self.head.votes(self.head.own(self.inputs(x)))

    def inputs(self, x: Tensor) -> Tensor:
        """Return what stages read for prepared x: features [B, D], or with head=cab the tokens [B, N, D]."""
        plan = Plan(tokens={0: self.prompt} if self.prompt_tokens else {}, keep_tokens=self.kind == "cab")
        if not plan.tokens and not plan.keep_tokens:
            features: Tensor = self.backbone(x)
            return features
        vit: Any = self.backbone
        with self.injector.use(vit, plan), _before(vit.norm) as seen:
            features = vit.forward_features(x) if self.kind == "cab" else vit(x)
        return seen[0] if self.kind == "cab" else features


@contextmanager
def _before(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list to which each call of `module` within the `with` block appends its input."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
