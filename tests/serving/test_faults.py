"""What a served application does when a part of it dies: the real thing, with a ranker, a vLLM reasoner and Redis."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from pulse_ray.config import Config
from pulse_ray.serving import app, filling
from tests.serving import shop
from tests.serving.conftest import RedisServer, free_port

PATIENCE_S = 240
"""Longest wait for a replica or an engine to come back on a busy machine."""
CLIENTS = 4
TYPED = {"history": [{"item_id": item} for item in shop.history(0)], "candidates": ["i1", "i2", "i4"]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Config:
    """A finished run with a ranker, an engine that writes eight random words, and profiles in Redis."""
    storage = tmp_path_factory.mktemp("faulty")
    text = {"history_tokens": 60, "review_words": 3}
    settings = shop.config(
        storage,
        engine={
            "model": str(storage / "tiny"),
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 16,
            "kv_cache_gb": 0.25,
        },
        rationales={"text": text},
        tree={"breadths": [1], "text": text, "sampling": {"max_tokens": 8, "gates": [], "attempts": 4}},
        select={"selectors": ["log_likelihood"]},
        ranker={
            "model": str(storage / "tiny"),
            "variants": ["log_likelihood"],
            "training": {"precision": "fp32"},
        },
        serve={
            "port": free_port(),
            "store": redis_server.url,
            # Longer than a ranker takes to come back on a busy machine, so that a second try can wait for it.
            "timeout_s": 120,
            # A busy machine is no reason to refuse a request here.
            "ranker": {"max_wait_s": 60},
            "reasoner": {"enabled": True, "time_limit_s": 5},
        },
    )
    shop.make(settings)
    shop.add_models(settings)
    filling.fill(settings)
    return settings


@pytest.fixture(scope="module")
def client(ray_cluster: None, config: Config) -> Iterator[httpx.Client]:
    with app.serving(config) as address, httpx.Client(base_url=address, timeout=150) as made:
        yield made


def _kill_replica(deployment: str) -> None:
    """Ends the process of a deployment's only replica without a warning."""
    # Only what this session's Ray has started.
    ours = psutil.Process().children(recursive=True)
    [replica] = [one for one in ours if f":{deployment}" in "".join(one.cmdline()[:1])]
    replica.kill()


def _until(reached: Callable[[], Any]) -> float:
    """Waits until something is true. Returns the seconds that it took."""
    started = time.monotonic()
    while not reached():
        assert time.monotonic() < started + PATIENCE_S
        time.sleep(0.1)
    return time.monotonic() - started


def _reason(client: httpx.Client) -> dict[str, Any]:
    answer = client.post("/v1/rank", json=TYPED)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["items"]) == 3
    reason: dict[str, Any] = answer.json()["reason"]
    return reason


def test_a_store_that_stops_is_a_clear_refusal_until_it_is_back(
    client: httpx.Client, config: Config, redis_server: RedisServer
) -> None:
    body = {"user_id": shop.user(0), "candidates": ["i1", "i2"]}
    redis_server.stop()
    try:
        refused = client.post("/v1/rank", json=body)
        assert (refused.status_code, refused.json()["message"]) == (503, "the profile store does not answer")
        assert refused.headers["retry-after"] == str(config.serve.retry_after_s)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["store"]) == (503, "the profile store does not answer")
        # A typed history needs no store.
        assert _reason(client)["source"] == "reasoner"
    finally:
        redis_server.start()
    # This server keeps nothing on disk: it comes back empty, which is said, and is filled again while serving goes on.
    assert client.get("/readyz").json()["store"].startswith("it is not filled")
    assert client.post("/v1/rank", json=body).status_code == 404
    filling.fill(config)
    assert client.get("/readyz").status_code == 200
    assert client.post("/v1/rank", json=body).json()["reason"]["source"] == "store"


def test_a_ranker_that_dies_under_load_loses_no_request_that_is_tried_twice(
    client: httpx.Client, record_property: Callable[[str, object], None]
) -> None:
    body = {"user_id": shop.user(0), "candidates": ["i1", "i2", "i4"]}
    over = threading.Event()
    first, second = Counter[int](), Counter[int]()
    answered: list[float] = []

    def ask() -> None:
        while not over.is_set():
            status = client.post("/v1/rank", json=body).status_code
            first[status] += 1
            if status != 200:
                status = client.post("/v1/rank", json=body).status_code
                second[status] += 1
            if status == 200:
                answered.append(time.monotonic())

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask) for _ in range(CLIENTS)]
        _until(lambda: len(answered) > 20)
        killed = time.monotonic()
        _kill_replica("Ranker")
        _until(lambda: len(answered) > 20 and answered[-1] > killed + 2)
        over.set()
        for one in asking:
            one.result()
    recovered = min(moment for moment in answered if moment > killed + 1) - killed
    record_property("ranker_recovery_s", round(recovered, 1))
    print(f"first answers {dict(first)}, second {dict(second)}, recovered after {recovered:.1f} s")
    assert set(first) <= {200, 429, 503}
    assert set(second) <= {200}


def test_a_reasoner_that_dies_leaves_rankings_without_reasons(client: httpx.Client) -> None:
    found = _reason(client)
    assert (found["source"], found["selector"]) == ("reasoner", "log_likelihood"), found
    assert [node["node_id"] for node in found["tree"]] == ["", "1"]
    _kill_replica("Reasoner")
    lost = _reason(client)
    assert (lost["source"], lost["text"]) == ("none", None)
    assert "and the reasoner" in lost["why"]
    # Who has a stored reason notices nothing.
    stored = client.post("/v1/rank", json={"user_id": shop.user(0), "candidates": ["i1", "i2"]}).json()
    assert stored["reason"]["source"] == "store"
