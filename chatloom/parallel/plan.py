"""`chatloom plan`: what a stage will need on given GPUs, before they are paid for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from chatloom.config import Lora, Params, Strategy, Training, TrainPpoParams
from chatloom.errors import InputError
from chatloom.parallel.hardware import GIB, Hardware
from chatloom.parallel.memory import Job, Memory, Placement, Rollout, Stage, host_bytes, moments
from chatloom.parallel.shapes import Shape
from chatloom.parallel.speed import Step, step

MOST_ROWS = 4096
"""Of a microbatch: nothing is gained by looking for a larger one that fits."""
SHOWN = 4
"""Ways to make a job fit that are shown, at most."""
OFFLOADING: tuple[Strategy, ...] = ("colossalai_zero2_cpu", "colossalai_gemini_auto")
OTHERS: tuple[Strategy, ...] = ("colossalai_zero2", "colossalai_gemini", *OFFLOADING)


@dataclass(frozen=True)
class Plan:
    shape: Shape
    job: Job
    gpu: str
    """Name of the card in the table of hardware."""
    moments: dict[str, Memory]
    host: float
    """Bytes of host memory for one GPU."""
    room: int
    host_room: int
    """Bytes that one GPU has, and of host memory with it."""
    step: Step
    usd_per_step: float

    @property
    def fullest(self) -> str:
        """The moment at which a GPU holds most."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> float:
        return self.moments[self.fullest].total

    @property
    def fits(self) -> bool:
        return self.peak <= self.room and self.host <= self.host_room


def plan(shape: Shape, job: Job, gpu: str, hardware: Hardware) -> Plan:
    """What `job` needs on cards of the kind `gpu`."""
    timed = step(shape, job, gpu, hardware)
    return Plan(
        shape=shape,
        job=job,
        gpu=gpu,
        moments=moments(shape, job),
        host=host_bytes(shape, job),
        room=hardware.room(gpu),
        host_room=hardware.host_room(gpu),
        step=timed,
        usd_per_step=job.gpus * hardware.gpus[gpu].usd_per_hour * timed.seconds / 3600,
    )


def largest_batch(shape: Shape, job: Job, gpu: str, hardware: Hardware) -> int:
    """Most rows (or comparisons) of a microbatch with which the job fits; 0 where it fits with none."""

    def fits(batch: int) -> bool:
        return plan(shape, replace(job, batch=batch), gpu, hardware).fits

    low, high = 0, MOST_ROWS + 1
    while high - low > 1:  # memory grows with the batch: everything up to `low` fits, nothing from `high` on
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def ways_to_fit(shape: Shape, job: Job, gpu: str, hardware: Hardware, lora: Lora) -> list[Plan]:
    """Jobs near this one that fit, with as many rows a step or more: those with the fewest changes first, then the
    fastest.

    Args:
        lora: the adapters to try where the job trains every weight.
    """
    found = []
    for near in _near(job, lora):
        batch = largest_batch(shape, near, gpu, hardware)
        if batch == 0:
            continue
        if batch < near.batch:
            times = 1 if job.stage == "ppo" else math.ceil(near.batch / batch)
            near = replace(near, batch=batch, accumulation=near.accumulation * times)
        if (made := plan(shape, near, gpu, hardware)).fits:  # gradients of earlier microbatches take room too
            found.append(made)
    found.sort(key=lambda made: (len(changes(job, made.job)), made.step.seconds))
    # A way that makes the changes of an earlier one, and more or by other numbers, is none of its own.
    made_by = [{(k, "" if v.isdigit() else v) for k, v in changes(job, made.job).items()} for made in found]
    own = [made for i, made in enumerate(found) if not any(earlier <= made_by[i] for earlier in made_by[:i])]
    return own[:SHOWN]


