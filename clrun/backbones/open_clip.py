"""CLIP models in open_clip's format (extra `clip`): from a folder that states everything, or a named model and a file.

open_clip is not imported: its package provides the sizes of its named models and CLIP's merge list. Models are read
whose image tower is a plain vision transformer and whose text tower is CLIP's; others are refused. Neither the
activation nor the preprocessing is guessed: a folder states them, and for a file of weights the configuration does.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from clrun.backbones.weights import check_file, load_weights
from clrun.data.byte_pairs import BytePairs
from clrun.system.errors import ConfigError, WeightsMissing, did_you_mean
from clrun.system.libraries import not_installed
from clrun.system.reading import read_json

if TYPE_CHECKING:
    from clrun.backbones.two_towers import Tower, TwoTowers

Shape = tuple[int, int, int]
Head = Literal["linear", "fixed", "live", "init"]
CONFIG, WEIGHTS, MERGES = (
    "open_clip_config.json",
    ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "merges.txt.gz",
)
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
JSON_BYTES = 2**20
# What the configuration of a model may say; anything else would change the network.
KNOWN = {
    "": ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"),
    "vision_cfg": [
        "image_size",
        "patch_size",
        "width",
        "layers",
        "head_width",
        "mlp_ratio",
        "no_ln_pre",
        "norm_kwargs",
    ],
    "text_cfg": ["context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"],
}


@dataclass(frozen=True)
class Description:
    """What a model is.

    Attributes:
        name: what to call it in messages.
        model: open_clip's `model_cfg`.
        preprocess: open_clip's `preprocess_cfg`: mean, std, interpolation.
        merges: the merge list of the tokenizer.
    """

    name: str
    model: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    merges: Path


def open_clip(
    shape: Shape,
    *,
    folder: str | None,
    model: str | None,
    weights: str | None,
    weights_key: str | None,
    pretrained: bool,
    quick_gelu: bool | None,
    mean: list[float] | None,
    std: list[float] | None,
    interpolation: Literal["bilinear", "bicubic"] | None,
    head: Head,
) -> nn.Module:
    """Return a CLIP model of open_clip as `TwoTowers`.

    Args:
        shape: (C, H, W) of the stored images; the transform converts them.
        folder: with open_clip_config.json and the weights, as open_clip's `local-dir:` takes it. A vocabulary that is
            not CLIP's needs its merge list there, as merges.txt.gz. None to name a model.
        model: open_clip's name of a model, such as "ViT-B-16"; its weights are in the file `weights`.
        weights: file of weights; None for those of the folder.
        weights_key: where in the file the weights are; None looks for them.
        pretrained: false gives random weights.
        quick_gelu: whether the activation is x * sigmoid(1.702 x), as in OpenAI's weights, instead of GELU; None where
            the folder, or the name of the model, says so.
        mean: mean of each channel of the images, in [0, 1] units; None where the folder says so.
        std: standard deviation of each channel, likewise.
        interpolation: of resizing, likewise.
        head: of methods that train a head: "linear", or with the text features of class names as rows ("fixed",
            "live", "init"), see `clrun.learning.names`.

    Raises:
        ConfigError: neither or both of folder and model are named, something is missing, contradicts the folder, or
            cannot be read.
    """
    preflight(folder=folder, model=model, weights=weights, pretrained=pretrained)
    stated = {"quick_gelu": quick_gelu, "mean": mean, "std": std, "interpolation": interpolation}
    found = from_folder(Path(folder).expanduser()) if folder is not None else named(str(model))
    backbone = towers(_completed(found, stated), head=head)
    if pretrained:
        file = Path(weights).expanduser() if weights is not None else _weights_in(Path(str(folder)).expanduser())
        load_towers(backbone, found.name, file, weights_key)
    return backbone


def preflight(*, folder: str | None, model: str | None, weights: str | None, pretrained: bool, **others: Any) -> None:
    """Find what is wrong with the options of `open_clip` without building the model.

    Raises:
        WeightsMissing: the file of weights is not there.
        ConfigError: neither or both of folder and model are named, the folder is missing, or the file holds no weights.
    """
    if (folder is None) == (model is None):
        raise ConfigError("backbone: set one of backbone.folder (a folder of open_clip) and backbone.model (a name)")
    if folder is not None and not (Path(folder).expanduser() / CONFIG).is_file():
        raise ConfigError(
            f"backbone.folder: there is no {CONFIG} in {folder}; set it to a folder that open_clip has saved"
        )
    if not pretrained:
        return
    if weights is not None:
        if not Path(weights).expanduser().exists():
            raise WeightsMissing(
                f"backbone.weights: there is no file {weights}, which has the weights of {model or folder}"
            )
        check_file(Path(weights).expanduser())
    elif folder is not None:
        _weights_in(Path(folder).expanduser())
    else:
        raise WeightsMissing(wanted(str(model)))


open_clip.preflight = preflight  # type: ignore[attr-defined]


def wanted(model: str) -> str:
    """Return the line that says which file of weights a named model needs."""
    return (
        f"backbone.weights: the weights of {model} are wanted; set it to a file with open_clip's names, such as "
        f"{WEIGHTS[0]} of the model's repository on the hub, or set backbone.pretrained=false"
    )


def from_folder(folder: Path) -> Description:
    """Return what a folder of open_clip says about its model.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    config = read_json(folder / CONFIG, remedy="set backbone.folder to a folder of open_clip", limit=JSON_BYTES)
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ConfigError(f"{folder / CONFIG}: has no model_cfg; set backbone.folder to a folder of open_clip")
    own = folder / MERGES
    model = {"quick_gelu": False, **config["model_cfg"]}  # the format's default
    return Description(
        folder.name, model, config.get("preprocess_cfg") or {}, own if own.is_file() else _packaged(VOCABULARY)
    )


