"""Answers requests: finds the user, the candidates and the reason, has them ranked, and says where each came from.

Plain Python over a few asynchronous questions (`Services`), which `serving.app` puts to deployments.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from pulse_ray.catalogue import Catalogue
from pulse_ray.config import Config
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.schema import History, Interaction, Item
from pulse_ray.serving import messages
from pulse_ray.serving.backend import BusyError, InvalidError, RefusedError, UnavailableError, UnknownError
from pulse_ray.serving.messages import RankAnswer, RankRequest, Reason, Thought
from pulse_ray.serving.store import Found, Profile, ProfileStore, StoreDownError
from pulse_ray.serving.titles import TitleIndex
from pulse_ray.text import clean

T = TypeVar("T")
logger = logging.getLogger("ray.serve")

READY_TIMEOUT_S = 3.0
"""A ranker that does not say its version within this time does not count as ready."""


@dataclass(frozen=True, kw_only=True)
class Services:
    """The models, as asynchronous functions. Each may raise `BusyError` or `UnavailableError`.

    `retrieve`: domain, item ids of the history, those that must not be found, and a count → items, best first.
    `rank`: a row, and how many rows of the same request were sent before it → one logit for each of its candidates, and
    the version of the model that gave them. `reason`: a history → a reason with its tree, or why there is none; None
    where the reasoner is switched off. `version`: of the model that ranks now.
    """

    retrieve: Callable[[str, Sequence[str], Sequence[str], int], Awaitable[list[str]]]
    rank: Callable[[RankRow, int], Awaitable[tuple[list[float], str]]]
    reason: Callable[[History], Awaitable[Found | str]] | None
    version: Callable[[], Awaitable[str]]


@dataclass(frozen=True, kw_only=True)
class _User:
    """Whom to rank for. `touched` are all items of the history, also those too old for `history`. `profile` is None for
    a history that was typed."""

    history: History
    touched: Sequence[str]
    profile: Profile | None


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request whose user and candidates are known to exist."""

    request: RankRequest
    user: _User
    candidates: list[Item] | None
    clock: _Clock
    profile_ms: float


