"""What one GPU holds at the moments of a training step at which it can hold most.

Everything is counted in bytes of tensors, kind by kind, from the shape of the model and from what the code allocates:
activations after Korthikanti et al. 2022 (section 4.1), counted anew for LLaMA's layer as transformers runs it with
fused attention; ZeRO after Rajbhandari et al. 2020, with the buffers of ColossalAI 0.5.0; Chatloom's own loops
(`chatloom.optim`, `chatloom.tensors`). Nothing is fitted. Left out are the host's share of a process, and what the
allocator loses in gaps: `reserve_gib` of hardware.yaml stands for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

from chatloom.config import Lora, Strategy
from chatloom.errors import InputError
from chatloom.parallel.shapes import Shape, cache_bytes, nf4_bytes
from chatloom.tensors import LOGITS_CHUNK

Stage = Literal["sft", "reward", "ppo"]
Placement = Literal["resident", "offload"]
HALF, FULL, DOUBLE = 2, 4, 8
"""Bytes of a number in bfloat16, float32 and float64."""
BUCKET = 12 * 2**20
"""Numbers that ColossalAI's LowLevelZeroPlugin sums at once (`reduce_bucket_size_in_m`); a larger tensor goes alone."""
SMALLEST_CHUNK = 32 * 2**20
"""Numbers in a chunk of ColossalAI's GeminiPlugin, at least (`min_chunk_size_m`)."""
CACHE_ROOM = 1.5
"""The cache of keys and values grows by half (`chatloom.models.decoder`)."""
MASTERS = ("none", "ddp")
"""Strategies of `chatloom.optim.MasterAdamW`, which keeps everything on every GPU."""
GEMINI = ("colossalai_gemini", "colossalai_gemini_auto")


@dataclass(frozen=True)
class Rollout:
    """What only PPO has."""

    prompts: int
    """Of a step, on all GPUs together."""
    new_tokens: int
    generation_batch: int
    """Sequences that one GPU generates at once."""
    epochs: int
    minibatches: int
    ptx_rows: int
    """Supervised rows of an optimizer step on one GPU."""
    placement: Placement = "resident"
    """Where reference and reward model are while the others learn; `offload` is the host's memory."""


