"""Generation: documents in, one more segment out, of any modality.

The prompt is laid out and encoded exactly as in training; then one token at a time is drawn from the softmax of the wanted
modality: an image takes its fixed number of codes, a sound runs until `<audio_end>`, a text until an opener or `<end>`. With
`guidance` w other than 1 a second pass sees the prompt's segments as `<null>` and the logits become `u + w (c - u)`
(classifier-free guidance, arXiv:2207.12598).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pile_app.data.assembly import assemble, whole
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, BadSample, Document, Segment, Vocabulary
from pile_app.model.backbones import Cache
from pile_app.model.fused import FusedLanguageModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draws among the most likely tokens that together have this probability (arXiv:1904.09751), 0 < top_p <= 1.
        guidance: weight of the prompt, 1 = as learned.
        max_text: most text tokens.
        max_seconds: longest sound.
        seed: of the draws; the same seed, prompts and batch give the same answer.
        use_cache: False computes everything anew for every token; slower, and the same greedy answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 1.0
    max_text: int = 256
    max_seconds: float = 10.0
    seed: int = 0
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature >= 0 and 0 < top_p <= 1, not {self.temperature} and {self.top_p}")
        if self.max_text < 1 or not self.max_seconds > 0:
            raise ValueError(f"max_text >= 1 and max_seconds > 0, not {self.max_text} and {self.max_seconds}")


@torch.no_grad()
def generate(
    model: FusedLanguageModel, prompts: Sequence[Document], to: int, sampling: Sampling | None = None
) -> list[Segment]:
    """One segment of modality `to` for each prompt. A text prompt that asks for text is continued.

    Raises:
        ValueError: the model does not know a modality.
        BadSample: a medium of a prompt cannot be decoded.
    """
    sampling = sampling or Sampling()
    for modality in (to, *(segment.modality for prompt in prompts for segment in prompt.segments)):
        if modality not in model.vocabulary.modalities:
            name = MODALITIES[modality]
            raise ValueError(f"the model has no {name} codec: it can neither read nor write {name}")
    was_training = model.training
    model.eval()
    groups: dict[int, list[int]] = defaultdict(list)  # prompts of one length run together, so that no row is padded
    rows = [_prompt_tokens(model, prompt, to) for prompt in prompts]
    for number, (tokens, _, _) in enumerate(rows):
        groups[len(tokens)].append(number)
    generator = torch.Generator(device=model.token_bytes.device).manual_seed(sampling.seed)
    segments: dict[int, Segment] = {}
    for numbers in groups.values():
        tokens, places, hidden = (torch.stack([rows[n][part] for n in numbers]) for part in range(3))
        codes = _draw(model, tokens, places, hidden, to, sampling, generator)
        segments.update(zip(numbers, _decode(model, codes, to), strict=True))
    model.train(was_training)
    return [segments[number] for number in range(len(prompts))]


def _prompt_tokens(model: FusedLanguageModel, prompt: Document, to: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) tokens, (T,) image places, (T,) tokens with every segment hidden behind `<null>`."""
    vocabulary, device = model.vocabulary, model.token_bytes.device
    continued = to == TEXT and bool(prompt.segments) and prompt.segments[-1].modality == TEXT
    laid_out = []
    for dropped in (0, len(prompt.segments)):
        if not prompt.segments:
            tokens, places = torch.tensor([Vocabulary.BEGIN], device=device), torch.zeros(1, dtype=torch.int64, device=device)
        else:
            length = 2 + sum(segment_length(model, segment) for segment in prompt.segments)
            batch = assemble([[whole(prompt, length - 1, dropped)]], vocabulary, model.tokenizer, length - 1)
            if batch.rejected:
                raise BadSample(*batch.rejected[0][2:])
            batch = batch.to(device)
            tokens, places = model.fill(batch)[0], model.image_places(batch)[0]
        if not continued:
            tokens = torch.cat([tokens, tokens.new_tensor([Vocabulary.OPENERS[to]])])
            places = torch.cat([places, places.new_zeros(1)])
        laid_out.append((tokens, places))
    return laid_out[0][0], laid_out[0][1], laid_out[1][0]


def segment_length(model: FusedLanguageModel, segment: Segment) -> int:
    """Tokens of a segment that is in no index, its opener and closing token included."""
    from pile_app.documents import audio_size

    if segment.is_encoded:
        return 1 + len(segment.codes.values) + (segment.modality == AUDIO)
    if segment.modality == TEXT:
        return model.vocabulary.segment_tokens(TEXT, len(model.tokenizer.encode(segment.text)))
    size, rate = audio_size(segment.file) if segment.modality == AUDIO else (0, 0)
    return model.vocabulary.segment_tokens(segment.modality, size, rate)


