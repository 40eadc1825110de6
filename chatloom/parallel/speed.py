"""How long a step takes, from arithmetic, bytes and the table of hardware: a roofline, not a simulation.

Work that can only be counted is counted; how much of a card's rated speed it reaches is one figure for all jobs
(`reached` in hardware.yaml). Expect the order of one job against another, and hours to within a factor of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from chatloom.parallel.hardware import Hardware
from chatloom.parallel.memory import FULL, GEMINI, HALF, MASTERS, Job, share, trained
from chatloom.parallel.shapes import Shape, cache_bytes

UPDATED = 7 * FULL + HALF
"""Bytes that Adam moves for one number: it reads gradient, master and moments, and writes master, moments, weight."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step (of PPO: of one rollout and its updates), by what takes them."""

    tokens: int
    """Trained on by all GPUs together; of PPO, those of its rollout."""
    rollout: float
    compute: float
    communication: float
    """What the backward pass does not hide."""
    optimizer: float
    sent: float
    """Bytes that one GPU sends to others."""
    useful: float
    """Share of the GPUs' rated arithmetic that trains: without what is computed twice."""

    @property
    def seconds(self) -> float:
        return self.rollout + self.compute + self.communication + self.optimizer


def step(shape: Shape, job: Job, gpu: str, hardware: Hardware) -> Step:
    """One step of `job` on cards of the kind `gpu`."""
    card, reached = hardware.gpus[gpu], hardware.reached
    rate = card.tflops * 1e12 * reached.compute
    flops, backward_share, repeated = _arithmetic(shape, job)
    flops /= job.tensor * job.pipeline
    compute = flops / rate * (1 + (job.pipeline - 1) / max(job.accumulation, 1))
    at_end, hidden, inside = _sent(shape, job)
    across = hardware.node.network_gb_s if job.gpus > hardware.node.gpus else card.link_gb_s
    link = min(card.link_gb_s, across) * 1e9 * reached.links
    exposed = max(0.0, hidden / link - compute * backward_share)
    communication = at_end / link + exposed + inside / (card.link_gb_s * 1e9 * reached.links)
    rollout = _rollout(shape, job, card.memory_gb_s * 1e9 * reached.memory, rate)
    optimizer = _optimizer(shape, job, gpu, hardware)
    seconds = rollout + compute + communication + optimizer
    return Step(
        tokens=_tokens(job),
        rollout=rollout,
        compute=compute,
        communication=communication,
        optimizer=optimizer,
        sent=at_end + hidden + inside,
        useful=flops * (1 - repeated) / (seconds * card.tflops * 1e12),
    )


def forward_flops(shape: Shape, seq: int) -> tuple[float, float]:
    """Operations of one token's forward pass in one layer, and in the output embedding.

    Two for each weight of a linear layer; causal attention multiplies queries with half of the keys, and half of the
    values with that, on average.
    """
    linear = sum(rows * columns for rows, columns in shape.linear.values())
    return 2 * linear + 2 * seq * shape.query, 2 * shape.embedding


def _training_flops(shape: Shape, job: Job, seq: int, predicted: float) -> tuple[float, float, float]:
    """Operations of one trained token: forward, backward, and again where activations are made twice.

    A backward pass costs two forward passes; where only adapters train, one: weights need no gradient.

    Args:
        predicted: share of the tokens whose logits are needed.
    """
    layer, head = forward_flops(shape, seq)
    adapted = shape.layers if job.lora is None or job.lora.layers is None else job.lora.layers
    times = 2 if job.lora is None else 1
    return (
        shape.layers * layer + predicted * head,
        times * (adapted * layer + predicted * head),
        adapted * layer if job.checkpointing else 0,
    )


def _arithmetic(shape: Shape, job: Job) -> tuple[float, float, float]:
    """Operations of one replica in one step; the share of them in backward passes, and of those done again."""
    if job.rollout is None:
        predicted = 1.0 if job.stage == "sft" else 0.0
        forward, backward, again = _training_flops(shape, job, job.seq, predicted)
        tokens = job.tokens * job.accumulation
        total = tokens * (forward + backward + again)
        return total, tokens * backward / total, tokens * again / total
    rollout = job.rollout
    predicted = rollout.new_tokens / job.seq
    policy, value = (_training_flops(shape, job, job.seq, share) for share in (predicted, 0.0))
    supervised = _training_flops(shape, job, job.seq, 1.0)
    tokens = job.seq * math.ceil(rollout.prompts / job.replicas)
    extra = job.seq * rollout.ptx_rows * rollout.epochs * rollout.minibatches
    # Policy and reference give logprobs, value and reward model one number a token; then come the updates.
    scoring = tokens * 2 * (policy[0] + value[0])
    parts = [rollout.epochs * tokens * (p + v) + extra * s for p, v, s in zip(policy, value, supervised, strict=True)]
    total = scoring + sum(parts)
    return total, parts[1] / total, parts[2] / total


