"""Every `experiment=NAME`: it composes, passes the checks, cuts the published tasks, and runs on stand-in data."""

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONF
from running import configuration, member

from clrun.config.check import check
from clrun.config.job import JobInfo
from clrun.data.reading.assemble import Domains, assemble
from clrun.data.reading.options import Reading
from clrun.data.reading.sequence import sequence
from clrun.data.split import Plain
from clrun.data.stream import Dataset, Stream
from clrun.running.parts import make
from clrun.running.run import run_config

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
EMBEDDED = ("digits", "glyphs", "synthetic")  # run as they are
ALPHABETS = (24, 14, *([32] * 48))  # characters; sizes differ, as the real ones do


def stand_in(
    name: str,
    classes: int,
    *,
    channels: int = 3,
    side: int = 8,
    domains: tuple[str, ...] = (),
    shared_test: bool = False,
    groups: dict[str, tuple[tuple[int, ...], ...]] | None = None,
) -> Callable[..., Dataset]:
    """Return a loader of random images: two training rows and a test row of each class (of each domain)."""

    def load(*, seed: int, augment: list[Any], val_fraction: float, **others: Any) -> Dataset:
        number = max(1, len(domains))
        labels = torch.arange(classes).repeat(number)
        train, test = labels.repeat_interleave(2), torch.arange(classes) if shared_test else labels
        draw = torch.Generator().manual_seed(0)
        rows = [
            (torch.randint(256, (len(y), channels, side, side), dtype=torch.uint8, generator=draw), y)
            for y in (train, test)
        ]
        known = None
        if domains:
            of_row = torch.arange(number).repeat_interleave(classes)
            known = Domains(domains, of_row.repeat_interleave(2), None if shared_test else of_row)
        return assemble(
            name,
            *rows,
            class_names=[f"c{label}" for label in range(classes)],
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
            groups=groups or {},
            reading=Reading(val_fraction=val_fraction and 0.5, seed=seed, augment=augment),
            domains=known,
        )

    return load


def sets(name: str, **classes: int) -> Callable[..., Dataset]:
    """Return a loader of several data sets with classes of their own."""

    def load(**options: Any) -> Dataset:
        return sequence(name, [stand_in(part, count)(**options) for part, count in classes.items()])

    return load


def alphabets() -> tuple[tuple[int, ...], ...]:
    stops = [sum(ALPHABETS[: k + 1]) for k in range(len(ALPHABETS))]
    return tuple(tuple(range(stop - size, stop)) for stop, size in zip(stops, ALPHABETS, strict=True))


def folders(*, sets: list[str], **options: Any) -> Dataset:
    """Return the data sets of these names, of their true numbers of classes, as `folder_sequence` does."""
    return sequence("folders", [stand_in(part, RECOGSEQ[part])(**options) for part in sets])


SUPERCLASS = tuple(tuple(range(k, 100, 20)) for k in range(20))
SESSIONS = ("s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11")
DOMAINS = ("real", "quickdraw", "painting", "sketch", "infograph", "clipart")
FIVE = {"cifar10": 10, "mnist": 10, "svhn": 10, "fashion_mnist": 10, "notmnist": 10}
RECOGSEQ = {"flowers": 102, "scenes": 67, "birds": 200, "cars": 196, "aircraft": 100}
RECOGSEQ |= {"actions": 11, "letters": 52, "svhn": 10}
MTIL = {"fgvc_aircraft": 100, "caltech101": 101, "cifar100": 100, "dtd": 47, "eurosat": 10, "flowers102": 102}
MTIL |= {"food101": 101, "mnist": 10, "oxford_pets": 37, "stanford_cars": 196, "sun397": 397}
LOADERS = {
    "mnist": stand_in("mnist", 10, channels=1),
    "cifar10": stand_in("cifar10", 10),
    "cifar100": stand_in("cifar100", 100, groups={"superclass": SUPERCLASS}),
    "tiny_imagenet": stand_in("tiny_imagenet", 200),
    "five_datasets": sets("five_datasets", **FIVE),
    "omniglot": stand_in("omniglot", sum(ALPHABETS), channels=1, groups={"alphabet": alphabets()}),
    "omniglot_rotation": stand_in("omniglot_rotation", 1200, channels=1),
    "imagenet_r": stand_in("imagenet_r", 200),
    "imagenet_a": stand_in("imagenet_a", 200),
    "cub200": stand_in("cub200", 200),
    "folder": stand_in("vtab", 50),
    "core50": stand_in("core50", 50, domains=SESSIONS, shared_test=True),
    "domainnet": stand_in("domainnet", 345, domains=DOMAINS),
    "mtil": sets("mtil", **MTIL),
    "folder_sequence": folders,
}


