"""Command line and last output line of a benchmark: sizes to choose from, what was measured, where, which bars hold."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal

Size = Literal["full", "quick", "smoke"]
"""`full` measures, `quick` measures roughly, `smoke` takes every path at the smallest sizes and measures nothing."""


def parser(module: str, description: str | None, *, quick: str) -> argparse.ArgumentParser:
    """Command-line parser of a benchmark, with the sizes that every benchmark has. `size` reads them.

    Args:
        module: file name without suffix, e.g. `prepare`.
        quick: what `--quick` measures, and how long it takes.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = made.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help=quick)
    sizes.add_argument(
        "--smoke",
        action="store_true",
        help="smallest sizes that take every path: under a minute, no bars; the figures mean nothing",
    )
    return made


def size(options: argparse.Namespace) -> Size:
    """Size that the command line asks for."""
    return "smoke" if options.smoke else "quick" if options.quick else "full"


def report(name: str, size: Size, figures: Mapping[str, Any], bars: Mapping[str, Mapping[str, Any]]) -> int:
    """Print the result as one line of JSON.

    Args:
        bars: by name `{"value": what was measured, "bar": what is asked, "holds": whether it is met}`. A smoke run
            measures nothing, so its bars are dropped.

    Returns:
        Exit code of the benchmark: 1 if a bar does not hold.
    """
    bars = {} if size == "smoke" else bars
    line = {
        "name": name,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "size": size,
        "date": date.today().isoformat(),
        "commit": _commit(),
        "hardware": _hardware(),
        "figures": figures,
        "bars": bars,
    }
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
