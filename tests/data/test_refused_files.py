"""Files that cannot be used as they are: each error names the file, what is wrong with it and what to change."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds import Prepare, amazon, bind, review, write_lines

from pulse_ray.config import FileSource, PrepareConfig
from pulse_ray.data import stage as prepare_stage
from pulse_ray.data.download import fetch
from pulse_ray.data.files import shown
from pulse_ray.data.sources import Chunk, read
from pulse_ray.errors import DataError


def chunks(path: Path, **source: Any) -> list[Chunk]:
    given = FileSource.model_validate({"interactions": str(path), **source})
    config = PrepareConfig.model_validate(
        {"domains": [{"name": "shop", "source": given}], "max_reject_fraction": 0.5, "read_block_kib": 1}
    )
    return list(read(str(path), "interactions", given, config))


HEADER = "user_id,item_id,timestamp,rating,review\n"


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        ("a.csv", HEADER, {"kind": "amazon2018"}, r"a\.csv is no file of 'amazon2018'.*source\.kind=table"),
        ("a.csv", "\n", {}, r"a\.csv is empty"),
        (
            "a.json",
            '{"reviewerID": "u", "asin": "i"}\n',
            {"kind": "amazon2018", "columns": {"user_id": "reviewerID"}},
            r"'amazon2018' has columns of its own.*Remove source\.columns",
        ),
        ("a.json", '{"name": "x", "value": 1}\n', {}, r"no format has lines with the keys name, value"),
        ("a.json", "not json\n", {}, r"no format has lines with the keys \(none: no line is a JSON object\)"),
        (
            "a.csv",
            HEADER + 'u,i,1,5,"never closed' + "x" * 3000,
            {},
            r"from row 2 on it cannot be read.*read_block_kib",
        ),
    ],
)
def test_file_of_no_known_format_is_refused(
    tmp_path: Path, name: str, content: str, source: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        chunks(tmp_path / name, **source)


@pytest.mark.parametrize(("value", "kind"), [({"name": "u"}, "Struct"), (b"\xff", "Binary")])
def test_column_of_a_type_without_text_is_refused(tmp_path: Path, value: object, kind: str) -> None:
    table = pa.table({"user_id": [value], "item_id": ["i"], "timestamp": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"column 'user_id' holds values of type {kind}.*Store it as text or numbers"):
        chunks(tmp_path / "a.parquet")


def test_rows_of_csv_that_are_not_utf8_are_rejected_with_their_numbers(tmp_path: Path) -> None:
    rows = [b"u%d,i%d,%d,5,fine\n" % (n, n, n) for n in range(300)]
    rows[7] = b"u7,i7,7,5,caf\xe9\n"
    rows[250] = b"u250,i\xff,250,5,fine\n"
    path = tmp_path / "a.csv"
    path.write_bytes(HEADER.encode() + b"".join(rows))
    found = chunks(path)
    rejects = [(one.key, one.reason) for chunk in found for one in chunk.rejects]
    assert rejects == [(f"{path}:9", "invalid UTF-8"), (f"{path}:252", "invalid UTF-8")]
    assert sum(chunk.interactions.num_rows for chunk in found) == 298


def test_row_with_a_wrong_number_of_values_at_the_end_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "u,i,1,5,fine\n" * 200 + "u,i,1\n")
    found = chunks(path)
    assert [one.key for chunk in found for one in chunk.rejects] == [f"{path}:202"]
    assert sum(chunk.interactions.num_rows for chunk in found) == 200


def test_folder_without_files_is_refused(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file in .*empty"):
        prepared(domains=[amazon(tmp_path / "empty")])


def test_address_on_this_machine_is_printed_as_it_is() -> None:
    assert shown("/data/reviews.json") == "/data/reviews.json"
    assert shown("https://data.example/x.gz?token=1") == "https://data.example/x.gz?token=1"


@pytest.mark.usefixtures("ray_cluster")
def test_split_without_examples_is_refused(tmp_path: Path) -> None:
    rows = [review(f"u{user}", f"i{n}", n) for user in range(5) for n in range(2)]
    loose = {"min_user_interactions": 1, "min_item_interactions": 1, "partitions": 1}
    stage = bind(tmp_path / "run", {"domains": [amazon(write_lines(tmp_path / "a.json", rows))], **loose})
    stage.begin()
    with pytest.raises(DataError, match=r"there are no examples for (validation|test).*lower the minima"):
        prepare_stage.run(stage)


def test_downloads_of_one_file_at_once_ask_the_host_once(tmp_path: Path) -> None:
    """A file that grew beyond the size that its host announces is downloaded anew."""
    content, asked, begun, go = b"x" * 5000, list[str](), threading.Event(), threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Range", ""))
            begun.set()
            go.wait(10)
            if self.headers.get("Range"):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.gz"
        paths: list[Path] = []
        fetches = [threading.Thread(target=lambda: paths.append(fetch(address, tmp_path))) for _ in range(2)]
        fetches[0].start()
        assert begun.wait(10)
        fetches[1].start()
        go.set()
        for one in fetches:
            one.join(20)
        assert asked == [""]
        assert [path.read_bytes() for path in paths] == [content] * 2
        part = paths[0].with_name("a.gz.part")
        paths[0].rename(part)
        part.write_bytes(content + b"more")
        assert fetch(address, tmp_path, pause_s=0).read_bytes() == content
        assert asked[1:] == [f"bytes={len(content) + 4}-", ""]
        server.shutdown()
