"""A small trained part on the sentence vectors of a frozen text encoder: the cheapest way to learn from texts.

The encoder never changes, so that a run computes the vector of each text once (`clrun.data.features`) and trains on
vectors: an attribute `frozen_part` tells it which part of the backbone that is. Rows of numbers are therefore taken as
vectors, and rows of ids are encoded first; both give the same features. Vectors are scaled to length 1, as the
published model does it (those of MiniLM have lengths around 6 before).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.backbones.bert import Head, TextEncoder
from clrun.backbones.text import Length, Shape, minilm, minilm_preflight
from clrun.system.errors import ConfigError, Positive, PositiveInt

Form = Literal["residual", "layer"]
GAINS: dict[str, float] = {"residual": 4.0, "layer": 20.0}  # for vectors of length 1 in 384 places


class ResidualPart(nn.Module):
    """The map e + W_2 gelu(W_1 s e), where W_2 begins at 0, so that features begin as the vectors themselves.

    Args:
        width: D.
        hidden: rows of W_1.
        gain: s.
    """

    def __init__(self, width: int, hidden: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, e: Tensor) -> Tensor:
        """Return the features [B, D] of vectors e [B, D]."""
        found: Tensor = e + self.fc2(F.gelu(self.fc1(self.gain * e)))
        return found


class LayerPart(nn.Module):
    """The map gelu(W s e), at random in the beginning.

    Args:
        width: D.
        hidden: rows of W, the width of the features.
        gain: s.
    """

    def __init__(self, width: int, hidden: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.fc1 = nn.Linear(width, hidden)

    def forward(self, e: Tensor) -> Tensor:
        """Return the features [B, hidden] of vectors e [B, D]."""
        return F.gelu(self.fc1(self.gain * e))


class Adapted(TextEncoder):
    """A frozen encoder of texts and a trained part behind it.

    Names of classes are encoded by the frozen encoder alone: with head=fixed and a residual part a learner begins as
    the zero-shot classifier of the encoder.

    Args:
        encoder: gives vectors [B, D], which are scaled to length 1: e; it is frozen and stays in evaluation mode.
        form: "residual", e + W_2 gelu(W_1 s e); "layer", gelu(W s e).
        hidden: rows of W_1 or W; None for D.
        gain: s; None for 4 in a residual part and 20 in a layer.

    Attributes:
        captions: vectors [M_k, D] of the captions of each class; a run that needs them computes them once.

    Raises:
        ConfigError: a head of class names for features that are no longer vectors of the encoder's kind.
    """

    def __init__(self, encoder: TextEncoder, *, form: Form, hidden: int | None, gain: float | None) -> None:
        if form == "layer" and encoder.head != "linear":
            raise ConfigError(
                f"backbone.head: {encoder.head} compares features with encoded names, which needs backbone.form="
                "residual; set it to linear for form=layer"
            )
        width, kind = encoder.num_features, {"residual": ResidualPart, "layer": LayerPart}[form]
        part = kind(width, hidden or width, GAINS[form] if gain is None else gain)
        features = width if form == "residual" else hidden or width
        super().__init__(
            features, encoder.tokenizer, max_tokens=encoder.max_tokens, head=encoder.head, kappa=encoder.kappa
        )
        self.negatives = encoder.negatives
        self.encoder, self.part = encoder.requires_grad_(False).eval(), part
        self.captions: tuple[Tensor, ...] | None = None
        self.weights_read = getattr(encoder, "weights_read", None)

    @property
    def frozen_part(self) -> TextEncoder:
        """The encoder: its vectors of the rows of a run are computed once."""
        return self.encoder

    def train(self, mode: bool = True) -> "Adapted":
        """Set the mode of the trained part."""
        super().train(mode)
        self.encoder.eval()
        return self

    def positions(self, x: Tensor) -> Tensor:
        """Return [B, 1] bool: the trained part sees one vector per row."""
        return torch.ones(len(x), 1, dtype=torch.bool, device=x.device)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return the vectors [N, D] of names given as ids [N, L], without the trained part."""
        found: Tensor = self.encoder(ids)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [B, .] of token ids x [B, L], or of vectors x [B, D] as the encoder has given them."""
        found: Tensor = self.part(F.normalize(x if x.is_floating_point() else self.encoder(x), dim=1))
        return found


def minilm_adapter(
    shape: Shape,
    *,
    form: Form,
    hidden: PositiveInt | None,
    gain: Positive | None,
    pretrained: bool,
    weights: str | None,
    max_tokens: Length,
    head: Head,
    kappa: Positive,
) -> Adapted:
    """Return frozen MiniLM with a small trained part: 295,680 numbers in a residual part of width 384.

    Args:
        shape: of the stored rows; a text backbone reads token ids.
        form: "residual", e + W_2 gelu(W_1 s e) with W_2 = 0 in the beginning; "layer", gelu(W s e).
        hidden: rows of W_1 or W; None for 384.
        gain: s; None for 4 in a residual part and 20 in a layer.
        pretrained: false gives the encoder random weights.
        weights: folder of MiniLM; None for that of the installed package.
        max_tokens: longest row of token ids; longer texts are cut.
        head: of methods that train a head, see `TextEncoder`.
        kappa: factor of cosines with class names.

    Raises:
        ConfigError: MiniLM is not there, or form and head do not suit each other.
    """
    encoder = minilm(
        shape, pretrained=pretrained, weights=weights, train="none", max_tokens=max_tokens, head=head, kappa=kappa
    )
    return Adapted(encoder, form=form, hidden=hidden, gain=gain)


minilm_adapter.preflight = minilm_preflight  # type: ignore[attr-defined]
minilm_adapter.weight_options = {"pretrained": False}  # type: ignore[attr-defined]

__all__ = ["Adapted", "minilm_adapter"]
