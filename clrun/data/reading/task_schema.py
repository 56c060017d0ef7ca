"""The schema of a task compared with the data set that it is for: its classes and its parts."""

from collections.abc import Iterable, Mapping, Sequence

from clrun.data.reading.class_names import composed
from clrun.data.reading.text import some
from clrun.data.schema import Schema
from clrun.data.texts import text_key
from clrun.system.errors import ConfigError, did_you_mean


def class_strings(schema: Schema | None, class_names: Sequence[str]) -> dict[str, str] | None:
    """Return the string of each class by its name; None where the names are the strings.

    Args:
        schema: of the data set; None without.
        class_names: C names.

    Raises:
        ConfigError: a class has no string, there is no class of a given name, or two strings are alike.
    """
    if schema is None or schema.verbaliser is None:
        return None
    key = "dataset.schema.verbaliser"
    found = {composed(str(name).strip()): text.strip() for name, text in schema.verbaliser.items()}
    _compare(key, "class", found, class_names)
    alike: dict[str, str] = {}
    for name in class_names:
        other = alike.setdefault(text_key(found[name]), name)
        if other != name:
            raise ConfigError(
                f"{key}: '{found[other]}' of {other} and '{found[name]}' of {name} differ in nothing but case, blanks "
                "or punctuation; choose other words"
            )
    return found


def check_parts(schema: Schema | None, parts: Iterable[str]) -> None:
    """Refuse prefixes by part that do not name each part of the data set.

    Raises:
        ConfigError: see above.
    """
    if schema is None or not schema.by_part:
        return
    names = list(parts)
    if not names:
        raise ConfigError(
            "dataset.schema.prefix: names parts, and this data set has none (no domains); set it to one text for all"
        )
    _compare("dataset.schema.prefix", "part", schema.by_part, names)


def _compare(key: str, kind: str, given: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse names that do not exist or are missing.

    Raises:
        ConfigError: see above.
    """
    if unknown := [name for name in given if name not in names]:
        hint = did_you_mean(unknown[0], names)
        raise ConfigError(f"{key}: there is no {kind} '{unknown[0]}'{hint} ({some(names)})")
    if missing := [name for name in names if name not in given]:
        raise ConfigError(f"{key}: has no text for {some(missing)}; name every {kind}")
