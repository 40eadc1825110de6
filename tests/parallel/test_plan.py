"""The plan by hand on a model of 1,704 parameters, its command, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from chatloom.cli import app
from chatloom.config import Lora, Params, load_params, load_preset, validate_params
from chatloom.errors import InputError
from chatloom.parallel.hardware import GIB, TABLE, load_hardware
from chatloom.parallel.memory import Job, Rollout, Stage, host_bytes, layer_activations, moments
from chatloom.parallel.plan import changes, job_of, largest_batch, plan, ways_to_fit
from chatloom.parallel.shapes import Shape, cache_bytes, nf4_bytes, quantized_bytes
from chatloom.parallel.speed import forward_flops, step
from tests.conftest import ROOT

SHAPE = Shape(hidden=8, intermediate=16, layers=2, heads=2, key_value_heads=1, head_dim=4, vocabulary=32, tied=False)
"""A layer: q 64, k 32, v 32, o 64, three of the MLP 128 each, two norms of 8: 592. Two layers, two embeddings of 256,
a last norm of 8: 1,704."""
JOB = Job("sft", "colossalai_zero2", gpus=4, batch=2, seq=16)
LORA = Lora(rank=2, alpha=4, target_modules=["q_proj", "down_proj"], layers=None, base_bits=None)
HARDWARE = load_hardware()
LLAMA_7B = Shape.named("llama-7b")
RECIPE = Job("sft", "colossalai_zero2", gpus=4, batch=8, seq=2048, checkpointing=True)


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


# --- bytes ---


def test_counts_by_hand() -> None:
    assert (SHAPE.layer, SHAPE.trunk, SHAPE.total) == (592, 1448, 1704)
    assert replace(SHAPE, tied=True).total == 1448
    assert SHAPE.adapter(LORA) == 2 * 2 * ((8 + 8) + (16 + 8))
    assert SHAPE.adapter(LORA.model_copy(update={"layers": 1})) == 80
    # Two norms of 8 in float32 and twice in 16 bits, q 8, k and v 4, the output twice 8, two float32, four times 16.
    assert layer_activations(SHAPE, JOB) == 2 * (4 + 2 + 2) * 8 + 2 * (8 + 4 + 4 + 8 + 8) + 2 * 4 + 2 * 4 * 16
    # Only the inputs of q_proj and down_proj are needed again: no scaled norm, no input of o_proj, gate_proj, up_proj.
    assert (
        layer_activations(SHAPE, replace(JOB, lora=LORA))
        == 2 * 4 * 8 + 2 * 8 + 2 * (8 + 4 + 4 + 8) + 2 * 4 + 2 * 4 * 16
    )


@pytest.mark.parametrize(
    ("strategy", "weights", "optimizer", "gradients", "host"),
    [
        ("ddp", 2, 12, 4, 0),
        ("colossalai_zero1", 2, 3, 2 + 1, 0),
        ("colossalai_zero2", 2, 3, 0.5 + 1, 0),
        ("colossalai_zero2_cpu", 2, 0, 0.5, 3 + 1),
        ("colossalai_gemini", 0.5, 3, 0.5, 0),
        ("colossalai_gemini_auto", 0, 0, 0, 3 + 0.5 + 0.5),
        ("colossalai_hybrid", 2, 3, 2 + 1, 0),
    ],
)
def test_bytes_a_parameter_on_four_gpus_at_the_step(
    strategy: Any, weights: float, optimizer: float, gradients: float, host: float
) -> None:
    job = replace(JOB, strategy=strategy)
    memory = moments(SHAPE, job)["step"]
    assert (memory.weights, memory.optimizer, memory.gradients) == (1704 * weights, 1704 * optimizer, 1704 * gradients)
    assert host_bytes(SHAPE, job) == 1704 * host


def test_a_whole_memory_by_hand() -> None:
    """zero2, checkpointed: 32 tokens keep 2 inputs of 8, the last norm, and in the loss its output and three gradients;
    the head's gradient is 2 bytes of 256."""
    found = moments(SHAPE, replace(JOB, checkpointing=True))
    assert found["loss"].activations == 32 * (2 * 2 * 8 + (4 + 2) * 8 + (2 + 2 + 2 + 4) * 8)
    # A chunk, which here is all of them, and what is kept for the head's gradient.
    assert found["loss"].logits == (4 + 4 + 2) * 32 * 32 + 2 * 32 * 32
    assert found["loss"].gradients == 0
    assert found["loss"].buffers == 2 * 256
    # The layer again, its input, gradients of both factors of the MLP and of the stream; nothing of it is stored yet.
    assert found["first layer"].activations == 32 * (2 * 8 + 328 + 2 * 2 * 16 + 2 * 2 * 8)
    assert found["first layer"].gradients == 0.5 * (1704 - 592 - 256)
    # Float64 of a quarter of the largest tensor, for its norm.
    assert found["step"].buffers == 8 * 256 / 4


