"""BERT as a text backbone (Devlin et al., NAACL 2019, arXiv 1810.04805): token ids to sentence vectors.

Post-norm blocks h <- LN(h + W_o Attn(h)), h <- LN(h + W_2 gelu(W_1 h)) with the exact GELU, keys masked at padding; the
feature is the mean of h over all real tokens, special tokens included (Sentence-BERT, Reimers and Gurevych, EMNLP
2019), not normalised. With the weights of a BERT model the features are those of the library `transformers`.

Deviations: no dropout in training (BERT's own has 0.1), so that a pass is a function of its rows; no pooler; all tokens
are of the first of BERT's two kinds, in the second part of a text, too.

Every matrix is a plain `nn.Linear` at a path such as "blocks.0.attn.query", so that low-rank updates and Kronecker
factors find it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.data.tokens import Tokenizer
from clrun.system.errors import ConfigError

Head = str  # one of HEADS, or "live_K"
HEADS = ("linear", "fixed", "init", "live")
TEXTS_AT_ONCE = 256  # of an encoding without gradients


@dataclass(frozen=True)
class Sizes:
    """The sizes of a BERT.

    Attributes:
        vocab: number of token ids.
        width: D.
        depth: number of blocks.
        heads: number of attention heads, a divisor of the width.
        hidden: width of the MLPs.
        positions: the longest row.
        eps: of the layer normalisations.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    hidden: int
    positions: int
    eps: float = 1e-12

    def __post_init__(self) -> None:
        """Check the number of heads."""
        if self.width % self.heads:
            raise ConfigError(f"backbone.heads: {self.heads} does not divide the width {self.width}")


