"""Image sizes that a timm model's patches divide: at others it would silently drop a margin of every image."""

import math
from functools import cache
from typing import Any

import torch
from torch import nn

from clrun.system import libraries
from clrun.system.errors import ConfigError


def check_patches(name: str, image_size: int) -> None:
    """Refuse an image size at which a timm model drops pixels at the right and at the bottom.

    Convolutions and unfoldings whose kernel is as large as their stride cut their input into patches, and ignore the
    rows and columns that fill no patch. Models that pad their input first are accepted.

    Args:
        name: a timm model, or a source ("hf-hub:...", "local-dir:...").
        image_size: height and width of the images in pixels.

    Raises:
        ConfigError: the model drops pixels; the message names the two nearest sizes at which it does not.
    """
    side = patch_side(name)
    if image_size % side == 0:
        return
    try:
        cut = patches(name, image_size)
        dropped = any(length % kernel for kernel, length in cut)
    except Exception:  # models say in many ways that they cannot take a size, as a rule because of their patches
        dropped = True
    if dropped:
        below = image_size // side * side
        nearest = f"{below} or {below + side}" if below else f"{side}"
        raise ConfigError(
            f"backbone.image_size: {image_size} is no multiple of {side}, so that {name} would drop a margin of every "
            f"image; set it to {nearest}"
        )


def patch_side(name: str) -> int:
    """Return the number of pixels of which image sizes must be a multiple, so that the model sees all pixels.

    Found at the model's own image size, which its patches divide: a kernel of k on a map that is r times smaller than
    the image needs a multiple of r k.
    """
    model, size = _empty_model(name, None)
    if cut := patches(name, None):
        return math.lcm(*(kernel * round(size / length) for kernel, length in cut))
    return int(_first(getattr(getattr(model, "patch_embed", None), "patch_size", 1)))  # cut by overlapping convolutions


@cache
def patches(name: str, image_size: int | None) -> tuple[tuple[int, int], ...]:
    """Return (kernel, height of the input) of all layers that cut their input into patches, in pixels of that input.

    Args:
        name: the model.
        image_size: height and width of the images; None for the model's own.
    """
    model, size = _empty_model(name, image_size)
    found: list[tuple[int, int]] = []

    def note(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        kernel, stride, padding = (_first(value) for value in (module.kernel_size, module.stride, module.padding))
        if kernel == stride > 1 and padding == 0:
            found.append((kernel, inputs[0].shape[2]))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Unfold):
            module.register_forward_pre_hook(note)
    with torch.no_grad(), torch.device("meta"):
        model(torch.zeros(1, model.pretrained_cfg["input_size"][0], size, size))
    return tuple(found)


def _empty_model(name: str, image_size: int | None) -> tuple[Any, int]:
    """Return a model without memory for its weights, in evaluation mode, and the height of its images."""
    timm = libraries.load("timm")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        options: dict[str, Any] = {"pretrained": False, "num_classes": 0}
        try:
            model = timm.create_model(name, **options, **({} if image_size is None else {"img_size": image_size}))
        except TypeError as error:  # a convolutional network takes images of any size
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, **options)
    return model.eval(), image_size or int(model.pretrained_cfg["input_size"][1])


def _first(value: Any) -> Any:
    """Return the first entry of a tuple, or the value itself."""
    return value[0] if isinstance(value, tuple) else value
