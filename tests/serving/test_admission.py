"""Who may wait: by the time that those ahead will take."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from pulse_ray.serving.admission import Admission
from pulse_ray.serving.backend import BusyError


def _fill(admission: Admission, room: ExitStack) -> int:
    """Takes places until one is refused; returns how many there were."""
    for taken in range(100):
        try:
            room.enter_context(admission.place())
        except BusyError:
            return taken
    raise AssertionError("nothing is refused")


# Ahead of the last one admitted: 10 · 0.1 s, 2 · 0.4 s, and one row, which may always be waited for.
@pytest.mark.parametrize(("row_s", "places"), [(0.1, 11), (0.4, 3), (9.0, 2)])
def test_rows_are_refused_by_the_time_that_those_ahead_will_take(row_s: float, places: int) -> None:
    admission = Admission(max_wait_s=1.0)
    admission.took(4, 4 * row_s)
    with ExitStack() as room:
        assert _fill(admission, room) == places
        with admission.place(companions=places):
            pass
    with admission.place():
        pass


def test_a_row_s_time_follows_the_newest_batches() -> None:
    admission = Admission(max_wait_s=1.0)
    for _ in range(20):
        admission.took(2, 0.2)
    assert admission.row_s == pytest.approx(0.1)
    admission.took(1, 1.0)
    assert 0.1 < admission.row_s < 1.0
