"""Named-entity recognition: which words of a text are names, and of what; the objective `Tagging` and `pile tag`.

    text, once or twice -> hidden vectors (B, T, D)
                             -> for each word the vector of its last token and the mean of its tokens (S, W, 2 D)
                             -> LSTM in both directions (S, W, 2 * width) -> scores of tags (S, W, K) -> linear chain

The model is causal: its vector at the end of a word does not depend on what follows. So the small LSTM reads these vectors in
both directions, as taggers over character language models do (Flair: Akbik et al. 2018; arXiv:1603.01360), or the text is given
twice and tagged at its second reading. The linear chain scores the sentence as a whole.

A tagged document is a text whose `meta` holds `spans`, [start, stop, type] in characters, sorted and not overlapping, and, if
it was published as words, `words`, [start, stop] of each; else `word_offsets` splits it. Tags are numbers, K = 1 + 2 x types:
0 outside, 1 + 2t begins an entity of type t, 2 + 2t continues it (BIO, also called IOB2).
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from pile_app.data.annotation import NO_LABEL, Annotator
from pile_app.data.assembly import assemble, whole
from pile_app.data.batch import Batch
from pile_app.documents import TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.prepare.entities import Offsets, word_offsets
from pile_app.tasks.embed import batches_by_length
from pile_app.training.objective import Objective, labelled_pieces
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer
    from pile_app.training.module import PileModule

OUTSIDE = 0
BATCH_TOKENS = 16_384  # that `tag_documents` reads at once


# -- Spans of a text <-> tags of its words <-> the tokens in which the words end


class Span(NamedTuple):
    """An entity: [start, stop) in characters."""

    start: int
    stop: int
    type: str


def document_words(text: str, meta: Mapping[str, Any]) -> list[Offsets]:
    """Return the words that a tagged document names, else its `word_offsets`."""
    return [(start, stop) for start, stop in meta["words"]] if "words" in meta else word_offsets(text)


def tags_of_words(words: Sequence[Offsets], spans: Iterable[Sequence[Any]], types: Sequence[str]) -> np.ndarray:
    """Return (words,) int32 tags.

    Raises:
        ValueError: the type of a span is not in `types`, or it does not begin and end with words.
    """
    tags = np.zeros(len(words), np.int32)
    starts, stops = [start for start, _ in words], [stop for _, stop in words]
    for start, stop, name in spans:
        first, last = bisect_left(starts, start), bisect_right(stops, stop)
        if name not in types:
            raise ValueError(f"span [{start}, {stop}) has the type {name!r}, model.objective.types has {list(types)}: add it")
        if first >= last or starts[first] != start or stops[last - 1] != stop or tags[first:last].any():
            wrong = "does not begin and end with words, or lies in another"
            raise ValueError(f"span [{start}, {stop}) of type {name!r} {wrong}: `pile prepare --kind entities` repairs it")
        tags[first], tags[first + 1 : last] = 1 + 2 * types.index(name), 2 + 2 * types.index(name)
    return tags


def spans_of_words(words: Sequence[Offsets], tags: Sequence[int], types: Sequence[str]) -> list[Span]:
    """Invert `tags_of_words`, for valid BIO tags."""
    spans: list[Span] = []
    for (start, stop), tag in zip(words, tags, strict=True):
        if tag % 2:
            spans.append(Span(start, stop, types[tag // 2]))
        elif tag:
            spans[-1] = spans[-1]._replace(stop=stop)
    return spans


def last_tokens(text: str, words: Sequence[Offsets], tokenizer: Tokenizer) -> np.ndarray:
    """Return (words,) index of the token of `text` in which each word ends, not decreasing, with any tokenizer."""
    # The tokenizer counts the tokens that end at or before an offset. If the last of them ends with the word, it is the token;
    # else the next token is, which covers the last character of the word.
    breaks = sorted({offset for _, stop in words for offset in (stop - 1, stop)})
    ids, before = tokenizer.encode_all([text], [breaks])[0]
    count = dict(zip(breaks, before.tolist(), strict=True))
    last = np.array([max(count[stop] - 1, count[stop - 1]) for _, stop in words], np.int64)
    return np.minimum(last, len(ids) - 1)


def merge_words(last: np.ndarray, words: Sequence[Offsets], tags: np.ndarray) -> tuple[np.ndarray, list[Offsets], np.ndarray]:
    """Merge words that end in the same token, since a token has one tag: (U,) tokens, offsets and (U,) tags.

    The tag is that of the first of them in an entity; an inside tag that then has no beginning becomes one.
    """
    first = np.flatnonzero(np.diff(last, prepend=-1)).tolist()
    if len(first) == len(words):
        return last, list(words), tags
    stop = [*first[1:], len(words)]
    merged = [next((tag for tag in tags[a:b].tolist() if tag), OUTSIDE) for a, b in zip(first, stop, strict=True)]
    for index, tag in enumerate(merged):
        if tag and tag % 2 == 0 and (index == 0 or (merged[index - 1] + 1) // 2 != tag // 2):
            merged[index] = tag - 1
    return last[first], [(words[a][0], words[b - 1][1]) for a, b in zip(first, stop, strict=True)], np.array(merged, np.int32)


# -- The objective


class TagAnnotator(Annotator):
    """Label the token in which a word ends with the tag of the word. `types`: of entities, in order."""

    def __init__(self, types: Sequence[str], readings: int = 1) -> None:
        self.types, self.readings = list(types), readings

    def check(self, document: Document) -> tuple[int, list[Offsets], np.ndarray]:
        """Return the index of the text, its words and their tags."""
        texts = [index for index, segment in enumerate(document.segments) if segment.modality == TEXT]
        if len(texts) != self.readings or "spans" not in document.meta:
            wanted = "one text, and `spans` in its meta, which `pile prepare --kind entities` writes"
            raise ValueError(f"document {document.key!r} is not tagged: it needs {wanted}")
        words = document_words(document.segments[texts[-1]].text, document.meta)
        try:
            return texts[-1], words, tags_of_words(words, document.meta["spans"], self.types)
        except ValueError as error:
            raise ValueError(f"document {document.key!r}: {error}") from error

    def labels(
        self, document: Document, spans: Sequence[tuple[int, int]], length: int, number: int, tokenizer: Tokenizer
    ) -> np.ndarray:
        index, words, tags = self.check(document)
        labels = np.full(length, NO_LABEL, np.int32)
        if words:
            last, _, tags = merge_words(last_tokens(document.segments[index].text, words, tokenizer), words, tags)
            labels[spans[index][0] + last] = tags
        return labels


class Words(NamedTuple):
    """The labelled words of a batch with S sentences (pieces with words).

    features: (S, W, 2 D) float32; tags: (S, W) int64, `OUTSIDE` past the end; lengths: (S,); indices: (S, W) flat index of the
    last token of each word.
    """

    features: Tensor
    tags: Tensor
    lengths: Tensor
    indices: Tensor


def gather_words(hidden: Tensor, batch: Batch) -> Words:
    """Gather the words of each piece from (B, T, D) hidden vectors. A word's tokens are those after the word before it, or from
    the opener of its text on."""
    labels, piece, hidden = batch.labels.flatten().long(), batch.piece_numbers.flatten(), hidden.flatten(0, 1).float()
    counts = [count for count in batch.label_counts if count]  # words of each sentence
    total, shape = sum(counts), (len(counts), max(counts, default=0))
    if not total:
        return Words(hidden.new_zeros(*shape, 2 * hidden.size(1)), labels.new_zeros(shape), labels[:0], labels.new_zeros(shape))
    last = torch.nonzero_static(labels >= 0, size=total, fill_value=0).squeeze(1)  # (L,) last token of each word
    pieces, _ = labelled_pieces(batch)
    of_piece = labels.new_zeros(len(batch.piece_sources))
    lengths = of_piece.index_add(0, piece[last], torch.ones_like(last))[pieces]
    sentence = of_piece.index_copy(0, pieces, torch.arange(len(pieces), device=pieces.device))[piece[last]]
    within = torch.arange(total, device=last.device) - (lengths.cumsum(0) - lengths)[sentence]

    ended = (labels >= 0).long()
    word = ended.cumsum(0) - ended  # number of the word that a token belongs to, if there is one in its piece
    nearest = word.clamp_max(total - 1)
    places = torch.arange(len(labels), device=labels.device)
    opener = torch.where(batch.tokens.flatten() == Vocabulary.OPENERS[TEXT], places, 0).cummax(0).values
    owned = (word < total) & (piece[last][nearest] == piece) & (opener[last][nearest] == opener)
    sums = hidden.new_zeros(total, hidden.size(1)).index_add(0, nearest, hidden * owned[:, None])
    sizes = hidden.new_zeros(total).index_add(0, nearest, owned.float())
    features = torch.cat([hidden[last], sums / sizes.clamp_min(1)[:, None]], 1)  # (L, 2 D)
    at = (sentence, within)
    padded = features.new_zeros(*shape, features.size(1)).index_put(at, features)
    tags = labels.new_full(shape, OUTSIDE).index_put(at, labels[last])
    # The part of an entity in a piece that begins within it is an entity.
    tags[:, 0] -= ((tags[:, 0] > OUTSIDE) & (tags[:, 0] % 2 == 0)).long()
    return Words(padded, tags, lengths, labels.new_zeros(shape).index_put(at, last))


class Tagging(Objective):
    """Find entities and their types. Metrics: micro `precision`, `recall` and `f1` of entities, and `<type>_f1`.

    Args:
        types: of entities, in the order of the tags.
        readings: times that a text is read, to be tagged at the last; 2: a causal model has then seen what follows a word
            (arXiv:2402.15449).
        width: of the LSTM over words, in each direction; 0: none, tags are scored from the words' vectors.
        dropout: fraction of a sentence's features that is dropped in training, the same in all its words (arXiv:1512.05287).
        word_dropout: fraction of the words whose features are all dropped.
        language_weight: see `Objective`.
        freeze: see `Objective`.
        learning_rate: see `Objective`.
    """

    def __init__(
        self, types: list[str], readings: int = 1, width: int = 128, dropout: float = 0.5, word_dropout: float = 0.05,
        language_weight: float = 0.0, freeze: bool = False, learning_rate: float = 0.001,
    ) -> None:  # fmt: skip
        super().__init__(language_weight, freeze, learning_rate)
        if not types or len(set(types)) < len(types):
            raise ValueError(f"objective.types needs one type of entity or more, each once, not {types}")
        if not (0 <= dropout < 1 and 0 <= word_dropout < 1):
            raise ValueError(f"0 <= dropout, word_dropout < 1, not {dropout} and {word_dropout}")
        if width < 0 or readings < 1:
            raise ValueError(f"width >= 0 and readings >= 1, not {width} and {readings}")
        self.types, self.readings, self.width, self.dropout, self.word_dropout = types, readings, width, dropout, word_dropout
        self.last: dict[str, Tensor] = {}  # results of the last `compute`

    @property
    def annotator(self) -> Annotator:
        return TagAnnotator(self.types, self.readings)

    def build(self, model: FusedLanguageModel) -> None:
        width = 2 * model.backbone.width
        if self.width:
            self.forwards, self.backwards = (nn.LSTM(width, self.width, batch_first=True) for _ in range(2))
        self.head = nn.Linear(2 * self.width or width, 1 + 2 * len(self.types))
        self.chain = LinearChain(len(self.types))
        self.scores = EntityScores(len(self.types))

    def emissions(self, words: Words, batch: Batch | None = None) -> Tensor:
        """Return (S, W, K) float32 scores of the tags of each word. `batch`: in training, for dropout."""
        steps = torch.arange(words.tags.size(1), device=words.tags.device).expand_as(words.tags)
        mirrored = torch.where(steps < words.lengths[:, None], words.lengths[:, None] - 1 - steps, steps)[..., None]

        def mirror(sequences: Tensor) -> Tensor:  # without padding; no packed sequence, whose lengths must be on the host
            return sequences.gather(1, mirrored.expand_as(sequences))

        def drop(features: Tensor, purpose: int) -> Tensor:  # the same components in all words
            if batch is None:
                return features
            one = features.new_ones(len(features), features.size(2))
            return features * self.drop(one, batch, words.indices[:, 0], self.dropout, purpose)[:, None]

        with torch.autocast(words.features.device.type, enabled=False):
            features = drop(words.features, 0)
            if batch is not None and self.training and self.word_dropout:
                draws = batch.uniform(words.indices.flatten(), purpose=2).view_as(words.tags)
                features = features * (draws >= self.word_dropout)[..., None]
            if not self.width:
                return self.head(features)
            read = torch.cat([self.forwards(features)[0], mirror(self.backwards(mirror(features))[0])], 2)
            return self.head(drop(read, 1))

    def forward(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch, step: Any = None) -> Tensor:
        total = self.prepare(model, [batch])[0] if step is None else step
        words = gather_words(hidden, batch)
        if not len(words.lengths):
            return hidden.sum() * 0.0
        return self.chain(self.emissions(words, batch), words.tags, words.lengths).sum() / total.squeeze()

    @torch.no_grad()
    def update(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> None:
        words = gather_words(hidden, batch)
        self.scores.update(self.decode(words), words.tags)

    @torch.no_grad()
    def decode(self, words: Words) -> Tensor:
        """Return (S, W) int64 tags, valid BIO."""
        return self.chain.decode(self.emissions(words), words.lengths) if len(words.lengths) else words.tags

    def compute(self) -> dict[str, Tensor]:
        self.last = {name: value.reshape(-1) for name, value in self.scores.compute().items()}  # of one type: squeezed
        self.scores.reset()
        by_type = zip(self.types, self.last["f1_by_type"], strict=True)
        return {name: self.last[name][0] for name in ("precision", "recall", "f1")} | {f"{name}_f1": f1 for name, f1 in by_type}

    def report(self, folder: Path) -> dict[str, Any]:
        """Write `entities.json`: the scores of each type, and its number of entities."""
        names = ("precision", "recall", "f1", "count")
        columns = {name: self.last[f"{name}_by_type"].tolist() for name in names}
        table = {one: {name: columns[name][number] for name in names} for number, one in enumerate(self.types)}
        (folder / "entities.json").write_text(json.dumps(table, indent=2) + "\n")
        return {}


class LinearChain(nn.Module):
    """A linear-chain conditional random field over BIO tags (Lafferty et al. 2001; over an LSTM: arXiv:1508.01991).

        score(tags) = Σ_w emission[w, tag_w] + step[tag_w-1, tag_w] + first[tag_0] + last[tag_W-1]

    Scores of what BIO does not allow (an inside tag after anything but its own entity, or at the start) are -inf, in training
    and in decoding alike: no weights, however wrong, can give an invalid sequence.
    """

    may_begin: Tensor
    may_follow: Tensor

    def __init__(self, types: int) -> None:
        super().__init__()
        tags = torch.arange(1 + 2 * types)
        inside = (tags > OUTSIDE) & (tags % 2 == 0)
        of_type = (tags + 1) // 2
        self.register_buffer("may_begin", ~inside, persistent=False)  # (K,)
        same = (of_type[:, None] == of_type) & (tags[:, None] > OUTSIDE)
        self.register_buffer("may_follow", ~inside | same, persistent=False)  # (K, K) from, to
        self.first = nn.Parameter(torch.zeros(len(tags)))
        self.last = nn.Parameter(torch.zeros(len(tags)))
        self.step = nn.Parameter(torch.zeros(len(tags), len(tags)))

    def _scores(self) -> tuple[Tensor, Tensor]:
        first = self.first.masked_fill(~self.may_begin, -torch.inf)
        return first, self.step.masked_fill(~self.may_follow, -torch.inf)

    def forward(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """(S,) -log p(tags) of each sentence.

        Args:
            emissions: (S, W, K) float32.
            tags: (S, W) int64, valid BIO; anything from `lengths` on.
            lengths: (S,) words of each sentence, at least 1.
        """
        first, step = self._scores()
        inside = torch.arange(emissions.size(1), device=lengths.device) < lengths[:, None]  # (S, W)
        tags = tags.masked_fill(~inside, OUTSIDE)
        taken = emissions.gather(2, tags[..., None]).squeeze(2).masked_fill(~inside, 0.0).sum(1)
        steps = step[tags[:, :-1], tags[:, 1:]].masked_fill(~inside[:, 1:], 0.0).sum(1)
        final = tags.gather(1, lengths[:, None] - 1).squeeze(1)
        score = taken + steps + first[tags[:, 0]] + self.last[final]
        total = first + emissions[:, 0]  # (S, K) log of the sum over all beginnings that end in each tag
        for word in range(1, emissions.size(1)):
            longer = torch.logsumexp(total[:, :, None] + step, 1) + emissions[:, word]
            total = torch.where(inside[:, word, None], longer, total)
        return torch.logsumexp(total + self.last, 1) - score

    @torch.no_grad()
    def decode(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """(S, W) int64: the most likely tags (Viterbi), `OUTSIDE` from the lengths on. Arguments as above."""
        first, step = self._scores()
        words = emissions.size(1)
        best = first + emissions[:, 0]
        origins = []
        for word in range(1, words):
            reached, origin = (best[:, :, None] + step).max(1)  # (S, K)
            here = (word < lengths)[:, None]
            best = torch.where(here, reached + emissions[:, word], best)
            origins.append(torch.where(here, origin, torch.arange(len(self.last), device=origin.device)))
        tags = [(best + self.last).argmax(1)]
        for origin in reversed(origins):
            tags.append(origin.gather(1, tags[-1][:, None]).squeeze(1))
        found = torch.stack(tags[::-1], 1)
        return found.masked_fill(torch.arange(words, device=found.device) >= lengths[:, None], OUTSIDE)


class EntityScores(Metric):
    """Precision, recall and F1 of entities, as seqeval and conlleval define them.

    An entity counts as right if its type, first and last word are right (Tjong Kim Sang and De Meulder 2003). The tags are
    valid BIO, where seqeval's schemes agree.
    """

    full_state_update = False
    right: Tensor
    found: Tensor
    gold: Tensor

    def __init__(self, types: int) -> None:
        super().__init__()
        for name in ("right", "found", "gold"):
            self.add_state(name, torch.zeros(types, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Tensor, gold: Tensor) -> None:
        """Count (S, W) int64 tags, `OUTSIDE` past the end of a sentence."""
        begins = gold % 2 == 1
        for state, tags in (
            (self.right, gold[begins & (found == gold) & (entity_stops(found) == entity_stops(gold))]),
            (self.found, found[found % 2 == 1]),
            (self.gold, gold[begins]),
        ):
            state += torch.bincount(tags // 2, minlength=len(state))

    def compute(self) -> dict[str, Tensor]:
        """Return precision, recall, f1: () over all entities (micro average), and (types,) with `_by_type`; 0 without any."""
        values = {"count_by_type": self.gold}
        sums = torch.stack([self.right, self.found, self.gold]).float()
        for suffix, (right, found, gold) in (("", sums.sum(1)), ("_by_type", sums)):
            values["precision" + suffix] = right / found.clamp_min(1)
            values["recall" + suffix] = right / gold.clamp_min(1)
            values["f1" + suffix] = 2 * right / (found + gold).clamp_min(1)
        return values


def entity_stops(tags: Tensor) -> Tensor:
    """Return (S, W) for each word the first later word that does not continue an entity."""
    words = tags.size(1)
    steps = torch.arange(words, device=tags.device).expand_as(tags)
    ends = steps.masked_fill((tags > 0) & (tags % 2 == 0), words)
    following = torch.cat([ends[:, 1:], torch.full_like(ends[:, :1], words)], 1)
    return following.flip(1).cummin(1).values.flip(1)


# -- `pile tag`


class Tagged(NamedTuple):
    text: str
    spans: list[Span]


@torch.no_grad()
def tag_documents(module: PileModule, documents: Sequence[Document], context: int) -> list[Tagged]:
    """Find the entities of each text, in order and without overlaps, with a run of `Tagging` in evaluation mode.

    Args:
        documents: of one text each, with `words` in their meta or without.
        context: most tokens that are read at once, both readings together; longer texts are cut, at the end of a sentence if
            possible.

    Raises:
        ValueError: the run has another objective.
    """
    objective, tokenizer = module.objective, module.tokenizer
    if not isinstance(objective, Tagging):
        raise ValueError("the run was not trained to tag: its model.objective is not pile_app.tasks.tagging.Tagging")
    tagged = [Tagged(document.segments[0].text, []) for document in documents]
    readings = objective.readings
    pieces = [one for n, document in enumerate(documents) for one in _pieces(n, document, context, readings, tokenizer)]
    for batch in batches_by_length(pieces, lambda piece: piece[0], BATCH_TOKENS):
        packs = [[whole(objective.annotator.arrange(document), tokens)] for tokens, _, document in batch]
        inputs = assemble(packs, module.vocabulary, tokenizer, batch[-1][0], annotator=objective.annotator).to(module.device)
        _, hidden = objective.read(module.model, inputs)
        words = gather_words(hidden, inputs)
        rows = zip(batch, objective.decode(words).tolist(), words.lengths.tolist(), strict=True)
        for (_, start, document), tags, count in rows:
            offsets = document.meta["words"]
            last = last_tokens(document.segments[0].text, offsets, tokenizer)
            _, units, _ = merge_words(last, offsets, np.zeros(len(last), np.int32))
            found = spans_of_words(units, tags[:count], objective.types)
            tagged[int(document.key)].spans.extend(Span(start + first, start + stop, name) for first, stop, name in found)
    for one in tagged:
        one.spans.sort()
    return tagged


def _pieces(
    number: int, document: Document, context: int, readings: int, tokenizer: Tokenizer
) -> Iterator[tuple[int, int, Document]]:
    """Yield (tokens, first character, document of the part) of the parts of text `number`, which is their key."""
    text = document.segments[0].text
    # `<begin>` and `<end>`; in each reading `<text>`, and one more token if the text is cut
    words, limit = document_words(text, document.meta), (context - 2) // readings - 2
    ends = last_tokens(text, words, tokenizer) + 1 if words else np.zeros(0, np.int64)
    first = 0
    while first < len(words):
        start = words[first][0]
        before = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, before + limit, side="right")))
        if stop < len(words):
            sentences = (n for n in range(stop, first + (stop - first) // 2, -1) if text[words[n - 1][1] - 1] in ".!?\n\u3002")
            stop = next(sentences, stop)
        part = text[start : words[stop - 1][1]]
        meta = {"words": [(a - start, b - start) for a, b in words[first:stop]], "spans": []}
        tokens = 2 + readings * (1 + len(tokenizer.encode(part)))
        yield tokens, start, Document((Segment(part),), str(number), meta=meta)
        first = stop


def as_inline(tagged: Tagged) -> str:
    """`I was in [Paris|location] .`"""
    return "".join(part if name is None else f"[{part}|{name}]" for part, name in split_parts(tagged))


def as_record(tagged: Tagged) -> dict[str, Any]:
    """Return what `pile prepare` reads, with the words of each span for people."""
    spans = [{"start": a, "end": b, "label": name, "text": tagged.text[a:b]} for a, b, name in tagged.spans]
    return {"text": tagged.text, "spans": spans}


def split_parts(tagged: Tagged) -> Iterator[tuple[str, str | None]]:
    """Yield the text in parts, each with its type or None."""
    place = 0
    for start, stop, name in tagged.spans:
        yield tagged.text[place:start], None
        yield tagged.text[start:stop], name
        place = stop
    yield tagged.text[place:], None
