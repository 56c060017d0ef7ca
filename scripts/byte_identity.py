"""Show that a change of the code leaves results as they were: accuracy.csv, byte for byte.

    python scripts/byte_identity.py record before.json --checkout OLD     # OLD: a checkout of the earlier commit
    python scripts/byte_identity.py record after.json
    python scripts/byte_identity.py compare before.json after.json

`record` runs, with the code of a checkout, the default run, one sweep over three task orders, and one shortened run of
every method (three tasks, at most twenty steps per fit), and writes the SHA-256 of each accuracy.csv. All runs use one
thread on the CPU. `compare` prints the runs that differ and exits with 1 if there are any; runs that only one of the
files has are listed and do not count as a difference.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["hardware=cpu", "hardware.threads=1", "job.progress=false", "job.picture=false", "job.feature_cache=false"]
SHORT = ["job.max_tasks=3", "job.max_steps=20"]
# Tried in turn until one suits the method: the settings and backbones that it accepts are the method's own affair.
ATTEMPTS = (
    ["scenario.setting=cil"],
    ["scenario.setting=til"],
    ["scenario.setting=til", "backbone=cnn"],
    ["scenario.setting=cil", "backbone=glyph_clip"],
    ["scenario.setting=cil", "dataset=text_synthetic", "backbone=t5_tiny"],
    ["scenario.setting=til", "dataset=text_synthetic", "backbone=t5_tiny"],
)
SWEEP = ["-m", "backbone=cnn", "method=finetune,er,ewc,simplecil", "task_order=random", "task_order.seed=range(3)"]


def clrun(checkout: Path, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command with the code of `checkout`, in an empty working folder."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "clrun", *arguments, *COMMON]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def digests(folder: Path, name: str) -> dict[str, str]:
    """Return the digest of every accuracy.csv below `folder`, by `name` and the relative folder."""
    files = sorted(folder.rglob("accuracy.csv"))
    return {
        f"{name} {file.parent.relative_to(folder)}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def run(checkout: Path, name: str, attempts: list[list[str]], work: Path) -> dict[str, str]:
    """Return the digests of the first attempt that succeeds.

    Raises:
        RuntimeError: none does.
    """
    for number, attempt in enumerate(attempts):
        out = work / f"{name} {number}"
        done = clrun(checkout, [*attempt, f"hydra.{'sweep' if '-m' in attempt else 'run'}.dir={out}"], work / "cwd")
        if done.returncode == 0:
            return digests(out, name)
    raise RuntimeError(f"{name}: no attempt succeeded; the last one said: {done.stderr.strip()[-500:]}")


def record(checkout: Path, jobs: int) -> dict[str, str]:
    """Return the digests of all runs with the code of `checkout`, by name of the run."""
    methods = sorted(file.stem for file in (checkout / "conf/method").glob("*.yaml"))
    runs = {f"method {m}": [[f"method={m}", *attempt, *SHORT] for attempt in ATTEMPTS] for m in methods}
    runs = {"default": [[]], "sweep": [SWEEP], **runs}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda item: run(checkout, item[0], item[1], Path(folder)), runs.items())
        return {name: digest for part in found for name, digest in part.items()}


def compare(before: dict[str, str], after: dict[str, str]) -> int:
    """Print what differs; return the exit code."""
    both = before.keys() & after.keys()
    different = sorted(name for name in both if before[name] != after[name])
    for name in different:
        print(f"differs: {name}")
    for name in sorted(before.keys() ^ after.keys()):
        print(f"only {'before' if name in before else 'after'}: {name}")
    print(f"{len(both)} runs compared, {len(both) - len(different)} byte-identical, {len(different)} differ")
    return 1 if different or not both else 0


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run everything and write the digests")
    recording.add_argument("out", type=Path)
    recording.add_argument("--checkout", type=Path, default=ROOT)
    recording.add_argument("--jobs", type=int, default=2, help="runs at once")
    comparing = commands.add_parser("compare", help="compare two files of digests")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return compare(json.loads(given.before.read_text()), json.loads(given.after.read_text()))
    given.out.write_text(json.dumps(record(given.checkout.resolve(), given.jobs), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
