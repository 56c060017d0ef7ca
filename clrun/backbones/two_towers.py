"""Models of an image and a text tower with a joint space, such as CLIP (Radford et al., ICML 2021, arXiv 2103.00020).

`TwoTowers` is a timm `VisionTransformer`, so that it is an image backbone for every method, with prompts, adapters and
low-rank updates; its features are the class token [B, vision_width], as those of other vision transformers. All that
a method needs beyond them is its `joint` space: projection of image features, text tower and scale. A method that reads
features of the frozen image tower has the same `joint` space at its identity backbone (`clrun.data.features`).

This module imports timm, which takes seconds: others import it inside functions.

Notation: g_i(x) image embedding, g_t(t) text embedding, both [., dim] and not normalised; n(v) = v / |v|.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.activations import QuickGELU
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Tokenize = Callable[[Sequence[str]], Tensor]
State = dict[str, Tensor]
TEXTS_AT_ONCE = 256  # of an encoding without gradients


@dataclass(frozen=True)
class Tower:
    """The sizes of one tower.

    Attributes:
        width: width of the tokens.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: width of the MLPs in multiples of `width`.
        eps: of the layer normalisations.
        quick_gelu: x * sigmoid(1.702 x) instead of GELU.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    eps: float = 1e-5
    quick_gelu: bool = False

    @property
    def activation(self) -> type[nn.Module]:
        """The activation of the MLPs."""
        return QuickGELU if self.quick_gelu else nn.GELU


