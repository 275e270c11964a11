"""Batches: B packs of T tokens, in one block of memory.

A worker writes only the tokens, the modality predicted after each, and where pieces and media begin. The device derives
document numbers, positions, sources and targets, without waiting: a fifth of the bytes to copy."""

from __future__ import annotations

import math
import mmap
import os
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pile_app.documents import MODALITIES

PADDING = -1  # in `Batch.document` and `piece_sources`
NOT_LEARNED = len(MODALITIES)  # in `Batch.learned`: the next token is not predicted

HEADER = 64  # bytes before the data; the first is 1 while the memory is in use
IS_POSSIBLE = hasattr(os, "memfd_create")  # Linux; elsewhere PyTorch's own way
Layout = dict[str, tuple[str, tuple[int, ...], int]]  # name -> type, shape, first byte


@dataclass
class Batch:
    """B packs of T tokens with P pieces (padding included), N images, E encoded images, and M sounds of A codes."""

    buffer: Tensor  # uint8
    layout: Layout
    target_counts: tuple[int, int, int]  # of each modality in this batch
    image_tokens: int = 0  # codes of an image
    sound_tokens: list[int] = field(default_factory=list)  # `audio_tokens` on the host
    memory: Memory | None = None  # that holds the buffer, if a loading worker made it
    rejected: list[tuple[int, str, str, str]] = field(default_factory=list)  # (source, key, reason, detail), masked
    numbers: list[int] = field(default_factory=list)  # positions of the packs in the order
    documents: list[list[tuple[int, str, int, int, int]]] = field(default_factory=list)  # (source, key, epoch, start, stop)
    source_tokens: list[int] = field(default_factory=list)  # planned tokens of each source in the step, over all ranks
    piece_lengths: list[int] = field(default_factory=list)  # tokens of each piece that is not padding
    label_counts: list[int] = field(default_factory=list)  # labelled tokens of each piece, with an objective
    given_sound_tokens: list[int] = field(default_factory=list)  # codes of each sound that a reader reads

    def __post_init__(self) -> None:
        views = {}
        for name, (kind, shape, first) in self.layout.items():
            dtype: torch.dtype = getattr(torch, kind)
            stop = first + math.prod(shape) * dtype.itemsize
            views[name] = self.buffer[first:stop].view(dtype).view(shape)
        # Flat indices count the tokens of all packs, 0 to B * T.
        self.tokens: Tensor = views["tokens"]  # (B, T) int32, 0 for the codes of media
        self.learned: Tensor = views["learned"]  # (B, T) uint8, modality of the *next* token, or `NOT_LEARNED`
        self.labels: Tensor = views.get("labels", self.tokens[:0])  # (B, T) int32, or (0, T) without an objective
        self.piece_starts: Tensor = views["piece_starts"]  # (P + 1,) int32 flat indices, B * T last
        self.piece_sources: Tensor = views["piece_sources"]  # (P,) int32
        self.images: Tensor = views["images"].permute(0, 3, 1, 2)  # (N, C, height, width) uint8; decoders write channels last
        self.image_starts: Tensor = views["image_starts"]  # (N + E,) int32, flat index of each first code, encoded images last
        self.audio: Tensor = views["audio"]  # (A, samples_per_token) float32, the samples of each code, zero-padded
        self.audio_starts: Tensor = views["audio_starts"]  # (M,) int32, flat index of each first code
        self.audio_tokens: Tensor = views["audio_tokens"]  # (M,) int32, codes of each sound
        self.given_images: Tensor = views["given_images"]  # int32, which of `images` a reader reads
        self.given_codes: Tensor = views["given_codes"]  # int32, which of `audio`
        self.normalizer: Tensor = views["normalizer"]  # () float32, targets of the whole optimizer step over all ranks

    @cached_property
    def piece_numbers(self) -> Tensor:
        """Return the index of the piece that each token belongs to, (B, T) int64."""
        lengths = self.piece_starts.diff()
        numbers = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(numbers, lengths, output_size=self.tokens.numel()).view(self.tokens.shape)

    @cached_property
    def _is_padding(self) -> Tensor:
        return self.piece_sources[self.piece_numbers] == PADDING

    @cached_property
    def document(self) -> Tensor:
        """Index of the piece of each token, or `PADDING`, (B, T) int64."""
        return self.piece_numbers.masked_fill(self._is_padding, PADDING)

    @cached_property
    def position(self) -> Tensor:
        """Index within the piece, 0 in padding, (B, T) int64."""
        indices = torch.arange(self.tokens.numel(), device=self.tokens.device).view(self.tokens.shape)
        return (indices - self.piece_starts[self.piece_numbers]).masked_fill(self._is_padding, 0)

    @cached_property
    def source(self) -> Tensor:
        """Index of the source, 0 in padding, (B, T) int32."""
        return self.piece_sources[self.piece_numbers].clamp_min(0)

    @cached_property
    def targets(self) -> tuple[Tensor, ...]:
        """Flat indices of the tokens whose next token is predicted, (K,) int64 per modality."""
        learned, counts = self.learned.flatten(), enumerate(self.target_counts)
        return tuple(torch.nonzero_static(learned == modality, size=count).squeeze(1) for modality, count in counts)

    @cached_property
    def image_slots(self) -> Tensor:
        """Flat indices of the codes of images, (N + E, codes of an image) int64."""
        return self.image_starts[:, None] + torch.arange(self.image_tokens, device=self.image_starts.device)

    @cached_property
    def audio_slots(self) -> Tensor:
        """Flat indices of the codes of all sounds, (A,) int64."""
        before = self.audio_tokens.cumsum(0) - self.audio_tokens  # codes of the sounds before
        shift = torch.repeat_interleave(self.audio_starts - before, self.audio_tokens, output_size=len(self.audio))
        return torch.arange(len(self.audio), device=shift.device) + shift

    def uniform(self, indices: Tensor, width: int = 1, purpose: int = 0) -> Tensor:
        """Draw (len(indices), width) numbers in [0, 1) for flat indices, from the position of the pack and the index in it.

        Any division of a step into devices and micro-batches draws the same numbers. (A batch without positions draws from
        torch's generator.)"""
        length = self.tokens.size(1)
        if not self.numbers:
            return torch.rand(len(indices), width, device=indices.device)
        starts = torch.stack([torch.full((), number * length, device=indices.device) for number in self.numbers])
        key = (starts[indices // length] + indices % length)[:, None] * width + torch.arange(width, device=indices.device)
        key = key ^ (purpose << 56)
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):  # SplitMix64
            key = (key ^ ((key >> shift) & ((1 << 64 - shift) - 1))) * factor
        return ((key >> 40) & 0xFFFFFF).float() / (1 << 24)

    def __getstate__(self) -> dict[str, Any]:
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.memory is not None:
            state |= {"memory": None, "buffer": self.memory.reference(len(self.buffer))}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["buffer"], tuple):
            state["buffer"] = torch.from_numpy(receive(state["buffer"]))
        self.__dict__.update(state)
        self.__post_init__()

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """Copy to a device; to a GPU without waiting, which Lightning asks for with tensors only."""
        non_blocking = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking), memory=None)

    def pin_memory(self) -> Batch:
        return replace(self, buffer=self.buffer.pin_memory(), memory=None)


