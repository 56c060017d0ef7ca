"""Classifiers of single tasks (stages) that are isolated from each other, and the choice among them by their energies.

With the logits h of a stage for its own classes, its confidence at the temperature T is T log sum_y exp(h_y / T), minus
the free energy (ESN, Wang et al., AAAI 2023, arXiv 2211.15969, section 3.3).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BELOW = 1.0  # how far the largest logit of a stage that is not chosen lies below that of the chosen one


def confidences(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Return T log sum_y exp(h_y / T) [B, V] of logits h [B, k] for V temperatures T."""
    t = logits.new_tensor(temperatures)
    top = logits.amax(dim=1, keepdim=True)
    return top + t * ((logits - top)[:, None, :] / t[:, None]).logsumexp(dim=2)


def routes(logits: Sequence[Tensor], temperatures: Sequence[float]) -> Tensor:
    """Return the stage [B, V] long with the largest confidence at each of V temperatures; the oldest of equals.

    Args:
        logits: of each stage, [B, k] with k the number of its classes.
        temperatures: V of them.
    """
    return torch.stack([confidences(own, temperatures) for own in logits], dim=2).argmax(dim=2)


class StageHeads(nn.Module):
    """The classifiers of all stages and the temperatures that vote among them.

    Args:
        num_classes: C.
        temperatures: the candidates, of which the first one votes from the beginning.

    Attributes:
        stages: the classifiers, `Stage`.
        voting: [candidates] bool, the temperatures that vote.
    """

    voting: Tensor

    def __init__(self, num_classes: int, temperatures: Sequence[float]) -> None:
        super().__init__()
        self.num_classes, self.temperatures = num_classes, list(temperatures)
        self.stages = nn.ModuleList()
        # A checkpoint may name only classes that a method has from its beginning (`clrun.running.checkpoint`).
        self.made_of = (nn.Linear, nn.LayerNorm, nn.GELU, nn.Sequential, nn.Identity)
        self.register_buffer("voting", torch.arange(len(self.temperatures)) == 0)

    @property
    def pool(self) -> list[float]:
        """The temperatures that vote."""
        return [t for t, votes in zip(self.temperatures, self.voting.tolist(), strict=True) if votes]

    def classes(self, number: int) -> Tensor:
        """Return the classes [k] of a stage."""
        stage = self.stages[number]
        assert isinstance(stage, Stage)
        return stage.classes

    def own(self, inputs: Tensor) -> list[Tensor]:
        """Return the logits [B, k] float32 of each stage for its own classes."""
        return [stage(inputs).float() for stage in self.stages]

    def votes(self, logits: Sequence[Tensor]) -> Tensor:
        """Return how many temperatures of the pool choose each of S stages, [B, S] long."""
        return F.one_hot(routes(logits, self.pool), len(logits)).sum(dim=1)

    def given(self, inputs: Tensor, number: int) -> Tensor:
        """Return the logits [B, C] of one stage; 0 in the columns of classes that it does not have."""
        own: Tensor = self.stages[number](inputs).float()
        return own.new_zeros(len(own), self.num_classes).index_copy(1, self.classes(number), own)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits [B, C] as `Esn` describes them; 0 in the columns of classes that no stage has."""
        logits = self.own(inputs)
        chosen = self.votes(logits).argmax(dim=1)
        tops = torch.stack([own.amax(dim=1) for own in logits], dim=1)
        shift = tops.gather(1, chosen[:, None]) - BELOW - tops
        found = logits[0].new_full((len(inputs), self.num_classes), -torch.inf)
        for number, own in enumerate(logits):
            columns = self.classes(number)
            found[:, columns] = torch.maximum(found[:, columns], own + shift[:, number, None])
        for number, own in enumerate(logits):  # last, because stages may share classes
            columns, won = self.classes(number), (chosen == number)[:, None]
            found[:, columns] = torch.where(won, own, found[:, columns])
        return found.masked_fill(found == -torch.inf, 0.0)


class Stage(nn.Module):
    """The classifier of one task.

    Args:
        body: maps the inputs to features [B, D].
        width: D.
        classes: [k] long, class ids of the task.
    """

    classes: Tensor

    def __init__(self, body: nn.Module, width: int, classes: Tensor) -> None:
        super().__init__()
        self.body, self.linear = body, nn.Linear(width, len(classes))
        self.register_buffer("classes", classes.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits [B, k] of the classes of this stage."""
        logits: Tensor = self.linear(self.body(inputs))
        return logits


class ClassAttention(nn.Module):
    """A token attends to the tokens of a transformer (CaiT, Touvron et al., ICCV 2021, arXiv 2103.17239).

    u = LN_1([token; tokens]); token <- token + W_p attention(W_q u_0, W_k u, W_v u); token <- token + MLP(LN_2(token)),
    where the MLP has D / 2 units and GELU. Matrices begin truncated normal with standard deviation 0.02, biases 0.

    Args:
        token: initial token [D].
        heads: number of attention heads.
    """

    def __init__(self, token: Tensor, heads: int) -> None:
        super().__init__()
        width = len(token)
        self.token, self.heads = nn.Parameter(token.detach().clone()), heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the token [B, D] after it has attended to itself and to tokens [B, N, D]."""
        token = self.token.expand(len(tokens), 1, -1)
        seen = self.norm1(torch.cat([token, tokens], dim=1))

        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

        query, key, value = split(self.query(seen[:, :1])), split(self.key(seen)), split(self.value(seen))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        token = token + self.proj(attended)
        changed: Tensor = token + self.mlp(self.norm2(token))
        return changed[:, 0]


__all__ = ["ClassAttention", "Stage", "StageHeads", "confidences", "routes"]
