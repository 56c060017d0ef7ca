import copy
import http.server
import json
import pickle
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CONF, configured
from torch import nn

from clrun.backbones import hub
from clrun.backbones.patches import check_patches, patch_side, patches
from clrun.backbones.pretrained import preflight, timm_backbone
from clrun.backbones.small import BatchNormRows, alexnet, cnn, lenet, mlp, resnet18, resnet32
from clrun.backbones.weights import read_weights
from clrun.data.sources.digits import digits
from clrun.data.transforms import fit_transform
from clrun.learning.heads import GrowingHead
from clrun.running.accounting import token_count
from clrun.system.errors import ConfigError

SMALL: dict[str, Callable[[tuple[int, int, int]], nn.Module]] = {
    "mlp": lambda shape: mlp(shape, hidden=[30, 20]),
    "cnn": lambda shape: cnn(shape, width=12, depth=2),
    "lenet": lenet,
    "alexnet": alexnet,
    "resnet18": lambda shape: resnet18(shape, width=6, bias=False, pool=None),
    "resnet18_halrp": lambda shape: resnet18(shape, width=6, bias=True, pool=2),
    "resnet32": lambda shape: resnet32(shape, width=4),
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def with_head(module: Any, num_classes: int) -> int:
    """Return the parameters of a backbone with a linear head."""
    return count(module) + (module.num_features + 1) * num_classes


@pytest.mark.parametrize(
    ("module", "num_classes", "expected"),
    [
        (lambda: lenet((3, 32, 32)), 10, 2_995_620),  # HALRP
        (lambda: lenet((3, 32, 32)), 5, 2_993_115),
        (lambda: alexnet((3, 32, 32)), 10, 6_533_450),
        (lambda: alexnet((3, 64, 64)), 10, 23_310_666),
        (lambda: resnet18((3, 32, 32), width=32, bias=True, pool=2), 10, 2_807_690),
        (lambda: resnet18((3, 64, 64), width=32, bias=True, pool=2), 10, 2_838_410),
        (lambda: resnet18((3, 32, 32), width=64, bias=False, pool=None), 10, 11_173_962),  # usual CIFAR ResNet-18
        (lambda: resnet18((3, 32, 32), width=20, bias=False, pool=None), 100, 1_109_240),  # GEM
        (lambda: resnet32((3, 32, 32), width=16), 10, 464_154),  # He et al.: 0.46 million
        (lambda: mlp((1, 28, 28), hidden=[100, 100]), 10, 89_610),  # GEM: 784-100-100-10
    ],
)
def test_parameter_counts_are_the_published_ones(
    module: Callable[[], nn.Module], num_classes: int, expected: int
) -> None:
    assert with_head(module(), num_classes) == expected


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (4, 40, 33)])
def test_features_fit_what_the_backbone_declares(name: str, shape: tuple[int, int, int]) -> None:
    module: Any = SMALL[name](shape)
    channels, height, width = module.input_size
    assert channels == {4: 3}.get(shape[0], shape[0])
    assert height >= shape[1] and width >= shape[2]
    assert module(torch.rand(3, *module.input_size)).shape == (3, module.num_features)
    assert module.mean is None and module.std is None


@pytest.mark.parametrize("name", SMALL)
def test_eval_features_do_not_depend_on_the_batch(name: str) -> None:
    torch.manual_seed(0)
    module: Any = SMALL[name]((1, 8, 8))
    x = torch.rand(6, *module.input_size)
    module.train()(x)  # moves running statistics
    module.eval()
    torch.testing.assert_close(module(x), torch.cat([module(row) for row in x.split(1)]))


@pytest.mark.parametrize("name", SMALL)
def test_weights_come_from_the_global_generator(name: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in SMALL[name]((1, 8, 8)).parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("name", SMALL)
def test_copies_give_the_same_features(name: str) -> None:
    module: Any = SMALL[name]((1, 8, 8)).eval()
    x = torch.rand(2, *module.input_size)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x)) and twin.num_features == module.num_features


