from __future__ import annotations

import gzip
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from worlds import SYNTHETIC, amazon, review, write_lines

from pulse_ray.config import DomainConfig, FileSource, PrepareConfig
from pulse_ray.data.download import fetch
from pulse_ray.data.files import FileKind, identity
from pulse_ray.data.sources import Chunk, read
from pulse_ray.data.tidy import tidy_item
from pulse_ray.errors import DataError


def chunks(path: Path, kind: FileKind = "interactions", max_reject_fraction: float = 0.5) -> list[Chunk]:
    config = PrepareConfig.model_validate({"domains": [amazon(path)], "max_reject_fraction": max_reject_fraction})
    source = config.domains[0].source
    assert isinstance(source, FileSource)
    return list(read(str(path), kind, source, config))


def test_unusable_lines_are_set_aside_with_file_line_and_reason(tmp_path: Path) -> None:
    good = [review("u", f"i{n}", n) for n in range(9)]
    bad = {
        "malformed JSON": '{"asin": "x"',
        "not a JSON object": "[1]",
        "interaction without item": review("u", "", 1),
        "interaction without user": review("u", "i", 1) | {"reviewerID": None},
        "interaction without time": {"reviewerID": "u", "asin": "i"},
        "time before 1970": review("u", "i", -1),
        "rating not from 1 to 5": review("u", "i", 1, overall=0),
    }
    path = write_lines(tmp_path / "reviews.json", [*good, "", *bad.values()])
    [chunk] = chunks(path)
    assert chunk.interactions.num_rows == 9
    assert [reject.reason for reject in chunk.rejects] == list(bad)
    # The blank line is no reject, and still counts as a line.
    assert [reject.key for reject in chunk.rejects] == [f"{path}:{line}" for line in range(11, 18)]


def test_too_many_rejects_stop_at_the_first(tmp_path: Path) -> None:
    rows = [review("u", f"i{n}", n) for n in range(8)]
    path = write_lines(tmp_path / "reviews.json.gz", [*rows[:3], {"asin": "x"}, *rows[3:], "nonsense"])
    assert chunks(path, max_reject_fraction=0.2)
    with pytest.raises(DataError, match=r"gz:4: interaction without user \(2 of 10 rows .*1 malformed JSON\)"):
        chunks(path, max_reject_fraction=0.19)


def test_missing_optional_fields_are_null(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "reviews.json", [{"reviewerID": "u", "asin": "i", "unixReviewTime": 7}])
    [chunk] = chunks(path)
    assert chunk.interactions.to_pylist() == [
        {"user_id": "u", "item_id": "i", "timestamp": 7, "rating": None, "review": None, "order": 1}
    ]


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"reviewerID":"u%d"}\n' % n for n in range(50_000)))
    broken = {
        "cut.json.gz": (whole[: len(whole) // 2], r"cut\.json\.gz:\d+ is cut off"),
        "plain.json.gz": (b'{"asin": "x"}\n', r"plain\.json\.gz is not gzip"),
        "damaged.json.gz": (whole[:-8] + b"\0" * 8, r"damaged\.json\.gz:\d+ is damaged"),
        "empty.json.gz": (gzip.compress(b""), r"empty\.json\.gz is empty"),
        "nothing.json": (b"", r"nothing\.json is empty"),
    }
    for name, (content, message) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            chunks(tmp_path / name)
        assert caught.value.remedy
    with pytest.raises(DataError, match=r"no file .*absent\.json"):
        chunks(tmp_path / "absent.json")
    with pytest.raises(DataError, match="cannot be read"):
        chunks(tmp_path)


def test_titles_in_reviews_describe_items(tmp_path: Path) -> None:
    rows = [review("u", "i", n, title=title) for n, title in enumerate(["Soap", "Soap again", None])]
    [chunk] = chunks(write_lines(tmp_path / "reviews.json", rows))
    assert chunk.items.to_pylist()[0]["title"] == "Soap"
    assert chunk.items.num_rows == 1


@pytest.mark.parametrize(
    ("raw", "tidy"),
    [
        ((None, None, None, []), ("", "", "", [])),
        (
            ("<span", "SPID SHORT DESCRIPTION NOT AVAILABLE", "By Terry", ["</span>", "Tea"]),
            ("", "", "By Terry", ["Tea"]),
        ),
        (("A &amp; B", "<p>Soft.</p>", "Visit Amazon's Otter Page", []), ("A & B", "Soft.", "Otter", [])),
    ],
)
def test_tidy_item(raw: tuple[str, str, str, list[str]], tidy: tuple[str, str, str, list[str]]) -> None:
    assert tuple(tidy_item(*raw).values()) == tidy


def test_long_descriptions_are_cut_between_words() -> None:
    description = tidy_item("Soap", "lather " * 1000, None, [])["description"]
    assert len(description) <= 600
    assert description.endswith("lather …")


def test_identity_follows_the_file(tmp_path: Path) -> None:
    def of(settings: object) -> str:
        return identity(DomainConfig.model_validate(settings))

    path = tmp_path / "reviews.json"
    domain = amazon(path)
    assert of(domain) == "missing"
    path.write_text("{}")
    uri = amazon(path)
    uri["source"]["interactions"] = path.as_uri()
    before = of(domain)
    assert of(uri) == before
    path.write_text("{} ")
    assert of(domain) not in (before, "missing")
    assert of(uri) == of(domain)
    assert of(SYNTHETIC) == ""
    address = "https://data.example/x.json.gz"
    assert of({"name": "far", "source": {"kind": "amazon2018", "interactions": address}}) == address


CONTENT = bytes(range(256)) * 40


class _Host(BaseHTTPRequestHandler):
    """Breaks off every answer after 4,000 bytes; knows ranges unless the path says otherwise."""

    asked: list[str | None]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        if "busy" in self.path and len(self.asked) <= 2:
            self.send_error(503 if len(self.asked) == 1 else 429)
            return
        if "absent" in self.path:
            self.send_error(404)
            return
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and "stubborn" not in self.path else 0
        if first == len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.end_headers()
        self.wfile.write(CONTENT[first : first + 4000])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[str]:
    _Host.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Host) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_broken_download_goes_on_where_it_stopped(host: str, tmp_path: Path) -> None:
    path = fetch(f"{host}/a/reviews.json.gz", tmp_path, pause_s=0)
    assert path.read_bytes() == CONTENT
    assert _Host.asked == [None, "bytes=4000-", "bytes=8000-"]
    assert fetch(f"{host}/a/reviews.json.gz", tmp_path, pause_s=0) == path
    assert len(_Host.asked) == 3
    part = path.with_name("reviews.json.gz.part")
    path.rename(part)  # All bytes had come, and the process died before it could say so.
    assert fetch(f"{host}/a/reviews.json.gz", tmp_path, pause_s=0).read_bytes() == CONTENT


def test_a_host_that_is_busy_is_asked_again(host: str, tmp_path: Path) -> None:
    assert fetch(f"{host}/busy.gz?version=2", tmp_path, pause_s=0).read_bytes() == CONTENT
    assert _Host.asked == [None, None, None, "bytes=4000-", "bytes=8000-"]


def test_downloads_that_cannot_succeed_say_why(host: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the host answered 404"):
        fetch(f"{host}/absent.gz", tmp_path, pause_s=0)
    with pytest.raises(DataError, match=r"4,000 of 10,240 bytes came"):
        fetch(f"{host}/stubborn.gz", tmp_path, pause_s=0)
    with pytest.raises(DataError, match=r"cannot download http://127\.0\.0\.1:9/x\.gz"):
        fetch("http://127.0.0.1:9/x.gz", tmp_path, pause_s=0)
