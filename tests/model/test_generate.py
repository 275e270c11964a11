"""The promises of `model/generate.py`: any modality out of any, the cache and the batch change nothing, the seed decides."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pile_app.data.assembly import assemble, whole
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Codes, Document, Segment
from pile_app.media import audio_size, decode_image, image_size
from pile_app.model.backbones import LSTM
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Answer, Sampling, answer_prompts, generate, generate_document, guide, stream
from pile_app.model.score import choose, rolling_scores
from pile_app.model.segments import prompt_tokens
from pile_app.vocabulary import Vocabulary

MakeModel = Callable[..., FusedLanguageModel]
MakeSegment = Callable[..., Segment]
BACKBONES = ("transformer", "lstm", "rnn", "mingru")
GREEDY = Sampling(temperature=0, max_text=12, max_seconds=0.5)


@pytest.fixture
def prompts(image: MakeSegment, sound: MakeSegment) -> list[Document]:
    """Prompts of different and of equal lengths, and an empty prompt."""
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


@torch.no_grad()
def write_without_cache(model: FusedLanguageModel, prompt: Document, to: int, guidance: float, count: int) -> list[int]:
    """Write the greedy answer, recomputing the whole row for every code."""
    rows = [prompt_tokens(model, prompt, to, masked) for masked in (0, len(prompt.segments))]
    codes: list[int] = []
    ends = {TEXT: (Vocabulary.END, *Vocabulary.OPENERS), IMAGE: (), AUDIO: (model.vocabulary.audio_codes,)}[to]
    while len(codes) < count and not (codes and codes[-1] in ends):
        each = []
        for tokens, indices, features in rows:
            position = torch.arange(len(tokens))[None]
            features = None if features is None else F.pad(features, (0, 0, 0, len(tokens) - len(features)))[None]
            hidden = model.hidden(tokens[None], indices[None], torch.zeros_like(position), position, features=features)
            each.append(model.logits(hidden[:, -1], to))
        logits = guide(*each, guidance) if guidance != 1 else each[0]
        if to == TEXT:
            logits[:, [Vocabulary.BEGIN, Vocabulary.NULL]] = -torch.inf
        code = logits.argmax(-1)
        codes.append(int(code))
        index = torch.tensor([len(codes) if to == IMAGE else 0])
        rows = [(torch.cat([t, code + model.vocabulary.slices[to].start]), torch.cat([i, index]), f) for t, i, f in rows]
    return codes


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("to", [TEXT, IMAGE, AUDIO])
def test_the_cache_does_not_change_the_greedy_answer(
    tiny_model: MakeModel, prompts: list[Document], backbone: str, to: int
) -> None:
    model = tiny_model(backbone)
    found = {}
    for guidance in (1.0, 3.0):
        answers = answer_prompts(model, prompts, to, replace(GREEDY, guidance=guidance))
        count = {TEXT: 12, IMAGE: 4, AUDIO: 12}[to]
        codes = [answer.codes.tolist() for answer in answers]
        assert codes == [write_without_cache(model, prompt, to, guidance, count) for prompt in prompts]
        found[guidance] = [answer.log_probabilities.tolist() for answer in answers]
    assert len(set(map(str, found[1.0]))) > 1, "the prompt makes a difference"
    assert found[1.0] != found[3.0], "guidance makes a difference"


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
    """The same without the codec: take the most likely code at each position in turn."""
    model = tiny_model(backbone)
    vocabulary = model.vocabulary
    tokens, places, _ = prompt_tokens(model, Document((Segment("seven"),)), IMAGE)
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


def test_guidance_does_not_raise_what_is_implausible() -> None:
    """Probabilities of the digits' demo before a word: `<end>` is 2e-4 with the picture, 5e-11 without."""
    prompted, unprompted = torch.tensor([0.9, 0.0998, 2e-4, 1e-7]).log(), torch.tensor([0.1, 0.2, 5e-11, 0.7]).log()
    free = (2 * prompted - unprompted).softmax(-1)
    assert free[2] > 0.9, "without the constraint it would all but always be drawn"
    guided = guide(prompted, unprompted, 2.0).softmax(-1)
    assert guided[2] < 3e-4 and guided[3] < 1e-8, "implausible tokens are not raised, and may be lowered"
    assert guided[0] / guided[1] == pytest.approx(float(free[0] / free[1])), "plausible tokens keep their ratio"
    half = guide(prompted, unprompted, 0.5)
    torch.testing.assert_close(half, (prompted + unprompted) / 2, msg="below 1 nothing is held back")


