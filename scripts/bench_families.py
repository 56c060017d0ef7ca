"""What curvature, regularisation, replay, gradient and mask methods cost, against the arithmetic they need.

    python scripts/bench_families.py [--only speed,bytes,flat] [--methods ewc gem ...] [--rounds 5]

CPU time on one thread; shipped options unless the table below says otherwise; images made by the script.

speed: steps of a method in its third task, in clrun's `fit`, beside a loop written out here that does the passes
through the network and the arithmetic on P parameters which the method's definition counts, nothing else; for low-rank
updates, adapters and projected gradients it is in `barelib`. The two take turns; `ratio` is the median of bare / method
over the rounds (1: as fast as the bare loop; demanded is what holds for an MLP of this size, 0.80, and 0.95 of model
mixture, merging, updates and adapters), `cost` that of method / bare finetuning. What happens once a task (Fisher
information, herding) is not in it: see flat.
bytes: what run.json says of the state after three tasks, without network and head, beside the definition's formula.
flat: 50 small tasks; growth of the time of learning a task (consolidation included), last third against the first one,
the first task left out. A life learns its last third in turns with the first third of the next life, and the median of
these pairs counts: a machine that grows busier slows both. Where time grows with the tasks by definition, the table
says what grows.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import clrun  # noqa: F401 isort: skip (sets how threads wait, before torch is imported)
import barelib
import torch
import torch.nn.functional as F
from bench_overhead import Journal
from benchlib import Figure, configured, finish
from torch import Tensor, nn

from clrun.backbones import small
from clrun.data.split import TensorSplit
from clrun.data.stream import Dataset, Stream, Task
from clrun.data.transforms import fit_transform
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.progress import Progress
from clrun.methods.packnet import prunable
from clrun.running.engine import Engine
from clrun.running.evaluation import Evaluation
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all

SHAPE, BATCH, ROWS, M = (3, 16, 16), 32, 128, 200  # ROWS of a task, M in memory
STORED = prod(SHAPE) + 8  # bytes of a row in memory
CLASSES = 2  # of a task
STEPS = 16  # timed
SPEED, BYTES, GROWTH = 0.80, 0.02, 0.10  # demanded
NEAR = 0.95  # speed demanded of model mixture, merging, low-rank updates and adapters
QUICK = "--methods finetune er gem hat mer dgc --rounds 1 --tasks 12 --lives 1"


@dataclass
class Sizes:
    """What formulas of bytes are made of, for a learner after T tasks."""

    method: Method
    tasks: int

    @property
    def p(self) -> int:
        """Parameters of the backbone."""
        return sum(p.numel() for p in self.method.backbone.parameters())

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return sum(p.numel() for p in self.method.head.parameters())

    @property
    def features(self) -> int:
        """D."""
        return int(self.method.backbone.num_features)  # type: ignore[arg-type]

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(outputs, inputs with the constant of a bias) of linear and convolutional layers."""
        layers = [m for m in self.method.backbone.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return [(len(m.weight), m.weight[0].numel() + (m.bias is not None)) for m in layers]

    @property
    def in_layers(self) -> int:
        """Parameters of these layers."""
        return sum(a * b for a, b in self.layers)

    @property
    def kronecker(self) -> int:
        """Numbers of Kronecker factors, and of a diagonal for the other parameters."""
        return sum(a * a + b * b for a, b in self.layers) + self.p - self.in_layers

    @property
    def weights(self) -> int:
        """Weights that can be pruned."""
        return sum(p.numel() for p in prunable(self.method.backbone).values())


@dataclass(frozen=True)
class Case:
    """What a method is and what it costs by its definition.

    Attributes:
        grad: rows of each forward and backward pass of a step.
        read: rows of each forward pass without gradient.
        vector: elementwise operations on all P parameters.
        products: times that every layer's matrix is multiplied from both sides.
        of_head: whether the head is one of the layers in `products`; its outputs have the identity.
        steps: optimizer steps that the passes are counted for.
        state: bytes between tasks, without network and head.
        grows: what grows with the number of tasks; "" for nothing: time per task is flat.
        method: file in conf/method; "" for the name of the case.
        options: changed ones.
        setting: of the stream.
        gated: the passes, as "grad 0" or "read 1", whose layers' outputs are multiplied by a gate for each channel, or
            have an adaptor of another network's outputs added.
        adaptor: width of these adaptors; 0 for gates.
        phases: names of the fits that are timed.
        vit: on a vision transformer.
        patches: of it per side, for speed and bytes.
        lora: rank of low-rank updates of the layers `qkv`; 0 for none.
        frozen: the method's own backbone is frozen, but the passes with gradient go through all weights.
        tuned: makes the bare loop of the method in its third task, of which it trains a part; see `barelib`.
        ridge: there are no steps: the arithmetic is that of a ridge regression on lifted features of all rows.
    """

    grad: tuple[int, ...] = (BATCH,)
    read: tuple[int, ...] = ()
    vector: float = 0
    products: int = 0
    of_head: bool = False
    steps: int = 1
    state: Callable[[Sizes], float] = lambda n: 0
    grows: str = ""
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    setting: str = "cil"
    gated: tuple[str, ...] = ()
    adaptor: int = 0
    phases: tuple[str, ...] = ("fit",)
    vit: bool = False
    patches: int = 4
    lora: int = 0
    frozen: bool = False
    tuned: Callable[[Any], barelib.Bare] | None = None
    ridge: bool = False


SLOW = {"alignment": {"rows_per_class": 8, "budget": {"batch_size": 8}}}
ALIGNED = "the head is aligned to the features of all classes"


def replay_bytes(n: Sizes) -> float:
    """Return the bytes of Gaussians, of their classes' tasks, and of the head before its alignment."""
    classes = n.method.num_classes
    return 8 * classes * (n.features + 2) + 4 * CLASSES * n.tasks * n.features**2 + 4 * n.head


def adapter_bytes(n: Sizes, *, sets: int) -> float:
    """Return the bytes of sets of adapters of width 16 in all blocks, and of the Gaussians and tasks of the classes."""
    width, classes = n.features, n.method.num_classes
    one = 4 * len(n.method.backbone.blocks) * (2 * width * 16 + 16 + width)  # type: ignore[arg-type]
    gaussians = 8 * classes * (width + 1) + 4 * CLASSES * n.tasks * width**2 + 16 * CLASSES * n.tasks
    return sets * one + gaussians + 8 * classes


def prototype_bytes(n: Sizes) -> float:
    """Return the bytes of the sums, counts and means of the classes in one space of features."""
    return n.method.num_classes * (8 * n.features + 8 + 4 * n.features + 1)


def hide_bytes(n: Sizes) -> float:
    """Return the bytes of prompts, of the network of the task identity, and of two sets of centroids."""
    width, classes, tasks = n.features, n.method.num_classes, n.tasks
    prompts = 4 * tasks * 4 * 2 * 5 * width
    identity = 4 * (2 * 2 * width**2 + (2 + 4 - 1) * width) + 4 * classes * (width + 1) + classes
    return prompts + identity + 2 * (16 * width + 16) * 2 * CLASSES * tasks + 8 * classes


def cl_lora_bytes(n: Sizes) -> float:
    """Return the bytes of shared LoRA with its last values, and of the LoRA, weights and prototypes of each task."""
    width, rank = n.features, 8
    shared = 2 * (4 * 2 * 2 * width * rank + 4 * 2 * width * rank)
    own = 4 * (2 * 2 * 2 * width * rank + 3 * 2) + prototype_bytes(n)
    return shared + n.tasks * own


def sema_bytes(n: Sizes) -> float:
    """Return the bytes of adapters in four blocks, and of modules of two blocks with descriptors and rows."""
    width, code = n.features, 128
    adapter, descriptor = 2 * width * 16 + 16 + width, 2 * width * code + code + width
    return 4 * (2 * adapter + 2 * n.tasks * (adapter + descriptor + width + 1)) + 24 * 2 * n.tasks


def inflora_bytes(n: Sizes) -> float:
    """Return the bytes of the folded weights of `qkv`, of the bases, and of the position of each class's task."""
    folded = 4 * 4 * 3 * n.features**2
    bases = sum(8 * s.width * min(s.dimension, s.width - s.dimension) for s in n.method.spaces)
    return folded + bases + 8 * n.method.num_classes


def gpm_bytes(n: Sizes) -> float:
    """Return the bytes of the bases, in float64, of d inputs and k protected directions of each layer."""
    return sum(8.0 * space.width * space.dimension for space in n.method.spaces)


def trgp_bytes(n: Sizes) -> float:
    """Return the bytes of `gpm`, of the directions of each task, and of the matrices of the tasks it trusts."""
    layers = [space.width for name, _, space in n.method.protected() if name != "head"]
    kept = [[own.of(name).shape[1] for name in own.names] for own in n.method.directions]
    directions = sum(4 * width * k for own in kept for width, k in zip(layers, own, strict=True))
    chosen = [(place, task) for own in n.method.trust for place, trust in enumerate(own) for task in trust.tasks]
    return gpm_bytes(n) + directions + sum(4.0 * kept[task][place] ** 2 for place, task in chosen)


def acil_bytes(n: Sizes) -> float:
    """Return the bytes of the projection, of the products of lifted features, and of sums and counts of classes."""
    lifted = 256
    return 4 * n.features * lifted + 8 * lifted**2 + n.method.num_classes * (8 * lifted + 8)


PENALTY = 3  # differences, their product with the importance, the sum with the gradient
KEPT = {"capacity": M}
CASES: dict[str, Case] = {
    "finetune": Case(),
    "joint": Case(state=lambda n: 4 * n.p, grows="the data of all tasks are learned again"),
    "l2": Case(vector=PENALTY, state=lambda n: 4 * n.p),
    "ewc": Case(vector=PENALTY, state=lambda n: 8 * n.p),
    "online_ewc": Case(vector=PENALTY, state=lambda n: 8 * n.p, method="ewc", options={"decay": 0.9}),
    "mas": Case(vector=PENALTY, state=lambda n: 8 * n.p),
    "si": Case(vector=PENALTY + 2 + 3, state=lambda n: 12 * n.p),  # copies of gradient and weights; path
    "kfac_ewc": Case(vector=PENALTY, products=2, state=lambda n: 4 * (n.kronecker + n.p)),  # proximal: there and back
    "kfac_ewc_grad": Case(
        vector=PENALTY,
        products=1,
        state=lambda n: 4 * (n.kronecker + n.p),
        method="kfac_ewc",
        options={"solver": "grad", "strength": 0.01},
    ),
    "ncl": Case(vector=PENALTY, products=2, state=lambda n: 4 * (n.kronecker + n.p)),  # pull, and preconditioning
    "qr": Case(vector=4 + 5, state=lambda n: 12 * n.p),  # running importance; interpolation
    "blip": Case(vector=1, state=lambda n: 9 * n.in_layers, options={"prior": 1e-30}),
    "progress_compress": Case(  # a step of progress and one of compress
        grad=(BATCH, BATCH),
        read=(BATCH, BATCH, BATCH),
        vector=PENALTY,
        steps=2,
        state=lambda n: 4 * (2 * (n.p + n.head) + n.p),
        gated=("grad 0", "read 1"),
        adaptor=16,
        phases=("fit", "compress"),
        options={"compress": {"epochs": None, "steps": STEPS}},
    ),
    "lwf": Case(read=(BATCH,), grows="a softmax for each earlier task"),
    "ebll": Case(
        read=(BATCH,), state=lambda n: 4 * n.tasks * 100 * (n.features + 1), grows="a code for each earlier task"
    ),
    "vit_pad": Case(read=(BATCH,), grows="a softmax for each earlier task", vit=True),
    "slca": Case(state=replay_bytes, options=SLOW, grows=ALIGNED),
    "slca_pp": Case(
        state=lambda n: replay_bytes(n) + 4 * (4 * 4 * 4 * n.features + n.method.num_classes),
        options=SLOW,
        grows=ALIGNED,
        vit=True,
        lora=4,
    ),  # LoRA of rank 4 on qkv in 4 blocks, and a factor per row of the head
    "coma": Case(state=lambda n: replay_bytes(n) + 4 * n.p, options=SLOW, grows=ALIGNED),
    "cofima": Case(state=lambda n: replay_bytes(n) + 8 * n.p, options=SLOW, grows=ALIGNED),
    # 4 blocks of width D: pairs of rank r for two parts of `qkv` take 4 D r numbers in each of them.
    "lora": Case(state=lambda n: 4 * 4 * 4 * n.features * 8, vit=True, tuned=barelib.updated),
    "inc_lora": Case(
        state=lambda n: 4 * 4 * 4 * n.features * 8 * n.tasks,
        method="lora",
        options={"growth": "per_task"},
        grows="the rank of the sum is that of all tasks together",
        vit=True,
        tuned=barelib.updated,
    ),
    "o_lora": Case(
        state=lambda n: 4 * 4 * 4 * n.features * 8 * n.tasks,
        grows="the rank of the sum is that of all tasks together, and so are the maps that the penalty compares",
        vit=True,
        tuned=barelib.updated,
    ),
    "inflora": Case(state=inflora_bytes, vit=True, tuned=barelib.updated),
    "sd_lora": Case(
        state=lambda n: 4 * (4 * (4 * n.features * 10 * n.tasks + 2 * n.tasks**2 + 2 * n.tasks) + n.tasks),
        grows="the rank of the sum is that of all tasks together",
        vit=True,
        tuned=barelib.updated,
    ),
    "gpm": Case(
        state=gpm_bytes,
        tuned=barelib.projected,
    ),
    "trgp": Case(
        state=trgp_bytes,
        grows="the directions and matrices of all tasks are kept, and two of them are used",
        tuned=barelib.scaled,
        setting="til",
    ),
    "acil": Case(state=acil_bytes, options={"m": 256}, ridge=True, phases=()),
    "mos": Case(
        state=lambda n: adapter_bytes(n, sets=n.tasks + 1) + prototype_bytes(n),  # the mean of the sets is one more
        options=SLOW,
        grows=ALIGNED,
        vit=True,
        tuned=barelib.adapted,
    ),
    "tuna": Case(
        state=lambda n: adapter_bytes(n, sets=n.tasks + 1),  # the fused set is one more
        options=SLOW,
        grows=ALIGNED,
        vit=True,
        tuned=barelib.adapted,
    ),
    # The attention computes a query for each key of a prefix in vain. The card counts 5 of these beside 197 tokens.
    "hide_prompt": Case(
        state=hide_bytes,
        patches=8,
        options={
            "alignment": {"centroids": 2, "rows_per_class": 8, "budget": {"epochs": 1}},
            "tii": {
                "budget": {"epochs": 1},
                "alignment": {"centroids": 2, "rows_per_class": 8, "budget": {"epochs": 1}},
            },
        },
        grows=ALIGNED,
        vit=True,
        tuned=barelib.prefixed,
    ),
    "cl_lora": Case(
        state=cl_lora_bytes,
        grows="the weights of all earlier tasks are compared in every step",
        vit=True,
        tuned=barelib.distilled,
    ),
    "sema": Case(
        state=sema_bytes,
        options={"rd": {"epochs": 1}, "threshold": 0.0},
        phases=("func-2",),  # of the first block that expands
        grows="with threshold 0 a module per block and task",
        vit=True,
        tuned=barelib.mixed,
    ),
    "esn": Case(grows="the temperature of a task is searched with the classifiers of all earlier ones"),
    "swag": Case(
        vector=PENALTY + 6 / 8,  # every fourth step of the tail, which is half of all, mean, square and deviation
        state=lambda n: 2 * 4 * (n.p + n.head) + 8 * n.p,  # variances and a deviation; importance and anchor
        options={"predict": "swag", "samples": 2, "strength": 0.1, "collect_every": 1.0},
    ),
    # The value and the derivative by input and weight of each layer are three forward passes, of which the first one
    # has a backward pass. The product rule adds two tensors per convolution and per normalisation of it: each is one
    # operation on the outputs of the convolution, as a gate is.
    "dlcft": Case(
        read=(BATCH, BATCH),
        gated=("read 0", "read 1"),
        vector=PENALTY + 2,
        products=1,
        of_head=True,
        state=lambda n: 4 * (2 * n.p + n.kronecker + n.method.num_classes * (n.features + 2) + (n.features + 1) ** 2),
        options={"samples": 32},
        frozen=True,
    ),
    "b_tuning": Case(state=lambda n: 4 * n.p),  # a copy of the student; its answers are stored during a task
    "packnet": Case(
        vector=1 + 2, state=lambda n: n.weights, setting="til", phases=("fit", "retrain")
    ),  # masked weights; gradient and restoration
    "hat": Case(
        vector=2 + 2, gated=("grad 0",), setting="til", state=lambda n: 4 * (n.tasks + 1) * len(n.method.units.used)
    ),
    "fish": Case(
        vector=2,
        setting="til",
        state=lambda n: 8 * sum(len(d.entries) for d in n.method.deltas),
        options={"warmup": {"steps": 2}, "ratio": 0.5},
    ),
    "er": Case(grad=(2 * BATCH,), state=lambda n: M * STORED, options=KEPT),
    "der": Case(
        grad=(BATCH, BATCH),
        state=lambda n: M * (STORED + 4 * n.method.num_classes),
        options={"beta": 0.0, **KEPT},
    ),
    "derpp": Case(
        grad=(BATCH,) * 3,
        state=lambda n: M * (STORED + 4 * n.method.num_classes),
        method="der",
        options={"beta": 0.5, **KEPT},
    ),
    "icarl": Case(
        read=(BATCH,),
        state=lambda n: M // (CLASSES * n.tasks) * CLASSES * n.tasks * STORED + 4 * n.method.num_classes * n.features,
        options=KEPT,
    ),
    "gem": Case(
        grad=(BATCH, M // 3, M // 3),
        vector=2 * 3,
        state=lambda n: M // n.tasks * n.tasks * STORED,
        grows="a gradient for each earlier task",
        options=KEPT,
    ),
    "a_gem": Case(grad=(BATCH, 128), vector=3, state=lambda n: M * STORED, options=KEPT),
    "mer": Case(grad=(1,), vector=1 / 4, state=lambda n: M * STORED, options={"draws": 3, **KEPT}),
    "dgc": Case(grad=(2 * BATCH, 32, 32), vector=4, state=lambda n: M * STORED + 12 * (n.p + n.head)),
    "merge": Case(state=lambda n: 8 * n.p, options={"sums": "single"}),  # the sum, and the initial weights
    "fisher_merge": Case(
        state=lambda n: 12 * n.p, method="merge", options={"sums": "single", "rule": "fisher", "samples": 64}
    ),
    "regmean": Case(
        state=lambda n: 4 * (sum(b * b + a * b for a, b in n.layers) + n.p - n.in_layers + n.p),
        method="merge",
        options={"sums": "single", "rule": "regmean", "samples": 64},
    ),
    "ties": Case(state=lambda n: (8 + 2 + 4) * n.p, method="merge", options={"sums": "single", "rule": "ties"}),
    "opcm": Case(state=lambda n: 8 * n.p, method="merge", options={"sums": "single", "rule": "opcm"}),
    "ema": Case(vector=3, state=lambda n: 8 * n.p, method="merge", options={"sums": "single", "rule": "ema"}),
    "imm": Case(vector=PENALTY, state=lambda n: 12 * n.p, options={"sums": "single", "samples": 64}),
    "full_memory": Case(
        state=lambda n: 8 * n.tasks * STORED,
        method="replay_finetune",
        options={"per_task": 8},
        grows="a draw from each earlier task in every step",
    ),
    "partial_memory": Case(
        state=lambda n: 8 * n.tasks * STORED,
        method="replay_finetune",
        options={"memory": "partial", "per_task": 8},
        grows="8 rows of each earlier task, a larger share of every batch",
    ),
}


MIXTURE = [
    "slca", "slca_pp", "coma", "cofima", "esn", "b_tuning", "swag", "dlcft",
    "imm", "merge", "fisher_merge", "regmean", "ties", "opcm", "ema",
]  # fmt: skip
UPDATES = [
    "lora", "inc_lora", "o_lora", "inflora", "sd_lora", "gpm", "trgp", "acil",
    "mos", "tuna", "hide_prompt", "cl_lora", "sema",
]  # fmt: skip
SPEEDS = dict.fromkeys([*MIXTURE, *UPDATES], NEAR)


def stream_of(tasks: int, shape: tuple[int, int, int], rows: int, setting: Any, backbone: nn.Module) -> Stream:
    """Return tasks of noise around a colour for each class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(tasks * CLASSES).repeat_interleave(rows // CLASSES)
    images = torch.randint(0, 128, (len(y), *shape), generator=generator, dtype=torch.uint8)
    images += (y % 7 * 16).to(torch.uint8)[:, None, None, None]
    split = TensorSplit(images, y)
    names = tuple(map(str, range(tasks * CLASSES)))
    dataset = Dataset("bench", split, split, len(names), names, shape, mean=(0.4,) * shape[0], std=(0.2,) * shape[0])
    transform, _ = fit_transform(dataset, backbone)
    made = []
    for index in range(tasks):
        at = slice(index * rows, (index + 1) * rows)
        part = TensorSplit(images[at], y[at], positions=index, transform=transform)
        made.append(Task(index, index, f"task {index}", y[at].unique(), part, part.select(torch.arange(1))))
    return Stream(tuple(made), tasks * CLASSES, setting, transform=transform)


def backbone_of(case: Case, shape: tuple[int, int, int]) -> nn.Module:
    """Return a network for images of `shape`."""
    if not case.vit:
        return small.cnn(shape, width=32, depth=3) if shape == SHAPE else small.cnn(shape, width=8, depth=1)
    from timm.models.vision_transformer import VisionTransformer

    side, patches = shape[1], case.patches if shape == SHAPE else 4
    size = {"img_size": side, "patch_size": side // patches, "in_chans": shape[0]}
    vit = VisionTransformer(**size, embed_dim=64, depth=4, num_heads=4, num_classes=0)
    vit.input_size, vit.mean, vit.std = shape, None, None  # type: ignore[assignment]
    return vit


def born(name: str, tasks: int, shape: tuple[int, int, int], rows: int, options: dict[str, Any]) -> tuple[Any, Stream]:
    """Return a new learner and its stream."""
    case = CASES[name]
    seed_all(0, "init")
    backbone = backbone_of(case, shape)
    stream = stream_of(tasks, shape, rows, case.setting, backbone)
    method = configured("method", case.method or name, **{**case.options, **options})(backbone, stream.num_classes)
    return method, stream


def engine_of(stream: Stream, budget: Budget, hardware: Hardware, max_steps: int | None) -> Engine:
    """Return an engine."""
    evaluation = Evaluation(hardware, "test", 1, None)
    return Engine(stream, budget, hardware, 0, evaluation, Journal(), max_steps=max_steps)  # type: ignore[arg-type]


# --- speed


class Bare:
    """The passes and the arithmetic of a step, and nothing else.

    Args:
        case: what to do.
        method: whose network is copied.
        split: images.
    """

    def __init__(self, case: Case, method: Method, split: TensorSplit) -> None:
        self.case, self.images, self.labels = case, split.images, split.labels
        self.model = nn.Sequential(copy.deepcopy(method.backbone), copy.deepcopy(method.head))
        if case.frozen:
            self.model.requires_grad_(True)
        self.teacher = copy.deepcopy(self.model).eval()
        for name, layer in self.model.named_modules():
            if case.lora and name.endswith("qkv") and isinstance(layer, nn.Linear):
                self._update(layer, case.lora)
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(params, lr=1e-3)
        size = sum(p.numel() for p in method.backbone.parameters())
        self.vectors = [torch.rand(size) for _ in range(3)]
        layers = Sizes(method, 0).layers if case.products else []
        self.matrices = [(torch.rand(a, a), torch.rand(a, b), torch.rand(b, b)) for a, b in layers]
        size = method.head.weight.shape[1] + 1 if case.of_head else 0  # type: ignore[union-attr, operator, index]
        self.of_head = (torch.rand(method.num_classes, size), torch.rand(size, size))
        self.generator = torch.Generator().manual_seed(0)
        self.gated = False  # the pass that runs
        for one, other in zip(self.model[0].modules(), self.teacher[0].modules(), strict=True):
            if case.gated and isinstance(one, nn.Conv2d):
                self._attach(one, other)

    def _attach(self, layer: nn.Conv2d, other: nn.Module) -> None:
        """Multiply the channels of a layer by gates, or add an adaptor of what another layer put out."""
        width, seen = layer.out_channels, list[Tensor]()
        gate = nn.Parameter(torch.ones(width, 1, 1))
        down, up = nn.Linear(width, max(1, self.case.adaptor)), nn.Linear(max(1, self.case.adaptor), width, bias=False)

        def changed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not self.gated:
                return output
            if not self.case.adaptor:
                return output * gate
            lateral = up(down(seen[0].movedim(1, -1)).relu()) * gate[:, 0, 0]
            return output + lateral.movedim(-1, 1)

        layer.register_forward_hook(changed)
        other.register_forward_hook(lambda module, args, output: seen.clear() or seen.append(output))

    @staticmethod
    def _update(layer: nn.Linear, rank: int) -> None:
        """Add a low-rank update to the output of a layer."""
        down, up = torch.rand(rank, layer.in_features) - 0.5, torch.zeros(layer.out_features, rank)
        layer.down, layer.up = nn.Parameter(down), nn.Parameter(up)
        layer.register_forward_hook(lambda module, args, y: y + F.linear(F.linear(args[0], module.down), module.up))

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Return prepared images and labels; convolutions are faster on images in channels-last order, as in `fit`."""
        rows = torch.randint(len(self.labels), (count,), generator=self.generator)
        images = self.images[rows].float().div_(255).sub_(0.4).div_(0.2)
        if not self.case.vit:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, self.labels[rows]

    def __call__(self, steps: int) -> float:
        """Return the CPU seconds of a step."""
        case, model = self.case, self.model.train()
        a, b, c = self.vectors
        operations = 0.0
        start = time.process_time()
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            for number, count in enumerate(case.read):
                self.gated = f"read {number}" in case.gated
                with torch.no_grad():
                    (model if self.gated else self.teacher)(self.rows(count)[0])
            for number, count in enumerate(case.grad):
                self.gated = f"grad {number}" in case.gated
                x, y = self.rows(count)
                F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            operations += case.vector
            while operations >= 1:
                torch.add(a, b, out=c)
                operations -= 1
            for outer, matrix, inner in self.matrices * case.products:
                outer @ matrix @ inner
            if case.of_head:
                self.of_head[0] @ self.of_head[1]
            for _ in range(case.steps):
                self.optimizer.step()
        return (time.process_time() - start) / (steps * case.steps)


class BareTuned(Bare):
    """The passes of a step through a network of which a part is trained, and what the method does beside them.

    Args:
        case: what to do.
        method: ready to learn.
        split: images.
    """

    def __init__(self, case: Case, method: Method, split: TensorSplit) -> None:
        assert case.tuned is not None
        self.case = case
        self.images, self.labels, self.bare = split.images, split.labels, case.tuned(method)
        self.optimizer = torch.optim.SGD(self.bare.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, steps: int) -> float:
        """Return the CPU seconds of a step."""
        bare = self.bare
        start = time.process_time()
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            x, y = self.rows(BATCH)
            features = bare.body(x)
            loss, term = F.cross_entropy(bare.head(features), y), bare.term(features, x)
            (loss if term is None else loss + term).backward()  # type: ignore[no-untyped-call]
            bare.project()
            self.optimizer.step()
            bare.settle()
        return (time.process_time() - start) / steps


class BareRidge(Bare):
    """Features and their lift, the sums of products in float64, and one solution: what a closed form does per task.

    Args:
        method: whose network, lift and sums are copied.
        split: images.
    """

    def __init__(self, method: Any, split: TensorSplit) -> None:
        self.images, self.labels, self.classes = split.images, split.labels, method.num_classes
        self.network, self.weight = copy.deepcopy(method.backbone).eval(), method.projection.weight.clone()
        self.gram = torch.zeros(2 * self.weight.shape[1:], dtype=torch.float64)

    def __call__(self, steps: int) -> float:
        """Return the CPU seconds of a task; `steps` is not used."""
        start, sums = time.process_time(), torch.zeros(len(self.gram), self.classes, dtype=torch.float64)
        with torch.no_grad():
            for rows in torch.arange(len(self.labels)).split(256):
                x, y = self.images[rows].float().div_(255).sub_(0.4).div_(0.2), self.labels[rows]
                lifted = F.relu(self.network(x) @ self.weight).double()
                self.gram += lifted.t() @ lifted
                sums += lifted.t() @ F.one_hot(y, self.classes).double()
            factor = torch.linalg.cholesky(self.gram + 0.1 * torch.eye(len(self.gram)))
            torch.cholesky_solve(sums, factor)
        return time.process_time() - start


class Timed:
    """A method in its third task, ready to be timed again and again.

    Args:
        name: of the case.
        hardware: one thread.
    """

    def __init__(self, name: str, hardware: Hardware) -> None:
        self.case, self.hardware = CASES[name], hardware
        self.budget = Budget(partial(torch.optim.SGD, lr=1e-3), epochs=100, batch_size=BATCH)
        self.method, self.stream = born(name, 3, SHAPE, ROWS, {})
        budget = Budget(partial(torch.optim.SGD, lr=1e-3), epochs=1, batch_size=BATCH)
        engine = engine_of(self.stream, budget, hardware, None)
        for before in self.stream.tasks[:2]:
            engine.train(self.method, engine.context(self.method, before))

    def begun(self) -> Any:
        """Return a copy of the method that is ready to learn the third task."""
        method, task = copy.deepcopy(self.method), self.stream.tasks[2]
        method.begin_task(task, Context(self.stream, task, self.budget, self.hardware, 0))
        return method

    def bare(self, split: TensorSplit) -> Bare:
        """Return the bare loop beside it."""
        if self.case.ridge:
            return BareRidge(self.method, split)
        return (
            Bare(self.case, self.method, split)
            if self.case.tuned is None
            else BareTuned(self.case, self.begun(), split)
        )

    def __call__(self, steps: int) -> float:
        """Return the CPU seconds of a step, from the first to the last of each fit; of a task if there are no steps."""
        clocks: dict[str, list[float]] = {}

        def on_step(progress: Progress) -> None:
            clocks.setdefault(progress.phase, []).append(time.process_time())

        method, task = copy.deepcopy(self.method), self.stream.tasks[2]
        ctx = Context(self.stream, task, self.budget, self.hardware, 0, on_step=on_step, max_steps=steps + 1)
        seed_all(0, "task", 2)
        method.begin_task(task, ctx)
        start = time.process_time()
        method.learn(task, ctx)
        if self.case.ridge:
            return time.process_time() - start
        spans = [clocks[phase] for phase in self.case.phases]
        return sum(c[-1] - c[0] for c in spans) / sum(len(c) - 1 for c in spans)


def speed(name: str, hardware: Hardware, rounds: int) -> tuple[str, Figure]:
    """Return a line and a figure on the speed of a method."""
    timed = Timed(name, hardware)
    train = timed.stream.tasks[2].train
    assert isinstance(train, TensorSplit)
    own = born("finetune", 3, SHAPE, ROWS, {})[0] if timed.case.ridge else timed.method  # whose head is a plain one
    bare, plain = timed.bare(train), Bare(replace(CASES["finetune"], frozen=True), own, train)  # plain: all weights
    steps = STEPS * (20 if name == "mer" else 1)
    works = (bare, timed, plain)
    for work in works:
        work(2)
    found = [[work(steps) for work in works] for _ in range(rounds)]
    ratio = statistics.median(b / t for b, t, _ in found)
    cost = statistics.median(t / p for _, t, p in found)
    ms = [1000 * statistics.median(column) for column in zip(*found, strict=True)]
    case = timed.case
    passes = "+".join(map(str, case.grad)) + (f", read {'+'.join(map(str, case.read))}" if case.read else "")
    passes += f", {case.vector:.2g} P" if case.vector else ""
    passes += f", {case.products} products" if case.products else ""
    passes += f", {'adaptors' if case.adaptor else 'gates'}" if case.gated else ""
    passes += f" in {case.steps} steps" if case.steps > 1 else ""
    passes = "a task: lift, products, solution" if case.ridge else passes
    figure = Figure(f"speed of {name} over bare arithmetic", ratio, SPEEDS.get(name, SPEED))
    return f"{name:18s}{ms[0]:9.2f}{ms[1]:9.2f}{ratio:8.2f}{cost:8.2f}  {figure.verdict:8s}{passes}", figure


# --- bytes


def stored(name: str, hardware: Hardware) -> tuple[str, Figure]:
    """Return a line and a figure on the bytes of a method's state."""
    method, stream = born(name, 3, SHAPE, ROWS, {})
    budget = Budget(partial(torch.optim.SGD, lr=1e-3), epochs=1, batch_size=BATCH)
    engine = engine_of(stream, budget, hardware, 1 if CASES[name].vit else None)
    method = engine.run(method)
    sizes = engine.state.costs[-1]["state_bytes"]
    found = sizes["total"] - sizes["backbone"] - sizes["head"]
    expected = CASES[name].state(Sizes(method, 3))
    off = abs(found - expected) / expected if expected else float(found > 0)
    figure = Figure(f"bytes of {name} off its formula", off, BYTES, True, ".2%")
    parts = "" if figure.met else f" { ({k: v for k, v in sizes.items() if k not in ('total', 'backbone')}) }"
    return f"{name:18s}{found:12,d}{expected:14,.0f}{off:8.2%}  {figure.verdict}{parts}", figure


# --- flat


def growth(name: str, hardware: Hardware, tasks: int, lives: int) -> tuple[str, Figure | None]:
    """Return a line and, unless time grows by definition, a figure on the time per task of a life of many tasks."""
    third = (tasks - 1) // 3
    pairs, old = list[tuple[float, float]](), life(name, hardware, tasks)
    next(old)
    for _ in range(third):
        next(old)
    for _ in range(lives):
        for _ in range(tasks - 1 - 2 * third):
            next(old)
        young = life(name, hardware, tasks)
        next(young)
        pairs += [(next(young), next(old)) for _ in range(third)]
        old = young
    first, last = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    figure = Figure(
        f"growth of the time of a task of {name}", statistics.median(b / a for a, b in pairs) - 1, GROWTH, True, ".0%"
    )
    grows = CASES[name].grows
    line = f"{name:18s}{first:9.1f}{last:9.1f}{figure.measured:9.0%}  {f'grows: {grows}' if grows else figure.verdict}"
    return line, None if grows else figure


def life(name: str, hardware: Hardware, tasks: int) -> Iterator[float]:
    """Yield the CPU seconds of learning each task."""
    method, stream = born(name, tasks, (1, 8, 8), 48, {})
    budget = Budget(partial(torch.optim.SGD, lr=1e-3), epochs=1, batch_size=8)
    engine = engine_of(stream, budget, hardware, None)
    for task in stream.tasks:
        start = time.process_time()
        engine.train(method, engine.context(method, task))
        yield time.process_time() - start


def main(words: list[str] | None = None) -> list[Figure]:
    """Measure, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="speed,bytes,flat")
    parser.add_argument("--methods", nargs="+", default=list(CASES), choices=list(CASES), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison of speeds")
    parser.add_argument("--tasks", type=int, default=50, help="of the life of many tasks")
    parser.add_argument(
        "--lives", type=int, default=3, help="whose last third is compared with the first of another one"
    )
    args = parser.parse_args(words)
    hardware: Hardware = configured("hardware", "cpu", threads=1)
    hardware.setup()
    figures: list[Figure] = []
    parts: list[tuple[str, str, Callable[[str], tuple[str, Figure | None]]]] = [
        (
            "speed",
            "ms a step             bare   method   ratio    cost            passes",
            partial(speed, hardware=hardware, rounds=args.rounds),
        ),
        ("bytes", "bytes                found      expected     off", partial(stored, hardware=hardware)),
        (
            "flat",
            "ms a task         first third  last   growth",
            partial(growth, hardware=hardware, tasks=args.tasks, lives=args.lives),
        ),
    ]
    for part, header, measure in parts:
        if part in args.only.split(","):
            print(header)
            for name in args.methods:
                line, figure = measure(name)
                print(line, flush=True)
                figures += [] if figure is None else [figure]
            print()
    return figures


if __name__ == "__main__":
    finish(main())
