"""The measured tables of docs/results.md and the README: run what is missing, draw them, say whether they still hold.

    python scripts/readme_results.py [TABLE ...] [--jobs 2] [--quick]     run and write the tables into the pages
    python scripts/readme_results.py --draw                               write the tables from the newest finished runs
    python scripts/readme_results.py --check                              exit 1 when what a table rests on has changed
    python scripts/readme_results.py --confirm                            run one order of each stale sweep again

A table is made of sweeps, each one `clrun -m` command with a folder of its own in outputs/readme: a repeated call goes
on where the last one stopped. The folder's name ends in a fingerprint of what the numbers rest on: the command, the
configuration files it names, and the code (without comments and docstrings) of every module of clrun that these reach.
After a change that matters, the sweep therefore starts anew beside the old one. docs/results.json keeps commit, date,
machine, the fingerprint of every part for `--check`, and what the first order of each sweep gave: when after a change
of code (not of a command) these runs give the same bytes again, `--confirm` brings the ledger up to date without the
rest.

--quick takes one order and digits only, and prints the tables instead of writing them.
"""

import argparse
import ast
import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from clrun.reporting.collect import collect
from clrun.reporting.groups import Group
from clrun.results import robustness

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "outputs" / "readme"
LEDGER = ROOT / "docs" / "results.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "performance.md")
NEWEST = []  # not empty: take the last finished runs of a sweep, whatever has changed since
# Modules that show numbers and make none.
SHOWING = (
    "clrun.reporting",
    "clrun.running.loggers",
    "clrun.running.preview",
    "clrun.running.dry_run",
    "clrun.cli",
    "clrun.running.jobs",
)

DATA = {
    "digits": ("dataset=digits", "scenario.n_tasks=5"),
    "glyphs": ("dataset=glyphs", "scenario.n_tasks=12"),
}
TEXTS = {  # of the tables about texts, which need the packages that these data sets and minilm are read from
    "hpo_linking_3": ("dataset=hpo_linking_3", "scenario=fixed_groups", "scenario.groups=branch"),
    "hpo_linking": ("dataset=hpo_linking", "scenario=fixed_groups", "scenario.groups=branch"),
    "icd10_chapters": ("dataset=icd10_chapters", "scenario=fixed_groups", "scenario.groups=three"),
    "body_systems": ("dataset=body_systems", "scenario=dataset_sequence"),
}
BACKBONES = {
    "glyph_vit": ("backbone=glyph_vit",),
    "cnn": ("backbone=cnn",),
    "pixels": ("backbone=mlp", "backbone.hidden=[]"),
    "random": ("backbone=glyph_vit", "backbone.pretrained=false"),
    "mlp": ("backbone=mlp",),
    "lenet": ("backbone=lenet",),
    "resnet18_reduced": ("backbone=resnet18_reduced",),
    "resnet32": ("backbone=resnet32",),
    "glyph_clip": ("backbone=glyph_clip",),
    "minilm": ("backbone=minilm", "backbone.train=none"),
    "minilm_names": ("backbone=minilm", "backbone.train=none", "backbone.head=fixed"),
    "minilm_residual": ("backbone=minilm_adapter", "backbone.head=fixed"),
    "minilm_layer": ("backbone=minilm_adapter", "backbone.form=layer"),
}
# All weights of glyph_vit move: a quarter of the default learning rate, the better one on a validation split of glyphs
# (joint 92.8 against 91.2).
GENTLE = ("budget.optimizer.lr=0.005",)
OWN_BUDGETS = {  # of further phases that move all weights
    "halrp": ("method.warmup.optimizer.lr=0.005",),
    "progress_compress": ("method.compress.optimizer.lr=0.005",),
}
ORDERS = {
    "random": lambda n: ("task_order=random", f"task_order.seed=range({n})"),
    "williams": lambda n: ("task_order=williams", f"task_order.row=range({n})"),
    "exhaustive": lambda n: ("task_order=exhaustive", f"task_order.index=range({n})"),
    "registers": lambda n: ("task_order=body_systems", f"task_order.order={','.join(REGISTERS[:n])}"),
}
REGISTERS = ("technical_to_lay", "lay_to_technical", "mixed")
ORDER_KEY = {
    "random": "task_order.seed",
    "williams": "task_order.row",
    "exhaustive": "task_order.index",
    "registers": "task_order.order",
}
FIRST_ORDER = {"registers": REGISTERS[0]}  # 0 for the other designs
CLOSED = ("simplecil", "ncm", "lda", "ranpac", "fecam")
PROMPTS = ("vpt", "l2p", "dualprompt", "coda_prompt", "dap", "lae", "aper", "ease")
FROZEN = (*CLOSED, "linear_probe")
LORA = ("lora", "o_lora", "inflora", "sd_lora", "gpm", "trgp", "cl_lora", "mos", "tuna", "sema", "hide_prompt", "acil")
VARIANTS = {"joint": ("method.mode=once",)}


