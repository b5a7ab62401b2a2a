"""Online ranking under load: capacity, overload, and packed batches against separate sequences.

    python -m benchmarks.serving            # ten minutes on two cores
    python -m benchmarks.serving --quick    # three minutes, and less certain
    python -m benchmarks.serving --smoke    # a tiny random model and some seconds of load: the paths, not the figures

`--help` says what is measured, and what has to hold.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._report import Size, parser, report, size

if TYPE_CHECKING:
    from benchmarks._load import Load
    from pulse_ray.config import Config
    from pulse_ray.serving.app import Ranker

DESCRIPTION = """
Serves SmolLM2-135M in fp32 with an untrained adapter on this machine's loopback, as `pulse-ray serve` does, and asks
for rankings of 20 candidates, as many as the service finds by itself, for users of the synthetic shop (some 390 tokens
of history and reason, 22 of each candidate):

  closed loop   1, 8 and 64 clients that wait for each answer, in turn, several rounds. The best rate is the capacity.
  open loop     requests at 1.5 times the capacity that wait for nothing; then a burst of some 300 at once, more than
                the application lets in.
  peer          the same model and application; the ranker takes one request at a time, and runs a sequence for
                each candidate (all in one padded batch or one by one, whichever is faster here). Also with 10
                candidates, where packing saves less; that ratio is reported and has no bar.
"""
BARS = """
What has to hold: the peer gives the same logits; nothing hangs; no status but 200, 429 and 503, and those two say
when to come again; under overload some are refused, and the p99 of the accepted is at most 3 times that at capacity;
packed batches answer at least 5 times as many requests a second as the peer.

The last line of output is one JSON object; the exit code is 1 when a bar does not hold.
"""

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CLIENTS = (1, 8, 64)
PEER_CLIENTS = 2
"""One request is worked on, and the next one waits: the peer never stands still."""
OVERLOAD = 1.5
CANDIDATES = 20
BURST_RATE, BURST_S = 3000, 0.1
"""A burst: requests a second, for so many seconds."""
FEW_CANDIDATES = 10
FEW_CLIENTS = 8
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What to serve, and how long to measure."""

    model: str | None
    """None stands for a tiny model with random weights."""
    rounds: int
    closed_s: float
    """Seconds of each closed loop in each round."""
    open_s: float
    peer_s: float
    few_s: float
    """Seconds with `FEW_CANDIDATES`, for each of the two."""


