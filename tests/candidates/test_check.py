"""`candidates --check` passes on what the stage stored, and sees whatever was done to it afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fake_stage
import numpy as np
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from pulse_ray import cli, runtime
from pulse_ray.candidates import check
from pulse_ray.candidates.check import CheckWorker, complain, require_complete, summarise
from pulse_ray.candidates.rows import read_rows
from pulse_ray.config import Config
from pulse_ray.errors import ArtifactError, DataError
from pulse_ray.pipeline import plan
from pulse_ray.schema import table
from pulse_ray.workspace import StageRun, Workspace

PART = "test-0002-0000"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> StageRun:
    made = fake_stage.make(tmp_path_factory.mktemp("good"), size=50)
    fake_stage.export(made)
    fake_stage.draw(made)
    assert made.rejected()
    return made


def test_a_good_table_passes(stage: StageRun) -> None:
    findings = fake_stage.check(stage)
    assert [finding.violations for finding in findings] == [0] * 6
    examples = len(fake_stage.rows(stage, "examples"))
    stored = len(fake_stage.rows(stage, "candidates"))
    assert [finding.checked for finding in findings] == [examples, stored, stored, stored, examples, stored]
    require_complete(stage)
    complain(findings, stage)


def _repeat(rows: Rows, touched: list[str]) -> None:
    place = 0 if rows[0]["target_index"] else 1
    rows[0]["items"][place] = rows[0]["items"][place + 1 if rows[0]["target_index"] != place + 1 else place + 2]


def _touch(rows: Rows, touched: list[str]) -> None:
    rows[0]["items"][0 if rows[0]["target_index"] else 1] = touched[0]


def _stranger(rows: Rows, touched: list[str]) -> None:
    rows[0]["items"][0 if rows[0]["target_index"] else 1] = "another shop's"


def _misplace(rows: Rows, touched: list[str]) -> None:
    rows[0]["target_index"] = (rows[0]["target_index"] + 1) % 50


def _lose(rows: Rows, touched: list[str]) -> None:
    del rows[0]


def _double(rows: Rows, touched: list[str]) -> None:
    rows.append(rows[0])


def _invent(rows: Rows, touched: list[str]) -> None:
    rows.append({**rows[0], "example_id": "shop/nobody/3"})


def _relabel(rows: Rows, touched: list[str]) -> None:
    rows[0]["popularity_catalogue_rank"] += 1


@pytest.mark.parametrize(
    ("corrupt", "seen"),
    [
        (_repeat, {"K different items", "a fresh draw"}),
        (_touch, {"no other item", "a fresh draw"}),
        (_stranger, {"K different items", "a fresh draw"}),
        (_misplace, {"the target stands", "a fresh draw"}),
        (_lose, {"every example has one row"}),
        (_double, {"every example has one row"}),
        (_invent, {"every example has one row"}),
        (_relabel, {"a fresh draw"}),
    ],
)
def test_a_corrupted_row_is_seen(
    stage: StageRun, tmp_path: Path, corrupt: Callable[[Rows, list[str]], None], seen: set[str]
) -> None:
    copy = _copy(stage, tmp_path)
    rows = copy.output("candidates").read(PART).to_pylist()
    examples = {row.example_id: row for row in read_rows(copy.input("examples").read(PART))}
    corrupt(rows, list(examples[rows[0]["example_id"]].items))
    copy.output("candidates").write(PART, table("candidates", rows))
    findings = summarise([CheckWorker(copy)(PART)], copy.config.candidates)
    broken = [finding for finding in findings if finding.violations]
    assert {name for name in seen if any(finding.title.startswith(name) for finding in broken)} == seen
    assert len(broken) == len(seen)
    assert all(finding.violations <= 2 and finding.first in {*examples, "shop/nobody/3"} for finding in broken)
    with pytest.raises(DataError, match=r"the stored candidates do not keep: .* of "):
        complain(findings, copy)


def test_a_lost_part_and_a_row_that_was_set_aside_for_nothing_are_seen(stage: StageRun, tmp_path: Path) -> None:
    copy = _copy(stage, tmp_path)
    data = copy.output("candidates").read(PART)
    copy.output("candidates").remove(PART)
    kept = [row["example_id"] for row in data.to_pylist()]
    assert _violations(copy)["every example has one row, or was set aside"] == len(kept)
    aside = [{"stage": "candidates", "key": key, "reason": "too few items", "detail": ""} for key in kept]
    copy.rejects.write(PART, table("rejects", [*_set_aside(copy), *aside]))
    assert _violations(copy) == {"a fresh draw gives the stored row": len(kept)}


def test_a_table_of_another_seed_is_seen(stage: StageRun, tmp_path: Path) -> None:
    other = _copy(stage, tmp_path, seed=stage.config.seed + 1)
    assert _violations(other) == {"a fresh draw gives the stored row": len(fake_stage.rows(stage, "candidates"))}
    with pytest.raises(ArtifactError, match="'candidates' is stale: there is nothing to check"):
        require_complete(other)


def test_targets_at_one_place_are_seen(stage: StageRun) -> None:
    answers = [{"part": PART, "checked": {}, "violations": {}, "places": {"3": 200}}]
    assert summarise(answers, stage.config.candidates)[-1].violations == 1
    even = np.random.default_rng(0).integers(50, size=2000).tolist()
    places = {str(place): even.count(place) for place in range(50)}
    spread = summarise([{**answers[0], "places": places}], stage.config.candidates)[-1]
    assert spread.violations == 0
    assert 0.001 < float(spread.title.rpartition("= ")[2].rstrip(")")) <= 1


def test_the_command_says_what_it_found(
    stage: StageRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: how actors are called is `map_parts`' business."""
    monkeypatch.setattr(check, "map_parts", lambda stage, parts, worker, *args, **_: map(worker(*args), parts))
    monkeypatch.setattr(runtime, "cluster", lambda _: nullcontext())
    monkeypatch.setattr(runtime, "check_resources", lambda *_: None)
    copy = _copy(stage, tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(copy.config.model_dump(mode="json")))
    good = CliRunner().invoke(cli.app, ["candidates", str(path), "--check"])
    assert good.exit_code == 0, good.output
    assert "a fresh draw gives the stored row" in good.stdout
    rows = copy.output("candidates").read(PART).to_pylist()
    copy.output("candidates").write(PART, table("candidates", rows[1:]))
    bad = CliRunner().invoke(cli.app, ["candidates", str(path), "--check"])
    assert bad.exit_code == 2
    assert rows[0]["example_id"] in bad.stdout
    [line] = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert f"for one, {rows[0]['example_id']}" in line
    assert "every example has one row, or was set aside (1 of " in line
    stale = CliRunner().invoke(cli.app, ["candidates", str(path), "--check", "--set", "seed=9"])
    assert stale.exit_code == 2
    assert "there is nothing to check" in stale.stderr


def _copy(stage: StageRun, folder: Path, **changes: Any) -> StageRun:
    shutil.copytree(stage.workspace.path, folder / "run")
    config = Config.model_validate(stage.config.model_dump() | {"storage": str(folder)} | changes)
    copy = plan(config)["candidates"]
    assert copy.workspace.path == Workspace(str(folder), "run").path
    return copy


def _violations(stage: StageRun) -> dict[str, int]:
    return {finding.title: finding.violations for finding in fake_stage.check(stage) if finding.violations}


def _set_aside(stage: StageRun) -> Rows:
    if PART not in stage.rejects.parts():
        return []
    data: pa.Table = stage.rejects.read(PART)
    return data.to_pylist()
