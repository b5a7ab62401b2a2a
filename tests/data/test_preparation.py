from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from worlds import SYNTHETIC, Prepare, Prepared, amazon, bind, review, write_lines

from pulse_ray.data.stage import run
from pulse_ray.errors import DataError

LOOSE = {"min_user_interactions": 1, "min_item_interactions": 1, "partitions": 2}


def golden(shared_data: Path, name: str, *, metadata: bool = True) -> dict[str, Any]:
    folder = shared_data / "amazon2018"
    return amazon(folder / f"{name}_5.json.gz", folder / f"meta_{name}.json.gz" if metadata else None, name)


@pytest.mark.data
def test_golden_counts_of_real_files(shared_data: Path, prepared: Prepare) -> None:
    domains = [
        golden(shared_data, "Gift_Cards"),
        golden(shared_data, "Magazine_Subscriptions"),
        golden(shared_data, "All_Beauty", metadata=False),
    ]
    result = prepared(domains=domains, partitions=2)
    steps = {
        "Gift_Cards": [(2972, 458, 148), (2965, 458, 148), (2941, 453, 147)],
        "Magazine_Subscriptions": [(2375, 348, 157), (2302, 348, 157), (2027, 294, 132)],
        "All_Beauty": [(5269, 991, 85), (4092, 991, 85), (686, 137, 24)],
    }
    for domain, counts in steps.items():
        assert [result.step(name, domain) for name in ("read", "unique", "filtered")] == counts
    assert result.metrics["examples"] == {"train": 884, "validation": 884, "test": 884}
    assert result.metrics["items"] == {"items": 303, "made_titles": 154, "without_text": 28}
    _check_texts(result)
    _check_splits(result, max_sequence=50, positions_per_user=1)


@pytest.mark.data
def test_golden_counts_of_ready_sequences(shared_data: Path, prepared: Prepare) -> None:
    folder = shared_data / "sequences"
    names = ("luxury_beauty.sequences.jsonl.gz", "luxury_beauty.items_partial.jsonl.gz")
    source = dict(zip(("interactions", "items"), (str(folder / name) for name in names), strict=True))
    result = prepared(domains=[{"name": "lux", "source": source}], partitions=2)
    assert [result.step(name) for name in ("read", "unique", "filtered")] == [
        (33841, 3811, 1438),
        (27735, 3811, 1438),
        (20050, 2028, 936),
    ]
    first = json.loads(gzip.decompress((folder / names[0]).read_bytes()).split(b"\n")[0])
    whole = prepared("whole", domains=[{"name": "lux", "source": source}], **LOOSE)
    assert whole.sequences()[first["user_id"]] == list(dict.fromkeys(first["items"]))


def _check_texts(result: Prepared) -> None:
    items = result.rows("items")
    for item in items:
        for text in (item["title"], item["text"], item["brand"], item["description"]):
            assert "<" not in text
            assert "span" not in text.split()
            assert "&amp;" not in text
        assert item["text"]
    magazines = {item["item_id"]: item for item in items if item["domain"] == "Magazine_Subscriptions"}
    described = [item for item in magazines.values() if item["text"] != item["item_id"]]
    assert len(described) == 128  # the other 4 have no metadata
    assert sum(len(item["text"].split()) >= 5 for item in described) > 115
    popular_mechanics = next(item for item in described if "Popular Mechanics is for" in item["description"])
    assert popular_mechanics["text"].startswith("Hearst Magazines, Transportation: Popular Mechanics is for people who")


@pytest.mark.data
def test_the_papers_filter_on_a_slice_of_luxury_beauty(shared_data: Path, prepared: Prepare) -> None:
    path = shared_data / "amazon2018" / "Luxury_Beauty_2018_slice.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    users, items = Counter(row["reviewerID"] for row in lines), Counter(row["asin"] for row in lines)
    kept = {(r["reviewerID"], r["asin"]) for r in lines if users[r["reviewerID"]] >= 4 and items[r["asin"]] >= 4}
    result = prepared(
        domains=[amazon(path)],
        filter="single_pass",
        min_user_interactions=4,
        min_item_interactions=4,
        partitions=3,
    )
    assert {(row["user_id"], row["item_id"]) for row in result.rows("interactions")} == kept
    assert result.metrics["items"]["without_text"] == 0, "titles stand in the reviews"


