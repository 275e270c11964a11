"""Documents to the tokens of a model, and codes back to segments: laid out and encoded exactly as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pile_app.data.assembly import assemble, whole
from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Document, Segment
from pile_app.media import audio_size
from pile_app.model.fused import FusedLanguageModel
from pile_app.vocabulary import Vocabulary


def is_continued(prompt: Document, to: int | None) -> bool:
    """Whether a new segment of modality `to` continues the last text of the prompt."""
    return to == TEXT and bool(prompt.segments) and prompt.segments[-1].modality == TEXT


def prompt_tokens(
    model: FusedLanguageModel, prompt: Document, to: int | None, masked_segments: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lay out a prompt: (T,) tokens, (T,) image indices (see `FusedLanguageModel.image_indices`), (T, embedding width) of
    `features`. Its media are given, unless only some of its segments are: those of a conversation's answers are not.

    `to`: modality whose opener follows, unless the last text is continued; None: no opener. `masked_segments`: so many segments
    become `<null>`, as with condition dropout in training. Raises BadSample if a medium cannot be decoded.
    """
    tokens = torch.tensor([Vocabulary.BEGIN], device=model.token_bytes.device)
    indices, features = torch.zeros_like(tokens), None
    if prompt.segments:
        if all(segment.loss for segment in prompt.segments):
            prompt = replace(prompt, segments=tuple(replace(segment, loss=False) for segment in prompt.segments))
        length = 1 + sum(segment_length(model, segment) for segment in prompt.segments)
        batch = assemble([[whole(prompt, length, masked_segments)]], model.vocabulary, model.tokenizer, length)
        if batch.rejected:
            raise BadSample(*batch.rejected[0][2:])
        batch = batch.to(tokens.device)
        tokens, indices, features = model.fill(batch)[0], model.image_indices(batch)[0], model.features(batch)
        features = None if features is None else features[0]
    if to is not None and not is_continued(prompt, to):
        tokens = torch.cat([tokens, tokens.new_tensor([Vocabulary.OPENERS[to]])])
        indices = torch.cat([indices, indices.new_zeros(1)])
    if features is not None:
        features = F.pad(features, (0, 0, 0, len(tokens) - len(features)))
    return tokens, indices, features


def segment_length(model: FusedLanguageModel, segment: Segment) -> int:
    """Count the tokens of a segment, including its opener and closing token."""
    if segment.is_encoded:
        return 1 + len(segment.codes.values) + (segment.modality == AUDIO)
    if segment.modality == TEXT:
        return model.vocabulary.segment_tokens(TEXT, len(model.tokenizer.encode(segment.text)))
    size, rate = audio_size(segment.file) if segment.modality == AUDIO else (0, 0)
    return model.vocabulary.segment_tokens(segment.modality, size, rate)


def plain(model: FusedLanguageModel, segment: Segment) -> Segment:
    """Decode an encoded segment with the model's tokenizer and codecs; return any other as it is. Raises BadSample if it was
    damaged before it was encoded."""
    if not segment.is_encoded:
        return segment
    if segment.codes.is_lost:
        raise BadSample("checksum", "the sample was damaged before it was encoded")
    first = Vocabulary.SPECIALS if segment.modality == TEXT else 0
    codes = (segment.codes.values.astype(np.int64) + first).tolist()
    return replace(decode_codes(model, [codes], segment.modality)[0], loss=segment.loss)


def decode_codes(model: FusedLanguageModel, rows: Sequence[Sequence[int]], to: int) -> list[Segment]:
    """Decode codes (ids within the modality's slice of the vocabulary) to texts, PNG images or WAV sounds."""
    device = model.token_bytes.device
    if to == TEXT:
        return [Segment(model.tokenizer.decode([code - Vocabulary.SPECIALS for code in row])) for row in rows]
    if to == IMAGE:
        assert model.image_codec is not None
        images = model.image_codec.decode(torch.tensor(rows, device=device)).cpu().numpy()
        return [Segment.from_image(np.moveaxis(image, 0, -1)) for image in images]
    assert model.audio_codec is not None
    codes = model.vocabulary.audio_codes
    one_frame = range(0, codes, codes // model.vocabulary.audio_codebooks)
    rows = [list(row) or list(one_frame) for row in rows]  # no sound is empty
    lengths = [len(row) for row in rows]
    flat = torch.tensor([code for row in rows for code in row], device=device)
    sounds = model.audio_codec.decode(flat, torch.tensor(lengths, device=device)).cpu().split(lengths)
    return [Segment.from_audio(sound.flatten().numpy(), model.vocabulary.sample_rate, "wav") for sound in sounds]
