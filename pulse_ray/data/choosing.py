"""The step of `prepare` that holds a whole domain: which of its interactions stay, and where time is cut."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from pulse_ray.data.core import cut_time, k_core
from pulse_ray.data.pieces import Counts, Pieces
from pulse_ray.seeding import derive
from pulse_ray.workspace import StageRun

NEVER = 2**62
"""A cut time that nothing reaches."""


def choose(stage: StageRun, domain: int) -> Counts:
    """Says which interactions stay, and gives the items of the domain numbers.

    The only step that holds a whole domain: eight bytes an interaction, some 40 while it works, and the items' ids.
    """
    prepare, pieces = stage.config.prepare, Pieces(stage, domain)
    gathered = _Gathered(pieces)
    if prepare.filter == "iterated":
        mask = k_core(gathered.users, gathered.items, prepare.min_user_interactions, prepare.min_item_interactions)
    else:
        mask = gathered.raw_users[gathered.users] >= prepare.min_user_interactions
        mask &= gathered.raw_items[gathered.items] >= prepare.min_item_interactions
    counts = {"items": len(gathered.raw_items), "rated_items": int((gathered.raw_items > 0).sum())}
    counts |= {f"filtered_{name}": count for name, count in gathered.sizes(mask).items()}
    if prepare.max_users is not None and counts["filtered_rows"]:
        mask &= gathered.sampled(mask, prepare.max_users)
    counts |= {f"kept_{name}": count for name, count in gathered.sizes(mask).items()}
    counts |= dict.fromkeys(("validation_from", "test_from"), NEVER)
    if prepare.split == "temporal" and counts["kept_rows"]:
        validation, test = prepare.temporal_shares
        times = gathered.times()[mask]
        counts |= {"validation_from": cut_time(times, validation + test), "test_from": cut_time(times, test)}
    gathered.put(mask)
    return counts


class _Gathered:
    """The unique interactions of a domain as two numbers each, partition after partition."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        users, items, raw_users, self.bounds = [], [], [], [0]
        self.catalogue = pl.DataFrame(schema={"item_id": pl.String, "raw": pl.Int64, "item": pl.Int32})
        offset = 0
        for partition in range(pieces.partitions):
            pairs = pieces.get("pairs", partition, ["user", "item"])
            raw_users.append(pieces.get("users", partition, ["raw"])["raw"].to_numpy())
            users.append(pairs["user"].to_numpy() + np.int32(offset))
            items.append(self._numbers(pieces.get("items", partition))[pairs["item"].to_numpy()])
            offset += len(raw_users[-1])
            self.bounds.append(self.bounds[-1] + pairs.height)
        self.users, self.items = np.concatenate(users), np.concatenate(items)
        self.raw_users, self.raw_items = np.concatenate(raw_users), self.catalogue["raw"].to_numpy()

    def _numbers(self, found: pl.DataFrame) -> npt.NDArray[np.int32]:
        """Numbers of a partition's items in the domain; items that are new get the next ones."""
        known = self.catalogue.join(found.rename({"raw": "more"}), on="item_id", how="left", maintain_order="left")
        known = known.select("item_id", pl.col("raw") + pl.col("more").fill_null(0), "item")
        new = found.join(self.catalogue, on="item_id", how="anti", maintain_order="left").select("item_id", "raw")
        new = new.with_columns(item=pl.int_range(known.height, known.height + new.height, dtype=pl.Int32, eager=True))
        self.catalogue = pl.concat([known, new])
        numbered = found.join(self.catalogue, on="item_id", how="left", maintain_order="left")
        return numbered["item"].to_numpy()

    def sizes(self, mask: npt.NDArray[np.bool_]) -> Counts:
        """Rows, users and items of the interactions in a mask."""
        distinct = (int((np.bincount(codes[mask]) > 0).sum()) for codes in (self.users, self.items))
        return dict(zip(("rows", "users", "items"), (int(mask.sum()), *distinct), strict=True))

    def sampled(self, mask: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
        """True for the interactions of the `count` users in the mask whose ids have the smallest hashes."""
        present = np.flatnonzero(np.bincount(self.users[mask], minlength=len(self.raw_users)))
        ids = pl.concat([self.pieces.get("users", number, ["user_id"]) for number in range(self.pieces.partitions)])
        hashes = np.array([derive(0, user) for user in ids["user_id"].gather(present)], dtype=np.int64)
        chosen = np.zeros(len(self.raw_users), dtype=np.bool_)
        chosen[present[np.argsort(hashes, kind="stable")[:count]]] = True
        return chosen[self.users]

    def times(self) -> npt.NDArray[np.int64]:
        """Times of the interactions: [n] seconds."""
        found = [self.pieces.get("pairs", number, ["timestamp"]) for number in range(self.pieces.partitions)]
        return pl.concat(found)["timestamp"].to_numpy()

    def put(self, mask: npt.NDArray[np.bool_]) -> None:
        """Leaves what stays: rows with their items' numbers by partition of users, items by partition of items."""
        for partition, (start, end) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
            stays = mask[start:end]
            rows = self.pieces.get("pairs", partition, ["row"])["row"].to_numpy()[stays]
            self.pieces.put("kept", partition, pl.DataFrame({"row": rows, "item": self.items[start:end][stays]}))
        present = np.bincount(self.items[mask], minlength=self.catalogue.height) > 0
        sold = self.catalogue.filter(pl.Series(present)).select("item_id", "item")
        places = self.pieces.places(sold["item_id"])
        for partition in range(self.pieces.partitions):
            self.pieces.put("sold", partition, sold.filter(pl.Series(places == partition)))
