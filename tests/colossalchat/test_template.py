"""A conversation template's JSON file as Jinja and stop tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from chatloom.colossalchat.template import Scaffold, Template, load_tokenizer, read_template
from chatloom.errors import InputError
from tests.colossalchat.factories import CHATML, OPENING, TO_ANSWER, TO_QUESTION, write_json

HI = {"role": "user", "content": "Hi"}


def render(template: Template, *messages: dict[str, str], generation_prompt: bool = False) -> str:
    text: str = template.tokenizer.apply_chat_template(
        list(messages), chat_template=template.jinja, tokenize=False, add_generation_prompt=generation_prompt
    )
    return text


def test_the_system_message_is_built_in_for_conversations_without_one(chatml: Template) -> None:
    assert render(chatml, HI, generation_prompt=True) == f"{OPENING}Hi{TO_ANSWER}"
    own = {"role": "system", "content": "Be brief."}
    assert render(chatml, own, HI) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_a_template_is_written_as_it_would_be_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # A line that begins with white space and a block, which Jinja leaves out at the start of a line only.
    source = "  {% for message in messages %}\n{{ message['content'] + '<|im_end|>' }}\n{% endfor %}"
    config = {"chat_template": source, "system_message": "{{ S }}", "stop_ids": [2], "end_of_assistant": "<|im_end|>"}
    template = read_template(write_json(tmp_path / "t.json", config), tokenizer)
    assert render(template, HI) == "{{ S }}<|im_end|>\nHi<|im_end|>\n"


def test_without_a_system_message_the_template_stays_as_it_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    template = read_template(write_json(tmp_path / "t.json", CHATML | {"system_message": None}), tokenizer)
    assert template.jinja == CHATML["chat_template"]


def test_the_scaffold_is_what_stands_around_the_turns(chatml: Template, human_template: Template) -> None:
    assert chatml.scaffold == Scaffold(
        OPENING, TO_ANSWER, f"<|im_end|>{TO_QUESTION}", "<|im_end|>", generation_prompt=TO_ANSWER
    )
    assert human_template.scaffold == Scaffold(
        "Be kind.\n\nHuman: <s>", "</s>Assistant: <s>", "</s>Human: <s>", "</s>", "</s>Assistant: <s>"
    )


@pytest.mark.parametrize(
    ("changes", "stop_tokens"),
    [
        ({}, ["<|im_end|>"]),
        # What the template writes comes first: training answers end with it.
        ({"stop_ids": [0], "end_of_assistant": "<|endoftext|>"}, ["<|im_end|>", "<|endoftext|>"]),
        ({"stop_ids": []}, ["<|im_end|>"]),
        # Several ids are one sequence in ColossalChat; here "ab", which is no token.
        ({"stop_ids": [67, 68]}, ["<|im_end|>"]),
    ],
)
def test_stop_tokens(
    changes: dict[str, Any], stop_tokens: list[str], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert read_template(write_json(tmp_path / "t.json", CHATML | changes), tokenizer).stop_tokens == stop_tokens


def test_a_template_by_path_and_the_tokenizers_own(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    for given in (str(tmp_path / "model"), None):
        config = {"chat_template": given, "system_message": None, "stop_ids": [2]}
        template = read_template(write_json(tmp_path / "t.json", config), load_tokenizer(tmp_path / "model"))
        assert template.jinja == tokenizer.chat_template


def test_keys_of_other_tasks_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = CHATML | {"reward_signal": ["+", "-"], "step_score_signal": "x"}
    assert read_template(write_json(tmp_path / "t.json", config), tokenizer).unused == [
        "reward_signal",
        "step_score_signal",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "{% for %}"}, "t.json: chat_template: "),
        ({"chat_template": 3}, "t.json: chat_template = 3: expected text"),
        ({"chat_template": "{{ messages[0]['content'] }}<|im_end|>"}, "does not write every turn once and as it is"),
        (
            {"chat_template": "{% for m in messages %}\n{{ m['content'] }}{% endfor %}"},
            "writes nothing behind an answer",
        ),
        ({"stop_ids": [99999]}, "t.json: stop_ids = [99999]: expected ids of the tokenizer's 259 tokens"),
        ({"stop_ids": "</s>"}, "t.json: stop_ids = '</s>'"),
        (
            {"chat_template": "{% for m in messages %}{{ m['content'] }}##{% endfor %}", "end_of_assistant": "##"}
            | {"stop_ids": [5, 5]},
            "neither is one token of the tokenizer; add it to the tokenizer as a special token",
        ),
    ],
)
def test_unusable_templates_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(InputError) as caught:
        read_template(write_json(tmp_path / "t.json", CHATML | changes), tokenizer)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1,\n}', "t.json:2: not valid JSON"),
        ("[]", "t.json: expected a JSON object"),
        (None, "t.json: no such file"),
    ],
)
def test_unreadable_files_are_named(
    content: str | None, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    if content is not None:
        (tmp_path / "t.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_template(tmp_path / "t.json", tokenizer)


def test_turns_that_cannot_be_told_apart(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    numbered = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    template = read_template(write_json(tmp_path / "t.json", CHATML | {"chat_template": numbered}), tokenizer)
    with pytest.raises(InputError, match="turns cannot be told apart"):
        _ = template.scaffold


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