@dataclass(frozen=True)
class Expected:
    """What an experiment must make of its data set.

    Attributes:
        setting: til, cil or dil.
        sizes: classes of each task, by id.
        order: task ids by position; None for ascending.
        first: the classes of task id 0; None for the lowest ones.
        names: names of the tasks by id; None where they do not matter.
    """

    setting: str
    sizes: tuple[int, ...]
    order: tuple[int, ...] | None = None
    first: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None


TINY_20 = (10, 18, 16, 14, 0, 17, 11, 2, 3, 9, 5, 7, 4, 19, 6, 15, 8, 1, 13, 12)
CIFAR_1993 = (68, 56, 78, 8, 23, 84, 90, 65, 74, 76)
CIFAR_1994 = (72, 6, 33, 96, 60, 94, 29, 40, 45, 66)
CLASSES_1995 = (146, 198, 169, 126, 142, 183, 108, 86, 79, 35, 112, 29)
CLASSES_1993 = (168, 136, 51, 9, 183, 101, 171, 99, 42, 159, 191, 70)  # the first of 200
AS_NUMBERED = ("l2p", "dualprompt", "coda_prompt", "dap", "lae", "esn")  # class orders of prompts and adapters
OF_1993 = ("aper", "ease", "vpt", "slca", "slca_pp", "cofima")
ADAPTED = ("mos", "tuna", "cl_lora", "sema", "hide_prompt")  # LoRA and adapters of each task
LIKE_SD_LORA = ("sd_lora", "seq_lora", "inc_lora", "o_lora")  # low-rank updates with the recipe of one of them
LOW_RANK = (*LIKE_SD_LORA, "inflora")
ON_CLIP = ("zero_shot", "proof", "rapf", "rail", "coop")  # on features of image and text towers
ON_TOWERS = ("zscl", "promptfusion", "promptfusion_lite", "moe_adapters")  # both towers read images and names
ALL = (*AS_NUMBERED, *OF_1993, *ADAPTED, *LOW_RANK)
PRESETS = [f"{m}_{d}" for m in ALL for d in ("cifar224", "imagenet_r")]
EXPECTED = {
    "split_mnist": Expected("cil", (2,) * 5),
    "permuted_mnist": Expected("dil", (10,) * 20),
    "permuted_mnist_til": Expected("til", (10,) * 10, (2, 8, 4, 9, 1, 6, 7, 3, 0, 5)),
    "rotated_mnist": Expected("dil", (10,) * 20),
    "split_cifar10": Expected("cil", (2,) * 5),
    "split_cifar100_10": Expected("cil", (10,) * 10),
    "split_cifar100_20": Expected("cil", (5,) * 20),
    "cifar100_split": Expected("til", (10,) * 10),
    "cifar100_superclass": Expected("til", (5,) * 20, first=(0, 20, 40, 60, 80)),
    "cifar224": Expected("cil", (10,) * 10, first=(68, 56, 78, 8, 23, 84, 90, 65, 74, 76)),
    "ranpac_cifar224": Expected("cil", (10,) * 10, first=(68, 56, 78, 8, 23, 84, 90, 65, 74, 76)),
    "fecam_cifar224": Expected("cil", (10,) * 10, first=(68, 56, 78, 8, 23, 84, 90, 65, 74, 76)),
    "tiny_imagenet_20": Expected("til", (10,) * 20, TINY_20),
    "tiny_imagenet_40": Expected("til", (5,) * 40),
    "five_datasets": Expected("til", (10,) * 5, (2, 0, 1, 3, 4), names=tuple(FIVE)),
    "omniglot_rotation": Expected("til", (12,) * 100),
    "omniglot_alphabets": Expected("til", ALPHABETS),
    "imagenet_r": Expected("cil", (20,) * 10, first=CLASSES_1993),
    "ranpac_imagenet_r": Expected("cil", (20,) * 10, first=CLASSES_1993),
    "imagenet_a": Expected("cil", (20,) * 10, first=CLASSES_1993),
    **{f"{method}_cifar224": Expected("cil", (10,) * 10) for method in AS_NUMBERED},
    **{f"{method}_imagenet_r": Expected("cil", (20,) * 10) for method in AS_NUMBERED if method != "l2p"},
    "l2p_imagenet_r": Expected("cil", (20,) * 10, first=CLASSES_1993),
    **{f"{method}_cifar224": Expected("cil", (10,) * 10, first=CIFAR_1993) for method in OF_1993},
    **{f"{method}_imagenet_r": Expected("cil", (20,) * 10, first=CLASSES_1993) for method in OF_1993},
    **{f"{m}_cifar224": Expected("cil", (5,) * 20, first=CIFAR_1993[:5]) for m in ("mos", "tuna", "cl_lora")},
    **{f"{m}_imagenet_r": Expected("cil", (20,) * 10, first=CLASSES_1993) for m in ("mos", "tuna", "sema")},
    "cl_lora_imagenet_r": Expected("cil", (5,) * 40, first=CLASSES_1993[:5]),
    "sema_cifar224": Expected("cil", (10,) * 10, first=CIFAR_1993),
    "hide_prompt_cifar224": Expected("cil", (10,) * 10),
    "hide_prompt_imagenet_r": Expected("cil", (20,) * 10),
    **{f"{method}_cifar224": Expected("cil", (10,) * 10, first=CIFAR_1993) for method in ON_CLIP},
    **{f"{method}_imagenet_r": Expected("cil", (20,) * 10, first=CLASSES_1993) for method in ON_CLIP},
    **{f"{method}_cifar224": Expected("cil", (10,) * 10) for method in ON_TOWERS},
    **{f"{method}_imagenet_r": Expected("cil", (20,) * 10) for method in ("promptfusion", "promptfusion_lite")},
    **{f"{m}_mtil": Expected("til", tuple(MTIL.values()), names=tuple(MTIL)) for m in ("zscl", "moe_adapters")},
    "clip_finetune_cifar224": Expected("cil", (10,) * 10),
    "clip_finetune_imagenet_r": Expected("cil", (20,) * 10, first=CLASSES_1993),
    "inflora_cifar224": Expected("cil", (10,) * 10),
    "inflora_imagenet_r": Expected("cil", (20,) * 10),
    **{f"{method}_cifar224": Expected("cil", (10,) * 10, first=CIFAR_1994) for method in LIKE_SD_LORA},
    **{f"{method}_imagenet_r": Expected("cil", (20,) * 10, first=CLASSES_1995) for method in LIKE_SD_LORA},
    "cub200": Expected("cil", (20,) * 10, first=CLASSES_1993),
    "vtab": Expected("cil", (10,) * 5),
    "core50_ni": Expected("dil", (50,) * 8, names=SESSIONS),
    "core50_nc": Expected("cil", (10, *([5] * 8))),
    "domainnet": Expected("dil", (345,) * 6, names=DOMAINS),
    "recogseq": Expected("til", tuple(RECOGSEQ.values()), names=tuple(RECOGSEQ)),
}


