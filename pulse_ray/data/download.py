"""Files behind http(s) addresses, kept on disk: resumed where they broke off, checked against the size announced."""

from __future__ import annotations

import fcntl
import hashlib
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from pulse_ray.data.read_progress import ReadProgress
from pulse_ray.errors import DataError

BLOCK_BYTES = 2**20
TIMEOUT_S = 60.0
ATTEMPTS = 5


def fetch(address: str, folder: Path, *, progress: ReadProgress | None = None, pause_s: float = 2.0) -> Path:
    """The local copy of a file, downloaded unless it is there.

    What arrives is kept in a `.part` file, from whose end a broken download goes on, in this call or the next.

    Args:
        address: an http or https address.
        folder: where copies are kept, by host and path.
        progress: counts the bytes as they arrive.
        pause_s: wait before the second attempt; it doubles with each further one.

    Raises:
        DataError: the host cannot be reached, does not have the file, or keeps breaking off.
    """
    parts = urllib.parse.urlsplit(address)
    names = [urllib.parse.quote(name, safe="") for name in parts.path.split("/") if name not in ("", ".", "..")]
    if parts.query:  # Another query may be another file.
        names.insert(0, hashlib.sha256(parts.query.encode()).hexdigest()[:12])
    path = folder.joinpath(parts.netloc.replace(":", "_"), *names)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two tasks may want the same file; the second waits and finds it there.
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _download(address, path, progress or ReadProgress(), pause_s)
    return path


def _download(address: str, path: Path, progress: ReadProgress, pause_s: float) -> None:
    part = path.with_name(path.name + ".part")
    trouble: Exception | str = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            total = _continue(address, part, progress)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise DataError(
                    f"{address}: the host answered {error.code} {error.reason}",
                    remedy="Check the address in prepare.domains",
                ) from error
            trouble = error
        except (OSError, HTTPException) as error:
            trouble = getattr(error, "reason", None) or error
        else:
            size = part.stat().st_size
            if total is None or size == total:
                part.rename(path)
                return
            trouble = f"{size:,} of {total:,} bytes came"
            if size > total:
                part.unlink()
    raise DataError(
        f"cannot download {address}: {trouble}",
        remedy="Check the network and run again (the download goes on where it stopped), or give a local file's path",
    )


def _continue(address: str, part: Path, progress: ReadProgress) -> int | None:
    """Appends what `part` lacks. Returns the whole file's size, where the host tells it."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        total = _range_total(error.headers.get("Content-Range"))
        if error.code == 416 and total is not None:  # Nothing is missing, or the file has shrunk.
            return total
        raise
    with response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        total = _range_total(response.headers.get("Content-Range")) if resumed else int(length) if length else None
        progress.begin("downloaded", total, have if resumed else 0)
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                progress.advance(len(block))
                progress.report()
    return total


def _range_total(header: str | None) -> int | None:
    """`bytes 100-199/200` → 200."""
    total = (header or "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None
