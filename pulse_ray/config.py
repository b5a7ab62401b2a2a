"""Configuration: one YAML per experiment, a section per stage, checked before anything starts.

`load` reads a file, applies `section.key=value` overrides and returns a frozen `Config`; an unknown key, a wrong type
or an impossible combination is a `ConfigError` that names the key. A file written by hand is YAML; what the machine
resolved is JSON (`Config.to_json`).

Settings marked `OPERATIONAL` say where and how fast work runs, not what comes out; they do not enter a stage's
fingerprint, so a run may continue on another number of workers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import to_jsonable_python

from pulse_ray import templates
from pulse_ray.errors import ConfigError

OPERATIONAL = "operational"

CPU_TOKENS = 6144
"""Of rows that a ranker scores at once on a CPU, by default."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Selector = Literal["thought_space", "sbert", "encoder_base", "log_likelihood", "random"]
Variant = Literal["none", "base", Selector]

BY_BEHAVIOUR: frozenset[Variant] = frozenset({"thought_space", "sbert", "encoder_base"})
"""Selectors that compare a thought with the behaviour's text."""

Gate = Literal["cut off", "too short", "repeats itself", "copies the prompt", "names an unseen item", "wrong language"]
GATES: tuple[Gate, ...] = get_args(Gate)

_CODES = """
ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr
fuv fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko
ku ky la lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru
rw sa sdh se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue
zh zu
"""
LANGUAGES = tuple(_CODES.split())
"""ISO 639 codes of the languages that py3langid tells apart."""


