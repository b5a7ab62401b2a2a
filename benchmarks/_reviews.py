"""Made-up reviews with the marginals of a real category, in the format of the Amazon 2018 dumps, fast.

What is alike: items take their reviews by a shifted Zipf law and users by a log-normal one; ratings are J-shaped; times
are whole days over ten years; lengths of reviews are log-normal (median 30 words, mean 55); about a third of the
reviews need cleaning, nearly all of them for runs of white space or line breaks, some for entities and tags; some
lines repeat a user and an item, and some have no usable rating. The file is sorted by item, as the dumps are.
The words mean nothing. A seed and a number of reviews give the same bytes each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from isal import igzip

SEED = 5
REVIEWS_PER_ITEM = 35
EXTRA_REVIEWS_MU, EXTRA_REVIEWS_SIGMA = -1.3, 1.65
"""A user writes one review and a log-normal number of others, rounded down."""
ZIPF_EXPONENT, ZIPF_SHIFT = 0.9, 20
REPEATED, UNRATED, STYLED = 0.03, 0.0005, 0.5
RATINGS, RATING_SHARES = (1.0, 2.0, 3.0, 4.0, 5.0), (0.09, 0.05, 0.08, 0.17, 0.61)
FIRST_DAY, DAYS = 14_060, 3_652
"""Days since 1970, and how many."""
WORDS_MU, WORDS_SIGMA, MOST_WORDS = np.log(30), 1.1, 3_000
SPACED, MARKED = 0.42, 0.04
"""Shares of reviews with line breaks and runs of spaces, and with entities and tags beside."""
WITHOUT_METADATA, TWICE_IN_METADATA = 0.03, 0.01
CHUNK = 200_000

_SYLLABLES = [f"{a}{b}{c}" for a in "bcdfghjklmnprstvwz" for b in "aeiou" for c in ("", "", "n", "r", "s", "t")]
_BASE36 = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
_VOCABULARY, _POOL_WORDS = 30_000, 1_000_000
_MARKS = ("&amp;", "&#34;", "<br />", "<br /><br />", "caf\\u00e9", "it\\u2019s", "\\ud83d\\ude00")

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where the reviews and the metadata of their items are."""

    reviews: Path
    metadata: Path


