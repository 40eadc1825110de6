"""The stage harness against real MLflow stores: what it writes, records and leaves behind when a stage ends badly."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.figure
import mlflow
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatloom.errors import InputError
from stages.run import nested, stage
from stages.tracking import _is_running, dvc_hash, flattened

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Iterator[Path]:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "CHATLOOM_REPRODUCTION", "CHATLOOM_PRESET"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    mlflow.set_tracking_uri(None)


def runs(project: Path) -> dict[str, Any]:
    """Runs of the project's own store, by name."""
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("chatloom")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def start(project: Path, body: str, **environment: str) -> subprocess.Popen[str]:
    """A stage in its own process, with `body` as its block."""
    indented = "\n".join("    " + line for line in body.splitlines())
    script = f"import sys, time, mlflow\nfrom stages.run import stage\nwith stage('train_sft') as run:\n{indented}\n"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_files_and_run_agree(project: Path) -> None:
    with stage("train_sft") as run:
        assert run.name == "train_sft"
        assert run.params.train_sft.seed == 42
        with run.out("models/sft") as folder:
            (folder / "weights").write_text("w")
            assert not Path("models/sft").exists()
        assert Path("models/sft/weights").read_text() == "w"
        run.log(2, {"train/loss": 0.5})
        run.log(1, {"train/loss": 1.0, "train/lr": 0.1, "eval/loss": 3.0})
        run.metrics({"loss": 0.5, "eval/loss": 3.0, "eval/rows": 7})
        run.report("train_sft", {"dropped": ["ä"]})
        run.table("samples", {"prompt": ["a", "b"], "response": ("c", "d")})
        run.figure("curve", matplotlib.figure.Figure())
        assert not Path("plots").exists()

    assert Path("plots/train_sft/train.csv").read_text() == "step,loss,lr\n1,1.0,0.1\n2,0.5,\n"
    assert Path("plots/train_sft/eval.csv").read_text() == "step,loss\n1,3.0\n"
    assert json.loads(Path("metrics/train_sft.json").read_text()) == {"loss": 0.5, "eval": {"loss": 3.0, "rows": 7}}
    assert json.loads(Path("reports/train_sft.json").read_text()) == {"dropped": ["ä"]}
    assert Path("reports/curve.png").read_bytes().startswith(b"\x89PNG")

    recorded = runs(project)["train_sft"]
    assert recorded.info.status == "FINISHED"
    assert recorded.data.metrics["eval/loss"] == 3.0
    assert recorded.data.metrics["train/loss"] == 0.5
    assert recorded.data.params["train_sft.optimizer.lr"] == "5e-05"
    assert recorded.data.params["runtime.device"] == "auto"
    assert not any(name.startswith("train_ppo") for name in recorded.data.params)
    assert recorded.data.tags["chatloom.stage"] == "train_sft"
    assert recorded.data.tags["chatloom.preset"] == "default"
    assert "mlflow.parentRunId" not in recorded.data.tags
    artifacts = {str(path.relative_to(project / "mlartifacts")).split("/", 2)[2] for path in _files("mlartifacts")}
    assert artifacts == {"tables/samples.json", "reports/train_sft.json", "reports/curve.png"}


def _files(folder: str) -> list[Path]:
    return [path for path in Path(folder).resolve().rglob("*") if path.is_file()]


def test_a_run_says_what_it_read_and_made_and_took(project: Path) -> None:
    listed = {"params": ["train_sft", "runtime.dtype"], "deps": ["x"], "outs": ["made.txt"]}
    pipeline = {"stages": {"train_sft": listed | {"metrics": ["metrics/train_sft.json"]}}}
    Path("dvc.yaml").write_text(json.dumps(pipeline))
    inputs = []
    for content in ("one", "one", "two"):
        Path("x").write_text(content)
        with stage("train_sft") as run:
            Path("made.txt").write_text("w")
            run.metrics({"loss": 1.0, "tokens": 12})
            id = mlflow.active_run().info.run_id  # type: ignore[union-attr]
        recorded = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db").get_run(id).data
        inputs.append(recorded.tags["chatloom.inputs"])
    assert inputs[0] == inputs[1] != inputs[2]
    assert recorded.tags["out/made.txt"] == "f1290186a5d0b1ceab27f4e77c0c5d68"  # md5sum of "w"
    assert "out/metrics/train_sft.json" in recorded.tags
    assert json.loads(recorded.tags["machine"])["cores"] == len(os.sched_getaffinity(0))
    assert recorded.metrics["cost/tokens"] == 12
    assert recorded.metrics["cost/wall_s"] > 0
    assert recorded.metrics["cost/cpu_hours"] > 0
    assert 0.01 < recorded.metrics["cost/peak_gib"] < 100
    assert json.loads(Path("metrics/train_sft.json").read_text()) == {"loss": 1.0, "tokens": 12}


