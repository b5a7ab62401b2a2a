"""The last line of a benchmark: what was measured, where, and which bars hold."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def report(name: str, figures: Mapping[str, Any], bars: Mapping[str, Mapping[str, Any]]) -> int:
    """Prints the line and gives the exit code: 1 where a bar does not hold.

    Args:
        bars: by name `{"value": what was measured, "bar": what is asked, "holds": whether it is met}`.
    """
    line = {"name": name, "commit": _commit(), "hardware": _hardware(), "figures": figures, "bars": bars}
    print(json.dumps(line), flush=True)
    return 0 if all(bar["holds"] for bar in bars.values()) else 1


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def _hardware() -> str:
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else 'a CPU'}, {memory:.0f} GiB"
