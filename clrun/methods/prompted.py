"""What learners have in common that leave a vision transformer as it is and train what they put into it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clrun.blocks.inject import Injector, Plan, require_blocks, require_vit
from clrun.blocks.selection import Selection, choose, cosines
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import Method, freeze
from clrun.learning.training import fit
from clrun.system.errors import ConfigError

Init = Literal["small", "wide"]


class Prompted(Method):
    """A frozen vision transformer with something injected, and a head on its features.

    The head's rows start as those of `nn.Linear`, whatever the published code of a method does.

    Args:
        backbone: a timm vision transformer; frozen here, and in eval mode also while training.
        num_classes: C.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`. The published codes of these
            methods mask all classes but those of the current task: "current".
        tokens: whether tokens or prefixes are injected; without, transformers other than timm's ViT will do.
    """

    needs_vit: ClassVar[bool] = True  # the backbone must be a timm `VisionTransformer`
    hooks_backbone = True
    given_by: ClassVar[str] = "task_id=given"  # the option that makes an instance need the task id

    def __init__(
        self, backbone: nn.Module, num_classes: int, *, lr_scale: float, compete: Compete, tokens: bool = True
    ) -> None:
        require = require_vit if tokens else require_blocks
        require(backbone, type(self).__name__)
        super().__init__(backbone, num_classes, compete=compete)
        freeze(backbone)
        self.width = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.lr_scale = lr_scale
        self.injector = Injector()
        self.known: Tensor | None = None  # queries of the task's training rows while it is learned, if they stand still

    def check(self, stream: Stream) -> None:
        if self.needs_task_id and stream.setting != "til":
            raise ConfigError(
                f"method.{self.given_by}: needs the task id at test time; scenario.setting={stream.setting} cannot use "
                "it (til)"
            )

    def learn(self, task: Task, ctx: Context) -> None:
        if self.asks_while_training() and not ctx.stream.transform.augments:
            self.known = torch.cat([self.query(batch.x) for batch in task.train.batches(256)])
        fit(self, task.train, ctx, budget=scaled(ctx.budget, self.lr_scale))
        self.known = None

    def asks_while_training(self) -> bool:
        """Return whether the loss needs the queries of training images."""
        return False

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return self.classification_loss(self(batch.x), batch, ctx)

    def after_step(self, ctx: Context) -> None:
        self.injector.release()

    def classification_loss(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """Return the cross-entropy [] of logits [B, C] over the classes that compete."""
        return masked_cross_entropy(logits, batch.y, self.competing(batch.t, ctx))

    def query(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of the plain frozen backbone, fp32, without gradient."""
        self.injector.release()
        return plain_features(self.backbone, x)

    def training_query(self, batch: Batch) -> Tensor:
        """Return the queries [B, D] of training images: computed once a task when nothing is augmented."""
        return self.query(batch.x) if self.known is None else self.known[batch.i]

    def features(self, x: Tensor, plan: Plan) -> Tensor:
        """Return the features [B, D] of the backbone with `plan`."""
        with self.injector.use(self.backbone, plan):
            features: Tensor = self.backbone(x)
        return features

    def mean_query(self, task: Task) -> Tensor:
        """Return the mean [D] of the normalised queries of the eval view of the task's training rows."""
        queries = [nn.functional.normalize(self.query(b.x), dim=1).double() for b in task.train.batches(256)]
        return torch.cat(queries).mean(dim=0).float()


def plain_features(backbone: nn.Module, x: Tensor) -> Tensor:
    """Return features [B, D] of prepared x, fp32, without gradient.

    A copy: transformers return views, which would keep the tokens of all places as long as a query is kept.
    """
    with torch.no_grad():
        return backbone(x).to(torch.float32, copy=True)  # type: ignore[no-any-return]


class Keyed(Prompted):
    """Every task has a key, and the nearest key of an image's query says which task's prompts it gets.

    Args:
        backbone: a timm vision transformer.
        num_classes: C.
        selection: "instance", or "batch" (see `blocks.selection.choose`), which makes predictions depend on the batch.
        task_id: "inferred" from the keys, or "given" at test time (task-incremental reading only).
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.

    Attributes:
        keys: by task, [D]; a subclass makes the list.
    """

    keys: nn.ParameterList

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        selection: Selection,
        task_id: Literal["inferred", "given"],
        lr_scale: float,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete=compete)
        self.selection: Selection = selection
        self.depends_on_batch = selection == "batch" and task_id == "inferred"
        self.needs_task_id = task_id == "given"

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        if self.needs_task_id and task is not None:
            return self.with_tasks(x, torch.full((len(x),), task, device=x.device))
        return self.forward_with(self.query(x), x)

    def constant(self, x: Tensor) -> Tensor | None:
        return None if self.needs_task_id else self.query(x)

    def forward_with(self, constant: Tensor, x: Tensor, task: int | None = None) -> Tensor:
        return self.with_tasks(x, self.chosen(constant)[:, 0])

    def choices(self, x: Tensor) -> Tensor | None:
        return nn.functional.one_hot(self.chosen(self.query(x))[:, 0], len(self.keys))

    def chosen(self, query: Tensor) -> Tensor:
        """Return [B, 1] long, the task whose prompts images with these queries [B, D] get."""
        return choose(cosines(query, torch.stack([*self.keys])), 1, self.selection)

    def with_tasks(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return logits [B, C] with the prompts of these tasks, [B] long."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Scaled:
    """Makes an optimizer with every learning rate scaled."""

    optimizer: Callable[..., Optimizer]
    factor: float

    def __call__(self, groups: list[Any]) -> Optimizer:
        made = self.optimizer(groups)
        for group in made.param_groups:
            group["lr"] = group["lr"] * self.factor
        return made


def scaled(budget: Budget, factor: float) -> Budget:
    """Return `budget` with its learning rate multiplied by `factor`."""
    return budget if factor == 1 else replace(budget, optimizer=_Scaled(budget.optimizer, factor))


def drawn(*shape: int, init: Init) -> Tensor:
    """Return initial prompts or keys.

    "small" is uniform on [0, 0.01), as in the authors' JAX code; "wide" on (-1, 1), as in its ports to PyTorch.
    """
    return torch.rand(shape) * 0.01 if init == "small" else torch.rand(shape) * 2 - 1


def vpt_prompt(vit: nn.Module, *shape: int) -> Tensor:
    """Return prompts uniform on (-v, v) with v = sqrt(6 / (3 p^2 + width)), p the patch size (VPT's code)."""
    patch: Any = vit.patch_embed.patch_size  # type: ignore[union-attr]
    bound = math.sqrt(6 / (3 * patch[0] * patch[1] + shape[-1]))
    return (torch.rand(shape) * 2 - 1) * bound
