"""Prompts, prefixes, adapters and SSF on unmodified timm vision transformers; LoRA is in `clrun.blocks.lora`.

A `Plan` lists the changes to one forward pass. `Injector.use` makes them with forward hooks, which exist only during
that pass: without a plan the backbone is the plain model, and no part of a plan is pickled with it. The backbone's
weights are never changed, and attention is computed by the backbone's own code, fused or not.

Shapes: `B` images, `P` prefix tokens of the plain model (class token, registers), `N` tokens of the plain model, `L`
injected tokens, `D` width, `H` attention heads.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clrun.system.errors import ConfigError

COMPILED = "hardware.compile: compiled code ignores hooks (prompts, adapters, gates, kfac, foof); set it to false"


@runtime_checkable
class TokenSource(Protocol):
    """A function that computes the tokens to inject into a block from the tokens that enter the block."""

    length: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return the tokens to inject [B, length, D] for the plain model's tokens x [B, N, D]."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values that every token of a block attends to in addition to those of the tokens.

    They are used as they are, without the key and value projections of the block.

    Attributes:
        keys: [L, D] or [B, L, D].
        values: [L, D] or [B, L, D].
        compensated: divide the contribution of the prefix by its share of the attention, as LAE does (Gao et al., ICCV
            2023, section 3.3): the effect of the prefix is then not reduced where the tokens attract most attention.
    """

    keys: Tensor
    values: Tensor
    compensated: bool = False

    @property
    def length(self) -> int:
        """The number L of keys."""
        return self.keys.shape[-2]


@dataclass(frozen=True)
class Plan:
    """The changes to one forward pass. Blocks are numbered from 0; paths are those of `nn.Module.get_submodule`.

    Attributes:
        tokens: by block, tokens [L, D] or [B, L, D] (or a `TokenSource`) that are inserted after the P prefix tokens at
            the input of the block. They pass through this block and all following ones, until they are replaced by the
            tokens of a later block or removed before the final normalisation.
        keep_tokens: do not remove the tokens before the final normalisation; for `forward_features`.
        prefix: by block, keys and values for its attention.
        parallel: by path, a module m; the output y of the submodule for its input x becomes y + m(x).
        sequential: by path, a module m; the output y of the submodule becomes y + m(y), after `parallel`.
        beside_mlp: by block, a module m; what the block adds to its residual stream x in its second half, the output of
            its MLP, becomes that output plus m(x), with x not normalised.
        scaled: by path, a module m; the output y of the submodule becomes m(y), after `parallel` and `sequential`.
        weights: by path of a linear layer, the weight [m, n] that takes the place of its own.
    """

    tokens: Mapping[int, "Tensor | TokenSource"] = field(default_factory=dict)
    keep_tokens: bool = False
    prefix: Mapping[int, Prefix] = field(default_factory=dict)
    parallel: Mapping[str, nn.Module] = field(default_factory=dict)
    sequential: Mapping[str, nn.Module] = field(default_factory=dict)
    beside_mlp: Mapping[int, nn.Module] = field(default_factory=dict)
    scaled: Mapping[str, nn.Module] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


