"""The profile store: what is known of a user when a request names one, by domain and user.

SQLite keeps it in one file, for one machine; Redis serves several nodes. Both keep a profile as JSON, list users by the
bytes of their ids, and carry a mark that names what they were filled from. A store that serves can be filled anew: each
profile knows its filling, new ones replace old ones in place, and those that are left of older fillings go last.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Protocol

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.schema import Interaction

WRITE_BATCH = 500
"""Profiles written in one transaction or round trip."""

BATCH = "score"
"""The filling of `pulse-ray score`: what it keeps outlasts the run's own fillings."""

TIMEOUT_S = 2.0
"""Longest wait for the store's answer; then it counts as down."""


class StoreDownError(Exception):
    """The store cannot be reached, or cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredThought:
    """A node of the tree that the reason was chosen from, as in the `thoughts` table."""

    node_id: str
    depth: int
    text: str
    mean_logprob: float
    leaf: bool
    agreement: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredReason:
    """A reason that a run found.

    `agreement` is the selector's score, None where it compared nothing. `version` names the selector and the
    fingerprint of the run's `reasons`.
    """

    text: str
    agreement: float | None
    selector: str
    node_id: str
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A user: the whole history, oldest first, and, where the run found one, the reason and its tree."""

    domain: str
    user_id: str
    history: tuple[Interaction, ...]
    reason: StoredReason | None = None
    tree: tuple[StoredThought, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A chosen reason and the tree that it was chosen from."""

    reason: StoredReason
    tree: tuple[StoredThought, ...]


class ProfileStore(Protocol):
    """What a store does. All methods may be called from any thread.

    Raises:
        StoreDownError: by every method, when the store does not answer.
    """

    def get(self, domain: str, user_id: str) -> Profile | None:
        """A user's profile, or None where there is none."""
        ...

    def put(self, profiles: Iterable[Profile], filling: str) -> int:
        """Keeps profiles in place of those of the same users, as part of a filling; returns how many came.

        What `BATCH` has put is the newer knowledge: only `BATCH` replaces it.
        """
        ...

    def find(self, domain: str, prefix: str, limit: int) -> list[str]:
        """Ids of up to `limit` users that begin with `prefix`, sorted by their UTF-8 bytes."""
        ...

    def mark(self) -> str | None:
        """What the store was last filled from; None where it was never filled to the end."""
        ...

    def set_mark(self, mark: str) -> None:
        """Says that the store is filled from `mark`."""
        ...

    def retire(self, keep: Collection[str]) -> None:
        """Removes the profiles of all fillings but these."""
        ...

    def close(self) -> None:
        """Lets go of files and connections."""
        ...


class SqliteStore:
    """One file in WAL mode: readers in other processes go on while one process fills it.

    Args:
        path: the file; it and its folder are made where they are missing.

    Raises:
        StoreDownError: the file cannot be opened, or is no database.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=TIMEOUT_S, check_same_thread=False, isolation_level=None)
            self._run("PRAGMA journal_mode=WAL")
            self._run("PRAGMA synchronous=NORMAL")
            self._run(
                "CREATE TABLE IF NOT EXISTS profiles"
                "(domain TEXT, user_id TEXT, filling TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (domain, user_id)) "
                "WITHOUT ROWID"
            )
            self._run("CREATE TABLE IF NOT EXISTS marks (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise StoreDownError(f"{path}: {error}") from error

    def get(self, domain: str, user_id: str) -> Profile | None:
        """See `ProfileStore`."""
        found = self._run("SELECT body FROM profiles WHERE domain = ? AND user_id = ?", (domain, user_id))
        return _decoded(found[0][0]) if found else None

    def put(self, profiles: Iterable[Profile], filling: str) -> int:
        """See `ProfileStore`."""
        count = 0
        for batch in _batches(profiles):
            rows = [(one.domain, one.user_id, filling, _encoded(asdict(one))) for one in batch]
            with self._lock:
                try:
                    self._connection.execute("BEGIN")
                    self._connection.executemany(
                        "INSERT INTO profiles VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE "
                        "SET filling = excluded.filling, body = excluded.body "
                        f"WHERE excluded.filling = '{BATCH}' OR profiles.filling <> '{BATCH}'",
                        rows,
                    )
                    self._connection.execute("COMMIT")
                except sqlite3.Error as error:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise StoreDownError(str(error)) from error
            count += len(rows)
        return count

    def find(self, domain: str, prefix: str, limit: int) -> list[str]:
        """See `ProfileStore`."""
        found = self._run(
            "SELECT user_id FROM profiles WHERE domain = ? AND user_id >= ? ORDER BY user_id LIMIT ?",
            (domain, prefix, limit),
        )
        return list(takewhile(lambda user: user.startswith(prefix), (user for (user,) in found)))

    def mark(self) -> str | None:
        """See `ProfileStore`."""
        found = self._run("SELECT value FROM marks WHERE name = 'filled'")
        return str(found[0][0]) if found else None

    def set_mark(self, mark: str) -> None:
        """See `ProfileStore`."""
        self._run("INSERT OR REPLACE INTO marks VALUES ('filled', ?)", (mark,))

    def retire(self, keep: Collection[str]) -> None:
        """See `ProfileStore`."""
        self._run(f"DELETE FROM profiles WHERE filling NOT IN ({', '.join('?' * len(keep))})", tuple(keep))

    def close(self) -> None:
        """See `ProfileStore`."""
        with self._lock:
            self._connection.close()

    def _run(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise StoreDownError(str(error)) from error


class RedisStore:
    """A Redis server: a hash of profiles and a sorted set of user ids per domain, and a set of users per filling.

    Args:
        url: `redis://user@host:port/db` or `rediss://…`.
        name: what all keys begin with, so that runs do not meet.
        password: the server's or the user's; None where it asks for none.
    """

    def __init__(self, url: str, name: str, password: str | None) -> None:
        self._name = f"pulse_ray:{name}"
        self._client = redis.Redis.from_url(
            url,
            password=password,
            decode_responses=True,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            # One quick try on a fresh connection, as after a restart; waiting longer would only keep the caller.
            retry=Retry(ConstantBackoff(0.05), 1),
        )

    def get(self, domain: str, user_id: str) -> Profile | None:
        """See `ProfileStore`."""
        with _redis_errors():
            body = self._client.hget(self._key("profiles", domain), user_id)
        return _decoded(str(body)) if body is not None else None

    def put(self, profiles: Iterable[Profile], filling: str) -> int:
        """See `ProfileStore`."""
        count = 0
        for batch in _batches(profiles):
            with _redis_errors(), self._client.pipeline(transaction=True) as pipeline:
                pipeline.sadd(self._key("fillings"), filling)
                for one in batch if filling == BATCH else self._not_from_batch(batch):
                    body = _encoded({**asdict(one), "filling": filling})
                    pipeline.hset(self._key("profiles", one.domain), one.user_id, body)
                    pipeline.zadd(self._key("users", one.domain), {one.user_id: 0})
                    pipeline.sadd(self._key("filling", filling), _encoded([one.domain, one.user_id]))
                pipeline.execute()
            count += len(batch)
        return count

    def _not_from_batch(self, profiles: Sequence[Profile]) -> list[Profile]:
        """Those whose user has no profile by `BATCH`."""
        with self._client.pipeline(transaction=False) as pipeline:
            for one in profiles:
                pipeline.sismember(self._key("filling", BATCH), _encoded([one.domain, one.user_id]))
            return [one for one, held in zip(profiles, pipeline.execute(), strict=True) if not held]

    def find(self, domain: str, prefix: str, limit: int) -> list[str]:
        """See `ProfileStore`."""
        with _redis_errors():
            found: Any = self._client.zrangebylex(self._key("users", domain), f"[{prefix}", "+", 0, limit)
        return list(takewhile(lambda user: user.startswith(prefix), found))

    def mark(self) -> str | None:
        """See `ProfileStore`."""
        with _redis_errors():
            mark = self._client.get(self._key("mark"))
        return None if mark is None else str(mark)

    def set_mark(self, mark: str) -> None:
        """See `ProfileStore`."""
        with _redis_errors():
            self._client.set(self._key("mark"), mark)

    def retire(self, keep: Collection[str]) -> None:
        """See `ProfileStore`."""
        with _redis_errors():
            fillings: Any = self._client.smembers(self._key("fillings"))
            for filling in set(fillings) - set(keep):
                for member in self._client.sscan_iter(self._key("filling", filling), count=WRITE_BATCH):
                    domain, user = json.loads(member)
                    body: Any = self._client.hget(self._key("profiles", domain), user)
                    # A later filling may have put the user again.
                    if body is not None and json.loads(body)["filling"] == filling:
                        self._client.hdel(self._key("profiles", domain), user)
                        self._client.zrem(self._key("users", domain), user)
                self._client.unlink(self._key("filling", filling))
                self._client.srem(self._key("fillings"), filling)

    def close(self) -> None:
        """See `ProfileStore`."""
        self._client.close()

    def _key(self, *parts: str) -> str:
        return ":".join((self._name, *parts))


@contextmanager
def _redis_errors() -> Iterator[None]:
    """Turns what the client raises into `StoreDownError`."""
    try:
        yield
    except redis.RedisError as error:
        raise StoreDownError(f"Redis: {error}") from error


def open_store(address: str, name: str, password: str | None = None) -> ProfileStore:
    """The store at an address.

    Args:
        address: `sqlite:///path` (a fourth slash makes the path absolute), `redis://…` or `rediss://…`.
        name: the run's name, which keeps runs apart in one Redis.
        password: of the Redis server.

    Raises:
        ConfigError: the address is of no known kind.
        ArtifactError: a SQLite file cannot be opened.
    """
    if address.startswith("sqlite:///"):
        try:
            return SqliteStore(Path(address.removeprefix("sqlite:///")).expanduser())
        except StoreDownError as error:
            raise ArtifactError(
                f"cannot open the profile store {address}: {error}",
                remedy="Check the path, or delete the file; it is filled again from the run",
            ) from error
    try:
        return RedisStore(address, name, password)
    except ValueError as error:
        raise ConfigError(
            f"serve.store '{address}' is no address: {error}",
            remedy="E.g. sqlite:///profiles.sqlite or redis://host:6379/0",
        ) from error


def _batches(profiles: Iterable[Profile]) -> Iterator[list[Profile]]:
    """Profiles in lists of at most `WRITE_BATCH`."""
    rest = iter(profiles)
    while batch := list(islice(rest, WRITE_BATCH)):
        yield batch


def _encoded(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _decoded(body: str) -> Profile:
    raw: dict[str, Any] = json.loads(body)
    return Profile(
        domain=raw["domain"],
        user_id=raw["user_id"],
        history=tuple(Interaction(**step) for step in raw["history"]),
        reason=StoredReason(**raw["reason"]) if raw["reason"] else None,
        tree=tuple(StoredThought(**node) for node in raw["tree"]),
    )
