"""Mistakes of the user: one line, what and where and what to do, exit code 2, no traceback, nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# What the signature of an option excludes is tried for every option in tests/unit/test_options.py.
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
    "several values": (["seed=1,2"], "Ambiguous value for argument 'seed=1,2'; add -m to run all of them, ..."),
    "range without -m": (["seed=range(3)"], "Sweep parameters 'seed=range(3)' requires --multirun"),
    "open bracket": (["seed=[1"], "'seed=[1': cannot be read: no viable alternative at input '[1'; quote ..."),
    "no key": (["=3"], "=3: Config group override must be a string or a list. Got int"),
    "command after an override": (["method=er", "list"], "'list': a command is the first word, as in: clrun list ..."),
    "folder of another command": (["--config-dir", ".", "report", "."], "unrecognized arguments: --config-dir; ..."),
    "misspelt command": (["lst", "methods"], "'lst': neither a command nor KEY=VALUE; did you mean 'list'?"),
    "unknown flag": (["--metod=er"], "unrecognized arguments: --metod=er; see clrun --help"),
    "no such folder": (["--config-dir", "nowhere"], "--config-dir: no such folder: nowhere"),
    "no such file": (["--config-name", "mine"], "there is no configuration file 'mine' (--config-name)"),
    "unknown interpolation": (["name=${nothing}"], "name: Interpolation key 'nothing' not found"),
    "unquoted home": (
        ["dataset=folder", "dataset.root=~/x"],
        """'dataset.root=~/x': cannot be read; quote the value: 'dataset.root="~/x"'""",
    ),
    "end of a Windows line": (
        ["method=er", "dataset=digits\r"],
        "'dataset=digits': a carriage return follows, as at the end of lines of Windows files; convert the script ...",
    ),
    "name in capitals": (["method=ER"], "no method named 'ER'; did you mean 'er'? (available: ..."),
    "empty sweep": (
        ["-m", "seed=range(0)"],
        "seed=range(0): gives no values, so that the sweep has no runs; range(1,4) gives 1, 2 and 3",
    ),
    "empty interpolation": (["name=${"], "'name=${': cannot be read: ..."),
    "two commands": (["--cfg", "job", "-m"], "Only one of --run, --multirun, --cfg, --info and --shell_completion ..."),
    "misspelt --cfg": (["--cfg", "jobs"], "argument --cfg/-c: invalid choice: 'jobs' ..."),
    "mistake with --cfg": (["--cfg", "job", "method=ewcc"], "no method named 'ewcc'; did you mean 'ewc'? ..."),
    "pickled configuration": (["--experimental-rerun", "x"], "--experimental-rerun is not supported; ..."),
    "unknown list": (
        ["list", "metods"],
        "list: there is no group 'metods'; did you mean 'method'? (available: backbone, ...",
    ),
    "list of Hydra's own group": (["list", "hydra"], "list: there is no group 'hydra' (available: backbone, ..."),
    "list of nothing": (["list"], "list: name a group (available: backbone, ..."),
    "report of nothing": (["report"], "the following arguments are required: DIR; see clrun --help"),
    "report of no folder": (["report", "nowhere"], "report: no such folder: nowhere"),
    "report of no run": (["report", "."], "report: no run (run.json) found in ."),
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
    "deleted group": (["~method"], "method: is missing; set method=CHOICE (see clrun list method)"),
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
    "countless threads": (["hardware.threads=10000"], "hardware.threads: must be at most 4096, got 10000"),
    "split": (["job.eval_split=train"], "job.eval_split: expected one of test, val, got 'train'"),
    "no steps": (["job.max_steps=0"], "job.max_steps: must be at least 1, got 0"),
    "text for a switch": (["job.resume=maybe"], "job.resume: expected bool, got 'maybe'"),
    "setting": (["scenario.setting=dil"], "scenario.setting: expected one of til, cil, got 'dil'"),
    "label of method": (["method=ewc", "method.labels=all"], "method.labels: expected one of ..."),
    "no order listed": (["task_order=listed"], "task_order.tasks: needs a value; set task_order.tasks=..."),
    "name of a path": (["name=a/b"], "name: must be a valid folder name ..."),
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
        "dataset.archive: there is no file gone.zip; set it to ...",
    ),
    "no prepared set": (
        ["dataset=cub200"],
        "dataset.root: cub200 cannot be read from data: expected CUB_200_2011/ ...",
    ),
    "unknown device": (
        ["hardware.device=tpu"],
        "hardware.device: there is no device 'tpu'; use auto, cpu, cuda or cuda:N",
    ),
    "no augmentation": (["dataset.augment=[flop]"], "dataset.augment..."),
    "no class order": (["scenario.class_order=[0,1]"], "scenario.class_order: must name each of the classes 0 ..."),
    "no table of texts": (
        ["dataset=text_table", "dataset.file=rows.csv"],
        "dataset.file: there is no file rows.csv; set it to a table of texts (text,label)",
    ),
    "no domains": (["dataset=folder_domains", "dataset.root=nowhere"], "dataset.root: there is no folder nowhere; ..."),
    "unknown domain": (
        ["dataset=domainnet", "dataset.domains=[reel]"],
        "dataset.domains: DomainNet has no 'reel'; did you mean 'real'? ...",
    ),
    "preview without data": (
        ["job=preview", "dataset=mnist", "dataset.root=nowhere"],
        "dataset.root: MNIST cannot be ...",
    ),
    "data of a preset": (
        ["experiment=split_cifar100_10", "dataset.root=nowhere"],
        "dataset.root: CIFAR100 cannot be ...",
    ),
    "no groups": (["scenario=fixed_groups"], "scenario.groups: needs a value; set scenario.groups=..."),
    "unknown groups": (
        ["scenario=fixed_groups", "scenario.groups=partiy"],
        "scenario.groups: digits has no groups named 'partiy'; did you mean 'parity'? ...",
    ),
    "a class in two groups": (
        ["scenario=fixed_groups", "scenario.groups=[[0,1],[1,2]]"],
        "scenario.groups: class 1 appears twice, the second time in group 1",
    ),
    "an empty group": (
        ["scenario=fixed_groups", "scenario.groups=[[0],[]]"],
        "scenario.groups: there must be at least one group and no group may be empty",
    ),
    "no such class": (
        ["scenario=fixed_groups", "scenario.groups=[[0],[10]]"],
        "scenario.groups: class 10 in group 1 does not exist (0 to 9)",
    ),
    "groups of numbers": (
        ["scenario=fixed_groups", "scenario.groups=[0,1]"],
        "scenario.groups: in each item expected a list, got [0, 1]",
    ),
    "unknown preset": (
        ["task_order=cifar100_split", "scenario.n_tasks=10", "task_order.order=F"],
        "task_order.order: no order 'F' (available: A, B, C, D, E)",
    ),
    "preset of other tasks": (
        ["task_order=cifar100_split"],
        "task_order.order: order 'A' permutes 10 tasks, and the stream has 5; choose ...",
    ),
    "no sequence": (["scenario=dataset_sequence"], "scenario=dataset_sequence: digits does not consist of several ..."),
    "unknown model": (["backbone=timm", "backbone.name=resnt18"], "backbone.name: timm ..."),
    "no weights file": (
        ["backbone=timm", "backbone.weights=gone.pth"],
        "backbone.weights: there is no file gone.pth",
    ),
}
# Three tasks of two generated classes. What follows is found while the run is built, after the checks above.
TINY = ["job=smoke", "job.picture=false", "hardware.threads=1", "backbone=cnn", "scenario.n_tasks=3"]
TINY += ["dataset=synthetic", "dataset.num_classes=6", "dataset.image_shape=[1,8,8]"]
TINY += ["dataset.train_rows=8", "dataset.test_rows=4"]
VIT, TIL = "backbone=glyph_vit", "scenario.setting=til"
FOUND_BY_METHODS = {
    "prompts without a ViT": (["method=l2p"], "backbone: L2p needs a vision transformer, not Backbone; use ..."),
    "attention of a CNN": (["method=vit_pad"], "backbone: vit_pad needs a vision transformer, not Backbone; use ..."),
    "adapters of a CNN": (
        ["method=ranpac", "method.phase1=adapter"],
        "backbone: Ranpac with method.phase1=adapter needs a transformer with blocks of attention and MLP, not ...",
    ),
    "more prompts than a pool": (
        [VIT, "method=l2p", "method.top=11"],
        "method.top=11: must be at most method.pool_size=10",
    ),
    "prompts of other tasks": (
        [VIT, "method=l2p", "method.copy_prompts=true"],
        "method.copy_prompts: needs method.use_prompt_mask=true, i.e. separate prompts per task",
    ),
    "pool that does not divide": (
        [VIT, "method=l2p", "method.use_prompt_mask=true"],
        "method.use_prompt_mask: 3 tasks of 5 prompts need method.pool_size=15, not 10",
    ),
    "too many components": (
        [VIT, "method=coda_prompt", "method.components=60"],
        "method.components: 3 tasks of 60 components need 180 orthogonal directions, the features have 96; take ...",
    ),
    "half a prefix": (
        [VIT, "method=coda_prompt", "method.length=3"],
        "method.length: must be even (half of it are keys, half values), got 3",
    ),
    "no such block": (
        [VIT, "method=coda_prompt", "method.blocks=[9]"],
        "method.blocks: there is no block 9; the backbone has the blocks 0 to 3",
    ),
    "a block twice": (
        [VIT, "method=dualprompt", "method.e_blocks=[2,2]"],
        "method.e_blocks: a block is listed twice; the backbone has the blocks 0 to 3",
    ),
    "prompts of a given task": (
        [VIT, "method=dap", "method.task_id=given"],
        "method.task_id=given: needs the task id at test time; scenario.setting=cil cannot use it (til)",
    ),
    "new prompts for each task": (
        [VIT, "method=vpt", "method.reinit=true"],
        "method.reinit: needs the task id at test time; scenario.setting=cil cannot use it (til)",
    ),
    "proximal steps of Adam": (
        ["method=ewc", "method.solver=proximal", "budget=adam"],
        "method.solver=proximal: needs budget.optimizer=torch.optim.SGD, not Adam; use budget=sgd or ...",
    ),
    "natural gradient of Adam": (
        ["method=ncl", "budget=adam"],
        "method=ncl: needs budget.optimizer=torch.optim.SGD, not Adam; use budget=sgd",
    ),
    "weight decay beside a prior": (
        ["method=ncl", "budget.optimizer.weight_decay=0.1"],
        "budget.optimizer.weight_decay=0.1: method=ncl needs 0",
    ),
    "sum of products": (
        ["method=kfac_ewc", "method.add=list"],
        "method.add=list: method.solver=proximal needs one product; use add=kl or solver=grad",
    ),
    "pattern of no layer": (
        ["method=kfac_ewc", "method.modules=[conv9]"],
        "method.modules: no layer matches 'conv9' (layers: ...",
    ),
    "classes of a sample": (
        ["method=ewc", "method.top_k=2"],
        "method.top_k: limits the sum over classes of method.labels=exact, but method.labels is sampled; set ...",
    ),
    "no strength": (["method=ranpac", "method.strengths=[]"], "method.strengths: must list at least one strength"),
    "forgetting what comes first": (
        [VIT, "method=ranpac", "method.phase1=ssf", "method.forget_tasks=[0]"],
        "method.forget_tasks: task 0 comes first and shapes the features for all others; ...",
    ),
    "forgetting the unknown": (
        ["method=ncm", "method.forget_tasks=[7]"],
        "method.forget_tasks: no task 7 (the stream has [0, 1, 2])",
    ),
    "forgetting everything": (
        ["method=simplecil", "method.forget_tasks=[0,1,2]"],
        "method.forget_tasks: names every task; at least one must remain",
    ),
    "least above most": (
        ["method=halrp", TIL, "method.lowest_rank=5", "method.highest_rank=2"],
        "method.lowest_rank: must be at most method.highest_rank=2",
    ),
    "costs without a budget": (
        ["method=halrp", TIL, "method.ranks=cost_aware", "method.growth=null"],
        "method.ranks=cost_aware: needs a budget; set method.growth",
    ),
    "no warm-up": (["method=halrp", TIL, "method.warmup.epochs=0"], "method.warmup: the ranks come from ..."),
    "curvature of no rows": (
        ["method=halrp", TIL, "method.curvature_data=val"],
        "method.curvature_data=val: there are no validation rows; set dataset.val_fraction",
    ),
    "no room to grow": (["method=halrp", TIL, "method.growth=0.0001"], "method.growth=0.0001: scales, biases, ..."),
    "codes of nothing": (
        ["method=ebll", "method.encoding.epochs=0"],
        "method.encoding: codes are learned; give it at least one epoch or step",
    ),
    "nothing kept": (
        ["method=progress_compress", "method.compress.epochs=0"],
        "method.compress: needs at least one epoch or step; knowledge that is not compressed is lost",
    ),
    "a word for a budget": (
        ["method=progress_compress", "method.compress=adam"],
        "method.compress: expected a node with a _target_, got 'adam'",
    ),
    "a word for a host": (["method=dgc", "method.host=er"], "method.host: expected a node with a _target_, got 'er'"),
    "two lengths within": (
        ["method=lwf", "method.warmup.steps=3"],
        "budget: give exactly one of epochs and steps (set the other to null)",
    ),
    "a ring too small": (
        ["method=gem", "method.capacity=2"],
        "method.capacity=2: a ring needs a row for each of 3 tasks in each of 1 processes; use more or ...",
    ),
    "less than an exemplar": (
        ["method=icarl", "method.capacity=3"],
        "method.capacity=3: less than one exemplar for each of 6 classes",
    ),
    "all but the head": (["method=fish", TIL, "method.ratio=0.00001"], "method.ratio=1e-05: the head takes 514 of ..."),
    "networks without the task": (
        ["method=stl"],
        "Stl needs the task id at test time; scenario.setting=cil cannot use it (til)",
    ),
}
FOUND_BY_TASKS = {
    "sizes of fewer classes": (
        ["scenario.sizes=[1,2]", "scenario.n_tasks=null"],
        "scenario.sizes: must be positive and sum to the 6 classes of the data set, got [1, 2] with sum 3",
    ),
    "sizes of other tasks": (
        ["scenario.sizes=[1,5]"],
        "scenario.n_tasks: 3 does not match the 2 tasks of scenario.sizes; set scenario.n_tasks=null",
    ),
    "sizes said twice": (
        ["scenario.sizes=[1,2,3]", "scenario.first=1"],
        "scenario.first: conflicts with scenario.sizes (both fix the size of task 0); set one of them to null",
    ),
    "first of more classes": (["scenario.first=7"], "scenario.first: must be at most 6 (the classes of ..."),
    "too few left": (["scenario.first=5"], "scenario.n_tasks: 6 classes with 5 of them in task 0 (scenario.first) ..."),
    "no sizes at all": (["scenario.n_tasks=null"], "scenario.n_tasks: must be given unless scenario.sizes lists ..."),
    "classes dealt twice": (
        ["scenario.class_seed=1", "scenario.class_order=[0,1,2,3,4,5]"],
        "scenario.class_seed: conflicts with scenario.class_order (both fix the class order); set one of them to null",
    ),
    "seed of no generator": (
        ["scenario.class_order={np_seed: 1}"],
        "scenario.class_order: must be a list of class ids, or one of numpy_seed, python_seed with a seed, got ...",
    ),
    "negative seed of NumPy": (
        ["scenario.class_order={numpy_seed: -1}"],
        "scenario.class_order.numpy_seed: must be between 0 and 4294967295, got -1",
    ),
    "rotation beyond the tasks": (
        ["task_order=rotation", "task_order.shift=3"],
        "task_order.shift: must be between 0 and 2, got 3 (3 tasks have 3 rotations)",
    ),
    "permutation beyond them": (
        ["task_order=exhaustive", "task_order.index=6"],
        "task_order.index: must be between 0 ...",
    ),
    "search of a part": (
        ["task_order=adversarial"],
        "job.max_tasks: with a limit, orders would differ in the learned tasks; ...",
    ),
    "results of nowhere": (
        ["task_order=adversarial", "task_order.reuse=[nowhere]", "job=default"],
        "task_order.reuse: no such folder: nowhere",
    ),
    "five channels": (
        [VIT, "dataset.image_shape=[5,8,8]"],
        "backbone: takes images of 1 channels, and those of the data set have 5; ...",
    ),
    "flat images": (["dataset.image_shape=[1,8]"], "dataset.image_shape: must be three positive integers ..."),
    "no rows to learn": (
        ["dataset.val_fraction=0.99"],
        "dataset.val_fraction: 0.99 leaves class c0 and 5 more classes no training rows ...",
    ),
    "word for augmentations": (["dataset.augment=crop"], "dataset.augment: expected a list, got 'crop'"),
    "augmentation in a list": (
        ["dataset.augment=[[crop]]"],
        "dataset.augment: no augmentation named '['crop']'; did you mean ...",
    ),
    "misspelt augmentation": (
        ["dataset.augment=[{crop: {pda: 1}}]"],
        "dataset.augment: crop: no option 'pda'; did you mean 'pad'? (has: pad, size)",
    ),
    "augmentation twice": (["dataset.augment=[crop,crop]"], "dataset.augment: crop: named twice"),
}
FOUND_BY_BUDGET_AND_JOB = {
    "neither epochs nor steps": (["budget.epochs=null"], "budget: give exactly one of epochs and steps (set ..."),
    "momentum of Nesterov": (
        ["budget=online", "budget.optimizer.nesterov=true"],
        "budget.optimizer: Nesterov momentum requires a momentum and zero dampening",
    ),
    "beta of 1.5": (
        ["budget=adam", "budget.optimizer.betas=[0.9,1.5]"],
        "budget.optimizer: Invalid beta parameter ...",
    ),
    "one beta": (["budget=adam", "budget.optimizer.betas=[0.9]"], "budget.optimizer.betas: expected a list of 2, ..."),
    "rate of nothing": (["budget.optimizer.lr=nan"], "budget.optimizer.lr: must be a number, got nan"),
    "rate of null": (["budget.optimizer.lr=null"], "budget.optimizer.lr: expected float, got None"),
    "optimizer with a closure": (
        ["budget.optimizer._target_=torch.optim.LBFGS"]
        + [f"~budget.optimizer.{key}" for key in ("momentum", "dampening", "weight_decay", "nesterov")],
        "budget.optimizer: LBFGS.step() missing 1 required positional argument: 'closure'",
    ),
    "misspelt optimizer": (
        ["budget.optimizer._target_=torch.optim.SDG"],
        "budget.optimizer._target_: cannot import 'torch.optim.SDG': 'torch.optim' has no 'SDG'; did you mean 'SGD'?",
    ),
    "word for a schedule": (
        ["budget.schedule=cosine"],
        "budget.schedule: expected a node with a _target_ or null, got 'cosine'",
    ),
    "precision of a GPU": (
        ["hardware=cpu", "hardware.precision=tf32"],
        "hardware.precision=tf32 needs a GPU, the device is cpu; use fp32 or bf16",
    ),
    "device of another maker": (["hardware.device=mps"], "hardware.device: 'mps' is not supported; use auto, cpu, ..."),
    "choice without rows": (["job=stability_decay"], "job.tuning: needs validation rows of every task; set ..."),
    "choice of nothing": (["job=stability_decay", "job.tuning.lrs=[]"], "job.tuning.lrs: empty; give at least one ..."),
    "decay of 1": (
        ["job=stability_decay", "job.tuning.decay=1"],
        "job.tuning.decay: a factor of 1 leaves the knobs unchanged; use a factor ...",
    ),
    "many trainings looked into": (
        ["job=stability_decay", "job.eval_every=3"],
        "job.eval_every: excludes job.tuning, which learns each task several times; set one of them to null",
    ),
    "word for a choice": (["job.tuning=all"], "job.tuning: expected a node with a _target_ or null, got 'all'"),
    "cache of no name": (
        ["method=ncm", "job.feature_cache=''"],
        "job.feature_cache: give a folder, true (the default ...",
    ),
    "cache in a file": (
        ["method=ncm", "job.feature_cache=/dev/null/x"],
        "/dev/null/x: features cannot be stored there ...",
    ),
    "preview in a file": (["job=preview", "hydra.run.dir=/dev/null/x"], "/dev/null/x: cannot be written (Not a ..."),
    "dry run of a misfit": (
        ["job=dry_run", "method=l2p"],
        "backbone: L2p needs a vision transformer, not Backbone; ...",
    ),
    "name of nothing": (
        ["name=''"],
        "name: must be a valid folder name (not empty, no slash, no leading dot or space), got ''",
    ),
    "seed of null": (["seed=null"], "seed: expected int, got None"),
}
COMMANDS = {
    "features of nothing": (["features", "lst"], "argument action: invalid choice: 'lst' (choose from ..."),
    "features of nowhere": (["features", "--dir", "nowhere"], "argument --dir: no such folder: nowhere; see ..."),
    "negative gigabytes": (["features", "prune", "--keep", "-1"], "features: --keep must be a number of gigabytes ..."),
    "gigabytes of nothing": (
        ["features", "prune", "--keep", "nan"],
        "features: --keep must be a number of gigabytes ...",
    ),
    "gigabytes of text": (["features", "prune", "--keep", "x"], "argument --keep: invalid float value: 'x'; see ..."),
    "list of two groups": (["list", "method", "dataset"], "unrecognized arguments: dataset; see clrun --help"),
    "list of nowhere": (
        ["list", "method", "--config-dir", "nowhere"],
        "argument --config-dir/-cd: no such folder: ...",
    ),
    "report of a file": (["report", "/dev/null"], "report: no such folder: /dev/null"),
    "misspelt option of report": (["report", ".", "--ot", "x"], "unrecognized arguments: --ot x; see clrun --help"),
    "completion of no shell": (
        ["-sc", "install=basch"],
        "No completion plugin for 'basch' found, available : bash ...",
    ),
    "information on nothing": (["--info", "nothing"], "argument --info/-i: invalid choice: 'nothing' (choose from ..."),
    "resolving nothing": (["--resolve"], "The --resolve flag can only be used in conjunction with --cfg or --help"),
}
SMALL_RUNS = FOUND_BY_METHODS | FOUND_BY_TASKS | FOUND_BY_BUDGET_AND_JOB
CASES = FOUND_BY_HYDRA | FOUND_BY_CHECK | FOUND_IN_DATA | COMMANDS
CASES |= {case: ([*TINY, *argv], line) for case, (argv, line) in SMALL_RUNS.items()}


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


# Found by Hydra, by the parser of words and by the checks. Each costs a process of its own, so others are slow tests.
THROUGH_THE_COMMAND = ["unknown method", "misspelt command", "negative capacity"]
OTHERS_THROUGH_THE_COMMAND = [
    "unknown dataset",
    "misspelt option",
    "unknown group",
    "several values",
    "open bracket",
    "no such folder",
    "unknown list",
]


@pytest.mark.parametrize(
    "case", [*THROUGH_THE_COMMAND, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS_THROUGH_THE_COMMAND)]
)
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
    "list": (b"- 1\n- 2\n", "method: expected a node with a _target_, got [1, 2]; set method=CHOICE ..."),
    "text": (b"hello\n", "method=text: its YAML file has no _target_, which names the class or function"),
    "nothing": (b"", "method=nothing: its YAML file has no _target_, which names the class or function"),
    "default": (b"defaults: [qqqq]\n", "method/default: no method named 'qqqq' (available: ..."),
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


def test_folder_of_another_or_a_damaged_run(clrun, folder):
    argv = [*TINY, "job.progress=false", "job.max_tasks=1", "hydra.run.dir=run"]
    assert clrun(*argv).code == 0
    run = folder / "run"
    left = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = clrun(*argv, "seed=1")
    assert other.lines == [
        f"clrun: {run}: holds a run of another configuration (seed differ); choose another hydra.run.dir"
    ]
    for damage in (b"", b"{}", b"\xff"):
        (run / "run.json").write_bytes(damage)
        done = clrun(*argv)
        assert done.code == 2 and len(done.lines) == 1, done.err
        assert done.lines[0].startswith(f"clrun: {run}/run.json: ") and done.lines[0].endswith(
            "; remove it to run again"
        )
        assert (run / "run.json").read_bytes() == damage
    assert {path for path in run.rglob("*") if path.is_file()} == left.keys()
    assert all(path.read_bytes() == content for path, content in left.items() if path.name != "run.json")


def test_a_bad_row_of_a_table_of_texts_is_named_and_nothing_is_written(clrun, folder):
    (folder / "rows.csv").write_text("text,label\nx,a\n,b\n")
    done = clrun("dataset=text_table", "dataset.file=rows.csv", "backbone=bert_tiny", "scenario.n_tasks=2")
    assert done.code == 2
    assert done.lines == ["clrun: rows.csv, line 3: the text is empty; remove the row or set dataset.empty=skip"]
    assert [path.name for path in folder.iterdir()] == ["rows.csv"]
