"""What an operator reads: progress, metrics beside the last run's; and which slot a stage takes."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from chatloom.errors import InputError
from chatloom.progress import progress
from tasks import progress as operator
from tasks.progress import LINE, ProgressArtifact
from tasks.report import compare, mlflow_ui, read_metrics
from tasks.slots import LIGHT, ensure_slots, slot_of, uses_gpu
from tasks.workspace import Reproduction
from tests.conftest import ROOT


def test_lines_of_progress_are_understood(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress("train_sft", 8, 2) as advance:
        advance(6, loss=1.5, tokens=300.0)
    line = f"12:00:01 INFO    {caplog.messages[-1]}"
    found = LINE.fullmatch(line)
    assert found is not None, line
    assert (found["loop"], found["done"], found["total"], found["left"]) == ("train_sft", "8", "8", "0:00")
    assert found["shown"] == "loss 1.5  tokens 300"
    with caplog.at_level(logging.INFO), progress("compare", 3) as advance:
        advance(3)
    assert (found := LINE.fullmatch(caplog.messages[-1])) is not None
    assert (found["loop"], found["shown"]) == ("compare", "")


def test_progress_is_one_artifact_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    from uuid import UUID

    seen: list[Any] = []
    made = UUID(int=7)

    def create(part: float, *, key: str, description: str) -> UUID:
        seen.append((part, key, description))
        return made

    def update(id: UUID, part: float, *, description: str) -> None:
        seen.append((id, part, description))

    monkeypatch.setattr(operator, "create_progress_artifact", create)
    monkeypatch.setattr(operator, "update_progress_artifact", update)
    artifact = ProgressArtifact("train_sft")
    for line in (
        "train_sft: MLflow run 3f",
        "10:00:00 INFO    train_sft 2/8  loss 1.5  0.5/s  0:12 left",
        "10:00:10 INFO    train_sft 6/8  loss 1.2  0.4/s  0:05 left",
    ):
        artifact.read(line)
    assert seen == [
        (25.0, "progress-train-sft", "train_sft: 2 of 8, 0.5 a second, 0:12 left (loss 1.5)"),
        (made, 75.0, "train_sft: 6 of 8, 0.4 a second, 0:05 left (loss 1.2)"),
    ]


def test_metrics_are_compared_with_the_last_run(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    (folder / "train_sft.json").write_text(json.dumps({"train": {"loss": 1.25, "note": "words"}, "steps": 8}))
    now = read_metrics(tmp_path)
    assert now == {"train_sft/train/loss": 1.25, "train_sft/steps": 8.0}
    assert compare({"train_sft/train/loss": 1.5, "gone/x": 2.0}, now) == [
        {"metric": "gone/x", "before": "2", "now": "", "change": ""},
        {"metric": "train_sft/steps", "before": "", "now": "8", "change": ""},
        {"metric": "train_sft/train/loss", "before": "1.5", "now": "1.25", "change": "-0.25"},
    ]
    (folder / "evaluate.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluate.json: not valid JSON: .*; run its stage again"):
        read_metrics(tmp_path)


def test_where_mlflow_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATLOOM_MLFLOW_UI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert mlflow_ui() is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert mlflow_ui() == "https://mlflow.example.org"
    monkeypatch.setenv("CHATLOOM_MLFLOW_UI", "http://127.0.0.1:5000")
    assert mlflow_ui() == "http://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("device", "found", "visible", "gpu"),
    [
        ("cpu", ["nvidia0"], None, False),
        ("cuda", [], None, True),
        ("auto", [], None, False),
        ("auto", ["nvidiactl"], None, False),
        ("auto", ["nvidia0"], None, True),
        ("auto", ["nvidia0"], "", False),
        ("auto", ["nvidia0"], "0", True),
    ],
)
def test_a_stage_takes_the_slot_of_what_it_computes_on(
    device: str, found: list[str], visible: str | None, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["runtime"]["device"] = device
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", visible)
    devices = tmp_path / "dev"
    devices.mkdir()
    for name in found:
        (devices / name).touch()
    assert uses_gpu(tmp_path, devices) is gpu


def test_without_a_server_that_lasts_there_are_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's temporary server would be started to ask it for one."""
    monkeypatch.setattr("tasks.slots.get_client", lambda **_: pytest.fail("it was asked"))
    monkeypatch.setattr("tasks.slots.concurrency", lambda *_, **__: pytest.fail("it was asked"))
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        ensure_slots()
        with slot_of("train_sft", Reproduction("one", ROOT, ROOT, "id"), print):
            pass


def test_stages_without_a_slot_are_stages() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert set(LIGHT) < set(stages)