FULL = Sizes(model=MODEL, rounds=3, closed_s=20, open_s=90, peer_s=70, few_s=35)
QUICK = Sizes(model=MODEL, rounds=1, closed_s=10, open_s=20, peer_s=20, few_s=10)
SMOKE = Sizes(model=None, rounds=2, closed_s=0.5, open_s=2, peer_s=1, few_s=1)
SIZES: Mapping[Size, Sizes] = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit code."""
    command_line = parser("serving", DESCRIPTION, quick="three minutes in place of ten, and less certain")
    command_line.epilog = BARS
    chosen = size(command_line.parse_args(arguments))
    sizes = SIZES[chosen]

    from benchmarks import _shop
    from benchmarks._separate import SeparateRanker
    from pulse_ray.serving.app import Ranker

    with tempfile.TemporaryDirectory(prefix="pulse-ray-serving-") as folder:
        _say("making a run to serve")
        config = _config(folder, sizes.model or _tiny(folder))
        _shop.make(config, SEED)
        bodies, few = (_shop.requests(candidates, SEED) for candidates in (CANDIDATES, FEW_CANDIDATES))
        ours, ours_few, overload, burst, packed = _ours(config, Ranker, bodies, few, sizes)
        peer, peer_few, separate, at_once = _peer(config, SeparateRanker, bodies, few, sizes)
        shapes = _shapes(config, bodies)
    best = max(ours, key=lambda clients: ours[clients].rate)
    figures = {
        "model": f"{sizes.model or 'random weights'}, fp32, LoRA",
        "prompt_tokens_median": shapes[0],
        "candidate_tokens_median": shapes[1],
        "candidates": CANDIDATES,
        "closed_loop": {str(clients): load.figures() for clients, load in ours.items()},
        "capacity_requests_per_s": round(ours[best].rate, 3),
        "capacity_clients": best,
        "open_loop": {"times_capacity": OVERLOAD, **overload.figures()},
        "burst": burst.figures(),
        "peer": {"sequences": at_once, "clients": PEER_CLIENTS, **peer.figures()},
        "few_candidates": {
            "candidates": FEW_CANDIDATES,
            "packed": {"clients": FEW_CLIENTS, **ours_few.figures()},
            "peer": {"clients": PEER_CLIENTS, **peer_few.figures()},
            "packed_requests_per_s_over_separate": round(ours_few.rate / peer_few.rate, 2)
            if peer_few.accepted
            else None,
        },
    }
    loads = [*ours.values(), ours_few, overload, burst, peer, peer_few]
    return report("serving", chosen, figures, _bars(loads, ours[best], overload, peer, packed, separate))


def _tiny(folder: str) -> str:
    from tests import tiny

    return str(tiny.make(Path(folder, "tiny")))


def _config(folder: str, model: str) -> Config:
    from pulse_ray.config import Config

    return Config.model_validate(
        {
            "name": "serving",
            "storage": folder,
            "prepare": {"domains": [{"name": "shop", "source": {"kind": "synthetic"}}]},
            "ranker": {"model": model, "variants": ["thought_space"], "training": {"precision": "fp32"}},
            "serve": {"port": _free_port()},
        }
    )


def _ours(
    config: Config, ranker: type[Ranker], bodies: Sequence[Any], few: Sequence[Any], sizes: Sizes
) -> tuple[dict[int, Load], Load, Load, Load, dict[str, float]]:
    """Closed loops by the number of clients, one with few candidates, the open loop, the burst, and some logits."""
    from benchmarks._load import Load, closed, open_
    from pulse_ray.serving.app import serving

    loops = {clients: Load() for clients in CLIENTS}
    few_load, overload, burst = Load(), Load(), Load()
    _say("starting the packed ranker")
    with serving(config, ranker) as address:
        logits = _logits(address, bodies[0])
        for number in range(sizes.rounds):
            for clients, load in loops.items():
                closed(load, f"{address}/v1/rank", bodies, clients=clients, seconds=sizes.closed_s)
                _say(f"round {number + 1}, {clients} clients: {load.rates[-1]:.2f} requests/s, p99 {load.p99_s:.2f} s")
        rate = OVERLOAD * max(load.rate for load in loops.values())
        open_(overload, f"{address}/v1/rank", bodies, rate=rate, seconds=sizes.open_s, seed=SEED)
        _say(
            f"{rate:.2f} requests/s offered: {overload.rate:.2f} accepted, {overload.statuses[429]} of {overload.sent} "
            f"refused, p99 {overload.p99_s:.2f} s"
        )
        open_(burst, f"{address}/v1/rank", bodies, rate=BURST_RATE, seconds=BURST_S, seed=SEED)
        _say(f"burst: {burst.accepted} accepted, {burst.statuses[429]} of {burst.sent} refused")
        closed(few_load, f"{address}/v1/rank", few, clients=FEW_CLIENTS, seconds=sizes.few_s)
        _say(f"{FEW_CANDIDATES} candidates: {few_load.rate:.2f} requests/s, p99 {few_load.p99_s:.2f} s")
    return loops, few_load, overload, burst, logits


def _peer(
    config: Config, ranker: type[Ranker], bodies: Sequence[Any], few: Sequence[Any], sizes: Sizes
) -> tuple[Load, Load, dict[str, float], str]:
    """The peer's closed loops, its logits of the same request, and how many sequences it runs at once."""
    import httpx

    from benchmarks._load import HANG_S, Load, closed
    from pulse_ray.serving.app import serving

    # Its slow passes may take their time, and `retrieve_k` tells how many candidates warm it up.
    patient = config.serve.model_copy(update={"timeout_s": 0.75 * HANG_S, "port": _free_port(), "retrieve_k": 4})
    load, few_load = Load(), Load()
    _say("starting the peer")
    with serving(config.model_copy(update={"serve": patient}), ranker) as address:
        logits = _logits(address, bodies[0])
        at_once = httpx.get(f"{address}/readyz", timeout=HANG_S).json()["model_version"].rpartition(", ")[2]
        closed(load, f"{address}/v1/rank", bodies, clients=PEER_CLIENTS, seconds=sizes.peer_s)
        _say(f"peer, {at_once}: {load.rate:.3f} requests/s, p99 {load.p99_s:.2f} s")
        closed(few_load, f"{address}/v1/rank", few, clients=PEER_CLIENTS, seconds=sizes.few_s)
        _say(f"peer, {FEW_CANDIDATES} candidates: {few_load.rate:.3f} requests/s, p99 {few_load.p99_s:.2f} s")
    return load, few_load, logits, at_once


