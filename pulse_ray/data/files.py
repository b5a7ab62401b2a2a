"""Outside files: where a domain's lie, what names their content, and their bytes, block by block of whole lines.

Local paths, folders and patterns, URIs of pyarrow's filesystems (`s3://`, `gs://`) and http(s) addresses, which are
downloaded first. Names that end in `.gz` and `.zst` are decompressed on the way; no file is ever held whole.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.fs as pafs
from isal import igzip, isal_zlib

from pulse_ray.config import DomainConfig, FileSource
from pulse_ray.data.download import fetch
from pulse_ray.data.read_progress import CountingReader, ReadProgress
from pulse_ray.errors import DataError, first_line

FileKind = Literal["interactions", "items"]
BLOCK_BYTES = 2**23
"""Bytes of a block before its last line is made whole: some ten thousand reviews."""

BUFFER_BYTES = 2**20
"""Bytes asked of a filesystem at once: one request to an object store."""

_AGAIN = "Copy or download the file again"


def addresses(domain: DomainConfig) -> dict[FileKind, tuple[str, ...]]:
    """The domain's outside files as they are configured; local paths are made absolute."""
    source = domain.source
    if not isinstance(source, FileSource):
        return {}
    given: dict[FileKind, tuple[str, ...]] = {"interactions": source.interactions, "items": source.items}
    return {kind: tuple(map(_absolute, names)) for kind, names in given.items() if names}


def found(domain: DomainConfig) -> list[tuple[FileKind, str]]:
    """Every file of a domain, folders and patterns resolved, in an order that depends on names alone.

    Raises:
        DataError: a folder or a pattern holds no file, or a file is named twice.
    """
    every = [(kind, one) for kind, names in addresses(domain).items() for name in names for one in _expand(name)]
    if twice := next((one for number, one in enumerate(every) if one in every[:number]), None):
        raise DataError(f"{shown(twice[1])} is named twice", remedy=f"Name it once in the source of '{domain.name}'")
    return every


def shown(address: str) -> str:
    """An address as it may be printed and kept: without credentials and without options.

    >>> shown("s3://key:secret@bucket/a.csv?endpoint_override=localhost")
    's3://bucket/a.csv'
    """
    scheme, mark, rest = address.partition("://")
    if not mark or scheme in ("http", "https"):
        return address
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def identity(domain: DomainConfig) -> str:
    """What a fingerprint should know of the domain's outside files; nothing is opened or downloaded.

    Local files are named by path, size and time of change, or `missing`; remote ones by address.
    """
    return ";".join(_file_identity(name) for names in addresses(domain).values() for name in names)


def stem(address: str) -> str:
    """The name in small letters, without a query and without the ending of its compression.

    >>> stem("https://data.example/Books.JSONL.gz?version=2")
    'https://data.example/books.jsonl'
    """
    return address.partition("?")[0].lower().removesuffix(".gz").removesuffix(".zst")


