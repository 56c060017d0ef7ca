"""The base class of every method: a backbone, a head, and hooks with defaults that amount to finetuning."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from clrun.data.captions import Captions
from clrun.data.split import Batch
from clrun.data.stream import Setting, Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.names import NamesHead, new_head
from clrun.learning.networks import Factory, FrozenNetwork
from clrun.learning.training import fit

ALL_SETTINGS: frozenset[Setting] = frozenset({"til", "cil", "dil"})


class Method(nn.Module):
    """A continual-learning method; the base class trains backbone and head on each task as it comes.

    The state of a method is its attributes. They must survive pickling and `copy.deepcopy`, because the pickled method
    is the checkpoint. In eval mode `forward` depends on the single sample only.

    Args:
        backbone: maps prepared images to features [B, D]; has `num_features` = D.
        num_classes: C, the classes of the whole data set.
        compete: classes that compete in the training loss, see `clrun.learning.losses`; "seen" unless a method says
            otherwise.
    """

    needs_vit: ClassVar[bool] = False  # the backbone must be a timm vision transformer
    needs_text: ClassVar[bool] = False  # the backbone must have a text tower, which encodes names of classes
    needs_towers: ClassVar[bool] = False  # with `needs_text`: beside an image tower, so that text backbones are refused
    needs_decoder: ClassVar[bool] = False  # the backbone must be an encoder-decoder, which reads and writes texts
    needs_task_id: bool = False  # predictions need the task id: class-incremental cells stay empty
    hooks_backbone: bool = False  # it changes passes of the backbone by hooks, which compiled code would not see
    depends_on_batch: bool = False  # predictions depend on the other samples of a test batch: noted in run.json
    depends_on_task_count: bool = False  # what it learns from a task depends on the number of all tasks
    samples_names: bool = True  # its training passes follow `sample` of a head of names, as `loss` here does
    own_weights: ClassVar[str] = ""  # why the backbone cannot be compressed, such as "keeps a network per task"
    settings: ClassVar[frozenset[Setting]] = ALL_SETTINGS
    knobs: tuple[Knob, ...] = ()  # options that trade plasticity for stability, in the order of their decay
    order_invariant: bool = False  # claim of this instance: final predictions do not depend on the task order

    def __init__(self, backbone: nn.Module, num_classes: int, *, compete: Compete = "seen") -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.compete: Compete = compete
        self.head: nn.Module = new_head(backbone, num_classes)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a second place that says whether a method reads features.

        A class with a `loss` of its own samples no names, unless it says so (`samples_names`).

        Raises:
            TypeError: the class defines `uses_frozen_features`.
        """
        super().__init_subclass__(**kwargs)
        if "loss" in vars(cls) and "samples_names" not in vars(cls):
            cls.samples_names = False
        if "uses_frozen_features" in vars(cls):
            raise TypeError(f"{cls.__name__}.uses_frozen_features follows from reads_features(options); define that")

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        """Return whether the engine feeds features of the frozen backbone instead of images as `batch.x`.

        This method alone decides. It is asked before there is an instance, and of an instance through
        `uses_frozen_features`, with its attributes: an option that is read here must be an attribute of that name.

        Args:
            options: of the method, by name.
        """
        return False

    @property
    def uses_frozen_features(self) -> bool:
        """Whether the engine feeds features of the frozen backbone to this instance: see `reads_features`."""
        return self.reads_features(vars(self))

    @classmethod
    def further_networks(cls, options: Mapping[str, Any]) -> Mapping[str, Factory]:
        """Return the factories of networks that a run loads like its backbone, by the path of their option.

        Args:
            options: of the method, by name; nodes of the configuration are factories.

        Raises:
            ConfigError: an option is no collection of factories.
        """
        return {}

    def receive(self, networks: Mapping[str, FrozenNetwork]) -> None:
        """Take the networks of `further_networks`, by the same paths; called before the first task."""

    def loaded_networks(self) -> dict[str, nn.Module]:
        """Return the networks that are as the configuration loads them, by name; "" is the backbone.

        A checkpoint stores those of their tensors that have not changed by a digest only.
        """
        return {"": self.backbone}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Look at the options before anything is built, and warn (`clrun.system.errors.warn`) of what is not advisable.

        Raises:
            ConfigError: options do not suit each other.
        """

    def check(self, stream: Stream) -> None:
        """Look at the tasks to come, before anything is written.

        Raises:
            ConfigError: they do not suit the options.
        """

    def check_budget(self, budget: Budget) -> None:
        """Look at what a fit may spend, before anything is written.

        Raises:
            ConfigError: its optimizer does not suit the method.
        """

    def read_names(self, captions: Captions | None) -> None:
        """Take the texts of all classes, before the first task; a head whose rows are texts needs them.

        Raises:
            ConfigError: the head needs them, and the stream has none.
        """
        if isinstance(self.head, NamesHead):
            self.head.read(captions)

    def meet(self, classes: Tensor) -> None:
        """Get ready to score `classes` ([k] long) that may not have been learned, by their names (`needs_text`).

        `job.eval_unseen` asks for this after `begin_task`. A method whose head is not of names does it in its own way.
        """
        if isinstance(self.head, NamesHead):
            self.head.grow(classes)

    def score_names(self, x: Tensor, captions: Captions) -> Tensor:
        """Return logits [B, K] of prepared x over K other classes, which are given by their captions.

        `job.eval_extra` asks for this on data sets that are never learned (`needs_text`). A method whose head is not of
        names overrides it.
        """
        assert isinstance(self.head, NamesHead)
        return self.head.score(self.backbone(x), captions)

    # --- once per task

    def begin_task(self, task: Task, ctx: Context) -> None:
        """Prepare for `task`: grow, allocate. The engine moves the method to the device afterwards."""
        self.check_budget(ctx.budget)
        self.grow(self.head, task.classes)

    def grow(self, head: nn.Module, classes: Tensor, generator: torch.Generator | None = None) -> None:
        """Initialise the rows of `classes` ([k] long) in `head`, with `compete=all` those of every class.

        A head that does not grow stays as it is.
        """
        if isinstance(head, GrowingHead):
            head.grow(torch.arange(self.num_classes) if self.compete == "all" else classes, generator)

    def competing(self, t: Tensor, ctx: Context) -> Tensor:
        """Return [B, C] bool: the classes that compete in the training loss of rows of the tasks at positions `t`."""
        return ctx.mask(t, self.compete)

    def learn(self, task: Task, ctx: Context) -> None:
        """Learn `task`: one fit, several fits, or a closed form."""
        fit(self, task.train, ctx)

    def end_task(self, task: Task, ctx: Context) -> None:
        """Consolidate after `task`."""

    # --- once per step, called by `fit`

    def mix(self, batch: Batch, ctx: Context) -> Batch:
        """Return the raw batch to train on; replay is added here."""
        return batch

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        """Return the training loss [] of a prepared batch."""
        competing = self.competing(batch.t, ctx)
        if isinstance(self.head, NamesHead) and self.head.negatives is not None:
            competing = competing & self.head.sample(batch.y, competing)
        return masked_cross_entropy(self(batch.x), batch.y, competing)

    def adjust_gradients(self, ctx: Context) -> None:
        """Change `.grad` between backward (averaged over processes) and the optimizer step."""

    def after_step(self, ctx: Context) -> None:
        """Act after an optimizer step."""

    # --- prediction and parameters

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Return logits [B, C] of prepared x; `task` is a position, used by methods with `needs_task_id` only."""
        logits: Tensor = self.head(self.backbone(x))
        return logits

    def constant(self, x: Tensor) -> Tensor | None:
        """Return the part [B, ...] of a prediction for prepared x that training never changes; None without one.

        Evaluations compute it once for the rows of each task, and pass it to `forward_with` from then on.
        """
        return None

    def choices(self, x: Tensor) -> Tensor | None:
        """Return how often each of M components is chosen for each sample, [B, M] integers; None without a choice."""
        return None

    def expansion(self) -> dict[str, int]:
        """Return how many modules stand at each place, by its name, where the method adds them by need; {} elsewhere.

        It is recorded after each task as `modules` in run.json.
        """
        return {}

    def forward_with(self, constant: Tensor, x: Tensor, task: int | None = None) -> Tensor:
        """Return the logits [B, C] that `forward` returns, given the result of `constant` for the same x."""
        raise NotImplementedError

    def new_parts(self) -> Iterable[nn.Module]:
        """Return the modules in which `begin_task` has made tensors; the engine moves them to the device."""
        return [self]

    def trainable(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """Return the parameters, or parameter groups, that `fit` trains by default."""
        return (p for p in self.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; submodules whose parameters are all frozen stay in eval mode (running statistics unchanged)."""
        super().train(mode)
        if mode:
            for child in self.children():
                parameters = list(child.parameters())
                frozen = parameters and not any(p.requires_grad for p in parameters)
                if frozen and not isinstance(child, NamesHead):  # whose mode says where its rows come from
                    child.eval()
        return self


def freeze(module: nn.Module) -> None:
    """Stop the training of every parameter of `module`."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


__all__ = ["ALL_SETTINGS", "Method", "freeze"]
