"""The table of learners on frozen features in the README: two data sets, three kinds of features, five task orders.

    python scripts/frozen_table.py DIR [--orders 5] [--only digits,glyphs]

Runs what is missing in DIR (about an hour on two cores; started again, it goes on) and prints the table, and the rank
correlation of LogME with the accuracy of simplecil and of lda over all backbones tried. The commands are

    clrun -m dataset=glyphs scenario.n_tasks=12 backbone=glyph_vit method=simplecil,ncm,lda,ranpac,fecam,... \\
        budget=adamw task_order=random 'task_order.seed=range(5)'

and so on; each is printed before it starts.
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

DATA = {"digits": ("dataset=digits", "scenario.n_tasks=5"), "glyphs": ("dataset=glyphs", "scenario.n_tasks=12")}
FEATURES = {
    "glyph_vit": ("backbone=glyph_vit",),
    "pixels": ("backbone=mlp", "backbone.hidden=[]"),
    "random glyph_vit": ("backbone=glyph_vit", "backbone.pretrained=false"),
}
OTHERS = {
    "mlp": ("backbone=mlp",),
    "cnn": ("backbone=cnn",),
    "lenet": ("backbone=lenet",),
    "resnet18_reduced": ("backbone=resnet18_reduced",),
    "resnet32": ("backbone=resnet32",),
}
CLOSED = "simplecil,ncm,lda,ranpac,fecam"
LEARNERS = {
    "closed": (f"method={CLOSED}",),
    "trained": ("method=linear_probe,finetune", "budget=adamw"),
    "joint": ("method=joint", "method.mode=once", "budget=adamw"),
}
METHODS = (*CLOSED.split(","), "linear_probe", "finetune", "joint")


def sweep(folder, *words, orders):
    """Run a sweep unless it is complete."""
    command = ["-m", *words, "task_order=random", f"task_order.seed=range({orders})", "job.progress=false"]
    command += ["job.picture=false", f"hydra.sweep.dir={folder}"]
    print("clrun", shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", "clrun", *command], check=True, stdout=subprocess.DEVNULL)


def runs(folder):
    """Return the lines of sweep.csv and the class-incremental AOPD by method."""
    with (folder / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    entries = json.loads((folder / "order_robustness.json").read_text())
    return lines, {entry["method"]: entry["aopd"] for entry in entries if entry["setting"] == "cil"}


def cells(folder):
    """Return {method: (accuracy, sd, forgetting, AOPD)} in points."""
    found = {}
    for part in sorted(folder.iterdir()):
        lines, aopd = runs(part)
        for method in {line["method"] for line in lines}:
            own = [line for line in lines if line["method"] == method]
            accuracy = [100 * float(line["cil_average_accuracy"]) for line in own]
            forgetting = np.mean([100 * float(line["cil_forgetting"]) for line in own])
            found[method] = (np.mean(accuracy), np.std(accuracy, ddof=1), forgetting, 100 * aopd[method])
    return found


def table(root, data, orders):
    """Print the table of one data set."""
    for features, backbone in FEATURES.items():
        for kind, learners in LEARNERS.items():
            folder = root / data / features.replace(" ", "_") / kind
            sweep(folder, *DATA[data], *backbone, *learners, orders=orders)
    print(
        f"\n{data}: {orders} random orders of {DATA[data][1].rpartition('=')[2]} tasks, class-incremental, in points\n"
    )
    names = " | ".join(f"{name}: accuracy | forgetting | AOPD" for name in FEATURES)
    print(f"| method | {names} |\n|---|{'---|' * 3 * len(FEATURES)}")
    found = {name: cells(root / data / name.replace(" ", "_")) for name in FEATURES}
    for method in METHODS:
        texts = []
        for name in FEATURES:
            accuracy, sd, forgetting, aopd = found[name][method]
            texts.append(f"{accuracy:.1f} ± {sd:.1f} | {forgetting + 0.0:.1f} | {aopd:.1f}")
        print(f"| {method} | {' | '.join(texts)} |")


def correlation(root, data):
    """Print LogME and accuracy of every backbone, and their rank correlations."""
    scores = {}
    for name, backbone in {**FEATURES, **OTHERS}.items():
        folder = root / f"{data}-logme" / name.replace(" ", "_")
        sweep(folder, *DATA[data], *backbone, "method=simplecil,lda", orders=1)
        lines, _ = runs(folder)
        accuracy = {line["method"]: 100 * float(line["cil_average_accuracy"]) for line in lines}
        scores[name] = (float(lines[0]["logme"]), accuracy["simplecil"], accuracy["lda"])
    print(f"\n{data}: LogME of the features and final accuracy\n")
    print("| features | LogME | simplecil | lda |\n|---|---|---|---|")
    for name, (score, simplecil, lda) in sorted(scores.items(), key=lambda pair: -pair[1][0]):
        print(f"| {name} | {score:.3f} | {simplecil:.1f} | {lda:.1f} |")
    ranks = np.argsort(np.argsort(np.array(list(scores.values())), axis=0), axis=0)
    for column, method in ((1, "simplecil"), (2, "lda")):
        print(f"rank correlation of LogME with {method}: {np.corrcoef(ranks[:, 0], ranks[:, column])[0, 1]:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--only", default="digits,glyphs")
    args = parser.parse_args()
    for data in args.only.split(","):
        table(args.folder, data, args.orders)
        correlation(args.folder, data)


if __name__ == "__main__":
    main()
