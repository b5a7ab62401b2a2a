"""An engine's processes end with their owner, even when it is killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

OWNER = """
import subprocess, sys
from pulse_ray.generation import reaper

reaper.watch()
# A grandchild in a session of its own, as an engine's workers may be.
start = "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
subprocess.run([sys.executable, "-c", start])
sys.stdin.read()
"""


def test_descendants_of_a_killed_owner_end() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    orphan = os.pidfd_open(int(owner.stdout.readline()))
    try:
        owner.send_signal(signal.SIGKILL)
        owner.wait(timeout=10)
        ended, _, _ = select.select([orphan], [], [], 20)
        assert ended
    finally:
        if not select.select([orphan], [], [], 0)[0]:
            signal.pidfd_send_signal(orphan, signal.SIGKILL)
        os.close(orphan)
