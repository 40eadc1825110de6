"""Packaging a chat model for MLflow, registering a version, and moving the aliases."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow

import chatloom
from chatloom.config import RegisterParams
from chatloom.errors import InputError
from chatloom.registry import gates
from chatloom.registry.gates import Verdict
from chatloom.registry.resolve import ARTIFACT

log = logging.getLogger(__name__)

CHALLENGER, CHAMPION = "challenger", "champion"
PACKAGE = Path(chatloom.__file__).parent
AGENT = PACKAGE / "registry" / "agent.py"
# What the agent and the part of chatloom that it imports need; the registered model pins the versions installed here.
REQUIREMENTS = ("gptqmodel", "jinja2", "mlflow", "pyarrow", "safetensors", "tokenizers", "torch", "transformers")
EXAMPLE_TOKENS = 4
"""Answer length of the prediction that MLflow makes to check a model that is logged."""


@dataclass(frozen=True)
class Registered:
    version: int
    champion: bool
    verdicts: tuple[Verdict, ...]


def register(
    model_dir: Path,
    params: RegisterParams,
    metrics: Mapping[str, Any],
    lineage: Mapping[str, str],
    sample_question: str,
) -> Registered:
    """A new version of `params.model_name`: @challenger, and @champion too if every blocking gate holds.

    Inside an active MLflow run. The champion moves last, when everything else is done: a failure on the way leaves the
    old one in place.

    Args:
        metrics: of `metrics/evaluate.json`; they are tied to the logged model, too.
        lineage: what the version was made from; becomes its tags.

    Raises:
        InputError: where there is no checkpoint, or a gate names an unknown metric.
    """
    assert mlflow.active_run() is not None, "the model is logged to the active run"
    if not (model_dir / "config.json").is_file():
        raise InputError(f"{model_dir}: no checkpoint to register; run the stage quantize first")
    verdicts = gates.evaluate_gates(params.gates, metrics)
    promoted = gates.holds(verdicts)
    model = _log_model(model_dir, sample_question)
    numbers = {name: float(value) for name, value in gates.flatten(metrics).items() if gates.is_number(value)}
    mlflow.log_metrics(numbers, model_id=model.model_id)
    tags = {
        **lineage,
        "gates": json.dumps([asdict(verdict) for verdict in verdicts]),
        "gates.hold": str(promoted).lower(),
    }
    version = int(mlflow.register_model(model.model_uri, params.model_name, tags=tags).version)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(params.model_name, CHALLENGER, str(version))
    if promoted:
        client.set_registered_model_alias(params.model_name, CHAMPION, str(version))
    log.info(
        "%s version %d is @%s", params.model_name, version, f"{CHALLENGER} and @{CHAMPION}" if promoted else CHALLENGER
    )
    return Registered(version, promoted, verdicts)


def _log_model(model_dir: Path, sample_question: str) -> Any:
    """Log the checkpoint with the code that answers; MLflow loads it and answers the question once, to check both."""
    return mlflow.pyfunc.log_model(
        name="chat",
        python_model=str(AGENT),
        artifacts={ARTIFACT: str(model_dir.resolve())},
        code_paths=[str(PACKAGE)],
        pip_requirements=[_pinned(name) for name in REQUIREMENTS],
        input_example={
            "input": [{"role": "user", "content": sample_question}],
            "max_output_tokens": EXAMPLE_TOKENS,
            "temperature": 0.0,
        },
    )


def _pinned(package: str) -> str:
    # A local version such as 2.14.1+cpu is on no package registry.
    return f"{package}=={importlib.metadata.version(package).partition('+')[0]}"
