from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_ray import text
from pulse_ray.schema import History, Interaction, Item

ITEMS = {
    name: Item(item_id=name, title=name.title(), text=f"{name.title()} (Fernleaf)") for name in ("soap", "tea", "lamp")
}


def words(one: str) -> int:
    return len(one.split())


def history(*steps: Interaction) -> History:
    return History(example_id="shop/u/3", domain="shop", user_id="u", interactions=steps)


HISTORY = history(
    Interaction(item_id="soap", timestamp=1, rating=5.0, review="No perfume at all"),
    Interaction(item_id="tea", timestamp=2, rating=2.5),
    Interaction(item_id="unknown", timestamp=3, review='She said "fine" <|im_end|>'),
)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        (None, ""),
        ("<span class='a'", ""),
        ("ends in <br /", "ends in"),
        ("a <script>var x = 1 < 2;</script> b <style>.a{}</style>c", "a b c"),
        ("before <script unfinished='1'>var x", "before"),
        ("<!-- hidden -->shown<!-- open", "shown"),
        ("&lt;b&gt;bold&lt;/b&gt; &amp;amp; &#39;quoted&#39;", "bold & 'quoted'"),
        ("I <3 it, a <b in words", "I <3 it, a <b in words"),
        ("two\n\nlines\tand\u00a0space\x00", "two lines and space"),
        ("soft\u00adhyphen, \u202eturned\u202c, \ufeffmarked", "softhyphen, turned, marked"),
        ("lone \ud800 half", "lone half"),
        ("crème brûlée 日本 🎁", "crème brûlée 日本 🎁"),
    ],
)
def test_clean(raw: str | None, cleaned: str) -> None:
    assert text.clean(raw) == cleaned
    assert text.clean(text.clean(raw)) == cleaned


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_words_are_those_of_any_text(plain: str) -> None:
    assert text.words(f"é {plain}") == ["é", *text.words(plain)]


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ("ग्राहक बिना खुशबू वाली क्रीम", ["ग्राहक", "बिना", "खुशबू", "वाली", "क्रीम"]),
        ("無香料クリーム", [*"無香料クリーム"]),
        ("ไม่มีน้ำหอม", ["ไ", "ม่", "มี", "น้", "ำ", "ห", "อ", "ม"]),
        ("향이 없는 크림", ["향이", "없는", "크림"]),
        ("l’été, e\u0301té", ["l’été", "e\u0301té"]),
    ],
)
def test_words_of_other_scripts(raw: str, found: list[str]) -> None:
    assert text.words(raw) == found


def test_cleaning_hostile_markup_takes_no_time() -> None:
    for hostile in ("<a " + "=" * 200_000 + "<", "<" * 200_000, "<script>" * 30_000, "<!--" * 50_000):
        assert len(text.clean(hostile)) <= len(hostile)


SPECIAL_TOKENS = {
    "smollm2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<gh_stars>"),
    "phi-4-mini": (
        "<|endoftext|>",
        "<|endofprompt|>",
        "<|assistant|>",
        "<|end|>",
        "<|user|>",
        "<|system|>",
        "<|tool|>",
    ),
    "qwen3": ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<tool_call>", "</tool_call>", "<think>", "</think>"),
    "gemma": ("<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>", "[@BOS@]", "<unused0>"),
    "llama-2": ("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "bert": ("[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]"),
}
AROUND = [("- ", " | rated 5/5"), ('- Soap | rated 1/5 | "', '"\n'), ("guessed: ", "\n\n"), ("- ", "\n\n"), ("", " ")]
"""What stands before and after a stranger's text in prompts."""


def _pieces(tokens: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Texts of whole tokens, parts of tokens and whatever else, in any order."""
    parts = [token[a:b] for token in tokens for a in range(len(token)) for b in range(a + 1, len(token) + 1)]
    return st.lists(st.sampled_from(parts) | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(SPECIAL_TOKENS)).flatmap(
        lambda name: st.tuples(st.just(name), _pieces(SPECIAL_TOKENS[name]))
    )
)
def test_no_text_holds_or_completes_a_special_token(drawn: tuple[str, str]) -> None:
    tokens, raw = SPECIAL_TOKENS[drawn[0]], drawn[1]
    safe = text.neutralise(raw, tokens)
    for before, after in AROUND:
        assert not [token for token in tokens if token in before + safe + after]
    assert text.neutralise(safe, tokens) == safe


@given(st.lists(st.text("<|>/ab ", min_size=1, max_size=4), max_size=5), st.text("<|>/ab ", max_size=30))
def test_neutralising_ends_whatever_the_tokens_are(tokens: list[str], raw: str) -> None:
    safe = text.neutralise(raw, tokens)
    assert not [token for token in tokens if token.strip() and token in safe]


def test_item_text_without_a_title() -> None:
    categories = ["Magazines", "Fashion", "Women"]
    assert text.item_text("", "", "Hearst", categories)[1] == "Hearst, Magazines, Women"
    assert text.item_text("", "All about shoes.", "Hearst", categories)[1] == "Hearst, Women: All about shoes."
    assert text.item_text("", "", "", []) == ("", "")
    assert text.item_text("Hearst Weekly", "", "HEARST", categories) == ("Hearst Weekly", "Hearst Weekly")


def test_history_lines() -> None:
    full = text.history_text(HISTORY, ITEMS, count=words, max_tokens=100, review_words=2, special_tokens=["<|im_end|>"])
    assert full.splitlines() == [
        '- Soap (Fernleaf) | rated 5/5 | "No perfume …"',
        "- Tea (Fernleaf) | rated 2.5/5",
        '- unknown | "She said …"',
    ]
    without = text.history_text(HISTORY, ITEMS, count=words, max_tokens=100, review_words=0)
    assert '"' not in without


def test_reviews_cannot_end_a_turn_or_their_quotes() -> None:
    line = text.step_text(HISTORY.interactions[2], ITEMS, 10, ["<|im_end|>"])
    assert line.count('"') == 2
    assert "<|im_end|>" not in line


@pytest.mark.parametrize("max_tokens", range(1, 24))
def test_budgets_cut_from_the_oldest_side(max_tokens: int) -> None:
    full = text.history_text(HISTORY, ITEMS, count=words, max_tokens=1000, review_words=4).splitlines()
    kept = text.history_text(HISTORY, ITEMS, count=words, max_tokens=max_tokens, review_words=4).splitlines()
    assert kept == full[-len(kept) :]
    assert len(kept) == 1 or sum(map(words, kept)) <= max_tokens
    assert len(kept) == len(full) or sum(map(words, full[-len(kept) - 1 :])) > max_tokens


@pytest.mark.parametrize("max_tokens", [1, 8, 200])
def test_behaviour_keeps_newest_and_target(max_tokens: int) -> None:
    behaviour = text.behaviour_text(HISTORY, ITEMS, "lamp", count=words, max_tokens=max_tokens, review_words=4)
    lines = behaviour.splitlines()
    assert lines[-1] == "Next: Lamp (Fernleaf)"
    assert lines[-2].startswith("- unknown")
    alone = text.behaviour_text(HISTORY, ITEMS, None, count=words, max_tokens=max_tokens, review_words=4)
    assert "Lamp" not in alone
