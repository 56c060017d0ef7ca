"""MoE-Adapters: experts beside the MLPs of both towers of CLIP, a router per task (Yu et al., CVPR 2024, 2403.11549).

In every block of both towers, with s the first token of the stream x:

    gates = softmax of the top_k entries of s W_g (+ e * (softplus(s W_n) + 0.01), e ~ N(0, 1), in training)
    x <- x + MLP(LN x) + sum_e gates_e E_e(x),   E_e(x) = scale * (W_up dropout(ReLU(W_down x + b)) + b_up)
    L = CE_ls(kappa n(g_i(x)) . n(g_t(t_k)), y),  k over the classes of the current task

W_g = W_n = 0 and W_up = 0 at first: the model is CLIP. Each task has routers of its own; the top_k experts of a block
that its rows choose most often are frozen when it ends. At test an image gets the router of the task whose selector
reconstructs its feature best, or the plain model if that is bad.

Memory between tasks, of floats: E experts of 2 D r + r + D per block of width D, 2 D E per block and task of routers,
2 d h + d + h per task of autoencoders for a joint space of width d, and C d per task of texts. Task id: not needed.

Deviations: the selector reads the embedding of the plain image tower, sqrt(d) n(g_i(x)), instead of a second network
(AlexNet); it decides for each image (selection=batch: for a whole test batch, as published); the threshold is relative
to the error on the task's own rows, because the published 0.0655 belongs to AlexNet; routers of tasks to come take no
part; predictions have no noise (published class-incremental ones have). By causality the router of the text tower sees
the same token for every text.

The multi-domain form is published for streams that give the classes of the task at test (scenario.setting=til). Without
them all classes compete under the router that an image gets, which was trained among the classes of its own task
(`compete=current`) and has moved the texts of the others freely: even where the selector is right, classes of other
tasks may win. For class-incremental streams there is the other form.

Verified: with new experts it is the plain model; frozen experts and both towers stay bit for bit; gates sum to 1, and
predictions do not depend on the batch; one expert is AdaptFormer; the plain model's choice is zero_shot; experts that
are not chosen get no gradient; counts of choices (test_methods_moe_adapters).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.inject import Adapter, Injector, Plan, require_blocks
from clrun.blocks.params import eval_mode
from clrun.blocks.reference import Loader, Reference
from clrun.blocks.selection import Selection
from clrun.data.captions import Captions
from clrun.data.split import Batch, TensorSplit
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.losses import Compete, smoothed_cross_entropy
from clrun.learning.method import Method, freeze
from clrun.learning.names import NamesHead
from clrun.learning.training import fit
from clrun.system.errors import ConfigError, Fraction, NonNegative, Positive, PositiveInt

FLOOR = 0.01  # of the standard deviation of the noise
PLAIN = -1  # the route of a row that no router sees


class Mixture(nn.Module):
    """The experts of a block and the routers of all tasks; its output is 0 before training.

    Args:
        width: D.
        experts: E, new adapters.
        top_k: experts per row.
        noisy: whether gates have noise in training.

    Attributes:
        frozen: [E] bool, the experts that are not trained any more.
        counts: [E] long, how often each expert was chosen in training since the task began.
    """

    frozen: Tensor
    counts: Tensor

    def __init__(self, width: int, experts: Iterable[Adapter], top_k: int, *, noisy: bool) -> None:
        super().__init__()
        self.width, self.top_k, self.noisy = width, top_k, noisy
        self.experts = nn.ModuleList(experts)
        self.routers, self.spreads = nn.ParameterList(), nn.ParameterList()
        self.register_buffer("frozen", torch.zeros(len(self.experts), dtype=torch.bool))
        self.register_buffer("counts", torch.zeros(len(self.experts), dtype=torch.long))
        self.route: int | Tensor = PLAIN  # of all rows, or [B] long

    def begin(self, *, new: bool) -> None:
        """Begin a task: train its router, a new one if asked, and the experts that are not frozen."""
        if new:
            for routers in (self.routers, self.spreads):
                for old in routers:
                    old.requires_grad_(False)
                routers.append(nn.Parameter(torch.zeros(self.width, len(self.experts))))
        for expert, frozen in zip(self.experts, self.frozen.tolist(), strict=True):
            expert.requires_grad_(not frozen)
        self.counts.zero_()

    def freeze_used(self) -> None:
        """Freeze the `top_k` experts that were chosen most often, the first ones among equals."""
        self.frozen[self.counts.argsort(descending=True, stable=True)[: self.top_k]] = True

    def gates(self, s: Tensor) -> Tensor:
        """Return the gates [B, E] of rows with first tokens s [B, D]; 0 where no router sees the row."""
        s = s.float()
        if isinstance(self.route, int):
            logits = s @ self.routers[self.route]
        else:
            routers = torch.stack([*self.routers])[self.route.clamp(min=0)]
            logits = torch.einsum("bd,bde->be", s, routers)
        if self.training and self.noisy:
            assert isinstance(self.route, int), "training has one router"
            spread = F.softplus(s @ self.spreads[self.route]) + FLOOR
            logits = logits + torch.randn_like(logits) * spread
        best = logits.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]
        if self.training:
            self.counts += torch.bincount(best.flatten(), minlength=len(self.experts))
        gates = torch.zeros_like(logits).scatter(1, best, logits.gather(1, best).softmax(dim=1))
        return gates if isinstance(self.route, int) else gates * (self.route >= 0)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Return the change [B, N, D] to be added, for the stream x [B, N, D].

        In eval mode an expert is computed for all rows or for none, so that a row does not depend on the others.
        """
        total = torch.zeros_like(x)
        if isinstance(self.route, int) and self.route == PLAIN:
            return total
        gates = self.gates(x[:, 0])
        for number in (gates > 0).any(dim=0).nonzero()[:, 0].tolist():
            expert, gate = self.experts[number], gates[:, number, None, None].to(x.dtype)
            if self.training:
                rows = gate[:, 0, 0].nonzero()[:, 0]
                total = total.index_add(0, rows, (gate[rows] * expert(x[rows])).to(total.dtype))
            else:
                total = total + gate * expert(x)
        return total


