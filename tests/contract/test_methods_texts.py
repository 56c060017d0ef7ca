"""Every method on texts: it learns a tiny stream of token ids, or refuses the backbone in one line that says why."""

import math
from contextlib import nullcontext

import pytest
from helpers import METHODS, cpu, live, sgd, text_stream
from test_methods import small

from clrun.data.features import frozen_features
from clrun.learning.names import NamesHead, require_text
from clrun.system.errors import ConfigError

REASONS = (
    "needs a transformer with blocks of attention and MLP, not Bert; use the backbones",
    "needs a vision transformer, not Bert; use the backbones",
    "needs an image and a text tower, not Bert; use the backbones",
    "torch.fx cannot trace the layers of Bert",
    "needs an encoder-decoder that writes texts, not Bert; use the backbones t5_tiny or t5",
)
# Nothing in these is about images.
# fmt: off
RUNS = {
    "a_gem", "apd", "b_tuning", "batchensemble", "blip", "cofima", "coma", "der", "dgc", "dlcft", "ebll", "er",
    "esn", "ewc", "fecam", "finetune", "fish", "gem", "gpm", "halrp", "icarl", "imm", "inflora", "joint",
    "kfac_ewc", "l2", "lda", "linear_probe", "lora", "lwf", "mas", "mer", "merge", "ncl", "ncm", "o_lora",
    "packnet", "progress_compress", "qr", "ranpac", "replay_finetune", "sd_lora", "si", "simplecil", "slca",
    "stl", "swag", "trgp",
}
# fmt: on
NAMES = ("ncm_names", "proof", "rail", "rapf", "zero_shot")  # compare texts with names of classes


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_texts_or_says_why_not(name: str) -> None:
    make = small(name)
    target = make.func  # type: ignore[attr-defined]
    setting = "cil" if "cil" in target.settings else "til"
    stream, backbone = text_stream(setting, head="fixed" if name in NAMES else "linear")
    cpu().place(backbone)
    try:
        if target.needs_text:
            require_text(backbone, target.__name__, towers=target.needs_towers)
        if target.reads_features(make.keywords):  # type: ignore[attr-defined]
            stream, backbone = frozen_features(stream, backbone, cpu(), text=target.needs_text)
        method = make(backbone, stream.num_classes)
    except ConfigError as error:
        assert name not in RUNS and name not in NAMES, error
        assert str(error).startswith("backbone: ") and "\n" not in str(error)
        assert any(reason in str(error) for reason in REASONS), error
        return
    method.read_names(stream.captions)
    method.check(stream)
    journal = live(method, stream, budget=sgd(epochs=1), until=2)
    assert all(math.isfinite(row["nll"]) for row in journal.recorded) and len(journal.recorded) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_methods_that_compare_with_names_say_what_to_set(name: str) -> None:
    target = small(name).func  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=rf"^backbone.head: {target.__name__} compares texts with names of classes;"):
        require_text(text_stream()[1], target.__name__)


# These read features, or have a classifier of their own.
OWN_HEADS = {
    "apd",
    "b_tuning",
    "batchensemble",
    "dlcft",
    "esn",
    "fecam",
    "halrp",
    "lda",
    "linear_probe",
    "ncm",
    "ranpac",
}
OWN_HEADS |= {"simplecil", "stl"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUNS - OWN_HEADS))
def test_methods_say_whether_their_passes_sample_names(name: str) -> None:
    """What `samples_names` says of a method is what happens with `backbone.head=live_1`."""
    make = small(name)
    target = make.func  # type: ignore[attr-defined]
    stream, backbone = text_stream("cil" if "cil" in target.settings else "til", head="live_1")
    method = make(backbone, stream.num_classes)
    assert isinstance(method.head, NamesHead)
    method.read_names(stream.captions)
    line = "^backbone.head: this method has a loss of its own, which samples no names"
    with nullcontext() if method.samples_names else pytest.raises(ConfigError, match=line):
        live(method, stream, budget=sgd(epochs=1), until=2)
