from typing import Any

import pytest
import torch
from helpers import configured
from torch import Tensor

from clrun.backbones.adapted import Adapted
from clrun.system.errors import ConfigError

TEXTS = ["a seizure", "café", "long text with many bytes"]


def adapted(
    form: Any = "residual", *, head: str = "linear", hidden: int | None = None, gain: float | None = None
) -> Any:
    torch.manual_seed(0)
    encoder = configured("backbone", "bert_tiny", head=head)((64,))
    return Adapted(encoder, form=form, hidden=hidden, gain=gain).eval()


def rows(model: Any) -> tuple[Tensor, Tensor]:
    """Return the ids of some texts, and their vectors."""
    ids = model.tokenize(TEXTS)
    return ids, model.encoder(ids)


def test_a_residual_part_begins_as_the_vectors_themselves() -> None:
    model = adapted()
    ids, vectors = rows(model)
    units = torch.nn.functional.normalize(vectors, dim=1)
    assert torch.equal(model(vectors), units) and torch.equal(model(ids), units)
    torch.testing.assert_close(model(3 * vectors), units)


def test_the_parts_compute_their_equations() -> None:
    model = adapted(hidden=5)
    e = torch.nn.functional.normalize(rows(model)[1], dim=1)
    torch.nn.init.normal_(model.part.fc2.weight)
    w1, b1, w2 = model.part.fc1.weight, model.part.fc1.bias, model.part.fc2.weight
    torch.testing.assert_close(model(e), e + torch.nn.functional.gelu(4 * e @ w1.T + b1) @ w2.T)
    assert w1.shape == (5, 32) and model.num_features == 32
    layer = adapted("layer", hidden=7, gain=3.0)
    expected = torch.nn.functional.gelu(3 * e @ layer.part.fc1.weight.T + layer.part.fc1.bias)
    torch.testing.assert_close(layer(e), expected)
    assert layer.num_features == 7 and adapted("layer").part.gain == 20


@pytest.mark.parametrize("form", ["residual", "layer"])
def test_vectors_that_were_computed_once_give_the_features_of_the_texts(form: str) -> None:
    model = adapted(form)
    torch.nn.init.normal_(model.part.fc1.weight)
    for mode in (False, True):
        model.train(mode)
        ids, vectors = rows(model)
        torch.testing.assert_close(model(ids), model(vectors))
        assert not model.encoder.training and model.part.training is mode


def test_the_part_alone_is_trained() -> None:
    model = adapted()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"part.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    assert model.frozen_part is model.encoder
    assert model.positions(rows(model)[0]).tolist() == [[True]] * 3


def test_names_are_encoded_without_the_part() -> None:
    model = adapted(head="fixed")
    torch.nn.init.normal_(model.part.fc2.weight)
    ids, vectors = rows(model)
    torch.testing.assert_close(model.encode_names(TEXTS), vectors)
    assert model.joint is model


def test_a_layer_has_no_head_of_names() -> None:
    with pytest.raises(ConfigError, match="backbone.head: fixed compares features with encoded names"):
        adapted("layer", head="fixed")
