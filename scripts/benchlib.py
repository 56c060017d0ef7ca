"""What the benchmarks share: a figure beside what is demanded of it, parts made from conf/, and processor time.

Each `bench_*.py` has `main(words)`, which measures, prints and returns its figures, and `QUICK`, the words of a short
run. Run alone it exits with 1 where a figure misses its demand; `bench.py` collects the figures of all.
"""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class Figure:
    """One figure of a benchmark.

    Attributes:
        name: what was measured.
        measured: the number; None where the benchmark broke off before it had one.
        demanded: its bound.
        less: less is better: the bound is the largest number that will do, else the smallest.
        form: how both are written.
        unit: behind both.
    """

    name: str
    measured: float | None
    demanded: float
    less: bool = False
    form: str = ".2f"
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the demand is met."""
        if self.measured is None:
            return False
        return self.measured <= self.demanded if self.less else self.measured >= self.demanded

    @property
    def found(self) -> str:
        """The number as text."""
        return "none" if self.measured is None else f"{self.measured:{self.form}}{self.unit}"

    @property
    def bound(self) -> str:
        """The demand as text."""
        return f"at {'most' if self.less else 'least'} {self.demanded:{self.form}}{self.unit}"

    @property
    def verdict(self) -> str:
        """The verdict as text."""
        return "MET" if self.met else "MISSED"

    def __str__(self) -> str:
        """Return number, demand and verdict."""
        return f"{self.found} ({self.bound}) {self.verdict}"


def finish(figures: Iterable[Figure]) -> None:
    """End the program: with 1 when a demand was missed, else with 0."""
    sys.exit(int(not all(figure.met for figure in figures)))


def configured(group: str, choice: str, **options: Any) -> Any:
    """Return what conf/`group`/`choice`.yaml names, with the options that it includes, and some of them changed."""
    node: Any = OmegaConf.load(CONF / group / f"{choice}.yaml")
    shared = [name.removesuffix("@_here_") for name in node.pop("defaults", ()) if name != "_self_"]
    parts = [OmegaConf.load(CONF / group / f"{name}.yaml") for name in shared]
    return instantiate(OmegaConf.merge(*parts, node, options), _convert_="all")


def seconds(work: Callable[[], Any]) -> float:
    """Return the processor time of a call, which other programs of the machine change little."""
    start = time.process_time()
    work()
    return time.process_time() - start
