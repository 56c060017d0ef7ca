"""Small streams, networks and lives of learners, for tests of methods and blocks."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from running import member
from torch import Tensor, nn

from clrun.data.features import frozen_features
from clrun.data.modality import modality_of
from clrun.data.split import Plain, Split, TensorSplit
from clrun.data.stream import Dataset, Setting, Stream, Task
from clrun.data.transforms import fit_transform
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.progress import Progress
from clrun.running.checkpoint import RunState
from clrun.running.engine import Engine
from clrun.running.evaluation import Evaluation, Row
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all

CONF = Path(__file__).parent.parent / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
FEATURES = 12
THREADS = int(os.environ["CLRUN_TEST_THREADS"])
HARDWARE: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / "hardware" / "cpu.yaml"))  # type: ignore[assignment]


class Net(nn.Module):
    """A network with everything that remembers or draws: batch normalisation and dropout."""

    num_features = FEATURES
    input_size = (1, 8, 8)
    mean = std = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(54, FEATURES)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(1)
        return self.dropout(self.linear(x).relu())


def tiny_vit(**options: Any) -> nn.Module:
    """Return a timm vision transformer for the images of `image_stream`, with weights large enough to tell them apart.

    Under timm's own initialisation the features of all images point the same way.
    """
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 4}
    vit = VisionTransformer(**({**shape, "num_classes": 0} | options))
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    vit.input_size, vit.mean, vit.std = (1, 8, 8), None, None
    return vit


def tiny_towers() -> Any:
    """Return an image and a text tower for `image_stream`, with weights large enough to tell images and names apart."""
    from clrun.backbones.two_towers import JointSpace, Tower, TwoTowers
    from clrun.data.byte_pairs import BytePairs

    joint = JointSpace(32, Tower(16, 1, 2), 12, BytePairs("", 24))
    towers = TwoTowers(image_size=8, patch_size=2, vision=Tower(32, 2, 4), pre_norm=True, joint=joint, channels=1)
    with torch.no_grad():
        for parameter in towers.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    towers.mean = towers.std = None
    return towers


def tiny_writer() -> nn.Module:
    """Return an encoder-decoder for `as_texts`."""
    writer: nn.Module = configured("backbone", "t5_tiny", width=16, depth=1, heads=2)((9,))
    return writer


def as_texts(stream: Stream) -> Stream:
    """Return the stream with a text in place of each image: a byte for the first pixel of each row, the end mark."""

    def read(split: Split) -> Split:
        raw = next(split.batches(len(split), view="raw"))
        ids = F.pad(raw.x.flatten(1)[:, ::8].long() + 3, (0, 1), value=1)
        return TensorSplit(ids, raw.y, positions=raw.t)

    tasks = [replace(t, train=read(t.train), test=read(t.test), val=t.val and read(t.val)) for t in stream.tasks]
    return replace(stream, tasks=tuple(tasks), transform=Plain())


class Linear(nn.Module):
    """A linear network."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Identity(nn.Module):
    """A backbone without parameters, for features [B, D]."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


@cache
def node(group: str, name: str) -> DictConfig:
    """Return the options of conf/`group`/`name`.yaml, which are read once: thousands of tests ask for them."""
    return OmegaConf.create(member(CONF / group / f"{name}.yaml"))


def configured(group: str, name: str, **options: Any) -> Any:
    """Return what conf/`group`/`name`.yaml names, with some options changed."""
    config = node(group, name)
    unknown = options.keys() - config.keys()
    assert not unknown, f"{group}={name} has no option {unknown}"
    return instantiate(OmegaConf.merge(config, options), _convert_="all")


def cpu(**options: Any) -> Hardware:
    """Return the configuration `hardware=cpu`, with the number of threads of the tests."""
    values = {key: value for key, value in HARDWARE.items() if key != "_target_"}
    return Hardware(**(values | {"threads": THREADS} | options))


def sgd(*, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0, **options: Any) -> Budget:
    """Return a budget of two epochs of SGD, or as `options` say."""
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return Budget(optimizer, **({"epochs": 2, "batch_size": 10} | options))


@cache  # thousands of tests read the same images
def images(train_rows: int, test_rows: int, augment: tuple[str, ...]) -> Dataset:
    """Return six classes of 8x8 images with these numbers of rows per class."""
    rows = {"train_rows": train_rows, "test_rows": test_rows}
    made: Dataset = configured(
        "dataset", "synthetic", num_classes=6, image_shape=[1, 8, 8], augment=list(augment), **rows
    )
    return made


def image_stream(
    setting: Setting = "cil",
    order: Sequence[int] = (0, 1, 2),
    *,
    augment: Sequence[str] = ("crop",),
    class_seed: int | None = None,
    train_rows: int = 16,
) -> Stream:
    """Return three tasks of two classes (domain-incremental: of six, under permutations) of 8x8 images.

    Each class has `train_rows` training images, or 5 per task in the domain-incremental stream.
    """
    dataset = images(*(5, 4) if setting == "dil" else (train_rows, 8), tuple(augment))
    transform, _ = fit_transform(dataset, Net())
    if setting == "dil":
        scenario = configured("scenario", "domain_shift", n_tasks=3)
    else:
        scenario = configured("scenario", "class_split", n_tasks=3, setting=setting, class_seed=class_seed)
    stream: Stream = scenario(dataset, lambda n: list(order), transform)
    return stream


def text_stream(setting: Setting = "cil", order: Sequence[int] = (0, 1, 2), **options: Any) -> tuple[Stream, nn.Module]:
    """Return three tasks of two classes of short texts, and the tiny BERT with random weights that they suit.

    Args:
        setting: of the stream.
        order: of the tasks.
        **options: of the backbone.
    """
    rows = {"num_classes": 6, "train_rows": 10, "test_rows": 3, "words": 3}
    dataset: Dataset = configured("dataset", "text_synthetic", **rows)
    seed_all(0, "init")
    sizes = {"width": 16, "depth": 1, "heads": 2, "max_tokens": 16}
    backbone: nn.Module = configured("backbone", "bert_tiny", **(sizes | options))(dataset.shape)
    fitted = modality_of(dataset).fit(dataset, backbone)
    scenario = configured("scenario", "class_split", n_tasks=3, setting=setting)
    stream: Stream = scenario(fitted.dataset, lambda n: list(order), fitted.transform)
    return stream, backbone


def row_stream(tasks: Sequence[tuple[Tensor, Tensor]], num_classes: int, setting: Setting = "cil") -> Stream:
    """Return a stream of feature rows, one (x [N, D], y [N]) a task."""

    def task(index: int, x: Tensor, y: Tensor) -> Task:
        split = TensorSplit(x, y, positions=index)
        return Task(index, index, f"task {index}", y.unique(), split, split)

    return Stream(tuple(task(i, x, y) for i, (x, y) in enumerate(tasks)), num_classes, setting)


def context(stream: Stream, index: int = 0, *, budget: Budget | None = None, seed: int = 0, **options: Any) -> Context:
    """Return the context of the task at position `index`."""
    return Context(stream, stream.tasks[index], budget or sgd(), cpu(), seed, **options)


def factory(name: str, **options: Any) -> Callable[..., Method]:
    """Return `method=name` of the configuration with some options changed."""
    return configured("method", name, **options)


def born(make: Callable[..., Method], stream: Stream, *, seed: int = 0) -> tuple[Method, Stream]:
    """Return a new method on a new network, and the stream it reads (features, where it wants them).

    The network is placed before the method gets it, as a run does: the memory format of a convolution chooses its
    kernel, and on some CPUs another kernel changes the last bit.
    """
    seed_all(seed, "init")
    target: Any = make.func if isinstance(make, partial) else make
    if target.needs_decoder:
        stream, backbone = as_texts(stream), tiny_writer()
    else:
        backbone = tiny_towers() if target.needs_text else tiny_vit() if target.needs_vit else Net()
    cpu().place(backbone)
    if target.reads_features(make.keywords if isinstance(make, partial) else {}):
        stream, backbone = frozen_features(stream, backbone, cpu(), text=target.needs_text)
    method = make(backbone, stream.num_classes)
    method.read_names(stream.captions)
    return method, stream


def rows(stream: Stream) -> Tensor:
    """Return the test rows of all tasks, as the network sees them."""
    return torch.cat([batch.x for task in stream.tasks for batch in task.test.batches(100)])


def answers(method: Method, x: Tensor) -> Tensor:
    """Return what a method says of prepared rows x, in evaluation mode."""
    method.eval()
    with torch.inference_mode():
        return method(x)


def copies(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters by their names."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def state(method: nn.Module) -> dict[str, Any]:
    """Return copies of weights, buffers and the tensors in plain attributes (replay memories, importances)."""
    found = dict(method.state_dict())
    for path, module in method.named_modules():
        found |= {f"{path}:{name}": value for name, value in vars(module).items() if isinstance(value, Tensor)}
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Fail unless two states are equal bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Recorder:
    """Stands for the recorder of a run: keeps what the engine reports.

    It calls `after` when a task ends and stops the engine after `until` tasks.
    """

    def __init__(self, after: Callable[[Task, Method, RunState], None] | None, until: int | None) -> None:
        self.after, self.until = after, until
        self.recorded: list[Row] = []
        self.logged: list[Mapping[str, Any]] = []
        self.steps = 0

    def begin_task(self, task: Task) -> None:
        pass

    def step(self, progress: Progress) -> None:
        self.steps += 1

    def log(self, record: dict[str, Any]) -> None:
        self.logged.append(record)

    def rows(self, rows: list[Row]) -> None:
        self.recorded += rows

    def end_task(self, task: Task, method: Method, run_state: RunState) -> None:
        if self.after is not None:
            self.after(task, method, run_state)
        if run_state.learned == self.until:
            raise _Stop


def live(
    method: Method,
    stream: Stream,
    *,
    budget: Budget | None = None,
    learned: int = 0,
    until: int | None = None,
    seed: int = 0,
    after: Callable[[Task, Method, RunState], None] | None = None,
) -> Recorder:
    """Let `method` learn the tasks at positions `learned` to `until` with the engine."""
    hardware, journal = cpu(), Recorder(after, until)
    evaluation = Evaluation(hardware, "test", 64, None)
    engine = Engine(stream, budget or sgd(), hardware, seed, evaluation, journal, state=RunState(learned=learned))
    with suppress(_Stop):
        engine.run(method)
    return journal


def trace(read: Callable[[Method], Any], method: Method, stream: Stream, **options: Any) -> list[Any]:
    """Return what `read` finds in the method after each task of its life."""
    found: list[Any] = []
    live(method, stream, after=lambda task, method, run_state: found.append(read(method)), **options)
    return found


class _Stop(Exception):
    """Ends a life early."""
