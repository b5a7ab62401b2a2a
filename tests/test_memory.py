from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks._memory import watch

MIB = 2**20
HOLD = "held = bytes(range(256)) * (60 * 2**12)"
CHILD = f"import time; {HOLD}; time.sleep(2)"
PARENT = (
    f"import subprocess, sys; {HOLD}; "
    f"subprocess.Popen([sys.executable, '-c', {CHILD!r}], start_new_session=True).wait()"
)
"""Python that holds 60 MiB, and Python that does while its child does too."""


def test_memory_of_what_a_command_starts_counts(tmp_path: Path) -> None:
    """A child that left its parent's session counts too, and the pages that both map count once."""
    one = watch([sys.executable, "-c", CHILD], tmp_path / "one", interval_s=0.1)
    two = watch([sys.executable, "-c", PARENT], tmp_path / "two", interval_s=0.1)
    assert 60 * MIB < one.bytes < 90 * MIB
    assert one.bytes + 60 * MIB < two.bytes < 2.2 * one.bytes
    assert sum(two.by_program.values()) == two.bytes


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3:\nno luck"):
        watch([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"], tmp_path / "log")
