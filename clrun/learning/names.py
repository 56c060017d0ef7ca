"""Names of classes as text: their encoded captions, and a head whose rows are these texts.

A backbone with a text side has an attribute `joint`: `JointSpace` of `clrun.backbones.two_towers`, or a module with its
`project`, `encode_texts`, `tokenize`, `encode_text`, `scale`, `dim` and `head`. Notation: f features [B, D], g(f) =
`joint.project(f)` [B, d], n(v) = v / |v|, t_{k,m} caption m of class k, kappa = `joint.scale`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.data.captions import Captions
from clrun.learning.heads import GrowingHead
from clrun.system.errors import ConfigError

Names = Literal["fixed", "live", "init"]


def caption_features(backbone: nn.Module, captions: Captions, classes: Iterable[int]) -> list[Tensor]:
    """Return the text embeddings [M_k, d] of the captions of each class, not normalised and without gradients.

    Those of a frozen text tower that the engine has computed for all classes, in the order of their ids, are looked up
    (`clrun.data.features`); else the captions of each class are encoded together, so that they do not depend on the
    order of the classes either. A backbone that encodes names itself takes all of them at once, because there may be
    thousands; a head whose rows stay asks for them once, see `NamesHead.read`.
    """
    known: Sequence[Tensor] | None = getattr(backbone, "captions", None)
    if known is not None:
        return [known[label] for label in classes]
    joint: Any = backbone.joint
    itself = backbone is joint
    texts = [captions.of(label) for label in classes]
    with torch.no_grad():
        if not itself or not texts:
            return [joint.encode_texts(own) for own in texts]
        return list(torch.split(joint.encode_texts([text for own in texts for text in own]), list(map(len, texts))))


def class_text(features: Tensor) -> Tensor:
    """Return w = n(mean_m n(t_m)) [d] of the text embeddings [M, d] of one class (CLIP's ensemble of templates)."""
    return F.normalize(F.normalize(features, dim=1).mean(dim=0), dim=0)


class NamesHead(GrowingHead):
    """Logits kappa n(g(f)) . w_k, where w_k is the text of class k: n(mean_m n(t_{k,m})).

    Growing a class encodes its captions and needs no random number, so that a task order cannot change its row.

    Args:
        backbone: has a `joint` space; only a reference to that is held, and its parameters are the backbone's.
        num_classes: C.
        names: "fixed": rows are computed once and stay. "init": they are trained from there. "live": rows follow the
            text tower: in training mode they are encoded with gradients, in each call, from the first template of
            the classes in `active`; in eval mode from all templates, once per change of the text tower.
        negatives: K, with "live": each training pass encodes the classes of its batch and K others, see `sample`; None
            for all that compete.

    Attributes:
        captions: names and templates of the classes; `read` sets them.
        start: [C, d] the texts of all classes by the backbone before its training, see `read`; None where they are
            encoded when a class is grown.
        active: classes whose rows training encodes ("live"); None for all that have been grown.
    """

    start: Tensor | None

    def __init__(self, backbone: nn.Module, num_classes: int, *, names: Names, negatives: int | None = None) -> None:
        joint: Any = backbone.joint
        super().__init__(joint.dim, num_classes, bias=False)
        self.names, self._of = names, (backbone,)  # in a tuple, because the backbone is no part of the head
        self.captions: Captions | None = None
        self.active: list[int] | None = None
        self.negatives = negatives
        self.weight.requires_grad_(names == "init")
        self.register_buffer("start", None)
        self._made_from: tuple[Any, ...] = ()
        self._tokens: tuple[list[int], Tensor] | None = None  # of the first captions of classes in training
        self._others: tuple[Captions, tuple[Any, ...], Tensor] | None = None  # of the data set asked for last

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what holds in this process alone: from which tensors the texts were computed."""
        return {**self.__dict__, "_made_from": (), "_others": None, "_tokens": None}

    @property
    def joint(self) -> Any:
        """The joint space of the backbone."""
        return self._of[0].joint

    def read(self, captions: Captions | None) -> None:
        """Take the captions of all classes; a class is encoded when it is grown.

        Where the backbone itself encodes names, rows that stay or are trained from the texts ("fixed", "init") are
        those of the backbone as it is now, before it is trained: all classes are encoded at once, in the order of their
        ids, and a class that comes later begins as it would have begun in the first task.

        Raises:
            ConfigError: the stream has no names of classes.
        """
        if captions is None:
            raise ConfigError(
                "backbone.head: rows of class names need a data set with names of classes; set it to linear"
            )
        self.captions = captions
        backbone = self._of[0]
        if self.names != "live" and self.joint is backbone and len(captions.classes) == len(self.weight):
            mode = backbone.training
            backbone.eval()
            self.start = self.final_texts(list(range(len(self.weight)))).to(self.weight).detach()
            backbone.train(mode)

    def grow(self, classes: Tensor, generator: torch.Generator | None = None) -> None:
        """Set the rows of those `classes` ([k] long) that have none yet to their texts; no random number is drawn."""
        classes = classes.to(self.initialised.device)
        new = classes[~self.initialised[classes]]
        self.initialised[new] = True
        self._encode(new.tolist())

    def texts(self, classes: list[int]) -> Tensor:
        """Return w [k, d] of classes with gradients, as training with "live" uses it: the first template alone."""
        assert self.captions is not None, "the method reads the captions before its first task"
        if self._tokens is None or self._tokens[0] != classes:
            self._tokens = classes, self.joint.tokenize([self.captions.of(label)[0] for label in classes])
        return F.normalize(self.joint.encode_text(self._tokens[1]), dim=1)

    def sample(self, y: Tensor, competing: Tensor) -> Tensor:
        """Choose the classes that the next training pass encodes: those of its rows, and at most K others.

        Args:
            y: [B] long, class ids of the rows.
            competing: [B, C] bool, the classes that compete for each row.

        Returns:
            [C] bool, the classes that were chosen.
        """
        chosen = torch.zeros(len(self.weight), dtype=torch.bool, device=y.device)
        chosen[y] = True
        others = (competing.any(dim=0) & ~chosen).nonzero()[:, 0]
        chosen[others[torch.randperm(len(others))[: self.negatives].to(others.device)]] = True
        self.active = chosen.nonzero()[:, 0].tolist()
        return chosen

    def _sampled(self) -> list[int] | None:
        """Return the classes that this training pass encodes; None for all that have been grown.

        Raises:
            ConfigError: they are to be sampled, and the method has not done it.
        """
        active = self.active
        if self.negatives is None:
            return active
        if active is None:
            raise ConfigError(
                f"backbone.head: this method has a loss of its own, which samples no names (live_{self.negatives}); "
                "set it to live"
            )
        self.active = None  # each pass has a sample of its own
        return active

    def final_texts(self, classes: list[int]) -> Tensor:
        """Return w [k, d] of classes without gradients, as predictions use it: all templates."""
        assert self.captions is not None, "the method reads the captions before its first task"
        return torch.stack([self.ensemble(own) for own in caption_features(self._of[0], self.captions, classes)])

    def ensemble(self, features: Tensor) -> Tensor:
        """Return w [d] of the text embeddings [M, d] of the captions of one class, see `class_text`."""
        return class_text(features)

    def sources(self) -> Iterable[Tensor]:
        """Return the tensors on which the rows depend."""
        found: Iterable[Tensor] = self.joint.parameters()
        return found

    def _encode(self, classes: list[int]) -> None:
        """Set the rows of these classes to their texts."""
        if classes:
            with torch.no_grad():
                texts = self.final_texts(classes) if self.start is None else self.start[classes]
                self.weight[classes] = texts.to(self.weight)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; rows that follow the text tower ("live") are brought up to date for predictions."""
        super().train(mode)
        if not mode and self.names == "live" and self.captions is not None:
            self.refresh()
        return self

    def _version_of_sources(self) -> tuple[Any, ...]:
        """Return what changes whenever the tensors change on which the rows depend.

        Inside `torch.func`, where other tensors stand for them, the rows count as unchanged: gradients and Fisher
        information of single samples take the texts as constants.
        """
        sources = list(self.sources())
        if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in sources):
            return self._made_from
        return tuple((tensor.data_ptr(), tensor._version) for tensor in sources)

    def refresh(self) -> None:
        """Encode all grown classes again if what they depend on has changed since they were encoded ("live")."""
        version = self._version_of_sources()
        if version != self._made_from:
            self._encode(self.initialised.nonzero()[:, 0].tolist())
            self._made_from = version

    def rows(self) -> Tensor:
        """Return w [C, d]; with "live" in training mode, gradients reach the text tower."""
        if self.names != "live":
            return self.weight
        if not self.training:
            self.refresh()
            return self.weight
        active = self._sampled()
        classes = self.initialised.nonzero()[:, 0].tolist() if active is None else active
        texts = self.texts(classes)
        if len(texts) == len(self.weight) and classes == list(range(len(classes))):
            return texts
        index = torch.tensor(classes, device=texts.device)
        return self.weight.detach().to(texts.dtype).index_copy(0, index, texts)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] of features [B, D]."""
        return self.match(self.embed(features), self.rows())

    def embed(self, features: Tensor) -> Tensor:
        """Return the unit image embeddings n(g(f)) [B, d] of features [B, D]."""
        return F.normalize(self.joint.project(features), dim=1)

    def match(self, embeddings: Tensor, texts: Tensor) -> Tensor:
        """Return kappa times the products [B, K] of unit embeddings [B, d] and texts [K, d]."""
        logits: Tensor = self.joint.scale * F.linear(embeddings, texts)
        return logits

    def other_texts(self, captions: Captions) -> Tensor:
        """Return w [K, d] of other classes, without gradients, as predictions use it."""
        own = [captions.of(label) for label in range(len(captions.classes))]
        features = self.joint.encode_texts([text for texts in own for text in texts])
        return torch.stack([self.ensemble(part) for part in torch.split(features, list(map(len, own)))])

    def rows_of(self, captions: Captions) -> Tensor:
        """Return `other_texts` [K, d], which are encoded once per change of what they depend on."""
        version = self._version_of_sources()
        if self._others is None or self._others[0] is not captions or self._others[1] != version:
            with torch.no_grad():
                self._others = captions, version, self.other_texts(captions)
        return self._others[2]

    def score(self, features: Tensor, captions: Captions) -> Tensor:
        """Return logits [B, K] of features [B, D] over K other classes, which are given by their captions."""
        return self.match(self.embed(features), self.rows_of(captions))


def has_names(backbone: nn.Module) -> bool:
    """Return whether a backbone asks for heads whose rows are texts of class names."""
    return getattr(getattr(backbone, "joint", None), "head", "linear") != "linear"


def new_head(backbone: nn.Module, num_classes: int) -> GrowingHead:
    """Return the head that methods train on features of a backbone: linear, or of names as its `joint` space asks."""
    if has_names(backbone):
        joint: Any = backbone.joint
        return NamesHead(backbone, num_classes, names=joint.head, negatives=getattr(joint, "negatives", None))
    return GrowingHead(int(backbone.num_features), num_classes)  # type: ignore[arg-type]


def require_text(backbone: nn.Module, method: str, *, towers: bool = False) -> None:
    """Refuse a backbone that cannot encode names of classes.

    Args:
        backbone: the backbone.
        method: name of the method, for the message.
        towers: also refuse a text backbone, which encodes names itself: the method needs two towers.

    Raises:
        ConfigError: see above.
    """
    joint = getattr(backbone, "joint", None)
    if joint is None and not towers and hasattr(backbone, "tokenizer"):
        raise ConfigError(f"backbone.head: {method} compares texts with names of classes; set it to fixed")
    if towers and hasattr(backbone, "tokenizer"):
        raise ConfigError(
            f"backbone: {method} needs an image and a text tower, not {type(backbone).__name__}; use the backbones "
            "glyph_clip, clip_vit_b16 or open_clip"
        )
    if joint is None:
        raise ConfigError(
            f"backbone: {method} needs names of classes as text, which {type(backbone).__name__} cannot encode; use a "
            "backbone with an image and a text tower (glyph_clip, clip_vit_b16, open_clip), or an encoder of texts "
            "(minilm, minilm_adapter, bert) with backbone.head=fixed"
        )
