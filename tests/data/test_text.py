"""Cleaning and tokenizers."""

import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pile_app.data.packing import sentence_ends
from pile_app.data.text import (
    ByteTokenizer,
    JsonTokenizer,
    clean_text,
    load_tokenizer,
    train_tokenizer,
)

CORPUS = ["The cat sat on the mat, the dog sat on the cat.", "Où est le chat ? 猫はどこ?  three\n\nthe the the"] * 4

# Few letters, so that marks, controls and line ends meet often.
nasty_texts = st.text(st.sampled_from("ae \t\n\r\v\f\x00\x1c\x85\x9f\u0301\u0327\u2028\u2000\xa0가\u11a8"), max_size=30)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_tokenizer(CORPUS, "bpe", 290, path)
    return JsonTokenizer(path)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    train_tokenizer(CORPUS, "words", 6, path)
    return JsonTokenizer(path)


@given(st.text() | nasty_texts)
def test_clean_text_is_nfc_without_controls_and_idempotent(text: str) -> None:
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert unicodedata.is_normalized("NFC", clean)
    assert not any(unicodedata.category(letter) == "Cc" and letter not in "\t\n" for letter in clean)
    assert "\n\n\n" not in clean
    assert all(line == line.rstrip() for line in clean.split("\n"))


def test_clean_text_keeps_what_matters() -> None:
    assert clean_text("a\r\nb\rc\x85d") == "a\nb\nc\nd"
    assert clean_text("\tdef f():  \n\n\n\n\treturn 1\x00\x07") == "\tdef f():\n\n\treturn 1"
    assert clean_text("e\x00\u0301") == "é"
    assert clean_text("👩\u200d🚀 a\u00a0b") == "👩\u200d🚀 a\u00a0b"


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.count(text) == len(ids) == tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bytes_that_are_no_text_decode_to_the_replacement_character() -> None:
    assert ByteTokenizer().decode([104, 255, 105]) == "h\ufffdi"


@given(st.text() | st.sampled_from(CORPUS))
def test_bpe_round_trip(bpe: JsonTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert ids.dtype == np.int32
    assert bpe.decode(ids) == text
    assert bpe.count(text) == len(ids)
    assert bpe.token_bytes[ids].sum() == len(text.encode())


def test_bpe_merges(bpe: JsonTokenizer) -> None:
    assert bpe.size == len(bpe.token_bytes) == 290
    assert bpe.count(CORPUS[0]) < len(CORPUS[0]) / 2


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    for kind in ("bpe", "words"):
        for name in "ab":
            train_tokenizer(iter(CORPUS), kind, 280, tmp_path / name)  # type: ignore[arg-type]
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_text_is_never_taken_for_a_special_token_nor_cut(tmp_path: Path, bpe: JsonTokenizer) -> None:
    from tokenizers import Tokenizer

    train_tokenizer(CORPUS, "bpe", 290, tmp_path / "tokenizer.json")
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_special_tokens(["<|end|>"])
    library.enable_truncation(4)
    library.enable_padding(length=4)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.size == 291
    assert tokenizer.token_bytes[290] == len("<|end|>")
    assert tokenizer.fingerprint != bpe.fingerprint
    for one in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert one.encode("the <|end|> of it").tolist() == bpe.encode("the <|end|> of it").tolist()
        assert one.encode("a").tolist() == bpe.encode("a").tolist()


def test_words_keeps_the_most_frequent_words(words: JsonTokenizer) -> None:
    assert words.size == 6
    ids = words.encode("The CAT sat, zebra <unk> the")
    assert words.decode(ids) == "the cat sat <unk> <unk> <unk> the"  # of the comma, the zebra, and itself
    assert words.token_bytes[ids[0]] == len("the ")
    assert words.encode("the")[0] == 1  # the most frequent one, after <unk>


def test_load_tokenizer_names_what_is_wrong(tmp_path: Path) -> None:
    assert load_tokenizer("bytes").size == 256
    with pytest.raises(ValueError, match=r"missing\.json.*cannot be read.*\"bytes\""):
        load_tokenizer(str(tmp_path / "missing.json"))
    for content in ("{", "{}", "[1]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.json.*is not a tokenizer\.json"):
            load_tokenizer(str(tmp_path / "bad.json"))
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    (tmp_path / "piece.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model | {"vocab": {"a": 0}}})
    )
    with pytest.raises(ValueError, match="WordPiece model without byte-level"):
        load_tokenizer(str(tmp_path / "piece.json"))


def test_train_tokenizer_refuses_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 256 tokens or more"):
        train_tokenizer(CORPUS, "bpe", 255, tmp_path / "t.json")
    with pytest.raises(ValueError, match="kinds are bpe, words"):
        train_tokenizer(CORPUS, "chars", 300, tmp_path / "t.json")  # type: ignore[arg-type]


# Where a long text may be cut

long_texts = st.lists(
    st.sampled_from([*CORPUS, "Hello world. ", "猫はどこ。", "\n", "é! ", "x" * 200, " \t"]), max_size=30
).map("".join)


@given(long_texts)
def test_breaks_are_token_places_whose_prefix_is_the_text_before_them(bpe: JsonTokenizer, text: str) -> None:
    ends = sentence_ends(text)
    for tokenizer in (ByteTokenizer(), bpe):
        ((ids, places),) = tokenizer.encode_all([text], [ends])
        assert np.array_equal(ids, tokenizer.encode(text)) and len(places) == len(ends)
        for place, end in zip(places.tolist(), ends, strict=True):
            before = tokenizer.decode(ids[:place])
            if tokenizer.token_bytes[ids[:place]].sum() == len(text[:end].encode()):
                assert before == text[:end]
            else:  # a token reaches over the break, and is on its far side
                reaching = int(tokenizer.token_bytes[ids[place]])
                assert text[:end].startswith(before) and len(before.encode()) + reaching > len(text[:end].encode())
