"""A checkpoint that lies is refused and none of its code runs; one that fits gives back the method bit for bit."""

import copy
import io
import json
import os
import pickle
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import quiet, rewrite, run, run_interrupted
from torch import nn

from clrun.data.split import Batch
from clrun.learning.context import Context
from clrun.methods.finetune import Finetune
from clrun.running import checkpoint, checkpoint_file
from clrun.running.build import build
from clrun.running.parts import Parts
from clrun.system.errors import ConfigError

OPTIONS = ("method=ewc", "job.max_tasks=2", "budget.epochs=1", "job.max_steps=2", "job.keep_checkpoint=true")


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run that was interrupted after its first task."""
    run_interrupted(tmp_path / "run", *OPTIONS)
    return tmp_path / "run"


class Reduce:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def dotted(command: str) -> bytes:
    """A pickle that calls os.system by a dotted name under torch, as protocol 4 allows."""
    text = pickle.dumps(command, protocol=4)[2:-1]
    name = b"\x8c\x05torch\x8c\x17serialization.os.system\x93"
    return b"\x80\x04" + name + text + b"\x85R."


def payloads(target: Path) -> dict[str, bytes]:
    """Method pickles that would create `target` if anything of them ran."""
    command = f"touch {target}"
    inner = pickle.dumps(Reduce(os.system, command))
    raw = {
        "os.system": pickle.dumps(Reduce(os.system, command)),
        "dotted name": dotted(command),
        "_load_from_bytes": pickle.dumps(Reduce(torch.storage._load_from_bytes, inner)),
        "eval": pickle.dumps(Reduce(eval, f"open({str(target)!r}, 'w')")),
        "getattr": pickle.dumps(Reduce(getattr, "x", "upper")),
    }
    zipped = {}
    for name, value in raw.items():
        if name in ("os.system", "eval"):
            buffer = io.BytesIO()
            torch.save(pickle.loads(b"N."), buffer)  # the usual container, its pickle replaced below
            zipped[f"{name} in torch's container"] = repacked(buffer.getvalue(), value)
    return raw | zipped


def repacked(archive: bytes, payload: bytes) -> bytes:
    """Return torch's zip container with its data.pkl replaced."""
    source, target = zipfile.ZipFile(io.BytesIO(archive)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
        for name in source.namelist():
            out.writestr(name, payload if name.endswith("data.pkl") else source.read(name))
    return target.getvalue()


@pytest.mark.parametrize("where", ["whole file", "method"])
@pytest.mark.parametrize("name", sorted(payloads(Path("x"))))
def test_a_crafted_pickle_is_refused_and_runs_nothing(stopped: Path, tmp_path: Path, name: str, where: str) -> None:
    target = tmp_path / "created"
    payload = payloads(target)[name]
    path = stopped / "checkpoint.pt"
    if where == "method":
        rewrite(path, method=payload)
    else:
        path.write_bytes(payload)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt"):
        run(stopped, *OPTIONS)
    assert not target.exists()


def test_the_payloads_would_work(tmp_path: Path) -> None:
    """The test above proves something only if an ordinary unpickler runs the payloads."""
    for name in ("os.system", "dotted name"):
        target = tmp_path / name.replace(" ", "-")
        pickle.loads(payloads(target)[name])
        assert target.exists()


def test_a_folder_cannot_choose_the_classes(stopped: Path, tmp_path: Path) -> None:
    """What the folder's config.yaml says plays no part in what its checkpoint may name."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'created')!r}, 'w')\nclass Evil: ...\n")
    config = yaml.safe_load((stopped / "config.yaml").read_text())
    config["method"]["_target_"] = "evil.Evil"
    (stopped / "config.yaml").write_text(yaml.safe_dump(config))
    rewrite(stopped / "checkpoint.pt", method=b"\x80\x02cevil\nEvil\n)\x81.")
    with pytest.raises(ConfigError, match="refused"):
        run(stopped, *OPTIONS)
    assert not (tmp_path / "created").exists()


def test_another_configuration_is_refused_by_its_keys(stopped: Path) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"method\.strength, seed differ"):
        run(stopped, *OPTIONS, "method.strength=7", "seed=1")
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_refused(stopped: Path) -> None:
    path = stopped / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: .*delete it"):
        run(stopped, *OPTIONS)


def test_what_is_saved_is_what_is_loaded(stopped: Path) -> None:
    config, _ = quiet(*OPTIONS)
    parts = Parts(config)
    hardware = parts.hardware
    hardware.setup()
    fresh = build(parts).method
    key = checkpoint_file.read(stopped / "checkpoint.pt")[0].config_hash
    method, run_state = checkpoint.load(stopped / "checkpoint.pt", fresh, config_hash=key, hardware=hardware)
    assert run_state.learned == 1
    assert method.penalty.shapes, "the state beyond tensors came back"
    again = copy.deepcopy(method)
    path = stopped / "again.pt"
    checkpoint.save(path, method, run_state, config_hash=key, backbone={}, hardware=hardware)
    loaded, _ = checkpoint.load(path, fresh, config_hash=key, hardware=hardware)
    for (name, before), after in zip(again.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(before, after), name


def test_unchanged_backbone_weights_are_stored_by_reference(tmp_path: Path) -> None:
    config, _ = quiet(*OPTIONS, "backbone=mlp", "backbone.hidden=[512,512]")
    parts = Parts(config)
    hardware = parts.hardware
    hardware.setup()
    built = build(parts)
    whole = checkpoint.fingerprints(built.method.backbone)
    sizes = {}
    for name, known in (("full", {}), ("referenced", whole)):
        path = tmp_path / f"{name}.pt"
        checkpoint.save(path, built.method, checkpoint.RunState(), config_hash="h", backbone=known, hardware=hardware)
        sizes[name] = path.stat().st_size
    assert sizes["full"] > 4 * 512 * 512
    assert sizes["referenced"] < sizes["full"] / 10
    fresh = build(parts).method
    loaded, _ = checkpoint.load(tmp_path / "referenced.pt", fresh, config_hash="h", hardware=hardware)
    assert checkpoint.fingerprints(loaded.backbone) == whole
    with torch.no_grad():
        next(fresh.backbone.parameters()).add_(1)
    with pytest.raises(ConfigError, match="other backbone weights"):
        checkpoint.load(tmp_path / "referenced.pt", fresh, config_hash="h", hardware=hardware)


class Keeper(Finetune):
    """Keeps whatever `kept` returns of the last batch of each task."""

    kept: Callable[..., Any]

    def mix(self, batch: Batch, ctx: Context) -> Batch:
        self.state = {"rows": type(self).kept([batch])}
        return batch


class Batches(Keeper):
    kept = list


class Growing(Keeper):
    """Keeps layers of kinds that it does not have when it begins."""

    def kept(rows: Any) -> Any:  # noqa: N805 - called on the class
        return nn.ModuleDict({"scales": nn.ParameterList([nn.Parameter(torch.eye(2))]), "norm": nn.LayerNorm(2)})


class Ring(Keeper):
    kept = deque


@pytest.mark.parametrize("kind", [Batches, Growing])
def test_batches_and_new_layers_may_be_kept(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most natural memory: a list of batches in a dictionary; and layers that are added while tasks are learned."""
    monkeypatch.setattr("clrun.methods.finetune.Finetune", kind)
    options = ("method=finetune", *OPTIONS[1:])
    run(tmp_path / "whole", *options)
    run_interrupted(tmp_path / "parts", *options)
    run(tmp_path / "parts", *options)
    whole, parts = ((tmp_path / name / "accuracy.csv").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_state_that_could_not_be_read_back_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clrun.methods.finetune.Finetune", Ring)
    expected = (
        r"^method: cannot be read back from a checkpoint .*GLOBAL collections\.deque\); keep .*job\.resume=false$"
    )
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path / "run", "method=finetune", *OPTIONS[1:])
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    run(tmp_path / "other", "method=finetune", *OPTIONS[1:], "job.resume=false")


class Callback(Keeper):
    """Keeps a function that cannot be pickled."""

    def kept(rows: Any) -> Any:  # noqa: N805 - called on the class
        return lambda: rows


def test_a_method_that_no_checkpoint_can_store_runs_without_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice of the message works when followed."""
    monkeypatch.setattr("clrun.methods.finetune.Finetune", Callback)
    options = ("method=finetune", *OPTIONS[1:4])
    with pytest.raises(ConfigError, match=r"^method: cannot be stored in a checkpoint .*or set job\.resume=false"):
        run(tmp_path / "run", *options)
    with pytest.raises(ConfigError, match="^method: cannot be stored in a checkpoint "):
        run(tmp_path / "kept", *options, "job.resume=false", "job.keep_checkpoint=true")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"of an earlier run")
    run(tmp_path / "run", *options, "job.resume=false")
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["status"] == "completed" and len(stored["notes"]) == 1
    assert stored["notes"][0].startswith("method: cannot be stored in a checkpoint ")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
