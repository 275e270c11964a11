"""Packing: documents -> packs -> batches.

A pack is `context` tokens of whole documents. A document longer than that is cut, between segments or at the end of a sentence
where it can be, inside a text where it must be, never inside an image or a sound. A
piece that continues a text repeats the last token of the piece before it, so that every text token and every code is predicted
exactly once, whatever the context.

`assemble` lays out the tokens of one pack; places of media codes are left empty, for the model to fill (its codecs know the
codes). `collate` stacks packs into a `Batch`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.data import transport
from pile_app.documents import (
    AUDIO,
    IMAGE,
    MODALITIES,
    TEXT,
    BadSample,
    Codes,
    Document,
    Segment,
    Vocabulary,
    audio_size,
    decode_audio,
    decode_image,
)

if TYPE_CHECKING:  # torch takes seconds to import, and planning needs none of it
    import torch
    from torch import Tensor

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


def cut_document(
    segments: Sequence[tuple[int, int]], context: int, breaks: Sequence[int] | np.ndarray = ()
) -> list[tuple[int, int]]:
    """Ranges [start, stop) of at most `context` tokens that a document is cut into.

    A cut falls on the last place that is good for one, between segments or at a break, unless that wastes more than a 32nd of
    the context: then a text is cut where the context ends.

    Args:
        segments: (modality, tokens with opener and closing token) of each segment; `<begin>` and `<end>` come on top.
        context: tokens of a pack.
        breaks: places in the document, in tokens, where a sentence ends; increasing.

    Raises:
        ValueError: an image or a sound alone is longer than the context.
    """
    openers = list(accumulate((tokens for _, tokens in segments), initial=1))  # places of the openers, then of `<end>`
    longest = max((tokens for modality, tokens in segments if modality != TEXT), default=0)
    if longest > context:
        raise ValueError(f"a medium of {longest} tokens cannot stand in a context of {context}")
    borders = set(openers)
    good = sorted(borders.union(map(int, breaks))) if len(breaks) else openers
    length = openers[-1] + 1
    pieces: list[tuple[int, int]] = []
    start = 0
    while length > start + context:
        limit = start + context
        segment = bisect_right(openers, limit) - 1
        cut = good[bisect_right(good, limit) - 1]
        if segments[min(segment, len(segments) - 1)][0] != TEXT and openers[segment] != limit:
            cut = openers[segment]  # never inside an image or a sound
        elif limit - cut > context / 32:
            cut = limit
        if cut > 1:  # not `<begin>` alone
            pieces.append((start, cut))
        if cut == openers[-1] and segments[-1][0] != TEXT:
            return pieces  # nothing but `<end>` is left, and nothing in sight to predict it from
        # A piece that goes on inside a text, or with its `<end>`, repeats the token before, to predict from.
        start = cut if cut in borders and cut != openers[-1] else cut - 1
    pieces.append((start, length))
    return pieces


@dataclass
class Pack:
    """One assembled sequence of T = context places. K targets, N images, M sounds.

    tokens: (T,) int64, 0 where a code belongs; document: (T,) int32, number of the piece or -1; position: (T,) int32, place
    within the piece; source: (T,) uint8; targets: per modality (K,) places whose *next* token is to be predicted;
    image_slots: N arrays of places; audio_slots: M arrays of places; encoded_image_slots: places of images whose codes stand in
    `tokens` already; rejected: (source, key, reason, detail) of documents that
    could not be used and whose span is masked; number: its position; documents: (source, key, epoch, start,
    stop) of the pieces that are planned to stand here.
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
    encoded_image_slots: list[np.ndarray] = field(default_factory=list)
    rejected: list[tuple[int, str, str, str]] = field(default_factory=list)
    number: int = 0
    documents: list[tuple[int, str, int, int, int]] = field(default_factory=list)


