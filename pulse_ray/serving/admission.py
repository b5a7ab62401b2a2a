"""Who may wait for the ranker: a row that would have to wait long is refused at once. Plain Python.

Ray Serve limits how many requests wait; how many are too many depends on the model, the machine and the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pulse_ray.serving.backend import BusyError

NEWEST = 0.3
"""Weight of the newest batch in the running mean of a row's time."""


class Admission:
    """Foretells a row's wait from the rows ahead of it and the mean time of a row so far.

    Args:
        max_wait_s: a row that would wait longer is refused.
    """

    def __init__(self, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s
        self.row_s: float | None = None
        """Mean seconds of a row; None before the first batch."""
        self._inside = 0

    @contextmanager
    def place(self, companions: int = 0) -> Iterator[None]:
        """Keeps a place for a row, from before it is encoded until it is scored.

        One row may always wait, or else the model would stand still until somebody asks again.

        Args:
            companions: rows of the same request that came before, which do not count: a request of many rows would
                otherwise refuse itself.

        Raises:
            BusyError: the row would wait for too long.
        """
        ahead = self._inside - companions
        if ahead > 1 and ahead * (self.row_s or 0.0) > self.max_wait_s:
            raise BusyError(f"{ahead} rows are ahead")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def took(self, rows: int, seconds: float) -> None:
        """Notes a batch of so many rows, and how long it took."""
        newest = seconds / rows
        self.row_s = newest if self.row_s is None else NEWEST * newest + (1 - NEWEST) * self.row_s
