"""Encodings of files: recognized by a mark or by zero bytes, else refused with the likely name; never guessed silently."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pile_app.documents import BadSample
from pile_app.prepare.files import BOMS, decode_text, encoding_of

TEXT = "Où est le café ?\n猫はどこ\n👩\u200d🚀 three\n"


@pytest.mark.parametrize("name", BOMS.values())
def test_byte_order_marks_decide(name: str) -> None:
    mark = next(mark for mark, encoding in BOMS.items() if encoding == name)
    data = mark + TEXT.replace("\n", "\r\n").encode(name)
    assert encoding_of(data) == name
    assert decode_text(data) == decode_text(data, "latin-1") == TEXT, "also against --encoding"


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["id,text\r\n1,three\r\n", "Привет, как дела?\n", "Où est le café ?"])
def test_utf_16_without_mark_is_recognized_by_its_zero_bytes(name: str, text: str) -> None:
    data = text.encode(name)
    assert encoding_of(data) == encoding_of(data[:-1], whole=False) == name
    assert decode_text(data) == text.replace("\r\n", "\n")


@given(st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"])))
def test_utf_8_is_utf_8(text: str) -> None:
    assert decode_text(text.encode()) == text
    assert encoding_of(text.encode()[:-1], whole=False) == "utf-8" or not text


def test_single_zero_bytes_are_no_utf_16() -> None:
    for text in ("a line of text with a\0 zero in it", "one\0two\0three\0four\0", "\0", "a\0"):
        assert decode_text(text.encode()) == text
    with pytest.raises(BadSample, match="binary file"):
        encoding_of("three".encode("utf-32-le"))


@pytest.mark.parametrize(
    ("text", "name", "hint"),
    [
        ("Où est le café ? Ça va très bien.", "latin-1", "latin-1"),
        ("\u201cSmart quotes\u201d \u2014 a café", "cp1252", "cp1252"),
        ("Привет, как дела? Это русский текст для проверки.", "cp1251", "cp1251"),
        ("猫はどこですか。今日は天気がいいですね。", "shift_jis", "cp932"),
    ],
)
def test_other_encodings_are_refused_with_the_likely_name_and_read_when_named(text: str, name: str, hint: str) -> None:
    with pytest.raises(BadSample, match=f"invalid_utf8: byte 0x.. at .*--encoding {hint}$"):
        decode_text(text.encode(name))
    assert decode_text(text.encode(name), name) == decode_text(text.encode(name), hint) == text


def test_wrong_encodings_are_refused() -> None:
    for data, name in (("café".encode("latin-1"), "utf-8"), (b"abc", "utf-16-le"), (b"abc", "no-such"), (b"x\x9c", "zip")):
        with pytest.raises(BadSample, match=f"wrong_encoding: the text is not {name}"):
            decode_text(data, name)
    with pytest.raises(BadSample, match="wrong_encoding"):
        decode_text(codecs.BOM_UTF16_LE + b"a\0b")
