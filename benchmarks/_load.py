"""A load test's client: one process, bounded in time and number. A request has a time limit, and every end counts."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import aiohttp
import numpy as np

HANG_S = 120.0
"""A request without an answer after so long hangs: the server itself gives up long before."""
MAX_OPEN = 512
"""Most requests in flight of an open loop. More would only measure the client."""


@dataclass(kw_only=True)
class Load:
    """What became of the requests of one or several loops of one kind."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    """Of the accepted requests."""
    hangs: int = 0
    connection_errors: int = 0
    without_retry_after: int = 0
    """Refusals for load that do not say when to come again."""
    rates: list[float] = field(default_factory=list)
    """Accepted requests a second, one for each loop."""
    seconds: float = 0.0

    @property
    def accepted(self) -> int:
        """Requests answered with 200."""
        return self.statuses[200]

    @property
    def rate(self) -> float:
        """Accepted requests a second."""
        return self.accepted / self.seconds

    @property
    def p99_s(self) -> float:
        """By nearest rank, rounded up: of fewer than a hundred latencies it is the longest."""
        return _percentile(self.latencies_s, 99)

    @property
    def sent(self) -> int:
        """All requests, whatever their end."""
        return sum(self.statuses.values()) + self.hangs + self.connection_errors

    def figures(self) -> dict[str, Any]:
        """For the report."""
        return {
            "seconds": round(self.seconds, 1),
            "sent": self.sent,
            "accepted": self.accepted,
            "rejected_429": self.statuses[429],
            "unavailable_503": self.statuses[503],
            "other_statuses": {str(key): value for key, value in self.statuses.items() if key not in (200, 429, 503)},
            "hangs": self.hangs,
            "connection_errors": self.connection_errors,
            "requests_per_s": round(self.rate, 3),
            "requests_per_s_each": [round(rate, 3) for rate in self.rates],
            "p50_s": round(_percentile(self.latencies_s, 50), 3),
            "p99_s": round(self.p99_s, 3),
        }


def closed(load: Load, address: str, bodies: Sequence[Any], *, clients: int, seconds: float) -> None:
    """Clients that ask, wait for the answer, and ask again. One that is refused comes again when it was told to.

    Args:
        load: where the outcomes are added.
        address: to post to.
        bodies: what is posted, in turn.
        seconds: nobody asks after that; what was asked before is waited for.
    """

    async def loop(ask: _Ask) -> None:
        async def client() -> None:
            while time.perf_counter() < end:
                wait_s = await ask()
                await asyncio.sleep(min(wait_s, max(0.0, end - time.perf_counter())))

        end = time.perf_counter() + seconds
        await asyncio.gather(*(client() for _ in range(clients)))

    asyncio.run(_measured(load, address, bodies, loop))


def open_(load: Load, address: str, bodies: Sequence[Any], *, rate: float, seconds: float, seed: int) -> None:
    """Requests that come independently of each other (a Poisson process), and do not wait for the answers to others.

    Args:
        rate: requests a second.
        seed: of the times between them.

    Other arguments are as for `closed`.
    """

    async def loop(ask: _Ask) -> None:
        gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(2 * rate * seconds) + 10)
        start = time.perf_counter()
        asked: list[asyncio.Task[float]] = []
        for at in np.cumsum(gaps):
            if at > seconds:
                break
            await asyncio.sleep(max(0.0, start + float(at) - time.perf_counter()))
            assert sum(not one.done() for one in asked) < MAX_OPEN, "the server keeps too many requests waiting"
            asked.append(asyncio.create_task(ask()))
        await asyncio.gather(*asked)

    asyncio.run(_measured(load, address, bodies, loop))


_Ask = Callable[[], Coroutine[Any, Any, float]]
"""Sends a request; returns the seconds after which the server wants to see its client again."""


async def _measured(load: Load, address: str, bodies: Sequence[Any], loop: Callable[[_Ask], Awaitable[None]]) -> None:
    encoded = [json.dumps(body).encode() for body in bodies]
    numbers = count(load.sent)
    limits = aiohttp.ClientTimeout(total=HANG_S)
    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=MAX_OPEN)
    async with aiohttp.ClientSession(connector=connector, timeout=limits, headers=headers) as session:

        async def ask() -> float:
            body, started = encoded[next(numbers) % len(encoded)], time.perf_counter()
            try:
                async with session.post(address, data=body) as answer:
                    await answer.read()
            except TimeoutError:
                load.hangs += 1
                return 0.0
            except aiohttp.ClientError:
                load.connection_errors += 1
                return 1.0
            load.statuses[answer.status] += 1
            if answer.status == 200:
                load.latencies_s.append(time.perf_counter() - started)
                return 0.0
            if answer.status in (429, 503) and "Retry-After" not in answer.headers:
                load.without_retry_after += 1
            return float(answer.headers.get("Retry-After", 1))

        before, started = load.accepted, time.perf_counter()
        await loop(ask)
        elapsed = time.perf_counter() - started
    load.seconds += elapsed
    load.rates.append((load.accepted - before) / elapsed)


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent, method="higher")) if values else float("inf")
