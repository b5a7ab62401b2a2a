"""Search over item titles: each word of a query must begin a word of the title."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from pulse_ray.schema import Item

_WORD = re.compile(r"\w+")


class TitleIndex:
    """The titles of one domain, by the beginnings of their words.

    >>> cream, soap = (Item(item_id=kind, title=f"Hand {kind}", text="") for kind in ("Cream", "Soap"))
    >>> [item.item_id for item in TitleIndex([cream, soap]).find("ha so", 5)]
    ['Soap']
    """

    def __init__(self, items: Iterable[Item]) -> None:
        # The most popular first: the order of every answer.
        self._items = sorted(items, key=lambda item: (-item.popularity, item.title, item.item_id))
        postings: dict[str, set[int]] = {}
        for place, item in enumerate(self._items):
            for word in _words(item.title):
                postings.setdefault(word, set()).add(place)
        self._words = sorted(postings)
        self._postings = postings

    def find(self, query: str, limit: int) -> Sequence[Item]:
        """Up to `limit` items, the most popular first. A query without words finds the most popular of all."""
        wanted = sorted(set(_words(query)), key=len, reverse=True)
        if not wanted:
            return self._items[:limit]
        found = set.intersection(*(self._beginning(word) for word in wanted))
        return [self._items[place] for place in sorted(found)[:limit]]

    def _beginning(self, prefix: str) -> set[int]:
        start = bisect_left(self._words, prefix)
        return set().union(*(self._postings[word] for word in self._from(start, prefix)))

    def _from(self, start: int, prefix: str) -> Iterator[str]:
        rest = (self._words[place] for place in range(start, len(self._words)))
        return takewhile(lambda word: word.startswith(prefix), rest)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
