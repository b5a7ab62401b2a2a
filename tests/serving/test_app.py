"""The whole application on a real Ray Serve, with tiny untrained models, and what it does when a part of it dies.

Starting it takes a minute: one application answers everything here. What kills a part of it comes after the requests,
and what replaces it comes last.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from ray import serve
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pulse_ray import catalogue
from pulse_ray.config import Config
from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.ranker.scorer import Scorer
from pulse_ray.schema import History
from pulse_ray.serving import app, command, filling
from pulse_ray.serving.store import open_store
from pulse_ray.workspace import Workspace
from tests.serving import shop
from tests.serving.conftest import RedisServer, free_port

PATIENCE_S = 240
"""Longest wait for a replica or an engine to come, or to come back, on a busy machine."""
CLIENTS = 4
TYPED = {"history": [{"item_id": item} for item in shop.history(0)], "candidates": ["i1", "i2", "i4"]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Config:
    """A finished run: a ranker, an engine that writes eight random words, profiles in Redis where it is installed."""
    storage = tmp_path_factory.mktemp("served")
    redis = request.getfixturevalue("redis_server").url if shutil.which("redis-server") else None
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
            "store": redis,
            "retrieve_k": 7,
            # Longer than a ranker takes to come back on a busy machine, so that a second try can wait for it.
            "timeout_s": 120,
            # A busy machine is no reason to refuse a request here.
            "ranker": {"max_wait_s": 60},
            "reasoner": {"enabled": True, "time_limit_s": 5},
        },
    )
    shop.make(settings)
    shop.add_models(settings)
    assert filling.fill(settings) == shop.USERS
    return settings


@pytest.fixture(scope="module")
def client(ray_cluster: None, config: Config) -> Iterator[httpx.Client]:
    with app.serving(config) as address, httpx.Client(base_url=address, timeout=150) as made:
        yield made


def test_a_stored_user_is_ranked_with_the_stored_reason(client: httpx.Client, config: Config) -> None:
    answer = client.post("/v1/rank", json={"user_id": shop.user(0), "candidates": ["i1", "i2", "i4"]})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    folder = Path(Workspace(config.storage, config.name).artefact("ranker").path) / "log_likelihood"
    digest = hashlib.sha256((folder / app.WEIGHTS).read_bytes()).hexdigest()
    assert found["model_version"] == f"log_likelihood@{digest[:12]}"
    reason = shop.reason(0)
    assert (found["reason"]["source"], found["reason"]["text"]) == ("store", reason)
    assert found["reason"]["agreement"] == -1.25
    # The same logits as the scorer gives outside of Serve.
    items = catalogue.load(Workspace(config.storage, config.name).artefact("items"))
    store = open_store(filling.store_address(config), config.name)
    profile = store.get("shop", shop.user(0))
    store.close()
    assert profile is not None
    row = RankRow(
        history=History(example_id="shop/U000/9", domain="shop", user_id="U000", interactions=profile.history),
        reason=reason,
        candidates=tuple(items["shop"][item] for item in ("i1", "i2", "i4")),
    )
    (expected,) = Scorer(folder, config.ranker, items).score([row], 4096)
    logits = {item["item_id"]: item["logit"] for item in found["items"]}
    assert [logits[item] for item in ("i1", "i2", "i4")] == pytest.approx(expected.tolist(), abs=1e-4)
    assert sum(item["probability"] for item in found["items"]) == pytest.approx(1)
    assert [item["logit"] for item in found["items"]] == sorted(logits.values(), reverse=True)


def test_refusals_cross_serve(client: httpx.Client, config: Config) -> None:
    assert client.post("/v1/rank", json={"user_id": "nobody"}).status_code == 404
    wrong = client.post("/v1/rank", json={"user_id": shop.user(0), "candidates": ["i1", "gone"]})
    assert (wrong.status_code, wrong.json()["fields"][0]["field"]) == (422, "body.candidates.1")
    large = b'{"user_id": "' + b"x" * config.serve.limits.request_bytes + b'"}'
    pieces = (large[at : at + 9999] for at in range(0, len(large), 9999))
    assert client.post("/v1/rank", content=pieces).status_code == 413
    assert client.post("/v1/rank", content=large).status_code == 413


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_made_from_the_schema_get_answers_that_it_describes(
    client: httpx.Client, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    # What takes no parameters cannot be asked wrongly.
    operations = [one for one in operations if one.path.startswith("/v1/") or mode.is_positive]
    assert len(operations) >= 6
    for operation in operations:

        @settings(max_examples=25, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            answer = case.call()
            case.validate_response(
                answer,
                checks=[
                    not_a_server_error,
                    status_code_conformance,
                    content_type_conformance,
                    response_schema_conformance,
                ],
            )

        check()


def test_the_page_and_the_probes_answer(client: httpx.Client) -> None:
    assert "<title>" in client.get("/").text
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["store"]) == (200, "ok")
    assert "pulse_requests_total" in client.get("/metrics").text
    assert client.get("/openapi.json").json()["info"]["title"] == "pulse_ray"


def test_requests_that_come_together_are_ranked_like_single_ones(client: httpx.Client) -> None:
    bodies: list[dict[str, Any]] = [
        {"user_id": shop.user(number), "candidates": [f"i{n}" for n in range(2 + number % 3)]}
        for number in range(shop.USERS)
        if number != shop.WITHOUT_REASON  # What the reasoner writes for this one may come too late, or in time.
    ]
    single = [client.post("/v1/rank", json=body).json()["items"] for body in bodies]
    together = client.post("/v1/rank:batch", json={"requests": bodies}).json()["results"]
    for alone, other in zip(single, (answer["items"] for answer in together), strict=True):
        assert [item["item_id"] for item in alone] == [item["item_id"] for item in other]
        assert [item["logit"] for item in alone] == pytest.approx([item["logit"] for item in other], abs=1e-4)


def test_what_cannot_be_served_is_refused_before_anything_starts(config: Config, client: httpx.Client) -> None:
    with pytest.raises(ConfigError, match=f"cannot serve on 127.0.0.1:{config.serve.port}"), app.serving(config):
        pass
    public = config.model_copy(update={"serve": config.serve.model_copy(update={"host": "0.0.0.0"})})
    with pytest.raises(ConfigError, match="there are no tokens"), app.serving(public):
        pass
    with (
        pytest.raises(ArtifactError, match="holds no complete 'items'"),
        app.serving(
            config.model_copy(update={"name": "absent", "serve": config.serve.model_copy(update={"port": free_port()})})
        ),
    ):
        pass


def test_the_builder_takes_a_file_and_overrides(config: Config, tmp_path: Path) -> None:
    path = shop.dump(config, tmp_path / "config.json")
    assert isinstance(app.build({"config": str(path), "set": ["serve.retrieve_k=3"]}), serve.Application)
    wrong = (
        ({}, "no `config`"),
        ({"config": str(path), "port": 1}, "unknown argument 'port'"),
        ({"config": str(path), "set": ["serve.host=0.0.0.0"]}, "there are no tokens"),
    )
    for args, place in wrong:
        with pytest.raises(ConfigError, match=place):
            app.build(args)


def test_the_builder_waits_for_a_run_as_long_as_it_may(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = config.model_copy(update={"storage": str(tmp_path / "runs")})
    path = shop.dump(unfinished, tmp_path / "config.json")
    with pytest.raises(ArtifactError, match="holds no complete"):
        app.build({"config": str(path), "wait_s": 0.1})
    looks: list[float] = []

    def finish(seconds: float) -> None:
        looks.append(seconds)
        shop.make(unfinished)
        shop.add_models(unfinished)

    monkeypatch.setattr(app.time, "sleep", finish)
    assert isinstance(app.build({"config": str(path), "wait_s": 60}), serve.Application)
    assert looks == [app.RUN_POLL_S]


def test_the_printed_line_ranks(client: httpx.Client, config: Config) -> None:
    line = command.curl(config, f"http://127.0.0.1:{config.serve.port}", command.example_user(config))
    assert line == (
        f"curl -s http://127.0.0.1:{config.serve.port}/v1/rank -H 'Content-Type: application/json' "
        '-d \'{"user_id": "U000"}\''
    )


def _kill_replica(deployment: str) -> None:
    """Ends the process of a deployment's only replica without a warning."""
    # Only what this session's Ray has started.
    ours = psutil.Process().children(recursive=True)
    [replica] = [one for one in ours if f":{deployment}" in _title(one)]
    replica.kill()


