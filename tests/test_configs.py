"""Every configuration that is shipped loads, plans, and says in its header how to run it and what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from pulse_ray import pipeline
from pulse_ray.config import FileSource, load

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAPER = [path for path in CONFIGS if path.stem in ("luxury_beauty", "prime_pantry", "video_games")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_says_how_to_run_it(path: Path) -> None:
    config = load(path)
    header = path.read_text(encoding="utf-8").split("\nname:")[0]
    assert config.name == path.stem
    assert f"pulse-ray run configs/{path.name}" in header
    assert "# Measured:" in header


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_untouched_workspace_lacks_every_stage(path: Path, tmp_path: Path) -> None:
    config = load(path, [f"storage={tmp_path}"])
    assert set(pipeline.conditions(config).values()) == {"missing"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_settings(path: Path) -> None:
    """PAPER.md §2, settings, and where the data is published."""
    config = load(path)
    (domain,) = config.prepare.domains
    category = path.stem.title()
    assert isinstance(domain.source, FileSource)
    assert domain.source.interactions[0].endswith(f"/amazon_v2/categoryFiles/{category}.json.gz")
    assert domain.source.items[0].endswith(f"/amazon_v2/metaFiles2/meta_{category}.json.gz")
    assert config.prepare.filter == "single_pass"
    assert config.prepare.min_user_interactions == config.prepare.min_item_interactions
    assert config.prepare.min_user_interactions == (4 if path.stem == "luxury_beauty" else 5)
    assert config.prepare.max_sequence == 50
    assert config.engine.model == config.ranker.model == "microsoft/Phi-4-mini-instruct"

    space = config.thought_space
    assert (space.model, space.negatives, space.temperature) == ("distilbert/distilbert-base-uncased", 10, 0.05)
    assert (space.training.batch_size, space.training.lr, space.training.warmup_fraction) == (32, 2e-5, 0.1)

    ranker = config.ranker
    assert (ranker.lora.r, ranker.lora.alpha, ranker.lora.dropout, ranker.max_tokens) == (8, 16, 0.05, 512)
    assert (ranker.training.lr, ranker.training.precision, ranker.training.zero_stage) == (2e-4, "bf16", 2)
    assert set(ranker.variants) == {"none", "base", "log_likelihood", "thought_space"}
    assert config.tree.breadths == (3, 3)

    assert config.engine.pool.gpus == ranker.training.workers.gpus == space.training.workers.gpus == 1