def _rollout(shape: Shape, job: Job, bandwidth: float, rate: float) -> float:
    """Prompts cost arithmetic; each new token of a batch costs reading the weights and the cache, or arithmetic."""
    if job.rollout is None:
        return 0
    layer, head = forward_flops(shape, job.seq)
    sequences = math.ceil(job.rollout.prompts / job.replicas)
    at_once = min(sequences, job.rollout.generation_batch)
    prompt = job.seq - job.rollout.new_tokens
    read = HALF * shape.total + cache_bytes(shape, at_once * (prompt + job.rollout.new_tokens // 2))
    token = max(read / bandwidth, at_once * (shape.layers * layer + head) / rate)
    parts = job.tensor * job.pipeline
    batches = sequences / at_once
    return (sequences * prompt * shape.layers * layer / rate + batches * job.rollout.new_tokens * token) / parts


def _sent(shape: Shape, job: Job) -> tuple[float, float, float]:
    """Bytes that one GPU sends in a step: at its end, under the backward pass, and between the parts of a replica.

    A ring of n sends (n - 1) / n of a tensor to scatter sums or to gather, twice that to do both.
    """
    n, t, p = job.replicas, job.tensor, job.pipeline
    ring = (n - 1) / n
    numbers = trained(shape, job) / (t * p)
    times = job.accumulation if job.rollout is None else _updates(job)
    steps = 1 if job.rollout is None else job.rollout.epochs * job.rollout.minibatches
    half = ring * HALF * numbers
    if job.strategy in MASTERS:
        return steps * 2 * ring * FULL * numbers, 0, 0
    if job.strategy in GEMINI:  # weights before the forward and before the backward pass; gradients after it
        return times * 2 * half, times * half, 0
    if job.strategy == "colossalai_hybrid":
        sums = 6 if job.checkpointing else 4  # of a layer's output, forward, backward and again
        inside = sums * 2 * (t - 1) / t * HALF * shape.hidden * job.tokens * shape.layers / p
        inside += (2 * HALF * shape.hidden * job.tokens) if p > 1 else 0
        return steps * 3 * half, 0, times * inside
    if job.strategy == "colossalai_zero1":
        return steps * 3 * half, 0, 0
    return steps * half, times * half, 0


def _updates(job: Job) -> int:
    """Backward passes of one PPO step on one GPU, of policy and value together, and of supervised rows."""
    assert job.rollout is not None
    rows = math.ceil(job.rollout.prompts / job.replicas / job.rollout.minibatches)
    passes = math.ceil(rows / job.batch) + (job.rollout.ptx_rows > 0)
    return job.rollout.epochs * job.rollout.minibatches * passes


def _optimizer(shape: Shape, job: Job, gpu: str, hardware: Hardware) -> float:
    card = hardware.gpus[gpu]
    sharers = 1 if job.strategy in MASTERS else job.replicas
    numbers = trained(shape, job) / (sharers * job.tensor * job.pipeline)
    times = 1 if job.rollout is None else job.rollout.epochs * job.rollout.minibatches
    if not share(job).offloaded:
        return times * numbers * UPDATED / (card.memory_gb_s * 1e9 * hardware.reached.memory)
    # The GPUs of a machine share its memory; gradients go down and weights come up in float32.
    beside = min(job.gpus, hardware.node.gpus)
    update = numbers * UPDATED * beside / (hardware.node.host_memory_gb_s * 1e9 * hardware.reached.memory)
    return times * (update + numbers * 2 * FULL / (card.host_link_gb_s * 1e9))


def _tokens(job: Job) -> int:
    if job.rollout is not None:
        return job.rollout.prompts * job.seq
    return job.tokens * job.accumulation * job.replicas
