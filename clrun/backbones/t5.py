"""T5 as a text backbone: an encoder, whose mean state is the feature, and a decoder that writes texts.

Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*, JMLR 21(140), 2020
(arXiv 1910.10683); ByT5, which reads and writes bytes, Xue et al., TACL 2022 (arXiv 2105.13626). Blocks are pre-norm
with a root-mean-square normalisation; attention is not scaled and has a bias per head for the distance of two tokens,
which all blocks of a stack share. With the weights of a T5 the logits are those of the library `transformers`.

Deviation: no dropout in training (T5's own has 0.1), so that a pass is a function of its rows.

Shapes: `B` rows, `L` tokens of a row, `T` tokens of a written text, `D` width, `V` tokens of the vocabulary.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.backbones.bert import Head, TextEncoder, choose_trained, mean_of_tokens
from clrun.backbones.text import CONFIG, WEIGHTS, Length, Shape
from clrun.backbones.weights import load_weights, takes_weights
from clrun.data.tokens import ByteTokenizer, Speller
from clrun.system.errors import ConfigError, Positive, PositiveInt, WeightsMissing
from clrun.system.reading import read_json

JSON_BYTES = 2**20
KEYS = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


@dataclass(frozen=True)
class T5Sizes:
    """The sizes of a T5.

    Attributes:
        vocab: V.
        width: D.
        head_width: width of an attention head.
        hidden: width of the MLPs.
        depth: blocks of the encoder.
        decoder_depth: blocks of the decoder.
        heads: attention heads.
        gated: MLPs gelu(W_0 h) * (W_1 h) (T5 1.1 and ByT5) instead of relu(W_1 h).
        scaled: logits are products of the last states, divided by sqrt(D), with the table of embeddings (T5); otherwise
            the output has a matrix of its own (T5 1.1 and ByT5).
        buckets: kinds of distances between two tokens.
        distance: from which on all distances are of one kind.
        eps: of the normalisations.
    """

    vocab: int
    width: int
    head_width: int
    hidden: int
    depth: int
    decoder_depth: int
    heads: int
    gated: bool = True
    scaled: bool = False
    buckets: int = 32
    distance: int = 128
    eps: float = 1e-6


class RmsNorm(nn.Module):
    """The map h -> w h / sqrt(mean(h^2) + eps).

    Args:
        width: D.
        eps: see above.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, h: Tensor) -> Tensor:
        """Return h [..., D] normalised."""
        return self.weight * (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """Attention without scale and biases of its projections.

    Args:
        sizes: of the network.
    """

    def __init__(self, sizes: T5Sizes) -> None:
        super().__init__()
        inner = sizes.heads * sizes.head_width
        self.heads = sizes.heads
        self.q, self.k, self.v = (nn.Linear(sizes.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, sizes.width, bias=False)
        nn.init.normal_(self.q.weight, std=(sizes.width * sizes.head_width) ** -0.5)
        for layer in (self.k, self.v):
            nn.init.normal_(layer.weight, std=sizes.width**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def forward(self, h: Tensor, source: Tensor, bias: Tensor) -> Tensor:
        """Return [B, T, D] for queries h [B, T, D], keys and values of source [B, L, D], bias [B|1, H|1, T, L]."""
        parts = ((self.q, h), (self.k, source), (self.v, source))
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, x in parts)
        bias = bias.expand(len(h), self.heads, -1, -1)
        found: Tensor = self.o(
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2).flatten(2)
        )
        return found


class Mlp(nn.Module):
    """The MLP of a block, without biases.

    Args:
        sizes: of the network.
    """

    def __init__(self, sizes: T5Sizes) -> None:
        super().__init__()
        self.gated = sizes.gated
        if sizes.gated:
            self.wi_0, self.wi_1 = (nn.Linear(sizes.width, sizes.hidden, bias=False) for _ in range(2))
        else:
            self.wi = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.wo = nn.Linear(sizes.hidden, sizes.width, bias=False)
        for layer in self.children():
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        """Return [B, L, D] for h [B, L, D]."""
        inner = F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h) if self.gated else F.relu(self.wi(h))
        found: Tensor = self.wo(inner)
        return found