def _bars(
    loads: Sequence[Load],
    capacity: Load,
    overload: Load,
    peer: Load,
    packed: dict[str, float],
    separate: dict[str, float],
) -> dict[str, dict[str, Any]]:
    wrong = sum(count for load in loads for status, count in load.statuses.items() if status not in (200, 429, 503))
    difference = max(abs(packed[item] - separate[item]) for item in packed)
    most: dict[str, tuple[float, float]] = {
        "logit_difference": (difference, 1e-4),
        "hangs": (sum(load.hangs for load in loads), 0),
        "connection_errors": (sum(load.connection_errors for load in loads), 0),
        "other_statuses_than_200_429_503": (wrong, 0),
        "refusals_without_retry_after": (sum(load.without_retry_after for load in loads), 0),
        "overload_p99_over_capacity_p99": (overload.p99_s / capacity.p99_s, 3),
    }
    least: dict[str, tuple[float, float]] = {
        "overload_refused": (overload.statuses[429] + overload.statuses[503], 1),
        "packed_requests_per_s_over_separate": (capacity.rate / peer.rate if peer.accepted else 0.0, 5),
    }
    bars = {name: {"value": value, "bar": f"<= {bar:g}", "holds": value <= bar} for name, (value, bar) in most.items()}
    bars |= {
        name: {"value": value, "bar": f">= {bar:g}", "holds": value >= bar} for name, (value, bar) in least.items()
    }
    for bar in bars.values():
        bar["value"] = float(f"{bar['value']:.3g}")
    return bars


def _logits(address: str, body: Any) -> dict[str, float]:
    import httpx

    answer = httpx.post(f"{address}/v1/rank", json=body, timeout=120)
    answer.raise_for_status()
    return {item["item_id"]: item["logit"] for item in answer.json()["items"]}


def _shapes(config: Config, bodies: Sequence[Any]) -> tuple[int, int]:
    """Median tokens of a prompt and of a candidate."""
    import numpy as np

    from benchmarks import _shop
    from pulse_ray import catalogue
    from pulse_ray.ranker import model
    from pulse_ray.ranker.packing import PromptEncoder
    from pulse_ray.ranker.prompts import RankRow
    from pulse_ray.schema import History
    from pulse_ray.serving.filling import store_address
    from pulse_ray.serving.store import open_store
    from pulse_ray.workspace import Workspace

    items = catalogue.load(Workspace(config.storage, config.name).artefact("items"))[_shop.DOMAIN]
    encoder, store = (
        PromptEncoder(model.tokenizer(config.ranker.model), config.ranker),
        open_store(store_address(config), config.name),
    )
    rows = []
    for body in bodies:
        profile = store.get(_shop.DOMAIN, body["user_id"])
        assert profile is not None
        history = History(example_id="", domain=_shop.DOMAIN, user_id="", interactions=profile.history)
        candidates = tuple(items[item] for item in body["candidates"])
        rows.append(encoder.encode(RankRow(history=history, reason=_shop.REASON, candidates=candidates), items))
    store.close()
    lengths = [len(candidate) for row in rows for candidate in row.candidates]
    return int(np.median([len(row.prompt) for row in rows])), int(np.median(lengths))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
