"""Import of the slow libraries (timm, torchvision, scikit-learn, ...), inside functions and with clear errors."""

import importlib
from types import ModuleType

from clrun.system.errors import ConfigError


def load(name: str) -> ModuleType:
    """Return the module `name`.

    Raises:
        ConfigError: it is not installed, or the installed torchvision was built for another torch (importing
            torchvision, and timm with it, then fails with "operator torchvision::nms does not exist").
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).split(".")[0]
        raise ConfigError(
            f"{name} cannot be imported: {missing} is not installed; run pip install {missing}"
        ) from error
    except (RuntimeError, ImportError, OSError) as error:
        if "torchvision" not in f"{error}{name}":
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{name} cannot be imported because torch and torchvision were built for different versions ({reason}); "
            "install both from the same source: pip install --upgrade --force-reinstall torch torchvision"
        ) from error
