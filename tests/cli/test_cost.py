"""What a sweep does once and not for every job."""

from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from test_runs import given

from clrun.config import check as config


def test_jobs_that_differ_in_values_are_composed_from_files_once(
    clrun, stub_run, folder, monkeypatch: pytest.MonkeyPatch
):
    composed = []
    compose = ConfigLoaderImpl.load_sweep_config

    def counting(self, master, overrides):
        composed.append(tuple(overrides))
        return compose(self, master, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counting)
    assert clrun(*stub_run, "-m", "seed=0,1,2", "hydra.sweep.dir=s").code == 0
    assert composed == [("experiment=stub",)]
    jobs = given(Path("s"))
    assert sorted(job["config"]["seed"] for job in jobs) == sorted(job["job"]["number"] for job in jobs) == [0, 1, 2]
    assert all("job:" in job["job"]["hydra"]["hydra.yaml"] for job in jobs)


def test_nodes_that_runs_share_are_checked_once(monkeypatch: pytest.MonkeyPatch):
    looked_at = []
    problems = config._group_problems

    def counting(group, node, choice):
        looked_at.append((group, str(node)))
        return problems(group, node, choice)

    monkeypatch.setattr(config, "_group_problems", counting)
    monkeypatch.setattr(config, "_known", {})
    node = {"_target_": "clrun.data.orders.random", "_partial_": True, "seed": 0}
    others = [{**node, "seed": seed} for seed in (0, 0.5)]
    found = [config._known_problems("task_order", other, None) for other in (node, *others, *others)]
    assert len(looked_at) == 2
    assert found[0] == found[1] == found[3] == [] and found[2] == found[4] and "expected int" in found[2][0]
