"""What is measured, against what, and how good it has to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.side import Job, Ppo, Rollouts, Training
from chatloom.errors import InputError

Measure = Literal["speed", "memory", "arithmetic"]
OURS = "ours"
TRL, TRL_PPO = "trl-1.16", "trl-1.12"


@dataclass(frozen=True)
class Side:
    """One of the processes that take turns."""

    name: str
    module: str
    environment: str = OURS
    """Whose packages: the project's own, or a file of pinned versions in `bench/peers`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What this side has otherwise than the part."""
    axis: str = ""
    """In a scaling part, the quantity that grows ..."""
    value: float = 0
    """... and how far it has."""


@dataclass(frozen=True)
class Comparison:
    """A line of the table: our side over the best of some others, in the same round."""

    what: str
    measure: Measure
    target: float | None
    """At least this ratio, or at most where less is better; None where there is nothing to reach."""
    against: tuple[str, ...] = ()
    """Sides; `arithmetic` has none, it is compared with what the machine can do."""

    def holds(self, ratio: float) -> bool | None:
        if self.target is None:
            return None
        return ratio <= self.target if self.measure == "memory" else ratio >= self.target


@dataclass(frozen=True)
class Part:
    name: str
    job: type[Job]
    rows: str
    """`instructions`, `preferences`, or `synthetic-<tokens>`."""
    settings: Mapping[str, Any]
    smoke: Mapping[str, Any]
    """The same part in seconds: it runs, and its figures mean nothing."""
    sides: tuple[Side, ...]
    comparisons: tuple[Comparison, ...] = ()


SFT, REWARD, ROLLOUTS, PPO = "bench.ours.sft", "bench.ours.reward", "bench.ours.rollouts", "bench.ours.ppo"
TRAINING = {"num_rows": 40, "batch_size": 8, "lr": 2e-5, "max_length": 512, "method": "full", "trainer": {}}
TRAINING_SMOKE = {"num_rows": 6, "batch_size": 2}
FIXED, NATURAL = {"max_new_tokens": 64, "natural": False}, {"max_new_tokens": 256, "natural": True}
GENERATION = {"num_prompts": 64, "batch_size": 16}
GENERATION_SMOKE = {"num_prompts": 8, "batch_size": 4, "max_new_tokens": 8}
EPISODES = {"num_prompts": 64, "batch_size": 8, "steps": 3, "lr": 1e-5, "ppo_epochs": 4}
EPISODES_SMOKE = {"num_prompts": 8, "batch_size": 4, "steps": 2, "max_new_tokens": 8}

DEFAULTS, PACKING, TUNED = "TRL (defaults)", "TRL (packing)", "TRL (tuned)"
# Two packed sequences hold about as many tokens as eight rows: the optimizer steps are of one size.
PACKED = {"batch_size": 2}
SFT_SIDES = (
    Side(OURS, SFT),
    Side(DEFAULTS, "bench.peers.sft", TRL),
    Side(PACKING, "bench.peers.sft", TRL, {**PACKED, "trainer": {"packing": True}}),
    Side(
        TUNED,
        "bench.peers.sft",
        TRL,
        {
            **PACKED,
            "trainer": {
                "packing": True,
                "gradient_checkpointing": False,
                "model_init_kwargs": {"dtype": "bfloat16"},
            },
        },
    ),
)


def sft_comparisons(kind: str) -> tuple[Comparison, ...]:
    return (
        Comparison(f"SFT, {kind}: tokens/s over TRL's defaults", "speed", 5.0, (DEFAULTS,)),
        Comparison(f"SFT, {kind}: tokens/s over TRL's best", "speed", 3.5, (PACKING, TUNED)),
        Comparison(f"SFT, {kind}: peak memory over TRL's", "memory", 0.5, (DEFAULTS,)),
    )


def ppo_part(name: str, what: str, lengths: Mapping[str, Any], target: float) -> Part:
    peer = "TRL (four models)"
    return Part(
        name,
        Ppo,
        "instructions",
        {**EPISODES, **lengths},
        EPISODES_SMOKE,
        (Side(OURS, PPO), Side(peer, "bench.peers.ppo", TRL_PPO)),
        (
            Comparison(f"PPO, {what}: episodes/s over TRL's", "speed", target, (peer,)),
            Comparison(f"PPO, {what}: peak memory over TRL's", "memory", 0.4, (peer,)),
        ),
    )