@dataclass
class Batch:
    """What the model trains on. B packs of T places, N images, M sounds of at most S samples.

    tokens: (B, T) int64; document, position: (B, T) int32; source: (B, T) uint8; targets: per modality, (K,) int64 indices into
    the flattened (B * T) places whose next token is to be predicted; images: (N, C, height, width) uint8; image_slots:
    (N + E, codes) int64 flat places, last those of the E images that came encoded; audio: (M, S) float32; audio_tokens: (M,)
    int64 codes of each sound; audio_slots:
    (sum of audio_tokens,) int64 flat places; normalizer: () float32, targets of the whole optimizer step, over all ranks;
    rejected: as in `Pack`; numbers: positions of the packs in the order; documents: of each pack; source_tokens: planned tokens
    of each source in the whole optimizer step, over all ranks.

    All tensors are views of one `buffer`, so a batch goes from process to process, and to the device, in one piece.
    """

    buffer: Tensor  # uint8
    layout: dict[str, tuple[str, tuple[int, ...], int]]  # of the tensors in it: type, shape, first byte
    memory: transport.Memory | None = None  # that the buffer lies in, where a loading worker made it
    rejected: list[tuple[int, str, str, str]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    documents: list[list[tuple[int, str, int, int, int]]] = field(default_factory=list)
    source_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._make_views()

    def _make_views(self) -> None:
        import torch

        views = {}
        for name, (kind, shape, first) in self.layout.items():
            dtype: torch.dtype = getattr(torch, kind)
            stop = first + math.prod(shape) * dtype.itemsize
            views[name] = self.buffer[first:stop].view(dtype).view(shape)
        self.tokens: Tensor = views["tokens"]
        self.document: Tensor = views["document"]
        self.position: Tensor = views["position"]
        self.source: Tensor = views["source"]
        self.targets: tuple[Tensor, Tensor, Tensor] = (views["text"], views["image"], views["audio"])
        self.images: Tensor = views["images"].permute(0, 3, 1, 2)  # pixels come from decoders with channels last
        self.image_slots: Tensor = views["image_slots"]
        self.audio: Tensor = views["waveforms"]
        self.audio_tokens: Tensor = views["audio_tokens"]
        self.audio_slots: Tensor = views["audio_slots"]
        self.normalizer: Tensor = views["normalizer"]

    def __getstate__(self) -> dict[str, Any]:
        state = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.memory is not None:
            state |= {"memory": None, "buffer": self.memory.reference(len(self.buffer))}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        import torch

        if isinstance(state["buffer"], tuple):
            state["buffer"] = torch.from_numpy(transport.receive(state["buffer"]))
        self.__dict__.update(state)
        self._make_views()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking), memory=None)

    def pin_memory(self) -> Batch:
        return replace(self, buffer=self.buffer.pin_memory(), memory=None)

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
        self.media: list[tuple[int, np.ndarray | None, int, int]] = []  # (modality, decoded or encoded, first place, codes)
        self.targets: tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]] = ([], [], [])
        parts: list[np.ndarray] = [np.array([Vocabulary.BEGIN])]
        self.length = 1
        for number, segment in enumerate(document.segments):
            first = self.length
            hidden = number < dropped
            opener = np.array([Vocabulary.OPENERS[segment.modality]])
            if segment.is_encoded:
                body = self._encoded(segment, tokenizer, first + 1, hidden)
            elif segment.modality == TEXT:
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

    def _encoded(self, segment: Segment, tokenizer: Tokenizer, first: int, hidden: bool) -> np.ndarray:
        """The ids of an encoded segment: nothing is left for the codec to do."""
        codes, modality, vocabulary = segment.codes, segment.modality, self.vocabulary
        if codes.is_lost:
            raise BadSample("checksum", "the sample was damaged before it was encoded")
        check_encoder(codes, modality, vocabulary, tokenizer)
        ids = codes.values.astype(np.int64) + vocabulary.starts[modality]
        promised = {
            TEXT: lambda: len(ids),
            IMAGE: lambda: vocabulary.image_tokens,
            AUDIO: lambda: int(vocabulary.audio_tokens(codes.size, max(1, codes.sample_rate))),
        }[modality]()
        if len(ids) != promised:
            raise BadSample("damaged_codes", f"{len(ids)} codes, its size asks for {promised}")
        limit = vocabulary.audio_end if modality == AUDIO else vocabulary.slices[modality].stop
        if len(ids) and int(ids.max()) >= limit:
            raise BadSample("damaged_codes", f"an id of {int(codes.values.max())} is beyond the vocabulary")
        if modality == IMAGE and not hidden and self.start <= first < self.stop:
            self.media.append((IMAGE, None, first, len(ids)))
        return np.append(ids, vocabulary.audio_end) if modality == AUDIO else ids

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
        if not hidden and self.start <= first < self.stop:
            waveform = decode_audio(data, self.vocabulary.sample_rate)
            codes = -(-len(waveform) // self.vocabulary.samples_per_token)
            self.media.append((AUDIO, waveform, first, codes))
        else:
            codes = int(self.vocabulary.audio_tokens(*audio_size(data)))
        return np.append(np.zeros(codes, np.int64), self.vocabulary.audio_end)

    def place(self, pack: Pack, offset: int) -> None:
        """Adds targets and media to `pack`, where this piece begins at `offset`."""
        shift = offset - self.start
        for modality, targets in enumerate(self.targets):
            pack.targets[modality].extend(places + shift for places in targets)
        for modality, decoded, first, codes in self.media:
            slots = np.arange(first, first + codes) + shift
            if decoded is None:
                pack.encoded_image_slots.append(slots)
                continue
            media, media_slots = (pack.images, pack.image_slots) if modality == IMAGE else (pack.audio, pack.audio_slots)
            media.append(decoded)
            media_slots.append(slots)


def check_encoder(codes: Codes, modality: int, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """Raises ValueError where an encoded segment was not made by the encoder of the model."""
    encoder = (tokenizer.fingerprint, vocabulary.image_codec, vocabulary.audio_codec)[modality]
    if codes.encoder == encoder:
        return
    what = f"the shards hold {MODALITIES[modality]} that was encoded by {codes.encoder}, "
    if modality == TEXT:
        raise ValueError(f"{what}the model's tokenizer is {encoder}: set model.tokenizer to that one, or encode them anew")
    if not encoder:
        raise ValueError(
            f"{what}the model's codec is not frozen from the start: set model.codecs_from to the run that encoded them and "
            "model.codec_steps to 0, or train on the shards that they were encoded from"
        )
    raise ValueError(
        f"{what}the model's codec is {encoder}: set model.codecs_from to the run that encoded them, or encode them anew"
    )


def collate(packs: Sequence[Pack], vocabulary: Vocabulary, normalizer: float = 0.0, source_tokens: Sequence[int] = ()) -> Batch:
    """Stacks packs. `normalizer` 0 means: the targets of these packs."""
    context = len(packs[0].tokens)
    rows = [row * context for row in range(len(packs))]
    targets = [
        [places + row for row, pack in zip(rows, packs, strict=True) for places in pack.targets[modality]]
        for modality in range(3)
    ]
    images = [image.transpose(1, 2, 0) for pack in packs for image in pack.images]
    audio = [waveform for pack in packs for waveform in pack.audio]
    slots = [slot + row for row, pack in zip(rows, packs, strict=True) for slot in pack.image_slots]
    slots += [slot + row for row, pack in zip(rows, packs, strict=True) for slot in pack.encoded_image_slots]
    audio_slots = [slot + row for row, pack in zip(rows, packs, strict=True) for slot in pack.audio_slots]
    channels, height, width = vocabulary.image_shape
    total = normalizer or float(sum(len(places) for one in targets for places in one))
    places = (len(packs), context)
    # Name -> (type, shape, arrays that fill it one row after the other, or one after the other).
    parts: dict[str, tuple[str, tuple[int, ...], Sequence[np.ndarray]]] = {
        "tokens": ("int64", places, [pack.tokens for pack in packs]),
        "document": ("int32", places, [pack.document for pack in packs]),
        "position": ("int32", places, [pack.position for pack in packs]),
        "source": ("uint8", places, [pack.source for pack in packs]),
        "images": ("uint8", (len(images), height, width, channels), images),
        "image_slots": ("int64", (len(slots), vocabulary.image_tokens), slots),
        "waveforms": ("float32", (len(audio), max(map(len, audio), default=0)), audio),
        "audio_tokens": ("int64", (len(audio),), [np.array([len(slot) for slot in audio_slots], np.int64)]),
        "audio_slots": ("int64", (sum(map(len, audio_slots)),), audio_slots),
        "normalizer": ("float32", (), [np.array([total], np.float32)]),
    }
    for modality, name in enumerate(MODALITIES):
        parts[name] = ("int64", (sum(map(len, targets[modality])),), targets[modality])
    buffer, layout, memory = _lay_out(parts)
    return Batch(
        buffer,
        layout,
        memory,
        rejected=[one for pack in packs for one in pack.rejected],
        numbers=[pack.number for pack in packs],
        documents=[pack.documents for pack in packs],
        source_tokens=list(source_tokens),
    )


def _lay_out(
    parts: Mapping[str, tuple[str, tuple[int, ...], Sequence[np.ndarray]]],
) -> tuple[Tensor, dict[str, tuple[str, tuple[int, ...], int]], transport.Memory | None]:
    """(buffer, layout, memory) of a `Batch`."""
    import torch
    from torch.utils.data import get_worker_info

    layout: dict[str, tuple[str, tuple[int, ...], int]] = {}
    size = 0
    for name, (kind, shape, _) in parts.items():
        layout[name] = (kind, shape, size)
        size += -(-math.prod(shape) * np.dtype(kind).itemsize // 64) * 64
    memory = transport.take(size) if transport.IS_POSSIBLE and get_worker_info() is not None else None
    whole = np.empty(size, np.uint8) if memory is None else memory.data(size)
    for name, (kind, shape, arrays) in parts.items():
        first = layout[name][2]
        flat = whole[first : first + math.prod(shape) * np.dtype(kind).itemsize].view(kind)
        if len(shape) > 1:
            for row, array in zip(flat.reshape(shape), arrays, strict=True):
                row[: len(array)] = array
                row[len(array) :] = 0
        elif arrays:
            np.concatenate(arrays, out=flat, casting="same_kind")
    return torch.from_numpy(whole), layout, memory