def make(folder: Path, reviews: int, seed: int = SEED) -> Files:
    """The files with so many reviews; those that an earlier call made are used again."""
    found = Files(
        reviews=folder / f"reviews-{reviews}-{seed}.json.gz", metadata=folder / f"metadata-{reviews}-{seed}.json.gz"
    )
    if found.reviews.exists() and found.metadata.exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, reviews])
    text = Text(rng)
    items = asins(rng.permutation(max(1, reviews // REVIEWS_PER_ITEM)))
    order = np.argsort(items.to_numpy())
    # Who is popular has nothing to do with where in the file it stands.
    counts = rng.permutation(_zipf_counts(len(items), reviews))
    users = rng.permutation(np.repeat(*_users(reviews, rng))[:reviews])
    for path, chunks in (
        (found.reviews, _reviews(items, order, counts, users, text, rng)),
        (found.metadata, _metadata(items, text, rng)),
    ):
        partial = path.with_suffix(".partial")
        _write(partial, chunks)
        partial.rename(path)
    return found


def _zipf_counts(items: int, reviews: int) -> Integers:
    """Reviews of each item, the most popular first; they add up."""
    weights = (np.arange(items) + ZIPF_SHIFT) ** -ZIPF_EXPONENT
    edges = np.rint(np.cumsum(weights) / weights.sum() * reviews).astype(np.int64)
    return np.diff(edges, prepend=0)


def _users(reviews: int, rng: np.random.Generator) -> tuple[Integers, Integers]:
    """Users' numbers and how many reviews each writes; at least `reviews` in all."""
    counts = 1 + np.exp(rng.normal(EXTRA_REVIEWS_MU, EXTRA_REVIEWS_SIGMA, reviews)).astype(np.int64)
    enough = int(np.searchsorted(np.cumsum(counts), reviews)) + 1
    return np.arange(enough), counts[:enough]


def _reviews(
    items: pl.Series, order: Integers, counts: Integers, users: Integers, text: Text, rng: np.random.Generator
) -> Iterator[pl.Series]:
    item_of = np.repeat(order, counts[order])
    days = pl.Series(np.arange(FIRST_DAY, FIRST_DAY + DAYS), dtype=pl.Int32).cast(pl.Date)
    spelled = pl.DataFrame({"day": days}).select(pl.col("day").dt.strftime("%m %-d, %Y"))["day"]
    ratings = np.array([*RATINGS, 0.0])
    shares = [*((1 - UNRATED) * np.array(RATING_SHARES)), UNRATED]
    for start in range(0, len(users), CHUNK):
        item, user = item_of[start : start + CHUNK], users[start : start + CHUNK].copy()
        size = len(item)
        repeats = np.flatnonzero((rng.random(size - 1) < REPEATED) & (item[1:] == item[:-1])) + 1
        user[repeats] = user[repeats - 1]
        # There are ever more reviews: twice as many in the last year as in the middle.
        day = (DAYS * np.sqrt(rng.random(size))).astype(np.int64)
        words = np.clip(np.exp(rng.normal(WORDS_MU, WORDS_SIGMA, size)), 1, MOST_WORDS).astype(np.int64)
        frame = pl.DataFrame(
            {
                "overall": pl.Series(rng.choice(ratings, size, p=shares)).cast(pl.String),
                "verified": pl.Series(rng.random(size) < 0.85).cast(pl.String),
                "time": spelled.gather(day),
                "user": reviewer_ids(user),
                "asin": items.gather(item),
                "style": pl.Series(rng.random(size) < STYLED),
                "name": text.slices(rng, np.full(size, 2)),
                "review": text.slices(rng, words, spaced=SPACED, marked=MARKED),
                "summary": text.slices(rng, 1 + words % 5),
                "unix": pl.Series((FIRST_DAY + day) * 86_400).cast(pl.String),
            }
        )
        style = pl.when("style").then(pl.lit('"style": {"Color:": " Grey"}, ')).otherwise(pl.lit(""))
        yield frame.select(
            pl.format(
                '{{"overall": {}, "verified": {}, "reviewTime": "{}", "reviewerID": "{}", "asin": "{}", {}'
                '"reviewerName": "{}", "reviewText": "{}", "summary": "{}", "unixReviewTime": {}}}\n',
                *("overall", "verified", "time", "user", "asin", style, "name", "review", "summary", "unix"),
            )
        ).to_series()


def _metadata(items: pl.Series, text: Text, rng: np.random.Generator) -> Iterator[pl.Series]:
    numbers = np.arange(len(items))
    listed = np.sort(
        np.concatenate(
            [numbers[rng.random(len(items)) >= WITHOUT_METADATA], numbers[rng.random(len(items)) < TWICE_IN_METADATA]]
        )
    )
    for start in range(0, len(listed), CHUNK):
        item = listed[start : start + CHUNK]
        size = len(item)
        words = np.clip(np.exp(rng.normal(WORDS_MU, WORDS_SIGMA, size)), 1, MOST_WORDS).astype(np.int64)
        frame = pl.DataFrame(
            {
                "asin": items.gather(item),
                "title": text.slices(rng, rng.integers(3, 16, size), marked=0.1),
                "description": text.slices(rng, words, spaced=0.1, marked=0.2),
                "brand": text.slices(rng, rng.integers(1, 3, size)),
                "by": pl.Series(rng.random(size) < 0.05),
                "kind": text.slices(rng, np.full(size, 1)),
                "kinds": text.slices(rng, np.full(size, 2), marked=0.1),
            }
        )
        by = pl.when("by").then(pl.lit("by\\n    ")).otherwise(pl.lit(""))
        yield frame.select(
            pl.format(
                '{{"category": ["Shop", "{}", "{}"], "description": ["{}"], "title": "{}", "also_buy": [], '
                '"brand": "{}{}", "rank": "7 in Shop", "price": "$9.99", "asin": "{}"}}\n',
                *("kind", "kinds", "description", "title", by, "brand", "asin"),
            )
        ).to_series()


class Text:
    """Random words as JSON spells them, in pools that texts are cut from."""

    def __init__(self, rng: np.random.Generator) -> None:
        syllables = rng.choice(_SYLLABLES, (_VOCABULARY, 4))
        # Frequent words are short.
        lengths = np.clip(rng.poisson(np.linspace(0.6, 2.2, _VOCABULARY)), 0, 3) + 1
        words = np.array(["".join(row[:length]) for row, length in zip(syllables, lengths, strict=True)], dtype=object)
        weights = 1 / (np.arange(_VOCABULARY) + 3)
        drawn = words[rng.choice(_VOCABULARY, _POOL_WORDS, p=weights / weights.sum())]
        ends = rng.random(_POOL_WORDS)
        plain = drawn + np.select([ends < 0.06, ends < 0.15], [",", "."], "").astype(object)
        quoted = np.where(rng.random(_POOL_WORDS) < 0.01, '\\"' + plain + '\\"', plain)
        marked = np.where(rng.random(_POOL_WORDS) < 0.05, rng.choice(np.array(_MARKS, object), _POOL_WORDS), quoted)
        full_stop = (ends >= 0.06) & (ends < 0.15)
        wide = np.where(full_stop, rng.choice(np.array(["  ", "  ", "\\n\\n", " "], object), _POOL_WORDS), " ")
        spaces = np.full(_POOL_WORDS, " ", dtype=object)
        self._pools = [_Pool(plain, spaces), _Pool(quoted, wide), _Pool(marked, wide)]

    def slices(
        self, rng: np.random.Generator, words: Integers, *, spaced: float = 0.0, marked: float = 0.0
    ) -> pl.Series:
        """Texts of so many words each, some from the pools with wide spaces and with marks."""
        starts = rng.integers(0, _POOL_WORDS - MOST_WORDS, len(words))
        kinds = np.digitize(rng.random(len(words)), [1 - spaced - marked, 1 - marked])
        found = np.empty((len(words), 4), dtype=np.int32)
        for kind, pool in enumerate(self._pools):
            chosen = kinds == kind
            found[chosen] = pool.views(starts[chosen], words[chosen], kind)
        buffers = [None, pa.py_buffer(found), *(pa.py_buffer(pool.content) for pool in self._pools)]
        return pl.Series(pa.Array.from_buffers(pa.string_view(), len(words), buffers))


class _Pool:
    """Words with what separates them in one run of bytes; Arrow's string views point into it."""

    def __init__(self, words: npt.NDArray[np.object_], spaces: npt.NDArray[np.object_]) -> None:
        parts = pl.DataFrame({"word": pl.Series(list(words)), "space": pl.Series(list(spaces))})
        lengths = parts.select(pl.all().str.len_bytes().cast(pl.Int64))
        ends = (lengths["word"] + lengths["space"]).cum_sum()
        self.content = np.frombuffer(
            "".join(parts.select(pl.concat_str("word", "space")).to_series()).encode(), dtype=np.uint8
        )
        self._starts = ends.shift(1, fill_value=0).to_numpy()
        self._ends = (ends - lengths["space"]).to_numpy()

    def views(self, first: Integers, words: Integers, number: int) -> npt.NDArray[np.int32]:
        """Views (length, first four bytes, number of the pool, place) of so many words from the `first`."""
        starts = self._starts[first]
        lengths = self._ends[first + words - 1] - starts
        head = self.content[starts[:, None] + np.arange(12)]
        views = np.empty((len(first), 4), dtype=np.int32)
        views[:, 0] = lengths
        # Arrow keeps up to twelve bytes in the view itself, padded with zeros.
        views[:, 1:] = np.where(np.arange(12) < lengths[:, None], head, 0).astype(np.uint8).view(np.int32)
        long = lengths > 12
        views[long, 2], views[long, 3] = number, starts[long]
        return views


def reviewer_ids(numbers: Integers) -> pl.Series:
    """Distinct ids for distinct numbers."""
    return _spell(b"A", numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15), 13)


def asins(numbers: Integers) -> pl.Series:
    """Distinct ids for distinct numbers."""
    return _spell(b"B0", numbers.astype(np.uint64) * np.uint64(1_000_003_777) % np.uint64(36**8), 8)


def _spell(prefix: bytes, numbers: npt.NDArray[np.uint64], digits: int) -> pl.Series:
    letters = np.empty((len(numbers), len(prefix) + digits), dtype=np.uint8)
    letters[:, : len(prefix)] = np.frombuffer(prefix, dtype=np.uint8)
    for place in range(digits):
        letters[:, -1 - place] = _BASE36[(numbers % np.uint64(36)).astype(np.int64)]
        numbers = numbers // np.uint64(36)
    width = letters.shape[1]
    offsets = np.arange(len(letters) + 1, dtype=np.int64) * width
    return pl.Series(
        pa.Array.from_buffers(pa.large_string(), len(letters), [None, pa.py_buffer(offsets), pa.py_buffer(letters)])
    )


def _write(path: Path, chunks: Iterator[pl.Series]) -> None:
    """Compresses in a second thread while the next chunk is made."""
    with path.open("wb") as raw, igzip.IGzipFile("", "wb", 1, raw, mtime=0) as zipped, ThreadPoolExecutor(1) as pool:
        pending = None
        for chunk in chunks:
            content = _content(chunk)
            if pending is not None:
                pending.result()
            pending = pool.submit(zipped.write, content)
        if pending is not None:
            pending.result()


def _content(lines: pl.Series) -> memoryview:
    array = lines.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)
    return memoryview(array.buffers()[2])[int(offsets[array.offset]) : int(offsets[array.offset + len(array)])]
