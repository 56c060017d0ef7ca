"""The configuration groups of a run, and the folder that holds their YAML files."""

from pathlib import Path

GROUPS = ("dataset", "scenario", "task_order", "backbone", "method", "budget", "hardware", "logger", "job")
RESERVED = frozenset({"_target_", "_partial_", "_convert_", "_recursive_"})


def conf_dir() -> Path:
    """Return the folder of clrun's YAML files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(d for d in (package / "conf", package.parent / "conf") if (d / "config.yaml").is_file())
