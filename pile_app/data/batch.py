"""What the model trains on: B packs of T places, in one piece of memory.

A worker writes down only what cannot be derived: the tokens, which modality is to be predicted after each of them, and where
pieces of documents and media begin. The rest (number of the document, place in it, source, targets) is computed from that on
the device where the batch is used, without waiting for it: a fifth of the bytes, and what variable-length attention wants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pile_app.data import transport
from pile_app.documents import MODALITIES

PADDING = -1  # `Batch.document` and `piece_sources` of a place that holds nothing
NOT_LEARNED = len(MODALITIES)  # `Batch.learned` of a place whose next token is not predicted

Layout = dict[str, tuple[str, tuple[int, ...], int]]  # name -> type, shape, first byte


@dataclass
class Batch:
    """B packs of T places, P pieces (a run of padding is one too), N images and E encoded ones, M sounds of at most S samples.

    Tensors in `buffer`: tokens (B, T) int32, 0 where a code belongs; learned (B, T) uint8, modality of the *next* token where
    that is to be predicted, else `NOT_LEARNED`; piece_starts (P + 1,) int32, flat places where pieces begin, then B * T;
    piece_sources (P,) int32, `PADDING` of padding; images (N, C, height, width) uint8; image_starts (N + E,) int32, flat
    places of first codes, last those of images that came encoded; audio (M, S) float32; audio_starts, audio_tokens (M,) int32,
    flat place of the first code and number of codes of each sound; normalizer () float32, targets of the whole optimizer step
    over all ranks; labels (B, T) int32, those of an objective (see `annotation.py`), (0, T) without one.

    Args:
        target_counts: targets of each modality in this batch.
        image_tokens, audio_total: codes of an image; of all sounds together.
        numbers: positions of the packs in the order.
        documents: (source, key, epoch, start, stop) of the pieces that are planned to stand in each pack.
        rejected: (source, key, reason, detail) of documents that could not be used and whose span is masked.
        source_tokens: planned tokens of each source in the whole optimizer step, over all ranks.
    """

    buffer: Tensor  # uint8
    layout: Layout
    target_counts: tuple[int, int, int]
    image_tokens: int = 0
    audio_total: int = 0
    memory: transport.Memory | None = None  # that the buffer lies in, where a loading worker made it
    rejected: list[tuple[int, str, str, str]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    documents: list[list[tuple[int, str, int, int, int]]] = field(default_factory=list)
    source_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        views = {}
        for name, (kind, shape, first) in self.layout.items():
            dtype: torch.dtype = getattr(torch, kind)
            stop = first + math.prod(shape) * dtype.itemsize
            views[name] = self.buffer[first:stop].view(dtype).view(shape)
        self.tokens: Tensor = views["tokens"]
        self.learned: Tensor = views["learned"]
        self.piece_starts: Tensor = views["piece_starts"]
        self.piece_sources: Tensor = views["piece_sources"]
        self.images: Tensor = views["images"].permute(0, 3, 1, 2)  # pixels come from decoders with channels last
        self.image_starts: Tensor = views["image_starts"]
        self.audio: Tensor = views["audio"]
        self.audio_starts: Tensor = views["audio_starts"]
        self.audio_tokens: Tensor = views["audio_tokens"]
        self.normalizer: Tensor = views["normalizer"]
        self.labels: Tensor = views.get("labels", self.tokens[:0])

    # -- What follows from them.

    @cached_property
    def piece_numbers(self) -> Tensor:
        """(B, T) int64 number of the piece of each place."""
        lengths = self.piece_starts.diff()
        numbers = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(numbers, lengths, output_size=self.tokens.numel()).view(self.tokens.shape)

    @cached_property
    def _is_padding(self) -> Tensor:
        return self.piece_sources[self.piece_numbers] == PADDING

    @cached_property
    def document(self) -> Tensor:
        """(B, T) int64 number of the piece, different for all pieces of the batch; `PADDING` where there is none."""
        return self.piece_numbers.masked_fill(self._is_padding, PADDING)

    @cached_property
    def position(self) -> Tensor:
        """(B, T) int64 place within the piece, 0 in padding."""
        places = torch.arange(self.tokens.numel(), device=self.tokens.device).view(self.tokens.shape)
        return (places - self.piece_starts[self.piece_numbers]).masked_fill(self._is_padding, 0)

    @cached_property
    def source(self) -> Tensor:
        """(B, T) int32 number of the source, 0 in padding."""
        return self.piece_sources[self.piece_numbers].clamp_min(0)

    @cached_property
    def targets(self) -> tuple[Tensor, ...]:
        """Per modality (K,) int64, flat places whose next token is to be predicted, increasing."""
        learned = self.learned.flatten()
        return tuple(
            torch.nonzero_static(learned == modality, size=count).squeeze(1)
            for modality, count in enumerate(self.target_counts)
        )

    @cached_property
    def image_slots(self) -> Tensor:
        """(N + E, codes of an image) int64, flat places of the codes."""
        return self.image_starts[:, None] + torch.arange(self.image_tokens, device=self.image_starts.device)

    @cached_property
    def audio_slots(self) -> Tensor:
        """(codes of all sounds,) int64, flat places of the codes, sound after sound."""
        total, device = self.audio_total, self.audio_starts.device
        sounds = torch.arange(len(self.audio_tokens), device=device)
        sound = torch.repeat_interleave(sounds, self.audio_tokens, output_size=total)
        before = self.audio_tokens.cumsum(0) - self.audio_tokens  # codes of the sounds before
        return torch.arange(total, device=device) + (self.audio_starts - before)[sound]

    @cached_property
    def audio_places(self) -> Tensor:
        """(codes of all sounds,) int64, places of the codes in (M, most codes of a sound) rows, one row a sound, flat."""
        longest = torch.arange(int(self.audio_tokens.max()), device=self.audio_tokens.device)
        inside = longest < self.audio_tokens[:, None]
        # Their number is known: a mask would wait for the device to find it.
        return torch.nonzero_static(inside.flatten(), size=self.audio_total).squeeze(1)

    @property
    def padding_share(self) -> float:
        return float(self._is_padding.float().mean())

    # -- From process to process, and to the device, in one piece.

    def __getstate__(self) -> dict[str, Any]:
        state = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.memory is not None:
            state |= {"memory": None, "buffer": self.memory.reference(len(self.buffer))}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["buffer"], tuple):
            state["buffer"] = torch.from_numpy(transport.receive(state["buffer"]))
        self.__dict__.update(state)
        self.__post_init__()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking), memory=None)

    def pin_memory(self) -> Batch:
        return replace(self, buffer=self.buffer.pin_memory(), memory=None)


def allocate(
    arrays: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[dict[str, np.ndarray], Tensor, Layout, transport.Memory | None]:
    """(name -> array, buffer, layout, memory) for arrays of these (type, shape), not initialized, one after the other."""
    from torch.utils.data import get_worker_info

    layout: Layout = {}
    size = 0
    for name, (kind, shape) in arrays.items():
        layout[name] = (kind, shape, size)
        size += -(-math.prod(shape) * np.dtype(kind).itemsize // 64) * 64
    memory = transport.take(size) if transport.IS_POSSIBLE and get_worker_info() is not None else None
    whole = np.empty(size, np.uint8) if memory is None else memory.data(size)
    views = {
        name: whole[first : first + math.prod(shape) * np.dtype(kind).itemsize].view(kind).reshape(shape)
        for name, (kind, shape, first) in layout.items()
    }
    return views, torch.from_numpy(whole), layout, memory
