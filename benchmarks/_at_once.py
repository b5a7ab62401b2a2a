"""Jobs of a benchmark, one after another or several at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run(jobs: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """Results of the jobs, in their order.

    Args:
        at_once: jobs that run at the same time; 1 runs them one after another.

    Raises:
        Exception: what the first job that failed raised. No job begins after that.
    """
    failed = threading.Event()

    def guarded(job: Callable[[], T]) -> T:
        if failed.is_set():
            raise CancelledError
        try:
            return job()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(guarded, jobs))
