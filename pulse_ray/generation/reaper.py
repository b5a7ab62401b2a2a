"""Ends an engine's processes when the process that owns them is gone, however it went.

vLLM runs its engine in child processes, which outlive an owner that was killed with SIGKILL, and keep their memory and
cores. `watch` starts this module as a small process that holds the reading end of a pipe: when the owner ends, the pipe
closes, and every process that carries the owner's mark in its environment is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

MARK = "PULSE_RAY_ENGINE"


def watch() -> subprocess.Popen[bytes]:
    """Marks the children that this process starts from now on, and has them killed when it ends.

    Closing the returned process's `stdin` has them killed at once.
    """
    os.environ[MARK] = mark = uuid.uuid4().hex
    # A session of its own, so that a signal to the owner's process group does not take the watcher along.
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(
        [sys.executable, "-m", __name__, mark], stdin=subprocess.PIPE, start_new_session=True, env=environment
    )


def _kill(mark: str) -> None:
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # It ended meanwhile, or belongs to another user.
            if f"{MARK}={mark}".encode() in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    _kill(sys.argv[1])
