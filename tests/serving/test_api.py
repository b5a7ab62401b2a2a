"""The HTTP interface over a fake backend: every status code, limits, tokens; and nothing that is sent makes a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from pulse_ray.config import LimitsConfig, ServeConfig
from pulse_ray.errors import ConfigError
from pulse_ray.serving import api, guard
from pulse_ray.serving.messages import RankAnswer
from tests.serving.fake_backend import REASON, TITLES, FakeBackend

LIMITS = LimitsConfig(request_bytes=4000, history=5, candidates=6, batch=3)
SERVE = ServeConfig(limits=LIMITS, retry_after_s=7)
ALLOWED = {200, 404, 405, 413, 422, 429, 503}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(api.create(FakeBackend(), SERVE), raise_server_exceptions=False) as made:
        yield made


def test_a_ranking_holds_items_reason_version_and_timing(client: TestClient) -> None:
    answer = client.post("/v1/rank", json={"user_id": "u1", "candidates": ["i4", "i5"]})
    assert answer.status_code == 200
    found = RankAnswer.model_validate(answer.json())
    assert [item.item_id for item in found.items] == ["i4", "i5"]
    assert found.reason.text == REASON
    assert found.candidates_from == "request"
    typed = client.post("/v1/rank", json={"history": [{"item_id": "i0", "rating": 5, "review": "Good"}]}).json()
    assert typed["reason"]["source"] == "none"
    assert "reasoner is off" in typed["reason"]["why"]


def test_a_batch_is_answered_in_order(client: TestClient) -> None:
    requests = [{"user_id": "u1", "candidates": [item]} for item in ("i2", "i1")]
    answer = client.post("/v1/rank:batch", json={"requests": requests}).json()
    assert [one["items"][0]["item_id"] for one in answer["results"]] == ["i2", "i1"]


STEP = {"item_id": "i0"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body"),
        ({"user_id": "u1", "history": [STEP]}, "body"),
        ({"user_id": ""}, "body.user_id"),
        ({"user_id": 3}, "body.user_id"),
        ({"user_id": "u1", "candidate": []}, "body.candidate"),
        ({"history": []}, "body.history"),
        ({"history": [STEP, {"item_id": "i0", "rating": 6}]}, "body.history.1.rating"),
        ({"history": [STEP] * 6}, "body.history"),
        ({"user_id": "u1", "candidates": []}, "body.candidates"),
        ({"user_id": "u1", "candidates": [f"i{n}" for n in range(7)]}, "body.candidates"),
        ({"user_id": "u1", "candidates": ["i1", "i2", "i1"]}, "body.candidates.2"),
        ({"user_id": "u1", "candidates": ["i1", "nothing"]}, "body.candidates.1"),
        ({"user_id": "\ud800"}, "body.user_id"),
        ([], "body"),
        (None, "body"),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, body: Any, field: str) -> None:
    answer = client.post("/v1/rank", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["fields"][0]["field"] == field
    assert answer.json()["fields"][0]["message"] in answer.json()["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 3000, b'{"user_id": 1e999}', b"9" * 3999])
def test_a_body_that_is_no_json_is_422(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/rank", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["fields"][0]["field"].startswith("body")


def test_a_batch_names_the_request_at_fault(client: TestClient) -> None:
    fine = {"user_id": "u1"}
    for wrong, status, field in (
        ({"user_id": "u1", "candidates": ["i1", "no"]}, 422, "body.requests.1.candidates.1"),
        ({"user_id": "u1", "candidates": ["i1", "i1"]}, 422, "body.requests.1.candidates.1"),
        ({"user_id": "nobody"}, 404, "body.requests.1.user_id"),
    ):
        answer = client.post("/v1/rank:batch", json={"requests": [fine, wrong]})
        assert (answer.status_code, answer.json()["fields"][0]["field"]) == (status, field)
    assert client.post("/v1/rank:batch", json={"requests": [fine] * 4}).json()["fields"][0]["field"] == "body.requests"


def test_busy_and_down_say_when_to_try_again(client: TestClient) -> None:
    for user, status in (("busy", 429), ("down", 503)):
        answer = client.post("/v1/rank", json={"user_id": user})
        assert (answer.status_code, answer.headers["retry-after"]) == (status, "7")


def test_a_body_above_the_limit_is_413_however_it_comes(client: TestClient) -> None:
    large = json.dumps({"user_id": "u1", "reason": "x" * LIMITS.request_bytes}).encode()
    assert client.post("/v1/rank", content=large).status_code == 413
    pieces = (large[at : at + 100] for at in range(0, len(large), 100))
    streamed = client.post("/v1/rank", content=pieces)
    assert "content-length" not in streamed.request.headers
    assert streamed.status_code == 413
    assert client.post("/v1/rank", content=b"{}", headers={"Content-Length": "9" * 30}).status_code == 422


def test_look_ups(client: TestClient) -> None:
    user = client.get("/v1/users/u1").json()
    assert user["history"][0]["title"] == TITLES["i0"]
    assert user["tree"][2]["text"] == REASON
    assert client.get("/v1/users/nobody").status_code == 404
    assert client.get("/v1/users/down").status_code == 503
    assert client.get("/v1/users", params={"query": "u"}).json()["users"] == ["u1"]
    assert client.get("/v1/items/i2").json()["title"] == TITLES["i2"]
    assert client.get("/v1/items/none").status_code == 404
    found = client.get("/v1/items", params={"query": "skin BALM"}).json()["items"]
    assert [item["item_id"] for item in found] == ["i4"]
    assert client.get("/v1/items", params={"limit": 51}).json()["fields"][0]["field"] == "query.limit"
    assert client.get("/v2/items").status_code == 404
    assert client.get("/v1/rank").status_code == 405


def test_probes_metrics_and_schema(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["ready"] is True
    client.post("/v1/rank", json={"user_id": "u1"})
    client.post("/v1/rank", content=b"x" * (LIMITS.request_bytes + 1))
    client.get("/no/such/path")
    text = client.get("/metrics").text
    assert 'pulse_requests_total{replica="0",route="/v1/rank",status="200"}' in text
    assert 'route="none",status="413"' in text
    assert "/no/such/path" not in text
    assert 'pulse_reasons_total{replica="0",source="store"}' in text
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]["/v1/rank"]["post"]["responses"]) >= {"200", "401", "404", "413", "422", "429", "503"}


def test_not_ready_is_503() -> None:
    backend = FakeBackend()
    backend.is_ready = False
    answer = TestClient(api.create(backend, SERVE)).get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["store"] == "it does not answer"


def test_tokens_come_from_the_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens"
    path.write_text("# people\nfirst\n\n  second  \n")
    monkeypatch.setenv("SOME_TOKENS", "third first")
    digests = guard.token_digests(ServeConfig(tokens_file=str(path), tokens_env="SOME_TOKENS"))
    assert len(digests) == 3
    assert not any(token in "".join(digests) for token in ("first", "second", "third"))
    client = TestClient(api.create(FakeBackend(), SERVE, digests))
    for header in ("", "Bearer", "Bearer fourth", "Basic first", "Bearer first x", "first"):
        answer = client.get("/v1/users/u1", headers={"Authorization": header} if header else {})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), header
        assert client.post("/v1/rank", content=b"x" * 9999, headers={"Authorization": header}).status_code == 401
    for header in ("Bearer first", "bearer second", "Bearer third"):
        assert client.get("/v1/users/u1", headers={"Authorization": header}).status_code == 200
    assert client.get("/v1/users/u1").headers["cache-control"] == "no-store"
    assert client.get("/").headers["x-content-type-options"] == "nosniff"
    path.write_text("schlüssel")
    with pytest.raises(ConfigError, match="ASCII"):
        guard.token_digests(ServeConfig(tokens_file=str(path)))
    for path_of_all in ("/", "/page.js", "/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert client.get(path_of_all).status_code == 200


def test_without_tokens_only_this_machine_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULSE_RAY_TOKENS", raising=False)
    assert guard.token_digests(ServeConfig()) == ()
    guard.check_host("127.0.0.1", ())
    guard.check_host("0.0.0.0", ("digest",))
    with pytest.raises(ConfigError, match="there are no tokens"):
        guard.check_host("0.0.0.0", ())
    empty = tmp_path / "empty"
    empty.write_text("# none yet\n")
    for wrong in (empty, tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="tokens_file"):
            guard.token_digests(ServeConfig(tokens_file=str(wrong)))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ID = st.sampled_from([*TITLES, "u1", "busy", "down", "nobody"]) | st.text(st.characters(), max_size=12)
STEPS = st.fixed_dictionaries(
    {"item_id": ID}, optional={"rating": st.floats() | st.none(), "review": st.text(), "timestamp": st.integers()}
)
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        "user_id": ID | ANYTHING,
        "history": st.lists(STEPS, max_size=7) | ANYTHING,
        "candidates": st.lists(ID, max_size=8) | ANYTHING,
        "reason": st.text(st.characters()) | ANYTHING,
        "domain": ID,
    },
)
VALID = st.fixed_dictionaries(
    {"user_id": st.just("u1")},
    optional={"candidates": st.lists(st.sampled_from(list(TITLES)), min_size=1, max_size=6, unique=True)},
)


@given(body=REQUEST | ANYTHING | VALID, batch=st.booleans())
def test_no_json_is_a_500(client: TestClient, body: Any, batch: bool) -> None:
    content = json.dumps({"requests": [body]} if batch else body)
    answer = client.post(f"/v1/rank{':batch' * batch}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in ALLOWED, answer.text
    if answer.status_code != 200:
        assert answer.json()["message"]


@given(body=VALID)
def test_every_valid_request_is_answered(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/v1/rank", json=body)
    assert answer.status_code == 200
    assert sum(item["probability"] for item in answer.json()["items"]) == pytest.approx(1)


@given(
    body=st.binary(max_size=200),
    kind=st.sampled_from(["application/json", "text/plain", "multipart/form-data; boundary=x", ""]),
    encoding=st.sampled_from(["", "gzip"]),
)
def test_no_bytes_are_a_500(client: TestClient, body: bytes, kind: str, encoding: str) -> None:
    answer = client.post("/v1/rank", content=body, headers={"Content-Type": kind, "Content-Encoding": encoding})
    assert answer.status_code in ALLOWED, answer.text


@given(
    route=st.sampled_from(
        ["/v1/users/", "/v1/items/", "/v1/items?query=", "/v1/users?query=", "/v1/items?limit=", "/"]
    ),
    tail=st.binary(max_size=30),
)
def test_no_path_is_a_500(client: TestClient, route: str, tail: bytes) -> None:
    answer = client.get(route + "".join(f"%{byte:02x}" for byte in tail))
    assert answer.status_code in ALLOWED, answer.text
