"""The whole application on a real Ray Serve, with a tiny untrained ranker and a tiny SASRec."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
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
from tests.serving.conftest import free_port

PATIENT = {"max_wait_s": 60}
"""A busy machine is no reason to refuse a request here."""
SWAP_TIMEOUT_S = 240
"""Seconds; a busy machine takes its time to start replicas."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run, its profiles in the store."""
    storage = tmp_path_factory.mktemp("served")
    settings = shop.config(storage, serve={"port": free_port(), "retrieve_k": 7, "ranker": PATIENT})
    shop.make(settings)
    shop.add_models(settings)
    assert filling.fill(settings) == shop.USERS
    return settings


@pytest.fixture(scope="module")
def client(ray_cluster: None, config: Config) -> Iterator[httpx.Client]:
    with app.serving(config) as address, httpx.Client(base_url=address, timeout=60) as made:
        yield made


def test_a_stored_user_is_ranked_with_the_stored_reason(client: httpx.Client, config: Config) -> None:
    answer = client.post("/v1/rank", json={"user_id": shop.user(0), "candidates": ["i1", "i2", "i4"]})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    folder = Path(Workspace(config.storage, config.name).artefact("ranker").path) / "thought_space"
    digest = hashlib.sha256((folder / app.WEIGHTS).read_bytes()).hexdigest()
    assert found["model_version"] == f"thought_space@{digest[:12]}"
    assert (found["reason"]["source"], found["reason"]["text"]) == ("store", shop.reason(0))
    assert found["reason"]["agreement"] == 0.5
    # The same logits as the scorer gives outside of Serve.
    items = catalogue.load(Workspace(config.storage, config.name).artefact("items"))
    store = open_store(filling.store_address(config), config.name)
    profile = store.get("shop", shop.user(0))
    store.close()
    assert profile is not None
    row = RankRow(
        history=History(example_id="shop/U000/9", domain="shop", user_id="U000", interactions=profile.history),
        reason=shop.reason(0),
        candidates=tuple(items["shop"][item] for item in ("i1", "i2", "i4")),
    )
    (expected,) = Scorer(folder, config.ranker, items).score([row], 4096)
    logits = {item["item_id"]: item["logit"] for item in found["items"]}
    assert [logits[item] for item in ("i1", "i2", "i4")] == pytest.approx(expected.tolist(), abs=1e-4)
    assert sum(item["probability"] for item in found["items"]) == pytest.approx(1)
    assert [item["logit"] for item in found["items"]] == sorted(logits.values(), reverse=True)


def test_sasrec_finds_candidates_that_the_history_does_not_hold(client: httpx.Client) -> None:
    found = client.post("/v1/rank", json={"history": [{"item_id": item} for item in shop.history(0)]}).json()
    items = [item["item_id"] for item in found["items"]]
    assert len(set(items)) == 7
    assert not set(items) & set(shop.history(0))
    assert (found["candidates_from"], found["reason"]["source"]) == ("sasrec", "none")
    assert "the reasoner is off" in found["reason"]["why"]


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
    ]
    single = [client.post("/v1/rank", json=body).json()["items"] for body in bodies]
    together = client.post("/v1/rank:batch", json={"requests": bodies}).json()["results"]
    for alone, other in zip(single, (answer["items"] for answer in together), strict=True):
        assert [item["item_id"] for item in alone] == [item["item_id"] for item in other]
        assert [item["logit"] for item in alone] == pytest.approx([item["logit"] for item in other], abs=1e-4)


def test_a_new_adapter_takes_over_while_requests_flow(client: httpx.Client, config: Config, tmp_path: Path) -> None:
    new = shop.make_adapter(tmp_path / "new", config.ranker, seed=1)
    expected = f"thought_space@{hashlib.sha256((new / app.WEIGHTS).read_bytes()).hexdigest()[:12]}"
    body = {"user_id": shop.user(1), "candidates": ["i1", "i2", "i4"]}
    before = client.post("/v1/rank", json=body).json()
    answers: list[httpx.Response] = []
    done = False

    def ask() -> None:
        while not done:
            answers.append(client.post("/v1/rank", json=body))

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        ranker = config.serve.ranker.model_copy(update={"adapter": str(new)})
        section = config.serve.model_copy(update={"ranker": ranker})
        serve.run(app.application(config.model_copy(update={"serve": section})), name=app.NAME, route_prefix="/")
        deadline = time.monotonic() + SWAP_TIMEOUT_S
        while not (answers and answers[-1].is_success and answers[-1].json()["model_version"] == expected):
            assert time.monotonic() < deadline, answers[-1].text
            time.sleep(0.2)
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
