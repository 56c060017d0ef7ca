"""Captions of classes: the name of each class in words, put into the templates of its data set.

They are the text side of methods that compare images with texts (`clrun.backbones.two_towers`). Name and templates
belong to the class id, so that they come along in every task order.

Templates and the words in `WORDS`: CLIP's (Radford et al. 2021, `data/prompts.md` of its repository), with which both
were compared. Templates of ImageNet and its variants are the seven that its notebook recommends; those of CIFAR-100
and ImageNet-R are PROOF's, too. CUB-200 is not in CLIP's list and has the template of Birdsnap; a data set without an
entry has `PLAIN`. Those of `digits` and `glyphs` are captions of glyph_clip. CLIP's own names of the 1000 classes of
ImageNet are not here: ids of WordNet get their first lemma, unless `dataset.class_names` names a file.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from clrun.system import libraries
from clrun.system.errors import ConfigError, first_line

PLAIN = ("a photo of a {}.",)
BOTH = ("a photo of a {}.", "a photo of the {}.")
SEEN = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
CIFAR = tuple(
    f"a {look}photo of {size}."
    for article in ("a", "the")
    for look, size in [
        *((look, f"{article} {{}}") for look in SEEN),
        ("", f"{article} small {{}}"),
        ("", f"{article} big {{}}"),
    ]
)
IMAGENET = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
NUMBER = ('a photo of the number: "{}".',)
FORMS: tuple[str, ...] = (
    "a photo of",
    "a painting of",
    "a plastic",
    "a sculpture of",
    "a sketch of",
    "a tattoo of",
    "a toy",
    "a rendition of",
)
FORMS += ("a embroidered", "a cartoon", "a {} in a video game", "a plushie", "a origami", "art of", "graffiti of")
FORMS += ("a drawing of", "a doodle of")


def _depicted(article: str) -> Iterator[str]:
    """Yield CLIP's templates of Caltech-101 with one article: "a toy {}." and "the toy {}.", "art of a {}."."""
    for form in FORMS:
        if form.endswith(" of"):
            yield f"{form} {article} {{}}."
        else:
            own = form.replace("a ", f"{article} ", 1)
            yield f"{own}." if "{}" in own else f"{own} {{}}."


