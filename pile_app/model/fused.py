"""The fused model: one likelihood over text, images and sound.

    batch (B, T) -> codes of its media (frozen codecs) -> embedding (B, T, D) -> backbone (B, T, D) -> a softmax per modality

The next token's modality is always known: after an opener and inside a medium it is a code of that medium, otherwise it is text
or an opener. So each softmax runs over its own slice of the vocabulary, and their product is an exact likelihood of a document.

Notable choices: codes of images and sounds share statistics through their FSQ levels, in embedding and softmax; RMS-normed
embedding; untied heads that start at zero; logits softly capped at 15 (arXiv:2408.00118); learned row and column vectors of
image codes, which also serve backbones without position embeddings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

from pile_app.data.batch import Batch
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT
from pile_app.model.base import Backbone, Cache, initialize, matmul_dtype, norm
from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.codecs import AudioCodec, Codec, ImageCodec, Judge, mirror_and_shift
from pile_app.model.loss import linear_cross_entropy
from pile_app.model.pretrained import load_weights, read_pretrained
from pile_app.model.pretrained_codecs import make_codec
from pile_app.model.readers import ReadersConfig, make_reader
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # by Lightning's precision


class FactoredTable(nn.Module):
    """One vector per code of FSQ with these levels: its own plus the sum of its levels' vectors; then `extra` plain vectors.
    Normally distributed with `std` at first."""

    level_rows: Tensor

    def __init__(self, levels: Sequence[int], extra: int, width: int, std: float) -> None:
        super().__init__()
        self.level_sizes, self.std = tuple(levels), std
        codes = math.prod(levels) if levels else 0
        self.weight = nn.Parameter(torch.empty(codes + extra, width))
        if levels:
            self.register_buffer("level_rows", torch.empty(codes, len(levels), dtype=torch.int64), persistent=False)
            self.levels = nn.Parameter(torch.empty(sum(levels), width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=self.std)
        if self.level_sizes:
            levels, code = [], torch.arange(len(self.level_rows))
            for index, size in enumerate(self.level_sizes):
                levels.append(code % size + sum(self.level_sizes[:index]))
                code = code // size
            self.level_rows.copy_(torch.stack(levels, 1))

    def forward(self) -> Tensor:
        """(codes + extra, D)"""
        if not self.level_sizes:
            return self.weight
        shared = F.embedding_bag(self.level_rows, self.levels, mode="sum")
        return self.weight + F.pad(shared, (0, 0, 0, len(self.weight) - len(shared)))

    def parts(self) -> tuple[Tensor, ...]:
        """Tensors of the table's rows, in order."""
        return (self(),)


@dataclass
class ModalityLoss:
    """Of one modality in one batch."""

    total: Tensor  # summed nats
    each: Tensor  # (K,) nats of each target
    targets: Tensor  # (K,)
    predictions: Tensor | None  # (K,) most likely codes


register_dataclass(ModalityLoss)  # FSDP2 looks into it for what gradients will come back through


