"""Words, spans and tags are converted to each other and back, with any scheme, script and tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pile_app.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, train_tokenizer
from pile_app.prepare.entities import scheme_of_tags, spans_of_tags, word_offsets
from pile_app.tasks.tagging import document_words, last_tokens, merge_words, spans_of_words, tags_of_words

TEXT = "José, the 李小龙 of Zürich… it's @paul's #nlp 👩‍🚀 talk at AT&T: http://x.y/z?a=1 नमस्ते 10.5%!!"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ("bpe", "words"):
        train_tokenizer([TEXT] * 20, kind, 400, folder / f"{kind}.json")  # type: ignore[arg-type]
    return {"bytes": ByteTokenizer()} | {kind: JsonTokenizer(folder / f"{kind}.json") for kind in ("bpe", "words")}


def test_texts_are_split_into_words() -> None:
    words = [TEXT[start:stop] for start, stop in word_offsets(TEXT)]
    assert words[:12] == ["José", ",", "the", "李", "小", "龙", "of", "Zürich", "…", "it", "'s", "@paul"]
    assert words[12:15] == ["'s", "#nlp", "👩"] and words[-3:] == ["10.5", "%", "!!"]
    assert {"AT&T", ":", "http://x.y/z?a=1", "नमस्ते"} <= set(words)
    assert document_words("ab cd", {"words": [[0, 5]]}) == [(0, 5)]


@given(st.text())
def test_words_cover_everything_but_whitespace_in_order(text: str) -> None:
    places = [0, *(place for word in word_offsets(text) for place in word), len(text)]
    assert places == sorted(places)
    assert all(not text[a:b].strip() for a, b in zip(places[::2], places[1::2], strict=True))


@pytest.mark.parametrize("name", ["bytes", "bpe", "words"])
def test_a_word_is_labelled_where_it_ends_with_any_tokenizer(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer, words = tokenizers[name], word_offsets(TEXT)
    last = last_tokens(TEXT, words, tokenizer)
    ids = tokenizer.encode(TEXT)
    assert (np.diff(last) >= 0).all() and last[0] >= 0 and last[-1] < len(ids)
    if name == "words":
        assert tokenizer.decode(ids[last[[0, 2, 7]]].tolist()).split() == ["josé", "the", "zürich"]
        return
    stops = np.cumsum(tokenizer.token_bytes[ids])
    for (_, stop), token in zip(words, last.tolist(), strict=True):
        assert stops[token] >= len(TEXT[:stop].encode()) > stops[token] - tokenizer.token_bytes[ids[token]]


def test_words_that_end_in_one_token_are_tagged_as_one(tokenizers: dict[str, Tokenizer]) -> None:
    words = [(0, 1), (1, 2), (2, 3), (4, 5)]
    tokens, places, tags = merge_words(np.array([0, 1, 1, 3]), words, np.array([0, 0, 3, 4], np.int32))
    assert (tokens.tolist(), places, tags.tolist()) == ([0, 1, 3], [(0, 1), (1, 3), (4, 5)], [0, 3, 4])
    assert merge_words(np.array([0, 0, 1, 2]), words, np.array([1, 3, 4, 0], np.int32))[2].tolist() == [1, 3, 0]


TAGS = st.lists(st.sampled_from(["O", *(f"{part}-{name}" for part in "BI" for name in ("a", "b"))]), max_size=12)


@given(TAGS)
def test_spans_come_back_from_tags_of_every_scheme(tags: list[str]) -> None:
    found, _ = spans_of_tags(tags)
    words = [(2 * n, 2 * n + 1) for n in range(len(tags))]
    spans = [(words[first][0], words[stop - 1][1], name) for first, stop, name in found]
    assert spans_of_words(words, tags_of_words(words, spans, ["a", "b"]).tolist(), ["a", "b"]) == spans
    schemes = {"BIO": ["O"] * len(tags), "IOB1": ["O"] * len(tags), "BIOES": ["O"] * len(tags)}
    before = (0, 0, "")
    for first, stop, name in found:
        size = stop - first
        schemes["BIO"][first:stop] = [f"B-{name}"] + [f"I-{name}"] * (size - 1)
        clash = before[1:] == (first, name)
        schemes["IOB1"][first:stop] = ["B-" * clash + "I-" * (not clash) + name] + [f"I-{name}"] * (size - 1)
        parts = ["S"] if size == 1 else ["B", *["I"] * (size - 2), "E"]
        schemes["BIOES"][first:stop] = [f"{part}-{name}" for part in parts]
        before = (first, stop, name)
    for scheme, written in schemes.items():
        assert spans_of_tags(written, scheme) == (found, 0)
    if found:
        assert scheme_of_tags([schemes["BIOES"], ["S-a"]]) == "BIOES" and scheme_of_tags([schemes["BIO"]]) == "BIO"


def test_invalid_tags_are_repaired_and_counted() -> None:
    assert spans_of_tags(["I-a", "I-a", "I-b", "O"]) == ([(0, 2, "a"), (2, 3, "b")], 2)
    assert spans_of_tags(["I-a", "I-a", "I-b", "O"], "IOB1") == ([(0, 2, "a"), (2, 3, "b")], 0)
    assert spans_of_tags(["B-a", "I-a", "O", "E-a", "B-b"], "BIOES") == ([(0, 2, "a"), (3, 4, "a"), (4, 5, "b")], 3)
    assert scheme_of_tags([["I-a", "B-a", "O"], ["O", "I-b"]]) == "IOB1"
    with pytest.raises(ValueError, match="'person' is no tag"):
        spans_of_tags(["O", "person"])


def test_spans_that_are_no_words_are_refused() -> None:
    words = word_offsets("Ada Lovelace wrote")
    assert tags_of_words(words, [[0, 12, "p"]], ["o", "p"]).tolist() == [3, 4, 0]
    with pytest.raises(ValueError, match=r"type 'q', model.objective.types has \['p'\]"):
        tags_of_words(words, [[0, 3, "q"]], ["p"])
    for spans in ([[0, 2, "p"]], [[0, 12, "p"], [4, 12, "p"]], [[3, 4, "p"]]):
        with pytest.raises(ValueError, match="does not begin and end with words"):
            tags_of_words(words, spans, ["p"])
