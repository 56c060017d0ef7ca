"""Any timm model as a backbone: pooled features, weights from the hub's cache, the network or a local file."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from clrun.backbones import hub
from clrun.backbones.patches import check_patches
from clrun.backbones.weights import check_file, load_weights
from clrun.system import libraries
from clrun.system.errors import ConfigError, PositiveInt, Range, did_you_mean, first_line, warn

Shape = tuple[int, int, int]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of its pixels


def timm_backbone(
    shape: Shape,
    *,
    name: str,
    pretrained: bool,
    weights: str | None,
    weights_key: str | None,
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
        shape: (C, H, W) of the stored images; the transform adapts the images to the model.
        name: timm's model name with the tag of the weights ("vit_base_patch16_224.augreg_in21k"), or a source
            ("hf-hub:...", "local-dir:...").
        pretrained: whether to load the weights of the tag, from the cache or the network.
        weights: file to load instead: safetensors, PyTorch (.pth, .pt, .bin, .ckpt, .pth.tar, ...) or JAX (.npz), read
            by its content; no pickled code is run (`clrun.backbones.weights`).
        weights_key: where in the file the weights are: keys of nested mappings and a prefix of names, with dots
            ("state_dict_ema", "teacher.backbone"); None looks for them and takes averaged weights first, as timm does.
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
    if ":" not in name:
        name = current_name(name)
    preflight(name=name, pretrained=pretrained, weights=weights, image_size=image_size)
    model = _create(timm, name, pretrained and weights is None, image_size)
    if weights is not None:
        _load(model, name, Path(weights).expanduser(), weights_key)
    config = model.pretrained_cfg
    channels, height, width = config["input_size"]
    model.input_size = (channels, image_size or height, image_size or width)
    if image_size is not None:
        check_patches(name, image_size)
        _check_size(model, name, model.input_size)
    model.mean, model.std = _normalisation(config, normalize)
    own = config.get("interpolation")
    model.crop = config.get("crop_pct") or 1.0 if crop is None else crop
    model.interpolation = interpolation or (own if own in ("bilinear", "bicubic") else "bilinear")
    model.num_features = getattr(model, "head_hidden_size", None) or model.num_features
    found: nn.Module = model
    return found


def _normalisation(config: Mapping[str, Any], normalize: str) -> tuple[Any, Any]:
    """Return mean and standard deviation of each channel; None stands for those of the data set."""
    channels = config["input_size"][0]
    return {
        "timm": (tuple(config["mean"]), tuple(config["std"])),
        "data": (None, None),
        "imagenet": IMAGENET,
        "none": ((0.0,) * channels, (1.0,) * channels),
    }[normalize]


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
        name = current_name(name)
        _check_name(libraries.load("timm"), name, load)
    if weights is not None:
        check_file(Path(weights).expanduser())
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


def _load(model: nn.Module, name: str, path: Path, key: str | None) -> None:
    """Load a file of weights, converted as timm converts published files of the model's family."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # timm's name for it
    classifier = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    load_weights(model, name, path, key=key, convert=convert, heads=heads)


def current_name(name: str) -> str:
    """Return timm's current name of a model; old names ("vit_base_patch16_224_in21k") are mapped as timm maps them.

    Raises:
        ConfigError: timm has removed the model.
    """
    renamed: dict[str, str | None] = libraries.load("timm.models").get_deprecated_models()
    if name not in renamed:
        return name
    current = renamed[name]
    if current is None:
        raise ConfigError(f"backbone.name: timm has removed the model {name}")
    warn(f"backbone.name: {name} is an old name of timm's for {current}, which is used")
    return current