def _differ(values: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{info.field_name} repeat: {values}")
    return values


DISTINCT = AfterValidator(_differ)


class Section(BaseModel):
    """A frozen part of the configuration that accepts no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ClusterConfig(Section):
    """Which Ray cluster runs the work."""

    address: str | None = Field(None, description="Ray address, `auto` for the running one; unset starts a local Ray")
    num_cpus: Count | None = Field(None, description="logical CPUs of a local Ray; unset takes 4 or the cores, if more")
    object_store_mb: Count = Field(300, description="object store of a local Ray, MiB")
    log_interval_s: Annotated[float, Field(ge=0)] = Field(
        15.0, description="seconds between two lines of progress where standard error is not a terminal"
    )
    report_interval_s: Annotated[float, Field(ge=0)] = Field(
        2.0, description="seconds between two reports of how far a task has read its file"
    )


class SyntheticSource(Section):
    """The synthetic shop: users whose planted motives drive what they buy, rate and write (`data/synthetic.py`)."""

    kind: Literal["synthetic"]
    users: Count = 160
    items: Count = 320
    min_purchases: Annotated[int, Field(ge=3)] = 6
    max_purchases: Annotated[int, Field(ge=3)] = 10
    motive_strength: Fraction = Field(0.9, description="share of purchases that follow the user's motive")

    @model_validator(mode="after")
    def _ordered(self) -> SyntheticSource:
        if self.max_purchases < self.min_purchases:
            raise ValueError(f"max_purchases ({self.max_purchases}) is below min_purchases ({self.min_purchases})")
        return self


FileFormat = Literal["auto", "amazon2014", "amazon2018", "amazon2023", "recbole", "table", "sequences"]
Paths = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]
"""Local paths, URIs or http(s) addresses; one may be written without a list."""


class ColumnsConfig(Section):
    """What the columns of a table are called in its files. A name that is unset is the column's own."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    rating: str = "rating"
    review: str = "review"
    title: str = "title"
    description: str = "description"
    brand: str = "brand"
    categories: str = "categories"


class FileSource(Section):
    """Files of interactions and, where there are any, of what is known about items. Plain, gzip or zstd.

    How a file is named says nothing of what is in it: fingerprints take `data.files.identity` instead.
    """

    kind: FileFormat = Field(
        "auto",
        description="`amazon2014`, `amazon2018`, `amazon2023`: JSON lines of reviews and metadata; `recbole`: .inter "
        "and .item; `table`: parquet, csv or JSON lines with `columns`; `sequences`: JSON lines of ordered item lists; "
        "`auto` tells them by their first line or their columns",
    )
    interactions: Annotated[Annotated[Paths, Field(min_length=1)], OPERATIONAL] = Field(
        description="files of reviews or other interactions: paths, folders, patterns with *, URIs, addresses"
    )
    items: Annotated[Paths, OPERATIONAL] = Field((), description="files of metadata")
    columns: ColumnsConfig = Field(ColumnsConfig(), description="names of a table's columns, where they differ")
    item_columns: ColumnsConfig | None = Field(None, description="the same for files of items; unset: as `columns`")


def _source_tag(given: Any) -> str:
    kind = given.get("kind") if isinstance(given, dict) else getattr(given, "kind", None)
    return "synthetic" if kind == "synthetic" else "files"


Source = Annotated[
    Annotated[SyntheticSource, Tag("synthetic")] | Annotated[FileSource, Tag("files")], Discriminator(_source_tag)
]
SOURCES: dict[str | int, type[Section]] = {"synthetic": SyntheticSource, "files": FileSource}
"""Sources by the tag that stands in pydantic's paths."""


class DomainConfig(Section):
    """A set of users and items whose ids are unique within it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    source: Source


PRESETS: dict[str, dict[str, Any]] = {
    "five_core": {"filter": "iterated", "min_user_interactions": 5, "min_item_interactions": 5},
    "paper_luxury_beauty": {"filter": "single_pass", "min_user_interactions": 4, "min_item_interactions": 4},
    "paper_video_games": {"filter": "single_pass", "min_user_interactions": 5, "min_item_interactions": 5},
}
"""Settings of `prepare` by the name of a preset; the paper's are those that give the counts of its Table 2."""


class PrepareConfig(Section):
    """Raw files → interactions, items, examples."""

    domains: Annotated[tuple[DomainConfig, ...], Field(min_length=1)]
    downloads: Annotated[str, OPERATIONAL] = Field("downloads", description="folder that downloaded files are kept in")
    preset: Annotated[Literal["five_core", "paper_luxury_beauty", "paper_video_games"] | None, OPERATIONAL] = Field(
        None, description="fills in `filter` and the two minima where they are not given"
    )
    min_rating: Annotated[float, Field(ge=1, le=5)] | None = Field(
        None, description="interactions rated lower do not count; those without a rating do"
    )
    duplicates: Literal["first", "last"] = Field("first", description="which of a user's reviews of one item stays")
    filter: Literal["iterated", "single_pass"] = Field(
        "iterated", description="`iterated`: k-core to its fixed point; `single_pass`: raw counts, once (the paper's)"
    )
    min_user_interactions: Count = 5
    min_item_interactions: Count = 5
    max_users: Count | None = Field(None, description="keep only this many users per domain, chosen by hash")
    split: Literal["leave_two_out", "temporal"] = Field(
        "leave_two_out", description="`temporal`: held out is what follows two cut times, the same for all users"
    )
    temporal_shares: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0, lt=1)]] = Field(
        (0.1, 0.1), description="shares of a domain's newest interactions for validation and, newer yet, for test"
    )
    positions_per_user: Count = Field(1, description="training examples per user, newest first")
    max_sequence: Annotated[int, Field(ge=2)] = Field(50, description="newest interactions kept as a history")
    max_review_chars: Count = Field(10_000, description="characters kept of a review")
    shard_examples: Count = Field(64, description="examples in a part of every table: the unit of work and of commit")
    partitions: Count = Field(8, description="hash partitions of users that are prepared independently")
    max_reject_fraction: Fraction = Field(0.05, description="largest share of a file's lines that may be unusable")
    read_cpus: Annotated[Annotated[float, Field(gt=0)], OPERATIONAL] = Field(
        1, description="CPUs of a task that reads a file; on a cluster it parses with as many threads"
    )
    read_block_kib: Annotated[Count, OPERATIONAL] = Field(
        8192, description="KiB of JSON lines or CSV that are parsed at once; a row of CSV must fit"
    )
    read_batch_rows: Annotated[Count, OPERATIONAL] = Field(50_000, description="rows of Parquet that are read at once")

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        return {**PRESETS.get(str(given.get("preset")), {}), **given} if isinstance(given, dict) else given

    @field_validator("temporal_shares")
    @classmethod
    def _leaves_some(cls, shares: tuple[float, float]) -> tuple[float, float]:
        if sum(shares) >= 1:
            raise ValueError(f"shares {shares} leave nothing to train on")
        return shares

    @field_validator("domains")
    @classmethod
    def _distinct(cls, domains: tuple[DomainConfig, ...]) -> tuple[DomainConfig, ...]:
        names = [domain.name for domain in domains]
        if len(set(names)) < len(names):
            raise ValueError(f"domain names repeat: {names}")
        return domains