def allocate(arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, np.ndarray], Tensor, Layout, Any]:
    """Allocate arrays of these (type, shape) in one block, uninitialized: (name -> array, buffer, layout, memory)."""
    from torch.utils.data import get_worker_info

    layout: Layout = {}
    size = 0
    for name, (kind, shape) in arrays.items():
        layout[name] = (kind, shape, size)
        size += -(-math.prod(shape) * np.dtype(kind).itemsize // 64) * 64
    memory = take(size) if IS_POSSIBLE and get_worker_info() is not None else None
    block = np.empty(size, np.uint8) if memory is None else np.frombuffer(memory.map, np.uint8, size, HEADER)
    views = {
        name: block[first : first + math.prod(shape) * np.dtype(kind).itemsize].view(kind).reshape(shape)
        for name, (kind, shape, first) in layout.items()
    }
    return views, torch.from_numpy(block), layout, memory


# -- Shared memory for the batches of loading workers, reused: clearing the pages of new memory, as `DataLoader` does, costs
# half as much as decoding. A worker takes an anonymous file, fills it and sends its number, the first time with its
# descriptor; the trainer lays tensors over it, and when the last of them is freed, its first byte becomes 0.


class Memory:
    """Hold a memory file of this process, with `size` bytes of data."""

    def __init__(self, size: int) -> None:
        self.size, self.name, self.was_sent = size, uuid.uuid4().hex, False
        self.descriptor = os.memfd_create("pile-batch")
        os.ftruncate(self.descriptor, HEADER + size)
        self.map = mmap.mmap(self.descriptor, HEADER + size)
        weakref.finalize(self, os.close, self.descriptor)

    def reference(self, size: int) -> tuple[Any, ...]:
        """Return the arguments for `receive` in another process."""
        first, self.was_sent = not self.was_sent, True
        from multiprocessing.reduction import DupFd  # not on Windows

        return os.getpid(), self.name, size, DupFd(self.descriptor) if first else None


_own: list[Memory] = []  # lent by this process
_received: dict[tuple[int, str], mmap.mmap] = {}  # (process, name) -> memory of another process


def take(size: int) -> Memory:
    """Return unused memory for `size` bytes."""
    free = [memory for memory in _own if not memory.map[0]]
    fitting = next((memory for memory in free if memory.size >= size), None)
    if fitting is None:
        fitting = Memory(size + size // 4)
        _own[:] = [*(memory for memory in _own if memory not in free), fitting]  # free memory is too small
    fitting.map[0] = 1
    return fitting


def receive(reference: tuple[Any, ...]) -> np.ndarray:
    """Map memory of another process as (size,) uint8, released with the last view of it."""
    process, name, size, descriptor = reference
    if descriptor is not None:
        for key in [key for key in _received if not os.path.exists(f"/proc/{key[0]}")]:
            del _received[key]
        file = descriptor.detach()
        _received[process, name] = mmap.mmap(file, os.fstat(file).st_size)
        os.close(file)
    shared = _received[process, name]
    array = np.frombuffer(shared, np.uint8, size, HEADER)
    weakref.finalize(array, shared.__setitem__, 0, 0).atexit = False
    return array
