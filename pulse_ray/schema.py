"""Every table of the project, column by column, and the types that cross between stages.

A column's meaning, unit and producer stand in its field's `doc` metadata; `describe(name)` prints them.
Tables keyed by `example_id` are cut into the same parts, in the same order, as `examples` (see `workspace.Part`), so a
stage reads part k of each of its inputs and writes part k of its output: no stage needs a join over a whole table.

`History` is what a model may see. `Example` also knows the target. A function that builds text for the tree, a selector
or the ranker takes a `History`; only Phase I takes an `Example`. That is how the target is kept out of prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from pulse_ray.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def _column(name: str, kind: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


INTERACTION = pa.struct(
    [
        _column("item_id", pa.string(), "item, unique within its domain"),
        _column("timestamp", pa.int64(), "seconds since 1970, UTC"),
        _column("rating", pa.float32(), "the user's rating, 1 to 5; null where the source has none", nullable=True),
        _column("review", pa.string(), "the user's words, markup removed; null where there are none", nullable=True),
    ]
)

_EXAMPLE_ID = _column("example_id", pa.string(), "domain/user_id/position, the key of every table after `prepare`")
_ROW_ID = _column("row_id", pa.string(), "file:row of the input of `pulse-ray score`, counted from 0")
_DOMAIN = _column("domain", pa.string(), "name of the domain in the configuration")
_USER_ID = _column("user_id", pa.string(), "user, unique within the domain")

TABLES: dict[str, pa.Schema] = {
    "interactions": pa.schema([_DOMAIN, _USER_ID, *INTERACTION]),
    "items": pa.schema(
        [
            _DOMAIN,
            _column("item_id", pa.string(), "item, unique within its domain"),
            _column("title", pa.string(), "readable title; made from brand, category and description where broken"),
            _column("description", pa.string(), "description, markup removed; may be empty"),
            _column("brand", pa.string(), "brand or maker; may be empty"),
            _column("categories", pa.list_(pa.string()), "from general to specific"),
            _column("text", pa.string(), "what models see of the item"),
            _column("popularity", pa.int64(), "training interactions with the item: targets held out are not counted"),
        ]
    ),
    "examples": pa.schema(
        [
            _EXAMPLE_ID,
            _DOMAIN,
            _USER_ID,
            _column("split", pa.string(), "train, validation or test"),
            _column("history", pa.list_(INTERACTION), "what precedes the target, oldest first"),
            _column(
                "target_item", pa.string(), "the next item: Phase I on train, losses and metrics alone may read it"
            ),
        ]
    ),
    "candidates": pa.schema(
        [
            _EXAMPLE_ID,
            _column("items", pa.list_(pa.string()), "K items: the target and K - 1 that the user never touched"),
            _column("target_index", pa.int32(), "place of the target among `items`"),
            _column("sampler", pa.string(), "uniform, popularity or sasrec"),
            _column("sasrec_logits", pa.list_(pa.float32()), "SASRec's logit for each of `items`"),
            _column(
                "sasrec_catalogue_rank",
                pa.int32(),
                "rank of the target by SASRec among all items of the domain that the history lacks, ties against it; "
                "null for train",
                nullable=True,
            ),
            _column(
                "popularity_catalogue_rank", pa.int32(), "the same rank by popularity; null for train", nullable=True
            ),
        ]
    ),
    "item_vectors": pa.schema(
        [
            _DOMAIN,
            _column("item_id", pa.string(), "item, unique within its domain"),
            _column("vector", pa.list_(pa.float32()), "SASRec's; its inner product with a state is the item's logit"),
        ]
    ),
    "user_states": pa.schema(
        [
            _column("example_id", pa.string(), "the user's newest training example"),
            _DOMAIN,
            _USER_ID,
            _column("state", pa.list_(pa.float32()), "SASRec's after that example's history and target"),
            _column("items", pa.list_(pa.string()), "newest of these items, newest first, without repeats"),
        ]
    ),
    "neighbours": pa.schema(
        [
            _EXAMPLE_ID,
            _column("user_ids", pa.list_(pa.string()), "most similar users by SASRec state, nearest first"),
            _column("items", pa.list_(pa.string()), "their training items, nearest user first, without repeats"),
        ]
    ),
    "rationales": pa.schema(
        [
            _EXAMPLE_ID,
            _column("text", pa.string(), "why the user chose the target (the positive rationale of Phase I)"),
            _column("model", pa.string(), "name of the language model"),
            _column("prompt_sha", pa.string(), "first 12 hex digits of the prompt template's sha256"),
            _column("seed", pa.int64(), "sampling seed of this completion"),
            _column("finish_reason", pa.string(), "stop or length"),
            _column("num_tokens", pa.int32(), "tokens generated"),
        ]
    ),
    "thoughts": pa.schema(
        [
            _EXAMPLE_ID,
            _column("node_id", pa.string(), 'place in the tree: "" is the base reason, "1" its first child, "1.2" …'),
            _column("depth", pa.int32(), "0 for the base reason"),
            _column("leaf", pa.bool_(), "whether it may become the reason: of full depth, or no refinement was kept"),
            _column("text", pa.string(), "the thought"),
            _column("mean_logprob", pa.float32(), "mean log-probability of its tokens under the language model"),
            _column(
                "agreement",
                pa.float32(),
                "cosine with the history in the Thought Space, which a beam chose by; null where it compared nothing",
                nullable=True,
            ),
            _column("num_tokens", pa.int32(), "tokens generated"),
            _column("seed", pa.int64(), "sampling seed of this completion"),
            _column("finish_reason", pa.string(), "stop or length"),
            _column("prompt_sha", pa.string(), "first 12 hex digits of the prompt template's sha256"),
        ]
    ),
    "reasons": pa.schema(
        [
            _EXAMPLE_ID,
            _column("selector", pa.string(), "base, or one of select.selectors"),
            _column("node_id", pa.string(), "the chosen node of the tree"),
            _column("text", pa.string(), "the chosen reason"),
            _column("agreement", pa.float32(), "the selector's score; null where it compared nothing", nullable=True),
        ]
    ),
    "scores": pa.schema(
        [
            _EXAMPLE_ID,
            _column("split", pa.string(), "validation or test"),
            _column("variant", pa.string(), "what ranked: popularity, sasrec, or a variant of the ranker"),
            _column("items", pa.list_(pa.string()), "the candidates, as stored in `candidates`"),
            _column("logits", pa.list_(pa.float32()), "one for each of `items`"),
            _column("target_index", pa.int32(), "place of the target among `items`"),
            _column("rank", pa.int32(), "rank of the target, 1 is best; ties rank against it"),
        ]
    ),
    "user_scores": pa.schema(
        [
            _ROW_ID,
            _DOMAIN,
            _USER_ID,
            _column("items", pa.list_(pa.string()), "the candidates: as given, or as retrieved, nearest first"),
            _column("logits", pa.list_(pa.float32()), "the ranker's, one for each of `items`"),
        ]
    ),
    "recommendations": pa.schema(
        [
            _ROW_ID,
            _DOMAIN,
            _USER_ID,
            _column("items", pa.list_(pa.string()), "the best candidates, best first"),
            _column("titles", pa.list_(pa.string()), "title of each of `items`"),
            _column("probabilities", pa.list_(pa.float32()), "of each of `items`, among all candidates of the row"),
            _column("reason", pa.string(), "the reason that the ranker saw; null where there was none", nullable=True),
            _column("model_version", pa.string(), "variant@fingerprint of the ranker"),
        ]
    ),
    "rejects": pa.schema(
        [
            _column("stage", pa.string(), "stage that set the row aside"),
            _column("key", pa.string(), "file:line, item_id, example_id or row_id"),
            _column("reason", pa.string(), "short, countable"),
            _column("detail", pa.string(), "what was wrong with this very row"),
        ]
    ),
}


def table(name: str, rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Rows as the table `name`, checked against its schema.

    Raises:
        DataError: a column is missing, unknown, null where it may not be, or of the wrong type.
    """
    rows = list(rows)
    schema = TABLES[name]
    for row in rows[:1]:
        if extra := set(row) - set(schema.names):
            raise DataError(f"table '{name}' has no column {sorted(extra)}", remedy="See pulse_ray/schema.py")
    try:
        return validate(name, pa.Table.from_pylist(rows, schema=schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"rows do not fit table '{name}': {error}", remedy="See pulse_ray/schema.py") from error


def validate(name: str, data: pa.Table) -> pa.Table:
    """`data` itself if it has the columns of the table `name` and no null where none may be.

    Raises:
        DataError: naming the first column that does not fit.
    """
    schema = TABLES[name]
    if not data.schema.equals(schema):
        raise DataError(
            f"table '{name}' has columns {data.schema.names}, expected {schema.names} with the types of its schema",
            remedy="See pulse_ray/schema.py",
        )
    for field in schema:
        if not field.nullable and data.column(field.name).null_count:
            raise DataError(f"table '{name}' has nulls in column '{field.name}'", remedy="See pulse_ray/schema.py")
    return data


def describe(name: str) -> str:
    """The columns of a table with their types and meanings, one a line."""
    return "\n".join(f"{f.name:<14} {f.type!s:<24} {(f.metadata or {})[b'doc'].decode()}" for f in TABLES[name])


@dataclass(frozen=True, kw_only=True, slots=True)
class Interaction:
    """One thing that a user did: item, time in seconds (UTC), rating from 1 to 5 and review where given."""

    item_id: str
    timestamp: int
    rating: float | None = None
    review: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What a model may see of an example: the interactions before the target, oldest first."""

    example_id: str
    domain: str
    user_id: str
    interactions: tuple[Interaction, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A history together with the item that followed it. Only Phase I, losses and metrics take this type."""

    history: History
    split: Split
    target_item: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An item as models see it. `text` is its title, enriched where the title alone says too little."""

    item_id: str
    title: str
    text: str
    brand: str = ""
    categories: tuple[str, ...] = ()
    description: str = ""
    popularity: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A row that was set aside: a key to find it by, a short countable reason, and the detail."""

    key: str
    reason: str
    detail: str = ""


def example_id(domain: str, user_id: str, position: int) -> str:
    """The key of an example; `position` is the target's index in the user's whole sequence."""
    return f"{domain}/{user_id}/{position}"


def examples(data: pa.Table) -> Iterator[Example]:
    """The rows of an `examples` table as `Example`s, in order."""
    for row in data.to_pylist():
        yield Example(history=_history(row), split=row["split"], target_item=row["target_item"])


def histories(data: pa.Table) -> Iterator[History]:
    """The rows of an `examples` table as `History`s; the target's column is not even read."""
    for row in data.select(["example_id", "domain", "user_id", "history"]).to_pylist():
        yield _history(row)


def _history(row: dict[str, Any]) -> History:
    return History(
        example_id=row["example_id"],
        domain=row["domain"],
        user_id=row["user_id"],
        interactions=tuple(Interaction(**step) for step in row["history"]),
    )
