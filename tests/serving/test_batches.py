"""Batches: what goes together, what is refused, and what becomes of errors and of those who leave. No models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from pulse_ray.serving.backend import BusyError
from pulse_ray.serving.batches import Batches


class _Work:
    """Answers with the rows themselves. The first batch stays until the gate opens."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()

    def __call__(self, rows: Sequence[int]) -> list[int]:
        self.batches.append(list(rows))
        assert self.gate.wait(20)
        if 13 in rows:
            raise ArithmeticError("13")
        return list(rows)


def _batches(work: _Work, **more: float) -> Batches[int, int]:
    return Batches(work, **{"budget": 10, "company_s": 0.0, "max_wait_s": 1.0, **more})  # type: ignore[arg-type]


async def _behind(work: _Work, first: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
    """Starts the first, and comes back when its batch runs."""
    task = asyncio.create_task(first)
    while not work.batches:
        await asyncio.sleep(0.001)
    return task


def test_what_waits_while_a_batch_runs_goes_together_in_order_within_the_budget() -> None:
    work = _Work()

    async def ask() -> list[int]:
        batches = _batches(work)
        first = await _behind(work, batches.answer(0, 4))
        others = [asyncio.create_task(batches.answer(row, 4)) for row in range(1, 6)]
        large = asyncio.create_task(batches.answer(6, 99))
        await asyncio.sleep(0.05)
        work.gate.set()
        return await asyncio.gather(first, *others, large)

    assert asyncio.run(ask()) == list(range(7))
    assert work.batches == [[0], [1, 2], [3, 4], [5], [6]]


def test_a_batch_that_is_not_full_waits_for_company() -> None:
    work = _Work()
    work.gate.set()

    async def ask() -> None:
        batches = _batches(work, company_s=0.1)
        first = asyncio.create_task(batches.answer(1, 4))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, batches.answer(2, 4))

    asyncio.run(ask())
    assert work.batches == [[1, 2]]


def _fill(batches: Batches[int, int], room: ExitStack) -> int:
    """Takes places until one is refused; returns how many there were."""
    for taken in range(100):
        try:
            room.enter_context(batches.admitted())
        except BusyError:
            return taken
    raise AssertionError("nothing is refused")


# Ahead of the last one admitted: 10 · 0.1 s, 2 · 0.4 s, and one row, which may always be waited for.
@pytest.mark.parametrize(("row_s", "places"), [(0.1, 11), (0.4, 3), (9.0, 2)])
def test_rows_are_refused_by_the_time_that_those_ahead_will_take(row_s: float, places: int) -> None:
    batches = _batches(_Work())
    batches.row_s = row_s
    with ExitStack() as room:
        assert _fill(batches, room) == places
        with batches.admitted(companions=places):
            pass
    with batches.admitted():
        pass


def test_an_error_reaches_those_of_its_batch_alone() -> None:
    work = _Work()
    work.gate.set()

    async def ask() -> list[int | BaseException]:
        batches = _batches(work)
        return await asyncio.gather(*(batches.answer(row, 5) for row in (13, 14, 15)), return_exceptions=True)

    wrong, company, other = asyncio.run(ask())
    assert isinstance(wrong, ArithmeticError) and isinstance(company, ArithmeticError)
    assert other == 15


def test_rows_that_nobody_waits_for_are_dropped() -> None:
    work = _Work()

    async def ask() -> int:
        batches = _batches(work)
        first = await _behind(work, batches.answer(0, 4))
        left, kept = (asyncio.create_task(batches.answer(row, 4)) for row in (1, 2))
        await asyncio.sleep(0.01)
        first.cancel()
        left.cancel()
        await asyncio.sleep(0.01)
        work.gate.set()
        return await kept

    assert asyncio.run(ask()) == 2
    assert work.batches == [[0], [2]]
