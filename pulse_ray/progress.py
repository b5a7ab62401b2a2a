"""Progress that a person can read: a bar with rates and time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class NoticeConsole(Console):
    """Console that falls silent once nobody reads it. Rich's own would end the process, and the work with it."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True


console = NoticeConsole(stderr=True, soft_wrap=True)
"""Where progress and notices go; results go to standard output."""

LOG_INTERVAL_S = 15.0
"""Default number of seconds between two lines of progress in a log."""

_logger = logging.getLogger(__name__)


class ReportGuard:
    """Run reports of progress so that an error in one never ends the work.

    Args:
        subject: the work that is reported on, for the log.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._failed = False

    def run(self, report: Callable[[], object]) -> None:
        """Run one report. The first error is logged with its traceback, later ones are dropped."""
        try:
            report()
        except Exception:
            if not self._failed:
                _logger.warning("progress of %s cannot be reported; the work continues", self._subject, exc_info=True)
            self._failed = True


class Bar:
    """Progress of one job: `advance` as work is done, `figures` for what else people want to know.

    Args:
        title: what is being done.
        total: units of work; None where it cannot be known.
        unit: name of a unit, for the log line.
        log_interval_s: seconds between two lines where standard error is not a terminal.
    """

    def __init__(self, title: str, total: int | None, unit: str, log_interval_s: float = LOG_INTERVAL_S) -> None:
        self.title, self.total, self.unit = title, total, unit
        self._log_interval_s = log_interval_s
        self._guard = ReportGuard(title)
        self.done = self.skipped = 0
        self._figures = ""
        self._started = self._logged = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if console.is_terminal:
            bar = self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = bar.add_task(self.title, total=self.total, figures="")
            self._guard.run(bar.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._guard.run(self._bar.stop)
        elif kind is None and self.done:
            self._guard.run(self._log)

    def skip(self, units: int) -> None:
        """Counts `units` as done before: they tell nothing about the time that is left."""
        self.skipped += units
        self.done += units
        if bar := self._bar:
            self._guard.run(lambda: bar.reset(self._task, total=self.total, completed=self.done, figures=""))

    def advance(self, units: int = 1, figures: Mapping[str, str] | None = None) -> None:
        """Counts `units` more as done and shows `figures`, e.g. `{"tokens/s": "279"}`."""
        self.done += units
        if figures is not None:
            self._figures = "  ".join(f"{value} {name}" for name, value in figures.items())
        if bar := self._bar:
            self._guard.run(
                lambda: bar.update(self._task, total=self.total, completed=self.done, figures=self._figures)
            )
        elif time.monotonic() - self._logged >= self._log_interval_s:
            self._guard.run(self._log)

    def _log(self) -> None:
        self._logged = now = time.monotonic()
        elapsed = now - self._started
        line = f"{self.title}: {self.done}{f'/{self.total}' if self.total else ''} {self.unit}, {elapsed:.0f} s"
        made = self.done - self.skipped
        if self.total and made and self.done < self.total:
            line += f", {elapsed / made * (self.total - self.done):.0f} s left"
        print(f"{line}  {self._figures}".rstrip(), file=sys.stderr, flush=True)
