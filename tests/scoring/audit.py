"""The real command, killed on purpose, and what must be true of its output afterwards."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

PATIENCE_S = 2
"""Time that a local Ray is given to follow its driver. Its actors do so at once; two agents of Ray's, which hold
nothing of a run's, take more than a minute."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """`pulse-ray score` with its configuration, input and output, and settings on top."""

    config: Path
    users: Path
    output: Path
    settings: Sequence[str] = ()

    def start(self) -> subprocess.Popen[bytes]:
        """Starts it; what it says goes to a file beside the output."""
        arguments = ["score", str(self.config), "--input", str(self.users), "--output", str(self.output)]
        overrides = [word for setting in self.settings for word in ("--set", setting)]
        # A file: a pipe would be held open by the processes that outlive the driver.
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pulse_ray.cli", *arguments, *overrides], stdout=log, stderr=log
            )

    @property
    def log(self) -> Path:
        """What it said."""
        return self.output.with_suffix(".log")

    def parts(self) -> list[str]:
        """Names of the parts that are committed: those that all outputs hold."""
        held = [
            {entry.name for entry in os.scandir(folder) if entry.name.endswith(".parquet")}
            for name in ("user_scores", "recommendations")
            if (folder := self.output / name).is_dir()
        ]
        return sorted(set.intersection(*held)) if len(held) == 2 else []

    def until(self, stop: Callable[[psutil.Process], bool], interval_s: float) -> subprocess.Popen[bytes]:
        """Starts it and asks `stop` again and again until it is true, or until the driver has ended."""
        driver = self.start()
        process = psutil.Process(driver.pid)
        while driver.poll() is None and not stop(process):
            time.sleep(interval_s)
        return driver

    def finish(self) -> None:
        """Runs it to its end."""
        assert self.start().wait() == 0, self.log.read_text()


@dataclass(frozen=True, kw_only=True)
class Killed:
    """A job whose driver was killed with SIGKILL.

    `committed` names the parts that were there, with the digest and the time of change of each of their files.
    `survivors` are the names of the processes that did not follow the driver and were killed after `PATIENCE_S`.
    """

    committed: Mapping[str, tuple[str, ...]]
    survivors: Sequence[str]
    seconds_to_follow: float


def kill(command: Command, at_parts: int) -> Killed:
    """Starts the command and kills its driver as soon as `at_parts` parts are committed."""
    driver = command.until(lambda _: len(command.parts()) >= at_parts, 0.02)
    assert driver.poll() is None, f"ended before it could be killed:\n{command.log.read_text()}"
    family = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGKILL)
    killed = time.monotonic()
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    seconds = time.monotonic() - killed
    survivors = sorted(process.name() for process in alive if process.is_running())
    for process in alive:
        process.kill()
    psutil.wait_procs(alive)
    return Killed(
        committed={part: marks(command, part) for part in command.parts()},
        survivors=survivors,
        seconds_to_follow=round(seconds, 2),
    )


def marks(command: Command, part: str) -> tuple[str, ...]:
    """Digest and time of change of each file of a part."""
    files = [command.output / name / part for name in ("user_scores", "recommendations", "rejects/score")]
    return tuple(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}@{file.stat().st_mtime_ns}" for file in files if file.exists()
    )


def each_once(command: Command) -> bool:
    """Whether every row of the input is in both tables, or among the rejects, and just once."""
    rows = pq.ParquetFile(command.users).metadata.num_rows
    expected = Counter(f"{command.users.name}:{row}" for row in range(rows))
    rejected = _column(command, "rejects/score", "key")
    return all(
        Counter(_column(command, name, "row_id") + rejected) == expected for name in ("user_scores", "recommendations")
    )


def difference(one: Command, other: Command) -> float:
    """The largest difference of two outputs' logits; infinite where rows or candidates differ."""
    ours, theirs = _scores(one), _scores(other)
    if ours.select(["row_id", "items"]) != theirs.select(["row_id", "items"]):
        return float("inf")
    logits = [np.asarray(table.column("logits").combine_chunks().flatten()) for table in (ours, theirs)]
    return float(np.abs(logits[0] - logits[1]).max())


def _scores(command: Command) -> pa.Table:
    files = sorted((command.output / "user_scores").glob("*.parquet"))
    return pa.concat_tables(map(pq.read_table, files)).sort_by("row_id").combine_chunks()


def _column(command: Command, name: str, column: str) -> list[Any]:
    files = sorted((command.output / name).glob("*.parquet"))
    return [value for file in files for value in pq.read_table(file, columns=[column]).column(0).to_pylist()]
