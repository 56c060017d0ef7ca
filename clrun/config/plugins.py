"""Hydra's plugins come from installed packages; those in the working folder are looked for only when asked for.

Hydra imports every module of the package `hydra_plugins` that it finds on Python's path, which contains the working
folder. Starting clrun in a folder of somebody else would then run the code that lies there.
"""

import importlib
import os
import sys
import types
from pathlib import Path

from clrun.system.errors import warn

ASKED_FOR = "CLRUN_HYDRA_PLUGINS"  # environment variable; 1 looks in the working folder, too
PACKAGE = "hydra_plugins"


def hide_working_folder() -> None:
    """Make Hydra look for plugins everywhere on Python's path but in the working folder, unless asked for.

    It has to be called before Hydra has looked. The package keeps the folders that it has then.
    """
    if _asked_for() or PACKAGE in sys.modules:
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
