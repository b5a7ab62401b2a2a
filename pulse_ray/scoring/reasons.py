"""The reasons that a run found, by user."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pulse_ray.config import Variant
from pulse_ray.workspace import Artefact


class Reasons:
    """The reason of each user's newest example, as one selector chose it.

    Kept as two columns rather than as Python strings: every actor of the pool holds all of them.
    """

    def __init__(self, artefact: Artefact, selector: Variant) -> None:
        users, positions, texts = [], [], []
        for data in artefact.tables(columns=["example_id", "selector", "text"]):
            chosen = data.filter(pc.equal(data.column("selector"), selector))
            # An example's id is domain/user_id/position, and a user's id may hold a slash.
            pieces = pc.split_pattern(chosen.column("example_id"), "/", max_splits=1, reverse=True)
            users.append(pc.list_element(pieces, 0))
            positions.append(pc.cast(pc.list_element(pieces, 1), pa.int64()))
            texts.append(chosen.column("text"))
        # All texts together may exceed the 2 GiB that the offsets of `string` can address.
        found = pa.table(
            {
                "user": _column(users, pa.string()),
                "position": _column(positions, pa.int64()),
                "text": _column(texts, pa.large_string()),
            }
        ).sort_by([("position", "descending")])
        self._users, self._texts = found.column("user"), found.column("text")

    def of(self, users: Sequence[tuple[str, str]]) -> list[str | None]:
        """The reason of each (domain, user id), or None where there is none."""
        keys = pa.array([f"{domain}/{user}" for domain, user in users], pa.string())
        # The first of a user's rows is found: the newest.
        places = pc.index_in(keys, value_set=self._users.combine_chunks())
        reasons: list[str | None] = pc.take(self._texts, places).to_pylist()
        return reasons


def _column(pieces: Sequence[pa.ChunkedArray], kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.cast(kind) for piece in pieces for chunk in piece.chunks], type=kind)
