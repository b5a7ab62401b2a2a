"""What a domain's items are called, as far as a text can be told to name one: runs of words, kept as hashes.

Only a run that few titles hold tells an item, and only where it is written as a name: "Lavender Dish Soap" names an
item where "a dish soap with lavender" describes one. Titles without capital letters or digits, as in scripts without
case, can therefore not be recognised.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import islice

import numpy as np
import numpy.typing as npt

from pulse_ray.catalogue import Catalogue
from pulse_ray.config import SamplingConfig
from pulse_ray.text import words

MAX_TITLES = 3
"""A run that more titles hold is a phrase and no name."""

MAX_WORD_SHARE = 0.05
"""A word that a larger share of the titles hold says what is sold here and tells no item."""

MIN_LETTERS = 3

_RUN = 3
_BUCKETS = 2**16
_CHUNK = 50_000
_PRIME, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1

Hashes = npt.NDArray[np.uint64]


class ItemNames:
    """Runs of words that tell an item: three words of its title, or both of a title of two. 8 bytes a run.

    Args:
        titles: of a domain's items; repeats count once.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        pairs, whole, runs = (array("Q") for _ in range(3))
        self._counts, self._titles = np.zeros(_BUCKETS, np.int64), 0
        for chunk in _chunks(titles):
            self._titles += len(chunk)
            self._counts += _word_counts(chunk)
            for kept, more in zip((pairs, whole, runs), _cut(chunk), strict=True):
                kept.frombytes(more.tobytes())
        self._runs = _rare(_sorted(runs))
        del runs
        self._pairs = _rare_among(_sorted(whole), _sorted(pairs))

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self._runs.nbytes + self._pairs.nbytes + self._counts.nbytes

    def unseen(self, text: str, shown: Iterable[str]) -> str | None:
        """The first run of a text that tells an item which was not shown, or None.

        A name's telling word must be new: what was shown may be shortened, and its words put together in another way.

        Args:
            shown: all that the text's writer has read.
        """
        known: set[str] | None = None
        for run in self._named(words(text)):
            if known is None:  # Few texts name anything, and prompts are long.
                known = {word.casefold() for one in shown for word in words(one)}
            if any(_is_name(word) and word.casefold() not in known and self._tells(word) for word in run):
                return " ".join(run)
        return None

    def _named(self, found: list[str]) -> Iterator[list[str]]:
        """The runs of a text that few titles hold, written as names."""
        hashes, names = [_hash(word) for word in found], [_is_name(word) for word in found]
        for size, kept in ((2, self._pairs), (_RUN, self._runs)):
            for place in range(len(found) - size + 1):
                run = slice(place, place + size)
                if sum(names[run]) >= 2 and _holds(kept, _mixed(hashes[run])):
                    yield found[run]

    def _tells(self, word: str) -> bool:
        # Numbers and units stand for sizes, not for items.
        rare = self._counts[_hash(word) % _BUCKETS] <= max(MAX_TITLES, MAX_WORD_SHARE * self._titles)
        return bool(rare) and len(word) >= MIN_LETTERS and not word[0].isdigit()


def of_catalogue(items: Catalogue, sampling: SamplingConfig) -> dict[str, ItemNames]:
    """The names of each domain's items; none where no gate asks for them, as a large catalogue takes half a minute."""
    if "names an unseen item" not in sampling.gates:
        return {}
    return {domain: ItemNames([item.title for item in held.values()]) for domain, held in items.items()}


@lru_cache(maxsize=2**16)
def _is_name(word: str) -> bool:
    """A word with an upper-case letter or a digit: in scripts without case, no word but one with a digit."""
    return word != word.lower() or any(map(str.isdigit, word))


@lru_cache(maxsize=2**16)
def _hash(word: str) -> int:
    # Python's own hash differs between processes, and verdicts would with it where words share a bucket.
    marked = f"^{word.casefold()}" if _is_name(word) else word
    return int.from_bytes(blake2b(marked.encode(), digest_size=8).digest(), "little")


def _mixed(hashes: Sequence[int]) -> int:
    value = 0
    for one in hashes:
        value = (value * _PRIME + one) & _MASK
    return value


def _holds(kept: Hashes, wanted: int) -> bool:
    at = int(np.searchsorted(kept, np.uint64(wanted)))
    return at < len(kept) and int(kept[at]) == wanted


def _chunks(titles: Sequence[str]) -> Iterator[list[str]]:
    """The titles, each once."""
    rest = iter(dict.fromkeys(titles))
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def _cut(titles: Sequence[str]) -> tuple[Hashes, Hashes, Hashes]:
    """Of what may be a name: pairs of words, the pairs that are whole titles, and runs."""
    flat, named, lengths = array("Q"), array("b"), array("I")
    for title in titles:
        found = words(title)
        flat.extend(map(_hash, found))
        named.extend(map(_is_name, found))
        lengths.append(len(found))
    size, h, name = np.array(lengths), np.array(flat, np.uint64), np.array(named, np.int8)
    owner = np.repeat(np.arange(len(titles)), size)
    pair = h[:-1] * np.uint64(_PRIME) + h[1:]
    run = pair[:-1] * np.uint64(_PRIME) + h[2:]
    together = (owner[:-1] == owner[1:]) & (name[:-1] + name[1:] == 2)
    whole = together & (size[owner[:-1]] == 2)
    may_name = (owner[:-2] == owner[2:]) & (name[:-2] + name[1:-1] + name[2:] >= 2)
    return pair[together], pair[whole], run[may_name]


def _word_counts(titles: Sequence[str]) -> npt.NDArray[np.int64]:
    """Titles by the bucket of a word that they hold; words that share a bucket seem more frequent than they are."""
    buckets = array("I")
    for title in titles:
        buckets.extend({_hash(word) % _BUCKETS for word in words(title)})
    return np.bincount(np.array(buckets, np.int64), minlength=_BUCKETS)


def _sorted(hashes: array[int]) -> Hashes:
    kept: Hashes = np.frombuffer(hashes, np.uint64)
    kept.sort()
    return kept


def _rare(hashes: Hashes) -> Hashes:
    """Of sorted hashes, each once, those that come at most `MAX_TITLES` times."""
    kept = np.ones(len(hashes), bool)
    kept[:-MAX_TITLES] = hashes[:-MAX_TITLES] != hashes[MAX_TITLES:]
    kept[1:] &= hashes[1:] != hashes[:-1]
    rare: Hashes = hashes[kept]
    return rare


def _rare_among(wanted: Hashes, hashes: Hashes) -> Hashes:
    """Of sorted hashes, each once, those that come at most `MAX_TITLES` times among other sorted ones."""
    wanted = np.unique(wanted)
    counts = np.searchsorted(hashes, wanted, "right") - np.searchsorted(hashes, wanted, "left")
    return wanted[counts <= MAX_TITLES]
