"""Storage that fails while a job writes: a full disk, a folder that may only be read, S3 that refuses requests.

The job goes on by itself or stops with an error that names the fault. Once that is mended, the same call makes exactly
the rows of a job that nothing disturbed.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow import fs as pafs
from ray import cloudpickle
from shops import example, stage
from typer.testing import CliRunner
from werkzeug.serving import make_server

from pulse_ray import cli
from pulse_ray.config import PoolConfig
from pulse_ray.errors import ArtifactError
from pulse_ray.generation.engine import Usage
from pulse_ray.pipeline import plan
from pulse_ray.runtime import ShardOutput, run_shards
from pulse_ray.schema import Reject, table
from pulse_ray.workspace import BEGIN, Artefact, Part, StageRun, Workspace

# Ray's workers cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PARTS = [f"train-0000-{number:04d}" for number in range(6)]
FULL, ROOMY = "450k", "64m"
"""Sizes of a disk: one that holds some of the parts and one that holds them all."""


class Writer:
    """Writes one text of 200 kB, of which half is left when it is packed, and sets one example aside."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, part: Part) -> ShardOutput:
        row = {"example_id": f"shop/{part}/4", "text": random.Random(part).randbytes(100_000).hex(), "model": "m"}
        row |= {"prompt_sha": "0" * 12, "seed": 1, "finish_reason": "stop", "num_tokens": 3}
        rejects = [Reject(key=f"shop/{part}/5", reason="too short")]
        return ShardOutput(tables={"rationales": table("rationales", [row])}, examples=2, rejects=rejects)


class EngineWriter(Writer):
    """The same as the command runs it: with an engine, which here writes nothing."""

    def __init__(self, *_: object) -> None:
        self.engine: Any = SimpleNamespace(start=lambda: None, usage=Usage())

    async def __call__(self, part: Part) -> ShardOutput:  # type: ignore[override]
        return replace(super().__call__(part), figures={"tokens": 3})


def job(folder: Path, storage: str | None = None) -> StageRun:
    """The stage, its outputs where `storage` says."""
    run = stage("rationales", folder, {}, {})
    return run if storage is None else replace(run, workspace=Workspace(storage, "run"), source=run.workspace)


def go(run: StageRun, parts: list[Part] = PARTS) -> None:
    run.begin()
    run_shards(run, parts, Writer, pool=PoolConfig(), title="test")


def committed(run: StageRun) -> dict[Part, bytes | None]:
    """The parts that are there, each of which must be whole."""
    output = run.output("rationales")
    for part in output.parts():
        assert output.read(part).equals(Writer()(part).tables["rationales"]), "a torn part"
        assert run.rejects.num_rows(part) == 1
    return {part: output.read_bytes(f"{part}.parquet") for part in output.parts()}


def check_resumed(run: StageRun, before: dict[Part, bytes | None]) -> None:
    """All rows are there, what was there before is untouched, and nothing else is left."""
    after = committed(run)
    assert list(after) == PARTS
    assert {part: after[part] for part in before} == before, "done again"
    assert names(run.output("rationales")) == {*(f"{part}.parquet" for part in PARTS), BEGIN}
    assert names(run.rejects) == {f"{part}.parquet" for part in PARTS}
    run.complete(1.0)
    manifest = run.output("rationales").manifest()
    assert manifest is not None
    assert (manifest.rows, manifest.rejects) == (len(PARTS), {"too short": len(PARTS)})


def names(artefact: Artefact) -> set[str]:
    return set(artefact.files())


