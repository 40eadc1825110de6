"""The rollout engine: against plain forward passes, and in every order of coming and going."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from chatloom.config import Lora
from chatloom.data.examples import Example
from chatloom.models import attention
from chatloom.models.adapters import Role, add_adapter, use_adapter
from chatloom.models.decoder import BLOCK, Decoder, ModelDecoder
from chatloom.models.generation import PREFILL_TOKENS, Engine, Event, generate, open_decoder, stream_tokens
from chatloom.models.llama_decoder import LlamaDecoder
from chatloom.models.sampling import Sampling, sample
from chatloom.packing import pack

PROMPTS = [[5, 6, 7], [8], list(range(10, 30)), [40, 41], [9, 8, 7, 6, 5], [12, 250]]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OPENERS: dict[str, Callable[[object, int], Decoder]] = {
    "snapshot": lambda model, rows: LlamaDecoder(model, rows, snapshot=True),
    "own layers": lambda model, rows: LlamaDecoder(model, rows, snapshot=False),
    "own forward pass": ModelDecoder,
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A tiny random LLaMA with more to say than its last token: an output embedding of its own, and large weights."""
    config = LlamaConfig(**SHAPE, initializer_range=0.2, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LlamaForCausalLM(config).eval()
    made.set_attn_implementation(attention.NAME)
    return made


@pytest.fixture(params=OPENERS)
def opened(request: pytest.FixtureRequest) -> Callable[[object, int], Decoder]:
    return OPENERS[request.param]


@torch.no_grad()
def full_logits(model: object, ids: Sequence[int]) -> Tensor:
    """(V) after the last token, of one unpadded forward pass in transformers' eager attention, without a cache."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain(torch.tensor([list(ids)])).logits[0, -1]


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 290, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- decoders ---


def test_every_step_is_a_full_forward_pass(model: LlamaForCausalLM, opened: Callable[[object, int], Decoder]) -> None:
    """Rows come, go and grow over a cache block; each step's logits are those of the whole sequence alone."""
    decoder = opened(model, 3)
    rows: list[list[int]] = []
    coming = iter([random_tokens(5, 0), random_tokens(BLOCK - 2, 1), random_tokens(1, 2), random_tokens(9, 3), [7, 7]])
    draw = random.Random(0)
    for number in range(12):
        joining = [next(coming) for _ in range({0: 2, 1: 1, 4: 1, 8: 1}.get(number, 0))]
        tokens = [draw.randrange(3, 290) for _ in rows]
        logits = decoder.extend(tokens, joining)
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)] + [list(prompt) for prompt in joining]
        expected = torch.stack([full_logits(model, row) for row in rows])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        for leaving in {3: [0], 7: [2], 9: [1]}.get(number, []):
            decoder.drop(leaving)
            rows[leaving] = rows[-1]
            rows.pop()
    assert max(map(len, rows)) > BLOCK or len(rows) < 3


def test_a_row_does_not_see_who_had_its_place_before(
    model: LlamaForCausalLM, opened: Callable[[object, int], Decoder]
) -> None:
    fresh, used = opened(model, 2), opened(model, 2)
    used.extend([], [random_tokens(40, 5), random_tokens(50, 6)])
    used.extend([3, 4], [])
    used.drop(0)
    used.drop(0)
    first, second = (decoder.extend([], [[5, 6, 7], [8, 9]]) for decoder in (fresh, used))
    assert torch.equal(first, second)
    assert torch.equal(fresh.extend([10, 11], []), used.extend([10, 11], []))


def test_bfloat16_is_as_near_to_float32_as_transformers_is(model: LlamaForCausalLM) -> None:
    """The copied, blocked weights that a CPU with bfloat16 uses, and what its rounding may do."""
    exact = copy.deepcopy(model.to(torch.bfloat16)).float()  # the same weights
    ours = LlamaDecoder(model, 4, snapshot=True)
    logits = ours.extend([], PROMPTS[:4])
    logits = ours.extend([9, 9, 9, 9], [])
    for row, prompt in enumerate(PROMPTS[:4]):
        expected = full_logits(exact, [*prompt, 9])
        theirs = (full_logits(model, [*prompt, 9]).float() - expected).abs().max()
        assert (logits[row].float() - expected).abs().max() < 2 * theirs + 0.01


