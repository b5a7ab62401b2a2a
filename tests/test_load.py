"""The load test's client, against a server that answers as it is told: every end of a request is counted."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from aiohttp import web

from benchmarks import _load
from tests.serving.conftest import free_port

SEEN: Counter[str] = Counter()
HANG_S = 1.0


async def _answer(request: web.Request) -> web.Response:
    body = await request.json()
    SEEN[body] += 1
    if body == "hang":
        await asyncio.sleep(HANG_S)
    if body == "busy":
        return web.Response(status=429, headers={"Retry-After": "0"})
    return web.Response(status={"fails": 500, "down": 503}.get(body, 200))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    port, loop = free_port(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/", _answer)
        made = web.AppRunner(app, shutdown_timeout=0.1)
        await made.setup()
        await web.TCPSite(made, "127.0.0.1", port).start()
        return made

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield f"http://127.0.0.1:{port}/"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(HANG_S), loop).result(10)  # What hangs comes to its end.
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_every_end_is_counted_and_all_bodies_are_sent_in_turn(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "HANG_S", 0.2)
    load, bodies = _load.Load(), ["fine", "busy", "fails", "down", "hang"]
    SEEN.clear()
    for seed in range(2):
        _load.open_(load, address, bodies, rate=100, seconds=0.4, seed=seed)
    assert max(SEEN.values()) - min(SEEN.values()) <= 1
    assert load.statuses == {200: SEEN["fine"], 429: SEEN["busy"], 500: SEEN["fails"], 503: SEEN["down"]}
    assert (load.hangs, load.without_retry_after, len(load.rates)) == (SEEN["hang"], SEEN["down"], 2)
    assert load.sent == sum(SEEN.values()) > 40
    assert len(load.latencies_s) == load.accepted > 0


def test_clients_of_a_closed_loop_end_in_time_and_nobody_answers_at_a_free_port(address: str) -> None:
    load = _load.Load()
    _load.closed(load, address, ["fine", "busy"], clients=3, seconds=0.3)
    assert 0.3 <= load.seconds < 3
    assert load.accepted > 3 and load.statuses[429] > 3
    _load.closed(load, f"http://127.0.0.1:{free_port()}/", ["fine"], clients=2, seconds=0.1)
    assert load.connection_errors == 2


def test_a_percentile_of_few_latencies_is_the_longest() -> None:
    load = _load.Load(latencies_s=[0.1] * 50 + [9.0], seconds=1)
    assert load.p99_s == 9
    assert load.figures()["p50_s"] == 0.1
