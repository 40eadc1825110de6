"""Every accepted schema, and every fault a row can have."""

from __future__ import annotations

from typing import Any

import pytest

from chatloom.config import Format
from chatloom.data.drops import RowFault
from chatloom.data.schemas import Conversation, convert, detect_format, detect_language, ignored_keys


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"

ACCEPTED: list[tuple[str, Format, dict[str, Any], Conversation]] = [
    (
        "alpaca",
        "alpaca",
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        Conversation([user("Add.\n\n1 and 2")], ["3"]),
    ),
    (
        "alpaca, empty input",
        "alpaca",
        {"instruction": "Hi", "input": "", "output": "x"},
        Conversation([user("Hi")], ["x"]),
    ),
    ("alpaca, no input", "alpaca", {"instruction": "Hi", "output": " x"}, Conversation([user("Hi")], [" x"])),
    (
        "alpaca, null input",
        "alpaca",
        {"instruction": "Hi", "input": None, "output": "x"},
        Conversation([user("Hi")], ["x"]),
    ),
    (
        "messages",
        "messages",
        {"messages": [system("S"), user("a"), assistant("b"), user("c"), assistant("d")]},
        Conversation([system("S"), user("a"), assistant("b"), user("c")], ["d"]),
    ),
    (
        "messages with from and value",
        "messages",
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        Conversation([user("a")], ["b"]),
    ),
    (
        "an empty system message says nothing",
        "messages",
        {"messages": [system(" "), user("a"), assistant("b")]},
        Conversation([user("a")], ["b"]),
    ),
    (
        "sharegpt",
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        Conversation([system("S"), user("a")], ["b"]),
    ),
    (
        "preference, prompt",
        "preference",
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        Conversation([user("a")], ["good", "bad"]),
    ),
    (
        "preference, messages",
        "preference",
        {"messages": [user("a"), assistant("b"), user("c")], "chosen": "good", "rejected": "bad"},
        Conversation([user("a"), assistant("b"), user("c")], ["good", "bad"]),
    ),
    (
        "preference, context",
        "preference",
        {"context": [user("a")], "chosen": assistant("good"), "rejected": [assistant("bad")]},
        Conversation([user("a")], ["good", "bad"]),
    ),
    (
        "preference, ShareGPT turns",
        "preference",
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        Conversation([user("a")], ["good", "bad"]),
    ),
    (
        "preference, whole conversations beside the prompt",
        "preference",
        {"prompt": "a", "chosen": [user("a"), assistant("good")], "rejected": [user("a"), assistant("bad")]},
        Conversation([user("a")], ["good", "bad"]),
    ),
    (
        "preference, whole conversations alone",
        "preference",
        {"chosen": [user("a"), assistant("good")], "rejected": [user("a"), assistant("bad")]},
        Conversation([user("a")], ["good", "bad"]),
    ),
    (
        "preference, instruction and input",
        "preference",
        {"instruction": "a", "input": "b", "chosen": "good", "rejected": "bad"},
        Conversation([user("a\n\nb")], ["good", "bad"]),
    ),
    (
        "a leading assistant turn holds instructions",
        "preference",
        {"messages": [assistant("Be kind."), user("a")], "chosen": "good", "rejected": "bad"},
        Conversation([system("Be kind."), user("a")], ["good", "bad"], leading_assistant=True),
    ),
    (
        "hh",
        "hh",
        {"chosen": f"{HH} Because.", "rejected": f"{HH} No."},
        Conversation([user("Hi"), assistant("Hello."), user("Why?")], ["Because.", "No."]),
    ),
    (
        "hh, transcript as prompt",
        "hh",
        {"prompt": HH, "chosen": " Because.", "rejected": " No."},
        Conversation([user("Hi"), assistant("Hello."), user("Why?")], [" Because.", " No."]),
    ),
    (
        "ranked, prompt",
        "ranked",
        {"prompt": "a", "responses": ["best", "middle", "worst"]},
        Conversation([user("a")], ["best", "middle", "worst"]),
    ),
    (
        "ranked, messages",
        "ranked",
        {"messages": [user("a")], "responses": ["best", "worst"]},
        Conversation([user("a")], ["best", "worst"]),
    ),
    ("prompt, instruction", "prompt", {"id": "7", "instruction": "a"}, Conversation([user("a")], [])),
    ("prompt, prompt", "prompt", {"prompt": "a"}, Conversation([user("a")], [])),
    ("prompt, with input", "prompt", {"instruction": "a", "input": "b"}, Conversation([user("a\n\nb")], [])),
]


@pytest.mark.parametrize(
    ("format", "fields", "expected"), [case[1:] for case in ACCEPTED], ids=[case[0] for case in ACCEPTED]
)
def test_accepted_schema_is_detected_and_converted(
    format: Format, fields: dict[str, Any], expected: Conversation
) -> None:
    assert detect_format([fields]) == format
    assert convert(fields, format) == expected


def test_plain_text_is_a_prompt() -> None:
    assert convert({"text": "a"}, "text") == Conversation([user("a")], [])