def test_accumulated_gradients_are_there_from_the_start() -> None:
    assert moments(SHAPE, replace(JOB, accumulation=2))["loss"].gradients == 0.5 * 1704
    gemini = replace(JOB, strategy="colossalai_gemini")
    assert moments(SHAPE, gemini)["loss"].gradients == 0
    assert moments(SHAPE, replace(gemini, accumulation=2))["loss"].gradients == 0.5 * 1704


def test_whole_logits() -> None:
    found = moments(SHAPE, replace(JOB, whole_logits=True))
    assert found["loss"].logits == 4 * 4 * 32 * 32
    assert found["first layer"].logits == found["step"].logits == 4 * 32 * 32


def test_reward_rows_are_comparisons_times_responses() -> None:
    job = replace(JOB, stage="reward", responses=3)
    assert job.tokens == 2 * 3 * 16
    memory = moments(SHAPE, job)
    assert memory["loss"].logits == 0
    # The output embedding is carried along, and not trained.
    assert memory["step"].weights == 2 * 1704
    assert memory["step"].optimizer == 3 * 1448


def test_ppo_holds_four_models_or_one_backbone() -> None:
    rollout = Rollout(prompts=8, new_tokens=4, generation_batch=2, epochs=1, minibatches=1, ptx_rows=0)
    full = moments(SHAPE, replace(JOB, stage="ppo", rollout=rollout))
    assert full["rollout"].weights == 2 * 4 * 1704
    assert full["rollout"].optimizer == 3 * (1704 + 1448)
    assert full["rollout"].cache == 1.5 * 2 * 16 * 2 * (2 * 2 * 4)
    one = moments(SHAPE, replace(JOB, stage="ppo", rollout=rollout, lora=LORA))
    assert one["rollout"].weights == 2 * (1704 + 3 * 160)


def test_ppo_can_set_its_scoring_models_aside_while_it_learns() -> None:
    rollout = Rollout(8, 4, generation_batch=2, epochs=1, minibatches=1, ptx_rows=0, placement="offload")
    job = replace(JOB, stage="ppo", rollout=rollout)
    found = moments(SHAPE, job)
    assert found["rollout"].weights == 2 * 4 * 1704
    assert all(found[name].weights == 2 * 2 * 1704 for name in ("loss", "last layer", "first layer", "step"))
    assert host_bytes(SHAPE, job) == 2 * 2 * 1704
    assert host_bytes(SHAPE, replace(job, lora=LORA)) == 0


def test_a_split_model_is_a_part_on_each_gpu() -> None:
    split = replace(JOB, strategy="colossalai_hybrid", tensor=2, pipeline=2, accumulation=2, checkpointing=True)
    found = moments(SHAPE, split)
    assert split.replicas == 1
    assert found["step"].weights == pytest.approx(2 * (592 + 256 + 8) / 2)
    # One layer, of two microbatches under way; the last norm and its gradients are not split, the vocabulary is.
    assert found["loss"].activations == 32 * (1 * 2 * 2 * 8 + 16 * 8)
    assert found["loss"].logits == 12 * 32 * 32 / 2