@contextmanager
def routed(mixtures: Iterable[nn.Module], route: int | Tensor) -> Iterator[None]:
    """Give the mixtures this route within the `with` block."""
    for mixture in mixtures:
        mixture.route = route  # type: ignore[assignment]
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.route = PLAIN  # type: ignore[assignment]


class RoutedHead(NamesHead):
    """Texts of class names by the text tower with its experts and the router of one task.

    Args:
        backbone: has a `joint` space.
        num_classes: C.
        mixtures: of the blocks of the text tower; only a reference is held.
        route: number of the router.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, mixtures: nn.ModuleList, route: int) -> None:
        super().__init__(backbone, num_classes, names="live")
        self._mixtures, self.route, self.injector = (mixtures,), route, Injector()

    @contextmanager
    def _routed(self) -> Iterator[None]:
        mixtures = self._mixtures[0]
        with (
            routed(mixtures, self.route),
            self.injector.use(self.joint, Plan(beside_mlp=dict(enumerate(mixtures)))),
        ):
            yield

    def texts(self, classes: list[int]) -> Tensor:
        """Return w [k, d] of classes with gradients, of their first template."""
        with self._routed():
            return super().texts(classes)

    def final_texts(self, classes: list[int]) -> Tensor:
        """Return w [k, d] of classes without gradients, of all templates and without noise."""
        with eval_mode(self._mixtures[0]), self._routed():
            return super().final_texts(classes)

    def other_texts(self, captions: Captions) -> Tensor:
        """Return w [K, d] of other classes without noise."""
        with eval_mode(self._mixtures[0]), self._routed():
            return super().other_texts(captions)

    def sources(self) -> Iterable[Tensor]:
        """Return the experts and routers of the text tower, on which the rows depend."""
        found: Iterable[Tensor] = self._mixtures[0].parameters()
        return found


class Autoencoder(nn.Module):
    """The reconstruction of sigmoid(f) by a code of `code` rectified units; its error says how unfamiliar f is."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, code), nn.Linear(code, width)
        self.register_buffer("usual", torch.zeros(()))  # the mean error on the rows it was trained on

    def forward(self, f: Tensor) -> Tensor:
        """Return the mean squared error [B] of features f [B, d]."""
        a = f.sigmoid()
        error: Tensor = (self.decoder(self.encoder(a).relu()).sigmoid() - a).square().mean(dim=1)
        return error