@dataclass(frozen=True)
class Sweep:
    """One method over task orders.

    Attributes:
        data: key of DATA or TEXTS.
        backbone: key of BACKBONES.
        method: configuration of that name.
        orders: how many.
        setting: the setting it is trained in.
        design: key of ORDERS.
        words: further overrides.
    """

    data: str
    backbone: str
    method: str
    orders: int
    setting: str = "cil"
    design: str = "random"
    words: tuple[str, ...] = ()

    @property
    def overrides(self):
        """What decides the numbers."""
        tuned = self.method not in (*FROZEN, *PROMPTS, *LORA, "esn") and self.backbone in ("glyph_vit", "random")
        return (
            *(DATA | TEXTS)[self.data],
            *BACKBONES[self.backbone],
            f"method={self.method}",
            *VARIANTS.get(self.method, ()),
            f"scenario.setting={self.setting}",
            *(GENTLE + OWN_BUDGETS.get(self.method, ()) if tuned else ()),
            *self.words,
            *ORDERS[self.design](self.orders),
            "hardware=cpu",
            "hardware.threads=1",
        )

    @property
    def slug(self):
        """What tells it from other sweeps."""
        words = f"-{digest(self.words)[:4]}" if self.words else ""
        return f"{self.data}-{self.backbone}-{self.setting}-{self.method}{words}-{self.design}{self.orders}"

    @property
    def folder(self):
        """Where its runs are."""
        if NEWEST:
            finished = sorted(OUT.glob(f"{self.slug}/*/made.json"), key=lambda path: path.stat().st_mtime)
            return finished[-1].parent if finished else OUT / self.slug
        return OUT / self.slug / digest(self.parts)

    @property
    def first(self):
        """The sweep of its first order alone."""
        return replace(self, orders=1)

    @property
    def parts(self):
        """{name: fingerprint} of what its numbers rest on."""
        return {"command": digest(self.overrides)} | depends(self.overrides)

    def command(self, folder):
        """The words after `python -m clrun`."""
        quiet = ("job.progress=false", "job.picture=false", f"hydra.sweep.dir={folder}")
        return ["-m", *self.overrides, *quiet]

    def run(self):
        """Run what is missing; return the hours it took."""
        folder, began = self.folder, time.time()
        done = folder / "made.json"
        if done.exists():
            return 0.0
        command = self.command(folder)
        print("clrun", shlex.join(command), flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            [sys.executable, "-m", "clrun", *command], env=environment, capture_output=True, text=True
        )
        if ended.returncode:
            raise SystemExit(f"{self.method} on {self.data}: {ended.stderr[-2000:] or ended.stdout[-2000:]}")
        made = {"commit": commit(), "date": str(datetime.date.today()), "machine": machine(), "parts": self.parts}
        done.write_text(json.dumps(made, indent=1))
        return (time.time() - began) / 3600

    def group(self, orders=None):
        """Return its runs as one group; with `orders`, those of the first seeds or rows only."""
        key = ORDER_KEY[self.design]
        return Group("", {}, [run for run in self.runs() if orders is None or run.config[key] < orders])

    def runs(self):
        """Return its finished runs."""
        runs, skipped = collect([self.folder])
        assert not skipped, skipped
        return runs

    def outcome(self):
        """Return the fingerprint of what its first order gave: every count of every evaluation."""
        key, first = ORDER_KEY[self.design], FIRST_ORDER.get(self.design, 0)
        run = min((run for run in self.runs() if run.config[key] == first), key=lambda run: run.config["seed"])
        return hashlib.sha256((run.folder / "accuracy.csv").read_bytes()).hexdigest()[:12]


def numbers(group, setting):
    """Return {accuracy, sd, forgetting, aopd, mopd} in points; None where there is none."""
    _, _, finals = group.finals(setting)
    values = {"accuracy": robustness.mean(finals), "sd": robustness.sd(finals), "forgetting": group.forgetting(setting)}
    values |= {"aopd": robustness.aopd(finals), "mopd": robustness.mopd(finals)}
    return {name: None if value is None else 100 * value for name, value in values.items()}


def result(sweep):
    """Return what the headline table and docs/methods.md show of a sweep."""
    values = numbers(sweep.group(), sweep.setting)
    named = {name: getattr(sweep, name) for name in ("data", "backbone", "setting", "method", "orders")}
    named |= {"words": " ".join(sweep.words)} if sweep.words else {}
    return named | {name: round(values[name], 1) for name in ("accuracy", "aopd") if values[name] is not None}


def cell(values, name):
    """Return a number of a table."""
    value = values[name]
    text = "" if value is None else f"{value + 0.0:.1f}"
    if name == "accuracy" and values["sd"] is not None:
        text += f" ± {values['sd']:.1f}"
    return text.replace("-0.0", "0.0")