def test_a_text_is_continued(tiny_model: MakeModel) -> None:
    """The continuation of a text and of its own beginning are one, so nothing is put between prompt and answer."""
    model = tiny_model()
    write_letters_only(model)
    tokens, *_ = prompt_tokens(model, Document((Segment("once"),)), TEXT)
    assert tokens.tolist() == [Vocabulary.BEGIN, Vocabulary.OPENERS[TEXT], *(Vocabulary.SPECIALS + b for b in b"once")]

    def continued(text: str, by: int) -> str:
        return generate(model, [Document((Segment(text),))], TEXT, replace(GREEDY, max_text=by))[0].text

    first, whole = continued("once", 4), continued("once", 10)
    assert len(whole) == 10 and whole.isascii() and len(set(whole)) > 2
    assert first + continued("once" + first, 6) == whole


def test_after_a_medium_a_text_is_opened(tiny_model: MakeModel, image: MakeSegment) -> None:
    prompt = Document((Segment("a"), image(0)))
    tokens, indices, _ = prompt_tokens(tiny_model(), prompt, TEXT)
    hidden, *_ = prompt_tokens(tiny_model(), prompt, TEXT, 2)
    assert tokens[-1] == Vocabulary.OPENERS[TEXT]
    assert indices.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 0]
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


@pytest.mark.parametrize("to", [TEXT, IMAGE, AUDIO])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(tiny_model: MakeModel, prompts: list[Document], to: int) -> None:
    """The answer to prompt n does not depend on the other prompts."""
    model = tiny_model()
    sampling = Sampling(max_text=12, max_seconds=0.5, seed=1, temperature=0.8, top_p=0.9)
    together = generate(model, prompts, to, sampling)
    others = [prompts[0], *[Document((Segment("x" * n),)) for n in range(1, 6)], prompts[6]]
    again = generate(model, others, to, sampling)
    assert same_media(together[0], again[0]) and same_media(together[6], again[6])
    assert generate(model, prompts[:1] * 2, to, sampling)[0] != generate(model, prompts[:1] * 2, to, sampling)[1]


def test_a_stream_is_the_text_that_generate_gives(tiny_model: MakeModel, prompts: list[Document]) -> None:
    model = tiny_model()
    write_letters_only(model)
    for sampling in (GREEDY, Sampling(max_text=40, seed=3), Sampling(max_text=40, guidance=2.0, stop=("e", "qu"))):
        *pieces, answer = stream(model, prompts[2], sampling)
        assert isinstance(answer, Answer) and "".join(pieces) == answer.segment.text  # type: ignore[arg-type]
        assert [answer.segment] == generate(model, [prompts[2]], TEXT, sampling)
        (whole_answer,) = answer_prompts(model, [prompts[2]], TEXT, sampling)
        assert torch.equal(answer.codes, whole_answer.codes) and answer.ended_by == whole_answer.ended_by
        torch.testing.assert_close(answer.log_probabilities, whole_answer.log_probabilities)


