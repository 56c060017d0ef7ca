"""The base of methods that leave a vision transformer frozen and train what they inject into it."""

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
    """A frozen vision transformer with injected parameters, and a head on its features.

    The rows of the head are initialised as in `nn.Linear`, whatever the published code of a method does.

    Args:
        backbone: a timm vision transformer, which is frozen and in eval mode also during training.
        num_classes: C.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`. The published codes of these
            methods mask all classes but those of the current task: "current".
        tokens: whether tokens or prefixes are injected, which needs a timm `VisionTransformer`; without them other
            transformers can be used.
    """

    needs_vit: ClassVar[bool] = True  # the backbone must be a timm `VisionTransformer`
    hooks_backbone = True
    given_by: ClassVar[str] = "task_id=given"  # the option with which a method needs the task id, for messages

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
        self.stored_queries: Tensor | None = None  # of all training rows; during a task without augmentation

    def check(self, stream: Stream) -> None:
        if self.needs_task_id and stream.setting != "til":
            raise ConfigError(
                f"method.{self.given_by}: needs the task id at test time; scenario.setting={stream.setting} cannot use "
                "it (til)"
            )

    def learn(self, task: Task, ctx: Context) -> None:
        if self.uses_training_queries() and not ctx.stream.transform.augments:
            self.stored_queries = torch.cat([self.query(batch.x) for batch in task.train.batches(256)])
        fit(self, task.train, ctx, budget=scaled(ctx.budget, self.lr_scale))
        self.stored_queries = None

    def uses_training_queries(self) -> bool:
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
        """Return the features [B, D] float32 of images x under the plain frozen backbone, without gradients."""
        self.injector.release()
        return plain_features(self.backbone, x)

    def training_query(self, batch: Batch) -> Tensor:
        """Return the queries [B, D] of training images; without augmentation they are computed once per task."""
        return self.query(batch.x) if self.stored_queries is None else self.stored_queries[batch.i]

    def features(self, x: Tensor, plan: Plan) -> Tensor:
        """Return the features [B, D] of images x under the backbone with the injections of `plan`."""
        with self.injector.use(self.backbone, plan):
            features: Tensor = self.backbone(x)
        return features

    def mean_query(self, task: Task) -> Tensor:
        """Return the mean [D] of the queries, each of length 1, of the task's training rows without augmentation."""
        queries = [nn.functional.normalize(self.query(b.x), dim=1).double() for b in task.train.batches(256)]
        return torch.cat(queries).mean(dim=0).float()


def plain_features(backbone: nn.Module, x: Tensor) -> Tensor:
    """Return the features [B, D] float32 of prepared images x, without gradients.

    They are a copy, because transformers return views, which keep the tokens of all positions in memory.
    """
    with torch.no_grad():
        return backbone(x).to(torch.float32, copy=True)  # type: ignore[no-any-return]


class Keyed(Prompted):
    """Each task has a key, and an image has the prompts of the task whose key is nearest to its query.

    Args:
        backbone: a timm vision transformer.
        num_classes: C.
        selection: "instance", or "batch", with which predictions depend on the batch; see `blocks.selection.choose`.
        task_id: "inferred" from the keys, or "given" at test time (only in the task-incremental setting).
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.

    Attributes:
        keys: the key [D] of each task; a subclass creates the list.
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
        """Return the positions [B, 1] long of the tasks whose prompts images with these queries [B, D] have."""
        return choose(cosines(query, torch.stack([*self.keys])), 1, self.selection)

    def with_tasks(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the logits [B, C] of images x, each with the prompts of the task at the position `chosen` [B] long."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Scaled:
    """A factory of optimizers that multiplies all learning rates by a factor."""

    optimizer: Callable[..., Optimizer]
    factor: float

    def __call__(self, groups: list[Any]) -> Optimizer:
        optimizer = self.optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor
        return optimizer


def scaled(budget: Budget, factor: float) -> Budget:
    """Return the budget with its learning rate multiplied by `factor`."""
    return budget if factor == 1 else replace(budget, optimizer=_Scaled(budget.optimizer, factor))


def drawn(*shape: int, init: Init) -> Tensor:
    """Return initial prompts or keys of this shape.

    "small" is uniform in [0, 0.01), as in the authors' JAX code; "wide" is uniform in [-1, 1), as in ports to PyTorch.
    """
    return torch.rand(shape) * 0.01 if init == "small" else torch.rand(shape) * 2 - 1


def vpt_prompt(vit: nn.Module, *shape: int) -> Tensor:
    """Return initial prompts, uniform in [-v, v) with v = sqrt(6 / (3 p^2 + width)) for patch size p (code of VPT)."""
    patch: Any = vit.patch_embed.patch_size  # type: ignore[union-attr]
    bound = math.sqrt(6 / (3 * patch[0] * patch[1] + shape[-1]))
    return (torch.rand(shape) * 2 - 1) * bound
