"""Registered versions as people see them: their lineage in words, and who is champion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chatloom.errors import InputError
from chatloom.registry.aliases import CHAMPION, Move, champion_before, champion_of, move_champion, read_moves
from chatloom.registry.lineage import FILE, NONE, Facts, parents
from chatloom.registry.register import COMPARED_WITH, REJECTED, STATUS
from chatloom.registry.resolve import parse_address, registry_errors, use_tracking_store, version_number


@dataclass(frozen=True)
class Version:
    """A registered version with its lineage."""

    name: str
    number: str
    aliases: Sequence[str]
    registered: str
    """When, in UTC, ISO 8601."""
    tags: Mapping[str, str]
    facts: Facts
    moves: Sequence[Move]
    """Of the champion, the oldest first."""

    @property
    def title(self) -> str:
        return " ".join([f"models:/{self.name}/{self.number}", *(f"@{alias}" for alias in sorted(self.aliases))])

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "version": self.number,
            "aliases": sorted(self.aliases),
            "registered": self.registered,
            "status": self.tags.get(STATUS, NONE),
            "gates": json.loads(self.tags.get("gates", "[]")),
            "champion_moves": [vars(move) for move in self.moves],
            **self.facts,
        }


def read_version(uri: str) -> Version:
    """The version that `uri` means, with what was recorded when it was registered.

    Raises:
        InputError: where the registry is down or does not have it, or the version is older than lineage files.
    """
    address = parse_address(uri)
    import mlflow

    with registry_errors(uri):
        client = mlflow.MlflowClient()
        name = address["name"]
        number = version_number(uri, client, name, address["alias"], address["version"])
        found = client.get_model_version(name, number)
        aliases = client.get_registered_model(name).aliases
        moves = read_moves(client, name)
        try:
            file = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{number}/{FILE}"))
            facts = json.loads(file.read_text(encoding="utf-8"))
        except (mlflow.exceptions.MlflowException, OSError, json.JSONDecodeError) as error:
            raise InputError(
                f"{uri}: version {number} of {name!r} has no readable {FILE}: it was registered by an older chatloom "
                "or its files are gone; register it again with `dvc repro --force --single-item register`"
            ) from error
    return Version(
        name=name,
        number=number,
        aliases=[alias for alias, version in aliases.items() if str(version) == number],
        registered=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        tags=dict(found.tags),
        facts=facts,
        moves=moves,
    )


def promote(uri: str, reason: str, expect: str | None = None, *, compared: bool = True, by: str | None = None) -> Move:
    """Make the version that `uri` means champion.

    Args:
        expect: version that has to be champion now, `none` for none; None takes whichever is.
        compared: whether its gates must have compared it with the present champion, on the same rows.
        by: who decided it; None for the user of this process.

    Raises:
        InputError: where it broke a gate, was compared with another champion, is champion already, or the champion is
            not the expected one.
    """
    address = parse_address(uri)
    import mlflow

    with registry_errors(uri):
        client = mlflow.MlflowClient()
        name = address["name"]
        number = version_number(uri, client, name, address["alias"], address["version"])
        before = _expected(client, name, expect)
        if number == before:
            raise InputError(f"{uri}: version {number} is champion already")
        tags = client.get_model_version(name, number).tags
        if tags.get(STATUS) == REJECTED:
            raise InputError(
                f"{uri}: version {number} was rejected: {tags['rejected.reason']}; a version that broke a gate is "
                "never champion: register one that holds, or change register.gates and register this one again"
            )
        if compared and not is_compared(tags, before):
            rival = tags.get(COMPARED_WITH, NONE)
            met = "no champion" if rival == NONE else f"version {rival}"
            raise InputError(
                f"{uri}: version {number} was compared with {met}, the champion is version {before}: register it again "
                "to measure both on the same rows, or say --without-comparison"
            )
        return move_champion(client, name, number, expected=before, action="promote", reason=reason, by=by)


def is_compared(tags: Mapping[str, str], champion: str | None) -> bool:
    """Whether the gates of a version compared it with the present champion, on the same rows, or there is none."""
    return champion is None or tags.get(COMPARED_WITH) == champion


def rollback(name: str, reason: str, expect: str | None = None) -> Move:
    """Make the version champion again that was it before the present one; the next rollback goes further back.

    Raises:
        InputError: where no earlier champion is recorded, or the champion is not the expected one.
    """
    uri = f"models:/{name}@{CHAMPION}"
    use_tracking_store(uri)
    import mlflow

    with registry_errors(uri):
        client = mlflow.MlflowClient()
        present = _expected(client, name, expect)
        earlier = champion_before(read_moves(client, name), present)
        if earlier is None:
            raise InputError(
                f"{uri}: no champion is recorded before {f'version {present}' if present else 'it'}; name the version: "
                f"chatloom promote models:/{name}/VERSION --reason ..."
            )
        return move_champion(client, name, earlier, expected=present, action="rollback", reason=reason)


def _expected(client: Any, name: str, expect: str | None) -> str | None:
    present = champion_of(client, name)
    if expect is not None and expect != (present or "none"):
        raise InputError(
            f"--expect {expect}: the champion of {name!r} is {present or 'none'}: somebody moved it meanwhile; "
            f"look at models:/{name}@{CHAMPION} and decide again"
        )
    return present


# --- in words -------------------------------------------------------------------------------------------------------


def describe(version: Version) -> str:
    """The lineage of a version as text, from the version down to the rows."""
    facts = version.facts
    return "\n".join(
        [
            f"{version.title}  registered {version.registered}",
            *_entry("status", version.tags.get(STATUS, NONE) + _because(version.tags)),
            *(f"  gate      {_gate(gate)}" for gate in json.loads(version.tags.get("gates", "[]"))),
            *_entry("weights", f"{facts['model']['path']}  {facts['model']['md5']}"),
            *_entry("4-bit", one_line(facts["params"]["quantize"])),
            *_entry("base", one_line(facts["base_model"])),
            *_entry("code", f"git {facts['code']['revision']}, uncommitted changes: {facts['code']['dirty']}"),
            *_entry("params", f"preset {facts['preset']}, params.yaml {facts['files']['params.yaml']}"),
            *_entry("lock", f"requirements.lock {facts['files']['requirements.lock']}"),
            *_entry("machine", one_line(facts["machine"])),
            *(f"  champion  {_moved(move)}" for move in version.moves if version.number in (move.version, move.before)),
            "",
            "stages, the last first",
            *(line for name in reversed(facts["stages"]) for line in _stage(facts, name)),
            "",
            "data",
            *(line for source in facts["sources"] for line in _source(source)),
        ]
    )


def one_line(values: Mapping[str, Any]) -> str:
    """`{"bits": 4, "seed": 42}` as `bits 4, seed 42`."""
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items() if value not in (None, [], ""))


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) else str(value)


def _entry(label: str, text: str) -> list[str]:
    return [f"  {label:<9} {text}"]


def _because(tags: Mapping[str, str]) -> str:
    return f": {tags['rejected.reason']}" if "rejected.reason" in tags else ""


def _gate(gate: Mapping[str, Any]) -> str:
    value = "" if gate["value"] is None else f" = {gate['value']:.4g}"
    note = f" ({gate['note']})" if gate.get("note") else ""
    return f"{gate['verdict']:<4}  {gate['metric']}{value}, bound {gate['bound']}{note}"


def _moved(move: Move) -> str:
    return f"{move.at[:19]} {move.action} {move.before or 'none'} -> {move.version} by {move.by}: {move.reason}"


def _stage(facts: Facts, name: str) -> list[str]:
    stage, run = facts["stages"][name], facts["runs"].get(name)
    made = f"run {run['id']} at git {run['revision'][:12]}" if run else "no run in MLflow made these bytes"
    before = ", ".join(parents(facts["stages"], name))
    return [
        f"  {name}  ({made}{f', after {before}' if before else ''})",
        *(f"    {path}  {md5}" for path, md5 in stage["outs"].items() if not path.startswith("metrics/")),
    ]


def _source(source: Mapping[str, Any]) -> list[str]:
    rows = "rows unknown" if source["rows_out"] is None else f"{source['rows_out']} of {source['rows_in']} rows"
    splits = ", ".join(f"{split} {rows}" for split, rows in source["splits"].items())
    return [
        f"  {source['name']}  {rows}, licence {source['license']}, from {source['from']}",
        *([f"    in {splits}"] if splits else []),
        *(f"    {file['file']}  {file['rows_out']} rows  sha256 {file['sha256']}" for file in source["files"]),
    ]
