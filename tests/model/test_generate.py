"""The promises of `model/generate.py`: any modality out of any, the cache and the batch change nothing, the seed decides."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from pile_app.data.assembly import assemble, whole
from pile_app.data.text import ByteTokenizer
from pile_app.documents import (
    AUDIO,
    IMAGE,
    TEXT,
    BadSample,
    Document,
    Segment,
    Vocabulary,
    audio_size,
    decode_image,
    image_size,
)
from pile_app.model.backbones import LSTM
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, _prompt_tokens, _sample, generate

MakeModel = Callable[..., FusedLanguageModel]
MakeSegment = Callable[..., Segment]
BACKBONES = ("transformer", "lstm", "rnn", "mingru")
GREEDY = Sampling(temperature=0, max_text=12, max_seconds=0.5)


@pytest.fixture
def prompts(image: MakeSegment, sound: MakeSegment) -> list[Document]:
    """Of different lengths, some of one length, one of nothing."""
    return [
        Document((Segment("seven"),)),
        Document(()),
        Document((image(0), Segment("a"), sound(0))),
        Document((Segment("eight"),)),
        Document((sound(1, 400),)),
        Document((image(1),)),
        Document((image(2),)),
    ]


def same_media(first: Segment, second: Segment) -> bool:
    """Sounds may differ in the last bits of 16, where sums are taken in another order."""
    if first.modality != AUDIO:
        return first == second
    one, other = (soundfile.read(io.BytesIO(segment.file))[0] for segment in (first, second))
    return len(one) == len(other) and bool(np.abs(one - other).max() < 2e-4)


def write_letters_only(model: FusedLanguageModel) -> None:
    """Other bytes could not be read back as UTF-8: their logits become 0, and some letter's is above that."""
    letters = torch.zeros(Vocabulary.SPECIALS + 256, dtype=torch.bool)
    letters[Vocabulary.SPECIALS + ord("a") : Vocabulary.SPECIALS + ord("z") + 1] = True
    with torch.no_grad():
        model.heads[TEXT].weight[~letters] = 0


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("to", [TEXT, IMAGE, AUDIO])
def test_with_and_without_cache_the_greedy_answer_is_the_same(
    tiny_model: MakeModel, prompts: list[Document], backbone: str, to: int
) -> None:
    model = tiny_model(backbone)
    cached = generate(model, prompts, to, GREEDY)
    anew = generate(model, prompts, to, replace(GREEDY, use_cache=False))
    assert all(same_media(*pair) for pair in zip(cached, anew, strict=True))
    assert len({segment.data for segment in cached}) > 1, "the prompt makes a difference"
    guided = [generate(model, prompts, to, replace(GREEDY, guidance=3.0, use_cache=cache)) for cache in (True, False)]
    assert all(same_media(*pair) for pair in zip(*guided, strict=True))
    assert guided[0] != cached, "guidance makes a difference"


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("to", [TEXT, IMAGE, AUDIO])
def test_prompts_of_different_lengths_are_answered_as_one_by_one(
    tiny_model: MakeModel, prompts: list[Document], backbone: str, to: int
) -> None:
    model = tiny_model(backbone)
    together = generate(model, prompts, to, GREEDY)
    alone = [generate(model, [prompt], to, GREEDY)[0] for prompt in prompts]
    assert all(same_media(*pair) for pair in zip(together, alone, strict=True))


@pytest.mark.parametrize("to", [TEXT, IMAGE, AUDIO])
def test_the_seed_decides_what_is_drawn(tiny_model: MakeModel, prompts: list[Document], to: int) -> None:
    model = tiny_model()
    sampling = Sampling(max_text=12, max_seconds=0.5, seed=1)
    first = generate(model, prompts, to, sampling)
    torch.manual_seed(99)  # the global generator has no say
    assert generate(model, prompts, to, sampling) == first
    assert generate(model, prompts, to, replace(sampling, seed=2)) != first