@cache
def composed(name: str) -> dict[str, Any]:
    """Return the configuration of an experiment."""
    return configuration(f"experiment={name}", "hydra.mode=RUN")[0]


@cache
def small() -> tuple[dict[str, Any], dict[str, str]]:
    """Return the configuration of a run that takes no time."""
    quiet = ("job=smoke", "job.progress=false", "job.picture=false", "hardware.threads=1")
    return configuration("method=finetune", "backbone=mlp", "backbone.hidden=[8]", *quiet)


def loader(config: dict[str, Any]) -> tuple[str, str]:
    """Return module and name of the loader that a configuration names."""
    module, _, name = config["dataset"]["_target_"].rpartition(".")
    return module, name


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Put a stand-in into the place of the loader that a configuration names."""

    def place(config: dict[str, Any]) -> None:
        module, name = loader(config)
        if name not in EMBEDDED:
            monkeypatch.setattr(importlib.import_module(module), name, LOADERS[name])

    return place


@pytest.mark.parametrize(("name", "phase1"), [("ranpac_cifar224", "adapter"), ("ranpac_imagenet_r", "ssf")])
def test_ranpac_as_published(name: str, phase1: str) -> None:
    config = composed(name)
    method, budget = config["method"], config["budget"]
    assert (method["phase1"], method["m"], method["rule"]) == (phase1, 10_000, "author")
    assert method["strengths"] == [10.0**k for k in range(-8, 9)]
    assert (budget["epochs"], budget["batch_size"], budget["schedule"]["warmup"]) == (20, 48, 0)
    optimizer = budget["optimizer"]
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.01, 0.9, 5e-4)


# Learning rate, epochs and batch size of the authors: of CIFAR-100, of ImageNet-R.
PUBLISHED = {
    "l2p": ((0.03 * 128 / 256, 5, 128), (0.03 * 16 / 256, 10, 32)),
    "dualprompt": ((0.03 * 24 / 256, 5, 24), (0.005 * 24 / 256, 50, 24)),
    "coda_prompt": ((0.001, 20, 128), (0.001, 50, 128)),
    "dap": ((0.01, 5, 128), (0.25, 20, 128)),
    "lae": ((0.0028125, 5, 24), (0.00046875, 50, 24)),
    "esn": ((0.01, 30, 128), (0.01, 50, 128)),
    "aper": ((0.01, 20, 48), (0.05, 20, 24)),
    "ease": ((0.025, 20, 48), (0.05, 20, 16)),
    "vpt": ((0.05, 5, 16), (0.05, 5, 16)),
    "slca": ((0.01, 20, 128), (0.01, 50, 128)),
    "slca_pp": ((0.01, 20, 128), (0.01, 50, 128)),
    "cofima": ((0.01, 20, 128), (0.01, 50, 128)),
    "inflora": ((0.0005, 20, 128), (0.0005, 50, 128)),
    **dict.fromkeys(LIKE_SD_LORA, ((0.008, 20, 128), (0.008, 20, 128))),
    "mos": ((0.03, 20, 48), (0.05, 10, 16)),
    "tuna": ((0.01, 15, 16), (0.02, 10, 32)),
    "cl_lora": ((0.03, 30, 64), (0.05, 20, 32)),
    "sema": ((0.005, 5, 32), (0.005, 20, 32)),
    "hide_prompt": ((0.03 * 24 / 256, 50, 192), (0.03 * 24 / 256, 150, 192)),
}
TAGS = {
    "orig_in21k": ("l2p", "dualprompt", "dap", "lae", "hide_prompt"),
    "augreg2_in21k_ft_in1k": ("sema", *LIKE_SD_LORA),
    "augreg_in21k": ("ease", "vpt", "aper_imagenet_r", "slca", "cofima", "mos", "tuna", "cl_lora_cifar224", "inflora"),
}
# Presets whose header names another one for what both have in common.
BY_REFERENCE = {
    "ranpac_imagenet_r": "batches and the head of phase 1 see ranpac_cifar224",
    "esn_imagenet_r": "the sign of the anchor, schedules, batches and heads see esn_cifar224",
}
TAGS["augreg_in21k_ft_in1k"] = ("coda_prompt", "aper_cifar224", "esn", "cl_lora_imagenet_r")


def test_every_experiment_is_expected_and_those_of_prompts_and_adapters_are_as_published() -> None:
    others = {name for name in EXPERIMENTS if loader(composed(name))[1] not in EMBEDDED}
    assert {*EXPECTED} == others
    for tag, names in TAGS.items():
        for name in (preset for preset in PRESETS if preset.startswith(names)):
            assert composed(name)["backbone"]["name"] == f"vit_base_patch16_224.{tag}", name
    for method, of_data in PUBLISHED.items():
        for name, expected in zip((f"{method}_cifar224", f"{method}_imagenet_r"), of_data, strict=True):
            config = composed(name)
            budget, scale = config["budget"], config["method"].get("lr_scale", 1.0)
            found = (budget["optimizer"]["lr"] * scale, budget["epochs"], budget["batch_size"])
            assert found == pytest.approx(expected), name
            assert config["method"].get("selection", "instance") == "instance"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_preset_says_which_classes_compete_how_schedules_step_and_how_heads_begin(name: str) -> None:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    method = name.removesuffix("_cifar224").removesuffix("_imagenet_r")
    slow = ("slca", "slca_pp", "cofima")
    prompts = ("l2p", "dualprompt", "coda_prompt", "dap", "vpt", "lae")
    if method in (*prompts, "mos", "tuna", "sema", "hide_prompt", *slow, *LOW_RANK):
        assert composed(name)["method"]["compete"] == "current"
        assert "Only the classes of the current task compete in the training loss (method.compete=current)" in header
    stepped = ("aper", "ease", "lae", "coda_prompt", "ranpac", *slow, "esn", *ADAPTED[:4], *LOW_RANK)
    if method in stepped and name not in BY_REFERENCE:
        assert "learning rate" in header and "short batch of an epoch is kept" in header and "nn.Linear" in header
    assert name not in BY_REFERENCE or BY_REFERENCE[name] in header


# Of slow learners: epoch of the drop of the learning rate, or its floor; weight decay; weights of the two losses.
SLOW = {
    "slca_cifar224": (18, 5e-4, None),
    "slca_imagenet_r": (40, 5e-4, None),
    "cofima_cifar224": (18, 5e-4, None),
    "cofima_imagenet_r": (40, 5e-4, None),
    "slca_pp_cifar224": (1e-4, 5e-4, (1.0, 0.1)),
    "slca_pp_imagenet_r": (1e-4, 0.0, (0.5, 0.5)),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_learners_are_as_published(name: str) -> None:
    config, (fall, decay, weights) = composed(name), SLOW[name]
    method, budget, alignment = config["method"], config["budget"], config["method"]["alignment"]
    schedule, stage_2 = budget["schedule"], alignment["budget"]
    assert fall == schedule.get("floor", schedule.get("at", [0])[0] * budget["epochs"])
    assert (budget["optimizer"]["momentum"], budget["optimizer"]["weight_decay"]) == (0.9, decay)
    assert (stage_2["epochs"], stage_2["batch_size"], alignment["rows_per_class"]) == (5, 256, 256)
    optimizer = stage_2["optimizer"]
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.01, 0.9, 5e-4)
    assert (alignment["temperature"], alignment["jitter"], alignment["covariance"]) == (0.1, 1e-4, "full")
    assert method["reset_final_norm"]
    assert config["backbone"]["normalize"] == ("data" if name.endswith("cifar224") else "imagenet")
    if weights is None:
        assert (method["backbone_lr_scale"], method["mean_shrink"]) == (0.01, 0.1)
    else:
        assert (method["ce_weight"], method["rce_weight"]) == weights
        assert (method["targets"], method["rank"], method["lora_scale"]) == (["qkv"], 4, 0.8)
        assert (method["backbone_lr_scale"], method["lora_lr_scale_first"], method["lora_lr_scale"]) == (0.1, 0.5, 0.1)
    if name.startswith("cofima"):
        assert (method["fisher"], method["clip"], method["alpha"]) == ("batch_squared", 1e-4, 0.5)


# Of methods with adapters per task: weight decay; rows per class and batch size, epochs and rate of the alignment.
ALIGNED = {
    "mos_cifar224": (5e-4, 240, 30, 0.005),
    "mos_imagenet_r": (5e-3, 80, 30, 0.005),
    "tuna_cifar224": (5e-4, 80, 30, 0.005),
    "tuna_imagenet_r": (5e-4, 160, 30, 0.005),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_methods_with_adapters_per_task_are_as_published(name: str) -> None:
    config, (decay, rows, epochs, rate) = composed(name), ALIGNED[name]
    method, alignment = config["method"], config["method"]["alignment"]
    assert (config["budget"]["optimizer"]["weight_decay"], method["bottleneck"]) == (decay, 16)
    budget = alignment["budget"]
    assert (alignment["rows_per_class"], budget["batch_size"], budget["epochs"]) == (rows, rows, epochs)
    assert (budget["optimizer"]["lr"], budget["optimizer"]["weight_decay"], alignment["covariance"]) == (
        rate,
        5e-4,
        "full",
    )
    if name.startswith("tuna"):
        assert method["mean_factor"] == ("inverted" if name == "tuna_imagenet_r" else "none")
        assert (budget["schedule"]["levels"], budget["schedule"]["half_period"]) == (30, 5)


def test_lora_and_prompts_of_each_task_are_as_published() -> None:
    for name, decay, rank, blocks in (("cl_lora_cifar224", 1e-4, 8, 6), ("cl_lora_imagenet_r", 5e-4, 10, 6)):
        config = composed(name)
        method = config["method"]
        assert (config["budget"]["optimizer"]["weight_decay"], method["rank"], method["kd"]) == (decay, rank, 5.0)
        assert (method["shared_blocks"], method["specific_blocks"]) == ([*range(blocks)], [*range(blocks, 12)])
    for name in ("sema_cifar224", "sema_imagenet_r"):
        method = composed(name)["method"]
        assert (method["blocks"], method["code"], method["threshold"]) == ([9, 10, 11], 128, 2.0)
        assert (method["rd"]["epochs"], method["rd"]["optimizer"]["lr"], method["detect"]) == (20, 0.01, "task")
    for name, length, weight in (("hide_prompt_cifar224", 5, 0.1), ("hide_prompt_imagenet_r", 20, 0.5)):
        config = composed(name)
        method, identity = config["method"], config["method"]["tii"]["budget"]
        assert (method["length"], method["contrast"], method["beta"], method["blocks"]) == (
            length,
            weight,
            0.01,
            [*range(5)],
        )
        assert (identity["epochs"], identity["optimizer"]["lr"]) == (20, pytest.approx(0.0005 * 24 / 256))
        assert config["budget"]["clip_norm"] == 1.0 and method["alignment"]["rows_per_class"] == 120


def test_methods_on_features_of_clip_are_as_published() -> None:
    tags = {
        "zero_shot": "clip_vit_b16",
        "proof": "clip_vit_b16_laion400m",
        "rapf": "clip_vit_b16",
        "rail": "clip_vit_b16",
        "coop": "clip_vit_b16",
    }
    for method, tag in tags.items():
        for data in ("cifar224", "imagenet_r"):
            config, towers = composed(f"{method}_{data}"), member(CONF / "backbone" / f"{tag}.yaml")
            assert config["backbone"]["quick_gelu"] == towers["quick_gelu"] and config["dataset"]["augment"] == []
    for name, epochs, size, capacity in (("proof_cifar224", 5, 64, 2000), ("proof_imagenet_r", 10, 48, 20)):
        config = composed(name)
        optimizer = config["budget"]["optimizer"]
        assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.001, 0.9, 0.05)
        found = (config["budget"]["epochs"], config["budget"]["batch_size"], config["method"]["capacity"])
        assert found == (epochs, size, capacity) and config["method"]["per_class"] == (capacity == 20)
    for name, size, factor, classes, near, bias in (
        ("rapf_cifar224", 100, 2, 2, 0.55, 0.6),
        ("rapf_imagenet_r", 64, 1, 5, 0.65, 0.7),
    ):
        method, budget = composed(name)["method"], composed(name)["budget"]
        assert (method["draw"], method["pair_draw"], method["draw_factor"]) == (10, 20, factor)
        assert (method["classes_per_batch"], method["name_distance"], method["mix_bias"]) == (classes, near, bias)
        assert method["shrinkage"] == (name == "rapf_imagenet_r") and method["max_pairs"] is None
        assert (budget["epochs"], budget["batch_size"], budget["optimizer"]["lr"]) == (15, size, 0.001)
        made = make(budget)
        optimizer = made.optimizer([torch.nn.Parameter(torch.zeros(1))])
        schedule, rates = made.schedule(optimizer, 15 * 50), []
        for _ in range(15):
            rates.append(optimizer.param_groups[0]["lr"])
            for _ in range(50):
                optimizer.step()
                schedule.step()
        assert rates == pytest.approx([0.001] * 4 + [0.0001] * 6 + [0.00001] * 5)


# Learning rate, weight decay, passes over the data (or steps), batch size.
TOWERS = {
    "coop_cifar224": (2e-3, 5e-4, 10, 32),
    "coop_imagenet_r": (2e-3, 5e-4, 10, 32),
    "clip_finetune_cifar224": (7.1e-6, 0.0, 1, 64),
    "clip_finetune_imagenet_r": (7e-6, 0.0, 1, 128),
    "zscl_cifar224": (7.1e-6, 0.0, 1, 64),
    "zscl_mtil": (1e-5, 0.0, 1000, 64),
    "moe_adapters_cifar224": (1e-3, 0.0, 1, 128),
    "moe_adapters_mtil": (1e-3, 0.0, 1000, 64),
    "promptfusion_cifar224": (2e-3, 1e-4, 3, 32),
    "promptfusion_imagenet_r": (3e-3, 1e-2, 5, 32),
    "promptfusion_lite_cifar224": (2e-3, 1e-3, 3, 32),
    "promptfusion_lite_imagenet_r": (3e-3, 1e-2, 5, 32),
}


@pytest.mark.parametrize("name", TOWERS)
def test_methods_on_two_towers_are_as_published(name: str) -> None:
    config = composed(name)
    method, budget = config["method"], config["budget"]
    optimizer, length = budget["optimizer"], budget["epochs"] or budget["steps"]
    assert (optimizer["lr"], optimizer["weight_decay"], length, budget["batch_size"]) == TOWERS[name]
    assert config["backbone"]["quick_gelu"] and config["job"]["eval_unseen"] == name.endswith("mtil")
    if name.startswith("coop"):
        assert (method["length"], method["context"], method["capacity"]) == (16, "shared", 0)
    elif name.startswith("clip_finetune"):
        assert (method["text"], method["label_smoothing"]) == (True, 0.2)
    elif name.startswith("promptfusion"):
        assert method["second_backbone"]["name"] == "vit_base_patch16_224.orig_in21k"
        assert method["capacity"] == 5000 and method["prompts"]["text"] == 30 and budget["clip_norm"] == 1.0
    elif name.startswith("zscl"):
        strengths = (
            method["image_strength"],
            method["text_strength"],
            method["consolidation"],
            method["average_every"],
        )
        assert strengths == ((1, 1, 1, 100) if name.endswith("mtil") else (5, 5, 0, 10))
        assert method["reference"][0]["_target_"].endswith(".imagenet")
        factors = {"fgvc_aircraft": 5.0, "mnist": 5.0}  # 5e-5
    else:
        factors = {"fgvc_aircraft": 5.0, "cifar100": 5.0, "eurosat": 0.1, "mnist": 0.1}  # 5e-3 and 1e-4
        shared = ("shared", 2, False, "none")
        found = (method["routers"], method["experts"], method["freeze_used"], method["selector"])
        assert found == (("per_task", 22, True, "autoencoder") if name.endswith("mtil") else shared)
    if name.endswith("mtil"):
        made = make(budget)
        assert made.lr_factors == factors
        made.check_tasks(tuple(MTIL))


@pytest.mark.parametrize(("order", "first"), [("i", (0, 1, 2)), ("ii", (9, 6, 7))])
def test_both_orders_of_mtil(order: str, first: tuple[int, ...]) -> None:
    found = make(configuration("experiment=zscl_mtil", f"task_order.order={order}")[0]["task_order"])(11)
    assert sorted(found) == list(range(11)) and tuple(found[:3]) == first


def test_the_learning_rate_of_coda_prompt_falls_along_a_quarter_of_a_cosine() -> None:
    budget = make(composed("coda_prompt_cifar224")["budget"])
    optimizer = budget.optimizer([torch.nn.Parameter(torch.zeros(1))])
    schedule, found = budget.schedule(optimizer, 20), []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([0.001 * math.cos(math.pi / 2 * step / 20) for step in range(20)])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_published_tasks(name: str, data: Callable[[dict[str, Any]], None]) -> None:
    config, expected = composed(name), EXPECTED[name]
    data(config)
    stream: Stream = make(config["scenario"])(make(config["dataset"]), make(config["task_order"]), Plain())
    assert stream.setting == expected.setting
    assert list(stream.order[: len(expected.order or ())]) == list(expected.order or ())
    tasks = {task.id: task for task in stream.tasks}
    assert tuple(len(tasks[k].classes) for k in sorted(tasks)) == expected.sizes
    first = expected.first or tuple(range(expected.sizes[0]))
    assert tuple(tasks[0].classes.tolist()[: len(first)]) == first
    assert expected.names is None or tuple(tasks[k].name for k in sorted(tasks)) == expected.names
    assert all(len(task.train) and len(task.test) for task in stream.tasks)
    assert all((task.val is None) == (config["dataset"]["val_fraction"] == 0) for task in stream.tasks)
    if expected.setting != "dil":
        assert sorted(label for task in stream.tasks for label in task.classes.tolist()) == list(
            range(stream.num_classes)
        )


FIRST = ("coda_prompt_cifar224", "dap_imagenet_r")  # run by default


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS])
def test_presets_of_prompts_and_adapters_run(name: str, data: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    base, choices = small()
    config = composed(name) | {group: base[group] for group in ("hardware", "job")}
    config["backbone"] |= {"name": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32}  # twelve blocks, too
    data(config)
    run_config(config, tmp_path, job=JobInfo(None, 1, choices, False, [], {}))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "completed" and not any("batch" in note for note in run["notes"])


CLIP_PRESETS = [f"{method}_{data}" for method in ON_CLIP for data in ("cifar224", "imagenet_r")]


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("rapf_cifar224", "zero_shot_cifar224") else pytest.param(n, marks=pytest.mark.slow)
        for n in CLIP_PRESETS
    ],
)
def test_presets_of_methods_on_features_of_clip_run(
    name: str, data: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    base, choices = small()
    towers = {"_target_": "clrun.backbones.glyph.glyph_clip", "_partial_": True}
    towers |= {"pretrained": True, "weights": None, "weights_key": None, "head": "linear"}
    config = composed(name) | {group: base[group] for group in ("hardware", "job")} | {"backbone": towers}
    config["method"] |= {"m": 50} if name.startswith("rail") else {}
    data(config)
    run_config(config, tmp_path, job=JobInfo(None, 1, choices, False, [], {}))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "completed" and not any("batch" in note for note in run["notes"])


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in (*PRESETS, *CLIP_PRESETS)])
def test_every_experiment_runs(name: str, data: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    base, choices = small()
    config = composed(name) | {group: base[group] for group in ("backbone", "method", "hardware", "job")}
    if name == "recogseq":  # cuts 224 pixels out of its images
        config["dataset"] = config["dataset"] | {"augment": ["flip"]}
    check(config, choices)
    data(config)
    value = run_config(config, tmp_path / "run", job=JobInfo(None, 1, choices, False, [], {}))
    assert 0 <= value <= 1


def test_width_tokens_and_parameters_are_recorded(tmp_path: Path) -> None:
    base, choices = small()
    vit = {"_target_": "clrun.backbones.glyph.glyph_vit", "_partial_": True, "pretrained": False}
    for name, node in (("mlp", base["backbone"]), ("vit", vit)):
        run_config(base | {"backbone": node}, tmp_path / name, job=JobInfo(None, 1, choices, False, [], {}))
    found = {name: json.loads((tmp_path / name / "run.json").read_text())["backbone"] for name in ("mlp", "vit")}
    assert found["mlp"] == {"features": 8, "tokens": None, "total": 520, "trainable": 520, "weights": None}
    assert found["vit"]["features"] == 96 and found["vit"]["tokens"] == 50 and found["vit"]["total"] == 379_968


def test_all_orders_of_a_preset_in_one_sweep() -> None:
    node = composed("cifar100_superclass")["task_order"]
    found = {order: make(node | {"order": order})(20) for order in "ABCDE"}
    assert found["A"] == list(range(20)) and found["C"][:4] == [17, 1, 19, 18]
    assert len({tuple(order) for order in found.values()}) == 5


def test_pixels_of_the_order_robust_studies_are_not_augmented_and_those_of_vits_are() -> None:
    for name in ("cifar100_split", "cifar100_superclass"):
        assert composed(name)["dataset"]["augment"] == []
    for name in ("cifar224", "imagenet_r", "imagenet_a", "cub200", "vtab"):
        config = composed(name)
        assert config["dataset"]["augment"] == [{"random_resized_crop": {"scale": [0.05, 1.0]}}, "flip"]
        assert config["backbone"]["normalize"] == "none" and config["backbone"]["crop"] == 0.875
        assert config["backbone"]["interpolation"] == "bicubic"