def test_a_text_ends_before_a_stop_string_whatever_the_batch(tiny_model: MakeModel, prompts: list[Document]) -> None:
    model = tiny_model()
    write_letters_only(model)
    free = generate(model, prompts, TEXT, Sampling(max_text=30, seed=2))
    stop = (free[0].text[3:5], free[3].text[7])
    stopped = answer_prompts(model, prompts, TEXT, Sampling(max_text=30, seed=2, stop=stop))
    for whole_text, answer in zip(free, stopped, strict=True):
        places = [whole_text.text.find(one) for one in stop if one in whole_text.text]
        assert answer.segment.text == whole_text.text[: min(places, default=None)]
        assert (answer.ended_by == "stop") == bool(places)
    assert sum(answer.ended_by == "stop" for answer in stopped) >= 2


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def next_scores(model: FusedLanguageModel, prompt: Document, text: str) -> torch.Tensor:
    """(1 + tokens, V) log-probabilities after a prompt and after every token of a text, without what is never drawn."""
    tokens, places, _ = prompt_tokens(model, prompt, TEXT)
    following = torch.tensor([Vocabulary.SPECIALS + byte for byte in text.encode()], dtype=torch.int64)
    places = torch.cat([places, torch.zeros_like(following)])
    tokens = torch.cat([tokens, following])[None]
    position = torch.arange(tokens.size(1))[None]
    logits = model.logits(model.hidden(tokens, places[None], 0 * position, position)[0, -1 - len(following) :], TEXT)
    logits[:, [Vocabulary.BEGIN, Vocabulary.NULL]] = -torch.inf
    return logits.log_softmax(-1)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_log_probabilities_are_those_of_the_finished_text(tiny_model: MakeModel, image: MakeSegment, backbone: str) -> None:
    """Token by token, what ended the text included."""
    model = prefer(tiny_model(backbone), {Vocabulary.SPECIALS + byte: 4.0 for byte in b"abcdef"} | {Vocabulary.END: 4.0})
    prompt = Document((image(0),))
    seeds = (answer_prompts(model, [prompt], TEXT, Sampling(seed=seed))[0] for seed in range(200))
    answer = next(
        one for one in seeds if one.codes[-1] == Vocabulary.END and len(one.segment.text) > 2 and one.segment.text.isascii()
    )
    scores = next_scores(model, prompt, answer.segment.text)
    torch.testing.assert_close(answer.log_probabilities, scores.gather(1, answer.codes[:, None]).squeeze(1), atol=1e-4, rtol=0)
    assert answer.ended_by == "model" and len(answer.codes) == len(answer.segment.text) + 1


def prefer(model: FusedLanguageModel, biases: dict[int, float]) -> FusedLanguageModel:
    """The model with these added to its text logits, by token."""
    logits = model.logits
    bias = torch.zeros(Vocabulary.SPECIALS + 256)
    bias[list(biases)] = torch.tensor(list(biases.values()))
    model.logits = lambda hidden, modality: logits(hidden, modality) + (bias if modality == TEXT else 0)  # type: ignore
    return model


def test_a_document_goes_on_with_segments_of_any_modality_until_its_end(tiny_model: MakeModel) -> None:
    model = prefer(tiny_model(), dict.fromkeys((Vocabulary.END, *Vocabulary.OPENERS), 4.0))
    seen, lengths = set(), set()
    for seed in range(12):
        sampling = Sampling(max_text=6, max_seconds=0.2, seed=seed)
        events = list(generate_document(model, Document((Segment("a"),)), sampling, most_segments=3))
        answers = [event for event in events if isinstance(event, Answer)]
        texts = [answer.segment.text for answer in answers if answer.segment.modality == TEXT]
        assert "".join(event for event in events if isinstance(event, str)) == "".join(texts) and all(texts)
        seen |= {answer.segment.modality for answer in answers}
        lengths.add(len(answers))
        for answer in answers:
            if answer.segment.modality == IMAGE:
                assert image_size(answer.segment.file) == (8, 8)
    assert seen == {TEXT, IMAGE, AUDIO} and max(lengths) <= 3 and len(lengths) > 1


