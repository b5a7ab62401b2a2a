"""One file on a local S3 and a local HTTP server, in a process of their own: `python -m benchmarks._hosts FILE`.

The first line of output is a JSON object of the file's addresses. The servers run until the process is terminated.
"""

from __future__ import annotations

import json
import logging
import mmap
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import FakeKey, s3_backends
from moto.server import ThreadedMotoServer

BUCKET, REGION = "reviews", "us-east-1"


@contextmanager
def serving(file: Path) -> Iterator[dict[str, str]]:
    """Addresses of the file by the name of the protocol, `s3` and `http`."""
    command = [sys.executable, "-m", "benchmarks._hosts", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
        yield json.loads(line)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


class Mapped(FakeKey):
    """An S3 object whose content is a file.

    moto holds the content of its own objects in memory once more for each request, also for a request of a range.
    """

    __module__ = FakeKey.__module__  # moto takes the name of the service from it.

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            self._content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        where = {"account_id": DEFAULT_ACCOUNT_ID, "region_name": REGION, "bucket_name": BUCKET}
        super().__init__(file.name, b"", etag="0" * 32, **where)
        self.contentsize = len(self._content)

    @property
    def value(self) -> Any:
        """The content, which is cut like bytes."""
        return self._content

    @value.setter
    def value(self, content: bytes) -> None:
        pass


class _Quiet(SimpleHTTPRequestHandler):
    """Answers GET and HEAD, and prints no line for each request."""

    def log_message(self, *_: Any) -> None:
        pass


def main(file: Path) -> None:
    """Serve the file until the process is terminated."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    bucket = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, REGION)
    bucket.keys[file.name] = Mapped(file)
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(file.parent)))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    endpoint = f"endpoint_override=http://127.0.0.1:{moto.get_host_and_port()[1]}&scheme=http&region={REGION}"
    addresses = {
        "s3": f"s3://key:secret@{BUCKET}/{file.name}?{endpoint}",
        "http": f"http://127.0.0.1:{http.server_port}/{file.name}",
    }
    print(json.dumps(addresses), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
