from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from worlds import SYNTHETIC, Prepare

import pulse_ray
from pulse_ray.config import SyntheticSource
from pulse_ray.data.synthetic import Shop


@pytest.fixture(scope="module")
def shop() -> Shop:
    return Shop(SyntheticSource(kind="synthetic"), seed=1)


def test_the_seed_alone_decides(shop: Shop) -> None:
    again, other = Shop(shop.source, seed=1), Shop(shop.source, seed=2)
    assert again.interactions().equals(shop.interactions())
    assert again.items().equals(shop.items())
    assert not other.interactions().equals(shop.interactions())


def test_a_user_does_not_depend_on_how_many_there_are(shop: Shop) -> None:
    fewer = Shop(shop.source.model_copy(update={"users": 7}), seed=1).interactions()
    assert shop.interactions().slice(0, fewer.num_rows).equals(fewer)


def test_labels_tell_items_apart(shop: Shop) -> None:
    items = shop.items().to_pylist()
    assert len({(item["brand"], item["title"]) for item in items}) == len(items)
    assert len({item["categories"][0] for item in items}) >= 5


def test_tiny_shops_work() -> None:
    source = SyntheticSource(kind="synthetic", users=3, items=4, min_purchases=3, max_purchases=9)
    rows = Shop(source, seed=0).interactions().to_pylist()
    assert all(len(items) == len(set(items)) >= 3 for items in _sequences(rows).values())


def test_who_knows_the_motive_beats_popularity(shop: Shop) -> None:
    """HR@1 among 1 + 9 uniform candidates of three readers; ties count as the chance to break them right."""
    motive_of = {row["item_id"]: row["motive"] for row in shop.item_motives().to_pylist()}
    wanted = _sequences(shop.purchase_motives().to_pylist(), "motive")
    sequences = _sequences(shop.interactions().to_pylist())
    popularity = Counter(item for items in sequences.values() for item in items[:-2])
    random = np.random.default_rng(0)
    hits: Counter[str] = Counter()
    draws = 5
    for user, items in sequences.items():
        others = sorted(set(motive_of) - set(items))
        bought = Counter(motive_of[item] for item in items[:-1])
        for _ in range(draws):
            candidates = [items[-1], *random.choice(others, 9, replace=False)]
            hits["oracle"] += _hit([motive_of[item] == wanted[user][-1] for item in candidates])
            hits["history"] += _hit([bought[motive_of[item]] for item in candidates])
            hits["popularity"] += _hit([popularity[item] for item in candidates])
    rate = {reader: count / len(sequences) / draws for reader, count in hits.items()}
    assert rate["oracle"] > 0.65
    assert rate["history"] > 0.65, "the motive must be readable from what came before"
    assert rate["popularity"] < 0.25


def test_ratings_and_reviews_follow_the_motive(shop: Shop) -> None:
    motive_of = {row["item_id"]: row["motive"] for row in shop.item_motives().to_pylist()}
    ratings: dict[bool, list[float]] = {True: [], False: []}
    for row, truth in zip(shop.interactions().to_pylist(), shop.purchase_motives().to_pylist(), strict=True):
        ratings[motive_of[row["item_id"]] == truth["motive"]].append(row["rating"])
    assert min(ratings[True]) > max(ratings[False])
    assert len(ratings[True]) / sum(map(len, ratings.values())) == pytest.approx(shop.source.motive_strength, abs=0.05)


def test_the_truth_is_stored_and_read_by_no_module(prepared: Prepare) -> None:
    result = prepared(domains=[SYNTHETIC], min_item_interactions=1, partitions=1)
    folder = Path(result.stage.workspace.artefact("truth").path)
    assert pq.read_table(folder / "shop-items.parquet").num_rows == 60
    truth = pq.read_table(folder / "shop-purchases.parquet")
    assert truth.num_rows == result.step("read")[0]
    package = Path(pulse_ray.__file__).parent
    named = [path.name for path in package.rglob("*.py") if '"truth"' in path.read_text(encoding="utf-8")]
    assert named == ["preparation.py"]


def _hit(scores: list[int] | list[bool]) -> float:
    best = max(scores)
    return (scores[0] == best) / sum(score == best for score in scores)


def _sequences(rows: list[dict[str, str]], column: str = "item_id") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["user_id"], []).append(row[column])
    return found
