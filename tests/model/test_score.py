"""Scores are the nats of the training loss, whatever documents are computed together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES

from pile_app.data.assembly import assemble, whole
from pile_app.data.tokenizers import load_tokenizer, train_tokenizer
from pile_app.documents import AUDIO, TEXT, Document, Segment
from pile_app.model import score
from pile_app.model.backbones import MinGRU
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, segment_length
from pile_app.model.score import choose, rolling_scores, score_answers, score_choices, score_continuations
from pile_app.model.segments import prompt_tokens
from pile_app.vocabulary import Vocabulary

Model = Callable[..., FusedLanguageModel]
Make = Callable[..., Segment]


def training_nats(model: FusedLanguageModel, document: Document) -> tuple[float, int]:
    """Nats and targets of a document by the loss of training, alone in a pack."""
    length = 2 + sum(segment_length(model, segment) for segment in document.segments)
    with torch.no_grad():
        losses = model(assemble([[whole(document, length)]], model.vocabulary, model.tokenizer, length))
    return sum(float(loss.each.double().sum()) for loss in losses.values()), sum(len(loss.each) for loss in losses.values())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_are_the_nats_of_training(backbone: str, tiny_model: Model, image: Make, sound: Make) -> None:
    model = tiny_model(backbone)
    answers = [Segment("seven"), Segment("a much longer answer than that"), image(1), sound(2), Segment("é")]
    prompts = [Document((image(n), Segment("what is it?"))) for n in range(3)] + [Document(()), Document((sound(0),))]
    scores = score_answers(model, prompts, answers)
    for prompt, answer, found in zip(prompts, answers, scores, strict=True):
        given = tuple(Segment(s.data, s.extension, loss=False) for s in prompt.segments)
        nats, targets = training_nats(model, Document((*given, answer)))
        assert found.nats == pytest.approx(nats, rel=1e-5) and found.tokens == targets
        assert found.bytes == (len(answer.text.encode()) if answer.modality == TEXT else 0)
    assert scores[3].tokens == 1 + model.vocabulary.segment_tokens(AUDIO, 1500, 8000)  # opener, codes, <audio_end>, <end>


@pytest.mark.parametrize("backbone", ["transformer", "mingru"])
def test_scores_together_are_those_of_each_alone(backbone: str, tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(backbone)
    prompts = [Document((Segment("ab" * n),)) for n in range(1, 20)]
    answers = [Segment("x" * (1 + n % 3)) for n in range(19)]
    for name, limit in (("PROMPTS", 3), ("ROWS", 2), ("LOGITS", 600)):  # several batches
        monkeypatch.setattr(score, name, limit)
    together = score_answers(model, prompts, answers)
    for one, prompt, answer in zip(together, prompts, answers, strict=True):
        alone = score_answers(model, [prompt], [answer])[0]
        assert one.nats == pytest.approx(alone.nats, rel=1e-5) and one.tokens == alone.tokens


def test_parts_of_a_text_add_up_to_the_whole(tiny_model: Model) -> None:
    model = tiny_model()
    text = "one two three"
    whole_text, first, rest, nothing = score_continuations(model, ["", "", "one", "one"], [text, "one", " two three", ""])
    assert whole_text.nats == pytest.approx(first.nats + rest.nats, rel=1e-5)
    assert (whole_text.tokens, nothing.tokens, nothing.nats) == (13, 0, 0.0)
    nats, targets = training_nats(model, Document((Segment(text),)))
    ends = score_answers(model, [Document(())], [Segment(text)])[0]
    assert (ends.nats, ends.tokens) == (pytest.approx(nats, rel=1e-5), targets) and targets == whole_text.tokens + 2


def test_a_continuation_that_changes_the_last_token_of_the_prompt_counts_it(tmp_path: Path) -> None:
    train_tokenizer(["then then then th th"] * 9, "bpe", 262, tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    model = FusedLanguageModel(MinGRU(width=16, layers=1), tokenizer)
    joint, alone = tokenizer.encode("th then"), tokenizer.encode("th th")
    assert len(joint) == len(alone) == 2  # `th then` and `th th` differ in the last token, which has to count
    assert score_continuations(model, ["th th"], ["en"])[0].tokens == 1
    spaced = score_continuations(model, ["th "], ["then"])[0]
    assert spaced.tokens == 1 and spaced.bytes == 5  # the space belongs to the token


@pytest.mark.parametrize("backbone", ["transformer", "mingru"])
def test_rolling_windows_count_every_token_once(backbone: str, tiny_model: Model) -> None:
    model = tiny_model(backbone)
    text = "the quick brown fox jumps over the lazy dog " * 3
    exact = score_continuations(model, [""], [text])[0]
    for context, stride in ((32, 8), (32, None), (64, 1), (200, 50)):
        scores = rolling_scores(model, text, context, stride)
        assert sum(one.tokens for one in scores) == sum(one.bytes for one in scores) == len(text)
        if context == 200:
            assert scores[0].nats == pytest.approx(exact.nats, rel=1e-5)
    window = text[32 - 2 - 24 - 1 : 32 - 2 + 8 - 1]  # the second window of (32, 8) reads tokens [8, 40)
    assert len(window) == 32
    with pytest.raises(ValueError, match="stride=32"):
        rolling_scores(model, text, 32, 32)
    assert rolling_scores(model, "", 32) == []


def test_windows_see_what_stands_before_them(tiny_model: Model) -> None:
    model = tiny_model()
    text = "abcdefghij" * 5
    scores = rolling_scores(model, text, 24, 6)
    ids = model.tokenizer.encode(text)
    # Token t of the document is t - 2 of the text. The second window scores tokens [24, 30), and sees [6, 30).
    tokens = torch.as_tensor(ids[4:28].astype("int64")) + model.vocabulary.SPECIALS
    with torch.no_grad():
        row = tokens[None]
        hidden = model.hidden(row, torch.zeros_like(row), torch.zeros_like(row), torch.arange(24)[None])
        logs = model.logits(hidden, TEXT)[0].log_softmax(-1)
    expected = -float(logs[17:23].gather(1, tokens[18:24, None]).sum())
    assert scores[1].nats == pytest.approx(expected, rel=1e-4) and scores[1].tokens == 6


NAMES = ("cat", "cart", "car", "dog", "dogs", "do", "ünïcode", "a longer name than the others", "€")


@torch.no_grad()
def log_likelihood(model: FusedLanguageModel, prompt: Document, answer: Segment, given: int | None, masked: int = 0) -> float:
    """Of one answer and its end, token by token, without cache. `given`: the modality whose opener does not count."""
    tokens, indices, _ = prompt_tokens(model, prompt, given, masked)
    path, path_indices = (part[1 + (given is not None) :] for part in prompt_tokens(model, Document((answer,)), None)[:2])
    row = torch.cat([tokens, path])[None]
    position = torch.arange(row.size(1))[None]
    hidden = model.hidden(row, torch.cat([indices, path_indices])[None], torch.zeros_like(row), position)[0]
    total = 0.0
    for token, state in zip(path.tolist(), hidden[len(tokens) - 1 :], strict=False):
        modality = next(m for m, part in enumerate(model.vocabulary.slices) if part.start <= token < part.stop)
        total += float(model.logits(state, modality).log_softmax(-1)[token - model.vocabulary.slices[modality].start])
    if answer.modality == TEXT:
        ends = [Vocabulary.END, *Vocabulary.OPENERS]
        total += float(model.logits(hidden[-1], TEXT).log_softmax(-1)[ends].logsumexp(0))
    return total


@pytest.fixture(params=[(32, 1024, 1 << 24), (2, 3, 700)], ids=["at once", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in zip(("PROMPTS", "ROWS", "LOGITS"), request.param, strict=True):
        monkeypatch.setattr(score, name, limit)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_closed_set_is_scored_as_each_answer_alone(backbone: str, tiny_model: Model, image: Make, sound: Make) -> None:
    """Answers that begin others, of several tokens, media, and modalities mixed."""
    model = tiny_model(backbone)
    prompts = [Document((image(n), Segment("en: "))) for n in range(3)] + [Document((image(4),)), Document(())]
    texts = [Segment(name) for name in NAMES]
    media = [image(5), image(6), image(5)], [sound(1), sound(2, 400)], [*texts, image(7), sound(3)]
    for answers, given in ((texts, TEXT), (media[0], 1), (media[1], AUDIO), (media[2], None)):
        found = score_choices(model, prompts, answers)
        expected = [[log_likelihood(model, prompt, answer, given) for answer in answers] for prompt in prompts]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_prior_is_subtracted_and_a_wide_beam_changes_nothing(backbone: str, tiny_model: Model, image: Make) -> None:
    model, texts = tiny_model(backbone), [Segment(name) for name in NAMES]
    for tail in ((Segment("en: "),), ()):
        prompts = [Document((image(n), *tail)) for n in range(3)]
        expected = [
            [log_likelihood(model, p, t, TEXT) - 0.5 * log_likelihood(model, p, t, TEXT, masked=1) for t in texts]
            for p in prompts
        ]
        for beam in (None, len(NAMES)):
            found = score_choices(model, prompts, texts, prior=0.5, beam=beam)
            torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=1e-6)


def test_a_narrow_beam_follows_the_likeliest_beginnings_only(tiny_model: Model, image: Make) -> None:
    model, texts = tiny_model(), [Segment(name) for name in NAMES]
    prompts = [Document((image(n),)) for n in range(4)]
    everything = score_choices(model, prompts, texts)
    for beam in (1, 2, 3):
        found = score_choices(model, prompts, texts, beam=beam)
        kept = found.isfinite()
        torch.testing.assert_close(found[kept], everything[kept], atol=1e-4, rtol=1e-6)
        assert (kept.sum(1) >= 1).all() and not kept.all(1).any()
        firsts = [
            {name[0] for name, is_kept in zip(NAMES, row, strict=True) if is_kept and name not in "€"} for row in kept.tolist()
        ]
        assert max(map(len, firsts)) <= beam


def test_closed_set_is_normalized_as_asked(tiny_model: Model, image: Make) -> None:
    model = tiny_model()
    prompts = [Document((image(n),)) for n in range(3)]
    answers = [Segment("one"), Segment("twenty-seven")]
    plain = score_choices(model, prompts, answers)
    for normalize, sizes in (("none", (1, 1)), ("tokens", (4, 13)), ("bytes", (3, 12))):
        found = score_choices(model, prompts, answers, normalize=normalize)  # type: ignore[arg-type]
        torch.testing.assert_close(found, plain / torch.tensor(sizes))
    with pytest.raises(ValueError, match="bytes"):
        score_choices(model, prompts, [image(5)], normalize="bytes")


def test_a_choice_is_drawn_as_often_as_its_probability_says(tiny_model: Model, image: Make) -> None:
    model, texts = tiny_model(), ["e", "ee", "q"]
    drawn = choose(model, [Document((image(0),))] * 400, texts, Sampling(seed=1))
    fractions = torch.tensor([choice.index for choice in drawn]).bincount(minlength=3) / 400
    torch.testing.assert_close(fractions, drawn[0].log_probabilities.softmax(-1), atol=0.08, rtol=0)
    (best,) = choose(model, [Document((image(0),))], texts, Sampling(temperature=0))
    assert best.index == int(best.log_probabilities.argmax())
    with pytest.raises(ValueError, match="different"):
        choose(model, [Document(())], ["one", "one"])


def test_guidance_of_zero_chooses_without_the_prompt(tiny_model: Model) -> None:
    model, texts = tiny_model(), ["seven", "s", "sevenths"]
    prompts = [Document((Segment(text),)) for text in ("eight", "three")]
    for guidance, alike in ((0.0, True), (1.0, False), (3.0, False)):
        one, other = choose(model, prompts, texts, Sampling(guidance=guidance))
        assert torch.allclose(one.log_probabilities, other.log_probabilities, atol=1e-5) == alike


def test_long_prompts_lose_their_beginning(tiny_model: Model, image: Make) -> None:
    model = tiny_model()
    long = score_continuations(model, ["ab" * 100], ["cd"], context=20)[0]
    kept = score_continuations(model, ["ab" * 100], ["cd"], context=None)[0]
    assert long.tokens == kept.tokens == 2 and long.nats != kept.nats
    with pytest.raises(ValueError, match="does not fit a context of 20"):
        score_continuations(model, ["a"], ["b" * 40], context=20)
    with pytest.raises(ValueError, match="only texts can be cut"):
        score_answers(model, [Document((image(0), Segment("a" * 30)))], [Segment("b")], context=20)
