"""Each step finds its fault, mends, drops or reports it, and leaves good text alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatloom.data.cleaning import clean
from chatloom.data.drops import RowFault
from chatloom.data.schemas import convert
from tests.data.factories import ROOT, cleaning


def cleaned(question: str, *answers: str, lang: str = "en", **actions: Any) -> tuple[str, list[str], list[str]]:
    """Question and answers after cleaning, and the steps that mended or noticed something."""
    row = clean([{"role": "user", "content": question}], list(answers), lang, cleaning(**actions))
    return row.question, row.responses, [step for step, _ in (*row.mended, *row.noticed)]


def fault(question: str, *answers: str, **actions: Any) -> tuple[str, str]:
    with pytest.raises(RowFault) as caught:
        cleaned(question, *answers, **actions)
    return caught.value.reason, caught.value.detail


GOOD = [
    ("Translate “naïve café” into German — please!", "Das naïve Café… 😀", "en"),
    ("用一句话介绍北京。", "北京是中国的首都，有三千多年的建城史。", "zh"),
    ("Write a paragraph in HTML.", "<p>Hello &amp; welcome</p>", "en"),
    ("Fill the template: <name> lives in <town>.", "Use `x < y && y > z` there.", "en"),
    ("What is 3 + 4?\n\n5", "It is 7, not 5.\n\tSee?", "en"),
]


@pytest.mark.parametrize(("question", "answer", "lang"), GOOD)
def test_good_text_stays(question: str, answer: str, lang: str) -> None:
    assert cleaned(question, answer, lang=lang) == (question, [answer], [])


def test_starter_set_stays_as_it_is() -> None:
    for file in sorted((ROOT / "data/starter").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            row = convert(fields, "ranked")
            found = clean(row.messages, row.responses, fields["lang"], cleaning())
            assert (found.messages, found.responses, found.mended) == (row.messages, row.responses, [])


@pytest.mark.parametrize(
    ("text", "mended", "step"),
    [
        ("Where is the cafÃ©?", "Where is the café?", "mojibake"),
        ("It doesnâ€™t matter.", "It doesn’t matter.", "mojibake"),
        ("ä½\xa0å¥½ï¼Œä¸–ç•Œ", "你好，世界", "mojibake"),
        ("a\x00b\x1b[0m\ufeff", "ab[0m", "control_characters"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree", "control_characters"),
    ],
)
def test_broken_text_is_mended(text: str, mended: str, step: str) -> None:
    assert cleaned(text, "Yes, it is.", language_mismatch="off") == (mended, ["Yes, it is."], [step])
    assert cleaned("Well?", text, language_mismatch="off") == ("Well?", [mended], [step])
    assert fault("Well?", text, **{step: "drop"})[0] == step
    assert cleaned("Well?", text, language_mismatch="off", **{step: "report"}) == ("Well?", [text], [step])
    assert cleaned("Well?", text, language_mismatch="off", **{step: "off"}) == ("Well?", [text], [])


def test_text_of_which_nothing_is_left_is_dropped() -> None:
    assert fault("Well?", "\x00\x01") == ("control_characters", "nothing but such characters in '\\x00\\x01'")


def test_ranked_responses_that_become_equal_are_dropped() -> None:
    assert fault("Well?", "yes it is", "yes it is\x00")[0] == "repeated_response"


@pytest.mark.parametrize(
    ("question", "answer", "reason", "detail"),
    [
        (
            "Well?",
            "caf\ufffd is nice",
            "lost_characters",
            "a character was lost before this file was written: 'caf\ufffd is nice'",
        ),
        ("Well?", "<noOutput>", "placeholder_answer", "the answer is '<noOutput>'"),
        ("你好吗？", "无输出。", "placeholder_answer", "the answer is '无输出。'"),
        ("Well then?", " well  THEN? ", "repeats_question", "the answer is the question: 'Well then?'"),
        ("x" * 50_000, "y", "too_many_characters", "50001 characters, cleaning.max_characters is 50000"),
    ],
)
def test_fault_that_is_dropped(question: str, answer: str, reason: str, detail: str) -> None:
    assert fault(question, answer) == (reason, detail)


@pytest.mark.parametrize(
    ("question", "answer", "step"),
    [
        ("Who am I?", "<div>You are a reader</div>", "html_answer"),
        ("Who am I?", "A reader&nbsp;of books", "html_answer"),
        ("How many?", "7", "one_character_answer"),
        ("Write to me.", "Write to jane.doe@example.org today.", "pii_email"),
        ("Call me.", "My number is 13812345678.", "pii_phone"),
        ("Call me.", "Dial (212) 555-0187 now.", "pii_phone"),
        ("Pay me.", "Card 4111 1111 1111 1111, please.", "pii_card"),
        ("Who?", "My identity card says 11010519491231002X.", "pii_chinese_id"),
        ("Where?", "The server is at 192.168.17.4 today.", "pii_ip"),
        (
            "Wie geht es dir heute, mein lieber Freund?",
            "Mir geht es sehr gut, vielen Dank für die Frage.",
            "language_mismatch",
        ),
    ],
)
def test_step_that_only_reports_by_default(question: str, answer: str, step: str) -> None:
    assert cleaned(question, answer) == (question, [answer], [step])
    assert cleaned(question, answer, **{step.split("_")[0] if "pii" in step else step: "off"}) == (
        question,
        [answer],
        [],
    )
    assert fault(question, answer, **{step.split("_")[0] if "pii" in step else step: "drop"})[0] == step


@pytest.mark.parametrize(
    "text",
    [
        "Order 4111 1111 1111 1112.",
        "Version 1.2.3.4567",
        "1234567890123",
        "300.300.300.300",
        "In 1999-2004, 12 345 men",
    ],
)
def test_numbers_that_are_nobodys_data(text: str) -> None:
    assert cleaned("Which one was it?", text)[2] == []


def test_report_does_not_repeat_what_it_found_of_a_person() -> None:
    row = clean([{"role": "user", "content": "Who?"}], ["jane@example.org"], "en", cleaning())
    assert row.noticed == [("pii_email", "ja**************")]


def test_only_the_best_answer_is_checked() -> None:
    assert cleaned("How many?", "There are seven.", "<nooutput>") == (
        "How many?",
        ["There are seven.", "<nooutput>"],
        [],
    )


def test_placeholder_input_is_taken_from_the_question() -> None:
    assert cleaned("Name a colour.\n\n<noinput>", "Red.") == ("Name a colour.", ["Red."], ["placeholder_input"])
    assert cleaned("No input", "Then say something.")[0] == "No input"
    assert fault("Name a colour.\n\nNo input.", "Red.", placeholder_input="drop") == (
        "placeholder_input",
        "the question ends with 'No input.'",
    )
