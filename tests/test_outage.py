"""MLflow's server is down before, during or after a stage.

A real one, which is killed with SIGKILL once and started again; its start takes longest, and so it is a relay before it
that goes down elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE
from sqlalchemy.exc import OperationalError

from chatloom.registry.resolve import may_pass
from stages import outbox, tracking
from stages.outbox import KEPT
from stages.run import stage
from tests.conftest import ROOT
from tests.loopback import Relay
from tests.mlflow_server import MlflowServer

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    server = MlflowServer(
        folder, "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"
    )
    server.up()
    yield server
    server.down()


@pytest.fixture
def server(real_server: MlflowServer) -> Iterator[Relay]:
    """The address that stages know."""
    relay = Relay(real_server.port)
    yield relay
    relay.down()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Relay) -> Iterator[Path]:
    """A folder to run stages in, whose experiment has its name; nothing is tried twice, and kept runs at once."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("CHATLOOM_REPRODUCTION", "CHATLOOM_PRESET", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_TRIES", 0.0)
    yield tmp_path
    mlflow.set_tracking_uri(None)


def runs(server: Relay, project: Path) -> dict[str, Any]:
    """Runs of the project's experiment by name."""
    server.up()
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(project.name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "a run was made twice"
    return {run.info.run_name: run for run in found}


def history(server: Relay, run: Any, metric: str) -> list[tuple[int, float]]:
    points = mlflow.MlflowClient(server.uri).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def kept() -> list[Path]:
    return sorted(KEPT.glob("*")) if KEPT.is_dir() else []


def stop_on_outage() -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("on_outage: keep", "on_outage: stop"))