def lines(header, rows):
    """Return a table in markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


# --- tables: each a function of (orders or None, data) that gives sweeps, and one that draws them


class Frozen:
    """Learners on frozen features against training (five orders)."""

    methods = (*FROZEN, "finetune", "joint")
    features = ("glyph_vit", "pixels", "random")

    def sweeps(self, data, orders):
        return [Sweep(d, b, m, orders or 5) for d in data for b in self.features for m in self.methods]

    def draw(self, data, orders):
        blocks = []
        for d in data:
            rows = []
            for m in self.methods:
                found = [numbers(Sweep(d, b, m, orders or 5).group(), "cil") for b in self.features]
                rows.append([m, *(cell(v, name) for v in found for name in ("accuracy", "forgetting", "aopd"))])
            names = [f"{b}: {name}" for b in self.features for name in ("accuracy", "forgetting", "AOPD")]
            blocks.append(lines([d, *names], rows))
        return "\n\n".join(blocks)


class LogMe:
    """LogME of the features of a backbone against the accuracy of its prototypes (one order: nothing depends on it)."""

    backbones = tuple(name for name in BACKBONES if name != "glyph_clip" and not name.startswith("minilm"))

    def sweeps(self, data, orders):
        return [Sweep(d, b, "simplecil", 1) for d in data for b in self.backbones]

    def draw(self, data, orders):
        found = {}
        for b in self.backbones:
            for d in data:
                group = Sweep(d, b, "simplecil", 1).group()
                found[b, d] = group.runs[0].logme, numbers(group, "cil")["accuracy"]
        ranked = sorted(self.backbones, key=lambda b: -found[b, data[-1]][0])
        rows = [[b, *(f"{v:.{3 - 2 * k}f}" for d in data for k, v in enumerate(found[b, d]))] for b in ranked]
        text = lines(["features", *(f"{d}: {name}" for d in data for name in ("LogME", "accuracy"))], rows)
        for d in data:
            pairs = np.array([found[b, d] for b in self.backbones])
            ranks = np.argsort(np.argsort(pairs, axis=0), axis=0)
            pearson, spearman = (np.corrcoef(values.T)[0, 1] for values in (pairs, ranks))
            text += f"\n\n{d}: correlation {pearson:.2f} (Pearson), {spearman:.2f} (ranks)."
        return text


class Prompts:
    """Prompts and adapters on glyph_vit (three orders, one seed)."""

    methods = (*PROMPTS, "finetune", "simplecil", "ranpac", "joint")

    def sweep(self, d, m, orders):
        return Sweep(d, "glyph_vit", m, orders or (5 if m in Frozen.methods else 3))

    def sweeps(self, data, orders):
        return [self.sweep(d, m, orders) for d in data for m in self.methods]

    def draw(self, data, orders):
        rows = []
        for m in self.methods:
            row = [m]
            for d in data:
                group = self.sweep(d, m, orders).group(3)
                row += [cell(numbers(group, "cil"), name) for name in ("accuracy", "forgetting", "aopd")]
                row += [f"{max(map(trainable, group.runs)):,}", f"{np.mean([r.train_seconds for r in group.runs]):.0f}"]
            rows.append(row)
        names = ("accuracy", "forgetting", "AOPD", "trainable", "train s")
        return lines(["method", *(f"{d}: {name}" for d in data for name in names)], rows)


class Orders:
    """How much a result depends on the order of the tasks (digits with a CNN: ten; glyphs with glyph_vit: five)."""

    settings = {
        "til": ("finetune", "er", "ewc", "simplecil", "ranpac", "l2p", "halrp", "apd", "stl"),
        "cil": ("finetune", "er", "ewc", "simplecil", "ranpac", "l2p"),
    }

    def sweep(self, d, s, m, orders):
        if d == "digits":
            return None if m == "l2p" else Sweep(d, "cnn", m, orders or 10, s, "williams")
        return Sweep(d, "glyph_vit", m, orders or 5, s)

    def sweeps(self, data, orders):
        every = [self.sweep(d, s, m, orders) for d in data for s, methods in self.settings.items() for m in methods]
        return [sweep for sweep in every if sweep]

    def draw(self, data, orders):
        blocks = []
        for s, methods in self.settings.items():
            rows = []
            for m in methods:
                row = [m]
                for d in data:
                    sweep = self.sweep(d, s, m, orders)
                    names = ("accuracy", "aopd", "mopd", "forgetting")
                    row += [cell(numbers(sweep.group(), s), name) for name in names] if sweep else [""] * len(names)
                rows.append(row)
            names = [f"{d}: {name}" for d in data for name in ("accuracy", "AOPD", "MOPD", "forgetting")]
            blocks.append(lines([f"trained and read {s}", *names], rows))
        return "\n\n".join(blocks)


class Families:
    """Curvature, regularisation, replay, gradients and masks (three orders)."""

    # Strengths chosen on validation rows of glyphs, in an order that the table does not use (see docs/results.md).
    tuned = {
        ("cnn", "ewc"): ("method.solver=proximal", "method.strength=1000"),
        ("cnn", "si"): ("method.solver=proximal", "method.strength=10"),
        ("cnn", "mas"): ("method.solver=proximal", "method.strength=1"),
        ("cnn", "hat"): ("method.init=uniform",),
        ("glyph_vit", "ewc"): ("method.solver=proximal", "method.strength=10000"),
        ("glyph_vit", "si"): ("method.solver=proximal", "method.strength=1000"),
        ("glyph_vit", "mas"): ("method.solver=proximal", "method.strength=10"),
        ("glyph_vit", "hat"): ("method.init=uniform", "budget.optimizer.lr=0.02"),
    }
    both = ("finetune", "l2", "ewc", "kfac_ewc", "si", "mas", "ncl", "qr", "blip", "progress_compress", "lwf", "ebll")
    both += ("er", "der", "icarl", "gem", "a_gem", "mer", "dgc", "replay_finetune", "joint")
    til = ("packnet", "hat", "fish", "batchensemble")
    vit = ("vit_pad",)
    backbones = ("cnn", "glyph_vit")

    def sweep(self, d, b, s, m, orders):
        if (m in self.til and s == "cil") or (m in self.vit and b == "cnn"):
            return None
        words = self.tuned.get((b, m), ())
        if m == "mer":
            words += ("budget=online", "method.algorithm=7")  # a row is a step: one pass, as published
        elif b == "cnn":
            words += ("budget.epochs=10",)
        if d == "glyphs":
            words += ("job.max_tasks=6",)
        shared = not words and s == "cil" and m in Frozen.methods
        return Sweep(d, b, m, orders or (5 if shared else 3), s, words=words)

    def sweeps(self, data, orders):
        every = [
            self.sweep(d, b, s, m, orders)
            for d in data
            for b in self.backbones
            for s in ("cil", "til")
            for m in (*self.both, *self.til, *self.vit)
        ]
        return [sweep for sweep in every if sweep]

    def draw(self, data, orders):
        blocks = []
        columns = [(d, b) for d in data for b in self.backbones]
        for s in ("cil", "til"):
            rows = []
            for m in (*self.both, *self.til, *self.vit):
                row = [m]
                for d, b in columns:
                    sweep = self.sweep(d, b, s, m, orders)
                    row.append(cell(numbers(sweep.group(3), s), "accuracy") if sweep else "")
                if any(row[1:]):
                    rows.append(row)
            blocks.append(lines([f"trained and read {s}", *(f"{d}, {b}" for d, b in columns)], rows))
        return "\n\n".join(blocks)


class Mixture:
    """Slow learners, ensembles and merging on glyph_vit (three orders): digits, and the first four tasks of glyphs."""

    # Options chosen on validation rows, in an order that the table does not use (see docs/results.md).
    rows = {
        "finetune": ("finetune",),
        "finetune, compete: current": ("finetune", "method.compete=current"),
        "er": ("er",),
        "ranpac": ("ranpac",),
        "joint": ("joint",),
        "slca": ("slca",),
        "slca_pp": ("slca_pp",),
        "coma": ("coma",),
        "cofima": ("cofima",),
        "esn": ("esn",),
        "swag": ("swag", "method.solver=proximal", "method.strength=10000"),
        "dlcft": ("dlcft",),
        "b_tuning": ("b_tuning",),
        "imm": ("imm",),
        "merge: mean": ("merge",),
        "merge: fisher": ("merge", "method.rule=fisher", "method.fisher.normalise=false"),
        "merge: regmean": ("merge", "method.rule=regmean"),
        "merge: task_arithmetic": ("merge", "method.rule=task_arithmetic", "method.task_arithmetic.scale=0.2"),
        "merge: ties": ("merge", "method.rule=ties", "method.ties.scale=0.6"),
        "merge: magmax": ("merge", "method.rule=magmax", "method.magmax.scale=0.5", "method.train_from=previous"),
        "merge: opcm": ("merge", "method.rule=opcm", "method.opcm.alpha=0.8"),
        "merge: dop": ("merge", "method.rule=dop", "method.dop.alpha=0.5"),
    }

    def sweep(self, d, row, orders):
        method, *words = self.rows[row]
        words += ["job.max_tasks=4"] if d == "glyphs" else []
        shared = not words and method in Frozen.methods  # sweeps of more orders that another table asks for
        return Sweep(d, "glyph_vit", method, orders or (5 if shared else 3), words=tuple(words))

    def sweeps(self, data, orders):
        return [self.sweep(d, row, orders) for d in data for row in self.rows]

    def draw(self, data, orders):
        rows = []
        for row in self.rows:
            cells = [row]
            for d in data:
                group = self.sweep(d, row, orders).group(3)
                cells += [cell(numbers(group, "cil"), name) for name in ("accuracy", "forgetting", "aopd")]
                cells.append(cell(numbers(group, "til"), "accuracy"))
            rows.append(cells)
        names = ("cil accuracy", "forgetting", "AOPD", "til accuracy")
        return lines(["method", *(f"{d}: {name}" for d in data for name in names)], rows)


class Towers:
    """Methods on an image and a text tower: digits, and the first four of the tasks of glyphs (three orders)."""

    adamw = ("budget=adamw",)
    shared = ("experts=2", "routers=shared", "freeze_used=false", "selector=none", "label_smoothing=0")
    rows = {  # name in the table: method and its options
        "zero_shot": ("zero_shot", ()),
        "coop": ("coop", ()),
        "clip_finetune": ("clip_finetune", (*adamw, "budget.optimizer.lr=1e-4")),
        "zscl": ("zscl", (*adamw, "budget.optimizer.lr=1e-4")),
        "proof": ("proof", ()),
        "rapf": ("rapf", ()),
        "rail": ("rail", ()),
        "promptfusion": ("promptfusion", (*adamw, "budget.optimizer.lr=2e-3")),
        "promptfusion_lite": ("promptfusion_lite", (*adamw, "budget.optimizer.lr=2e-3")),
        "moe_adapters (class-incremental)": ("moe_adapters", (*adamw, *(f"method.{word}" for word in shared))),
        "moe_adapters (MTIL)": ("moe_adapters", adamw),
        "joint": ("joint", ("budget.optimizer.lr=0.005",)),
    }
    length = {"digits": ("budget.epochs=2",), "glyphs": ("budget.epochs=null", "budget.steps=30", "job.max_tasks=4")}
    # The longest names of glyphs leave the text tower room for two vectors.
    two_vectors = {"coop": ("method.length=2",)} | {
        name: ("method.prompts.text=2",) for name in ("promptfusion", "promptfusion_lite")
    }
    names = {"digits": ("job.eval_unseen=true",), "glyphs": ("job.eval_extra=[digits]",)}  # methods that read names

    def sweep(self, d, row, orders):
        method, words = self.rows[row]
        words += self.length[d] if method == "joint" else (*self.length[d], *self.names[d])
        if d == "glyphs":
            words += self.two_vectors.get(method, ())
        if method == "zscl" and d == "glyphs":  # its reference data are neither learned nor evaluated
            words += ("method.reference=[synthetic]",)
        return Sweep(d, "glyph_clip", method, orders or 3, words=words)

    def sweeps(self, data, orders):
        return [self.sweep(d, row, orders) for d in data for row in self.rows]

    def draw(self, data, orders):
        found = {(d, row): self.sweep(d, row, orders).group() for d in data for row in self.rows}
        rows = []
        for row in self.rows:
            line = [row]
            for d in data:
                values = numbers(found[d, row], "cil")
                line += [cell(values, name) for name in ("accuracy", "forgetting", "aopd")]
                line.append(cell(numbers(found[d, row], "til"), "accuracy"))
            rows.append(line)
        names = ("accuracy", "forgetting", "AOPD", "with the task id")
        table = lines(["method", *(f"{d}: {name}" for d in data for name in names)], rows)
        return f"{table}\n\n{self.unseen(data, found)}"

    def unseen(self, data, found):
        """Return the table of accuracies on tasks and data sets that have not been learned."""
        rows = []
        for row in self.rows:
            if row == "joint":
                continue
            line = [row]
            for name in ("transfer", "matrix_average", "average_accuracy"):
                values = [run.metrics["til"][name] for run in found["digits", row].runs]
                line.append(f"{100 * np.mean(values):.1f}")
            if "glyphs" in data:
                counts = [held_out(run) for run in found["glyphs", row].runs]
                line.append(" to ".join(f"{100 * np.mean([c[k] for c in counts]):.1f}" for k in (0, 1)))
            rows.append(line)
        names = [f"digits: {name}" for name in ("transfer", "matrix average", "last")]
        return lines(["method", *names, *["digits while glyphs are learned"] * ("glyphs" in data)], rows)


def held_out(run):
    """Return the accuracy on the digits that are never learned, before the first task and after the last one."""
    counts = json.loads((run.folder / "run.json").read_text())["held_out"]
    return [counts[k]["digits"][0] / counts[k]["digits"][1] for k in (0, -1)]


class Lora:
    """LoRA and adapters of each task on glyph_vit (three orders): digits, and the first four tasks of glyphs.

    gpm and trgp are for small networks and have the CNN; trgp needs the task id, and both are trained and read til.
    """

    small = ("gpm", "trgp")

    variants = {"lora: growth=per_task": ("method.growth=per_task",)}
    rows = ("finetune", "ease", "ranpac", "lora", *variants, *LORA[1:])
    # Options under which a method does what its public code does where that differs from its paper; on glyphs alone.
    published = {
        "inflora: energy=plain": ("method.energy=plain",),  # the other way round: the default is that of the code
        "mos: pulls_per_step=13, stored=mean_of_earlier": ("method.pulls_per_step=13", "method.stored=mean_of_earlier"),
        "tuna: universal=newest": ("method.universal=newest",),
        "hide_prompt: selection=reshaped": ("method.selection=reshaped",),
        "sema: detect=batch": ("method.detect=batch",),
    }
    shorter = (
        "method.alignment.budget.epochs=10",
        "method.tii.alignment.budget.epochs=10",
    )  # a third of what is published

    def sweep(self, d, row, orders):
        method = row.partition(":")[0]
        words = (self.variants | self.published).get(row, ())
        words += self.shorter if method == "hide_prompt" else ()
        words += ("job.max_tasks=4",) if d == "glyphs" else ()
        shared = not words and method in Frozen.methods  # sweeps of more orders that another table asks for
        backbone, setting = ("cnn", "til") if method in self.small else ("glyph_vit", "cil")
        return Sweep(d, backbone, method, orders or (5 if shared else 3), setting, words=words)

    def sweeps(self, data, orders):
        every = [self.sweep(d, row, orders) for d in data for row in self.rows]
        return every + [self.sweep("glyphs", row, orders) for row in self.published if "glyphs" in data]

    def draw(self, data, orders):
        names = ("accuracy", "forgetting", "AOPD")
        rows = []
        for row in (*self.rows, *(self.published if "glyphs" in data else ())):
            cells, setting = ([f"{row} (cnn, til)"], "til") if row in self.small else ([row], "cil")
            for d in data:
                if row in self.published and d != "glyphs":
                    cells += [""] * len(names)
                    continue
                values = numbers(self.sweep(d, row, orders).group(3), setting)
                cells += [cell(values, name.lower()) for name in names]
            rows.append(cells)
        return lines(["method", *(f"{d}: {name}" for d in data for name in names)], rows)


class Linking:
    """Forgetting of entity linking: three organ systems in all six orders, three seeds each."""

    budget = ("budget=adamw", "budget.epochs=10", "seed=range(3)")
    # Strengths chosen on validation rows of the canonical order, see docs/results.md.
    learners = {  # name in the table: method and its options
        "finetune": ("finetune",),
        "er": ("er", "method.capacity=400"),
        "ewc": ("ewc", "method.strength=100"),
        "kfac_ewc": ("kfac_ewc", "method.solver=grad", "method.strength=10"),
        "kfac_ewc, strength 100": ("kfac_ewc", "method.solver=grad", "method.strength=100"),
        "joint": ("joint",),
    }
    frozen = ("zero_shot", "ncm_names")

    def sweep(self, m, orders):
        count = orders or 6
        if m in self.frozen:
            return Sweep("hpo_linking_3", "minilm_names", m, count, design="exhaustive")
        method, *words = self.learners[m]
        words = (*self.budget, *words)
        return Sweep("hpo_linking_3", "minilm_residual", method, count, design="exhaustive", words=words)

    def sweeps(self, data, orders):
        return [] if list(data) != list(DATA) else [self.sweep(m, orders) for m in (*self.frozen, *self.learners)]

    def draw(self, data, orders):
        if not self.sweeps(data, orders):
            return ""
        cil, til = tfidf(self.sweep("zero_shot", orders))
        rows = [["tfidf", f"{cil:.1f}", "", "", "0.0", f"{til:.1f}", "", "", "0.0"]]
        base = {s: numbers(self.sweep("finetune", orders).group(), s)["forgetting"] for s in ("cil", "til")}
        for m in (*self.frozen, *self.learners):
            group, row = self.sweep(m, orders).group(), [m]
            for s in ("cil", "til"):
                values = numbers(group, s)
                row += [cell(values, "accuracy"), cell(values, "forgetting")]
                saved = 100 * (1 - values["forgetting"] / base[s])
                row.append(f"{saved:.0f} %" if m not in (*self.frozen, "finetune", "joint") else "")
                row.append(cell(values, "aopd"))
            rows.append(row)
        names = ("accuracy", "forgetting", "less than finetune", "AOPD")
        return lines(["hpo_linking_3", *(f"{s}: {name}" for s in ("cil", "til") for name in names)], rows)


class Texts:
    """Entity linking on eight organ systems, chapters of ICD-10 and registers of language: three orders each."""

    # Strengths of icd10_chapters and body_systems were chosen on validation rows of the canonical order; those of
    # hpo_linking are those of hpo_linking_3.
    strengths = {  # of ewc and of kfac_ewc
        "hpo_linking": (100, 10),
        "icd10_chapters": (1000, 1),
        "body_systems": (10, 10),
    }
    learners = ("finetune", "er", "lwf", "ewc", "kfac_ewc", "joint")
    frozen = {
        "hpo_linking": ("zero_shot", "ncm_names"),
        "icd10_chapters": ("zero_shot", "ncm_names", "simplecil", "ranpac"),
        "body_systems": ("zero_shot", "ncm_names", "simplecil", "ranpac"),
    }

    def sweep(self, d, m, orders):
        setting, design = ("dil", "registers") if d == "body_systems" else ("cil", "random")
        if m in self.frozen[d]:
            backbone = "minilm_names" if m in Linking.frozen else "minilm"
            return Sweep(d, backbone, m, orders or 3, setting, design)
        ewc, kfac = self.strengths[d]
        words = {
            "er": (f"method.capacity={800 if d == 'hpo_linking' else 200}",),
            "ewc": (f"method.strength={ewc}",),
            "kfac_ewc": ("method.solver=grad", f"method.strength={kfac}"),
        }.get(m, ())
        backbone, budget = ("minilm_layer", ("budget=adam",))
        if d == "hpo_linking":
            backbone, budget = "minilm_residual", ("budget=adamw", "budget.epochs=10")
        return Sweep(d, backbone, m, orders or 3, setting, design, (*budget, *words))

    def sweeps(self, data, orders):
        if list(data) != list(DATA):
            return []
        return [self.sweep(d, m, orders) for d in self.frozen for m in (*self.frozen[d], *self.learners)]

    def draw(self, data, orders):
        if not self.sweeps(data, orders):
            return ""
        return "\n\n".join(self.block(d, orders) for d in self.frozen)

    def block(self, d, orders):
        """Return the table of one data set."""
        settings = ("dil",) if d == "body_systems" else ("cil", "til")
        cil, til = tfidf(self.sweep(d, "zero_shot", orders))
        rows = []
        for m in ("tfidf", *self.frozen[d], *self.learners):
            row = [m]
            for s in settings:
                if m == "tfidf":
                    row += [f"{til if s == 'til' else cil:.1f}", "", "0.0"]
                    continue
                values = numbers(self.sweep(d, m, orders).group(), s)
                row += [cell(values, name) for name in ("accuracy", "forgetting", "aopd")]
            rows.append(row)
        names = ("accuracy", "forgetting", "AOPD")
        return lines([d, *(f"{s}: {name}" for s in settings for name in names)], rows)


def tfidf(sweep):
    """Return the accuracies in points of TF-IDF against the names of the classes: all of them compete, the task's.

    Characters of words, two to four at a time, by scikit-learn; the vocabulary and its weights are those of the names.
    Nothing is learned, and the order of the tasks does not matter.

    Args:
        sweep: one on the same data.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    from clrun.data.orders import canonical
    from clrun.data.split import Plain
    from clrun.data.texts import to_texts
    from clrun.running.build import build_stream
    from clrun.running.parts import Parts

    parts = Parts(json.loads((sweep.runs()[0].folder / "run.json").read_text())["config"])
    dataset = parts.load_dataset()
    stream = build_stream(parts, dataset, canonical, Plain())
    reader = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    names = reader.fit_transform(dataset.class_names)
    found = []
    for task in stream.tasks:
        batch = next(task.test.batches(len(task.test), view="raw"))
        scores = (reader.transform(to_texts(batch.x)) @ names.T).toarray()
        own = np.where(stream.members[task.index].numpy(), scores, -1)
        found.append([np.mean(s.argmax(axis=1) == batch.y.numpy()) for s in (scores, own)])
    return [100 * value for value in np.mean(found, axis=0)]


