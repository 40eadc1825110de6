"""Rollout engines: one contract for the project's own, for vLLM, and for `VllmEngine` over a stand-in for vLLM."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from chatloom.config import BaseModelParams, Lora, NativeGeneration, Optimizer, TrainPpoParams, VllmGeneration
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.models.adapters import Role, add_adapter, use_adapter
from chatloom.models.base import make_base_model
from chatloom.models.checkpoint import load_on, save_causal_lm
from chatloom.models.rollouts import RolloutEngine, VllmEngine, open_engine, require_available
from chatloom.models.sampling import Sampling
from chatloom.packing import pack
from chatloom.ppo.loop import train_ppo
from chatloom.ppo.preflight import estimate_memory, require_memory
from chatloom.ppo.roles import load_roles
from tests import fake_vllm
from tests.conftest import CPU, ROOT, SOURCE
from tests.test_ppo import make_reward_model, params

PROMPTS = [[5, 6, 7], [8], list(range(10, 30)), [40, 41], [9, 8, 7, 6, 5], [12, 250]]
VLLM = VllmGeneration(kind="vllm", gpu_memory_utilization=0.4)
LORA = Lora(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], layers=None, base_bits=None)
CUDA = torch.cuda.is_available()
DEVICE = Device(torch.device("cuda"), torch.float32) if CUDA else CPU
HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with heads as wide as vLLM takes, and weights large enough to prefer some tokens to others.

    Its output embedding is its own: of a shared one, vLLM's build for CPUs has a second copy that never changes.
    """
    start, folder = (tmp_path_factory.mktemp("rollouts") / name for name in ("start", "sft"))
    source = SOURCE.model_copy(update={"hidden_size": 64, "num_heads": 2})
    template = str(ROOT / "data/templates/chatml.jinja")
    wanted = BaseModelParams(source=source, pad_token=None, stop_tokens=None, chat_template=template)
    make_base_model(wanted, torch.float32, start)
    model = load_on(start, CPU).model
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 6
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    save_causal_lm(folder, model, start)
    return folder


@pytest.fixture
def model(sft: Path) -> Any:
    return load_on(sft, DEVICE).model


Open = Callable[[Lora | None], RolloutEngine]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


@pytest.fixture(scope="module")
def opened_vllm(sft: Path) -> Iterator[Open]:
    """vLLM itself, started once for each kind of training. Its build for CPUs has no sleep mode and does without."""
    engines: dict[bool, RolloutEngine] = {}
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            import vllm
            from vllm.platforms import current_platform

            start = vllm.LLM.__init__
            patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
            patch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
            # Compiling C++ takes longer than all these tests.
            patch.setattr(vllm.LLM, "__init__", lambda self, *args, **kw: start(self, *args, enforce_eager=True, **kw))

        def open_once(lora: Lora | None) -> RolloutEngine:
            adapts = lora is not None
            if adapts not in engines:
                engines[adapts] = VllmEngine(sft, DEVICE, 4, 0.2, lora)
            return engines[adapts]

        yield open_once


@pytest.fixture(
    params=[
        "native",
        "fake",
        pytest.param("vllm on a CPU", marks=pytest.mark.skipif(CUDA or not HAS_VLLM, reason="needs vLLM for CPUs")),
        pytest.param(
            "vllm", marks=[pytest.mark.gpu, pytest.mark.skipif(not (CUDA and HAS_VLLM), reason="needs CUDA and vLLM")]
        ),
    ]
)
def opened(request: pytest.FixtureRequest, sft: Path) -> Open:
    """Opens an engine for models that train adapters, or train in full."""
    if request.param.startswith("vllm"):
        return request.getfixturevalue("opened_vllm")
    if request.param == "fake":
        request.getfixturevalue("fake")
    generation = VLLM if request.param == "fake" else NativeGeneration(kind="native")
    return lambda lora: open_engine(generation, 4, sft, DEVICE, lora)


# --- the contract ---