class WorkersConfig(Section):
    """Training workers. One DeepSpeed rank each."""

    count: Count = 1
    cpus: Annotated[float, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    threads: Count | None = Field(None, description="CPU threads of a worker; unset divides the machine's cores")
    max_failures: Annotated[int, Field(ge=0)] = Field(1, description="times a broken worker group is started again")


class TrainingConfig(Section):
    """How a model is trained (`training`). Warm-up is linear, decay is cosine to zero."""

    epochs: Count = 3
    batch_size: Count = Field(16, description="examples in one optimizer step, all workers together")
    micro_batch_size: Count | None = Field(None, description="examples in one forward pass of a worker; unset: all")
    lr: Annotated[float, Field(gt=0)] = 2e-4
    warmup_fraction: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="3 also cuts the weights among workers; for the ranker")
    precision: Literal["bf16", "fp32"] = "fp32"
    evaluations_per_epoch: Annotated[float, Field(gt=0)] = Field(1.0, description="0.2 validates every fifth epoch")
    patience: Count = Field(3, description="evaluations without a better score before training stops")
    async_validation: bool = Field(
        False, description="validate checkpoints beside training; early stopping then comes one evaluation later"
    )
    validation_examples: Count | None = Field(None, description="validation examples scored each time; unset: all")
    workers: Annotated[WorkersConfig, OPERATIONAL] = WorkersConfig()


class SasrecConfig(Section):
    """SASRec (Kang and McAuley, 2018): a causal transformer over item ids."""

    dim: Count = 64
    layers: Count = 2
    heads: Count = 2
    dropout: Fraction = 0.2
    positions: Literal["learned", "rotary"] = "learned"
    loss: Literal["sampled_softmax", "full_softmax", "gbce"] = "sampled_softmax"
    negatives: Count = Field(256, description="negatives shared by a batch; the full softmax takes all items")
    gbce_calibration: Fraction = Field(0.75, description="t of gBCE (Petrov and Macdonald, 2023)")
    training: TrainingConfig = TrainingConfig(epochs=30, batch_size=64, lr=2e-3, patience=5)

    @model_validator(mode="after")
    def _divisible(self) -> SasrecConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) is not a multiple of heads ({self.heads})")
        if self.positions == "rotary" and self.dim // self.heads % 2:
            raise ValueError(f"rotary positions need an even dim per head, not {self.dim} / {self.heads}")
        return self


