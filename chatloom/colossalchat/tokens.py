"""Conversations out of ColossalChat's token columns, for rows that hold nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from chatloom.colossalchat.template import Template
from chatloom.data.drops import RowFault
from chatloom.data.prepared import Message
from chatloom.data.schemas import Conversation, Fields, convert

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without loss."""


def instruction(fields: Fields, template: Template) -> Conversation:
    """`input_ids` and `labels`, as `prepare_dataset.py --type sft` writes them."""
    ids = _ids(fields, "input_ids", template)
    loss = [label != IGNORED for label in _numbers(fields, "labels")]
    return convert({"messages": _dialogue(ids, template, loss=loss, every_answer=True)}, "messages")


def prompt(fields: Fields, template: Template) -> Conversation:
    """`input_ids` alone, as `--type prompt` writes them."""
    return convert({"messages": _dialogue(_ids(fields, "input_ids", template), template)}, "prompt")


def preference(fields: Fields, template: Template) -> Conversation:
    """`chosen_input_ids`, `chosen_loss_mask` and the same of `rejected`, as `--type preference` writes them."""
    sides = {
        side: _dialogue(
            _ids(fields, f"{side}_input_ids", template),
            template,
            loss=[bool(flag) for flag in _numbers(fields, f"{side}_loss_mask")],
        )
        for side in ("chosen", "rejected")
    }
    return convert(sides, "preference")


def completion(fields: Fields, template: Template) -> Conversation:
    """`prompt` and `completion`, as `--type kto` writes them."""
    context = _dialogue(_ids(fields, "prompt", template), template)
    answer = _answer(_decode(_ids(fields, "completion", template), template.tokenizer), template)
    return convert({"messages": [*context, {"role": "assistant", "content": answer}]}, "messages")


def _ids(fields: Fields, key: str, template: Template) -> list[int]:
    ids = _numbers(fields, key)
    size = len(template.tokenizer)
    if (outside := next((id for id in ids if not 0 <= id < size), None)) is not None:
        raise RowFault(
            "unknown_token", f"{key} holds {outside}, the tokenizer has {size} tokens: is it the one they were made by?"
        )
    return ids


def _numbers(fields: Fields, key: str) -> list[int]:
    value = fields.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(number, int) for number in value):
        raise RowFault("wrong_type", f"{key} is not a list of whole numbers")
    return value


def _dialogue(
    ids: list[int], template: Template, *, loss: Sequence[bool] | None = None, every_answer: bool = False
) -> list[Message]:
    """The turns of a tokenised conversation, without the system message, which is the template's.

    `loss` is True on the tokens of the answers (of the last answer only, unless `every_answer`); without it the tokens
    are a prompt.
    """
    contents = _contents(_decode(ids, template.tokenizer), template, is_prompt=loss is None)
    if loss is not None:
        contents[-1] = _answer(contents[-1], template)
        answers = contents[1::2] if every_answer else contents[-1:]
        _require_agreement(ids, loss, answers, template)
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(contents)]


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _contents(text: str, template: Template, *, is_prompt: bool) -> list[str]:
    """Questions and answers in turn; the last answer may still have its end."""
    scaffold, tokenizer = template.scaffold, template.tokenizer
    bos = str(tokenizer.bos_token or "")  # put first where the template does not write it
    text = text.removeprefix(bos)
    literal, tidy = _reading(tokenizer)
    opening = re.match(literal(scaffold.opening.removeprefix(bos)), text)
    ending = re.search(literal(scaffold.generation_prompt) + r"\Z", text) if is_prompt else None
    if opening is not None and (not is_prompt or ending is not None):
        body = text[opening.end() : ending.start() if ending is not None else None]
        pieces = re.split(f"({literal(scaffold.to_answer)})|({literal(scaffold.to_question)})", body)
        contents, to_answer = pieces[::3], [piece is not None for piece in pieces[1::3]]
        in_turn = to_answer == [number % 2 == 0 for number in range(len(to_answer))]
        if in_turn and len(contents) % 2 == is_prompt:
            return [tidy(content) for content in contents]
    raise RowFault("not_the_template", f"its tokens do not read as a conversation in {template.path}: {text[:60]!r}...")


def _reading(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """How to look for a literal in decoded text, and what of a content is kept.

    ColossalChat tokenises a conversation piece by piece. A tokenizer that puts a space before each piece
    (SentencePiece) writes it back there: white space around literals says nothing then, and that of contents is lost.
    """
    piece = tokenizer("a", add_special_tokens=False)["input_ids"]
    if _decode([*piece, *piece], tokenizer) == "aa":
        return re.escape, str
    return lambda literal: r"\s*" + "".join(re.escape(c) + r"\s*" for c in "".join(literal.split())), str.strip


def _answer(text: str, template: Template) -> str:
    literal, tidy = _reading(template.tokenizer)
    end = re.search(literal(template.scaffold.end_of_answer), text)
    if end is None:
        raise RowFault("cut_answer", f"its last answer was cut: no {template.scaffold.end_of_answer!r} behind it")
    return tidy(text[: end.start()])


def _require_agreement(ids: list[int], loss: Sequence[bool], answers: Sequence[str], template: Template) -> None:
    """Each stretch of tokens with a loss must hold one of the answers that were read out of the text."""
    if len(loss) != len(ids):
        raise RowFault("lengths_differ", f"{len(ids)} tokens, and {len(loss)} labels or flags")
    spans = [
        [id for id, _ in span] for has_loss, span in groupby(zip(ids, loss, strict=True), lambda t: t[1]) if has_loss
    ]
    # The end of the sequence has a loss of its own where something stands between it and the last answer.
    spans = [span for span in spans if set(span) != {template.tokenizer.eos_token_id}]
    texts = [_decode(span, template.tokenizer) for span in spans]
    if len(texts) != len(answers) or any(
        _squeezed(answer) not in _squeezed(text) for answer, text in zip(answers, texts, strict=True)
    ):
        raise RowFault("loss_elsewhere", f"the loss is on {texts!r:.80}, the answers read are {list(answers)!r:.80}")


def _squeezed(text: str) -> str:
    return "".join(text.split())
