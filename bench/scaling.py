"""`python -m bench.scaling`: what `chatloom plan` says next to published figures, and of sizes that nobody ran here.

Writes the tables of docs/scaling.md and its pictures. No figure of the plan is typed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import typer

from bench.pages import fill, table
from bench.presets import ROOT
from chatloom.config import Lora, Strategy
from chatloom.parallel.hardware import GIB, Hardware, load_hardware
from chatloom.parallel.memory import Job
from chatloom.parallel.plan import Plan, describe, largest_batch, plan
from chatloom.parallel.shapes import Shape, cache_bytes, quantized_bytes

PAGE, FIGURES = ROOT / "docs" / "scaling.md", ROOT / "docs" / "figures"
MIB = 2**20
LORA = Lora(
    rank=16,
    alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    layers=None,
    base_bits=None,
)
QLORA = LORA.model_copy(update={"base_bits": 4})


# --- published figures of training ---


@dataclass(frozen=True)
class Published:
    """A line of ColossalChat's README: SFT of Llama-2-7B on H800, rows of 2048 tokens, checkpointing, flash attention.

    Its figure is the peak of PyTorch's allocator on a GPU, in MiB. Where it cannot have been measured as it is
    labelled, `read_as` says how the page reads it, and why.
    """

    strategy: Strategy
    gpus: int
    batch: int
    mib: float
    lora: Lora | None = None
    read_batch: int | None = None
    read_lora: Lora | None = None

    @property
    def label(self) -> str:
        lora = "" if self.lora is None else f", LoRA r{self.lora.rank}"
        return f"{self.gpus} x {self.strategy.removeprefix('colossalai_')}, batch {self.batch}{lora}"

    @property
    def labelled(self) -> Job:
        job = Job("sft", self.strategy, self.gpus, self.batch, seq=2048, checkpointing=True, lora=self.lora)
        return replace(job, whole_logits=True)

    @property
    def read(self) -> Job:
        return replace(self.labelled, batch=self.read_batch or self.batch, lora=self.read_lora or self.lora)


RANK_8 = LORA.model_copy(update={"rank": 8})
PUBLISHED = (
    Published("colossalai_zero2_cpu", 2, 4, 22457.98),
    Published("colossalai_zero2", 2, 4, 72390.95),
    Published("colossalai_zero2_cpu", 4, 8, 19412.77, read_batch=4),
    Published("colossalai_zero2", 4, 8, 43446.31, read_batch=4),
    Published("colossalai_zero2", 4, 16, 58082.30),
    # Gradients reached the adapters at the top only: as if no layer but the last had them.
    Published("colossalai_zero2", 4, 8, 21167.73, lora=RANK_8, read_lora=RANK_8.model_copy(update={"layers": 1})),
)


def planned_mib(job: Job, hardware: Hardware) -> float:
    return plan(Shape.named("llama-7b"), job, "h800-80gb", hardware).peak / MIB


def published_rows(hardware: Hardware) -> list[tuple[str, float, float, float]]:
    """Label, published, planned as labelled, planned as read; MiB."""
    return [
        (line.label, line.mib, planned_mib(line.labelled, hardware), planned_mib(line.read, hardware))
        for line in PUBLISHED
    ]


# --- 4-bit serving ---

PUBLISHED_4BIT = {"llama-7b": 3.5, "llama-13b": 6.5, "llama-30b": 15.8, "llama-65b": 31.2}
"""GiB of GPU memory that 4-bit inference needs at least, as published; one scale for each output of a layer."""


def serving_rows() -> list[tuple[str, float, float, float, float]]:
    """Model; GiB published, planned likewise, planned with Chatloom's groups of 128; and of 2048 cached tokens."""
    rows = []
    for name, published in PUBLISHED_4BIT.items():
        shape = Shape.named(name)
        alike, grouped = (quantized_bytes(shape, group=group) / GIB for group in (None, 128))
        rows.append((name, published, alike, grouped, cache_bytes(shape, 2048) / GIB))
    return rows


# --- capacity of one GPU ---

