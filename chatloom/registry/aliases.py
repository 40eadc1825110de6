"""Moving @champion: with a reason, kept as a tag of the registered model, and never over somebody else's move."""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from chatloom.errors import InputError

log = logging.getLogger(__name__)

CHALLENGER, CHAMPION = "challenger", "champion"
HISTORY = "champion/"
"""Begins the tags of a registered model that keep the moves of its champion, one each, in the order of their names."""


@dataclass(frozen=True)
class Move:
    """One change of the champion."""

    action: Literal["promote", "rollback"]
    version: str
    before: str | None
    """The version that was champion until then."""
    reason: str
    by: str
    at: str
    """In UTC, ISO 8601."""


def champion_of(client: Any, name: str) -> str | None:
    """Version of the champion of the registered model `name`; None where there is none, or no such model."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_registered_model(name).aliases.get(CHAMPION)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if version is None else str(version)


def move_champion(
    client: Any,
    name: str,
    version: str,
    *,
    expected: str | None,
    action: Literal["promote", "rollback"],
    reason: str,
    by: str | None = None,
) -> Move:
    """Make `version` champion, where the champion still is `expected`.

    The reason is kept first, so that no champion is without one; if the move then fails, it is taken back. MLflow
    cannot compare and set an alias at once: two moves within the same moment are found out, not prevented.

    Args:
        client: an `MlflowClient`.
        expected: version that was champion when the move was decided; None for none.
        by: who decided it; None for the user of this process.

    Raises:
        InputError: where somebody else moved the champion meanwhile.
    """
    if not reason.strip():
        raise InputError("--reason is empty: say why the champion moves; it is kept with the model")
    require_champion(client, name, expected)
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"  # a name that MLflow takes as a tag's
    move = Move(action, version, expected, reason.strip(), by or _who(), now)
    tag = f"{HISTORY}{now}"
    client.set_registered_model_tag(name, tag, json.dumps(asdict(move), ensure_ascii=False))
    try:
        require_champion(client, name, expected)
        client.set_registered_model_alias(name, CHAMPION, version)
    except BaseException:
        client.delete_registered_model_tag(name, tag)
        raise
    require_champion(client, name, version)
    log.info("%s version %s is @%s, before: %s", name, version, CHAMPION, expected or "none")
    return move


def require_champion(client: Any, name: str, expected: str | None) -> None:
    """Raise where the champion is another version than `expected`."""
    found = champion_of(client, name)
    if found != expected:
        raise InputError(
            f"the champion of {name!r} is {_called(found)}, not {_called(expected)}: somebody moved it meanwhile; "
            f"look at models:/{name}@{CHAMPION} and decide again"
        )


def read_moves(client: Any, name: str) -> list[Move]:
    """Every recorded move of the champion, the oldest first."""
    tags = client.get_registered_model(name).tags
    return [Move(**json.loads(tags[tag])) for tag in sorted(tags) if tag.startswith(HISTORY)]


def champion_before(moves: Sequence[Move], champion: str | None) -> str | None:
    """The version that was champion before `champion`: one rollback goes there, the next one further back.

    None where nothing is recorded before it, or where the champion was moved without a record. A move that the next
    one does not start from never came to be.
    """
    stack: list[str] = []
    followed = [*(move.before for move in moves[1:]), champion]
    for move in (move for move, now in zip(moves, followed, strict=False) if move.version == now):
        if move.action == "rollback" and move.version in stack:
            del stack[stack.index(move.version) + 1 :]
        else:
            if not stack and move.before is not None:
                stack.append(move.before)
            stack.append(move.version)
    return stack[-2] if len(stack) > 1 and stack[-1] == champion else None


def _called(version: str | None) -> str:
    return "none" if version is None else f"version {version}"


def _who() -> str:
    try:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
