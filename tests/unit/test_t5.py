import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import configured
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call, grad, vmap

from clrun.backbones.t5 import from_transformers, preflight
from clrun.system.errors import ConfigError, WeightsMissing

TEXTS = ["abc", "a longer text", "é"]
CONFIG = {"model_type": "t5", "vocab_size": 264, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 2}
CONFIG |= {
    "num_decoder_layers": 3,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    return configured("backbone", "t5_tiny", **({"width": 16, "heads": 2} | options))((64,)).eval()


def test_padding_changes_neither_features_nor_logits() -> None:
    model = tiny()
    ids, written = model.tokenize(TEXTS), model.tokenize(["yes", "no", ""])
    wide = torch.cat([ids, ids.new_zeros(3, 9)], dim=1)
    longer = torch.cat([written, written.new_zeros(3, 4)], dim=1)
    torch.testing.assert_close(model(wide), model(ids), rtol=1e-5, atol=1e-6)
    logits = model.decode(*model.encode(ids), written)
    more = model.decode(*model.encode(wide), longer)
    torch.testing.assert_close(more[:, : written.shape[1]], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.train()(wide), model.eval()(ids), rtol=1e-5, atol=1e-6)


def test_a_token_is_predicted_from_those_before_it_alone() -> None:
    model = tiny()
    states, mask = model.encode(model.tokenize(["abc"]))
    a, b = model.tokenize(["yes"]), model.tokenize(["yet"])
    first, second = model.decode(states, mask, a), model.decode(states, mask, b)
    torch.testing.assert_close(first[:, :3], second[:, :3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first[:, 3], second[:, 3])


def test_gradients_of_single_rows_are_those_of_a_loop() -> None:
    model = tiny()
    ids, weights = model.tokenize(TEXTS), {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, values, row[None]).square().mean()

    together = vmap(grad(loss), in_dims=(None, 0))(weights, ids)
    for k, row in enumerate(ids):
        torch.testing.assert_close(
            {n: g[k] for n, g in together.items()}, grad(loss)(weights, row), rtol=1e-4, atol=1e-5
        )


def test_embeddings_before_a_row_are_seen_by_it() -> None:
    model = tiny()
    ids = model.tokenize(TEXTS)
    states, mask = model.encode(ids, torch.randn(3, 16))
    assert states.shape[1] == ids.shape[1] + 3 == mask.shape[1] and mask[:, :3].all()
    as_text = model.encode(ids[:, 1:], model.shared(ids[0, :1]))
    torch.testing.assert_close(as_text[0][:1], model.encode(ids)[0][:1])


def test_blocks_of_the_decoder_are_the_last() -> None:
    names = [name for name, p in tiny(train="last_1").named_parameters() if p.requires_grad]
    assert names and all(name.startswith("decoder.blocks.1.") for name in names)
    with pytest.raises(ConfigError, match="backbone.heads: 3 does not divide the width 16"):
        tiny(heads=3)


def saved(path: Path, **config: Any) -> Path:
    """Write a folder of a tiny model with the names of transformers, and return it."""
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    torch.manual_seed(0)
    model = configured("backbone", "t5", folder=str(path), pretrained=False)((64,))
    back = {"attn": (0, "SelfAttention"), "norm1": (0, "layer_norm")}
    state = {}
    for name, value in model.state_dict().items():
        stack, _, rest = name.partition(".blocks.")
        if not rest:
            name = name.replace("output.", "lm_head.").replace(".norm.", ".final_layer_norm.")
            name = name.replace(".bias.", ".block.0.layer.0.SelfAttention.relative_attention_bias.")
        else:
            last = 2 if stack == "decoder" else 1
            places = back | {"mlp": (last, "DenseReluDense"), "norm2": (last, "layer_norm")}
            places |= {"cross": (1, "EncDecAttention"), "norm3": (1, "layer_norm")}
            block, part, leaf = rest.split(".", 2)
            name = f"{stack}.block.{block}.layer.{places[part][0]}.{places[part][1]}.{leaf}"
        state[name] = value.clone()
    save_file(state, path / "model.safetensors")
    return path


@pytest.mark.parametrize("change", [{}, {"feed_forward_proj": "relu", "tie_word_embeddings": True}])
def test_a_folder_that_transformers_has_saved_is_read(tmp_path: Path, change: dict[str, Any]) -> None:
    model = configured("backbone", "t5", folder=str(saved(tmp_path, **change)))((64,)).eval()
    torch.manual_seed(0)
    same = configured("backbone", "t5", folder=str(tmp_path), pretrained=False)((64,)).eval()
    ids = model.tokenize(TEXTS)
    own = model.decode(*model.encode(ids), ids)
    assert torch.equal(own, same.decode(*same.encode(ids), ids)) and (model.output is None) is bool(change)
    transformers = pytest.importorskip("transformers")
    reference = transformers.T5ForConditionalGeneration.from_pretrained(str(tmp_path), local_files_only=True).eval()
    with torch.no_grad():
        logits = reference(input_ids=ids, attention_mask=(ids != 0).long(), labels=ids).logits
    if change:  # the library ties both tables where they are stored apart
        torch.testing.assert_close(own, logits, rtol=1e-5, atol=1e-5)


def test_an_output_that_was_saved_as_the_table_of_embeddings_is_found() -> None:
    shared = torch.ones(2, 2)
    assert from_transformers({"shared.weight": shared}, tiny())["output.weight"].equal(shared)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backbone.folder: set it to a folder with config.json and model.safetensors"):
        configured("backbone", "t5")((64,))
    with pytest.raises(ConfigError, match="there is no config.json in"):
        preflight(folder=str(tmp_path), pretrained=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "bart"}))
    with pytest.raises(WeightsMissing, match=r"there is no model.safetensors in"):
        preflight(folder=str(tmp_path), pretrained=True)
    with pytest.raises(ConfigError, match="is not that of a T5 or ByT5 .model_type=bart"):
        configured("backbone", "t5", folder=str(tmp_path), pretrained=False)((64,))
