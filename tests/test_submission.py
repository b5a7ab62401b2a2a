"""Jobs on a cluster: what is sent, that the same job is not started twice, and, once, a real cluster of two nodes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from pulse_ray import cli, submission
from pulse_ray.config import load
from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.pipeline import conditions

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PATIENCE_S = 180


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
        content = json.loads((Path(runtime_env["working_dir"]) / submission.CONFIGURATION).read_text())
        self.sent.append({"entrypoint": entrypoint, "configuration": content, **runtime_env})
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
    assert sent["entrypoint"] == "python -m pulse_ray.cli thought-space configuration.json"
    assert sent["env_vars"] == {"QUIET": "1"}
    assert [Path(module).name for module in sent["py_modules"]] == ["pulse_ray"]
    path = tmp_path / "sent.json"
    path.write_text(json.dumps(sent["configuration"]))
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
    source = {"kind": "amazon2018", "reviews": "reviews.json.gz"}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"name": "small", "prepare": {"domains": [{"name": "shop", "source": source}]}}))
    with pytest.raises(ConfigError, match=r"prepare\.domains\.0\.source\.reviews is the relative path"):
        submission.describe(load(path), None, {})
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"ranker\.model is the relative path 'weights'"):
        submission.describe(load(QUICKSTART, ["ranker.model=weights"]), None, {})
    with pytest.raises(ConfigError, match="no stage 'trees'"):
        submission.describe(load(QUICKSTART), "trees", {})


def test_tokens_are_on_unless_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*submission.TOKENS, "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
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


@dataclass(frozen=True)
class Nodes:
    """Two Ray nodes on this machine, and how to reach them."""

    address: str
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]]


@pytest.fixture
def two_nodes() -> Iterator[Nodes]:
    """A head and a second node on free ports, with a token. Ends the processes that it started, and no others."""
    token = uuid.uuid4().hex
    # Below /tmp itself: the path of a socket may have 107 characters, and Ray adds some 70.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_TMPDIR": folder,
            # A job's entry point is `python`: the one that has the libraries.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        # The package comes with the job, or not at all.
        environment.pop("PYTHONPATH", None)
        gcs, dashboard, client = _free_ports(3)
        head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        nodes = Nodes(f"http://127.0.0.1:{dashboard}", environment, [])
        try:
            for role in (head, [f"--address=127.0.0.1:{gcs}"]):
                nodes.processes.append(_start(role, folder, environment))
                _wait_for(nodes, token)
            yield nodes
        finally:
            for process in nodes.processes:
                _end(process)


def _start(role: list[str], folder: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    ray = str(Path(sys.executable).parent / "ray")
    [agent] = _free_ports(1)
    command = [ray, "start", "--block", *role, "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}"]
    command += ["--num-cpus=2", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats"]
    log = (Path(folder) / f"{agent}.log").open("wb")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends `ray start --block` and all that it started, at once: asked politely, Ray drains a node for 30 s."""
    with contextlib.suppress(psutil.NoSuchProcess):
        ours = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _wait_for(nodes: Nodes, token: str) -> None:
    """Waits until as many nodes are alive as were started, as the dashboard tells those who know the token."""
    request = urllib.request.Request(
        f"{nodes.address}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    deadline = time.monotonic() + PATIENCE_S
    alive: list[Any] = []
    while len(alive) < len(nodes.processes):
        assert time.monotonic() < deadline, f"{len(alive)} of {len(nodes.processes)} nodes came up"
        assert all(process.poll() is None for process in nodes.processes), "a node ended"
        time.sleep(0.5)
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            summary = json.load(answer)["data"]["summary"]
            alive = [one for one in summary if one["raylet"].get("state") == "ALIVE"]


@pytest.mark.slow
def test_a_cluster_of_two_nodes_runs_a_stage(two_nodes: Nodes, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    source = {"kind": "synthetic", "users": 30, "items": 40}
    prepare = {"domains": [{"name": "shop", "source": source}], "min_item_interactions": 1, "partitions": 2}
    config.write_text(yaml.safe_dump({"name": "small", "storage": str(tmp_path / "runs"), "prepare": prepare}))
    command = [sys.executable, "-m", "pulse_ray.cli", "submit", str(config), "--address", two_nodes.address]
    command += ["--stage", "prepare"]

    def call(*more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more],
            env={**two_nodes.environment, "PYTHONPATH": str(QUICKSTART.parents[1]), **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    refused = call(RAY_AUTH_TOKEN=uuid.uuid4().hex)
    assert refused.returncode == 2
    assert "refused the token" in refused.stderr
    done = call("--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started small-prepare-" in done.stderr
    assert "[1/1] prepare" in done.stdout
    assert conditions(load(config))["prepare"] == "complete"
    found = call("--follow")
    assert found.returncode == 0
    assert "found small-prepare-" in found.stderr
    broken = call("--follow", "--set", "prepare.min_user_interactions=1000")
    assert broken.returncode == 2, "the job's own exit code"
    assert "error:" in broken.stdout
