"""Any timm model as a backbone: pooled features, weights from the hub's cache, the network or a local file."""

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from clrun.backbones import hub
from clrun.backbones.patches import check_patches
from clrun.system import libraries
from clrun.system.errors import ConfigError, PositiveInt, Range, did_you_mean, first_line, one_line

Shape = tuple[int, int, int]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of its pixels


def timm_backbone(
    image_shape: Shape,
    *,
    name: str,
    pretrained: bool,
    weights: str | None,
    normalize: Literal["timm", "data", "imagenet", "none"],
    image_size: PositiveInt | None,
    crop: Annotated[float, Range(above=0, maximum=1)] | None,
    interpolation: Literal["bilinear", "bicubic"] | None,
) -> nn.Module:
    """Return a plain timm model without classifier; its output is the pooled features [B, num_features].

    The model keeps its own class, so that code written for timm models works on it. Added attributes: `input_size`,
    `mean`, `std`, `crop` and `interpolation`. `num_features` is always the width of the output, where some timm models
    have the width before the head.

    Args:
        image_shape: (C, H, W) of the stored images; the transform adapts the images to the model.
        name: timm's model name with the tag of the weights ("vit_base_patch16_224.augreg_in21k"), or a source
            ("hf-hub:...", "local-dir:...").
        pretrained: whether to load the weights of the tag, from the cache or the network.
        weights: .safetensors, .pth, .pt or .bin file to load instead; pickled code is refused.
        normalize: "timm" uses mean and standard deviation of the model's configuration, "data" those of the data set,
            "imagenet" those of ImageNet, "none" leaves pixels in [0, 1].
        image_size: height and width of the input in pixels, a multiple of the patch size; None for the model's own.
        crop: fraction of each side of an image that the model sees, in the middle: 0.875 at 224 pixels is Resize(256),
            CenterCrop(224); None for that of the model's own evaluation.
        interpolation: method of resizing; None for the model's own.

    Raises:
        ConfigError: unknown model or tag; weights that are missing, cannot be downloaded, or do not fit; an image size
            at which the model drops pixels or that it cannot take.
    """
    timm = libraries.load("timm")
    preflight(name=name, pretrained=pretrained, weights=weights, image_size=image_size)
    model = _create(timm, name, pretrained and weights is None, image_size)
    if weights is not None:
        _load(model, name, Path(weights).expanduser())
    config = model.pretrained_cfg
    channels, height, width = config["input_size"]
    model.input_size = (channels, image_size or height, image_size or width)
    if image_size is not None:
        check_patches(name, image_size)
        _check_size(model, name, model.input_size)
    model.mean, model.std = {
        "timm": (tuple(config["mean"]), tuple(config["std"])),
        "data": (None, None),
        "imagenet": IMAGENET,
        "none": ((0.0,) * channels, (1.0,) * channels),
    }[normalize]
    own = config.get("interpolation")
    model.crop = config.get("crop_pct") or 1.0 if crop is None else crop
    model.interpolation = interpolation or (own if own in ("bilinear", "bicubic") else "bilinear")
    model.num_features = getattr(model, "head_hidden_size", None) or model.num_features
    found: nn.Module = model
    return found


def preflight(
    *, name: str, pretrained: bool, weights: str | None, image_size: int | None = None, **others: Any
) -> None:
    """Find what is wrong with the options of `timm_backbone` without building the model.

    Raises:
        ConfigError: unknown model or tag; weights that are neither on this machine nor can be downloaded; an image size
            that the model's patches do not divide.
    """
    load = pretrained and weights is None
    if ":" not in name:
        _check_name(libraries.load("timm"), name, load)
    if weights is not None:
        _weights_file(Path(weights).expanduser())
    elif load:
        hub.locate(name)
    if image_size is not None and ":" not in name:
        check_patches(name, image_size)


timm_backbone.preflight = preflight  # type: ignore[attr-defined]


def _check_name(timm: Any, name: str, pretrained: bool) -> None:
    """Refuse a model or a tag that timm does not know, and models without published weights."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise ConfigError(f"backbone.name: timm {timm.__version__} has no model '{architecture}'{hint}")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    if pretrained and not tags:
        raise ConfigError(f"backbone.pretrained: timm has no weights for {architecture}; set it to false")
    if tag and tag not in tags:
        hint = did_you_mean(tag, tags)
        raise ConfigError(
            f"backbone.name: {architecture} has no weights tagged '{tag}'{hint} (tags: {', '.join(tags) or 'none'})"
        )


def _create(timm: Any, name: str, pretrained: bool, image_size: int | None) -> Any:
    """Return the model without classifier; transformers are built for `image_size`, other models take any size."""
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    if pretrained:
        name, cached = hub.locate(name)
        options |= {"pretrained_cfg_overlay": cached} if cached else {}
    try:
        if image_size is None:
            return timm.create_model(name, **options)
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, **options)
    except Exception as error:  # the network libraries below timm raise errors of their own kinds
        if pretrained and not name.startswith("local-dir:"):
            raise ConfigError(hub.missing(name, first_line(error)[:200])) from error
        if ":" in name:
            raise ConfigError(f"backbone.name: {name} cannot be opened ({first_line(error)[:200]})") from error
        if image_size is not None and isinstance(error, AssertionError | RuntimeError | ValueError):
            raise ConfigError(_refused_size(name, image_size, error)) from error
        raise


def _check_size(model: nn.Module, name: str, size: Shape) -> None:
    """Refuse an image size that the model cannot take, for example because of its windows, by a forward pass."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(_refused_size(name, size[1], error)) from error
    model.train()


def _refused_size(name: str, image_size: int, error: Exception) -> str:
    """Return the message for an image size that a model cannot take."""
    return f"backbone.image_size: {name} cannot take {image_size} ({first_line(error)[:200]})"


def _load(model: nn.Module, name: str, path: Path) -> None:
    """Load a file of weights, which must have all parameters of the model and may have a classifier."""
    state = read_weights(path)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # timm's name for it
    try:
        if convert is not None:
            state = convert(state, model)
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, TypeError) as error:  # shapes, or names that the conversion expects
        reason = one_line(error)[:200]
        raise ConfigError(f"backbone.weights: {path} does not fit {name} ({reason})") from error
    classifier = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    extra = [key for key in result.unexpected_keys if not key.startswith(tuple(f"{head}." for head in heads))]
    for what, keys in (("has no values for", result.missing_keys), ("has values unknown to it,", extra)):
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ConfigError(f"backbone.weights: {path} does not fit {name}: it {what} {shown}")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors, .pth, .pt or .bin file by name; nothing in the file is executed.

    The tensors may be under "state_dict" or "model" in the file, and names may begin with "module.".

    Raises:
        ConfigError: the file is missing, of another kind, or contains more than tensors.
    """
    _weights_file(path)
    try:
        if path.suffix == ".safetensors":
            content: Any = libraries.load("safetensors.torch").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors' error has no public base class but Exception
        kind = "contains more than tensors and is refused" if isinstance(error, pickle.UnpicklingError) else "is broken"
        raise ConfigError(f"backbone.weights: {path} {kind} ({first_line(error)[:200]})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ConfigError(f"backbone.weights: {path} contains no named tensors")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _weights_file(path: Path) -> None:
    """Refuse a missing file, and one whose name is not that of a file of weights."""
    if not path.is_file():
        raise ConfigError(f"backbone.weights: there is no file {path}; set it to a file of weights, or to null")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"backbone.weights: {path} is not a .safetensors, .pth, .pt or .bin file; set it to one")