def test_other_architectures_use_their_own_forward_pass() -> None:
    config = Qwen2Config(**SHAPE)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    model.set_attn_implementation(attention.NAME)
    decoder = open_decoder(model, 2, snapshot=True)
    assert isinstance(decoder, ModelDecoder)
    decoder.extend([], PROMPTS[:2])
    logits = decoder.extend([11, 12], [])
    for row, (prompt, token) in enumerate(zip(PROMPTS, (11, 12), strict=False)):
        torch.testing.assert_close(logits[row], full_logits(model, [*prompt, token]), atol=1e-4, rtol=0)


# --- adapters ---


def trained_adapter(model: LlamaForCausalLM, lora: Lora, scale: float) -> Role:
    add_adapter(model, "policy", lora, seed=1)
    policy = Role(model, "policy")
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data += scale * noise.to(parameter.dtype)
    return policy


@pytest.mark.parametrize("adapter", ["policy", None])
def test_the_adapter_that_is_on_answers(
    model: LlamaForCausalLM, lora: Lora, opened: Callable[[object, int], Decoder], adapter: str | None
) -> None:
    trained_adapter(model, lora, 0.05)
    add_adapter(model, "value", lora, seed=2)
    use_adapter(model, adapter)
    decoder = opened(model, 2)
    decoder.extend([], PROMPTS[:2])
    logits = decoder.extend([11, 12], [])
    for row, (prompt, token) in enumerate(zip(PROMPTS, (11, 12), strict=False)):
        torch.testing.assert_close(logits[row], full_logits(model, [*prompt, token]), atol=1e-4, rtol=0)
    use_adapter(model, "policy" if adapter is None else None)
    other = full_logits(model, [*PROMPTS[0], 11])
    assert not torch.allclose(logits[0], other, atol=1e-3)


def test_the_policy_that_samples_is_the_one_that_is_trained(model: LlamaForCausalLM, lora: Lora) -> None:
    """In bfloat16, the logprobs it samples by are as near to the update's as those are to exact ones."""
    policy = trained_adapter(model.to(torch.bfloat16), lora, 0.02)
    prompt, response = PROMPTS[2], random_tokens(48, 9)
    packed = pack([Example.of_response(prompt, response)])
    with torch.no_grad():
        trained, reference = policy.logprobs(packed), Role(model).logprobs(packed)
        exact = Role(copy.deepcopy(model).float(), "policy").logprobs(packed)
    use_adapter(model, "policy")
    decoder = LlamaDecoder(model, 1, snapshot=True)
    steps = [decoder.extend([], [prompt]), *(decoder.extend([token], []) for token in response[:-1])]
    logprobs = torch.log_softmax(torch.cat(steps).float(), dim=-1)
    sampled = logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1)
    rounding = (trained - exact).abs().mean()
    assert (reference - exact).abs().mean() > 5 * rounding, "the adapter is no rounding error"
    assert (sampled - trained).abs().mean() < 2 * rounding


# --- the engine ---


def responses_of(engine: Engine, prompts: Sequence[list[int]], sampling: Sampling, stop_ids: Sequence[int]) -> object:
    numbers = [engine.add(p, sampling, stop_ids=stop_ids, seed=1000 + p[0]) for p in prompts]
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    while not engine.idle:
        for event in engine.step():
            tokens[event.request].append(event.token)
    return {tuple(prompt): tokens[number] for prompt, number in zip(prompts, numbers, strict=True)}


def greedy_oracle(model: object, prompt: list[int], limit: int, stop: Sequence[int]) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(full_logits(model, ids).argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def test_greedy_is_the_likeliest_token_after_the_whole_sequence(
    model: LlamaForCausalLM, opened: Callable[[object, int], Decoder]
) -> None:
    free = [greedy_oracle(model, prompt, 9, ()) for prompt in PROMPTS]
    stop = free[1][3]
    engine = Engine(opened(model, 2), 2)
    expected = {tuple(p): greedy_oracle(model, p, 9, (stop,)) for p in PROMPTS}
    assert responses_of(engine, PROMPTS, Sampling(9, temperature=0), (stop,)) == expected
    assert len(expected[8,]) == 4, "it ends with its stop token"


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 40])
def test_samples_depend_on_neither_batch_nor_order(
    model: LlamaForCausalLM, opened: Callable[[object, int], Decoder], batch_size: int
) -> None:
    sampling, stop = Sampling(20, temperature=1.0), range(60)
    alone = {}
    for prompt in PROMPTS:
        alone |= responses_of(Engine(opened(model, 1), 1), [prompt], sampling, stop)
    assert len(set(map(len, alone.values()))) > 2, "they end at different steps"
    for prompts in (PROMPTS, PROMPTS[::-1]):
        assert responses_of(Engine(opened(model, batch_size), batch_size), prompts, sampling, stop) == alone