class PoolConfig(Section):
    """Actors of one kind: between `min` and `max` of them, each with `cpus` and `gpus`."""

    min: Count = 1
    max: Count = 1
    cpus: Annotated[float, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _ordered(self) -> PoolConfig:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class CandidatesConfig(Section):
    """Candidate sets and similar users."""

    size: Annotated[int, Field(ge=2)] = Field(10, description="K: the target and K - 1 negatives")
    sampler: Literal["uniform", "popularity", "sasrec"] = "uniform"
    similar_users: Count = 5
    neighbours_flat_limit: Count = Field(
        200_000, description="users of a domain up to which similar ones are searched for exactly; beyond, by IVF"
    )
    neighbours_nprobe: Count = Field(64, description="inverted lists of about 4 √users that a search looks into")
    max_reject_fraction: Annotated[Fraction, OPERATIONAL] = Field(
        0.05, description="examples for which the catalogue holds too few items that the user never touched"
    )
    sasrec: SasrecConfig = SasrecConfig()
    pool: Annotated[PoolConfig, OPERATIONAL] = PoolConfig()


class EngineConfig(Section):
    """The language model that writes rationales and trees, and the vLLM engine under it."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: Count = 1024
    max_num_seqs: Annotated[Count, OPERATIONAL] = 128
    quantization: str | None = Field(None, description="vLLM's name of a method, e.g. fp8; unset: as the model says")
    adapters: dict[str, str] = Field({}, description="LoRA adapters by name: folders or hub names")
    tensor_parallel: Annotated[Count, OPERATIONAL] = 1
    kv_cache_gb: Annotated[Annotated[float, Field(gt=0)], OPERATIONAL] = Field(1.0, description="CPU only")
    gpu_memory_utilization: Annotated[Annotated[float, Field(gt=0, lt=1)], OPERATIONAL] = 0.85
    compile: Annotated[bool, OPERATIONAL] = Field(False, description="compile and capture graphs: slow start, fast run")
    threads: Annotated[Count | None, OPERATIONAL] = Field(None, description="CPU threads; unset takes every core")
    shards_in_flight: Annotated[Count, OPERATIONAL] = Field(2, description="parts that one engine works on at once")
    max_shard_attempts: Annotated[Count, OPERATIONAL] = Field(
        4, description="a part that was being written when its engine died so many times is rejected"
    )
    pool: Annotated[PoolConfig, OPERATIONAL] = PoolConfig()


class TextConfig(Section):
    """How a history becomes text. The token budget is spent on the newest interactions first."""

    history_tokens: Count = 320
    review_words: Annotated[int, Field(ge=0)] = Field(24, description="words kept of each review; 0 leaves reviews out")


class SamplingConfig(Section):
    """How completions are drawn."""

    max_tokens: Count = 64
    temperature: Temperature = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="texts that end a completion")
    adapter: str | None = Field(None, description="the one of engine.adapters that writes; unset: the model alone")
    min_words: Count = Field(5, description="a shorter completion is degenerate")
    language: str | None = Field("en", description="ISO 639 code of the language to be written in; null: any")
    gates: Annotated[tuple[Gate, ...], DISTINCT] = Field(
        GATES, description="what a completion is refused for; an empty one always is"
    )
    attempts: Count = Field(
        2, description="draws, each with another seed, before a completion is rejected; at temperature 0 there is one"
    )

    @field_validator("language")
    @classmethod
    def _is_known(cls, language: str | None) -> str | None:
        if language is not None and language not in LANGUAGES:
            raise ValueError(f"language '{language}' cannot be told; known are {', '.join(LANGUAGES)}")
        return language


def _template_of(stage: str) -> AfterValidator:
    def check(version: str) -> str:
        if version not in (known := templates.versions(stage)):
            raise ValueError(f"there is no template '{version}'; known are {', '.join(known)}")
        return version

    return AfterValidator(check)


class RationalesConfig(Section):
    """Phase I: why a user chose the target, written with the target in view, for training examples only."""

    template: Annotated[str, _template_of("rationales")] = Field("v1", description="version of the prompt's wording")
    text: TextConfig = TextConfig()
    sampling: SamplingConfig = SamplingConfig()
    max_reject_fraction: Annotated[Fraction, OPERATIONAL] = 0.1


class ThoughtSpaceConfig(Section):
    """Phase I: rationale encoder E1 and history encoder E2, trained by InfoNCE (Eq. 1)."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    shared_tower: bool = Field(False, description="one encoder for both sides")
    negatives: Count | Literal["all"] = Field(10, description="in-batch rationales of other users per anchor")
    inter_domain: Fraction | None = Field(
        None, description="share of the sampled negatives from other domains; unset: as they come in a batch"
    )
    hard_negatives: Fraction = Field(0.0, description="share of the sampled negatives that is the nearest there are")
    temperature: Annotated[float, Field(ge=0.01)] = 0.05
    learned_temperature: bool = Field(False, description="train the temperature as well, from `temperature` on")
    max_tokens: Count = 256
    drop_target: Fraction = Field(0.5, description="chance that the target is left out of a behaviour text in training")
    text: TextConfig = TextConfig(history_tokens=224)
    projected_examples: Count = Field(120, description="held-out examples drawn in the plot of the Thought Space")
    training: TrainingConfig = TrainingConfig(epochs=3, batch_size=32, lr=2e-5)


class TreeConfig(Section):
    """The Tree of Thought: base reason, then `breadths[0]` refinements, `breadths[1]` of each of those, …"""

    template: Annotated[str, _template_of("tree")] = Field("v1", description="version of the prompts' wording")
    breadths: Annotated[tuple[Count, ...], Field(min_length=1)] = (3, 3)
    beam_width: Count | None = Field(
        None,
        description="refine only so many nodes of a level, those that agree best in the Thought Space; unset: all",
    )
    temperatures: tuple[Temperature, ...] | None = Field(
        None, description="of the base reason and of each level of breadths; unset: sampling.temperature for all"
    )
    neighbour_items: Annotated[int, Field(ge=0)] = Field(
        5, description="items of similar users shown to the base reason"
    )
    validation_examples: Count | None = Field(
        None, description="trees for so many validation examples, in whole parts, as only early stopping reads them"
    )
    text: TextConfig = TextConfig()
    sampling: SamplingConfig = SamplingConfig()
    max_reject_fraction: Annotated[Fraction, OPERATIONAL] = 0.1

    @model_validator(mode="after")
    def _one_for_each_level(self) -> TreeConfig:
        levels = 1 + len(self.breadths)
        if self.temperatures is not None and len(self.temperatures) != levels:
            raise ValueError(
                f"temperatures has {len(self.temperatures)} entries for {levels} levels: the base reason and breadths"
            )
        return self


class SelectConfig(Section):
    """Which leaf becomes the reason. One row per example and selector."""

    selectors: Annotated[tuple[Selector, ...], Field(min_length=1), DISTINCT] = Field(
        ("thought_space", "log_likelihood"),
        description="`thought_space`, `sbert`, `encoder_base`: nearest to the behaviour under the trained encoders, "
        "select.sbert_model or the untrained thought_space.model; `log_likelihood`: likeliest under the language "
        "model; `random`: drawn by the example's seed",
    )
    sbert_model: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", description="sentence encoder of the selector `sbert`, used as it is"
    )
    protocol: Literal["deployable", "oracle"] = Field(
        "deployable", description="`oracle` scores leaves against the target too (Eq. 2 as printed): it sees the label"
    )
    pool: Annotated[PoolConfig, OPERATIONAL] = PoolConfig()


