"""Progress within one outside file: bytes (or rows) are counted as they are read, and published now and then."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Literal

import pyarrow as pa

from pulse_ray.progress import ReportGuard

Phase = Literal["downloaded", "read"]
"""What happens to a file: one behind an http(s) address is downloaded before it is read."""

Publish = Callable[[Phase, float], None]
"""Takes the phase and the fraction of the file, from 0 to 1."""


class ReadProgress:
    """How far a file is downloaded or read.

    Whoever reads calls `begin` once per phase, `advance` after each read, and `report` between two blocks. Counting
    asks the stream nothing, so it works for streams without a position: compressed ones and those of object stores.

    Args:
        publish: called at most every `interval_s` seconds; an error in it is logged once and reading continues.
        interval_s: seconds between two calls; 0 publishes at every report.
    """

    def __init__(self, publish: Publish = lambda phase, fraction: None, interval_s: float = 0.0) -> None:
        self._publish, self._interval_s = publish, interval_s
        self._guard = ReportGuard("reading a file")
        self._published_at = time.monotonic()
        self._phase: Phase = "read"
        self._done = self._total = 0

    def begin(self, phase: Phase, total: int | None, done: int = 0) -> None:
        """Start a phase.

        Args:
            total: bytes or rows of the whole file; None where the host does not say.
            done: of them, those that an earlier attempt has downloaded.
        """
        self._phase, self._total, self._done = phase, total or 0, done

    def advance(self, count: int) -> None:
        """Count bytes or rows. Any thread may call it."""
        self._done += count

    @property
    def fraction(self) -> float:
        """Fraction of the file that this phase has done, from 0 to 1; 0 where the total is unknown."""
        return min(1.0, self._done / self._total) if self._total else 0.0

    def report(self) -> None:
        """Publish the fraction if the last time was `interval_s` ago or more."""
        if time.monotonic() - self._published_at >= self._interval_s:
            self._published_at = time.monotonic()
            self._guard.run(lambda: self._publish(self._phase, self.fraction))


class CountingReader(io.RawIOBase):
    """A pyarrow input stream as a raw Python stream that counts what is read."""

    def __init__(self, stream: pa.NativeFile, progress: ReadProgress) -> None:
        self._stream, self._counted = stream, progress

    def readable(self) -> bool:
        """True: `io.BufferedReader` asks before it reads."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the stream allows. Returns the number of bytes, 0 at the end."""
        count = int(self._stream.readinto(buffer))
        self._counted.advance(count)
        return count
