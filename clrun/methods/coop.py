"""CoOp: learned words before the class names (Zhou, Yang, Loy and Liu, IJCV 2022, arXiv 2109.01134), task by task.

    prompt_k = [SOT; v_1 .. v_M; tokens of name k; "."; EOT]      w_k = n(text_from_embeddings(prompt_k))
    L = CE(kappa n(g_i(x)) . w_k, y)                              v learned, both towers and kappa frozen

Memory between tasks: 4 M w bytes per context (w: width of the text tower) and one text row per class, 4 C d bytes; with
replay, capacity (D + 2) rows of features, classes and tasks. Task id: not needed.

The paper is not continual. `context=shared` goes on training one context (it forgets); `task` gives the classes of
each task a context of their own, and `class` each class (CSC in the paper); contexts of earlier tasks are frozen. With
`capacity` above 0 rows are replayed from a reservoir of features, as in `clrun.methods.er`.

Deviation: no random crops and flips in training, because features of the frozen image tower are read.

Verified: embeddings of real words as context give the features of these words exactly, only contexts get gradients,
and a class out of competition none (test_two_towers).
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.data.captions import Captions
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.learning.names import NamesHead
from clrun.methods.er import Er
from clrun.system.errors import ConfigError, Count, PositiveInt

Position = Literal["end", "middle", "front"]
STD = 0.02  # of new context vectors


class ContextHead(NamesHead):
    """Rows are texts of class names with learned vectors beside them.

    Args:
        backbone: has a `joint` space.
        num_classes: C.
        length: M, learned vectors per context.
        position: of the class name: after the vectors ("end"), between their halves ("middle") or before ("front").
        option: path of the option that holds the length, for messages.

    Attributes:
        contexts: learned vectors [G, M, w], one parameter per group of contexts.
        owner: [C, 2] long: group, and place in the group, of the context of each class; -1 for none yet.
    """

    owner: Tensor

    def __init__(
        self, backbone: nn.Module, num_classes: int, *, length: int, position: Position, option: str = "method.length"
    ) -> None:
        super().__init__(backbone, num_classes, names="live")
        self.length, self.position, self.option = length, position, option
        self.contexts = nn.ParameterList()
        self.register_buffer("owner", torch.full((num_classes, 2), -1))
        self._prompts: tuple[Any, ...] | None = None  # those asked for last, without their vectors

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what is computed again."""
        return {**super().__getstate__(), "_prompts": None}

    def read(self, captions: Captions | None) -> None:
        """Take the names of all classes, and find the places of the vectors in their prompts.

        Raises:
            ConfigError: the stream has no names, or a prompt is too long for the text tower.
        """
        super().read(captions)
        assert self.captions is not None
        names, words = [name.rstrip(".") for name in self.captions.names], " ".join(["x"] * self.length)
        lengths = self.joint.tokenize([f"{name} ." for name in names]).argmax(dim=1) - 2  # of the names alone
        longest = int(lengths.argmax())
        needed = int(lengths[longest]) + self.length + 3
        if needed > self.joint.context_length:
            raise ConfigError(
                f"{self.option}: {self.length} vectors and the name '{names[longest]}' need {needed} tokens, and the "
                f"text tower has {self.joint.context_length}; choose a smaller length"
            )
        before = {"end": self.length, "middle": self.length // 2, "front": 0}[self.position]
        steps = torch.arange(self.length, device=lengths.device)
        self.places = 1 + steps + torch.where(steps < before, 0, lengths[:, None])
        parts = " ".join(words.split()[:before]), " ".join(words.split()[before:])
        self.ids = self.joint.tokenize([f"{parts[0]} {name} {parts[1]} ." for name in names])

    def add(self, vectors: Tensor, classes: Tensor) -> None:
        """Give classes [k] long that have none yet the contexts `vectors`: [1, M, w] for all, or [k, M, w]."""
        classes = classes.to(self.owner.device)
        new = classes[self.owner[classes, 0] < 0]
        if len(new):
            self.owner[new, 0] = len(self.contexts)
            self.owner[new, 1] = torch.arange(len(new), device=new.device) if len(vectors) > 1 else 0
            self.contexts.append(nn.Parameter(vectors))
            self._prompts = None

    def train_only(self, classes: Tensor) -> None:
        """Let only the contexts of these classes be trained."""
        groups = set(self.owner[classes, 0].tolist())
        for number, context in enumerate(self.contexts):
            context.requires_grad_(number in groups)

    def texts(self, classes: list[int]) -> Tensor:
        """Return w [k, d] of classes, with gradients to their contexts."""
        asked = classes, torch.is_inference_mode_enabled()  # tensors made in that mode cannot be trained through
        if self._prompts is None or self._prompts[0] != asked:
            self._prompts = asked, *self._without_vectors(classes)
        _, groups, embeddings, index, eot = self._prompts
        parts = [self.contexts[group][places] for group, places in groups]
        vectors = parts[0] if len(parts) == 1 else torch.cat(parts)
        prompts = embeddings.scatter(1, index, vectors.expand(len(eot), -1, -1).to(embeddings))
        return F.normalize(self.joint.text_from_embeddings(prompts, eot), dim=1)

    def _without_vectors(self, classes: list[int]) -> tuple[list[tuple[int, Any]], Tensor, Tensor, Tensor]:
        """Return what is constant in the prompts of classes.

        That is the rows of each group of contexts that they have in turn, the embeddings of the tokens [k, L, w] with
        places for the vectors, the index [k, M, w] of these places, and the places [k] of the end-of-text marks.
        """
        groups: list[tuple[int, Any]] = []
        for group, place in self.owner[classes].tolist():
            if groups and groups[-1][0] == group:
                groups[-1][1].append(place)
            else:
                groups.append((group, [place]))
        if len(groups) == 1 and len(self.contexts[groups[0][0]]) == 1:
            groups = [(groups[0][0], slice(None))]  # one context for all: no copies
        ids = self.ids[classes].to(self.weight.device)
        eot = ids.argmax(dim=1)
        embeddings: Tensor = self.joint.embed_tokens(ids[:, : int(eot.max()) + 1])
        index = self.places[classes].to(ids.device)[:, :, None].expand(-1, -1, embeddings.shape[2])
        return groups, embeddings, index, eot

    def final_texts(self, classes: list[int]) -> Tensor:
        """Return w [k, d] of classes without gradients; a class without context has the texts of its captions."""
        rows = super().final_texts(classes)
        known = [k for k, label in enumerate(classes) if self.owner[label, 0] >= 0]
        if known:
            rows[known] = self.texts([classes[k] for k in known]).to(rows)
        return rows

    def other_texts(self, captions: Captions) -> Tensor:
        """Return w [K, d] of other classes: with a shared context in front of their names, else their captions."""
        if (self.owner != 0).any():
            return super().other_texts(captions)
        count = len(captions.classes)
        twin = ContextHead(self._of[0], count, length=self.length, position=self.position).to(self.weight.device)
        twin.contexts = self.contexts
        twin.owner.zero_()
        twin.read(captions)
        return twin.texts(list(range(count)))

    def sources(self) -> Iterable[Tensor]:
        """Return the contexts, on which the rows depend: the towers are frozen."""
        return self.contexts


class Coop(Er):
    """Learn context vectors before the class names, on features of the frozen image tower.

    Args:
        backbone: passes on features of a frozen image tower; has a `joint` space with a text tower.
        num_classes: C.
        length: M, learned vectors per context; the paper has 16 and, with `init`, 4.
        context: "shared", one context; "task", one per task; "class", one per class.
        position: of the class name: at the "end", in the "middle" or at the "front".
        init: words whose embeddings the vectors start from, M tokens; None for a normal distribution of deviation 0.02.
        capacity: rows of earlier tasks in memory; 0 for no replay.
        replay_size: number of rows replayed per step; null for as many as the batch size.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    needs_text: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = True
    head: ContextHead

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        length: PositiveInt,
        context: Literal["shared", "task", "class"],
        position: Position,
        init: str | None,
        capacity: Count,
        replay_size: Count | None,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, capacity=capacity, replay_size=replay_size, compete=compete)
        freeze(backbone)
        self.context = context
        self.head = ContextHead(backbone, num_classes, length=length, position=position)
        self.words = None if init is None else _embedded(self.head.joint, init, length)
        if context == "shared":
            self.head.add(self._vectors(1), torch.arange(num_classes))

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return True

    def _vectors(self, number: int) -> Tensor:
        """Return the first values [number, M, w] of contexts."""
        if self.words is not None:
            return self.words.repeat(number, 1, 1)
        return torch.randn(number, self.head.length, self.head.joint.text_width) * STD

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.head.refresh()
        self.head.add(self._vectors(len(task.classes) if self.context == "class" else 1), task.classes)
        self.head.train_only(task.classes)
        competing = ctx.mask(torch.tensor([task.index]), "seen" if self.capacity else self.compete)[0]
        active = competing if self.context == "shared" else torch.isin(torch.arange(len(competing)), task.classes)
        self.head.active = active.nonzero()[:, 0].tolist()


def _embedded(joint: Any, text: str, length: int) -> Tensor:
    """Return the embeddings [1, M, w] of the tokens of a text.

    Raises:
        ConfigError: it has not M tokens.
    """
    ids = joint.tokenize([text])
    count = int(ids.argmax()) - 1
    if count != length:
        raise ConfigError(f"method.init: '{text}' has {count} tokens, and method.length is {length}; make them equal")
    found: Tensor = joint.embed_tokens(ids[:, 1 : 1 + length]).detach()
    return found
