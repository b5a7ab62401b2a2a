"""What requests and answers hold. Configured limits are checked in `serving.api`; these models check the rest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Id = Annotated[str, Field(min_length=1, max_length=256)]


class Message(BaseModel):
    """A part of a request or an answer. It accepts no unknown field and no number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Step(Message):
    """One thing that the user did."""

    item_id: Id
    rating: Annotated[float, Field(ge=1, le=5)] | None = Field(None, description="1 to 5")
    review: Annotated[str, Field(max_length=5000)] | None = Field(None, description="the user's words")
    timestamp: Annotated[int, Field(ge=0, lt=2**62)] | None = Field(None, description="seconds since 1970, UTC")


class RankRequest(Message):
    """A user or a history, and what to rank for it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": "U00001"}, {"history": [{"item_id": "I00001", "rating": 5}]}]}
    )

    domain: Id | None = Field(None, description="needed where several domains are served")
    user_id: Id | None = Field(None, description="a user of the profile store")
    history: Annotated[list[Step], Field(min_length=1)] | None = Field(None, description="oldest first")
    candidates: Annotated[list[Id], Field(min_length=1)] | None = Field(
        None, description="items to rank; unset: SASRec finds `retrieve_k` that the history does not hold"
    )
    reason: Annotated[str, Field(min_length=1, max_length=2000)] | None = Field(
        None, description="a reason to rank with, in place of the stored one"
    )

    @model_validator(mode="after")
    def _one_user(self) -> RankRequest:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either user_id or history")
        return self


class BatchRequest(Message):
    """Several rankings, answered together; one that is wrong refuses them all."""

    requests: Annotated[list[RankRequest], Field(min_length=1)]


class RankedItem(Message):
    """A candidate. `probability` is the softmax of the logits over this answer's candidates."""

    item_id: str
    title: str
    logit: float
    probability: float


class Thought(Message):
    """A node of a tree: `node_id` is "" for the base reason, "1.2" for the second child of its first child."""

    node_id: str
    depth: int
    text: str
    mean_logprob: float
    leaf: bool = Field(
        description="whether it could become the reason; a node without children that could not was "
        "left behind by the beam"
    )
    agreement: float | None = Field(description="what a beam compared it by; null where it compared nothing")


class Reason(Message):
    """The reason that went into the ranking, and where it came from; with `none`, `why` says why there is none."""

    source: Literal["request", "store", "reasoner", "none"]
    text: str | None = None
    agreement: float | None = Field(
        None, description="the selector's score of the reason; null where it compared nothing"
    )
    selector: str | None = None
    node_id: str | None = Field(None, description="the chosen node of the tree")
    version: str | None = Field(None, description="selector and fingerprint of the run's reasons")
    tree: list[Thought] = Field([], description="where the reasoner has just grown it; GET /v1/users has stored ones")
    why: str | None = None


class Timing(Message):
    """Milliseconds, as seen by the ingress."""

    total_ms: float
    profile_ms: float
    retrieve_ms: float
    reason_ms: float
    rank_ms: float


class RankAnswer(Message):
    """Candidates, best first."""

    domain: str
    user_id: str | None
    items: list[RankedItem]
    candidates_from: Literal["request", "sasrec"]
    reason: Reason
    model_version: str = Field(description="variant of the ranker and sha256 of its adapter")
    timing: Timing


class BatchAnswer(Message):
    """Answers in the order of the requests."""

    results: list[RankAnswer]


class SeenStep(Message):
    """An interaction with its item's title."""

    item_id: str
    title: str
    timestamp: int
    rating: float | None
    review: str | None


class UserAnswer(Message):
    """A user's profile: history, oldest first, reason and tree."""

    domain: str
    user_id: str
    history: list[SeenStep]
    reason: Reason
    tree: list[Thought]


class UsersAnswer(Message):
    """Ids that begin with what was asked for."""

    domain: str
    users: list[str]


class ItemAnswer(Message):
    """An item. `text` is what models see of it."""

    domain: str
    item_id: str
    title: str
    text: str
    brand: str
    categories: list[str]
    popularity: int


class FoundItem(Message):
    """An item in a list."""

    item_id: str
    title: str


class ItemsAnswer(Message):
    """Items whose title holds a word that begins with each word of the query."""

    domain: str
    items: list[FoundItem]


class Readiness(Message):
    """Whether rankings are possible, and with what."""

    ready: bool
    model_version: str | None
    domains: list[str]
    variant: str
    store: str = Field(description="`ok`, or what is wrong with it")
    ranker: str = Field(description="`ok`, or what is wrong with it")


class Fault(Message):
    """A field of the request, as a path like `requests.0.candidates.3`, and what is wrong with it."""

    field: str
    message: str


class Problem(Message):
    """Why a request was refused."""

    message: str
    fields: list[Fault] = []
