"""Pre-train the two small models that ship with the package, on characters of freely licensed fonts, on the CPU.

    python scripts/pretrain_glyphs.py glyph_vit  --work DIR     # Latin letters only
    python scripts/pretrain_glyphs.py glyph_clip --work DIR     # starts from glyph_vit; letters, digits and captions
    python scripts/measure_glyphs.py                            # numbers of both, written into the model cards

Needs the Debian packages of `scripts/glyph_fonts.py` (licences there); glyph_clip also needs the package
open_clip_torch. Training resumes from the checkpoint in DIR, which is written every minute. Every random number is
keyed by (seed, step), so an interrupted run ends in the weights of an uninterrupted one, on the same machine and with
the same versions.

Data. No stored image is used: each training image is a character of a random family (handwriting-like families more
often), style and letter, as a white mask, thickened or thinned, put through a random affine and a smooth elastic warp,
and averaged down to 28x28. Two thirds then lose resolution: they are averaged to a grid of 7 to 14 pixels a side, half
of these to 8x8 with the character filling the frame, and enlarged again bilinearly, as `clrun.data.transforms` does
with 8x8 images. Contrast, blur and noise vary. Capitals and small letters of one shape share a class.

glyph_vit learns to tell the classes apart by a softmax over cosines, so that class means of features make sense. Half
of the patches are dropped in the first 90 % of the steps (as Li et al., FLIP, CVPR 2023), which doubles the speed.
Shipped are the exponential moving averages of the weights, in half precision.

glyph_clip is an `open_clip.CLIP`. Its image tower starts from glyph_vit's weights; image and text towers are then
trained together: each image must find the caption of its class among one random caption of every class (a plain
in-batch loss would call captions of the same class wrong). 49,408 tokens do not fit in 1 MB, so the folder has its own
vocabulary, a merge list of byte pairs for open_clip's own tokenizer that covers the words of the captions whole and
any other text by bytes: open_clip.get_tokenizer("local-dir:FOLDER", bpe_path="FOLDER/merges.txt.gz").
"""

import argparse
import gzip
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from glyph_fonts import CANVAS, HANDWRITTEN, MARGIN, faces, mask
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clrun.backbones.glyph import FOLDER, MEAN, SIZE, STD, vision_transformer
from clrun.system import libraries
from clrun.system.seeding import seed_all

MERGED = ("cC", "kK", "oO", "pP", "sS", "uU", "vV", "wW", "xX", "zZ", "lI")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "image of {}",
    "image of a {}",
    "a photo of {}",
    "a photo of a {}",
    "a picture of the {}",
    "a drawing of a {}",
    "written {}",
    "a handwritten {}",
    "a printed {}",
    "a blurry {}",
)
TOWER_NAMES = {  # of timm and of open_clip
    ".blocks.": ".transformer.resblocks.",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".attn.in_proj_",
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".norm.": ".ln_post.",
}
BATCH = 64
DROPPED = 0.9  # share of the steps that train with half of the patches
HAND_WEIGHT = 3.0  # how much more often a handwriting-like family is drawn
BANK = 48  # side of the stored masks


@dataclass(frozen=True)
class Recipe:
    """What differs between the two models."""

    digits: bool
    steps: int
    rate: float
    warmup: int
    seed: int


RECIPES = {
    "glyph_vit": Recipe(digits=False, steps=11000, rate=1.5e-3, warmup=400, seed=1),
    "glyph_clip": Recipe(digits=True, steps=6000, rate=1e-3, warmup=200, seed=2),
}


# --- characters and their names


def classes(digits: bool) -> list[str]:
    """Return the classes, each as the string of its characters."""
    letters = [chr(code) for start in (65, 97) for code in range(start, start + 26)]
    alone = [letter for letter in letters if not any(letter in pair for pair in MERGED)]
    return [*MERGED, *alone, *("0123456789" if digits else "")]


def names(characters: str) -> list[str]:
    """Return the names of a class, as they stand in captions."""
    if characters.isdigit():
        number, word = characters, DIGITS[int(characters)]
        return [number, word, f"digit {number}", f"digit {word}", f"number {number}", f"number {word}"]
    found = []
    for letter in characters:
        case = ("capital", "uppercase") if letter.isupper() else ("small", "lowercase")
        found += [
            f"{case[0]} {letter}",
            f"{case[0]} letter {letter}",
            f"{case[1]} {letter}",
            f"{case[1]} letter {letter}",
        ]
    if len(characters) == 2 and characters[0] == characters[1].lower():
        found += [f"letter {characters[0]}"] * 4
    return [name.lower() for name in found]


