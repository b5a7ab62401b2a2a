"""Seeds derived from names, so that a draw depends on what it is for and not on where or when it is made."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A seed below 2**63 for the purpose spelled by `names`.

    >>> derive(7, "tree", "shop/u1/5", "1.2") == derive(7, "tree", "shop/u1/5", "1.2")
    True
    >>> derive(7, "a", "bc") == derive(7, "ab", "c")
    False
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
