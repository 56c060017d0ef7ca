"""The two small pre-trained models that ship with the package; `glyph_models/` holds their weights and model cards.

Both were made by `scripts/pretrain_glyphs.py`. `glyph_vit` was trained on Latin letters only: on no digit and no other
script. `glyph_clip` was trained on Latin letters and digits, and on their names as text.
"""

from pathlib import Path
from typing import Any

from torch import nn

from clrun.backbones.open_clip import Head, from_folder, load_towers, towers
from clrun.backbones.weights import takes_weights
from clrun.system import libraries

FOLDER = Path(__file__).parent / "glyph_models"
SIZE = 28  # side of the models' input images in pixels
MEAN = (0.2,)  # of the training images, in [0, 1] units
STD = (0.33,)

Shape = tuple[int, int, int]


@takes_weights
def glyph_vit(shape: Shape, *, pretrained: bool) -> nn.Module:
    """Return a tiny timm `VisionTransformer` (0.38 million parameters, 49 patches of 4x4, 4 blocks of width 96).

    Its output is the class token after the last normalisation, [B, 96]. It is a plain timm model, so that code written
    for timm's transformers (prompts, adapters, low-rank updates) works on it. Images of any size are resized to 28x28
    pixels, which 49 patches cover completely.

    Args:
        shape: (C, H, W) of the stored images; the transform converts them to 28x28 pixels, grey.
        pretrained: whether to load the weights that come with the package; false gives random weights.
    """
    model = vision_transformer(patch_drop_rate=0.0)
    if pretrained:
        model.load_state_dict(libraries.load("safetensors.torch").load_file(FOLDER / "glyph_vit.safetensors"))
    model.input_size, model.mean, model.std = (1, SIZE, SIZE), MEAN, STD
    found: nn.Module = model
    return found


def vision_transformer(*, patch_drop_rate: float) -> Any:
    """Return the untrained transformer that both models are made of.

    Args:
        patch_drop_rate: fraction of the patches to drop in training mode, for pre-training.
    """
    return libraries.load("timm.models.vision_transformer").VisionTransformer(
        img_size=SIZE,
        patch_size=4,
        in_chans=1,
        num_classes=0,
        global_pool="token",
        embed_dim=96,
        depth=4,
        num_heads=4,
        mlp_ratio=3.0,
        patch_drop_rate=patch_drop_rate,
        weight_init="jax",  # timm's default is too small for this width
    )


def glyph_clip(
    shape: Shape, *, pretrained: bool, weights: str | None, weights_key: str | None, head: Head
) -> nn.Module:
    """Return the dual encoder as `TwoTowers`: images of 28x28 pixels, grey repeated, and texts of at most 16 tokens.

    The joint space has width 64, the features of the image tower have width 96. The folder of its weights can also be
    opened without clrun: `open_clip.create_model_and_transforms("local-dir:FOLDER")` and, because its vocabulary is its
    own, `open_clip.get_tokenizer("local-dir:FOLDER", bpe_path="FOLDER/merges.txt.gz")`.

    Args:
        shape: (C, H, W) of the stored images; the transform converts them.
        pretrained: whether to load the weights that come with the package; false gives random weights.
        weights: file to load instead, as saved by a run.
        weights_key: where in that file the weights are; None looks for them.
        head: of methods that train a head: "linear", or with the text features of class names as rows ("fixed",
            "live", "init"), see `clrun.learning.names`.
    """
    folder = FOLDER / "glyph_clip"
    model = towers(from_folder(folder), head=head)
    if weights is not None:
        load_towers(model, "glyph_clip", Path(weights).expanduser(), weights_key)
    elif pretrained:
        load_towers(model, "glyph_clip", folder / "open_clip_model.safetensors", None)
    return model
