"""Two Ray nodes on this machine: a head and a second one that can be killed, with all that runs on it."""

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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 180
CPUS = 2
"""Logical CPUs of each node."""

HOLDER = "holder"
"""The job that takes the head's CPUs."""


@dataclass
class Nodes:
    """A head and its followers on free ports, with a token."""

    folder: Path
    token: str
    gcs: int
    address: str
    """Of the dashboard, where jobs are sent."""
    environment: dict[str, str]
    """Of who wants to be let in."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *role: str) -> None:
        """Starts a node and waits until it is alive."""
        [agent] = _free_ports(1)
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", *role]
        command += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
        command += [f"--num-cpus={CPUS}", f"--object-store-memory={100 * 2**20}"]
        log = (self.folder / f"{agent}.log").open("wb")
        self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
        deadline = time.monotonic() + PATIENCE_S
        while len(self.alive()) < len(self.processes):
            assert time.monotonic() < deadline, f"{len(self.alive())} of {len(self.processes)} nodes came up"
            assert all(process.poll() is None for process in self.processes), "a node ended"
            time.sleep(0.5)

    def join(self) -> None:
        """Starts a second node."""
        self.start(f"--address=127.0.0.1:{self.gcs}")

    def kill_last(self) -> list[str]:
        """Kills the node that was started last, at once.

        Returns:
            Classes of the actors that lived there.
        """
        actors = self.actors()
        pids = _end(self.processes.pop())
        return [str(actor["class_name"]) for actor in actors if actor["pid"] in pids]

    def alive(self) -> list[str]:
        """Ids of the nodes that are alive, as the dashboard tells those who know the token."""
        with contextlib.suppress(OSError):
            summary = self.call("/nodes?view=summary")["data"]["summary"]
            return [one["raylet"]["nodeId"] for one in summary if one["raylet"].get("state") == "ALIVE"]
        return []

    def actors(self) -> list[dict[str, Any]]:
        """Actors that are alive."""
        query = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE&limit=1000"
        rows: list[dict[str, Any]] = self.call(f"/api/v0/actors?{query}")["data"]["result"]["result"]
        return rows

    @contextmanager
    def head_taken(self) -> Iterator[None]:
        """Holds the head's CPUs, so that all work goes to the second node."""
        job = {"entrypoint": "sleep 3600", "submission_id": f"{HOLDER}-{uuid.uuid4().hex[:8]}"}
        needs = {"entrypoint_num_cpus": CPUS, "entrypoint_resources": {"head": 1}}
        self.call("/api/jobs/", {**job, **needs})
        try:
            yield
        finally:
            self.call(f"/api/jobs/{job['submission_id']}/stop", {})

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """An answer of the dashboard."""
        request = urllib.request.Request(
            self.address + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@contextmanager
def two_nodes(variables: Mapping[str, str] | None = None) -> Iterator[Nodes]:
    """Ends the processes that it started, and no others.

    Args:
        variables: more of the nodes' environment.
    """
    token = uuid.uuid4().hex
    # Below /tmp itself: the path of a socket may have 107 characters, and Ray adds some 70.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_TMPDIR": folder,
            # A dead node is noticed in two seconds instead of fifteen.
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
            # A job's entry point is `python`: the one that has the libraries.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        # The package comes with the job, or not at all.
        environment.pop("PYTHONPATH", None)
        environment |= variables or {}
        gcs, dashboard, client = _free_ports(3)
        nodes = Nodes(Path(folder), token, gcs, f"http://127.0.0.1:{dashboard}", environment)
        ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        try:
            nodes.start("--head", *ports, '--resources={"head": 1}')
            nodes.join()
            yield nodes
        finally:
            for process in nodes.processes:
                _end(process)


def _end(node: subprocess.Popen[bytes]) -> set[int]:
    """Kills `ray start --block` and all that it started: asked politely, Ray drains a node for half a minute.

    Returns:
        Ids of the processes.
    """
    ours: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        ours = psutil.Process(node.pid).children(recursive=True)
    node.kill()
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()
    return {process.pid for process in ours}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
