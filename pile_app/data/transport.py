"""Shared memory in which loading workers hand batches to the training process, reused: clearing the pages of new memory, as
`DataLoader` does, costs half as much as decoding. A worker `take`s an anonymous file, fills it and sends its number, the first
time with its descriptor; `receive` lays tensors over it, and when the last of them is freed, its first byte becomes 0."""

from __future__ import annotations

import mmap
import os
import uuid
import weakref
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

HEADER = 64  # bytes before the data; the first is 1 while the memory is in use
IS_POSSIBLE = hasattr(os, "memfd_create")  # Linux; elsewhere PyTorch's own way


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