def trained_adapter(model: Any, name: str, seed: int) -> Role:
    add_adapter(model, name, LORA, seed)
    role = Role(model, name)
    for parameter in role.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter.device)
        parameter.data += 0.3 * noise
    return role


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], limit: int, stop_ids: Sequence[int]) -> list[int]:
    """The likeliest tokens, by transformers' eager attention over the whole sequence each time."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] not in stop_ids):
        ids.append(int(plain(torch.tensor([ids], device=model.device)).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_responses_end_with_their_stop_token_or_at_the_limit(model: Any, opened: Open) -> None:
    free = [greedy(model, prompt, 8, ()) for prompt in PROMPTS]
    stop_ids = (free[0][3], free[2][5])
    expected = [greedy(model, prompt, 8, stop_ids) for prompt in PROMPTS]
    assert {response[-1] in stop_ids for response in expected} == {True, False}, "some stop and some do not"
    done: list[int] = []
    engine = opened(None)
    sampled = engine(model, PROMPTS, Sampling(8, temperature=0), stop_ids=stop_ids, on_done=done.append)
    assert sampled.responses == expected
    assert sum(done) == len(PROMPTS)
    assert engine(model, [], Sampling(8), stop_ids=()).responses == []


def test_the_checkpoints_own_eos_stops_only_where_it_is_a_stop_token(sft: Path, model: Any, opened: Open) -> None:
    (eos,) = load_on(sft, CPU).stop_ids
    with torch.no_grad():
        model.lm_head.weight[eos] = model.lm_head.weight[greedy(model, [8], 1, ())[0]] * 2
    engine = opened(None)
    for stop_ids, expected in (((), [eos] * 4), ((eos,), [eos])):
        assert greedy(model, [8], 4, stop_ids) == expected
        assert engine(model, [[8]], Sampling(4, temperature=0), stop_ids=stop_ids).responses == [expected]


def test_what_is_sampled_depends_on_the_generator_alone(model: Any, opened: Open) -> None:
    engine = opened(None)

    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        return engine(model, prompts, Sampling(12), stop_ids=(), generator=seeded(seed)).responses

    first = sample([[8]] * 6, 0)
    assert {len(response) for response in first} == {12}
    assert len({tuple(response) for response in first}) == 6, "a seed a prompt"
    assert sample([[8]] * 6, 0) == first
    assert sample([[8]] * 6, 1) != first
    assert sample([[8]] * 2, 0) == first[:2], "who else is in the batch makes no difference"


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_come_as_often_as_the_temperature_and_the_nucleus_say(model: Any, opened: Open, top_p: float) -> None:
    """Nothing else warps the distribution: no top-k, penalty or default of the checkpoint."""
    prompt, count, temperature = [5, 6, 7], 1500, 0.8
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        scores = plain(torch.tensor([prompt], device=model.device)).logits[0, -1].double().cpu()
    probabilities = (scores / temperature).softmax(-1)
    if top_p < 1:
        order = probabilities.argsort(descending=True).tolist()
        nucleus, total = [], 0.0
        while total < top_p:
            nucleus.append(order[len(nucleus)])
            total += float(probabilities[nucleus[-1]])
        probabilities = torch.zeros_like(probabilities).index_copy(
            0, torch.tensor(nucleus), probabilities[torch.tensor(nucleus)] / total
        )
    sampled = opened(None)(
        model, [prompt] * count, Sampling(1, temperature, top_p), stop_ids=(), generator=seeded(3)
    ).responses
    seen = torch.bincount(torch.tensor([token for (token,) in sampled]), minlength=len(probabilities)).double()
    for token, probability in enumerate(probabilities.tolist()):
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(float(seen[token]) - count * probability) <= 4.5 * deviation + 1e-9, token


def test_the_adapter_that_is_on_answers_as_it_is_now(model: Any, opened: Open) -> None:
    policy = trained_adapter(model, "policy", seed=1)
    trained_adapter(model, "value", seed=2)
    engine = opened(LORA)

    def answers(adapter: str | None) -> list[list[int]]:
        use_adapter(model, adapter)
        expected = [greedy(model, prompt, 6, ()) for prompt in PROMPTS]
        assert engine(model, PROMPTS, Sampling(6, temperature=0), stop_ids=()).responses == expected
        return expected

    first = answers("policy")
    assert answers(None) != first
    assert answers("policy") == first
    for factor in policy.parameters():
        factor.data *= 1.5
    assert answers("policy") != first, "it has learned since, and the engine knows"


def test_a_model_that_trains_in_full_answers_as_it_is_now(model: Any, opened: Open) -> None:
    engine = opened(None)
    responses = []
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                parameter *= scale
        expected = [greedy(model, prompt, 6, ()) for prompt in PROMPTS]
        responses.append(engine(model, PROMPTS, Sampling(6, temperature=0), stop_ids=()).responses)
        assert responses[-1] == expected
    assert responses[0] != responses[1]


def test_logprobs_that_an_engine_tells_are_those_of_the_policy(model: Any, opened: Open) -> None:
    policy = trained_adapter(model, "policy", seed=1)
    use_adapter(model, "policy")
    sampled = opened(LORA)(model, PROMPTS, Sampling(8, temperature=0.7), stop_ids=range(40), generator=seeded(0))
    if sampled.logprobs is None:
        return
    assert [len(row) for row in sampled.logprobs] == [len(response) for response in sampled.responses]
    examples = [Example.of_response(p, r) for p, r in zip(PROMPTS, sampled.responses, strict=True)]
    with torch.no_grad():
        ours = policy.logprobs(pack(examples, DEVICE.device), 0.7)
    told = torch.tensor([logprob for row in sampled.logprobs for logprob in row])
    torch.testing.assert_close(told, ours.cpu(), atol=1e-3 if CUDA else 1e-4, rtol=0)


# --- in PPO ---


@pytest.mark.parametrize("method", ["lora", "full"])
def test_ppo_over_vllm_is_ppo(method: str, checkpoint: Path, tmp_path: Path, fake: None, optimizer: Optimizer) -> None:
    """The stand-in samples as the native engine does, so every metric of every step has to be the same.

    Also where the output embedding is the input's, as it is here.
    """
    reward = make_reward_model(checkpoint, tmp_path / "reward", LORA)
    held_out = [PreparedRow(f"r{i}", "en", [], [5 + i, 6], [False, False], ["the tea"], [[9, 2]]) for i in range(3)]

    def run(p: TrainPpoParams) -> list[dict[str, float]]:
        steps: list[dict[str, float]] = []
        roles = load_roles(checkpoint, reward, p, CPU)
        train_ppo(roles, PROMPTS, [], p, lambda _, m: steps.append(dict(m)), lambda *_: None, held_out=held_out)
        return [{name: value for name, value in m.items() if not name.startswith("time/")} for m in steps]

    fast = optimizer.model_copy(update={"lr": 2e-2})
    p = params(LORA, fast, method=method, num_steps=3, generation={"kind": "native"})
    p = p.model_copy(update={"guards": p.guards.model_copy(update={"held_out_every": 1})})
    expected = run(p)
    found = run(p.model_copy(update={"generation": VLLM}))
    gaps = [step.pop("rollout/engine_gap") for step in found[1:]]  # step 0 looks at held-out answers only
    assert max(gaps) < 1e-4
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert expected[-1]["objective/kl"] > 0.01, "the policy that sampled last had learned"


@pytest.mark.parametrize(("lora", "level"), [(LORA, 1), (None, 2)])
def test_vllm_sleeps_while_nobody_asks(
    sft: Path, model: Any, fake: None, monkeypatch: pytest.MonkeyPatch, lora: Lora | None, level: int
) -> None:
    """With adapters its weights wait in the CPU's memory; without, they are forgotten and come from the model."""
    engine = VllmEngine(sft, CPU, 4, 0.4, lora)
    asleep = engine._llm
    assert (asleep.asleep, asleep.sleep_level) == (fake_vllm.MEMORY, level)
    engine(model, PROMPTS, Sampling(2), stop_ids=())
    assert (asleep.asleep, asleep.sleep_level) == (fake_vllm.MEMORY, level)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(asleep, "generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine(model, PROMPTS, Sampling(2), stop_ids=())
    assert asleep.asleep == fake_vllm.MEMORY


# --- refusals ---


def test_vllm_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu, key = torch.device("cuda"), torch.device("cpu"), "train_ppo.generation"
    require_available(NativeGeneration(kind="native"), cpu, key)
    with pytest.raises(
        InputError, match=r"train_ppo\.generation\.kind = 'vllm': needs a CUDA device.* on cpu; .*native"
    ):
        require_available(VLLM, cpu, key)
    monkeypatch.setitem(sys.modules, "vllm", None)  # what import makes of a package that is not there
    with pytest.raises(InputError, match=r"kind = 'vllm': vLLM cannot be imported .*docs/vllm\.md says, or set"):
        require_available(VLLM, cuda, key)
    fake_vllm.install(monkeypatch)
    require_available(VLLM, cuda, key)


def test_settings_that_vllm_does_not_take_are_named(sft: Path, model: Any, fake: None) -> None:
    with pytest.raises(InputError, match=r"gpu_memory_utilization = 0\.95: vLLM does not start \(Free memory .*native"):
        VllmEngine(sft, CPU, 4, 0.95, None)
    with pytest.raises(InputError, match=r"lora\.rank = 600: vLLM takes adapters of rank 512 at most"):
        VllmEngine(sft, CPU, 4, 0.4, LORA.model_copy(update={"rank": 600}))
    engine = VllmEngine(sft, CPU, 4, 0.4, None)
    context = model.config.max_position_embeddings
    with pytest.raises(
        InputError, match=rf"max_new_tokens = {context} make {context + 3} tokens, .* room for {context}"
    ):
        engine(model, [[5, 6, 7]], Sampling(context), stop_ids=())


def test_the_estimate_of_memory_has_vllms_share(
    sft: Path, tmp_path: Path, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = make_reward_model(sft, tmp_path / "reward", LORA)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 << 30, 40 << 30))
    p = params(LORA, optimizer, generation=VLLM.model_dump())
    memory = estimate_memory(
        sft, reward, p, Device(torch.device("cuda"), torch.bfloat16), longest_prompt=4, longest_ptx=0
    )
    assert memory.rollout == 16 << 30
    with pytest.raises(InputError, match=r"lower train_ppo\.generation\.gpu_memory_utilization = 0\.4"):
        require_memory(memory, 10 << 30, p)
