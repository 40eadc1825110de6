from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from chatloom.models.sampling import Sampling
from chatloom.serving.batches import NativeBatch, Request, Token
from chatloom.serving.engine import Engine
from chatloom.serving.logits import Penalties
from chatloom.serving.prompts import Message

HOT = Sampling(max_new_tokens=12, temperature=1.0)


@pytest.fixture
def requests(babbler: Engine) -> list[Request]:
    """Three that differ in prompt, length and settings."""
    prompts = [babbler.prompts.encode([Message("user", text)]) for text in ("a", "bcd", "efghij" * 5)]
    return [
        Request(prompts[0], HOT, seed=1),
        Request(prompts[1], Sampling(5, temperature=0.5, top_p=0.9), seed=2, penalties=Penalties(2.0, 1.0, 0.5)),
        Request(prompts[2], Sampling(9, temperature=2.0), seed=3, top_k=3, num_logprobs=4),
    ]


def run(batch: NativeBatch) -> dict[int, list[Token]]:
    found: dict[int, list[Token]] = {}
    while tokens := batch.step():
        for token in tokens:
            found.setdefault(token.request, []).append(token)
    return found


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_what_a_request_gets_depends_on_no_other(babbler: Engine, requests: list[Request], size: int) -> None:
    alone = []
    for request in requests:
        batch = NativeBatch(babbler.chat_model, 1)
        batch.add(7, request)
        alone.append(ids(run(batch)[7]))
    batch = NativeBatch(babbler.chat_model, size)
    for number, request in enumerate(requests):
        batch.add(number, request)
    together = run(batch)
    assert [ids(together[number]) for number in range(3)] == alone
    assert [len(tokens) for tokens in alone] == [12, 5, 9]
    for tokens in together.values():
        assert [token.last for token in tokens] == [False] * (len(tokens) - 1) + [True]


def test_the_same_as_the_engine_for_one(babbler: Engine, requests: list[Request]) -> None:
    """`Engine.generate` draws the seed of its request from the seed that it is given."""
    prompt = list(requests[0].prompt_ids)
    (seed,) = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(5)).tolist()
    batch = NativeBatch(babbler.chat_model, 4)
    batch.add(0, Request(prompt, HOT, seed))
    text = babbler.prompts.decode(ids(run(batch)[0]))
    assert "".join(babbler.generate(prompt, HOT, seed=5)) in text.replace("\ufffd", "")


def test_logprobs_are_those_of_the_model(babbler: Engine, requests: list[Request]) -> None:
    """Against transformers' own forward pass over the whole; penalties and top-k do not show in them."""
    batch = NativeBatch(babbler.chat_model, 2)
    batch.add(0, replace(requests[2], penalties=Penalties(repetition=3.0)))
    tokens = run(batch)[0]
    prompt = list(requests[2].prompt_ids)
    model = babbler.chat_model.model
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids(tokens)]])).logits[0, len(prompt) - 1 : -1].float()
    expected = logits.log_softmax(-1)
    for place, token in enumerate(tokens):
        assert token.logprobs is not None
        assert token.logprobs.sampled == pytest.approx(float(expected[place, token.id]), abs=1e-3)
        assert len(token.logprobs.top) == 4
        values = [value for _, value in token.logprobs.top]
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(float(expected[place].max()), abs=1e-3)
        assert math.exp(values[0]) <= 1


def test_a_strong_penalty_repeats_nothing(babbler: Engine, requests: list[Request]) -> None:
    batch = NativeBatch(babbler.chat_model, 1)
    greedy = Sampling(40, temperature=0.0)
    batch.add(0, Request(requests[0].prompt_ids, greedy, 0))
    batch.add(1, Request(requests[0].prompt_ids, greedy, 0, penalties=Penalties(presence=1000.0)))
    found = run(batch)
    assert len(set(ids(found[0]))) < 40
    assert len(set(ids(found[1]))) == len(found[1])


def test_cancelling(babbler: Engine, requests: list[Request]) -> None:
    batch = NativeBatch(babbler.chat_model, 2)
    for number, request in enumerate(requests):
        batch.add(number, request)
    assert [token.request for token in batch.step()] == [0, 1]
    batch.cancel(0)  # 2 takes its place
    batch.cancel(99)
    assert sorted(token.request for token in batch.step()) == [1, 2]
    batch.cancel(2)
    assert {token.request for tokens in iter(batch.step, []) for token in tokens} == {1}
