"""BLIP: weights keep the leading bits that the tasks so far gave them (Shi et al., CVPR 2021, arXiv 2105.04444).

Memory between tasks: 9 bytes per protected weight (mean information, quantised value, number of bits). Task id: not
needed.

Verified: bits are the information gain and never decrease, weights stay within a quantum, and 20 bits freeze a weight
(test_methods_columns).
"""

from typing import Annotated, Literal, Self

import torch
from torch import Tensor, nn

from clrun.blocks.curvature import Labels, diagonal_fisher
from clrun.blocks.params import Carrier, Params, hold_statistics, select
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import Method
from clrun.system.errors import ConfigError, PositiveInt, Range

FINEST = 20  # bits at which a bound counts as closed; float32 resolves 24


class Blip(Method):
    """A weight in [-u, u] is quantised when a task ends; later tasks may change it by one quantum, u 2^-n, at most.

    u = 6 / sqrt(fan-in) for weights and 1 for biases, and n is the weight's number of bits. Let F_t be the task's
    diagonal Fisher information and G_t = ((t + 1) G_(t-1) + F_t) / (t + 2) its mean over tasks, with G_(-1) = prior *
    fan-in. A task adds ceil(1/2 log2(G_t / G_(t-1))) bits to n, its information gain, if that is positive. The weights
    and biases of linear and convolutional layers of the backbone are protected; the head is not. A weight without a bit
    becomes 0, which prunes the weights that no task needs.

    Momentum and adaptive learning rates keep pushing weights against their bounds. The published settings use neither,
    and no weight decay.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        prior: F_prior, for F as the mean over samples. Published values (1e-15 to 5e-17) refer to F / B^2 at a batch
            size B of 100; multiply them by 1e4. If it is too large, no weight ever gets a bit.
        bits: largest number of bits of a weight; 20 bits nearly freeze it.
        labels: how the labels of the Fisher information are chosen: exact, sampled, empirical, predicted or batched;
            see `clrun.blocks.curvature.estimate`.
        samples: number of rows that the Fisher information is estimated on; null for all.
        initial: "keep": the backbone as it was loaded. "normal": drawn from N(0, 1 / fan-in), as published. Both are
            clipped to [-u, u].
        rest: other parameters (normalisation layers, tokens, positions) and running statistics. "freeze_after_first":
            trained in the first task only. "train": trained in every task, without protection.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    own_weights = "puts the weights of the backbone on a grid of bits of its own"

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        prior: Annotated[float, Range(above=0, maximum=1)],
        bits: Annotated[int, Range(minimum=1, maximum=FINEST)],
        labels: Labels,
        samples: PositiveInt | None,
        initial: Literal["keep", "normal"],
        rest: Literal["train", "freeze_after_first"],
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.labels = labels
        self.prior, self.samples, self.initial, self.rest = prior, samples, initial, rest
        self.grid = BitGrid(backbone, prior, bits)
        self.held = False  # whether the rest is frozen

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0 and self.initial == "normal":
            self.grid.draw_(self.backbone, ctx.generator("initial"))
        self.grid.open(self.backbone)
        self.grid.clamp_(self.backbone)

    def after_step(self, ctx: Context) -> None:
        self.grid.clamp_(self.backbone)

    def end_task(self, task: Task, ctx: Context) -> None:
        fisher = diagonal_fisher(self, task.train, ctx, of=self.backbone, labels=self.labels, samples=self.samples)
        self.grid.update(self.backbone, fisher.params(fisher.values), task.index)
        if dead := self.grid.dead():
            raise ConfigError(
                f"method.prior={self.prior:g}: no weight of backbone.{dead} got a bit, and all would become 0; the "
                "Fisher information does not exceed prior * fan-in; use a smaller method.prior"
            )
        self.grid.quantise_(self.backbone)
        if self.rest == "freeze_after_first" and not self.held:
            self.held = True
            for name, parameter in select(self.backbone).items():
                parameter.requires_grad_(name in self.grid.bounds)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.held:
            hold_statistics(self.backbone)
        return self


class BitGrid(Carrier):
    """The bits, the last quantised values and the mean information of the protected weights, each [P].

    Args:
        backbone: whose trainable weights and biases of linear and convolution layers are protected.
        prior: F_prior.
        bits: most bits.
    """

    def __init__(self, backbone: nn.Module, prior: float, bits: int) -> None:
        super().__init__()
        self.most = bits
        self.bounds: dict[str, float] = {}  # u
        self.fans: dict[str, int] = {}
        sizes = []
        for path, module in backbone.named_modules():
            if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                continue
            fan_in = module.weight[0].numel()
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and name in ("weight", "bias"):
                    full = f"{path}.{name}" if path else name
                    self.bounds[full] = 6 / fan_in**0.5 if name == "weight" else 1.0
                    self.fans[full] = fan_in
                    sizes.append(parameter.numel())
        self.sizes = sizes
        self.low = self.high = torch.zeros(0)  # limits, [P] during a task
        self.bits = torch.zeros(sum(sizes), dtype=torch.int8)
        self.value = torch.zeros(sum(sizes))
        self.information = torch.cat(
            [torch.full((n,), prior * fan) for n, fan in zip(sizes, self.fans.values(), strict=True)] or [self.value]
        )

    def parts(self, backbone: nn.Module) -> list[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
        """Return name, weights, bits, quantised values and information of each protected tensor, in its shape."""
        columns = [torch.split(x, self.sizes) for x in (self.bits, self.value, self.information)]
        found = []
        for name, *flat in zip(self.bounds, *columns, strict=True):
            weight = backbone.get_parameter(name).detach()
            bits, value, information = (x.view(weight.shape) for x in flat)
            found.append((name, weight, bits, value, information))
        return found

    def draw_(self, backbone: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights from N(0, 1 / fan-in)."""
        for name, weight, *_ in self.parts(backbone):
            weight.copy_(torch.randn(weight.shape, generator=generator) / self.fans[name] ** 0.5)

    def open(self, backbone: nn.Module) -> None:
        """Set the limits of each weight for the task that begins: a quantum either way, within [-u, u]."""
        low, high = [], []
        for name, _, bits, value, _ in self.parts(backbone):
            u = self.bounds[name]
            quantum, edge = torch.ldexp(torch.full_like(value, u), -bits.int()), u * (1 - 2.0**-FINEST)
            low.append((value - quantum).clamp(min=-edge).flatten())
            high.append((value + quantum).clamp(max=edge).flatten())
        self.low, self.high = (torch.cat(x) if x else self.value for x in (low, high))

    def clamp_(self, backbone: nn.Module) -> None:
        """Put every weight back to within its limits."""
        limits = torch.split(self.low, self.sizes), torch.split(self.high, self.sizes)
        for name, low, high in zip(self.bounds, *limits, strict=True):
            weight = backbone.get_parameter(name).detach()
            torch.clamp(weight, low.view(weight.shape), high.view(weight.shape), out=weight)

    def update(self, backbone: nn.Module, fisher: Params, index: int) -> None:
        """Give each weight the bits that the Fisher information of the task at position `index` is worth."""
        for name, _, bits, _, information in self.parts(backbone):
            before = information.double()
            now = ((index + 1) * before + fisher[name]) / (index + 2)
            gain = torch.ceil(0.5 * torch.log2(now / before))
            # Where the information did not grow, rounding must not make it a bit.
            gain = torch.where(fisher[name] > information, gain, 0.0).clamp(0, self.most)
            bits.copy_((bits + gain).clamp(max=self.most))
            information.copy_(now)

    def dead(self) -> str | None:
        """Return the name of a weight matrix without a single bit, or None."""
        empty = (n for n, bits in zip(self.bounds, torch.split(self.bits, self.sizes), strict=True) if not bits.any())
        return next((name for name in empty if name.endswith("weight")), None)

    def quantise_(self, backbone: nn.Module) -> None:
        """Round every weight to its bits: u round(w / u 2^n) / 2^n, 0 without a bit."""
        for name, weight, bits, value, _ in self.parts(backbone):
            u, levels = self.bounds[name], torch.ldexp(torch.ones_like(value), bits.int())
            weight.copy_(torch.where(bits > 0, u * (torch.round(weight / u * levels) / levels), 0.0))
            value.copy_(weight)
        self.low = self.high = torch.zeros(0)
