"""The whole DAG on the smoke preset, as its user runs it: in two processes, again, in part in one, after an edit."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = pytest.mark.smoke
STAGES = set(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of what is here, edits included, with a DVC cache and an MLflow store of its own."""
    folder = tmp_path_factory.mktemp("dag") / "checkout"
    names = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "CHATLOOM_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def reproduce(checkout: Path, *options: str) -> set[str]:
    """Names of the stages that ran."""
    done = python("-m", "tasks.reproduce", "--preset", "smoke", *options, cwd=checkout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return set(re.findall(r"^Running stage '(\w+)'", done.stdout, re.MULTILINE))


def read_metrics(checkout: Path) -> dict[str, Any]:
    folder = checkout / "workspaces/smoke/metrics"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def in_two_processes(text: str) -> str:
    """The preset with stages that train by ZeRO 2 in two processes, with as many rows a step as before; the gold model,
    which is trained by the same code as the reward model, still in one."""
    params = yaml.safe_load(text)
    params["train_gold"] = copy.deepcopy(params["train_reward"])  # which it is an alias of
    for stage in ("train_sft", "train_reward", "train_ppo"):
        params[stage]["parallel"] = {"strategy": "colossalai_zero2", "num_processes": 2}
    for stage in ("train_sft", "train_reward"):
        params[stage]["batch_size"] //= 2
    return yaml.safe_dump(params)


def test_the_dag_from_data_to_champion_and_back(checkout: Path) -> None:
    preset = checkout / "params/smoke.yaml"
    one_process = preset.read_text(encoding="utf-8")
    preset.write_text(in_two_processes(one_process), encoding="utf-8")
    assert reproduce(checkout) == STAGES
    metrics = read_metrics(checkout)
    assert set(metrics) == STAGES
    assert metrics["train_sft"]["eval"]["loss_en"] < metrics["train_sft"]["eval"]["loss_en_before"]
    assert metrics["register"]["champion"] == 1.0
    assert (checkout / "workspaces/smoke/reports/report.html").stat().st_size > 50_000

    assert reproduce(checkout) == set(), "nothing changed"

    preset.write_text(one_process, encoding="utf-8")
    assert reproduce(checkout, "--stage", "train_sft") == {"train_sft"}
    # The steps have the same rows: but for rounding they are the same.
    assert read_metrics(checkout)["train_sft"]["eval"] == pytest.approx(metrics["train_sft"]["eval"], rel=1e-3)

    preset.write_text(in_two_processes(one_process), encoding="utf-8")
    with (checkout / "chatloom/serving/engine.py").open("a", encoding="utf-8") as engine:
        engine.write("# a change to serving\n")
    assert reproduce(checkout) == {"register"}, "the run cache has the training in two processes"
    # The second version was compared with the first, and took its place.
    again = read_metrics(checkout)
    assert again["register"]["version"] == 2
    assert again["register"]["champion"] == 1.0

    runs = python(
        "-c",
        "import mlflow; mlflow.set_tracking_uri('sqlite:///mlflow.db')\n"
        "r = mlflow.search_runs(search_all_experiments=True)\n"
        "kids = r[r['tags.mlflow.parentRunId'].notna()]\n"
        "v = mlflow.MlflowClient().get_model_version_by_alias('chatloom-smoke', 'champion')\n"
        "print(len(kids), set(r.status), v.tags['git.revision'], v.version)",
        cwd=checkout,
    )
    assert runs.returncode == 0, runs.stderr[-2000:]
    count, status, revision, version = runs.stdout.split()
    assert (int(count), status, version) == (len(STAGES) + 2, "{'FINISHED'}", "2")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    assert revision == head.stdout.strip()


def test_bad_input_is_one_line_and_no_half_written_out(checkout: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns("workspaces", ".dvc", ".git", "mlruns"))
    edit(folder / "params.yaml", "path: data/starter/*.jsonl", "path: data/none/*.jsonl")
    done = python("-m", "stages.raw_data", cwd=folder)
    assert done.returncode == 1
    assert "raw_data.sources[0].path = 'data/none/*.jsonl': no file matches" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "data/raw").exists()
    assert not list((folder / "data").glob(".raw*"))
