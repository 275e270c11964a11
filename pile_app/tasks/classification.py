"""Classification of documents: texts, images, sounds, or any mixture of them.

The label of a document is `meta["label"]` (of a field `{label: cls}`), or its last segment, a text. The model reads the
document up to the label, and a linear head classifies its pooled hidden vectors; or the model itself predicts the label, if
that is a text. Either way the label is not seen: the model is causal.

    hidden (B, T, D) -> mean, maximum, deviation, last of each document (L, F) -> head -> logits (L, classes)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from pile_app.model.generate import as_row, evaluating
from pile_app.model.score import TEXT_END, score_paths
from pile_app.model.score import Path as TokenPath
from pile_app.model.segments import segment_length
from pile_app.training.objective import Objective, labelled_pieces, mean_by_piece
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer

Pooling = Literal["mean", "max", "deviation", "last"]
ROWS = 64  # documents that are read at once for predictions
MOST_NAMED = 100  # labels with metrics of their own


class LabelAnnotator(Annotator):
    """Give the number of the label to every token of the segments and to the token after them, `<end>` or the opener of a label
    in text.

    Args:
        labels: in order.
        as_text: refuse documents whose label is not a text, to be predicted by the model itself.
    """

    def __init__(self, labels: Sequence[str], as_text: bool = False) -> None:
        self.numbers = {label: number for number, label in enumerate(labels)}
        self.as_text = as_text

    def arrange(self, document: Document) -> Document:
        return label_last(document)

    def check(self, document: Document) -> tuple[int, bool]:
        """Return what `number_of_label` does."""
        label, is_text = number_of_label(document, self.numbers)
        if self.as_text and not is_text:
            raise ValueError(
                f"objective.head language predicts labels as text, and that of document {document.key!r} is none: set "
                "objective.head to linear, or make it a text with fields: [..., {label: <name>, learn: true}]"
            )
        return label, is_text

    def labels(
        self, document: Document, spans: Sequence[tuple[int, int]], length: int, number: int, tokenizer: Tokenizer
    ) -> np.ndarray:
        label, is_text = self.check(document)
        labels = np.full(length, NO_LABEL, np.int32)
        for first, stop in spans[: len(spans) - is_text]:
            labels[first:stop] = label
        labels[spans[-1][0] - 1 if is_text else length - 1] = label
        return labels


def number_of_label(document: Document, numbers: Mapping[str, int]) -> tuple[int, bool]:
    """Return the number of the label, and whether it is the last segment; raise ValueError if it is unknown or stands alone."""
    label, is_text = label_of(document)
    if label not in numbers:
        shown = f"{list(numbers)[:20]}{' and more' * (len(numbers) > 20)}"
        raise ValueError(
            f"document {document.key!r} has the label {label!r}, model.objective.labels has {shown}: add it there, or remove "
            "the document"
        )
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
    """Predict which of several labels a document has.

    Metrics: accuracy (which is also micro precision, recall and F1), macro precision, recall and F1, and those of each label,
    for up to `MOST_NAMED` labels. `confusion.png` and `summary.json` hold the confusion matrix.

    Args:
        labels: all labels, in the order of the classes, as `pile prepare` prints them.
        head: linear, on the pooled vectors; or language: the model's own softmax, which needs no new weights (arXiv:2001.07676
            calls the labels a verbalizer). It is taken over the first tokens of the labels. If some labels begin alike, the
            model learns all tokens of the label instead, and the label whose text is most likely is predicted.
        pooling: features of a document, concatenated: mean, maximum or standard deviation of its hidden vectors, or the last
            one, which has read all of it. (The head `language` reads the last one.)
        class_weights: of the labels in the loss, in their order; balanced: total / (classes * count), by the labels that the
            run has seen so far; null: all 1.
        dropout: fraction of the features that is dropped in training.
        label_smoothing: probability that training gives to all labels alike instead of the right one (arXiv:1512.00567); not
            used by `head: language` where labels begin alike.
        language_weight: see `Objective`.
        freeze: see `Objective`.
        learning_rate: see `Objective`.
    """

    seen: Tensor
    first_tokens: Tensor
    label_paths: list[TokenPath] | None = None  # tokens of each label, if some begin alike
    reads_end: Tensor
    weights: Tensor

    def __init__(
        self,
        labels: list[str],
        head: Literal["linear", "language"] = "linear",
        pooling: list[Pooling] = ["mean"],  # noqa: B006 (jsonargparse shows it; never changed)
        class_weights: Literal["balanced"] | list[float] | None = None,
        dropout: float = 0.1,
        label_smoothing: float = 0.0,
        language_weight: float = 0.0,
        freeze: bool = False,
        learning_rate: float = 0.001,
    ) -> None:
        super().__init__(language_weight, freeze, learning_rate)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"objective.label_smoothing is 0 or more and below 1, not {label_smoothing}")
        if len(set(labels)) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"objective.labels needs two different labels or more, not {labels}")
        if not pooling or len(set(pooling)) < len(pooling):
            raise ValueError(f"objective.pooling needs some of mean, max, deviation and last, once each, not {pooling}")
        if isinstance(class_weights, list) and (len(class_weights) != len(labels) or min(class_weights) <= 0):
            raise ValueError(f"objective.class_weights needs a number above 0 for each of {labels}, not {class_weights}")
        if head == "language" and freeze:
            raise ValueError("objective.head language has no weights of its own: with objective.freeze set head to linear")
        self.labels, self.kind = labels, head
        self.pooling: list[Pooling] = ["last"] if head == "language" else pooling
        self.class_weights = class_weights
        self.dropout, self.label_smoothing = dropout, label_smoothing
        self.confusion: Tensor | None = None  # (true, predicted) counts of the last validation

    @property
    def annotator(self) -> Annotator:
        return LabelAnnotator(self.labels, self.kind == "language")

    def build(self, model: FusedLanguageModel) -> None:
        from torchmetrics import MetricCollection
        from torchmetrics import classification as metrics

        classes = len(self.labels)
        self.register_buffer("reads_end", torch.zeros((), dtype=torch.bool))  # trained on labels that are no text
        if self.kind == "language":
            ids = [model.tokenizer.encode(label).astype(int) + Vocabulary.SPECIALS for label in self.labels]
            paths = [[*((token, 0) for token in label.tolist()), (TEXT_END, 0)] for label in ids]
            firsts = [path[0][0] for path in paths]
            self.register_buffer("first_tokens", torch.tensor(firsts), persistent=False)
            if len(set(firsts)) < len(firsts):
                self.label_paths = paths
        else:
            self.head = nn.Linear(model.backbone.width * len(self.pooling), classes)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if self.class_weights == "balanced":
            self.register_buffer("seen", torch.ones(classes))
        given = self.class_weights if isinstance(self.class_weights, list) else [1.0] * classes
        self.register_buffer("weights", torch.tensor(given), persistent=False)
        kinds = {
            "precision": metrics.MulticlassPrecision,
            "recall": metrics.MulticlassRecall,
            "f1": metrics.MulticlassF1Score,
        }
        collected = {name: kind(classes, average="macro") for name, kind in kinds.items()}
        collected |= {f"{name}_by_label": kind(classes, average="none") for name, kind in kinds.items()}
        collected["accuracy"] = metrics.MulticlassAccuracy(classes, average="micro")
        self.metrics = MetricCollection(collected | {"confusion": metrics.MulticlassConfusionMatrix(classes)})

    def logits(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (L, classes) float32 of the labelled pieces, and (L,) their labels."""
        pieces, labels = labelled_pieces(batch)
        if self.label_paths:
            return self._score_labels(model, batch, pieces), labels
        features = pool(hidden, batch, self.pooling)[pieces]
        if self.kind == "language":
            return model.logits(features, TEXT)[:, self.first_tokens], labels
        return self.head(self.drop(features, batch, batch.piece_starts[pieces].long(), self.dropout)).float(), labels

    def _score_labels(self, model: FusedLanguageModel, batch: Batch, pieces: Tensor) -> Tensor:
        """Return (L, classes) log-likelihoods of the text of each label after the pieces."""
        with model.inference():
            tokens, indices = model.fill(batch).flatten(), model.image_indices(batch).flatten()
            seen = model.features(batch)
            features = None if seen is None else seen.flatten(0, 1)
            spans = torch.stack([batch.piece_starts[pieces], last_labelled(batch)[pieces] + 1], 1).tolist()
            contexts = [[as_row(tokens, indices, features, first, stop)] for first, stop in spans]
            found = score_paths(model, contexts, [self.label_paths or []] * len(contexts))
        nats = [[row[number].nats for number in range(len(self.labels))] for row in found]
        return -torch.tensor(nats, device=tokens.device).view(-1, len(self.labels))

    def _text_loss(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch, weights: Tensor) -> Tensor:
        """Return () weighted nats of the labels' tokens and of the `<end>` after them."""
        assert self.label_paths is not None
        pieces, labels = labelled_pieces(batch)
        steps = torch.arange(max(map(len, self.label_paths)), device=pieces.device)
        at = last_labelled(batch)[pieces, None] + steps  # (L, longest label) tokens whose next token is learned
        is_label = at + 1 < batch.piece_starts[pieces + 1, None]
        at = at * is_label
        targets = batch.tokens.flatten()[at + 1].long() * is_label
        logits = model.logits(hidden.flatten(0, 1)[at], TEXT)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(at)
        return ((nats * is_label).sum(1) * weights[labels]).sum()

    def count(self, model: FusedLanguageModel, batch: Batch) -> Tensor:
        labels = labelled_pieces(batch)[1]
        ends = ((batch.labels >= 0) & (batch.tokens == Vocabulary.END)).any()
        counts = torch.zeros_like(self.weights).index_add(0, labels, torch.ones_like(labels, dtype=torch.float32))
        return torch.cat([ends.float()[None], counts])

    def begin_step(self, total: Tensor) -> tuple[Tensor, Tensor]:
        ends, counts = total[0], total[1:]
        self.reads_end |= ends > 0
        weights = self.weights
        if self.class_weights == "balanced":
            self.seen += counts
            weights = self.seen.sum() / (len(self.labels) * self.seen)
        return weights, (weights * counts).sum().clamp_min(1e-9)

    def forward(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch, step: Any = None) -> Tensor:
        weights, total = step or self.prepare(model, [batch])[0]
        if self.label_paths:
            return self._text_loss(model, hidden, batch, weights) / total
        logits, labels = self.logits(model, hidden, batch)
        smoothing = self.label_smoothing
        return F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing) / total

    @torch.no_grad()
    def update(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> None:
        logits, labels = self.logits(model, hidden, batch)
        if len(labels):
            self.metrics.update(logits, labels)

    def compute(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = self.metrics.compute()
        self.metrics.reset()
        self.confusion = values.pop("confusion").cpu()
        self.by_label = {name: values.pop(f"{name}_by_label").tolist() for name in ("precision", "recall", "f1")}
        if len(self.labels) <= MOST_NAMED:
            for name, of_labels in self.by_label.items():
                values |= {f"{name}/{label}": torch.tensor(v) for label, v in zip(self.labels, of_labels, strict=True)}
        return values

    def report(self, folder: Path) -> dict[str, Any]:
        """Write `confusion.png`, also into the W&B run that is open."""
        if self.confusion is None:
            return {}
        import wandb
        from matplotlib.pyplot import close
        from torchmetrics.utilities.plot import plot_confusion_matrix

        picture = folder / "confusion.png"
        figure, _ = plot_confusion_matrix(self.confusion, labels=self.labels, add_text=len(self.labels) <= 40, cmap="Blues")
        figure.set_size_inches(*[3.5 + 0.55 * min(len(self.labels), 40)] * 2)
        figure.savefig(picture, bbox_inches="tight")
        close(figure)

        if wandb.run is not None:
            wandb.log({"confusion": wandb.Image(str(picture))})
        rows = zip(*self.by_label.values(), strict=True)
        by_label = {label: dict(zip(self.by_label, row, strict=True)) for label, row in zip(self.labels, rows, strict=True)}
        return {"confusion": self.confusion.tolist(), "labels": by_label}

    def _with_any_label(self, document: Document) -> Document:
        """Give a document a label, which nothing reads, in the form that labels had in training."""
        if not self.reads_end:
            return Document((*document.segments, Segment(self.labels[0])), document.key)
        last = document.segments[-1]
        label = next(one for one in self.labels if last.modality != TEXT or one != last.text.strip())
        return Document(document.segments, document.key, meta={"label": label})

    @torch.no_grad()
    def predict(self, model: FusedLanguageModel, documents: Sequence[Document]) -> Tensor:
        """Return (N, classes) float32 probabilities for documents without a label, read whole, however long; on the CPU.

        Raises:
            BadSample: a medium cannot be decoded, or the model has no codec for it.
        """
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


def pool(hidden: Tensor, batch: Batch, kinds: Sequence[Pooling]) -> Tensor:
    """Return (P, D * kinds) float32 of the labelled tokens of each piece."""
    means = mean_by_piece(hidden, batch)
    labelled = batch.labels.flatten() >= 0
    piece = batch.piece_numbers.flatten()
    flat = hidden.flatten(0, 1)

    def maximum() -> Tensor:
        inside = flat.float().masked_fill(~labelled[:, None], -torch.inf)
        lowest = torch.full_like(means, -torch.inf)
        return lowest.scatter_reduce(0, piece[:, None].expand_as(inside), inside, "amax")

    def deviation() -> Tensor:
        squares = (flat.float() - means[piece]).square().unflatten(0, batch.labels.shape)
        return (mean_by_piece(squares, batch) + 1e-6).sqrt()

    def last() -> Tensor:
        return flat[last_labelled(batch)].float()

    found: dict[str, Callable[[], Tensor]] = {"mean": lambda: means, "max": maximum, "deviation": deviation, "last": last}
    return torch.cat([found[kind]() for kind in kinds], dim=-1)


def last_labelled(batch: Batch) -> Tensor:
    """Return (P,) flat index of the last labelled token of each piece, 0 without any."""
    labels = batch.labels.flatten()
    indices = torch.arange(len(labels), device=labels.device).masked_fill(labels < 0, 0)
    empty = indices.new_zeros(len(batch.piece_sources))
    return empty.scatter_reduce(0, batch.piece_numbers.flatten(), indices, "amax")
