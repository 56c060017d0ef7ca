"""The public face: what it exports, how overrides are read, how images are read, what a folder says, clear errors."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clrun
from clrun import api
from clrun.api import ConfigError, load, load_sweep, run, sweep
from clrun.api.images import Reader
from clrun.api.overrides import as_arguments

ROOT = Path(__file__).parents[2]


# --- what there is


def test_every_export_is_there_under_its_own_name():
    for name in api.__all__:
        assert getattr(api, name) is not None
    assert set(api.__all__) == set(api._HOME) and list(api.__all__) == sorted(api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = api.nothing


def test_type_checkers_see_what_is_exported():
    tree = ast.parse((ROOT / "clrun/api/__init__.py").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    assert typed == api._HOME
    assert (ROOT / "clrun/py.typed").exists()


def test_the_package_offers_the_functions_too():
    assert clrun.run is run and clrun.load is load and clrun.sweep is sweep and clrun.load_sweep is load_sweep
    assert clrun.api is api
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        _ = clrun.walk


def test_importing_costs_neither_torch_nor_hydra_nor_pandas():
    code = "import sys, clrun, clrun.api; print([m for m in ('torch', 'hydra', 'pandas', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_costs_no_torch(tmp_path):
    code = (
        f"import sys, clrun\ntry: clrun.load({str(tmp_path)!r})\nexcept Exception as e: print(e)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"load: no run (run.json) in {tmp_path}", "False"]


# --- overrides


def test_overrides_are_texts_one_text_or_a_mapping():
    expected = ["method=er", "method.capacity=50", "budget.epochs=2"]
    assert as_arguments(expected, {}) == expected
    assert as_arguments("method=er method.capacity=50 budget.epochs=2", {}) == expected
    assert as_arguments({"method": "er", "method.capacity": 50, "budget": {"epochs": 2}}, {}) == expected
    assert as_arguments(["method=er"], {"method": {"capacity": 50}, "budget": {"epochs": 2}}) == expected
    assert as_arguments("name='two words'", {}) == ["name=two words"]


VALUES = [
    "er",
    "1",
    "true",
    "Null",
    "",
    "two words",
    "it's",
    'a"b',
    "a,b",
    "[a]",
    "1e-3",
    "$x",
    "a=b",
    "ä",
    "back\\slash",
]
VALUES += [1, -3, 0.1, 1e-7, 1e30, float("inf"), True, False, None, ["a", "1", 2, None], {"a": [1, "b c"]}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_survive_hydras_grammar(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (text,) = as_arguments({"key": [value]} if isinstance(value, dict) else {"key": value}, {})
    read = OverridesParser.create().parse_override(text)._value
    found = plain(read)
    assert found == ([value] if isinstance(value, dict) else value)
    assert type(found) is type(value) or isinstance(value, dict)


def plain(value):
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return value.text if hasattr(value, "text") else value


def test_numbers_of_numpy_and_paths_are_options():
    given = {"a": np.int64(3), "b": np.float32(0.5), "c": Path("some/where"), "d": range(3), "e": np.bool_(True).item()}
    assert as_arguments(given, {}) == ["a=3", "b=0.5", "c=some/where", "d=[0,1,2]", "e=true"]


def test_lists_are_the_values_of_a_sweep():
    given = {"method": ["er", "ewc"], "seed": range(2), "dataset": {"augment": [["flip", "crop"], []]}}
    expected = ["method=er,ewc", "seed=0,1", "dataset.augment=[flip,crop],[]"]
    assert as_arguments(given, {}, sweep=True) == expected


WRONG = {
    "a flag": (["-m"], "overrides: '-m' belongs to the command line; call sweep(...) instead of run(...)"),
    "a folder of choices": (
        ["--config-dir=x"],
        "overrides: '--config-dir=x' belongs to the command line; pass config_dir=F",
    ),
    "no text": ([3], "overrides: expected texts 'KEY=VALUE', got 3; a mapping takes other values"),
    "a key": ({3: 1}, "overrides: expected a text as key, got 3"),
    "several choices": ({"method": ["er", "ewc"]}, "method: expected one choice, got ['er', 'ewc']; clrun.sweep runs"),
    "a tensor": (
        {"seed": torch.zeros(2)},
        "seed: a Tensor cannot be an option; expected None, bool, int, float, str, a",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_overrides_are_told_in_one_line(case):
    given, expected = WRONG[case]
    with pytest.raises(ConfigError) as error:
        as_arguments(given, {})
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


# --- starting


REFUSED = {
    "unknown option": (
        lambda out: run(method={"capcity": 3}, folder=out),
        "method.capcity: unknown option of method=er",
    ),
    "unknown member": (lambda out: run(method="err", folder=out), "no method named 'err'; did you mean 'er'?"),
    "wrong type": (lambda out: run(seed="one", folder=out), "seed: expected int, got 'one'"),
    "a sweep": (lambda out: run(["hydra.mode=MULTIRUN"], folder=out), "hydra.mode: the configuration is a sweep; call"),
    "several values": (lambda out: run(["seed=1,2"], folder=out), "Ambiguous value for argument 'seed=1,2'"),
    "dry run": (lambda out: run(job="dry_run", folder=out), "job.mode=dry_run: trains nothing"),
    "a search": (
        lambda out: run(task_order="adversarial", folder=out),
        "task_order=adversarial: a search is many runs",
    ),
    "folder twice": (lambda out: run(["hydra.run.dir=x"], folder=out), "hydra.run.dir: given as an override and as"),
    "no such folder of choices": (lambda out: run(config_dir="nowhere", folder=out), "--config-dir: no such folder"),
    "an empty sweep": (lambda out: sweep(seed=[], folder=out), "seed: a sweep needs at least one value"),
    "a job of a sweep": (lambda out: sweep(seed=[1, "x"], folder=out), "seed: expected int, got 'x' [1 of 2 runs]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_config_errors_and_leave_nothing(case, tmp_path, capsys):
    start, expected = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        start(tmp_path / "out")
    assert str(error.value).startswith(expected)
    assert list(tmp_path.iterdir()) == []


# --- reading folders


def test_folders_without_a_run_are_told(tmp_path):
    with pytest.raises(ConfigError, match="load: no such folder: .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"load: no run \(run.json\) in "):
        load(tmp_path)
    with pytest.raises(ConfigError, match="load_sweep: no such folder"):
        load_sweep(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="load_sweep: no run"):
        load_sweep(tmp_path)
    (tmp_path / "run.json").write_text('{"some": "file"}')
    with pytest.raises(ConfigError, match="run.json: not written by this version of clrun"):
        load(tmp_path)


# --- images


def reader(*shape):
    return Reader(shape)


def one(images, *shape):
    (found,) = reader(*shape).batches(images, 100)
    return found


GREY = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 1, 8, 8)
COLOUR = np.random.RandomState(0).randint(0, 256, (5, 3, 8, 8)).astype(np.uint8)


@pytest.mark.parametrize(
    "given",
    [
        COLOUR,
        COLOUR.transpose(0, 2, 3, 1),
        torch.from_numpy(COLOUR),
        list(COLOUR),
        [x.transpose(1, 2, 0) for x in COLOUR],
    ],
    ids=["N C H W", "N H W C", "tensor", "list C H W", "list H W C"],
)
def test_arrays_of_the_stored_size_are_taken_as_they_are(given):
    np.testing.assert_array_equal(one(given, 3, 8, 8), COLOUR)


def test_grey_images_need_no_axis_of_channels(tmp_path):
    np.testing.assert_array_equal(one(GREY[:, 0], 1, 8, 8), GREY)
    np.testing.assert_array_equal(one(GREY[0, 0], 1, 8, 8), GREY[:1])
    np.testing.assert_array_equal(one([x[0] for x in GREY], 1, 8, 8), GREY)


def test_pictures_and_files_equal_arrays(tmp_path):
    pictures = [Image.fromarray(x.transpose(1, 2, 0)) for x in COLOUR]
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    np.testing.assert_array_equal(one(pictures, 3, 8, 8), COLOUR)
    np.testing.assert_array_equal(one(paths, 3, 8, 8), COLOUR)
    np.testing.assert_array_equal(one([str(path) for path in paths], 3, 8, 8), COLOUR)
    np.testing.assert_array_equal(one(paths[0], 3, 8, 8), COLOUR[:1])
    np.testing.assert_array_equal(one(str(paths[0]), 3, 8, 8), COLOUR[:1])


def test_other_sizes_and_channels_are_fitted_alike_from_every_kind(tmp_path):
    large = np.random.RandomState(1).randint(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(large).save(tmp_path / "large.png")
    for shape in [(3, 8, 8), (1, 8, 8)]:
        found = one(tmp_path / "large.png", *shape)
        assert found.shape == (1, *shape) and found.dtype == torch.uint8
        np.testing.assert_array_equal(found, one(Image.fromarray(large), *shape))
        np.testing.assert_array_equal(found, one(large[None], *shape))
        np.testing.assert_array_equal(found, one(large, *shape))


def test_images_come_in_batches_in_order():
    found = list(reader(3, 8, 8).batches(COLOUR, 2))
    assert [len(x) for x in found] == [2, 2, 1]
    np.testing.assert_array_equal(torch.cat(found), COLOUR)
    assert list(reader(3, 8, 8).batches([], 2)) == []


def test_rows_of_features_are_floats():
    rows = np.random.RandomState(0).rand(4, 6)
    np.testing.assert_array_equal(one(rows, 6), rows.astype(np.float32))
    np.testing.assert_array_equal(one(rows[0], 6), rows[:1].astype(np.float32))


BAD = {
    "floats": (COLOUR / 255, "images: expected values 0..255 of uint8, got [5, 3, 8, 8] float64; multiply values in"),
    "int64": (COLOUR.astype(int), "images: expected values 0..255 of uint8, got [5, 3, 8, 8] int64; convert them"),
    "axes": (np.zeros((5, 7, 8, 9), np.uint8), "images: expected [N, 3, 8, 8] or [N, 8, 8, 3], got [5, 7, 8, 9] uint8"),
    "text": (["nowhere.png"], "images[0]: no such file: nowhere.png"),
    "folder": ([str(ROOT)], f"images[0]: {ROOT} is a folder; give the files in it"),
    "number": ([3], "images[0]: expected an array, a tensor, a Pillow image or a path, got int"),
    "many in one": ([COLOUR], "images[0]: expected one image, got [5, 3, 8, 8] uint8"),
    "strings": (np.array(["a", "b"]), "images: an array of <U1 holds no pixels; expected uint8"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_images_are_told_in_one_line(case):
    given, expected = BAD[case]
    with pytest.raises(ConfigError) as error:
        list(reader(3, 8, 8).batches(given, 10))
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ConfigError, match="text.png: cannot be decoded"):
        one(tmp_path / "text.png", 3, 8, 8)