def test_frozen_weights_in_4_bits_by_hand() -> None:
    """Half a byte each, one of a scale for 64, four of a float32 for 256 scales; embeddings and norms in 16 bits."""
    linear = 2 * (64 + 32 + 32 + 64 + 3 * 128)
    rest = 2 * 256 + 5 * 8
    assert nf4_bytes(SHAPE) == linear * (0.5 + 1 / 64 + 4 / 16384) + 2 * rest
    rounded = LORA.model_copy(update={"base_bits": 4})
    whole, found = (moments(SHAPE, replace(JOB, lora=lora)) for lora in (LORA, rounded))
    assert whole["step"].weights - found["step"].weights == 2 * linear - (nf4_bytes(SHAPE) - 2 * rest)
    # While the largest layer is multiplied its weights are there in 16 bits.
    assert found["first layer"].buffers - whole["first layer"].buffers == 2 * 128
    assert found["loss"].buffers == whole["loss"].buffers


def test_quantized_and_cached_bytes_by_hand() -> None:
    linear = 64 + 32 + 32 + 64 + 3 * 128
    inputs = 8 + 8 + 8 + 8 + 8 + 8 + 16
    groups = 64 / 4 + 2 * 32 / 4 + 64 / 4 + 3 * 128 / 4
    layer = linear / 2 + 2.5 * groups + 4 * inputs
    assert quantized_bytes(SHAPE, bits=4, group=4) == 2 * layer + 2 * (256 + 256 + 5 * 8)
    assert cache_bytes(SHAPE, 10) == 10 * 2 * 2 * 2 * 4


# --- time ---


def test_operations_by_hand() -> None:
    assert forward_flops(SHAPE, seq=16) == (2 * 576 + 2 * 16 * 8, 2 * 256)


def test_bytes_sent_by_hand() -> None:
    """Three quarters of 2 bytes a parameter: sums in each of 3 microbatches, weights once."""
    job = replace(JOB, accumulation=3)
    assert step(SHAPE, job, "a100-80gb", HARDWARE).sent == 0.75 * 2 * 1704 * (3 + 1)
    assert step(SHAPE, replace(job, strategy="ddp"), "a100-80gb", HARDWARE).sent == 0.75 * 2 * 4 * 1704
    gemini = replace(job, strategy="colossalai_gemini")
    assert step(SHAPE, gemini, "a100-80gb", HARDWARE).sent == 0.75 * 2 * 1704 * 3 * 3


def test_arithmetic_takes_its_share_of_the_rated_speed() -> None:
    """Every weight 2 operations forward and 4 backward; what is computed again is no useful work."""
    alone = replace(RECIPE, strategy="none", gpus=1, checkpointing=False)
    weights = LLAMA_7B.total - LLAMA_7B.embedding - 65 * 4096
    attention = 32 * 2 * 2048 * 4096
    tokens = 8 * 2048
    seconds = tokens * 3 * (2 * weights + attention) / (312e12 * HARDWARE.reached.compute)
    timed = step(LLAMA_7B, alone, "a100-80gb", HARDWARE)
    assert timed.compute == pytest.approx(seconds, rel=1e-6)
    again = step(LLAMA_7B, replace(alone, checkpointing=True), "a100-80gb", HARDWARE)
    assert again.compute / timed.compute == pytest.approx(4 / 3, rel=0.01)
    assert again.useful < timed.useful < HARDWARE.reached.compute


def test_the_network_is_felt_beyond_one_machine() -> None:
    inside, across = (step(LLAMA_7B, replace(RECIPE, gpus=gpus), "h100-80gb", HARDWARE) for gpus in (8, 16))
    assert across.communication > 5 * inside.communication


# --- what fits ---


def test_the_largest_batch_is_where_it_stops_fitting() -> None:
    most = largest_batch(LLAMA_7B, RECIPE, "a100-80gb", HARDWARE)
    assert plan(LLAMA_7B, replace(RECIPE, batch=most), "a100-80gb", HARDWARE).fits
    assert not plan(LLAMA_7B, replace(RECIPE, batch=most + 1), "a100-80gb", HARDWARE).fits
    assert largest_batch(Shape.named("llama-65b"), RECIPE, "a100-80gb", HARDWARE) == 0


