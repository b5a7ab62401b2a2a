"""Input as strangers leave it: nothing crashes, nothing is dropped silently."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import Prepare, Prepared, amazon, review, write_lines

from pulse_ray.config import FileSource, PrepareConfig
from pulse_ray.data.sources import read
from pulse_ray.errors import DataError
from pulse_ray.workspace import Manifest

LOOSE = {"min_user_interactions": 1, "min_item_interactions": 1, "partitions": 3}
FUTURE = 7_258_118_400
"""The year 2200, in seconds."""


def manifest(result: Prepared) -> Manifest:
    """That of `interactions`, in which the account of every row stands."""
    result.stage.complete(1.0, result.metrics)
    found = result.stage.output("interactions").manifest()
    assert found is not None
    return found


def check_account(result: Prepared, lines: int) -> dict[str, int]:
    """The account of the only domain, which must add up to this many lines of interactions."""
    [account] = manifest(result).metrics["accounting"]
    assert account["lines"] == lines == account["rejects"] + account["read"]
    out = ("below_rating", "duplicates", "filtered", "sampled_out", "written")
    assert account["read"] == sum(account[name] for name in out)
    assert account["written"] == len(result.rows("interactions"))
    return account


def mended(result: Prepared) -> dict[str, int]:
    return {entry["what"]: entry["rows"] for entry in result.metrics["interactions"]["mended"]}


def line(**fields: Any) -> bytes:
    """A review of which some fields are special, as a line."""
    return json.dumps(review("u", "i", 1_500_000_000) | fields).encode()


UNUSABLE: dict[str, list[bytes]] = {
    "malformed JSON": [b'{"asin": "x"', line(reviewText="a~b").replace(b"~", b"\0"), b"\0\0\0", line()[:-1]],
    "not a JSON object": [b"[1]", b'"text"', b"7", b"null"],
    "key given twice": [line()[:-1] + b', "asin": "other"}'],
    "invalid UTF-8": [line(reviewText="caf~").replace(b"~", b"\xe9"), line(asin="~").replace(b"~", b"\xff\xfe")],
    "interaction without user": [line(reviewerID=None), line(reviewerID="  "), line(reviewerID="")],
    "interaction without item": [line(asin=None), line(asin="")],
    "interaction without time": [line(unixReviewTime=None), line(unixReviewTime="yesterday")],
    "time before 1970": [line(unixReviewTime=-1), line(unixReviewTime=-1_500_000_000_000)],
    "time in the future": [line(unixReviewTime=FUTURE), line(unixReviewTime=FUTURE * 1000)],
    "rating not from 1 to 5": [line(overall=0), line(overall=5.5), line(overall=-3), line(overall="five")],
}


@pytest.mark.parametrize("ending", ["json", "json.gz"])
def test_lines_that_cannot_be_used_are_set_aside(prepared: Prepare, tmp_path: Path, ending: str) -> None:
    """Between each two of them stands a good line: none may take its neighbours with it."""
    bad = [one for lines in UNUSABLE.values() for one in lines]
    good = [line(reviewerID=f"u{n % 3}", asin=f"i{n}") for n in range(len(bad))]
    content = b"".join(b + b"\n" + g + b"\n" for b, g in zip(bad, good, strict=True))
    path = tmp_path / f"reviews.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    result = prepared(domains=[amazon(path)], max_reject_fraction=0.6, **LOOSE)
    account = check_account(result, len(bad) + len(good))
    assert account["written"] == len(good)
    assert manifest(result).rejects == {reason: len(lines) for reason, lines in sorted(UNUSABLE.items())}
    places = {row["key"]: row["reason"] for table in result.stage.rejects.tables() for row in table.to_pylist()}
    expected = [reason for reason, lines in UNUSABLE.items() for _ in lines]
    assert places == {f"{path}:{2 * number + 1}": reason for number, reason in enumerate(expected)}


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(UNUSABLE["malformed JSON"])), max_size=12))
def test_no_bytes_break_a_file(tmp_path: Path, junk: list[bytes]) -> None:
    """Whatever stands between good lines, these are read, and every other line is set aside under its number."""
    bad = [piece for one in junk for piece in one.split(b"\n") if piece.strip()]
    path = tmp_path / "reviews.json"
    path.write_bytes(b"\n".join([line(), *(one for piece in bad for one in (piece, line()))]))
    config = PrepareConfig.model_validate({"domains": [amazon(path)], "max_reject_fraction": 1.0})
    source = config.domains[0].source
    assert isinstance(source, FileSource)
    chunks = list(read(str(path), "interactions", source, config))
    assert sum(chunk.interactions.num_rows for chunk in chunks) == 1 + len(bad)
    keys = [reject.key for chunk in chunks for reject in chunk.rejects]
    assert keys == [f"{path}:{2 * number}" for number in range(1, 1 + len(bad))]


def test_times_in_milliseconds_are_mended_and_counted(prepared: Prepare, tmp_path: Path) -> None:
    times = [1_500_000_000_999, 1_500_000_001, 0, 1_400_000_000_000]
    rows = [review("u", f"i{n}", time) for n, time in enumerate(times)]
    result = prepared(domains=[amazon(write_lines(tmp_path / "reviews.json", rows))], **LOOSE)
    found = [(row["item_id"], row["timestamp"]) for row in result.rows("interactions")]
    assert found == [("i2", 0), ("i3", 1_400_000_000), ("i0", 1_500_000_000), ("i1", 1_500_000_001)]
    assert mended(result) == {"times in milliseconds": 2}
    check_account(result, 4)


def test_a_review_of_ten_megabytes_is_cut_and_costs_its_neighbours_nothing(prepared: Prepare, tmp_path: Path) -> None:
    rows = [review("u", f"i{n}", n) for n in range(5)]
    rows[2]["reviewText"] = "word " * 2_000_000
    rows[3]["reviewText"] = "x" * 10_000
    result = prepared(domains=[amazon(write_lines(tmp_path / "reviews.json.gz", rows))], **LOOSE)
    lengths = [len(row["review"]) for row in result.rows("interactions")]
    assert lengths == [5, 5, 9_999, 10_000, 5]  # Cleaning takes the space at the end.
    assert mended(result) == {"reviews cut": 1}
    check_account(result, 5)


def test_control_characters_leave_reviews(prepared: Prepare, tmp_path: Path) -> None:
    texts = ["a\0b", "\x1b[31mred\x07", "soft\u00adhyphen", "\0", "line\r\n\tbreak", "\ud83d alone"]
    rows = [review("u", f"i{n}", n, reviewText=text) for n, text in enumerate(texts)]
    result = prepared(domains=[amazon(write_lines(tmp_path / "reviews.json", rows))], **LOOSE)
    reviews = [row["review"] for row in result.rows("interactions")]
    assert reviews[:5] == ["a b", "[31mred", "softhyphen", None, "line break"]
    assert "\ud83d" not in reviews[5] and reviews[5].endswith("alone")
    check_account(result, len(texts))


IDS = [
    "a/b",
    "../../etc/passwd",
    'say "hi"',
    "it's",
    "two words",
    "tab\there",
    "🦊/🛒",
    "ß",
    "%2F",
    "a,b;c",
    "C:\\d",
    "NULL",
]


def test_ids_may_hold_anything(prepared: Prepare, tmp_path: Path) -> None:
    rows = [review(user, item, time) for user in IDS for time, item in enumerate(IDS)]
    about = [{"asin": item, "title": f"Title of {number}"} for number, item in enumerate(IDS)]
    domain = amazon(write_lines(tmp_path / "reviews.json", rows), write_lines(tmp_path / "about.json", about))
    result = prepared(domains=[domain], **LOOSE)
    assert result.sequences() == dict.fromkeys(IDS, IDS)
    titles = {item["item_id"]: item["title"] for item in result.rows("items")}
    assert titles == {item: f"Title of {number}" for number, item in enumerate(IDS)}
    last = len(IDS) - 1
    targets = {e["example_id"]: e["target_item"] for e in result.rows("examples") if e["split"] == "test"}
    assert targets == {f"shop/{user}/{last}": IDS[last] for user in IDS}
    check_account(result, len(rows))


def test_ids_lose_the_space_around_them(prepared: Prepare, tmp_path: Path) -> None:
    rows = [review(" u", "i ", 1), review("u", "i", 2), review("u\n", "j", 3)]
    result = prepared(domains=[amazon(write_lines(tmp_path / "reviews.json", rows))], **LOOSE)
    assert result.sequences() == {"u": ["i", "j"]}
    assert check_account(result, 3)["duplicates"] == 1


def test_metadata_twice_and_metadata_missing(prepared: Prepare, tmp_path: Path) -> None:
    items = [f"i{n}" for n in range(10)]
    rows = [review(f"u{n % 2}", item, n) for n, item in enumerate(items)]
    about: list[Any] = [{"asin": item, "title": f"Title {item}"} for item in items[:5]]
    about += [{"asin": "i0", "title": "Another", "brand": "Fern"}, {"asin": "unsold"}, {"title": "Nobody's"}, "oops"]
    domain = amazon(write_lines(tmp_path / "reviews.json", rows), write_lines(tmp_path / "about.json", about))
    result = prepared(domains=[domain], max_reject_fraction=0.5, **LOOSE)
    texts = {item["item_id"]: item["text"] for item in result.rows("items")}
    expected = {item: f"Title {item}" for item in items[:5]} | {item: item for item in items[5:]}
    assert texts == expected | {"i0": "Title i0 (Fern)"}
    assert result.metrics["items"] == {"items": 10, "made_titles": 5, "without_text": 5}
    assert mended(result) == {"items named twice": 1}
    assert manifest(result).rejects == {"item without id": 1, "malformed JSON": 1}
    check_account(result, len(rows))


def test_one_user_with_very_many_interactions(prepared: Prepare, tmp_path: Path) -> None:
    many = 200_000
    rows = [review("u", f"i{n}", 1_500_000_000 + n // 7, reviewText=None) for n in range(many)]
    rows += [review(f"v{n}", f"i{n}", 1_500_000_000) for n in range(9)]
    path = write_lines(tmp_path / "reviews.json", rows)
    result = prepared(domains=[amazon(path)], shard_examples=100, **LOOSE)
    sequence = result.sequences()["u"]
    assert sequence == [f"i{n}" for n in range(many)]
    examples = {e["split"]: e for e in result.rows("examples") if e["user_id"] == "u"}
    for split, back in (("train", 3), ("validation", 2), ("test", 1)):
        assert examples[split]["example_id"] == f"shop/u/{many - back}"
        assert [step["item_id"] for step in examples[split]["history"]] == sequence[many - back - 50 : many - back]
    check_account(result, len(rows))


@pytest.mark.parametrize("role", ["interactions", "items"])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_files_that_are_cut_off_stop_the_stage(prepared: Prepare, tmp_path: Path, role: str, ending: str) -> None:
    content = b"".join(line(reviewerID=f"u{n}", asin=f"i{n}") + b"\n" for n in range(20_000))
    whole = gzip.compress(content) if ending == ".gz" else pa.compress(content, "zstd", asbytes=True)
    good, cut = tmp_path / "good.json", tmp_path / f"cut.json{ending}"
    good.write_bytes(content)
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    reviews, about = (cut, good) if role == "interactions" else (good, cut)
    with pytest.raises(DataError, match=rf"cut\.json\{ending}.*(cut off|cannot be read)") as caught:
        prepared(domains=[amazon(reviews, about)], **LOOSE)
    assert caught.value.remedy


def test_all_that_can_be_counted_is_counted(prepared: Prepare, tmp_path: Path) -> None:
    """Every way out at once: set aside, rated too low, given twice, too rare, not drawn."""
    rows: list[Any] = [review(f"u{n}", f"i{m}", n + m, overall=5) for n in range(8) for m in range(4)]
    rows += [review(f"u{n}", f"i{m}", 99) for n in range(3) for m in range(2)]
    rows += [review(f"u{n}", "disliked", 99, overall=1) for n in range(5)]
    rows += [review("rare", f"i{m}", 99) for m in range(2)]
    rows += ["nonsense", "nonsense"]
    path = write_lines(tmp_path / "reviews.json", rows)
    settings_ = {"min_user_interactions": 3, "min_item_interactions": 3, "max_users": 6, "min_rating": 2}
    result = prepared(domains=[amazon(path)], partitions=3, max_reject_fraction=0.5, **settings_)
    account = check_account(result, len(rows))
    assert Counter({key: account[key] for key in account if key not in ("domain", "lines", "read")}) == Counter(
        rejects=2, below_rating=5, duplicates=6, filtered=2, sampled_out=8, written=24
    )
    assert [result.step(name)[0] for name in ("read", "rated", "unique", "filtered", "kept")] == [45, 40, 34, 32, 24]
