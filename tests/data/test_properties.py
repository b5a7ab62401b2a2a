"""`prepare` against a naive version of itself, on small worlds full of ties and repetitions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import Prepare, amazon, review, write_lines

from pulse_ray.data.core import cut_time, k_core
from pulse_ray.errors import DataError

Row = dict[str, Any]
Settings = dict[str, Any]
Targets = set[tuple[str, str, int]]
"""User, split and place of the target in the user's sequence."""

RELAXED = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.sampled_from("uvwx"),
            "item": st.sampled_from("abcdef"),
            "time": st.integers(0, 9),
            "rating": st.sampled_from([1.0, 2.0, 5.0, None]),
        }
    ),
    min_size=1,
    max_size=60,
)
SETTINGS = st.fixed_dictionaries(
    {
        "duplicates": st.sampled_from(["first", "last"]),
        "filter": st.sampled_from(["iterated", "single_pass"]),
        "min_user_interactions": st.integers(1, 4),
        "min_item_interactions": st.integers(1, 4),
        "min_rating": st.sampled_from([None, 1.5, 2.0]),
        "split": st.sampled_from(["leave_two_out", "temporal"]),
        "temporal_shares": st.sampled_from([(0.1, 0.1), (0.2, 0.3), (0.05, 0.4), (0.3, 0.05)]),
        "positions_per_user": st.integers(1, 3),
        "max_sequence": st.sampled_from([2, 50]),
        "partitions": st.integers(1, 2),
    }
)


def naive(rows: list[Row], chosen: Settings) -> dict[str, list[Row]]:
    """What is kept of each user, oldest first; each row knows its line."""
    least = chosen["min_rating"]
    left = [row | {"line": line} for line, row in enumerate(rows)]
    left = [row for row in left if least is None or row["rating"] is None or row["rating"] >= least]
    users, items = Counter(row["user"] for row in left), Counter(row["item"] for row in left)
    left.sort(key=lambda row: (row["time"], row["line"]))
    unique: dict[tuple[str, str], Row] = {}
    for row in left:
        if chosen["duplicates"] == "last" or (row["user"], row["item"]) not in unique:
            unique[row["user"], row["item"]] = row
    left = list(unique.values())
    while True:
        if chosen["filter"] == "iterated":
            users, items = Counter(row["user"] for row in left), Counter(row["item"] for row in left)
        fewer = [
            row
            for row in left
            if users[row["user"]] >= chosen["min_user_interactions"]
            and items[row["item"]] >= chosen["min_item_interactions"]
        ]
        if len(fewer) == len(left):
            break
        left = fewer
    sequences: dict[str, list[Row]] = {}
    for row in sorted(left, key=lambda row: (row["time"], row["line"])):
        sequences.setdefault(row["user"], []).append(row)
    return sequences


def naive_cut(times: list[int], share: float) -> int:
    """The first second from which on at most the share of the interactions lies."""
    return next(time for time in range(max(times) + 2) if sum(t >= time for t in times) <= share * len(times))


def naive_targets(sequences: dict[str, list[Row]], chosen: Settings) -> tuple[Targets, set[int]]:
    """The targets, and the lines that count as training."""
    targets: Targets = set()
    trained: set[int] = set()
    times = [row["time"] for rows in sequences.values() for row in rows]
    validation, test = chosen["temporal_shares"]
    validation_from, test_from = naive_cut(times, validation + test), naive_cut(times, test)
    for user, rows in sequences.items():
        places = range(len(rows))
        if chosen["split"] == "leave_two_out":
            held_out = {"validation": [places[-2]], "test": [places[-1]]} if len(rows) >= 3 else {}
            training = places[:-2] if held_out else places
        else:
            training = [n for n in places if rows[n]["time"] < validation_from]
            between = [n for n in places if validation_from <= rows[n]["time"] < test_from]
            held_out = {"validation": between[:1], "test": [n for n in places if rows[n]["time"] >= test_from][:1]}
        newest = [n for n in training if n > 0][-chosen["positions_per_user"] :]
        for split, found in {"train": newest, **held_out}.items():
            targets |= {(user, split, n) for n in found if n > 0}
        trained |= {rows[n]["line"] for n in training}
    return targets, trained


@RELAXED
@given(rows=ROWS, chosen=SETTINGS)
def test_prepare_does_what_naive_python_does(
    prepared: Prepare, tmp_path: Path, rows: list[Row], chosen: Settings
) -> None:
    lines = [
        review(row["user"], row["item"], row["time"], overall=row["rating"], reviewText=f"line {line}")
        for line, row in enumerate(rows)
    ]
    path = write_lines(tmp_path / "reviews.json", lines)
    expected = naive(rows, chosen)
    if not expected:
        with pytest.raises(DataError, match="leaves nothing"):
            prepared(domains=[amazon(path)], **chosen)
        return
    result = prepared(domains=[amazon(path)], **chosen)
    sequences: dict[str, list[int]] = {}
    for row in result.rows("interactions"):
        sequences.setdefault(row["user_id"], []).append(int(row["review"].removeprefix("line ")))
    assert sequences == {user: [row["line"] for row in kept] for user, kept in expected.items()}
    targets, trained = naive_targets(expected, chosen)
    examples = result.rows("examples")
    places = [(row["user_id"], row["split"], int(row["example_id"].rpartition("/")[2])) for row in examples]
    assert Counter(places) == Counter(targets)
    for (user, _, place), example in zip(places, examples, strict=True):
        before = expected[user][max(0, place - chosen["max_sequence"]) : place]
        assert [step["review"] for step in example["history"]] == [f"line {row['line']}" for row in before]
        assert example["target_item"] == expected[user][place]["item"]
    popularity = Counter(row["item"] for kept in expected.values() for row in kept if row["line"] in trained)
    kept_items = {row["item"] for kept in expected.values() for row in kept}
    assert {row["item_id"]: row["popularity"] for row in result.rows("items")} == {i: popularity[i] for i in kept_items}


@given(
    pairs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), unique=True, max_size=80),
    least=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_k_core_is_what_remains_when_nothing_rare_does(pairs: list[tuple[int, int]], least: tuple[int, int]) -> None:
    left = set(pairs)
    while True:
        users, items = Counter(user for user, _ in left), Counter(item for _, item in left)
        rare = {(user, item) for user, item in left if users[user] < least[0] or items[item] < least[1]}
        if not rare:
            break
        left.remove(min(rare))  # One at a time: the order does not matter.
    users_, items_ = (np.array([pair[side] for pair in pairs], dtype=np.int32) for side in (0, 1))
    mask = k_core(users_, items_, *least)
    assert {pair for pair, stays in zip(pairs, mask, strict=True) if stays} == left


@given(times=st.lists(st.integers(0, 30), min_size=1), share=st.floats(0, 0.99))
def test_a_cut_leaves_at_most_its_share(times: list[int], share: float) -> None:
    cut = cut_time(np.array(times), share)
    after = sum(time >= cut for time in times)
    assert after <= share * len(times)
    # An earlier one would leave more.
    earlier = [time for time in times if time < cut]
    assert not earlier or sum(time >= max(earlier) for time in times) > share * len(times)