@pytest.mark.parametrize("name", SMALL)
def test_a_training_batch_of_one_row_works(name: str) -> None:
    module: Any = SMALL[name]((1, 8, 8)).train()
    x = torch.rand(1, *module.input_size)
    module(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_batch_norm_of_one_row_takes_the_running_statistics() -> None:
    norm = BatchNormRows(4)
    norm(torch.randn(64, 4) * 3 + 1)
    mean, x = norm.running_mean.clone(), torch.randn(1, 4)
    found = norm(x)
    assert torch.equal(norm.running_mean, mean) and torch.equal(found, norm.eval()(x))
    reference = nn.BatchNorm1d(4)
    y = torch.randn(8, 4)
    assert torch.equal(BatchNormRows(4)(y), reference(y))


def test_small_images_are_enlarged_to_what_a_network_accepts() -> None:
    data = digits(val_fraction=0.0, seed=0, augment=[])
    for module, line in (
        (lenet((1, 8, 8)), "8x8x1 -> 32x32x1: resized, normalised by the data set"),
        (cnn((1, 8, 8), width=8, depth=1), "8x8x1: normalised by the data set"),
        (resnet32((1, 8, 8), width=4), "8x8x1: normalised by the data set"),
        (resnet18((1, 8, 8), width=4, bias=False, pool=None), "8x8x1 -> 16x16x1: resized, normalised by the data set"),
    ):
        transform, found = fit_transform(data, module)
        assert found == line
        assert module.eval()(transform.eval(data.train.images[:2])).shape[0] == 2


def test_no_hidden_layer_makes_pixels_the_features() -> None:
    module = mlp((2, 3, 3), hidden=[])
    assert module.num_features == 9 and count(module) == 0  # two channels: grey with alpha


def test_identity_shortcuts_and_subsampling() -> None:
    module: Any = resnet32((3, 8, 8), width=4)
    block = module.layers.stage2_1
    x = torch.rand(2, 4, 8, 8)
    shortcut = block.shortcut(x)
    assert shortcut.shape == (2, 8, 4, 4)
    assert torch.equal(shortcut[:, 2:6], x[:, :, ::2, ::2]) and not shortcut[:, [0, 1, 6, 7]].any()


def test_the_default_network_learns_digits() -> None:
    data = digits(val_fraction=0.0, seed=0, augment=[])
    torch.manual_seed(0)
    module = cnn((1, 8, 8), width=32, depth=2)
    head = GrowingHead(module.num_features, 10)
    head.grow(torch.arange(10))
    model = nn.Sequential(module, head)
    transform, _ = fit_transform(data, module)
    train, test = replace(data.train, transform=transform), replace(data.test, transform=transform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(3):
        for batch in train.batches(32, view="train", shuffle=shuffle):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.x), batch.y).backward()
            optimizer.step()
    batch = next(test.batches(len(test)))
    assert (model.eval()(batch.x).argmax(dim=1) == batch.y).float().mean() > 0.95


# --- timm


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    return pytest.importorskip("timm")


UNTRAINED: dict[str, Any] = {"pretrained": False, "weights": None}


def timm_model(name: str, shape: tuple[int, int, int] = (3, 32, 32), **changes: Any) -> Any:
    options = dict(
        pretrained=False,
        weights=None,
        weights_key=None,
        normalize="timm",
        image_size=None,
        crop=1.0,
        interpolation="bilinear",
    )
    return timm_backbone(shape, name=name, **(options | changes))


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "mobilenetv3_small_050"]
)
def test_any_timm_model_gives_pooled_features(timm: ModuleType, name: str) -> None:
    module = timm_model(name).eval()
    config = timm.get_pretrained_cfg(name)
    assert module.input_size == config.input_size and module.mean == config.mean and module.std == config.std
    x = torch.rand(2, *module.input_size)
    assert module(x).shape == (2, module.num_features)
    assert type(module).__module__.startswith("timm.")  # hooks written for timm models work
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


def test_normalisation_is_the_models_the_data_sets_or_none(timm: ModuleType) -> None:
    assert timm_model("test_vit").mean == timm.get_pretrained_cfg("test_vit").mean
    assert timm_model("test_vit", normalize="data").mean is None
    assert timm_model("test_vit", normalize="imagenet").std == (0.229, 0.224, 0.225)
    bare = timm_model("test_vit", normalize="none")
    assert bare.mean == (0, 0, 0) and bare.std == (1, 1, 1)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_image_size(timm: ModuleType, name: str) -> None:
    module = timm_model(name, image_size=64)
    assert module.input_size == (3, 64, 64)
    assert module(torch.rand(2, 3, 64, 64)).shape == (2, module.num_features)


