"""Every accepted schema, converted to one conversation with ranked responses.

A converter takes the fields of one row and either returns a `Conversation` or raises `RowFault`; what to do with a
fault (count it, report it) is the caller's business.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatloom.config import Format, Split
from chatloom.data.drops import RowFault
from chatloom.data.prepared import Message

Fields = Mapping[str, Any]
"""One row as it was read: column or key to value."""

ACCEPTED: dict[Format, str] = {
    "alpaca": '{"instruction", "input"?, "output"}',
    "messages": '{"messages": [{role|from, content|value}, ...]}, the last one the assistant\'s',
    "sharegpt": '{"conversations": [{from|role, value|content}, ...]}, the last one the assistant\'s',
    "preference": '{"prompt"|"messages"|"context", "chosen", "rejected"}',
    "hh": '{"chosen", "rejected"} with "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts',
    "ranked": '{"prompt"|"messages", "responses": [best, ..., worst]}',
    "prompt": '{"instruction"|"prompt"}',
    "text": "plain text, one prompt a line (.txt)",
    "feedback": '{"rating", "answer", "messages", "response", "other"?}, what the chat page keeps',
}
"""What a row of each format looks like, for messages to people."""

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
# A row may hold more than one (UltraFeedback has `prompt` and `messages`): the first one is the context.
CONTEXT_KEYS = ("prompt", "messages", "conversations", "context", "instruction")
# A row of prompts with one of these is something else: taking it for a prompt would lose its answers silently.
ANSWER_KEYS = {"output", "completion", "response", "responses", "answer", "answers", "chosen", "rejected"}
KEYS_READ: dict[Format, set[str]] = {
    "alpaca": {"instruction", "input", "output"},
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "preference": {*CONTEXT_KEYS, "input", "chosen", "rejected"},
    "hh": {"prompt", "chosen", "rejected"},
    "ranked": {*CONTEXT_KEYS, "input", "responses"},
    "prompt": {*CONTEXT_KEYS, "input"},
    "text": {"text"},
    "feedback": {"rating", "answer", "messages", "response", "other", "annotator"},
}
ROW_KEYS = {"id", "lang"}
"""Keys every format may have."""
LANGUAGE_CHARACTERS = 5000
"""Of each text that are looked at to tell its language."""


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    """The context; it ends with a user turn."""
    responses: list[str]
    """Best first: none makes a prompt, one an instruction with its answer, more a preference."""
    leading_assistant: bool = False
    """The context began with an assistant turn (instructions, in the data seen), which became a system message."""


@dataclass(frozen=True)
class RawRow:
    """One row in the canonical schema of `data/raw`, with where it came from."""

    id: str
    lang: str
    messages: list[Message]
    responses: list[str]
    source: str
    file: str
    line: int
    license: str
    group: str | None
    """The source's pattern and what it found in the id: rows with an equal group (translations of one item) share a
    split, also of several sources with one pattern."""
    splits: list[Split]
    """Splits the row may go to."""
    weight: float
    """How often the row counts in training."""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def convert(fields: Fields, format: Format) -> Conversation:
    """The conversation of one row of `format` (not `auto`).

    Raises:
        RowFault: where the row does not hold what its format promises.
    """
    return _CONVERTERS[format](fields)


def detect_format(rows: Sequence[Fields]) -> Format | None:
    """The format most of `rows` have by their keys, None where no format is known for any."""
    found = Counter(format for fields in rows if (format := _format_of(fields)) is not None)
    return found.most_common(1)[0][0] if found else None


def ignored_keys(rows: Sequence[Fields], format: Format) -> list[str]:
    """Keys of `rows` that a conversion from `format` does not read."""
    return keys_of(rows, but=KEYS_READ[format] | ROW_KEYS)


def keys_of(rows: Sequence[Fields], *, but: Collection[str] = ()) -> list[str]:
    """Keys of `rows`, in a spelling that can be printed: JSON can spell half of a character."""
    keys = {str(key) for fields in rows for key in fields if key not in but}
    return sorted(key.encode(errors="backslashreplace").decode() for key in keys)


def detect_language(conversation: Conversation) -> str:
    """`zh` where a fifth of the letters are Chinese characters (one says as much as several Latin letters), else `en`.

    Only the dialogue counts, not a system message.
    """
    turns = [message["content"] for message in conversation.messages if message["role"] != "system"]
    text = "".join(text[:LANGUAGE_CHARACTERS] for text in (*turns, *conversation.responses))
    letters = sum(character.isalpha() for character in text)
    return "zh" if 5 * len(_CHINESE.findall(text)) > letters else "en"


def text_of(value: object, key: str) -> str:
    """`value`, which has to be text that UTF-8 can hold (JSON can spell half of a character)."""
    if not isinstance(value, str):
        raise RowFault("wrong_type", f"{key} is {_kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowFault("broken_text", f"{key} has half a character at {error.start}") from error
    return value


_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")


def _format_of(fields: Fields) -> Format | None:
    keys = {key for key, value in fields.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        if "prompt" in keys and _is_transcript(fields["prompt"]):
            return "hh"
        if keys & set(CONTEXT_KEYS) or isinstance(fields["chosen"], list):
            return "preference"
        return "hh" if _is_transcript(fields["chosen"]) else None
    if {"rating", "answer", "response"} <= keys:
        return "feedback"
    if "responses" in keys:
        return "ranked"
    if "conversations" in keys:
        return "sharegpt"
    if "messages" in keys:
        return "messages"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    return "prompt" if keys & {"instruction", "prompt"} and not keys & ANSWER_KEYS else None


# --- converters -----------------------------------------------------------------------------------------------------


def _alpaca(fields: Fields) -> Conversation:
    question = _instruction(fields)
    return _conversation([question], [_answer(_value(fields, "output"), "output")])


def _messages(fields: Fields) -> Conversation:
    return _answered(_turns(_value(fields, "messages"), "messages"))


def _sharegpt(fields: Fields) -> Conversation:
    return _answered(_turns(_value(fields, "conversations"), "conversations"))


def _preference(fields: Fields) -> Conversation:
    return _preferred(_context(fields, required=False), _side(fields, "chosen"), _side(fields, "rejected"))


def _hh(fields: Fields) -> Conversation:
    context = _transcript(fields["prompt"], "prompt") if fields.get("prompt") is not None else []
    sides = [_hh_side(fields, key, bare=bool(context)) for key in ("chosen", "rejected")]
    return _preferred(context, sides[0], sides[1])


def _hh_side(fields: Fields, key: str, *, bare: bool) -> list[Message]:
    """`bare`: after a transcript as prompt, a side may be the answer alone."""
    value = _value(fields, key)
    return _side(fields, key) if bare and not _is_transcript(value) else _transcript(value, key)


def _ranked(fields: Fields) -> Conversation:
    responses = _value(fields, "responses")
    if not isinstance(responses, list):
        raise RowFault("wrong_type", f"responses is {_kind(responses)}, expected a list of texts")
    if not responses:
        raise RowFault("empty_answer", "responses is empty")
    answers = [_answer(response, f"responses[{number}]") for number, response in enumerate(responses)]
    return _conversation(_context(fields), answers)


def _prompt(fields: Fields) -> Conversation:
    return _conversation(_context(fields), [])


def _plain(fields: Fields) -> Conversation:
    return _conversation([_turn_of("user", text_of(_value(fields, "text"), "text"))], [])


_CONVERTERS: dict[Format, Callable[[Fields], Conversation]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "hh": _hh,
    "ranked": _ranked,
    "prompt": _prompt,
    "text": _plain,
    # A file of it was made into such rows as a whole: one says what another is worth.
    "feedback": _ranked,
}


# --- parts of a conversation ----------------------------------------------------------------------------------------


def _answered(turns: list[Message]) -> Conversation:
    if not turns or turns[-1]["role"] != "assistant":
        last = f"the last turn is the {turns[-1]['role']}'s" if turns else "there is no turn"
        raise RowFault("last_turn_not_assistant", f"{last}, expected the assistant's")
    return _conversation(turns[:-1], [_answer(turns[-1]["content"], "the last turn")])


def _preferred(context: list[Message], chosen: list[Message], rejected: list[Message]) -> Conversation:
    """A preference from the context and its two sides; a side is the answer alone, or a whole conversation."""
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[-1]["role"] != "assistant":
            raise RowFault("last_turn_not_assistant", f"{key} does not end with an assistant turn")
    shared = chosen[:-1]
    if shared != rejected[:-1]:
        raise RowFault("contexts_differ", "chosen and rejected differ before their last turn")
    if shared and context and context not in (shared[: len(context)], shared[-len(context) :]):
        raise RowFault("contexts_differ", "the prompt is not the one chosen and rejected answer")
    answers = [_answer(chosen[-1]["content"], "chosen"), _answer(rejected[-1]["content"], "rejected")]
    return _conversation(shared or context, answers)


def _conversation(messages: list[Message], responses: list[str]) -> Conversation:
    """Check the order of roles and that nothing is empty; a leading assistant turn becomes the system message."""
    leading = bool(messages) and messages[0]["role"] == "assistant"
    if leading:
        messages = [_turn_of("system", messages[0]["content"]), *messages[1:]]
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    if not turns:
        raise RowFault("empty_prompt", "there is no user turn before the answer")
    for number, turn in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if turn["role"] != expected:
            place = number + len(system) + 1
            raise RowFault("role_order", f"turn {place} is the {turn['role']}'s, expected the {expected}'s")
    if turns[-1]["role"] != "user":
        raise RowFault("last_turn_not_user", "the context ends with an assistant turn, expected the user's")
    if not turns[-1]["content"].strip():
        raise RowFault("empty_prompt", "the last user turn is empty")
    if any(not turn["content"].strip() for turn in turns):
        raise RowFault("empty_turn", "an earlier turn is empty")
    if len({response.strip() for response in responses}) < len(responses):
        raise RowFault("repeated_response", "two ranked responses are equal")
    if system and not system[0]["content"].strip():
        system = []
    return Conversation([*system, *turns], responses, leading)


def _context(fields: Fields, *, required: bool = True) -> list[Message]:
    key = next((key for key in CONTEXT_KEYS if fields.get(key) is not None), None)
    if key is None:
        if required:
            raise RowFault("missing_key", f"none of the keys {', '.join(CONTEXT_KEYS)}")
        return []
    if key == "instruction":
        return [_instruction(fields)]
    value = fields[key]
    return _turns(value, key) if isinstance(value, list) else [_turn_of("user", text_of(value, key))]


def _instruction(fields: Fields) -> Message:
    """Alpaca's instruction, with its input after a blank line where there is one."""
    instruction = text_of(_value(fields, "instruction"), "instruction")
    extra = text_of(fields["input"], "input") if fields.get("input") is not None else ""
    return _turn_of("user", "\n\n".join(part for part in (instruction, extra) if part.strip()))


