"""Curvature of networks that read padded texts: padding enters no factor, tables of embeddings have an exact form."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import configured, context, row_stream, tiny_towers
from matrices import as_dense
from torch import Tensor, nn

from clrun.blocks.curvature import (
    Curvature,
    Diagonal,
    KroneckerFactored,
    KroneckerTable,
    Tape,
    estimate,
    isotropic,
    layers_of,
    named_too_large,
)
from clrun.blocks.curvature.layers import inner_sum, tables_of
from clrun.blocks.optimizers import Foof, Kfac
from clrun.learning.method import Method
from clrun.learning.names import NamesHead
from clrun.learning.training import fit
from clrun.system.errors import ConfigError, DataWarning

WORDS, WIDTH = 9, 4


class Reader(nn.Module):
    """A small encoder of token ids in float64: table, positions, layer per token, mean over the real tokens, layer."""

    num_features = 3

    def __init__(self, *, trained_table: bool = True, cut: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.token, self.pooled = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, self.num_features)
        self.table.weight.requires_grad_(trained_table)
        self.cut = cut

    def positions(self, x: Tensor) -> Tensor:
        return x != 0

    def forward(self, x: Tensor) -> Tensor:
        if self.cut and self.training:
            x = x[:, : int((x != 0).sum(dim=1).max())]
        real = (x != 0).double()[..., None]
        tokens = torch.tanh(self.token(self.table(x) + self.places(torch.arange(x.shape[1]))))
        return self.pooled((tokens * real).sum(dim=1) / real.sum(dim=1))


def texts(rows: int = 10, length: int = 5, *, padding: int = 0, seed: int = 0) -> Tensor:
    """Token ids [rows, length + padding] of texts of 1 to `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return F.pad(torch.where(torch.arange(length) < lengths, ids, 0), (0, padding))


def learner(backbone: nn.Module) -> Method:
    torch.manual_seed(0)
    method = Method(backbone, 3).double()
    method.head = nn.Identity()
    return method


def reader(**options: Any) -> Reader:
    torch.manual_seed(1)
    return Reader(**options).double()


def found(method: Method, x: Tensor, kind: Any = "kfac_expand", **options: Any) -> Curvature:
    stream = row_stream([(x, torch.arange(len(x)) % 3)], 3)
    options = {"labels": "exact", "samples": None} | options
    return estimate(kind, method, stream.tasks[0].train, context(stream, 0), of=method.backbone, **options)


def factors(curvature: Curvature) -> dict[str, tuple[Tensor, Tensor]]:
    parts = (part for part in curvature.parts if isinstance(part, KroneckerFactored | KroneckerTable))
    return {next(iter(part.shapes)): (part.outer, part.inner) for part in parts}


# --- padding


@pytest.mark.parametrize("kind", ["kfac_expand", "kfac_reduce"])
def test_padding_changes_no_factor(kind: str) -> None:
    method = learner(reader())
    short, long = (factors(found(method, texts(padding=n), kind, tables=True)) for n in (0, 20))
    assert set(short) == {"table.weight", "token.weight", "pooled.weight"}
    for name, pair in short.items():
        for ours, other in zip(pair, long[name], strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


def test_padding_changes_no_factor_of_a_bert() -> None:
    backbone = configured("backbone", "bert_tiny", width=16, depth=1, max_tokens=40)((40,))
    method = Method(backbone.double(), 3)
    method.head.double().grow(torch.arange(3))
    ids = backbone.tokenize(["a", "seizure", "long words"])
    found_in = [F.pad(ids, (0, padding)).repeat(4, 1) for padding in (0, 20)]
    short, long = (factors(found(method, x, tables=True)) for x in found_in)
    assert len(short) == 7 and "word.weight" in short
    for name, pair in short.items():
        torch.testing.assert_close(pair, long[name], rtol=1e-6, atol=1e-9)


def test_padding_would_change_the_factor_of_inputs_if_it_counted() -> None:
    method = learner(reader())
    aware = factors(found(method, texts(padding=20)))["token.weight"]
    method.backbone.positions = None  # as of a network that does not say
    blind = factors(found(method, texts(padding=20)))["token.weight"]
    assert (blind[1] - aware[1]).norm() > 0.3 * aware[1].norm()
    torch.testing.assert_close(aware[0], blind[0])


def test_factor_of_inputs_is_the_mean_over_rows_of_the_mean_over_their_tokens() -> None:
    method, x = learner(reader()), texts()
    backbone = method.backbone
    tokens = backbone.table(x) + backbone.places(torch.arange(x.shape[1]))
    expand, reduce = torch.zeros(5, 5).double(), torch.zeros(5, 5).double()
    for row, ids in zip(tokens, x, strict=True):
        a = F.pad(row[ids != 0], (0, 1), value=1.0)
        expand += a.T @ a / len(a) / len(x)
        reduce += torch.outer(a.mean(dim=0), a.mean(dim=0)) / len(x)
    for kind, expected in (("kfac_expand", expand), ("kfac_reduce", reduce)):
        torch.testing.assert_close(factors(found(method, x, kind))["token.weight"][1], expected.detach())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_without_padding_the_factor_is_bitwise_what_it_is_without_positions(sharing: Any) -> None:
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inner_sum(x, sharing, torch.ones(6, 5, dtype=torch.bool)), inner_sum(x, sharing))


def test_a_shared_layer_leaves_out_the_padding_of_each_call() -> None:
    class Twice(Reader):
        def forward(self, x: Tensor) -> Tensor:
            real = (x != 0).double()[..., None]
            tokens = self.token(torch.tanh(self.token(self.table(x))))
            return self.pooled((tokens * real).sum(dim=1) / real.sum(dim=1))

    torch.manual_seed(0)
    method = learner(Twice().double())
    short, long = (factors(found(method, texts(padding=n))) for n in (0, 9))
    torch.testing.assert_close(short, long)


@pytest.mark.parametrize("cut", [False, True])
def test_statistics_of_optimizers_leave_padding_out(cut: bool) -> None:
    """Steps are the same with 20 more columns of padding, also where the network cuts what is padding in all rows."""
    kfac = partial(
        Kfac,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        damping=0.1,
        average=0.5,
        sharing="expand",
        largest=64,
        statistics_every=1,
        invert_every=1,
        kl_clip=None,
    )
    foof = partial(
        Foof,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        damping=0.1,
        average=0.5,
        largest=64,
        statistics_every=1,
        invert_every=1,
    )
    for optimizer in (kfac, foof):
        weights = []
        for padding in (0, 20):
            method = learner(reader(trained_table=False, cut=cut and padding > 0))
            stream = row_stream([(texts(padding=padding), torch.arange(10) % 3)], 3)
            ctx = context(stream, 0)
            budget = type(ctx.budget)(optimizer, epochs=None, steps=2, batch_size=10)
            fit(method, stream.tasks[0].train, ctx, budget=budget)
            weights.append(method.backbone.token.weight.detach())
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)


# --- tables of embeddings


class Hot(nn.Module):
    """A table as a linear layer on one-hot vectors."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.layer = nn.Linear(WORDS, WIDTH, bias=False).double()
        self.layer.weight.data = table.weight.data.T.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x[..., None] == torch.arange(WORDS)).double())


def test_a_table_is_a_linear_layer_on_one_hot_vectors() -> None:
    plain, twin, x = reader(), reader(), texts()
    twin.table = Hot(plain.table)
    table, layer = found(learner(plain), x, tables=True), found(learner(twin), x)
    (ours,) = (part for part in table.parts if isinstance(part, KroneckerTable))
    (theirs,) = (part for part in layer.parts if "table.layer.weight" in part.shapes)
    torch.testing.assert_close(torch.diag(ours.inner), theirs.inner)
    torch.testing.assert_close(ours.outer, theirs.outer)
    change = torch.randn(WORDS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    product = theirs.mv(change.T.flatten()).view(WIDTH, WORDS)
    torch.testing.assert_close(ours.mv(change.flatten()).view(WORDS, WIDTH), product.T)
    torch.testing.assert_close(ours.inner, frequencies(x))


def frequencies(x: Tensor) -> Tensor:
    rows = [torch.bincount(row[row != 0], minlength=WORDS).double() / int((row != 0).sum()) for row in x]
    return torch.stack(rows).mean(dim=0)


def test_a_table_of_texts_of_one_token_under_squared_loss_is_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(3, 2)).double()
    x = torch.tensor([[0], [1], [1], [3]])
    tape = Tape({}, net, tables_of(net), training=True)
    with tape.recording():
        values = net(x)
        inner, outer, exact = tape.inner("expand", 4)["0"] / 4, 0, 0
        for direction in torch.eye(2, dtype=torch.float64):
            outer = outer + tape.outer(values, direction.expand_as(values), "expand", keep=True)["0"] / 4
            for row in values:
                g = torch.autograd.grad(row, net[0].weight, direction, retain_graph=True)[0].flatten()
                exact = exact + torch.outer(g, g) / 4
    shapes = {"weight": (5, 3)}
    torch.testing.assert_close(as_dense(KroneckerTable(shapes, outer, inner)), exact)


def test_words_that_never_occur_and_places_have_no_product() -> None:
    method = learner(reader())
    x = texts()
    x[x == 7] = 2
    curvature = found(method, x, tables=True)
    (table,) = (part for part in curvature.parts if isinstance(part, KroneckerTable))
    diagonal = table.params(table.diag())["table.weight"]
    assert not diagonal[7].any() and not diagonal[0].any() and diagonal[2].all()
    (rest,) = (part for part in curvature.parts if isinstance(part, Diagonal))
    assert list(rest.shapes) == ["places.weight"]  # its entries are the same for all rows, and do not come row by row
    assert set(factors(found(method, x))) == {"token.weight", "pooled.weight"}


def product(seed: int, *, empty: bool = False) -> KroneckerTable:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    inner = torch.rand(4, dtype=torch.float64, generator=generator)
    inner[0] = 0 if empty else inner[0]
    return KroneckerTable({"table.weight": (4, 3)}, root @ root.T + 0.1 * torch.eye(3), inner)


def test_operations_of_a_table_are_those_of_its_matrix() -> None:
    k = product(0, empty=True)
    dense = as_dense(k)
    torch.testing.assert_close(dense, torch.kron(torch.diag(k.inner), k.outer))
    torch.testing.assert_close(k.diag(), dense.diagonal())
    torch.testing.assert_close(as_dense(k.scale(3.0)), 3 * dense)
    torch.testing.assert_close(as_dense(k.decomposed()), dense)
    torch.testing.assert_close(k.decomposed().diag(), dense.diagonal())
    torch.testing.assert_close(as_dense(k.decomposed().scale(2.0)), 2 * dense)
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(as_dense(k.inverse(0.3)), torch.linalg.inv(dense + 0.3 * eye))
    factored = k.inverse(0.3, "factored")
    wide = KroneckerFactored({"w": (3, 4)}, k.outer, torch.diag(k.inner)).inverse(0.3, "factored")
    torch.testing.assert_close(factored.outer, wide.outer)
    torch.testing.assert_close(torch.diag(factored.inner), wide.inner)
    torch.testing.assert_close(as_dense(isotropic(k, 2.0)), 2 * eye)
    v = torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(as_dense(k.add(product(1), "list")), dense + as_dense(product(1)))
    torch.testing.assert_close(k.decomposed().add(k, "list").mv(v), 2 * dense @ v)


@pytest.mark.parametrize("how", ["kl", "additive", "rank1"])
def test_a_sum_of_tables_is_that_of_their_layers(how: Any) -> None:
    first, second = product(0, empty=True), product(1)
    layers = [KroneckerFactored({"w": (3, 4)}, k.outer, torch.diag(k.inner)) for k in (first, second)]
    ours, theirs = first.add(second, how), layers[0].add(layers[1], how)
    torch.testing.assert_close(ours.outer, theirs.outer)
    torch.testing.assert_close(torch.diag(ours.inner), theirs.inner)


# --- messages


def test_layers_that_are_too_large_are_named() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert named_too_large(net, 9, "method.largest") == ""
    assert named_too_large(net, 8, "method.largest") == (
        "method.largest=8: 1 of 2 layers are larger and get a diagonal instead of Kronecker factors: 2 (2 x 9); "
        "method.largest=9 gives factors to all"
    )
    method = learner(reader())
    with pytest.warns(DataWarning, match=r"budget.optimizer.largest=4: 2 of 2 layers .* backbone.token \(4 x 5\)"):
        Foof.look_at(method, largest=4, lr=0.1)


def test_kfac_is_refused_where_names_are_encoded_by_the_same_layers() -> None:
    towers = tiny_towers()
    towers.joint.requires_grad_(True)
    method = Method(towers, 6)
    for names, refused in (("live", True), ("fixed", False)):
        method.head = NamesHead(towers, 6, names=names)
        if refused:
            with pytest.raises(ConfigError, match=r"Kfac: its factors would mix .* names of classes"):
                Kfac.look_at(method, largest=1024)
        else:
            Kfac.look_at(method, largest=1024)
    assert layers_of(method)
