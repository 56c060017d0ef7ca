"""What the frozen recipes of text benchmarks share: hashes that decide, folded texts, and files of installed packages.

A recipe is a pure function of one published file. Everything in it that looks like a draw is a hash of ids and texts,
so that the data set is the same on every machine, for every seed, and for every order of the lines of the file.
"""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clrun.data.modality import Texts
from clrun.data.reading.assemble import Domains, assemble
from clrun.data.reading.options import PackageReading, user_path
from clrun.data.split import TensorSplit
from clrun.data.stream import Dataset
from clrun.data.texts import to_bytes
from clrun.system.errors import ConfigError, first_line
from clrun.system.libraries import install_files
from clrun.system.reading import MB

LIMIT = 256 * MB  # bytes of a file; the largest of them has 11 million


def key(*parts: object) -> int:
    """Return the first 8 bytes, big endian, of the SHA-256 of the parts as text, joined by the character U+001F."""
    joined = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(joined).digest()[:8], "big")


@dataclass(frozen=True)
class Source:
    """A published file that lies in an installed Python package.

    Attributes:
        package: name of the package and of its folder, which is found without importing it.
        inside: path of the file in that folder.
        sha256: digest of the file.
        release: what the file is, for messages.
        install: what pip must install.
    """

    package: str
    inside: str
    sha256: str
    release: str
    install: str

    @property
    def name(self) -> str:
        """The name of the file."""
        return Path(self.inside).name

    def find(self, root: str | None) -> Path:
        """Return the path of the file.

        Args:
            root: `dataset.root`: the file, or a folder that holds it; None for the installed package.

        Raises:
            ConfigError: the package is not installed, or there is no such file.
        """
        remedy = f"run {install_files(self.install)}, or set dataset.root to the file of {self.release}"
        if root is not None:
            path = user_path(root, "dataset.root")
            path = path / self.name if path.is_dir() else path
            if not path.is_file():
                raise ConfigError(f"dataset.root: there is no file {path}; set it to null and {remedy}")
            return path
        found = importlib.util.find_spec(self.package)
        folders = [] if found is None else list(found.submodule_search_locations or ())
        for folder in folders:
            if (path := Path(folder, self.inside)).is_file():
                return path
        raise ConfigError(f"dataset: {self.name} is in no installed package; {remedy}")

    def read(self, root: str | None) -> bytes:
        """Return the content of the file, see `find`.

        Raises:
            ConfigError: it is not found, cannot be read, or is another release.
        """
        path = self.find(root)
        try:
            if (size := path.stat().st_size) > LIMIT:
                raise ConfigError(f"{path}: has {size / MB:,.0f} MB; expected {self.release}")
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ConfigError(
                f"{path}: is another release; the recipe is made for {self.release} (sha256 {self.sha256[:16]}...), "
                f"which '{self.install}' has"
            )
        return content


def from_recipe(
    name: str,
    rows: Sequence[tuple[str, int, str]],
    *,
    class_names: Sequence[str],
    reading: PackageReading,
    groups: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    domains: tuple[Sequence[str], Sequence[int]] | None = None,
) -> Dataset:
    """Return the data set of the rows of a recipe.

    Args:
        name: as in `dataset=NAME`.
        rows: text, class id and part ("train" or "test") of each row.
        class_names: C names.
        reading: the common options.
        groups: partitions of the classes by name: class ids by name of the group.
        domains: names of the domains, and the domain of each row.
    """
    stored, labels = to_bytes([text for text, _, _ in rows]), torch.tensor([label for _, label, _ in rows])
    tested = torch.tensor([part == "test" for _, _, part in rows])
    train, test = ((tested == wanted).nonzero()[:, 0] for wanted in (False, True))
    of_rows = None if domains is None else torch.tensor(domains[1])
    return assemble(
        name,
        TensorSplit(stored, labels, train),
        TensorSplit(stored, labels, test),
        class_names=class_names,
        mean=(),
        std=(),
        reading=reading,
        groups={title: tuple(map(tuple, parts.values())) for title, parts in (groups or {}).items()},
        group_names={title: tuple(parts) for title, parts in (groups or {}).items()},
        domains=None if domains is None or of_rows is None else Domains(domains[0], of_rows[train], of_rows[test]),
        modality=Texts(),
    )


__all__ = ["Source", "from_recipe", "key"]
