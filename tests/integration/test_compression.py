"""Compression as a stage of runs: what holds, what is recorded, what is refused, and that resuming changes no byte."""

import json
import re

import pytest
import torch
from running import cells, fitting, quiet, run, run_interrupted

from clrun.blocks.compress.base import FORMS, forms_of
from clrun.config.compose import Composer, plain_config
from clrun.reporting.page import render
from clrun.reporting.sweep import page_of, read_runs, sweep_table
from clrun.reporting.tables import final_table
from clrun.running.run import preflight
from clrun.system.errors import ConfigError
from clrun.system.yaml_files import conf_dir

SHORT = ("job.max_tasks=2", "budget.epochs=1", "job.max_steps=3")
FEW = ("compress.samples=32",)
KINDS = {
    "svd": FEW,
    "fwsvd": FEW,
    "tfwsvd": (*FEW, "compress.sweeps=2"),
    "magnitude_prune": FEW,
    "obc_prune": (*FEW, "compress.layers=[layers.conv1]"),
    "obc_quant": (*FEW, "compress.layers=[layers.conv1]"),
    "mfac_prune": (*FEW, "compress.gradients=4", "compress.rounds=2", "compress.update=none"),
}


def record(out):
    return json.loads((out / "run.json").read_text())


def stages(out):
    return [task.get("compression") for task in record(out)["cost"]["tasks"]]


def rows(out, phase):
    return [line for line in (out / "accuracy.csv").read_text().splitlines() if line.endswith(f",{phase}")]


