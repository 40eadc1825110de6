"""Toy checkouts for tests: a git and DVC repository whose stages are shell commands that take no time."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.loopback import poll

ROOT = Path(__file__).resolve().parents[2]
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")


def real_graph() -> dict[str, Any]:
    """The project's own stages, each with a command that writes the checksum of its deps to every out.

    Params are not in it: what a stage reads of them is up to a test.
    """
    pipeline: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    for name, stage in pipeline["stages"].items():
        outs = [*stage.get("outs", []), *stage["metrics"]]
        stage["cmd"] = " && ".join([f"echo this is {name}", *(_write(out, stage["deps"]) for out in outs)])
    return pipeline


def chain(**commands: str) -> dict[str, Any]:
    """Stages of given commands in a row: each depends on the file named after the one before, and writes its own."""
    stages: dict[str, Any] = {}
    before = "input.txt"
    for name, command in commands.items():
        stages[name] = {"cmd": command, "deps": [before], "outs": [f"out/{name}.txt"]}
        before = f"out/{name}.txt"
    return {"stages": stages}


def make_checkout(root: Path, pipeline: dict[str, Any]) -> Path:
    """A checkout with that `dvc.yaml`, the project's params and settings, and a file for each dep no stage makes."""
    root.mkdir(parents=True)
    for name in ("params.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(
        ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "remote", "config.local")
    )
    (root / ".gitignore").open("a").write("/out/\n")
    (root / "params").mkdir()
    (root / "params" / "tiny.yaml").write_text("train_sft: {seed: 7}\n")
    (root / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    made = {out for stage in pipeline["stages"].values() for out in (*stage.get("outs", []), *stage.get("metrics", []))}
    for dep in sorted({dep for stage in pipeline["stages"].values() for dep in stage["deps"]} - made):
        file = root / dep if "." in dep else root / dep / "file.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{dep}\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "toy"]):
        subprocess.run([*GIT, *command], cwd=root, check=True)
    return root


def wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when a process, which has to live, has made `file`."""

    def made() -> bool:
        assert process.poll() is None, "the process ended"
        return file.exists()

    poll(made, seconds=120)


def _write(out: str, deps: list[str]) -> str:
    file = out if "." in Path(out).name else f"{out}/file.txt"
    summed = f"find -L {shlex.join(deps)} -type f | sort | xargs cat | cksum"
    if file.endswith(".json"):
        summed += """ | awk '{print "{\\"checksum\\": " $1 "}"}'"""
    return f"mkdir -p {Path(file).parent} && {summed} > {file}"
