"""Jobs of a sweep are composed as Hydra composes them: its loader is the reference."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from clrun.config import sweep_jobs
from clrun.config.compose import Composer, folder_of, plain_config, recorded_config, yaml_text
from clrun.config.sweep_jobs import JobComposer, PlainJob, choices_of

FIXED = ("method.capacity=7", "dataset.root=/data", "name=a-${seed}")


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with Composer.of(config_path=None, config_name=None, config_dir=None) as found:
        yield found


@pytest.fixture(scope="module")
def sweep(composer: Composer) -> DictConfig:
    cfg = composer.compose(["seed=0,1"], sweep=True)
    folder_of(cfg, "hydra.sweep.dir")  # its time and random part are drawn once, before the jobs are composed
    return cfg


@pytest.fixture(scope="module")
def jobs(composer: Composer) -> Any:
    return JobComposer(composer.hydra.config_loader, FIXED)  # type: ignore[arg-type]


def outcome(loader: Any, sweep: DictConfig, words: list[str]) -> Any:
    try:
        return loader.load_sweep_config(sweep, words)
    except Exception as error:
        return type(error), str(error)


SIMPLE = {
    "values": ["seed=3", "budget.optimizer.lr=1e-3", "budget.optimizer.momentum=null", "job.progress=false"],
    "groups and values": ["method=er", "seed=4", "method.capacity=9", "backbone=mlp", "backbone.hidden=[3,4]"],
    "fixed": ["method=er", "method.capacity=7", "seed=1"],
    "a needed value is fixed": ["dataset=folder", "dataset.root=/data", "seed=3"],
    "preset": ["experiment=cifar100_superclass", "task_order.order=B", "seed=1"],
    "quoted": ["name='x y'", "method.capacity='3'"],
    "options of hydra": ["hydra.verbose=true", "seed=7"],
    "nothing": [],
}
OTHERS = {
    "expression": ["seed=5", "name=a-${seed}"],
    "expression on a value": ["dataset=folder", "dataset.root=/elsewhere", "seed=3"],
    "removed": ["~method.capacity"],
    "forced": ["++method.capacity=5", "+method.another=3"],
    "merged": ["method=er", "method={capacity: 3}"],
    "the last one counts": ["method.capacity=9", "method.capacity=7", "seed=1"],
    "the last one within counts": ["method={capacity: 3}", "method.capacity=7"],
    "set after it was added": ["+dataset.root=/elsewhere", "dataset.root=/data"],
    "data sets": ["method=zero_shot", "backbone=glyph_clip", "job.eval_extra=[digits]"],
}
WRONG = {
    "unknown option": ["method=ewc", "method.strenght=3"],
    "unknown choice": ["method=ewcc", "seed=1"],
    "added again": ["seed=1", "+seed=2"],
    "no text": ["seed=1", "seed"],
}


@pytest.mark.parametrize("words", [*SIMPLE.values(), *OTHERS.values(), *WRONG.values()])
def test_a_job_is_what_hydra_composes(words: list[str], composer: Composer, sweep: DictConfig, jobs: Any) -> None:
    theirs, ours = (outcome(loader, sweep, words) for loader in (composer.hydra.config_loader, jobs))
    if isinstance(theirs, tuple):
        assert ours == theirs
        return
    assert OmegaConf.to_container(ours) == OmegaConf.to_container(theirs)
    with open_dict(theirs.hydra.job):
        theirs.hydra.job.num, theirs.hydra.job.id = 3, "3"
    assert folder_of(ours, "hydra.sweep.dir") == folder_of(theirs, "hydra.sweep.dir")
    plain = jobs.plain(sweep, words, 3)
    assert plain.folder == folder_of(theirs, "hydra.sweep.subdir")
    assert plain.config == plain_config(theirs) and plain.written == recorded_config(theirs)
    assert plain.choices == choices_of(theirs.hydra)


@pytest.mark.parametrize("words", SIMPLE.values(), ids=SIMPLE)
def test_common_jobs_are_composed_once(
    words: list[str], sweep: DictConfig, jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.plain(sweep, words, 0)  # the first job with these choices
    monkeypatch.setattr(sweep_jobs, "folder_of", None)  # what takes a copy of the configuration needs its folder
    assert jobs.plain(sweep, [*words, "job.eval_batch_size=17"], 1).config["job"]["eval_batch_size"] == 17


def test_values_within_what_an_expression_reads_are_left_to_hydra(jobs: Any) -> None:
    node = OmegaConf.create({"a": {"b": {"c": 1}, "d": "${.b}"}, "hydra": {"sweep": {"subdir": "${clrun.slug:}"}}})
    plain = PlainJob({"a": {"b": {"c": 1}, "d": {"c": 1}}}, {}, {}, Path())
    template = sweep_jobs._Template(node, plain, {"a.b"}, {"a.d"})
    words = ("a.b.c=2", "a.d.c=2", "a.d=2", "a.b={c: 2}")
    found = [sweep_jobs._is_simple(sweep_jobs._parsed(word), template) for word in words]
    assert found == [False, False, False, False]
    other = replace(template, plain=replace(plain, config={"a": {"e": 1}}))
    assert sweep_jobs._is_simple(sweep_jobs._parsed("a.e=2"), other)


def test_jobs_share_no_values(sweep: DictConfig, jobs: Any) -> None:
    first, second = (jobs.plain(sweep, ["method=er", f"method.capacity={n}"], n) for n in (1, 2))
    assert (first.config["method"]["capacity"], second.config["method"]["capacity"]) == (1, 2)
    assert first.folder != second.folder


def test_texts_of_configurations_read_as_those_of_omegaconf(sweep: DictConfig) -> None:
    words = ["yes", "1e3", "7", "", None, True, "x: y", "é", "- z", "long " * 60, "two\nlines"]
    odd = OmegaConf.create({"a": words, "b": {"c": "${a}"}, "d": {}})
    for cfg in (sweep, odd):
        assert yaml.safe_load(yaml_text(cfg)) == yaml.safe_load(OmegaConf.to_yaml(cfg))