def test_generation_leaves_the_global_generator_alone(tiny_model: MakeModel, prompts: list[Document]) -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    generate(model, prompts, IMAGE)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_greedy_answer_is_what_the_model_finds_most_likely(tiny_model: MakeModel, image: MakeSegment) -> None:
    """Checked against the losses of the finished document: training and generation lay out the same."""
    model = tiny_model()
    write_letters_only(model)
    answer = generate(model, [Document((image(0),))], TEXT, GREEDY)[0]
    assert len(answer.text) == 12 and answer.text.isascii() and len(set(answer.text)) > 2
    document = Document((image(0), answer), "k")
    loss = model(assemble([[whole(document, 20)]], model.vocabulary, model.tokenizer, 20), predict=True)[TEXT]
    letters = slice(2, 14)  # after the openers of image and text, before `<end>`
    assert torch.equal(loss.predictions[letters], loss.targets[letters])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_greedy_codes_of_an_image_are_the_most_likely_ones(tiny_model: MakeModel, backbone: str) -> None:
    """The same, without the codec: the codes are found by taking the most likely one, one place after another."""
    model = tiny_model(backbone)
    vocabulary = model.vocabulary
    tokens, places, _ = _prompt_tokens(model, Document((Segment("seven"),)), IMAGE)
    assert tokens.tolist() == [0, 2, *(vocabulary.SPECIALS + byte for byte in b"seven"), 3]
    codes = []
    for number in range(4):
        position = torch.arange(len(tokens))[None]
        hidden = model.hidden(tokens[None], places[None], torch.zeros_like(position), position)
        codes.append(model.logits(hidden[0, -1], IMAGE).argmax())
        tokens = torch.cat([tokens, codes[-1][None] + vocabulary.starts[IMAGE]])
        places = torch.cat([places, torch.tensor([number + 1])])
    expected = model.image_codec.decode(torch.stack(codes)[None])[0]  # type: ignore[union-attr]
    made = generate(model, [Document((Segment("seven"),))], IMAGE, GREEDY)[0]
    assert np.array_equal(decode_image(made.file, 1, 8, 8), expected.numpy())


def test_an_image_has_its_size_and_takes_all_its_codes(
    tiny_model: MakeModel, prompts: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    codec = model.image_codec
    assert codec is not None
    seen: list[torch.Tensor] = []
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda codes: seen.append(codes) or decode(codes))
    for segment in generate(model, prompts, IMAGE, Sampling()):
        assert segment.extension == "png" and image_size(segment.file) == (8, 8)
    assert sum(len(codes) for codes in seen) == len(prompts)
    for codes in seen:
        assert codes.shape[1] == 4 and codes.min() >= 0 and codes.max() < codec.quantizer.codes


def test_a_sound_is_whole_codes_and_no_longer_than_asked(tiny_model: MakeModel, prompts: list[Document]) -> None:
    model = tiny_model()
    lengths = set()
    for seed in range(3):
        for segment in generate(model, prompts, AUDIO, Sampling(max_seconds=1.0, seed=seed)):
            samples, rate = audio_size(segment.file)
            assert rate == 8000 and samples % 320 == 0 and 0 < samples <= 8000
            lengths.add(samples)
    assert len(lengths) > 1, "a sound ends where the model says so"


def test_a_text_ends_where_the_model_says_so_or_at_its_limit(tiny_model: MakeModel, prompts: list[Document]) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.heads[TEXT].weight[Vocabulary.OPENERS[IMAGE]] += 0.3 * torch.randn(32)
    texts = [
        segment.data for seed in range(20) for segment in generate(model, prompts[:4], TEXT, Sampling(max_text=7, seed=seed))
    ]
    lengths = {len(text) for text in texts}  # a byte that is no UTF-8 is one character too
    assert max(lengths) == 7 and len(lengths) > 1