class Recommender:
    """A `serving.backend.Backend`.

    Args:
        items: of every domain that is served.
        store: profiles.
    """

    def __init__(self, config: Config, items: Catalogue, store: ProfileStore, services: Services) -> None:
        self.config, self.items, self.store, self.services = config, items, store, services
        self.variant = config.ranker.served(config.serve.variant)
        self.titles = {domain: TitleIndex(found.values()) for domain, found in items.items()}

    async def rank(self, requests: Sequence[RankRequest]) -> list[RankAnswer]:
        """See `Backend`."""
        try:
            async with asyncio.timeout(self.config.serve.timeout_s):
                # All are checked before work is done on any.
                asked = await self._each([self._ask(request) for request in requests])
                return await self._each([self._rank(one, place) for place, one in enumerate(asked)])
        except TimeoutError as error:
            raise UnavailableError(f"no answer within {self.config.serve.timeout_s:g} s") from error

    async def user(self, user_id: str, domain: str | None) -> messages.UserAnswer:
        """See `Backend`."""
        profile = await self._profile(self._domain(domain), user_id)
        items = self.items[profile.domain]
        return messages.UserAnswer(
            domain=profile.domain,
            user_id=user_id,
            history=[messages.SeenStep(title=_title(items, step.item_id), **asdict(step)) for step in profile.history],
            reason=_stored(profile),
            tree=[Thought(**asdict(node)) for node in profile.tree],
        )

    async def users(self, prefix: str, domain: str | None, limit: int) -> messages.UsersAnswer:
        """See `Backend`."""
        name = self._domain(domain)
        return messages.UsersAnswer(domain=name, users=await self._ask_store(self.store.find, name, prefix, limit))

    async def item(self, item_id: str, domain: str | None) -> messages.ItemAnswer:
        """See `Backend`."""
        name = self._domain(domain)
        found = self.items[name].get(item_id)
        if found is None:
            raise UnknownError(f"no item '{item_id}' in domain '{name}'", field="item_id")
        return messages.ItemAnswer(
            domain=name,
            item_id=item_id,
            title=found.title,
            text=found.text,
            brand=found.brand,
            categories=list(found.categories),
            popularity=found.popularity,
        )

    async def search(self, query: str, domain: str | None, limit: int) -> messages.ItemsAnswer:
        """See `Backend`."""
        name = self._domain(domain)
        # Of a large catalogue this takes a while.
        found = await asyncio.to_thread(self.titles[name].find, query, limit)
        return messages.ItemsAnswer(
            domain=name, items=[messages.FoundItem(item_id=item.item_id, title=item.title) for item in found]
        )

    async def ready(self) -> messages.Readiness:
        """See `Backend`."""
        version, ranker, store = None, "ok", "ok"
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                version = await self.services.version()
        except (RefusedError, TimeoutError) as error:
            ranker = str(error) or f"it does not answer within {READY_TIMEOUT_S:g} s"
        try:
            if await self._ask_store(self.store.mark) is None:
                store = "it is not filled: only typed histories can be ranked"
        except UnavailableError as error:
            store = error.message
        return messages.Readiness(
            ready=(ranker, store) == ("ok", "ok"),
            model_version=version,
            domains=list(self.items),
            variant=self.variant,
            store=store,
            ranker=ranker,
        )

    async def _each(self, questions: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Asks all at once. Raises the first refusal, with its place."""
        answers = []
        for place, answer in enumerate(await asyncio.gather(*questions, return_exceptions=True)):
            if isinstance(answer, RefusedError):
                answer.place = place
            if isinstance(answer, BaseException):
                raise answer
            answers.append(answer)
        return answers

    async def _ask(self, request: RankRequest) -> _Asked:
        clock = _Clock()
        domain = self._domain(request.domain)
        candidates = self._known(domain, request.candidates, "candidates.{}") if request.candidates else None
        user = await self._user(domain, request)
        return _Asked(request=request, user=user, candidates=candidates, clock=clock, profile_ms=clock.lap())

    async def _rank(self, asked: _Asked, place: int) -> RankAnswer:
        request, user, clock = asked.request, asked.user, asked.clock
        clock.lap()
        candidates = asked.candidates or await self._retrieve(user)
        retrieve_ms = clock.lap()
        reason = await self._reason(request, user)
        reason_ms = clock.lap()
        row = RankRow(history=user.history, reason=reason.text, candidates=tuple(candidates))
        logits, version = await self.services.rank(row, place)
        rank_ms = clock.lap()
        if not np.isfinite(logits).all():
            logger.error("%s gives logits that are no numbers", version)
            raise UnavailableError("the ranker's answer is no number")
        return RankAnswer(
            domain=user.history.domain,
            user_id=request.user_id,
            items=_ranked(candidates, logits),
            candidates_from="request" if asked.candidates else "sasrec",
            reason=reason,
            model_version=version,
            timing=messages.Timing(
                total_ms=clock.total(),
                profile_ms=asked.profile_ms,
                retrieve_ms=retrieve_ms,
                reason_ms=reason_ms,
                rank_ms=rank_ms,
            ),
        )

    async def _user(self, domain: str, request: RankRequest) -> _User:
        profile = None
        if request.user_id is not None:
            profile = await self._profile(domain, request.user_id)
            # A profile may be older, or newer, than the catalogue.
            steps = tuple(step for step in profile.history if step.item_id in self.items[domain])
            if not steps:
                raise InvalidError(f"no item of user '{request.user_id}' is in the catalogue", field="user_id")
        else:
            given = request.history or []
            self._known(domain, [step.item_id for step in given], "history.{}.item_id")
            # Where times are not given, the order is all that counts.
            steps = tuple(
                Interaction(
                    item_id=step.item_id,
                    timestamp=place if step.timestamp is None else step.timestamp,
                    rating=step.rating,
                    review=clean(step.review) or None,
                )
                for place, step in enumerate(given)
            )
        history = History(
            example_id=f"{domain}/{request.user_id or ''}/now",
            domain=domain,
            user_id=request.user_id or "",
            interactions=steps[-self.config.prepare.max_sequence :],
        )
        return _User(history=history, touched=[step.item_id for step in steps], profile=profile)

    async def _retrieve(self, user: _User) -> list[Item]:
        history = user.history
        newest = [step.item_id for step in history.interactions]
        found = await self.services.retrieve(history.domain, newest, user.touched, self.config.serve.retrieve_k)
        if not found:
            raise InvalidError("the history holds every item, so none is left to rank", field="candidates")
        return [self.items[history.domain][item] for item in found]

    async def _reason(self, request: RankRequest, user: _User) -> Reason:
        if self.variant == "none":
            return _none("the model that is served ranks without reasons")
        if given := clean(request.reason):
            return Reason(source="request", text=given)
        stored = user.profile and user.profile.reason
        if user.profile and stored:
            return _stored(user.profile)
        missing = "no reason is stored for this user" if user.profile else "no reason is stored for a typed history"
        if self.services.reason is None:
            return _none(f"{missing}, and the reasoner is off")
        limit = self.config.serve.reasoner.time_limit_s
        try:
            async with asyncio.timeout(limit):
                found = await self.services.reason(user.history)
        except TimeoutError:
            return _none(f"{missing}, and the reasoner took longer than {limit:g} s")
        except (BusyError, UnavailableError) as error:
            return _none(f"{missing}, and the reasoner does not answer: {error.message}")
        if isinstance(found, str):
            return _none(f"{missing}, and {found}")
        tree = [Thought(**asdict(node)) for node in found.tree]
        return Reason(source="reasoner", tree=tree, **asdict(found.reason))

    async def _profile(self, domain: str, user_id: str) -> Profile:
        found = await self._ask_store(self.store.get, domain, user_id)
        if found is None:
            raise UnknownError(f"no user '{user_id}' in domain '{domain}'", field="user_id")
        return found

    async def _ask_store(self, question: Callable[..., T], *values: object) -> T:
        try:
            return await asyncio.to_thread(question, *values)
        except StoreDownError as error:
            raise UnavailableError("the profile store does not answer") from error

    def _domain(self, name: str | None) -> str:
        if name is None and len(self.items) == 1:
            return next(iter(self.items))
        if name is None or name not in self.items:
            problem = "name one" if name is None else f"no domain '{name}'"
            raise InvalidError(f"{problem}; there are {', '.join(self.items)}", field="domain")
        return name

    def _known(self, domain: str, wanted: Sequence[str], field: str) -> list[Item]:
        """The items, or `InvalidError` that names the first unknown one's place in `field`."""
        items = self.items[domain]
        for place, item in enumerate(wanted):
            if item not in items:
                raise InvalidError(f"no item '{item}' in domain '{domain}'", field=field.format(place))
        return [items[item] for item in wanted]


class _Clock:
    """Milliseconds since it was made, and between laps."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return round(1000 * (self._last - last), 2)

    def total(self) -> float:
        return round(1000 * (time.perf_counter() - self._start), 2)


def _ranked(candidates: Sequence[Item], logits: Sequence[float]) -> list[messages.RankedItem]:
    """Best first; candidates of the same logit keep their order."""
    scores = np.asarray(logits, dtype=np.float64)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    return [
        messages.RankedItem(
            item_id=candidates[place].item_id,
            title=candidates[place].title,
            logit=float(scores[place]),
            probability=float(shares[place]),
        )
        for place in np.argsort(-scores, kind="stable").tolist()
    ]


def _stored(profile: Profile) -> Reason:
    if profile.reason is None:
        return _none("no reason is stored for this user")
    return Reason(source="store", **asdict(profile.reason))


def _none(why: str) -> Reason:
    return Reason(source="none", why=why)


def _title(items: Mapping[str, Item], item_id: str) -> str:
    return items[item_id].title if item_id in items else item_id