def _side(fields: Fields, key: str) -> list[Message]:
    value = _value(fields, key)
    if isinstance(value, list):
        return _turns(value, key)
    return [_turn(value, key)] if isinstance(value, dict) else [_turn_of("assistant", text_of(value, key))]


def _turns(value: object, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowFault("wrong_type", f"{key} is {_kind(value)}, expected a list of messages")
    return [_turn(item, f"{key}[{number}]") for number, item in enumerate(value)]


def _turn(value: object, key: str) -> Message:
    if not isinstance(value, dict):
        raise RowFault("wrong_type", f"{key} is {_kind(value)}, expected a message")
    role, content = (
        next((value[name] for name in names if value.get(name) is not None), None)
        for names in (("role", "from"), ("content", "value"))
    )
    if role is None or content is None:
        raise RowFault("missing_key", f"{key} has no {'role or from' if role is None else 'content or value'}")
    if not isinstance(role, str) or role not in ROLES:
        raise RowFault("unknown_role", f"{key} has the role {role!r}, expected one of {', '.join(ROLES)}")
    return _turn_of(ROLES[role], text_of(content, key))


def _turn_of(role: str, content: str) -> Message:
    return {"role": role, "content": content}


_TURN_START = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and _TURN_START.match(value.lstrip()) is not None


def _transcript(value: object, key: str) -> list[Message]:
    """Turns of an hh transcript; an empty last assistant turn (a prompt's) is left out."""
    text = text_of(value, key)
    before, *parts = _TURN_START.split(text.strip())
    if before or not parts:
        raise RowFault("not_a_transcript", f'{key} does not begin with "\\n\\nHuman:"')
    roles = ("user" if name == "Human" else "assistant" for name in parts[::2])
    turns = [_turn_of(role, content.strip()) for role, content in zip(roles, parts[1::2], strict=True)]
    is_prompt = key == "prompt" and turns[-1] == _turn_of("assistant", "")
    return turns[:-1] if is_prompt else turns


def _value(fields: Fields, key: str) -> Any:
    if fields.get(key) is None:
        raise RowFault("missing_key", f"no key {key!r}")
    return fields[key]


def _answer(value: object, key: str) -> str:
    text = text_of(value, key)
    if not text.strip():
        raise RowFault("empty_answer", f"{key} is empty")
    return text


def _kind(value: object) -> str:
    names = {str: "text", dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
