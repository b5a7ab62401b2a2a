"""Every format from every kind of storage, with all thresholds of reading at their smallest.

Progress is published after every block, and blocks hold a line or two: what a large file reaches after seconds, these
small ones reach at once.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from test_formats import FORMATS, LOOSE, PACKED, World, amazon2018, lines, tables, world
from typer.testing import CliRunner
from worlds import Prepare

from pulse_ray import cli
from pulse_ray.config import FileSource, PrepareConfig
from pulse_ray.data import preparation
from pulse_ray.data.preparation import Pieces
from pulse_ray.data.read_progress import Phase, ReadProgress
from pulse_ray.data.sources import read

__all__ = ["world"]

SMALLEST = {"read_block_kib": 1, "read_batch_rows": 20}
STORAGES = ("local", "s3", "http")
Place = Callable[[str, bytes], str]
"""Puts a file into a storage and returns its address."""


def sequences(world: World) -> tuple[dict[str, bytes], dict[str, Any]]:
    users: dict[str, list[str]] = {}
    for row in world[0]:
        users.setdefault(row["user_id"], []).append(row["item_id"])
    rows = [{"user_id": user, "items": items} for user, items in users.items()]
    return {"users.jsonl": lines(rows)}, {}


EVERY_FORMAT = {**FORMATS, "sequences": sequences}
CASES = [(kind, ending) for kind in EVERY_FORMAT for ending in PACKED if not (ending and kind == "parquet")]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Place]]:
    folder = tmp_path_factory.mktemp("served")

    def local(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _, moto_port = moto.get_host_and_port()
    login = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{moto_port}", **login)
    client.create_bucket(Bucket="shop")

    def s3(name: str, content: bytes) -> str:
        client.put_object(Bucket="shop", Key=name, Body=content)
        return f"s3://key:secret@shop/{name}?endpoint_override=127.0.0.1:{moto_port}&scheme=http&region=us-east-1"

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as host:
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()

        def http(name: str, content: bytes) -> str:
            local(name, content)
            return f"http://127.0.0.1:{host.server_port}/{name}"

        yield {"local": local, "s3": s3, "http": http}
        host.shutdown()
        thread.join()
    moto.stop()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("kind", "ending"), CASES)
def test_published_progress_within_a_file_rises_to_1(
    servers: dict[str, Place], tmp_path: Path, world: World, kind: str, ending: str, storage: str
) -> None:
    contents, more = EVERY_FORMAT[kind](world)
    name, content = next(iter(contents.items()))
    address = servers[storage](f"{kind}-{name}{ending}", PACKED[ending](content))
    source = FileSource.model_validate({"interactions": address, **more})
    domain = {"name": "shop", "source": source}
    config = PrepareConfig.model_validate({"domains": [domain], "downloads": str(tmp_path), **SMALLEST})
    published: list[tuple[Phase, float]] = []
    progress = ReadProgress(lambda phase, fraction: published.append((phase, fraction)))
    rows = sum(chunk.interactions.num_rows for chunk in read(address, "interactions", source, config, progress))
    assert rows == 500
    phases = [phase for phase, _ in published]
    assert phases == sorted(phases), "a file is downloaded before it is read"
    assert ("downloaded" in phases) == (storage == "http")
    for phase in set(phases):
        fractions = [fraction for when, fraction in published if when == phase]
        assert all(before <= after for before, after in pairwise(fractions))
        assert 0 < fractions[0] <= fractions[-1] == 1
        # Decompressors and arrow's CSV reader have read a file of this size whole before its first block is parsed.
        if phase == "read" and not ending and kind not in ("recbole", "separated"):
            assert fractions[0] < 1


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("kind", "ending"), [case for case in CASES if case[0] != "sequences"])
def test_smallest_blocks_give_the_same_tables(
    prepared: Prepare, servers: dict[str, Place], tmp_path: Path, world: World, kind: str, ending: str, storage: str
) -> None:
    source, expected = ({}, {})
    contents, more = EVERY_FORMAT[kind](world)
    for role, (name, content) in zip(("interactions", "items"), contents.items(), strict=True):
        packed = PACKED[ending](content)
        source[role] = servers[storage](f"{kind}-{name}{ending}", packed)
        expected[role] = servers["local"](f"{kind}-{name}{ending}", packed)
    settings = {**LOOSE, "downloads": str(tmp_path / "downloads")}
    whole = prepared("whole", domains=[{"name": "shop", "source": {**expected, **more}}], **settings)
    assert len(whole.rows("interactions")) > 300
    blocks = prepared("blocks", domains=[{"name": "shop", "source": {**source, **more}}], **settings, **SMALLEST)
    assert tables(blocks) == tables(whole)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_shows_progress_within_a_file(
    servers: dict[str, Place],
    tmp_path: Path,
    world: World,
    storage: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows, about = world
    many = [{**row, "user_id": f"{row['user_id']}-{copy}"} for copy in range(40) for row in rows]
    contents, _ = amazon2018((many, about))
    name, content = next(iter(contents.items()))
    monkeypatch.setenv("COLUMNS", "300")
    source = {"interactions": servers[storage](f"many-{name}", content)}
    config = {"name": "run", "storage": str(tmp_path), "prepare": {"domains": [{"name": "shop", "source": source}]}}
    config["prepare"] |= {**LOOSE, "read_block_kib": 16, "downloads": str(tmp_path / "downloads")}
    config["cluster"] = {"log_interval_s": 0, "report_interval_s": 0}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    result = CliRunner().invoke(cli.app, ["prepare", str(tmp_path / "config.yaml")])
    assert result.exit_code == 0, result.output
    shown = [int(share) for share in re.findall(r"(\d+)% read", result.stderr + capfd.readouterr().err)]
    assert any(0 < share < 100 for share in shown)
    assert shown == sorted(shown)


def test_an_error_in_progress_is_logged_once_and_reading_continues(
    prepared: Prepare, servers: dict[str, Place], world: World, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fails(*_: object) -> None:
        raise OSError("only valid on seekable files")

    contents, _ = amazon2018(world)
    addresses = [servers["local"](name, content) for name, content in contents.items()]
    domain = {"name": "shop", "source": dict(zip(("interactions", "items"), addresses, strict=True))}
    expected = tables(prepared("expected", domains=[domain], **LOOSE))
    monkeypatch.setattr(Pieces, "note", fails)
    with caplog.at_level(logging.WARNING):
        result = prepared("result", domains=[domain], **LOOSE, **SMALLEST)
    assert tables(result) == expected
    assert preparation.published(result.stage, "read", [(0, 0)]) == 0
    assert len([record for record in caplog.records if "progress of" in record.message]) <= 2 * len(addresses)
