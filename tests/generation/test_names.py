"""Items that a text names: found whatever stands around them, and never where they were shown or merely described."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_ray.generation.names import ItemNames

SHOWN = ["- Fernleaf Lavender Soap Bar | rated 5/5", "- Starbucks Holiday Gift Card"]
NAMES = ItemNames(
    [
        "Fernleaf Lavender Soap Bar",
        "Starbucks Gift Card",
        *(f"{brand} Gift Card in a Gift Box" for brand in ("Fandango", "Subway", "Panera", "Wendy")),
        *(f"{kind} (Pack of 12)" for kind in ("Granola", "Raisins", "Napkins")),
        "Hand Cream for Dry Skin",
        "Kids' Cucumber Sunscreen, 2 x 50 ml (Pack of 12)",
        "Zyxwort Balm",
        "Zyxwort Balm",
        "SEA-SALT SHAMPOO BAR",
        "common thing 3",
        "",
        "ポケットモンスター ダイヤモンド 攻略本",
        "香りのない石けん",
    ]
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a balm, perhaps the Zyxwort Balm.", "Zyxwort Balm"),
        ('the "Kids\' Cucumber Sunscreen" of summer', "Kids Cucumber Sunscreen"),
        ("a Sea-Salt Shampoo Bar in paper", "Sea-Salt Shampoo Bar"),
        ("the Fandango Gift Card for two", "Fandango Gift Card"),
        ("ポケットモンスター ダイヤモンド 攻略本", None),
        ("a Fernleaf Lavender Soap Bar and a Starbucks Gift Card", None),
        ("a hand cream for dry skin, a gift card in a gift box", None),
        ("a Gift Card in a Gift Box", None),
        ("a pack of 12, 2 x 50 ml, a Pack of 12", None),
        ("a common thing 3", None),
        ("香りのない石けんが好き", None),
        ("", None),
    ],
)
def test_names_are_told_from_descriptions(text: str, named: str | None) -> None:
    assert NAMES.unseen(text, SHOWN) == named
    assert NAMES.unseen(text, [*SHOWN, text]) is None


_TITLE = st.lists(st.text("ABCDE", min_size=3, max_size=5), min_size=2, max_size=5).map(" ".join)


@settings(max_examples=60)
@given(st.lists(_TITLE, min_size=1, max_size=8), st.data())
def test_every_title_is_found_that_shares_no_word_with_what_was_shown(titles: list[str], data: st.DataObject) -> None:
    title = data.draw(st.sampled_from(titles))
    found = ItemNames(titles).unseen(f"things like {title}, and more", ["nothing of it"])
    few = sum(word in other.split() for word in title.split() for other in set(titles)) <= 3
    assert found is not None or not few
    assert found is None or any(found in f"{other}," for other in titles)


def test_an_empty_catalogue_names_nothing() -> None:
    assert ItemNames([]).unseen("The Zyxwort Balm", []) is None


_FEW_BUCKETS = """
from pulse_ray.generation import names
names._BUCKETS = 40
titles = [f"Brand{one} Soap{one} Kind{one % 7}" for one in range(200)]
held = names.ItemNames(titles)
print([title for title in titles if held.unseen(title, [])])
"""


def test_a_verdict_is_the_same_in_every_process() -> None:
    verdicts = [
        subprocess.run(
            [sys.executable, "-c", _FEW_BUCKETS],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert verdicts[0] == verdicts[1]
    assert 0 < verdicts[0].count(b"Brand") < 200, "words share buckets"


def test_a_large_catalogue_is_small() -> None:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)).title() for _ in range(5_000)]
    titles = [" ".join(rng.choices(vocabulary, k=rng.randint(2, 14))) for _ in range(50_000)]
    names = ItemNames(titles)
    assert names.nbytes < 200 * len(titles), "200 MB a million"
    assert names.unseen(f"a product that is soft, such as {titles[0]}", ["a product"]) is not None
