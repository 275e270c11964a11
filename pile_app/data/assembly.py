"""Documents -> `Batch`: lay out the tokens of packs (see `vocabulary.py`) and decode their media.

The model's codecs fill in the codes of media. The tokens of an unusable document are masked, so nothing else moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pile_app.data.annotation import NO_LABEL, Annotator
from pile_app.data.batch import NOT_LEARNED, PADDING, Batch, allocate
from pile_app.data.index import segment_size
from pile_app.data.order import Piece
from pile_app.data.tokenizers import Tokenizer
from pile_app.data.transforms import Transforms
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, BadSample, Codes, Document, Segment
from pile_app.media import decode_audio, decode_image
from pile_app.vocabulary import Vocabulary


class PackedDocument(NamedTuple):
    """A piece of a document in a pack; condition dropout hides its first `dropped` segments behind `<null>`."""

    piece: Piece
    key: str
    document: Document | BadSample
    dropped: int = 0


def whole(document: Document, length: int, dropped: int = 0) -> PackedDocument:
    """Make a piece of the first `length` tokens of a document without a source, such as a prompt."""
    return PackedDocument(Piece(0, 0, 0, 0, length, True), document.key, document, dropped)


def assemble(
    packs: Sequence[Sequence[PackedDocument]],
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    context: int,
    numbers: Sequence[int] = (),
    normalizer: float = 0.0,
    source_tokens: Sequence[int] = (),
    *,
    decode: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
    annotator: Annotator | None = None,
    transforms: Mapping[int, Transforms] | None = None,
) -> Batch:
    """Assemble a batch with a row of `context` tokens for each pack. numbers: positions of the packs in the order, which
    `transforms` need; normalizer: 0 means the targets of these packs; decode: `map`, or an equivalent with several threads."""
    rows = _Rows(len(packs), context, vocabulary, tokenizer, annotator)
    for row, pack in enumerate(packs):
        rows.lay_out(row, pack, numbers[row] if numbers else 0, transforms or {})
    starts = np.cumsum([0, *(sound.codes for sound in rows.sounds)])  # of each sound in `audio`
    (channels, height, width), tables = vocabulary.image_shape, rows.tables()
    specs: dict[str, tuple[str, tuple[int, ...]]]
    specs = {name: ("uint8" if name == "learned" else "int32", table.shape) for name, table in tables.items()}
    specs["images"] = ("uint8", (len(rows.images), height, width, channels))
    specs["audio"] = ("float32", (int(starts[-1]), vocabulary.samples_per_token))
    arrays, buffer, layout, memory = allocate(specs | {"normalizer": ("float32", ())})
    samples = np.split(arrays["audio"], starts[1:-1]) if rows.sounds else []
    media = [*zip(rows.images, arrays["images"], strict=True), *zip(rows.sounds, samples, strict=True)]
    for _ in decode(rows.decode, media[::2] + media[1::2]) if media else ():  # into the arrays; half of each kind a thread
        pass

    if rows.rejected:  # remove their media
        tables = rows.tables()
        for name, some in (("images", rows.images), ("audio", rows.sounds)):
            lengths = [medium.codes if name == "audio" else 1 for medium in some]
            is_kept = np.array([medium.piece not in rows.rejected for medium in some], bool)
            tables[name] = arrays[name][np.repeat(is_kept, np.array(lengths, int))]
    np.subtract(tables.pop("tokens"), EMPTY, out=arrays["tokens"])
    for name, table in tables.items():
        arrays[name][: len(table)] = table
        kind, _, first = layout[name]
        layout[name] = (kind, table.shape, first)
    has = vocabulary.modalities
    text, image, audio = (int(np.count_nonzero(rows.learned == m)) if m in has else 0 for m in (TEXT, IMAGE, AUDIO))
    arrays["normalizer"][...] = normalizer or text + image + audio
    batch = Batch(buffer, layout, (text, image, audio), vocabulary.image_tokens, tables["audio_tokens"].tolist(), memory)
    batch.given_sound_tokens = [sound.codes for sound in rows.sounds if sound.is_given and sound.piece not in rows.rejected]
    batch.rejected = [rows.rejected[number] for number in sorted(rows.rejected)]
    batch.numbers, batch.source_tokens = list(numbers), list(source_tokens)
    batch.piece_lengths = np.diff(tables["piece_starts"])[tables["piece_sources"] != PADDING].tolist()
    if annotator is not None:
        batch.label_counts = np.add.reduceat((rows.labels != NO_LABEL).astype(int), rows.starts).tolist()
    batch.documents = [[(piece.source, key, piece.epoch, piece.start, piece.stop) for piece, key, *_ in pack] for pack in packs]
    return batch


class _Medium(NamedTuple):
    """An image or sound. piece: number of its piece; start: flat index of its first code; file: b"" if encoded; is_given: a
    reader reads it."""

    piece: int
    start: int
    file: bytes
    codes: int
    augment: Callable[[np.ndarray], np.ndarray] | None
    is_given: bool


EMPTY = -Vocabulary.SPECIALS  # id 0 in `_Rows.tokens`
WHOLE_TEXT = [EMPTY + token for token in (Vocabulary.BEGIN, Vocabulary.OPENERS[TEXT], Vocabulary.END)]


class _Rows:
    """Lay out the packs of a batch in flat arrays of rows * context tokens."""

    def __init__(
        self, rows: int, context: int, vocabulary: Vocabulary, tokenizer: Tokenizer, annotator: Annotator | None
    ) -> None:
        self.context, self.vocabulary, self.tokenizer, self.annotator = context, vocabulary, tokenizer, annotator
        self.tokens = np.full(rows * context, EMPTY, np.int32)  # relative to the first id of text: texts are only copied
        self.learned = np.full(rows * context, NOT_LEARNED, np.uint8)
        self.labels = np.full(rows * context if annotator else 0, NO_LABEL, np.int32)
        self.starts, self.sources = list[int](), list[int]()  # of pieces, by number, padding included
        self.pieces: dict[int, PackedDocument] = {}
        self.images, self.encoded_images, self.sounds = list[_Medium](), list[_Medium](), list[_Medium]()
        self.rejected: dict[int, tuple[int, str, str, str]] = {}

    def lay_out(self, row: int, pack: Sequence[PackedDocument], position: int, transforms: Mapping[int, Transforms]) -> None:
        offset, end = row * self.context, (row + 1) * self.context
        for index, packed in enumerate(pack):
            number, start, stop, source = len(self.starts), packed.piece.start, packed.piece.stop, packed.piece.source
            self.starts.append(offset)
            self.sources.append(source)
            self.pieces[number] = packed
            try:
                document, given = packed.document, transforms.get(source)
                if isinstance(document, BadSample):
                    raise document
                augment = partial(given, position=position, piece=index) if given else None
                spans, length = self._lay_out(number, offset, document, packed, augment)
                if self.annotator is not None:
                    labels = self.annotator.labels(document, spans, length, number, self.tokenizer)
                    self.labels[offset : offset + stop - start] = labels[start:stop]
                    if self.annotator.splits_segments:
                        firsts = [first for first, _ in (*spans, (length, length)) if start < first - 1 < stop]
                        self.starts += [offset + first - 1 - start for first in firsts]
                        self.sources += [source] * len(firsts)
            except BadSample as error:
                self._reject(number, error)
            offset += stop - start
        if offset < end:
            self.starts.append(offset)
            self.sources.append(PADDING)

    def tables(self) -> dict[str, np.ndarray]:
        """Return the arrays of the batch, without media, for the documents that are not rejected."""
        all_media = (self.images, self.encoded_images, self.sounds)
        images, encoded, sounds = ([medium for medium in media if medium.piece not in self.rejected] for media in all_media)
        lists = {"image_starts": [medium.start for medium in images + encoded], "piece_sources": self.sources}
        lists |= {"audio_starts": [sound.start for sound in sounds], "audio_tokens": [sound.codes for sound in sounds]}
        lists["piece_starts"] = [*self.starts, len(self.tokens)]
        lists["given_images"] = [number for number, image in enumerate(images) if image.is_given]
        tables = {name: np.array(values, np.int32) for name, values in lists.items()}
        is_given = np.repeat(np.array([sound.is_given for sound in sounds], bool), tables["audio_tokens"])
        tables["given_codes"] = is_given.nonzero()[0].astype(np.int32)
        for name in ("tokens", "learned", *(["labels"] if self.annotator else [])):
            tables[name] = getattr(self, name).reshape(-1, self.context)
        return tables

    def decode(self, medium_and_target: tuple[_Medium, np.ndarray]) -> None:
        """Decode an image into (height, width, channels) uint8, or a sound into (codes, samples_per_token) float32."""
        medium, target = medium_and_target
        try:
            if target.dtype == np.uint8:
                decode_image(medium.file, *self.vocabulary.image_shape, target, medium.augment)
                return
            waveform = decode_audio(medium.file, self.vocabulary.sample_rate)
            if self.vocabulary.audio_tokens(len(waveform), self.vocabulary.sample_rate) != medium.codes:
                raise BadSample("length", f"a sound has {len(waveform):,} samples, the index promises {medium.codes} codes")
            if medium.augment is not None:
                waveform = medium.augment(waveform)[: len(waveform)]
            flat = target.reshape(-1)
            flat[: len(waveform)] = waveform
            flat[len(waveform) :] = 0
        except BadSample as error:
            self._reject(medium.piece, error)

    def _reject(self, number: int, error: BadSample) -> None:
        if number in self.rejected:
            return
        piece, key, *_ = self.pieces[number]
        self.rejected[number] = (piece.source, key, error.reason, error.detail)
        span = slice(self.starts[number], self.starts[number] + piece.stop - piece.start)
        for array, empty in ((self.tokens, EMPTY), (self.learned, NOT_LEARNED), (self.labels, NO_LABEL)):
            array[span] = empty  # `labels` is empty without an objective
        self.sources[number] = PADDING

    def _lay_out(
        self, number: int, offset: int, document: Document, packed: PackedDocument, augment: Callable[..., np.ndarray] | None
    ) -> tuple[list[tuple[int, int]], int]:
        """Lay out a piece of a document from `offset` on and return ([first, stop) of the document's segments, its length)."""
        start, stop, vocabulary = packed.piece.start, packed.piece.stop, self.vocabulary
        shift = offset - start  # from the document's indices to flat indices
        tokens, learned = self.tokens, self.learned
        if len(document.segments) == 1 and not packed.dropped and self.annotator is None:
            segment = document.segments[0]
            if segment.ids is not None and segment.loss and (start, stop) == (0, len(segment.ids) + 3):
                # Fast path for whole texts, the most frequent documents; the code below is equivalent.
                end = offset + stop - 1
                tokens[offset], tokens[offset + 1], tokens[end] = WHOLE_TEXT
                tokens[offset + 2 : end] = segment.ids
                learned[offset:end] = TEXT
                return [], stop

        def mark(index: int, token: int) -> None:
            if start <= index < stop:
                tokens[index + shift] = EMPTY + token

        def put(first: int, ids: np.ndarray, base: int = 0) -> None:
            low, high = max(first, start), min(first + len(ids), stop)
            if low < high:
                tokens[low + shift : high + shift] = ids[low - first : high - first]
                if base:
                    tokens[low + shift : high + shift] += base

        def learn(first: int, end: int, modality: int) -> None:
            """Predict the tokens [first, end), if they and their predecessor are in this piece."""
            low, high = max(first, start + 1), min(end, stop)
            if low < high:
                learned[low - 1 + shift : high - 1 + shift] = modality

        mark(0, Vocabulary.BEGIN)
        length, spans = 1, list[tuple[int, int]]()
        for segment_number, segment in enumerate(document.segments):
            modality, opener, first = segment.modality, length, length + 1
            hidden = segment_number < packed.dropped
            mark(opener, Vocabulary.OPENERS[modality])
            codes, media = self._codes(segment, augment is not None)
            length = first + (codes if isinstance(codes, int) else len(codes))
            if not hidden and isinstance(codes, np.ndarray):
                put(first, codes, EMPTY + vocabulary.starts[modality])
            # Nothing that a reader has read is predicted. With labels to be learned, it reads all media.
            is_given = modality in vocabulary.reads and (self.annotator is not None or not segment.loss)
            if media is not None and not hidden and start <= first < stop:  # media are never cut
                change = partial(augment, segment=segment_number) if augment else None
                file = b"" if segment.is_encoded else segment.file
                media.append(_Medium(number, first + shift, file, length - first, change, is_given))
            if modality == AUDIO:
                if not hidden:
                    mark(length, vocabulary.audio_end)
                length += 1
            spans.append((first, length))
            if hidden:
                tokens[max(first, start) + shift : max(min(length, stop), start) + shift] = EMPTY + Vocabulary.NULL
            elif segment.loss:
                # The end of a segment without loss, and the opener after it, are learned by the segment after it.
                learn(opener, first, TEXT)
                if not is_given:
                    learn(first, length, modality)
        mark(length, Vocabulary.END)
        if document.segments[-1].loss:
            learn(length, length + 1, TEXT)
        if length + 1 < stop:
            raise BadSample("length", f"{packed.key!r} has {length + 1} tokens, the index promises at least {stop}")
        return spans, length + 1

    def _codes(self, segment: Segment, augmented: bool) -> tuple[np.ndarray | int, list[_Medium] | None]:
        """Return the ids of a segment, or the number of codes of a medium, and the list of its media if the model reads it."""
        vocabulary, modality = self.vocabulary, segment.modality
        if segment.ids is not None:
            return segment.ids, None
        if modality == TEXT and not segment.is_encoded:
            return self.tokenizer.encode(segment.text), None
        if modality not in vocabulary.modalities:
            name = MODALITIES[modality]
            raise BadSample(f"no_{name}_codec", f"the model has no {name} codec: set model.{name}, or remove the {name}s")
        encoded = segment.codes if segment.is_encoded else None
        count = vocabulary.image_tokens if encoded is None or modality != TEXT else len(encoded.values)
        if modality == AUDIO:
            size, rate = segment_size(segment) if encoded is None else (encoded.size, max(1, encoded.sample_rate))
            count = int(vocabulary.audio_tokens(size, rate))
        if encoded is None:
            return count, self.images if modality == IMAGE else self.sounds
        if encoded.is_lost:
            raise BadSample("checksum", "the sample was damaged before it was encoded")
        check_encoder(encoded, modality, vocabulary, self.tokenizer, augmented)
        if len(encoded.values) != count:
            raise BadSample("damaged_codes", f"{len(encoded.values)} codes, its size asks for {count}")
        size = (vocabulary.text_tokens, vocabulary.image_codes, vocabulary.audio_codes)[modality]
        if int(encoded.values.max(initial=0)) >= size:
            raise BadSample("damaged_codes", f"an id of {int(encoded.values.max())} is beyond the vocabulary")
        return encoded.values, self.encoded_images if modality == IMAGE else None


def check_encoder(codes: Codes, modality: int, vocabulary: Vocabulary, tokenizer: Tokenizer, augmented: bool = False) -> None:
    """Raise ValueError if an encoded segment was not made by the model's encoder, or its source has transforms."""
    encoder = (tokenizer.fingerprint, vocabulary.image_codec, vocabulary.audio_codec)[modality]
    fixes = {  # the first that applies
        "and transforms cannot augment codes: train on the original shards, or remove the transforms": augmented and modality,
        f"and model.readers.{MODALITIES[modality]} reads it itself: train on the original shards, or set it to null": modality
        in vocabulary.reads,
        "": codes.encoder == encoder,
        f"the model's tokenizer is {encoder}: set model.tokenizer to that tokenizer, or encode again": modality == TEXT,
        f"the model's codec is {encoder}: set model.codecs_from to the run that encoded, or encode again": encoder,
        "the model's codec is not frozen from the start: set model.codecs_from to the run that encoded them and "
        "model.codec_steps to 0, or train on the original shards": True,
    }
    if fix := next(message for message, applies in fixes.items() if applies):
        raise ValueError(f"the shards hold {MODALITIES[modality]} that was encoded by {codes.encoder}, {fix}")
