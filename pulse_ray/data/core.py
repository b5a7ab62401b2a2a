"""Which interactions stay: k-core, or the paper's single pass, on two integers for each interaction of a domain."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


def k_core(users: Codes, items: Codes, min_user: int, min_item: int) -> Mask:
    """The largest set of interactions in which every user has `min_user` and every item `min_item` of them.

    Users and items with fewer are dropped in turn until none is left (Seidman, 1983, for bipartite graphs).

    Args:
        users: [n] number of each interaction's user, from 0 on.
        items: [n] of its item.

    Returns:
        [n], True for interactions that stay.

    >>> k_core(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 1]), 2, 2)
    array([ True,  True,  True,  True, False])
    """
    left = np.arange(len(users))
    while True:
        kept = left[_frequent(items[left], min_item)]
        kept = kept[_frequent(users[kept], min_user)]
        if len(kept) == len(left):
            break
        left = kept
    mask = np.zeros(len(users), dtype=np.bool_)
    mask[left] = True
    return mask


def _frequent(codes: Codes, least: int) -> Mask:
    return np.asarray(np.bincount(codes)[codes] >= least) if len(codes) else np.zeros(0, dtype=np.bool_)


def cut_time(times: npt.NDArray[np.int64], share: float) -> int:
    """The smallest time such that at most `share` of the interactions lie at or after it.

    >>> cut_time(np.array([1, 2, 3, 3, 4]), 0.2), cut_time(np.array([1, 2, 3, 3, 4]), 0.4)
    (4, 4)
    """
    ordered = np.sort(times)
    allowed = int(share * len(ordered))
    first = np.searchsorted(ordered, ordered[len(ordered) - allowed - 1], side="right")
    return int(ordered[first]) if first < len(ordered) else int(ordered[-1]) + 1
