"""The plan's bytes against PyTorch's own count of them: `MemTracker` follows every storage a step makes and frees."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chatloom import kernels
from chatloom.config import Lora, Optimizer
from chatloom.data.examples import Example
from chatloom.device import Device
from chatloom.models import attention, four_bit
from chatloom.models.adapters import Role, add_adapter
from chatloom.optim import MasterAdamW, ParameterGroup
from chatloom.packing import Packed, pack
from chatloom.parallel.memory import Job, moments
from chatloom.parallel.shapes import Shape
from chatloom.sft import sft_loss

TINY = Shape(
    hidden=256, intermediate=688, layers=4, heads=4, key_value_heads=2, head_dim=64, vocabulary=1024, tied=False
)
ROWS, SEQ = 2, 384
JOB = Job("sft", "none", 1, ROWS, SEQ)
WIDE = replace(Shape.named("llama-7b"), layers=3)
WIDE_JOB = Job("sft", "colossalai_zero1", 1, 4, 2048, checkpointing=True)
LORA = Lora(rank=8, alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], layers=None, base_bits=None)


ROUNDED = LORA.model_copy(update={"base_bits": 4})


@pytest.fixture(autouse=True)
def pytorch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has no use for our kernels for CPUs."""
    monkeypatch.setattr(kernels, "compiled", lambda *_, **__: None)


def config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )


def bfloat16_llama(shape: Shape) -> Any:
    model = AutoModelForCausalLM.from_config(config(shape), dtype=torch.bfloat16)
    model.set_attn_implementation(attention.NAME)
    return model