@dataclass(frozen=True)
class Job:
    """One training stage on some GPUs."""

    stage: Stage
    strategy: Strategy
    gpus: int
    batch: int
    """Rows (SFT, PPO) or comparisons (reward) of one microbatch on one GPU."""
    seq: int
    """Tokens of a row: question and answer."""
    accumulation: int = 1
    """Microbatches of an optimizer step."""
    checkpointing: bool = False
    lora: Lora | None = None
    """None trains every weight."""
    tensor: int = 1
    pipeline: int = 1
    responses: int = 2
    """Of a comparison, each a row."""
    rollout: Rollout | None = None
    whole_logits: bool = False
    """float32 logits of every token at once and kept until the next step, as ColossalChat's loop over transformers'
    loss has them; Chatloom's has those of `LOGITS_CHUNK` tokens."""

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: where parts of it contradict each other.
        """
        if self.strategy == "none" and self.gpus > 1:
            raise InputError(f"parallel.strategy = 'none' uses one GPU, not {self.gpus}: name another, such as ddp")
        if self.gpus % (self.tensor * self.pipeline):
            raise InputError(
                f"tensor * pipeline = {self.tensor} * {self.pipeline} does not divide {self.gpus} GPUs: lower one"
            )
        if self.tensor * self.pipeline > 1 and self.strategy != "colossalai_hybrid":
            raise InputError(f"parallel.strategy = {self.strategy!r} splits no layers: only colossalai_hybrid does")
        if self.lora is not None and (self.strategy in GEMINI or self.tensor > 1):
            what = self.strategy if self.strategy in GEMINI else f"{self.strategy} with tensor = {self.tensor}"
            raise InputError(f"method = 'lora' does not go with {what} in ColossalAI: take colossalai_zero2, or full")

        if self.strategy in GEMINI and self.stage == "ppo":
            raise InputError(
                f"train_ppo.parallel.strategy = {self.strategy!r}: PPO samples from whole weights, and Gemini "
                "slices them; take colossalai_zero2, or colossalai_zero2_cpu where memory is short"
            )

    @property
    def replicas(self) -> int:
        """GPUs that each see other rows."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def accumulates(self) -> bool:
        """Whether gradients stay between backward passes: PPO's of policy, value and supervised rows do."""
        return self.accumulation > 1 or self.stage == "ppo"

    @property
    def tokens(self) -> int:
        """Of one microbatch on one GPU; PPO's supervised rows are one too."""
        rows = self.batch * self.responses if self.stage == "reward" else self.batch
        return self.seq * max(rows, self.rollout.ptx_rows if self.rollout is not None else 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    """float32 masters and Adam's moments."""
    activations: float = 0
    logits: float = 0
    cache: float = 0
    """Keys and values of a rollout."""
    buffers: float = 0
    """What exists for a moment: gradients on their way, gathered chunks, norms."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Share:
    """Bytes that a rank holds for each parameter that it trains."""

    weights: float
    gradients: float
    """As a backward pass leaves them."""
    optimizer: float
    step: float = 0
    """What float32 gradients that exist during the step only take more."""
    offloaded: bool = False
    """Whether the last two are in the host's memory."""


def share(job: Job) -> Share:
    """Who keeps what, per strategy; n ranks see other rows."""
    n = job.replicas
    state = (FULL + 2 * FULL) / n
    if job.strategy in MASTERS:  # gradients are added up in float32; one alone becomes that in the step
        return Share(HALF, FULL, 3 * FULL) if job.accumulates else Share(HALF, HALF, 3 * FULL, FULL - HALF)
    if job.strategy == "colossalai_gemini":  # gradients in chunks of their own, so that they can be accumulated
        return Share(HALF / n, HALF / n, state)
    if job.strategy == "colossalai_gemini_auto":  # weights on the GPU while they are used: the least it can do with
        return Share(0, 0, state + 2 * HALF / n, offloaded=True)
    if job.strategy in ("colossalai_zero1", "colossalai_hybrid"):
        return Share(HALF, HALF, state, FULL / n)
    return Share(HALF, HALF / n, state, FULL / n, offloaded=job.strategy == "colossalai_zero2_cpu")


def trained(shape: Shape, job: Job) -> int:
    """Parameters that the job trains, of all its models."""
    if job.lora is not None:
        return shape.adapter(job.lora) * (2 if job.stage == "ppo" else 1)
    return {"sft": shape.total, "reward": shape.trunk, "ppo": shape.total + shape.trunk}[job.stage]


def frozen_bytes(shape: Shape, job: Job) -> float:
    """Of the parameters that it only reads. PPO's reward model is an adapter too where PPO trains one."""
    if job.lora is not None:
        backbone = HALF * shape.total if job.lora.base_bits is None else nf4_bytes(shape)
        return backbone + (HALF * shape.adapter(job.lora) if job.stage == "ppo" else 0)
    # A reward or value model still carries its output embedding; the reference and the reward model are whole.
    return HALF * {"sft": 0, "reward": shape.head, "ppo": shape.head + 2 * shape.total}[job.stage]


def moments(shape: Shape, job: Job) -> dict[str, Memory]:
    """Bytes at each moment of a step that can be the fullest one; between two of them it is less, or on the way.

    `loss`: the forward pass is done, and no layer's part of it is freed yet. `last layer`, `first layer`: the backward
    pass has come there, and with checkpointing has just computed the layer's activations again. `step`: all gradients
    are there. `rollout`: PPO generates.
    """
    own, tokens = share(job), job.tokens
    mine = _part(shape, job)
    number = trained(shape, job) * mine
    full = job.lora is None
    layers = _layers_kept(shape, job)
    kept = HALF * shape.hidden if job.checkpointing else layer_activations(shape, job)
    running = layer_activations(shape, job) + _backward_temporaries(shape, job) if layers else 0
    # Above the last layer that the backward pass is in: with checkpointing every layer's input is still there.
    kept_below = layers * kept if job.checkpointing else max(layers - 1, 0) * kept
    away = _set_aside(shape, job)
    resident = Memory(
        weights=own.weights * number + frozen_bytes(shape, job) * mine - away,
        optimizer=0 if own.offloaded else own.optimizer * number,
        activations=_below(shape, job),
        buffers=_gathered(shape, job),
    )
    stored = own.gradients * number
    # Gradients that are there before a backward pass: of earlier microbatches.
    before = stored if job.accumulates else 0
    # Of all but the first layer and what lies below it.
    most = max(before, stored - own.gradients * (shape.layer + shape.embedding) / job.tensor if full else stored)
    head = HALF * shape.embedding / job.tensor if full and job.stage != "reward" else 0
    # The gradient of a tied embedding waits for its other half until the end.
    unpacked = _unpacked(shape, job)
    buffers = resident.buffers + _in_transit(shape, job) + (head if shape.tied else 0) + unpacked
    retained = FULL * tokens * shape.vocabulary if job.whole_logits else 0
    step = 0 if own.offloaded else own.step * number
    moment = partial(replace, resident)
    at_loss = moment(
        gradients=before,
        activations=resident.activations + tokens * (layers * kept + _top(shape, job)),
        logits=_logits(shape, job),
        buffers=resident.buffers + (0 if job.whole_logits else head),
    )
    at_norm = replace(
        at_loss,
        activations=resident.activations + tokens * (layers * kept + _last_norm(shape, job)),
        logits=retained,
    )
    found = {
        "loss": max(at_loss, at_norm, key=lambda memory: memory.total),
        "last layer": moment(
            gradients=max(before, own.gradients * shape.head / job.tensor if full else 0),
            activations=resident.activations + tokens * (kept_below + running),
            logits=retained,
            buffers=buffers,
        ),
        "first layer": moment(
            gradients=most,
            activations=resident.activations + tokens * (HALF * shape.hidden + running),
            logits=retained,
            buffers=buffers,
        ),
        "step": moment(gradients=stored + step, logits=retained, buffers=resident.buffers + _for_step(shape, job)),
    }
    if job.rollout is not None:
        sequences = job.rollout.generation_batch
        found["rollout"] = moment(
            weights=resident.weights + away,
            logits=(FULL + HALF) * sequences * shape.vocabulary,
            cache=CACHE_ROOM * cache_bytes(shape, sequences * job.seq) * mine,
            buffers=resident.buffers + unpacked,
        )
    return found


def host_bytes(shape: Shape, job: Job) -> float:
    """What offloading keeps in the host's memory for one GPU."""
    own = share(job)
    state = (own.optimizer + own.step) * trained(shape, job) * _part(shape, job) if own.offloaded else 0
    return state + _set_aside(shape, job)


def _set_aside(shape: Shape, job: Job) -> float:
    """Reference and reward model where they are offloaded; with adapters they are the backbone that learns."""
    if job.rollout is None or job.rollout.placement == "resident" or job.lora is not None:
        return 0
    return 2 * HALF * shape.total * _part(shape, job)


def layer_activations(shape: Shape, job: Job) -> float:
    """What one token leaves behind in one layer for the backward pass.

    A normalisation keeps its input in float32, what it made of it where its weight trains, and its output where a
    linear layer that reads it trains. Attention keeps queries, keys, values, its output, and one float32 a head; the
    output projection a copy of that output in another layout. The MLP keeps the gate, its activation, the up
    projection, and their product where the down projection trains.
    """
    trains = 1 if job.lora is None else 0
    norms = 2 * (FULL + HALF * trains) * shape.hidden
    inputs = HALF * shape.hidden * (_reads(job, "q_proj", "k_proj", "v_proj") + _reads(job, "gate_proj", "up_proj"))
    attention = HALF * (2 * shape.query + 2 * shape.key_value) + FULL * shape.heads
    attention += HALF * shape.query * _reads(job, "o_proj")
    mlp = HALF * shape.intermediate * (3 + _reads(job, "down_proj"))
    return norms + inputs + (attention + mlp) / job.tensor


def _reads(job: Job, *names: str) -> bool:
    """Whether the gradient of a weight or an adapter needs the input of one of these linear layers."""
    return job.lora is None or not set(names).isdisjoint(job.lora.target_modules)


def _backward_temporaries(shape: Shape, job: Job) -> float:
    """Gradients of one token's activations that exist together, where the MLP's product goes backward: its own (in the
    place of the product, where that was kept), those of its factors, and of the residual stream before and after."""
    of_product = HALF * shape.intermediate * (not _reads(job, "down_proj"))
    return (of_product + 2 * HALF * shape.intermediate) / job.tensor + 2 * HALF * shape.hidden


def _top(shape: Shape, job: Job) -> float:
    """What one token has above the layers when the loss is taken: what the last normalisation keeps, and its output.

    Chatloom's loss (`chatloom.tensors`) has that output's gradient already, and makes it anew, weighted, in float32.
    """
    norm = (FULL + HALF * (job.lora is None)) * shape.hidden
    ahead = 0 if job.whole_logits or job.stage == "reward" else (2 * HALF + FULL) * shape.hidden
    return norm + HALF * shape.hidden + ahead


def _last_norm(shape: Shape, job: Job) -> float:
    """What one token has there in the last normalisation's backward pass: what it keeps, its gradient in both
    precisions, and in float32 those of its factors."""
    return (FULL + HALF * (job.lora is None) + HALF + 3 * FULL) * shape.hidden


def _logits(shape: Shape, job: Job) -> float:
    """Whole: the logits, their log-softmax, and the gradients of both, in float32.

    In chunks: of a chunk, logits and probabilities in float32 and their difference from the truth in the model's
    precision, which is kept of all tokens where the output embedding trains.
    """
    if job.stage == "reward":
        return 0
    if job.whole_logits:
        return 4 * FULL * job.tokens * shape.vocabulary
    chunk = (HALF + 2 * FULL) * min(LOGITS_CHUNK, job.tokens)
    return (chunk + HALF * job.tokens * (job.lora is None)) * shape.vocabulary / job.tensor


def _below(shape: Shape, job: Job) -> float:
    """What the layers under the lowest adapter made of PPO's rollout (`chatloom.models.trunk`)."""
    if job.rollout is None or job.lora is None or job.lora.layers is None:
        return 0
    return HALF * shape.hidden * job.seq * math.ceil(job.rollout.prompts / job.replicas)


def _part(shape: Shape, job: Job) -> float:
    """Share of a model's parameters that one GPU computes with: all of them but in colossalai_hybrid."""
    edges = shape.total - shape.layers * shape.layer
    edge = edges if job.pipeline == 1 else shape.embedding + shape.hidden
    return (math.ceil(shape.layers / job.pipeline) * shape.layer + edge) / shape.total / job.tensor


def _layers_kept(shape: Shape, job: Job) -> int:
    """Layers whose activations are kept at once; the first part of a pipeline works on a microbatch for each part."""
    layers = shape.layers if job.lora is None or job.lora.layers is None else job.lora.layers
    return math.ceil(layers / job.pipeline) * min(job.pipeline, job.accumulation)


def _largest(shape: Shape, job: Job) -> tuple[int, int]:
    """Numbers in the largest tensor that a layer trains, and that the model trains."""
    if job.lora is not None:
        adapter = job.lora.rank * max(max(shape.linear[name]) for name in job.lora.target_modules)
        return adapter, adapter
    largest = max(rows * columns for rows, columns in shape.linear.values())
    return largest // job.tensor, max(largest, shape.embedding) // job.tensor


def _in_transit(shape: Shape, job: Job) -> float:
    """Gradients between the layer that made them and the place where they are kept."""
    in_layer, _ = _largest(shape, job)
    if job.strategy in MASTERS:  # one in the model's precision, before it is added to the float32 one
        return HALF * in_layer if job.accumulates else 0
    if job.strategy in ("colossalai_zero2", "colossalai_zero2_cpu"):  # as made, laid flat to be sent, and received
        bucket = max(in_layer, min(BUCKET, trained(shape, job)))
        return HALF * bucket * (2 + 1 / job.replicas)
    return 0


def _unpacked(shape: Shape, job: Job) -> float:
    """The weights of the one 4-bit layer that is multiplied with, in 16 bits: the largest one's."""
    if job.lora is None or job.lora.base_bits is None:
        return 0
    return HALF * max(rows * columns for rows, columns in shape.linear.values())


def _for_step(shape: Shape, job: Job) -> float:
    """ColossalAI's norm copies one gradient at a time to float64 (`LowLevelZeroOptimizer._compute_grad_norm`)."""
    _, largest = _largest(shape, job)
    return 0 if job.strategy in (*MASTERS, *GEMINI) else DOUBLE * largest / job.replicas


def _gathered(shape: Shape, job: Job) -> float:
    """Gemini's chunks that are whole on the GPU: the one in use and the one before it, or the embedding's own."""
    if job.strategy not in GEMINI:
        return 0
    in_layer, largest = _largest(shape, job)
    whole = HALF * max(2 * max(SMALLEST_CHUNK, in_layer), largest)
    return whole if job.strategy == "colossalai_gemini_auto" else whole * (1 - 1 / job.replicas)