class LoraConfig(Section):
    """Low-rank adaptation. `all` also adapts the MLP projections."""

    r: Count = 8
    alpha: Count = 16
    dropout: Fraction = 0.05
    targets: Literal["attention", "all"] = "all"
    last_layers: Count | None = Field(None, description="adapt only so many layers, counted from the head; unset: all")


class RankerConfig(Section):
    """Phase II: LoRA and a scalar head, one logit per candidate, listwise cross-entropy (Eq. 3)."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    variants: Annotated[tuple[Variant, ...], Field(min_length=1), DISTINCT] = (
        "none",
        "base",
        "log_likelihood",
        "thought_space",
    )
    max_tokens: Count = Field(512, description="tokens of a prompt without its candidates")
    candidate_tokens: Count = Field(32, description="tokens kept of a candidate's text")
    reason_tokens: Count = Field(64, description="tokens kept of a reason")
    text: TextConfig = TextConfig()
    lora: LoraConfig = LoraConfig()
    quantization: Literal["nf4"] | None = Field(
        None, description="keep the frozen weights in 4 bits (QLoRA): a quarter of the memory; needs bitsandbytes"
    )
    gradient_checkpointing: Annotated[bool, OPERATIONAL] = False
    training: TrainingConfig = TrainingConfig(epochs=2, batch_size=8, lr=2e-4, precision="bf16")

    @model_validator(mode="after")
    def _cut_or_quantized(self) -> RankerConfig:
        if self.quantization and self.training.zero_stage == 3:
            raise ValueError("training.zero_stage is 3, but quantized weights cannot be cut among workers")
        return self

    def served(self, variant: Variant | None) -> Variant:
        """The variant that ranks for users: the one named, else `thought_space`, else the last one."""
        return variant or ("thought_space" if "thought_space" in self.variants else self.variants[-1])


class EvaluateConfig(Section):
    """Metrics with bootstrap intervals on the stored candidates, and the report."""

    splits: Annotated[tuple[Literal["validation", "test"], ...], Field(min_length=1), DISTINCT] = ("test",)
    bootstrap_samples: Count = 2000
    report_users: Annotated[int, Field(ge=0)] = Field(5, description="users whose tree and ranking the report shows")
    pool: Annotated[PoolConfig, OPERATIONAL] = PoolConfig()
    token_budget: Annotated[Count, OPERATIONAL] = Field(
        CPU_TOKENS, description="tokens in all forward passes under way at once; a GPU takes five times as many"
    )


class ScoreConfig(Section):
    """Batch scoring of users from outside the experiment (`pulse-ray score`)."""

    variant: Variant | None = Field(None, description="which ranker scores; unset: thought_space, else the last one")
    top_n: Count = Field(10, description="items in a user's recommendations")
    retrieve_k: Count = Field(100, description="candidates that SASRec finds for a user who comes without any")
    shard_users: Count = Field(256, description="users in a part of the output: the unit of work and of commit")
    keep_profiles: bool = Field(False, description="also keep each user's history and reason in serve.store")
    max_reject_fraction: Annotated[Fraction, OPERATIONAL] = Field(
        0.1, description="largest share of users that may be set aside"
    )
    pool: Annotated[PoolConfig, OPERATIONAL] = PoolConfig()
    token_budget: Annotated[Count, OPERATIONAL] = Field(
        CPU_TOKENS, description="tokens in all forward passes under way at once; a GPU takes five times as many"
    )


class LimitsConfig(Section):
    """What one request may hold; more is refused."""

    request_bytes: Count = Field(262_144, description="bytes of a body, as they arrive")
    history: Count = Field(200, description="interactions of a history")
    candidates: Count = Field(100, description="candidates of one ranking")
    batch: Count = Field(16, description="rankings in one batch request")


class DeploymentConfig(Section):
    """Replicas of one kind, and how many requests each takes before it is too busy."""

    replicas: PoolConfig = PoolConfig()
    max_ongoing_requests: Count = Field(16, description="requests that a replica works on at once")
    max_queued_requests: Count = Field(64, description="requests that wait for a replica, per caller; more are refused")
    target_ongoing_requests: Annotated[float, Field(gt=0)] = Field(8, description="autoscaling adds replicas above it")


class RankingConfig(DeploymentConfig):
    """The ranker: packed forward passes over as many requests as fit a token budget."""

    adapter: str | None = Field(None, description="folder or URI of another adapter than the run's, to roll out")
    token_budget: Count = Field(CPU_TOKENS, description="packed tokens of the requests that are scored together")
    batch_wait_s: Annotated[float, Field(ge=0)] = Field(0.01, description="a batch that is not full waits for company")
    max_wait_s: Annotated[float, Field(ge=0)] = Field(
        2, description="a request whose turn would come later is refused, as one above max_ongoing_requests would be"
    )


class ReasonerConfig(DeploymentConfig):
    """The reasoner: grows a tree with the run's `engine` where the store has no reason."""

    enabled: bool = False
    time_limit_s: Annotated[float, Field(gt=0)] = Field(8, description="then the ranking goes out without a reason")


