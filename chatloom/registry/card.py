"""The model card: what a version is, written from its lineage and metrics alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from chatloom.registry.cost import StageCost
from chatloom.registry.gates import Verdict, flatten
from chatloom.registry.lineage import Facts

SHOWN = (
    ("4bit/perplexity", "perplexity of held-out answers, 4-bit"),
    ("perplexity/quantized_ratio", "4-bit perplexity as a share of the unquantized"),
    ("win_rate/ppo_over_sft/gold", "PPO wins over SFT, by the gold reward model"),
    ("win_rate/4bit_over_ppo/gold", "4-bit wins over unquantized, by the gold reward model"),
    ("ppo/kl", "KL of PPO from SFT, nats a response"),
    ("reward/accuracy", "reward model, held-out pairs ranked right"),
    ("gold/accuracy", "gold reward model, held-out pairs ranked right"),
    ("4bit/refusals", "share of answers that refuse"),
    ("4bit/repetition", "share of four-token runs that repeat"),
)


def render_card(
    name: str,
    facts: Facts,
    metrics: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    total: StageCost,
    currency: str,
) -> str:
    """`model_card.md`: data with licences, training, metrics, limits.

    Args:
        metrics: as in `metrics/evaluate.json`, nested or flat.
        total: of all stages.
    """
    flat = flatten(metrics)
    # No autoescape: Markdown is no HTML, and an apostrophe of a source's name no entity.
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("card.md.jinja").render(
        name=name,
        facts=facts,
        params=facts["params"],
        shown=[
            (label, flat[key], flat.get(f"{key}_low"), flat.get(f"{key}_high")) for key, label in SHOWN if key in flat
        ],
        metrics=flat,
        verdicts=verdicts,
        total=total,
        currency=currency,
        licenses=sorted({source["license"] for source in facts["sources"]}),
        languages=sorted(key.rpartition("_")[2] for key in flat if key.startswith("base/perplexity_")),
        base=json.dumps(facts["base_model"], ensure_ascii=False),
    )
