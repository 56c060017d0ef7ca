"""What the benchmarks share: a figure beside what is demanded of it.

Each `bench_*.py` has `main(words)`, which measures, prints and returns its figures, and `QUICK`, the words of a short
run. Run alone it exits with 1 where a figure misses its demand; `bench.py` collects the figures of all.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass


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
