"""Build the data set `glyphs`: rendered Greek, Cyrillic and kana characters, packed into the package.

    python scripts/make_glyphs.py            # writes clrun/data/assets/glyphs.npz
    python scripts/make_glyphs.py --check    # rebuilds it and compares byte for byte
    python scripts/make_glyphs.py --audit    # prints the closest pairs of the look-alike measurement

Needs Debian 12's font packages (`python scripts/glyph_fonts.py` prints the install line; licences are listed there),
Pillow with FreeType, fontTools and NumPy. The bytes are those of the versions stored under "made_with" in the file.

Classes. The candidates below are already curated: capitals and small letters of one shape count once (Φ and φ, Ψ and
ψ), of characters shared by two scripts one is kept (Φ and Ф, か and カ, き and キ, せ and セ, も and モ, や and ヤ),
and so is one of characters that a small stroke sets apart (Ш of Ш Щ, И of И Й, ウ of ウ ワ ク, ヌ of ヌ ス メ, ぬ of
ぬ め, シ of シ ツ ソ ン). Shapes of Latin letters, their mirror images and digits are out (А В Е К М Н О Р С Т Х, З
and ろ = 3, Ч = 4, ち and ら = 5, б = 6, Ь and Ъ = b, δ = 6, α = a, ω = w, し = L, ナ = t, ヨ = E, の, ニ, ロ, エ, コ,
...); Э and Я differ from their mirror images and stay. What is left is then measured: the resemblance of two
characters is the mean over fonts of the cosine similarity of their blurred 16x16 images drawn by the same font, at
the best of nine shifts. A candidate that resembles a Latin letter, a digit or an earlier candidate by more than
`LIMIT`, just below what C and G do (0.885; E and F 0.904, c and C 0.937), is dropped. --audit prints the measurement:
it drops Γ (F), Θ (O), Λ (A), Б (B), Є (C), ...

Images. 28x28 uint8, white on black. Each is one character of one font file, under a random rotation, shear, scale,
aspect and shift, drawn from a seed that depends on part, class and number alone. Training and test images come from
different font families, evenly over the families that have the character and over the styles of a family. How far the
maps reach was set once, by a look at raw pixels only: their class means find 42 % of the test images, which leaves room
above. The file was fixed before any model of `scripts/pretrain_glyphs.py` was trained.
"""

import argparse
import io
import json
import math
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import PIL
from glyph_fonts import CANVAS, Face, faces, mask
from PIL import Image, ImageFilter, features

OUT = Path(__file__).parents[1] / "clrun" / "data" / "assets" / "glyphs.npz"
CANDIDATES = {
    "greek": "ΓΔΘΛΞΠΣΦΨΩζλμξπ",
    "cyrillic": "БДЖИЛЦШЫЭЮЯЉЊЂЄ",
    "kana": "あうえおかきけさすせそたてなにぬねはひふほまみむもやゆよるれわんアウオケサシタチヌネハヒホマミムユル",
}
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
SIZE = 28
TRAIN, TEST = 80, 25  # images of a class
LIMIT = 0.88
SEED = 2024


def resemblance(fonts: list[Face], characters: str) -> np.ndarray:
    """Return [K, K], the mean similarity of two characters over the fonts that have both (0 where none has)."""
    total = np.zeros((len(characters), len(characters)))
    count = np.zeros_like(total)
    for font in fonts:
        drawn = [mask(font, character) for character in characters]
        have = [k for k, image in enumerate(drawn) if image is not None]
        plain = np.stack([_blurred(drawn[k], 0, 0).ravel() for k in have])
        best = np.full((len(have), len(have)), -1.0)
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                moved = np.stack([_blurred(drawn[k], dx, dy).ravel() for k in have])
                best = np.maximum(best, plain @ moved.T)
        grid = np.ix_(have, have)
        total[grid] += np.maximum(best, best.T)
        count[grid] += 1
    return total / np.maximum(count, 1)