class FusedLanguageModel(nn.Module):
    """Vocabulary, codecs, embedding, backbone and heads.

    Args:
        backbone: see `backbones.py`.
        tokenizer: of the text.
        image: shape of the image codec; None: the model knows no images.
        audio: shape of the audio codec; None: the model knows no sound.
        dropout: dropout of the embedding.
        word_dropout: fraction of the learned text's tokens that are masked from what follows them (arXiv:1511.06349), which
            then has to be read off something else, such as an image before the text.
        code_dropout: the same for codes of images and sounds that are given, not learned.
        readers: of images and sounds that are given, see `readers.py`.
    """

    token_bytes: Tensor
    autocast_dtype: torch.dtype | None = None  # in which the run trained: generation on a GPU computes in it
    tables: tuple[Tensor, Tensor | None, list[Tensor]] | None = None  # computed once, see `inference`

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        image: ImageCodecConfig | None = None,
        audio: AudioCodecConfig | None = None,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        code_dropout: float = 0.0,
        readers: ReadersConfig = ReadersConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.vocabulary = make_vocabulary(tokenizer.size, tokenizer.fingerprint, image, audio)
        self.image_codec: ImageCodec | None = make_codec(image)
        self.audio_codec: AudioCodec | None = make_codec(audio)
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.word_dropout, self.code_dropout = word_dropout, code_dropout
        shapes: list[tuple[Sequence[int], int]] = [((), Vocabulary.SPECIALS + tokenizer.size)]
        for config, ends in ((image, 0), (audio, 1)):
            codes = math.prod(config.levels) if config else 0
            shapes.append((config.levels, ends) if config and not config.pretrained else ((), codes + ends))
        width = backbone.embedding_width
        wanted = {modality: getattr(readers, MODALITIES[modality]) for modality in self.codecs}
        reads = tuple(modality for modality, config in wanted.items() if config is not None)
        self.vocabulary = replace(self.vocabulary, reads=reads)
        self.readers = nn.ModuleDict({MODALITIES[m]: make_reader(wanted[m], self.codecs[m], width) for m in reads})
        self.embeddings = nn.ModuleList(FactoredTable(levels, extra, width, backbone.code_std) for levels, extra in shapes)
        self.heads = nn.ModuleList(FactoredTable(levels, extra, backbone.width, 0.0) for levels, extra in shapes)
        if (tables := backbone.text_tables(tokenizer)) is not None:
            self.embeddings[TEXT], self.heads[TEXT] = tables
        rows, columns = self.vocabulary.image_grid
        self.image_rows = nn.Parameter(torch.empty(rows, width))
        self.image_columns = nn.Parameter(torch.empty(columns, width))
        self.register_buffer("token_bytes", torch.empty(self.vocabulary.slices[TEXT].stop, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the parameters and buffers of this module itself."""
        nn.init.zeros_(self.image_rows)
        nn.init.zeros_(self.image_columns)
        token_bytes = torch.from_numpy(self.tokenizer.token_bytes)
        self.token_bytes.copy_(F.pad(token_bytes, (Vocabulary.SPECIALS, 0)))

    initialize = initialize

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone_class: type[Backbone] | None = None) -> FusedLanguageModel:
        """Load the model of a folder that `pile export` wrote, in evaluation mode on the CPU; no code of the folder runs.
        Raises ValueError if it is no such folder, or its parts do not belong together."""
        arguments, weights = read_pretrained(Path(folder), backbone_class)
        try:
            model = cls(**arguments)
            load_weights(model, weights)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{str(folder)!r}: config.json and weights do not belong together: {error}") from error
        model.fingerprint_codecs()
        return model.eval()

    @property
    def codecs(self) -> dict[int, Codec]:
        """The codecs there are, by modality."""
        pairs = ((IMAGE, self.image_codec), (AUDIO, self.audio_codec))
        return {modality: codec for modality, codec in pairs if codec is not None}

    def fingerprint_codecs(self, trained: bool = False) -> None:
        """Write the fingerprints of frozen codecs into the vocabulary, so that the model takes media that they encoded.
        `trained`: those of codecs that the run trains stay out."""
        used = {modality: codec for modality, codec in self.codecs.items() if codec.config.pretrained or not trained}
        found = {modality: codec_fingerprint(codec) for modality, codec in used.items()}
        self.vocabulary = replace(self.vocabulary, image_codec=found.get(IMAGE, ""), audio_codec=found.get(AUDIO, ""))

    def parameters_of_modality(self, modality: int) -> list[nn.Parameter]:
        """Parameters that only batches with this modality use."""
        own = [*self.embeddings[modality].parameters(), *self.heads[modality].parameters()]
        return own + ([self.image_rows, self.image_columns] if modality == IMAGE else [])

    def codec_loss(
        self,
        batch: Batch,
        crop: int | None = None,
        augment: bool = False,
        judges: Mapping[str, Judge] = MappingProxyType({}),
    ) -> dict[int, Tensor]:
        """Reconstruction loss of each codec on the batch's media; a codec without media in the batch has none.

        `crop` cuts sounds to so many tokens at a random position, which bounds the cost of long recordings; `augment`: see
        `mirror_and_shift`; `judges`: see `discriminators.py`. Losses are means over images and over the codes of sounds (see
        `codec_counts`). Pretrained codecs have none in training.
        """
        losses: dict[int, Tensor] = {}
        codecs = {m: codec for m, codec in self.codecs.items() if not (codec.config.pretrained and torch.is_grad_enabled())}
        if IMAGE in codecs and len(batch.images):
            images = batch.images
            if augment:
                images = mirror_and_shift(images, batch.uniform(batch.image_slots[: len(images), 0].long(), 3))
            losses[IMAGE] = codecs[IMAGE].loss(images, judges.get(MODALITIES[IMAGE]))
        if AUDIO in codecs and len(batch.audio):
            audio, tokens = batch.audio, batch.audio_tokens
            if crop is not None and max(batch.sound_tokens) > crop:
                kept = tokens.clamp_max(crop)
                total = sum(min(count, crop) for count in batch.sound_tokens)
                draws = batch.uniform(batch.audio_starts.long()).squeeze(1)
                first = torch.minimum((draws * (tokens - kept + 1)).long(), tokens - kept)
                starts = tokens.cumsum(0) - tokens + first - (kept.cumsum(0) - kept)  # of each sound, minus its new start
                shift = starts.repeat_interleave(kept, output_size=total)
                audio, tokens = audio[torch.arange(total, device=tokens.device) + shift], kept
            losses[AUDIO] = codecs[AUDIO].loss(audio, tokens, judges.get(MODALITIES[AUDIO]))
        return losses

    def codec_counts(self, batch: Batch, crop: int | None = None) -> dict[int, int]:
        """Count the images, and the codes of sounds, that `codec_loss` is the mean over."""
        sounds = batch.sound_tokens if crop is None else [min(count, crop) for count in batch.sound_tokens]
        counts = {IMAGE: len(batch.images), AUDIO: sum(sounds)}
        return {modality: counts[modality] for modality in self.codecs if counts[modality]}

    @torch.no_grad()
    def fill(self, batch: Batch) -> Tensor:
        """(B, T) int64 tokens with the codes of the batch's images and sounds; those of encoded media are there already."""
        tokens = batch.tokens.long()
        flat = tokens.view(-1)
        if self.image_codec and len(batch.images):
            codes = self.image_codec.encode(batch.images)
            flat[batch.image_slots[: len(batch.images)]] = codes + self.vocabulary.starts[IMAGE]
        if self.audio_codec and len(batch.audio):
            lengths = batch.sound_tokens if self.audio_codec.config.pretrained else batch.audio_tokens
            codes = self.audio_codec.encode(batch.audio, lengths)
            flat[batch.audio_slots] = codes + self.vocabulary.starts[AUDIO]
        return tokens

    def features(self, batch: Batch) -> Tensor | None:
        """(B, T, embedding width) what the readers see of the media that are given, 0 elsewhere; None without readers."""
        if not self.readers:
            return None
        flat = torch.zeros(batch.tokens.numel(), self.backbone.embedding_width, device=batch.tokens.device)
        if len(images := batch.given_images):
            slots = batch.image_slots[images].flatten()
            flat = flat.index_copy(0, slots, self.readers["image"](batch.images[images], ()))
        if len(codes := batch.given_codes):
            found = self.readers["audio"](batch.audio[codes], batch.given_sound_tokens)
            flat = flat.index_copy(0, batch.audio_slots[codes], found)
        return flat.view(*batch.tokens.shape, -1)

    def image_indices(self, batch: Batch) -> Tensor:
        """(B, T) 1 + index of the code within its image, 0 elsewhere."""
        indices = torch.zeros_like(batch.tokens, dtype=torch.int64)
        within = torch.arange(1, batch.image_slots.size(1) + 1, device=indices.device)
        indices.view(-1)[batch.image_slots] = within.expand_as(batch.image_slots)
        return indices

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., embedding width) vectors of tokens, and the second of `embedding_tables`."""
        if self.tables or not self.backbone.is_pretrained:
            table, grid = self.tables[:2] if self.tables else self.embedding_tables()
            return F.embedding(tokens, table), grid
        text: Any = self.embeddings[TEXT]
        specials, words = text.parts()  # many and perhaps frozen words: without a copy of them
        ours = torch.cat([specials, *(embedding() for embedding in self.embeddings[1:])])
        word = tokens - len(specials)
        is_word = (word >= 0) & (word < len(words))
        index = torch.where(is_word, 0, torch.where(word < 0, tokens, tokens - len(words)))
        x = torch.where(is_word[..., None], F.embedding(torch.where(is_word, word, 0), words), F.embedding(index, ours))
        return x, self._grid()

    def embedding_tables(self) -> tuple[Tensor, Tensor | None]:
        """(V, embedding width) of all tokens, (1 + codes of an image, embedding width) of positions in an image."""
        return torch.cat([embedding() for embedding in self.embeddings]), self._grid()

    def _grid(self) -> Tensor | None:
        if self.image_codec is None:
            return None
        return F.pad((self.image_rows[:, None] + self.image_columns).flatten(0, 1), (0, 0, 1, 0))

    def hidden(
        self,
        tokens: Tensor,
        image_indices: Tensor,
        document: Tensor,
        position: Tensor,
        cache: Cache | None = None,
        piece_starts: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) hidden states; arguments (B, T), or see `backbones.py`; `features`: of `features`, for the embeddings."""
        x, grid = self._embed(tokens)
        if grid is not None:
            x = x + F.embedding(image_indices, grid)
        if features is not None:
            x = x + features
        x = norm(x) if self.backbone.normalizes_input else x
        more = {"seen_media": seen_media(tokens, document, cache)} if self.backbone.adapts_media_only else {}
        return self.backbone(self.dropout(x), document, position, cache, piece_starts, **more)

    def logits(self, hidden: Tensor, modality: int) -> Tensor:
        """(..., D) -> (..., size of the modality's slice), float32."""
        table = self.tables[2][modality] if self.tables else self.heads[modality]().to(hidden.dtype)
        logits = F.linear(hidden.to(table.dtype), table).float()
        cap = self.backbone.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Switch to evaluation mode and compute the tables of embedding and heads once; generation adds `autocast`."""
        was_training, outer = self.training, self.tables
        self.eval()
        try:
            with torch.no_grad(), self.autocast():
                dtype = matmul_dtype(self.image_rows)
                self.tables = *self.embedding_tables(), [head().to(dtype) for head in self.heads]
            yield
        finally:
            self.tables = outer
            torch.clear_autocast_cache()
            self.train(was_training)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the type that the run trained in, on a GPU, and without `torch.compile`, which compiles for each length.

        (`torch.autocast` would drop the cast weights at the end of each token.)
        """
        kind = self.token_bytes.device.type
        was = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        stance: Any = torch.compiler.set_stance("force_eager") if self.backbone.is_compiled else nullcontext()
        with stance:
            try:
                if self.autocast_dtype is not None and kind != "cpu":
                    torch.set_autocast_dtype(kind, self.autocast_dtype)
                    torch.set_autocast_enabled(kind, True)
                yield
            finally:
                torch.set_autocast_dtype(kind, was[1])
                torch.set_autocast_enabled(kind, was[0])

    def forward(self, batch: Batch, predict: bool = False) -> dict[int, ModalityLoss]:
        """Cross-entropy of every target, by modality; modalities without a target are omitted. `predict`: also the most likely
        codes."""
        return self.losses(*FusedLanguageModel.read(self, batch), batch, predict)  # not what FSDP2 made of `read`

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T) tokens with the codes of the media, (B, T, D) hidden states."""
        tokens = self.fill(batch)
        indices = self.image_indices(batch)
        seen = self._mask(tokens, batch) if self.training and (self.word_dropout or self.code_dropout) else tokens
        features = self.features(batch)
        return tokens, self.hidden(seen, indices, batch.document, batch.position, None, batch.piece_starts, features)

    def _mask(self, tokens: Tensor, batch: Batch) -> Tensor:
        """(B, T) tokens, with random learned words and given codes behind `<null>`."""
        is_learned = torch.zeros_like(tokens, dtype=torch.bool)
        for indices in batch.targets:
            is_learned.view(-1)[indices + 1] = True
        is_code = tokens >= self.vocabulary.slices[TEXT].stop
        is_word = (tokens >= Vocabulary.SPECIALS) & ~is_code
        probability = self.word_dropout * (is_word & is_learned) + self.code_dropout * (is_code & ~is_learned)
        draws = batch.uniform(torch.arange(tokens.numel(), device=tokens.device)).view_as(tokens)
        return torch.where(draws < probability, Vocabulary.NULL, tokens)

    def losses(self, tokens: Tensor, hidden: Tensor, batch: Batch, predict: bool = False) -> dict[int, ModalityLoss]:
        """See `forward`; of what `read` returned."""
        hidden, following = hidden.flatten(0, 1), tokens.flatten()
        losses: dict[int, ModalityLoss] = {}
        heads: Any = self.heads
        for modality, indices in enumerate(batch.targets):
            if not len(indices):
                continue
            targets = following[indices + 1] - self.vocabulary.slices[modality].start
            head, cap = heads[modality].parts(), self.backbone.logit_cap
            found = linear_cross_entropy(hidden[indices], head, targets, cap, predict, self.backbone.is_compiled)
            losses[modality] = ModalityLoss(found[0], found[1], targets, found[2])
        if not losses and torch.is_grad_enabled():  # padding alone: the other devices wait for gradients all the same
            losses[TEXT] = ModalityLoss(hidden.sum() * 0.0, hidden.new_zeros(0), following[:0], None)
        return losses

    def flops_per_token(self, context: float, shares: Sequence[float] | None = None) -> float:
        """Forward and backward of the language model for one token, multiply-adds count two (PaLM, arXiv:2204.02311, app. B).

        Args:
            context: tokens that an average token attends to.
            shares: fraction of the targets of each modality, each through its own head only; None: the same for all.
        """
        sizes = [s.stop - s.start for s in self.vocabulary.slices]
        if shares is None:
            used = self.vocabulary.modalities
            shares = [(modality in used) / len(used) for modality in range(len(sizes))]
        head = 2.0 * self.backbone.width * sum(share * size for share, size in zip(shares, sizes, strict=True))
        return self.backbone.passes * self.backbone.flops_per_token(context) + 3 * head


def seen_media(tokens: Tensor, document: Tensor, cache: Cache | None = None) -> Tensor:
    """(B, T) whether an image or a sound of its document begins at a token or before it; all (B, T) integers."""
    opens = (tokens == Vocabulary.OPENERS[IMAGE]) | (tokens == Vocabulary.OPENERS[AUDIO])
    if cache is None:
        index = torch.arange(1, 1 + tokens.size(1), device=tokens.device)
        starts = F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
        return (opens * index).cummax(1).values >= (starts * index).cummax(1).values
    seen = opens.cumsum(1) > 0
    seen = seen if cache.seen_media is None else seen | cache.seen_media
    cache.seen_media = seen[:, -1:]
    return seen


def codec_fingerprint(codec: Codec) -> str:
    """32 hexadecimal digits that differ between codecs of another shape or other weights."""
    shape = {name: value for name, value in asdict(codec.config).items() if name not in ("pretrained", "codebooks")}
    digest = hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def make_vocabulary(
    text_tokens: int, tokenizer: str, image: ImageCodecConfig | None, audio: AudioCodecConfig | None
) -> Vocabulary:
    """The vocabulary of a tokenizer and codecs."""
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
        audio_codebooks=audio.codebooks if audio else 1,
    )