def test_the_core_is_a_fixed_point_and_the_largest(prepared: Prepare, tmp_path: Path) -> None:
    result = prepared(domains=[SYNTHETIC], min_user_interactions=4, min_item_interactions=6, partitions=3)
    pairs = {(row["user_id"], row["item_id"]) for row in result.rows("interactions")}
    everything = prepared("all", domains=[SYNTHETIC], **LOOSE)
    core = {(row["user_id"], row["item_id"]) for row in everything.rows("interactions")}
    while True:
        users, items = Counter(user for user, _ in core), Counter(item for _, item in core)
        fewer = {(user, item) for user, item in core if users[user] >= 4 and items[item] >= 6}
        if fewer == core:
            break
        core = fewer
    assert 0 < len(core) < everything.step("read")[0]
    assert pairs == core
    assert {item["item_id"] for item in result.rows("items")} == {item for _, item in core}


@pytest.mark.parametrize(("max_sequence", "positions_per_user"), [(50, 1), (4, 3)])
def test_leave_two_out(prepared: Prepare, max_sequence: int, positions_per_user: int) -> None:
    limits = {"max_sequence": max_sequence, "positions_per_user": positions_per_user}
    result = prepared(domains=[SYNTHETIC], shard_examples=7, **LOOSE, **limits)
    _check_splits(result, **limits)
    examples = result.stage.output("examples")
    sizes = {part: examples.num_rows(part) for part in examples.parts()}
    assert max(sizes.values()) == 7
    for part, size in sizes.items():  # Only the last part of a split and partition may be short.
        prefix, _, chunk = part.rpartition("-")
        assert size == 7 or f"{prefix}-{int(chunk) + 1:04d}" not in sizes


def _check_splits(result: Prepared, *, max_sequence: int, positions_per_user: int) -> None:
    sequences: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result.rows("interactions"):
        sequences.setdefault((row["domain"], row["user_id"]), []).append(row)
    examples = result.rows("examples")
    assert len({example["example_id"] for example in examples}) == len(examples)
    positions: dict[tuple[str, str], dict[str, list[int]]] = {}
    for example in examples:
        user = (example["domain"], example["user_id"])
        position = int(example["example_id"].rpartition("/")[2])
        sequence = sequences[user]
        assert example["example_id"] == f"{user[0]}/{user[1]}/{position}"
        assert example["target_item"] == sequence[position]["item_id"]
        before = sequence[max(0, position - max_sequence) : position]
        keys = ("item_id", "timestamp", "rating", "review")
        assert example["history"] == [{key: step[key] for key in keys} for step in before]
        assert example["target_item"] not in {step["item_id"] for step in example["history"]}
        positions.setdefault(user, {}).setdefault(example["split"], []).append(position)
    for user, sequence in sequences.items():
        n = len(sequence)
        assert [step["timestamp"] for step in sequence] == sorted(step["timestamp"] for step in sequence)
        assert len({step["item_id"] for step in sequence}) == n
        train = list(range(n - 3, 0, -1))[:positions_per_user] if n >= 3 else list(range(n - 1, 0, -1))
        expected = {"test": [n - 1], "validation": [n - 2]} if n >= 3 else {}
        assert positions.get(user, {}) == expected | ({"train": train} if train else {})
    trained = Counter(
        (domain, step["item_id"])
        for (domain, _), sequence in sequences.items()
        for step in (sequence[:-2] if len(sequence) >= 3 else sequence)
    )
    for item in result.rows("items"):
        assert item["popularity"] == trained[item["domain"], item["item_id"]]
    sold = {(step["domain"], step["item_id"]) for sequence in sequences.values() for step in sequence}
    assert sold == {(item["domain"], item["item_id"]) for item in result.rows("items")}


def test_ties_and_duplicates(prepared: Prepare, tmp_path: Path) -> None:
    rows = [
        review("u", "b", 5),
        review("u", "a", 5),
        review("u", "c", 9, overall=2.0),
        review("u", "c", 1, overall=1.0),
        review("u", "d", 2, reviewText="<b>So</b> &amp; so\u0007"),
        review("u", "c", 9, overall=3.0),
        review("v", "a", 1, reviewText=" "),
        review("v", "b", 1),
        review("w", "a", 1),
    ]
    path = write_lines(tmp_path / "reviews.json", rows)
    first = prepared("first", domains=[amazon(path)], **LOOSE)
    last = prepared("last", domains=[amazon(path)], duplicates="last", **LOOSE)
    # Equal times keep the order of the file.
    assert first.sequences() == {"u": ["c", "d", "b", "a"], "v": ["a", "b"], "w": ["a"]}
    assert last.sequences()["u"] == ["d", "b", "a", "c"]
    found = {(row["user_id"], row["item_id"]): row for row in last.rows("interactions")}
    assert found["u", "c"]["rating"] == 3.0
    assert found["u", "d"]["review"] == "So & so"
    assert found["v", "a"]["review"] is None
    examples = {(example["user_id"], example["split"]): example["target_item"] for example in first.rows("examples")}
    assert examples == {
        ("u", "train"): "d",
        ("u", "validation"): "b",
        ("u", "test"): "a",
        ("v", "train"): "b",
    }
    assert {item["text"] for item in first.rows("items")} == {"a", "b", "c", "d"}