CHARACTER = ("{}", "a {}", "image of {}", "a photo of {}", "a drawing of a {}", "written {}", "a handwritten {}")
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "caltech101": (*_depicted("a"), *_depicted("the")),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "digits": CHARACTER,
    "dtd": tuple(
        f"a photo of {article} {{}} {kind}."
        for article in ("a", "the")
        for kind in ("texture", "pattern", "thing", "object")
    ),
    "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "cub200": ("a photo of a {}, a type of bird.",),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "food101": ("a photo of {}, a type of food.",),
    "glyphs": CHARACTER,
    "gtsrb": tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")),
    "imagenet": IMAGENET,
    "imagenet_a": IMAGENET,
    "imagenet_r": IMAGENET,
    "mnist": NUMBER,
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "stanford_cars": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "stl10": BOTH,
    "sun397": BOTH,
    "tiny_imagenet": IMAGENET,
}
SIGNS = (
    "red and white circle 20 kph speed limit",
    "red and white circle 30 kph speed limit",
    "red and white circle 50 kph speed limit",
    "red and white circle 60 kph speed limit",
    "red and white circle 70 kph speed limit",
    "red and white circle 80 kph speed limit",
    "end / de-restriction of 80 kph speed limit",
    "red and white circle 100 kph speed limit",
    "red and white circle 120 kph speed limit",
    "red and white circle red car and black car no passing",
    "red and white circle red truck and black car no passing",
    "red and white triangle road intersection warning",
    "white and yellow diamond priority road",
    "red and white upside down triangle yield right-of-way",
    "stop",
    "empty red and white circle",
    "red and white circle no truck entry",
    "red circle with white horizonal stripe no entry",
    "red and white triangle with exclamation mark warning",
    "red and white triangle with black left curve approaching warning",
    "red and white triangle with black right curve approaching warning",
    "red and white triangle with black double curve approaching warning",
    "red and white triangle rough / bumpy road warning",
    "red and white triangle car skidding / slipping warning",
    "red and white triangle with merging / narrow lanes warning",
    "red and white triangle with person digging / construction / road work warning",
    "red and white triangle with traffic light approaching warning",
    "red and white triangle with person walking warning",
    "red and white triangle with child and person walking warning",
    "red and white triangle with bicyle warning",
    "red and white triangle with snowflake / ice warning",
    "red and white triangle with deer warning",
    "white circle with gray strike bar no speed limit",
    "blue circle with white right turn arrow mandatory",
    "blue circle with white left turn arrow mandatory",
    "blue circle with white forward arrow mandatory",
    "blue circle with white forward or right turn arrow mandatory",
    "blue circle with white forward or left turn arrow mandatory",
    "blue circle with white keep right arrow mandatory",
    "blue circle with white keep left arrow mandatory",
    "blue circle with white arrows indicating a traffic circle",
    "white circle with gray strike bar indicating no passing for cars has ended",
    "white circle with gray strike bar indicating no passing for trucks has ended",
)  # of GTSRB, spelt as CLIP spells them
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS: Mapping[str, Mapping[str, str]] = {  # names that differ from those in the files of a data set
    "caltech101": {
        "Faces": "off-center face",
        "Faces_easy": "centered face",
        "Leopards": "leopard",
        "Motorbikes": "motorbike",
        "airplanes": "airplane",
        "car_side": "side of a car",
        "cougar_body": "body of a cougar cat",
        "cougar_face": "face of a cougar cat",
        "crocodile_head": "head of a crocodile",
        "flamingo_head": "head of a flamingo",
        "snoopy": "snoopy (cartoon beagle)",
        "yin_yang": "yin and yang symbol",
    },
    "digits": {str(k): f"digit {word}" for k, word in enumerate(DIGITS)},
    "eurosat": {
        "AnnualCrop": "annual crop land",
        "Forest": "forest",
        "HerbaceousVegetation": "brushland or shrubland",
        "Highway": "highway or road",
        "Industrial": "industrial buildings or commercial buildings",
        "Pasture": "pasture land",
        "PermanentCrop": "permanent crop land",
        "Residential": "residential buildings or homes or apartments",
        "River": "river",
        "SeaLake": "lake or sea",
    },
    "flowers102": {
        "globe-flower": "globe flower",
        "pink-yellow dahlia?": "pink and yellow dahlia",
        "ball moss": "air plant",
    },
    "gtsrb": {f"sign {k}": words for k, words in enumerate(SIGNS)},
}
WORDNET = re.compile(r"n\d{8}")
NUMBERED = re.compile(r"\d+\.(?=[^\W\d])")  # as in "001.Black_footed_Albatross"


@dataclass(frozen=True)
class Captions:
    """The texts of C classes.

    Attributes:
        classes: C names as the data set has them, or words that replace them.
        templates: C tuples of templates, each with one "{}" for the name.
        exact: whether `classes` are strings that the user has chosen, which stay as they are.
    """

    classes: tuple[str, ...]
    templates: tuple[tuple[str, ...], ...]
    exact: bool = False

    @cached_property
    def names(self) -> tuple[str, ...]:
        """C names in words: underscores are spaces, and WordNet ids are looked up in the table of timm."""
        return self.classes if self.exact else tuple(map(in_words, self.classes))

    def of(self, label: int) -> list[str]:
        """Return the captions of the class with this id, one for each of its templates."""
        return [template.replace("{}", self.names[label]) for template in self.templates[label]]

    def repeated(self, times: int) -> "Captions":
        """Return the captions of `times` copies of the classes, one after the other."""
        return Captions(self.classes * times, self.templates * times, self.exact)

    def first(self, number: int) -> "Captions":
        """Return the captions of the first `number` classes."""
        return Captions(self.classes[:number], self.templates[:number], self.exact)

    def record(self) -> dict[str, Any]:
        """Return names and templates for run.json; the templates as one list if all classes have the same."""
        same = len(set(self.templates)) == 1
        templates = self.templates[0] if same else self.templates
        return {"names": list(self.names), "templates": [t if same else list(t) for t in templates]}


