"""Configuration: what is refused and how, round trips, and which settings name a result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pulse_ray.config import Config, load
from pulse_ray.errors import ConfigError
from pulse_ray.pipeline import STAGES
from pulse_ray.scoring.job import SPEC as SCORE

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"

OPERATIONAL = (
    "storage",
    "cluster",
    "prepare.downloads",
    "prepare.preset",
    "prepare.read_cpus",
    "prepare.read_block_kib",
    "prepare.read_batch_rows",
    "engine.max_num_seqs",
    "engine.tensor_parallel",
    "engine.kv_cache_gb",
    "engine.gpu_memory_utilization",
    "engine.compile",
    "engine.threads",
    "engine.shards_in_flight",
    "engine.max_shard_attempts",
    "engine.pool",
    "candidates.pool",
    "candidates.max_reject_fraction",
    "rationales.max_reject_fraction",
    "tree.max_reject_fraction",
    "candidates.sasrec.training.workers",
    "thought_space.training.workers",
    "select.pool",
    "ranker.training.workers",
    "ranker.gradient_checkpointing",
    "evaluate.pool",
    "evaluate.token_budget",
    "score.max_reject_fraction",
    "score.pool",
    "score.token_budget",
    "serve",
)
"""Settings that say where and how fast, not what comes out: a run may change them half way."""


@pytest.mark.parametrize(
    ("override", "place", "remedy"),
    [
        ("tree.breadth=[2]", "unknown key 'tree.breadth'", "breadths"),
        ("treee.breadths=[2]", "unknown key 'treee'", "tree"),
        ("prepare.domains.0.source.user=3", "unknown key 'prepare.domains.0.source.user'", "users"),
        ("seed=many", "'seed'", "integer"),
        ("tree.breadths=3", "'tree.breadths'", "tuple"),
        ("tree.breadths=[2,0]", "'tree.breadths.1'", "greater than or equal to 1"),
        ("engine.dtype=int3", "'engine.dtype'", "bfloat16"),
        ("ranker.lora.dropout=1.5", "'ranker.lora.dropout'", "less than or equal to 1"),
        ("prepare.domains=[]", "'prepare.domains'", "at least 1"),
        ("prepare.domains.0.source.kind=shop", "prepare.domains.0.source", "amazon2018"),
        ("tree.temperatures=[0.5,0.5,0.5]", "temperatures has 3 entries for 2 levels", "Change"),
        ("tree.beam_width=0", "'tree.beam_width'", "greater than or equal to 1"),
        ("ranker.variants=[none,sbert,random]", "ranker.variants needs ['random', 'sbert']", "Change"),
        ("select.selectors=[thought_space,base]", "'select.selectors.1'", "'encoder_base'"),
        ("select.selectors=[random,random]", "selectors repeat", "Change"),
        ("select.selectors=[log_likelihood]", "ranker.variants needs ['thought_space']", "Change"),
        ("engine.max_model_len=128", "leaves no room in engine.max_model_len (128)", "Change"),
        ("ranker.max_tokens=64", "leaves no room for the instruction in ranker.max_tokens", "Change"),
        ("candidates.sasrec.heads=7", "dim (32) is not a multiple of heads (7)", "Change"),
        ("name=a/b", "'name'", "pattern"),
        ("name=..", "'name'", "pattern"),
        ("prepare.domains.0.source.interactions=x", "unknown key 'prepare.domains.0.source.interactions'", "users"),
        ("thought_space.negatives=0", "'thought_space.negatives'", "greater than or equal to 1"),
        ("thought_space.training.micro_batch_size=2", "negatives from all examples of a step", "Change"),
        ("ranker={quantization: nf4, training: {zero_stage: 3}}", "quantized weights cannot be cut among", "Change"),
        ("ranker.training.zero_stage=4", "'ranker.training.zero_stage'", "0, 1, 2 or 3"),
        ("thought_space.training.zero_stage=3", "only the ranker is large enough for", "Change"),
        ("evaluate.splits=[test,test]", "splits repeat", "Change"),
        ("serve.variant=base", "serve.variant is 'base', not one of ['thought_space']", "Change"),
        ("serve.store=redis://u:secret@x/0", "an address of Redis takes no password and no options", "Change"),
        ("serve.store=mysql://x", "'mysql://x' begins with neither sqlite:/// nor redis://", "Change"),
        ("serve.ranker.token_bugdet=9", "unknown key 'serve.ranker.token_bugdet'", "token_budget"),
        ("tree.breadths", "override 'tree.breadths'", "--set tree.breadths=[2,2]"),
        ("=3", "override '=3'", "--set"),
        ("seed.deep=3", "'seed' is not a section", "--set"),
        ("prepare.domains.7.name=x", "override 'prepare.domains.7.name=x'", "--set"),
        ("seed=[1", "override 'seed=[1'", "YAML"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(override: str, place: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(QUICKSTART, [override])
    assert place in caught.value.message
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"name: [", "bad.yaml:1"),
        (b"name: a\n\tseed: 3", "bad.yaml:2"),
        (b"", "holds no settings"),
        (b"- a\n- b", "holds no settings"),
        (b"\xff\xfe\x00", "bad.yaml is not valid YAML"),
        (b"name: a", "'prepare' is missing"),
    ],
)
def test_a_wrong_file_is_named_with_its_remedy(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert place in caught.value.message
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"Give the path of a YAML file") as caught:
            load(path)
        assert str(path) in caught.value.message


def test_an_override_reaches_its_place() -> None:
    config = load(QUICKSTART, ["tree.breadths=[4, 1]", "prepare.domains.0.source.users=9", "cluster.address=auto"])
    assert config.tree.breadths == (4, 1)
    assert config.prepare.domains[0].source.model_dump()["users"] == 9
    assert config.cluster.address == "auto"


@given(
    seed=st.integers(0, 2**31),
    breadths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    lr=st.floats(1e-9, 1.0),
    temperature=st.floats(0, 2),
    negatives=st.one_of(st.integers(1, 99), st.just("all")),
    model=st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=20),
)
def test_the_resolved_configuration_loads_as_itself(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    breadths: list[int],
    lr: float,
    temperature: float,
    negatives: int | str,
    model: str,
) -> None:
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["seed"] = seed
    raw["tree"]["breadths"] = breadths
    raw["tree"]["sampling"]["temperature"] = temperature
    raw["ranker"]["training"]["lr"] = lr
    raw["thought_space"]["negatives"] = negatives
    raw["engine"]["model"] = model
    config = Config.model_validate(raw)
    path = tmp_path_factory.mktemp("resolved") / "resolved.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert load(path) == config


def _settings(raw: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of every single setting of a resolved configuration."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from _settings(value, (*path, name))
    else:
        yield path


def _changed(config: Config, path: tuple[str, ...]) -> Config:
    """The configuration with one setting changed to another that is allowed."""
    raw = json.loads(config.to_json())
    node = raw
    for name in path[:-1]:
        node = node[name]
    value = node[path[-1]]
    for other in _others(value):
        node[path[-1]] = other
        try:
            changed = Config.model_validate(raw)
        except ValueError:
            continue
        if changed != config:
            return changed
    raise AssertionError(f"found no other value for {'.'.join(path)} = {value!r}")


def _others(value: Any) -> list[Any]:
    words = ["bf16", "fp32", "float32", "float16", "last", "single_pass", "popularity", "gbce", "oracle", "attention"]
    words += ["thought_space", "redis://elsewhere:6379", "temporal", "five_core", "rotary", "de", "nf4"]
    if isinstance(value, list) and value and isinstance(value[0], dict):  # domains
        return [[{**value[0], "name": "elsewhere"}]]
    if isinstance(value, list):
        return [
            value + value,
            value[:1],
            [*value[:1], 0.3],
            [*value, "log_likelihood"],
            ["base"],
            [*value, "validation"],
        ]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value * 2, value / 2, value - 1]
    return [*words, "other", 3, 99, 0.5, [0.5, 0.5]]


POOLS = [f"{key}.pool" for key in ("engine", "candidates", "select", "evaluate", "score")]
POOLS += [f"serve.{key}.replicas" for key in ("ingress", "retriever", "ranker", "reasoner")]
CONFIG = load(
    QUICKSTART,
    ["tree.validation_examples=null", "engine.adapters={other: folder}", *(f"{pool}.max=4" for pool in POOLS)],
)
ONE_VALUE = {"thought_space.training.micro_batch_size"}
ONE_VALUE |= {f"{key}.template" for key in ("rationales", "tree")}
"""Settings that allow no other value."""
PATHS = [path for path in _settings(json.loads(CONFIG.to_json())) if ".".join(path) not in ONE_VALUE]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_setting_enters_the_fingerprints_of_the_stages_that_read_it(path: tuple[str, ...]) -> None:
    changed = _changed(CONFIG, path)
    key = ".".join(path)
    operational = any(key == name or key.startswith(f"{name}.") for name in OPERATIONAL)
    for spec in (SCORE, *(spec for spec, _ in STAGES.values())):
        differs = CONFIG.fingerprint(spec.settings) != changed.fingerprint(spec.settings)
        reads = any(f"{key}.".startswith(f"{setting}.") for setting in spec.settings)
        assert differs == (reads and not operational), spec.name