def blocks(
    address: str, downloads: str, progress: ReadProgress | None = None, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Blocks of whole lines, each with the number of its first line, counted from 1.

    Args:
        progress: counts the file's bytes as they are read, before decompression.
        block_bytes: bytes read at once, after decompression; a block ends with the last line that is complete.

    Raises:
        DataError: the file is missing, damaged or cut off; the line is named.
    """
    number, rest = 1, b""
    with told(address, lambda: number), opened(address, downloads, progress, block_bytes) as stream:
        while fresh := stream.read(block_bytes):
            if number == 1 and not rest:
                fresh = fresh.removeprefix(codecs.BOM_UTF8)
            whole, newline, tail = fresh.rpartition(b"\n")
            if not newline:  # A line that is longer than a block.
                rest += fresh
                continue
            block, rest = rest + whole + newline, tail
            yield number, block
            number += block.count(b"\n")
        if rest:
            yield number, rest


@contextmanager
def opened(
    address: str, downloads: str, progress: ReadProgress | None = None, block_bytes: int = BLOCK_BYTES
) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file.

    Args:
        progress: counts the file's bytes as they are read, before decompression.
        block_bytes: bytes that the caller reads at once.
    """
    progress = progress or ReadProgress()
    filesystem, path = _located(address, downloads, progress)
    with (
        filesystem.open_input_stream(path, compression=None) as raw,
        io.BufferedReader(CountingReader(raw, progress), min(BUFFER_BYTES, block_bytes)) as buffered,
    ):
        progress.begin("read", filesystem.get_file_info(path).size)
        name = address.partition("?")[0].lower()
        if name.endswith(".gz"):
            if buffered.peek(2)[:2] not in (b"\x1f\x8b", b""):
                raise DataError(
                    f"{shown(address)} is not gzip", remedy=f"{_AGAIN}; a plain file's name must not end in .gz"
                )
            yield cast(BinaryIO, igzip.IGzipFile(fileobj=buffered))  # type: ignore[no-untyped-call]
        elif name.endswith(".zst"):
            yield cast(BinaryIO, pa.CompressedInputStream(buffered, "zstd"))
        else:
            yield cast(BinaryIO, buffered)


@contextmanager
def seekable(address: str, downloads: str, progress: ReadProgress | None = None) -> Iterator[pa.NativeFile]:
    """A file with random access, for parquet.

    Args:
        progress: counts the bytes of a download; the reader counts rows.

    Raises:
        DataError: as `blocks`.
    """
    with told(address, lambda: 0):
        filesystem, path = _located(address, downloads, progress or ReadProgress())
        with filesystem.open_input_file(path) as file:
            yield file


def _located(address: str, downloads: str, progress: ReadProgress) -> tuple[pafs.FileSystem, str]:
    if address.startswith(("http://", "https://")):
        address = str(fetch(address, Path(downloads), progress=progress))
    if "://" not in address:
        return pafs.LocalFileSystem(), address
    filesystem, path = pafs.FileSystem.from_uri(address)
    return filesystem, str(path)


@contextmanager
def told(address: str, line: Callable[[], int]) -> Iterator[None]:
    """Errors of reading as `DataError`s that name file and line, where `line()` knows it."""

    def where() -> str:
        return f"{shown(address)}:{line()}" if line() else shown(address)

    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"no file {shown(address)}",
            remedy="Check the paths in prepare.domains; relative ones start where the command runs",
        ) from error
    except EOFError as error:
        raise DataError(f"{where()} is cut off: the gzip stream ends early", remedy=_AGAIN) from error
    except gzip.BadGzipFile as error:
        raise DataError(f"{where()} is damaged: {error}", remedy=_AGAIN) from error
    except (isal_zlib.IsalError, zlib.error, OSError, pa.ArrowException) as error:  # type: ignore[misc]
        raise DataError(f"{where()} cannot be read: {first_line(error)}", remedy=_AGAIN) from error


def _absolute(address: str) -> str:
    if address.startswith("file://"):
        return str(pafs.FileSystem.from_uri(address)[1])
    return address if "://" in address else str(Path(address).expanduser().absolute())


def _expand(address: str) -> list[str]:
    if address.startswith(("http://", "https://")):
        return [address]
    head, mark, options = address.partition("?") if "://" in address else (address, "", "")
    filesystem, path = cast(pafs.FileSystem, pafs.LocalFileSystem()), address
    if "://" in address:
        filesystem, path = pafs.FileSystem.from_uri(address)
    folder, _, pattern = path.rpartition("/")
    home = head.rpartition("/")[0]
    if "*" not in pattern:
        if filesystem.get_file_info(path).type != pafs.FileType.Directory:
            return [address]
        folder, pattern, home = path, "[!._]*", head.rstrip("/")
    infos = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    names = sorted(info.base_name for info in infos if info.is_file and fnmatch(info.base_name, pattern))
    if not names:
        raise DataError(f"no file in {shown(address)}", remedy="Check the paths in prepare.domains")
    return [f"{home}/{name}{mark}{options}" for name in names]


def _file_identity(address: str) -> str:
    if "://" in address:
        return address
    try:
        stated = [(name, Path(name).stat()) for name in _expand(address)]
    except (OSError, DataError):
        return "missing"
    return ",".join(f"{name}:{status.st_size}:{status.st_mtime_ns}" for name, status in stated)
