from __future__ import annotations

import pyarrow as pa

from pulse_ray.candidates.rows import newest_rows
from pulse_ray.schema import table


def _example(position: int, length: int) -> dict[str, object]:
    step = {"item_id": "i", "timestamp": 1, "rating": None, "review": None}
    return {
        "example_id": f"shop/a/b/{position}",
        "domain": "shop",
        "user_id": "a/b",
        "split": "train",
        "history": [step] * length,
        "target_item": f"i{position}",
    }


def test_newest_example_has_the_highest_position_in_whatever_order_shards_come() -> None:
    """Shard 10000 sorts by name before shard 9999, and histories are cut to one length."""
    examples = [_example(9, 2), _example(10, 2), _example(1, 1)]
    for order in (examples, examples[::-1]):
        shards: list[pa.Table] = [table("examples", [row]) for row in order]
        assert newest_rows(shards)["shop", "a/b"].target == "i10"
