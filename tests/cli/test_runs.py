"""Starting runs and sweeps: folders, what a run is told, failures, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clrun import __version__

ROOT = Path(__file__).parents[2]


def given(path: Path) -> list[dict]:
    """What the runs below a folder were given, in order of folders."""
    return [json.loads(file.read_text()) for file in sorted(path.rglob("given.json"))]


# --- one run


def test_a_run_gets_plain_types_its_folder_and_how_it_was_started(clrun, stub_run, folder):
    done = clrun(*stub_run, "seed=3", "method.strength=7")
    assert (done.code, done.err) == (0, "")
    [run] = given(folder)
    assert run["config"]["seed"] == 3
    assert run["config"]["method"] == {"_target_": "targets.Method", "_partial_": True, "strength": 7}
    assert run["config"]["name"] == "none-none"
    assert "hydra" not in run["config"]
    job = run["job"]
    assert (job["number"], job["parallel"], job["sweep"]) == (None, 1, False)
    assert job["overrides"] == ["experiment=stub", "seed=3", "method.strength=7"]
    assert job["choices"]["method"] == "none"
    assert "seed: 3" in job["hydra"]["config.yaml"]
    assert "runtime:" in job["hydra"]["hydra.yaml"]
    assert job["hydra"]["overrides.yaml"] == "- experiment=stub\n- seed=3\n- method.strength=7\n"
    [file] = folder.rglob("given.json")
    assert file.parent.parent == folder / "outputs" / "none-none"
    assert [path.name for path in file.parent.iterdir()] == ["given.json"]  # Hydra writes nothing there


def test_runs_of_the_same_second_have_folders_of_their_own(clrun, stub_run, folder):
    for _ in range(3):
        clrun(*stub_run)
    assert len(given(folder)) == 3


def test_a_run_that_writes_nothing_leaves_no_folder(clrun, stub_run, folder, monkeypatch):
    monkeypatch.setattr(sys.modules["clrun.running.run"], "run_config", lambda config, out, *, job: 0.0)
    assert clrun(*stub_run).code == 0
    assert list(folder.iterdir()) == []


def test_a_mistake_found_late_leaves_only_what_was_there(clrun, stub_run, folder):
    (folder / "mine").mkdir()
    done = clrun(*stub_run, "seed=14", "hydra.run.dir=mine/a/b")
    assert (done.code, done.lines) == (2, ["clrun: seed: 14 is refused late"])
    assert [path.name for path in folder.rglob("*")] == ["mine"]
    assert clrun(*stub_run, "seed=14", "hydra.run.dir=mine").code == 2
    assert (folder / "mine").is_dir()


def test_a_bug_has_a_traceback_and_exit_code_1(clrun, stub_run, folder):
    done = clrun(*stub_run, "seed=13")
    assert done.code == 1
    assert done.lines[0] == "Traceback (most recent call last):"
    assert done.lines[-1] == "RuntimeError: unlucky"


def test_ctrl_c(clrun, stub_run, folder, monkeypatch):
    def interrupted(config, out, *, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["clrun.running.run"], "run_config", interrupted)
    done = clrun(*stub_run)
    assert (done.code, done.err) == (130, "")


@pytest.mark.parametrize(("argv", "error"), [(["seed=13"], "RuntimeError"), (["method=nope"], "ConfigError")])
def test_hydra_full_error_raises(argv, error, stub_run, folder, monkeypatch):
    from clrun.cli import main

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception) as raised:  # noqa: PT011
        main([*stub_run, *argv])
    assert raised.type.__name__ == error


def test_the_working_directory_is_searched_last(clrun, stub_run, folder):
    (folder / "mine.py").write_text("from targets import Method as Mine\n")
    (folder / "json.py").write_text("raise RuntimeError('shadowed')\n")
    config = folder.parent / "conf" / "method" / "mine.yaml"
    config.write_text("_target_: mine.Mine\n_partial_: true\nstrength: 1\n")
    assert clrun(*stub_run, "method=mine").code == 0
    assert sys.path[-1] == str(folder)


def test_torchrun_ranks_above_zero_make_no_folder(clrun, stub_run, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sys.modules["clrun.running.run"],
        "run_config",
        lambda config, out, *, job: seen.append((out, out.exists())) or 0.0,
    )
    for rank in ("1", "0"):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        assert clrun(*stub_run, "hydra.run.dir=run").code == 0
    assert seen == [(folder / "run", False), (folder / "run", True)]


# --- sweeps


def test_a_sweep_runs_every_combination(clrun, stub_run, folder):
    done = clrun(*stub_run, "-m", "seed=range(2)", "method.strength=3,4", "hydra.sweep.dir=sweep")
    assert (done.code, done.err) == (0, "")
    runs = given(folder / "sweep")
    assert sorted((r["config"]["seed"], r["config"]["method"]["strength"]) for r in runs) == [
        (0, 3),
        (0, 4),
        (1, 3),
        (1, 4),
    ]
    assert sorted(r["job"]["number"] for r in runs) == [0, 1, 2, 3]
    assert {(r["job"]["sweep"], r["job"]["parallel"]) for r in runs} == {(True, 1)}
    assert done.out.splitlines()[0] == "4 runs, results: sweep"


def test_a_sweep_started_again_finds_its_folders(clrun, stub_run, folder):
    clrun(*stub_run, "-m", "seed=1,2", "method.strength=3", "hydra.sweep.dir=sweep")
    before = {path.name for path in (folder / "sweep").glob("*/")}
    clrun(*stub_run, "-m", "job.progress=false", "method.strength=3", "hydra.sweep.dir=sweep", "seed=2,3,1")
    after = {path.name for path in (folder / "sweep").glob("*/")}
    assert before < after
    assert len(after) == 3


def test_failed_jobs_stop_nobody(clrun, stub_run, folder):
    for more in ([], ["hydra.sweeper.max_batch_size=1"]):
        done = clrun(*stub_run, "-m", "seed=13,1,14,2", "hydra.sweep.dir=sweep", *more)
        assert done.code == 1
        assert sorted(r["config"]["seed"] for r in given(folder / "sweep")) == [1, 2]
        assert done.lines[-2:] == [
            "clrun: failed: experiment=stub seed=13: RuntimeError: unlucky",
            "clrun: failed: experiment=stub seed=14: seed: 14 is refused late",
        ]
        assert done.err.count("Traceback") == 1
        assert len(list((folder / "sweep").glob("*/"))) == 2  # none for the failed ones


def test_mistakes_of_all_combinations_are_listed_before_anything_starts(clrun, stub_run, folder):
    done = clrun(*stub_run, "-m", "method=none,task_aware", "scenario.n_tasks=0,5", "seed=1,abc", "+method.x=1")
    assert done.code == 2
    assert done.lines == [
        "clrun: scenario.n_tasks: must be at least 1, got 0 [4 of 8 runs]",
        "clrun: method.x: unknown option of method=none [4 of 8 runs]",
        "clrun: seed: expected int, got 'abc' [4 of 8 runs]",
        "clrun: method.x: unknown option of method=task_aware [4 of 8 runs]",
    ]
    assert list(folder.iterdir()) == []


def test_mistakes_that_hydra_finds_in_combinations(clrun, stub_run, folder):
    done = clrun(*stub_run, "-m", "method=none,nope", "budget.x=1,2", "method.strength=range(2)")
    assert (done.code, len(done.lines)) == (2, 2)
    assert "clrun: budget.x: unknown option of budget=none [4 of 8 runs]" in done.lines
    assert any(line.startswith("clrun: no method named 'nope'") for line in done.lines)
    assert list(folder.iterdir()) == []


def test_mistakes_in_the_data_end_a_sweep_before_it_starts(clrun, stub_run, folder):
    done = clrun(*stub_run, "-m", "scenario.n_tasks=5,11", "seed=range(3)")
    assert (done.code, done.lines) == (2, ["clrun: scenario.n_tasks: 11 tasks of 10 classes [3 of 6 runs]"])
    assert list(folder.iterdir()) == []


def test_mistakes_of_the_method_are_those_of_its_own_jobs(clrun, stub_run, folder):
    done = clrun(*stub_run, "-m", "method.strength=1,13,2", "seed=range(2)")
    assert (done.code, done.lines) == (2, ["clrun: method.strength: 13 is refused [2 of 6 runs]"])
    assert list(folder.iterdir()) == []


def test_data_are_looked_at_once_for_runs_that_share_them(clrun, stub_run, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sys.modules["clrun.running.run"], "preflight", lambda config: seen.append(config["scenario"]["n_tasks"])
    )
    assert clrun(*stub_run, "-m", "scenario.n_tasks=3,4", "seed=range(5)").code == 0
    assert seen == [3, 4]


def test_two_runs_in_one_folder_are_a_mistake(clrun, stub_run, folder):
    done = clrun(*stub_run, "-m", "hardware.workers=0,1")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "would share the folder" in done.lines[0]
    assert list(folder.iterdir()) == []


def test_sweep_folders_may_be_numbered(clrun, stub_run, folder):
    assert clrun(*stub_run, "-m", "seed=1,2", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra:job.num}").code == 0
    assert sorted(path.name for path in (folder / "sweep").glob("*/")) == ["0", "1"]


def test_globs_and_long_orders(clrun, stub_run, folder):
    orders = ",".join(f"[{','.join(map(str, range(start, start + 100)))}]" for start in (0, 1))
    done = clrun(*stub_run, "-m", "method=glob(non*)", f"task_order.tasks={orders}")
    assert (done.code, done.err) == (0, "")
    assert len(given(folder)) == 2


def test_tables_are_rebuilt_whatever_happens(clrun, stub_run, folder, monkeypatch):
    seen = []

    class Result:
        text = "THE TABLE"

    monkeypatch.setattr("clrun.reporting.sweep.refresh", lambda path: seen.append(path) or Result)
    assert "THE TABLE" in clrun(*stub_run, "-m", "seed=1,2", "hydra.sweep.dir=a").out
    assert "THE TABLE" in clrun(*stub_run, "-m", "seed=13", "hydra.sweep.dir=b").out

    def interrupted(config, out, *, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["clrun.running.run"], "run_config", interrupted)
    done = clrun(*stub_run, "-m", "seed=1,2", "hydra.sweep.dir=c")
    assert (done.code, "THE TABLE" in done.out) == (130, True)
    assert seen == [Path("a"), Path("b"), Path("c")]


def test_an_experiment_can_be_a_sweep(clrun, stub_run, folder):
    assert clrun(*stub_run[:2], "experiment=stub_sweep").code == 0
    assert [r["config"]["seed"] for r in given(folder / "outputs" / "sweeps")] == [0, 1]
    assert clrun(*stub_run[:2], "--run", "experiment=stub_sweep", "seed=5").code == 0
    assert [r["config"]["seed"] for r in given(folder / "outputs" / "none-none")] == [5]


@pytest.mark.parametrize(("launcher", "parallel"), [("joblib", 2), ("submitit_local", 2)])
def test_parallel_launchers(launcher, parallel, stub, folder):
    argv = ["-m", "seed=13,2", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep"]
    argv += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    for name in ("__init__", f"hydra_{launcher.partition('_')[0]}_launcher"):  # of somebody else; it is not run
        (folder / "hydra_plugins").mkdir(exist_ok=True)
        (folder / "hydra_plugins" / f"{name}.py").write_text(f"open('{folder}/ran', 'w').close()\n")
    (folder / "mine.py").write_text("from targets import *\n")  # a module of the working folder is found all the same
    (Path(stub[1]) / "dataset" / "none.yaml").write_text("_target_: mine.dataset")
    done = subprocess.run([sys.executable, "-m", "clrun", *stub, *argv], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "clrun: failed: experiment=stub seed=13: RuntimeError: unlucky"
    runs = given(folder / "sweep")
    assert [(r["config"]["seed"], r["job"]["number"], r["job"]["parallel"]) for r in runs] == [(2, 1, parallel)]
    found = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert found == {"sweep", "hydra_plugins", "mine.py"}


# --- questions


def test_help_is_a_page_of_our_own(clrun, folder):
    done = clrun("--help")
    assert done.code == 0
    for group in ("dataset", "scenario", "task_order", "backbone", "method", "budget", "hardware", "logger", "job"):
        assert f"\n{group}: " in done.out
    assert "\nexperiment: aper_cifar224, " in done.out
    examples = done.out.partition("Examples\n")[2].partition("\n\n")[0]
    assert examples.count("clrun") == 5
    assert "powered by Hydra" not in done.out


def test_version(clrun):
    assert clrun("--version").out == f"clrun {__version__}\n"


def test_cfg_shows_every_option(clrun):
    out = clrun("--cfg", "job", "method=ewc", "method.strength=7").out
    assert "  strength: 7\n" in out
    assert "hydra:" not in out.replace("${hydra:", "")


GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra")


def test_list_refuses_what_is_no_group(clrun):
    done = clrun("list", "hydra")
    assert done.code == 2 and f"no group 'hydra' (available: {', '.join(GROUPS)})" in done.err


@pytest.mark.parametrize("group", GROUPS)
def test_list(group, clrun):
    done = clrun("list", group)
    assert done.out == clrun("list", f"{group}s").out
    members = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
    assert [line.split()[0] for line in done.out.splitlines()] == members
    assert all(len(line.split()) > 3 for line in done.out.splitlines())


@pytest.mark.parametrize("option_first", [False, True])
def test_list_knows_the_users_members(option_first, clrun, stub):
    words = ("list", "methods")
    lines = clrun(*(stub[:2] + words if option_first else words + stub[:2])).out.splitlines()
    assert [line for line in lines if line.split() == ["none", "Does", "nothing"]]
    assert any(line.startswith("ewc ") for line in lines)


def test_completion(clrun, monkeypatch):
    assert "complete" in clrun("-sc", "install=bash").out
    monkeypatch.setenv("COMP_LINE", "clrun method=e")
    monkeypatch.setenv("COMP_POINT", "14")
    found = clrun("-sc", "query=bash").out.split()
    assert found == ["method=ease", "method=ebll", "method=er", "method=esn", "method=ewc"]


def test_the_reader_of_a_pipe_may_leave(folder):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m clrun --help | true"
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.stderr == ""
