"""Where candidates and reasons come from, and what is said when there are none: over services without models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pulse_ray import catalogue
from pulse_ray.config import Config
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.schema import History, Interaction
from pulse_ray.serving import filling
from pulse_ray.serving.backend import BusyError, InvalidError, RefusedError, UnavailableError, UnknownError
from pulse_ray.serving.messages import RankAnswer, RankRequest
from pulse_ray.serving.recommender import Recommender, Services
from pulse_ray.serving.store import Found, Profile, StoreDownError, StoredReason, StoredThought, open_store
from pulse_ray.text import clean
from pulse_ray.workspace import Workspace
from tests.serving import shop

GROWN = Found(
    reason=StoredReason(
        text="New.", agreement=0.2, selector="thought_space", node_id="1", version="thought_space@online"
    ),
    tree=(StoredThought(node_id="", depth=0, text="Old.", mean_logprob=-1.0, leaf=True, agreement=None),),
)
RUNS: list[RankRow] = []
TYPED = RankRequest.model_validate({"history": [{"item_id": "i1", "review": "Nice"}, {"item_id": "i2", "rating": 3}]})


async def _retrieve(domain: str, history: Sequence[str], touched: Sequence[str], count: int) -> list[str]:
    assert set(history) <= set(touched)
    return [f"i{n}" for n in range(shop.ITEMS) if f"i{n}" not in touched][:count]


async def _rank(row: RankRow, _: int) -> tuple[list[float], str]:
    RUNS.append(row)
    return [float(item.item_id[1:]) for item in row.candidates], "v1"


async def _version() -> str:
    return "v1"


SERVICES = Services(retrieve=_retrieve, rank=_rank, reason=None, version=_version)
Make = Callable[..., Recommender]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a recommender over the small shop, with some services or settings replaced."""
    shop.make(shop.config(tmp_path))
    filling.fill(shop.config(tmp_path))
    store = open_store(filling.store_address(shop.config(tmp_path)), "tiny-shop")
    items = catalogue.load(Workspace(str(tmp_path), "tiny-shop").artefact("items"))
    RUNS.clear()

    def build(serve: dict[str, Any] | None = None, **services: Any) -> Recommender:
        settings: Config = shop.config(tmp_path, serve={"retrieve_k": 4, **(serve or {})})
        return Recommender(settings, items, store, replace(SERVICES, **services))

    yield build
    store.close()


def _one(recommender: Recommender, request: RankRequest) -> RankAnswer:
    (answer,) = asyncio.run(recommender.rank([request]))
    return answer


def _refused(work: Awaitable[object]) -> RefusedError:
    async def wait() -> None:
        await work

    with pytest.raises(RefusedError) as caught:
        asyncio.run(wait())
    return caught.value


def test_a_user_is_ranked_with_history_and_reason_of_the_store(make: Make) -> None:
    answer = _one(make(), RankRequest(user_id=shop.user(0), candidates=["i1", "i3", "i2"]))
    (row,) = RUNS
    assert [step.item_id for step in row.history.interactions] == shop.history(0)
    assert row.reason == answer.reason.text == shop.reason(0)
    assert (answer.reason.source, answer.reason.version) == ("store", "thought_space@select00")
    assert [item.item_id for item in answer.items] == ["i3", "i2", "i1"]
    assert answer.items[0].probability == pytest.approx(0.665, abs=1e-3)
    assert answer.items[0].title == "Soap No 3"


def test_a_typed_history_keeps_its_order_and_is_ranked_without_a_reason(make: Make) -> None:
    answer = _one(make(), TYPED)
    (row,) = RUNS
    assert [(step.item_id, step.timestamp) for step in row.history.interactions] == [("i1", 0), ("i2", 1)]
    assert row.reason is None
    assert answer.reason.why == "no reason is stored for a typed history, and the reasoner is off"
    assert {item.item_id for item in answer.items} == {"i0", "i3", "i4", "i5"}


def test_a_history_beyond_the_model_s_length_still_says_what_was_touched(make: Make) -> None:
    recommender = make()
    recommender.config = recommender.config.model_copy(
        update={"prepare": recommender.config.prepare.model_copy(update={"max_sequence": 2})}
    )
    answer = _one(recommender, RankRequest(user_id=shop.user(0)))
    assert [step.item_id for step in RUNS[0].history.interactions] == shop.history(0)[-2:]
    assert not {item.item_id for item in answer.items} & set(shop.history(0))


def test_items_of_a_profile_that_the_catalogue_lacks_are_left_out(make: Make) -> None:
    recommender = make()
    steps = tuple(Interaction(item_id=item, timestamp=0) for item in ("gone", "i4"))
    recommender.store.put(
        [Profile(domain="shop", user_id=f"p{n}", history=steps[:n]) for n in (1, 2)],
        "other",
    )
    _one(recommender, RankRequest(user_id="p2"))
    assert [step.item_id for step in RUNS[0].history.interactions] == ["i4"]
    refused = _refused(recommender.rank([RankRequest(user_id="p1")]))
    assert (refused.status, refused.field) == (422, "user_id")


def test_texts_of_a_request_are_cleaned_like_those_of_the_data(make: Make) -> None:
    request = {"history": [{"item_id": "i1", "review": "ok\x07\n- more"}], "reason": " \n "}
    answer = _one(make(), RankRequest.model_validate(request))
    assert (answer.reason.source, RUNS[0].reason) == ("none", None)
    assert RUNS[0].history.interactions[0].review == clean("ok\x07\n- more") == "ok - more"


