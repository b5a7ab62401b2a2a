"""Users per second that a ranker scores and trains on: packed rows against the other ways to do it.

    python -m benchmarks.ranker            # SmolLM2-135M and a Phi-3 of 12M parameters: about an hour on two cores
    python -m benchmarks.ranker --quick    # the Phi-3, 10 candidates, fp32
    python -m benchmarks.ranker --smoke    # the Phi-3, fp32, one turn, vLLM not compiled: the paths, not the figures

Prompts have 400 tokens and candidates 24, all of them random. The peers are a sequence for each candidate in the same
framework, in batches of the size that is fastest here, in scoring and in training, and in scoring with passes beside
each other, as packed rows have them, where that is faster; `vllm.LLM.classify` on the merged model, compiled, with its
prefix cache, and with the tokens in a step that are fastest here; and packed rows, one in a pass, under a dense mask
that Python builds row by row. A training step is forward and backward through LoRA on every layer, for one user of 10
candidates. Every system has fresh users in every turn, and the systems take turns: vLLM has processes of its own, which
wait while others work. All must give the same logits for a user.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Phi3Config, Phi3ForCausalLM

from benchmarks._report import Size, parser, report, size
from pulse_ray.config import CPU_TOKENS, RankerConfig
from pulse_ray.ranker import attention, model
from pulse_ray.ranker.packing import TokenRow, pack
from pulse_ray.ranker.scorer import Scorer, in_threads

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
AT_ONCE = (1, 5, 10)
"""Sequences in a batch, of which the separate peer has the best."""
THREADS = (1, 2)
"""Batches of that peer beside each other, of which it has the better."""
VOCABULARY = 30_000
Figures = dict[str, Any]
Way = TypeVar("Way")


class Lengths(NamedTuple):
    """Tokens of a prompt and of a candidate."""

    prompt: int
    candidate: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What to measure, and how often."""

    only: str | None
    """One of the two models; None stands for what the command line says."""
    precisions: tuple[str, ...]
    counts: tuple[int, ...]
    """Candidates of a user."""
    lengths: Lengths
    turns: int
    step_tokens: tuple[int, ...]
    """Tokens in a step of vLLM, of which it has the better; it would take 4,096."""
    compiled: bool
    """Whether vLLM compiles the model."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the processes beside this one."""


