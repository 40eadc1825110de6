"""The code for vLLM over a stand-in for its engine: what it is asked, and what becomes of what it says."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from chatloom.errors import InputError
from chatloom.models.sampling import Sampling
from chatloom.serving.batches import Request, Token
from chatloom.serving.loading import open_model
from chatloom.serving.logits import Logprobs, Penalties
from chatloom.serving.options import Options
from chatloom.serving.vllm_batch import VllmBatch


@dataclass
class Entry:
    logprob: float
    rank: int


class FakeEngine:
    """Steps that were thought out before: each a list of (request, tokens, their logprobs, whether it is over)."""

    def __init__(self, steps: list[list[tuple[str, list[int], Any, bool]]]) -> None:
        self.steps = steps
        self.added: dict[str, tuple[Any, Any]] = {}
        self.aborted: list[str] = []

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.added[request_id] = prompt, params

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    def has_unfinished_requests(self) -> bool:
        return bool(self.steps)

    def step(self) -> list[Any]:
        return [
            SimpleNamespace(
                request_id=number, finished=finished, outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)]
            )
            for number, ids, logprobs, finished in self.steps.pop(0)
        ]


@pytest.fixture(autouse=True)
def _package(monkeypatch: pytest.MonkeyPatch) -> None:
    package, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vars(sampling).update(RequestOutputKind=SimpleNamespace(DELTA="delta"))
    vars(package).update(SamplingParams=lambda **settings: settings, sampling_params=sampling)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)


def test_requests_and_tokens() -> None:
    # The sampled token is told too: here the third by rank, beside the two that were asked for.
    told = [{5: Entry(-1.0, 1), 6: Entry(-2.0, 2), 9: Entry(-3.0, 3)}, {5: Entry(-1.0, 1), 6: Entry(-2.0, 2)}]
    engine = FakeEngine([[("0", [4], None, False)], [("0", [7], None, True), ("1", [9, 5], told, True)]])
    batch = VllmBatch(engine, [2, 3])
    batch.add(0, Request([1, 2], Sampling(8, temperature=0.5, top_p=0.9), seed=11, top_k=40))
    batch.add(1, Request([1], Sampling(2), seed=12, penalties=Penalties(1.5, 0.25, 0.75), num_logprobs=2))
    batch.add(2, Request([1], Sampling(2), seed=13))
    batch.cancel(2)
    assert engine.aborted == ["2"]
    prompt, first = engine.added["0"]
    assert prompt == {"prompt_token_ids": [1, 2]}
    expected = {
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 11,
        "logprobs": None,
        "stop_token_ids": [2, 3],
        "ignore_eos": True,
        "output_kind": "delta",
    }
    assert first | expected == first
    _, second = engine.added["1"]
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": 0.75}
    assert second | penalties | {"logprobs": 2, "top_k": 0} == second
    assert batch.step() == [Token(0, 4, False, None)]
    assert batch.step() == [
        Token(0, 7, True, None),
        Token(1, 9, False, Logprobs(-3.0, ((5, -1.0), (6, -2.0)))),
        Token(1, 5, True, Logprobs(-1.0, ((5, -1.0), (6, -2.0)))),
    ]
    assert batch.step() == []


def test_without_a_device(parrot_path: Path) -> None:
    with pytest.raises(InputError, match="--engine vllm: needs a CUDA device"):
        open_model(parrot_path, "cpu", Options(engine="vllm"))
