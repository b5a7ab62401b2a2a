"""Which interactions are targets, and of which split: leave-two-out, or by two cut times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pulse_ray.schema import Split

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Rows of the targets of each split, by user and newest first, and which rows count as training."""

    rows: dict[Split, Rows]
    trained: npt.NDArray[np.bool_]


def leave_two_out(starts: Rows, length: int, positions: int) -> Targets:
    """A user's last interaction is for test, the one before for validation, `positions` before those for training.

    A user with two trains only. The first interaction has no history and is never a target.

    Args:
        starts: [users] first row of each user; a user's rows follow each other, oldest first.
        length: number of rows.
    """
    user, place, count = _places(starts, length)
    held_out = count >= 3
    test, validation = held_out & (place == count - 1), held_out & (place == count - 2)
    newest = np.where(held_out, count - 3, count - 1)
    train = (place >= 1) & (place <= newest) & (place > newest - positions)
    return _targets(user, place, train, validation, test, trained=~(test | validation))


def temporal(starts: Rows, times: Rows, validation_from: int, test_from: int, positions: int) -> Targets:
    """Training precedes one time and test follows another, the same for all users (Ji et al., 2023, on data leakage).

    A user's first interaction at or after `test_from` is for test, its first between the two for validation, and its
    `positions` newest before `validation_from` for training. What else lies after `validation_from` is only history.

    Args:
        starts: as in `leave_two_out`.
        times: [n] of the rows, in seconds.
    """
    user, place, _ = _places(starts, len(times))
    phase = (times >= validation_from).astype(np.int8) + (times >= test_from)
    before = np.where(place >= 1, np.roll(phase, 1), -1)
    validation, test = ((before >= 0) & (phase == number) & (before != number) for number in (1, 2))
    newest = (np.bincount(user, weights=phase == 0).astype(np.int64) - 1)[user] if len(user) else user
    train = (phase == 0) & (place >= 1) & (place > newest - positions)
    return _targets(user, place, train, validation, test, trained=phase == 0)


def _places(starts: Rows, length: int) -> tuple[Rows, Rows, Rows]:
    """Of each row: its user's number, its place in the user's sequence, that sequence's length. [n] each."""
    counts = np.diff(np.append(starts, length))
    user = np.repeat(np.arange(len(starts)), counts)
    return user, np.arange(length) - starts[user], counts[user]


def _targets(
    user: Rows,
    place: Rows,
    train: npt.NDArray[np.bool_],
    validation: npt.NDArray[np.bool_],
    test: npt.NDArray[np.bool_],
    *,
    trained: npt.NDArray[np.bool_],
) -> Targets:
    order = np.lexsort((-place, user))
    masks: dict[Split, npt.NDArray[np.bool_]] = {"train": train, "validation": validation, "test": test}
    return Targets(rows={split: order[mask[order]] for split, mask in masks.items()}, trained=trained)