def rollouts_part(name: str, what: str, lengths: Mapping[str, Any], target: float) -> Part:
    peer = "transformers generate"
    return Part(
        name,
        Rollouts,
        "instructions",
        {**GENERATION, **lengths},
        GENERATION_SMOKE,
        (Side(OURS, ROLLOUTS), Side(peer, "bench.peers.rollouts", TRL)),
        (Comparison(f"rollouts, {what}: tokens/s over generate's", "speed", target, (peer,)),),
    )


def scaling_parts() -> tuple[Part, ...]:
    """Ours alone: tokens and bytes as one quantity grows."""
    sequence = [
        Side(
            f"{length} tokens",
            SFT,
            # 4096 tokens a step whatever the length, and three steps.
            settings={"rows": f"synthetic-{length}", "batch_size": 4096 // length, "num_rows": 3 * 4096 // length},
            axis="tokens a sequence",
            value=length,
        )
        for length in (256, 512, 1024, 2048)
    ]
    sizes = [
        Side(name, SFT, settings={"checkpoint": name}, axis="parameters")
        for name in ("random-64x2", "random-128x4", "random-256x8", "base")
    ]
    rollouts = [
        Side(f"{count} rollouts", PPO, settings={"batch_size": count}, axis="rollouts a step", value=count)
        for count in (4, 8, 16, 32)
    ]
    training = {**TRAINING, "max_length": 2048}
    smoke = {"num_rows": 2, "batch_size": 1}
    return (
        Part("scaling_length", Training, "synthetic-256", training, smoke, tuple(sequence)),
        Part("scaling_size", Training, "synthetic-256", {**training, "num_rows": 24}, smoke, tuple(sizes)),
        Part(
            "scaling_rollouts",
            Ppo,
            "instructions",
            {**EPISODES, **FIXED, "steps": 3, "ppo_epochs": 1},
            {**EPISODES_SMOKE, "num_prompts": 32},
            tuple(rollouts),
        ),
    )


PARTS = (
    Part("sft_full", Training, "instructions", TRAINING, TRAINING_SMOKE, SFT_SIDES, sft_comparisons("full")),
    Part(
        "sft_lora",
        Training,
        "instructions",
        {**TRAINING, "method": "lora"},
        TRAINING_SMOKE,
        SFT_SIDES,
        sft_comparisons("LoRA"),
    ),
    Part(
        "reward",
        Training,
        "preferences",
        {**TRAINING, "num_rows": 32},
        TRAINING_SMOKE,
        (Side(OURS, REWARD), Side(DEFAULTS, "bench.peers.reward", TRL)),
        (
            Comparison("reward training: pairs/s over TRL's", "speed", 3.0, (DEFAULTS,)),
            Comparison("reward training: peak memory over TRL's", "memory", None, (DEFAULTS,)),
        ),
    ),
    rollouts_part("rollouts_fixed", "64 tokens each", FIXED, 2.5),
    rollouts_part("rollouts_natural", "natural stops, limit 256", {**NATURAL, "num_prompts": 32}, 4.0),
    ppo_part("ppo_fixed", "64 tokens each", FIXED, 3.0),
    ppo_part("ppo_natural", "natural stops, limit 256", {**NATURAL, "steps": 2}, 6.0),
    Part(
        "arithmetic",
        Training,
        "instructions",
        TRAINING,
        TRAINING_SMOKE,
        (Side(OURS, SFT),),
        (Comparison("SFT, full: useful FLOP/s over matrix products'", "arithmetic", 0.5),),
    ),
    *scaling_parts(),
)


def select(names: Sequence[str]) -> list[Part]:
    """Parts whose name is, or begins with, one of `names`; every part where there are none.

    Raises:
        InputError: where a name fits nothing.
    """
    for name in names:
        if not any(part.name.startswith(name) for part in PARTS):
            raise InputError(f"--part {name}: no such part; there are {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if not names or any(part.name.startswith(name) for name in names)]
