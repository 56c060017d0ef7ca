"""CLIP models in open_clip's format: folders and named models, nothing guessed, and the same numbers as open_clip's."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import configured
from running import run
from safetensors.torch import load_file, save_file

from clrun.backbones import open_clip as formats
from clrun.backbones.glyph import FOLDER, glyph_clip
from clrun.system.errors import ConfigError

CLIP = FOLDER / "glyph_clip"
STATED = {"quick_gelu": True, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}


def opened(**options):
    return configured("backbone", "open_clip", **options)((1, 8, 8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLIP, tmp_path / "saved"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Path:
    """Stands for the package of open_clip: one tiny model under the name ViT-B-16, and the vocabulary of glyph_clip."""
    (tmp_path / "model_configs").mkdir()
    config = json.loads((CLIP / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "model_configs" / "ViT-B-16.json").write_text(json.dumps(config))
    shutil.copy(CLIP / "merges.txt.gz", tmp_path / formats.VOCABULARY)
    monkeypatch.setattr(formats, "_packaged", lambda name: tmp_path / name)
    return tmp_path


def change(folder: Path, part: str, **changed: object) -> None:
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    node = config["model_cfg"] if part in ("", "vision_cfg", "text_cfg") else config[part]
    (node[part] if part in ("vision_cfg", "text_cfg") else node).update(changed)
    file.write_text(json.dumps(config))


class TestFolders:
    def test_a_folder_says_everything(self, folder):
        found = opened(folder=str(folder))
        ours = glyph_clip((1, 8, 8), pretrained=True, weights=None, weights_key=None, head="linear")
        assert {n: t.tolist() for n, t in found.state_dict().items()} == {
            n: t.tolist() for n, t in ours.state_dict().items()
        }
        assert found.mean == (0.2,) * 3 and found.interpolation == "bilinear" and found.input_size == (3, 28, 28)
        assert found.weights_read["file"] == "open_clip_model.safetensors" and len(found.weights_read["sha256"]) == 64

    def test_what_contradicts_the_folder_is_refused(self, folder):
        with pytest.raises(ConfigError, match=r"^backbone.quick_gelu: is True, but saved says False; set it to null"):
            opened(folder=str(folder), quick_gelu=True)

    def test_what_a_folder_does_not_say_must_be_stated(self, folder):
        change(folder, "preprocess_cfg", mean=None)
        with pytest.raises(
            ConfigError, match=r"^backbone.mean: the weights of saved do not say it; set it as they were"
        ):
            opened(folder=str(folder))
        assert opened(folder=str(folder), mean=[0.1, 0.2, 0.3]).mean == (0.1, 0.2, 0.3)

    @pytest.mark.parametrize(
        ("part", "changed"),
        [
            ("vision_cfg", {"timm_model_name": "vit"}),
            ("text_cfg", {"hf_model_name": "bert"}),
            ("", {"custom_text": True}),
        ],
    )
    def test_other_architectures_are_refused(self, folder, part, changed):
        change(folder, part, **changed)
        with pytest.raises(
            ConfigError, match=rf"^backbone: saved is no CLIP of a plain vision .*{next(iter(changed))}"
        ):
            opened(folder=str(folder))

    def test_a_vocabulary_of_another_size_is_refused(self, folder):
        change(folder, "text_cfg", vocab_size=600)
        with pytest.raises(
            ConfigError, match=r"^backbone: saved has a vocabulary of 600 tokens, and merges.txt.gz makes 611"
        ):
            opened(folder=str(folder))

    def test_weights_that_do_not_fit_are_refused(self, folder):
        state = load_file(folder / "open_clip_model.safetensors")
        del state["visual.proj"]
        save_file(state, folder / "open_clip_model.safetensors")
        with pytest.raises(ConfigError, match=r"^backbone.weights: .* does not fit saved: .*image_projection"):
            opened(folder=str(folder))

    @pytest.mark.parametrize("both", [{}, {"model": "ViT-B-16", "folder": str(CLIP)}])
    def test_a_folder_or_a_name_and_not_both(self, both):
        with pytest.raises(ConfigError, match=r"^backbone: set one of backbone.folder .* and backbone.model"):
            opened(**both)


class TestNamedModels:
    def test_activation_and_preprocessing_are_stated_or_refused(self, package):
        file = str(CLIP / "open_clip_model.safetensors")
        for key in STATED:
            with pytest.raises(ConfigError, match=rf"^backbone.{key}: the weights of ViT-B-16 do not say it"):
                opened(model="ViT-B-16", weights=file, **{**STATED, key: None})
        found = opened(model="ViT-B-16", weights=file, **STATED)
        assert type(found.blocks[0].mlp.act).__name__ == type(found.joint.blocks[0].mlp.act).__name__ == "QuickGELU"

    def test_an_unknown_name_is_refused(self, package):
        with pytest.raises(
            ConfigError, match=r"^backbone.model: open_clip has no model 'ViT-B16'; did you mean 'ViT-B-16'"
        ):
            opened(model="ViT-B16", pretrained=False, **STATED)

    def test_without_the_package_the_error_names_it(self, monkeypatch):
        monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"'open_clip' is not installed; run pip install '?open_clip_torch"):
            opened(model="ViT-B-16", pretrained=False, **STATED)

    def test_a_dry_run_needs_no_weights_and_says_which_file_a_run_needs(self, package, tmp_path, capsys):
        options = ("backbone=clip_vit_b16", "method=zero_shot", "dataset=digits", "job=dry_run", "scenario.n_tasks=5")
        run(tmp_path / "r", *options, "backbone.weights=ViT-B-16.safetensors")
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights: ")]
        assert said == [
            "weights: random in this dry run, and a run needs them: backbone.weights: there is no file "
            "ViT-B-16.safetensors, which has the weights of ViT-B-16"
        ]
        run(tmp_path / "r", *options)
        assert "the weights of ViT-B-16 are wanted" in capsys.readouterr().out

    @pytest.mark.filterwarnings("ignore::clrun.system.errors.DataWarning")
    def test_a_dry_run_of_proof_on_the_files_of_cifar100_needs_neither_weights_nor_network(
        self, package, tmp_path, capsys, monkeypatch
    ):
        utils = pytest.importorskip("torchvision.datasets.utils")
        monkeypatch.setattr(utils, "check_integrity", lambda path, md5=None: Path(path).is_file())
        monkeypatch.setattr("socket.socket.connect", lambda *address: pytest.fail("a dry run reaches for the network"))
        home = tmp_path / "cifar-100-python"
        home.mkdir()
        for part in ("train", "test"):
            rows = {"data": np.zeros((100, 3072), dtype=np.uint8), "fine_labels": list(range(100))}
            (home / part).write_bytes(pickle.dumps(rows))
        (home / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"name {k}" for k in range(100)]}))
        options = ("backbone=clip_vit_b16", "method=proof", "dataset=cifar100", f"dataset.root={tmp_path}")
        options += ("job=dry_run", "scenario.n_tasks=10", "backbone.weights=FILE.safetensors")
        run(tmp_path / "r", *options)
        said = capsys.readouterr().out.splitlines()
        assert [line for line in said if line.startswith("weights: ")] == [
            "weights: random in this dry run, and a run needs them: backbone.weights: there is no file "
            "FILE.safetensors, which has the weights of ViT-B-16"
        ]
        assert any("10 tasks, 100 classes" in line for line in said) and said[-1].startswith("estimated time: ")
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_towers_are_those_of_open_clip(tmp_path, quick_gelu):
    open_clip = pytest.importorskip("open_clip", reason="needs the package open_clip_torch")
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 611, "width": 32, "heads": 4, "layers": 2}
    config = {"embed_dim": 48, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(48, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).eval()
    preprocess = {"mean": [0.4] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    shutil.copy(CLIP / "merges.txt.gz", tmp_path / "merges.txt.gz")
    ours = opened(folder=str(tmp_path)).eval()
    ids, x = ours.tokenize(["a photo of a digit seven", "zebra"]), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(x), model.encode_image(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.encode_text(ids), model.encode_text(ids), rtol=1e-4, atol=1e-5)
