"""Register the 4-bit chat model: a new version in MLflow's registry, champion if every blocking gate holds.

With `register.promotion: approval` a person decides afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from chatloom.config import Params
from chatloom.data.prepared import read_split
from chatloom.device import resolve_device
from chatloom.evaluation.champion import against_champion
from chatloom.evaluation.report import render_report
from chatloom.files import atomic_file, read_json
from chatloom.models.reward_model import load_reward_model
from chatloom.registry.aliases import champion_of
from chatloom.registry.card import render_card
from chatloom.registry.cost import stage_costs, total_cost
from chatloom.registry.gates import evaluate_gates, flatten
from chatloom.registry.graph import draw_lineage
from chatloom.registry.lineage import collect_lineage, find_runs, lineage_tags
from chatloom.registry.register import Registered, register
from chatloom.registry.resolve import resolve
from stages.run import stage

MODEL, SFT, GOLD, EVAL = Path("models/chat-4bit"), Path("models/sft"), Path("models/gold"), Path("data/prepared/eval")
METRICS, EVALUATION, REPORTS = Path("metrics/evaluate.json"), Path("reports/evaluate.json"), Path("reports")
REPORT, CARD = Path("reports/report.html"), Path("reports/model_card.md")
EVALUATE = "run the stage evaluate"
SAMPLE_QUESTION = "What is the capital of France?"


def main() -> None:
    with stage("register", needs_mlflow=True) as run:
        params = run.params.register_
        facts = collect_lineage(run.params, str(MODEL), os.environ.get("CHATLOOM_PRESET"))
        facts["runs"] = find_runs(facts)
        evaluation = read_json(EVALUATION, EVALUATE)
        metrics = flatten(read_json(METRICS, EVALUATE))
        champion = champion_of(MlflowClient(), params.model_name)
        if champion is not None:
            metrics |= compare(run.params, evaluation["candidate"], champion)
        verdicts = evaluate_gates(params, metrics, facts["sources"], has_champion=champion is not None)
        costs = stage_costs(facts["runs"], params.cost)
        total = total_cost(costs)
        page = render_report(
            title=f"{params.model_name}: preset {facts['preset']}, git {facts['code']['revision'][:12]}",
            metrics=metrics,
            evaluation=evaluation,
            pictures=REPORTS,
            verdicts=[asdict(verdict) for verdict in verdicts],
            costs=[asdict(cost) for cost in (*costs, total)],
            currency=params.cost.currency,
            sources=facts["sources"],
            graph=draw_lineage(params.model_name, facts),
        )
        card = render_card(params.model_name, facts, metrics, verdicts, total, params.cost.currency)
        for path, text in ((REPORT, page), (CARD, card)):
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            run.artifact(path)
        registered = register(
            MODEL,
            params.model_name,
            metrics=metrics,
            verdicts=verdicts,
            facts=facts,
            champion=champion,
            sample_question=SAMPLE_QUESTION,
            description=card,
            files=(REPORT, CARD, EVALUATION),
            promote=params.promotion == "gates",
        )
        run.table("gates", gate_table(registered))
        run.report(
            "register",
            {"gates": [asdict(verdict) for verdict in registered.verdicts], "lineage": lineage_tags(facts)},
        )
        run.metrics(summary(registered))


def compare(params: Params, candidate: Mapping[str, Any], champion: str) -> dict[str, float]:
    """The new model against the champion, on the rows that the new one was evaluated on."""
    runtime = params.runtime
    device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
    name = params.register_.model_name
    gold, _ = load_reward_model(GOLD, device, sft=SFT)
    path = resolve(f"models:/{name}/{champion}").path
    return against_champion(candidate, path, gold, SFT, read_split(EVAL), params.evaluate, device)


def gate_table(registered: Registered) -> dict[str, list[Any]]:
    """The verdicts by column, one row a gate."""
    columns = ("metric", "value", "bound", "verdict", "blocks", "note")
    return {column: [getattr(verdict, column) for verdict in registered.verdicts] for column in columns}


def summary(registered: Registered) -> dict[str, float]:
    """Numbers for `metrics/register.json`; the version is that of one store and differs between machines."""
    gates: dict[str, float] = {}
    for verdict in registered.verdicts:
        # A metric may have two gates, one that warns and one that blocks: it holds where both do.
        name = f"gate/{verdict.metric}"
        gates[name] = min(gates.get(name, 1.0), float(verdict.verdict == "pass"))
    return {"version": registered.version, "champion": float(registered.champion), **gates}


if __name__ == "__main__":
    main()