class Injector:
    """Applies plans to forward passes of a backbone.

    Under gradient checkpointing the backward pass runs the blocks again. The hooks of a pass with gradients then stay
    until the next pass begins or `release` is called, and there must not be two such passes with different plans before
    a backward pass.
    """

    def __init__(self) -> None:
        self._kept: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without hooks that wait for a backward pass: copies and checkpoints do not contain them."""
        return {"_kept": []}

    def release(self) -> None:
        """Remove the hooks that a pass under gradient checkpointing has left on the backbone."""
        for handle in self._kept:
            handle.remove()
        self._kept = []

    @contextmanager
    def use(self, vit: nn.Module, plan: Plan) -> Iterator[None]:
        """Apply `plan` to the forward passes of `vit` within the `with` block.

        Raises:
            ConfigError: the backbone is compiled, and compiled code ignores hooks.
        """
        self.release()
        if getattr(vit, "_compiled_call_impl", None) is not None:
            raise ConfigError(COMPILED)
        handles = list(_attached(vit, plan))
        try:
            yield
        finally:
            if getattr(vit, "grad_checkpointing", False) and torch.is_grad_enabled():
                self._kept = handles
            else:
                for handle in handles:
                    handle.remove()


def require_vit(backbone: nn.Module, method: str, *, where: str = "backbone") -> None:
    """Refuse a backbone into which prompts and prefixes cannot be injected.

    Args:
        backbone: the backbone.
        method: name of the method, for the message.
        where: option that names the backbone, for the message.

    Raises:
        ConfigError: it is not a timm `VisionTransformer` of plain blocks with plain attention.
    """
    timm: Any = sys.modules.get("timm.models.vision_transformer")
    use = "use the backbones vit_*, glyph_vit, or timm with a VisionTransformer (ViT, DeiT, DINOv2, CLIP)"
    found = type(backbone).__name__
    if timm is None or not isinstance(backbone, timm.VisionTransformer):
        raise ConfigError(f"{where}: {method} needs a vision transformer, not {found}; {use}")
    blocks: Any = backbone.blocks
    odd = {type(b).__name__ for b in blocks if type(b) is not timm.Block}
    odd |= {type(b.attn).__name__ for b in blocks if not odd and type(b.attn) is not timm.Attention}
    if odd:
        raise ConfigError(f"{where}: {method} needs plain transformer blocks, not {', '.join(sorted(odd))}; {use}")


def require_blocks(backbone: nn.Module, method: str) -> None:
    """Refuse a backbone without the blocks that adapters and SSF need; RoPE models such as EVA have them.

    Args:
        backbone: the backbone.
        method: name of the method, for the message.

    Raises:
        ConfigError: it has no list of blocks with `norm1`, `attn`, `norm2`, `mlp` and `drop_path2`.
    """
    names = ("norm1", "attn", "norm2", "mlp", "drop_path2")
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not all(hasattr(b, n) for b in blocks for n in names):
        raise ConfigError(
            f"backbone: {method} needs a transformer with blocks of attention and MLP, not {type(backbone).__name__}; "
            "use the backbones vit_*, glyph_vit or timm with a VisionTransformer or an Eva"
        )


def require_depth(backbone: nn.Module, blocks: list[int], option: str) -> None:
    """Refuse block numbers that the backbone does not have, or that are listed twice.

    Args:
        backbone: the backbone.
        blocks: the numbers.
        option: name of the option that lists them, for the message.

    Raises:
        ConfigError: a number is wrong or listed twice.
    """
    depth = len(backbone.blocks)  # type: ignore[arg-type]
    wrong = [b for b in blocks if not 0 <= b < depth]
    if wrong or len(set(blocks)) < len(blocks):
        what = f"there is no block {wrong[0]}" if wrong else "a block is listed twice"
        raise ConfigError(f"{option}: {what}; the backbone has the blocks 0 to {depth - 1}")


# --- hooks


def _attached(vit: nn.Module, plan: Plan) -> Iterator[RemovableHandle]:
    """Register the hooks of a plan one after the other, and yield the handle of each."""
    blocks: Any = getattr(vit, "blocks", None)
    before = 0
    for index in sorted(plan.tokens):
        tokens = _TokensAt(int(vit.num_prefix_tokens), before, plan.tokens[index])  # type: ignore[arg-type]
        yield blocks[index].register_forward_pre_hook(tokens.enter, with_kwargs=True)
        before = tokens.length
    if before and not plan.keep_tokens:
        strip = _Strip(int(vit.num_prefix_tokens), before)  # type: ignore[arg-type]
        yield vit.norm.register_forward_pre_hook(strip.leave)  # type: ignore[union-attr]
    for path in dict.fromkeys((*plan.parallel, *plan.sequential, *plan.scaled)):
        changed = _Changed(plan.parallel.get(path), plan.sequential.get(path), plan.scaled.get(path))
        yield vit.get_submodule(path).register_forward_hook(changed.change)
    for path, weight in plan.weights.items():
        other = _OtherWeight(weight)
        yield vit.get_submodule(path).register_forward_pre_hook(other.enter)
        yield vit.get_submodule(path).register_forward_hook(other.leave, always_call=True)
    for index, module in plan.beside_mlp.items():
        beside = _BesideMlp(module)
        yield blocks[index].norm2.register_forward_pre_hook(beside.store)
        yield blocks[index].drop_path2.register_forward_hook(beside.add)
    for index, prefix in plan.prefix.items():
        if prefix.length:
            yield from _PrefixedAttention(blocks[index].attn, prefix).attach()


class _TokensAt:
    """Inserts tokens at the input of a block after the `prefix` first ones, in place of `before` injected earlier."""

    def __init__(self, prefix: int, before: int, source: Tensor | TokenSource) -> None:
        self.prefix, self.before, self.source = prefix, before, source
        self.length = source.shape[-2] if isinstance(source, Tensor) else source.length

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x: Tensor = args[0]
        head, tail = x[:, : self.prefix], x[:, self.prefix + self.before :]
        if isinstance(self.source, Tensor):
            tokens = self.source
        else:
            tokens = self.source(torch.cat([head, tail], dim=1) if self.before else x)
        tokens = tokens.to(x.dtype).expand(len(x), -1, -1)
        return (torch.cat([head, tokens, tail], dim=1), *args[1:]), kwargs


class _Strip:
    """Removes the injected tokens, which are the `length` ones after the `prefix` first ones."""

    def __init__(self, prefix: int, length: int) -> None:
        self.prefix, self.length = prefix, length

    def leave(self, module: nn.Module, args: Any) -> tuple[Any, ...]:
        x: Tensor = args[0]
        return (torch.cat([x[:, : self.prefix], x[:, self.prefix + self.length :]], dim=1), *args[1:])


class _Changed:
    """Changes the output of a submodule by the modules of `Plan.parallel`, `sequential` and `scaled`."""

    def __init__(self, parallel: nn.Module | None, sequential: nn.Module | None, scaled: nn.Module | None) -> None:
        self.parallel, self.sequential, self.scaled = parallel, sequential, scaled

    def change(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.parallel is not None:
            output = output + self.parallel(args[0])
        if self.sequential is not None:
            output = output + self.sequential(output)
        if self.scaled is not None:
            output = self.scaled(output)
        return output


class _OtherWeight:
    """Gives a layer another weight for the time of a call, so that it costs no further product."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.own: nn.Parameter | None = None

    def enter(self, module: nn.Module, args: Any) -> None:
        self.own = module._parameters["weight"]
        module._parameters["weight"] = self.weight  # type: ignore[assignment]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters["weight"] = self.own


