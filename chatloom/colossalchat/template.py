"""ColossalChat's conversation template: as a Jinja file with stop tokens, and as what stands around each turn."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from chatloom.data.prepared import Message
from chatloom.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = {"chat_template", "system_message", "stop_ids", "end_of_assistant"}
# Contents that no template writes by itself.
MARKS = ["⦃question 1⦄", "⦃answer 1⦄", "⦃question 2⦄", "⦃answer 2⦄"]


@dataclass(frozen=True)
class Scaffold:
    """What the template writes around the contents of the turns."""

    opening: str
    """Before the first question, the system message included."""
    to_answer: str
    to_question: str
    end_of_answer: str
    """Up to and with ColossalChat's `end_of_assistant`: prepared data has nothing behind the last one."""
    generation_prompt: str
    """Behind the last question, where the model is to answer."""


@dataclass(frozen=True, eq=False)
class Template:
    path: Path
    tokenizer: PreTrainedTokenizerBase
    jinja: str
    """ColossalChat's template with its system message built in, for conversations without one of their own."""
    stop_tokens: list[str]
    """The one that the template writes behind an answer first."""
    end_of_answer: str
    unused: list[str]
    """Keys of the file that have no place here."""

    @cached_property
    def scaffold(self) -> Scaffold:
        """Learnt by writing a conversation of two rounds.

        Raises:
            InputError: where turns cannot be told apart by it.
        """
        opening, to_answer, to_question, again, _ = self._around(MARKS)
        if again != to_answer or not (to_answer.strip() and to_question.strip()):
            raise InputError(
                f"{self.path}: chat_template: turns cannot be told apart by what it writes between them "
                f"({to_answer!r}, {to_question!r}, {again!r}); import the rows that the tokens were made of instead"
            )
        prompt = _render(self.tokenizer, self.jinja, [_turn(0)], self.path, generation_prompt=True)
        return Scaffold(opening, to_answer, to_question, self.end_of_answer, prompt.split(MARKS[0])[1])

    def _around(self, marks: Sequence[str]) -> list[str]:
        return _around(self.tokenizer, self.jinja, marks, self.path)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Raises:
        InputError: where there is none.
    """
    # Seconds to import, and an import of text alone does without.
    from transformers import AutoTokenizer

    try:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give the checkpoint's folder, ColossalChat's --pretrain")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: has no tokenizer that can be loaded: {error}") from error
    return tokenizer


def read_template(path: Path, tokenizer: PreTrainedTokenizerBase) -> Template:
    """A file of ColossalChat's `conversation_template/`, or one that its `prepare_dataset.py` wrote.

    Raises:
        InputError: naming the file and the key.
    """
    config = read_object(path)
    source = _source(config, tokenizer, path)
    system = _text(config, "system_message", path)
    jinja = source if system is None else _with_system(system, source)
    *_, closing = _around(tokenizer, jinja, MARKS[:2], path)
    if not closing.strip():
        raise InputError(f"{path}: chat_template: it writes nothing behind an answer, so that none would end")
    declared = _text(config, "end_of_assistant", path)
    return Template(
        path=path,
        tokenizer=tokenizer,
        jinja=jinja,
        stop_tokens=_stop_tokens(config, declared, closing, tokenizer, path),
        end_of_answer=closing[: closing.index(declared) + len(declared)]
        if declared is not None and declared in closing
        else closing.rstrip(),
        unused=sorted(config.keys() - KEYS),
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def _source(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, path: Path) -> str:
    """The template's text: given, or a checkpoint's own."""
    given = _text(config, "chat_template", path)
    if given is not None and "{" not in given:
        tokenizer, given = load_tokenizer(Path(given)), None
    source = given or tokenizer.chat_template
    if not isinstance(source, str):
        raise InputError(f"{path}: chat_template: there is none, and the tokenizer has no single one of its own")
    return source


def _with_system(system: str, source: str) -> str:
    # The line end behind a block is not written, so that `source` begins a line as it did alone.
    message = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
    return (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        f"{{% set messages = {message} + messages %}}{{% endif %}}\n{source}"
    )


def _stop_tokens(
    config: dict[str, Any], declared: str | None, closing: str, tokenizer: PreTrainedTokenizerBase, path: Path
) -> list[str]:
    """Tokens that end an answer: what the template writes behind one, and what ColossalChat stopped at."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    written = [token for token in sorted(special, key=len, reverse=True) if closing.lstrip().startswith(token)][:1]
    ids = config.get("stop_ids") or []
    if not isinstance(ids, list) or not all(isinstance(id, int) and 0 <= id < len(tokenizer) for id in ids):
        raise InputError(f"{path}: stop_ids = {ids!r}: expected ids of the tokenizer's {len(tokenizer)} tokens")
    # Several ids are one sequence there: the ids of a word that is no token of its own.
    stopped_at = tokenizer.convert_ids_to_tokens(ids) if len(ids) == 1 else [tokenizer.decode(ids)]
    vocabulary = tokenizer.get_vocab()
    found = [token for token in (*written, declared, *stopped_at) if token is not None and token in vocabulary]
    if not found:
        raise InputError(
            f"{path}: end_of_assistant = {declared!r}, stop_ids = {ids}: neither is one token of the tokenizer; "
            "add it to the tokenizer as a special token"
        )
    return list(dict.fromkeys(found))


def _text(config: dict[str, Any], key: str, path: Path) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{path}: {key} = {value!r}: expected text")
    return value


def _turn(number: int) -> Message:
    return {"role": "assistant" if number % 2 else "user", "content": MARKS[number]}


def _around(tokenizer: PreTrainedTokenizerBase, jinja: str, marks: Sequence[str], path: Path) -> list[str]:
    """What is written before, between and behind turns with the contents `marks`."""
    text = _render(tokenizer, jinja, [_turn(number) for number in range(len(marks))], path)
    pieces = re.split("|".join(map(re.escape, marks)), text)
    if len(pieces) != len(marks) + 1:
        raise InputError(f"{path}: chat_template: it does not write every turn once and as it is")
    return pieces


def _render(
    tokenizer: PreTrainedTokenizerBase,
    jinja: str,
    messages: list[Message],
    path: Path,
    *,
    generation_prompt: bool = False,
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=jinja, tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        raise InputError(f"{path}: chat_template: {error}") from error
    return text
