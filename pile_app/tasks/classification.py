"""Classification of documents: texts, images, sounds, or any mixture of them.

The label of a document is `meta["label"]` (of a field `{label: cls}`), or its last segment, a text. The model reads the
document up to the label, and a linear head classifies its pooled hidden vectors; or the model itself predicts the label, if
that is a text. Either way the label is not seen: the model is causal.

    hidden (B, T, D) -> mean, maximum, deviation, last of each document (L, F) -> head -> logits (L, classes)
    and beside it, where asked for: runs of tokens, statistics of sounds -> linear -> added to the logits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pile_app.data.annotation import NO_LABEL, Annotator, label_last, label_of
from pile_app.data.assembly import assemble, whole
from pile_app.data.batch import Batch
from pile_app.documents import TEXT, BadSample, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.objective import Objective, frames_of_codes, labels_by_piece, mean_by_piece, refuse_encoded
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer

Pooling = Literal["mean", "max", "deviation", "last"]
ROWS = 64  # documents that are read at once for predictions
BUCKETS = 1 << 18  # that n-grams are hashed into


class LabelAnnotator(Annotator):
    """Gives every token of the segments the number of the label, and the token after them too: `<end>`, or the opener of the
    label where that is a text.

    Args:
        labels: in order.
        as_text: refuse documents whose label is not a text, to be predicted by the model itself.
    """

    def __init__(self, labels: Sequence[str], as_text: bool = False) -> None:
        self.numbers = {label: number for number, label in enumerate(labels)}
        self.as_text = as_text

    def arrange(self, document: Document) -> Document:
        return label_last(document)

    def labels(
        self, document: Document, spans: Sequence[tuple[int, int]], length: int, number: int, tokenizer: Tokenizer
    ) -> np.ndarray:
        label, is_text = number_of_label(document, self.numbers)
        if self.as_text and not is_text:
            raise ValueError(
                f"objective.head language predicts labels as text, and that of document {document.key!r} is none: set "
                "objective.head to linear, or make it a text with fields: [..., {label: <name>, learn: true}]"
            )
        labels = np.full(length, NO_LABEL, np.int32)
        for first, stop in spans[: len(spans) - is_text]:
            labels[first:stop] = label
        labels[spans[-1][0] - 1 if is_text else length - 1] = label
        return labels


def number_of_label(document: Document, numbers: Mapping[str, int]) -> tuple[int, bool]:
    """Return the number of the label, and whether it is the last segment.

    Raises:
        ValueError: the label is unknown, or nothing comes before it.
    """
    label, is_text = label_of(document)
    if label not in numbers:
        raise ValueError(f"document {document.key!r} has the label {label!r}, model.objective.labels names {list(numbers)}")
    if is_text and len(document.segments) < 2:
        raise ValueError(f"document {document.key!r} is nothing but the label {label!r}")
    return numbers[label], is_text


def split_label(document: Document, labels: Sequence[str]) -> tuple[Document, int]:
    """Return the document without its label, and the number of the label. Raises ValueError, see `number_of_label`."""
    document = label_last(document)
    number, is_text = number_of_label(document, {label: number for number, label in enumerate(labels)})
    meta = {name: value for name, value in document.meta.items() if name != "label"}
    return replace(document, segments=document.segments[: len(document.segments) - is_text], meta=meta), number


class Classification(Objective):
    """Which of several labels a document has.

    Args:
        labels: all labels, in the order of the classes, as `pile prepare` prints them.
        head: linear, on the pooled vectors; or language: the model's own softmax where the label begins, over the first tokens
            of the labels, which have to differ. That needs no new weights (arXiv:2001.07676 calls the labels a verbalizer).
        pooling: what is taken of the hidden vectors of a document, one after the other: their mean, the maximum or the standard
            deviation of each component, the last one, which has seen them all. (The head `language` reads the last one.)
        class_weights: of the labels in the loss, in their order; balanced: total / (classes * count), by the labels that the
            run has seen so far; null: all 1.
        ngrams: 1 or more: beside the head stands a linear model of the text's runs of up to so many tokens, which learns
            at once what speaks for which label (wide and deep, arXiv:1606.07792, with fastText's features, arXiv:1607.01759).
        sound_statistics: beside the head stands a linear model of what each band of the sounds' log-mel frames does over time,
            see `SoundStatistics`; nothing where the model has no sound. Not from encoded shards.
        dropout: share of the features that is dropped in training.
        language_weight: see `Objective`.
        freeze: see `Objective`.
        learning_rate: see `Objective`.
        unrounded: see `Objective`.
    """

    seen: Tensor
    first_tokens: Tensor
    reads_end: Tensor

    def __init__(
        self,
        labels: list[str],
        head: Literal["linear", "language"] = "linear",
        pooling: list[Pooling] = ["mean"],  # noqa: B006 (jsonargparse shows it; never changed)
        class_weights: Literal["balanced"] | list[float] | None = None,
        ngrams: int = 0,
        sound_statistics: bool = False,
        dropout: float = 0.1,
        language_weight: float = 0.0,
        freeze: bool = False,
        learning_rate: float = 0.001,
        unrounded: bool = False,
    ) -> None:
        super().__init__(language_weight, freeze, learning_rate, unrounded)
        if len(set(labels)) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"objective.labels needs two different labels or more, not {labels}")
        if not pooling or len(set(pooling)) < len(pooling):
            raise ValueError(f"objective.pooling needs some of mean, max, deviation and last, once each, not {pooling}")
        if isinstance(class_weights, list) and (len(class_weights) != len(labels) or min(class_weights) <= 0):
            raise ValueError(f"objective.class_weights needs a number above 0 for each of {labels}, not {class_weights}")
        if ngrams < 0:
            raise ValueError(f"objective.ngrams is 0 or more, not {ngrams}")
        if head == "language" and freeze:
            raise ValueError("objective.head language has no weights of its own: with objective.freeze set head to linear")
        self.labels = labels
        self.kind = head
        self.pooling: list[Pooling] = ["last"] if head == "language" else pooling
        self.class_weights = class_weights
        self.ngrams = ngrams
        self.sound_statistics = sound_statistics
        self.dropout = nn.Dropout(dropout)
        self.confusion: Tensor | None = None  # (true, predicted) counts of the last validation

    @property
    def annotator(self) -> Annotator:
        return LabelAnnotator(self.labels, self.kind == "language")

    def build(self, model: FusedLanguageModel) -> None:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassConfusionMatrix,
            MulticlassF1Score,
            MulticlassPrecision,
            MulticlassRecall,
        )

        super().build(model)
        classes = len(self.labels)
        self.register_buffer("reads_end", torch.zeros((), dtype=torch.bool))  # trained on labels that are no text
        self.wide = nn.ModuleList()
        if self.ngrams:
            self.wide.append(Ngrams(self.ngrams, classes, model.vocabulary.slices[TEXT].stop))
        if self.sound_statistics and model.audio_codec is not None:
            self.wide.append(SoundStatistics(model.audio_codec.config.mels, classes))
        if self.kind == "language":
            self.register_buffer("first_tokens", torch.tensor(self._first_tokens(model.tokenizer)), persistent=False)
        else:
            self.head = nn.Linear(model.backbone.width * len(self.pooling), classes)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if self.class_weights == "balanced":
            self.register_buffer("seen", torch.ones(classes))
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "precision": MulticlassPrecision(classes, average="macro"),
                "recall": MulticlassRecall(classes, average="macro"),
                "f1": MulticlassF1Score(classes, average="macro"),
                "confusion": MulticlassConfusionMatrix(classes),
            }
        )

    def _first_tokens(self, tokenizer: Tokenizer) -> list[int]:
        firsts = {label: int(tokenizer.encode(label)[0]) for label in self.labels}
        by_token: dict[int, list[str]] = {}
        for label, token in firsts.items():
            by_token.setdefault(token, []).append(label)
        if alike := [labels for labels in by_token.values() if len(labels) > 1]:
            raise ValueError(
                f"objective.head language tells labels by their first token, and {alike} begin alike with this tokenizer: "
                "name them otherwise, or set objective.head to linear"
            )
        return list(firsts.values())

    def logits(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(L, classes) float32 of the labelled pieces, (L,) their labels."""
        features, labels = pool(hidden, batch, self.pooling)
        if self.kind == "language":
            logits = model.logits(features, TEXT)[:, self.first_tokens + model.vocabulary.SPECIALS]
        else:
            logits = self.head(self.dropout(features)).float()
        kept = labels_by_piece(batch) >= 0
        for wide in self.wide:
            logits = logits + wide(model, batch, self.dropout)[kept]
        return logits, labels

    def forward(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> Tensor:
        logits, labels = self.logits(model, hidden, batch)
        self.reads_end |= ((batch.labels >= 0) & (batch.tokens == Vocabulary.END)).any()
        if not len(labels):
            return logits.sum()
        weights: Tensor | None = None
        if self.class_weights == "balanced":
            self.seen += labels.bincount(minlength=len(self.labels))
            weights = self.seen.sum() / (len(self.labels) * self.seen)
        elif self.class_weights is not None:
            weights = logits.new_tensor(self.class_weights)
        return F.cross_entropy(logits, labels, weights)

    @torch.no_grad()
    def update(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> None:
        logits, labels = self.logits(model, hidden, batch)
        if len(labels):
            self.metrics.update(logits, labels)

    def compute(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = self.metrics.compute()
        self.confusion = values.pop("confusion").cpu()
        self.metrics.reset()
        return values

    def report(self, folder: Path) -> dict[str, Any]:
        """`confusion.png`, also into the W&B run that is open."""
        if self.confusion is None:
            return {}
        picture = folder / "confusion.png"
        draw_confusion(self.confusion, self.labels, picture)
        import wandb

        if wandb.run is not None:
            wandb.log({"confusion": wandb.Image(str(picture))})
        return {"confusion": self.confusion.tolist()}

    def _with_any_label(self, document: Document) -> Document:
        """Give a document a label, which nothing reads, in the form that labels had in training."""
        if not self.reads_end:
            return Document((*document.segments, Segment(self.labels[0])), document.key)
        last = document.segments[-1]
        label = next(one for one in self.labels if last.modality != TEXT or one != last.text.strip())
        return Document(document.segments, document.key, meta={"label": label})

    @torch.no_grad()
    def predict(self, model: FusedLanguageModel, documents: Sequence[Document]) -> Tensor:
        """(N, classes) float32 probabilities for documents without a label, read whole, however long; on the CPU.

        Raises:
            BadSample: a medium cannot be decoded, or the model has no codec for it.
        """
        from pile_app.model.generate import evaluating, segment_length

        asked = [self._with_any_label(document) for document in documents]
        lengths = [2 + sum(segment_length(model, segment) for segment in document.segments) for document in asked]
        order = sorted(range(len(asked)), key=lengths.__getitem__)  # rows of about one length: little padding
        result = torch.zeros(len(asked), len(self.labels))
        with evaluating(self), evaluating(model):
            for first in range(0, len(order), ROWS):
                rows = order[first : first + ROWS]
                packs = [[whole(asked[number], lengths[number])] for number in rows]
                batch = assemble(packs, model.vocabulary, model.tokenizer, lengths[rows[-1]], annotator=self.annotator)
                if batch.rejected:
                    raise BadSample(*batch.rejected[0][2:])
                batch = batch.to(model.token_bytes.device)
                logits, _ = self.logits(model, self.read(model, batch)[1], batch)
                result[rows] = logits.softmax(-1).cpu()
        return result


class Ngrams(nn.Module):
    """Logits of a document as the sum over its runs of 1 to `longest` tokens, divided by the square root of their number.

    Runs are hashed; those that fall into one of the `BUCKETS` share their weights.

    Args:
        longest: tokens of a run.
        classes: C.
        text_stop: token from which on it is not text.
    """

    def __init__(self, longest: int, classes: int, text_stop: int) -> None:
        super().__init__()
        self.longest = longest
        self.text_stop = text_stop
        self.weight = nn.Parameter(torch.zeros(BUCKETS, classes))

    def forward(self, model: FusedLanguageModel, batch: Batch, dropout: nn.Module) -> Tensor:
        """(P, C) float32, 0 of pieces without text that is labelled."""
        tokens, piece = batch.tokens.flatten().long(), batch.piece_numbers.flatten()
        is_text = (batch.labels.flatten() >= 0) & (tokens >= Vocabulary.SPECIALS) & (tokens < self.text_stop)
        inside, run = is_text, torch.zeros_like(tokens)
        sums = self.weight.new_zeros(len(batch.piece_sources), 1 + self.weight.size(1))  # of runs, and their logits
        for back in range(self.longest):
            inside = inside & is_text.roll(back) & (piece.roll(back) == piece)
            run = (run * 1_000_003 + tokens.roll(back)) % ((1 << 31) - 1)
            logits = dropout(F.embedding(run % BUCKETS, self.weight))
            sums = sums.index_add(0, piece, F.pad(logits, (1, 0), value=1.0) * inside[:, None])
        return sums[:, 1:] / sums[:, :1].clamp_min(1).sqrt()


class SoundStatistics(nn.Module):
    """Logits of a document as a linear function of what each band of its sounds does over time: mean, maximum and standard
    deviation of its log-mel frames, mean of how far they move from one to the next.

    Features of music and of noises since Tzanetakis and Cook (2002), whom ESC-50's own baseline follows; with a few hundred
    recordings they say more than a small language model can learn. Each is standardized by what training has seen of it.

    Args:
        mels: F, bands of a frame.
        classes: C.
    """

    seen: Tensor

    def __init__(self, mels: int, classes: int) -> None:
        super().__init__()
        self.mels = mels
        self.linear = nn.Linear(4 * mels, classes, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.register_buffer("seen", torch.zeros(3, 4 * mels))  # of each feature: number, sum, sum of squares

    def forward(self, model: FusedLanguageModel, batch: Batch, dropout: nn.Module) -> Tensor:
        """(P, C) float32, 0 of pieces without sound."""
        refuse_encoded(model, batch, "sound_statistics")
        logits = self.linear.weight.new_zeros(len(batch.piece_sources), len(self.linear.weight))
        if model.audio_codec is None or not len(batch.audio):
            return logits
        frames = frames_of_codes(model.audio_codec, batch).unflatten(1, (-1, self.mels))  # (codes, frames, F)
        piece = batch.piece_numbers.flatten()[batch.audio_slots].repeat_interleave(frames.size(1))
        heard, piece = piece.unique(return_inverse=True)
        features = self.describe(frames.flatten(0, 1), piece, len(heard))
        if self.training:
            self.seen += torch.stack([torch.ones_like(features), features, features.square()]).sum(1)
        number, total, squares = self.seen
        mean = total / number.clamp_min(1)
        deviation = (squares / number.clamp_min(1) - mean.square()).clamp_min(1e-4).sqrt()
        return logits.index_copy(0, heard, self.linear(dropout((features - mean) / deviation)).float())

    @staticmethod
    def describe(frames: Tensor, piece: Tensor, pieces: int) -> Tensor:
        """(N, F) frames, (N,) piece of each, increasing -> (pieces, 4 F) mean, maximum, deviation, mean step of each band."""

        def mean(values: Tensor, piece: Tensor) -> Tensor:
            counts = piece.bincount(minlength=pieces).clamp_min(1)
            return values.new_zeros(pieces, values.size(1)).index_add(0, piece, values) / counts[:, None]

        means = mean(frames, piece)
        maxima = torch.full_like(means, -torch.inf).scatter_reduce(0, piece[:, None].expand_as(frames), frames, "amax")
        deviations = (mean((frames - means[piece]).square(), piece) + 1e-6).sqrt()
        steps = frames.diff(dim=0).abs()
        within = (piece.diff() == 0).nonzero().squeeze(1)
        return torch.cat([means, maxima, deviations, mean(steps[within], piece[within])], dim=1)


def pool(hidden: Tensor, batch: Batch, kinds: Sequence[Pooling]) -> tuple[Tensor, Tensor]:
    """(L, D * kinds) float32 of the labelled places of each piece that has some, in the order of the pieces; (L,) labels."""
    means, labels = mean_by_piece(hidden, batch)
    kept = labels >= 0
    labelled = batch.labels.flatten() >= 0
    piece = batch.piece_numbers.flatten()
    flat = hidden.flatten(0, 1)
    parts = []
    for kind in kinds:
        if kind == "mean":
            parts.append(means[kept])
        elif kind == "max":
            lowest = flat.new_full(means.shape, -torch.inf, dtype=torch.float32)
            inside = flat.float().masked_fill(~labelled[:, None], -torch.inf)
            parts.append(lowest.scatter_reduce(0, piece[:, None].expand_as(inside), inside, "amax")[kept])
        elif kind == "deviation":
            squares, _ = mean_by_piece((flat.float() - means[piece]).square().unflatten(0, batch.labels.shape), batch)
            parts.append((squares[kept] + 1e-6).sqrt())
        else:
            places = torch.arange(len(flat), device=flat.device).masked_fill(~labelled, 0)
            last = torch.zeros_like(labels).scatter_reduce(0, piece, places, "amax")
            parts.append(flat[last[kept]].float())
    return torch.cat(parts, dim=-1), labels[kept]


def draw_confusion(counts: Tensor, labels: Sequence[str], path: Path) -> None:
    """A picture of (true, predicted) counts: shares of each true label as colors, counts as numbers where they can be read."""
    from matplotlib.figure import Figure

    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    side = 2.5 + 0.55 * min(len(labels), 40)
    figure = Figure((side + 1, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the true label")
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=90)
    axes.set_yticks(ticks, labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= 40:
        for (row, column), count in np.ndenumerate(counts.numpy()):
            if count:
                dark = bool(shares[row, column] > 0.5)
                axes.text(column, row, f"{count}", ha="center", va="center", color="white" if dark else "black", fontsize=8)
    figure.savefig(path)