def test_guidance_of_one_is_no_guidance(tiny_model: MakeModel, prompts: list[Document]) -> None:
    model = tiny_model()
    for to in (TEXT, IMAGE):
        plain = generate(model, prompts, to, GREEDY)
        assert generate(model, prompts, to, replace(GREEDY, guidance=1.0)) == plain
        nearly = generate(model, prompts, to, replace(GREEDY, guidance=1.0 + 1e-6))
        assert nearly == plain, "the mixture of both passes is continuous in the weight"


def test_guidance_of_zero_does_not_see_the_prompt(tiny_model: MakeModel) -> None:
    model = tiny_model()
    prompts = [Document((Segment(text),)) for text in ("seven", "eight", "three")]
    answers = generate(model, prompts, IMAGE, replace(GREEDY, guidance=0.0))
    assert answers[0] == answers[1] == answers[2]
    assert len(set(generate(model, prompts, IMAGE, GREEDY))) > 1


def test_a_text_is_continued(tiny_model: MakeModel) -> None:
    """The continuation of a text and of its own beginning are one, so nothing is put between prompt and answer."""
    model = tiny_model()
    write_letters_only(model)
    tokens, _, _ = _prompt_tokens(model, Document((Segment("once"),)), TEXT)
    assert tokens.tolist() == [Vocabulary.BEGIN, Vocabulary.OPENERS[TEXT], *(Vocabulary.SPECIALS + b for b in b"once")]

    def continued(text: str, by: int) -> str:
        return generate(model, [Document((Segment(text),))], TEXT, replace(GREEDY, max_text=by))[0].text

    first, whole = continued("once", 4), continued("once", 10)
    assert len(whole) == 10 and whole.isascii() and len(set(whole)) > 2
    assert first + continued("once" + first, 6) == whole


def test_after_a_medium_a_text_is_opened(tiny_model: MakeModel, image: MakeSegment) -> None:
    tokens, places, hidden = _prompt_tokens(tiny_model(), Document((Segment("a"), image(0))), TEXT)
    assert tokens[-1] == Vocabulary.OPENERS[TEXT]
    assert places.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 0]
    null = Vocabulary.NULL
    assert hidden.tolist() == [Vocabulary.BEGIN, 2, null, 3, null, null, null, null, Vocabulary.OPENERS[TEXT]]


def test_a_modality_without_codec_is_refused(tiny_model: MakeModel, image: MakeSegment) -> None:
    model = FusedLanguageModel(LSTM(width=16, layers=1), ByteTokenizer())
    for to in (IMAGE, AUDIO):
        with pytest.raises(ValueError, match="codec"):
            generate(model, [Document((Segment("a"),))], to)
    with pytest.raises(ValueError, match="codec"):
        generate(model, [Document((image(0),))], TEXT)


def test_a_prompt_that_cannot_be_decoded_is_refused(tiny_model: MakeModel) -> None:
    for extension, reason in (("png", "undecodable_image"), ("wav", "undecodable_audio")):
        with pytest.raises(BadSample) as caught:
            generate(tiny_model(), [Document((Segment(b"nothing", extension),))], TEXT, GREEDY)
        assert caught.value.reason == reason


def test_a_model_in_training_stays_in_training(tiny_model: MakeModel) -> None:
    model = tiny_model().train()
    generate(model, [Document((Segment("a"),))], IMAGE, GREEDY)
    assert model.training
    model.eval()
    generate(model, [Document((Segment("a"),))], IMAGE, GREEDY)
    assert not model.training


def test_top_p_draws_among_the_most_likely_only() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in ((1.0, 4), (0.95, 4), (0.85, 3), (0.69, 2), (0.4, 1), (1e-6, 1)):
        drawn = _sample(logits, Sampling(top_p=top_p), generator).bincount(minlength=4)
        assert (drawn > 0).tolist() == [number < kept for number in range(4)]
    shares = _sample(logits, Sampling(temperature=0.5), generator).bincount() / 4000
    torch.testing.assert_close(shares, torch.tensor([16, 9, 4, 1]) / 30, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_text": 0}, {"max_seconds": 0.0}]
)
def test_values_that_cannot_be_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]
