"""ColossalChat's rows, raw or prepared, as conversations."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from chatloom.colossalchat import tokens
from chatloom.colossalchat.template import Template
from chatloom.data.drops import RowFault
from chatloom.data.schemas import Conversation, Fields, convert, detect_format

ANSWERS = ("assistant", "gpt")


def conversation(fields: Fields, template: Template | None) -> Conversation:
    """The conversation of one row: from its text, or from its tokens, for which there has to be a `template`.

    `prepare_dataset.py` keeps a row's text columns beside the tokens it makes of them, so that its output has the whole
    text, also of rounds that it left out at `--max_length`.

    Raises:
        RowFault: where the row holds neither.
    """
    keys = {key for key, value in fields.items() if value is not None}
    format = detect_format([fields])
    if format == "preference" and "context" in keys:
        sides = {side: _turns(fields[side]) for side in ("chosen", "rejected")}
        return convert({"context": _merged(_turns(fields["context"])), **sides}, format)
    if format == "messages":
        return _of_messages(fields)
    if format is not None:
        return convert(fields, format)
    if {"prompt", "completion", "label"} <= keys:
        return _of_completion(fields, template)
    if "chosen_input_ids" in keys:
        return tokens.preference(fields, _needed(template))
    if "input_ids" in keys:
        return (tokens.instruction if "labels" in keys else tokens.prompt)(fields, _needed(template))
    raise RowFault("unknown_schema", f"its keys are {', '.join(sorted(fields))}: none of ColossalChat's formats")


def _of_messages(fields: Fields) -> Conversation:
    """An instruction where the assistant speaks last, else a prompt; prepared rows say themselves what they are."""
    turns = _turns(fields["messages"])
    if not turns or not isinstance(turns, list):
        return convert({"messages": turns}, "messages")  # which says what is wrong
    answered = _role(turns[-1]) in ANSWERS
    wants_answer = "labels" in fields or ("input_ids" not in fields and answered)
    # As in ColossalChat: a question behind the last answer teaches nothing, and the answer to a prompt is not wanted.
    if answered != wants_answer:
        turns = turns[:-1]
    return convert({"messages": turns}, "messages" if wants_answer else "prompt")


def _of_completion(fields: Fields, template: Template | None) -> Conversation:
    """KTO's rows: one answer, known to be good or bad."""
    if not fields["label"]:
        raise RowFault("undesired_answer", "label is false: a bad answer without a better one beside it ranks nothing")
    if not isinstance(fields["completion"], dict):
        return tokens.completion(fields, _needed(template))
    if not isinstance(fields["prompt"], list):
        raise RowFault("wrong_type", "prompt is no list of messages")
    return convert({"messages": _turns([*fields["prompt"], fields["completion"]])}, "messages")


def _needed(template: Template | None) -> Template:
    if template is None:
        raise RowFault("only_tokens", "it holds tokens and no text: give --template and --base-model to read them")
    return template


def _turns(value: Any) -> Any:
    """Turns with roles in lower case, as ColossalChat compares them; what is no list of turns stays for `convert`."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [
        {key: text.lower() if key in ("from", "role") and isinstance(text, str) else text for key, text in turn.items()}
        if isinstance(turn, dict)
        else turn
        for turn in value
    ]


def _merged(turns: Any) -> Any:
    """Neighbours of one role as one turn with a space between, which is what `tokenize_rlhf` makes of them."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns
    ):
        return turns
    groups = [list(group) for _, group in groupby(turns, key=_role)]
    return [{**group[0], "content": " ".join(turn["content"] for turn in group)} for group in groups]


def _role(turn: Any) -> Any:
    return (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