@dataclass(frozen=True)
class Disk:
    """A file system of its own, in memory."""

    folder: Path

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk that some of the parts fit on."""
    made = Disk(tmp_path / "disk")
    made.folder.mkdir()
    made.mount(f"size={FULL}")
    yield made
    subprocess.run(["umount", "--lazy", str(made.folder)], check=True)


@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_stops_the_job_and_with_room_it_goes_on(disk: Disk) -> None:
    run = job(disk.folder)
    with pytest.raises(ArtifactError, match=r"cannot write .*No space left on device.*free space"):
        go(run)
    run.pause(3.0)  # That the time cannot be kept hides no error.
    before = committed(run)
    assert 0 < len(before) < len(PARTS)
    left = {name for name in (*run.output("rationales").files(), *run.rejects.files()) if name.startswith(".")}
    assert not left, "a write that fails takes its room with it"
    disk.change(f"size={ROOMY}")
    go(run)
    check_resumed(run, before)


@pytest.mark.usefixtures("ray_cluster")
def test_storage_that_becomes_read_only_stops_the_job_and_writable_it_goes_on(disk: Disk) -> None:
    disk.change(f"size={ROOMY}")
    run = job(disk.folder)
    go(run, PARTS[:2])
    disk.change("ro")
    with pytest.raises(ArtifactError, match=r"cannot write .*Read-only file system"):
        go(run)
    before = committed(run)
    assert list(before) == PARTS[:2]
    assert run.condition() == "partial"
    disk.change("rw")
    go(run)
    check_resumed(run, before)


@pytest.mark.usefixtures("ray_cluster")
def test_the_command_says_in_one_line_that_the_disk_is_full(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pulse_ray.rationales.stage.RationaleWorker", EngineWriter)
    examples = {part: [example()] for part in PARTS}
    settings = {"rationales": {"max_reject_fraction": 1.0}}
    shop = stage("rationales", disk.folder, examples, settings)
    for run in plan(shop.config).values():
        if run.spec.name in ("prepare", "candidates"):
            for name in run.spec.outputs:
                run.output(name).write_bytes(BEGIN, f'{{"fingerprint": "{run.fingerprint}"}}'.encode())
            run.complete(1.0)
    (tmp_path / "run.json").write_text(shop.config.to_json())
    command = ["rationales", str(tmp_path / "run.json")]

    full = CliRunner().invoke(cli.app, command)
    assert full.exit_code == 2, full.output
    [line] = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert "Traceback" not in full.output
    before = plan(shop.config)["rationales"].output("rationales").parts()
    assert before
    disk.change(f"size={ROOMY}")
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert list(committed(plan(shop.config)["rationales"])) == PARTS


Refusal = Callable[[dict[str, Any], int], bool]
"""Whether a request is refused, of which its environment and its number are known."""


@dataclass
class Bucket:
    """An S3 server that refuses some requests, and a bucket."""

    refuses: Refusal = lambda _, __: False
    requests: int = 0
    refused: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    backend: Any = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app))

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            self.requests += 1
            refuse = self.refuses(environ, self.requests)
            self.refused += refuse
        if not refuse:
            return self.backend(environ, start_response)  # type: ignore[no-any-return]
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status = ("500 Internal Server Error", "503 Slow Down")[self.refused % 2]
        start_response(status, [("Content-Length", "0")])
        return [b""]

    def uri(self, login: str = "") -> str:
        return f"s3://{login}bucket/deep/er?endpoint_override=http://127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def artefact(self) -> Artefact:
        """One whose requests are not tried again, which takes seconds."""
        once = pafs.AwsStandardS3RetryStrategy(max_attempts=1)
        endpoint = {"endpoint_override": f"127.0.0.1:{self.port}", "scheme": "http", "region": "us-east-1"}
        return Artefact(pafs.S3FileSystem(**endpoint, retry_strategy=once), "bucket/rationales", "rationales")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = Bucket()
    server = make_server("127.0.0.1", 0, made, threaded=True)
    made.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    filesystem, _ = pafs.FileSystem.from_uri(f"{made.uri()}&allow_bucket_creation=true&allow_bucket_deletion=true")
    filesystem.create_dir("bucket")
    yield made
    made.refuses = lambda _, __: False
    filesystem.delete_dir("bucket")  # Every server of a process has the same buckets.
    server.shutdown()
    thread.join()


LOGIN = "key:secret@"
"""For Ray's workers, whose environment is older than the test's."""


@pytest.mark.usefixtures("ray_cluster")
def test_s3_that_fails_every_tenth_request_changes_nothing(bucket: Bucket, tmp_path: Path) -> None:
    bucket.refuses = lambda _, number: number % 10 == 0
    run = job(tmp_path, bucket.uri(LOGIN))
    go(run)
    assert bucket.refused > len(PARTS)
    check_resumed(run, {})


@pytest.mark.usefixtures("ray_cluster")
def test_s3_that_goes_away_stops_the_job_and_once_it_is_back_it_goes_on(bucket: Bucket, tmp_path: Path) -> None:
    run = job(tmp_path, bucket.uri(LOGIN))
    go(run, PARTS[:2])
    before = committed(run)
    gone = bucket.requests + 40  # In the midst of a part.
    bucket.refuses = lambda _, number: number > gone
    with pytest.raises(ArtifactError, match=r"cannot (read|write|list) bucket/deep/er/run/.*Check storage"):
        go(run)
    bucket.refuses = lambda _, __: False
    go(run)
    check_resumed(run, before)


def test_a_rename_on_s3_that_ends_half_way_leaves_a_whole_part(bucket: Bucket) -> None:
    output = bucket.artefact()
    rows = Writer()(PARTS[0]).tables["rationales"]
    bucket.refuses = lambda environ, _: environ["REQUEST_METHOD"] == "DELETE"
    with pytest.raises(ArtifactError, match=f"cannot write bucket/rationales/{PARTS[0]}.parquet"):
        output.write(PARTS[0], rows)
    bucket.refuses = lambda _, __: False
    assert output.parts() == PARTS[:1]
    assert output.read(PARTS[0]).equals(rows)
    assert len(names(output)) == 2
    output.sweep()
    assert names(output) == {f"{PARTS[0]}.parquet"}


def test_storage_that_does_not_answer_is_not_taken_for_damage(bucket: Bucket, tmp_path: Path) -> None:
    output = bucket.artefact()
    output.write(PARTS[0], Writer()(PARTS[0]).tables["rationales"])
    output.write_bytes(f"{PARTS[1]}.parquet", b"half a part")
    (tmp_path / "weights").write_bytes(os.urandom(100))
    for use in (output.read, output.num_rows):
        with pytest.raises(ArtifactError, match=r"cannot read .*Delete bucket/rationales; the stage makes"):
            use(PARTS[1])
    bucket.refuses = lambda environ, _: environ["REQUEST_METHOD"] in ("GET", "POST", "PUT")
    uses: list[Callable[[], object]] = [
        lambda: output.read(PARTS[0]),
        lambda: output.upload(tmp_path),
        lambda: output.download(tmp_path / "copy"),
    ]
    for use in uses:
        with pytest.raises(ArtifactError, match=r"cannot (read|copy) .*AWS Error.*Check storage") as caught:
            use()
        assert "Delete" not in str(caught.value)
