"""Fonts of the glyph data set and of the shipped models, and how a character of a font becomes a mask.

Every font comes from a Debian 12 package (`apt-get install`, see `python scripts/glyph_fonts.py` for the list) under a
free licence that the package's copyright file states for the font: OFL (SIL Open Font License 1.0 or 1.1), Apache-2.0,
BSD, MIT, Vera (Bitstream Vera), GUST (GUST Font License, an LPPL), M+ (M+, Sazanami and BSD terms of VL
Gothic) and PD (public domain). Where there is a choice of licences, the one named below is taken. Fonts under GPL, LGPL
or Creative Commons terms only, or under unclear ones, are left out; other statements in those copyright files concern
Debian's packaging or build scripts.

Roles of a family: "train" and "test" are the two sides of the data set `glyphs`; "latin" families are used for Latin
letters (and digits) only. The models are pre-trained on Latin letters (and digits) of "train" and "latin" families, so
the "test" families of `glyphs` are new to them as well as its scripts. Families that share a design are on one side.
"""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTCollection, TTFont
from PIL import Image, ImageDraw, ImageFont

CATALOGUE = """
dejavu-core        Vera     train  DejaVu Sans, DejaVu Serif, DejaVu Sans Mono
noto-core          OFL      train  Noto Sans, Noto Serif
open-sans          Apache   train  Open Sans
roboto-unhinted    Apache   train  Roboto, Roboto Condensed
roboto-slab        Apache   train  Roboto Slab
croscore           OFL      train  Arimo, Tinos, Cousine
crosextra-carlito  OFL      train  Carlito
cmu                OFL      train  CMU Serif, CMU Typewriter Text, CMU Bright
ebgaramond-extra   OFL      train  EB Garamond
fantasque-sans     OFL      train  Fantasque Sans Mono
firacode           OFL      train  Fira Code
go                 BSD      train  Go, Go Mono
sil-gentiumplus    OFL      train  Gentium Plus
manrope            OFL      train  Manrope
tuffy              PD       train  Tuffy
play               OFL      train  Play
jura               OFL      train  Jura
stix               OFL      train  STIXGeneral
cantarell          OFL      train  Cantarell
linuxlibertine     OFL      train  Linux Libertine O, Linux Biolinum O
mononoki           OFL      train  mononoki
monofur            OFL      train  monofur
eurofurence        OFL      train  eurofurence
clear-sans         Apache   train  Clear Sans
noto-cjk           OFL      train  Noto Sans CJK JP, Noto Serif CJK JP
mplus              OFL      train  M PLUS 1, M PLUS 2
dotgothic16        OFL      train  DotGothic16
rocknroll          OFL      train  RocknRoll One
klee               OFL      train  Klee One
lxgw-wenkai        OFL      train  LXGW WenKai
sawarabi-mincho    OFL      train  Sawarabi Mincho
motoya-l-cedar     Apache   train  MotoyaLCedar
motoya-l-maruberi  Apache   train  MotoyaLMaru
vlgothic           M+       train  VL PGothic
stick              OFL      train  Stick
kiloji             BSD      train  kiloji
aoyagi-kouzan-t    PD       train  AoyagiKouzanFontT
inter              OFL      test   Inter
vollkorn           OFL      test   Vollkorn
jetbrains-mono     Apache   test   JetBrains Mono
comfortaa          OFL      test   Comfortaa
oldstandard        OFL      test   Old Standard TT
yusei-magic        OFL      test   Yusei Magic
reggae             OFL      test   Reggae One
seto               OFL      test   SetoFont
nanum              OFL      test   NanumMyeongjo
agave              MIT      latin  Agave
allerta            OFL      latin  Allerta
anonymous-pro      OFL      latin  Anonymous Pro
arapey             OFL      latin  Arapey
averia-gwf         OFL      latin  Averia GWF
averia-sans-gwf    OFL      latin  Averia Sans GWF
averia-serif-gwf   OFL      latin  Averia Serif GWF
b612               OFL      latin  B612, B612 Mono
breip              OFL      latin  Breip
bwht               OFL      latin  Because We Build, Because We Connect, Because We Create, Because We Learn
bwht               OFL      latin  Because We Mentor, Because We Organize
cabin              OFL      latin  Cabin
century-catalogue  OFL      latin  Century Catalogue
comic-neue         OFL      latin  Comic Neue
compagnon          OFL      latin  Compagnon
courier-prime      OFL      latin  Courier Prime, Courier Prime Sans
crosextra-caladea  OFL      latin  Caladea
dancingscript      OFL      latin  Dancing Script
dkg-handwriting    OFL      latin  DkgHandwriting
dosis              OFL      latin  Dosis
ecolier-court      OFL      latin  Ecolier_court
essays1743         OFL      latin  Essays1743
fanwood            MIT      latin  Fanwood
gnutypewriter      OFL      latin  GNUTypewriter
goudybookletter    PD       latin  Goudy Bookletter 1911
hack               Vera     latin  Hack
havana             OFL      latin  Havana
humor-sans         OFL      latin  Humor Sans
inconsolata        OFL      latin  Inconsolata
junction           OFL      latin  Junction
junicode           OFL      latin  Junicode Two Beta
karla              OFL      latin  Karla
katex              MIT      latin  KaTeX_Main, KaTeX_SansSerif
kaushanscript      OFL      latin  Kaushan Script
klaudia-berenika   OFL      latin  Berenika, Klaudia
kristi             OFL      latin  Kristi
lato               OFL      latin  Lato
league-mono        OFL      latin  League Mono
league-spartan     OFL      latin  League Spartan
leckerli-one       OFL      latin  Leckerli One
lemonada           OFL      latin  Lemonada
liberation2        OFL      latin  Liberation Mono, Liberation Sans, Liberation Serif
lindenhill         MIT      latin  Linden Hill
lmodern            GUST     latin  Latin Modern Mono, Latin Modern Roman, Latin Modern Sans
lobstertwo         OFL      latin  Lobster Two
monoid             OFL      latin  Monoid
national-park      OFL      latin  National Park
okolaks            OFL      latin  okolaks
opendin            OFL      latin  OSP-DIN
oxygen             OFL      latin  Oxygen-Sans
prociono           PD       latin  Prociono
quattrocento       OFL      latin  Quattrocento
quicksand          OFL      latin  Quicksand, Quicksand Light, Quicksand Medium
radisnoir          OFL      latin  Radis Sans
routed-gothic      OFL      latin  Routed Gothic, Routed Gothic Narrow, Routed Gothic Wide
sil-andika         OFL      latin  Andika
sil-charis         OFL      latin  Charis SIL
sil-galatia        OFL      latin  Galatia SIL
smc-chilanka       OFL      latin  Chilanka
smc-manjari        OFL      latin  Manjari
sora               OFL      latin  Sora
texgyre            GUST     latin  TeX Gyre Adventor, TeX Gyre Bonum, TeX Gyre Chorus, TeX Gyre Cursor, TeX Gyre Heros
texgyre            GUST     latin  TeX Gyre Heros Cn, TeX Gyre Pagella, TeX Gyre Schola
triod-postnaja     OFL      latin  TriodPostnaja
yanone-kaffeesatz  OFL      latin  Yanone Kaffeesatz
yrsa-rasa          OFL      latin  Yrsa
"""
HANDWRITTEN = [
    "Because We Build",
    "Because We Connect",
    "Because We Create",
    "Because We Learn",
    "Because We Mentor",
    "Because We Organize",
    "Breip",
    "Comic Neue",
    "Chilanka",
    "Dancing Script",
    "DkgHandwriting",
    "Ecolier_court",
    "Humor Sans",
    "Kaushan Script",
    "Klee One",
    "Kristi",
    "LXGW WenKai",
    "Leckerli One",
    "AoyagiKouzanFontT",
    "kiloji",
]
STYLES = 6  # faces of a family at most, spread evenly over its sorted files
CANVAS = 64  # side of a mask in pixels; the longer side of the drawn character touches the margin
MARGIN = 4
SLACK = 96  # font size at which a character is drawn before it is scaled to the canvas