def _near(job: Job, lora: Lora) -> Iterator[Job]:
    """The job with other strategies, with checkpointing, with adapters, on weights in 4 bits too, with fewer answers
    generated at once, and combinations of these that exist."""
    # With one GPU nothing is shared out: only what moves to the host's memory helps.
    others = OTHERS if job.gpus > 1 else OFFLOADING
    strategies = dict.fromkeys((job.strategy, *others))
    checkpointing = (True,) if job.checkpointing else (False,) if job.stage == "ppo" else (False, True)
    own = job.lora or lora
    adapters = [own] if job.lora is not None else [None, own]
    if own.base_bits is None:
        adapters.append(own.model_copy(update={"base_bits": 4}))
    rollouts = [job.rollout]
    if job.rollout is not None:
        sizes = dict.fromkeys(max(job.rollout.generation_batch // times, 1) for times in (1, 4, 16))
        places: dict[Placement, None] = dict.fromkeys((job.rollout.placement, "offload"))
        rollouts = [
            replace(job.rollout, generation_batch=size, placement=place) for size, place in product(sizes, places)
        ]
    for strategy, repeat, adapter, rollout in product(strategies, checkpointing, adapters, rollouts):
        tensor, pipeline = (job.tensor, job.pipeline) if strategy == job.strategy else (1, 1)
        changed: dict[str, Any] = {"strategy": strategy, "checkpointing": repeat, "lora": adapter, "rollout": rollout}
        with suppress(InputError):  # strategies, stages and adapters that do not go together
            yield replace(job, tensor=tensor, pipeline=pipeline, **changed)


def changes(old: Job, new: Job) -> dict[str, str]:
    """What to write into params to get from one job to the other: the key, and its value."""
    section = f"train_{new.stage}"
    values: dict[str, tuple[object, object]] = {
        "parallel.strategy": (old.strategy, new.strategy),
        "activation_checkpointing": (old.checkpointing, new.checkpointing),
        "method": (_method(old), _method(new)),
        "lora.base_bits": (_base_bits(old), _base_bits(new)),
        "batch_size": (old.batch, new.batch),
        "accumulation_steps": (old.accumulation, new.accumulation),
    }
    if old.rollout is not None and new.rollout is not None:
        values["generation_batch"] = (old.rollout.generation_batch, new.rollout.generation_batch)
        values["placement"] = (old.rollout.placement, new.rollout.placement)
    return {f"{section}.{key}": str(b).lower() for key, (a, b) in values.items() if a != b}


def _method(job: Job) -> str:
    return "full" if job.lora is None else "lora"


def _base_bits(job: Job) -> str:
    return "null" if job.lora is None or job.lora.base_bits is None else str(job.lora.base_bits)


def job_of(params: Params, stage: Stage, gpus: int, given: Mapping[str, Any]) -> Job:
    """The job that params describe, on so many GPUs. Rows are as long as `prepare_data` lets them be.

    Args:
        given: fields of the job that hold instead of what params say; `lora_rank` changes the adapters' rank, 0 takes
            them away; `base_bits` is that of the weights under them, 4 or 16.

    Raises:
        InputError: where the stage has no such setting, or settings contradict each other.
    """
    given = dict(given)
    sections: dict[Stage, Training | TrainPpoParams]
    sections = {"sft": params.train_sft, "reward": params.train_reward, "ppo": params.train_ppo}
    section = sections[stage]
    rank = given.pop("lora_rank", section.lora.rank if section.method == "lora" else 0)
    adapters = section.lora.model_copy(update={"rank": rank})
    if "base_bits" in given:
        bits = 4 if given.pop("base_bits") == 4 else None
        if bits and not rank:
            raise InputError(f"--base-bits {bits}: only weights that do not train can be rounded; give --lora-rank")
        adapters = adapters.model_copy(update={"base_bits": bits})
    values: dict[str, Any] = {
        "strategy": section.parallel.strategy,
        "batch": section.batch_size,
        "lora": adapters if rank else None,
    }
    prompt = params.prepare_data.max_prompt_tokens
    if isinstance(section, TrainPpoParams):
        for name, key in (("checkpointing", "activation_checkpointing"), ("accumulation", "accumulation_steps")):
            if name in given:
                raise InputError(f"--{name}: train_ppo has no {key}; its keys are batch_size and num_minibatches")
        values["seq"] = prompt + section.max_new_tokens
        values["rollout"] = Rollout(
            prompts=section.rollout_batch,
            new_tokens=section.max_new_tokens,
            generation_batch=section.generation_batch,
            epochs=section.ppo_epochs,
            minibatches=section.num_minibatches,
            ptx_rows=math.ceil(section.ptx_batch / gpus) if section.ptx_coef > 0 else 0,
            placement=given.pop("placement", section.placement),
        )
        if given.get("seq", values["seq"]) <= section.max_new_tokens:
            raise InputError(
                f"--seq {given['seq']}: train_ppo.max_new_tokens = {section.max_new_tokens} leaves no prompt"
            )
    else:
        values["seq"] = prompt + params.prepare_data.max_response_tokens
        values["accumulation"] = section.accumulation_steps
        values["checkpointing"] = section.activation_checkpointing
        if "placement" in given:
            raise InputError(f"--placement: train_{stage} has one model; placement is a key of train_ppo")
        if stage == "reward":
            values["responses"] = params.compare.num_responses + params.compare.include_reference
    return Job(stage=stage, gpus=gpus, **(values | given))


# --- as text ---


def describe(made: Plan, name: str, most: int, ways: list[Plan]) -> str:
    """The plan as a person reads it.

    Args:
        name: of the model.
        most: `largest_batch`.
        ways: `ways_to_fit`, where it does not fit.
    """
    job = made.job
    rows = "comparisons" if job.stage == "reward" else "rows"
    lines = [
        f"{name}, {made.shape.total / 1e9:.2f}B parameters, {job.stage}, {_method_text(job)}, {job.strategy}, "
        f"on {job.gpus} x {made.gpu}",
        f"microbatches of {job.batch} {rows} of {job.seq} tokens a GPU, {_step_text(job)}, "
        f"{'with' if job.checkpointing else 'without'} activation checkpointing",
        "",
        *_memory_table(made),
        "",
        f"Peak on a GPU {made.peak / GIB:.1f} of {made.room / GIB:.1f} GiB ({made.fullest}); "
        f"host memory for it {made.host / GIB:.1f} of {made.host_room / GIB:.1f} GiB: "
        f"{'it fits' if made.fits else 'IT DOES NOT FIT'}; most {rows} a microbatch: {most}",
    ]
    if made.fits:
        lines += _speed_lines(made)
    elif ways:
        lines += ["What would fit, the smallest change first:"]
        lines += [f"  {_way(job, way)}" for way in ways]
    else:
        fewer = ", fewer supervised rows (ptx_batch)" if job.rollout is not None else ""
        lines += [f"Nothing near it fits: take more or larger GPUs, shorter rows{fewer}, or a smaller model"]
    return "\n".join(lines)


def _method_text(job: Job) -> str:
    if job.lora is None:
        return "every weight"
    return f"LoRA of rank {job.lora.rank}" + (" on weights of 4 bits" if job.lora.base_bits else "")


def _step_text(job: Job) -> str:
    if job.rollout is None:
        return f"{job.accumulation} a step"
    return f"{job.rollout.prompts} prompts a step, {job.rollout.generation_batch} answers at once on a GPU"


def _memory_table(made: Plan) -> list[str]:
    """A column a moment, a row a kind."""
    names = list(made.moments)
    kinds = [kind for kind in Memory.__dataclass_fields__ if any(getattr(m, kind) for m in made.moments.values())]
    width = max(map(len, names)) + 2
    lines = [f"{'GiB on a GPU':<14}" + "".join(f"{name:>{width}}" for name in names)]
    for kind in [*kinds, "total"]:
        values = [getattr(memory, kind) / GIB for memory in made.moments.values()]
        lines.append(f"{kind:<14}" + "".join(f"{value:>{width}.2f}" for value in values))
    return lines


def _speed_lines(made: Plan) -> list[str]:
    timed = made.step
    parts = {
        "rollout": timed.rollout,
        "arithmetic": timed.compute,
        "communication": timed.communication,
        "optimizer": timed.optimizer,
    }
    told = ", ".join(f"{what} {seconds:.2f}" for what, seconds in parts.items() if seconds)
    return [
        f"A step takes about {timed.seconds:.2f} s ({told}); a GPU sends {timed.sent / 1e9:.1f} GB in it",
        f"{timed.tokens / timed.seconds:,.0f} tokens/s, {100 * timed.useful:.0f} % of the rated arithmetic; "
        f"${made.usd_per_step:.4f} a step, ${made.usd_per_step / timed.tokens * 1e6:.2f} a million tokens",
    ]


def _way(old: Job, way: Plan) -> str:
    told = ", ".join(f"{key}: {value}" for key, value in changes(old, way.job).items())
    host = f", host {way.host / GIB:.0f} GiB a GPU" if way.host else ""
    return f"{told}  ({way.peak / GIB:.1f} GiB{host}, {way.step.tokens / way.step.seconds:,.0f} tokens/s)"
