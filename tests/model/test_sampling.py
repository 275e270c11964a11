"""The promises of `model/sampling.py`: how tokens are drawn, and which part of a text can be shown while it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pile_app.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from pile_app.model.sampling import Sampling, TextPieces, draw


def test_top_p_draws_among_the_most_likely_only() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    for top_p, kept in ((1.0, 4), (0.95, 4), (0.85, 3), (0.69, 2), (0.4, 1), (1e-6, 1)):
        drawn = draw(logits, Sampling(top_p=top_p), uniform).bincount(minlength=4)
        assert (drawn > 0).tolist() == [number < kept for number in range(4)]
    shares = draw(logits, Sampling(temperature=0.5), uniform).bincount() / 4000
    torch.testing.assert_close(shares, torch.tensor([16, 9, 4, 1]) / 30, atol=0.03, rtol=0)


def test_what_is_impossible_is_never_drawn() -> None:
    logits = torch.full((2000, 5), -torch.inf)
    logits[:, [1, 3]] = 0.0
    uniform = torch.cat([torch.rand(1998), torch.tensor([0.0, 1 - 2**-24])])  # the ends of what float32 can draw
    for sampling in (Sampling(), Sampling(top_p=0.9), Sampling(temperature=3.0)):
        for scale in (1.0, 0.3, 1e-3):  # totals that round up or down
            drawn = draw(torch.where(logits.isfinite(), torch.rand_like(logits) * scale, logits), sampling, uniform)
            assert set(drawn.tolist()) == {1, 3}


def test_drawing_needs_no_float64() -> None:
    """MPS has none."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            assert all(x.dtype != torch.float64 for x in tree_leaves(out) if isinstance(x, torch.Tensor)), func
            return out

    with NoFloat64():
        for sampling in (Sampling(), Sampling(top_p=0.9), Sampling(temperature=0)):
            draw(torch.randn(3, 7), sampling, torch.rand(3))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_text": 0},
        {"max_seconds": 0.0},
        {"stop": ("",)},
        {"stop": "a"},
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


def pieces_of(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What comes out token by token, at last by `finish`, and whether a stop string was found."""
    pieces = TextPieces(tokenizer, stop)
    shown = []
    for token in tokens:
        shown.append(pieces.push(token))
        if pieces.stopped:
            break
    shown.append(pieces.finish())
    assert "".join(shown) == pieces.text
    return shown, pieces.stopped


def up_to_the_first(text: str, stop: list[str]) -> str:
    """Nothing is read beyond the first complete stop string; of several, the earliest start counts."""
    for end in range(len(text) + 1):
        if places := [text[:end].find(one) for one in stop if one in text[:end]]:
            return text[: min(places)]
    return text


@given(st.binary(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop_string(data: bytes, stop: list[str]) -> None:
    """Any bytes: so no piece was ever half a character or a part of a stop string, or the pieces would not add up."""
    stop = [one for one in stop if "\ufffd" not in one]
    text = ByteTokenizer().decode(list(data))
    shown, stopped = pieces_of(ByteTokenizer(), list(data), tuple(stop))
    assert stopped == any(one in text for one in stop)
    assert "".join(shown) == up_to_the_first(text, stop)


@given(st.text("aab\u20ac", max_size=20), st.lists(st.text("ab\u20ac", min_size=1, max_size=3), min_size=1, max_size=3))
def test_stop_strings_that_overlap_the_text_in_every_way(text: str, stop: list[str]) -> None:
    shown, _ = pieces_of(ByteTokenizer(), list(text.encode()), tuple(stop))
    assert "".join(shown) == up_to_the_first(text, stop)


def test_a_character_comes_out_whole_and_at_once() -> None:
    shown, _ = pieces_of(ByteTokenizer(), list("a\u20acb\U0001f600".encode()))
    assert shown == ["a", "", "", "\u20ac", "b", "", "", "", "\U0001f600", ""]
    assert pieces_of(ByteTokenizer(), list("\u20ac".encode())[:2])[0] == ["", "", "\ufffd"]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    shown, stopped = pieces_of(ByteTokenizer(), list(b"ab.\n.\n\nno"), ("\n\n",))
    assert shown == ["a", "b", ".", "", "\n.", "", "", ""] and stopped


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_pieces_of_other_tokenizers_add_up(tmp_path: Path, kind: str) -> None:
    texts = ["the cat sat on the m\u00e4t, na\u00efve \u20ac\u20ac \U0001f600 end"] * 3
    train_tokenizer(texts, kind, 300, tmp_path / "t.json")  # type: ignore[arg-type]
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    tokens = tokenizer.encode(texts[0] + " \U0001f601 cat").tolist()
    text = tokenizer.decode(tokens)
    assert "".join(pieces_of(tokenizer, tokens)[0]) == text
    assert "".join(pieces_of(tokenizer, tokens, ("sat",))[0]) == text[: text.index("sat")]
