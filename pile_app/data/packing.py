"""Packing: documents -> packs -> batches.

A pack is `context` tokens of whole documents. A document longer than that is cut, between segments where it can be and inside
a text where it must be, never inside an image or a sound. A piece that continues a text repeats the last token of the piece
before it, so that every text token and every code is predicted exactly once, whatever the context.

`assemble` lays out the tokens of one pack; places of media codes are left empty, for the model to fill (its codecs know the
codes). `collate` stacks packs into a `Batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Document, Vocabulary, decode_audio, decode_image

if TYPE_CHECKING:
    from pile_app.data.text import Tokenizer

PADDING = -1  # `Batch.document` of a place that holds nothing


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Bins of indices with `sum(lengths) <= capacity`: longest first, each into the fullest bin that takes it.

    O(n) with a bit set of the free room that occurs: bit r is set while some bin has r left.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a piece of {int(lengths.max())} tokens cannot stand in a pack of {capacity}")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    occurring = 0
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = occurring >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                occurring &= ~(1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        by_room[room - length].append(number)
        occurring |= 1 << (room - length)
    return [np.array(one) for one in bins]


def cut_document(segments: Sequence[tuple[int, int]], context: int) -> list[tuple[int, int]]:
    """Ranges [start, stop) of at most `context` tokens that a document is cut into.

    Args:
        segments: (modality, tokens with opener and closing token) of each segment; `<begin>` and `<end>` come on top.
        context: tokens of a pack.

    Raises:
        ValueError: an image or a sound alone is longer than the context.
    """
    pieces: list[tuple[int, int]] = []
    start, place = 0, 1
    for modality, tokens in segments:
        end = place + tokens
        if end > start + context and modality != TEXT:
            if tokens > context:
                raise ValueError(f"a medium of {tokens} tokens cannot stand in a context of {context}")
            pieces.append((start, place))
            start = place
        while end > start + context:
            stop = start + context
            pieces.append((start, stop))
            start = stop if stop == place else stop - 1
        place = end
    if place + 1 > start + context:
        pieces.append((start, place))
        if segments[-1][0] != TEXT:  # nothing but `<end>` is left, and nothing in sight to predict it from
            return pieces
        start = place - 1
    pieces.append((start, place + 1))
    return pieces


@dataclass
class Pack:
    """One assembled sequence of T = context places. K targets, N images, M sounds.

    tokens: (T,) int64, 0 where a code belongs; document: (T,) int32, number of the piece or -1; position: (T,) int32, place
    within the piece; source: (T,) uint8; targets: per modality (K,) places whose *next* token is to be predicted;
    image_slots: N arrays of places; audio_slots: M arrays of places; rejected: (source, key, reason, detail) of documents that
    could not be used and whose span is masked; keys: (source, key) of the documents.
    """

    tokens: np.ndarray
    document: np.ndarray
    position: np.ndarray
    source: np.ndarray
    targets: tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]
    images: list[np.ndarray] = field(default_factory=list)
    image_slots: list[np.ndarray] = field(default_factory=list)
    audio: list[np.ndarray] = field(default_factory=list)
    audio_slots: list[np.ndarray] = field(default_factory=list)
    rejected: list[tuple[int, str, str, str]] = field(default_factory=list)
    keys: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Batch:
    """What the model trains on. B packs of T places, N images, M sounds of at most S samples.

    tokens: (B, T) int64; document, position: (B, T) int32; source: (B, T) uint8; targets: per modality, (K,) int64 indices into
    the flattened (B * T) places whose next token is to be predicted; images: (N, C, height, width) uint8; image_slots:
    (N, codes) int64 flat places; audio: (M, S) float32; audio_tokens: (M,) int64 codes of each sound; audio_slots:
    (sum of audio_tokens,) int64 flat places; normalizer: () float32, targets of the whole optimizer step, over all ranks.
    """

    tokens: Tensor
    document: Tensor
    position: Tensor
    source: Tensor
    targets: tuple[Tensor, Tensor, Tensor]
    images: Tensor
    image_slots: Tensor
    audio: Tensor
    audio_tokens: Tensor
    audio_slots: Tensor
    normalizer: Tensor
    rejected: list[tuple[int, str, str, str]] = field(default_factory=list)
    keys: list[tuple[int, str]] = field(default_factory=list)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def one(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(function(tensor) for tensor in value)
            return function(value) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: one(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    @property
    def padding_share(self) -> float:
        return float((self.document == PADDING).float().mean())


def empty_pack(context: int) -> Pack:
    return Pack(
        np.zeros(context, np.int64),
        np.full(context, PADDING, np.int32),
        np.zeros(context, np.int32),
        np.zeros(context, np.uint8),
        ([], [], []),
    )


def assemble(
    pieces: Iterable[tuple[int, Document | BadSample, str, int, int, int]],
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    context: int,
) -> Pack:
    """Lays out the pieces one after another.

    Args:
        pieces: (source, document, key, start, stop, dropped) each; a `BadSample` in place of a document masks its span; the
            first `dropped` segments are hidden behind `<null>` (condition dropout).
        vocabulary: ids and lengths.
        tokenizer: of the text.
        context: T.
    """
    pack = empty_pack(context)
    offset = 0
    for number, (source, document, key, start, stop, dropped) in enumerate(pieces):
        span = slice(offset, offset + stop - start)
        if not isinstance(document, BadSample):
            try:
                layout = _Layout(document, vocabulary, tokenizer, start, stop, dropped)
                if layout.length < stop:
                    raise BadSample("length", f"{key!r} has {layout.length} tokens, the index promises at least {stop}")
                layout.place(pack, offset)
                pack.tokens[span] = layout.tokens[start:stop]
                pack.document[span] = number
                pack.position[span] = np.arange(stop - start)
                pack.source[span] = source
                pack.keys.append((source, key))
            except BadSample as error:
                document = error
        if isinstance(document, BadSample):
            pack.rejected.append((source, key, document.reason, document.detail))
        offset = span.stop
    return pack


class _Layout:
    """The tokens of one document and where its targets and media stand."""

    def __init__(
        self, document: Document, vocabulary: Vocabulary, tokenizer: Tokenizer, start: int, stop: int, dropped: int
    ) -> None:
        self.vocabulary = vocabulary
        self.start, self.stop = start, stop
        self.media: list[tuple[int, np.ndarray, int, int]] = []  # (modality, decoded, first place, codes)
        self.targets: tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]] = ([], [], [])
        parts: list[np.ndarray] = [np.array([Vocabulary.BEGIN])]
        self.length = 1
        for number, segment in enumerate(document.segments):
            first = self.length
            hidden = number < dropped
            opener = np.array([Vocabulary.OPENERS[segment.modality]])
            if segment.modality == TEXT:
                body = tokenizer.encode(segment.text).astype(np.int64) + vocabulary.starts[TEXT]
            elif segment.modality == IMAGE:
                body = self._image(segment.file, first + 1, hidden)
            else:
                body = self._audio(segment.file, first + 1, hidden)
            parts += [opener, np.full_like(body, Vocabulary.NULL) if hidden else body]
            self.length += 1 + len(body)
            if segment.loss and not hidden:
                # A given segment is not learned, but that it *ends* and what comes next is, by the segment after it.
                self._target(TEXT, first, first + 1)
                self._target(segment.modality, first + 1, self.length)
        parts.append(np.array([Vocabulary.END]))
        self.length += 1
        if document.segments[-1].loss:
            self._target(TEXT, self.length - 1, self.length)
        self.tokens = np.concatenate(parts)

    def _target(self, modality: int, first: int, stop: int) -> None:
        """Tokens [first, stop) of the document are to be predicted, as far as they and their predecessor are in this piece."""
        first, stop = max(first, self.start + 1), min(stop, self.stop)
        if first < stop:
            self.targets[modality].append(np.arange(first - 1, stop - 1))

    def _image(self, data: bytes, first: int, hidden: bool) -> np.ndarray:
        codes = self.vocabulary.image_tokens
        if not codes:
            raise BadSample("no_image_codec", "the model has no image codec: set model.image, or leave the images out")
        if not hidden and self.start <= first < self.stop:
            self.media.append((IMAGE, decode_image(data, *self.vocabulary.image_shape), first, codes))
        return np.zeros(codes, np.int64)

    def _audio(self, data: bytes, first: int, hidden: bool) -> np.ndarray:
        if not self.vocabulary.audio_codes:
            raise BadSample("no_audio_codec", "the model has no audio codec: set model.audio, or leave the sounds out")
        from pile_app.documents import audio_size

        codes = int(self.vocabulary.audio_tokens(*audio_size(data)))
        if not hidden and self.start <= first < self.stop:
            self.media.append((AUDIO, decode_audio(data, self.vocabulary.sample_rate), first, codes))
        return np.append(np.zeros(codes, np.int64), self.vocabulary.audio_end)

    def place(self, pack: Pack, offset: int) -> None:
        """Adds targets and media to `pack`, where this piece begins at `offset`."""
        shift = offset - self.start
        for modality, targets in enumerate(self.targets):
            pack.targets[modality].extend(places + shift for places in targets)
        for modality, decoded, first, codes in self.media:
            slots = np.arange(first, first + codes) + shift
            media, media_slots = (pack.images, pack.image_slots) if modality == IMAGE else (pack.audio, pack.audio_slots)
            media.append(decoded)
            media_slots.append(slots)


def collate(packs: Sequence[Pack], vocabulary: Vocabulary, normalizer: float = 0.0) -> Batch:
    """Stacks packs. `normalizer` 0 means: the targets of these packs."""
    context = len(packs[0].tokens)
    rows = [row * context for row in range(len(packs))]

    def flat(arrays: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays]))

    targets = tuple(
        flat(places + row for row, pack in zip(rows, packs, strict=True) for places in pack.targets[modality])
        for modality in range(3)
    )
    images = [image for pack in packs for image in pack.images]
    audio = [waveform for pack in packs for waveform in pack.audio]
    slots = [slot + row for row, pack in zip(rows, packs, strict=True) for slot in pack.image_slots]
    audio_slots = [slot + row for row, pack in zip(rows, packs, strict=True) for slot in pack.audio_slots]
    waveforms = np.zeros((len(audio), max((len(waveform) for waveform in audio), default=0)), np.float32)
    for waveform, row in zip(audio, waveforms, strict=True):
        row[: len(waveform)] = waveform
    image_shape = (0, *vocabulary.image_shape)
    return Batch(
        tokens=torch.from_numpy(np.stack([pack.tokens for pack in packs])),
        document=torch.from_numpy(np.stack([pack.document for pack in packs])),
        position=torch.from_numpy(np.stack([pack.position for pack in packs])),
        source=torch.from_numpy(np.stack([pack.source for pack in packs])),
        targets=targets,  # type: ignore[arg-type]
        images=torch.from_numpy(np.stack(images) if images else np.zeros(image_shape, np.uint8)),
        image_slots=torch.from_numpy(np.stack(slots) if slots else np.zeros((0, vocabulary.image_tokens), np.int64)),
        audio=torch.from_numpy(waveforms),
        audio_tokens=torch.tensor([len(slot) for slot in audio_slots], dtype=torch.int64),
        audio_slots=flat(audio_slots),
        normalizer=torch.tensor(normalizer or float(sum(len(index) for index in targets)), dtype=torch.float32),
        rejected=[one for pack in packs for one in pack.rejected],
        keys=[one for pack in packs for one in pack.keys],
    )