def captions(
    dataset: str,
    class_names: Sequence[str],
    *,
    templates: Sequence[str] | None = None,
    words: str | None = None,
    strings: Mapping[str, str] | None = None,
) -> Captions:
    """Return the captions of a data set's classes.

    Args:
        dataset: name of the data set.
        class_names: C names by class id.
        templates: templates of all classes; None for the published ones of the data set, or `PLAIN` without any.
        words: file with the words of classes, see `read_words`; None for the published ones, or the names themselves.
        strings: the string of each class by its name, which is used as it is; None without.

    Raises:
        ConfigError: the file cannot be read or has no words of a class.
    """
    if strings is not None:
        own = tuple(templates) if templates is not None else PLAIN
        return Captions(tuple(strings[name] for name in class_names), (own,) * len(class_names), exact=True)
    known = WORDS.get(dataset, {}) if words is None else read_words(Path(words).expanduser(), class_names)
    own = tuple(templates) if templates is not None else TEMPLATES.get(dataset, PLAIN)
    return Captions(tuple(known.get(name, name) for name in class_names), (own,) * len(class_names))


def joined(parts: Sequence[Captions]) -> Captions:
    """Return the captions of the classes of several data sets, one after the other."""
    return Captions(
        tuple(name for part in parts for name in part.classes),
        tuple(own for part in parts for own in part.templates),
    )


def check_templates(templates: Sequence[str] | None) -> None:
    """Refuse templates into which a class name cannot be put.

    Raises:
        ConfigError: there is no template, or one has no or several "{}".
    """
    if templates is None:
        return
    wrong = next((template for template in templates if template.count("{}") != 1), None)
    if wrong is not None or not templates:
        found = "is empty" if wrong is None else f"'{wrong}' has {wrong.count('{}')} places for the class name"
        raise ConfigError(
            f"dataset.templates: {found}; write {{}} once in each template, as in ['a photo of a {{}}.'], or set it to "
            "null for the published templates"
        )


def in_words(name: str) -> str:
    """Return the name of a class in words.

    Underscores become spaces, a number in front ("001.") is dropped, and a WordNet id is replaced by the first lemma of
    its synset in the table that comes with timm.

    Raises:
        ConfigError: the table does not have the id.
    """
    if WORDNET.fullmatch(name):
        try:
            found: str = _lemmas().label_name_to_description(name)
        except KeyError:
            raise ConfigError(
                f"dataset.class_names: no words are known for the class {name}; set it to a file with one line per "
                "class, as 'n01440764 tench'"
            ) from None
        return found.partition(",")[0]
    return " ".join(NUMBERED.sub("", name, count=1).replace("_", " ").split()) or name


@cache
def _lemmas() -> Any:
    """Return timm's table of WordNet, read once per process."""
    return libraries.load("timm.data").ImageNetInfo()


def read_words(path: Path, class_names: Sequence[str]) -> dict[str, str]:
    """Return the words of classes from a file with one line per class: its name, a tab or space, its words.

    Of several synonyms, separated by commas, the first counts, as in the files words.txt and LOC_synset_mapping.txt of
    ImageNet. Lines of other classes are left out.

    Raises:
        ConfigError: the file cannot be read, or has no words of a class.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dataset.class_names: {path} cannot be read ({first_line(error)})") from error
    found: dict[str, str] = {}
    by_length = sorted(class_names, key=len, reverse=True)  # a name may hold spaces, and begin with another one
    for line in lines:
        name = next((n for n in by_length if line.startswith(n) and line[len(n) : len(n) + 1] in ("\t", " ")), None)
        if name is not None and (words := line[len(name) :].partition(",")[0].strip()):
            found.setdefault(name, words)
    missing = [name for name in class_names if name not in found]
    if missing:
        raise ConfigError(
            f"dataset.class_names: {path} has no words of the class {missing[0]} ({len(missing)} missing); add lines "
            f"such as '{missing[0]} WORDS'"
        )
    return found
