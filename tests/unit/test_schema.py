"""The task of a data set of texts in words: what is tokenised, the strings of classes, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_texts import BACKBONE, SYNTHETIC, TABLE, texts
from test_texts import COMMON as OWN

from clrun.data.modality import Texts
from clrun.data.orders import canonical
from clrun.data.reading.options import PackageReading
from clrun.data.reading.recipe import from_recipe
from clrun.data.scenarios import dataset_sequence
from clrun.data.schema import Schema
from clrun.data.sources.hpo_linking import hpo_linking
from clrun.data.sources.text_folder import text_folder
from clrun.data.sources.text_synthetic import text_synthetic
from clrun.data.sources.text_table import text_table
from clrun.data.stream import Dataset
from clrun.data.tokens import ByteTokenizer
from clrun.system.errors import ConfigError

WIDE: Any = type("Wide", (), {"tokenizer": ByteTokenizer(), "max_tokens": 200})()
PAIRS = "text,more,label,split\na,b,no,train\nc,d,yes,train\ne,f,yes,test\ng,h,no,test\n"


def schema(**options: Any) -> Schema:
    return Schema(**({"prefix": None, "template": None, "verbaliser": None, "metric": "accuracy"} | options))


def synthetic(**options: Any) -> Dataset:
    return text_synthetic(**(SYNTHETIC | options))


def table(folder: Path, content: str = PAIRS, **options: Any) -> Dataset:
    (folder / "rows.csv").write_text(content)
    return text_table(**(OWN | TABLE | {"name": "rows.csv", "file": str(folder / "rows.csv")} | options))


def read(dataset: Dataset, split: str = "train") -> list[str]:
    """Return the texts of a part as a backbone is given them."""
    fitted = Texts().fit(dataset, WIDE).dataset
    chosen = getattr(fitted, split)
    rows = next(chosen.batches(len(chosen), view="raw")).x
    return [ByteTokenizer().decode(row) for row in rows.tolist()]


def test_a_prefix_stands_before_each_text_and_stored_rows_stay() -> None:
    plain, stated = synthetic(), synthetic(schema=schema(prefix="topic:"))
    assert read(stated) == [f"topic: {text}" for text in texts(plain.train)]
    assert read(stated, "test") == [f"topic: {text}" for text in texts(plain.test)]
    assert texts(stated.train) == texts(plain.train) and torch.equal(stated.train.images, plain.train.images)


def test_without_a_schema_equal_rows_of_two_tasks_are_equal_and_prefixes_tell_them_apart(tmp_path: Path) -> None:
    content = "text,label,split,domain\n" + "".join(
        f"same,{c},{p},{d}\n" for c in "ab" for p in ("train", "test") for d in "xy"
    )
    with pytest.warns(UserWarning):
        plain = table(tmp_path, content, schema=schema())
        both = table(tmp_path, content, schema=schema(prefix={"x": "mood:", "y": "topic:"}))
    for dataset, expected in ((plain, ["same", "same"]), (both, ["mood: same", "topic: same"])):
        fitted, transform, *_ = Texts().fit(dataset, WIDE)
        stream = dataset_sequence(fitted, canonical, transform, setting="dil")
        for split in ("train", "test"):
            rows = [next(getattr(task, split).batches(9)).x[0].tolist() for task in stream.tasks]
            assert [ByteTokenizer().decode(row) for row in rows] == expected
    assert transform.rows(["new"], part="y")[0].tolist()[:10] == ByteTokenizer().encode("topic: new", 99)[:10]


def test_a_template_states_a_pair_in_words(tmp_path: Path) -> None:
    stated = schema(prefix="mnli", template="{prefix} hypothesis: {text_b} premise: {text} {{?}}")
    assert read(table(tmp_path, text_b="more", schema=stated)) == [
        "mnli hypothesis: b premise: a {?}",
        "mnli hypothesis: d premise: c {?}",
    ]
    assert schema(prefix="p").state("a\x1fb") == "p a\x1fb", "without a template a pair stays one"
    odd = schema(template="say {text}!")
    assert odd.state("{text_b} {prefix}") == "say {text_b} {prefix}!", "places in a text are text"
    with pytest.raises(ConfigError, match="template: has no {text_b}, and texts are pairs: 'a'; change the template"):
        read(table(tmp_path, text_b="more", schema=odd))
    with pytest.raises(ConfigError, match="template: has {text_b}, and the text is none of a pair: 'a'; change the"):
        read(table(tmp_path, schema=schema(template="{text} {text_b}")))


def test_samples_and_the_line_of_the_input_show_the_words() -> None:
    parts = {"domain 0": "in x:", "domain 1": "in y:"}
    dataset = synthetic(domains=2, schema=schema(prefix=parts, metric="exact_match"))
    fitted = Texts().fit(dataset, WIDE)
    rows = torch.tensor([0, len(dataset.train) - 1])
    found = Texts().samples(dataset.train, rows, fitted.transform, torch.Generator())
    assert found is not None
    expected = [f"in {'xy'[k]}: {texts(dataset.train)[row]}" for k, row in enumerate(rows.tolist())]
    assert [shown.text for shown in found.texts] == expected
    assert all("".join(s.tokens).startswith("in") for s in found.texts)
    words = "; stated as '{prefix} {text}'; prefix by part: domain 0 'in x:', domain 1 'in y:'; exact match"
    assert fitted.line.endswith(words)
    assert "stated" not in Texts().fit(synthetic(schema=schema()), BACKBONE).line


def test_strings_of_classes_are_used_as_they_are() -> None:
    names = synthetic().class_names
    strings = {name: f"not_{name}" for name in names}
    captions = synthetic(schema=schema(verbaliser=strings)).texts
    assert captions.names == tuple(strings[name] for name in names) == captions.repeated(2).names[4:]
    assert captions.of(1) == [strings[names[1]]] and captions.record()["names"] == list(captions.names)
    assert synthetic(schema=schema()).texts == synthetic().texts


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pa": "x"}, "has no text for ro, te, vu; name every class"),
        ({"pa": "x", "ro": "y", "te": "z", "vx": "w"}, "there is no class 'vx'; did you mean 'vu'?"),
        ({"pa": "x", "ro": "y", "te": "X.", "vu": "w"}, "'x' of pa and 'X.' of te differ in nothing but case"),
    ],
)
def test_every_class_has_a_string_of_its_own(change: dict[str, str], expected: str) -> None:
    assert synthetic().class_names == ("pa", "ro", "te", "vu")
    with pytest.raises(ConfigError) as caught:
        synthetic(schema=schema(verbaliser=change))
    assert str(caught.value).startswith("dataset.schema.verbaliser: ") and expected in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prefix": " "}, "prefix: a text is empty; set it to null"),
        ({"prefix": {}}, "prefix: is empty; set it to null"),
        ({"prefix": "a\0"}, "prefix: 'a\\x00' holds a character that is none of a text"),
        ({"prefix": "\udcff"}, "prefix: '\\udcff' holds a character that is none of a text"),
        ({"verbaliser": {"a": ""}}, "verbaliser: a text is empty"),
        (
            {"template": "say {txt}"},
            "template: 'say {txt}' has the place 'txt'; did you mean 'text'? (places: {prefix}, ",
        ),
        ({"template": "say"}, "template: 'say' has no place for the text; add {text}, and write it in quotes"),
        ({"template": "{text"}, "template: '{text': expected '}' before end of string; write it in quotes within"),
        ({"template": "{text!r}"}, "template: '{text!r}' has a place with a format"),
        ({"template": "{0} {text}"}, "template: '{0} {text}' has the place '0'"),
        (
            {"template": "{prefix} {text}"},
            "template: '{prefix} {text}' has {prefix}, and there is none; set dataset.schema.prefix",
        ),
        ({"template": "{text}", "prefix": "a"}, "template: '{text}' has no {prefix}, and dataset.schema.prefix is set"),
    ],
)
def test_a_wrong_schema_is_refused_before_any_file_is_read(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"dataset.schema.{expected}")):
        schema(**options)


def test_prefixes_by_part_need_parts() -> None:
    by_part = schema(prefix={"domain 0": "a"})
    with pytest.raises(
        ConfigError, match="^dataset.schema.prefix: names parts, and this data set has none .no domains"
    ):
        synthetic(schema=by_part)
    with pytest.raises(ConfigError, match="^dataset.schema.prefix: has no text for domain 1; name every part"):
        synthetic(domains=2, schema=by_part)
    with pytest.raises(ConfigError, match="^dataset.class_names: conflicts with dataset.schema.verbaliser"):
        synthetic(class_names="words.txt", schema=schema(verbaliser={"pa": "x"}))


def test_folders_and_recipes_have_a_schema(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            (tmp_path / part / label / "1.txt").write_text(f"{part} {label}")
    stated = schema(prefix="p", verbaliser={"a": "x", "b": "y"})
    found = text_folder(**(OWN | {"name": "own", "root": str(tmp_path), "schema": stated}))
    assert read(found) == ["p train a", "p train b"] and found.texts.names == ("x", "y")
    reading = PackageReading(val_fraction=0.0, seed=0, augment=[], root=None, schema=stated)
    made = from_recipe("r", [("t", 0, "train"), ("u", 1, "test")], class_names=["a", "b"], reading=reading)
    assert read(made) == ["p t"] and made.texts.names == ("x", "y") and made.schema is stated
    assert "schema" in hpo_linking.__annotations__
