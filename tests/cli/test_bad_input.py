"""Mistakes of the user: one line, what and where and what to do, exit code 2, no traceback, nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# Arguments, and the line without "clrun: " (its beginning, where it ends in "...").
FOUND_BY_HYDRA = {
    "unknown method": (["method=ewcc"], "no method named 'ewcc'; did you mean 'ewc'? (available: a_gem, ..."),
    "unknown dataset": (["dataset=digts"], "no dataset named 'digts'; did you mean 'digits'? (available: ..."),
    "unknown backbone": (["backbone=lennet"], "no backbone named 'lennet'; did you mean 'lenet'? (available: ..."),
    "unknown order": (["task_order=randm"], "no task_order named 'randm'; did you mean 'random'? (available: ..."),
    "unknown experiment": (["experiment=zzz"], "no experiment named 'zzz' (available: aper_cifar224, ..."),
    "unknown logger": (["logger=tensorbord"], "no logger named 'tensorbord'; did you mean 'tensorboard'? ..."),
    "unknown launcher": (["-m", "hydra/launcher=jobli"], "no hydra/launcher named 'jobli'; did you mean 'joblib'? ..."),
    "unknown group": (["methd=er"], "methd: unknown option; did you mean 'method'?"),
    "unknown group's key": (["methd.capacity=3"], "methd: unknown option; did you mean 'method'?"),
    "misspelt option": (
        ["method=ewc", "method.strenght=1"],
        "method.strenght: unknown option of method=ewc; did you mean 'strength'?",
    ),
    "option of another method": (["method.strength=1"], "method.strength: unknown option of method=er"),
    "misspelt inner option": (
        ["budget.optimizer.momentun=0"],
        "budget.optimizer.momentun: unknown option of budget=sgd; did you mean 'momentum'?",
    ),
    "misspelt seed": (["sed=1"], "sed: unknown option; did you mean 'seed'?"),
    "key below a number": (["seed.x=1"], "seed.x: unknown option..."),
    "deleted key": (["~method.nothing"], "Could not delete from config. 'method.nothing' does not exist."),
    "several values": (["seed=1,2"], "Ambiguous value for argument 'seed=1,2'; to run them all add -m, ..."),
    "range without -m": (["seed=range(3)"], "Sweep parameters 'seed=range(3)' requires --multirun"),
    "open bracket": (["seed=[1"], "'seed=[1': cannot be read: no viable alternative at input '[1'; quote ..."),
    "no key": (["=3"], "=3: Config group override must be a string or a list. Got int"),
    "misspelt command": (["lst", "methods"], "'lst': neither a command nor KEY=VALUE; did you mean 'list'?"),
    "unknown flag": (["--metod=er"], "unrecognized arguments: --metod=er; see clrun --help"),
    "no such folder": (["--config-dir", "nowhere"], "--config-dir: no such folder: nowhere"),
    "no such file": (["--config-name", "mine"], "no configuration file 'mine' (--config-name)"),
    "unknown interpolation": (["name=${nothing}"], "name: Interpolation key 'nothing' not found"),
    "empty interpolation": (["name=${"], "'name=${': cannot be read: ..."),
    "two commands": (["--cfg", "job", "-m"], "Only one of --run, --multirun, --cfg, --info and --shell_completion ..."),
    "misspelt --cfg": (["--cfg", "jobs"], "argument --cfg/-c: invalid choice: 'jobs' ..."),
    "mistake with --cfg": (["--cfg", "job", "method=ewcc"], "no method named 'ewcc'; did you mean 'ewc'? ..."),
    "pickled configuration": (["--experimental-rerun", "x"], "--experimental-rerun is not supported; ..."),
    "unknown list": (["list", "metods"], "list: no group 'metods'; did you mean 'method'? (available: backbone, ..."),
    "list of nothing": (["list"], "list: no group '' (available: backbone, ..."),
    "report of nothing": (["report"], "the following arguments are required: DIR; see clrun --help"),
    "report of no folder": (["report", "nowhere"], "report: no such folder: nowhere"),
    "report of no run": (["report", "."], "report: no run (run.json) in ."),
}
FOUND_BY_CHECK = {
    "compiled gates": (
        ["hardware.compile=true", "method=hat", "scenario.setting=til"],
        "hardware.compile: compiled code ignores hooks (prompts, adapters, gates, kfac, foof); set it to false",
    ),
    "compiled layers": (
        ["hardware.compile=true", "method=finetune", "budget=kfac"],
        "hardware.compile: compiled code ignores hooks (prompts, adapters, gates, kfac, foof); set it to false",
    ),
    "added option": (
        ["+method.capasity=1"],
        "method.capasity: unknown option of method=er; did you mean 'capacity'?",
    ),
    "forced option": (["++job.resum=1"], "job.resum: unknown option of job=default; did you mean 'resume'?"),
    "added key": (["+sede=1"], "sede: unknown option; did you mean 'seed'?"),
    "added group": (["+optimizer/x=1"], "optimizer/x: unknown option..."),
    "deleted group": (["~method"], "method: missing; choose one (clrun list method)"),
    "seed of text": (["seed=abc"], "seed: expected int, got 'abc'"),
    "seed of 1.5": (["seed=1.5"], "seed: expected int, got 1.5"),
    "negative seed": (["seed=-1"], "seed: must be at least 0, got -1"),
    "seed of yes": (["seed=true"], "seed: expected int, got True"),
    "quoted number": (["method.capacity='3'"], "method.capacity: expected int, got '3'"),
    "negative capacity": (["method.capacity=-1"], "method.capacity: must be at least 0, got -1"),
    "no tasks": (["scenario.n_tasks=0"], "scenario.n_tasks: must be at least 1, got 0"),
    "negative epochs": (["budget.epochs=-1"], "budget.epochs: must be at least 0, got -1"),
    "batch of none": (["budget.batch_size=0"], "budget.batch_size: must be at least 1, got 0"),
    "epochs and steps": (["budget.steps=5"], "budget: give exactly one of epochs and steps (set the other to null)"),
    "fraction of 1.5": (["dataset.val_fraction=1.5"], "dataset.val_fraction: must be at most 1, got 1.5"),
    "negative rate": (["budget.optimizer.lr=-1"], "budget.optimizer: Invalid learning rate: -1"),
    "rate of text": (["budget.optimizer.lr=fast"], "budget.optimizer.lr: expected float, got 'fast'"),
    "no optimizer": (["budget.optimizer=sgd"], "budget.optimizer: expected a node with a _target_, got 'sgd'"),
    "precision": (["hardware.precision=fp16"], "hardware.precision: expected one of fp32, tf32, bf16, got 'fp16'"),
    "no processes": (["hardware.processes=0"], "hardware.processes: must be at least 1, got 0"),
    "no threads": (["hardware.threads=0"], "hardware.threads: must be at least 1, got 0"),
    "split": (["job.eval_split=train"], "job.eval_split: expected one of test, val, got 'train'"),
    "no steps": (["job.max_steps=0"], "job.max_steps: must be at least 1, got 0"),
    "text for a switch": (["job.resume=maybe"], "job.resume: expected bool, got 'maybe'"),
    "setting": (["scenario.setting=dil"], "scenario.setting: expected one of til, cil, got 'dil'"),
    "label of method": (["method=ewc", "method.labels=all"], "method.labels: expected one of ..."),
    "no order listed": (["task_order=listed"], "task_order.tasks: needs a value; set task_order.tasks=..."),
    "name of a path": (["name=a/b"], "name: must be usable as the name of a folder, got 'a/b'"),
    "own images without folder": (["dataset=folder"], "dataset.root: needs a value; set dataset.root=..."),
    "stored size": (
        ["dataset=folder", "dataset.root=x", "dataset.images.size=0"],
        "dataset.images.size: must be at least 1, got 0",
    ),
    "way to fit": (
        ["dataset=cub200", "dataset.images.fit=crp"],
        "dataset.images.fit: expected one of crop, squash, got 'crp'",
    ),
}
FOUND_IN_DATA = {
    "more tasks than classes": (["scenario.n_tasks=11"], "scenario.n_tasks..."),
    "no permutation": (["task_order=listed", "task_order.tasks=[0,0,1,2,3]"], "task_order.tasks..."),
    "order of other tasks": (["task_order=listed", "task_order.tasks=[0,1]"], "task_order.tasks..."),
    "row of Williams": (["task_order=williams", "task_order.row=99"], "task_order.row..."),
    "no validation rows": (["job.eval_split=val"], "job.eval_split=val: there are no validation rows; ..."),
    "no data": (["dataset=mnist", "dataset.root=nowhere"], "dataset.root: ..."),
    "no folder": (["dataset=folder", "dataset.root=nowhere"], "dataset.root: there is no folder nowhere; expected ..."),
    "no archive": (
        ["dataset=folder", "dataset.root=nowhere", "dataset.archive=gone.zip"],
        "dataset.archive: there is no file gone.zip",
    ),
    "no prepared set": (
        ["dataset=cub200"],
        "dataset.root: cub200 cannot be read from data: expected CUB_200_2011/ ...",
    ),
    "unknown device": (["hardware.device=tpu"], "hardware.device: no device 'tpu'; use auto, cpu, cuda or cuda:N"),
    "no augmentation": (["dataset.augment=[flop]"], "dataset.augment..."),
    "no class order": (["scenario.class_order=[0,1]"], "scenario.class_order: must name each of the classes 0 ..."),
    "unknown preset": (
        ["task_order=cifar100_split", "scenario.n_tasks=10", "task_order.order=F"],
        "task_order.order: no order 'F' (available: A, B, C, D, E)",
    ),
    "preset of other tasks": (["task_order=cifar100_split"], "task_order.order: order 'A' is one of 10 tasks, ..."),
    "no sequence": (["scenario=dataset_sequence"], "scenario=dataset_sequence: digits does not consist of several ..."),
    "unknown model": (["backbone=timm", "backbone.name=resnt18"], "backbone.name: timm ..."),
    "no weights file": (["backbone=timm", "backbone.weights=gone.pth"], "backbone.weights: there is no file gone.pth"),
}
CASES = FOUND_BY_HYDRA | FOUND_BY_CHECK | FOUND_IN_DATA


def assert_refused(code: int, err: str, line: str, folder: Path) -> None:
    """One line on stderr, exit code 2, nothing written."""
    assert err.count("\n") == 1, err
    beginning, more, _ = line.partition("...") if line.endswith("...") else (line + "\n", "", "")
    assert err.startswith(f"clrun: {beginning}")
    assert code == 2
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case, clrun, folder):
    argv, line = CASES[case]
    done = clrun(*argv)
    assert_refused(done.code, done.err, line, folder)


THROUGH_THE_COMMAND = [
    "unknown method",
    "unknown dataset",
    "misspelt option",
    "unknown group",
    "several values",
    "open bracket",
    "misspelt command",
    "no such folder",
    "unknown list",
    "negative capacity",
]


@pytest.mark.parametrize("case", THROUGH_THE_COMMAND)
def test_the_real_command_refuses_likewise(case, folder):
    argv, line = CASES[case]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "clrun", *argv], cwd=folder, env=env, capture_output=True, text=True)
    assert_refused(done.returncode, done.stderr, line, folder)


def test_what_hydra_finds_is_said_without_torch(folder):
    code = (
        "import contextlib, os, sys\nfrom clrun.cli import main\n"
        "for argv in eval(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit):\n        main(argv)\n"
        "print([m for m in ('torch', 'timm', 'sklearn') if m in sys.modules])"
    )
    argvs = [argv for argv, _ in FOUND_BY_HYDRA.values()][::3] + [["--help"], ["--cfg", "job"], ["list", "methods"]]
    argvs += [["-sc", "query=bash"], ["--version"], ["--info", "searchpath"]]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COMP_LINE": "clrun method=", "COMP_POINT": "13"}
    done = subprocess.run(
        [sys.executable, "-c", code, repr(argvs)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_all_problems_of_a_run_are_listed(clrun, folder):
    done = clrun("seed=-1", "method.capacity=x", "+method.a=1", "budget.batch_size=0")
    assert done.lines == [
        "clrun: seed: must be at least 0, got -1",
        "clrun: method.capacity: expected int, got 'x'",
        "clrun: method.a: unknown option of method=er",
        "clrun: budget.batch_size: must be at least 1, got 0",
    ]
    assert done.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_gpu(clrun, folder):
    done = clrun("hardware=gpu")
    assert_refused(done.code, done.err, "hardware.device=cuda: torch sees no GPU on this machine; use ...", folder)


UNREADABLE = {
    "bracket": (b"_target_: x\na: [1, 2\nb: 3\n", "{file}, line 3: not valid YAML: expected ',' or ']', but got ':'"),
    "tab": (b"a: 1\n\tb: 2\n", "{file}, line 2: not valid YAML: found character '\\t' that cannot start any token"),
    "twice": (b"a: 1\na: 2\n", "{file}, line 2: not valid YAML: found duplicate key a"),
    "latin": (b"a: \xe4\n", "{file}: not a readable configuration file: 'utf-8' codec can't decode ..."),
    "zero": (b"a: \x00\n", "{file}: not a readable configuration file: unacceptable character #x0000: ..."),
    "interpolation": (b"a: ${oops\n", "{file}: not a readable configuration file: a: ..."),
    "list": (b"- 1\n- 2\n", "method: expected a node with a _target_, got [1, 2]; choose one ..."),
    "text": (b"hello\n", "method: expected a node with a _target_, got {{'hello': None}}; choose one ..."),
    "nothing": (b"", "method: expected a node with a _target_, got {{}}; choose one ..."),
    "default": (b"defaults: [nowhere]\n", "method/default: no method named 'nowhere' (available: ..."),
    "package": (b"# @package a b\nx: 1\n", "method=package: Too many components in '@package a b'"),
    "gone": (b"_target_: no_such.Gone\n", "method._target_: cannot import 'no_such.Gone': No module named 'no_such'"),
    "nameless": (b"_target_: clrun.methods.er.Err\n", "method._target_: cannot import 'clrun.methods.er.Err': ..."),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_yaml_of_the_user(name, clrun, folder, tmp_path):
    content, line = UNREADABLE[name]
    file = tmp_path / "my_conf" / "method" / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    done = clrun("--config-dir", str(tmp_path / "my_conf"), f"method={name}")
    assert_refused(done.code, done.err, line.format(file=file), folder)


def test_method_that_needs_the_task_id(clrun, stub, folder):
    done = clrun(*stub, "method=task_aware")
    line = "TaskAware needs the task id at test time; scenario.setting=cil cannot use it (til)"
    assert_refused(done.code, done.err, line, folder)


@pytest.mark.parametrize("argv", [[], ["-m", "seed=1,2"]])
def test_torchrun_needs_one_folder(argv, clrun, stub, folder, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = clrun(*stub, *argv)
    assert_refused(done.code, done.err, "torchrun starts one run in one folder: add hydra.run.dir=FOLDER, ...", folder)


def test_folder_that_cannot_be_made(clrun, stub_run, folder):
    (folder / "file").write_text("")
    for argv in (["hydra.run.dir=file/run"], ["-m", "seed=1", "hydra.sweep.dir=file/sweep"]):
        done = clrun(*stub_run, *argv)
        assert done.code == 2
        assert done.lines[-1].endswith("cannot be written (Not a directory); make room or choose another folder")
        assert len(done.lines) == 1
        assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["-m", "seed=interval(0,1)"], "BasicSweeper does not support sweep type : INTERVAL_SWEEP"),
        (
            ["-m", "hydra.sweep.subdir=${nothing}", "seed=1"],
            "hydra.sweep.subdir: Interpolation key 'nothing' not found",
        ),
        (["-m", "hydra.sweep.dir=${nothing}"], "hydra.sweep.dir: Interpolation key 'nothing' not found"),
        (["hydra.run.dir=${nothing}"], "hydra.run.dir: Interpolation key 'nothing' not found"),
        (["-m", "+hydra.launcher.x=1"], "Error ..."),
        (["-m", "hydra/launcher=joblib,basic"], "Sweeping over Hydra's configuration is not supported : ..."),
    ],
)
def test_options_of_hydra(argv, line, clrun, stub_run, folder):
    done = clrun(*stub_run, *argv)
    assert_refused(done.code, done.err, line, folder)


def test_slurm_without_slurm(clrun, stub_run, folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    done = clrun(*stub_run, "-m", "hydra/launcher=submitit_slurm", "seed=1")
    assert_refused(done.code, done.err, "hydra/launcher=submitit_slurm: no Slurm here (no srun); use ...", folder)


def test_a_sweep_with_a_backbone_that_cannot_be_had_starts_nothing(clrun, folder):
    done = clrun("-m", "backbone=timm", "backbone.pretrained=false", "backbone.name=test_vit,tst_resnet,test_vit.none")
    assert done.code == 2 and len(done.lines) == 2 and list(folder.iterdir()) == []
    assert "has no model 'tst_resnet'; did you mean 'test_resnet" in done.lines[0]
    assert done.lines[1].startswith("clrun: backbone.name: test_vit has no weights tagged 'none'")
    assert all(line.endswith("[1 of 3 runs]") for line in done.lines)