def in_4_bits(model: Any, device: str = "cpu") -> Any:
    """As `chatloom.models.checkpoint.load_on` reads it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        rounding = four_bit.settings(Device(torch.device(device), torch.bfloat16))
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation=attention.NAME, **rounding
        )


class Tracker(MemTracker):
    """Without statistics of single modules, for which each parameter has to train and each module to run once."""

    def _pre_fw_hook(self, *_: Any) -> None:
        pass

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    @property
    def peak(self) -> int:
        [kinds] = self.get_tracker_snapshot("peak").values()
        return int(kinds["Total"])


def role(shape: Shape, job: Job) -> Role:
    """What stages.training.trainable makes of a checkpoint."""
    model = bfloat16_llama(shape)
    if job.lora is not None and job.lora.base_bits is not None:
        model = in_4_bits(model)
        four_bit.keep_gradients(model)
    if job.checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    if job.lora is None:
        return Role(model)
    add_adapter(model, "sft", job.lora, seed=0)
    return Role(model, "sft")


@pytest.mark.parametrize("name", ["llama-7b", "llama-3.1-8b", "llama-3.2-3b", "smollm2-135m"])
def test_parameters_are_those_of_transformers(name: str) -> None:
    shape = replace(Shape.named(name), layers=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(config(shape))
    assert shape.total == sum(parameter.numel() for parameter in model.parameters())
    assert shape.layer == sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert shape.trunk == sum(parameter.numel() for parameter in model.model.parameters())


@pytest.mark.parametrize(("name", "billions"), [("7b", 6.7), ("13b", 13.0), ("30b", 32.5), ("65b", 65.2)])
def test_parameters_are_those_of_the_paper(name: str, billions: float) -> None:
    """Touvron et al. 2023, table 2."""
    assert Shape.named(f"llama-{name}").total / 1e9 == pytest.approx(billions, abs=0.1)


def test_adapters_are_those_of_peft() -> None:
    upper = LORA.model_copy(update={"layers": 3})
    model = bfloat16_llama(TINY)
    add_adapter(model, "sft", upper, seed=0)
    assert TINY.adapter(upper) == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    "job",
    [
        JOB,
        replace(JOB, checkpointing=True),
        replace(JOB, lora=LORA),
        replace(JOB, lora=LORA, checkpointing=True),
        replace(JOB, lora=ROUNDED, checkpointing=True),
        replace(JOB, batch=6, checkpointing=True),
    ],
    ids=["full", "full checkpointed", "lora", "lora checkpointed", "lora, 4 bits", "full checkpointed, more rows"],
)
def test_the_peak_of_sft_on_a_tiny_model(job: Job, optimizer: Optimizer) -> None:
    """Chatloom's own step, twice: Adam's moments exist in the second one only."""
    policy = role(TINY, job)
    examples = [Example(list(range(SEQ)), [False] + [True] * (SEQ - 1)) for _ in range(job.batch)]
    packed = pack(examples)
    tracker = Tracker()
    tracker.track_external(policy.model)
    with tracker:
        updates = MasterAdamW([ParameterGroup(policy.parameters(), 1e-3)], optimizer)
        for _ in range(2):
            sft_loss(policy, packed, len(packed.targets)).backward()
            updates.step(1.0, "train_sft", 1)
    planned = max(memory.total for memory in moments(TINY, job).values())
    assert planned == pytest.approx(tracker.peak, rel=0.05)


@pytest.mark.parametrize(
    "job",
    [
        replace(WIDE_JOB, whole_logits=True),
        WIDE_JOB,
        replace(WIDE_JOB, checkpointing=False),
    ],
    ids=["transformers' loss", "checkpointed", "all activations"],
)
def test_the_peak_of_layers_as_wide_as_the_7b_models(job: Job) -> None:
    """Forward and backward pass on fake tensors: sizes without contents. Gradients stay where the backward pass leaves
    them, as with zero1, and there is no optimizer yet."""
    packed = pack([Example([1] * job.seq, [False] + [True] * (job.seq - 1)) for _ in range(job.batch)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = role(WIDE, job)
        tracker = Tracker()
        tracker.track_external(policy.model)
        with tracker:
            loss, _kept = loss_and_kept(policy, packed, job)
            loss.backward()
    planned = max(memory.total - memory.optimizer for name, memory in moments(WIDE, job).items() if name != "step")
    assert planned == pytest.approx(tracker.peak, rel=0.05)


def loss_and_kept(policy: Role, packed: Packed, job: Job) -> tuple[Tensor, Tensor | None]:
    """Chatloom's loss; or transformers' one, and the logits that its caller keeps."""
    if not job.whole_logits:
        return sft_loss(policy, packed, len(packed.targets)), None
    model = policy.model
    hidden = model.model(input_ids=packed.input_ids.view(job.batch, -1), use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    shifted = logits[:, :-1].contiguous().view(-1, WIDE.vocabulary)
    return F.cross_entropy(shifted, packed.targets), logits


def peak_of_two_steps(policy: Role, job: Job, optimizer: Optimizer) -> int:
    """Bytes that CUDA's allocator had given at the most."""
    packed = pack([Example([1] * job.seq, [False] + [True] * (job.seq - 1)) for _ in range(job.batch)], "cuda")
    updates = MasterAdamW([ParameterGroup(policy.parameters(), 1e-3)], optimizer)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        sft_loss(policy, packed, len(packed.targets)).backward()
        updates.step(1.0, "train_sft", 1)
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_sft_on_a_gpu(checkpointing: bool, optimizer: Optimizer) -> None:
    """What CUDA's allocator counts in two steps of a model of 0.1B parameters."""
    shape = replace(WIDE, hidden=1024, intermediate=2752, layers=6, heads=8, key_value_heads=8)
    job = replace(WIDE_JOB, strategy="none", checkpointing=checkpointing)
    policy = role(shape, job)
    policy.model.cuda()
    planned = max(memory.total for memory in moments(shape, job).values())
    assert planned == pytest.approx(peak_of_two_steps(policy, job, optimizer), rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_of_sft_on_4_bits_on_a_gpu(optimizer: Optimizer) -> None:
    """As above, of a model of 0.5B parameters whose weights are most of its memory."""
    shape = replace(WIDE, hidden=2048, intermediate=5504, layers=8, heads=16, key_value_heads=16)
    job = replace(WIDE_JOB, strategy="none", batch=1, seq=512, lora=ROUNDED)
    model = in_4_bits(bfloat16_llama(shape), "cuda")
    model.activation_checkpointing_enable()
    model.train()
    add_adapter(model, "sft", ROUNDED, seed=0)
    policy = Role(model, "sft")
    planned = max(memory.total for memory in moments(shape, job).values())
    assert planned == pytest.approx(peak_of_two_steps(policy, job, optimizer), rel=0.1)
