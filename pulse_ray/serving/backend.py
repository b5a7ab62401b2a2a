"""What the API asks of the system behind it, and how that system refuses. Plain Python: tests put a fake behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pulse_ray.serving.messages import (
    ItemAnswer,
    ItemsAnswer,
    RankAnswer,
    RankRequest,
    Readiness,
    UserAnswer,
    UsersAnswer,
)


class RefusedError(Exception):
    """A request that is not answered.

    `status` is the HTTP status, `field` the place in the request that is at fault, if any. `place` is the index of the
    ranking among those that were asked for together.
    """

    status = 503

    def __init__(self, message: str, *, field: str | None = None, place: int = 0) -> None:
        super().__init__(message)
        self.message, self.field, self.place = message, field, place


class InvalidError(RefusedError):
    """A field holds what cannot be ranked."""

    status = 422


class UnknownError(RefusedError):
    """There is no such user or item."""

    status = 404


class BusyError(RefusedError):
    """Too many requests wait already."""

    status = 429


class UnavailableError(RefusedError):
    """A part of the system does not answer."""

    status = 503


class Backend(Protocol):
    """The system behind the API.

    Raises:
        RefusedError: by every method but `ready`.
    """

    async def rank(self, requests: Sequence[RankRequest]) -> list[RankAnswer]:
        """Ranks for each request, in order. One that cannot be answered refuses all."""
        ...

    async def user(self, user_id: str, domain: str | None) -> UserAnswer:
        """A user's profile."""
        ...

    async def users(self, prefix: str, domain: str | None, limit: int) -> UsersAnswer:
        """Users whose id begins with `prefix`."""
        ...

    async def item(self, item_id: str, domain: str | None) -> ItemAnswer:
        """An item."""
        ...

    async def search(self, query: str, domain: str | None, limit: int) -> ItemsAnswer:
        """Items by words of their title."""
        ...

    async def ready(self) -> Readiness:
        """Whether rankings are possible now."""
        ...
