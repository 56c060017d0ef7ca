"""Any text encoder of the library `transformers` as a backbone, from a local folder.

The model is given a mask [B, 1, L, L] of its own for each row: the library's own handling of masks [B, L] asks whether
any row has padding, which gradients of single rows (`torch.func.vmap`) cannot answer. Whether the model understands the
larger mask is tried when it is loaded.

Ids are stored with 0 as padding, as clrun does everywhere. Where 0 is another token (in RoBERTa, for one) all ids are
one larger than those of the library.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clrun.backbones.bert import Head, TextEncoder, choose_trained, mean_of_tokens
from clrun.backbones.text import CONFIG, Length, Shape
from clrun.data.tokens import SEPARATOR, Tokenizer
from clrun.system import libraries
from clrun.system.errors import ConfigError, Positive, first_line

Pooling = Literal["mean", "first"]
TOLERANCE = 1e-3  # of features under the two kinds of masks, relative to the largest entry


class LibraryTokenizer:
    """A tokenizer of `transformers`, with 0 as padding.

    Args:
        tokenizer: as `AutoTokenizer` gives it.
    """

    pad = 0

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.shift = int(tokenizer.pad_token_id != self.pad)
        self.end = None if tokenizer.eos_token_id is None else tokenizer.eos_token_id + self.shift
        fast = getattr(tokenizer, "backend_tokenizer", None)
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True) if fast is None else fast.to_str()
        self.digest = hashlib.sha256(f"{type(tokenizer).__name__} {self.shift}\n{content}".encode()).hexdigest()
        self.vocab_size = len(tokenizer) + self.shift
        self.name = f"{type(tokenizer).__name__} {len(tokenizer):,}"

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """Return the ids of a text, or of the two parts of one, with the special tokens of the model."""
        parts = text.split(SEPARATOR)[:2]
        found = self.tokenizer(*parts, truncation=True, max_length=max_tokens, padding=False)["input_ids"]
        return [token + self.shift for token in found]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of the vocabulary."""
        found: list[str] = self.tokenizer.convert_ids_to_tokens([max(0, token - self.shift) for token in ids])
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the first end mark, without special tokens."""
        ids = [token - self.shift for token in ids if token != self.pad]
        end = self.tokenizer.eos_token_id
        found: str = self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)
        return found


class LibraryEncoder(TextEncoder):
    """An encoder of `transformers`; its features [B, D] are the mean of the last tokens, or the first of them.

    In training mode the model's own dropout is on, and columns that are padding in all rows are cut off.

    Args:
        model: as `AutoModel` gives it, called with `input_ids` and `attention_mask`.
        tokenizer: turns texts into token ids.
        pooling: "mean" over real tokens, or the "first" token.
        max_tokens: see `TextEncoder`.
        head: likewise.
        kappa: likewise.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, *, pooling: Pooling, max_tokens: int, head: Head, kappa: float
    ) -> None:
        config: Any = model.config
        super().__init__(int(config.hidden_size), tokenizer, max_tokens=max_tokens, head=head, kappa=kappa)
        self.model, self.pooling = model, pooling
        self.shift = int(getattr(tokenizer, "shift", 0))
        self.padding = int(config.pad_token_id or 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of token ids x [B, L], of any integer type."""
        mask = self.positions(x)
        if self.training and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            length = int(mask.any(dim=0).nonzero().max()) + 1
            x, mask = x[:, :length], mask[:, :length]
        columns = mask.shape[1]
        return self._features(x, mask, mask[:, None, None, :].expand(-1, 1, columns, -1))

    def _features(self, x: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        """Return the features of ids, where `given` is the mask that the model is given."""
        ids = torch.where(mask, x.long() - self.shift, self.padding).clamp(min=0)
        tokens: Tensor = self.model(input_ids=ids, attention_mask=given).last_hidden_state
        return tokens[:, 0] if self.pooling == "first" else mean_of_tokens(tokens, mask)

    @torch.no_grad()
    def check(self, name: str) -> None:
        """Compare the features under the mask of each row with those under the library's own mask; try the longest row.

        Raises:
            ConfigError: they differ, or the model takes no such mask, or no row of `max_tokens`.
        """
        try:
            self(torch.full((1, self.max_tokens), self.tokenizer.encode("a", self.max_tokens)[0]))
        except (IndexError, RuntimeError, ValueError) as error:
            what = f"{name} cannot read rows of {self.max_tokens} tokens ({first_line(error)})"
            raise ConfigError(f"backbone.max_tokens: {what}; set it to a smaller number") from error
        ids = self.tokenize(["a", "a few words that are longer"])
        mask = self.positions(ids)
        try:
            own, theirs = self(ids), self._features(ids, mask, mask.long())
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"backbone: {name} takes no mask per row ({first_line(error)}); use another model"
            ) from error
        if not torch.allclose(own, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max())):
            raise ConfigError(f"backbone: {name} gives other features under a mask per row; use another model")


def hf_text(
    shape: Shape,
    *,
    folder: str | None,
    download: bool,
    pretrained: bool,
    pooling: Pooling,
    train: str,
    max_tokens: Length,
    head: Head,
    kappa: Positive,
) -> LibraryEncoder:
    """Return a text encoder of `transformers`: one for masked language modelling, such as BERT, DistilBERT or RoBERTa.

    Args:
        shape: of the stored rows; a text backbone reads token ids.
        folder: that `save_pretrained` of model and tokenizer has written; with `download` also a name on the hub.
        download: whether the hub may be asked; otherwise no request is made.
        pretrained: false gives random weights.
        pooling: "mean" of the real tokens, or the "first" token.
        train: "all", "blocks", "last_K" (K a number) or "none", see `choose_trained`.
        max_tokens: longest row of token ids; longer texts are cut.
        head: of methods that train a head, see `TextEncoder`.
        kappa: factor of cosines with class names.

    Raises:
        ConfigError: the extra `text` is not installed, the folder is missing or cannot be read, or it holds another
            kind of model.
    """
    place = located(folder, download, "folder")
    transformers = libraries.load("transformers")
    config = loaded(transformers.AutoConfig.from_pretrained, place, download)
    if type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"backbone.folder: {place} holds a {type(config).__name__.removesuffix('Config')}, which is no encoder of "
            "texts for masked language modelling; use such a model, or backbone=t5 for a T5"
        )
    tokenizer = LibraryTokenizer(loaded(transformers.AutoTokenizer.from_pretrained, place, download))
    if pretrained:
        model = loaded(transformers.AutoModel.from_pretrained, place, download)
    else:
        model = transformers.AutoModel.from_config(config)
    encoder = LibraryEncoder(model, tokenizer, pooling=pooling, max_tokens=max_tokens, head=head, kappa=kappa)
    encoder.eval().check(str(place))
    choose_trained(encoder, blocks_of(model), train)
    return encoder


def preflight(*, folder: str | None, download: bool, **others: Any) -> None:
    """Find out whether the folder is there, without building the model.

    Raises:
        ConfigError: it is not.
    """
    located(folder, download, "folder")


hf_text.preflight = preflight  # type: ignore[attr-defined]
hf_text.weight_options = {"pretrained": False}  # type: ignore[attr-defined]  # the tokenizer is in the folder


def located(folder: str | None, download: bool, option: str) -> Path | str:
    """Return the folder of a model; with `download` also a name on the hub.

    Raises:
        ConfigError: there is no such folder, or no config.json in it.
    """
    if folder is None:
        raise ConfigError(f"backbone.{option}: set it to a folder that transformers has saved")
    place = Path(folder).expanduser()
    if (place / CONFIG).is_file():
        return place
    if download and not place.exists():
        return folder
    what = f"there is no {CONFIG} in {place}" if place.is_dir() else f"there is no folder {place}"
    raise ConfigError(
        f"backbone.{option}: {what}; set it to a folder that transformers has saved, or set backbone.download=true for "
        "a name on the hub"
    )


def loaded(load: Callable[..., Any], place: Path | str, download: bool) -> Any:
    """Return what a function of `transformers` reads from a folder; code in it is never run.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return load(str(place), local_files_only=not download, trust_remote_code=False)
    except Exception as error:  # the library, its formats and the network have many kinds
        raise ConfigError(f"backbone.folder: {place} cannot be read ({first_line(error)[:200]})") from error


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a transformer: the longest list of modules of one class within."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(part) for part in m}) == 1]
    return max(lists, key=len, default=[])


__all__ = ["LibraryEncoder", "LibraryTokenizer", "blocks_of", "hf_text", "loaded", "located"]
