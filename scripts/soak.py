"""Disturb runs in every way that is known to happen, and count what came of it: a soak test with a time limit.

    python scripts/soak.py --minutes 20     # one method per family
    python scripts/soak.py --quick          # one method, one attempt of each kind; a test runs this

| kind | what is done |
| --- | --- |
| kill | a run is killed before one of its file operations and started again |
| flip | one bit is flipped: of a file of an interrupted run, of cached features or of stored weights |
| torn | such a file is cut off |
| full disk | a run writes to a disk that is too small, and goes on when there is room |
| two writers | two processes in separate process namespaces on one host start the same run in one folder |
| processes | a run of one or two processes goes on with another number, then with the right one |
| hostile | a report is made of a folder with a file that is damaged, endless, a pipe or of another type |

Every attempt is "identical" (the bytes of an undisturbed run; for a hostile folder: a report), "refused" (one line,
exit code 2) or "wrong" (anything else). After a kill or a full disk only "identical" is right. Every kind gets the same
share of the time, and one attempt at least. The exit code is 1 if anything was wrong.
"""

import argparse
import os
import random
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path

import soaklib as lib
from hostile import hostile_folders
from soaklib import Ended, Result, Unavailable, end, forked, start

sys.path.insert(0, str(lib.ROOT / "tests" / "integration"))

from running import fitting, quiet, run, run_interrupted  # noqa: E402

FAMILIES = ("finetune", "ewc", "er", "der", "a_gem", "icarl", "lwf", "packnet", "halrp", "l2p", "simplecil", "joint")
# What a run imports when it needs it: imported once, before processes are forked.
LATE = ("sklearn.datasets", "safetensors.torch", "torch.utils.flop_counter", "torch.distributed", "clrun.api.learner")
LATE += (
    "clrun.reporting.figures",
    "clrun.reporting.sweep",
    "clrun.running.restoring",
    "matplotlib.figure",
    "scipy.stats",
)
SHORT = ("job.max_tasks=3", "budget.epochs=1", "job.max_steps=2", "job.max_eval_rows=16", "job.save_model=true")
LEFT = 77  # exit code of a process that the system did not give what it needed
HEAVIER = 700_000  # KiB by which reading a folder may make a process grow
Attempt = Callable[[], Result]


class Method:
    """Undisturbed and interrupted runs of one method, made when they are needed.

    Args:
        name: of the method.
        work: a folder.
    """

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work, self.log = name, work / name, work / f"{name}.log"
        self.work.mkdir()
        cache = f"job.feature_cache={self.work / 'features'}"
        self.options = (f"method={name}", *fitting(name), *SHORT, cache)
        quiet(*self.options)  # composed once, before processes are forked
        for module in (*LATE, *(("timm",) if name == "l2p" else ())):
            import_module(module)

    def run(self, out: Path) -> Ended:
        """Run or continue in `out`, in a process of its own."""
        return forked(partial(run, out, *self.options), self.log)

    def judged(self, ended: Ended, out: Path) -> Result:
        """Return the outcome of a run that ended in `out`."""
        if ended.code == 0 and (out / "accuracy.csv").read_bytes() == self.whole:
            return Result("identical")
        last = (ended.text.strip().splitlines() or [""])[-1]
        return Result("refused" if ended.refused else "wrong", f"exit code {ended.code}: {last}")

    @cached_property
    def _completed(self) -> Ended:
        """An undisturbed run, which prints the number of its file operations; its features stay in the cache."""

        def counting() -> None:
            count = lib.at_file_operation(0, lib.kill_myself)
            run(self.completed, *self.options)
            print(count())

        return made(forked(counting, self.log))

    @property
    def completed(self) -> Path:
        """The folder of the undisturbed run."""
        return self.work / "whole"

    @cached_property
    def whole(self) -> bytes:
        """The accuracy.csv of the undisturbed run."""
        assert self._completed.code == 0
        return (self.completed / "accuracy.csv").read_bytes()

    @property
    def operations(self) -> int:
        """The number of file operations of the undisturbed run."""
        return int(self._completed.text.split()[-1])

    @cached_property
    def interrupted(self) -> Path:
        """The folder of a run that was interrupted after two tasks, with two generations of its checkpoint."""
        out = self.work / "interrupted"
        made(forked(lambda: run_interrupted(out, *self.options, at=2), self.log))
        return out


