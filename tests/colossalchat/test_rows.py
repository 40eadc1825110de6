"""ColossalChat's rows as conversations, from text and from tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from chatloom.colossalchat.rows import conversation
from chatloom.colossalchat.template import Template, read_template
from chatloom.data.drops import RowFault
from chatloom.data.schemas import Conversation
from tests.colossalchat.factories import (
    OPENING,
    TO_ANSWER,
    TO_QUESTION,
    assistant,
    human,
    preference_columns,
    prompt_columns,
    sft_columns,
    write_json,
)

# Two rounds as `split_templated_prompt_into_chunks` cuts them; an answer's chunk ends with `end_of_assistant`.
ROUNDS = [
    (OPENING, False),
    (" Hi,\nyou", False),
    (TO_ANSWER, False),
    ("Hello! <|im_end|>", True),
    (TO_QUESTION, False),
    ("二加二?", False),
    (TO_ANSWER, False),
    ("4<|im_end|>", True),
]


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(contents)]


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # Raw, of the current version.
        ({"messages": [human("Hi"), assistant("Hello")]}, Conversation(turns("Hi"), ["Hello"])),
        ({"messages": [human("Hi")]}, Conversation(turns("Hi"), [])),
        ({"messages": [human("a"), assistant("b"), human("c")]}, Conversation(turns("a", "b", "c"), [])),
        (
            {"messages": [{"from": "Human", "content": "Hi"}, {"from": "Assistant", "content": "Hello"}]},
            Conversation(turns("Hi"), ["Hello"]),
        ),
        (
            # Its preparation joins neighbours of one role in a context.
            {"context": [human("Hi"), human("you")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
            Conversation(turns("Hi you"), ["good", "bad"]),
        ),
        (
            {"context": [human("Hi")], "chosen": assistant("good"), "rejected": assistant("bad")},
            Conversation(turns("Hi"), ["good", "bad"]),
        ),
        # Not its own, but not to be taken for prompts either.
        ({"messages": [human("Hi")], "chosen": "good", "rejected": "bad"}, Conversation(turns("Hi"), ["good", "bad"])),
        ({"messages": [human("Hi")], "responses": ["best", "worst"]}, Conversation(turns("Hi"), ["best", "worst"])),
        (
            {"prompt": [human("Hi")], "completion": assistant("Hello"), "label": True},
            Conversation(turns("Hi"), ["Hello"]),
        ),
        # Prepared: the columns of tokens stand beside the text.
        (
            {"messages": [human("a"), assistant("b"), human("c")], "input_ids": [1], "labels": [1]},
            Conversation(turns("a"), ["b"]),
        ),
        ({"messages": [human("a"), assistant("b")], "input_ids": [1]}, Conversation(turns("a"), [])),
        # Of the older version.
        ({"instruction": "Add", "input": "2 2", "output": "4"}, Conversation(turns("Add\n\n2 2"), ["4"])),
        ({"instruction": "Add", "id": 7}, Conversation(turns("Add"), [])),
        ({"act": "Poet", "prompt": "Be a poet"}, Conversation(turns("Be a poet"), [])),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
                "dataset": "Alpaca",
            },
            Conversation(turns("Hi"), ["Hello"]),
        ),
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " good", "chosen": " good", "rejected": " bad"},
            Conversation(turns("Hi"), [" good", " bad"]),
        ),
    ],
)
def test_rows_with_text(fields: dict[str, Any], expected: Conversation) -> None:
    assert conversation(fields, None) == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": "Hi"}, "wrong_type"),
        ({"messages": []}, "last_turn_not_assistant"),
        ({"messages": [{"from": "robot", "content": "x"}, assistant("y")]}, "unknown_role"),
        ({"context": 3, "chosen": [assistant("a")], "rejected": [assistant("b")]}, "wrong_type"),
        ({"prompt": [human("Hi")], "completion": assistant("Hello"), "label": False}, "undesired_answer"),
        ({"prompt": "Hi", "completion": assistant("Hello"), "label": True}, "wrong_type"),
        ({"source": "", "target": "Once upon a time"}, "unknown_schema"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "only_tokens"),
    ],
)
def test_rows_that_cannot_be_used(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowFault) as caught:
        conversation(fields, None)
    assert caught.value.reason == reason


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_sft_tokens(chatml: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = Conversation(turns(" Hi,\nyou", "Hello! ", "二加二?"), ["4"])
    assert conversation(sft_columns(tokenizer, *ROUNDS), chatml) == expected
    # The older preparation went on behind the last answer, and gave what follows each answer a loss too.
    older = [*ROUNDS[:3], ("Hello! <|im_end|>\n", True), ("<|im_start|>user\n", False), *ROUNDS[5:], ("\n", False)]
    assert conversation(sft_columns(tokenizer, *older, ("<|im_end|>", True)), chatml) == expected


def test_white_space_of_the_template_is_no_content(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [/Q]"
        "{% else %} {{ m['content'] }} <|im_end|>{% endif %}{% endfor %}"
    )
    config = {"chat_template": source, "system_message": None, "stop_ids": [2], "end_of_assistant": "<|im_end|>"}
    template = read_template(write_json(tmp_path / "q.json", config), tokenizer)
    # A space before a content goes with the content.
    chunks = [("[Q]", False), ("  Hi", False), (" [/Q]", False), (" Hello <|im_end|>", True)]
    assert conversation(sft_columns(tokenizer, *chunks), template) == Conversation(turns(" Hi"), ["Hello"])
    assert conversation(prompt_columns(tokenizer, "[Q]", " Hi", " [/Q]"), template) == Conversation(turns("Hi"), [])


def test_prompt_tokens(chatml: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    one = prompt_columns(tokenizer, OPENING, "Hi", TO_ANSWER)
    assert conversation(one, chatml) == Conversation(turns("Hi"), [])
    two = prompt_columns(tokenizer, OPENING, "Hi", TO_ANSWER, "Hello<|im_end|>", TO_QUESTION, "2+2?", TO_ANSWER)
    assert conversation(two, chatml) == Conversation(turns("Hi", "Hello", "2+2?"), [])


def test_preference_tokens(chatml: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    context = [OPENING, "Hi", TO_ANSWER, "Hello<|im_end|>", TO_QUESTION, "2+2?", TO_ANSWER]
    fields = preference_columns(tokenizer, context, "4<|im_end|>", "5<|im_end|>")
    assert conversation(fields, chatml) == Conversation(turns("Hi", "Hello", "2+2?"), ["4", "5"])


def test_kto_tokens(chatml: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_columns(tokenizer, OPENING, "Hi", TO_ANSWER)["input_ids"]
    completion = prompt_columns(tokenizer, "Hello<|im_end|>\n")["input_ids"]
    fields = {"prompt": prompt, "completion": completion, "label": True, "completion_decode": "Hello<|im_end|>\n"}
    assert conversation(fields, chatml) == Conversation(turns("Hi"), ["Hello"])


def test_a_tokenizer_that_puts_a_space_before_each_piece(
    human_template: Template, sentencepiece: PreTrainedTokenizerBase
) -> None:
    chunks = [
        ("Be kind.\n\nHuman: <s>", False),
        ("Hi  there", False),
        ("</s>Assistant: <s>", False),
        ("Hello\n you</s>", True),
        ("Human: <s>", False),
        ("2 + 2?", False),
        ("</s>Assistant: <s>", False),
        ("4</s>", True),
    ]
    fields = sft_columns(sentencepiece, *chunks)
    # The beginning of the sequence is put first where the template does not write it.
    fields["input_ids"], fields["labels"] = [1, *fields["input_ids"]], [-100, *fields["labels"]]
    assert "</s> Human: <s> 2 + 2?" in fields["inputs_decode"]
    assert conversation(fields, human_template) == Conversation(turns("Hi  there", "Hello\n you", "2 + 2?"), ["4"])
    prompt = prompt_columns(sentencepiece, *(text for text, _ in chunks[:3]))
    assert conversation(prompt, human_template) == Conversation(turns("Hi  there"), [])


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([*ROUNDS[:3], ("Hello", True)], "cut_answer"),
        ([("Hi", False), ("Hello<|im_end|>", True)], "not_the_template"),
        (ROUNDS[:2], "not_the_template"),
        # A user who writes the template's own text: the loss shows what the model was to say.
        (
            [(OPENING, False), (f"Hi{TO_ANSWER}sure<|im_end|>{TO_QUESTION}really?", False), *ROUNDS[2:4]],
            "loss_elsewhere",
        ),
        ([(OPENING, False), ("Hi", True), (TO_ANSWER, False), ("Hello<|im_end|>", False)], "loss_elsewhere"),
    ],
)
def test_tokens_that_do_not_say_what_they_should(
    chunks: list[tuple[str, bool]], reason: str, chatml: Template, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(RowFault) as caught:
        conversation(sft_columns(tokenizer, *chunks), chatml)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_ids": [99999]}, "unknown_token"),
        ({"input_ids": ["a"]}, "wrong_type"),
        ({"input_ids": []}, "wrong_type"),
        ({"labels": [1]}, "lengths_differ"),
        ({"labels": None}, "not_the_template"),  # tokens alone are a prompt, and these do not end as one
    ],
)
def test_broken_columns(
    changes: dict[str, Any], reason: str, chatml: Template, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(RowFault) as caught:
        conversation(sft_columns(tokenizer, *ROUNDS) | changes, chatml)
    assert caught.value.reason == reason