class Bank:
    """Masks of all characters in all faces, drawn once and kept in `work`, and a sampler over them."""

    def __init__(self, work: Path, digits: bool) -> None:
        path = work / "bank.npz"
        if not path.exists():
            np.savez(path, **_draw_bank())
        stored = np.load(path)
        self.masks = torch.from_numpy(stored["masks"])
        labels = {c: k for k, characters in enumerate(classes(digits)) for c in characters}
        weight = np.zeros(len(self.masks))
        self.label = torch.zeros(len(self.masks), dtype=torch.long)
        count = Counter(zip(stored["family"].tolist(), stored["character"].tolist(), strict=True))
        for row, (family, character) in enumerate(
            zip(stored["family"].tolist(), stored["character"].tolist(), strict=True)
        ):
            if character in labels:
                self.label[row] = labels[character]
                hand = HAND_WEIGHT if family in HANDWRITTEN else 1.0
                shared = sum(c in labels for c in classes(digits)[labels[character]])
                weight[row] = hand / count[family, character] / shared
        self.cumulative = torch.from_numpy(np.cumsum(weight / weight.sum()))

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Return masks [B, 1, BANK, BANK] in [0, 1] and labels [B], from the global generator."""
        rows = torch.searchsorted(self.cumulative, torch.rand(count, dtype=torch.float64)).clamp(
            max=len(self.label) - 1
        )
        return self.masks[rows].float().div_(255).unsqueeze(1), self.label[rows]


def _draw_bank() -> dict[str, Any]:
    """Return masks [N, BANK, BANK], and family and character of each, of the families allowed for pre-training."""
    masks, family, character = [], [], []
    for face in faces(["train", "latin"]):
        drawn = {c: mask(face, c) for c in "".join(classes(digits=True))}
        small = {c: _shrink(image) for c, image in drawn.items() if image is not None}
        capitals = _capitals_only(small)
        for c, image in small.items():
            if not (capitals and c.islower()):
                masks.append(image)
                family.append(face.family)
                character.append(c)
    return {"masks": np.stack(masks), "family": np.array(family), "character": np.array(character)}


def _shrink(image: np.ndarray) -> np.ndarray:
    """Return a mask [CANVAS, CANVAS] as [BANK, BANK] uint8."""
    values = F.interpolate(torch.from_numpy(image.copy()).float()[None, None], BANK, mode="bilinear", antialias=True)
    return values[0, 0].round().byte().numpy()


def _capitals_only(small: dict[str, np.ndarray]) -> bool:
    """Return whether a face draws small letters as capitals."""
    pairs = [
        (small[c].astype(float), small[c.upper()].astype(float)) for c in "abdeghnqr" if {c, c.upper()} <= small.keys()
    ]
    alike = [float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())) for a, b in pairs]
    return bool(alike) and float(np.median(alike)) > 0.8


# --- images


def render(masks: Tensor) -> Tensor:
    """Return training images [B, 1, SIZE, SIZE] in [0, 1] of masks [B, 1, BANK, BANK]; global generator."""
    count = len(masks)
    coarse = torch.rand(count, 1, 1, 1) < 1 / 3  # will become 8x8 with the character filling the frame
    x = warp(stroke(masks), fill=coarse.flatten())
    low = _through(x, int(torch.randint(7, 15, ())))
    counts = F.interpolate(x, 8, mode="area")
    counts = (counts / counts.amax(dim=(2, 3), keepdim=True).clamp(min=0.4)).mul(16).round().div(16)
    eight = F.interpolate(counts, SIZE, mode="bilinear")
    x = torch.where(coarse, eight, torch.where(torch.rand(count, 1, 1, 1) < 0.5, low, x))
    blurred = F.avg_pool2d(x, 3, 1, 1)
    x = torch.lerp(x, blurred, torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.3))
    x = x * torch.empty(count, 1, 1, 1).uniform_(0.75, 1.5)
    x = x + torch.randn_like(x) * 0.08 * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.3)
    return x.clamp_(0, 1)


def _through(x: Tensor, side: int) -> Tensor:
    """Return images averaged to `side` pixels a side and enlarged again."""
    return F.interpolate(F.interpolate(x, side, mode="area"), SIZE, mode="bilinear")


def stroke(masks: Tensor) -> Tensor:
    """Return masks with strokes made thicker (half of them) or thinner (some, unless they would break)."""
    kind = torch.rand(len(masks), 1, 1, 1)
    thin = -F.max_pool2d(-masks, 3, 1, 1)
    kept = thin.sum(dim=(2, 3), keepdim=True) > 0.35 * masks.sum(dim=(2, 3), keepdim=True)
    x = torch.where(kind < 0.3, F.max_pool2d(masks, 3, 1, 1), masks)
    x = torch.where((kind >= 0.3) & (kind < 0.5), F.max_pool2d(masks, 5, 1, 2), x)
    return torch.where((kind > 0.85) & kept, thin, x)


def warp(masks: Tensor, *, fill: Tensor) -> Tensor:
    """Return [B, 1, SIZE, SIZE]: masks under a random affine and elastic map; `fill` [B] asks for a full frame."""
    count = len(masks)
    angle = torch.randn(count).mul(0.17).clamp(-0.45, 0.45)
    shear = torch.randn(count).mul(0.2).clamp(-0.5, 0.5)
    extent = torch.where(fill, torch.empty(count).uniform_(0.92, 1.05), torch.empty(count).uniform_(0.55, 1.0))
    narrow = torch.where(fill, torch.randn(count).mul(0.2).add(0.15), torch.randn(count).mul(0.2)).exp()
    unit = (CANVAS - 2 * MARGIN) / CANVAS / extent
    cos, sin = angle.cos(), angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    skew = torch.eye(2).repeat(count, 1, 1)
    skew[:, 0, 1] = shear
    scale = torch.diag_embed(torch.stack([unit * narrow, unit], 1))
    reach = torch.where(fill, 0.06, 0.16)[:, None]
    shift = torch.empty(count, 2).uniform_(-1, 1) * reach
    theta = torch.cat([scale @ skew @ linear, shift[:, :, None]], dim=2)
    grid = F.affine_grid(theta, [count, 1, 2 * SIZE, 2 * SIZE], align_corners=False)
    bumps = torch.randn(count, 2, 4, 4) * torch.rand(count, 1, 1, 1) * 0.13
    grid = grid + F.interpolate(bumps, 2 * SIZE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.avg_pool2d(F.grid_sample(masks, grid, align_corners=False), 2)


def normalised(x: Tensor) -> Tensor:
    """Return images as the models are fed."""
    return (x - MEAN[0]) / STD[0]


# --- models: each maps normalised images and labels to a loss


class Classifier(nn.Module):
    """glyph_vit under training: the transformer and a cosine classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = vision_transformer(patch_drop_rate=0.5)
        self.weight = nn.Parameter(torch.randn(num_classes, self.model.num_features) * 0.1)
        self.scale = nn.Parameter(torch.tensor(math.log(12.0)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss."""
        cosines = F.normalize(self.model(x), dim=1) @ F.normalize(self.weight, dim=1).T
        return F.cross_entropy(self.scale.exp().clamp(max=24) * cosines, y, label_smoothing=0.1)

    def patches(self, drop: bool) -> None:
        """Set whether half of the patches are dropped."""
        self.model.patch_drop.train(drop)


class Captioner(nn.Module):
    """glyph_clip under training: an open_clip model and the tokens of all captions of each class."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        groups = [[template.format(name) for name in names(c) for template in TEMPLATES] for c in classes(digits=True)]
        _prepare(folder, [caption for group in groups for caption in group])
        open_clip = libraries.load("open_clip")
        name = f"local-dir:{folder}"
        self.model = open_clip.create_model(name, load_weights=False, force_patch_dropout=0.5)
        tokenizer = open_clip.get_tokenizer(name, bpe_path=str(folder / "merges.txt.gz"))
        self.tokens = [tokenizer(group) for group in groups]
        copy_image_tower(load_file(FOLDER / "glyph_vit.safetensors"), self.model.visual)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean of the loss of images among captions and the loss of captions among images."""
        captions = torch.stack([tokens[torch.randint(len(tokens), ())] for tokens in self.tokens])
        images = self.model.encode_image(x.expand(-1, 3, -1, -1), normalize=True)
        texts = self.model.encode_text(captions, normalize=True)
        logits = self.model.logit_scale.exp().clamp(max=24) * images @ texts.T
        mine = F.one_hot(y, len(captions)).float()
        present = mine.sum(dim=0) > 0
        targets = (mine / mine.sum(dim=0).clamp(min=1))[:, present]
        return 0.5 * (
            F.cross_entropy(logits, y, label_smoothing=0.1) + F.cross_entropy(logits[:, present].T, targets.T)
        )

    def patches(self, drop: bool) -> None:
        """Set whether half of the patches are dropped."""
        self.model.visual.patch_dropout.train(drop)


def _prepare(folder: Path, captions: list[str]) -> None:
    """Write open_clip's configuration and the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = byte_pairs(captions)
    text = "\n".join(["#version: 1", *(" ".join(pair) for pair in merges)])
    (folder / "merges.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    norm = {"eps": 1e-6}  # timm's
    vision = {"image_size": SIZE, "patch_size": 4, "width": 96, "layers": 4, "head_width": 24, "mlp_ratio": 3.0}
    vision |= {"no_ln_pre": True, "norm_kwargs": norm}
    words = {"context_length": 16, "vocab_size": 512 + len(merges) + 2, "width": 32, "heads": 2, "layers": 2}
    config = {
        "model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": words},
        "preprocess_cfg": {"mean": MEAN * 3, "std": STD * 3, "interpolation": "bilinear", "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def byte_pairs(captions: list[str]) -> list[tuple[str, str]]:
    """Return the merges after which every word of the captions is one token, most frequent pair first."""
    counts = Counter(word for caption in captions for word in caption.split())
    words = {(*word[:-1], f"{word[-1]}</w>"): count for word, count in counts.items()}
    merges = []
    while any(len(parts) > 1 for parts in words):
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, count in words.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {_merged(parts, best): count for parts, count in words.items()}
    return merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Return a word with each occurrence of a pair joined."""
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return tuple(found)


def copy_image_tower(weights: dict[str, Tensor], visual: nn.Module) -> None:
    """Copy glyph_vit into open_clip's transformer: the same function, but for its projection to the joint space.

    open_clip takes three channels, which are equal here, and has no bias in the patch embedding, which moves into the
    position embeddings of the patches.
    """
    weights = {key: value.float() for key, value in weights.items()}
    position = weights["pos_embed"][0].clone()
    position[1:] += weights["patch_embed.proj.bias"]
    state = {
        "class_embedding": weights["cls_token"][0, 0],
        "positional_embedding": position,
        "conv1.weight": weights["patch_embed.proj.weight"].repeat(1, 3, 1, 1) / 3,
        "proj": visual.proj.detach(),
    }
    for key, value in weights.items():
        if key.startswith(("blocks.", "norm.")):
            name = f".{key}"
            for ours, theirs in TOWER_NAMES.items():
                name = name.replace(ours, theirs)
            state[name[1:]] = value
    visual.load_state_dict(state)


# --- the loop


def train(net: nn.Module, bank: Bank, recipe: Recipe, work: Path, name: str) -> tuple[dict[str, Tensor], float]:
    """Return the averaged weights of `net.model` and the CPU seconds spent, resuming from `work`."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
    average = {key: value.clone() for key, value in net.model.state_dict().items()}
    first, spent = _resume(work / f"{name}.pt", net, optimizer, average)
    begun, saved = time.process_time(), time.monotonic()
    running = 0.0
    for step in range(first, recipe.steps):
        seed_all(recipe.seed, name, step)
        net.train()
        net.patches(step < DROPPED * recipe.steps)
        masks, labels = bank.sample(BATCH)
        loss = net(normalised(render(masks)), labels)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _schedule(step, recipe)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        for key, value in net.model.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        running += loss.item()
        cpu = spent + time.process_time() - begun
        if (step + 1) % 100 == 0:
            print(f"{name} step {step + 1} loss {running / 100:.3f} CPU minutes {cpu / 60:.1f}", flush=True)
            running = 0.0
        if time.monotonic() - saved > 60 or step + 1 == recipe.steps:
            saved = time.monotonic()
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save({**state, "step": step + 1, "cpu": cpu}, work / "partial")
            (work / "partial").replace(work / f"{name}.pt")
    return average, spent + time.process_time() - begun


def _resume(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
) -> tuple[int, float]:
    """Load a checkpoint if there is one; return the next step and the CPU seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    stored = torch.load(path, weights_only=True)
    net.load_state_dict(stored["net"])
    optimizer.load_state_dict(stored["optimizer"])
    average.update(stored["average"])
    return stored["step"], stored["cpu"]


def _schedule(step: int, recipe: Recipe) -> float:
    """Return the factor of the learning rate: linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup))


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train a shipped model.")
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--work", type=Path, required=True, help="folder for drawn characters and checkpoints")
    parser.add_argument("--preview", action="store_true", help="only write a picture of training images")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    recipe = RECIPES[options.model]
    bank = Bank(options.work, recipe.digits)
    seed_all(recipe.seed, options.model, "init")
    if options.preview:
        from PIL import Image

        x = render(bank.sample(400)[0]).view(20, 20, SIZE, SIZE).permute(0, 2, 1, 3).reshape(20 * SIZE, 20 * SIZE)
        Image.fromarray(x.mul(255).byte().numpy()).save(options.work / "preview.png")
        return
    if options.model == "glyph_vit":
        net, target = Classifier(len(classes(recipe.digits))), FOLDER / "glyph_vit.safetensors"
    else:
        net, target = Captioner(FOLDER / "glyph_clip"), FOLDER / "glyph_clip" / "open_clip_model.safetensors"
    average, seconds = train(net, bank, recipe, options.work, options.model)
    save_file({key: value.half().contiguous() for key, value in average.items()}, target)
    target.chmod(0o644)  # safetensors writes private files
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB, {seconds / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
