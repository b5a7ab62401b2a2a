"""Similar users: the nearest training states by cosine, with faiss.

Each domain has one index, built once from the exported states and then mapped into memory by every actor: exact up to
`neighbours_flat_limit` users; beyond, inverted lists around centroids, of which a query looks into the nearest few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pulse_ray.schema import TABLES
from pulse_ray.seeding import derive

MAX_NEIGHBOUR_ITEMS = 30
SAMPLE_PER_LIST = 64
"""States that each centroid is trained on; faiss asks for at least 39."""

Batches = Callable[[], Iterable[pa.Table]]
"""Goes over the users of a domain, in the same order each time: columns user_id, state [D] and items. None is empty."""

_USERS = pa.schema([TABLES["user_states"].field(name) for name in ("user_id", "items")])


def write_index(folder: Path, domain: str, batches: Batches, *, flat_limit: int, seed: int) -> int:
    """Writes `<domain>.faiss`, the index, and `<domain>.arrow`, its users and their items row by row.

    Takes the memory of the index itself, 4 × D bytes a user, and of one batch.

    Args:
        flat_limit: users up to which the index is exact.
        seed: of the centroids.

    Returns:
        The number of users. Nothing is written for none.
    """
    users = sum(int(data.num_rows) for data in batches())
    if not users:
        return 0
    index = _empty(batches, users, flat_limit, derive(seed, "neighbours", domain))
    with pa.OSFile(str(folder / f"{domain}.arrow"), "wb") as sink, pa.ipc.new_file(sink, _USERS) as writer:
        for data in batches():
            index.add(_vectors(data))
            writer.write_table(data.select(_USERS.names))
    faiss.write_index(index, str(folder / f"{domain}.faiss"))
    return users


class UserIndex:
    """The users of one domain by the state that follows their training sequence. Lies in the page cache, not on a heap.

    Args:
        folder: where `write_index` wrote.
        probes: inverted lists that a query looks into, if there are any.
    """

    def __init__(self, folder: Path, domain: str, *, probes: int) -> None:
        self._index = faiss.read_index(str(folder / f"{domain}.faiss"), faiss.IO_FLAG_MMAP_IFC)
        if isinstance(self._index, faiss.IndexIVF):
            self._index.nprobe = probes
        users = pa.ipc.open_file(pa.memory_map(str(folder / f"{domain}.arrow"))).read_all()
        self._user_ids, self._items = users.column("user_id"), users.column("items")

    def nearest(self, states: NDArray[np.float32], user_ids: Sequence[str], count: int) -> list[list[int]]:
        """For each query, up to `count` rows of the index, nearest first; never the querying user itself.

        Args:
            states: [q, D] states of the histories.
            user_ids: [q] whose they are.
        """
        _, found = self._index.search(_normalised(states), min(count + 1, self._index.ntotal))
        return [
            [row for row in rows.tolist() if row >= 0 and self.user_id(row) != user][:count]
            for rows, user in zip(found, user_ids, strict=True)
        ]

    def user_id(self, row: int) -> str:
        """The user of a row of the index."""
        return str(self._user_ids[row].as_py())

    def items_of(self, rows: Iterable[int]) -> list[str]:
        """Training items of these users, nearest user first, each user's newest first, without repeats."""
        return newest(item for row in rows for item in self._items[row].as_py())


def newest(items: Iterable[str]) -> list[str]:
    """The first `MAX_NEIGHBOUR_ITEMS` different ones of items that come newest first."""
    return list(dict.fromkeys(items))[:MAX_NEIGHBOUR_ITEMS]


def _empty(batches: Batches, users: int, flat_limit: int, seed: int) -> faiss.Index:
    """An index without users, trained on a sample of them where it has centroids."""
    if users <= flat_limit:
        return faiss.IndexFlatIP(next(_vectors(data).shape[1] for data in batches()))
    lists = max(1, min(int(4 * math.sqrt(users)), users // SAMPLE_PER_LIST))
    size = min(lists * SAMPLE_PER_LIST, users)
    rows = np.sort(np.random.default_rng(seed).choice(users, size=size, replace=False))
    sample = np.concatenate(list(_sampled(batches(), rows)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(sample.shape[1]), sample.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed % 2**31
    index.cp.spherical = True  # States are compared by direction, so centroids are directions too.
    index.train(sample)
    return index


def _sampled(batches: Iterable[pa.Table], rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """Vectors of the users at ascending `rows`, counted over all batches."""
    first = 0
    for data in batches:
        low, high = np.searchsorted(rows, [first, first + data.num_rows])
        if high > low:
            yield _vectors(data.take(rows[low:high] - first))
        first += data.num_rows


def _vectors(data: pa.Table) -> NDArray[np.float32]:
    """States of length 1: [n, D]."""
    states = data.column("state").combine_chunks()
    return _normalised(states.flatten().to_numpy().reshape(len(states), -1))


def _normalised(states: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors = np.array(states, dtype=np.float32, order="C")
    faiss.normalize_L2(vectors)
    return vectors
