"""Forty kinds of weight files as people have them: each gives the right tensors, or one line that says what it is."""

import argparse
import datetime
import gzip
import io
import json
import os
import pathlib
import pickle
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from clrun.backbones.pretrained import current_name, timm_backbone
from clrun.backbones.small import cnn
from clrun.backbones.weights import check_file, load_weights, read_weights
from clrun.system.errors import ConfigError, DataWarning

State = dict[str, torch.Tensor]
OPTIONS = dict.fromkeys(("weights", "weights_key", "image_size", "crop", "interpolation"))


def small() -> nn.Module:
    """A network whose names look like those of a transformer."""
    model = nn.Module()
    model.patch_embed = nn.Linear(4, 3)
    model.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model.norm = nn.BatchNorm1d(3)
    return model


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    return {name: value.clone() for name, value in small().state_dict().items()}


def plus(state: State, number: float) -> State:
    """The tensors with `number` added, of their own types."""
    return {name: value + number for name, value in state.items()}


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def safe(path: Path, state: State) -> Path:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.", "module.encoder_q.", "encoder.", "net.", "student.")
PREFIXES += ("teacher.backbone.", "_orig_mod.module.", "module._orig_mod.", "model.backbone.", "visual.trunk.")
NESTINGS = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "teacher",
    "state_dict_ema",
    "model_ema",
    "weights",
)
SUFFIXES = ("w.pth", "w.pt", "w.bin", "w.ckpt", "w.pth.tar", "w.PTH", "w", "w.weights", "w.model")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(state: State, tmp_path: Path, prefix: str) -> None:
    loads(saved(tmp_path / "w.pth", prefixed(state, prefix)), state)


@pytest.mark.parametrize("key", NESTINGS)
def test_nested_states_are_found(state: State, tmp_path: Path, key: str) -> None:
    loads(
        saved(tmp_path / "w.pth", {"epoch": 3, key: state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}), state
    )


@pytest.mark.parametrize("name", SUFFIXES)
def test_the_content_decides_and_not_the_name(state: State, tmp_path: Path, name: str) -> None:
    loads(saved(tmp_path / name, state), state)


def loads(path: Path, state: State, **options: Any) -> list[str]:
    """Load a file into the small network, compare bit for bit, and return the notes."""
    model = small()
    load_weights(model, "small", path, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.weights_read["file"] == path.name and len(model.weights_read["sha256"]) == 64
    notes: list[str] = model.weights_read["notes"]
    return notes


def test_two_levels_and_a_prefix(state: State, tmp_path: Path) -> None:
    loads(saved(tmp_path / "w.pth", {"checkpoint": {"model": prefixed(state, "module.backbone.")}}), state)


def test_the_old_pickle_format_of_torch(state: State, tmp_path: Path) -> None:
    loads(saved(tmp_path / "w.pth", OrderedDict(state), _use_new_zipfile_serialization=False), state)


def test_safetensors_under_its_own_and_another_name(state: State, tmp_path: Path) -> None:
    assert not loads(safe(tmp_path / "w.safetensors", state), state)
    loads(safe(tmp_path / "w.SAFETENSORS", state), state)
    assert "is a safetensors file by its content" in loads(safe(tmp_path / "w.pth", state), state)[0]
    loads(saved(tmp_path / "x.safetensors", state), state)  # a PyTorch file under the name of the other format


def test_own_model_file_of_a_run(state: State, tmp_path: Path) -> None:
    loads(
        safe(tmp_path / "model.safetensors", {**prefixed(state, "backbone."), "head.weight": torch.ones(2, 3)}), state
    )


def test_averaged_weights_come_first_and_the_others_by_option(state: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"state_dict": state, "state_dict_ema": plus(state, 1)})
    (note,) = loads(path, plus(state, 1))
    assert "'state_dict_ema' was loaded (averaged weights come first, as in timm)" in note
    assert "backbone.weights_key chooses another one: state_dict" in note
    assert not loads(path, state, key="state_dict")
    without = {name: value for name, value in plus(state, 1).items() if "num_batches" not in name}
    path = saved(
        tmp_path / "w.pth", {"model": state, "model_ema": {**without, "norm.num_batches_tracked": torch.tensor(0)}}
    )
    assert "'model_ema' was loaded" in loads(path, {**without, "norm.num_batches_tracked": torch.tensor(0)})[0]


def test_student_and_teacher(state: State, tmp_path: Path) -> None:
    both = {"student": prefixed(state, "module.backbone."), "teacher": prefixed(plus(state, 1), "backbone.")}
    path = saved(tmp_path / "w.pth", both)
    (note,) = loads(path, plus(state, 1))
    assert "'teacher.backbone' was loaded" in note and "student.backbone" in note
    loads(path, state, key="student.backbone")
    loads(path, state, key="student")
    flat = saved(tmp_path / "f.pth", {**prefixed(state, "student."), **prefixed(plus(state, 1), "teacher.")})
    assert "'teacher' was loaded" in loads(flat, plus(state, 1))[0]
    loads(flat, state, key="student")


