"""Named-entity recognition: which words of a text are names, and of what.

    hidden vectors (B, T, D) -> a vector a word: that of its last token, and the mean of its tokens (S, W, 2 D)
                             -> LSTM in both directions (S, W, 2 · width) -> scores of tags (S, W, K) -> linear chain

The model is causal: what it knows at the end of a word does not see what follows. The small LSTM reads its vectors in both
directions, as taggers over character language models do (Flair: Akbik et al. 2018; arXiv:1603.01360), and the linear chain
decides for the sentence as a whole. Documents: see `tasks/entities.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pile_app.data.annotation import NO_LABEL, Annotator
from pile_app.data.batch import Batch
from pile_app.documents import TEXT, Document
from pile_app.model.fused import FusedLanguageModel
from pile_app.tasks.entities import OUTSIDE, document_words, last_tokens, merge_words, tags_of_words
from pile_app.tasks.entity_scores import EntityScores
from pile_app.tasks.linear_chain import LinearChain
from pile_app.training.objective import Objective

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer


class TagAnnotator(Annotator):
    """The token in which a word ends has the tag of the word. `types`: of entities, in order."""

    def __init__(self, types: Sequence[str]) -> None:
        self.types = list(types)

    def labels(
        self, document: Document, spans: Sequence[tuple[int, int]], length: int, number: int, tokenizer: Tokenizer
    ) -> np.ndarray:
        texts = [place for place, segment in enumerate(document.segments) if segment.modality == TEXT]
        if len(texts) != 1 or "spans" not in document.meta:
            raise ValueError(
                f"document {document.key!r} is not tagged: it needs one text, and its entities as `spans` in its meta, which "
                "`pile prepare --kind entities` writes"
            )
        text = document.segments[texts[0]].text
        words = document_words(text, document.meta)
        labels = np.full(length, NO_LABEL, np.int32)
        if words:
            try:
                tags = tags_of_words(words, document.meta["spans"], self.types)
            except ValueError as error:
                raise ValueError(f"document {document.key!r}: {error}") from error
            places, _, tags = merge_words(last_tokens(text, words, tokenizer), words, tags)
            labels[spans[texts[0]][0] + places] = tags
        return labels


class Words(NamedTuple):
    """The labelled words of a batch, S pieces with words. features: (S, W, 2 D) float32; tags: (S, W) int64, `OUTSIDE` past the
    end; lengths: (S,)."""

    features: Tensor
    tags: Tensor
    lengths: Tensor


def gather_words(hidden: Tensor, batch: Batch) -> Words:
    """The words of each piece, from (B, T, D) hidden vectors. A word's tokens are those after the word before it."""
    labels, piece = batch.labels.flatten().long(), batch.piece_numbers.flatten()
    hidden = hidden.flatten(0, 1).float()
    labelled = labels >= 0
    places = labelled.nonzero().squeeze(1)  # (L,)
    of_word = piece[places]
    _, sentence, lengths = torch.unique_consecutive(of_word, return_inverse=True, return_counts=True)
    place = torch.arange(len(places), device=places.device) - (lengths.cumsum(0) - lengths)[sentence]

    word = labelled.cumsum(0) - labelled.long()  # number of the word that a token is of, if there is one in its piece
    owned = (word < len(places)).nonzero().squeeze(1)
    owned = owned[piece[owned] == of_word[word[owned]]]
    sums = hidden.new_zeros(len(places), hidden.size(1)).index_add(0, word[owned], hidden[owned])
    counts = torch.bincount(word[owned], minlength=len(places)).clamp_min(1)
    features = torch.cat([hidden[places], sums / counts[:, None]], 1)  # (L, 2 D)

    shape = (len(lengths), int(lengths.max()) if len(lengths) else 0)
    padded = features.new_zeros(*shape, features.size(1)).index_put((sentence, place), features)
    tags = labels.new_full(shape, OUTSIDE).index_put((sentence, place), labels[places])
    if tags.size(1):  # a piece may begin within an entity, the part of which in it is one
        inside = (tags[:, 0] > OUTSIDE) & (tags[:, 0] % 2 == 0)
        tags[:, 0] -= inside.long()
    return Words(padded, tags, lengths)


class Tagging(Objective):
    """Which words are entities of which type. The metrics are `precision`, `recall` and `f1` of entities, and `<type>_f1`.

    Args:
        types: of entities, in the order of the tags.
        width: of the LSTM over words, in each direction.
        dropout: share of a sentence's features that is dropped in training, the same in all its words (arXiv:1512.05287).
        word_dropout: share of the words whose features are dropped altogether.
        language_weight: see `Objective`.
        freeze: see `Objective`.
        learning_rate: see `Objective`.
    """

    def __init__(
        self,
        types: list[str],
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
        if not (0 <= dropout < 1 and 0 <= word_dropout < 1 and width > 0):
            raise ValueError(f"0 <= dropout, word_dropout < 1 and width >= 1, not {dropout}, {word_dropout} and {width}")
        self.types = types
        self.width = width
        self.dropout = dropout
        self.word_dropout = word_dropout
        self.last: dict[str, Tensor] = {}  # what `compute` found

    @property
    def annotator(self) -> Annotator:
        return TagAnnotator(self.types)

    def build(self, model: FusedLanguageModel) -> None:
        self.reader = nn.LSTM(2 * model.backbone.width, self.width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * self.width, 1 + 2 * len(self.types))
        self.chain = LinearChain(len(self.types))
        self.scores = EntityScores(len(self.types))

    def emissions(self, words: Words) -> Tensor:
        """(S, W, K) float32 scores of the tags of each word."""
        with torch.autocast(words.features.device.type, enabled=False):
            features = self._drop(words.features)
            if self.training and self.word_dropout:
                kept = torch.rand(features.shape[:2], device=features.device) >= self.word_dropout
                features = features * kept[..., None]
            packed = pack_padded_sequence(features, words.lengths.cpu(), batch_first=True, enforce_sorted=False)
            read, _ = pad_packed_sequence(self.reader(packed)[0], batch_first=True)
            return self.head(self._drop(read))

    def _drop(self, features: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return features
        kept = torch.rand(len(features), 1, features.size(2), device=features.device) >= self.dropout
        return features * kept / (1 - self.dropout)

    def forward(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> Tensor:
        words = gather_words(hidden, batch)
        if not len(words.lengths):
            return hidden.sum() * 0.0
        return self.chain(self.emissions(words), words.tags, words.lengths).sum() / words.lengths.sum()

    @torch.no_grad()
    def update(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> None:
        words = gather_words(hidden, batch)
        self.scores.update(self.decode(words), words.tags)

    @torch.no_grad()
    def decode(self, words: Words) -> Tensor:
        """(S, W) int64 tags, valid BIO."""
        if not len(words.lengths):
            return words.tags
        return self.chain.decode(self.emissions(words), words.lengths)

    def compute(self) -> dict[str, Tensor]:
        self.last = self.scores.compute()
        self.scores.reset()
        by_type = zip(self.types, self.last["f1_by_type"], strict=True)
        return {name: self.last[name] for name in ("precision", "recall", "f1")} | {f"{name}_f1": f1 for name, f1 in by_type}

    def report(self, folder: Path) -> dict[str, Any]:
        """Writes `entities.json`: the scores of each type, and how many entities of it there are."""
        names = ("precision", "recall", "f1", "count")
        table = {
            one: {name: self.last[f"{name}_by_type"][number].item() for name in names} for number, one in enumerate(self.types)
        }
        (folder / "entities.json").write_text(json.dumps(table, indent=2) + "\n")
        return {}