@dataclass(frozen=True)
class Face:
    """One font file of a family."""

    family: str
    package: str
    licence: str
    role: str
    path: str
    characters: frozenset[str]


def entries() -> list[tuple[str, str, str, str]]:
    """Return (family, Debian package, licence, role) of every family, in the order of the catalogue."""
    rows = []
    for line in CATALOGUE.strip().splitlines():
        package, licence, role, families = re.split(r"\s+", line, maxsplit=3)
        rows += [(family, f"fonts-{package}", licence, role) for family in families.split(", ")]
    return rows


def faces(roles: Sequence[str]) -> list[Face]:
    """Return the font files of all families of these roles: at most `STYLES` a family.

    Raises:
        SystemExit: a package is not installed, or does not hold a family.
    """
    found = []
    for family, package, licence, role in entries():
        if role not in roles:
            continue
        own = [(path, covered) for path, name, covered in _files(package) if name == family]
        if not own:
            raise SystemExit(f"{package}: no font of the family '{family}'; run apt-get install {' '.join(packages())}")
        keep = [own[round(k * (len(own) - 1) / (STYLES - 1))] for k in range(STYLES)] if len(own) > STYLES else own
        found += [Face(family, package, licence, role, path, covered) for path, covered in keep]
    return found


def packages() -> list[str]:
    """Return the Debian packages of the catalogue."""
    return list(dict.fromkeys(package for _, package, _, _ in entries()))


