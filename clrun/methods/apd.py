"""APD: gated shared weights plus a sparse part of each task (Yoon et al., ICLR 2020, arXiv 1902.09432).

Memory between tasks: the P shared weights, and for each task P numbers of its own part, most of which are 0 when the
task is evaluated, with its gates, biases, normalisation layers and head. Task id: needed.

Verified: the gates, normalisation layers and heads of learned tasks do not change, the penalties are computed by hand,
and consolidation moves no weight by more than half the gap (test_methods_apd).
"""

import torch
from torch import Tensor, nn

from clrun.blocks.additive import Additive, additive_layers, cluster, consolidate, fold, sparse
from clrun.blocks.low_rank import copy_for_task, layers_of
from clrun.blocks.params import Params
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.method import freeze
from clrun.methods.task_networks import TaskNetworks
from clrun.system.errors import Count, NonNegative, PositiveInt


class Apd(TaskNetworks):
    """theta_i = sigma * sigmoid(v_i) + tau_i, with sigma shared by all tasks and moved by each.

    Here theta_i are the weights of task i, v_i its gates, one per output unit of a layer, and tau_i its own part. Task
    t minimises over sigma, over v_t, its biases, normalisation layers and head, and over tau of all tasks up to t:

        CE + l1 sum_(i <= t) |tau_i|_1 + drift / 2 sum_(i < t) |theta_i - theta_i at the start of task t|^2
           + decay / 2 (|tau_t|^2 + |v_t|^2, in the first task + |sigma|^2) + gate_l1 |v_t|_1.

    tau_t starts as sigma, and v_t at random with variance 1 / m for m output units. The weights of earlier tasks follow
    sigma and can drift, because each task sets their targets anew. The cost of a step grows with the number of tasks so
    far. Deviations from the public code: the gates of earlier tasks do not change; normalisation layers, if any, belong
    to the task; k-means starts from the means of the previous groups, without random numbers.

    Args:
        backbone: maps prepared images to features [B, D]; sigma begins as its weights.
        num_classes: C.
        l1: lambda_1, weight of the sparsity of tau. Entries of at most this size count as 0 in eval mode.
        drift: lambda_2, weight of the drift of earlier tasks. Gradient descent diverges when learning rate * drift * (1
            + T / 4) exceeds 2 in T tasks; the published value of 100 is for Adam.
        decay: weight of the squared terms.
        gate_l1: weight of |v|. A gate of at most this size counts as 0 in eval mode.
        retroactive: whether tau of earlier tasks is trained as sigma changes. false is APD-Fixed, in which only the
            drift penalty protects earlier tasks.
        group_every: number of tasks between two consolidations, in which the tau of all tasks are grouped and each
            group shares the entries that agree: APD(2). 0 is APD(1), without consolidation.
        groups: number of groups per `group_every` tasks.
        gap: beta: entries of tau in a group that differ by at most this are shared.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        l1: NonNegative,
        drift: NonNegative,
        decay: NonNegative,
        gate_l1: NonNegative,
        retroactive: bool,
        group_every: Count,
        groups: PositiveInt,
        gap: NonNegative,
    ) -> None:
        super().__init__(backbone, num_classes)
        self.l1, self.drift, self.decay, self.gate_l1 = l1, drift, decay, gate_l1
        self.retroactive = retroactive
        self.group_every, self.groups, self.gap = group_every, groups, gap
        self.grouping: dict[str, list[int]] = {}  # group of each task, by layer
        self.targets: list[Params] = []  # theta of earlier tasks at the start of the current one; empty between tasks
        freeze(self.backbone)

    def new_network(self, task: Task, ctx: Context) -> nn.Module:
        network = copy_for_task(self.backbone)
        shared = layers_of(self.backbone)
        for name, layer in layers_of(network).items():
            layer.weight = shared[name].weight
            logits = torch.randn(len(layer.weight)).to(layer.weight) / len(layer.weight) ** 0.5
            parts = Additive(layer, logits=logits, threshold=self.l1, gate_threshold=self.gate_l1)
            network.set_submodule(name, parts)
        return network

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        for layer in layers_of(self.backbone).values():
            layer.weight.requires_grad_(True)
        earlier = [additive_layers(network) for network in self.networks[:-1]]
        self.targets = [{name: layer.theta().detach() for name, layer in layers.items()} for layers in earlier]
        for layers in earlier:
            for part in layers.values():
                part.own.requires_grad_(self.retroactive)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        loss = super().loss(batch, ctx)
        for layer in additive_layers(self.networks[-1]).values():
            squares = layer.own.square().sum() + layer.logits.square().sum()
            if ctx.task.index == 0:
                squares = squares + layer.layer.weight.square().sum()
            loss = loss + self.l1 * layer.own.abs().sum() + self.decay / 2 * squares
            loss = loss + self.gate_l1 * layer.logits.abs().sum()
        for network, targets in zip(self.networks, self.targets, strict=False):
            for name, layer in additive_layers(network).items():
                loss = loss + self.drift / 2 * (layer.theta() - targets[name]).square().sum()
                if self.retroactive:
                    loss = loss + self.l1 * layer.own.abs().sum()
        return loss

    def end_task(self, task: Task, ctx: Context) -> None:
        freeze(self)
        self.networks[-1].eval()
        self.targets = []
        if self.group_every and (task.index + 1) % self.group_every == 0:
            self._consolidate(self.groups * (task.index + 1) // self.group_every)
        ctx.log({"phase": "capacity", "capacity": self.capacity()})

    def _consolidate(self, count: int) -> None:
        """Group the tasks in each layer, and let each group share the entries on which its members agree."""
        networks = [additive_layers(network) for network in self.networks]
        for name in networks[0]:
            layers = [network[name] for network in networks]
            fold(layers)
            rows = torch.stack([layer.own.detach().flatten() for layer in layers])
            self.grouping[name] = cluster(rows, count, before=self.grouping.get(name, []))
            consolidate(layers, self.grouping[name], gap=self.gap)

    def capacity(self) -> float:
        """Return how many nonzero numbers all tasks use, relative to the parameters of one backbone with the heads."""
        parameters = {id(p): p for p in self.parameters()}
        parts: dict[int, nn.Parameter] = {}
        for network in self.networks:
            for layer in additive_layers(network).values():
                parts |= {id(p): p for p in (layer.own, layer.common) if p is not None}
        used = sum(int(sparse(part.detach(), self.l1).count_nonzero()) for part in parts.values())
        whole = sum(p.numel() for key, p in parameters.items() if key not in parts)
        single = sum(p.numel() for module in (self.backbone, self.heads) for p in module.parameters())
        return (used + whole) / single
