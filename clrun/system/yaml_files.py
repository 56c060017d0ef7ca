"""The YAML files that come with clrun: where they are, and the line in which each says what it is."""

from pathlib import Path


def conf_dir() -> Path:
    """Return the folder of clrun's YAML files: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(d for d in (package / "conf", package.parent / "conf") if (d / "config.yaml").is_file())


def description(file: Path) -> str:
    """Return the first comment line of a YAML file, which says what it is; "" when there is none."""
    comments = (line.removeprefix("#").strip() for line in file.read_text("utf-8").splitlines() if line.startswith("#"))
    return next((comment for comment in comments if comment and not comment.startswith("@")), "")