def test_query_and_key_encoder_of_momentum_contrast(state: State, tmp_path: Path) -> None:
    both = {**prefixed(state, "module.encoder_q."), **prefixed(plus(state, 1), "module.encoder_k.")}
    path = saved(tmp_path / "w.pth", {"state_dict": {**both, "module.queue": torch.ones(2)}})
    assert "'state_dict.encoder_q' was loaded" in loads(path, state)[0]
    loads(path, plus(state, 1), key="state_dict.encoder_k")


class Note:
    """An object of a module that nobody knows."""


BESIDE: dict[str, Callable[[], Any]] = {
    "namespace": lambda: argparse.Namespace(lr=1),
    "NumPy scalar": lambda: np.float64(1),
    "NumPy array": lambda: np.arange(3),
    "NumPy integer": lambda: np.int32(7),
    "path": lambda: pathlib.PurePosixPath("a"),
    "simple namespace": lambda: types.SimpleNamespace(a=1),
    "date": lambda: datetime.datetime(2026, 1, 1),
    "settings of omegaconf": lambda: __import__("omegaconf").OmegaConf.create({"a": 1}),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_settings_beside_the_weights_do_not_matter(state: State, tmp_path: Path, beside: str) -> None:
    loads(saved(tmp_path / "w.pth", {"model": state, "args": BESIDE[beside]()}), state)


class Call:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_no_code_in_a_file_is_run(state: State, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for call in (Call(os.mkdir, str(mark)), Call(Path.touch, mark), Call(eval, f"open({str(mark)!r}, 'w')")):
        path = saved(tmp_path / "w.pth", {"model": state, "x": call})
        said = refused(path)
        assert "contains more than tensors and is refused" in said and "weights_only" not in said
    path.write_bytes(pickle.dumps({"model": Call(os.mkdir, str(mark))}, protocol=2))
    refused(path)
    assert not mark.exists()


def refused(path: Path, **options: Any) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ConfigError) as error:
        load_weights(small(), "small", path, **options)
    said = str(error.value)
    assert said.startswith(("backbone.weights", "backbone.weights_key")) and len(said.splitlines()) == 1
    assert str(path) in said and said.isprintable()
    return said


def test_an_unknown_class_is_named_plainly(state: State, tmp_path: Path) -> None:
    said = refused(saved(tmp_path / "w.pth", {"model": state, "extra": Note()}))
    assert "an object of the type" in said and "Note" in said and "save only the state_dict()" in said
    said = refused(saved(tmp_path / "w.pth", {"model": state, "extra": defaultdict(list, a=[1])}))
    assert "type collections.defaultdict" in said


def as_zip(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return buffer.getvalue()


WRONG: dict[str, tuple[bytes, str]] = {
    "page": (b"<html><body>404</body></html>", "is a web page (HTML)"),
    "page with a byte order mark": (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "is a web page (HTML)"),
    "xml of a storage service": (b"<?xml version='1.0'?><Error>", "is a web page (HTML)"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
    "empty": (b"", "is empty (0 bytes)"),
    "json": (json.dumps({"error": "not found"}).encode(), "is a JSON text"),
    "text": (b"Not Found", "is neither a safetensors, nor a PyTorch, nor an .npz file"),
    "gzip": (gzip.compress(b"weights"), "is a compressed archive"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(64), "is a Keras (HDF5) file"),
    "zip of other files": (as_zip({"readme.txt": b"x"}), "is a zip archive without weights"),
    "script": (as_zip({"m/data.pkl": b"x", "m/code/m.py": b"x"}), "is a TorchScript program"),
    "cut zip": (as_zip({"m/data.pkl": b"x" * 100})[:60], "is damaged or cut off"),
    "zip of nothing": (as_zip({"m/data.pkl": b""}), "is damaged"),
    "zeros": (bytes(1000), "is neither"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_file_of_weights_is_told_as_what_it_is(tmp_path: Path, kind: str) -> None:
    content, said = WRONG[kind]
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    assert said in refused(path)


def test_files_that_are_cut_off(state: State, tmp_path: Path) -> None:
    for path in (saved(tmp_path / "w.pth", state), safe(tmp_path / "w.safetensors", state)):
        path.write_bytes(path.read_bytes()[:-200])
        assert "damaged" in refused(path) or "cut off" in refused(path)


def test_folders_pipes_and_missing_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is not a regular file" in refused(tmp_path / "pipe.pth").replace("not a regular", "is not a regular", 1)
    assert "is a folder" in refused(tmp_path)
    assert "there is no file" in refused(tmp_path / "gone.pth")


def test_other_contents(state: State, tmp_path: Path) -> None:
    assert "holds a list and no tensors by name" in refused(saved(tmp_path / "w.pth", [torch.ones(1)]))
    assert "holds no tensors by name (its keys: epoch)" in refused(saved(tmp_path / "w.pth", {"epoch": 3}))
    broken = {**state, "norm.weight": torch.full((3,), float("nan"))}
    assert "NaN or infinite in norm.weight" in refused(saved(tmp_path / "w.pth", broken))


def test_names_that_differ_show_both_lists_and_the_likely_prefix(state: State, tmp_path: Path) -> None:
    other = {"stem.weight": torch.ones(3), "stem.bias": torch.ones(3)}
    said = refused(saved(tmp_path / "w.pth", other))
    assert "the file has no values for blocks.0.bias" in said and "no tensors called stem.bias, stem.weight" in said
    assert "size mismatch" in refused(saved(tmp_path / "w.pth", {**state, "norm.weight": torch.ones(7)}))


def test_a_key_that_is_not_there_lists_the_choices(state: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"state_dict": state, "model_ema": state})
    said = refused(path, key="ema")
    assert said.startswith("backbone.weights_key") and "there are: state_dict, model_ema" in said


# --- timm


def timm_model(**changes: Any) -> nn.Module:
    given: dict[str, Any] = {"name": "test_vit", "pretrained": False, "normalize": "timm", **OPTIONS, **changes}
    return timm_backbone((3, 32, 32), **given)


def jax_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights of a timm vision transformer as Google's .npz files name and lay them out."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for i in range(len(model.blocks)):
        to, own = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        width = state[f"{own}.norm1.weight"].size
        arrays |= {
            f"{to}/LayerNorm_0/{a}": state[f"{own}.norm1.{b}"] for a, b in (("scale", "weight"), ("bias", "bias"))
        }
        arrays |= {
            f"{to}/LayerNorm_2/{a}": state[f"{own}.norm2.{b}"] for a, b in (("scale", "weight"), ("bias", "bias"))
        }
        attention = f"{to}/MultiHeadDotProductAttention_1"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * width, (part + 1) * width)
            weight, bias = state[f"{own}.attn.qkv.weight"][rows], state[f"{own}.attn.qkv.bias"][rows]
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = state[f"{own}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = state[f"{own}.attn.proj.bias"]
        for j in range(2):
            arrays[f"{to}/MlpBlock_3/Dense_{j}/kernel"] = state[f"{own}.mlp.fc{j + 1}.weight"].T
            arrays[f"{to}/MlpBlock_3/Dense_{j}/bias"] = state[f"{own}.mlp.fc{j + 1}.bias"]
    return arrays


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def test_jax_weights_of_a_vision_transformer(vit: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, **jax_arrays(vit))
    assert check_file(path) == "npz"
    model = type(vit)(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    load_weights(model, "vit", path)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, vit.state_dict()[name]), name
    assert "which small cannot take" in refused(path)
    np.savez(path, other=np.ones(3))
    with pytest.raises(ConfigError, match="w.npz does not fit vit"):
        load_weights(model, "vit", path)


def test_old_names_of_timm_are_mapped_as_timm_maps_them() -> None:
    pytest.importorskip("timm")
    with pytest.warns(DataWarning, match="an old name of timm's for vit_base_patch16_224.augreg_in21k"):
        assert current_name("vit_base_patch16_224_in21k") == "vit_base_patch16_224.augreg_in21k"
    assert current_name("test_vit") == "test_vit"


def test_a_timm_model_says_what_it_has_read(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    source = timm.create_model("test_vit")  # with a classifier of 1000 classes
    path = saved(tmp_path / "w.pth.tar", {"state_dict": prefixed(source.state_dict(), "module.")})
    model = timm_model(weights=str(path))
    assert model.weights_read["key"] == "state_dict"
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_own_networks_take_weights_of_a_run(tmp_path: Path) -> None:
    source = cnn((1, 8, 8), width=4, depth=1)
    path = safe(tmp_path / "model.safetensors", prefixed(source.state_dict(), "backbone."))
    model = cnn((1, 8, 8), width=4, depth=1, weights=str(path))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="does not fit backbone cnn"):
        cnn((1, 8, 8), width=8, depth=1, weights=str(path))
    with pytest.raises(ConfigError, match="there is no file"):
        cnn.preflight(weights=str(tmp_path / "gone.pth"))


# --- anything at all

names = st.sampled_from(["model", "state_dict", "a", "module", "ema", "patch_embed.weight", "norm.bias", ""])
values = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.text(max_size=3),
    st.builds(torch.ones, st.integers(0, 3)),
    st.lists(st.integers(), max_size=2),
)
contents = st.recursive(values, lambda inner: st.dictionaries(names, inner, max_size=4), max_leaves=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents, cut=st.integers(0, 400), flip=st.integers(0, 400), key=st.sampled_from([None, "model", "a.b"]))
def test_no_file_gives_a_traceback(tmp_path: Path, content: Any, cut: int, flip: int, key: str | None) -> None:
    path = saved(tmp_path / "w.pth", content)
    data = bytearray(path.read_bytes())
    if flip % 3 == 0:
        data[flip % len(data)] ^= 0x41
    path.write_bytes(bytes(data[: len(data) - cut] if cut % 2 else data))
    try:
        read_weights(path, key=key, expected=small().state_dict())
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
