"""`chatloom verify` and the drawn lineage, on a small workspace in git with a DVC cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from chatloom.registry.graph import draw_lineage, page_of
from chatloom.registry.hashes import dvc_md5
from chatloom.registry.verify import Finding, _check_recorded, _check_sources, _repeat, summarize
from tasks.workspace import DVC


def git(folder: Path, *arguments: str) -> str:
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *me, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Code in git; a model folder that DVC's cache has too."""
    folder = tmp_path_factory.mktemp("verify") / "workspace"
    for name, text in {
        "stages/train.py": "code\n",
        "chatloom/kernels/a.c": "int a;\n",
        "models/m/weights": "w" * 100,
        "models/m/config.json": "{}",
        "data/own.jsonl": "row\n",
        "params.yaml": "a: 1\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "-q")
    (folder / ".gitignore").write_text("/models\n/.dvc\n/data\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    for command in (["init", "--no-scm"], ["add", "models/m"]):
        subprocess.run([*DVC, *command, "-q"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def facts(workspace: Path) -> dict[str, Any]:
    def md5(name: str) -> str:
        found = dvc_md5(workspace / name)
        assert found is not None
        return found

    sha256 = hashlib.sha256(b"row\n").hexdigest()
    deps = {name: md5(name) for name in ("stages/train.py", "chatloom/kernels")}
    return {
        "model": {"path": "models/m", "md5": md5("models/m")},
        "preset": "default",
        "code": {"revision": git(workspace, "rev-parse", "HEAD"), "dirty": "false"},
        "files": {"params.yaml": md5("params.yaml"), "requirements.lock": "none"},
        "sources": [
            {
                "name": "own",
                "from": "data/own.jsonl",
                "license": "MIT",
                "rows_in": 1,
                "rows_out": 1,
                "splits": {"sft": 1},
                "files": [{"file": "data/own.jsonl", "sha256": sha256, "rows_out": 1}],
            }
        ],
        "stages": {
            "raw_data": {"cmd": "x", "deps": {}, "outs": {"data/raw": "ab.dir"}},
            "train": {"cmd": "x", "deps": deps | {"data/raw": "ab.dir"}, "outs": {"models/m": md5("models/m")}},
        },
        "runs": {"train": {"id": "1234567890abcdef", "revision": "fedcba", "machine": {}, "cost": {}}},
    }


def check(recorded: dict[str, Any], workspace: Path) -> dict[str, Finding]:
    recorded["stages"]["raw_data"]["outs"] = {}  # what nothing made cannot be checked here
    recorded["stages"]["train"]["deps"].pop("data/raw", None)
    return {finding.name: finding for finding in _check_recorded(recorded, workspace)}


def test_everything_as_it_was(workspace: Path) -> None:
    found = check(facts(workspace), workspace)
    assert {name: finding.state for name, finding in found.items()} == {
        "models/m": "same",
        "stages/train.py": "same",
        "chatloom/kernels": "same",
        "params.yaml": "same",
    }
    assert summarize(list(found.values())) == "4 the same, 0 the same elsewhere, 0 not as they were"


def test_one_byte_changed_is_found_and_said_where_the_right_one_is(workspace: Path) -> None:
    recorded = facts(workspace)
    weights = workspace / "models/m/weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (workspace / "stages/train.py").write_text("cod3\n")
    (workspace / "chatloom/kernels/a.c").unlink()
    found = check(recorded, workspace)
    assert [found[name].state for name in ("models/m", "stages/train.py", "chatloom/kernels")] == ["elsewhere"] * 3
    assert "changed in the workspace, the right bytes are in DVC's cache" in found["models/m"].detail
    assert f"git {recorded['code']['revision'][:12]}" in found["stages/train.py"].detail
    assert not any(finding.bad for finding in found.values())

    cached = next(
        file
        for file in (workspace / ".dvc/cache/files/md5").rglob("*")
        if file.is_file() and file.stat().st_size == 100
    )
    cached.chmod(0o600)
    cached.write_bytes(b"w" * 99 + b"x")
    found = check(recorded, workspace)
    assert found["models/m"].state == "changed"
    assert found["models/m"].bad
    assert summarize(list(found.values())).startswith("changed: out models/m: was ")


def test_bytes_that_the_workspace_claims_to_have_are_changed_though_the_cache_has_them(workspace: Path) -> None:
    recorded = facts(workspace)
    outs = [{"path": "models/m", "md5": recorded["model"]["md5"]}]
    lock = {"stages": {"train": {"cmd": "x", "outs": outs}}}
    (workspace / "dvc.lock").write_text(json.dumps(lock))
    weights = workspace / "models/m/weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (workspace / "params.yaml").write_text("a: 2\n")
    git(workspace, "commit", "-qam", "other params")
    recorded["code"]["revision"] = git(workspace, "rev-parse", "HEAD")  # which does not have the old ones
    found = check(recorded, workspace)
    assert found["models/m"].state == "changed"
    assert found["models/m"].detail.endswith("dvc checkout --force models/m")
    assert found["params.yaml"].detail == "changed in the workspace, its values are in the lineage"
    assert not found["params.yaml"].bad


def test_what_is_gone_is_missing(workspace: Path) -> None:
    recorded = facts(workspace)
    for file in (workspace / "models/m").iterdir():
        file.unlink()
    (workspace / "models/m").rmdir()
    (workspace / ".dvc/cache").rename(workspace / ".dvc/lost")
    assert check(recorded, workspace)["models/m"].state == "missing"


def test_sources(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = facts(workspace)
    assert [finding.state for finding in _check_sources(recorded, workspace)] == ["same"]
    (workspace / "data/own.jsonl").write_text("r0w\n")
    (found,) = _check_sources(recorded, workspace)
    assert (found.state, found.name, found.bad) == ("changed", "own: data/own.jsonl", True)
    recorded["sources"][0]["files"][0]["file"] = "gone.jsonl"
    assert [finding.state for finding in _check_sources(recorded, workspace)] == ["missing"]
    recorded["sources"][0]["files"] = []
    assert [finding.state for finding in _check_sources(recorded, workspace)] == ["unknown"]


def test_runs_of_equal_inputs_that_made_different_bytes() -> None:
    first = {"out/models/m": "aa", "out/metrics/m.json": "cc", "machine": json.dumps({"cpu": "x", "cores": 2})}
    assert _repeat("train", {"1": first, "2": dict(first)}).state == "same"
    found = _repeat("train", {"1": first, "2": first | {"out/models/m": "bb"}})
    assert (found.state, found.name, found.bad) == ("unrepeatable", "train", True)
    assert "2 runs of equal inputs, on one kind of machine, made different bytes: models/m: aa (run 1), bb (run 2)" in (
        found.detail
    )
    other = first | {"out/models/m": "bb", "machine": json.dumps({"cpu": "y", "cores": 2})}
    assert "on machines of different kinds" in _repeat("train", {"1": first, "2": other}).detail


def test_the_graph_has_every_stage_once_and_nothing_from_elsewhere(workspace: Path) -> None:
    recorded = facts(workspace)
    recorded["sources"][0]["name"] = "<own & others>"
    svg = draw_lineage("models:/chat/1 @champion", recorded)
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in ("sources", "raw_data", "train", "version")] == [
        "sources",
        "raw_data",
        "train",
        "version",
    ]
    assert "<own & others>: 1 rows, MIT" in texts
    assert "run 1234567890ab, git fedcba" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == 3, "sources, raw_data, train, version in a row"
    page = page_of("a <b>", svg)
    assert "<title>a &lt;b&gt;</title>" in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 0