def _title(process: psutil.Process) -> str:
    """What a process calls itself; nothing where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return "".join(process.cmdline()[:1])
    return ""


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
        try:
            _until(lambda: len(answered) > 20)
            killed = time.monotonic()
            _kill_replica("Ranker")
            _until(lambda: len(answered) > 20 and answered[-1] > killed + 2)
        finally:
            over.set()  # Or who asks would go on for ever.
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


def test_another_adapter_and_store_take_over_while_requests_flow_and_the_reasoner_goes(
    client: httpx.Client, config: Config, tmp_path: Path
) -> None:
    new = shop.make_adapter(tmp_path / "new", config.ranker, seed=1)
    expected = f"log_likelihood@{hashlib.sha256((new / app.WEIGHTS).read_bytes()).hexdigest()[:12]}"
    body = {"user_id": shop.user(1), "candidates": ["i1", "i2", "i4"]}
    before = client.post("/v1/rank", json=body).json()
    answers: list[httpx.Response] = []
    done = False

    def ask() -> None:
        while not done:
            answers.append(client.post("/v1/rank", json=body))

    ranker = config.serve.ranker.model_copy(update={"adapter": str(new)})
    without = config.serve.reasoner.model_copy(update={"enabled": False})
    section = config.serve.model_copy(update={"ranker": ranker, "reasoner": without, "store": None})
    changed = config.model_copy(update={"serve": section})
    filling.fill(changed)
    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            serve.run(app.application(changed), name=app.NAME, route_prefix="/")
            deadline = time.monotonic() + PATIENCE_S
            while not (answers and answers[-1].is_success and answers[-1].json()["model_version"] == expected):
                assert time.monotonic() < deadline, answers[-1].text
                time.sleep(0.2)
        finally:
            done = True
        for one in asking:
            one.result()
    assert {answer.status_code for answer in answers} == {200}
    by_version: dict[str, set[float]] = {}
    for answer in answers:
        by_version.setdefault(answer.json()["model_version"], set()).add(round(answer.json()["items"][0]["logit"], 3))
    assert set(by_version) == {before["model_version"], expected}
    old, swapped = by_version[before["model_version"]], by_version[expected]
    assert all(math.isclose(logit, before["items"][0]["logit"], abs_tol=2e-3) for logit in old)
    assert not old & swapped


def test_sasrec_finds_candidates_that_the_history_does_not_hold(client: httpx.Client) -> None:
    found = client.post("/v1/rank", json={"history": [{"item_id": item} for item in shop.history(0)]}).json()
    items = [item["item_id"] for item in found["items"]]
    assert len(set(items)) == 7
    assert not set(items) & set(shop.history(0))
    assert (found["candidates_from"], found["reason"]["source"]) == ("sasrec", "none")
    assert "the reasoner is off" in found["reason"]["why"]
