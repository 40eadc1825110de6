"""The stage `register` as DVC runs it, and the command that serves what it registered."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from chatloom.files import read_json
from chatloom.registry.gates import Verdict
from chatloom.registry.register import Registered
from stages.register import gate_table, summary

ROOT = Path(__file__).parents[2]
METRICS = {
    "reward": {"accuracy": 0.8},
    "perplexity": {"quantized_ratio": 1.1},
    "ppo": {"kl": 9.0},
    "gold": {"accuracy": 0.7},
    "win_rate": {"ppo_over_sft": {"gold": 0.5, "gold_high": 0.6}},
}


def test_summary_and_table() -> None:
    verdicts = (
        Verdict("ppo/kl", 12.0, "<= 40", "pass", True),
        Verdict("ppo/kl", 12.0, "<= 10", "warn", False),
        Verdict("win_rate/mean", 0.5, ">= 0.45", "pass", True),
    )
    registered = Registered(7, True, verdicts)
    assert summary(registered) == {"version": 7, "champion": 1.0, "gate/ppo/kl": 0.0, "gate/win_rate/mean": 1.0}
    assert gate_table(registered) == {
        "metric": ["ppo/kl", "ppo/kl", "win_rate/mean"],
        "value": [12.0, 12.0, 0.5],
        "bound": ["<= 40", "<= 10", ">= 0.45"],
        "verdict": ["pass", "warn", "pass"],
        "blocks": [True, False, True],
        "note": ["", "", ""],
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no such file; run the stage evaluate"), ("{", "not valid JSON"), ("[]", "expected an object")],
)
def test_metrics_that_cannot_be_read(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "evaluate.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_json(path, "run the stage evaluate")


@pytest.fixture
def workspace(tmp_path: Path, checkpoint: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(checkpoint, tmp_path / "models" / "chat-4bit")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "evaluate.json").write_text(json.dumps(METRICS))
    (tmp_path / "reports").mkdir()
    prepared = {"splits": {"sft": {"sources": {"starter": 9}}}}
    (tmp_path / "reports" / "prepare_data.json").write_text(json.dumps(prepared))
    evaluation = {"models": [], "figures": [], "samples": [], "probes": [], "candidate": {}}
    (tmp_path / "reports" / "evaluate.json").write_text(json.dumps(evaluation))
    return tmp_path


def environment() -> dict[str, str]:
    """Without what would lead the stage to another store."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "CHATLOOM_"))}


@pytest.mark.smoke
def test_register_then_serve(workspace: Path) -> None:
    command = [sys.executable, "-m", "stages.register"]
    done = subprocess.run(command, cwd=workspace, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = json.loads((workspace / "metrics" / "register.json").read_text())
    assert (measured["version"], measured["champion"]) == (1, 1)
    assert measured["gate"]["perplexity"]["quantized_ratio"] == 1
    report = json.loads((workspace / "reports" / "register.json").read_text())
    assert [gate["verdict"] for gate in report["gates"]] == ["pass"] * 8

    card = (workspace / "reports" / "model_card.md").read_text()
    assert "| starter (`data/starter/*.jsonl`) | unknown of unknown | sft 9 | Apache-2.0 |" in card
    assert "right on 70 % of held-out pairs" in card
    assert "chatloom: preset default" in (workspace / "reports" / "report.html").read_text()

    # No tracking address anywhere: the command finds mlflow.db where it runs.
    serve = [sys.executable, "-m", "chatloom.cli", "serve", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(serve, cwd=workspace, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:  # ends if the server does; uvicorn then names the port it was given
            lines.append(line)
            if "Uvicorn running on " in line:
                break
        else:
            pytest.fail("".join(lines))
        assert any("Serving chatloom version 1" in line for line in lines)
        address = lines[-1].partition("running on ")[2].split()[0]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60)
        (card,) = client.models.list().data
        assert card.model_extra is not None
        assert card.model_extra["version"] == "1"
        assert card.model_extra["lineage"]["data.sources"] == json.dumps(
            [{"name": "starter", "from": "data/starter/*.jsonl", "license": "Apache-2.0"}]
        )
        chunks = client.chat.completions.create(
            model="chatloom", messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0, stream=True
        )
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("stop", "length")
    finally:
        server.terminate()
        assert server.wait(timeout=30) in (0, -signal.SIGTERM)  # uvicorn cleans up, then ends by the same signal