class ServeConfig(Section):
    """Online serving (`pulse_ray/serving/`)."""

    host: str = Field("127.0.0.1", description="another one needs tokens")
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    variant: Variant | None = Field(None, description="one of ranker.variants; unset: thought_space, else the last one")
    retrieve_k: Count = Field(20, description="candidates that SASRec finds where a request names none")
    limits: LimitsConfig = LimitsConfig()
    tokens_file: str | None = Field(None, description="file of bearer tokens, one a line")
    tokens_env: str = Field("PULSE_RAY_TOKENS", description="environment variable of bearer tokens, by white space")
    store: str | None = Field(
        None,
        description="`sqlite:///path` or `redis://user@host:port/db`; unset: a SQLite file in the run's folder",
    )
    store_password_env: str = Field("PULSE_RAY_STORE_PASSWORD", description="environment variable of Redis' password")
    retry_after_s: Count = Field(2, description="when who was refused for load may try again")
    timeout_s: Annotated[float, Field(gt=0)] = Field(30, description="a request that takes longer is given up")
    ingress: DeploymentConfig = DeploymentConfig(
        replicas=PoolConfig(cpus=0.5), max_ongoing_requests=64, max_queued_requests=128, target_ongoing_requests=32
    )
    retriever: DeploymentConfig = DeploymentConfig(replicas=PoolConfig(cpus=0.5))
    # More than the ingress takes: `max_wait_s` decides who waits, and sees only what has come to the replica.
    ranker: RankingConfig = RankingConfig(max_ongoing_requests=128)
    reasoner: ReasonerConfig = ReasonerConfig(max_ongoing_requests=4, max_queued_requests=8, target_ongoing_requests=2)

    @field_validator("store")
    @classmethod
    def _known(cls, store: str | None) -> str | None:
        if store is not None and not store.startswith(("sqlite:///", "redis://", "rediss://")):
            raise ValueError(f"'{store}' begins with neither sqlite:/// nor redis:// nor rediss://")
        if store is not None and not store.startswith("sqlite"):
            place = urlsplit(store)
            if place.password is not None or place.query:
                raise ValueError(
                    "an address of Redis takes no password and no options: the password comes from the variable that "
                    "serve.store_password_env names"
                )
            _ = place.port  # It raises what is wrong with a port.
        return store