class Block(nn.Module):
    """A pre-norm block of self-attention, attention to the encoder in a decoder, and MLP.

    Args:
        sizes: of the network.
        decodes: whether it attends to the encoder.
    """

    def __init__(self, sizes: T5Sizes, *, decodes: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(sizes.width, sizes.eps), RmsNorm(sizes.width, sizes.eps)
        self.attn, self.mlp = Attention(sizes), Mlp(sizes)
        self.cross = Attention(sizes) if decodes else None
        self.norm3 = RmsNorm(sizes.width, sizes.eps) if decodes else None

    def forward(self, h: Tensor, bias: Tensor, states: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the tokens [B, T, D] after the block.

        Args:
            h: tokens [B, T, D].
            bias: of the self-attention, [B or 1, H or 1, T, T].
            states: of the encoder [B, L, D], in a decoder.
            mask: of its tokens, as a bias [B, 1, 1, L].
        """
        x = self.norm1(h)
        h = h + self.attn(x, x, bias)
        if self.cross is not None:
            assert states is not None and mask is not None and self.norm3 is not None
            h = h + self.cross(self.norm3(h), states, mask.expand(-1, -1, h.shape[1], -1))
        found: Tensor = h + self.mlp(self.norm2(h))
        return found


class Stack(nn.Module):
    """The encoder or the decoder.

    Args:
        sizes: of the network.
        decodes: whether a token sees itself and those before it only, and the encoder.
    """

    def __init__(self, sizes: T5Sizes, *, decodes: bool) -> None:
        super().__init__()
        self.decodes, self.buckets, self.distance = decodes, sizes.buckets, sizes.distance
        self.bias = nn.Embedding(sizes.buckets, sizes.heads)
        depth = sizes.decoder_depth if decodes else sizes.depth
        self.blocks = nn.ModuleList(Block(sizes, decodes=decodes) for _ in range(depth))
        self.norm = RmsNorm(sizes.width, sizes.eps)
        nn.init.normal_(self.bias.weight, std=sizes.width**-0.5)

    def forward(self, h: Tensor, mask: Tensor, states: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Return the last tokens [B, T, D] of embeddings h [B, T, D].

        Args:
            h: embeddings.
            mask: [B, T] bool, real tokens.
            states: of the encoder [B, L, D], for a decoder.
            seen: [B, L] bool, its real tokens.
        """
        length = h.shape[1]
        places = torch.arange(length, device=h.device)
        bias = self.bias(self._bucket(places[None] - places[:, None])).permute(2, 0, 1)[None]
        allowed = mask[:, None, None, :]
        if self.decodes:
            allowed = allowed & (places[None] <= places[:, None])
        bias = bias.masked_fill(~allowed, -torch.inf) if not self.decodes else bias + _as_bias(allowed, h)
        others = None if seen is None else _as_bias(seen[:, None, None, :], h)
        for block in self.blocks:
            h = block(h, bias, states, others)
        found: Tensor = self.norm(h)
        return found

    def _bucket(self, distance: Tensor) -> Tensor:
        """Return the kind [T, T] of distances from queries to keys: near ones one by one, far ones logarithmically."""
        buckets = self.buckets
        found = torch.zeros_like(distance)
        if self.decodes:
            distance = (-distance).clamp(min=0)
        else:
            buckets //= 2
            found, distance = (distance > 0).long() * buckets, distance.abs()
        exact = buckets // 2
        far = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.distance / exact) * (buckets - exact)
        return found + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))


def _as_bias(allowed: Tensor, like: Tensor) -> Tensor:
    """Return 0 where attention is allowed and minus infinity elsewhere."""
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, -torch.inf)