def test_digits_fit_a_timm_model(timm: ModuleType) -> None:
    data = digits(val_fraction=0.0, seed=0, augment=[])
    module = timm_model("test_resnet", (1, 8, 8), image_size=32)
    transform, line = fit_transform(data, module)
    assert line == "8x8x1 -> 32x32x3: resized, grey repeated, normalised by the backbone"
    assert module(transform.eval(data.test.images[:3])).shape == (3, module.num_features)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_weights_come_from_a_local_file(timm: ModuleType, tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    source = timm.create_model("test_vit")  # with a classifier of 1000 classes
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    module = timm_model("test_vit", pretrained=True, weights=str(path))  # nothing is downloaded
    for key, value in module.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    larger = timm_model("test_vit", weights=str(path), image_size=256)  # position embeddings are interpolated
    assert torch.equal(larger.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_weights_that_do_not_fit_are_refused(timm: ModuleType, tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    short, extra, other = (tmp_path / f"{name}.pth" for name in ("short", "extra", "other"))
    torch.save({k: v for k, v in state.items() if "layer4" not in k}, short)
    torch.save(state | {"surplus": torch.zeros(1)}, extra)
    torch.save({k: torch.zeros(2) for k in state}, other)
    for path, said in (
        (short, "the file has no values for layer4.0.* and [0-9]+ more"),
        (extra, "the model has no tensors called surplus"),
        (other, "size mismatch"),
    ):
        with pytest.raises(ConfigError, match=f"^backbone.weights: {path} does not fit test_resnet.*{said}") as error:
            timm_model("test_resnet", weights=str(path))
        assert "\n" not in str(error.value)


class Payload:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_weight_files_run_no_code_and_broken_ones_are_named(tmp_path: Path) -> None:
    crafted, mark = tmp_path / "crafted.pth", tmp_path / "mark"
    torch.save({"a": torch.zeros(1), "b": Payload(mark)}, crafted)
    with pytest.raises(ConfigError, match="crafted.pth contains more than tensors and is refused"):
        read_weights(crafted)
    assert not mark.exists()
    for name, content in (("a.pth", b"nonsense"), ("a.safetensors", b"nonsense"), ("a.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"^backbone.weights: .*{name}"):
            read_weights(tmp_path / name)
    with pytest.raises(ConfigError, match="^backbone.weights: there is no file .*missing.pth"):
        read_weights(tmp_path / "missing.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="list.pth holds a list and no tensors by name"):
        read_weights(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "vit_bse_patch16_224",
            "backbone.name: timm .* has no model 'vit_bse_patch16_224'; did you mean 'vit_base_patch16_224'",
        ),
        ("test_vit.r160_in2k", "backbone.name: test_vit has no weights tagged 'r160_in2k'; did you mean 'r160_in1k'"),
    ],
)
def test_unknown_models_and_tags(timm: ModuleType, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        timm_model(name)


def test_a_model_without_published_weights(timm: ModuleType) -> None:
    with_weights = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
    name = min(set(timm.list_models()) - with_weights)
    with pytest.raises(ConfigError, match=f"^backbone.pretrained: timm has no weights for {name}; set it to false"):
        timm_model(name, pretrained=True)


# --- weights that are published


NOWHERE = (
    "weights of {} are not on this machine and downloading failed; "
    "set backbone.weights=FILE or backbone.pretrained=false ({})"
)


@pytest.fixture
def cache(timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An empty cache of the hub, without a network; call it to put a file into a repository."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_silence", lambda url: "no route to host")

    def put(repository: str, file: str) -> Path:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
        return folder / "snapshots" / "abc" / file

    return put


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "hf-hub:someone/a_model"])
def test_weights_that_cannot_be_had_are_missed_before_the_model_is_built(
    cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, timm: ModuleType, name: str
) -> None:
    monkeypatch.setattr(timm, "create_model", None)
    for call in (timm_model, lambda name, pretrained: preflight(name=name, pretrained=pretrained, weights=None)):
        with pytest.raises(ConfigError) as error:
            call(name, pretrained=True)
        assert str(error.value) == NOWHERE.format(name, "no route to host")


def test_offline_by_choice(cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"downloading failed; .* \(HF_HUB_OFFLINE is set\)$"):
        timm_model("test_vit.r160_in1k", pretrained=True)


def test_cached_weights_are_read_without_asking(cache: Callable[..., Path], timm: ModuleType) -> None:
    torch.manual_seed(1)
    source = timm.create_model("test_vit")
    pytest.importorskip("safetensors.torch").save_file(
        source.state_dict(), cache("timm/test_vit.r160_in1k", "model.safetensors")
    )
    module = timm_model("test_vit.r160_in1k", pretrained=True)
    assert torch.equal(module.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    preflight(name="test_vit.r160_in1k", pretrained=True, weights=None)


def test_cached_models_of_the_hub_are_read_without_asking(cache: Callable[..., Path], timm: ModuleType) -> None:
    torch.manual_seed(1)
    source = timm.create_model("test_vit")
    weights = cache("someone/a_model", "model.safetensors")
    pytest.importorskip("safetensors.torch").save_file(source.state_dict(), weights)
    facts = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": source.pretrained_cfg}
    weights.with_name("config.json").write_text(json.dumps(facts))
    module = timm_model("hf-hub:someone/a_model", pretrained=True)
    assert torch.equal(module.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_a_download_that_fails_says_what_to_do(
    cache: Callable[..., Path], timm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, **options: Any) -> None:
        raise ConnectionError("connection reset\nand more")

    monkeypatch.setattr(hub, "_silence", lambda url: None)
    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(ConfigError) as error:
        timm_model("test_vit.r160_in1k", pretrained=True)
    assert str(error.value) == NOWHERE.format("test_vit.r160_in1k", "connection reset")


def test_silence_is_told_from_an_answer() -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        assert "refused" in (hub._silence(f"http://127.0.0.1:{taken.getsockname()[1]}") or "")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert hub._silence(f"http://127.0.0.1:{server.server_port}") is None  # 501: something is there
        server.shutdown()


def test_preflight_finds_what_building_would(timm: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.npz").touch()
    for options, said in (
        ({"name": "test_vitt", "pretrained": False, "weights": None}, "has no model 'test_vitt'"),
        ({"name": "test_vit.x", "pretrained": False, "weights": None}, "has no weights tagged 'x'"),
        ({"name": "test_vit", "pretrained": True, "weights": f"{tmp_path}/b.pth"}, "there is no file .*b.pth"),
        ({"name": "test_vit", "pretrained": True, "weights": f"{tmp_path}/a.npz"}, "a.npz is empty"),
        ({"name": f"local-dir:{tmp_path}/c", "pretrained": True, "weights": None}, r"opened \(no such folder\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            preflight(**options)
    assert timm_backbone.preflight is preflight  # where `clrun.running.run` looks for it


def test_the_middle_that_a_model_sees(timm: ModuleType) -> None:
    module = timm_model("test_resnet", crop=0.875, interpolation="bicubic")
    assert module.crop == 0.875 and module.interpolation == "bicubic"
    own = timm_model("test_resnet", crop=None, interpolation=None)
    config = timm.get_pretrained_cfg("test_resnet")
    assert own.crop == config.crop_pct and own.interpolation == config.interpolation


CHECKPOINTS = {
    "vit_b16_in21k": ("vit_base_patch16_224.augreg_in21k", (0.5, 0.5, 0.5)),
    "vit_b16_in1k": ("vit_base_patch16_224.augreg_in21k_ft_in1k", (0.5, 0.5, 0.5)),
    "vit_b16_orig_in21k": ("vit_base_patch16_224.orig_in21k", (0.5, 0.5, 0.5)),
    "vit_b16_dino": ("vit_base_patch16_224.dino", (0.485, 0.456, 0.406)),
    "vit_b16_clip": ("vit_base_patch16_clip_quickgelu_224.openai", (0.48145466, 0.4578275, 0.40821073)),
    "vit_s16_in21k": ("vit_small_patch16_224.augreg_in21k", (0.5, 0.5, 0.5)),
    "vit_t16_in21k": ("vit_tiny_patch16_224.augreg_in21k", (0.5, 0.5, 0.5)),
    "resnet50_in1k": ("resnet50.tv_in1k", (0.485, 0.456, 0.406)),
    "resnet18_in1k": ("resnet18.tv_in1k", (0.485, 0.456, 0.406)),
}


def test_checkpoints_of_the_literature_name_existing_weights(timm: ModuleType) -> None:
    files = (configured("backbone", file.stem) for file in (CONF / "backbone").glob("*.yaml"))
    found = {node.keywords["name"] for node in files if getattr(node, "func", None) is timm_backbone}
    assert found == {name for name, _ in CHECKPOINTS.values()}
    for choice, (name, mean) in CHECKPOINTS.items():
        options = configured("backbone", choice).keywords
        assert options["name"] == name and options["pretrained"] and options["normalize"] == "timm"
        assert options["crop"] == (0.875 if "resnet" in name else 1.0) and options["interpolation"] == "bilinear"
        assert name in timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        config = timm.get_pretrained_cfg(name)
        assert config.mean == mean and config.input_size == (3, 224, 224)


def test_pilots_pixels() -> None:
    for choice in ("vit_b16_in21k", "vit_b16_in1k"):
        usual, pilot = (configured("backbone", f"{choice}{suffix}").keywords for suffix in ("", "_pilot"))
        assert pilot == usual | {"normalize": "none", "crop": 0.875, "interpolation": "bicubic"}


def test_tokens_are_counted_where_there_are_any(timm: ModuleType) -> None:
    assert token_count(timm_model("test_vit")) == 101  # 10 x 10 patches and a class token
    assert token_count(timm_model("test_vit", image_size=64)) == 17
    assert token_count(timm_model("vit_tiny_r_s16_p8_224", image_size=64)) == 5
    assert token_count(timm_model("test_resnet")) is None and token_count(lenet((1, 28, 28))) is None


def test_an_image_size_that_a_model_cannot_take(timm: ModuleType) -> None:
    with pytest.raises(ConfigError, match="^backbone.image_size: test_maxvit cannot take 33 "):
        timm_model("test_maxvit", image_size=33)


@pytest.mark.parametrize(
    ("name", "size", "side", "nearest"),
    [
        ("test_vit", 33, 16, "32 or 48"),
        ("test_vit", 9, 16, "16"),
        ("test_convnext", 80, 32, "64 or 96"),  # the stem cuts at 4 pixels, and three layers halve
        ("xcit_nano_12_p16_224", 225, 16, "224 or 240"),  # cuts with overlapping convolutions
        ("tnt_s_patch16_224", 225, 16, "224 or 240"),  # unfolds
        ("vit_tiny_r_s16_p8_224", 48, 32, "32 or 64"),  # patches of a map that is smaller than the image
    ],
)
def test_an_image_size_that_patches_do_not_divide(
    timm: ModuleType, name: str, size: int, side: int, nearest: str
) -> None:
    for build in (timm_model, lambda name, image_size: preflight(name=name, image_size=image_size, **UNTRAINED)):
        with pytest.raises(ConfigError) as error:
            build(name, image_size=size)
        assert str(error.value) == (
            f"backbone.image_size: {size} is no multiple of {side}, so that {name} would drop a margin of every image; "
            f"set it to {nearest}"
        )


@pytest.mark.parametrize(("name", "size"), [("test_vit", 48), ("test_convnext", 96), ("xcit_nano_12_p16_224", 240)])
def test_the_advised_image_sizes_are_accepted(timm: ModuleType, name: str, size: int) -> None:
    assert timm_model(name, image_size=size).input_size == (3, size, size)


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 33), ("davit_tiny", 65)])
def test_models_that_pad_their_input_take_sizes_that_patches_do_not_divide(
    timm: ModuleType, name: str, size: int
) -> None:
    check_patches(name, size)  # raises where a margin would be dropped
    assert timm_model(name, image_size=size).input_size == (3, size, size)


def test_looking_for_patches_draws_no_random_numbers(timm: ModuleType) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    patches.cache_clear()
    check_patches("test_vit", 64)
    assert patch_side("test_vit") == 16 and torch.equal(torch.get_rng_state(), before)


def test_sources_that_cannot_be_opened(timm: ModuleType, tmp_path: Path) -> None:
    for name in (f"local-dir:{tmp_path}", f"local-dir:{tmp_path}/gone", "nowhere:model"):
        with pytest.raises(ConfigError, match=f"^backbone.name: {name} cannot be opened"):
            timm_model(name)


# --- any images on any backbone

BUILT: dict[str, dict[str, Any]] = {
    "mlp": {},
    "cnn": {},
    "lenet": {},
    "alexnet": {},
    "resnet18": {"width": 4},
    "resnet18_reduced": {"width": 4},
    "resnet18_halrp": {"width": 4},
    "resnet32": {"width": 4},
    "glyph_vit": {"pretrained": False},
    "timm": {"name": "test_vit", "pretrained": False, "image_size": 32},
}


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (4, 20, 33), (2, 28, 28)])
def test_any_images_fit_any_backbone(timm: ModuleType, name: str, shape: tuple[int, int, int]) -> None:
    data = configured(
        "dataset", "synthetic", num_classes=2, image_shape=list(shape), train_rows=2, augment=["crop", "flip"]
    )
    module = configured("backbone", name)(shape, **BUILT[name]).eval()
    transform, _ = fit_transform(data, module)
    for x in (transform.eval(data.train.images), transform.train(data.train.images, torch.Generator())):
        assert module(x).shape == (4, module.num_features) and module(x).isfinite().all()


def test_large_colour_images_on_a_small_grey_transformer(timm: ModuleType) -> None:
    shape = dict(img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    module = pytest.importorskip("timm.models.vision_transformer").VisionTransformer(**shape)
    module.input_size = (1, 16, 16)
    data = configured("dataset", "synthetic", num_classes=2, image_shape=[3, 64, 64], train_rows=2)
    transform, line = fit_transform(data, module)
    assert line == "64x64x3 -> 16x16x1: resized, RGB to grey, normalised by the data set"
    assert module(transform.eval(data.train.images)).shape == (4, 16)
    assert token_count(module) == 17
