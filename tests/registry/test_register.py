"""Registering, resolving and predicting, against a real MLflow store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pytest
import yaml
from typer.testing import CliRunner

from chatloom.cli import app
from chatloom.config import Cost, Gate, LicenseGate, RegisterParams
from chatloom.errors import InputError
from chatloom.models.sampling import Sampling
from chatloom.registry.aliases import champion_of
from chatloom.registry.gates import evaluate_gates
from chatloom.registry.hashes import dvc_md5
from chatloom.registry.register import REQUIREMENTS, Registered, register
from chatloom.registry.resolve import resolve
from chatloom.registry.versions import describe, read_version
from chatloom.serving.engine import Engine
from chatloom.serving.prompts import Message
from tests.loopback import free_port

NAME = "tiny-chat"
SOURCE = {
    "name": "own",
    "from": "own.jsonl",
    "license": "Apache-2.0",
    "rows_in": 3,
    "rows_out": 2,
    "splits": {"sft": 2},
    "files": [],
}
FACTS = {
    "model": {"path": "models/chat-4bit", "md5": "5d4.dir"},
    "preset": "default",
    "code": {"revision": "abc123", "dirty": "false"},
    "files": {"params.yaml": "1", "dvc.yaml": "2", "requirements.lock": "3"},
    "params": {"quantize": {"bits": 4}},
    "base_model": {"kind": "random"},
    "sources": [SOURCE],
    "stages": {},
    "machine": {"cpu": "x"},
    "runs": {},
}
LINEAGE = {
    "git.revision": "abc123",
    "data.sources": '[{"name": "own", "from": "own.jsonl", "license": "Apache-2.0"}]',
    "dvc.model": "5d4.dir",
}
COST = Cost(currency="USD", cpu_hour=0, gpu_hour=0, cpu_watts=0, gpu_watts=0)
LICENSES = LicenseGate(allowed=["Apache-2.0"], blocks=True)
METRICS = {"reward": {"accuracy": 0.75}, "ppo": {"kl": 12.0}, "note": "text"}
QUESTION = {"input": [{"role": "user", "content": "你好"}], "max_output_tokens": 6, "temperature": 0.0}


def run_register(checkpoint: Path, max_kl: float, *, name: str = NAME) -> Registered:
    gates = [
        Gate(metric="reward/accuracy", min=0.5, max=None, blocks=True),
        Gate(metric="ppo/kl", min=None, max=max_kl, blocks=True),
    ]
    champion = champion_of(mlflow.MlflowClient(), name)
    with mlflow.start_run():
        return register(
            checkpoint,
            name,
            metrics=METRICS,
            verdicts=evaluate_gates(
                RegisterParams(model_name=name, cost=COST, promotion="gates", gates=gates, licenses=LICENSES),
                METRICS,
                [SOURCE],
                has_champion=champion is not None,
            ),
            facts=FACTS,
            champion=champion,
            sample_question="你好",
            description="# A card\n" + "words\n" * 1000,
        )


@pytest.fixture(scope="module")
def versions(store: str, checkpoint: Path) -> tuple[Registered, Registered]:
    """One that holds every gate, then one that does not."""
    return run_register(checkpoint, 40.0), run_register(checkpoint, 1.0)


def aliases() -> dict[str, str]:
    return dict(mlflow.MlflowClient().get_registered_model(NAME).aliases)


def test_champion_only_if_gates_hold(versions: tuple[Registered, Registered]) -> None:
    good, bad = versions
    assert (good.version, good.champion, bad.version, bad.champion) == (1, True, 2, False)
    assert [verdict.verdict for verdict in bad.verdicts] == ["pass", "fail", "pass"]
    # MLflow gives versions of aliases as text or as numbers, by its version.
    assert {alias: str(version) for alias, version in aliases().items()} == {"champion": "1", "challenger": "2"}


def test_tags_tell_the_lineage(versions: tuple[Registered, Registered]) -> None:
    tags = mlflow.MlflowClient().get_model_version(NAME, "2").tags
    assert tags | LINEAGE == tags
    assert (tags["gates.hold"], tags["status"], tags["champion.compared_with"]) == ("false", "rejected", "1")
    assert tags["rejected.reason"] == "ppo/kl = 12, bound <= 1"
    assert json.loads(tags["gates"])[1] == {
        "metric": "ppo/kl",
        "value": 12.0,
        "bound": "<= 1",
        "verdict": "fail",
        "blocks": True,
        "note": "",
    }


def test_the_lineage_travels_with_the_version(versions: tuple[Registered, Registered]) -> None:
    version = read_version(f"models:/{NAME}@champion")
    assert (version.number, version.facts, version.aliases) == ("1", FACTS, ["champion"])
    assert [(move.action, move.version, move.before) for move in version.moves] == [("promote", "1", None)]
    description = mlflow.MlflowClient().get_model_version(NAME, "1").description
    assert len(description) <= 5000
    assert description.startswith("# A card\nwords\n")
    assert description.endswith("words\n\n(shortened: model_card.md among the files of the version is whole)")
    text = describe(version)
    assert "own  2 of 3 rows, licence Apache-2.0, from own.jsonl" in text
    assert "4-bit     bits 4" in text
    refused = describe(read_version(f"models:/{NAME}/2"))
    assert "status    rejected: ppo/kl = 12, bound <= 1" in refused


def test_the_command_shows_and_draws_it(versions: tuple[Registered, Registered], tmp_path: Path) -> None:
    graph = tmp_path / "lineage.html"
    done = CliRunner().invoke(app, ["lineage", f"models:/{NAME}/2", "--json", "--graph", str(graph)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["version"], found["status"], found["aliases"]) == ("2", "rejected", ["challenger"])
    assert found["sources"] == [SOURCE]
    assert f"models:/{NAME}/2 @challenger" in graph.read_text()
    promoted = CliRunner().invoke(app, ["promote", f"models:/{NAME}@challenger", "--reason", "better"])
    assert promoted.exit_code == 1
    assert "version 2 was rejected: ppo/kl = 12, bound <= 1" in promoted.stderr


def test_verify_hashes_the_weights_in_the_registry(
    versions: tuple[Registered, Registered], checkpoint: Path, tmp_path: Path
) -> None:
    # The lineage of these versions names another hash than their files have.
    done = CliRunner().invoke(app, ["verify", f"models:/{NAME}/1", "--workspace", str(tmp_path)])
    assert done.exit_code == 1
    assert f"changed: weights models:/{NAME}/1: its files have the hash {dvc_md5(checkpoint)}" in done.stdout
    assert "5d4.dir" in done.stdout
    assert "missing: code abc123: this repository has no such commit; fetch it" in done.stdout


def test_metrics_are_tied_to_the_model(versions: tuple[Registered, Registered]) -> None:
    model_id = mlflow.MlflowClient().get_model_version(NAME, "1").source.rpartition("/")[2]
    metrics = {metric.key: metric.value for metric in mlflow.get_logged_model(model_id).metrics}
    assert metrics == {"reward/accuracy": 0.75, "ppo/kl": 12.0}


@pytest.mark.parametrize(("address", "version"), [("@champion", "1"), ("@challenger", "2"), ("/2", "2")])
def test_resolve(versions: tuple[Registered, Registered], checkpoint: Path, address: str, version: str) -> None:
    found = resolve(f"models:/{NAME}{address}")
    assert (found.name, found.version, found.tags["git.revision"]) == (NAME, version, "abc123")
    assert (found.path / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    messages = [Message("user", "你好")]
    assert Engine(found.path).chat(messages, sampling) == Engine(checkpoint).chat(messages, sampling)


def test_predict_as_mlflow_does(versions: tuple[Registered, Registered], checkpoint: Path) -> None:
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    expected = Engine(checkpoint).chat([Message("user", "你好")], Sampling(max_new_tokens=6, temperature=0.0))
    response = model.predict(QUESTION)
    (item,) = response["output"]
    assert (item["type"], item["role"], item["content"][0]["text"]) == ("message", "assistant", expected.text)
    assert response["usage"]["input_tokens"] == expected.prompt_tokens
    assert response["usage"]["output_tokens"] == expected.completion_tokens == 6
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    *deltas, done = model.predict_stream(QUESTION)
    assert "".join(delta["delta"] for delta in deltas) == expected.text == done["item"]["content"][0]["text"]


def test_predict_with_earlier_turns(versions: tuple[Registered, Registered], checkpoint: Path) -> None:
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    answered = model.predict(QUESTION)
    turns: list[Any] = [
        {"role": "system", "content": "Be brief."},
        *QUESTION["input"],
        *answered["output"],
        {"role": "user", "content": [{"type": "input_text", "text": "more"}]},
    ]
    text = answered["output"][0]["content"][0]["text"]
    messages = [("system", "Be brief."), ("user", "你好"), ("assistant", text), ("user", "more")]
    prompt = Engine(checkpoint).prompts.encode([Message(*message) for message in messages])
    assert model.predict(QUESTION | {"input": turns})["usage"]["input_tokens"] == len(prompt)


def test_seed(versions: tuple[Registered, Registered]) -> None:
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")

    def answer(seed: int) -> str:
        asked = QUESTION | {"temperature": 1.0, "max_output_tokens": 30, "custom_inputs": {"seed": seed, "stop": ["!"]}}
        text: str = model.predict(asked)["output"][0]["content"][0]["text"]
        return text

    assert answer(1) == answer(1) != answer(2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"custom_inputs": {"sead": 1}}, "custom_inputs has"),
        ({"input": [{"type": "function_call", "arguments": "{}", "call_id": "1", "name": "f"}]}, "messages only"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "reads text only"),
        ({"tools": [{"type": "web_search"}]}, "tools are not supported"),
        ({"max_output_tokens": 10_000}, "ask for at most"),
    ],
)
def test_predict_refuses(versions: tuple[Registered, Registered], change: dict[str, Any], words: str) -> None:
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    with pytest.raises(InputError, match=words):
        model.predict(QUESTION | change)


def test_the_code_and_the_pins_travel(versions: tuple[Registered, Registered]) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/1"))
    assert (folder / "code" / "chatloom" / "serving" / "engine.py").is_file()
    assert not list(folder.rglob("__pycache__"))
    pins = (folder / "requirements.txt").read_text().split()
    assert [pin.partition("==")[0] for pin in pins] == list(REQUIREMENTS)
    assert yaml.safe_load((folder / "MLmodel").read_text())["metadata"]["task"] == "agent/v1/responses"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        (f"models:/{NAME}@nobody", "known aliases: @challenger, @champion"),
        (f"models:/{NAME}/99", "version 99"),
        ("models:/unheard-of@champion", "does not have it"),
        (f"models:/{NAME}", "write models:/name@alias"),
        ("models:x", "write models:/name@alias"),
        ("/nowhere/at/all", "no such folder"),
    ],
)
def test_resolve_refuses(versions: tuple[Registered, Registered], uri: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve(uri)


def test_missing_checkpoint(store: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the stage quantize first"):
        run_register(tmp_path, 40.0, name="never")
    assert not mlflow.search_registered_models(filter_string="name = 'never'")


def test_a_failure_on_the_way_keeps_the_champion(
    versions: tuple[Registered, Registered], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = aliases()
    move = mlflow.MlflowClient.set_registered_model_alias

    def lost_connection(client: Any, name: str, alias: str, version: str) -> None:
        if alias == "challenger":
            raise ConnectionError
        move(client, name, alias, version)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_alias", lost_connection)
    with pytest.raises(ConnectionError):
        run_register(checkpoint, 40.0)
    assert aliases() == before


def test_a_plain_folder_needs_no_mlflow(checkpoint: Path) -> None:
    code = (
        "import sys; from chatloom.registry.resolve import resolve; "
        f"found = resolve({str(checkpoint)!r}); print(found.name, found.version); assert 'mlflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [checkpoint.name, "None"]


def test_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow, "is_tracking_uri_set", lambda: False)
    with pytest.raises(InputError, match=r"set MLFLOW_TRACKING_URI, or run this where mlflow\.db is"):
        resolve("models:/chatloom@champion")
    assert not list(tmp_path.iterdir())


@pytest.mark.smoke
def test_mlflow_models_serve(versions: tuple[Registered, Registered], store: str, checkpoint: Path) -> None:
    port = free_port()
    programs = Path(sys.executable).parent  # MLflow finds uvicorn by PATH
    serve = ["models", "serve", "-m", f"models:/{NAME}@champion", "--env-manager", "local", "-p", str(port)]
    server = subprocess.Popen(
        [programs / "mlflow", *serve],
        env=os.environ
        | {"PATH": f"{programs}:{os.environ['PATH']}", "MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # its workers end with it
    )
    try:
        response = first_response(server, f"http://127.0.0.1:{port}/invocations", seconds=120)
        assert response.status_code == 200
        expected = Engine(checkpoint).chat([Message("user", "你好")], Sampling(max_new_tokens=6, temperature=0.0))
        assert response.json()["output"][0]["content"][0]["text"] == expected.text
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def first_response(server: subprocess.Popen[bytes], url: str, *, seconds: float) -> httpx.Response:
    """Of the question, asked until the server listens."""
    deadline = time.monotonic() + seconds
    while True:
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server never answered"
        try:
            return httpx.post(url, json=QUESTION, timeout=60)
        except httpx.ConnectError:
            time.sleep(0.2)
