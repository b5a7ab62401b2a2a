"""Rows that wait together go together, and a row that would have to wait long is refused at once. Plain asyncio.

Ray Serve's own batching closes a batch some milliseconds after its first row, also while the batch before it still
runs: under load many small batches stand in line. And a row that did not fit goes to the end of that line.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pulse_ray.serving.backend import BusyError

Row = TypeVar("Row")
Answer = TypeVar("Answer")

NEWEST = 0.3
"""Weight of the newest batch in the running mean of a row's time."""


@dataclass(kw_only=True)
class _Waiting(Generic[Row, Answer]):
    row: Row
    size: int
    future: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batches(Generic[Row, Answer]):
    """One batch at a time, made of what waits when the one before it ends, in the order of arrival.

    Args:
        work: answers a batch, in order. It may block: it runs in a thread of its own.
        budget: most that the sizes of a batch add up to; a larger row goes alone.
        company_s: how long a batch that is not full waits for more rows.
        max_wait_s: a row that would wait longer is refused. The time is foretold by the mean time of a row so far.
    """

    def __init__(
        self, work: Callable[[list[Row]], Sequence[Answer]], *, budget: int, company_s: float, max_wait_s: float
    ) -> None:
        self._work, self._budget, self._company_s, self._max_wait_s = work, budget, company_s, max_wait_s
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[_Waiting[Row, Answer]] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._inside = 0
        self.row_s: float | None = None
        """Mean seconds of a row; None before the first batch."""

    @contextmanager
    def admitted(self, companions: int = 0) -> Iterator[None]:
        """Keeps a place for a row, from before it is made until it is answered.

        One row may always wait, or else the model would stand still until somebody asks again.

        Args:
            companions: rows of the same request that came before, which do not count: a request of many rows would
                otherwise refuse itself.

        Raises:
            BusyError: the row would wait for too long.
        """
        ahead = self._inside - companions
        if ahead > 1 and ahead * (self.row_s or 0.0) > self._max_wait_s:
            raise BusyError(f"{ahead} rows are ahead")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def answer(self, row: Row, size: int) -> Answer:
        """The answer to a row. Cancelling it takes the row out, unless its batch has begun."""
        waiting: _Waiting[Row, Answer] = _Waiting(row=row, size=size)
        self._waiting.append(waiting)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await waiting.future

    async def _run(self) -> None:
        while self._waiting:
            if sum(one.size for one in self._waiting) < self._budget:
                await asyncio.sleep(self._company_s)
            if batch := self._next():
                await self._answer(batch)

    def _next(self) -> list[_Waiting[Row, Answer]]:
        """The rows that wait longest, within the budget; those that nobody waits for any more are dropped."""
        batch: list[_Waiting[Row, Answer]] = []
        size = 0
        while self._waiting:
            first = self._waiting[0]
            if not first.future.done():
                if batch and size + first.size > self._budget:
                    break
                batch.append(first)
                size += first.size
            self._waiting.popleft()
        return batch

    async def _answer(self, batch: list[_Waiting[Row, Answer]]) -> None:
        started = time.perf_counter()
        rows = [one.row for one in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._work, rows)
        except Exception as error:  # It belongs to those who wait.
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(error)
            return
        newest = (time.perf_counter() - started) / len(batch)
        self.row_s = newest if self.row_s is None else NEWEST * newest + (1 - NEWEST) * self.row_s
        for one, answer in zip(batch, answers, strict=True):
            if not one.future.done():
                one.future.set_result(answer)