CAPACITY_CARDS = ("rtx-4080-16gb", "rtx-4090-24gb", "a100-40gb", "a100-80gb")
CAPACITY_JOBS = {
    "plain": Job("sft", "none", 1, 1, seq=2048, checkpointing=True),
    "LoRA r16": Job("sft", "none", 1, 1, seq=2048, checkpointing=True, lora=LORA),
    "LoRA r16, 4 bits": Job("sft", "none", 1, 1, seq=2048, checkpointing=True, lora=QLORA),
    "zero2_cpu": Job("sft", "colossalai_zero2_cpu", 1, 1, seq=2048, checkpointing=True),
    "gemini": Job("sft", "colossalai_gemini", 1, 1, seq=2048, checkpointing=True),
    "gemini_auto": Job("sft", "colossalai_gemini_auto", 1, 1, seq=2048, checkpointing=True),
}


@dataclass(frozen=True)
class Capacity:
    method: str
    card: str
    billions: float
    """Parameters of the largest model that fits."""
    host_limited: bool
    """Whether the next larger one lacks host memory, not the GPU's."""


def llama_like(width: int) -> Shape:
    """LLaMA's proportions at any width: 4096 gives the 7B, 5120 the 13B model. `width` is a multiple of 128."""
    return Shape(
        hidden=width,
        intermediate=256 * math.ceil(8 * width / 3 / 256),
        layers=width // 128,
        heads=width // 128,
        key_value_heads=width // 128,
        head_dim=128,
        vocabulary=32000,
        tied=False,
    )


def capacity(method: str, card: str, hardware: Hardware) -> Capacity:
    """The largest LLaMA-like model that a job fits with; larger ones need more of everything."""
    job, width = CAPACITY_JOBS[method], 128
    while plan(llama_like(width + 128), job, card, hardware).fits:
        width += 128
    beyond = plan(llama_like(width + 128), job, card, hardware)
    return Capacity(method, card, llama_like(width).total / 1e9, host_limited=beyond.peak <= beyond.room)


def capacities(hardware: Hardware) -> list[Capacity]:
    return [capacity(method, card, hardware) for method in CAPACITY_JOBS for card in CAPACITY_CARDS]


# --- 8, 64 and 512 GPUs ---

ROWS_A_STEP, SIZES, SCALE_CARD = 1024, (8, 64, 512), "h100-80gb"
TOKENS_A_ROW = 110
"""Mean of the 104K bilingual set (docs/results.md)."""
_JOB = Job("sft", "colossalai_gemini", 8, batch=1, seq=2048, checkpointing=True)
SCALE = {
    "llama-7b": (replace(_JOB, strategy="colossalai_zero2"), _JOB),
    "llama-65b": (
        _JOB,
        replace(_JOB, strategy="colossalai_hybrid", tensor=8),
        replace(_JOB, strategy="colossalai_hybrid", gpus=32, tensor=8, pipeline=4),
    ),
}


@dataclass(frozen=True)
class Scaled:
    """`made` is None where nothing fits."""

    model: str
    job: Job
    made: Plan | None

    @property
    def how(self) -> str:
        parts = f" {self.job.tensor}x{self.job.pipeline}" if self.job.tensor * self.job.pipeline > 1 else ""
        return self.job.strategy.removeprefix("colossalai_") + parts


def scaled(hardware: Hardware) -> list[Scaled]:
    """SFT with `ROWS_A_STEP` rows a step, however many GPUs share them, in the microbatches that are fastest."""
    found = []
    for model, jobs in SCALE.items():
        shape = Shape.named(model)
        for job in jobs:
            for gpus in SIZES:
                if gpus % (job.tensor * job.pipeline) == 0:
                    of_size = replace(job, gpus=gpus)
                    found.append(Scaled(model, of_size, _fastest(shape, of_size, hardware)))
    return found


