"""Documents -> `Batch`: the tokens of packs are laid out, media decoded.

    <begin> <text> b y t e s <image> c c c c <audio> a a a a a <audio_end> <end>

Places of media codes are left empty, for the model to fill (its codecs know the codes). A document that cannot be used leaves
its span masked, so that nothing else moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pile_app.data.annotation import NO_LABEL, Annotator
from pile_app.data.batch import NOT_LEARNED, PADDING, Batch, allocate
from pile_app.data.index import segment_size
from pile_app.data.order import Piece
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, BadSample, Codes, Document, Segment
from pile_app.media import decode_audio, decode_image
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer


class PackedDocument(NamedTuple):
    """A piece of a document as it stands in a pack: segments in the order they are seen in, the first `dropped` hidden behind
    `<null>` (condition dropout). `document` is a `BadSample` where it could not be read."""

    piece: Piece
    key: str
    document: Document | BadSample
    dropped: int = 0


def whole(document: Document, length: int, dropped: int = 0) -> PackedDocument:
    """A document of no source, such as a prompt, from its first token up to `length`."""
    return PackedDocument(Piece(0, 0, 0, 0, length, True), document.key, document, dropped)


def assemble(
    packs: Sequence[Sequence[PackedDocument]],
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    context: int,
    *,
    numbers: Sequence[int] = (),
    normalizer: float = 0.0,
    source_tokens: Sequence[int] = (),
    decode: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
    annotator: Annotator | None = None,
) -> Batch:
    """The batch of some packs, each a row.

    Args:
        packs: pieces of documents, one after the other, at most `context` tokens in each pack.
        vocabulary: ids and lengths.
        tokenizer: of the text.
        context: T.
        numbers: positions of the packs in the order.
        normalizer: see `Batch`; 0: the targets of these packs.
        source_tokens: see `Batch`.
        decode: `map`, or what does the same in several threads.
        annotator: of an objective.

    Raises:
        ValueError: a segment was encoded by another encoder than the model's.
    """
    rows = _Rows(len(packs), context, vocabulary, tokenizer, annotator)
    for row, pack in enumerate(packs):
        rows.lay_out(row, pack)
    waveforms = list(decode(rows.decode_sound, rows.sounds)) if rows.sounds else []
    channels, height, width = vocabulary.image_shape
    arrays, buffer, layout, memory = allocate(
        {
            "images": ("uint8", (len(rows.images), height, width, channels)),
            "image_starts": ("int32", (len(rows.images) + len(rows.encoded_images),)),
            "audio": ("float32", (len(waveforms), max(map(len, waveforms), default=0))),
            "audio_starts": ("int32", (len(waveforms),)),
            "audio_tokens": ("int32", (len(waveforms),)),
            "tokens": ("int32", (len(packs), context)),
            "learned": ("uint8", (len(packs), context)),
            "piece_starts": ("int32", (len(rows.starts) + 1,)),
            "piece_sources": ("int32", (len(rows.starts),)),
            "normalizer": ("float32", ()),
        }
        | ({"labels": ("int32", (len(packs), context))} if annotator else {})
    )
    pixels = list(zip(rows.images, arrays["images"], strict=True))  # decoded in place
    for _ in decode(rows.decode_image, pixels) if pixels else ():
        pass

    # The media of a piece that was rejected go, and what follows moves up.
    images, encoded, sounds = (rows.usable(media) for media in (rows.images, rows.encoded_images, rows.sounds))
    for place, number in enumerate(images):
        if place != number:
            arrays["images"][place] = arrays["images"][number]
    image_starts = [rows.images[number].place for number in images] + [rows.encoded_images[number].place for number in encoded]
    arrays["image_starts"][: len(image_starts)] = image_starts
    for place, number in enumerate(sounds):
        waveform, row = waveforms[number], arrays["audio"][place]
        row[: len(waveform)] = waveform
        row[len(waveform) :] = 0
        arrays["audio_starts"][place] = rows.sounds[number].place
        arrays["audio_tokens"][place] = rows.sounds[number].codes
    left = {"images": images, "image_starts": image_starts} | dict.fromkeys(("audio", "audio_starts", "audio_tokens"), sounds)
    for name, media in left.items():
        kind, shape, first = layout[name]
        layout[name] = (kind, (len(media), *shape[1:]), first)

    arrays["tokens"][:] = rows.tokens.reshape(-1, context)
    arrays["learned"][:] = rows.learned.reshape(-1, context)
    if annotator is not None:
        arrays["labels"][:] = rows.labels.reshape(-1, context)
    arrays["piece_starts"][:] = [*rows.starts, len(rows.tokens)]
    arrays["piece_sources"][:] = rows.sources
    text, image, audio = (int(np.count_nonzero(rows.learned == modality)) for modality in (TEXT, IMAGE, AUDIO))
    arrays["normalizer"][...] = normalizer or text + image + audio
    return Batch(
        buffer,
        layout,
        (text, image, audio),
        vocabulary.image_tokens,
        sum(rows.sounds[number].codes for number in sounds),
        memory,
        rejected=[rows.rejected[number] for number in sorted(rows.rejected)],
        numbers=list(numbers),
        documents=[[(one.source, key, one.epoch, one.start, one.stop) for one, key, *_ in pack] for pack in packs],
        source_tokens=list(source_tokens),
    )


class _Medium(NamedTuple):
    """An image or a sound. piece: number of its piece; place: flat, of its first code; file: b"" where its codes are known;
    codes: how many."""

    piece: int
    place: int
    file: bytes
    codes: int


class _Rows:
    """The packs of a batch as they are laid out, in flat arrays of rows x context places."""

    def __init__(
        self, rows: int, context: int, vocabulary: Vocabulary, tokenizer: Tokenizer, annotator: Annotator | None
    ) -> None:
        self.annotator = annotator
        self.labels = np.full(rows * context if annotator else 0, NO_LABEL, np.int32)
        self.context = context
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.tokens = np.zeros(rows * context, np.int32)
        self.learned = np.full(rows * context, NOT_LEARNED, np.uint8)
        self.starts: list[int] = []  # of pieces, by number, padding included
        self.sources: list[int] = []
        self.pieces: dict[int, PackedDocument] = {}
        self.images: list[_Medium] = []
        self.encoded_images: list[_Medium] = []
        self.sounds: list[_Medium] = []
        self.rejected: dict[int, tuple[int, str, str, str]] = {}

    def lay_out(self, row: int, pack: Sequence[PackedDocument]) -> None:
        place, stop = row * self.context, (row + 1) * self.context
        for one in pack:
            number = len(self.starts)
            self.starts.append(place)
            self.sources.append(one.piece.source)
            self.pieces[number] = one
            try:
                if isinstance(one.document, BadSample):
                    raise one.document
                spans, length = self._lay_out(number, place, one.document, one)
                if self.annotator is not None:
                    self._annotate(number, place, one.document, one, spans, length)
            except BadSample as error:
                self._reject(number, error)
            place += one.piece.stop - one.piece.start
        if place < stop:
            self.starts.append(place)
            self.sources.append(PADDING)

    def _annotate(
        self, number: int, place: int, document: Document, one: PackedDocument, spans: list[tuple[int, int]], length: int
    ) -> None:
        assert self.annotator is not None
        labels = self.annotator.labels(document, spans, length, number, self.tokenizer)
        start, stop = one.piece.start, one.piece.stop
        self.labels[place : place + stop - start] = labels[start:stop]
        if self.annotator.splits_segments:
            cuts = [first - 1 for first, _ in spans] + [length - 1]
            inside = [place + cut - start for cut in cuts if start < cut < stop]
            self.starts += inside
            self.sources += [one.piece.source] * len(inside)

    def usable(self, media: list[_Medium]) -> list[int]:
        """Numbers of those whose piece was not rejected."""
        return [number for number, medium in enumerate(media) if medium.piece not in self.rejected]

    def decode_sound(self, medium: _Medium) -> np.ndarray:
        """(samples,) float32, none where it cannot be used."""
        try:
            waveform = decode_audio(medium.file, self.vocabulary.sample_rate)
            if -(-len(waveform) // self.vocabulary.samples_per_token) != medium.codes:
                raise BadSample("length", f"a sound has {len(waveform):,} samples, the index promises {medium.codes} codes")
        except BadSample as error:
            self._reject(medium.piece, error)
            return np.zeros(0, np.float32)
        return waveform

    def decode_image(self, medium_and_place: tuple[_Medium, np.ndarray]) -> None:
        medium, place = medium_and_place
        try:
            decode_image(medium.file, *self.vocabulary.image_shape, out=place)
        except BadSample as error:
            self._reject(medium.piece, error)

    def _reject(self, number: int, error: BadSample) -> None:
        if number in self.rejected:
            return
        piece, key, *_ = self.pieces[number]
        self.rejected[number] = (piece.source, key, error.reason, error.detail)
        span = slice(self.starts[number], self.starts[number] + piece.stop - piece.start)
        self.tokens[span] = 0
        self.learned[span] = NOT_LEARNED
        if self.annotator is not None:
            self.labels[span] = NO_LABEL
        self.sources[number] = PADDING

    def _lay_out(self, number: int, place: int, document: Document, one: PackedDocument) -> tuple[list[tuple[int, int]], int]:
        """The tokens [start, stop) of a document, from `place` on. Returns [first, stop) of its segments, and its length."""
        start, stop, vocabulary = one.piece.start, one.piece.stop, self.vocabulary
        shift = place - start  # from places of the document to flat ones
        tokens, learned = self.tokens, self.learned
        if len(document.segments) == 1 and not one.dropped and self.annotator is None:
            segment = document.segments[0]
            if segment.ids is not None and segment.loss and (start, stop) == (0, len(segment.ids) + 3):
                # A whole text, as most documents are: what follows does the same, in twice the time.
                end = place + stop - 1
                tokens[place], tokens[place + 1], tokens[end] = Vocabulary.BEGIN, Vocabulary.OPENERS[TEXT], Vocabulary.END
                np.add(segment.ids, Vocabulary.SPECIALS, out=tokens[place + 2 : end], casting="unsafe")
                learned[place:end] = TEXT
                return [], stop

        def put(first: int, ids: np.ndarray | Sequence[int], base: int) -> None:
            low, high = max(first, start), min(first + len(ids), stop)
            if low < high:
                part, out = ids[low - first : high - first], tokens[low + shift : high + shift]
                np.add(part, base, out=out, casting="unsafe")

        def learn(first: int, end: int, modality: int) -> None:
            """Tokens [first, end) are to be predicted, as far as they and their predecessor are in this piece."""
            low, high = max(first, start + 1), min(end, stop)
            if low < high:
                learned[low - 1 + shift : high - 1 + shift] = modality

        if start == 0:
            tokens[place] = Vocabulary.BEGIN
        length = 1
        spans = []
        for segment_number, segment in enumerate(document.segments):
            modality, opener, first = segment.modality, length, length + 1
            hidden = segment_number < one.dropped
            inside = not hidden and start <= first < stop  # of a medium, which is never cut
            if start <= opener < stop:
                tokens[opener + shift] = Vocabulary.OPENERS[modality]
            if modality == TEXT:
                ids = self._text_ids(segment)
                length = first + len(ids)
                if not hidden:
                    put(first, ids, Vocabulary.SPECIALS)
            else:
                media, codes = self._codes_of(segment)
                length = first + (len(codes) if isinstance(codes, np.ndarray) else codes)
                if inside and isinstance(codes, np.ndarray):
                    put(first, codes, vocabulary.starts[modality])
                if inside and media is not None:
                    media.append(_Medium(number, first + shift, b"" if segment.is_encoded else segment.file, length - first))
                if modality == AUDIO:
                    if not hidden and start <= length < stop:
                        tokens[length + shift] = vocabulary.audio_end
                    length += 1
            spans.append((first, length))
            if hidden:
                tokens[max(first, start) + shift : max(min(length, stop), start) + shift] = Vocabulary.NULL
            elif segment.loss:
                # A given segment is not learned, but that it *ends* and what comes next is, by the segment after it.
                learn(opener, first, TEXT)
                learn(first, length, modality)
        if start <= length < stop:
            tokens[length + shift] = Vocabulary.END
        if document.segments[-1].loss:
            learn(length, length + 1, TEXT)
        if length + 1 < stop:
            raise BadSample("length", f"{one.key!r} has {length + 1} tokens, the index promises at least {stop}")
        return spans, length + 1

    def _text_ids(self, segment: Segment) -> np.ndarray:
        if segment.ids is not None:
            return segment.ids
        if not segment.is_encoded:
            return self.tokenizer.encode(segment.text)
        codes = segment.codes
        return self._checked(codes, TEXT, len(codes.values))

    def _codes_of(self, segment: Segment) -> tuple[list[_Medium] | None, np.ndarray | int]:
        """(the list that it belongs to if its codec has to see it, its codes or how many there will be)."""
        vocabulary, modality = self.vocabulary, segment.modality
        if modality not in vocabulary.modalities:
            name = MODALITIES[modality]
            raise BadSample(f"no_{name}_codec", f"the model has no {name} codec: set model.{name}, or leave them out")
        encoded = segment.codes if segment.is_encoded else None
        codes = vocabulary.image_tokens
        if modality == AUDIO:
            size, rate = segment_size(segment) if encoded is None else (encoded.size, max(1, encoded.sample_rate))
            codes = int(vocabulary.audio_tokens(size, rate))
        if encoded is not None:
            return self.encoded_images if modality == IMAGE else None, self._checked(encoded, modality, codes)
        return self.images if modality == IMAGE else self.sounds, codes

    def _checked(self, codes: Codes, modality: int, promised: int) -> np.ndarray:
        """The ids of an encoded segment: nothing is left for tokenizer or codec to do."""
        if codes.is_lost:
            raise BadSample("checksum", "the sample was damaged before it was encoded")
        check_encoder(codes, modality, self.vocabulary, self.tokenizer)
        if len(codes.values) != promised:
            raise BadSample("damaged_codes", f"{len(codes.values)} codes, its size asks for {promised}")
        size = (self.vocabulary.text_tokens, self.vocabulary.image_codes, self.vocabulary.audio_codes)[modality]
        if int(codes.values.max(initial=0)) >= size:
            raise BadSample("damaged_codes", f"an id of {int(codes.values.max())} is beyond the vocabulary")
        return codes.values


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
