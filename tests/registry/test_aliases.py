"""Promotion and rollback against a real MLflow store, and what becomes of two people who move the champion at once."""

from __future__ import annotations

import re
from typing import Any

import mlflow
import pytest

from chatloom.errors import InputError
from chatloom.registry.aliases import Move, champion_before, champion_of, move_champion, read_moves
from chatloom.registry.versions import promote, rollback


def moved(action: Any, version: str, before: str | None) -> Move:
    return Move(action, version, before, "r", "me", "2026-01-01")


@pytest.mark.parametrize(
    ("moves", "champion", "earlier"),
    [
        ([], None, None),
        ([("promote", "1", None)], "1", None),
        ([("promote", "1", None), ("promote", "2", "1")], "2", "1"),
        # A second rollback goes further back, and not forth again.
        ([("promote", "1", None), ("promote", "2", "1"), ("promote", "3", "2"), ("rollback", "2", "3")], "2", "1"),
        ([("promote", "1", None), ("promote", "2", "1"), ("rollback", "1", "2")], "1", None),
        # The first recorded move started from a champion that was set without a record.
        ([("promote", "7", "4")], "7", "4"),
        # Moved by hand since: what was before that is not known.
        ([("promote", "1", None), ("promote", "2", "1")], "9", None),
        # The second move failed half way: the third starts from the first.
        ([("promote", "1", None), ("promote", "2", "1"), ("promote", "3", "1")], "3", "1"),
    ],
)
def test_the_champion_before(moves: list[Any], champion: str | None, earlier: str | None) -> None:
    assert champion_before([moved(*move) for move in moves], champion) == earlier


@pytest.fixture
def model(store: str, request: pytest.FixtureRequest) -> str:
    """A registered model with three versions, the second of which broke a gate."""
    client = mlflow.MlflowClient()
    name = re.sub(r"\W", "-", request.node.name)
    client.create_registered_model(name)
    accepted = {"status": "accepted", "champion.compared_with": "1"}
    for tags in ({"status": "accepted"}, {"status": "rejected", "rejected.reason": "ppo/kl = 50"}, accepted):
        client.create_model_version(name, source="s3://nowhere/model", tags=tags)
    return name


def test_promote_and_roll_back_keep_who_and_why(model: str) -> None:
    client = mlflow.MlflowClient()
    first = promote(f"models:/{model}/1", "first one ", expect="none")
    assert (first.version, first.before, first.reason, first.action) == ("1", None, "first one", "promote")
    assert "@" in first.by
    promote(f"models:/{model}/3", "reads better", expect="1")
    assert champion_of(client, model) == "3"
    back = rollback(model, "users complain")
    assert (back.version, back.before, back.reason) == ("1", "3", "users complain")
    assert champion_of(client, model) == "1"
    assert [move.reason for move in read_moves(client, model)] == ["first one", "reads better", "users complain"]
    with pytest.raises(InputError, match=r"no champion is recorded before version 1; name the version"):
        rollback(model, "further")
    assert champion_of(client, model) == "1"


def test_a_version_is_promoted_over_the_champion_that_it_was_compared_with(model: str) -> None:
    client = mlflow.MlflowClient()
    promote(f"models:/{model}/3", "the only one")  # over none: nothing to compare with
    words = "version 1 was compared with no champion, the champion is version 3: register it again"
    with pytest.raises(InputError, match=words):
        promote(f"models:/{model}/1", "better")
    assert champion_of(client, model) == "3"
    assert promote(f"models:/{model}/1", "better", compared=False).before == "3"


@pytest.mark.parametrize(
    ("address", "reason", "expect", "words"),
    [
        ("/2", "better", None, r"version 2 was rejected: ppo/kl = 50; a version that broke a gate is never champion"),
        ("/1", " ", None, "--reason is empty"),
        ("/1", "better", "3", "--expect 3: the champion of .* is none: somebody moved it meanwhile"),
        ("/9", "better", None, "did not do it: .*not found"),
        ("@nobody", "better", None, "no version of .* is @nobody"),
        ("", "better", None, "write models:/name@alias"),
    ],
)
def test_promote_refuses_and_leaves_all_as_it_was(
    model: str, address: str, reason: str, expect: str | None, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        promote(f"models:/{model}{address}", reason, expect)
    client = mlflow.MlflowClient()
    assert champion_of(client, model) is None
    assert read_moves(client, model) == []


def test_a_champion_that_somebody_else_moves_meanwhile_stays(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow.MlflowClient()
    promote(f"models:/{model}/1", "first")
    write_tag = mlflow.MlflowClient.set_registered_model_tag

    def somebody_is_faster(self: Any, name: str, key: str, value: str) -> None:
        write_tag(self, name, key, value)
        client.set_registered_model_alias(name, "champion", "2")

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_tag", somebody_is_faster)
    with pytest.raises(InputError, match="is version 2, not version 1: somebody moved it meanwhile"):
        move_champion(client, model, "3", expected="1", action="promote", reason="better")
    assert champion_of(client, model) == "2"
    assert [move.reason for move in read_moves(client, model)] == ["first"], "no record of a move that never was"


def test_a_registry_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("http://127.0.0.1:9")  # nothing listens there
    try:
        with pytest.raises(InputError, match=r"the registry at http://127\.0\.0\.1:9 did not do it"):
            promote("models:/chatloom/1", "better")
    finally:
        mlflow.set_tracking_uri(before)