class Config(Section):
    """A whole experiment."""

    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="the run's folder below `storage`")
    ]
    storage: Annotated[str, OPERATIONAL] = Field("runs", description="folder or URI (s3://, gs://) that holds runs")
    seed: Annotated[int, Field(ge=0)] = 0
    cluster: Annotated[ClusterConfig, OPERATIONAL] = ClusterConfig()
    engine: EngineConfig = EngineConfig()
    prepare: PrepareConfig
    candidates: CandidatesConfig = CandidatesConfig()
    rationales: RationalesConfig = RationalesConfig()
    thought_space: ThoughtSpaceConfig = ThoughtSpaceConfig()
    tree: TreeConfig = TreeConfig()
    select: SelectConfig = SelectConfig()
    ranker: RankerConfig = RankerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    score: ScoreConfig = ScoreConfig()
    serve: Annotated[ServeConfig, OPERATIONAL] = ServeConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        wanted = {v for v in self.ranker.variants if v not in ("none", "base")}
        if missing := sorted(wanted - set(self.select.selectors)):
            raise ValueError(f"ranker.variants needs {missing}, which select.selectors does not list")
        if self.serve.variant not in (None, *self.ranker.variants):
            raise ValueError(f"serve.variant is '{self.serve.variant}', not one of {list(self.ranker.variants)}")
        for name, section in (("rationales", self.rationales), ("tree", self.tree)):
            used = section.text.history_tokens + 3 * section.sampling.max_tokens
            if used >= self.engine.max_model_len:
                raise ValueError(
                    f"{name}.text.history_tokens + 3 × {name}.sampling.max_tokens = {used} leaves no room in "
                    f"engine.max_model_len ({self.engine.max_model_len})"
                )
            if section.sampling.adapter not in (None, *self.engine.adapters):
                raise ValueError(f"{name}.sampling.adapter is '{section.sampling.adapter}', not one of engine.adapters")
        if self.ranker.text.history_tokens + self.ranker.reason_tokens >= self.ranker.max_tokens:
            raise ValueError(
                "ranker.text.history_tokens + ranker.reason_tokens leaves no room for the instruction in "
                "ranker.max_tokens"
            )
        if (grown := self.tree.validation_examples) is not None:
            if "validation" in self.evaluate.splits:
                raise ValueError("evaluate.splits holds validation, so tree.validation_examples must be unset")
            if grown < (self.ranker.training.validation_examples or grown + 1):
                raise ValueError("tree.validation_examples is below ranker.training.validation_examples")
        for name, model in (("candidates.sasrec", self.candidates.sasrec), ("thought_space", self.thought_space)):
            if model.training.zero_stage == 3:
                raise ValueError(f"{name}.training.zero_stage is 3, which only the ranker is large enough for")
        space = self.thought_space
        if space.training.micro_batch_size is not None:
            raise ValueError(
                "thought_space.training takes its negatives from all examples of a step: leave micro_batch_size unset"
            )
        if space.negatives == "all" and (space.inter_domain is not None or space.hard_negatives):
            raise ValueError("thought_space.negatives is 'all', so inter_domain and hard_negatives choose none of them")
        if self.score.variant is not None and self.score.variant not in self.ranker.variants:
            raise ValueError(f"score.variant ({self.score.variant}) is not among ranker.variants")
        if self.thought_space.text.history_tokens >= self.thought_space.max_tokens:
            raise ValueError("thought_space.text.history_tokens must be below thought_space.max_tokens")
        return self

    @property
    def templates(self) -> dict[str, str]:
        """The version of the prompts that each stage writes with, by the stage's name."""
        return {"rationales": self.rationales.template, "tree": self.tree.template}

    def to_json(self) -> str:
        """The resolved configuration, every default written out."""
        return self.model_dump_json(indent=2)

    def resolved(self, keys: Iterable[str]) -> dict[str, Any]:
        """Settings by dotted key, every default written out, as JSON holds them."""
        return {key: to_jsonable_python(attrgetter(key)(self)) for key in keys}

    def model_of(self, selector: Variant) -> str | None:
        """Name of the encoder that a selector takes as it is; None where it takes none, or what the run has trained."""
        return {"sbert": self.select.sbert_model, "encoder_base": self.thought_space.model}.get(selector)

    def fingerprint(self, keys: Iterable[str], inputs: Iterable[str] = ()) -> str:
        """16 hex digits that name what a stage computes.

        Args:
            keys: the settings that the stage reads, e.g. `("seed", "engine", "thought_space.text")`.
            inputs: the fingerprints of the artefacts that it reads.
        """
        settings = {key: _identity(attrgetter(key)(self)) for key in sorted(keys)}
        text = json.dumps([settings, list(inputs)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _identity(value: Any) -> Any:
    """`value` as JSON without operational settings."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            name: _identity(getattr(value, name)) for name in sorted(fields) if OPERATIONAL not in fields[name].metadata
        }
    if isinstance(value, tuple):
        return [_identity(entry) for entry in value]
    return value


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `section.key=value` overrides applied.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, or a value is not allowed.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"no configuration at {path}", remedy="Give the path of a YAML file, e.g. configs/quickstart.yaml"
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder", remedy="Give the path of a YAML file") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}", remedy="Give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f"{path}:{line + 1}" if line is not None else str(path)
        raise ConfigError(
            f"{where} is not valid YAML", remedy="Mend the file; indentation is the usual cause"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no settings", remedy="See configs/quickstart.yaml for an example")
    for override in overrides:
        _apply(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, str(path)) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"override '{override}' is not of the form section.key=value", remedy="E.g. --set tree.breadths=[2,2]"
        )
    *sections, last = key.strip().split(".")
    node: Any = raw
    for name in sections:
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict):
            node = node.setdefault(name, {})
        else:
            node = None
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"override '{override}': '{name}' is not a section", remedy="E.g. --set tree.breadths=[2,2]"
            )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override '{override}' has an unreadable value", remedy="Write the value as in YAML"
        ) from error
    if isinstance(node, list):
        if not last.isdecimal() or int(last) >= len(node):
            raise ConfigError(f"override '{override}': no entry '{last}'", remedy=f"Entries are 0 to {len(node) - 1}")
        node[int(last)] = value
    else:
        node[last] = value


def _explain(error: ValidationError, source: str) -> ConfigError:
    """The first complaint of pydantic as one line with the key's path, and what is allowed there."""
    first = error.errors(include_url=False)[0]
    # pydantic puts the tags of unions into the path; no such keys stand in the file.
    path = [
        str(part) for part in first["loc"] if part not in SOURCES and str(part).isidentifier() | isinstance(part, int)
    ]
    key = ".".join(path) or "the configuration"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Known keys there: {', '.join(known)}"
        return ConfigError(f"{source}: unknown key '{key}'{more}", remedy=hint)
    if first["type"] == "missing":
        return ConfigError(f"{source}: '{key}' is missing{more}", remedy="Add it; see configs/quickstart.yaml")
    if first["type"] == "value_error":
        return ConfigError(f"{source}: {key}: {first['ctx']['error']}{more}", remedy="Change one of the values")
    value = json.dumps(first["input"], default=str)
    value = value if len(value) <= 60 else value[:57] + "..."
    return ConfigError(f"{source}: '{key}' is {value}{more}", remedy=first["msg"])


def _keys_at(path: Sequence[str | int]) -> list[str]:
    """Keys of the section at a path of pydantic's."""
    kind: type[BaseModel] = Config
    for part in path:
        if part == "domains":
            kind = DomainConfig
        elif part in SOURCES:
            kind = SOURCES[part]
        elif part in kind.model_fields and isinstance(inner := kind.model_fields[str(part)].annotation, type):
            kind = inner
    return list(kind.model_fields)