class T5(TextEncoder):
    """T5 with the mean state of its encoder as features [B, D].

    Args:
        sizes: of the network.
        tokenizer: reads and writes texts; its mark `end` ends a text.
        max_tokens: see `TextEncoder`.
        head: likewise.
        kappa: likewise.
    """

    start = 0  # the token before the first one that is written

    def __init__(self, sizes: T5Sizes, tokenizer: Speller, *, max_tokens: int, head: Head, kappa: float) -> None:
        super().__init__(sizes.width, tokenizer, max_tokens=max_tokens, head=head, kappa=kappa)
        self.speller = tokenizer
        self.shared = nn.Embedding(sizes.vocab, sizes.width)
        self.encoder, self.decoder = Stack(sizes, decodes=False), Stack(sizes, decodes=True)
        self.output = None if sizes.scaled else nn.Linear(sizes.width, sizes.vocab, bias=False)
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=sizes.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of token ids x [B, L], of any integer type."""
        states, mask = self.encode(x)
        return mean_of_tokens(states, mask)

    def encode(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the states [B, P + L, D] of token ids x [B, L], and which of them are real tokens [B, P + L].

        In training mode columns that are padding in all rows are cut off, as in `clrun.backbones.bert.Bert`.

        Args:
            x: ids.
            before: embeddings [P, D] that stand before each row, such as soft prompts.
        """
        mask = self.positions(x)
        if self.training and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            length = int(mask.any(dim=0).nonzero().max()) + 1
            x, mask = x[:, :length], mask[:, :length]
        h = self.shared(x.long())
        if before is not None:
            h = torch.cat([before.to(h.dtype).expand(len(h), -1, -1), h], dim=1)
            mask = torch.cat([mask.new_ones(len(mask), len(before)), mask], dim=1)
        return self.encoder(h, mask), mask

    def decode(self, states: Tensor, seen: Tensor, written: Tensor) -> Tensor:
        """Return the logits [B, T, V] of the next token after `start` and each token of `written` but the last one.

        Args:
            states: of the encoder [B, L, D].
            seen: [B, L] bool, its real tokens.
            written: [B, T] token ids; logits at place t are those of token t, given the ones before it.
        """
        before = torch.cat([written.new_full((len(written), 1), self.start), written[:, :-1]], dim=1)
        mask = torch.ones_like(before, dtype=torch.bool)  # padding is behind all real tokens, which do not see it
        h: Tensor = self.decoder(self.shared(before), mask, states, seen)
        if self.output is None:
            return F.linear(h * h.shape[2] ** -0.5, self.shared.weight)
        found: Tensor = self.output(h)
        return found


# --- factories


