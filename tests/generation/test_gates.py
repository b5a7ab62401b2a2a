"""Which completions are kept, and what happens to the others."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from scribe import Scribe

from pulse_ray.config import GATES, LANGUAGES, Gate, SamplingConfig
from pulse_ray.generation.engine import Completion
from pulse_ray.generation.gates import Flaw, Request, draw, fault, judge
from pulse_ray.generation.names import ItemNames

GOOD = "The customer wants creams without perfume, because scented ones made the skin itch."
HISTORY = ("Unscented Hand Cream for Dry Skin (Fernleaf)", "Crème de Corps Nourrissante pour Peau Sèche (Otterbrook)")
HISTORY_LINES = (
    "A customer bought these products, oldest first:\n"
    f"- {HISTORY[0]} | rated 5/5\n- {HISTORY[1]} | rated 4/5\n\n"
    "Customers with similar taste also bought:\n- Oat Soap Bar (Wren & Co)\n- Cotton Gloves (Calder)"
)
REQUEST = Request(
    prompt=HISTORY_LINES,
    task="Say in two short sentences what this customer will want next and why.",
    thought="The customer wants creams without perfume in a small tube for the bag.",
    reviews=("My old one left my hands sticky for hours, this one is gone in a minute.",),
    titles=(*HISTORY, "Oat Soap Bar (Wren & Co)", "Cotton Gloves (Calder)"),
    names=ItemNames(["Hand Cream for Dry Skin", "Zyxwort Night Balm", "Trail Mix", "Gift Card in a Box", *HISTORY]),
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("", "empty"),
        (" \n!? ", "empty"),
        ("Hand cream.", "too short"),
        ("soft and warm and soft and warm and soft and warm and soft and warm", "repeats itself"),
        ("a cream that is gone in a minute. They look for a cream that is gone in a minute.", "repeats itself"),
        ("Say in two short sentences what this customer will want next.", "copies the prompt"),
        ("creams without perfume in a small tube for the bag.", "copies the prompt"),
        ("a cream whose old one left my hands sticky for hours, this one is gone in a minute.", "copies the prompt"),
        ("creams without perfume in a small tube for the bag, as scent makes the skin itch at night.", None),
        (HISTORY_LINES.split("\n\n")[0], "copies the prompt"),
        (HISTORY_LINES.split("\n\n")[1], "copies the prompt"),
        (HISTORY_LINES, "copies the prompt"),
        (
            "things like the Unscented Hand Cream for Dry Skin (Fernleaf), the Oat Soap Bar (Wren & Co) and the Cotton "
            "Gloves (Calder), all of them kind to skin.",
            None,
        ),
        ("Oat Soap Bar (Wren & Co), Cotton Gloves (Calder)", None),
        ("a cream that does not leave hands sticky for hours, so that work can go on.", None),
        ("an Unscented Hand Cream for Dry Skin (Fernleaf), an Unscented Hand Cream for feet.", None),
        ("things such as the Zyxwort Night Balm, which the skin takes in at once.", "names an unseen item"),
        ("a snack for long walks, above all Trail Mix with nuts.", "names an unseen item"),
        ("a hand cream for dry skin, a trail mix or a gift card in a box.", None),
        ("productos sin perfume porque la piel le pica con los otros.", "wrong language"),
        ("Cremes ohne Duftstoffe, weil die Haut davon juckt und rot wird.", "wrong language"),
        ("没有香味的护肤霜， 因为 他的 皮肤 会 发痒 而且 很 干燥。", "wrong language"),
        ("a cream like Crème de Corps Nourrissante pour Peau Sèche (Otterbrook).", None),
        ("body care such as crème de corps nourrissante pour peau sèche.", None),
        ("the Fjällräven Kånken Rucksack Größe mittel für Schule und Freizeit.", None),
    ],
)
def test_degenerate_texts_are_told_from_good_ones(text: str, reason: str | None) -> None:
    assert fault(text, REQUEST, SamplingConfig(), cut=False) == reason
    only: tuple[Gate, ...] = tuple(gate for gate in GATES if gate == reason)
    assert fault(text, REQUEST, SamplingConfig(gates=only), cut=False) == reason
    left_out: tuple[Gate, ...] = tuple(gate for gate in GATES if gate != reason)
    if reason != "empty":
        assert fault(text, REQUEST, SamplingConfig(gates=left_out), cut=False) is None


def test_a_refinement_may_keep_most_of_the_thought_in_its_prompt() -> None:
    request = replace(REQUEST, prompt=f"{HISTORY_LINES}\n\nA colleague guessed: {REQUEST.thought} Say it better.")
    text = "The customer wants creams without perfume in a small tube, as scent makes the skin itch at night."
    assert fault(text, request, SamplingConfig(), cut=False) is None
    repeated = f"{REQUEST.thought} {HISTORY_LINES}"
    assert fault(repeated, request, SamplingConfig(), cut=False) == "copies the prompt"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("creams without any perfume. They also look for", "creams without any perfume."),
        ("creams without any perfume, as scent makes", None),
        ("creams. They look for things without perfume in", None),
        ("creams without any perfume. They like it.", "creams without any perfume. They like it."),
        ("creams without any perfume. Creams by St. Ives that do not", "creams without any perfume."),
        ("creams by Dr. Brown, e.g. those by St. Ives that", None),
        ("creams without any perfume, balms etc. They like", "creams without any perfume, balms etc."),
        ("没有香味的护肤霜。她的皮肤在冬", "没有香味的护肤霜。"),
        ("「香りのないクリーム。」冬は肌が", "「香りのないクリーム。」"),
        ("बिना खुशबू वाली क्रीम। उसकी त्वचा", "बिना खुशबू वाली क्रीम।"),
        ("ครีมที่ไม่มีน้ำหอมเพราะผิวแพ้", None),
    ],
)
def test_of_a_text_that_was_cut_off_whole_sentences_stay(text: str, kept: str | None) -> None:
    completion = Completion(text=text, mean_logprob=-1.0, num_tokens=9, finish_reason="length", seed=0)
    judged = judge(completion, REQUEST, SamplingConfig(min_words=4, language=None))
    if kept is None:
        assert judged == Flaw(reason="cut off", detail=text)
    else:
        assert isinstance(judged, Completion)
        assert judged.text == kept


def test_the_languages_of_the_configuration_are_those_that_can_be_told() -> None:
    from pulse_ray.generation.language import _identifier

    assert set(LANGUAGES) == {*_identifier().labels} - {"zxx"}
    text = "productos sin perfume porque la piel le pica con los otros."
    assert fault(text, REQUEST, SamplingConfig(language="es"), cut=False) is None
    assert fault(GOOD, REQUEST, SamplingConfig(language="es"), cut=False) == "wrong language"
    assert fault(text, REQUEST, SamplingConfig(language=None), cut=False) is None


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("zh", "没有香味的护肤霜，因为她的皮肤在冬天很干燥。"),
        ("yue", "冇香味嘅潤膚膏，因為佢嘅皮膚好乾。"),
        ("ja", "香りのないクリームを探しています。冬は肌が乾燥するからです。"),
        ("th", "ครีมที่ไม่มีน้ำหอมเพราะผิวแพ้ง่าย"),
        ("lo", "ຄີມທີ່ບໍ່ມີກິ່ນຫອມເພາະຜິວແຫ້ງ"),
        ("km", "ក្រែមគ្មានក្លិនព្រោះស្បែករបស់គាត់ស្ងួត។"),
        ("my", "ရနံ့မပါသော ခရင်မ်ကို ကြိုက်သည်။"),
        ("hi", "बिना खुशबू वाली क्रीम क्योंकि उसकी त्वचा रूखी है।"),
        ("ko", "향이 없는 크림을 좋아합니다. 겨울에는 피부가 건조하기 때문입니다."),
        ("ar", "كريم بلا عطر لأن البشرة جافة في الشتاء."),
    ],
)
def test_good_text_of_other_scripts_is_kept(language: str, text: str) -> None:
    sampling = SamplingConfig(language=language)
    assert fault(text, REQUEST, sampling, cut=False) is None
    assert fault(text, REQUEST, sampling, cut=True) == ("cut off" if language in ("th", "lo") else None)
    assert fault(text[:2], REQUEST, sampling, cut=False) == "too short"
    assert fault(text * 4, REQUEST, sampling, cut=False) == "repeats itself"


def _draw(scribe: Scribe, prompt: str = "prompt", attempts: int = 3, temperature: float = 0.8) -> Completion | Flaw:
    request = replace(REQUEST, prompt=prompt)
    sampling = SamplingConfig(attempts=attempts, temperature=temperature)
    (drawn,) = asyncio.run(draw(scribe, request, sampling, lambda attempt: 10 + attempt))
    return drawn


def test_a_flawed_completion_is_drawn_again_with_the_next_seed() -> None:
    scribe = Scribe(lambda prompt, seed: GOOD if seed == 12 else "No.")
    kept = _draw(scribe)
    assert isinstance(kept, Completion)
    assert (kept.text, kept.seed, len(scribe.prompts)) == (GOOD, 12, 3)


def test_an_opening_is_read_by_the_model_and_stands_before_what_it_adds() -> None:
    scribe = Scribe(lambda prompt, seed: " creams without perfume, as scent made the skin itch.")
    request = replace(REQUEST, prompt="prompt ", opening="They want")
    (kept,) = asyncio.run(draw(scribe, request, SamplingConfig(), lambda attempt: 1))
    assert isinstance(kept, Completion)
    assert scribe.prompts == ["prompt They want"]
    assert kept.text == "They want creams without perfume, as scent made the skin itch."


def test_only_the_siblings_that_are_flawed_are_drawn_again() -> None:
    scribe = Scribe(lambda prompt, seed: "No." if seed in (11, 20) else f"{GOOD} {seed}")
    drawn = asyncio.run(draw(scribe, REQUEST, SamplingConfig(attempts=2), lambda attempt: 10 * (attempt + 1), n=3))
    assert [one.seed if isinstance(one, Completion) else one.reason for one in drawn] == [10, "too short", 12]
    assert len(scribe.prompts) == 2


def test_after_the_last_attempt_the_reason_is_told() -> None:
    assert _draw(Scribe(lambda prompt, seed: "No."), attempts=2) == Flaw(reason="too short", detail="No.")


def test_what_is_drawn_greedily_is_drawn_once() -> None:
    scribe = Scribe(lambda prompt, seed: "No.")
    assert _draw(scribe, temperature=0) == Flaw(reason="too short", detail="No.")
    assert len(scribe.prompts) == 1


def test_a_prompt_that_does_not_fit_is_not_sent() -> None:
    scribe = Scribe(lambda prompt, seed: GOOD)
    flaw = _draw(scribe, prompt="word " * 2000)
    assert isinstance(flaw, Flaw)
    assert flaw.reason == "prompt too long"
    assert not scribe.prompts