class NearestMean(nn.Module):
    """1 - cosine of f and the mean of the rows of a task, which needs no training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("usual", torch.zeros(()))

    def forward(self, f: Tensor) -> Tensor:
        """Return the distance [B] of features f [B, d]."""
        return 1 - F.cosine_similarity(f, self.mean[None], dim=1)  # type: ignore[index]


class MoeAdapters(Method):
    """Frozen CLIP with shared experts in both towers and a router per task, which is chosen for each image.

    Two forms are published. Multi-domain (MTIL): experts=22, routers=per_task, freeze_used=true, a selector.
    Class-incremental: experts=2, routers=shared, freeze_used=false, selector=none, label_smoothing=0; both experts then
    always run.

    Args:
        backbone: two towers, frozen.
        num_classes: C.
        experts: E, experts per block.
        top_k: experts per row.
        bottleneck: r, width of the experts.
        scale: factor of their output.
        dropout: probability with which an activation of an expert is dropped in training.
        noise: "train": gates have noise in training; "none": never.
        routers: "per_task", or "shared" by all tasks.
        freeze_used: freeze the `top_k` experts of each block that a task has chosen most often. When all experts are
            frozen, later tasks train their routers alone.
        selector: how the task of an image is found: "autoencoder", "nearest_mean", or "none" with routers=shared.
        selection: "instance", or "batch", with which predictions depend on the batch.
        code: h, units of the code of an autoencoder.
        threshold: an image whose error is above this multiple of the mean error of the chosen task's training rows is
            left to the plain model; None for no such limit.
        reference: loaders of data sets that stand for all other images: one more selector is trained on them, whose
            choice means the plain model; [] for none.
        reference_rows: largest number of images of each of them; None for all.
        selector_budget: of an autoencoder; published: 300 steps (1000 on reference data).
        label_smoothing: share of the target that is spread over the classes that compete; published: 0.2 (MTIL), 0.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    needs_text: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = True
    hooks_backbone = True
    head: NamesHead

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        experts: PositiveInt,
        top_k: PositiveInt,
        bottleneck: PositiveInt,
        scale: Positive,
        dropout: Fraction,
        noise: Literal["train", "none"],
        routers: Literal["per_task", "shared"],
        freeze_used: bool,
        selector: Literal["autoencoder", "nearest_mean", "none"],
        selection: Selection,
        code: PositiveInt,
        threshold: NonNegative | None,
        reference: list[Loader],
        reference_rows: PositiveInt | None,
        selector_budget: Budget,
        label_smoothing: Fraction,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        freeze(backbone)
        joint: Any = backbone.joint
        for tower in (backbone, joint):
            require_blocks(tower, type(self).__name__)
        self.head = NamesHead(backbone, num_classes, names="fixed")  # of the plain model
        self.routers, self.freezes, self.selector, self.selection = routers, freeze_used, selector, selection
        self.code, self.threshold, self.label_smoothing, self.budget = code, threshold, label_smoothing, selector_budget
        self.depends_on_batch = selector != "none" and selection == "batch"

        def mixtures(depth: int, width: int) -> nn.ModuleList:
            def expert() -> Adapter:
                return Adapter(width, bottleneck, activation="relu", dropout=dropout, scale=scale, learn_scale=False)

            return nn.ModuleList(
                Mixture(width, (expert() for _ in range(experts)), top_k, noisy=noise == "train") for _ in range(depth)
            )

        self.image_mixtures = mixtures(len(backbone.blocks), joint.vision_width)  # type: ignore[arg-type]
        self.text_mixtures = mixtures(len(joint.blocks), joint.text_width)
        self.heads = nn.ModuleList()  # one per router
        self.selectors, self.others = nn.ModuleList(), nn.ModuleList()  # of tasks; of reference data
        self.reference = Reference(reference, rows=reference_rows, texts=None, option="method.reference")
        self.injector = Injector()

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        if options["top_k"] > options["experts"]:
            raise ConfigError(f"method.top_k={options['top_k']}: there are {options['experts']} experts; choose fewer")
        if options["selector"] == "none" and options["routers"] == "per_task":
            raise ConfigError(
                "method.selector=none: nothing chooses among the routers of the tasks; set method.routers=shared or "
                "method.selector=autoencoder"
            )

    def check(self, stream: Stream) -> None:
        self.reference.open(self.backbone, stream)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, also of the heads of names, whose parameters are frozen and whose mode says what they do."""
        super().train(mode)
        self.heads.train(mode)
        return self

    def _mixtures(self) -> list[Any]:
        """Return the mixtures of all blocks of both towers."""
        return [*self.image_mixtures, *self.text_mixtures]

    def _routed_heads(self) -> list[Any]:
        """Return the heads of all routers."""
        return [*self.heads]

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        new = self.routers == "per_task" or not len(self.heads)
        for mixture in self._mixtures():
            mixture.begin(new=new)
        if new:
            head = RoutedHead(self.backbone, self.num_classes, self.text_mixtures, len(self.heads))
            head.captions = self.head.captions
            self.heads.append(head.to(self.head.weight.device))
        known = self.head.initialised.nonzero()[:, 0]
        active = ctx.mask(torch.tensor([task.index]), self.compete)[0].nonzero()[:, 0].tolist()
        for own in self._routed_heads():
            own.grow(known)
            own.active = active

    def meet(self, classes: Tensor) -> None:
        for head in (self.head, *self._routed_heads()):
            head.grow(classes)

    def learn(self, task: Task, ctx: Context) -> None:
        if self.selector != "none":
            if self.reference.loaders and not len(self.others):
                self.reference.open(self.backbone, ctx.stream)
                self.reference.place(ctx.hardware)
                self._learn_selector(self.others, self.reference.images(), ctx, "selector of others")
            self._learn_selector(self.selectors, (batch.x for batch in task.train.batches(256)), ctx, "selector")
        fit(self, task.train, ctx)

    def _learn_selector(self, into: nn.ModuleList, images: Iterable[Tensor], ctx: Context, name: str) -> None:
        """Append a selector that knows these prepared images."""
        with torch.no_grad(), eval_mode(self), ctx.hardware.autocast():
            f = torch.cat([self.plain(ctx.hardware.layout(x)) for x in images])
        if self.selector == "nearest_mean":
            nearest = NearestMean(f.shape[1]).to(f.device)
            nearest.mean.copy_(F.normalize(f, dim=1).mean(dim=0))  # type: ignore[operator]
            found: nn.Module = nearest
        else:
            found = Autoencoder(f.shape[1], self.code).to(f.device)
            rows = TensorSplit(f, torch.zeros(len(f), dtype=torch.long, device=f.device), positions=ctx.task.index)

            def loss(batch: Batch, ctx: Context) -> Tensor:
                error: Tensor = found(batch.x).mean()
                return error

            fit(self, rows, ctx, loss=loss, params=found.parameters(), budget=self.budget, name=name)
        freeze(found)
        with torch.no_grad():
            found.usual.copy_(found(f).mean())  # type: ignore[operator]
        into.append(found)

    def end_task(self, task: Task, ctx: Context) -> None:
        if self.freezes:
            for mixture in self._mixtures():
                mixture.freeze_used()

    # --- a step

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return smoothed_cross_entropy(self(batch.x), batch.y, self.competing(batch.t, ctx), self.label_smoothing)

    def after_step(self, ctx: Context) -> None:
        self.injector.release()

    # --- prediction

    def plain(self, x: Tensor) -> Tensor:
        """Return sqrt(d) n(g_i(x)) [B, d] of the plain model for images x."""
        encode: Any = self.backbone.encode_image
        embeddings = F.normalize(encode(x).float(), dim=1)
        return embeddings * math.sqrt(embeddings.shape[1])

    def routes(self, f: Tensor) -> Tensor:
        """Return the router [B] long of images with features f [B, d] of the plain model, -1 for that model alone."""
        if not len(self.selectors):
            return torch.full((len(f),), PLAIN, device=f.device)
        errors = torch.stack([net(f) for net in (*self.selectors, *self.others)], dim=1)
        if self.selection == "batch":
            errors = errors.mean(dim=0, keepdim=True).expand(len(f), -1)
        error, best = errors.min(dim=1)
        tasks = len(self.selectors)
        plain = best >= tasks
        if self.threshold is not None:
            usual = torch.stack([net.usual for net in self.selectors])  # type: ignore[misc]
            plain |= error > self.threshold * usual[best.clamp(max=tasks - 1)]
        return torch.where(plain, PLAIN, best.clamp(max=len(self.heads) - 1))

    def encode(self, x: Tensor, route: int | Tensor) -> Tensor:
        """Return n(g_i(x)) [B, d] with the experts, for one router or the router [B] long of each image."""
        plan, encode = Plan(beside_mlp=dict(enumerate(self.image_mixtures))), self.backbone.encode_image
        with routed(self.image_mixtures, route), self.injector.use(self.backbone, plan):
            return F.normalize(encode(x), dim=1)  # type: ignore[operator]

    def constant(self, x: Tensor) -> Tensor | None:
        return None if self.selector == "none" else self.plain(x)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        if self.training:
            head: Any = self.heads[-1]
            logits: Tensor = head.match(self.encode(x, head.route), head.rows())
            return logits
        return self.forward_with(self.plain(x), x)

    def forward_with(self, constant: Tensor, x: Tensor, task: int | None = None) -> Tensor:
        return self._scored(constant, x, lambda head: head.rows())

    def score_names(self, x: Tensor, captions: Captions) -> Tensor:
        return self._scored(self.plain(x), x, lambda head: head.rows_of(captions))

    def _scored(self, f: Tensor, x: Tensor, texts: Callable[[Any], Tensor]) -> Tensor:
        """Return the logits of images x, each with the `texts` of the head of its own router."""
        if self.selector == "none":
            return self.head.match(self.encode(x, 0), texts(self.heads[0]))
        routes = self.routes(f)
        embeddings = self.encode(x, routes)
        logits = self.head.match(embeddings, texts(self.head))
        for route in sorted(set(routes[routes >= 0].tolist())):
            own = self.head.match(embeddings, texts(self.heads[route]))
            logits = torch.where((routes == route)[:, None], own, logits)
        return logits

    def choices(self, x: Tensor) -> Tensor | None:
        """Return [B, tasks + 1] integers: 1 for the plain model or for the router of a task."""
        return None if self.selector == "none" else F.one_hot(self.routes(self.plain(x)) + 1, len(self.heads) + 1)
