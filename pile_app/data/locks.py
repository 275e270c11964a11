"""Locks between processes and hosts, by `flock`. Windows has none; there, one process at a time should write a folder."""

from __future__ import annotations

from typing import IO, Any

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

LOCK_SH, LOCK_EX, LOCK_NB, LOCK_UN = (getattr(fcntl, name, 0) for name in ("LOCK_SH", "LOCK_EX", "LOCK_NB", "LOCK_UN"))


def flock(file: int | IO[Any], operation: int) -> None:
    if fcntl is not None:
        fcntl.flock(file, operation)