def test_a_document_is_continued_as_if_its_segments_had_been_given(tiny_model: MakeModel) -> None:
    """Greedy: text written after two generated segments equals text written after them as a prompt."""
    model = prefer(tiny_model(), {Vocabulary.OPENERS[IMAGE]: 20.0})
    greedy = Sampling(temperature=0, max_text=6, max_seconds=0.2)
    first, second = generate_document(model, Document((Segment("a"),)), greedy, most_segments=2, continue_text=False)
    assert isinstance(first, Answer) and isinstance(second, Answer)
    assert [first.segment] == generate(model, [Document((Segment("a"),))], IMAGE, greedy)
    # The codes themselves are the prompt: a picture that is encoded again may get others.
    codes = Codes("00" * 16, 64, 0, first.codes.numpy())
    model.vocabulary = replace(model.vocabulary, image_codec="00" * 16)
    prompt = Document((Segment("a"), Segment(codes.to_bytes(), "imagecodes")))
    assert [second.segment] == generate(model, [prompt], IMAGE, greedy)


def test_a_complete_text_is_not_continued(tiny_model: MakeModel) -> None:
    """Only an opener or `<end>` can come, however much the model would rather go on with the text."""
    model = prefer(tiny_model(), {Vocabulary.SPECIALS + ord("a"): 20.0, Vocabulary.OPENERS[TEXT]: 10.0})
    prompt = Document((Segment("once"),))
    for continue_text, written in ((True, "aaa"), (False, "aaa")):
        *_, answer = generate_document(model, prompt, replace(GREEDY, max_text=3), continue_text=continue_text)
        assert isinstance(answer, Answer) and answer.segment.text == written
    prefer(model, {Vocabulary.END: 15.0})
    assert list(generate_document(model, prompt, replace(GREEDY, max_text=3), continue_text=False)) == []
    assert list(generate_document(model, prompt, replace(GREEDY, max_text=3), continue_text=True)) != []


def test_a_stop_string_ends_the_document(tiny_model: MakeModel) -> None:
    model = prefer(tiny_model(), {Vocabulary.SPECIALS + ord(letter): 8.0 for letter in "abcdefgh"})
    prompt = Document((Segment("once"),))
    text = generate(model, [prompt], TEXT, GREEDY)[0].text
    assert len(text) == 12
    cut = next(place for place in range(2, 10) if text[place : place + 2] not in text[: place + 1])
    *_, answer = generate_document(model, prompt, replace(GREEDY, stop=(text[cut : cut + 2],)))
    assert isinstance(answer, Answer) and answer.segment.text == text[:cut] and answer.ended_by == "stop"


def test_a_text_only_model_opens_no_image() -> None:
    torch.manual_seed(0)
    model = FusedLanguageModel(LSTM(width=16, layers=1), ByteTokenizer())
    for seed in range(5):
        for event in generate_document(model, Document((Segment("a"),)), Sampling(seed=seed), most_segments=20):
            assert isinstance(event, str) or event.segment.modality == TEXT


def test_generation_does_not_run_compiled_blocks(tiny_model: MakeModel, prompts: list[Document]) -> None:
    """A compiled block would be compiled again for each length; training still runs it."""

    def refuse(graph: object, inputs: object) -> None:
        raise AssertionError("compiled")

    model = tiny_model()
    expected = generate(model, prompts[:2], TEXT, GREEDY)
    model.backbone.is_compiled = True
    for block in model.backbone.blocks:  # type: ignore[union-attr]
        block.compile(backend=refuse)
    assert generate(model, prompts[:2], TEXT, GREEDY) == expected
    with pytest.raises(Exception, match="compiled"):
        model.backbone(torch.randn(1, 4, 32), torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None])


def test_generation_and_scoring_make_no_float64_on_the_device(
    tiny_model: MakeModel, prompts: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPS has none."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))  # type: ignore[operator]
            assert all(x.dtype != torch.float64 for x in tree_leaves(out) if isinstance(x, torch.Tensor)), func
            return out

    model = tiny_model("mingru")
    with NoFloat64():
        for to in (TEXT, IMAGE, AUDIO):
            generate(model, prompts[:3], to, replace(GREEDY, temperature=1, top_p=0.9, guidance=2.0))
        choose(model, prompts[:3], ["one", "two"], Sampling())
        rolling_scores(model, "a text", 4)
        model(assemble([[whole(Document((*prompts[2].segments,), "k"), 20)]], model.vocabulary, model.tokenizer, 20))
