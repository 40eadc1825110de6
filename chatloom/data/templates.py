"""Conversations as tokens: the chat template, which of its tokens the model said, and responses.

Text cannot forge the template: a special token spelled inside a message or a response stays text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jinja2 import TemplateError

from chatloom.data.drops import RowFault
from chatloom.data.prepared import Message
from chatloom.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]
"""First and last + 1 character of each token."""


class Dialogue(Protocol):
    @property
    def messages(self) -> list[Message]: ...
    @property
    def responses(self) -> list[str]: ...


class Encoded(NamedTuple):
    prompt_ids: list[int]
    """(P) ends with the generation prompt."""
    prompt_loss_mask: list[bool]
    """(P) True on the tokens of earlier assistant turns, their stop token included."""
    response_ids: list[list[int]]
    """(R_k) each with the stop token."""


def encode_row(tokenizer: PreTrainedTokenizerBase, stop_id: int, row: Dialogue) -> Encoded:
    """Tokens of one row.

    Raises:
        InputError: where the tokenizer or its chat template cannot serve at all.
        RowFault: where this row cannot be put into the template.
    """
    [encoded] = encode_rows(tokenizer, stop_id, [row])
    if isinstance(encoded, RowFault):
        raise encoded
    return encoded


def encode_rows(tokenizer: PreTrainedTokenizerBase, stop_id: int, rows: Sequence[Dialogue]) -> list[Encoded | RowFault]:
    """Tokens of many rows in few calls of the tokenizer, which is what makes it fast."""
    check_tokenizer(tokenizer)
    prompts = _encode_prompts(tokenizer, stop_id, [row.messages for row in rows])
    answers = iter(_encode_texts(tokenizer, [response for row in rows for response in row.responses]))
    responses = [[[*next(answers), stop_id] for _ in row.responses] for row in rows]
    return [
        prompt if isinstance(prompt, RowFault) else Encoded(*prompt, response_ids)
        for prompt, response_ids in zip(prompts, responses, strict=True)
    ]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Tokens of a conversation up to the place where the model answers: what serving and evaluation give it.

    Raises:
        InputError, RowFault: as `encode_row`.
    """
    check_tokenizer(tokenizer)
    text = _render(tokenizer, messages, generation_prompt=True)
    special = _special_tokens(tokenizer)
    return _encode_rendered(tokenizer, messages, text, special)[0]


def load_tokenizer(model: Path) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of the checkpoint `model`, and the first of its stop tokens, which ends every answer.

    Read without PyTorch: transformers' AutoTokenizer imports it, 400 MB in each of several processes.

    Raises:
        InputError: where the checkpoint lacks one of them.
    """
    from transformers import PreTrainedTokenizerFast

    for name in ("tokenizer.json", "generation_config.json"):
        if not (model / name).is_file():
            raise InputError(f"{model}: no {name}; `dvc repro base_model` makes models/base, which has one")
    declared = json.loads((model / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    stop_ids = declared if isinstance(declared, list) else [declared]
    if not stop_ids or not isinstance(stop_ids[0], int):
        raise InputError(f"{model}/generation_config.json: eos_token_id = {declared!r} names no stop token")
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(model)
    return tokenizer, stop_ids[0]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError where `tokenizer` has no chat template, or cannot say where its tokens come from."""
    if tokenizer.chat_template is None:
        raise InputError(
            "base_model.chat_template = null: the base model's tokenizer has no chat template of its own; "
            "give the path of a Jinja file, for example data/templates/chatml.jinja"
        )
    if not tokenizer.is_fast:
        raise InputError("base_model.source: its tokenizer has no fast version (tokenizer.json), which is needed here")


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded: Any = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase, stop_id: int, conversations: list[list[Message]]
) -> list[tuple[list[int], list[bool]] | RowFault]:
    special = _special_tokens(tokenizer)
    results: list[tuple[list[int], list[bool]] | RowFault] = []
    plain: list[tuple[int, str]] = []  # one user turn without special tokens: nearly every row; encoded together
    for messages in conversations:
        try:
            text = _render(tokenizer, messages, generation_prompt=True)
            if any(message["role"] == "assistant" for message in messages) or _spells(special, messages):
                ids, offsets = _encode_rendered(tokenizer, messages, text, special)
                results.append((ids, _loss_mask(tokenizer, stop_id, messages, text, ids, offsets)))
            else:
                plain.append((len(results), text))
                results.append(([], []))
        except RowFault as fault:
            results.append(fault)
    if plain:
        texts = [text for _, text in plain]
        encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for (place, _), ids in zip(plain, encoded["input_ids"], strict=True):
            results[place] = (ids, [False] * len(ids))
    return results


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, generation_prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        raise RowFault("template_refuses", f"the chat template refuses it: {error}") from error
    return text


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # Longest first: one may begin with another.
    tokens.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _spells(special: re.Pattern[str] | None, messages: list[Message]) -> bool:
    return special is not None and any(special.search(message["content"]) for message in messages)


def _encode_rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str, special: re.Pattern[str] | None
) -> tuple[list[int], Offsets]:
    """Tokens of the rendered `text`, in which only the template's special tokens are special."""
    if special is None or not _spells(special, messages):
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]
    # The same conversation with letters in place of what its texts spell: the special tokens left are the template's.
    blanked = [
        {**message, "content": special.sub(lambda found: "x" * len(found.group()), message["content"])}
        for message in messages
    ]
    skeleton = _render(tokenizer, blanked, generation_prompt=True)
    real = list(special.finditer(skeleton))
    if len(skeleton) != len(text) or any(text[found.start() : found.end()] != found.group() for found in real):
        raise RowFault(
            "special_token_in_text", "it spells a special token that the chat template does not keep as it is"
        )
    ids: list[int] = []
    offsets: Offsets = []
    position = 0
    for found in [*real, None]:
        end = found.start() if found else len(text)
        if end > position:
            piece: Any = tokenizer(
                text[position:end],
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids += piece["input_ids"]
            offsets += [(position + first, position + last) for first, last in piece["offset_mapping"]]
        if found:
            ids.append(tokenizer.convert_tokens_to_ids(found.group()))
            offsets.append(found.span())
            position = found.end()
    return ids, offsets


def _loss_mask(
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int,
    messages: list[Message],
    text: str,
    ids: list[int],
    offsets: Offsets,
) -> list[bool]:
    """(P) True from where the template lets an earlier assistant turn begin up to its stop token."""
    mask = [False] * len(ids)
    firsts = [first for first, _ in offsets]
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:number], generation_prompt=True)
        if not text.startswith(before):
            raise InputError(
                "base_model.chat_template: it renders an earlier turn otherwise than the last one, so that what the "
                "model said cannot be told from what it read; use a template that only appends"
            )
        # A token that begins in the header and ends in the answer is the header's: generation starts behind it.
        position = bisect_left(firsts, len(before))
        while position < len(ids) and ids[position] != stop_id:
            mask[position] = True
            position += 1
        if position == len(ids):
            stop = tokenizer.convert_ids_to_tokens(stop_id)
            raise InputError(
                f"base_model.chat_template: it does not end an assistant turn with {stop!r}, the first of "
                "base_model.stop_tokens; make the two agree"
            )
        mask[position] = True
    return mask