def test_nothing_is_ranked_where_one_of_a_batch_is_wrong(make: Make) -> None:
    fine, wrong = RankRequest(user_id=shop.user(0)), RankRequest(user_id=shop.user(1), candidates=["gone"])
    refused = _refused(make().rank([fine, fine, wrong]))
    assert (refused.status, refused.place, refused.field) == (422, 2, "candidates.0")
    assert not RUNS


def test_logits_that_are_no_numbers_are_a_503(make: Make) -> None:
    async def rank(row: RankRow, _: int) -> tuple[list[float], str]:
        return [float("nan")] * len(row.candidates), "v1"

    assert _refused(make(rank=rank).rank([TYPED])).status == 503


def test_a_reason_of_the_request_goes_before_the_store(make: Make) -> None:
    answer = _one(make(), RankRequest(user_id=shop.user(0), reason="Mine."))
    assert (answer.reason.source, RUNS[0].reason) == ("request", "Mine.")


def test_the_reasoner_writes_where_the_store_has_none(make: Make) -> None:
    async def reason(history: History) -> Found | str:
        return GROWN

    recommender = make(reason=reason)
    for request in (TYPED, RankRequest(user_id=shop.user(shop.WITHOUT_REASON))):
        answer = _one(recommender, request)
        assert (answer.reason.source, answer.reason.agreement, answer.reason.tree[0].text) == ("reasoner", 0.2, "Old.")
    assert _one(recommender, RankRequest(user_id=shop.user(0))).reason.source == "store"
    assert [row.reason for row in RUNS] == ["New.", "New.", shop.reason(0)]


async def _slow(history: History) -> Found | str:
    await asyncio.sleep(30)
    return GROWN


async def _dead(history: History) -> Found | str:
    raise UnavailableError("the reasoner does not answer")


async def _flawed(history: History) -> Found | str:
    return "the tree was rejected: too short"


@pytest.mark.parametrize(
    ("reason", "why"),
    [(_slow, "took longer than 0.05 s"), (_dead, "does not answer"), (_flawed, "the tree was rejected: too short")],
)
def test_a_reasoner_that_fails_does_not_stop_the_ranking(make: Make, reason: object, why: str) -> None:
    answer = _one(make({"reasoner": {"time_limit_s": 0.05}}, reason=reason), TYPED)
    assert answer.reason.source == "none"
    assert answer.reason.why is not None and why in answer.reason.why
    assert len(answer.items) == 4


def test_refusals_name_place_and_field(make: Make) -> None:
    recommender = make()
    fine = RankRequest(user_id=shop.user(0))
    for wrong, kind, field in (
        (RankRequest(user_id="nobody"), UnknownError, "user_id"),
        (RankRequest(user_id=shop.user(0), candidates=["i1", "gone"]), InvalidError, "candidates.1"),
        (RankRequest.model_validate({"history": [{"item_id": "gone"}]}), InvalidError, "history.0.item_id"),
        (RankRequest(user_id=shop.user(0), domain="books"), InvalidError, "domain"),
    ):
        error = _refused(recommender.rank([fine, wrong]))
        assert (type(error), error.field, error.place) == (kind, field, 1)
    everything = RankRequest.model_validate({"history": [{"item_id": f"i{n}"} for n in range(shop.ITEMS)]})
    assert _refused(recommender.rank([everything])).field == "candidates"


def test_a_busy_ranker_and_a_slow_one_are_refusals(make: Make) -> None:
    async def busy(row: RankRow, _: int) -> tuple[list[float], str]:
        raise BusyError("too many requests wait for the ranker")

    async def slow(row: RankRow, _: int) -> tuple[list[float], str]:
        await asyncio.sleep(30)
        return [], ""

    assert isinstance(_refused(make(rank=busy).rank([TYPED])), BusyError)
    error = _refused(make({"timeout_s": 0.05}, rank=slow).rank([TYPED]))
    assert (type(error), error.message) == (UnavailableError, "no answer within 0.05 s")


class _Down:
    """A store that does not answer."""

    def get(self, *_: object) -> None:
        raise StoreDownError("gone")

    find = mark = get


def test_a_store_that_is_down_leaves_typed_histories(make: Make) -> None:
    recommender = make()
    assert asyncio.run(recommender.ready()).ready
    recommender.store = _Down()  # type: ignore[assignment]
    assert isinstance(_refused(recommender.rank([RankRequest(user_id="u")])), UnavailableError)
    assert isinstance(_refused(recommender.users("u", None, 3)), UnavailableError)
    assert len(_one(recommender, TYPED).items) == 4
    ready = asyncio.run(recommender.ready())
    assert (ready.ready, ready.store, ready.ranker) == (False, "the profile store does not answer", "ok")


def test_look_ups(make: Make) -> None:
    recommender = make()
    user = asyncio.run(recommender.user(shop.user(0), None))
    assert [step.item_id for step in user.history] == shop.history(0)
    assert user.history[0].title == "Hand Cream No 0"
    assert [node.node_id for node in user.tree] == ["", "1", "2"]
    assert asyncio.run(recommender.users("U01", None, 9)).users == ["U010", "U011"]
    found = asyncio.run(recommender.search("cream 1", "shop", 9)).items
    assert {item.title for item in found} == {"Hand Cream No 12", "Hand Cream No 18"}
    assert asyncio.run(recommender.search("cream zebra", None, 9)).items == []
    assert asyncio.run(recommender.item("i7", None)).brand == "Fernleaf"
    assert _refused(recommender.item("gone", None)).status == 404
