"""Each step of `pile prepare` on both sides of its threshold."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from pile_app.documents import BadSample, Document, Segment
from pile_app.media import audio_size, decode_audio, decode_image, image_size
from pile_app.prepare.filters import apply_steps, c4, gopher, normalize_text
from pile_app.prepare.ngrams import EvaluationTexts, NearDuplicates, minhash, ngram_hashes, words_of
from pile_app.prepare.options import Options, require

RATE = 8000


def reason(call: Any, *arguments: Any) -> str:
    """Of the rejection, "" where there is none."""
    try:
        call(*arguments)
    except BadSample as error:
        return error.reason
    return ""


def words(count: int, seed: int = 0) -> list[str]:
    """Different words of five letters."""
    rng = np.random.default_rng(seed)
    return ["".join(chr(97 + letter) for letter in rng.integers(0, 26, 5)) for _ in range(count)]


def prose(count: int = 60, seed: int = 0) -> str:
    return " ".join(words(count, seed))


# -- repair

DAMAGED = [
    ("schÃ¶n, oui, voilÃ ", "schön, oui, voilà"),
    ("donâ€™t", "don\u2019t"),
    ("P&EACUTE;REZ &amp; co", "PÉREZ & co"),
    ("\x1b[36;44mblue\x1b[0m", "blue"),
    ("a\ufeffb\ufffcc", "abc"),
]
INTACT = ["plain\n\ttext", "schön", "\u201cquotes\u201d ﬁ \uff37", "日本語のテキスト", "Привет, мир", "Ελληνικά", "a < b && c"]


def repaired_text(text: str) -> str:
    return normalize_text(text, Options(repair=True, clean=False))


@pytest.mark.parametrize(("damaged", "repaired"), DAMAGED)
def test_damaged_texts_are_repaired(damaged: str, repaired: str) -> None:
    assert repaired_text(damaged).strip() == repaired
    assert repaired_text("x" * 50 + damaged + "y" * 50).startswith("x" * 50 + repaired[:3])


@pytest.mark.parametrize("text", INTACT)
def test_intact_texts_are_left_alone(text: str) -> None:
    assert repaired_text(text) == text


def test_a_missing_extra_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="needs no_such_library: pip install no_such_library"):
        require("no_such_library", "prepare", "this")


# -- quality


def repeated_ngrams(n: int, times: int, count: int) -> str:
    """`times` copies of n words among others, `count` words in all."""
    parts = [[*words(n, seed=1), f"{'sep' * 2}{number}"] for number in range(times)]
    flat = [word for part in parts for word in part]
    return " ".join(flat + words(count - len(flat), seed=2))


def lines(count: int, end: str = "", same: int = 1, begin: str = "", glue: str = "\n") -> str:
    """Lines of nine words, `same` of them alike; the first ones end so, all begin so."""
    return glue.join(begin + prose(9, n // same) + end * (n < 4) for n in range(count))


GOPHER = [
    ("word_count", prose(49), prose(50)),
    ("word_count", prose(100_001), None),
    ("word_length", " ".join(["ab"] * 30 + ["cde"] * 29), None),
    ("word_length", " ".join(word * 2 + "x" for word in words(60)), " ".join(word * 2 for word in words(60))),
    ("symbols", prose(60) + " #" * 8, prose(60) + " #" * 5),
    ("symbols", "... " * 7 + prose(60), "... " * 6 + prose(60)),
    ("bullet_lines", lines(10, begin="- "), prose(9, 99) + "\n" + lines(9, begin="- ")),
    ("ellipsis_lines", lines(13, "..."), lines(14, "...")),
    ("alphabetic", prose(79) + " 12345" + " 6" * 20, prose(80) + "".join(f" {n}" for n in range(10_000, 10_020))),
    ("duplicate_lines", lines(20, same=2), lines(20)),
    ("duplicate_paragraphs", "short one\n\n" * 4 + lines(30), "short one\n\n" + lines(30)),
    ("top_ngram", " ".join(f"{word} alpha beta" for word in words(40)), prose(50) + " alpha beta" * 4 + prose(50, 1)),
    ("duplicate_ngram", repeated_ngrams(10, 4, 150), prose(150)),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "bad", "good"), GOPHER, ids=[rule for rule, _, _ in GOPHER])
def test_gopher_rules(rule: str, bad: str, good: str | None) -> None:
    assert reason(gopher, bad) == f"gopher_{rule}"
    if good is not None:
        assert reason(gopher, good) == ""
        assert gopher(good) == good


SENTENCES = "This is the first sentence here. And this is the second one. A third one follows at last."


def test_c4_drops_lines_and_judges_what_is_left() -> None:
    text = (
        f"Home | About\n\n{SENTENCES}[12]\nPlease enable Javascript to see this page.\nfour words are few\n{'x' * 1001} b c d e"
    )
    assert c4(text) == SENTENCES
    assert reason(c4, "One sentence of five words. And two of five words.") == "c4_sentences"
    assert reason(c4, SENTENCES + " {x}") == "c4_curly_bracket"
    assert reason(c4, SENTENCES + " Lorem ipsum dolor.") == "c4_lorem_ipsum"
    assert c4("一 二 三 四 五。六 七 八。九 十。") == "一 二 三 四 五。六 七 八。九 十。"


def test_blank_texts_are_dropped_and_a_document_of_them_is_rejected() -> None:
    picture = Segment.from_image(np.zeros((4, 4, 3), np.uint8))
    assert apply_steps(Document((picture, Segment(" \n"))), Options()).segments == (picture,)
    assert reason(apply_steps, Document((Segment(" \n"),)), Options()) == "empty_text"
    assert reason(apply_steps, Document((Segment("what?", loss=False), Segment(" "))), Options()) == "empty_text"
    captions = apply_steps(Document((picture, Segment("a  ", choices=("a  ", " ", "b")))), Options()).segments[1]
    assert (captions.text, captions.choices) == ("a", ("a", "b"))


def test_quality_is_for_texts_alone() -> None:
    options = Options(quality=("gopher",))
    picture = Segment.from_image(np.zeros((4, 4, 3), np.uint8))
    assert apply_steps(Document((picture, Segment("a cat"))), options).segments[1].text == "a cat"
    assert reason(apply_steps, Document((Segment("a cat"),)), options) == "gopher_word_count"


# -- near-duplicates


def test_words_and_ngrams() -> None:
    assert words_of("Don't stop,  Ünï 3.5 中文字!") == ["don", "t", "stop", "ünï", "3", "5", "中", "文", "字"]
    hashes = ngram_hashes(words_of("a b c a b c"), 3)
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 3
    assert len(ngram_hashes(["a"], 3)) == 0


def test_similarity_is_estimated_and_the_first_is_kept() -> None:
    base = words(400)
    near, far = base[:380] + words(20, 5), base[:200] + words(200, 5)
    signatures = [minhash(" ".join(text)) for text in (base, near, far)]
    exact = [
        len(set(a) & set(b)) / len(set(a) | set(b))
        for a, b in [[ngram_hashes(one, 5).tolist() for one in (base, other)] for other in (near, far)]
    ]
    estimates = [float((signatures[0] == other).mean()) for other in signatures[1:]]
    assert estimates == pytest.approx(exact, abs=0.12)
    assert exact[0] > 0.85 > 0.45 > exact[1]
    index = NearDuplicates(0.8)
    assert index.add(signatures[0], "base") is None
    assert index.add(signatures[2], "far") is None
    found = index.add(signatures[1], "near")
    assert found is not None
    assert found[0] == "base"
    assert minhash("").tolist() == minhash("").tolist() != minhash("?").tolist()


# -- decontamination


@pytest.fixture
def evaluation(tmp_path: Path) -> Iterator[EvaluationTexts]:
    question = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    short = "What is the capital of the French republic?"
    path = tmp_path / "evaluation"
    assert EvaluationTexts.save([question, short, "too short"], 13, path) == (3, 1)
    yield EvaluationTexts(path)


def test_a_part_of_an_evaluation_text_is_found(evaluation: EvaluationTexts) -> None:
    thirteen = "two, three FOUR five six seven eight nine ten; eleven twelve thirteen fourteen"
    assert reason(evaluation.check, f"{prose()} {thirteen}. {prose()}") == "contaminated"
    twelve = thirteen.rpartition(" ")[0]
    assert reason(evaluation.check, f"{prose()} {twelve}. {prose()}") == ""
    assert reason(evaluation.check, f"{prose()} what is the capital of the french republic") == "contaminated"
    assert reason(evaluation.check, f"{prose()} what is the capital of the french") == ""
    assert reason(evaluation.check, "too short") == reason(evaluation.check, "") == ""


# -- images and sounds


def picture(width: int, height: int, extension: str = "png", mode: str = "RGB") -> Segment:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, {"jpg": "jpeg"}.get(extension, extension))
    return Segment(file.getvalue(), extension)


def image_step(segment: Segment, **options: Any) -> Segment:
    return apply_steps(Document((segment,)), Options(**options)).segments[0]


def test_small_and_narrow_images_are_rejected() -> None:
    assert reason(lambda: image_step(picture(40, 31), min_image_size=32)) == "image_too_small"
    assert reason(lambda: image_step(picture(40, 32), min_image_size=32)) == ""
    assert reason(lambda: image_step(picture(61, 20), max_aspect=3)) == "image_aspect"
    assert reason(lambda: image_step(picture(20, 60), max_aspect=3)) == ""


@pytest.mark.parametrize(
    ("extension", "mode"), [("png", "RGB"), ("png", "P"), ("png", "RGBA"), ("jpg", "CMYK"), ("webp", "RGB")]
)
def test_large_images_are_shrunk_in_their_format(extension: str, mode: str) -> None:
    large = picture(200, 100, extension, mode)
    shrunk = image_step(large, image_max_size=64)
    assert image_size(shrunk.file) == (32, 64)
    assert shrunk.extension == extension
    assert shrunk == image_step(large, image_max_size=64)
    assert image_step(large, image_max_size=200) is large
    small = image_step(picture(200, 100, "gif", "P"), image_max_size=64)
    assert (small.extension, image_size(small.file)) == ("png", (32, 64))


def tone(seconds: float, level: float = 0.5, rate: int = RATE, extension: str = "wav") -> Segment:
    return Segment.from_audio(level * np.sin(np.arange(int(seconds * rate)) / 3), rate, extension)


def audio_step(segment: Segment, **options: Any) -> Segment:
    return apply_steps(Document((segment,)), Options(**options)).segments[0]


def test_short_and_silent_sounds_are_rejected() -> None:
    assert reason(lambda: audio_step(tone(0.49), min_audio_seconds=0.5)) == "audio_too_short"
    assert reason(lambda: audio_step(tone(0.5), min_audio_seconds=0.5)) == ""
    assert reason(lambda: audio_step(tone(1, 0.012), silence=-40)) == "silent_audio"  # -41.4 dB
    assert reason(lambda: audio_step(tone(1, 0.016), silence=-40)) == ""  # -38.9 dB


def test_sounds_are_resampled_and_re_encoded_where_they_have_to_be() -> None:
    own = tone(0.5, extension="flac")
    assert audio_step(own, resample=RATE, audio_format="flac") is own
    lower = audio_step(own, resample=4000)
    assert (audio_size(lower.file), lower.extension) == ((2000, 4000), "flac")
    assert lower == audio_step(own, resample=4000)
    expected = decode_audio(own.file, 4000)
    np.testing.assert_allclose(decode_audio(lower.file, 4000), expected, atol=1e-4)
    wav = audio_step(own, audio_format="wav")
    assert (audio_size(wav.file), wav.extension) == ((4000, RATE), "wav")
    stereo = io.BytesIO()
    soundfile.write(stereo, np.tile(np.sin(np.arange(8000) / 3)[:, None], 2) * 0.5, 16000, format="WAV")
    mono = audio_step(Segment(stereo.getvalue(), "wav"), resample=8000)
    assert soundfile.info(io.BytesIO(mono.file)).channels == 1
    assert mono.extension == "wav"


def test_a_grey_picture_of_16_bits_stays_grey_when_it_shrinks() -> None:
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(file, "png")
    (segment,) = apply_steps(Document((Segment(file.getvalue(), "png"),)), Options(image_max_size=32)).segments
    assert image_size(segment.file) == (32, 32) and abs(decode_image(segment.file, 1, 32, 32).mean() - 127.5) < 2
