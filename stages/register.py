"""Register the 4-bit chat model: a new version in MLflow's registry, champion if every blocking gate holds."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from chatloom.errors import InputError
from chatloom.registry.aliases import champion_of
from chatloom.registry.gates import evaluate_gates
from chatloom.registry.lineage import collect_lineage, find_runs, lineage_tags
from chatloom.registry.register import Registered, register
from stages.run import stage

MODEL = Path("models/chat-4bit")
METRICS = Path("metrics/evaluate.json")
SAMPLE_QUESTION = "What is the capital of France?"


def main() -> None:
    with stage("register") as run:
        params = run.params.register_
        facts = collect_lineage(run.params, str(MODEL), os.environ.get("CHATLOOM_PRESET"))
        facts["runs"] = find_runs(facts)
        champion = champion_of(MlflowClient(), params.model_name)
        metrics = read_metrics(METRICS)
        verdicts = evaluate_gates(params.gates, metrics, facts["sources"], has_champion=champion is not None)
        registered = register(
            MODEL,
            params.model_name,
            metrics=metrics,
            verdicts=verdicts,
            facts=facts,
            champion=champion,
            sample_question=SAMPLE_QUESTION,
        )
        run.table("gates", gate_table(registered))
        run.report(
            "register",
            {"gates": [asdict(verdict) for verdict in registered.verdicts], "lineage": lineage_tags(facts)},
        )
        run.metrics(summary(registered))


def read_metrics(path: Path) -> dict[str, Any]:
    """What `evaluate` measured.

    Raises:
        InputError: where the file is missing or is no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; run the stage evaluate first")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}; run the stage evaluate again") from error
    if not isinstance(metrics, dict):
        raise InputError(f"{path}: expected an object of metrics, found {type(metrics).__name__}")
    return metrics


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
