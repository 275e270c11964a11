"""Segments to the tokens of a model, and its codes back to segments: laid out and encoded exactly as in training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pile_app.data.assembly import assemble, whole
from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Document, Segment
from pile_app.media import audio_size
from pile_app.model.fused import FusedLanguageModel
from pile_app.vocabulary import Vocabulary


def prompt_tokens(model: FusedLanguageModel, prompt: Document, to: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) tokens, (T,) image places, (T,) tokens with every segment hidden behind `<null>`; up to the opener of what is to be
    written, unless `to` is None or a text that is continued."""
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
        if to is not None and not continued:
            tokens = torch.cat([tokens, tokens.new_tensor([Vocabulary.OPENERS[to]])])
            places = torch.cat([places, places.new_zeros(1)])
        laid_out.append((tokens, places))
    return laid_out[0][0], laid_out[0][1], laid_out[1][0]


def segment_length(model: FusedLanguageModel, segment: Segment) -> int:
    """Tokens of a segment that is in no index, its opener and closing token included."""
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
    return replace(decode_codes(model, [values + first], segment.modality)[0], loss=segment.loss)


def decode_codes(model: FusedLanguageModel, codes: list[Tensor], to: int) -> list[Segment]:
    """Codes of each row back to text, an image file or a sound file."""
    if to == TEXT:
        return [Segment(model.tokenizer.decode((row - Vocabulary.SPECIALS).tolist())) for row in codes]
    if to == IMAGE:
        assert model.image_codec is not None
        images = model.image_codec.decode(torch.stack(codes)).cpu().numpy()
        return [Segment.from_image(np.moveaxis(image, 0, -1)) for image in images]
    assert model.audio_codec is not None
    rows = [row if len(row) else row.new_zeros(1) for row in codes]  # no sound is empty
    tokens = torch.tensor([len(row) for row in rows], device=codes[0].device)
    waveforms = model.audio_codec.decode(torch.cat(rows), tokens).cpu().split([len(row) for row in rows])
    return [Segment.from_audio(one.flatten().numpy(), model.vocabulary.sample_rate, "wav") for one in waveforms]