def test_ways_to_fit_do_fit_and_change_no_more_than_they_must() -> None:
    job = replace(RECIPE, gpus=1, strategy="none", batch=4)
    ways = ways_to_fit(LLAMA_7B, job, "rtx-4090-24gb", HARDWARE, LORA)
    assert ways
    made = [set(changes(job, way.job).items()) for way in ways]
    for i, way in enumerate(ways):
        assert way.fits
        assert way.job.batch * way.job.accumulation >= 4
        assert not any(other < made[i] for other in made)
    assert changes(job, ways[0].job) == {"train_sft.method": "lora"}


def test_a_model_too_large_for_adapters_fits_in_4_bits() -> None:
    job = replace(RECIPE, gpus=1, strategy="none", batch=1, seq=512, lora=LORA)
    shape = Shape.named("llama-13b")
    assert not plan(shape, job, "rtx-4090-24gb", HARDWARE).fits
    [way, *_] = ways_to_fit(shape, job, "rtx-4090-24gb", HARDWARE, LORA)
    assert changes(job, way.job) == {"train_sft.lora.base_bits": "4"}


def test_offloading_does_not_fit_without_host_memory() -> None:
    shape = Shape.named("llama-13b")
    job = replace(RECIPE, gpus=1, strategy="colossalai_zero2_cpu", batch=1)
    made = plan(shape, job, "a100-80gb", HARDWARE)
    assert made.peak <= made.room
    assert made.host == pytest.approx(16 * shape.total)
    assert not made.fits


# --- from params ---


def test_a_preset_becomes_a_job() -> None:
    preset = ROOT / "params" / "llama-7b.yaml"
    values = validate_params(load_preset(preset, ROOT / "params.yaml"), str(preset))
    own, lengths = values.train_sft, values.prepare_data
    job = job_of(values, "sft", 4, {})
    assert (job.strategy, job.lora) == (own.parallel.strategy, None)
    assert (job.batch, job.accumulation) == (own.batch_size, own.accumulation_steps)
    assert (job.checkpointing, job.rollout) == (own.activation_checkpointing, None)
    assert job.seq == lengths.max_prompt_tokens + lengths.max_response_tokens
    assert job_of(values, "sft", 4, {"batch": 8, "seq": 2048, "accumulation": 1}) == RECIPE
    ppo, job = values.train_ppo, job_of(values, "ppo", 8, {})
    assert job.seq == lengths.max_prompt_tokens + ppo.max_new_tokens
    assert job.rollout == Rollout(
        prompts=ppo.rollout_batch,
        new_tokens=ppo.max_new_tokens,
        generation_batch=ppo.generation_batch,
        epochs=ppo.ppo_epochs,
        minibatches=ppo.num_minibatches,
        ptx_rows=ppo.ptx_batch // 8,
        placement="offload",
    )


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("model", ["llama-7b", "llama-13b"])
def test_every_stage_of_a_preset_fits_its_gpus_of_80_gb(model: str, stage: Stage) -> None:
    preset = ROOT / "params" / f"{model}.yaml"
    values = validate_params(load_preset(preset, ROOT / "params.yaml"), str(preset))
    gpus = {"sft": values.train_sft, "reward": values.train_reward, "ppo": values.train_ppo}[
        stage
    ].parallel.num_processes
    assert gpus <= 8
    made = plan(Shape.named(model), job_of(values, stage, gpus, {}), "a100-80gb", HARDWARE)
    assert made.fits, (made.fullest, made.peak / GIB, made.host / GIB)


def test_options_about_adapters(params: Params) -> None:
    given = {"strategy": "colossalai_zero2"}
    assert job_of(params, "sft", 2, given).lora is None
    rank_8 = job_of(params, "sft", 2, given | {"lora_rank": 8}).lora
    assert rank_8 is not None
    assert (rank_8.rank, rank_8.target_modules) == (8, params.train_sft.lora.target_modules)
    assert job_of(params, "reward", 2, given | {"lora_rank": 0}).lora is None
    rounded = job_of(params, "reward", 2, given | {"base_bits": 4}).lora
    assert rounded is not None
    assert rounded.base_bits == 4
    assert job_of(params, "reward", 2, given | {"base_bits": 16}).lora == params.train_reward.lora


