"""The profile store: both kinds keep what they were given, find users alike, and are filled from a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.schema import Interaction
from pulse_ray.serving import filling
from pulse_ray.serving.store import (
    BATCH,
    WRITE_BATCH,
    Profile,
    ProfileStore,
    StoreDownError,
    StoredReason,
    StoredThought,
    open_store,
)
from tests.serving import shop
from tests.serving.conftest import RedisServer

MakeStore = Callable[[], ProfileStore]
NAMES = count()

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
STEP = st.builds(
    Interaction, item_id=TEXT, timestamp=st.integers(0, 2**62), rating=st.none() | NUMBER, review=st.none() | TEXT
)
REASON = st.builds(StoredReason, text=TEXT, agreement=st.none() | NUMBER, selector=TEXT, node_id=TEXT, version=TEXT)
THOUGHT = st.builds(
    StoredThought, node_id=TEXT, depth=st.integers(0, 9), text=TEXT, mean_logprob=NUMBER, agreement=st.none() | NUMBER
)
PROFILE = st.builds(
    Profile,
    domain=st.sampled_from(["shop", "books", "a:b"]),
    user_id=TEXT,
    history=st.lists(STEP, max_size=3).map(tuple),
    reason=st.none() | REASON,
    tree=st.lists(THOUGHT, max_size=3).map(tuple),
)
RELAXED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["sqlite", "redis"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Makes empty stores of one kind."""
    made: list[ProfileStore] = []

    def new() -> ProfileStore:
        name = f"run{next(NAMES)}"
        if request.param == "sqlite":
            address = f"sqlite:///{tmp_path}/{name}.sqlite"
        else:
            address = request.getfixturevalue("redis_server").url
        made.append(open_store(address, name))
        return made[-1]

    new()
    yield new
    for store in made:
        store.retire(())
        store.close()


@RELAXED
@given(profiles=st.lists(PROFILE, max_size=6), prefix=TEXT)
def test_a_store_keeps_the_newest_profile_of_each_user(make: MakeStore, profiles: list[Profile], prefix: str) -> None:
    store = make()
    assert store.put(profiles, "a") == len(profiles)
    newest = {(one.domain, one.user_id): one for one in profiles}
    for (domain, user), profile in newest.items():
        assert store.get(domain, user) == profile
    assert store.get("shop", "nobody here") is None
    for domain in ("shop", "books"):
        known = sorted((user for place, user in newest if place == domain), key=str.encode)
        assert store.find(domain, prefix, 3) == [user for user in known if user.startswith(prefix)][:3]
    assert store.mark() is None
    store.set_mark("a/b")
    assert store.mark() == "a/b"
    store.retire(["b"])
    assert all(store.get(*key) is None for key in newest)
    assert store.find("shop", "", 3) == []


def test_a_store_that_serves_is_filled_anew(make: MakeStore) -> None:
    store = make()
    old, kept, new = (Profile(domain="shop", user_id=user, history=()) for user in ("a/old", "kept", "new"))
    store.put([old, kept], "first")
    store.put([Profile(domain="shop", user_id="batch", history=())], BATCH)
    store.put([kept, new], "second")
    assert store.find("shop", "", 9) == ["a/old", "batch", "kept", "new"], "nobody is missing meanwhile"
    newer = Profile(domain="shop", user_id="kept", history=(Interaction(item_id="i", timestamp=1),))
    store.put([newer], BATCH)
    store.put([kept, new], "second")
    assert store.get("shop", "kept") == newer, "what the batch job put is newer than any run"
    store.retire(["second", BATCH])
    assert store.find("shop", "", 9) == ["batch", "kept", "new"]
    assert store.get("shop", "a/old") is None
    assert store.get("shop", "kept") == newer


def test_a_store_is_filled_and_read_by_several_threads(make: MakeStore) -> None:
    store = make()
    profiles = [Profile(domain="shop", user_id=f"u{n}", history=()) for n in range(3 * WRITE_BATCH + 1)]
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(store.put, profiles[start::3], "a") for start in range(3)]
        readers = [pool.submit(store.get, "shop", f"u{n}") for n in range(300)]
        assert sum(writer.result() for writer in writers) == len(profiles)
        assert all(reader.result() in (None, profiles[n]) for n, reader in enumerate(readers))
    assert all(store.get("shop", one.user_id) == one for one in profiles)


def test_runs_do_not_meet_in_one_redis(redis_server: RedisServer) -> None:
    first, second = (open_store(redis_server.url, name) for name in ("first", "second"))
    first.put([Profile(domain="shop", user_id="u", history=())], "a")
    assert second.get("shop", "u") is None
    second.retire(())
    assert first.get("shop", "u") is not None


def test_redis_that_stopped_is_down_and_comes_back(tmp_path: Path, redis_server: RedisServer) -> None:
    store = open_store(redis_server.url, "stops")
    store.put([Profile(domain="shop", user_id="u", history=())], "a")
    redis_server.stop()
    try:
        for question in (lambda: store.get("shop", "u"), lambda: store.find("shop", "", 1), store.mark):
            with pytest.raises(StoreDownError, match="Redis"):
                question()
    finally:
        redis_server.start()
    assert store.get("shop", "u") is None


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"this is no database " * 99)
    for path in (broken, tmp_path):
        with pytest.raises(ArtifactError, match="cannot open the profile store"):
            open_store(f"sqlite:///{path}", "run")
    with pytest.raises(ConfigError, match="is no address"):
        open_store("redis://host:port", "run")


def test_a_run_fills_the_store_once(tmp_path: Path) -> None:
    config = shop.config(tmp_path)
    shop.make(config)
    assert filling.fill(config) == shop.USERS
    assert filling.fill(config) == 0
    assert filling.store_address(config) == f"sqlite:///{tmp_path}/tiny-shop/serving/profiles.sqlite"
    store = open_store(filling.store_address(config), config.name)
    for number in range(shop.USERS):
        profile = store.get("shop", shop.user(number))
        assert profile is not None
        assert [step.item_id for step in profile.history] == shop.history(number)
        if number == shop.WITHOUT_REASON:
            assert (profile.reason, profile.tree) == (None, ())
            continue
        assert profile.reason == StoredReason(
            text=shop.reason(number),
            agreement=0.5,
            selector="thought_space",
            node_id="1",
            version="thought_space@select00",
        )
        nodes = [(node.node_id, node.leaf, node.agreement) for node in profile.tree]
        assert nodes == [("", False, None), ("1", True, 0.5), ("2", False, -0.25)]
    store.close()


def test_another_variant_fills_the_store_anew(tmp_path: Path) -> None:
    variants = {"model": "m", "variants": ["none", "base", "thought_space"]}
    shop.make(shop.config(tmp_path))
    assert filling.fill(shop.config(tmp_path, ranker=variants)) == shop.USERS
    base = shop.config(tmp_path, ranker=variants, serve={"variant": "base"})
    assert filling.fill(base) == shop.USERS
    store = open_store(filling.store_address(base), base.name)
    profile = store.get("shop", shop.user(0))
    store.close()
    assert profile is not None and profile.reason is not None
    assert (profile.reason.node_id, profile.reason.agreement) == ("", None)


def test_an_unfinished_run_and_a_remote_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no complete 'interactions'"):
        filling.fill(shop.config(tmp_path))
    remote = shop.config(tmp_path).model_copy(update={"storage": "s3://bucket/runs?region=us-east-1"})
    with pytest.raises(ConfigError, match=r"serve\.store"):
        filling.store_address(remote)
