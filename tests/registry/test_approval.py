"""Asking a person about a version, against a real MLflow store."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlflow
import pytest

from chatloom.errors import InputError, Unavailable
from chatloom.registry.aliases import champion_of, read_moves
from chatloom.registry.approval import Candidate, decide, question, read_candidate
from chatloom.registry.runs import run_pages

GATES = [
    {"metric": "ppo/kl", "value": 12.0, "bound": "<= 40", "verdict": "pass", "blocks": True, "note": ""},
    {"metric": "champion/win_rate", "value": None, "bound": ">= 0.5", "verdict": "pass", "note": "no champion"},
]
SAMPLES = [{"prompt": "Capital of France?", "answers": {"sft": {"text": "Lyon"}, "4bit": {"text": "Paris"}}}]


@pytest.fixture
def model(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A registered model: version 1 is fit and has samples, 2 broke a gate, 3 was compared with version 1."""
    client = mlflow.MlflowClient()
    name = re.sub(r"\W", "-", request.node.name)
    client.create_registered_model(name)
    (tmp_path / "evaluate.json").write_text(json.dumps({"samples": SAMPLES}))
    gates = {"gates": json.dumps(GATES)}
    for tags in (
        {"status": "accepted", "champion.compared_with": "none"},
        {"status": "rejected", "rejected.reason": "ppo/kl = 50"},
        {"status": "accepted", "champion.compared_with": "1"},
    ):
        client.create_model_version(name, source=tmp_path.as_uri(), tags=gates | tags)
    client.set_registered_model_alias(name, "challenger", "1")
    return name


def tags(name: str, version: str) -> dict[str, str]:
    found = mlflow.MlflowClient().get_model_version(name, version).tags
    return {key: value for key, value in found.items() if key.startswith("approval.")}


def test_an_approved_version_is_champion_with_who_and_why(model: str) -> None:
    client = mlflow.MlflowClient()
    candidate = read_candidate(f"models:/{model}@challenger")
    assert (candidate.number, candidate.champion, candidate.samples) == ("1", None, SAMPLES)
    move = decide(candidate, approved=True, by="Ann", reason="reads well")
    assert move is not None
    assert (move.version, move.by, move.reason) == ("1", "Ann", "reads well")
    assert champion_of(client, model) == "1"
    kept = tags(model, "1")
    assert kept.pop("approval.at").endswith("+00:00")
    assert kept == {"approval.decision": "approved", "approval.by": "Ann", "approval.reason": "reads well"}
    assert decide(read_candidate(f"models:/{model}/3"), approved=True, by="Bo", reason="better") is not None
    assert [move.by for move in read_moves(client, model)] == ["Ann", "Bo"]


def test_a_rejected_version_stays_what_it_was(model: str) -> None:
    assert decide(read_candidate(f"models:/{model}/1"), approved=False, by="Ann", reason="repeats itself") is None
    assert champion_of(mlflow.MlflowClient(), model) is None
    assert tags(model, "1")["approval.decision"] == "rejected"
    assert tags(model, "1")["approval.reason"] == "repeats itself"


def test_a_champion_that_moved_meanwhile_stays(model: str) -> None:
    client = mlflow.MlflowClient()
    candidate = read_candidate(f"models:/{model}/1")
    client.set_registered_model_alias(model, "champion", "3")
    with pytest.raises(InputError, match="is 3: somebody moved it meanwhile"):
        decide(candidate, approved=True, by="Ann", reason="reads well")
    assert champion_of(client, model) == "3"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/2", "version 2 is not fit to be champion: ppo/kl = 50"),
        ("/3", "is @champion already"),
        ("/1", "version 1 was compared with none, the champion is version 3"),
        ("@nobody", "no version of .* is @nobody"),
        ("", "write models:/name@alias"),
    ],
)
def test_nobody_is_asked_about_what_cannot_be(model: str, address: str, words: str) -> None:
    mlflow.MlflowClient().set_registered_model_alias(model, "champion", "3")
    with pytest.raises(InputError, match=words):
        read_candidate(f"models:/{model}{address}")


def test_a_registry_that_is_down_may_be_up_later() -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("http://127.0.0.1:9")  # nothing listens there
    try:
        with pytest.raises(Unavailable):
            read_candidate("models:/chatloom/1")
    finally:
        mlflow.set_tracking_uri(before)


def test_the_question_shows_gates_and_answers_as_they_are() -> None:
    said: list[dict[str, Any]] = [
        {"prompt": "Say <b>", "answers": {"4bit": {"text": "# No\n[x](http://x)" + "y" * 700}}},
    ]
    text = question(Candidate("chat", "3", "2", GATES, said))
    assert text.startswith("**chat version 3** would become @champion; the champion is version 2.\n")
    assert "| ppo/kl | 12 | <= 40 | pass |" in text
    assert "| champion/win_rate |  | >= 0.5 | pass: no champion |" in text
    assert r"**Say \<b\>**" in text
    assert r"- **4bit**: \# No \[x\](http://x)yyy" in text
    assert max(map(len, text.splitlines())) < 700
    assert "No sample answers came with this version." in question(Candidate("chat", "3", None, GATES, []))


def test_pages_of_a_reproduction(store: str) -> None:
    with mlflow.start_run(tags={"chatloom.reproduction": "r1"}) as parent:
        with mlflow.start_run(run_name="train_sft", nested=True) as sft:
            pass
        with mlflow.start_run(run_name="register", nested=True) as register:
            pass
    home = f"http://ui/#/experiments/{parent.info.experiment_id}/runs"
    assert run_pages("r1", "http://ui/") == {
        "r1": f"{home}/{parent.info.run_id}",
        "train_sft": f"{home}/{sft.info.run_id}",
        "register": f"{home}/{register.info.run_id}",
        "report": f"{home}/{register.info.run_id}/artifacts/reports/report.html",
    }
    assert run_pages("r2", "http://ui") == {}