@pytest.mark.parametrize(
    ("stage", "gpus", "given", "words"),
    [
        ("sft", 4, {}, "'none' uses one GPU, not 4"),
        ("sft", 4, {"strategy": "colossalai_hybrid", "tensor": 3}, "tensor * pipeline = 3 * 1 does not divide 4 GPUs"),
        ("sft", 4, {"strategy": "ddp", "tensor": 2}, "only colossalai_hybrid does"),
        ("sft", 4, {"strategy": "colossalai_gemini", "lora_rank": 8}, "does not go with colossalai_gemini"),
        ("ppo", 1, {"checkpointing": True}, "train_ppo has no activation_checkpointing"),
        ("sft", 1, {"placement": "offload"}, "placement is a key of train_ppo"),
        ("sft", 1, {"base_bits": 4}, "only weights that do not train can be rounded; give --lora-rank"),
        ("ppo", 4, {"strategy": "colossalai_gemini", "lora_rank": 0}, "PPO samples from whole weights"),
        ("ppo", 1, {"seq": 48}, "max_new_tokens = 48 leaves no prompt"),
    ],
)
def test_contradictions_are_refused(params: Params, stage: Any, gpus: int, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as raised:
        job_of(params, stage, gpus, given)
    assert words in str(raised.value)


# --- data files ---


@pytest.mark.parametrize(("text", "found"), [("4x80GB", (4, "a100-80gb")), ("1xH100-80GB", (1, "h100-80gb"))])
def test_gpus_by_size_and_by_name(text: str, found: tuple[int, str]) -> None:
    assert HARDWARE.parse_gpus(text) == found


@pytest.mark.parametrize("text", ["4", "0x80GB", "4x81GB", "x80GB"])
def test_unknown_gpus_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--gpus {text}: .*h200-141gb"):
        HARDWARE.parse_gpus(text)


def test_a_wrong_value_of_the_table_is_named(tmp_path: Path) -> None:
    values = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    values["gpus"]["l4-24gb"]["tflops"] = 0
    (tmp_path / "hardware.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(InputError, match=r"gpus\.l4-24gb\.tflops = 0"):
        load_hardware(tmp_path / "hardware.yaml")


def test_room_is_what_programs_find_less_the_reserve() -> None:
    assert HARDWARE.room("h100-80gb") == round((79.1 - 2.0) * GIB)


def test_a_shape_from_a_config(tmp_path: Path) -> None:
    values = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert Shape.named(str(tmp_path)) == Shape.named(str(tmp_path / "config.json")) == SHAPE
    for broken, words in (
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | broken), encoding="utf-8")
        with pytest.raises(InputError, match=words):
            Shape.named(str(tmp_path))


def test_unknown_models_and_modules_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'llama-7b'"):
        Shape.named("llama-7")
    with pytest.raises(InputError, match="a layer has no 'c_attn'"):
        SHAPE.adapter(LORA.model_copy(update={"target_modules": ["c_attn"]}))
    with pytest.raises(InputError, match="the model has 2 layers"):
        SHAPE.adapter(LORA.model_copy(update={"layers": 3}))


# --- the command ---


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    monkeypatch.chdir(ROOT)
    return CliRunner().invoke(app, ["plan", *options])


def test_the_command_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "--model", "llama-7b", "--stage", "ppo", "--gpus", "8x40GB")
    assert result.exit_code == 0
    assert "IT DOES NOT FIT" in result.stdout
    assert "train_ppo.method: lora" in result.stdout


def test_the_commands_input_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "--model", "llama-8b", "--stage", "sft", "--gpus", "4x80GB")
    assert result.exit_code == 1
    assert result.stderr.startswith("chatloom: --model llama-8b")
    assert result.stderr.count("\n") == 1
