"""Cleaning, tokenizers and token counts."""

import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pile_app.data.index import load_index, save_arrays
from pile_app.data.packing import sentence_ends
from pile_app.data.shards import Shards, write_shards
from pile_app.data.tar import ShardError
from pile_app.data.tokenizers import (
    ByteTokenizer,
    JsonTokenizer,
    clean_text,
    load_tokenizer,
    text_tokens,
    train_tokenizer,
)
from pile_app.documents import ENCODED_EXTENSIONS, TEXT, BadSample, Codes, Document, Segment

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


def _write(folder: Path, texts: list[str]) -> str:
    image = Segment.from_image(np.zeros((4, 4, 3), np.uint8))
    documents = [Document((image,)), *(Document((Segment(text), image, Segment("the"))) for text in texts)]
    return write_shards(documents, folder, "a")[0].path


def sidecars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tokens.*"))


def test_token_counts_are_those_of_the_texts(tmp_path: Path, bpe: JsonTokenizer) -> None:
    shards = Shards([_write(tmp_path, CORPUS[:2])])
    counts = text_tokens(shards, 0, ByteTokenizer()).counts
    assert counts.tolist() == [0, len(CORPUS[0]), 0, 3, len(CORPUS[1].encode()), 0, 3]
    assert not sidecars(tmp_path)
    expected = [0, bpe.count(CORPUS[0]), 0, bpe.count("the"), bpe.count(CORPUS[1]), 0, bpe.count("the")]
    counts = text_tokens(shards, 0, bpe).counts
    assert counts.dtype == np.int64
    assert counts.tolist() == expected
    assert [path.name for path in sidecars(tmp_path)] == [f"a-000000.tar.{bpe.fingerprint[:16]}.tokens.safetensors"]


def test_training_reads_the_ids_that_were_kept_and_notices_damage(tmp_path: Path, bpe: JsonTokenizer) -> None:
    path = _write(tmp_path, CORPUS)
    shards = Shards([path])
    texts = text_tokens(shards, 0, bpe)
    for sample in range(1, len(CORPUS)):
        read, plain = shards.document_to_train(0, sample, texts), shards.document(0, sample)
        for segment, text in zip(read.segments, plain.segments, strict=True):
            if text.modality == TEXT:
                assert segment.ids is not None and segment.ids.tolist() == bpe.encode(text.text).tolist()
            else:
                assert segment.data == text.data
    (sidecar,) = sidecars(tmp_path)
    data = bytearray(sidecar.read_bytes())
    data[data.index(texts.flat_ids.tobytes())] ^= 1  # in the first text
    sidecar.write_bytes(data)
    damaged = Shards([path])
    texts = text_tokens(damaged, 0, bpe)
    with pytest.raises(BadSample, match="damaged: remove the file"):
        damaged.document_to_train(0, 1, texts)
    assert damaged.document_to_train(0, 2, texts).segments[0].ids is not None


def test_token_counts_are_read_back_until_the_shard_changes(
    tmp_path: Path, bpe: JsonTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path, ["the cat"])
    before = text_tokens(Shards([path]), 0, bpe).counts
    with monkeypatch.context() as patch:
        patch.setattr("pile_app.data.tokenizers._tokenize", lambda *_: pytest.fail("tokenized again"))
        assert text_tokens(Shards([path]), 0, bpe).counts.tolist() == before.tolist()
    _write(tmp_path, ["xyz wq."])  # as many samples, segments and bytes
    after = text_tokens(Shards([path]), 0, bpe).counts
    assert after[1] == bpe.count("xyz wq.") != before[1]


LONG = ("Où est le chat ? The cat sat on the mat, 猫はどこ。 " * 12 + "\n\nthe the the, " * 9 + "\n") * 2


