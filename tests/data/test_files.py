"""Work in several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

INTERRUPTED = """
import time
from pile_app.data.files import for_each
print("started", flush=True)
try:
    for_each(time.sleep, [60.0] * 4, 2)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_does_not_wait_for_the_work_of_other_processes() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", INTERRUPTED], text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    time.sleep(1)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all processes
    said, errors = child.communicate(timeout=20)
    assert said == "interrupted\n" and not errors and child.returncode == 0, errors