class _BesideMlp:
    """Adds a function of the residual stream at the second half of a block to the output of the block's MLP."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.stream: Tensor | None = None

    def store(self, module: nn.Module, args: Any) -> None:
        self.stream = args[0]

    def add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self.stream is not None, "norm2 is called before drop_path2"
        stream, self.stream = self.stream, None
        changed: Tensor = output + self.module(stream)
        return changed


class _PrefixedAttention:
    """Prefix keys and values for an attention whose code stays as it is.

    The attention gets L rows more than the tokens have, which the projection `qkv` does not: the keys and values of the
    prefix take their places behind it. After the attention the rows are removed. Their queries are 0 and attend in
    vain; for all other rows the result is that of concatenated keys and values.
    """

    def __init__(self, attention: Any, prefix: Prefix) -> None:
        self.attention, self.prefix, self.length = attention, prefix, prefix.length
        self.tokens: Tensor | None = None
        self.correction: Tensor | None = None

    def attach(self) -> Iterator[RemovableHandle]:
        attention = self.attention
        yield attention.register_forward_pre_hook(self.lengthen, with_kwargs=True)
        yield attention.qkv.register_forward_pre_hook(self.restore)
        yield attention.qkv.register_forward_hook(self.append)
        if self.prefix.compensated:
            yield attention.proj.register_forward_pre_hook(self.compensate)
        yield attention.register_forward_hook(self.cut)

    def lengthen(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        assert kwargs.get("attn_mask") is None, "an attention mask would have to be lengthened as well"
        self.tokens = x = args[0]
        batch, length, width = x.shape  # all that a plain attention reads of its input before the projection
        return (x.new_zeros(()).expand(batch, length + self.length, width), *args[1:]), kwargs

    def restore(self, module: nn.Module, args: Any) -> tuple[Any, ...]:
        tokens, self.tokens = self.tokens, None
        assert tokens is not None, "the attention is called before qkv"
        return (tokens,)

    def append(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        pair = torch.cat([self.prefix.keys, self.prefix.values], dim=-1).to(output.dtype)
        rows = F.pad(pair, (output.shape[2] - pair.shape[-1], 0))
        whole = torch.cat([output, rows.expand(len(output), -1, -1)], dim=1)
        if self.prefix.compensated:
            self.correction = self._correction(whole)
        return whole

    def cut(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output[:, : -self.length]

    def _correction(self, qkv: Tensor) -> Tensor:
        """Return (1 - w) Attention(q, prefix) [B, N + L, D], where w is the prefix's share of the attention weights.

        Added to the joint attention, this divides the contribution of the prefix by w.
        """
        batch, length, _ = qkv.shape
        heads = qkv.view(batch, length, 3, self.attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = self.attention.q_norm(heads[0]), self.attention.k_norm(heads[1]), heads[2]
        # Values that are 1 for the prefix and 0 elsewhere give w. They are as wide as q, as fused kernels require.
        indicator = q.new_zeros(1, 1, q.shape[2], q.shape[3])
        indicator[:, :, -self.length :] = 1
        weight = F.scaled_dot_product_attention(q, k, indicator.expand_as(q))[..., :1]
        alone = F.scaled_dot_product_attention(q, k[:, :, -self.length :], v[:, :, -self.length :])
        return ((1 - weight) * alone).transpose(1, 2).flatten(2)

    def compensate(self, module: nn.Module, args: Any) -> tuple[Any, ...]:
        assert self.correction is not None, "qkv is called before proj"
        correction, self.correction = self.correction, None
        return (args[0] + correction, *args[1:])


# --- modules that plans are made of


class Adapter(nn.Module):
    """The bottleneck scale * (W_up dropout(act(W_down x + b_down)) + b_up), whose output is 0 before training.

    Args:
        width: D.
        bottleneck: r, the number of activations between the two linear maps.
        activation: act.
        dropout: probability with which each of the r activations is dropped in training.
        scale: initial value of the factor `scale`.
        learn_scale: whether the factor is trained.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        *,
        activation: Literal["relu", "gelu"],
        dropout: float,
        scale: float,
        learn_scale: bool,
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.activation, self.dropout = activation, dropout
        self.scale: nn.Parameter | float = nn.Parameter(torch.tensor(scale)) if learn_scale else scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the change [..., D] to be added, for x [..., D]."""
        hidden = F.relu(self.down(x)) if self.activation == "relu" else F.gelu(self.down(x))
        change: Tensor = self.scale * self.up(F.dropout(hidden, self.dropout, self.training))
        return change


def mlp_adapters(depth: int, width: int, bottleneck: int, *, scale: float, dropout: float) -> nn.ModuleDict:
    """Return one adapter per block for `Plan.beside_mlp`, by block number (AdaptFormer, Chen et al., NeurIPS 2022)."""
    adapters = nn.ModuleDict()
    for block in range(depth):
        adapters[str(block)] = Adapter(
            width, bottleneck, activation="relu", dropout=dropout, scale=scale, learn_scale=False
        )
    return adapters


class ScaleShift(nn.Module):
    """The map y -> scale * y + shift (SSF, Lian et al., NeurIPS 2022, equation 2).

    Args:
        width: number of features of y.
        std: standard deviation of the initial scale around 1 and of the initial shift around 0 (published: 0.02).
    """

    def __init__(self, width: int, *, std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + std * torch.randn(width))
        self.shift = nn.Parameter(std * torch.randn(width))

    def forward(self, y: Tensor) -> Tensor:
        """Return the scaled and shifted y [..., width]."""
        return self.scale * y + self.shift


def scale_shift_sites(vit: nn.Module) -> dict[str, int]:
    """Return the width of every output that SSF scales and shifts, by path.

    These are the outputs of the patch embedding, of the normalisations and linear maps of each block, and of the final
    normalisation.
    """
    width = int(vit.embed_dim)  # type: ignore[arg-type]
    sites = {"patch_embed": width}
    for index, block in enumerate(vit.blocks):  # type: ignore[arg-type]
        sites |= {f"blocks.{index}.{norm}": width for norm in ("norm1", "norm2")}
        for part in ("attn", "mlp"):
            for name, module in getattr(block, part).named_modules():
                if isinstance(module, nn.Linear):
                    sites[f"blocks.{index}.{part}.{name}"] = module.out_features
    last = "norm" if not isinstance(vit.norm, nn.Identity) else "fc_norm"
    return sites | {last: width}


__all__ = [
    "Adapter",
    "Injector",
    "Plan",
    "Prefix",
    "ScaleShift",
    "TokenSource",
    "mlp_adapters",
    "require_blocks",
    "require_depth",
    "require_vit",
    "scale_shift_sites",
]
