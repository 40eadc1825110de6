"""The two stages as DVC runs them: from params.yaml to outs, metrics and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatloom.data.prepared import read_split
from tests.data.factories import ROOT, templated_rows, write_jsonl

pytestmark = pytest.mark.smoke


def run_stage(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", f"stages.{name}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_raw_and_prepared_rows(tmp_path: Path, checkpoint: Path) -> None:
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    [source] = params["raw_data"]["sources"]
    source |= {"path": "rows.jsonl", "format": "auto"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    refused = run_stage("raw_data", tmp_path)
    assert refused.returncode == 1
    assert "raw_data: raw_data.sources[0].path = 'rows.jsonl': no such file or folder" in refused.stderr
    assert not (tmp_path / "data/raw").exists()

    write_jsonl(tmp_path / "rows.jsonl", [*templated_rows(60), {"instruction": "a", "output": ""}])
    (tmp_path / "models").mkdir()
    (tmp_path / "models/base").symlink_to(checkpoint)
    for name in ("raw_data", "prepare_data"):
        done = run_stage(name, tmp_path)
        assert done.returncode == 0, done.stderr
    metrics = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "metrics").iterdir()}
    assert metrics["raw_data"]["dropped"] == {"total": 1, "empty_answer": 1}
    assert metrics["prepare_data"]["rows"] == {"in": 60, "out": 60}
    assert (
        sum(len(read_split(tmp_path / "data/prepared" / split)) for split in ("sft", "reward", "ppo", "ptx", "eval"))
        == 60
    )
    page = (tmp_path / "reports/data.html").read_text(encoding="utf-8")
    assert "rows.jsonl:61: output is empty" in page
    report = json.loads((tmp_path / "reports/raw_data.json").read_text())
    assert report["dropped"]["empty_answer"]["examples"] == ["rows.jsonl:61: output is empty"]