# The stage is the same for all kinds, and what differs is tried without a run in test_blocks_compress.
OFTEN = ("svd", "obc_quant")
SELDOM = [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize("kind", SELDOM)
def test_a_run_records_what_it_has_compressed_and_resumes_byte_for_byte(kind, tmp_path):
    options = ("method=er", f"compress={kind}", *KINDS[kind], *SHORT)
    run(tmp_path / "whole", *options)
    run_interrupted(tmp_path / "again", *options)
    run(tmp_path / "again", *options)
    assert (tmp_path / "again/accuracy.csv").read_bytes() == (tmp_path / "whole/accuracy.csv").read_bytes()
    timed = ("seconds", "finetune_seconds", "peak_memory_bytes")
    first, second = (
        [{k: v for k, v in s.items() if k not in timed} for s in stages(tmp_path / n)] for n in ("whole", "again")
    )
    assert first == second and all(stage["kind"] == kind for stage in first)
    for stage in first:
        assert stage["stored_bytes"] < stage["dense_bytes"]
        saved = sum(layer["dense_bytes"] - layer["stored_bytes"] for layer in stage["layers"].values())
        assert saved == stage["dense_bytes"] - stage["stored_bytes"] and stage["layers"]
        assert set(stage["before"]) == {"cil", "til"}
    assert len(rows(tmp_path / "whole", "dense")) == len(rows(tmp_path / "whole", "end")) == 6


NEUTRAL = {
    "svd": "compress.amount=1",
    "fwsvd": "compress.target=rank compress.amount=1000",
    "magnitude_prune": "compress.amount=0",
    "obc_prune": "compress.target=ratio compress.amount=1",
    "obc_quant": "compress.amount=16",
    "mfac_prune": "compress.amount=0",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    run(out, "method=er", "job.keep_checkpoint=true", *SHORT)
    return out


@pytest.mark.parametrize("kind", [k if k in OFTEN else pytest.param(k, marks=pytest.mark.slow) for k in NEUTRAL])
def test_a_neutral_target_is_bit_for_bit_the_plain_run(kind, plain, tmp_path):
    run(tmp_path, "method=er", f"compress={kind}", *FEW, *NEUTRAL[kind].split(), *SHORT)
    assert (tmp_path / "accuracy.csv").read_bytes() == (plain / "accuracy.csv").read_bytes()


def test_without_compression_the_configuration_is_that_from_before_the_group():
    with Composer.of(config_path=None, config_name=None, config_dir=None) as composer:
        config = plain_config(composer.compose(["hydra.run.dir=unused"]))
    assert "compress" not in config


def test_removed_weights_stay_removed_while_later_tasks_are_learned(tmp_path, monkeypatch):
    """After every step of the second task, also with fine-tuning and momentum."""
    seen = []
    from clrun.running import engine

    def watched(method):
        real(method)
        if hasattr(method, FORMS):
            seen.append(
                {
                    n: float((method.backbone.get_parameter(f"{n}.weight") == 0).float().mean())
                    for n, _ in forms_of(method)
                }
            )

    real = engine.hold
    monkeypatch.setattr(engine, "hold", watched)
    run(tmp_path, "method=er", "compress=magnitude_prune", "compress.amount=0.75", "compress.epochs=1", *FEW, *SHORT)
    assert len(seen) == 3 + 3 + 3 and all(set(each.values()) == {0.75} for each in seen)
    first, second = stages(tmp_path)
    assert first["layers"] == second["layers"] and "directly_after" in first and first["finetune_seconds"] > 0
    assert len(rows(tmp_path, "compressed")) == 6


def test_low_rank_stays_low_rank(tmp_path, monkeypatch):
    ranks = []
    from clrun.running import engine

    real = engine.hold

    def watched(method):
        real(method)
        if hasattr(method, FORMS):
            weight = method.backbone.get_parameter("layers.conv2.weight").flatten(1).double()
            ranks.append(int(torch.linalg.matrix_rank(weight, rtol=1e-5)))

    monkeypatch.setattr(engine, "hold", watched)
    run(tmp_path, "method=ewc", "compress=svd", "compress.target=rank", "compress.amount=5", *SHORT)
    assert ranks == [5, 5, 5]
    assert [stage["layers"]["layers.conv2"]["rank"] for stage in stages(tmp_path)] == [5, 5]


def test_quantised_weights_end_on_their_grid_although_training_moves_them(tmp_path):
    options = ("compress=obc_quant", "compress.amount=2", "compress.rounding=nearest", "compress.epochs=1")
    run(tmp_path, "method=er", *options, *FEW, *SHORT, "job.save_model=true")
    from clrun.api import load

    weight = load(tmp_path).learner().method.backbone.get_parameter("layers.conv2.weight").flatten(1)
    assert max(len(row.unique()) for row in weight) <= 4


def weights_of(out):
    from clrun.api import load

    learner = load(out).learner()
    return learner.method.backbone.state_dict(), learner


@pytest.mark.parametrize("kind", ["svd", "magnitude_prune", pytest.param("obc_quant", marks=pytest.mark.slow)])
def test_a_saved_model_is_the_compressed_form_and_loads_bit_for_bit(kind, tmp_path):
    run(
        tmp_path,
        "method=er",
        f"compress={kind}",
        *KINDS[kind],
        *SHORT,
        "job.keep_checkpoint=true",
        "job.save_model=true",
    )
    whole, _ = weights_of(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    saved, learner = weights_of(tmp_path)
    assert whole.keys() == saved.keys() and all(torch.equal(whole[key], saved[key]) for key in whole)
    stage = stages(tmp_path)[-1]
    assert {n: form.stored_bytes for n, form in forms_of(learner.method)} == {
        n: layer["stored_bytes"] for n, layer in stage["layers"].items()
    }
    from safetensors import safe_open

    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        size = sum(file.get_tensor(key).nbytes for key in file.keys() if key.startswith(("backbone.", FORMS)))  # noqa: SIM118
    assert size == stage["stored_bytes"]


def test_the_end_is_the_last_task_alone(tmp_path):
    run(tmp_path, "method=er", "compress=magnitude_prune", "compress.when=end", *FEW, *SHORT)
    first, last = stages(tmp_path)
    assert first is None and last["layers"]
    assert len(rows(tmp_path, "dense")) == 4


def test_a_fine_tuning_offers_no_row_to_the_memory_again(tmp_path):
    """The memory of the second task holds what it would hold without fine-tuning."""
    from clrun.api import load

    held = []
    for name, more in (("without", ()), ("with", ("compress.epochs=1",))):
        run(tmp_path / name, "method=er", "compress=magnitude_prune", *more, *FEW, *SHORT, "job.keep_checkpoint=true")
        held.append(load(tmp_path / name).learner().method.memory)
    assert held[0].offered == held[1].offered and torch.equal(held[0].y, held[1].y)


REFUSED = {
    "frozen features": ("method=ncm", "compress: Ncm reads features of the frozen backbone"),
    "linear probe": ("method=linear_probe", "compress: LinearProbe reads features of the frozen backbone"),
    "halrp": ("method=halrp scenario.setting=til", "compress: Halrp predicts with a network of its own for each task"),
    "packnet": ("method=packnet scenario.setting=til", "compress: Packnet gives each task weights of its own"),
    "blip": ("method=blip", "compress: Blip puts the weights of the backbone on a grid"),
    "swag": ("method=swag", "compress: Swag predicts with averages"),
}


@pytest.mark.parametrize(("options", "line"), REFUSED.values(), ids=REFUSED)
def test_a_method_for_which_it_makes_no_sense_is_refused_before_anything_is_built(options, line):
    config, _ = quiet(*options.split(), "compress=svd")
    with pytest.raises(ConfigError) as error:
        preflight(config)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


LATE = {
    "frozen backbone": ("method=l2p backbone=glyph_vit compress=svd", "compress: L2p trains no linear layer"),
    "unknown layer": (
        "compress=svd compress.layers=[convv1]",
        "compress.layers: no trained layer of the backbone matches",
    ),
    "everything excluded": ("compress=svd 'compress.exclude=[*]'", "compress.layers: no layer is left"),
    "ratio without room": (
        "compress=svd compress.amount=0.01",
        "compress.amount=0.01: layer layers.conv1 [32, 9] needs",
    ),
    "odd columns": (
        "compress=obc_prune compress.pattern='2:4'",
        "compress.pattern=2:4: layer layers.conv1 has 9 columns",
    ),
    "odd blocks": ("compress=obc_prune compress.block=2", "compress.block=2: layer layers.conv1 has 9 columns"),
}


@pytest.mark.parametrize(("options", "line"), LATE.values(), ids=LATE)
def test_what_the_layers_do_not_allow_is_refused_and_nothing_is_left(options, line, tmp_path):
    with pytest.raises(ConfigError) as error:
        run(tmp_path / "out", *(word.strip("'").replace("'", "") for word in options.split()), *SHORT)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


OPTIONS = {
    "ratio above 1": ("compress=svd compress.amount=1.5", "compress.amount=1.5: a ratio is"),
    "broken rank": ("compress=svd compress.target=rank compress.amount=2.5", "compress.amount=2.5: a rank is"),
    "one bit": ("compress=obc_quant compress.amount=1", "compress.amount=1: grids have 2 to 8 bits"),
    "twelve bits": ("compress=obc_quant compress.amount=12", "compress.amount=12: grids have 2 to 8 bits"),
    "broken bits": ("compress=obc_quant compress.amount=2.5", "compress.amount=2.5: bits are a whole number"),
    "everything": ("compress=magnitude_prune compress.amount=1", "compress.amount=1: a sparsity is"),
    "tiny ratio": ("compress=mfac_prune compress.target=ratio compress.amount=0.01", "compress.amount=0.01: a ratio"),
    "N = M": ("compress=obc_prune compress.pattern='4:4'", "compress.pattern=4:4: N of every M columns are kept"),
    "no pattern": ("compress=obc_prune compress.pattern=half", "compress.pattern=half: expected N:M"),
    "pattern over all": (
        "compress=magnitude_prune compress.pattern='2:4' compress.scope=global",
        "compress.pattern: is the same in every layer",
    ),
    "pattern of blocks": ("compress=obc_prune compress.pattern='2:4' compress.block=4", "compress.block: excludes"),
    "unknown option": ("compress=svd compress.side=in", "compress.side: unknown option of compress=svd"),
    "option of none": ("compress.amount=1", "compress.amount: unknown option of compress=none"),
}


@pytest.mark.parametrize(("options", "line"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_make_no_sense_are_refused_in_one_line(options, line):
    with pytest.raises(ConfigError) as error:
        quiet(*options.split())
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_dry_run_says_what_will_be_compressed(tmp_path, capsys):
    run(tmp_path, "job=dry_run", "job.max_tasks=1", "compress=obc_quant", "compress.exclude=[layers.conv1]")
    out = capsys.readouterr().out
    assert "compress: obc_quant, 4 bits per layer, after each task: 1 layers (layers.conv2) with 18,432 of the " in out


@pytest.mark.slow  # four runs
def test_a_run_that_went_on_after_its_last_task_cannot_have_been_compressed_at_its_end(tmp_path):
    options = (
        "method=er",
        "compress=magnitude_prune",
        *FEW,
        "budget.epochs=1",
        "job.max_steps=2",
        "job.keep_checkpoint=true",
    )
    run(tmp_path / "one", *options, "compress.when=end", "job.max_tasks=1")
    with pytest.raises(ConfigError, match=r"^job.start_from: with compress.when=end"):
        run(tmp_path / "two", *options, "compress.when=end", "job.max_tasks=2", f"job.start_from={tmp_path / 'one'}")
    run(tmp_path / "each", *options, "job.max_tasks=1")
    run(tmp_path / "on", *options, "job.max_tasks=2", f"job.start_from={tmp_path / 'each'}")
    run(tmp_path / "whole", *options, "job.max_tasks=2")
    assert cells(tmp_path / "on") == cells(tmp_path / "whole")


def test_reports_have_the_bytes_and_draw_accuracy_against_them(tmp_path):
    for name, options in (("plain", ()), ("small", ("compress=magnitude_prune",)), ("low", ("compress=svd",))):
        run(tmp_path / name, "method=er", *options, *SHORT)
    result = read_runs([tmp_path])
    header, lines = sweep_table(result.runs)
    columns = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    dense, stored = (stages(tmp_path / "small")[-1][key] for key in ("dense_bytes", "stored_bytes"))
    assert (columns["small"]["dense_bytes"], columns["small"]["compressed_bytes"]) == (dense, stored)
    assert columns["plain"]["dense_bytes"] is columns["plain"]["compressed_bytes"] is None
    page = render(page_of(result, "title"))
    assert "Accuracy (points) against bytes of the network." in page and f"{stored:,.4g} bytes of the network" in page
    assert f"{dense:,.4g} bytes of the network" in page  # the run without compression stands beside them
    table = final_table(record(tmp_path / "small"))
    assert re.search(rf"compressed +{stored:,}  \({stored / dense:.3f} of them\)", table)
    assert "accuracy before compression" in table
    assert "compress" not in final_table(record(tmp_path / "plain"))


def test_a_matrix_without_an_inverse_is_said_in_one_line(tmp_path):
    options = ("compress=obc_quant", "compress.damping=1e-30", "compress.samples=1", "compress.exclude=[layers.conv1]")
    with pytest.raises(ConfigError, match=r"^compress.damping: the inputs of layer layers.conv2 depend on each other"):
        run(tmp_path, "method=er", *options, *SHORT)


SOME = ("lwf", "gem")  # teachers, projected gradients; the others in the slow run
METHODS = [
    name if name in SOME else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(path.stem for path in (conf_dir() / "method").glob("*.yaml"))
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_compressed_and_stays_so_or_is_refused_before_it_begins(method, tmp_path):
    options = (f"method={method}", *fitting(method), "compress=magnitude_prune", "compress.amount=0.6", *FEW, *SHORT)
    try:
        run(tmp_path / "out", *options, "job.keep_checkpoint=true", "job.max_eval_rows=8")
    except ConfigError as error:
        assert str(error).startswith("compress: ") and not (tmp_path / "out").exists()
        return
    from clrun.api import load

    learned = load(tmp_path / "out").learner().method
    for layer, form in forms_of(learned):
        weight = learned.backbone.get_parameter(f"{layer}.weight")
        assert not weight[~form.kept].any() and float((~form.kept).float().mean()) == pytest.approx(0.6, abs=0.02)
    assert [sorted(stage["layers"]) for stage in stages(tmp_path / "out")] == [
        sorted(name for name, _ in forms_of(learned))
    ] * 2
