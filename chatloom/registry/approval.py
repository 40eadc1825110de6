"""A person decides whether a version becomes champion: what is asked, and the record of the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chatloom.errors import InputError
from chatloom.registry.aliases import CHAMPION, Move, champion_of
from chatloom.registry.register import ACCEPTED, COMPARED_WITH, REJECTED, STATUS
from chatloom.registry.resolve import parse_address, registry_errors, use_tracking_store, version_number
from chatloom.registry.versions import is_compared, promote

EVALUATION = "evaluate.json"
"""File of a version with what the models answered, side by side."""
DECISION, BY, REASON, AT = "approval.decision", "approval.by", "approval.reason", "approval.at"
"""Tags of a version: the last decision on it, `approved` or `rejected`."""
SAMPLES_SHOWN = 6
LONGEST_ANSWER = 600


@dataclass(frozen=True)
class Candidate:
    """A version that may become champion."""

    name: str
    number: str
    champion: str | None
    """The version that is champion now."""
    gates: Sequence[Mapping[str, Any]]
    """Verdicts, as `chatloom.registry.gates.Verdict`."""
    samples: Sequence[Mapping[str, Any]]
    """`{"prompt", "answers": {model: {"text"}}}`; empty where the version has none."""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"


def read_candidate(uri: str) -> Candidate:
    """The version that `uri` means, fit to be asked about.

    Raises:
        InputError: where it is champion already, broke a gate, or was compared with another champion.
        Unavailable: where the registry is down.
    """
    address = parse_address(uri)
    import mlflow

    with registry_errors(uri):
        client = mlflow.MlflowClient()
        name = address["name"]
        number = version_number(uri, client, name, address["alias"], address["version"])
        tags = client.get_model_version(name, number).tags
        champion = champion_of(client, name)
        if number == champion:
            raise InputError(f"{uri}: version {number} is @{CHAMPION} already: there is nothing to approve")
        if tags.get(STATUS) != ACCEPTED:
            why = tags.get("rejected.reason", "no gate was looked at")
            raise InputError(f"{uri}: version {number} is not fit to be champion: {why}")
        if not is_compared(tags, champion):
            raise InputError(
                f"{uri}: version {number} was compared with {tags.get(COMPARED_WITH, 'no champion')}, the champion is "
                f"version {champion}: register it again to measure both on the same rows"
            )
        return Candidate(name, number, champion, json.loads(tags.get("gates", "[]")), _samples(name, number))


def decide(candidate: Candidate, *, approved: bool, by: str, reason: str) -> Move | None:
    """Record who decided what and why on the version; where it is approved, make it champion.

    Raises:
        InputError: where somebody else moved the champion since the candidate was read.
        Unavailable: where the registry is down.
    """
    use_tracking_store(candidate.uri)
    import mlflow

    decision = "approved" if approved else REJECTED
    tags = {DECISION: decision, BY: by, REASON: reason, AT: datetime.now(UTC).isoformat(timespec="seconds")}
    with registry_errors(candidate.uri):
        client = mlflow.MlflowClient()
        for key, value in tags.items():
            client.set_model_version_tag(candidate.name, candidate.number, key, value)
    if not approved:
        return None
    return promote(candidate.uri, reason, expect=candidate.champion or "none", by=by)


def question(candidate: Candidate) -> str:
    """What a person is asked, as Markdown: the gates, then what the models answered."""
    now = f"version {candidate.champion}" if candidate.champion else "none"
    return "\n".join(
        [
            f"**{candidate.name} version {candidate.number}** would become @{CHAMPION}; the champion is {now}.",
            "",
            "| gate | value | bound | verdict |",
            "|---|---|---|---|",
            *(_gate(gate) for gate in candidate.gates),
            "",
            *(["No sample answers came with this version."] if not candidate.samples else []),
            *(line for sample in candidate.samples[:SAMPLES_SHOWN] for line in _sample(sample)),
        ]
    )


def _samples(name: str, number: str) -> list[dict[str, Any]]:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        file = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{number}/{EVALUATION}"))
    except (MlflowException, OSError):  # registered before versions had it: `question` says so
        return []
    samples: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")).get("samples", [])
    return samples


def _gate(gate: Mapping[str, Any]) -> str:
    value = "" if gate["value"] is None else f"{gate['value']:.4g}"
    note = f": {gate['note']}" if gate.get("note") else ""
    return f"| {gate['metric']} | {value} | {gate['bound']} | {gate['verdict']}{_plain(note)} |"


def _sample(sample: Mapping[str, Any]) -> list[str]:
    answers = [f"- **{model}**: {_plain(said['text'])}" for model, said in sample["answers"].items()]
    return [f"**{_plain(sample['prompt'])}**", "", *answers, ""]


def _plain(text: str) -> str:
    """One line that Markdown shows as it is: models write what they like."""
    line = " ".join(text.split())
    shown = line if len(line) <= LONGEST_ANSWER else f"{line[:LONGEST_ANSWER]} …"
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#!&" else letter for letter in shown)
