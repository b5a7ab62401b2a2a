"""The whole pipeline, real vLLM, DeepSpeed and Ray on tiny random models, disturbed in two ways that must end alike: as
a job on two nodes of which one is killed, and on one machine, its driver killed and interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accounting
import nodes
import pytest
import tiny
import yaml

from pulse_ray.config import load
from pulse_ray.pipeline import STAGES, conditions
from pulse_ray.workspace import Workspace

ROOT = Path(__file__).parents[1]
PATIENCE_S = 600


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.experiment(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def configure(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the configuration of a run whose workspace lies in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")

    def write(name: str) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**settings, "storage": str(folder / name)}))
        return path

    return write


@pytest.fixture(scope="module")
def outlived(configure: Callable[[str], Path]) -> Path:
    """A run that was submitted to two nodes, and has outlived one of them, killed while it grew trees."""
    path = configure("outlived")

    def submit(*more: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pulse_ray.cli", "submit", str(path), "--address", cluster.address, *more],
            env={**cluster.environment, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(client: subprocess.Popen[str]) -> str:
        return client.communicate(timeout=PATIENCE_S)[0]

    with nodes.two_nodes() as cluster:
        with cluster.head_taken():
            run = submit("--follow")
            # Meanwhile, what does not get as far as a stage.
            refused, broken = submit(RAY_AUTH_TOKEN=uuid.uuid4().hex), submit("--follow", "--stage", "evaluate")
            assert "refused the token" in end(refused)
            assert refused.returncode == 2
            assert "needs 'interactions', which is missing" in end(broken)
            assert broken.returncode == 2, "the job's own exit code"
            deadline = time.monotonic() + PATIENCE_S
            while not _some_thoughts(_workspace(path)):
                assert run.poll() is None, end(run)
                assert time.monotonic() < deadline, "no tree was grown"
                time.sleep(0.1)
            lost = cluster.kill_last()
            assert conditions(load(path))["tree"] == "partial", "the stage was not in the middle"
            assert any("_Committer" in name for name in lost), f"no work was lost, only {lost}"
        log = end(run)
        assert run.returncode == 0, log
        assert "started run-run-" in log
        assert "[8/8] evaluate" in log
        found = submit("--follow")
        assert "found run-run-" in end(found)
        assert found.returncode == 0
    return path


def _start(config: Path) -> subprocess.Popen[str]:
    # A file: a pipe that the driver's children inherit would keep `communicate` waiting after a kill.
    log = config.with_suffix(".log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "pulse_ray.cli", "run", str(config)],
        stdout=log,
        stderr=log,
        text=True,
        # Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )


def _finish(config: Path) -> str:
    driver = _start(config)
    code = driver.wait(timeout=PATIENCE_S)
    log = config.with_suffix(".log").read_text()
    assert code == 0, log
    return log


def _stop_when(config: Path, reached: Callable[[Workspace], bool], how: signal.Signals) -> int:
    """Starts a run and signals its driver as soon as `reached` is true of the workspace. Returns the exit code."""
    workspace = _workspace(config)
    driver = _start(config)
    deadline = time.monotonic() + PATIENCE_S
    while not reached(workspace):
        assert driver.poll() is None, config.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, config.with_suffix(".log").read_text()
        time.sleep(0.1)
    os.kill(driver.pid, how)
    return driver.wait(timeout=PATIENCE_S)


def _workspace(config: Path) -> Workspace:
    settings = load(config)
    return Workspace(settings.storage, settings.name)


def _some_thoughts(workspace: Workspace) -> bool:
    return len(workspace.artefact("thoughts").parts()) > 0 and workspace.artefact("thoughts").manifest() is None


@pytest.mark.slow
def test_a_run_outlives_a_node_with_every_example_accounted_for_and_a_second_run_does_nothing(outlived: Path) -> None:
    workspace = _workspace(outlived)
    accounting.check(workspace)
    assert set(conditions(load(outlived)).values()) == {"complete"}
    metrics = json.loads(workspace.artefact("evaluation").read_bytes("metrics.json") or b"")
    assert {row["model"] for row in metrics} == {"popularity", "sasrec", "none", "thought_space"}
    tests = sum(row["split"] == "test" for row in accounting.rows(workspace, "examples"))
    assert {row["n"] for row in metrics} == {tests}
    again = _finish(outlived)
    assert again.count("complete already") == len(STAGES)
    assert "report.html" in again


@pytest.mark.slow
def test_a_driver_killed_and_interrupted_gives_the_rows_of_the_run_that_lost_a_node(
    outlived: Path, configure: Callable[[str], Path]
) -> None:
    killed = configure("killed")
    source, target = Path(_workspace(outlived).path), Path(_workspace(killed).path)
    _workspace(killed).claim()
    for name in ("interactions", "items", "examples", "sasrec", "neighbours", "candidates", "encoders"):
        shutil.copytree(source / name, target / name)

    def some_rationales(workspace: Workspace) -> bool:
        return len(workspace.artefact("rationales").parts()) > 0 and workspace.artefact("rationales").manifest() is None

    def first_checkpoint(workspace: Workspace) -> bool:
        return len(list(Path(workspace.path).glob("ranker/none/checkpoints/run/checkpoint_*"))) > 0

    _stop_when(killed, some_rationales, signal.SIGKILL)
    committed = {
        part: _workspace(killed).artefact("rationales").read_bytes(f"{part}.parquet")
        for part in _workspace(killed).artefact("rationales").parts()
    }
    assert conditions(load(killed))["rationales"] == "partial"
    interrupted = _stop_when(killed, _some_thoughts, signal.SIGINT)
    assert interrupted == 130, killed.with_suffix(".log").read_text()
    assert conditions(load(killed))["tree"] == "partial"
    _stop_when(killed, first_checkpoint, signal.SIGKILL)
    for part, content in committed.items():
        assert _workspace(killed).artefact("rationales").read_bytes(f"{part}.parquet") == content, "done again"
    _finish(killed)
    accounting.check(_workspace(killed))
    for table in ("rationales", "thoughts", "reasons", "scores"):
        ours, theirs = (
            {tuple(row[column] for column in accounting.KEYS[table]): row for row in accounting.rows(workspace, table)}
            for workspace in (_workspace(killed), _workspace(outlived))
        )
        assert ours.keys() == theirs.keys()
        for name, row in ours.items():
            assert _plain(row) == _plain(theirs[name])
            assert _numbers(row) == pytest.approx(_numbers(theirs[name]), abs=1e-4)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Columns that must be the same to the letter."""
    return {name: value for name, value in row.items() if name not in ("mean_logprob", "agreement", "logits", "rank")}


def _numbers(row: dict[str, Any]) -> list[float]:
    """Columns that come out of floating-point sums, whose order may differ."""
    found = [row.get("mean_logprob"), row.get("agreement"), *row.get("logits", [])]
    return [value for value in found if value is not None]
