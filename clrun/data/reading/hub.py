"""Data sets of the library `datasets` of Hugging Face: their splits and columns. Their own code is never run."""

import logging
import sys
from pathlib import Path
from typing import Any

from clrun.system import libraries
from clrun.system.errors import ConfigError, did_you_mean, one_line

OLDEST = 4  # from this version on the library refuses data sets with a program
SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes


def hub_tables(name: str, path: str, config: str | None, revision: str | None) -> Any:
    """Return the splits of a data set by their names.

    Args:
        name: as in `dataset=NAME`, for messages.
        path: name on the Hub, or folder.
        config: name of the configuration; None if there is only one.
        revision: commit or tag on the Hub; None for the newest.

    Raises:
        ConfigError: the library is missing or too old, or the data set cannot be loaded.
    """
    library = libraries.load("datasets")
    if int(library.__version__.split(".")[0]) < OLDEST:
        raise ConfigError(
            f"dataset={name} needs datasets {OLDEST} or newer, which run no code of a data set; found "
            f"{library.__version__}; run {libraries.pip_install('datasets', upgrade=True)}"
        )
    if not sys.stderr.isatty():
        library.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the error below reports failed attempts
    home = Path(path).expanduser()
    try:
        if any((home / name).is_file() for name in SAVED):
            found = library.load_from_disk(str(home))
            return found if isinstance(found, dict) else {"train": found}
        return library.load_dataset(str(home) if home.is_dir() else path, config, revision=revision)
    except Exception as error:  # the library and the network below it have many kinds
        reason = one_line(error)[:300]
        raise ConfigError(
            f"dataset.path: {path} cannot be loaded ({reason}); set it to a name on the Hub that this machine can "
            "reach or has loaded before, or to a folder"
        ) from error


def pick(tables: Any, name: str, option: str) -> Any:
    """Return the split `name`."""
    if name not in tables:
        hint = did_you_mean(name, tables) or f"; set dataset.{option}"
        raise ConfigError(f"dataset.{option}: there is no split '{name}'{hint} (there are: {', '.join(tables)})")
    return tables[name]


def listed(table: Any) -> str:
    """Return the columns of a table with their types."""
    return ", ".join(f"{column} ({type(feature).__name__})" for column, feature in table.features.items())


def label_column(table: Any, name: str | None, row: str) -> str:
    """Return the column `name`, or the only ClassLabel, or the only column beside that of the rows."""
    if name is not None:
        if name not in table.features:
            raise ConfigError(f"dataset.label: there is no column '{name}' (there are: {listed(table)})")
        return name
    found = [column for column, feature in table.features.items() if type(feature).__name__ == "ClassLabel"]
    others = [column for column in table.features if column != row]
    if len(found) != 1 and len(others) != 1:
        raise ConfigError(
            f"dataset.label: name the column; {len(found)} are of the kind ClassLabel (of: {listed(table)})"
        )
    return str(found[0] if len(found) == 1 else others[0])