class Attention(nn.Module):
    """Multi-head self-attention, without the residual connection.

    Args:
        sizes: of the network.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.query, self.key, self.value, self.proj = (nn.Linear(sizes.width, sizes.width) for _ in range(4))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return [B, L, D] for h [B, L, D]; mask [B, 1, 1, L] is true at real tokens."""
        q, k, v = (
            part(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        found: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return found


class Block(nn.Module):
    """A post-norm block of attention and MLP.

    Args:
        sizes: of the network.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attn = Attention(sizes)
        self.norm1, self.norm2 = (nn.LayerNorm(sizes.width, eps=sizes.eps) for _ in range(2))
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(sizes.width, sizes.hidden))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(sizes.hidden, sizes.width))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return the tokens [B, L, D] after the block."""
        h = self.norm1(h + self.attn(h, mask))
        found: Tensor = self.norm2(h + self.mlp(h))
        return found


def _parsed(head: Head) -> tuple[str, int | None]:
    """Return the kind of a head, and the K of "live_K".

    Raises:
        ConfigError: there is no such head.
    """
    kind, _, count = head.partition("_")
    if kind == "live" and re.fullmatch("[1-9][0-9]{0,8}", count):
        return kind, int(count)
    if head not in HEADS:
        raise ConfigError(f"backbone.head: '{head}' is none of {', '.join(HEADS)}, live_1, live_2, ...")
    return head, None


class TextEncoder(nn.Module):
    """What text backbones have in common: a tokenizer, and names of classes encoded by the backbone itself.

    With a head of names `joint` is the encoder itself: such a head (`clrun.learning.names`) finds in it what it finds
    in the joint space of an image and a text tower. The projection of features is the identity there.

    Args:
        num_features: D.
        tokenizer: turns texts into token ids.
        max_tokens: the longest row of ids, special tokens included.
        head: of methods that train a head: "linear", or with encoded class names as rows ("fixed", "live", "init").
            "live_K" encodes in each step of training the names of the classes of the batch and of K others.
        kappa: factor of the cosines between features and class names.

    Attributes:
        negatives: K; None for all names.

    Raises:
        ConfigError: there is no such head.
    """

    def __init__(self, num_features: int, tokenizer: Tokenizer, *, max_tokens: int, head: Head, kappa: float) -> None:
        super().__init__()
        self.num_features = num_features
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.head, self.negatives = _parsed(head)
        self.kappa = kappa

    @property
    def joint(self) -> "TextEncoder | None":
        """The encoder itself, for a head of names; None for a linear head."""
        return None if self.head == "linear" else self

    @property
    def dim(self) -> int:
        """Width of encoded names, D."""
        return self.num_features

    @property
    def scale(self) -> float:
        """Factor of cosines."""
        return self.kappa

    @property
    def context_length(self) -> int:
        """The largest number of tokens of a text, special ones included."""
        return self.max_tokens

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Return the texts that are cut."""
        more = self.max_tokens + 1
        return [text for text in texts if len(self.tokenizer.encode(text, more)) > self.max_tokens]

    def project(self, features: Tensor) -> Tensor:
        """Return the features [B, D] as they are."""
        return features

    def positions(self, x: Tensor) -> Tensor:
        """Return [B, L] bool: the real tokens of ids x [B, L]. The first token of a row counts as real always."""
        first = torch.arange(x.shape[1], device=x.device) == 0
        return (x != self.tokenizer.pad) | first

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids [N, L] long of texts, L that of the longest one, on the device of the encoder."""
        rows = [torch.tensor(self.tokenizer.encode(text, self.max_tokens)) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad)
        return ids.to(next(self.parameters()).device)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return the vectors [N, D] of names given as ids [N, L]."""
        found: Tensor = self(ids)
        return found

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors [N, D] of N texts, not normalised."""
        parts = (texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE))
        return torch.cat([self.encode_text(self.tokenize(part)) for part in parts])

    @torch.no_grad()
    def encode_names(self, names: Sequence[str]) -> Tensor:
        """Return the vectors [N, D] of names of classes, not normalised and without gradients."""
        return self.encode_texts(names)


class Bert(TextEncoder):
    """BERT with the mean of its last tokens as features [B, D].

    In training mode columns that are padding in all rows of a batch are cut off; in evaluation mode they stay, because
    gradients of single rows (`torch.func.vmap`) allow no size that depends on the data.

    Args:
        sizes: of the network; `positions` is `max_tokens`.
        tokenizer: turns texts into token ids.
        head: see `TextEncoder`.
        kappa: likewise.
    """

    def __init__(self, sizes: Sizes, tokenizer: Tokenizer, *, max_tokens: int, head: Head, kappa: float) -> None:
        if max_tokens > sizes.positions:
            raise ConfigError(f"backbone.max_tokens: {max_tokens} is more than the {sizes.positions} of the model")
        super().__init__(sizes.width, tokenizer, max_tokens=max_tokens, head=head, kappa=kappa)
        self.word, self.position = nn.Embedding(sizes.vocab, sizes.width), nn.Embedding(sizes.positions, sizes.width)
        self.kind = nn.Embedding(2, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.eps)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        nn.init.normal_(self.position.weight, std=0.1)  # at random weights it is words that tell texts apart
        nn.init.normal_(self.kind.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of token ids x [B, L], of any integer type."""
        mask = self.positions(x)
        if self.training and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            length = int(mask.any(dim=0).nonzero().max()) + 1
            x, mask = x[:, :length], mask[:, :length]
        return mean_of_tokens(self.hidden(x.long(), mask), mask)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last tokens [B, L, D] of ids [B, L] long with real tokens where mask [B, L] is true."""
        h: Tensor = self.norm(self.word(ids) + self.position.weight[: ids.shape[1]] + self.kind.weight[0])
        for block in self.blocks:
            h = block(h, mask[:, None, None, :])
        return h


def mean_of_tokens(h: Tensor, mask: Tensor) -> Tensor:
    """Return the mean [B, D] of those tokens h [B, L, D] where mask [B, L] is true; at least one is in each row."""
    weights = mask.to(h.dtype)
    return (h * weights[:, :, None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)


def choose_trained(encoder: nn.Module, blocks: Sequence[nn.Module], train: str) -> None:
    """Set which parameters of a text encoder are trained.

    Args:
        encoder: the network.
        blocks: its blocks, first to last.
        train: "all"; "blocks", all but the tables of embeddings and what else is outside of the blocks; "last_K", the
            last K blocks; "none".

    Raises:
        ConfigError: another word, or more blocks than there are.
    """
    last = re.fullmatch(r"last_([1-9]\d*)", train)
    if train not in ("all", "blocks", "none") and not last:
        raise ConfigError(f"backbone.train: '{train}' is none of all, blocks, last_1, last_2, ..., none")
    count = int(last.group(1)) if last else len(blocks)
    if count > len(blocks):
        raise ConfigError(f"backbone.train: {train}, but the model has {len(blocks)} blocks")
    encoder.requires_grad_(train == "all")
    for block in blocks[len(blocks) - count :] if train != "none" else ():
        block.requires_grad_(True)


NAMES = {
    "embeddings.word_embeddings": "word",
    "embeddings.position_embeddings": "position",
    "embeddings.token_type_embeddings": "kind",
    "embeddings.LayerNorm": "norm",
    "attention.self.query": "attn.query",
    "attention.self.key": "attn.key",
    "attention.self.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}
UNUSED = ("pooler.", "cls.", "embeddings.position_ids", "classifier.", "qa_outputs.")


def from_transformers(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights with the names of `Bert`, for those of `transformers`' BertModel or a model around it.

    Poolers and heads are left out. Names that are those of `Bert` already stay.
    """
    found = {}
    for name, value in state.items():
        short = name.removeprefix("bert.")
        short = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", short))  # of the first published files
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", short)
        head, rest = (f"blocks.{layer.group(1)}.", layer.group(2)) if layer else ("", short)
        place, _, leaf = rest.rpartition(".")
        if not short.startswith(UNUSED):
            found[f"{head}{NAMES[place]}.{leaf}" if place in NAMES else short] = value
    return found


__all__ = ["Bert", "Head", "Sizes", "TextEncoder", "choose_trained", "from_transformers", "mean_of_tokens"]
