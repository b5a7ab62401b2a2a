"""A backend without models: every candidate's logit is its place, and some users make it refuse."""

from __future__ import annotations

from collections.abc import Sequence

from pulse_ray.serving.backend import BusyError, InvalidError, UnavailableError, UnknownError
from pulse_ray.serving.messages import (
    FoundItem,
    ItemAnswer,
    ItemsAnswer,
    RankAnswer,
    RankedItem,
    RankRequest,
    Readiness,
    Reason,
    SeenStep,
    Thought,
    Timing,
    UserAnswer,
    UsersAnswer,
)

TITLES = {
    "i0": "Unscented Hand Cream",
    "i1": "Hypoallergenic Shampoo",
    "i2": "Gym Towel, Quick Dry",
    "i3": "Fragrance-Free Soap",
    "i4": "Zyxwort Balm for Sensitive Skin",
    "i5": "Pet Brush",
    "i6": "Trail Mix, 500 g",
}
HOSTILE = '<img src=x onerror="document.title=1">'
REASON = "The customer looks for products without perfume, and will want a mild balm next."


def _node(node_id: str, text: str, mean_logprob: float, agreement: float | None = None) -> Thought:
    depth = len(node_id.split(".")) if node_id else 0
    return Thought(
        node_id=node_id, depth=depth, leaf=depth == 2, text=text, mean_logprob=mean_logprob, agreement=agreement
    )


TREE = [
    _node("", "The customer looks for care that is gentle.", -1.4),
    _node("1", "The customer looks for mild products for daily use.", -1.2, 0.51),
    _node("1.1", REASON, -0.9),
    _node("1.2", f"The customer looks for {HOSTILE} soap.", -1.1),
    _node("2", "The customer looks for sport articles.", -2.1, 0.02),
]
STORED = Reason(
    source="store",
    text=REASON,
    agreement=0.63,
    selector="thought_space",
    node_id="1.1",
    version="thought_space@5f0c2a9e",
)


class FakeBackend:
    """Knows user `u1`; `busy`, `down` and `dead` make it refuse."""

    def __init__(self) -> None:
        self.is_ready = True

    async def rank(self, requests: Sequence[RankRequest]) -> list[RankAnswer]:
        return [self._rank(request, place) for place, request in enumerate(requests)]

    def _rank(self, request: RankRequest, place: int) -> RankAnswer:
        if request.user_id in ("busy", "down"):
            raise {"busy": BusyError, "down": UnavailableError}[request.user_id]("not now", place=place)
        if request.user_id not in (None, "u1"):
            raise UnknownError(f"no user '{request.user_id}'", field="user_id", place=place)
        for index, item in enumerate(request.candidates or ()):
            if item not in TITLES:
                raise InvalidError(f"no item '{item}'", field=f"candidates.{index}", place=place)
        chosen = request.candidates or list(TITLES)[3:]
        share = 2 / (len(chosen) * (len(chosen) + 1))
        none = Reason(source="none", why="no reason is stored for a typed history, and the reasoner is off")
        return RankAnswer(
            domain="shop",
            user_id=request.user_id,
            items=[
                RankedItem(
                    item_id=item, title=TITLES[item], logit=1.7 - at * 0.4, probability=(len(chosen) - at) * share
                )
                for at, item in enumerate(chosen)
            ],
            candidates_from="request" if request.candidates else "sasrec",
            reason=STORED if request.user_id else none,
            model_version="thought_space@0123456789ab",
            timing=Timing(total_ms=21.0, profile_ms=1, retrieve_ms=4, reason_ms=0, rank_ms=16),
        )

    async def user(self, user_id: str, domain: str | None) -> UserAnswer:
        if user_id == "down":
            raise UnavailableError("the profile store does not answer")
        if user_id != "u1" or domain not in (None, "shop"):
            raise UnknownError(f"no user '{user_id}'", field="user_id")
        reviews = ("No perfume, my skin stays calm", None, HOSTILE, "Fine.")
        return UserAnswer(
            domain="shop",
            user_id="u1",
            history=[
                SeenStep(item_id=f"i{n}", title=TITLES[f"i{n}"], timestamp=1500 * 10**6 + n, rating=5 - n, review=words)
                for n, words in enumerate(reviews)
            ],
            reason=STORED,
            tree=TREE,
        )

    async def users(self, prefix: str, domain: str | None, limit: int) -> UsersAnswer:
        return UsersAnswer(domain="shop", users=[user for user in ("u1",) if user.startswith(prefix)][:limit])

    async def item(self, item_id: str, domain: str | None) -> ItemAnswer:
        if item_id not in TITLES:
            raise UnknownError(f"no item '{item_id}'", field="item_id")
        title = TITLES[item_id]
        return ItemAnswer(
            domain="shop", item_id=item_id, title=title, text=title, brand="", categories=[], popularity=1
        )

    async def search(self, query: str, domain: str | None, limit: int) -> ItemsAnswer:
        words = query.casefold().split()
        found = [
            FoundItem(item_id=item, title=title)
            for item, title in TITLES.items()
            if all(any(part.startswith(word) for part in title.casefold().split()) for word in words)
        ]
        return ItemsAnswer(domain="shop", items=found[:limit])

    async def ready(self) -> Readiness:
        state = "ok" if self.is_ready else "it does not answer"
        return Readiness(
            ready=self.is_ready,
            model_version="thought_space@0123456789ab",
            domains=["shop"],
            variant="thought_space",
            store=state,
            ranker="ok",
        )