def test_down_before_a_stage_its_run_is_sent_when_the_next_one_starts(
    project: Path, server: Relay, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.down()
    monkeypatch.setenv("CHATLOOM_REPRODUCTION", "r1")
    Path("rows.txt").write_text("one\n")
    with stage("train_sft") as run:
        run.dataset("rows.txt", "sft")
        run.log(1, {"train/loss": 2.0})
        run.log(2, {"train/loss": 1.0})
        run.table("samples", {"prompt": ["ä"], "response": ["b"]})
        run.table("samples", {"prompt": ["c"], "response": ["d"]})
        run.report("train_sft", {"text": "as it was"})
        run.metrics({"loss": 1.0})
    Path("reports/train_sft.json").write_text("changed later")
    assert Path("plots/train_sft/train.csv").read_text() == "step,loss\n1,2.0\n2,1.0\n"
    assert len(kept()) == 1
    assert f"MLflow at {server.uri} does not answer" in (said := capsys.readouterr().err)
    assert str(kept()[0]) in said
    server_started = int(time.time() * 1000)
    server.up()
    with stage("raw_data"):
        assert kept() == []
    found = runs(server, project)
    assert set(found) == {"r1", "train_sft", "raw_data"}
    sent = found["train_sft"]
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert sent.info.start_time < sent.info.end_time < server_started
    assert sent.data.tags["mlflow.parentRunId"] == found["r1"].info.run_id
    assert sent.data.tags["chatloom.stage"] == "train_sft"
    assert sent.data.tags["mlflow.user"]
    assert sent.data.params["train_sft.optimizer.lr"] == "5e-05"
    assert history(server, sent, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert sent.data.metrics["loss"] == 1.0
    assert sent.data.metrics["cost/wall_s"] > 0
    assert [one.dataset.name for one in sent.inputs.dataset_inputs] == ["sft"]
    files = mlflow.MlflowClient(server.uri)
    rows = json.loads(Path(files.download_artifacts(sent.info.run_id, "tables/samples.json")).read_text())
    assert rows == {"columns": ["prompt", "response"], "data": [["ä", "b"], ["c", "d"]]}
    report = Path(files.download_artifacts(sent.info.run_id, "reports/train_sft.json"))
    assert json.loads(report.read_text()) == {"text": "as it was"}


def test_killed_during_a_stage_the_curve_has_no_gap(project: Path, server: Relay, real_server: MlflowServer) -> None:
    server.up()
    with stage("train_sft") as run:
        run.log(1, {"train/loss": 1.0, "train/lr": 0.1})
        real_server.down()
        for step in (2, 3):
            run.log(step, {"train/loss": 1 / step})
        run.table("samples", {"step": [3]})
        assert len(kept()) == 1
        real_server.up()
        run.log(4, {"train/loss": 0.25})
        assert kept() == []
        run.log(5, {"train/loss": 0.2})
    found = runs(server, project)
    assert set(found) == {"train_sft"}
    assert found["train_sft"].info.status == "FINISHED"
    assert history(server, found["train_sft"], "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 0.2)]
    assert history(server, found["train_sft"], "train/lr") == [(1, 0.1)]


def test_down_after_a_stage_its_end_is_sent_by_hand(
    project: Path, server: Relay, capsys: pytest.CaptureFixture[str]
) -> None:
    server.up()
    with stage("train_sft") as run:
        run.log(1, {"train/loss": 1.0})
        server.down()
    assert len(kept()) == 1
    with pytest.raises(SystemExit) as ended:
        outbox.main()
    assert ended.value.code == 1
    assert f"still kept: {kept()[0]}" in capsys.readouterr().err
    server.up()
    with pytest.raises(SystemExit) as ended:
        outbox.main()
    assert ended.value.code == 0
    assert "nothing is kept" in capsys.readouterr().err
    found = runs(server, project)
    assert (set(found), found["train_sft"].info.status) == ({"train_sft"}, "FINISHED")


def test_a_stage_killed_while_its_run_is_kept(project: Path, server: Relay) -> None:
    server.down()
    script = (
        "import signal\nfrom stages.run import stage\nwith stage('train_sft') as run:\n"
        "    run.log(1, {'train/loss': 1.0})\n    print('ready', flush=True)\n    signal.pause()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (folder,) = kept()
        server.up()
        assert outbox.send_kept(mlflow, server.uri) == 0, "its process lives"
        process.kill()
    with (folder / "events.jsonl").open("a") as events:
        events.write('{"do": "metrics", "poi')  # as a kill can leave it
    assert outbox.send_kept(mlflow, server.uri) == 1
    found = runs(server, project)["train_sft"]
    assert found.info.status == "KILLED"
    assert history(server, found, "train/loss") == [(1, 1.0)]
    assert kept() == []


def test_stop_before_and_during_a_stage_says_what_to_do(
    project: Path, server: Relay, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_on_outage()
    server.up()
    with pytest.raises(SystemExit) as ended:
        _goes_down_after_a_step(server)
    assert ended.value.code == 75
    said = capsys.readouterr().err
    assert f"MLFLOW_TRACKING_URI={server.uri} does not answer any more" in said
    assert "tracking.on_outage: keep" in said
    assert "Traceback" not in said
    with pytest.raises(SystemExit), stage("train_sft"):
        pytest.fail("the block must not run")
    assert "start it (make ui)" in capsys.readouterr().err
    assert kept() == []
    assert not Path("plots").exists()


def _goes_down_after_a_step(server: Relay) -> None:
    with stage("train_sft") as run:
        run.log(1, {"train/loss": 1.0})
        server.down()
        run.log(2, {"train/loss": 0.5})


def test_stop_at_the_end_of_a_stage_leaves_its_state(project: Path, server: Relay) -> None:
    """What is run again goes on from it."""
    stop_on_outage()
    Path("dvc.yaml").write_text(json.dumps({"stages": {"train_sft": {"params": ["train_sft"], "deps": ["x"]}}}))
    Path("x").write_text("")
    server.up()
    with pytest.raises(SystemExit) as ended:
        _one_step(server.down)
    assert ended.value.code == 75
    server.up()
    assert _one_step(lambda: None) == (1, {"loss": 1.0})
    assert not Path(".state/train_sft").exists()


def _one_step(before_the_end: Callable[[], None]) -> tuple[int, dict[str, Any]] | None:
    """What a stage with one step had to go on from."""
    with stage("train_sft") as run:
        checkpoints = run.checkpoints(1)
        assert checkpoints is not None
        found = checkpoints.load()
        if found is None:
            run.log(1, {"train/loss": 1.0})
            checkpoints.save(1, {"loss": 1.0})
        before_the_end()
    return found


def test_a_stage_that_needs_the_registry_stops(
    project: Path, server: Relay, capsys: pytest.CaptureFixture[str]
) -> None:
    server.down()
    with pytest.raises(SystemExit) as ended, stage("register", needs_mlflow=True):
        pytest.fail("the block must not run")
    assert ended.value.code == 75
    assert "does not answer" in capsys.readouterr().err


def _answer(status: int) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    return response


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MlflowException("API request failed with exception: connection refused"), True),
        (MlflowException("the database is gone", error_code=TEMPORARILY_UNAVAILABLE), True),
        (RestException({"error_code": "INTERNAL_ERROR", "message": ""}), True),
        (RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": ""}), False),
        (MlflowException("no right", error_code=PERMISSION_DENIED), False),
        (requests.ConnectionError(), True),
        (requests.HTTPError(response=_answer(503)), True),
        (requests.HTTPError(response=_answer(403)), False),
        (OperationalError("", {}, Exception()), True),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_may_pass_and_what_is_refused(error: Exception, expected: bool) -> None:
    assert may_pass(error) is expected