def made(ended: Ended) -> Ended:
    """Return the end of a process that nothing disturbed.

    Raises:
        RuntimeError: it failed all the same.
    """
    if ended.code:
        raise RuntimeError(f"an undisturbed run ended with exit code {ended.code}: {ended.text[-2000:]}")
    return ended


def without_refusal(result: Result) -> Result:
    """Return the outcome where a refusal is wrong, too."""
    return Result("wrong", result.detail) if result.outcome == "refused" else result


class Soak:
    """All kinds of attempts.

    Args:
        names: of the methods.
        work: a folder for everything.
        seed: of the moments and places.
    """

    def __init__(self, names: tuple[str, ...], work: Path, seed: int) -> None:
        self.work, self.log, self.seed = work, work / "log", seed
        self.draw = random.Random(seed)
        self.methods = [Method(name, work) for name in names]
        self.number = 0

    def kinds(self) -> dict[str, Iterator[Attempt]]:
        """Return the attempts of each kind."""
        return {
            "kill": self.kills(),
            "flip": self.damages(self.flipped),
            "torn": self.damages(self.cut),
            "full disk": self.full_disks(),
            "two writers": self.writers(),
            "processes": self.processes(),
            "hostile": self.hostile(),
        }

    def folder(self) -> Path:
        """Return the path of a new folder; the one of some attempts ago is removed."""
        self.number += 1
        shutil.rmtree(self.work / f"attempt-{self.number - 6}", ignore_errors=True)
        return self.work / f"attempt-{self.number}"

    # --- kills

    def kills(self) -> Iterator[Attempt]:
        """Yield one attempt per method and file operation, in random order; the methods take turns."""
        left: dict[Method, list[int]] = {}
        methods = list(self.methods)
        while methods:
            for method in list(methods):
                if method not in left:
                    left[method] = list(range(1, method.operations + 1))
                    self.draw.shuffle(left[method])
                yield partial(self.kill, method, left[method].pop())
                if not left[method]:
                    methods.remove(method)

    def kill(self, method: Method, at: int) -> Result:
        out = self.folder()

        def dying() -> None:
            lib.at_file_operation(at, lib.kill_myself)
            run(out, *method.options)

        first = forked(dying, self.log)
        if first.code not in (-9, 0):
            return Result("wrong", f"{method.name}, before operation {at}: exit code {first.code}: {first.text[-500:]}")
        result = without_refusal(method.judged(method.run(out), out))
        return Result(result.outcome, f"{method.name}, before operation {at}: {result.detail}")

    # --- damaged files

    def damages(self, damage: Callable[[Path], str]) -> Iterator[Attempt]:
        """Yield attempts without end: files of interrupted runs, cached features, stored weights."""
        while True:
            for method in self.methods:
                for _ in range(3):
                    yield partial(self.damaged_run, method, damage, ("checkpoint.pt", "checkpoint.previous.pt"))
                yield partial(self.damaged_run, method, damage, ("accuracy.csv", "metrics.jsonl", "config.yaml"))
                if list((method.work / "features").glob("*.npy")):
                    yield partial(self.damaged_features, method, damage)
                yield partial(self.damaged_weights, method, damage)

    def flipped(self, path: Path) -> str:
        bit = self.draw.randrange(8 * path.stat().st_size)
        lib.flip(path, bit)
        return f"{path.name}, bit {bit}"

    def cut(self, path: Path) -> str:
        size = self.draw.randrange(path.stat().st_size)
        os.truncate(path, size)
        return f"{path.name}, cut to {size} bytes"

    def damaged_run(self, method: Method, damage: Callable[[Path], str], names: tuple[str, ...]) -> Result:
        assert method.whole
        out = self.folder()
        shutil.copytree(method.interrupted, out)
        what = damage(self.draw.choice([out / name for name in names if (out / name).exists()]))
        result = method.judged(method.run(out), out)
        return Result(result.outcome, f"{method.name}, {what}: {result.detail}")

    def damaged_features(self, method: Method, damage: Callable[[Path], str]) -> Result:
        out, files = self.folder(), sorted((method.work / "features").glob("*.*"))
        what = damage(self.draw.choice([file for file in files if file.suffix in (".npy", ".json")]))
        result = method.judged(method.run(out), out)
        return Result(result.outcome, f"{method.name}, features {what}: {result.detail}")

    def damaged_weights(self, method: Method, damage: Callable[[Path], str]) -> Result:
        from clrun import api

        out = self.folder()
        assert method.whole
        shutil.copytree(method.completed, out)
        what = damage(out / "model.safetensors")
        ended = forked(lambda: api.load(out).learner(), self.log)
        return Result("refused" if ended.refused else "wrong", f"{method.name}, {what}: {ended.text[-300:]}")

    # --- full disks

    def full_disks(self) -> Iterator[Attempt]:
        """Yield attempts without end, with disks of 4 KiB up to what a run needs."""
        while True:
            for method in self.methods:
                yield partial(self.full_disk, method, self.draw.randrange(4, 120))

    def full_disk(self, method: Method, size: int) -> Result:
        assert method.whole
        out = self.folder()
        out.mkdir()

        def filling() -> None:
            try:
                lib.own_namespaces(lib.NEW_MOUNTS)
                lib.mount(b"tmpfs", out, b"size=%dk" % size)
            except Unavailable as error:
                print(error)
                os._exit(LEFT)
            try:
                run(out, *method.options)
            except lib.ConfigError as error:
                assert "No space left" in str(error) and len(str(error).splitlines()) == 1, error
            lib.mount(b"tmpfs", out, b"size=64m", again=True)
            run(out, *method.options)
            assert (out / "accuracy.csv").read_bytes() == method.whole, "another accuracy.csv"

        ended = forked(filling, self.log)
        if ended.code == LEFT:
            raise Unavailable(ended.text.strip())
        return Result("wrong" if ended.code else "identical", f"{method.name}, {size} KiB: {ended.text[-500:]}")

    # --- two writers

    def writers(self) -> Iterator[Attempt]:
        """Yield attempts without end."""
        while True:
            for method in self.methods:
                yield partial(self.two_writers, method)

    def two_writers(self, method: Method) -> Result:
        assert method.whole
        out = self.folder()

        def contained() -> None:
            try:
                lib.own_namespaces(lib.NEW_PIDS | lib.NEW_MOUNTS)
            except Unavailable as error:
                print(error)
                os._exit(LEFT)
            inner = self.work / f"inner-{os.getpid()}"

            def first_process() -> None:
                lib.mount(b"proc", Path("/proc"))
                run(out, *method.options)

            ended = forked(first_process, inner)
            print(ended.text, end="")
            os._exit(ended.code % 256)

        logs = [self.work / f"writer-{n}" for n in (1, 2)]
        ends = [end(pid, log) for pid, log in [(start(contained, log), log) for log in logs]]
        if any(found.code == LEFT for found in ends):
            raise Unavailable(ends[0].text.strip())
        said = "; ".join(f"exit code {found.code}: {found.text.strip()[-300:]}" for found in ends)
        right = any(found.code == 0 for found in ends) and all(found.code == 0 or found.refused for found in ends)
        same = right and (out / "accuracy.csv").read_bytes() == method.whole
        return Result("identical" if same else "wrong", f"{method.name}: {said}")

    # --- numbers of processes

    def processes(self) -> Iterator[Attempt]:
        """Yield attempts without end."""
        while True:
            for before, now in ((2, 1), (1, 2), (2, 3)):
                yield partial(self.other_processes, self.draw.choice(self.methods), before, now)

    def together(self, world: int, work: Callable[[], object]) -> list[Ended]:
        """Do `work` in the processes of a run as torchrun starts them; one process is started without it."""
        if world == 1:
            return [forked(lambda: work() and None, self.log)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def member(rank: int) -> None:
            with lib.torchrun(rank, world, port):
                work()

        logs = [self.work / f"rank-{rank}" for rank in range(world)]
        pids = [start(partial(member, rank), log) for rank, log in enumerate(logs)]
        return [end(pid, log) for pid, log in zip(pids, logs, strict=True)]

    def other_processes(self, method: Method, before: int, now: int) -> Result:
        whole, out = self.folder(), self.folder()
        name = f"{method.name}, {before} processes, then {now}"
        for ended in self.together(before, partial(run, whole, *method.options)):
            made(ended)
        for ended in self.together(before, lambda: run_interrupted(out, *method.options)):
            made(ended)
        others = self.together(now, partial(run, out, *method.options))
        if not all(ended.refused for ended in others):
            return Result("wrong", f"{name}: {others[0].code}: {others[0].text[-500:]}")
        again = self.together(before, partial(run, out, *method.options))
        same = (out / "accuracy.csv").read_bytes() == (whole / "accuracy.csv").read_bytes()
        right = same and all(ended.code == 0 for ended in again)
        return Result("refused" if right else "wrong", f"{name}: {again[0].text[-500:]}")

    # --- folders of other people

    def hostile(self) -> Iterator[Attempt]:
        """Yield attempts without end."""
        assert self.methods[0].whole
        for name, folder in hostile_folders(self.methods[0].completed, self.work, self.seed):
            yield partial(self.report, name, folder)

    def report(self, name: str, folder: Path) -> Result:
        from clrun.reporting import report

        out, weight = self.folder(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def reporting() -> None:
            print(report([folder], out=out).text)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - weight
            assert grown < HEAVIER, f"it took {grown} KiB"

        ended = forked(reporting, self.log)
        printed = all(line.isprintable() for line in ended.text.splitlines())
        outcome = (
            "wrong" if not printed else "identical" if ended.code == 0 else "refused" if ended.refused else "wrong"
        )
        return Result(outcome, f"{name}: {ended.text[-300:]!a}")


def soak(kinds: dict[str, Iterator[Attempt]], until: float) -> tuple[dict[str, Counter[str]], list[str]]:
    """Attempt all kinds until the time `until`; return the outcomes by kind, and what was wrong.

    The next attempt is of the kind that has taken the least time so far.
    """
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    taken, lines = dict.fromkeys(kinds, 0.0), []
    while taken:
        kind = min(taken, key=lambda kind: taken[kind])
        if taken[kind] and time.monotonic() > until:
            break
        began = time.monotonic()
        attempt = next(kinds[kind], None)
        try:
            result = None if attempt is None else attempt()
        except Unavailable as error:
            lines.append(f"{kind}: left out, the system does not allow it ({error})")
            result = None
        if result is None:
            del taken[kind]
            continue
        taken[kind] += time.monotonic() - began
        counts[kind][result.outcome] += 1
        if result.outcome == "wrong":
            lines.append(f"{kind}: {result.detail}")
    return counts, lines


def table(counts: dict[str, Counter[str]]) -> str:
    """Return the table of outcomes."""
    heads = ("identical", "refused", "wrong")
    lines = [f"{'kind':<14}{'attempts':>10}" + "".join(f"{head:>11}" for head in heads)]
    for kind, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        lines.append(f"{kind:<14}{found.total():>10}" + "".join(f"{found[head]:>11}" for head in heads))
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Read the command line, attempt everything, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="time for the attempts")
    parser.add_argument("--quick", action="store_true", help="one method, one attempt of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(FAMILIES))
    parser.add_argument("--kinds", default="", help="only these, separated by commas")
    given = parser.parse_args(words)
    names = ("er",) if given.quick else tuple(given.methods.split(","))
    with tempfile.TemporaryDirectory(prefix="clrun-soak-") as folder:
        os.environ["CLRUN_CACHE"] = f"{folder}/cache"
        attempts = Soak(names, Path(folder), given.seed).kinds()
        chosen = {kind: attempts[kind] for kind in given.kinds.split(",") if kind} or attempts
        until = time.monotonic() + (0 if given.quick else 60 * given.minutes)
        counts, lines = soak(chosen, until)
    print("\n".join([table(counts), *lines]))
    return 1 if sum(found["wrong"] for found in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
