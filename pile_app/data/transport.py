"""Memory in which loading workers hand batches to the training process, used again and again.

PyTorch's `DataLoader` hands every tensor over in new shared memory, and the kernel has to find and clear each page of it: for
decoded images that costs half as much as the decoding. Here a worker keeps a few pieces of memory (anonymous files: nothing is
left behind by a process that is killed) and takes one again when the training process has let go of all tensors in it.

    worker    take(size) ── fills it ── pickled: a number, and the first time the file descriptor ──►
    trainer   receive() ── tensors over it; when the last one dies, its first byte becomes 0: free ──► worker takes it again
"""

from __future__ import annotations

import mmap
import os
import uuid
import weakref
from dataclasses import dataclass, field
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

HEADER = 64  # bytes before the data, the first of which is 1 while somebody uses the memory
IS_POSSIBLE = hasattr(os, "memfd_create")  # Linux; elsewhere PyTorch's own way


@dataclass(eq=False)
class Memory:
    """A piece of memory that this process made. `size` bytes of data."""

    size: int
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    was_sent: bool = False

    def __post_init__(self) -> None:
        self.descriptor = os.memfd_create("pile-batch")
        os.ftruncate(self.descriptor, HEADER + self.size)
        self.map = mmap.mmap(self.descriptor, HEADER + self.size)
        weakref.finalize(self, os.close, self.descriptor)

    def data(self, size: int) -> np.ndarray:
        """(size,) uint8."""
        return np.frombuffer(self.map, np.uint8, size, HEADER)

    def reference(self, size: int) -> tuple[Any, ...]:
        """What the other process needs to `receive` it."""
        first, self.was_sent = not self.was_sent, True
        return os.getpid(), self.name, size, DupFd(self.descriptor) if first else None


_own: list[Memory] = []  # that this process lends
_received: dict[tuple[int, str], mmap.mmap] = {}  # (process, name) -> of other processes


def take(size: int) -> Memory:
    """Memory for `size` bytes that nobody uses."""
    free = [memory for memory in _own if not memory.map[0]]
    fitting = next((memory for memory in free if memory.size >= size), None)
    if fitting is None:
        for memory in free:  # too small: batches have grown
            _own.remove(memory)
        fitting = Memory(size + size // 4)
        _own.append(fitting)
    fitting.map[0] = 1
    return fitting


def receive(reference: tuple[Any, ...]) -> np.ndarray:
    """(size,) uint8 over memory of another process, to which it returns when this array and all that share it are gone."""
    process, name, size, descriptor = reference
    if descriptor is not None:
        for key in [key for key in _received if not os.path.exists(f"/proc/{key[0]}")]:
            del _received[key]
        file = descriptor.detach()
        _received[process, name] = mmap.mmap(file, os.fstat(file).st_size)
        os.close(file)
    shared = _received[process, name]
    array = np.frombuffer(shared, np.uint8, size, HEADER)
    weakref.finalize(array, _give_back, shared).atexit = False
    return array


def _give_back(shared: mmap.mmap) -> None:
    shared[0] = 0
