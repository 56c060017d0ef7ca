"""The choices of the configuration groups, by their files alone: what `clrun list` and `clrun --help` print.

Hydra's own listing copies its tree of configurations once per group, which takes a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

HELP = Path("hydra", "help", "clrun.yaml")  # in a folder of configurations


def groups(folders: Sequence[Path]) -> list[str]:
    """Return the names of the groups in some folders of configurations, sorted."""
    return sorted({f.name for folder in folders for f in folder.iterdir() if f.is_dir() and f.name != "hydra"})


def members(folders: Sequence[Path], group: str) -> dict[str, Path]:
    """Return the file of each choice of a group by its name, sorted; a choice of an earlier folder hides later ones."""
    found: dict[str, Path] = {}
    for folder in reversed(folders):
        below = folder / group
        found |= {f.relative_to(below).with_suffix("").as_posix(): f for f in below.rglob("*.yaml")}
    return {name: found[name] for name in sorted(found) if not name.startswith("_")}  # files with _ are only included


def help_page(folders: Sequence[Path]) -> str:
    """Return the text of `clrun --help`."""
    file = next(folder / HELP for folder in folders if (folder / HELP).is_file())
    page: Mapping[str, Any] = yaml.load(file.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    template = page["template"]
    for part in ("header", "footer"):
        template = template.replace(f"${{hydra.help.{part}}}", page[part])
    listed = "".join(f"{group}: {', '.join(members(folders, group))}\n" for group in groups(folders))
    return Template(template).substitute(APP_CONFIG_GROUPS=listed)