def test_samples_follow_the_full_forward_pass(model: LlamaForCausalLM) -> None:
    """Each token is where the request's own next uniform number falls in the distribution after the whole sequence."""
    engine = Engine(LlamaDecoder(model, 2, snapshot=True), 2)
    engine.add([8, 9], Sampling(12, temperature=0.7), stop_ids=(), seed=5)
    tokens = []
    while not engine.idle:
        tokens += [event.token for event in engine.step()]
    uniforms, ids = random.Random(5), [8, 9]
    for token in tokens:
        cumulative = torch.softmax(full_logits(model, ids).double() / 0.7, -1).cumsum(0)
        below = float(cumulative[token - 1]) if token else 0.0
        assert below - 1e-5 <= uniforms.random() <= float(cumulative[token]) + 1e-5
        ids.append(token)


def test_events_and_limits_of_each_request(model: LlamaForCausalLM) -> None:
    engine = Engine(LlamaDecoder(model, 2, snapshot=True), 2)
    tokens = greedy_oracle(model, [40, 41], 3, ())
    assert len(set(tokens)) == 3
    short = engine.add([40, 41], Sampling(2, temperature=0), stop_ids=(), seed=0)
    long = engine.add([40, 41], Sampling(9, temperature=0), stop_ids=(tokens[2],), seed=0)
    waiting = engine.add([40, 41], Sampling(1, temperature=0), stop_ids=tokens[:1], seed=0)
    assert (short, long, waiting) == (0, 1, 2)
    assert engine.step() == [Event(0, tokens[0], None), Event(1, tokens[0], None)]
    assert engine.step() == [Event(0, tokens[1], "length"), Event(1, tokens[1], None)]
    # The third takes the place of the first, and ends with a stop token, though it is at its limit too.
    assert engine.step() == [Event(1, tokens[2], "stop"), Event(2, tokens[0], "stop")]
    assert engine.idle


def test_cancelling(model: LlamaForCausalLM) -> None:
    sampling = Sampling(6, temperature=0)
    expected = greedy_oracle(model, [40, 41], 6, ())
    engine = Engine(LlamaDecoder(model, 2, snapshot=True), 2)
    running, kept, waiting, last = (
        engine.add(p, sampling, stop_ids=(), seed=0) for p in ([8], [40, 41], [9], [40, 41])
    )
    events = engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    while not engine.idle:
        events += engine.step()
    assert [event.token for event in events if event.request == kept] == expected
    assert [event.token for event in events if event.request == last] == expected
    assert sum(event.request in (running, waiting) for event in events) == 1, "the one token before it was cancelled"
    engine.cancel(running)
    engine.cancel(kept)
    assert engine.step() == [], "they have ended: nothing happens"