TABLES = {
    "frozen": Frozen(),
    "logme": LogMe(),
    "prompts": Prompts(),
    "orders": Orders(),
    "families": Families(),
    "mixture": Mixture(),
    "towers": Towers(),
    "lora": Lora(),
    "linking": Linking(),
    "texts": Texts(),
}


def trainable(run):
    """Return the most parameters that were trained in any task of a run."""
    tasks = json.loads((run.folder / "run.json").read_text())["cost"]["tasks"]
    return max(task["parameters"]["trainable"] for task in tasks)


# --- what numbers rest on


def digest(value):
    """Return 12 hexadecimal digits of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@cache
def depends(overrides):
    """Return {file or module: fingerprint} of the configuration and the code behind a command."""
    found = {}
    base = yaml.safe_load((ROOT / "conf/config.yaml").read_text())
    choices = {k: v for entry in base["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    words = dict(word.split("=", 1) for word in overrides)
    files = [ROOT / "conf/config.yaml"]
    for group, member in (choices | words).items():
        path = ROOT / "conf" / group / f"{member}.yaml"
        if "/" not in group and path.is_file() and group != "logger":
            files += [path, *included(path)]
    modules = {"clrun.running.run"}
    for path in files:
        content = yaml.safe_load(path.read_text())
        found[path.relative_to(ROOT).as_posix()] = digest(content)
        modules |= set(targets(content))
    for module in reached(frozenset(modules)):
        found[module] = code(module)
    return found


def included(path):
    """Yield the files that a YAML file includes from a folder `_options`, directly or not."""
    for entry in yaml.safe_load(path.read_text()).get("defaults", ()):
        if entry != "_self_":
            file = path.parent / f"{entry.partition('@')[0]}.yaml"
            yield file
            yield from included(file)


def targets(node):
    """Yield the modules that a configuration names."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_" and str(value).startswith("clrun."):
                yield str(value).rpartition(".")[0]
            yield from targets(value)


