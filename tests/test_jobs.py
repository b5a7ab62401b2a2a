"""Entry points for `ray job submit`: one for each stage, the pipeline and scoring, thin, and each calls its command."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from pulse_ray import cli, pipeline

JOBS = Path(__file__).parents[1] / "jobs"
COMMANDS = {**{name.replace("-", "_"): name for name in pipeline.STAGES}, "pipeline": "run", "score": "score"}


def test_there_is_an_entry_for_every_stage() -> None:
    assert {path.stem for path in JOBS.iterdir() if path.suffix == ".py"} == set(COMMANDS)
    for path in JOBS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 30
        assert f"python jobs/{path.name}" in text


@pytest.mark.parametrize(("file", "command"), COMMANDS.items())
def test_an_entry_calls_its_command(file: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(cli, "main", called.append)
    monkeypatch.setattr(sys, "argv", [f"{file}.py", "a.yaml", "--set", "seed=1"])
    runpy.run_path(str(JOBS / f"{file}.py"), run_name="__main__")
    assert called == [[command, "a.yaml", "--set", "seed=1"]]
