"""Hydra's plugins come from installed packages; those in the working folder are looked for only when asked for.

Hydra imports every module of the package `hydra_plugins` that it finds on Python's path, which contains the working
folder. Starting clrun in a folder of somebody else would then run the code that lies there.

Parallel launchers start processes that import this package before anything of clrun. They get a path without the
working folder, and `use_working_folder` adds it when the plugins have been found.
"""

import importlib
import os
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from hydra.core.utils import env_override

from clrun.system.errors import warn

ASKED_FOR = "CLRUN_HYDRA_PLUGINS"  # environment variable; 1 looks in the working folder, too
PACKAGE = "hydra_plugins"


def hide_working_folder() -> None:
    """Make Hydra look for plugins everywhere on Python's path but in the working folder, unless asked for.

    The package keeps the folders that it has then.
    """
    if _asked_for():
        return
    if PACKAGE in sys.modules:
        package = sys.modules[PACKAGE]
        package.__path__ = [entry for entry in package.__path__ if not _is_here(os.path.dirname(entry))]
        return
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if not _is_here(entry)]
    try:
        package = importlib.import_module(PACKAGE)
        package.__path__ = list(package.__path__)
    except ImportError:
        package = sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
        package.__path__ = []
    finally:
        sys.path[:] = before


def use_working_folder() -> None:
    """Add the working folder to Python's path, as its last entry, so that a file torch.py there does not hide torch."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


@contextmanager
def hidden_from_new_processes() -> Iterator[None]:
    """Start processes in the block whose Python's path has no working folder, unless asked for.

    This process itself goes on to find modules there. When clrun lies in the working folder, nothing is hidden: what is
    in a checkout of clrun is trusted, and the processes would not find clrun.
    """
    if _asked_for() or _is_here(str(Path(__file__).parents[2])):
        yield
        return
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if not _is_here(entry)]
    sys.meta_path.append(_WorkingFolder)
    try:
        with env_override({"PYTHONSAFEPATH": "1"}):  # `python -m` puts the working folder first otherwise
            yield
    finally:
        sys.meta_path.remove(_WorkingFolder)
        sys.path[:] = before


class _WorkingFolder:
    """Finds modules in the working folder that are not found elsewhere."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Return where a module that is in no package lies; None when it is not in the working folder."""
        return PathFinder.find_spec(name, [os.getcwd()]) if path is None else None


def mention_hidden() -> None:
    """Warn when the working folder has plugins that are not used."""
    if not _asked_for() and Path(PACKAGE).is_dir():
        warn(f"{PACKAGE} in the working folder is not used; if you trust it, set {ASKED_FOR}=1 in the environment")


def _asked_for() -> bool:
    return os.environ.get(ASKED_FOR) == "1"


def _is_here(entry: str) -> bool:
    try:
        return os.path.realpath(entry or os.curdir) == os.path.realpath(os.curdir)
    except OSError:
        return not entry
