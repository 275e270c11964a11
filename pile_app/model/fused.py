"""The fused model: one likelihood over text, images and sound.

    batch (B, T) -> codes of its media (frozen codecs) -> embedding (B, T, D) -> backbone (B, T, D) -> a softmax per modality

Which modality comes next is known at every place: after an opener and inside a medium it is that medium's codes, everywhere
else it is text or the opener of the next segment. So each softmax runs over its own slice of the vocabulary, and the product of
all of them is an exact likelihood of the whole document.

Notable choices: codes of an image or a sound share statistics through their FSQ levels, in embedding and softmax alike (a
vector per code plus one per level and dimension); RMS-normed embedding; untied heads that start at zero; logits capped softly
at 15 (arXiv:2408.00118); learned row and column vectors for image codes, which also serve backbones without positions of their
own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

from pile_app.data.batch import Batch
from pile_app.documents import AUDIO, IMAGE, TEXT
from pile_app.model.backbones import Backbone, Cache, norm
from pile_app.model.codecs import AudioCodec, AudioCodecConfig, FiniteScalarQuantizer, ImageCodec, ImageCodecConfig
from pile_app.model.loss import linear_cross_entropy
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer

LOGIT_CAP = 15.0


class FactoredTable(nn.Module):
    """One vector per code: a vector of its own plus the sum of its levels' vectors; then `extra` plain ones.

    Args:
        quantizer: says which levels a code has; None for a plain table.
        extra: rows after the codes (or all rows).
        width: D.
        std: of the normal initialization; 0 for zeros.
    """

    level_rows: Tensor

    def __init__(self, quantizer: FiniteScalarQuantizer | None, extra: int, width: int, std: float) -> None:
        super().__init__()
        codes = quantizer.codes if quantizer else 0
        self.weight = nn.Parameter(torch.randn(codes + extra, width) * std)
        if quantizer is not None:
            offsets = quantizer.levels.cumsum(0) - quantizer.levels
            rows = quantizer.to_levels(torch.arange(codes)) + offsets
            self.register_buffer("level_rows", rows, persistent=False)  # (codes, d)
            self.levels = nn.Parameter(torch.randn(quantizer.level_count, width) * std)

    def forward(self) -> Tensor:
        """(codes + extra, D)"""
        if not hasattr(self, "levels"):
            return self.weight
        shared = F.embedding_bag(self.level_rows, self.levels, mode="sum")
        return self.weight + F.pad(shared, (0, 0, 0, len(self.weight) - len(shared)))


@dataclass
class ModalityLoss:
    """Of one modality in one batch: summed nats, nats of each target (K,), targets (K,), most likely codes (K,) if asked."""

    total: Tensor
    each: Tensor
    targets: Tensor
    predictions: Tensor | None


register_dataclass(ModalityLoss)  # FSDP2 looks into it for what gradients will come back through


class FusedLanguageModel(nn.Module):
    """Vocabulary, codecs, embedding, backbone and heads.

    Args:
        backbone: see `backbones.py`; its width is D, and it says how wide the embedding is (D, unless asked otherwise).
        tokenizer: of the text.
        image: shape of the image codec; None: the model knows no images.
        audio: shape of the audio codec; None: the model knows no sound.
        dropout: share of the embedding that is dropped in training.
        word_dropout: share of the learned text's tokens that are hidden in training from what follows them (arXiv:1511.06349),
            which then has to be read off something else, such as an image before the text.
        code_dropout: the same of the codes of images and sounds that are given, not learned.
    """

    token_bytes: Tensor

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        image: ImageCodecConfig | None = None,
        audio: AudioCodecConfig | None = None,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        code_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.vocabulary = make_vocabulary(tokenizer.size, tokenizer.fingerprint, image, audio)
        self.image_codec = ImageCodec(image) if image else None
        self.audio_codec = AudioCodec(audio) if audio else None
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.word_dropout, self.code_dropout = word_dropout, code_dropout
        image_quantizer = self.image_codec.quantizer if self.image_codec else None
        audio_quantizer = self.audio_codec.quantizer if self.audio_codec else None
        shapes = (
            (None, Vocabulary.SPECIALS + tokenizer.size),
            (image_quantizer, 0),
            (audio_quantizer, 1),
        )
        width = backbone.embedding_width
        self.embeddings = nn.ModuleList(FactoredTable(quantizer, extra, width, 0.5) for quantizer, extra in shapes)
        self.heads = nn.ModuleList(FactoredTable(quantizer, extra, backbone.width, 0.0) for quantizer, extra in shapes)
        rows, columns = self.vocabulary.image_grid
        self.image_rows = nn.Parameter(torch.zeros(rows, width))
        self.image_columns = nn.Parameter(torch.zeros(columns, width))
        token_bytes = torch.zeros(Vocabulary.SPECIALS + tokenizer.size, dtype=torch.int64)
        token_bytes[Vocabulary.SPECIALS :] = torch.as_tensor(tokenizer.token_bytes)
        self.register_buffer("token_bytes", token_bytes, persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone_class: type[Backbone] | None = None) -> FusedLanguageModel:
        """The model of a folder that `pile export` wrote; no code of the folder is run. See `pretrained.py`."""
        from pile_app.model.pretrained import load_pretrained

        return load_pretrained(Path(folder), backbone_class)

    @property
    def codecs(self) -> dict[int, ImageCodec | AudioCodec]:
        """The codecs there are, by modality."""
        pairs = ((IMAGE, self.image_codec), (AUDIO, self.audio_codec))
        return {modality: codec for modality, codec in pairs if codec is not None}

    def fingerprint_codecs(self) -> None:
        """Writes into the vocabulary which codecs these are. For codecs that will not change any more: with it the model takes
        media that they have encoded."""
        found = {modality: codec_fingerprint(codec) for modality, codec in self.codecs.items()}
        self.vocabulary = replace(self.vocabulary, image_codec=found.get(IMAGE, ""), audio_codec=found.get(AUDIO, ""))

    def parameters_of_modality(self, modality: int) -> list[nn.Parameter]:
        """Parameters that only batches with this modality use."""
        own = [*self.embeddings[modality].parameters(), *self.heads[modality].parameters()]
        return own + ([self.image_rows, self.image_columns] if modality == IMAGE else [])

    def codec_loss(self, batch: Batch, crop: int | None = None) -> dict[int, Tensor]:
        """Reconstruction loss of each codec on the batch's media; a codec without media in the batch has none.

        `crop` cuts sounds to so many tokens at a random position, which bounds the cost of long recordings. The losses are
        means over images, and over the codes of sounds (see `codec_counts`).
        """
        losses: dict[int, Tensor] = {}
        if self.image_codec and len(batch.images):
            with full_precision(batch):
                losses[IMAGE] = self.image_codec.loss(batch.images)
        if self.audio_codec and len(batch.audio):
            audio, tokens = batch.audio, batch.audio_tokens
            if crop is not None and max(batch.sound_tokens) > crop:
                kept = tokens.clamp_max(crop)
                total = sum(min(count, crop) for count in batch.sound_tokens)
                draws = batch.uniform(batch.audio_starts.long()).squeeze(1)
                first = torch.minimum((draws * (tokens - kept + 1)).long(), tokens - kept)
                starts = tokens.cumsum(0) - tokens + first - (kept.cumsum(0) - kept)  # of each sound, minus its new start
                shift = starts.repeat_interleave(kept, output_size=total)
                audio, tokens = audio[torch.arange(total, device=tokens.device) + shift], kept
            with full_precision(batch):
                losses[AUDIO] = self.audio_codec.loss(audio, tokens)
        return losses

    def codec_counts(self, batch: Batch, crop: int | None = None) -> dict[int, int]:
        """Number of images, or of codes of sounds, that `codec_loss` of each codec is the mean over."""
        sounds = batch.sound_tokens if crop is None else [min(count, crop) for count in batch.sound_tokens]
        counts = {IMAGE: len(batch.images), AUDIO: sum(sounds)}
        return {modality: counts[modality] for modality in self.codecs if counts[modality]}

    @torch.no_grad()
    def fill(self, batch: Batch) -> Tensor:
        """(B, T) int64, the batch's tokens with the codes of its images and sounds; those of encoded ones are there already."""
        tokens = batch.tokens.long()
        flat = tokens.view(-1)
        if self.image_codec and len(batch.images):
            with full_precision(batch):
                flat[batch.image_slots[: len(batch.images)]] = (
                    self.image_codec.encode(batch.images) + self.vocabulary.starts[IMAGE]
                )
        if self.audio_codec and len(batch.audio):
            with full_precision(batch):
                codes = self.audio_codec.encode(batch.audio, batch.audio_tokens)
            flat[batch.audio_slots] = codes + self.vocabulary.starts[AUDIO]
        return tokens

    def image_places(self, batch: Batch) -> Tensor:
        """(B, T) 1 + number of the code within its image, 0 elsewhere."""
        places = torch.zeros_like(batch.tokens, dtype=torch.int64)
        numbers = torch.arange(1, batch.image_slots.size(1) + 1, device=places.device)
        places.view(-1)[batch.image_slots] = numbers.expand_as(batch.image_slots)
        return places

    def hidden(
        self,
        tokens: Tensor,
        image_places: Tensor,
        document: Tensor,
        position: Tensor,
        cache: Cache | None = None,
        piece_starts: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) what the backbone makes of the tokens; arguments (B, T), or see `backbones.py`; `beside`: (B, T, embedding
        width) that is added to the embeddings."""
        table = torch.cat([embedding() for embedding in self.embeddings])  # (V, embedding width)
        x = F.embedding(tokens, table)
        if self.image_codec is not None:
            grid = (self.image_rows[:, None] + self.image_columns).flatten(0, 1)
            x = x + F.embedding(image_places, F.pad(grid, (0, 0, 1, 0)))
        if beside is not None:
            x = x + beside
        return self.backbone(self.dropout(norm(x)), document, position, cache, piece_starts)

    def logits(self, hidden: Tensor, modality: int) -> Tensor:
        """(..., D) -> (..., size of the modality's slice), float32."""
        logits = F.linear(hidden, self.heads[modality]().to(hidden.dtype)).float()
        return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)

    def forward(self, batch: Batch, predict: bool = False) -> dict[int, ModalityLoss]:
        """Cross-entropy of every target, by modality; modalities without a target are left out. `predict`: what is most likely,
        too."""
        return self.losses(*self.read(batch), batch, predict)

    def read(self, batch: Batch, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T) tokens with the codes of the media, (B, T, D) what the backbone makes of them; `beside`: see `hidden`."""
        tokens = self.fill(batch)
        places_of_codes = self.image_places(batch)
        seen = self._hide(tokens, batch) if self.training and (self.word_dropout or self.code_dropout) else tokens
        return tokens, self.hidden(seen, places_of_codes, batch.document, batch.position, None, batch.piece_starts, beside)

    def _hide(self, tokens: Tensor, batch: Batch) -> Tensor:
        """(B, T) tokens, shares of the learned words and of the given codes behind `<null>`."""
        is_learned = torch.zeros_like(tokens, dtype=torch.bool)
        for places in batch.targets:
            is_learned.view(-1)[places + 1] = True
        is_code = tokens >= self.vocabulary.slices[TEXT].stop
        is_word = (tokens >= Vocabulary.SPECIALS) & ~is_code
        share = self.word_dropout * (is_word & is_learned) + self.code_dropout * (is_code & ~is_learned)
        draws = batch.uniform(torch.arange(tokens.numel(), device=tokens.device)).view_as(tokens)
        return torch.where(draws < share, Vocabulary.NULL, tokens)

    def losses(self, tokens: Tensor, hidden: Tensor, batch: Batch, predict: bool = False) -> dict[int, ModalityLoss]:
        """See `forward`; of what `read` returned."""
        hidden, following = hidden.flatten(0, 1), tokens.flatten()
        losses: dict[int, ModalityLoss] = {}
        for modality, places in enumerate(batch.targets):
            if not len(places):
                continue
            targets = following[places + 1] - self.vocabulary.slices[modality].start
            total, each, predictions = linear_cross_entropy(hidden[places], self.heads[modality](), targets, LOGIT_CAP, predict)
            losses[modality] = ModalityLoss(total, each, targets, predictions)
        if not losses and torch.is_grad_enabled():  # padding alone: the other devices wait for gradients all the same
            losses[TEXT] = ModalityLoss(hidden.sum() * 0.0, hidden.new_zeros(0), following[:0], None)
        return losses

    def flops_per_token(self, context: float, shares: Sequence[float] | None = None) -> float:
        """Forward and backward of the language model for one token, multiply-adds count two (PaLM, arXiv:2204.02311, app. B).

        Args:
            context: tokens that an average token attends to.
            shares: targets of each modality for one token: each goes through its own head alone. None: the modalities that the
                model has, alike.
        """
        sizes = [s.stop - s.start for s in self.vocabulary.slices]
        if shares is None:
            used = self.vocabulary.modalities
            shares = [(modality in used) / len(used) for modality in range(len(sizes))]
        head = 2.0 * self.backbone.width * sum(share * size for share, size in zip(shares, sizes, strict=True))
        return 3 * (self.backbone.flops_per_token(context) + head)


def codec_fingerprint(codec: ImageCodec | AudioCodec, weights: Mapping[str, Tensor] | None = None) -> str:
    """32 hexadecimal digits that differ between codecs of another shape or other weights. `weights`: None takes its own."""
    digest = hashlib.blake2b(json.dumps(asdict(codec.config), sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted((codec.state_dict() if weights is None else weights).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def full_precision(batch: Batch) -> torch.autocast:
    """Codecs compute in float32 whatever the run does: half precision would move codes over the borders of their levels."""
    return torch.autocast(batch.tokens.device.type, enabled=False)


def make_vocabulary(
    text_tokens: int, tokenizer: str, image: ImageCodecConfig | None, audio: AudioCodecConfig | None
) -> Vocabulary:
    """The vocabulary that follows from tokenizer and codecs."""
    side = image.size // image.patch if image else 0
    return Vocabulary(
        text_tokens=text_tokens,
        tokenizer=tokenizer,
        image_codes=math.prod(image.levels) if image else 0,
        image_shape=(image.channels, image.size, image.size) if image else (0, 0, 0),
        image_grid=(side, side),
        audio_codes=math.prod(audio.levels) if audio else 0,
        sample_rate=audio.sample_rate if audio else 0,
        samples_per_token=audio.samples_per_token if audio else 0,
    )