def plain(model: FusedLanguageModel, segment: Segment) -> Segment:
    """What an encoded segment stands for, by the model's tokenizer and codecs; any other as it is.

    Raises:
        BadSample: it stands for nothing.
    """
    if not segment.is_encoded:
        return segment
    codes = segment.codes
    if codes.is_lost:
        raise BadSample("checksum", "the sample was damaged before it was encoded")
    first = Vocabulary.SPECIALS if segment.modality == TEXT else 0
    values = torch.from_numpy(codes.values.astype(np.int64)).to(model.token_bytes.device)
    return replace(_decode(model, [values + first], segment.modality)[0], loss=segment.loss)


def _draw(
    model: FusedLanguageModel,
    tokens: Tensor,
    places: Tensor,
    hidden_prompt: Tensor,
    to: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> list[Tensor]:
    """Codes (ids within the modality's slice) drawn after each row of `tokens` (B, T)."""
    vocabulary = model.vocabulary
    first_id = vocabulary.slices[to].start
    stops, limit = _stops(vocabulary, to, sampling)
    guided = sampling.guidance != 1.0
    contexts = [(tokens, places)] + ([(hidden_prompt, torch.zeros_like(places))] if guided else [])
    caches = [model.backbone.new_cache() if sampling.use_cache else None for _ in contexts]
    drawn: list[Tensor] = []
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    lengths = torch.full((len(tokens),), limit, device=tokens.device)
    new = contexts
    for step in range(limit):
        logits = [_next_logits(model, *fed, cache, len(tokens[0]) + step, to) for fed, cache in zip(new, caches, strict=True)]
        mixed = logits[-1] + sampling.guidance * (logits[0] - logits[-1]) if guided else logits[0]
        if to == TEXT:
            mixed[:, [Vocabulary.BEGIN, Vocabulary.NULL]] = -torch.inf
        code = _sample(mixed, sampling, generator)
        drawn.append(code)
        ended = torch.isin(code, stops.to(code.device)) & ~done
        lengths[ended] = step
        done |= ended
        if bool(done.all()):
            break
        place = torch.full_like(code, step + 1 if to == IMAGE else 0)[:, None]
        token = (code + first_id)[:, None]
        contexts = [(torch.cat([t, token], 1), torch.cat([p, place], 1)) for t, p in contexts]
        new = [(token, place)] * len(contexts) if sampling.use_cache else contexts
    codes = torch.stack(drawn, 1)
    return [row[: int(length)] for row, length in zip(codes, lengths, strict=True)]


def _stops(vocabulary: Vocabulary, to: int, sampling: Sampling) -> tuple[Tensor, int]:
    """Codes that end a segment, and the most codes it may have."""
    if to == IMAGE:
        return torch.tensor([]), vocabulary.image_tokens
    if to == AUDIO:
        return torch.tensor([vocabulary.audio_codes]), max(1, int(sampling.max_seconds * vocabulary.audio_tokens_per_second))
    return torch.tensor([Vocabulary.END, *Vocabulary.OPENERS]), sampling.max_text


def _next_logits(
    model: FusedLanguageModel, tokens: Tensor, places: Tensor, cache: Cache | None, length: int, to: int
) -> Tensor:
    """(B, slice) logits of what follows; `length`: places so far, these included."""
    position = torch.arange(length - tokens.size(1), length, device=tokens.device).expand_as(tokens)
    hidden = model.hidden(tokens, places, torch.zeros_like(tokens), position, cache)
    return model.logits(hidden[:, -1], to)


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(B, V) logits -> (B,) drawn."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(beyond, 0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def _decode(model: FusedLanguageModel, codes: list[Tensor], to: int) -> list[Segment]:
    """Codes of each row back to text, an image file or a sound file."""
    if to == TEXT:
        return [Segment(model.tokenizer.decode((row - Vocabulary.SPECIALS).tolist())) for row in codes]
    if to == IMAGE:
        assert model.image_codec is not None
        images = model.image_codec.decode(torch.stack(codes)).cpu().numpy()
        return [Segment.from_image(np.moveaxis(image, 0, -1)) for image in images]
    assert model.audio_codec is not None
    tokens = torch.tensor([max(1, len(row)) for row in codes], device=codes[0].device)
    padded = torch.nn.utils.rnn.pad_sequence([row if len(row) else row.new_zeros(1) for row in codes], batch_first=True)
    waveforms = model.audio_codec.decode(padded, tokens).cpu().numpy()
    per_token = model.vocabulary.samples_per_token
    return [
        Segment.from_audio(waveform[: int(n) * per_token], model.vocabulary.sample_rate, "wav")
        for waveform, n in zip(waveforms, tokens, strict=True)
    ]
