"""Text-to-text: classes are strings that an encoder-decoder writes (T5, Raffel et al., JMLR 2020, arXiv 1910.10683).

There is no classifier: the output space is the vocabulary, so that new classes add no parameters, and task- and
class-incremental runs differ only in the strings that are admissible when a prediction is made.

Memory between tasks: the strings of all classes, 8 bytes per token. Task id: not needed.

Verified: with strings of one token the scores are the log-softmax of these tokens, scores of seen strings do not depend
on unseen ones, the loss is that of transformers' T5, and equal rows of two tasks have equal predictions
(test_text_to_text).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clrun.data.schema import Metric
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.system.errors import ConfigError, PositiveInt

LARGEST = 500  # strings to rank: each costs a pass of the decoder per row
DECODED = 256  # rows that are written at once


class TextToText(Method):
    """Train log p(s_y | x) of the string s_y of the label; predict the string with the largest mean log-likelihood.

    L = -1/|s_y| sum_t log p(s_{y,t} | s_{y,<t}, x), averaged over rows; |s| counts the end mark. The score of class k
    is 1/|s_k| sum_t log p(s_{k,t} | s_{k,<t}, x), or the sum alone. Strings are those of
    `dataset.schema.verbaliser`, else the names of the classes in the words of `dataset.class_names`; classes without
    names are numbered.

    With `dataset.schema.metric=exact_match` a prediction is the class whose string greedy decoding writes. Then til and
    cil agree, because nothing restricts what is written; another text than the string of a class is no answer.

    Tasks of a task-incremental stream may have classes of the same string, as domains have. Their class-incremental
    reading counts the first of them.

    Args:
        backbone: an encoder-decoder that writes texts, such as t5_tiny.
        num_classes: C.
        normalise: scores are the "mean" over the tokens of a string, or their "sum", which prefers short strings.
        chunk: strings that are scored at once.
        exact_match: whether the fraction of validation rows for which greedy decoding writes the label's string, and
            nothing else, is logged after each task (`exact_match`).
    """

    needs_decoder: ClassVar[bool] = True
    strings: Tensor
    seen: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        normalise: Literal["mean", "sum"],
        chunk: PositiveInt,
        exact_match: bool,
    ) -> None:
        if not hasattr(backbone, "speller"):
            raise ConfigError(
                f"backbone: {type(self).__name__} needs an encoder-decoder that writes texts, not "
                f"{type(backbone).__name__}; use the backbones t5_tiny or t5"
            )
        super().__init__(backbone, num_classes)
        self.head = nn.Identity()  # the output is the vocabulary
        self.metric: Metric = "accuracy"
        self.normalise, self.chunk, self.exact_match = normalise, chunk, exact_match
        self.register_buffer("strings", torch.zeros(num_classes, 0, dtype=torch.long))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def check(self, stream: Stream) -> None:
        """Refuse too many strings, and classes of one string.

        Raises:
            ConfigError: see above.
        """
        if stream.num_classes > LARGEST:
            raise ConfigError(
                f"method: TextToText ranks the strings of {stream.num_classes} classes, more than {LARGEST}; choose "
                "another method, such as method=finetune, or fewer classes"
            )
        names, strings = _names(stream), self.tokenised(_names(stream)).tolist()
        for members in stream.members if stream.setting == "til" else stream.members.any(dim=0)[None]:
            first: dict[tuple[int, ...], int] = {}
            for label in members.nonzero()[:, 0].tolist():
                other = first.setdefault(tuple(strings[label]), label)
                if other != label:
                    raise ConfigError(
                        f"dataset.schema.verbaliser: {names[other]!r} and {names[label]!r} have the same tokens, so "
                        f"that the classes {other} and {label} cannot be told apart; give them other strings"
                    )

    def begin_task(self, task: Task, ctx: Context) -> None:
        """Learn the strings of the classes."""
        self.check_budget(ctx.budget)
        self.metric = ctx.stream.metric
        if not self.strings.shape[1]:
            self.strings = self.tokenised(_names(ctx.stream)).to(self.seen.device)
        self.seen[task.classes.to(self.seen.device)] = True

    def tokenised(self, names: Sequence[str]) -> Tensor:
        """Return the token ids [C, T] of names, with the end mark, filled up with padding."""
        backbone: Any = self.backbone
        rows = [torch.tensor(backbone.speller.encode(name, backbone.max_tokens)) for name in names]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=backbone.speller.pad)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        states, mask = self.encode(batch.x)
        return -self.likelihood(states, mask, self.strings[batch.y], mean=True).mean()

    def encode(self, x: Tensor, task: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the states [B, L, D] of the encoder and which of them are real [B, L]."""
        found: tuple[Tensor, Tensor] = self.backbone.encode(x)  # type: ignore[operator]
        return found

    def likelihood(self, states: Tensor, mask: Tensor, strings: Tensor, *, mean: bool) -> Tensor:
        """Return the log-likelihood [B] of one string per row.

        Args:
            states: of the encoder [B, L, D].
            mask: [B, L] bool, its real tokens.
            strings: [B, T] token ids.
            mean: per token of the string, instead of the sum over its tokens.
        """
        logits: Tensor = self.backbone.decode(states, mask, strings)  # type: ignore[operator]
        of_tokens = logits.float().log_softmax(dim=2).gather(2, strings[:, :, None])[:, :, 0]
        real = strings != 0
        total = (of_tokens * real).sum(dim=1)
        return total / real.sum(dim=1) if mean else total

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Return the scores [B, C] of the strings of the classes seen so far; those of other classes are 0.

        With the metric exact_match, 0 for the class whose string is written, and minus infinity for every other one.
        """
        if self.metric == "exact_match":
            return self.matches(x, task)
        states, mask = self.encode(x, task)
        scores = states.new_zeros(len(x), self.num_classes, dtype=torch.float32)
        for classes in torch.split(self.seen.nonzero()[:, 0], self.chunk):
            count = len(classes)
            pairs, seen = states.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)
            strings = self.strings[classes].repeat(len(x), 1)
            own = self.likelihood(pairs, seen, strings, mean=self.normalise == "mean")
            scores = scores.index_copy(1, classes, own.view(len(x), count))
        return scores

    def matches(self, x: Tensor, task: int | None = None) -> Tensor:
        """Return [B, C]: 0 for seen classes whose string is written for a row, minus infinity elsewhere."""
        texts, names = self.write(x, task), self.spelt()
        written = torch.tensor([[text == name for name in names] for text in texts], device=x.device)
        return torch.zeros(written.shape, device=x.device).masked_fill(~(written & self.seen), -torch.inf)

    def spelt(self) -> list[str]:
        """Return the C strings as the tokenizer reads them back."""
        speller: Any = self.backbone.speller
        return [speller.decode(ids) for ids in self.strings.tolist()]

    @torch.no_grad()
    def write(self, x: Tensor, task: int | None = None) -> list[str]:
        """Return the text that greedy decoding writes for each row of x, at most as long as the longest string."""
        backbone: Any = self.backbone
        states, mask = self.encode(x, task)
        written = torch.zeros(len(x), 0, dtype=torch.long, device=states.device)
        for _ in range(self.strings.shape[1]):
            padded = torch.cat([written, written.new_zeros(len(x), 1)], dim=1)
            token = backbone.decode(states, mask, padded)[:, -1].argmax(dim=1, keepdim=True)
            written = torch.cat([written, token], dim=1)
        return [backbone.speller.decode(row) for row in written.tolist()]

    def end_task(self, task: Task, ctx: Context) -> None:
        """Log the fraction of validation rows that are written exactly, if that is asked for."""
        if not self.exact_match or not task.val:
            return
        self.eval()
        names, right = self.spelt(), 0
        for batch in task.val.batches(DECODED):
            texts = self.write(ctx.hardware.layout(batch.x), task.index)
            right += sum(text == names[y] for text, y in zip(texts, batch.y.tolist(), strict=True))
        ctx.log({"exact_match": right / len(task.val)})


def _names(stream: Stream) -> list[str]:
    """Return the strings of all classes."""
    names = stream.class_names if stream.captions is None else stream.captions.names
    return [name.strip() for name in names] or [str(label) for label in range(stream.num_classes)]
