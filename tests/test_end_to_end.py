"""The whole pipeline, real vLLM, DeepSpeed and Ray on tiny random models, disturbed in two ways that must not show.

As a job on two nodes, the second of which is killed in the middle of the trees; and on this machine alone, with a
driver that is killed among the trees and interrupted in training. Both must account for every example, and agree on
every row.
"""

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
from dataclasses import dataclass
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

PATIENCE_S = 600

ARITHMETIC = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "2"}
"""Environment of both runs: sums come out alike, to the last digits, where they are taken in the same order."""


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


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that went on without its second node."""

    config: Path
    log: str
    """What `submit --follow` printed."""
    condition: str
    """Of the stage `tree` when the node was killed."""
    lost: list[str]
    """Classes of the actors that lived there."""
    found: str
    """What the same command printed afterwards."""


@pytest.fixture(scope="module")
def job(configure: Callable[[str], Path]) -> Job:
    """A finished run. Its second node did all the work up to the middle of the trees, and was killed then."""
    config = configure("job")
    workspace = _workspace(config)
    with nodes.two_nodes(ARITHMETIC) as cluster:
        with cluster.head_taken():
            client = _submit(cluster, config, "--follow")
            # Meanwhile, what does not get as far as a stage.
            stranger = _submit(cluster, config, RAY_AUTH_TOKEN=uuid.uuid4().hex)
            early = _submit(cluster, config, "--follow", "--stage", "evaluate")
            assert "refused the token" in _output(stranger, 2)
            assert "needs 'interactions', which is missing" in _output(early, 2), "the job's own exit code"
            deadline = time.monotonic() + PATIENCE_S
            while not workspace.artefact("thoughts").parts():
                assert client.poll() is None, _output(client, 0)
                assert time.monotonic() < deadline, "no tree was grown"
                time.sleep(0.1)
            lost = cluster.kill_last()
            condition = conditions(load(config))["tree"]
        log = _output(client, 0)
        found = _output(_submit(cluster, config, "--follow"), 0)
    return Job(config=config, log=log, condition=condition, lost=lost, found=found)


def _submit(cluster: nodes.Nodes, config: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pulse_ray.cli", "submit", str(config), "--address", cluster.address]
    return subprocess.Popen(
        [*command, *options],
        # The cluster itself knows nothing of the package.
        env={**cluster.environment, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _output(client: subprocess.Popen[str], code: int) -> str:
    output, _ = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == code, output
    return output


def _start(config: Path) -> subprocess.Popen[str]:
    # A file: a pipe that the driver's children inherit would keep `communicate` waiting after a kill.
    log = config.with_suffix(".log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "pulse_ray.cli", "run", str(config)],
        stdout=log,
        stderr=log,
        text=True,
        env={**os.environ, **ARITHMETIC},
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


@pytest.mark.slow
def test_a_job_outlives_a_node_that_is_killed(job: Job) -> None:
    assert job.condition == "partial", "the node was not killed in the middle of the stage"
    assert any("_Committer" in name for name in job.lost), f"no work was lost, only {job.lost}"
    assert "started run-run-" in job.log
    assert f"[{len(STAGES)}/{len(STAGES)}] evaluate" in job.log
    assert "found run-run-" in job.found, "the same job is not started twice"


@pytest.mark.slow
def test_every_example_is_accounted_for_and_a_second_run_does_nothing(job: Job) -> None:
    workspace = _workspace(job.config)
    accounting.check(workspace)
    assert set(conditions(load(job.config)).values()) == {"complete"}
    metrics = json.loads(workspace.artefact("evaluation").read_bytes("metrics.json") or b"")
    assert {row["model"] for row in metrics} == {"popularity", "sasrec", "thought_space"}
    tests = sum(row["split"] == "test" for row in accounting.rows(workspace, "examples"))
    assert {row["n"] for row in metrics} == {tests}
    again = _finish(job.config)
    assert again.count("complete already") == len(STAGES)
    assert "report.html" in again


@pytest.mark.slow
def test_a_driver_killed_and_interrupted_gives_the_same_rows(job: Job, configure: Callable[[str], Path]) -> None:
    killed = configure("killed")
    source, target = Path(_workspace(job.config).path), Path(_workspace(killed).path)
    _workspace(killed).claim()
    finished = ("prepare", "candidates", "rationales", "thought-space")
    for name in (name for stage in finished for name in (*STAGES[stage][0].outputs, f"rejects/{stage}")):
        if (source / name).exists():  # Not every stage rejects something.
            shutil.copytree(source / name, target / name)

    def some_thoughts(workspace: Workspace) -> bool:
        return len(workspace.artefact("thoughts").parts()) > 0 and workspace.artefact("thoughts").manifest() is None

    def first_checkpoint(workspace: Workspace) -> bool:
        return len(list(Path(workspace.path).glob("ranker/thought_space/checkpoints/run/checkpoint_*"))) > 0

    _stop_when(killed, some_thoughts, signal.SIGKILL)
    thoughts = _workspace(killed).artefact("thoughts")
    committed = {part: thoughts.read_bytes(f"{part}.parquet") for part in thoughts.parts()}
    assert conditions(load(killed))["tree"] == "partial"
    interrupted = _stop_when(killed, first_checkpoint, signal.SIGINT)
    assert interrupted == 130, killed.with_suffix(".log").read_text()
    assert conditions(load(killed))["ranker"] == "partial"
    for part, content in committed.items():
        assert thoughts.read_bytes(f"{part}.parquet") == content, "done again"
    _finish(killed)
    accounting.check(_workspace(killed))
    for table in ("thoughts", "reasons", "scores"):
        ours, theirs = (
            {tuple(row[column] for column in accounting.KEYS[table]): row for row in accounting.rows(workspace, table)}
            for workspace in (_workspace(killed), _workspace(job.config))
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
