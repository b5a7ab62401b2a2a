"""The synthetic shop: a small world in which why people buy is known, made from a seed alone.

An item is a product with one motive on its label, a flavour and a brand. A user has a motive, which a quarter of them
change once, early on. A purchase follows the motive of the time with probability `motive_strength`; otherwise, and
among the items that fit, popularity decides. Ratings are high where an item fits and low where not; reviews say why in
the customers' words. Popularity is skewed (Zipf's law, flattened) and independent of motives, so it explains little.

The motive of the next purchase is in plain sight in the history, in titles, ratings and reviews. The motives themselves
are kept apart (`item_motives`, `purchase_motives`) for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pulse_ray.config import SyntheticSource
from pulse_ray.data.motives import BRANDS, FLAVOURS, MOTIVES, PRODUCTS, REMARKS, Motive
from pulse_ray.data.sources import RAW_INTERACTIONS, RAW_ITEMS, Row
from pulse_ray.seeding import derive

ZIPF_EXPONENT = 0.4
SHIFT_PROBABILITY = 0.25
REVIEW_PROBABILITY = 0.9
OPENING_S = 1_546_300_800  # 2019-01-01
DAY_S = 86_400

Words = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Product:
    """An item of the shop: its motive's number and what its label says."""

    motive: int
    brand: str
    product: str
    row: Row


class Shop:
    """Items and purchases of a synthetic shop.

    Args:
        source: sizes of the shop.
        seed: the same seed makes the same shop, row for row.
    """

    def __init__(self, source: SyntheticSource, seed: int) -> None:
        self.source, self.seed = source, seed

    def items(self) -> pa.Table:
        """Raw items, as a metadata file would give them."""
        return pa.Table.from_pylist([product.row for product in self._products], schema=RAW_ITEMS)

    def interactions(self) -> pa.Table:
        """Raw interactions, as a review file would give them."""
        rows = [row for row, _ in self._purchases]
        return pa.Table.from_pylist(rows, schema=RAW_INTERACTIONS)

    def item_motives(self) -> pa.Table:
        """The truth about items: `item_id, motive`."""
        rows = [{"item_id": one.row["item_id"], "motive": MOTIVES[one.motive].name} for one in self._products]
        return pa.Table.from_pylist(rows)

    def purchase_motives(self) -> pa.Table:
        """The truth about purchases: `user_id, item_id, motive` (the user's, at that time)."""
        rows = [
            {"user_id": row["user_id"], "item_id": row["item_id"], "motive": MOTIVES[motive].name}
            for row, motive in self._purchases
        ]
        return pa.Table.from_pylist(rows)

    @cached_property
    def _products(self) -> list[_Product]:
        random = np.random.default_rng(derive(self.seed, "items"))
        labels: set[str] = set()
        return [self._product(number, random, labels) for number in range(self.source.items)]

    def _product(self, number: int, random: np.random.Generator, labels: set[str]) -> _Product:
        motive = MOTIVES[number % len(MOTIVES)]
        kind = _pick(random, motive.kinds)
        category, product = PRODUCTS[kind][random.integers(len(PRODUCTS[kind]))]
        brand = _pick(random, BRANDS)
        label = self._label(random, motive, product, _pick(random, FLAVOURS[kind]))
        if f"{brand} {label}" in labels:
            label += f", No. {number}"
        labels.add(f"{brand} {label}")
        facts = [f"A {product.lower()} by {brand}.", _pick(random, motive.facts)]
        row = {
            "item_id": f"item-{number:05d}",
            "title": label,
            "description": " ".join(random.permutation(np.array(facts))),
            "brand": brand,
            "categories": [category, product],
            "order": number,
        }
        return _Product(motive=number % len(MOTIVES), brand=brand, product=product, row=row)

    @staticmethod
    def _label(random: np.random.Generator, motive: Motive, product: str, flavour: str) -> str:
        word = _pick(random, motive.titles)
        forms = (f"{word} {flavour} {product}", f"{product}, {word}, {flavour}", f"{flavour} {product} ({word})")
        return _pick(random, forms)

    @cached_property
    def _purchases(self) -> list[tuple[Row, int]]:
        random = np.random.default_rng(derive(self.seed, "popularity"))
        ranks = 1 + random.permutation(len(self._products))
        popularity: npt.NDArray[np.float64] = np.power(ranks, -ZIPF_EXPONENT, dtype=np.float64)
        return [purchase for user in range(self.source.users) for purchase in self._history(user, popularity)]

    def _history(self, user: int, popularity: npt.NDArray[np.float64]) -> list[tuple[Row, int]]:
        """A user's purchases, each with the motive of the time. Every user has a stream of random numbers."""
        random = np.random.default_rng(derive(self.seed, "user", user))
        length = int(random.integers(self.source.min_purchases, self.source.max_purchases + 1))
        length = min(length, len(self._products))
        motives = self._motives(random, length)
        time = OPENING_S + int(random.integers(365 * DAY_S))
        free = np.ones(len(self._products), dtype=bool)
        purchases = []
        for position, motive in enumerate(motives):
            fitting = free & (self._motive_of_item == motive)
            follows = random.random() < self.source.motive_strength and bool(fitting.any())
            weights = popularity * (fitting if follows else free)
            number = int(random.choice(len(weights), p=weights / weights.sum()))
            free[number] = False
            time += int(random.integers(DAY_S, 60 * DAY_S))
            row = self._review(random, self._products[number], motive)
            row |= {
                "user_id": f"user-{user:05d}",
                "timestamp": time,
                "order": user * self.source.max_purchases + position,
            }
            purchases.append((row, motive))
        return purchases

    def _motives(self, random: np.random.Generator, length: int) -> list[int]:
        known = min(len(MOTIVES), len(self._products))
        first, second = (int(motive) for motive in random.choice(known, size=2, replace=known < 2))
        early = int(random.integers(1, max(2, length // 3 + 1)))
        change = early if random.random() < SHIFT_PROBABILITY else length
        return [first if position < change else second for position in range(length)]

    @cached_property
    def _motive_of_item(self) -> npt.NDArray[np.int64]:
        return np.array([product.motive for product in self._products])

    @staticmethod
    def _review(random: np.random.Generator, item: _Product, motive: int) -> Row:
        fits = item.motive == motive
        rating = (
            random.choice([5.0, 4.0], p=[0.75, 0.25]) if fits else random.choice([1.0, 2.0, 3.0], p=[0.2, 0.4, 0.4])
        )
        said = _pick(random, MOTIVES[motive].praise) if fits else f"I wanted {_pick(random, MOTIVES[motive].wishes)}"
        remark = _pick(random, REMARKS).format(product=item.product.lower(), brand=item.brand)
        review = f"{said}. {remark}".strip() if random.random() < REVIEW_PROBABILITY else None
        return {"item_id": item.row["item_id"], "rating": float(rating), "review": review}


def _pick(random: np.random.Generator, choices: Words) -> str:
    return choices[int(random.integers(len(choices)))]