def test_metadata_names_items_and_reviews_fill_in(prepared: Prepare, tmp_path: Path) -> None:
    rows = [review("u", item, time, title=f"Review's {item}") for time, item in enumerate("abc")]
    about = [
        {"asin": "a", "title": "Soap", "brand": "Fern"},
        {"asin": "b", "title": "<span class=", "brand": "by\n    Calder", "description": ["Fine tea."]},
        {"asin": "b", "title": "Tea"},
        {"asin": "z", "title": "Unsold"},
        {"title": "Nobody's"},
    ]
    domain = amazon(write_lines(tmp_path / "reviews.json", rows), write_lines(tmp_path / "metadata.json.gz", about))
    result = prepared(domains=[domain], max_reject_fraction=0.5, **LOOSE)
    texts = {item["item_id"]: item["text"] for item in result.rows("items")}
    assert texts == {"a": "Soap (Fern)", "b": "Tea (Calder)", "c": "Review's c"}
    assert result.stage.rejected() == {"item without id": 1}


def test_order_of_work_and_repetition_change_nothing(prepared: Prepare) -> None:
    settings = {"domains": [SYNTHETIC, SYNTHETIC | {"name": "other"}], "min_item_interactions": 2, "partitions": 3}

    def content(result: Prepared) -> dict[str, list[Any]]:
        outputs = {name: result.stage.output(name) for name in result.stage.spec.outputs}
        return {f"{name}/{part}": one.read(part).to_pylist() for name, one in outputs.items() for part in one.parts()}

    once = prepared("once", **settings)
    before = content(once)
    assert content(prepared("once", **settings)) == before
    assert content(prepared("backwards", backwards=True, **settings)) == before
    assert not once.stage.workspace.artefact("scratch").files()
    # Partitions cut the tables differently and hold the same rows.
    whole = prepared("whole", **settings | {"partitions": 1})
    for name in ("interactions", "items", "examples"):
        assert sorted(map(repr, whole.rows(name))) == sorted(map(repr, once.rows(name)))


def test_a_sample_of_users_is_stable_and_nested(prepared: Prepare) -> None:
    def users(**settings: Any) -> set[str]:
        return set(prepared(domains=[SYNTHETIC], min_item_interactions=1, **settings).sequences())

    few = users(max_users=5, partitions=4)
    assert len(few) == 5
    assert few == users(max_users=5, partitions=1)
    assert few < users(max_users=20) < users(max_users=10_000)


def test_a_filter_that_leaves_nothing_says_so(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"nothing of domain 'shop' .* 99 .* 5") as caught:
        prepared(domains=[SYNTHETIC], min_user_interactions=99)
    assert "prepare.min_user_interactions" in caught.value.remedy


def test_a_data_set_without_usable_rows_says_so(prepared: Prepare, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "reviews.json", [{"asin": "x"}])
    with pytest.raises(DataError, match="domain 'shop' has no interactions"):
        prepared(domains=[amazon(path)], max_reject_fraction=1.0)


def test_on_ray_as_in_one_process(ray_cluster: None, prepared: Prepare, tmp_path: Path) -> None:
    settings = {"domains": [SYNTHETIC], "min_item_interactions": 1, "partitions": 2}
    here = prepared("here", **settings)
    stage = bind(tmp_path / "there", settings)
    stage.begin()
    there = Prepared(stage, run(stage))
    assert there.metrics == here.metrics
    for name in stage.spec.outputs:
        assert there.rows(name) == here.rows(name)
    stage.complete(1.0, there.metrics)
    assert stage.condition() == "complete"

    absent = bind(tmp_path / "faulty", {"domains": [amazon(tmp_path / "absent.json.gz")]})
    absent.begin()
    with pytest.raises(DataError, match=r"no file .*absent\.json\.gz"):
        run(absent)
    assert absent.condition() == "partial"
