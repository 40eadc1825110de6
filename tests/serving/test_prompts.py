from __future__ import annotations

import pytest

from chatloom.errors import InputError
from chatloom.serving.engine import Engine
from chatloom.serving.prompts import ContextLengthError, Message, Prompts


@pytest.fixture
def short(parrot: Engine) -> Prompts:
    """With a context of 120 tokens: a token a character, and a template around each turn."""
    return Prompts(parrot.chat_model.tokenizer, 120)


def turns(*texts: str) -> list[Message]:
    """Of user and assistant in turn."""
    return [Message("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]


def test_oldest_turns_are_left_out_as_far_as_needed(short: Prompts) -> None:
    system = Message("system", "be kind")
    long = turns("a" * 40, "b" * 40, "c" * 10, "d" * 10, "e" * 5)
    with pytest.raises(ContextLengthError):
        short.encode([system, *long])
    # The whole is too long; without the first pair it fits: that, and no more, is left out.
    assert short.encode_latest([system, *long], 5) == short.encode([system, *long[2:]])
    # More room for the answer leaves less for the conversation.
    assert short.encode_latest([system, *long], 70) == short.encode([system, long[4]])
    # What fits is left as it is.
    assert short.encode_latest(long[2:], 5) == short.encode(long[2:])


def test_the_last_message_stays(short: Prompts) -> None:
    with pytest.raises(ContextLengthError, match="the model's context is 120"):
        short.encode_latest(turns("a", "b", "c" * 200), 5)
    # It fits, but not with so long an answer: `room` says how long that may be.
    assert short.encode_latest(turns("a", "b", "c" * 50), 100) == short.encode(turns("c" * 50))


def test_a_bare_text(parrot: Engine) -> None:
    ids = parrot.prompts.encode_text("one<|im_end|>")
    assert parrot.prompts.decode(ids) == "one<|im_end|>"
    control = parrot.chat_model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert control not in ids
    assert parrot.prompts.name(control) == "<|im_end|>"
    assert parrot.prompts.decode([control]) == ""
    with pytest.raises(InputError, match="prompt is empty"):
        parrot.prompts.encode_text("")
    with pytest.raises(InputError, match="half a character at position 1"):
        parrot.prompts.encode_text("a\ud83d")


@pytest.mark.parametrize(("ids", "words"), [([], "at least one token"), ([-1], "token -1"), ([10**9], "token 10000")])
def test_token_ids(parrot: Engine, ids: list[int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parrot.prompts.check_ids(ids)
    assert parrot.prompts.check_ids([0, 5]) == [0, 5]