@cache
def _files(package: str) -> list[tuple[str, str, frozenset[str]]]:
    """Return (path, family, characters) of the font files of a package, one per distinct style, sorted by path."""
    listing = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False).stdout
    rows, styles = [], set()
    for path in sorted({str(Path(line).resolve()) for line in listing.splitlines() if _is_font(line)}):
        font = TTCollection(path, lazy=True).fonts[0] if path.endswith(".ttc") else TTFont(path, lazy=True)
        names = font["name"]
        family = names.getDebugName(16) or names.getDebugName(1)
        style = names.getDebugName(17) or names.getDebugName(2)
        if (family, style) not in styles:  # the same face as .otf and .ttf counts once
            styles.add((family, style))
            rows.append((path, family, frozenset(map(chr, font.getBestCmap() or {}))))
    return rows


def _is_font(path: str) -> bool:
    """Return whether a path of a package is a font file that exists."""
    return bool(re.search(r"\.(ttf|otf|ttc)$", path, re.IGNORECASE)) and Path(path).exists()


@cache
def _opened(path: str) -> ImageFont.FreeTypeFont:
    """Return a font opened at the drawing size, without the layout engine's ligatures."""
    return ImageFont.truetype(path, SLACK, layout_engine=ImageFont.Layout.BASIC)


def mask(face: Face, character: str) -> np.ndarray | None:
    """Return a character as [CANVAS, CANVAS] uint8, white on black, centred; None where the font has no ink for it.

    The longer side of the bounding box becomes CANVAS - 2 * MARGIN pixels, so that size carries no information.
    """
    if character not in face.characters:
        return None
    drawn = Image.new("L", (4 * SLACK, 4 * SLACK), 0)
    ImageDraw.Draw(drawn).text((SLACK, SLACK), character, font=_opened(face.path), fill=255)
    box = drawn.getbbox()
    if box is None:
        return None
    ink = drawn.crop(box)
    scale = (CANVAS - 2 * MARGIN) / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    canvas = Image.new("L", (CANVAS, CANVAS), 0)
    canvas.paste(
        ink.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR),
        ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2),
    )
    return np.asarray(canvas)


if __name__ == "__main__":
    print("apt-get install --no-install-recommends", " ".join(packages()))