@takes_weights
def t5_tiny(
    shape: Shape,
    *,
    width: PositiveInt,
    depth: PositiveInt,
    heads: PositiveInt,
    train: str,
    max_tokens: Length,
    head: Head,
    kappa: Positive,
) -> T5:
    """Return a small T5 with random weights that reads and writes bytes, as ByT5 does.

    Args:
        shape: of the stored rows; a text backbone reads token ids.
        width: D, a multiple of the number of heads; MLPs are twice as wide.
        depth: blocks of the encoder, and of the decoder.
        heads: number of attention heads.
        train: "all", "blocks", "last_K" (K a number) or "none"; the decoder's blocks come after the encoder's.
        max_tokens: longest row of token ids; longer texts are cut.
        head: of methods that train a head, see `TextEncoder`.
        kappa: factor of cosines with class names.

    Raises:
        ConfigError: the number of heads does not divide the width.
    """
    if width % heads:
        raise ConfigError(f"backbone.heads: {heads} does not divide the width {width}")
    tokenizer = ByteTokenizer()
    sizes = T5Sizes(tokenizer.vocab_size, width, width // heads, 2 * width, depth, depth, heads)
    model = T5(sizes, tokenizer, max_tokens=max_tokens, head=head, kappa=kappa)
    choose_trained(model, [*model.encoder.blocks, *model.decoder.blocks], train)
    return model


def t5(
    shape: Shape, *, folder: str | None, pretrained: bool, train: str, max_tokens: Length, head: Head, kappa: Positive
) -> T5:
    """Return a T5 or ByT5 from a folder that `transformers` has saved. For a T5 its tokenizer needs the extra `text`.

    Args:
        shape: of the stored rows; a text backbone reads token ids.
        folder: with config.json, model.safetensors and, for a T5, the files of the tokenizer.
        pretrained: false gives random weights.
        train: "all", "blocks", "last_K" (K a number) or "none"; the decoder's blocks come after the encoder's.
        max_tokens: longest row of token ids; longer texts are cut.
        head: of methods that train a head, see `TextEncoder`.
        kappa: factor of cosines with class names.

    Raises:
        ConfigError: the folder lacks a file, or holds another kind of model.
    """
    preflight(folder=folder, pretrained=pretrained)
    place = Path(str(folder)).expanduser()
    config = read_json(place / CONFIG, remedy="use a folder that transformers has saved", limit=JSON_BYTES)
    sizes = _sizes(place / CONFIG, config if isinstance(config, dict) else {})
    tokenizer = _speller(place)
    if tokenizer.vocab_size > sizes.vocab:
        raise ConfigError(f"backbone: {place} has {tokenizer.vocab_size:,} tokens and a model of {sizes.vocab:,}")
    model = T5(sizes, tokenizer, max_tokens=max_tokens, head=head, kappa=kappa)
    if pretrained:
        load_weights(model, f"the T5 of {CONFIG}", place / WEIGHTS, convert=from_transformers)
    choose_trained(model, [*model.encoder.blocks, *model.decoder.blocks], train)
    return model


def preflight(*, folder: str | None, pretrained: bool, **others: Any) -> None:
    """Find what is missing in the folder of `t5` without building the model.

    Raises:
        WeightsMissing: the weights alone are not there.
        ConfigError: there is no such folder, or no config.json in it.
    """
    if folder is None:
        raise ConfigError(f"backbone.folder: set it to a folder with {CONFIG} and {WEIGHTS} of a T5 or ByT5")
    place = Path(folder).expanduser()
    for name in (CONFIG, *((WEIGHTS,) if pretrained else ())):
        if not (place / name).is_file():
            kind = WeightsMissing if name == WEIGHTS else ConfigError
            raise kind(f"backbone.folder: there is no {name} in {place}; put it there, or name another folder")


t5.preflight = preflight  # type: ignore[attr-defined]


def _sizes(path: Path, config: Mapping[str, Any]) -> T5Sizes:
    """Return the sizes that config.json names.

    Raises:
        ConfigError: it is that of another kind of network.
    """
    act = config.get("feed_forward_proj", "relu")
    whole = all(isinstance(config.get(key), int) and 0 < config[key] < 2**24 for key in KEYS)
    if config.get("model_type") != "t5" or act not in ("relu", "gated-gelu") or not whole:
        raise ConfigError(
            f"backbone: {path} is not that of a T5 or ByT5 (model_type={config.get('model_type')}, "
            f"feed_forward_proj={act}; it must have {', '.join(KEYS)})"
        )
    vocab, width, head_width, hidden, depth, heads = (int(config[key]) for key in KEYS)
    return T5Sizes(
        vocab,
        width,
        head_width,
        hidden,
        depth,
        int(config.get("num_decoder_layers") or depth),
        heads,
        gated=act == "gated-gelu",
        scaled=bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)),
        buckets=int(config.get("relative_attention_num_buckets", 32)),
        distance=int(config.get("relative_attention_max_distance", 128)),
        eps=float(config.get("layer_norm_epsilon", 1e-6)),
    )


def _speller(folder: Path) -> Speller:
    """Return the tokenizer of a folder: bytes for a ByT5, which has no vocabulary; else that of `transformers`.

    Raises:
        ConfigError: the extra `text` is missing, or the tokenizer cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        return ByteTokenizer()
    from clrun.backbones.hf_text import LibraryTokenizer, loaded
    from clrun.system import libraries

    return LibraryTokenizer(loaded(libraries.load("transformers").AutoTokenizer.from_pretrained, folder, False))


LAYERS = {
    "SelfAttention": "attn",
    "EncDecAttention": "cross",
    "DenseReluDense": "mlp",
}


def from_transformers(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights with the names of `T5` for those of `transformers`' T5ForConditionalGeneration."""
    found = {}
    for name, value in state.items():
        if name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            continue
        name = name.replace("lm_head.", "output.").replace("final_layer_norm.", "norm.")
        bias = re.fullmatch(r"(encoder|decoder)\.block\.0\..*relative_attention_bias\.weight", name)
        layer = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.(\w+)\.(.+)", name)
        if bias:
            name = f"{bias.group(1)}.bias.weight"
        elif layer:
            stack, block, number, kind, rest = layer.groups()
            norm = "norm1" if number == "0" else "norm3" if stack == "decoder" and number == "1" else "norm2"
            name = f"{stack}.blocks.{block}.{LAYERS.get(kind, norm)}.{rest}"
        found[name] = value
    if getattr(model, "output", None) is None:
        found.pop("output.weight", None)
    elif "output.weight" not in found and "shared.weight" in found:  # saved while both were one tensor
        found["output.weight"] = found["shared.weight"].clone()
    return found


__all__ = ["T5", "T5Sizes", "from_transformers", "t5", "t5_tiny"]