class Attention(nn.Module):
    """Multi-head self-attention in which a token sees itself and those before it.

    Args:
        width: of the tokens.
        heads: number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens [B, L, width] after attention."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TextBlock(nn.Module):
    """A block of the text tower; its parts are called as in timm's blocks, so that adapters find them.

    Args:
        tower: sizes of the text tower.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        width, hidden = tower.width, int(tower.mlp_ratio * tower.width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=tower.eps) for _ in range(2))
        self.attn = Attention(width, tower.heads)
        self.mlp = nn.Sequential()
        for name, layer in (
            ("fc1", nn.Linear(width, hidden)),
            ("act", tower.activation()),
            ("fc2", nn.Linear(hidden, width)),
        ):
            self.mlp.add_module(name, layer)
        self.drop_path2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens [B, L, width] after the block."""
        x = x + self.attn(self.norm1(x))
        return x + self.drop_path2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class JointSpace(nn.Module):
    """Everything of two towers but the image tower: projection of its features, text tower and scale.

    Args:
        vision_width: width of the image features.
        text: sizes of the text tower.
        dim: width of the joint space.
        tokenize: turns texts into token ids [N, context_length], in which the end-of-text mark has the largest id and
            0 fills the rest; it has `size`, the number of tokens, and `context_length`.

    Attributes:
        logit_scale: [] logarithm of the scale of cosines.
        head: the head of methods that train one, see `clrun.learning.names`; a factory of backbones sets it.
    """

    head: str = "linear"

    def __init__(self, vision_width: int, text: Tower, dim: int, tokenize: Any) -> None:
        super().__init__()
        self.vision_width, self.text_width, self.dim = vision_width, text.width, dim
        self.num_features = dim
        self.tokenizer = tokenize
        self.image_projection = nn.Linear(vision_width, dim, bias=False)
        self.token_embedding = nn.Embedding(tokenize.size, text.width)
        self.positions = nn.Parameter(torch.empty(tokenize.context_length, text.width).normal_(std=0.01))
        self.blocks = nn.Sequential(*(TextBlock(text) for _ in range(text.depth)))
        self.norm = nn.LayerNorm(text.width, eps=text.eps)
        self.text_projection = nn.Linear(text.width, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @property
    def context_length(self) -> int:
        """The largest number of tokens of a text, marks included."""
        return len(self.positions)

    @property
    def scale(self) -> Tensor:
        """[] factor of cosines, exp(logit_scale), at most 100 as in CLIP's training."""
        return self.logit_scale.exp().clamp(max=100)

    def project(self, features: Tensor) -> Tensor:
        """Return the image embeddings [B, dim] of features [B, vision_width] of the image tower."""
        embeddings: Tensor = self.image_projection(features)
        return embeddings

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids [N, context_length] long of texts, on the device of the text tower."""
        ids: Tensor = self.tokenizer(texts)
        return ids.to(self.positions.device)

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Return the texts that are cut."""
        found: list[str] = self.tokenizer.too_long(texts)
        return found

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Return the embeddings [N, L, text_width] of token ids [N, L], without positions."""
        embeddings: Tensor = self.token_embedding(ids)
        return embeddings

    def text_from_embeddings(self, embeddings: Tensor, eot_index: Tensor) -> Tensor:
        """Return the text embeddings [N, dim] of token embeddings.

        Tokens after the end-of-text mark cannot influence it: rows may be cut after the last one.

        Args:
            embeddings: [N, L, text_width], as of `embed_tokens`; L is at most `context_length`.
            eot_index: [N] long, place of the end-of-text mark of each row.
        """
        x = self.norm(self.blocks(embeddings + self.positions[: embeddings.shape[1]]))
        found: Tensor = self.text_projection(x[torch.arange(len(x), device=x.device), eot_index])
        return found

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return the text embeddings [N, dim] of token ids [N, L]; columns that are padding in all rows are cut off."""
        eot = ids.argmax(dim=1)
        ids = ids[:, : int(eot.max()) + 1] if len(ids) else ids
        return self.text_from_embeddings(self.embed_tokens(ids), eot)

    def forward(self, ids: Tensor) -> Tensor:
        """Return `encode_text` of token ids [N, L]."""
        return self.encode_text(ids)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the text embeddings [N, dim] of N texts."""
        return torch.cat([self.encode_text(ids) for ids in torch.split(self.tokenize(texts), TEXTS_AT_ONCE)])


class TwoTowers(VisionTransformer):
    """Two towers as a timm vision transformer; its output is the class token after the last norm, [B, vision_width].

    The joint space is frozen: a method that trains the text tower, the projections or the scale says so itself
    (`requires_grad_`).

    Args:
        image_size: side of the input images in pixels.
        patch_size: side of the patches.
        vision: sizes of the image tower.
        pre_norm: layer normalisation before the first block, as in OpenAI's models.
        joint: the joint space.
        channels: channels of the input images.

    Attributes:
        joint: the joint space.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        vision: Tower,
        pre_norm: bool,
        joint: JointSpace,
        channels: int = 3,
    ) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=channels,
            num_classes=0,
            embed_dim=vision.width,
            depth=vision.depth,
            num_heads=vision.heads,
            mlp_ratio=vision.mlp_ratio,
            pre_norm=pre_norm,
            norm_layer=partial(LayerNorm, eps=vision.eps),
            act_layer=vision.activation,
            weight_init="jax",
        )
        self.patch_embed.proj.register_parameter("bias", None)
        self.joint = joint
        joint.requires_grad_(False)
        self.input_size = (channels, image_size, image_size)

    dim = property(lambda self: self.joint.dim)
    text_width = property(lambda self: self.joint.text_width)
    vision_width = property(lambda self: self.joint.vision_width)
    context_length = property(lambda self: self.joint.context_length)
    logit_scale = property(lambda self: self.joint.logit_scale)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return `JointSpace.tokenize`."""
        return self.joint.tokenize(texts)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Return `JointSpace.embed_tokens`."""
        return self.joint.embed_tokens(ids)

    def text_from_embeddings(self, embeddings: Tensor, eot_index: Tensor) -> Tensor:
        """Return `JointSpace.text_from_embeddings`."""
        return self.joint.text_from_embeddings(embeddings, eot_index)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return `JointSpace.encode_text`."""
        return self.joint.encode_text(ids)

    def encode_image(self, x: Tensor) -> Tensor:
        """Return the image embeddings [B, dim] of prepared images x."""
        return self.joint.project(self(x))

    def image_from_tokens(
        self, x: Tensor, prompts: Tensor | None = None, *, pool: Literal["cls", "prompt_mean"] = "cls"
    ) -> Tensor:
        """Return the image embeddings [B, dim] of prepared images x with prompt tokens beside their patches.

        Args:
            x: prepared images.
            prompts: [P, vision_width] or [B, P, vision_width]: inserted between class token and patches before the
                first block, without positions; None or P = 0 for none.
            pool: "cls" takes the class token, "prompt_mean" the mean of the prompts' outputs.
        """
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        count = 0 if prompts is None else prompts.shape[-2]
        if prompts is not None and count:
            prompts = prompts.expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
        tokens = self.norm(self.blocks(tokens))
        return self.joint.project(tokens[:, 0] if pool == "cls" else tokens[:, 1 : 1 + count].mean(dim=1))


# --- published weights


RENAMED = (  # of open_clip and of this module, in this order
    ("visual.transformer.resblocks.", "blocks."),
    ("visual.conv1.", "patch_embed.proj."),
    ("visual.ln_pre.", "norm_pre."),
    ("visual.ln_post.", "norm."),
    ("transformer.resblocks.", "joint.blocks."),
    ("ln_final.", "joint.norm."),
    ("token_embedding.", "joint.token_embedding."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "visual.class_embedding": ("cls_token", lambda value: value.view(1, 1, -1)),
    "visual.positional_embedding": ("pos_embed", lambda value: value.unsqueeze(0)),
    "visual.proj": ("joint.image_projection.weight", lambda value: value.T.contiguous()),
    "positional_embedding": ("joint.positions", lambda value: value),
    "text_projection": ("joint.text_projection.weight", lambda value: value.T.contiguous()),
    "logit_scale": ("joint.logit_scale", lambda value: value.reshape(())),
}
UNUSED = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # numbers in OpenAI's files; the causal mask


def from_open_clip(state: State, model: nn.Module) -> State:
    """Return weights with the names of open_clip, which are those of OpenAI, with the names of `TwoTowers`.

    Weights of half precision become fp32; those that have the names of `TwoTowers` already stay as they are.
    """
    if "visual.class_embedding" not in state:
        return state
    found: State = {}
    for name, value in state.items():
        if name in UNUSED:
            continue
        change: Callable[[Tensor], Tensor] = torch.Tensor.contiguous
        if name in TENSORS:
            name, change = TENSORS[name]
        for old, new in RENAMED:
            if old in name and (old.startswith(".") or name.startswith(old)):
                name = name.replace(old, new)
        found[name] = change(value).float()
    return found
