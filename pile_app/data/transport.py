"""Shared memory in which loading workers hand batches to the training process, reused.

PyTorch's `DataLoader` hands over every tensor in new shared memory, whose pages the kernel has to find and clear: for decoded
images that costs half as much as the decoding. Here a worker keeps a few anonymous files (a killed process leaves nothing
behind) and reuses each of them when the training process has released all of its tensors.

    worker    take(size) -- fills it -- pickled: a number, and the first time the file descriptor -->
    trainer   receive() -- tensors over it; when the last one dies, the first byte becomes 0: free --> worker reuses it
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

HEADER = 64  # bytes before the data; the first is 1 while the memory is in use
IS_POSSIBLE = hasattr(os, "memfd_create")  # Linux; elsewhere PyTorch's own way


@dataclass(eq=False)
class Memory:
    """A memory file of this process, with `size` bytes of data."""

    size: int
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    was_sent: bool = False

    def __post_init__(self) -> None:
        self.descriptor = os.memfd_create("pile-batch")
        os.ftruncate(self.descriptor, HEADER + self.size)
        self.map = mmap.mmap(self.descriptor, HEADER + self.size)
        weakref.finalize(self, os.close, self.descriptor)

    def data(self, size: int) -> np.ndarray:
        return np.frombuffer(self.map, np.uint8, size, HEADER)

    def reference(self, size: int) -> tuple[Any, ...]:
        """Return what another process needs to `receive` it."""
        first, self.was_sent = not self.was_sent, True
        return os.getpid(), self.name, size, DupFd(self.descriptor) if first else None


_own: list[Memory] = []  # lent by this process
_received: dict[tuple[int, str], mmap.mmap] = {}  # (process, name) -> memory of another process


def take(size: int) -> Memory:
    """Return memory for `size` bytes that is not in use."""
    free = [memory for memory in _own if not memory.map[0]]
    fitting = next((memory for memory in free if memory.size >= size), None)
    if fitting is None:
        _own[:] = [memory for memory in _own if memory not in free]  # too small: batches have grown
        fitting = Memory(size + size // 4)
        _own.append(fitting)
    fitting.map[0] = 1
    return fitting


def receive(reference: tuple[Any, ...]) -> np.ndarray:
    """Return (size,) uint8 over memory of another process, released when this array and all views of it are gone."""
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
