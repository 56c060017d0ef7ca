import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import configured
from torch import Tensor
from torch.func import functional_call, grad, vmap

from clrun.backbones.hf_text import LibraryTokenizer, preflight
from clrun.blocks.inject import Injector, Plan
from clrun.blocks.lora import LinearLoRA
from clrun.data.tokens import SEPARATOR, Speller
from clrun.system.errors import ConfigError

transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
tokenizers = pytest.importorskip("tokenizers")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{c}" for c in "abcdefgh")]
TEXTS = ["abc", "hag fad bead", "g"]
SIZES: dict[str, dict[str, Any]] = {
    "Bert": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12},
    "DistilBert": {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
    "Roberta": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models, by the name of their kind; RoBERTa has its padding at id 1."""
    top = tmp_path_factory.mktemp("models")
    for kind, sizes in SIZES.items():
        torch.manual_seed(0)
        pieces = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *PIECES[4:]] if kind == "Roberta" else PIECES
        ids = {piece: number for number, piece in enumerate(pieces)}
        made = getattr(transformers, f"{kind}Config")
        config = made(vocab_size=len(ids), max_position_embeddings=24, pad_token_id=ids["[PAD]"], **sizes)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(top / kind)
        reference = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
        reference.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        special = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
        reference.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
        )
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=reference, **names).save_pretrained(top / kind)
    return top


def built(folders: Path, kind: str, **options: Any) -> Any:
    return configured("backbone", "hf_text", folder=str(folders / kind), max_tokens=16, **options)((16,)).eval()


@pytest.mark.parametrize("kind", SIZES)
def test_features_are_those_of_the_library_offline(folders: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    model = built(folders, kind)
    ids = model.tokenize(TEXTS)
    assert int((ids[0] != 0).sum()) == 5 and ids[2].tolist() != ids[0].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folders / kind))
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    reference = transformers.AutoModel.from_pretrained(str(folders / kind)).eval()
    with torch.no_grad():
        tokens = reference(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
        mask = given["attention_mask"][:, :, None]
        torch.testing.assert_close(model(ids), (tokens * mask).sum(1) / mask.sum(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(built(folders, kind, pooling="first")(ids), tokens[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SIZES)
def test_padding_changes_nothing_and_rows_have_gradients_of_their_own(folders: Path, kind: str) -> None:
    model = built(folders, kind)
    ids = model.tokenize(TEXTS)
    wide = torch.cat([ids, ids.new_zeros(3, 4)], dim=1)
    torch.testing.assert_close(model(wide), model(ids), rtol=1e-5, atol=1e-6)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, values, row[None]).square().mean()

    together = vmap(grad(loss), in_dims=(None, 0))(weights, ids)
    for k, row in enumerate(ids):
        torch.testing.assert_close(
            {n: g[k] for n, g in together.items()}, grad(loss)(weights, row), rtol=1e-4, atol=1e-5
        )


def test_blocks_alone_are_trained_and_updates_find_linear_layers(folders: Path) -> None:
    model = built(folders, "DistilBert", train="last_1")
    trained = {name.split(".")[:4][-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1"} and not any(p.requires_grad for p in built(folders, "Bert", train="none").parameters())
    path = next(name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    update = LinearLoRA.beside(model.get_submodule(path), 2)
    torch.nn.init.normal_(update.up)
    ids = model.tokenize(TEXTS)
    plain = model(ids)
    with Injector().use(model, Plan(parallel={path: update})):
        assert not torch.allclose(model(ids), plain)
    assert torch.equal(model(ids), plain)


def test_the_tokenizer_of_the_library_has_padding_at_zero(folders: Path) -> None:
    own = LibraryTokenizer(transformers.AutoTokenizer.from_pretrained(str(folders / "Roberta")))
    ids = own.encode("ab", 9)
    assert own.shift == 1 and 0 not in ids and own.tokens(ids) == ["[CLS]", "a", "##b", "[SEP]"]
    assert own.tokens(own.encode(f"a{SEPARATOR}b", 9)) == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]
    assert own.encode("abc abc abc", 4)[-1] == own.encode("", 4)[-1] and isinstance(own, Speller)
    other = LibraryTokenizer(transformers.AutoTokenizer.from_pretrained(str(folders / "Bert")))
    assert own.digest != other.digest and other.shift == 0


def test_what_cannot_be_used_is_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backbone.folder: there is no folder .*none; set it to a folder"):
        preflight(folder=str(tmp_path / "none"), download=False)
    with pytest.raises(ConfigError, match="there is no config.json in"):
        preflight(folder=str(tmp_path), download=False)
    for kind, most in (("Bert", 24), ("Roberta", 22)):  # two of RoBERTa's positions are no places of tokens
        configured("backbone", "hf_text", folder=str(folders / kind), max_tokens=most)((16,))
        with pytest.raises(ConfigError, match=f"backbone.max_tokens: .* cannot read rows of {most + 1} tokens"):
            configured("backbone", "hf_text", folder=str(folders / kind), max_tokens=most + 1)((16,))
    transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=9).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds a GPT2, which is no encoder of texts"):
        configured("backbone", "hf_text", folder=str(tmp_path))((16,))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        configured("backbone", "hf_text", folder=str(tmp_path))((16,))


def test_damaged_weights_are_one_line(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "Bert", tmp_path / "Bert")
    for content in (b"", b"junk", (folders / "Bert" / "model.safetensors").read_bytes()[:-9]):
        (tmp_path / "Bert" / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match="^backbone.folder: .*Bert cannot be read .[^\\n]+.$"):
            built(tmp_path, "Bert")