def named(model: str) -> Description:
    """Return what open_clip's package says about a model; its preprocessing depends on the weights.

    Raises:
        ConfigError: open_clip is not installed, or does not know the model.
    """
    file = _packaged("model_configs") / f"{model}.json"
    if not file.is_file():
        hint = did_you_mean(model, [path.stem for path in file.parent.glob("*.json")])
        raise ConfigError(f"backbone.model: open_clip has no model '{model}'{hint}")
    return Description(model, json.loads(file.read_text(encoding="utf-8")), {}, _packaged(VOCABULARY))


def _packaged(name: str) -> Path:
    """Return a file or folder of open_clip's package, which is not imported.

    Raises:
        ConfigError: open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"backbone: {not_installed('open_clip')}")
    return Path(spec.submodule_search_locations[0]) / name


def _completed(found: Description, stated: Mapping[str, Any]) -> Description:
    """Return the description with what the options state.

    Raises:
        ConfigError: an option contradicts the description, or neither says something.
    """
    own = {
        "quick_gelu": found.model.get("quick_gelu"),
        **{k: found.preprocess.get(k) for k in ("mean", "std", "interpolation")},
    }
    for key, value in stated.items():
        if own[key] is None and value is None:
            raise ConfigError(
                f"backbone.{key}: the weights of {found.name} do not say it; set it as they were trained (CLIP by "
                "OpenAI: quick_gelu=true, mean=[0.48145466,0.4578275,0.40821073], "
                "std=[0.26862954,0.26130258,0.27577711], interpolation=bicubic)"
            )
        if own[key] is not None and value is not None and own[key] != value:
            raise ConfigError(f"backbone.{key}: is {value}, but {found.name} says {own[key]}; set it to null")
    both = {key: own[key] if value is None else value for key, value in stated.items()}
    model = {**found.model, "quick_gelu": both.pop("quick_gelu")}
    return Description(found.name, model, {**found.preprocess, **both}, found.merges)


def towers(found: Description, *, head: Head) -> "TwoTowers":
    """Return the untrained model of a description.

    Raises:
        ConfigError: the model is not made of a plain vision transformer and CLIP's text tower.
    """
    from clrun.backbones.two_towers import JointSpace, TwoTowers

    _check_known(found)
    vision, text, quick = found.model["vision_cfg"], found.model["text_cfg"], bool(found.model.get("quick_gelu"))
    tokenizer = BytePairs.read(found.merges, text.get("context_length", 77))
    if tokenizer.size != text.get("vocab_size", 49408):
        raise ConfigError(
            f"backbone: {found.name} has a vocabulary of {text['vocab_size']} tokens, and {found.merges.name} makes "
            f"{tokenizer.size}; put its merge list as {MERGES} into its folder"
        )
    image = _tower(vision, vision["width"] // vision.get("head_width", 64), quick)
    joint = JointSpace(image.width, _tower(text, text.get("heads", 8), quick), found.model["embed_dim"], tokenizer)
    backbone = TwoTowers(
        image_size=vision.get("image_size", 224),
        patch_size=vision["patch_size"],
        vision=image,
        pre_norm=not vision.get("no_ln_pre", False),
        joint=joint,
    )
    joint.head = head
    if head == "live":  # its rows are the texts of a text tower that is trained
        joint.requires_grad_(True)
        joint.logit_scale.requires_grad_(False)
    preprocess = found.preprocess
    for name in ("mean", "std"):
        setattr(backbone, name, tuple(preprocess[name]))
    backbone.interpolation = preprocess["interpolation"]
    return backbone


def _tower(config: Mapping[str, Any], heads: int, quick_gelu: bool) -> "Tower":
    """Return the sizes of a tower."""
    from clrun.backbones.two_towers import Tower

    eps = (config.get("norm_kwargs") or {}).get("eps", 1e-5)
    return Tower(config["width"], config["layers"], heads, config.get("mlp_ratio", 4.0), eps, quick_gelu)


def _check_known(found: Description) -> None:
    """Refuse a model with other parts than those of `TwoTowers`.

    Raises:
        ConfigError: its configuration says something that is not in `KNOWN`, or lacks a part.
    """
    for part, known in KNOWN.items():
        config = found.model.get(part, {}) if part else found.model
        odd = [key for key, value in config.items() if key not in known and value not in (None, False)]
        if odd or not config or not isinstance(config.get("layers", 1), int):
            raise ConfigError(
                f"backbone: {found.name} is no CLIP of a plain vision transformer and CLIP's text tower "
                f"({part or 'model_cfg'}: {odd[0] if odd else 'layers'}); choose another model, such as ViT-B-16"
            )


def _weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder of open_clip.

    Raises:
        ConfigError: there is none.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise WeightsMissing(f"backbone.folder: there is no {' or '.join(WEIGHTS)} in {folder}; put the weights there")
    return file


def load_towers(backbone: "TwoTowers", name: str, file: Path, key: str | None) -> None:
    """Load weights with open_clip's names, or those of `TwoTowers`, into a model.

    Raises:
        ConfigError: the file cannot be read or does not fit.
    """
    from clrun.backbones.two_towers import from_open_clip

    load_weights(backbone, name, file, key=key, convert=from_open_clip)


__all__ = ["open_clip", "from_folder", "named", "towers", "load_towers", "Description"]
