"""Jobs on a cluster: what is sent, that the same job is not started twice, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pulse_ray import cli, submission
from pulse_ray.config import load
from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.pipeline import conditions, plan

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


@dataclass
class Entry:
    """A job as the cluster tells of it."""

    submission_id: str
    status: Any
    driver_exit_code: int | None = None
    message: str = ""


class Status(str):
    def is_terminal(self) -> bool:
        return self in ("FAILED", "STOPPED", "SUCCEEDED")


@dataclass
class Cluster:
    """A job server that starts nothing."""

    jobs: dict[str, Entry] = field(default_factory=dict)
    sent: list[dict[str, Any]] = field(default_factory=list)
    raced: bool = False

    def list_jobs(self) -> list[Entry]:
        return list(self.jobs.values())

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str:
        if self.raced:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.sent.append({"entrypoint": entrypoint, **runtime_env})
        self.jobs[submission_id] = Entry(submission_id, Status("PENDING"))
        return submission_id

    def get_job_info(self, job_id: str) -> Entry:
        return self.jobs[job_id]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "a line\n"


def test_a_job_carries_package_configuration_and_environment(tmp_path: Path) -> None:
    config = load(QUICKSTART, [f"storage={tmp_path}", "cluster.address=ray://elsewhere:10001"])
    job = submission.describe(config, "thought-space", {"QUIET": "1"})
    cluster = Cluster()
    name, started = submission.start(cluster, job, again=False)
    [sent] = cluster.sent
    assert started
    assert name.startswith("quickstart-thought-space-")
    assert "python -m pulse_ray.cli thought-space" in sent["entrypoint"]
    assert sent["env_vars"]["QUIET"] == "1"
    assert "working_dir" not in sent, "nodes of one machine would share the folder, and take it from each other"
    assert [Path(module).name for module in sent["py_modules"]] == ["pulse_ray"]
    path = tmp_path / "sent.json"
    path.write_text(sent["env_vars"][submission.CONFIGURATION])
    there = load(path)
    assert there.cluster.address == "auto"
    assert Path(there.prepare.downloads).is_absolute()
    assert conditions(there) == conditions(config), "what was made here is found there"


def test_names_follow_the_configuration_but_not_where_it_runs(tmp_path: Path) -> None:
    def name(*changes: str) -> str:
        return submission.describe(load(QUICKSTART, changes), "tree", {}).name

    assert name() == name("cluster.num_cpus=2") == name("engine.pool.max=4")
    assert len({name(), name("seed=8"), name("tree.breadths=[4]"), name(f"storage={tmp_path}")}) == 4
    assert submission.describe(load(QUICKSTART), None, {}).name.startswith("quickstart-run-")


@pytest.mark.parametrize(
    ("states", "again", "name", "started"),
    [
        ([], False, "job", True),
        (["RUNNING"], False, "job", False),
        (["PENDING"], True, "job", False),
        (["SUCCEEDED"], False, "job", False),
        (["SUCCEEDED"], True, "job-2", True),
        (["FAILED"], False, "job-2", True),
        (["FAILED", "STOPPED", "RUNNING"], False, "job-3", False),
        (["FAILED", "SUCCEEDED"], True, "job-3", True),
    ],
)
def test_the_same_job_is_not_started_twice(states: list[str], again: bool, name: str, started: bool) -> None:
    known = ["job", "job-2", "job-3"][: len(states)]
    cluster = Cluster({key: Entry(key, Status(state)) for key, state in zip(known, states, strict=True)})
    job = submission.Job(name="job", entrypoint="true", config=load(QUICKSTART), environment={})
    assert submission.start(cluster, job, again=again) == (name, started)
    assert len(cluster.sent) == started


def test_one_of_two_that_submit_at_once_finds_the_others_job() -> None:
    job = submission.Job(name="job", entrypoint="true", config=load(QUICKSTART), environment={})
    assert submission.start(Cluster(raced=True), job, again=False) == ("job", False)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 1), ("STOPPED", -15, -15)],
)
def test_following_gives_the_log_and_the_jobs_exit_code(
    status: str, code: int | None, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster({"job": Entry("job", Status(status), code, "why")})
    assert submission.follow(cluster, "job") == expected
    assert capsys.readouterr().out == "a line\n"


def test_what_the_cluster_could_not_find_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"ranker\.model is the relative path 'weights'"):
        submission.describe(load(QUICKSTART, ["ranker.model=weights"]), None, {})
    with pytest.raises(ConfigError, match="no stage 'trees'"):
        submission.describe(load(QUICKSTART), "trees", {})


def test_relative_files_of_a_source_are_found_under_absolute_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = {"kind": "amazon2018", "interactions": "reviews.json.gz"}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"name": "small", "prepare": {"domains": [{"name": "shop", "source": source}]}}))
    unread = submission.describe(load(path), None, {})
    (tmp_path / "reviews.json.gz").write_bytes(b"reviews")
    here = load(path, [f"storage={tmp_path / 'runs'}"])
    job = submission.describe(here, None, {})
    (sent,) = job.config.prepare.domains
    assert sent.source == here.prepare.domains[0].source.model_copy(
        update={"interactions": (str(tmp_path / "reviews.json.gz"),)}
    )
    fingerprints = {name: run.fingerprint for name, run in plan(here).items()}
    assert {name: run.fingerprint for name, run in plan(job.config).items()} == fingerprints, "another run's"
    assert job.name != unread.name, "another file is another job"


def test_tokens_are_on_unless_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*submission.TOKENS, "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")  # So that what `connect` sets is taken back.
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ArtifactError, match="no token for the Ray cluster"):
        submission.connect("http://127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ArtifactError, match="no job server"):
        submission.connect("http://127.0.0.1:1")


def test_a_dry_run_prints_what_the_cluster_would_see() -> None:
    done = CliRunner().invoke(cli.app, ["submit", str(QUICKSTART), "--stage", "tree", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["cluster"]["address"] == "auto"
    assert "quickstart-tree-" in done.stderr
