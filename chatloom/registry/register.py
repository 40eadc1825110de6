"""Packaging a chat model for MLflow, registering a version with what stands behind it, and moving the aliases."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow

import chatloom
from chatloom.errors import InputError
from chatloom.files import write_json
from chatloom.registry import gates
from chatloom.registry.aliases import CHALLENGER, move_champion
from chatloom.registry.gates import Verdict
from chatloom.registry.lineage import FILE, NONE, Facts, lineage_tags
from chatloom.registry.resolve import ARTIFACT

log = logging.getLogger(__name__)

PACKAGE = Path(chatloom.__file__).parent
AGENT = PACKAGE / "registry" / "agent.py"
# What the agent and the part of chatloom that it imports need; the registered model pins the versions installed here.
REQUIREMENTS = ("gptqmodel", "jinja2", "mlflow", "pyarrow", "safetensors", "tokenizers", "torch", "transformers")
EXAMPLE_TOKENS = 4
"""Answer length of the prediction that MLflow makes to check a model that is logged."""
LONGEST_DESCRIPTION = 5000  # a column of MLflow's database
STATUS, ACCEPTED, REJECTED = "status", "accepted", "rejected"
"""Tag of a version that says whether every blocking gate holds; `rejected.reason` says which does not."""
COMPARED_WITH = "champion.compared_with"
"""Tag of a version: the champion that its gates compared it with."""


@dataclass(frozen=True)
class Registered:
    version: int
    champion: bool
    verdicts: tuple[Verdict, ...]


def register(
    model_dir: Path,
    name: str,
    *,
    metrics: Mapping[str, Any],
    verdicts: tuple[Verdict, ...],
    facts: Facts,
    champion: str | None,
    sample_question: str,
    description: str = "",
    files: Sequence[Path] = (),
    promote: bool = True,
) -> Registered:
    """A new version of `name`: @challenger, and @champion too if every blocking gate holds, else rejected.

    Inside an active MLflow run. The champion moves last, when everything else is done: a failure on the way leaves the
    old one in place.

    Args:
        metrics: of `metrics/evaluate.json`; they are tied to the logged model, too.
        facts: the lineage; travels with the version, and partly as its tags.
        champion: version that the gates compared with, None for none: if another is champion by now, none is moved.
        description: of the version, as Markdown.
        files: more that travels with the version.
        promote: False where a person makes it champion later, or does not.

    Raises:
        InputError: where there is no checkpoint, or somebody else moved the champion meanwhile.
    """
    assert mlflow.active_run() is not None, "the model is logged to the active run"
    if not (model_dir / "config.json").is_file():
        raise InputError(f"{model_dir}: no checkpoint to register; run the stage quantize first")
    client = mlflow.MlflowClient()
    accepted = gates.holds(verdicts)
    model = _log_model(model_dir, sample_question)
    numbers = {name: float(value) for name, value in gates.flatten(metrics).items() if gates.is_number(value)}
    mlflow.log_metrics(numbers, model_id=model.model_id)
    with tempfile.TemporaryDirectory() as folder:
        lineage = Path(folder, FILE)
        write_json(lineage, facts)
        for file in (lineage, *files):
            client.log_model_artifact(model.model_id, str(file))
    tags = {
        **lineage_tags(facts),
        "gates": json.dumps([asdict(verdict) for verdict in verdicts], ensure_ascii=False),
        "gates.hold": str(accepted).lower(),
        COMPARED_WITH: champion or NONE,
        STATUS: ACCEPTED if accepted else REJECTED,
        **({} if accepted else {"rejected.reason": gates.reason(verdicts)}),
    }
    version = str(mlflow.register_model(model.model_uri, name, tags=tags).version)
    client.update_model_version(name, version, _shortened(description))
    client.set_registered_model_alias(name, CHALLENGER, version)
    log.info("%s version %s is @%s, %s", name, version, CHALLENGER, tags[STATUS])
    if accepted and promote:
        move_champion(
            client, name, version, expected=champion, action="promote", reason="registered; every blocking gate holds"
        )
    return Registered(int(version), accepted and promote, verdicts)


def _shortened(description: str) -> str:
    """Whole lines of it, as many as a registry keeps."""
    if len(description) <= LONGEST_DESCRIPTION:
        return description
    rest = "(shortened: model_card.md among the files of the version is whole)"
    return description[: LONGEST_DESCRIPTION - len(rest) - 2].rpartition("\n")[0] + f"\n\n{rest}"


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
