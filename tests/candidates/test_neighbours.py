"""Indices of users: exact ones, approximate ones, and what is looked up by their rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pulse_ray.candidates.neighbours import MAX_NEIGHBOUR_ITEMS, UserIndex, write_index
from pulse_ray.schema import TABLES

SCHEMA = pa.schema([TABLES["user_states"].field(name) for name in ("user_id", "state", "items")])


def _batches(user_ids: list[str], states: np.ndarray, items: list[list[str]], size: int) -> Iterator[pa.Table]:
    for start in range(0, len(user_ids), size):
        own = slice(start, start + size)
        yield pa.table([user_ids[own], states[own].tolist(), items[own]], schema=SCHEMA)


def _index(folder: Path, users: list[str], states: np.ndarray, items: list[list[str]], limit: int) -> UserIndex:
    made = write_index(folder, "shop", lambda: _batches(users, states, items, 700), flat_limit=limit, seed=3)
    assert made == len(users)
    return UserIndex(folder, "shop", probes=64)


def test_neighbours_are_by_cosine_and_never_the_user_itself(tmp_path: Path) -> None:
    states = np.array([[1, 0], [0.9, 0.1], [0, 5], [-1, 0]], dtype=np.float32)
    index = _index(tmp_path, ["a", "b", "c", "d"], states, [["x"], ["x", "y"], ["z"], []], limit=10)
    assert index.nearest(np.array([[2, 0], [0, 1]], dtype=np.float32), ["a", "q"], 2) == [[1, 2], [2, 1]]
    assert index.nearest(np.array([[2, 0]], dtype=np.float32), ["a"], 9) == [[1, 2, 3]]
    lists = _index(tmp_path, ["a", "b", "c", "d"], states, [["x"], ["x", "y"], ["z"], []], limit=3)
    assert lists.nearest(np.array([[2, 0]], dtype=np.float32), ["a"], 9) == [[1, 2, 3]]
    assert index.user_id(2) == "c"
    assert index.items_of([1, 2, 0]) == ["x", "y", "z"]


def test_items_of_neighbours_are_bounded(tmp_path: Path) -> None:
    items = [[f"i{number}" for number in range(first, first + 20)] for first in (0, 10, 20)]
    index = _index(tmp_path, ["a", "b", "c"], np.eye(3, dtype=np.float32), items, limit=10)
    assert index.items_of([0, 1, 2]) == [f"i{number}" for number in range(MAX_NEIGHBOUR_ITEMS)]


def test_inverted_lists_find_nearly_what_exact_search_finds(tmp_path: Path) -> None:
    """Users around tastes, as trained states lie; each index is built in batches and mapped."""
    rng = np.random.default_rng(0)
    tastes = rng.normal(size=(200, 32))
    states = (tastes[rng.integers(200, size=20_000)] + 0.7 * rng.normal(size=(20_000, 32))).astype(np.float32)
    users, items = [f"u{number}" for number in range(len(states))], [["x"]] * len(states)
    found = []
    for limit in (20_000, 19_999):
        folder = tmp_path / str(limit)
        folder.mkdir()
        index = _index(folder, users, states, items, limit)
        found.append(index.nearest(states[:400], users[:400], 5))
        assert all(own not in rows and len(rows) == 5 for own, rows in enumerate(found[-1]))
    exact, approximate = found
    recall = np.mean([len(set(one) & set(other)) / 5 for one, other in zip(exact, approximate, strict=True)])
    assert recall >= 0.9
    assert (tmp_path / "19999/shop.faiss").stat().st_size > (tmp_path / "20000/shop.faiss").stat().st_size
