"""The report shows what it must, loads nothing, and takes no markup from strangers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import fake_run
import pytest

from pulse_ray.config import Selector
from pulse_ray.evaluation import report
from pulse_ray.evaluation.protocol import Tally, metric_rows, models
from pulse_ray.evaluation.stage import ScoreWorker
from pulse_ray.workspace import StageRun

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Outline(HTMLParser):
    """Counts tags, keeps text and addresses, and fails on a tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _render(
    folder: Path, protocol: str = "deployable", change: Callable[[StageRun], None] = lambda stage: None, **sections: Any
) -> str:
    select = {"protocol": protocol, **sections.pop("select", {})}
    stage = fake_run.make(fake_run.config(folder, select=select, **sections))
    change(stage)
    worker, tally = ScoreWorker(stage, fake_run.MotiveScorer), Tally()
    for part in stage.input("examples").parts("test"):
        made = worker(part)
        stage.reject(part, made.rejects)
        stage.output("scores").write(part, made.tables["scores"])
        tally.add(made.tables["scores"])
        tally.add_catalogue(stage.input("candidates").read(part), "test", {"shop": 24})
    return report.render(report.collect(stage, metric_rows(tally, stage.config), seconds=1.0))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _render(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_shows_every_part_of_the_run(page: str, outline: Outline) -> None:
    text = " ".join(" ".join(outline.text).split())
    for said in (
        "fernleaf-shop",
        "5f0c2a9e71b3d846",  # the fingerprint
        "59 examples, 10 candidates each",
        "0.083 0.417",  # retrieval before and after
        "Before training",
        "60 train, 60 validation, 60 test",
        "degenerate: 1",
        "Examples without candidates, which count for no model: 1.",
        "agreement +0.630",
        "Ranked among all 24 items of shop",
        "are not to be compared",
        '"bootstrap_samples": 500',
    ):
        assert said in text
    for stage in ("prepare", "candidates", "rationales", "thought-space", "tree", "select", "ranker", "evaluate"):
        assert re.search(rf'<th scope="row">{stage}</th>', page)
    for model in models(fake_run.config(Path())):
        assert re.search(
            rf'<tr class="deployable" data-model="{model}">\s*<th scope="row">{re.escape(report.LABELS[model])}', page
        )
    for model in ("popularity", "sasrec"):
        assert re.search(rf'<tr data-catalogue="{model}">\s*<th scope="row">{re.escape(report.LABELS[model])}', page)
    assert page.count('<details class="case"') == 5
    assert page.count('<tr class="target">') == 5
    assert page.count("None: its thoughts were rejected") == 1
    trained, projections, rows, legend = 6, 2, 6, 3
    assert outline.tags["svg"] == trained + projections + rows + legend


def test_best_value_of_each_column_is_bold(page: str) -> None:
    assert len(re.findall(r'<td class="n best">', page)) >= len(report.metrics.GAINS)


def test_loads_nothing_and_runs_nothing(page: str, outline: Outline) -> None:
    assert all(address.startswith("#") for address in outline.addresses), outline.addresses
    assert outline.tags["script"] == outline.tags["link"] == outline.tags["img"] == 0
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert not re.search(r'(?<!xmlns)="https?://', page)


def test_markup_in_reviews_is_shown_as_text(page: str, outline: Outline) -> None:
    assert fake_run.HOSTILE not in page
    assert any(fake_run.HOSTILE in piece for piece in outline.text)


def test_follows_light_and_dark(page: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    names = [set(re.findall(r"(--[a-z-]+):", block)) for block in (light, dark)]
    assert names[0] == names[1] >= set(re.findall(r"var\((--[a-z-]+)\)", page))
    assert "prefers-color-scheme: dark" in page
    body = page[page.index("<body>") :]
    assert not re.search(r"#[0-9a-f]{6}\b", body.replace("&#", "")), "a colour in the body would not follow the theme"


def test_ids_are_unique(page: str) -> None:
    repeated = [name for name, count in Counter(re.findall(r'\bid="([^"]+)"', page)).items() if count > 1]
    assert repeated == []


def test_oracle_numbers_carry_their_label(tmp_path: Path) -> None:
    page = _render(tmp_path, "oracle")
    assert "This run sees the label." in page
    rows = re.findall(r'<tr class="(\w+)" data-model="(\w+)">.*?</tr>', page, flags=re.DOTALL)
    assert {model for protocol, model in rows if protocol == "oracle"} == {"thought_space"}
    for protocol, body in re.findall(r'<tr class="(\w+)" data-model="\w+">(.*?)</tr>', page, flags=re.DOTALL):
        assert ("sees the label" in body) == (protocol == "oracle")
        assert not (protocol == "oracle" and "best" in body)
    for summary in re.findall(r"<summary>.*?ranked.*?</summary>", page, flags=re.DOTALL):
        assert "sees the label" in summary


def test_a_run_with_one_variant_and_no_users_shown(tmp_path: Path) -> None:
    page = _render(tmp_path, ranker={"variants": ["none"]}, evaluate={"report_users": 0, "bootstrap_samples": 50})
    assert 'class="case"' not in page
    assert "Ranker, no reason" in page
    assert "Ranker, base reason" not in page


def test_every_selector_is_named_in_words_and_a_beam_is_seen(tmp_path: Path) -> None:
    chosen = list(get_args(Selector))
    page = _render(tmp_path, select={"selectors": chosen}, ranker={"variants": ["none", "base", *chosen]})
    for title in ("Thought Space", "SBERT", "untrained encoder", "log-likelihood", "random leaf"):
        assert page.count(f"Ranker, tree + {title}") >= 2
    assert '<span class="tag">SBERT</span>' in page
    assert "encoder_base</" not in page
    assert "left behind by the beam" in page
    assert "agreement +0.380" in page


def test_training_that_stopped_before_its_first_loss_point_is_reported(tmp_path: Path) -> None:
    """Losses are noted 200 times in a run; one of many epochs may end earlier."""

    def forget_losses(stage: StageRun) -> None:
        folders = [f"{variant}/" for variant in stage.config.ranker.variants]
        for artifact, folder in [("sasrec", ""), ("encoders", ""), *(("ranker", folder) for folder in folders)]:
            record = json.loads(stage.input(artifact).read_bytes(f"{folder}training.json") or b"")
            record["steps"] = []
            stage.input(artifact).write_bytes(f"{folder}training.json", json.dumps(record).encode())

    page = _render(tmp_path, change=forget_losses, evaluate={"bootstrap_samples": 50})
    assert "best at step 80 of 120" in page