def _fastest(shape: Shape, job: Job, hardware: Hardware) -> Plan | None:
    rows = ROWS_A_STEP // job.replicas
    batches = [batch for batch in range(1, rows + 1) if rows % batch == 0]
    plans = [
        plan(shape, replace(job, batch=batch, accumulation=rows // batch), SCALE_CARD, hardware) for batch in batches
    ]
    return min((made for made in plans if made.fits), key=lambda made: made.step.seconds, default=None)


# --- users ---

USERS, TOKENS_A_USER, SERVING_CARD = 10_000, 1000, "h100-80gb"


@dataclass(frozen=True)
class Fleet:
    model: str
    cache_gib: float
    """Keys and values of all users."""
    users_a_card: int
    cards: int
    tokens_a_second: float
    """For each user, every card being full."""


def fleet(model: str, hardware: Hardware) -> Fleet:
    """Cards for `USERS` answers under way at once, 4-bit weights on each; a token costs reading weights and cache."""
    shape, card = Shape.named(model), hardware.gpus[SERVING_CARD]
    weights, a_user = quantized_bytes(shape), cache_bytes(shape, TOKENS_A_USER)
    on_card = (hardware.room(SERVING_CARD) - weights) // a_user
    seconds = (weights + on_card * a_user) / (card.memory_gb_s * 1e9 * hardware.reached.memory)
    return Fleet(model, USERS * a_user / GIB, on_card, math.ceil(USERS / on_card), 1 / seconds)


# --- the page ---

SIZES_HEAD = (
    "model",
    "strategy",
    "GPUs",
    "GiB a GPU",
    "s a step",
    "waiting for others",
    "tokens/s",
    "$ a 1M tokens",
    "10M rows",
    "1B rows",
)


def tables(hardware: Hardware) -> dict[str, str]:
    """The page's tables by the name of their place."""
    return {
        "example": f"```\n{_example(hardware)}\n```",
        "published": table(
            ("as ColossalChat labels it", "published, MiB", "plan as labelled", "", "plan as read", ""),
            [
                (label, f"{mib:,.0f}", f"{own:,.0f}", _off(own, mib), f"{read:,.0f}", _off(read, mib))
                for label, mib, own, read in published_rows(hardware)
            ],
        ),
        "serving": table(
            ("model", "published, GiB", "plan", "", "with groups of 128", "", "2048 tokens of cache"),
            [
                (name, f"{mib:g}", f"{own:.2f}", _off(own, mib), f"{grouped:.2f}", _off(grouped, mib), f"{cache:.2f}")
                for name, mib, own, grouped, cache in serving_rows()
            ],
        ),
        "capacity": table(("one GPU", *CAPACITY_JOBS), _capacity_rows(hardware)),
        "sizes": table(SIZES_HEAD, [_scaled_cells(line) for line in scaled(hardware)]),
        "users": table(
            ("model", "cache of all, GiB", "users a card", "cards", "tokens/s for each"),
            [
                (f.model, f"{f.cache_gib:,.0f}", str(f.users_a_card), str(f.cards), f"{f.tokens_a_second:.0f}")
                for f in (fleet(model, hardware) for model in ("llama-7b", "llama-3.1-8b"))
            ],
        ),
    }


def _example(hardware: Hardware) -> str:
    """What the command that the page begins with prints."""
    shape, card = Shape.named("llama-7b"), "a100-80gb"
    job = Job("sft", "colossalai_zero2", 4, batch=8, seq=2048, checkpointing=True)
    return describe(plan(shape, job, card, hardware), "llama-7b", largest_batch(shape, job, card, hardware), [])


def _off(planned: float, published: float) -> str:
    return f"{100 * (planned / published - 1):+.1f} %"


def _capacity_rows(hardware: Hardware) -> list[tuple[str, ...]]:
    found = {(c.card, c.method): c for c in capacities(hardware)}
    rows = []
    for card in CAPACITY_CARDS:
        plain = found[card, "plain"].billions
        cells = [found[card, method] for method in CAPACITY_JOBS]
        texts = [f"{c.billions:.2f}B, {c.billions / plain:.1f}x{' (host)' if c.host_limited else ''}" for c in cells]
        rows.append((f"{card}, {hardware.gpus[card].host_gib:g} GiB host", *texts))
    return rows


def _scaled_cells(line: Scaled) -> tuple[str, ...]:
    if line.made is None:
        return (line.model, line.how, str(line.job.gpus), "does not fit", *[""] * 6)
    timed = line.made.step
    speed = timed.tokens / timed.seconds
    return (
        line.model,
        line.how,
        str(line.job.gpus),
        f"{line.made.peak / GIB:.0f}",
        f"{timed.seconds:.1f}",
        f"{100 * timed.communication / timed.seconds:.0f} %",
        f"{speed:,.0f}",
        f"{line.made.usd_per_step / timed.tokens * 1e6:.2f}",
        *(_duration(rows * TOKENS_A_ROW / speed) for rows in (1e7, 1e9)),
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 2 * 86400 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Write the tables of docs/scaling.md and its pictures anew."""
    from bench.scaling_plots import draw  # matplotlib takes a second to import

    hardware = load_hardware()
    sections = tables(hardware)
    typer.echo("\n\n".join(sections.values()))
    fill(PAGE, sections)
    draw(hardware, FIGURES)


if __name__ == "__main__":
    typer.run(main)
