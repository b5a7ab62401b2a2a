"""Progress in a log and on a terminal; nothing that goes wrong with it reaches the work."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from pulse_ray import progress
from pulse_ray.progress import Bar, ReportGuard


def test_log_lines_tell_units_and_seconds_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("trees", 4, "shards", log_interval_s=0) as bar:
        bar.skip(1)
        bar.advance(1, {"tokens/s": "279"})
        bar.advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"trees: 2/4 shards, 0 s, 0 s left  279 tokens/s", lines[0])
    assert re.fullmatch(r"trees: 4/4 shards, 0 s  279 tokens/s", lines[1])


def test_no_log_line_before_the_interval_but_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("trees", None, "shards", log_interval_s=1e6) as bar:
        bar.advance(3)
        assert capsys.readouterr().err == ""
    assert re.fullmatch(r"trees: 3 shards, 0 s\n", capsys.readouterr().err)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=150))
    return screen


def test_terminal_shows_a_total_that_becomes_known_later(terminal: io.StringIO) -> None:
    with Bar("ranker: none", None, "steps") as bar:
        bar.total = 40
        bar.skip(10)
        bar.advance(5, {"loss": "2.1"})
    assert re.search(r"ranker: none.*15/40.*2\.1 loss", terminal.getvalue())


@pytest.mark.parametrize("on_terminal", [True, False])
def test_closed_output_does_not_end_the_work(
    on_terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    if on_terminal:
        monkeypatch.setattr(progress, "console", Console(file=Broken(), force_terminal=True))
    else:
        monkeypatch.setattr(sys, "stderr", Broken())
    with caplog.at_level(logging.WARNING), Bar("trees", 3, "shards", log_interval_s=0) as bar:
        for _ in range(3):
            bar.advance()
    assert bar.done == 3
    assert len([record for record in caplog.records if "progress of trees" in record.message]) == 1


def test_notices_after_a_broken_pipe_are_dropped() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    console = progress.NoticeConsole(file=Broken())
    console.print("engine 1 is started again")
    console.print("engine 2 is started again")


def test_guard_lets_the_user_interrupt() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ReportGuard("trees").run(interrupt)
