"""Named-entity recognition: which words of a text are names, and of what.

    text, once or twice -> hidden vectors (B, T, D)
                             -> for each word the vector of its last token and the mean of its tokens (S, W, 2 D)
                             -> LSTM in both directions (S, W, 2 * width) -> scores of tags (S, W, K) -> linear chain

The model is causal: its vector at the end of a word does not depend on what follows. So the small LSTM reads these vectors in
both directions, as taggers over character language models do (Flair: Akbik et al. 2018; arXiv:1603.01360), or the text is given
twice and tagged at its second reading. The linear chain scores the sentence as a whole. Documents: see `tasks/entities.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from pile_app.data.annotation import NO_LABEL, Annotator
from pile_app.data.batch import Batch
from pile_app.documents import TEXT, Document
from pile_app.model.fused import FusedLanguageModel
from pile_app.prepare.entities import Offsets
from pile_app.tasks.entities import OUTSIDE, document_words, last_tokens, merge_words, tags_of_words
from pile_app.tasks.linear_chain import LinearChain
from pile_app.training.objective import Objective, labelled_pieces
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer


class TagAnnotator(Annotator):
    """Label the token in which a word ends with the tag of the word. `types`: of entities, in order."""

    def __init__(self, types: Sequence[str], readings: int = 1) -> None:
        self.types, self.readings = list(types), readings

    def check(self, document: Document) -> tuple[int, list[Offsets], np.ndarray]:
        """Return the index of the text, its words and their tags."""
        texts = [index for index, segment in enumerate(document.segments) if segment.modality == TEXT]
        if len(texts) != self.readings or "spans" not in document.meta:
            raise ValueError(
                f"document {document.key!r} is not tagged: it needs one text, and its entities as `spans` in its meta, which "
                "`pile prepare --kind entities` writes"
            )
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
        self,
        types: list[str],
        readings: int = 1,
        width: int = 128,
        dropout: float = 0.5,
        word_dropout: float = 0.05,
        language_weight: float = 0.0,
        freeze: bool = False,
        learning_rate: float = 0.001,
    ) -> None:
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
        self.last = {
            name: value.reshape(-1 if name.endswith("_by_type") else ()) for name, value in self.scores.compute().items()
        }
        self.scores.reset()
        by_type = zip(self.types, self.last["f1_by_type"], strict=True)
        return {name: self.last[name] for name in ("precision", "recall", "f1")} | {f"{name}_f1": f1 for name, f1 in by_type}

    def report(self, folder: Path) -> dict[str, Any]:
        """Write `entities.json`: the scores of each type, and its number of entities."""
        names = ("precision", "recall", "f1", "count")
        table = {
            one: {name: self.last[f"{name}_by_type"][number].item() for name in names} for number, one in enumerate(self.types)
        }
        (folder / "entities.json").write_text(json.dumps(table, indent=2) + "\n")
        return {}


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