FAULTS: list[tuple[Format, dict[str, Any], str, str]] = [
    ("alpaca", {"instruction": "a", "output": " \n"}, "empty_answer", "output is empty"),
    ("alpaca", {"instruction": "a"}, "missing_key", "no key 'output'"),
    ("alpaca", {"instruction": "a", "output": 3}, "wrong_type", "output is a number, expected text"),
    ("alpaca", {"instruction": "a", "input": ["x"], "output": "b"}, "wrong_type", "input is a list, expected text"),
    ("alpaca", {"instruction": " ", "input": "", "output": "b"}, "empty_prompt", "the last user turn is empty"),
    ("alpaca", {"instruction": "a\ud83d", "output": "b"}, "broken_text", "instruction has half a character at 1"),
    ("messages", {"messages": "a"}, "wrong_type", "messages is text, expected a list of messages"),
    ("messages", {"messages": ["a"]}, "wrong_type", "messages[0] is text, expected a message"),
    ("messages", {"messages": []}, "last_turn_not_assistant", "there is no turn, expected the assistant's"),
    ("messages", {"messages": [{"content": "a"}]}, "missing_key", "messages[0] has no role or from"),
    ("messages", {"messages": [{"role": "user"}]}, "missing_key", "messages[0] has no content or value"),
    (
        "messages",
        {"messages": [{"role": "tool", "content": "a"}]},
        "unknown_role",
        "messages[0] has the role 'tool', expected one of user, human, assistant, gpt, system",
    ),
    (
        "messages",
        {"messages": [user("a")]},
        "last_turn_not_assistant",
        "the last turn is the user's, expected the assistant's",
    ),
    ("messages", {"messages": [assistant("a")]}, "empty_prompt", "there is no user turn before the answer"),
    (
        "messages",
        {"messages": [user("a"), user("b"), assistant("c")]},
        "role_order",
        "turn 2 is the user's, expected the assistant's",
    ),
    (
        "messages",
        {"messages": [system("S"), user("a"), assistant("b"), assistant("c"), user("d"), assistant("e")]},
        "role_order",
        "turn 4 is the assistant's, expected the user's",
    ),
    (
        "messages",
        {"messages": [user("a"), assistant(""), user("b"), assistant("c")]},
        "empty_turn",
        "an earlier turn is empty",
    ),
    ("messages", {"messages": [user("a"), assistant("")]}, "empty_answer", "the last turn is empty"),
    (
        "preference",
        {"messages": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"},
        "last_turn_not_user",
        "the context ends with an assistant turn, expected the user's",
    ),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": ""}, "empty_answer", "rejected is empty"),
    (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "b "},
        "repeated_response",
        "two ranked responses are equal",
    ),
    (
        "preference",
        {"prompt": "a", "chosen": [user("a")], "rejected": "b"},
        "last_turn_not_assistant",
        "chosen does not end with an assistant turn",
    ),
    (
        "preference",
        {"prompt": "a", "chosen": [user("x"), assistant("b")], "rejected": [user("x"), assistant("c")]},
        "contexts_differ",
        "the prompt is not the one chosen and rejected answer",
    ),
    (
        "hh",
        {"chosen": f"{HH} b", "rejected": "\n\nHuman: other\n\nAssistant: c"},
        "contexts_differ",
        "chosen and rejected differ before their last turn",
    ),
    ("hh", {"chosen": "b", "rejected": f"{HH} c"}, "not_a_transcript", 'chosen does not begin with "\\n\\nHuman:"'),
    ("ranked", {"prompt": "a", "responses": "b"}, "wrong_type", "responses is text, expected a list of texts"),
    ("ranked", {"prompt": "a", "responses": []}, "empty_answer", "responses is empty"),
    ("ranked", {"prompt": "a", "responses": ["b", ""]}, "empty_answer", "responses[1] is empty"),
    ("ranked", {"prompt": "a", "responses": ["b", {}]}, "wrong_type", "responses[1] is an object, expected text"),
    (
        "ranked",
        {"responses": ["b", "c"]},
        "missing_key",
        "none of the keys prompt, messages, conversations, context, instruction",
    ),
    ("prompt", {"prompt": "\n"}, "empty_prompt", "the last user turn is empty"),
    ("prompt", {"prompt": True}, "wrong_type", "prompt is true or false, expected text"),
]


@pytest.mark.parametrize(("format", "fields", "reason", "detail"), FAULTS)
def test_fault_has_reason_and_detail(format: Format, fields: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(RowFault) as caught:
        convert(fields, format)
    assert (caught.value.reason, caught.value.detail) == (reason, detail)


def test_detection_follows_most_rows() -> None:
    incomplete = {"instruction": "no answer here"}
    assert (
        detect_format([incomplete, {"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}])
        == "alpaca"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "a"},
        {"prompt": "a", "completion": "b"},  # taken for a prompt, it would lose its answer
        {"prompt": "a", "output": "b"},
        {"chosen": "b", "rejected": "c"},
        {"text": "a"},  # a corpus, not prompts, unless `format: text` says so
    ],
)
def test_unknown_schema_is_not_guessed(fields: dict[str, Any]) -> None:
    assert detect_format([fields]) is None


def test_keys_a_format_does_not_read_are_named() -> None:
    row = {"id": 1, "lang": "en", "instruction": "a", "output": "b", "history": [], "topic": "x"}
    assert ignored_keys([row], "alpaca") == ["history", "topic"]


@pytest.mark.parametrize(
    ("question", "answer", "language"),
    [
        ("What is 你好?", "It is a greeting, the most common one there is.", "en"),
        ("把下面的句子翻译成英文：你好吗", "How are you?", "zh"),
        ("1 + 1 = ?", "2", "en"),
        ("用 Python 写一个函数", "def f(): return", "zh"),
    ],
)
def test_language_by_script(question: str, answer: str, language: str) -> None:
    assert detect_language(Conversation([user(question)], [answer])) == language
