"""What an operator reads when a reproduction is over: stages, metrics beside the last run's, links."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from chatloom.errors import InputError
from chatloom.files import read_json, write_json
from chatloom.registry.gates import flatten, is_number
from chatloom.registry.runs import run_pages
from stages.run import STATE
from tasks.workspace import Reproduction

MLFLOW_UI = "CHATLOOM_MLFLOW_UI"
"""Where people look at MLflow; `make ui` sets it, and a tracking server is its own."""
LAST = STATE / "last_metrics.json"


def publish_stages(reproduction: Reproduction, stages: Mapping[str, tuple[str, float]]) -> None:
    """The table of stages: what became of each, and its seconds."""
    rows = [{"stage": name, "outcome": outcome, "seconds": round(took, 1)} for name, (outcome, took) in stages.items()]
    create_table_artifact(rows, key=_key("stages", reproduction), description=f"Stages of {reproduction.id}")


def publish_metrics(reproduction: Reproduction) -> None:
    """The table of metrics beside those of the last reproduction that ended well here, which this one then is."""
    path = reproduction.workspace / LAST
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = read_metrics(reproduction.workspace)
    create_table_artifact(
        compare(before, now),
        key=_key("metrics", reproduction),
        description=f"Metrics of {reproduction.id} beside those of the last run that ended well",
    )
    write_json(path, now)


def publish_links(reproduction: Reproduction) -> None:
    """Pages of MLflow: the runs of this reproduction, and the report."""
    ui = mlflow_ui()
    if ui is None:
        return
    # Where the stages recorded, which is not the current folder's store.
    os.environ.setdefault("MLFLOW_TRACKING_URI", reproduction.environment()["MLFLOW_TRACKING_URI"])
    try:
        pages = run_pages(reproduction.id, ui)
    except InputError as error:  # the work is done: links are no reason to fail
        get_run_logger().warning("no links to MLflow: %s", error)
        return
    if not pages:
        return
    lines = [f"- [{name}]({page})" for name, page in pages.items()]
    create_markdown_artifact("\n".join(lines), key=_key("links", reproduction), description="Runs in MLflow, report")


def read_metrics(workspace: Path) -> dict[str, float]:
    """Every number of `metrics/*.json`, named like `train_sft/train/loss`."""
    found: dict[str, Any] = {}
    for path in sorted((workspace / "metrics").glob("*.json")):
        found |= flatten({path.stem: read_json(path, "run its stage again")})
    return {name: float(value) for name, value in found.items() if is_number(value)}


def compare(before: Mapping[str, float], now: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row a metric: what it was, is, and by how much it changed; empty where there is nothing to compare."""
    return [
        {
            "metric": name,
            "before": _shown(before.get(name)),
            "now": _shown(now.get(name)),
            "change": f"{now[name] - before[name]:+.4g}" if name in now and name in before else "",
        }
        for name in sorted({*before, *now})
    ]


def mlflow_ui() -> str | None:
    """Address of MLflow's UI, None where nobody said it."""
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    return os.environ.get(MLFLOW_UI) or (store if store.startswith(("http://", "https://")) else None)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _key(what: str, reproduction: Reproduction) -> str:
    """Prefect's keys have small letters, digits and dashes only."""
    return f"{what}-{re.sub('[^a-z0-9]+', '-', reproduction.name.lower()).strip('-')}"
