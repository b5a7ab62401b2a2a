"""Peak memory of a command and of everything that it starts, sampled from outside."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "PULSE_RAY_MEASURED"
"""Variable that a command's environment is marked with: what it starts inherits it, whoever its parent is later."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The largest memory of all processes together, in bytes, and who held it then.

    A page that several processes map counts once: each has its share of it (PSS).
    """

    bytes: int
    by_program: dict[str, int]


def watch(command: Sequence[str], log: Path, interval_s: float = 0.5) -> Peak:
    """Runs a command to its end; what it says goes to a file.

    Raises:
        RuntimeError: the command failed; with the end of what it said.
    """
    mark = uuid.uuid4().hex
    highest: Counter[str] = Counter()
    known: dict[int, bool] = {}
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env={**os.environ, MARK: mark}
        )
        while True:
            held = _held(f"{MARK}={mark}".encode(), known)
            highest = max(highest, held, key=lambda programs: sum(programs.values()))
            try:
                code = process.wait(interval_s)
            except subprocess.TimeoutExpired:
                continue
            break
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read_text(errors='replace')[-4000:]}")
    return Peak(bytes=sum(highest.values()), by_program=dict(highest.most_common()))


def _held(mark: bytes, known: dict[int, bool]) -> Counter[str]:
    """Bytes that each program of the marked processes holds; `known` remembers which processes are marked."""
    held: Counter[str] = Counter()
    alive = {int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()}
    for gone in known.keys() - alive:
        del known[gone]
    for number in alive:
        folder = Path("/proc", str(number))
        try:
            # A process that was forked a moment ago still has its parent's environment: only what is ours is sure.
            if not known.get(number):
                known[number] = mark in (folder / "environ").read_bytes().split(b"\0")
            if known[number]:
                sizes = (folder / "smaps_rollup").read_text()
                [share] = [line.split()[1] for line in sizes.splitlines() if line.startswith("Pss:")]
                held[_program(folder)] += int(share) * 1024
        except (OSError, ValueError):  # It has just ended, or belongs to someone else.
            continue
    return held


def _program(folder: Path) -> str:
    """A process's name: Ray gives its workers what they are doing, other programs have their file's name."""
    first = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace").strip()
    return first if first.startswith("ray::") else Path(first.split(" ")[0]).name
