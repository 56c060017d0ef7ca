"""Run every benchmark of this folder and print what was measured beside what is demanded.

    python scripts/bench.py [--quick] [--only overhead report ...]

Each `bench_NAME.py` runs in a process of its own, one after the other, and prints as it does alone. The table at the
end has a line for each figure; the exit code is 1 where one misses its demand or a benchmark breaks off. `--quick`
takes few repeats and small sizes: it shows that everything runs, and its figures are rough. The figures are ratios and
growths, most of them of processor time, but only a machine that does nothing else gives them without noise.
"""

import argparse
import importlib
import multiprocessing
import platform
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchlib import Figure, finish

NAMES = sorted(file.stem.removeprefix("bench_") for file in Path(__file__).parent.glob("bench_*.py"))


def figures_of(name: str, quick: bool) -> list[Figure]:
    """Run one benchmark in this process; return its figures, or the one that it has none."""
    try:
        module = importlib.import_module(f"bench_{name}")
        figures: list[Figure] = module.main(module.QUICK.split() if quick else [])
    except (Exception, SystemExit):
        traceback.print_exc()
        return [Figure("broke off", None, 0)]
    return figures


def table(found: dict[str, list[Figure]]) -> str:
    """Return a line for each figure of each benchmark."""
    rows = [(name, f.name, f.found, f.bound, f.verdict) for name, figures in found.items() for f in figures]
    rows.insert(0, ("benchmark", "figure", "measured", "demanded", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> None:
    """Run them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="few repeats and small sizes")
    args = parser.parse_args()
    found: dict[str, list[Figure]] = {}
    for name in args.only:
        print(f"--- bench_{name}", flush=True)
        start = time.perf_counter()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            found[name] = fresh.submit(figures_of, name, args.quick).result()
        print(f"--- {time.perf_counter() - start:.0f} s\n", flush=True)
    print(f"{platform.machine()}, {time.strftime('%Y-%m-%d')}{', quick' if args.quick else ''}")
    print(table(found))
    finish(figure for figures in found.values() for figure in figures)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