def test_prompts_join_as_far_as_a_pass_has_room(model: LlamaForCausalLM) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.joined: list[list[int]] = []

        def extend(self, tokens: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
            self.joined.append([len(prompt) for prompt in prompts])
            return torch.zeros(len(tokens) + len(prompts), 300)

        def drop(self, row: int) -> None:
            pass

    recorder = Recorder()
    engine = Engine(recorder, 4)
    for length in (PREFILL_TOKENS - 10, 10, 1, PREFILL_TOKENS + 1, 5):
        engine.add([7] * length, Sampling(4), stop_ids=(), seed=0)
    for _ in range(5):
        engine.step()
    # Two fill the first pass; the third must not wait for the fourth, which is longer than a pass and goes alone; the
    # fifth waits until one of the four has left.
    assert recorder.joined == [[PREFILL_TOKENS - 10, 10], [1], [PREFILL_TOKENS + 1], [], [5]]


# --- what is built on it ---


def test_generate_answers_in_the_order_of_its_prompts(model: LlamaForCausalLM) -> None:
    done: list[int] = []
    responses = generate(
        model,
        PROMPTS,
        Sampling(8, temperature=0),
        stop_ids=(),
        batch_size=2,
        on_done=done.append,
    )
    assert responses == [greedy_oracle(model, prompt, 8, ()) for prompt in PROMPTS]
    assert sum(done) == len(PROMPTS)


def test_generate_draws_its_seeds_from_the_generator(model: LlamaForCausalLM) -> None:
    def drawn(batch_size: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, PROMPTS, Sampling(8), stop_ids=(), batch_size=batch_size, generator=generator)

    assert drawn(2, 0) == drawn(6, 0) != drawn(2, 1)
    generator = torch.Generator().manual_seed(0)
    first, second = (generate(model, [[8], [8]], Sampling(8), stop_ids=(), generator=generator) for _ in "12")
    assert first != second, "the next rollout has new luck"
    assert first[0] != first[1], "and so has the same prompt beside it"


def test_stream_is_the_response(model: LlamaForCausalLM) -> None:
    stream = list(stream_tokens(model, PROMPTS[2], Sampling(12, temperature=0), stop_ids=()))
    assert stream == greedy_oracle(model, PROMPTS[2], 12, ())


# --- sampling ---


def shares(probabilities: Sequence[float], sampling: Sampling, count: int = 20000) -> Tensor:
    logits = torch.log(torch.tensor([list(probabilities)])).expand(count, len(probabilities))
    uniforms = [(number + 0.5) / count for number in range(count)]
    tokens = torch.tensor(sample(logits, [sampling] * count, uniforms))
    return torch.bincount(tokens, minlength=len(probabilities)) / count


def test_samples_follow_the_distribution() -> None:
    plain = shares([0.5, 0.3, 0.15, 0.05], Sampling(1))
    torch.testing.assert_close(plain, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=1e-4, rtol=0)
    # At temperature 0.5 probabilities are squared: 0.25, 0.09, 0.0225, 0.0025 of 0.365.
    cold = shares([0.5, 0.3, 0.15, 0.05], Sampling(1, temperature=0.5))
    torch.testing.assert_close(cold, torch.tensor([0.6849, 0.2466, 0.0616, 0.0068]), atol=1e-4, rtol=0)
    # The smallest set that reaches 0.7 is the first two.
    nucleus = shares([0.05, 0.5, 0.15, 0.3], Sampling(1, top_p=0.7))
    torch.testing.assert_close(nucleus, torch.tensor([0.0, 0.625, 0.0, 0.375]), atol=1e-4, rtol=0)


def test_samples_follow_the_distribution_over_a_large_vocabulary() -> None:
    """More tokens than one section of the cumulative sum, not a multiple of it, some of them impossible."""
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    weights[::3] = 0
    expected = weights / weights.sum()
    found = shares(expected.tolist(), Sampling(1), count=5000)
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
    assert not found[::3].any()


def test_the_ends_of_the_unit_interval() -> None:
    logits = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]))
    assert sample(logits, [Sampling(1)], [0.0]) == [1]
    assert sample(logits, [Sampling(1)], [1 - 2**-53]) == [3]


@pytest.mark.parametrize("setting", [Sampling(1, top_p=5e-324), Sampling(1, temperature=5e-324)], ids=str)
def test_the_least_settings_leave_the_likeliest_token(setting: Sampling) -> None:
    logits = torch.tensor([[-90.0, 80.0, 79.0, 0.0]]).log_softmax(-1)
    assert [sample(logits, [setting], [uniform]) for uniform in (0.0, 0.5, 1 - 2**-53)] == [[1]] * 3


def test_each_row_has_its_own_settings() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.7]])).expand(4, 3)
    settings = [Sampling(1, temperature=0), Sampling(1), Sampling(1, top_p=0.5), Sampling(1, temperature=100.0)]
    # 0.25 falls on the second token; of the nucleus {2}, on the only one; of three nearly equal thirds, on the first.
    assert sample(logits, settings, [0.25] * 4) == [2, 1, 2, 0]