@pytest.mark.parametrize("damage", ["cut off", "empty", "no header", "other lengths", "of another shard", "garbage"])
def test_a_damaged_sidecar_is_made_anew(tmp_path: Path, bpe: JsonTokenizer, damage: str) -> None:
    path = _write(tmp_path, [LONG, "the cat"])
    right = text_tokens(Shards([path]), 0, bpe)
    (sidecar,) = sidecars(tmp_path)
    whole = sidecar.read_bytes()
    few = {"counts": np.ones(2, "<u4"), "breaks": np.zeros(0, "<u4"), "crc": np.ones(2, "<u4"), "ids": np.ones(2, "<u2")}
    many = {"counts": np.ones(7, "<u4"), "breaks": np.ones(99, "<u4"), "crc": np.ones(7, "<u4"), "ids": np.ones(7, "<u2")}
    {
        "cut off": lambda: sidecar.write_bytes(whole[:-3]),
        "empty": lambda: sidecar.write_bytes(b""),
        "no header": lambda: sidecar.write_bytes(bytes(8) + whole[8:]),
        "other lengths": lambda: save_arrays(str(sidecar), few, {"shard": load_index(path).fingerprint}),
        "of another shard": lambda: save_arrays(str(sidecar), many, {"shard": "0" * 32}),
        "garbage": lambda: sidecar.write_bytes(b"\x93NUMPY" * 100),
    }[damage]()
    again = text_tokens(Shards([path]), 0, bpe)
    assert again.counts.tolist() == right.counts.tolist()
    assert {k: v.tolist() for k, v in again.breaks.items()} == {k: v.tolist() for k, v in right.breaks.items()}
    assert sidecar.read_bytes() == whole


def test_counting_a_damaged_shard_names_it(tmp_path: Path, bpe: JsonTokenizer) -> None:
    path = _write(tmp_path, ["the cat sat"])
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(b"the cat sat", b"the cat sax"))
    with pytest.raises(ShardError, match=r"a-000000\.tar.*cannot be tokenized.*pile index"):
        text_tokens(Shards([path]), 0, bpe)
    assert not sidecars(tmp_path)


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


def test_breaks_of_all_texts_are_kept_in_their_order(
    tmp_path: Path, bpe: JsonTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Segment.from_image(np.zeros((4, 4, 3), np.uint8))
    made = bpe.encode(LONG)
    places = np.array([[300, 600], [100, 200]])
    codes = Codes(bpe.fingerprint, len(LONG.encode()), 0, made, places)
    encoded = Segment(codes.to_bytes(), ENCODED_EXTENSIONS[TEXT])
    documents = [
        Document((Segment(LONG), image, Segment("short")), "a"),
        Document((encoded, Segment(LONG[3:])), "b"),
        Document((Segment(LONG[9:]), encoded), "c"),
    ]
    path = write_shards(documents, tmp_path, "a")[0].path
    texts = {0: LONG, 4: LONG[3:], 5: LONG[9:]}
    for at_once in (1, 1 << 20):
        monkeypatch.setattr("pile_app.data.tokenizers.TOKENIZED_AT_ONCE", at_once)
        for sidecar in sidecars(tmp_path):
            sidecar.unlink()
        found = text_tokens(Shards([path]), 0, bpe)
        assert found.counts.tolist() == [
            *(bpe.count(LONG), 0, bpe.count("short")),
            *(len(made), bpe.count(LONG[3:])),
            *(bpe.count(LONG[9:]), len(made)),
        ]
        assert found.breaks.keys() == {0, 3, 4, 5, 6}
        for segment, text in texts.items():
            ((_, expected),) = bpe.encode_all([text], [sentence_ends(text)])
            assert len(expected) > 3 and found.breaks[segment].tolist() == expected.tolist()
        assert found.breaks[3].tolist() == found.breaks[6].tolist() == [100, 200]
    found = text_tokens(Shards([path]), 0, ByteTokenizer())
    assert found.breaks[4].tolist() == [len(LONG[3 : 3 + end].encode()) for end in sentence_ends(LONG[3:])]


def test_text_that_another_tokenizer_encoded_is_refused(tmp_path: Path, bpe: JsonTokenizer) -> None:
    codes = Codes("ab" * 16, 3, 0, np.arange(3))
    document = Document((Segment(codes.to_bytes(), ENCODED_EXTENSIONS[TEXT]),), "a")
    path = write_shards([document], tmp_path, "a")[0].path
    with pytest.raises(ShardError, match=r"a-000000\.tar.* encoded by tokenizer abab.*set model\.tokenizer"):
        text_tokens(Shards([path]), 0, bpe)