def test_what_the_clock_says_is_in_mlflow_and_in_no_file(project: Path) -> None:
    """So that equal work writes equal files."""
    with stage("train_sft") as run:
        run.log(1, {"train/loss": 1.0, "time/tokens_per_s": 321.0})
        run.metrics({"steps": 1, "time/tokens_per_s_mean": 123.0})
    assert [path.name for path in _files("plots")] == ["train.csv"]
    assert json.loads(Path("metrics/train_sft.json").read_text()) == {"steps": 1}
    recorded = runs(project)["train_sft"].data.metrics
    assert (recorded["time/tokens_per_s"], recorded["time/tokens_per_s_mean"]) == (321.0, 123.0)


def test_a_resumed_stage_has_the_whole_curve_in_its_files_and_in_its_run(project: Path) -> None:
    Path("dvc.yaml").write_text(json.dumps({"stages": {"train_sft": {"params": ["train_sft"], "deps": ["x"]}}}))
    with pytest.raises(ZeroDivisionError):
        _three_steps()
    assert not Path("plots").exists()
    with stage("train_sft") as run:
        checkpoints = run.checkpoints(2)
        assert checkpoints is not None
        assert checkpoints.load() == (2, {"loss": 0.5})
        run.log(3, {"train/loss": 0.25})
        run.table("samples", {"step": [3], "response": ["answer 3"]})
        id = mlflow.active_run().info.run_id  # type: ignore[union-attr]
    assert Path("plots/train_sft/train.csv").read_text() == "step,loss\n1,1.0\n2,0.5\n3,0.25\n"
    assert not Path(".state/train_sft").exists()
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    history = client.get_metric_history(id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert [point.step for point in client.get_metric_history(id, "time/rollout")] == [1, 2]
    rows = json.loads(next(path for path in _files(f"mlartifacts/{id}") if path.name == "samples.json").read_text())
    assert rows == {"columns": ["step", "response"], "data": [[step, f"answer {step}"] for step in (1, 2, 3)]}


def _three_steps() -> None:
    with stage("train_sft") as run:
        checkpoints = run.checkpoints(2)
        assert checkpoints is not None
        for step in (1, 2, 3):
            run.log(step, {"train/loss": 1 / step, "time/rollout": 9.0})
            run.table("samples", {"step": [step], "response": [f"answer {step}"]})
            if checkpoints.due(step):
                checkpoints.save(step, {"loss": 1 / step})
        _ = 1 / 0


def test_without_a_pipeline_no_state_is_saved(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stage("train_sft") as run:
        assert run.checkpoints(2) is None
    assert "no dvc.yaml here lists it: its state is not saved" in capsys.readouterr().err


def test_stages_of_one_reproduction_share_a_parent(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATLOOM_REPRODUCTION", "20260101-120000-ab12")
    monkeypatch.setenv("CHATLOOM_PRESET", "smoke")
    for name in ("raw_data", "prepare_data"):
        with stage(name):
            assert runs(project)["20260101-120000-ab12"].info.status == "RUNNING"
    recorded = runs(project)
    assert set(recorded) == {"20260101-120000-ab12", "raw_data", "prepare_data"}
    assert {run.info.status for run in recorded.values()} == {"FINISHED"}
    parent = recorded["20260101-120000-ab12"].info.run_id
    assert recorded["raw_data"].data.tags["mlflow.parentRunId"] == parent
    assert recorded["prepare_data"].data.tags["mlflow.parentRunId"] == parent
    assert recorded["prepare_data"].data.tags["chatloom.preset"] == "smoke"


def test_two_stages_started_at_once_on_a_fresh_store(project: Path) -> None:
    Path("mlflow.db").unlink()
    processes = [start(project, "pass", CHATLOOM_REPRODUCTION="r1") for _ in range(2)]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr and process.stderr.read()
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    (experiment,) = (one for one in client.search_experiments() if one.name == "chatloom")
    names = sorted(run.info.run_name for run in client.search_runs([experiment.experiment_id]))
    assert names == ["r1", "train_sft", "train_sft"]


def test_input_error_is_one_message_and_status_1(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHATLOOM_REPRODUCTION", "r1")
    with pytest.raises(SystemExit) as ended:
        _refuse()
    assert ended.value.code == 1
    shown = capsys.readouterr().err
    assert "train_sft: train_sft.batch_size = 4: too much" in shown
    assert "Traceback" not in shown
    assert not Path("metrics").exists()
    assert not Path("plots").exists()
    assert {name: run.info.status for name, run in runs(project).items()} == {"r1": "FAILED", "train_sft": "FAILED"}


def _refuse() -> None:
    with stage("train_sft") as run:
        run.log(1, {"train/loss": 1.0})
        run.metrics({"loss": 1.0})
        raise InputError("train_sft.batch_size = 4: too much")


def test_any_other_exception_keeps_its_traceback(project: Path) -> None:
    with pytest.raises(ZeroDivisionError), stage("train_sft"):
        _ = 1 / 0
    assert runs(project)["train_sft"].info.status == "FAILED"


def test_a_bad_params_file_starts_no_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("num_threads", "threads"))
    with pytest.raises(SystemExit) as ended, stage("train_sft"):
        pytest.fail("the block must not run")
    assert ended.value.code == 1
    assert "runtime.threads: unknown key" in capsys.readouterr().err
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    assert client.get_experiment_by_name("chatloom") is None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_stage_says_so(project: Path, number: signal.Signals, status: int) -> None:
    body = "run.log(1, {'train/loss': 1.0})\nprint('ready', flush=True)\ntime.sleep(60)"
    process = start(project, body, CHATLOOM_REPRODUCTION="r1")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in shown
    assert {name: run.info.status for name, run in runs(project).items()} == {"r1": "KILLED", "train_sft": "KILLED"}
    assert not Path("plots").exists()


def test_the_run_of_a_stage_that_was_killed_outright_is_ended_by_the_next_one(project: Path) -> None:
    body = "print(mlflow.active_run().info.run_id, flush=True)\ntime.sleep(60)"
    with start(project, body, CHATLOOM_REPRODUCTION="r1") as killed, start(project, body) as alive:
        ids = [process.stdout.readline().strip() for process in (killed, alive) if process.stdout is not None]
        killed.kill()
        killed.wait()
        client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
        elsewhere = client.create_run(client.get_run(ids[0]).info.experiment_id, tags=client.get_run(ids[0]).data.tags)
        client.set_tag(elsewhere.info.run_id, "chatloom.workspace", "/elsewhere")
        ids += [elsewhere.info.run_id, runs(project)["r1"].info.run_id]
        with stage("raw_data"):
            assert [client.get_run(id).info.status for id in ids] == ["RUNNING"] * 4, "not its business"
        with stage("train_sft"):
            assert [client.get_run(id).info.status for id in ids] == ["KILLED", "RUNNING", "RUNNING", "KILLED"]
        alive.kill()


def test_a_number_that_another_process_got_is_no_sign_of_life() -> None:
    own = psutil.Process()
    assert _is_running(own.pid, own.create_time())
    assert not _is_running(own.pid, own.create_time() - 3600)


def test_mlflow_down_names_the_variable(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("on_outage: keep", "on_outage: stop"))
    with pytest.raises(SystemExit) as ended, stage("train_sft"):
        pytest.fail("the block must not run")
    assert ended.value.code == 75, "it is worth another try"
    assert "MLFLOW_TRACKING_URI=http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_a_store_that_cannot_be_opened_names_the_variable(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.db").write_text("this is no database " * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/broken.db")
    with pytest.raises(SystemExit) as ended, stage("train_sft"):
        pytest.fail("the block must not run")
    assert ended.value.code == 1
    assert "broken.db does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_stops_the_stage(project: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"train/loss is (nan|inf) at step 7"), stage("train_sft") as run:
        run.log(7, {"train/loss": value})
    with pytest.raises(ValueError, match=r"reward/accuracy is (nan|inf)"), stage("train_sft") as run:
        run.metrics({"reward/accuracy": value})
    assert not Path("metrics").exists()


def test_a_curve_needs_a_file_to_go_to(project: Path) -> None:
    with pytest.raises(ValueError, match="'loss' has no part"), stage("train_sft") as run:
        run.log(1, {"loss": 1.0})


def test_datasets_carry_the_hash_that_dvc_recorded(project: Path) -> None:
    digest = "d751713988987e9331980363e24189ce.dir"  # 36 characters: the most that MLflow takes
    entry = {"path": "data/prepared/sft", "md5": digest, "hash": "md5"}
    Path("dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {"prepare_data": {"outs": [entry]}}}))
    folder = Path("data/prepared/sft")
    folder.mkdir(parents=True)
    rows = [{"id": "1", "messages": [{"role": "user", "content": "hé"}], "prompt_ids": [1, 2]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    Path("models/base").mkdir(parents=True)
    Path("models/base/config.json").write_text("{}")
    with stage("train_sft") as run:
        run.dataset("data/prepared/sft", "sft")
        run.dataset(Path("models/base"), "base")
    inputs = {one.dataset.name: one.dataset for one in runs(project)["train_sft"].inputs.dataset_inputs}
    assert inputs["sft"].digest == digest
    assert "prompt_ids" in inputs["sft"].schema
    assert set(inputs) == {"sft", "base"}


def test_dvc_hash_prefers_what_was_made_to_what_was_seen(tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    assert dvc_hash(Path("a"), lock) is None
    stages = {
        "user": {"deps": [{"path": "a", "md5": "old"}]},
        "maker": {"outs": [{"path": "a", "md5": "new"}]},
    }
    lock.write_text(json.dumps({"stages": stages}))
    assert dvc_hash(Path("a"), lock) == "new"
    assert dvc_hash(Path("b"), lock) is None


def test_lock_and_revision_are_tagged(project: Path) -> None:
    Path("dvc.lock").write_text("stages: {}\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    Path(".gitignore").write_text("/mlflow.db*\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    Path("dvc.lock").write_text("stages: {}\n\n")  # a running reproduction changes it: not dirty
    with stage("raw_data"):
        pass
    tags = runs(project)["raw_data"].data.tags
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert tags["git.revision"] == revision
    assert tags["git.dirty"] == "false"
    # sha256sum of "stages: {}\n\n"
    assert tags["dvc.lock.sha256"] == "86066d5d2ad51010a656a4c3fa58eb14fd7a52b33630fb57dff42f5c4a3284b8"
    Path("new.py").write_text("")
    with stage("base_model"):
        pass
    assert runs(project)["base_model"].data.tags["git.dirty"] == "true"


def test_no_handler_is_left_behind(project: Path) -> None:
    before = list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)
    with stage("raw_data"):
        assert len(logging.getLogger().handlers) == len(before[0]) + 1
    assert (logging.getLogger().handlers, signal.getsignal(signal.SIGTERM)) == before


def test_names_nest_and_values_flatten() -> None:
    assert nested({"a/b/c": 1, "a/d": 2, "e": 3}) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    with pytest.raises(ValueError, match="'a/b'"):
        nested({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="'a'"):
        nested({"a/b": 2, "a": 1})
    assert flattened({"a": {"b": None, "c": [1, {"d": "x"}]}, "e": "text"}) == {
        "a.b": "null",
        "a.c": '[1, {"d": "x"}]',
        "e": "text",
    }
    assert len(flattened({"long": "x" * 10_000})["long"]) == 6000
