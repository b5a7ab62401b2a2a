"""Coverage plugin that saves what Ray's workers have measured every other second.

Ray ends actors without running Python's exit handlers, in which coverage would save. Coverage loads its plugins in
every process that it measures. Other processes save once, at their end: lines that run during a save may be lost.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from coverage import Coverage

INTERVAL_S = 2.0


def coverage_init(registry: Any, options: Any) -> None:
    """Start the thread that saves, in a worker of Ray; called by coverage."""
    if any(argument.endswith("default_worker.py") for argument in sys.argv[:1]):
        threading.Thread(target=_save_repeatedly, daemon=True).start()


def _save_repeatedly() -> None:
    while True:
        time.sleep(INTERVAL_S)
        current = Coverage.current()
        if current is not None:
            current.save()