def _blurred(image: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Return a mask as a 16x16 image of unit norm, blurred and shifted by 16ths."""
    small = Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)).resize((16, 16), Image.Resampling.BOX)
    values = np.roll(np.asarray(small, dtype=float), (dy, dx), axis=(0, 1))
    return values / np.linalg.norm(values)


def choose(fonts: list[Face]) -> tuple[list[str], np.ndarray, str]:
    """Return the classes, and the similarity matrix with its characters (Latin first, then all candidates)."""
    characters = LATIN + "".join(CANDIDATES.values())
    similarity = resemblance(fonts, characters)
    kept = list(range(len(LATIN)))
    for k in range(len(LATIN), len(characters)):
        if similarity[k, kept].max() <= LIMIT:
            kept.append(k)
    return [characters[k] for k in kept[len(LATIN) :]], similarity, characters


def audit(classes: list[str], similarity: np.ndarray, characters: str) -> None:
    """Print what was dropped and why, and the closest pairs that remain."""
    index = {character: k for k, character in enumerate(characters)}
    for pair in ("OQ", "EF", "cC", "O0", "l1", "CG", "hn", "VY"):
        print(f"for scale: {pair[0]} {pair[1]} {similarity[index[pair[0]], index[pair[1]]]:.3f}")
    allowed = [index[c] for c in LATIN] + [index[c] for c in classes]
    for character in "".join(CANDIDATES.values()):
        others = [k for k in allowed if k != index[character]]
        nearest = max(others, key=lambda k: similarity[index[character], k])
        state = "kept" if character in classes else "dropped"
        print(f"{state} {character}: nearest {characters[nearest]} {similarity[index[character], nearest]:.3f}")


def draw(face: Face, character: str, rng: np.random.RandomState) -> np.ndarray:
    """Return one image [SIZE, SIZE] uint8 under a random affine map."""
    angle, shear = math.radians(rng.uniform(-20, 20)), rng.uniform(-0.2, 0.2)
    longest = rng.uniform(16, 25)  # pixels of the longer side of the upright character
    aspect = math.exp(rng.uniform(-0.18, 0.18))
    shift = rng.uniform(-2, 2, size=2)
    image = Image.fromarray(mask(face, character))
    scale = longest / (CANVAS - 8)
    linear = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = linear @ np.array([[1, shear], [0, 1]]) @ np.diag([scale * aspect, scale / aspect])
    fine = 3 * SIZE  # drawn three times as large, then averaged: antialiasing
    inverse = np.linalg.inv(3 * linear)
    offset = CANVAS / 2 - inverse @ (fine / 2 + 3 * shift)
    matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
    warped = image.transform((fine, fine), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(warped.resize((SIZE, SIZE), Image.Resampling.BOX))


def render(fonts: list[Face], classes: list[str], count: int, part: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return images [C * count, SIZE, SIZE], the family number of each and the family names."""
    families = list(dict.fromkeys(face.family for face in fonts))
    images, origin = [], []
    for label, character in enumerate(classes):
        able = {name: [f for f in fonts if f.family == name and _draws(f, character)] for name in families}
        able = {name: styles for name, styles in able.items() if styles}
        order = np.random.RandomState([SEED, part, label]).permutation(list(able))
        for number in range(count):
            rng = np.random.RandomState([SEED, part, label, number])
            name = str(order[number % len(order)])
            styles = able[name]
            face = styles[(number // len(order) + label) % len(styles)]
            images.append(draw(face, character, rng))
            origin.append(families.index(name))
    return np.stack(images), np.array(origin, dtype=np.uint8), families


def _draws(face: Face, character: str) -> bool:
    """Return whether a font has ink for a character."""
    return mask(face, character) is not None


def build() -> tuple[bytes, tuple[list[str], np.ndarray, str]]:
    """Return the packed file and the outcome of the look-alike measurement."""
    train_fonts, test_fonts = faces(["train"]), faces(["test"])
    classes, similarity, characters = choose(train_fonts)
    train, train_family, train_names = render(train_fonts, classes, TRAIN, 0)
    test, test_family, test_names = render(test_fonts, classes, TEST, 1)
    facts = {
        "characters": classes,
        "classes": [unicodedata.name(c).replace("LETTER ", "").lower() for c in classes],
        "train_families": train_names,
        "test_families": test_names,
        "seed": SEED,
        "made_with": {
            "pillow": PIL.__version__,
            "freetype": features.version("freetype2"),
            "numpy": np.__version__,
            "python": ".".join(map(str, sys.version_info[:2])),
        },
    }
    arrays = {
        "train": train,
        "test": test,
        "train_family": train_family,
        "test_family": test_family,
        "facts": np.frombuffer(json.dumps(facts, ensure_ascii=False).encode(), dtype=np.uint8),
    }
    return pack(arrays), (classes, similarity, characters)


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Return arrays as an .npz file without time stamps, compressed by LZMA (smaller than NumPy's own deflate)."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_LZMA
            archive.writestr(info, member.getvalue())
    return packed.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the data set `glyphs`.")
    parser.add_argument("--check", action="store_true", help="rebuild and compare with the stored file byte for byte")
    parser.add_argument("--audit", action="store_true", help="print the look-alike measurement only")
    options = parser.parse_args()
    if options.audit:
        audit(*choose(faces(["train"])))
        return
    data, (classes, _, _) = build()
    if options.check:
        same = OUT.read_bytes() == data
        print(f"{OUT.name}: {'identical' if same else 'DIFFERENT'}")
        sys.exit(not same)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(data)
    print(f"{OUT}: {len(classes)} classes, {len(data) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