FULL = Sizes(
    only=None,
    precisions=("fp32", "bf16"),
    counts=(10, 20, 100),
    lengths=Lengths(prompt=400, candidate=24),
    turns=3,
    step_tokens=(1024, 4096),
    compiled=True,
)
QUICK = replace(FULL, only="phi3", precisions=("fp32",), counts=(10,))
# Compiling, and a process for vLLM's engine beside that of its client, take longer than all else.
SMOKE = replace(
    QUICK,
    counts=FULL.counts,
    lengths=Lengths(prompt=48, candidate=8),
    turns=1,
    step_tokens=(1024,),
    compiled=False,
    environment={"TORCH_COMPILE_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
)
SIZES: Mapping[Size, Sizes] = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


def main() -> int:
    """Measure both models and print the report."""
    command_line = parser("ranker", __doc__, quick="the Phi-3, 10 candidates, fp32")
    command_line.add_argument("--only", choices=("smollm2", "phi3"), help="one of the two models in the full size")
    command_line.add_argument("--child", choices=("vllm", "memory"), help=argparse.SUPPRESS)
    command_line.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = command_line.parse_args()
    if options.child:
        {"vllm": _serve_vllm, "memory": _memory}[options.child](**options.settings)
        return 0
    chosen = size(options)
    sizes = SIZES[chosen]
    only = sizes.only or options.only
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("smollm2", "phi3"):
            for precision in sizes.precisions:
                if only in (None, name):
                    case = Case(Path(folder) / name / precision, name, precision)
                    figures[f"{name}_{precision}"] = _compare(case, sizes)
    return report("ranker", chosen, figures, _bars(figures))


class Case:
    """A model in a precision: an untrained adapter, and the merged model for vLLM."""

    def __init__(self, folder: Path, name: str, precision: str) -> None:
        folder.mkdir(parents=True)
        base = str(_phi3(folder / "base")) if name == "phi3" else SMOLLM2
        self.name, self.precision, self.folder = name, precision, folder
        settings = {"model": base, "training": {"precision": precision}, "lora": {"dropout": 0.0}}
        self.config = RankerConfig.model_validate(settings)
        ranker = model.create(self.config)
        model.save(ranker, folder / "adapter", self.config)
        merged = ranker.model.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        model.tokenizer(base).save_pretrained(folder / "merged")
        (folder / "ranker.json").write_text(self.config.model_dump_json())


def _phi3(folder: Path) -> Path:
    """A Phi-3 of 12M parameters with random weights."""
    tokenizer = model.tokenizer(SMOLLM2)
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=32_064,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _users(lengths: Lengths, count: int, candidates: int, seed: int) -> list[TokenRow]:
    draws = np.random.default_rng((candidates, seed))

    def text(length: int) -> list[int]:
        return [int(token) for token in draws.integers(100, VOCABULARY, length)]

    return [
        TokenRow(prompt=text(lengths.prompt), candidates=[text(lengths.candidate) for _ in range(candidates)])
        for _ in range(count)
    ]


def _compare(case: Case, sizes: Sizes) -> Figures:
    scorer = Scorer(case.folder / "adapter", case.config, {})
    ways = {(at_once, threads): _separate(scorer, at_once, threads) for at_once in AT_ONCE for threads in THREADS}
    separate = _fastest(ways, _users(sizes.lengths, 1, sizes.counts[0], 0))
    found: Figures = {}
    with contextlib.ExitStack() as engines:
        vllm = {tokens: engines.enter_context(_Vllm(case, tokens, sizes)) for tokens in sizes.step_tokens}
        for count in sizes.counts:
            found[str(count)] = _scored(scorer, count, separate, vllm, sizes)
            print(case.name, case.precision, count, found[str(count)], file=sys.stderr, flush=True)
    trained = _trained(case, sizes)
    found["training"] = trained | {f"{how}_peak_mib": _peak_mib(case, how, sizes) for how in ("packed", "separate")}
    print(case.name, case.precision, found["training"], file=sys.stderr, flush=True)
    return found


def _load(candidates: int) -> int:
    """Users in a turn of the systems that compute prompts once."""
    return max(2, 80 // candidates)


def _scored(
    scorer: Scorer, candidates: int, separate: tuple[int, int], vllm: dict[int, _Vllm], sizes: Sizes
) -> Figures:
    """Users per second of every system, and how far their logits are from those of separate sequences.

    Args:
        separate: of that peer, sequences in a batch, and batches beside each other.
        vllm: its engines, by the tokens in a step.
    """
    load = _load(candidates)
    systems: dict[str, tuple[Callable[[list[TokenRow]], Any], int]] = {
        "packed": (lambda users: scorer.score_tokens(users, CPU_TOKENS), load),
        "separate": (_separate(scorer, *separate), 1),
        "mask_in_python": (_masked(scorer), max(1, load // 4)),
    }
    systems |= {f"vllm_{tokens}": (engine.score, load) for tokens, engine in vllm.items()}
    rates: dict[str, list[float]] = {name: [] for name in systems}
    logits: dict[str, np.ndarray] = {}
    for name, (score, users) in systems.items():
        if name != "separate":  # That one is warm, and slow.
            score(_users(sizes.lengths, users, candidates, 0))
    for turn in range(1, 1 + sizes.turns):
        for name, (score, users) in systems.items():
            rows = _users(sizes.lengths, users, candidates, turn)
            started = time.perf_counter()
            first = score(rows)[0]
            rates[name].append(users / (time.perf_counter() - started))
            logits[name] = np.array(first)
    median = {name: statistics.median(found) for name, found in rates.items()}
    step_tokens = max(vllm, key=lambda tokens: median[f"vllm_{tokens}"])
    right = logits.pop("separate")
    by_turn = [ours / theirs for ours, theirs in zip(rates["packed"], rates[f"vllm_{step_tokens}"], strict=True)]
    return {
        "separate_at_once": separate,
        "users_per_s": {name: round(rate, 3) for name, rate in median.items()},
        "of_token_ratio": round(median["packed"] / median["separate"] / _token_ratio(sizes.lengths, candidates), 3),
        "over_vllm": round(median["packed"] / median[f"vllm_{step_tokens}"], 2),
        "over_vllm_by_turn": [round(ratio, 2) for ratio in by_turn],
        "over_mask_in_python": round(median["packed"] / median["mask_in_python"], 2),
        "logits_apart": {name: float(np.abs(found - right).max()) for name, found in logits.items()},
        "logits_std": float(right.std()),
        "vllm_cached_tokens": vllm[step_tokens].cached_tokens,
        "vllm_step_tokens": step_tokens,
    }


def _fastest(ways: dict[Way, Callable[[list[TokenRow]], Any]], users: list[TokenRow]) -> Way:
    """Which of some ways is, the better of two turns each: the first warms up."""
    return min(ways, key=lambda name: min(_seconds(ways[name], users) for _ in range(2)))


def _token_ratio(lengths: Lengths, candidates: int) -> float:
    return candidates * (lengths.prompt + lengths.candidate) / (lengths.prompt + candidates * lengths.candidate)


def _seconds(score: Callable[[list[TokenRow]], Any], users: list[TokenRow]) -> float:
    started = time.perf_counter()
    score(users)
    return time.perf_counter() - started


def _separate(scorer: Scorer, at_once: int, threads: int) -> Callable[[list[TokenRow]], list[np.ndarray]]:
    """A sequence for each candidate.

    Args:
        at_once: sequences in a batch.
        threads: batches beside each other.
    """

    def score(users: list[TokenRow]) -> list[np.ndarray]:
        scorer.ranker.model.get_base_model().set_attn_implementation("sdpa")
        found = []
        for user in users:
            logits = np.zeros(len(user.candidates), np.float32)

            @torch.inference_mode()
            def fill(places: list[int], user: TokenRow = user, logits: np.ndarray = logits) -> None:
                some = TokenRow(prompt=user.prompt, candidates=[user.candidates[place] for place in places])
                (batch,) = _sequences(scorer.ranker, some, len(places))
                logits[places] = batch.float().numpy()

            every = range(len(user.candidates))
            in_threads(fill, [list(every[start : start + at_once]) for start in every[::at_once]], threads)
            found.append(logits)
        scorer.ranker.model.get_base_model().set_attn_implementation(attention.NAME)
        return found

    return score


def _sequences(ranker: model.PackedRanker, user: TokenRow, at_once: int) -> Iterator[torch.Tensor]:
    for start in range(0, len(user.candidates), at_once):
        tokens = torch.tensor([user.prompt + candidate for candidate in user.candidates[start : start + at_once]])
        yield ranker.model(input_ids=tokens).logits[:, 0]


def _masked(scorer: Scorer) -> Callable[[list[TokenRow]], list[np.ndarray]]:
    """One packed row at a time under a dense mask."""

    @torch.inference_mode()
    def score(users: list[TokenRow]) -> list[np.ndarray]:
        base = scorer.ranker.model.get_base_model()
        base.set_attn_implementation("sdpa")
        found = []
        for user in users:
            batch = pack([user])
            hidden_1LD = getattr(base, base.base_model_prefix)(
                input_ids=batch.input_ids_T[None],
                position_ids=batch.positions_T[None],
                attention_mask=_mask_row_by_row(user),
            ).last_hidden_state
            found.append(base.score(hidden_1LD[0, batch.ends_BK[0]])[:, 0].float().numpy())
        base.set_attn_implementation(attention.NAME)
        return found

    return score


def _mask_row_by_row(user: TokenRow) -> torch.Tensor:
    prompt, length = len(user.prompt), user.packed_length
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    for row in range(prompt):
        mask[0, 0, row, : row + 1] = True
    start = prompt
    for candidate in user.candidates:
        for row in range(start, start + len(candidate)):
            mask[0, 0, row, :prompt] = True
            mask[0, 0, row, start : row + 1] = True
        start += len(candidate)
    return mask


def _trained(case: Case, sizes: Sizes) -> Figures:
    """Steps per second of one user, packed and separate, and how far their gradients are apart."""
    ranker = model.create(case.config)
    torch.manual_seed(0)
    for name, parameter in ranker.named_parameters():
        if "lora_B" in name:  # Zero at the start: the gradients of half of the weights would be, too.
            torch.nn.init.normal_(parameter, std=0.02)
    ways: dict[int, Callable[[list[TokenRow]], Any]] = {
        batch: lambda users, batch=batch: _step(ranker, batch, users[0])  # type: ignore[misc]
        for batch in AT_ONCE
    }
    at_once = _fastest(ways, _users(sizes.lengths, 1, 10, 0))
    seconds: dict[str, list[float]] = {"packed": [], "separate": []}
    gradients: dict[str, torch.Tensor] = {}
    _step(ranker, None, _users(sizes.lengths, 1, 10, 0)[0])
    for turn in range(1, 1 + sizes.turns):
        for how, taken in seconds.items():
            (user,) = _users(sizes.lengths, 1, 10, turn)
            started = time.perf_counter()
            gradients[how] = _step(ranker, None if how == "packed" else at_once, user)
            taken.append(time.perf_counter() - started)
    apart = (gradients["packed"] - gradients["separate"]).norm() / gradients["separate"].norm()
    median = {how: statistics.median(taken) for how, taken in seconds.items()}
    return {
        "separate_at_once": at_once,
        "packed_over_separate": round(median["separate"] / median["packed"], 2),
        "steps_per_s": {how: round(1 / taken, 3) for how, taken in median.items()},
        "gradients_apart": float(apart),
    }


def _step(ranker: model.PackedRanker, at_once: int | None, user: TokenRow) -> torch.Tensor:
    """Forward and backward for one user, packed or with so many sequences at once. Returns the gradient, flat.

    The softmax joins all candidates, so the graphs of all sequences live until the backward pass.
    """
    if at_once is None:
        logits_BK = ranker(pack([user]))
    else:
        base = ranker.model.get_base_model()
        base.set_attn_implementation("sdpa")
        logits_BK = torch.cat(list(_sequences(ranker, user, at_once)))[None].float()
        base.set_attn_implementation(attention.NAME)
    loss = F.cross_entropy(logits_BK, torch.tensor([3]))
    trainable = [parameter for parameter in ranker.parameters() if parameter.requires_grad]
    return torch.cat([one.float().flatten() for one in torch.autograd.grad(loss, trainable)])


def _child(which: str, case: Case, sizes: Sizes, **settings: Any) -> subprocess.Popen[str]:
    """A process of this module, which reads and writes lines of JSON."""
    settings |= {"folder": str(case.folder)}
    command = [sys.executable, "-m", "benchmarks.ranker", "--child", which, "--settings", json.dumps(settings)]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, **sizes.environment, "PYTHONPATH": root}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True
    )


def _answer(child: subprocess.Popen[str]) -> Figures:
    """The next line of JSON among what a process prints."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith('{"'):
            return dict(json.loads(line))
    raise RuntimeError(f"{child.args} gave no answer: exit status {child.wait()}")


def _peak_mib(case: Case, how: str, sizes: Sizes) -> float:
    with _child("memory", case, sizes, how=how, lengths=sizes.lengths) as child:
        return float(_answer(child)["peak_mib"])


def _memory(folder: str, how: str, lengths: Sequence[int]) -> None:
    """Print what a training step adds to the memory of a process at its peak, which is forgotten before it."""
    config = RankerConfig.model_validate_json((Path(folder) / "ranker.json").read_text())
    ranker = model.create(config)
    at_once = None if how == "packed" else 1
    _step(ranker, at_once, TokenRow(prompt=[1] * 8, candidates=[[1]] * 4))  # What is loaded once counts for neither.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    _step(ranker, at_once, _users(Lengths(*lengths), 1, 10, 0)[0])
    print(json.dumps({"peak_mib": round((_status_kib("VmHWM") - before) / 1024, 1)}))


def _status_kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


class _Vllm:
    """An engine in a process of its own.

    Attributes:
        cached_tokens: of the prompts of the first user's candidates, when they were last scored.
    """

    def __init__(self, case: Case, step_tokens: int, sizes: Sizes) -> None:
        self._case, self._step_tokens, self._sizes = case, step_tokens, sizes
        self.cached_tokens = 0

    def __enter__(self) -> Self:
        settings = {"step_tokens": self._step_tokens, "compiled": self._sizes.compiled}
        self._child = _child("vllm", self._case, self._sizes, **settings)
        _answer(self._child)
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate()

    def score(self, users: list[TokenRow]) -> list[list[float]]:
        """Logits of every user's candidates."""
        assert self._child.stdin is not None
        print(json.dumps([[row.prompt, row.candidates] for row in users]), file=self._child.stdin, flush=True)
        found = _answer(self._child)
        self.cached_tokens = found["cached_tokens"]
        return list(found["logits"])


def _serve_vllm(folder: str, step_tokens: int, compiled: bool) -> None:
    """Score the users of each line that is read.

    Args:
        step_tokens: in a step of the engine, at most.
        compiled: whether the engine compiles the model.
    """
    from pulse_ray.config import EngineConfig
    from pulse_ray.generation.engine import prepare_environment, vllm_arguments

    config = RankerConfig.model_validate_json((Path(folder) / "ranker.json").read_text())
    dtype = "bfloat16" if config.training.precision == "bf16" else "float32"
    settings = {"model": config.model, "dtype": dtype, "max_model_len": 512, "compile": compiled}
    engine = EngineConfig.model_validate(settings)
    prepare_environment(engine)
    from vllm import LLM, PoolingParams, TokensPrompt

    # The smallest blocks that vLLM has on CPU: what of the prompt does not fill one is computed for every candidate.
    arguments = vllm_arguments(engine, f"{folder}/merged") | {"block_size": 32, "max_num_batched_tokens": step_tokens}
    llm = LLM(**arguments, runner="pooling", convert="classify", disable_log_stats=True)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        users = json.loads(line)
        prompts = [
            TokensPrompt(prompt_token_ids=prompt + candidate)
            for prompt, candidates in users
            for candidate in candidates
        ]
        found = list(llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False))
        logits = iter(one.outputs.probs[0] for one in found)
        cached = sum(int(one.num_cached_tokens or 0) for one in found[: len(users[0][1])])
        answer = {"logits": [[next(logits) for _ in candidates] for _, candidates in users], "cached_tokens": cached}
        print(json.dumps(answer), flush=True)


def _bars(figures: Figures) -> dict[str, dict[str, Any]]:
    bars: dict[str, dict[str, Any]] = {}

    def bar(name: str, value: float, least: float) -> None:
        bars[name] = {"value": value, "bar": least, "holds": value >= least}

    def at_most(name: str, value: float, most: float) -> None:
        bars[name] = {"value": value, "bar": most, "holds": value <= most}

    for name, found in figures.items():
        for count in (str(count) for count in FULL.counts if str(count) in found):
            bar(f"{name}_{count}_of_token_ratio", found[count]["of_token_ratio"], 0.85)
            bar(f"{name}_{count}_over_vllm", found[count]["over_vllm"], 1.5 if count == "100" else 1.1)
            if "fp32" in name:
                for system, apart in found[count]["logits_apart"].items():
                    # vLLM has the merged model, whose sums are others.
                    most = 1e-3 if system.startswith("vllm") else 1e-4
                    at_most(f"{name}_{count}_{system}_logits_apart", apart, most)
        bar(f"{name}_training", found["training"]["packed_over_separate"], 4)
        if "fp32" in name:
            at_most(f"{name}_gradients_apart", found["training"]["gradients_apart"], 1e-3)
    return bars


if __name__ == "__main__":
    sys.exit(main())
