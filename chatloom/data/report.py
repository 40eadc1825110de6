"""What became of the data: the report of `prepare_data` as JSON, and `reports/data.html`, a page to look at it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatloom.config import Split
from chatloom.data.drops import Drops
from chatloom.data.splits import SPLITS

if TYPE_CHECKING:
    from chatloom.data.measure import Measured, Tally

LARGEST_CLUSTERS = 8
CLUSTER_EXAMPLES = 4
READ_BY: dict[Split, str] = {
    "sft": "train_sft",
    "reward": "compare, train_reward",
    "ppo": "train_ppo (prompts)",
    "ptx": "train_ppo (PTX), quantize",
    "eval": "evaluate",
}
STEPS = {
    "broken_json": "not valid JSON",
    "empty_answer": "no answer",
    "missing_key": "a key is missing",
    "wrong_type": "a value of the wrong type",
    "role_order": "turns out of order",
    "duplicate": "exact duplicates",
    "near_duplicate": "near-duplicates",
    "repeated_question": "questions asked again, with another answer",
    "leak": "on both sides of training and eval",
    "prompt_too_long": "questions too long",
    "response_too_long": "answers too long",
    "over_max_eval_rows": "over the cap of eval",
    "language_mismatch": "reads like another language",
    "html_answer": "web page in an answer",
    "one_character_answer": "answers of one character",
    "repeats_question": "the answer repeats the question",
    "placeholder_answer": "placeholder answers",
    "placeholder_input": "placeholder inputs",
    "mojibake": "broken encodings",
    "control_characters": "control characters",
    "lost_characters": "lost characters",
    "pii_email": "e-mail addresses",
    "pii_phone": "phone numbers",
    "pii_chinese_id": "Chinese identity numbers",
    "pii_card": "card numbers",
    "pii_ip": "IP addresses",
}
"""Reasons in words, for the page; any other is shown as it is."""


def prepare_report(
    tallies: Mapping[str, Tally],
    rows_of: Mapping[Split, Sequence[Measured]],
    clusters: Sequence[Sequence[Measured]],
    *,
    rows_out: int,
    leaked: int,
) -> dict[str, Any]:
    """The report, as JSON.

    Args:
        tallies: what was dropped, mended and noticed, by source.
        rows_of: the rows of each split as they were written, a row that counts twice twice.
        clusters: rows that ask nearly the same, where there are two or more.
        rows_out: rows written, each counted once.
        leaked: rows trained on whose question is in eval.
    """
    rows = [row for split in SPLITS for row in rows_of[split]]
    out = {row.id: row.source for row in rows}
    written = Counter(out.values())
    return {
        "rows_in": sum(tally.rows_in for tally in tallies.values()),
        "rows_out": rows_out,
        "dropped": Drops.merged(tally.dropped for tally in tallies.values()).report(),
        "mended": Drops.merged(tally.mended for tally in tallies.values()).report(),
        "noticed": Drops.merged(tally.noticed for tally in tallies.values()).report(),
        "leaked": leaked,
        "responses_cut": Drops.merged(tally.cut for tally in tallies.values()).report(),
        "sources": {
            source: {
                "rows_in": tally.rows_in,
                "rows_out": written[source],
                "dropped": tally.dropped.counts(),
                "mended": tally.mended.counts(),
                "noticed": tally.noticed.counts(),
            }
            for source, tally in sorted(tallies.items())
        },
        "clusters": _clusters(clusters),
        "histograms": {
            "prompt_tokens": histogram([(row.lang, row.prompt_tokens) for row in rows]),
            "response_tokens": histogram([(row.lang, length) for row in rows for length in row.response_tokens]),
        },
        "splits": {split: _split_report(rows_of[split]) for split in SPLITS},
        "budget": {split: _budget(rows_of[split]) | {"read_by": READ_BY[split]} for split in SPLITS},
    }


def histogram(lengths: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """`{"up_to": [1, 2, 4, ...], <language>: [rows, ...]}`: how many lengths are in each doubling."""
    top = max((length for _, length in lengths), default=1)
    up_to = [2**power for power in range(int(top - 1).bit_length() + 1)]
    counts: dict[str, list[int]] = {}
    for lang, length in lengths:
        counts.setdefault(lang, [0] * len(up_to))[max(length - 1, 0).bit_length()] += 1
    return {"up_to": up_to, **dict(sorted(counts.items()))}


def _clusters(clusters: Sequence[Sequence[Measured]]) -> dict[str, Any]:
    largest = sorted(clusters, key=lambda rows: (-len(rows), rows[0].id))[:LARGEST_CLUSTERS]
    return {
        "clusters": len(clusters),
        "rows": sum(map(len, clusters)),
        "largest": [
            {"rows": len(rows), "examples": [f"{row.id}: {row.preview}" for row in rows[:CLUSTER_EXAMPLES]]}
            for rows in largest
        ],
    }


def _split_report(rows: Sequence[Measured]) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "languages": dict(sorted(Counter(row.lang for row in rows).items())),
        "sources": dict(sorted(Counter(row.source for row in rows).items())),
        "responses": dict(sorted(Counter(str(row.num_responses) for row in rows).items())),
        "tokens": sum(row.num_tokens for row in rows),
        "lengths": {
            "prompt_tokens": spread([row.prompt_tokens for row in rows]),
            "response_tokens": spread([length for row in rows for length in row.response_tokens]),
            "question_characters": spread([row.question_characters for row in rows]),
            "response_characters": spread([length for row in rows for length in row.response_characters]),
        },
    }


def _budget(rows: Sequence[Measured]) -> dict[str, int]:
    """Tokens that a pass over the split reads, and those of them that SFT's loss is taken of."""
    best = sum(row.response_tokens[0] for row in rows if row.response_tokens)
    return {
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "response_tokens": sum(sum(row.response_tokens) for row in rows),
        "learned_tokens": best + sum(row.answer_turn_tokens for row in rows if row.response_tokens),
    }


def spread(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    low, median, high, top = np.percentile(lengths, [0, 50, 95, 100])
    found = {"min": low, "median": median, "mean": np.mean(lengths), "p95": high, "max": top}
    return {name: round(float(value), 2) for name, value in found.items()}


# --- the page -------------------------------------------------------------------------------------------------------


def render_data_report(raw: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
    """`reports/data.html`: one page without anything from elsewhere, of the reports of `ingest` and `prepare`."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["words"] = lambda reason: STEPS.get(reason, reason.replace("_", " "))
    return environment.get_template("report.html.jinja").render(raw=raw, prepared=prepared, flow=_flow(raw, prepared))


def _flow(raw: Mapping[str, Any], prepared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each source's way through both stages: rows read, rows dropped by step, rows left."""
    flow = []
    for source in raw["sources"]:
        later = prepared["sources"].get(source["name"], {"rows_out": 0, "dropped": {}, "mended": {}, "noticed": {}})
        drops = Counter({reason: found["rows"] for reason, found in source["dropped"].items()})
        drops.update(later["dropped"])
        flow.append({**source, "rows_left": later["rows_out"], "drops": drops.most_common(), "later": later})
    return flow