@cache
def reached(roots):
    """Return the modules of clrun that these import, directly or not, in order."""
    seen, waiting = set(), list(roots)
    while waiting:
        module = waiting.pop()
        if module in seen or source(module) is None or module.startswith(SHOWING):
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(source(module).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("clrun"):
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names if alias.name.startswith("clrun")]
    return sorted(seen)


def source(module):
    """Return the file of a module of clrun; None when there is none of that name."""
    path = ROOT.joinpath(*module.split("."))
    files = [path.with_suffix(".py"), path / "__init__.py"]
    return next((file for file in files if file.is_file()), None)


@cache
def code(module):
    """Return the fingerprint of a module's code, without comments and docstrings."""
    tree = ast.parse(source(module).read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = body[1:]
    return digest(ast.dump(tree))


@cache
def commit():
    """Return the commit at hand, with + when files that numbers rest on differ from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "clrun", "conf"], capture_output=True, text=True).stdout
    return name + "+" * bool(changed)


def machine():
    """Return what the runs ran on."""
    return f"{os.cpu_count()} cores {platform.machine()}, CPU, one thread per run"


def rests_on(parts):
    """Return what several sweeps rest on together, beside their commands: {file or module: fingerprint}."""
    return {key: value for each in parts for key, value in each.items() if key != "command"}


# --- pages


def write(name, text, sweeps):
    """Put a table into docs/results.md and what it rests on into the ledger."""
    made = [json.loads((sweep.folder / "made.json").read_text()) for sweep in sweeps]
    commits, dates, machines = (sorted({m[key] for m in made}) for key in ("commit", "date", "machine"))
    entry = {"commits": commits, "dates": dates, "machines": machines, "parts": rests_on([m["parts"] for m in made])}
    entry["sweeps"] = {
        sweep.slug: {"command": m["parts"]["command"], "first": sweep.outcome(), "result": result(sweep)}
        for sweep, m in zip(sweeps, made, strict=True)
    }
    save(ledger() | {name: entry})
    place(f"table: {name}", f"{text}\n\n{stamp(entry)}")


def ledger():
    """Return {table: what it rests on}."""
    return json.loads(LEDGER.read_text()) if LEDGER.exists() else {}


def save(content):
    """Write the ledger."""
    LEDGER.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def stamp(entry):
    """Return the line below a table."""
    span = " to ".join(dict.fromkeys((entry["dates"][0], entry["dates"][-1])))
    text = f"Commit {', '.join(entry['commits'])}; {span}; {'; '.join(entry['machines'])}"
    if "confirmed" in entry:
        again = entry["confirmed"]
        text += f"; the first order of each sweep, run again at {again['commit']} on {again['date']}, gave the same"
    return f"*{text}.*"


def amend(name, line):
    """Replace the line below a table."""
    table, _, _ = between(f"table: {name}").rpartition("\n")
    place(f"table: {name}", f"{table}\n{line}")


def page(mark):
    """Return the page that holds <!-- mark -->."""
    for path in PAGES:
        if f"<!-- {mark} -->\n" in path.read_text():
            return path
    names = ", ".join(path.relative_to(ROOT).as_posix() for path in PAGES)
    raise SystemExit(f"{names}: no place for {mark!r} (<!-- {mark} --> and <!-- end -->)")


def between(mark):
    """Return what stands between <!-- mark --> and the next <!-- end -->."""
    _, _, rest = page(mark).read_text().partition(f"<!-- {mark} -->\n")
    return rest.partition("\n<!-- end -->")[0]


def place(mark, text):
    """Put `text` between <!-- mark --> and the next <!-- end --> of the page that has them."""
    path = page(mark)
    before, begin, rest = path.read_text().partition(f"<!-- {mark} -->")
    path.write_text(f"{before}{begin}\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


def headline():
    """Return the short table of the README: glyphs in 12 tasks on glyph_vit, from the ledger."""
    rows, settings = [], Orders.settings
    results = {slug: part["result"] for slug, part in ledger()["orders"]["sweeps"].items()}
    for m in settings["til"]:
        row = [m]
        for s in ("til", "cil"):
            found = results[TABLES["orders"].sweep("glyphs", s, m, None).slug] if m in settings[s] else {}
            row += [f"{found[name]:.1f}" if name in found else "" for name in ("accuracy", "aopd")]
        rows.append(row)
    return lines(["method", "til: accuracy", "til: AOPD", "cil: accuracy", "cil: AOPD"], rows)


def changes(name, entry):
    """Return (what a table rests on and has changed since it was made, the sweeps whose command is another or new)."""
    sweeps = TABLES[name].sweeps(list(DATA), None)
    now = rests_on([sweep.parts for sweep in sweeps])
    changed = sorted(key for key in entry["parts"].keys() | now.keys() if entry["parts"].get(key) != now.get(key))
    known = {slug: part["command"] for slug, part in entry["sweeps"].items()}
    return changed, [sweep.slug for sweep in sweeps if known.get(sweep.slug) != sweep.parts["command"]]


def check():
    """Say which tables rest on something that has changed since; return the exit code."""
    stale = False
    for name, entry in ledger().items():
        changed, others = changes(name, entry)
        changed += [f"the command of {slug}" for slug in others]
        print(f"{name}: {'changed since: ' + ', '.join(changed) if changed else 'up to date'}")
        stale |= bool(changed)
    return int(stale)


def confirm(names, jobs):
    """Run the first order of every sweep of stale tables again and compare; return the exit code."""
    wrong = False
    for name in names:
        entry = ledger()[name]
        changed, others = changes(name, entry)
        if not changed and not others:
            continue
        sweeps = [s for s in TABLES[name].sweeps(list(DATA), None) if s.slug not in others]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda sweep: sweep.first.run(), sweeps))
        differ = [s.slug for s in sweeps if s.first.outcome() != entry["sweeps"][s.slug]["first"]]
        wrong |= bool(differ or others)
        if differ or others:
            print(f"{name}: run again: {', '.join(differ + others)}")
            continue
        entry["parts"] = rests_on([sweep.parts for sweep in sweeps])
        entry["confirmed"] = {"commit": commit(), "date": str(datetime.date.today())}
        save(ledger() | {name: entry})
        amend(name, stamp(entry))
        print(f"{name}: {len(sweeps)} sweeps give the same")
    return int(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="commands at once")
    parser.add_argument("--quick", action="store_true", help="one order, digits only; prints the tables")
    parser.add_argument("--draw", action="store_true", help="run nothing; take the newest finished runs")
    parser.add_argument("--check", action="store_true", help="only say what has changed since the tables were made")
    parser.add_argument("--confirm", action="store_true", help="run the first order of what has changed and compare")
    args = parser.parse_args()
    if args.check:
        sys.exit(check())
    if args.confirm:
        sys.exit(confirm(args.tables or list(ledger()), args.jobs))
    data, orders = (["digits"], 1) if args.quick else (list(DATA), None)
    wanted = args.tables or list(TABLES)
    sweeps = list(dict.fromkeys(sweep for name in wanted for sweep in TABLES[name].sweeps(data, orders)))
    if args.draw:
        NEWEST.append(True)
    else:
        with ThreadPoolExecutor(args.jobs) as pool:
            hours = sum(pool.map(Sweep.run, sweeps))
        print(f"{len(sweeps)} sweeps, {hours:.2f} hours of one core")
    for name in wanted:
        text = TABLES[name].draw(data, orders)
        print(f"\n{name}\n\n{text}")
        if not args.quick:
            write(name, text, TABLES[name].sweeps(data, orders))
    if not args.quick:
        place("headline", headline())
        print("now run python scripts/method_page.py, which shows some of these results")


if __name__ == "__main__":
    main()
