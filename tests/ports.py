"""Ports for the servers of tests that run side by side. Imports little: processes that a test spawns import it too."""

import contextlib
import random
import socket


def free_port() -> int:
    """Of this machine, below those that the system gives to whoever connects, so that nobody takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
