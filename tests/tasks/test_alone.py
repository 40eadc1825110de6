"""One reproduction at a time in a workspace, and what a killed one leaves, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from toy_pipeline import wait_for

from tasks.alone import LOCK, alone_in, end_survivors
from tests.loopback import poll

REPO = Path(__file__).resolve().parents[2]
# As a flow is: it holds the workspace, and its stage is in a session of its own.
HOLDS = """
import os, subprocess, sys
from pathlib import Path
from tasks.alone import alone_in
with alone_in(Path.cwd(), print) as record:
    print("earlier", record({"reproduction": sys.argv[1]}), flush=True)
    stage = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "CHATLOOM_REPRODUCTION": sys.argv[1]},
    )
    print(stage.pid, flush=True)
    sys.stdin.readline()
    stage.communicate()
"""


def hold(folder: Path, id: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDS, id],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def release(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.wait(timeout=30) == 0


def test_a_second_one_waits_for_the_first_and_finds_nothing_of_it(tmp_path: Path) -> None:
    first = hold(tmp_path, "a")
    assert read_line(first) == "earlier {}"
    read_line(first)
    second = hold(tmp_path, "b")
    try:
        assert read_line(second).startswith("waits: reproduction a is at work in ")
        release(first)
        assert read_line(second) == "goes on: the workspace is free"
        assert read_line(second) == "earlier {}"
        release(second)
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def test_what_a_killed_one_left_is_known_and_ended(tmp_path: Path) -> None:
    killed = hold(tmp_path, "a")
    read_line(killed)
    stage = psutil.Process(int(read_line(killed)))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    said: list[str] = []
    with alone_in(tmp_path, said.append) as record:
        assert record({"reproduction": "b"}) == {"reproduction": "a"}
        # Of the whole flow nothing was left but its stage, if the pipe did not end it before us.
        assert psutil.wait_procs([stage], timeout=10)[1] == []
        assert json.loads((tmp_path / LOCK).read_text()) == {"reproduction": "b"}
    assert (tmp_path / LOCK).read_text() == ""


@pytest.fixture
def survivor() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["bash", "-c", "sleep 300 & sleep 300; true"],
        env={**os.environ, "CHATLOOM_REPRODUCTION": "killed-one"},
        start_new_session=True,
    )


def test_survivors_are_ended_with_their_children_and_nobody_else(survivor: subprocess.Popen[bytes]) -> None:
    other = subprocess.Popen(["sleep", "300"], env={**os.environ, "CHATLOOM_REPRODUCTION": "other"})
    try:
        top = psutil.Process(survivor.pid)
        poll(lambda: len(top.children()) == 2)
        tree = [top, *top.children()]
        said: list[str] = []
        end_survivors("killed-one", said.append)
        assert psutil.wait_procs(tree, timeout=10)[1] == []
        assert len(said) == 1
        assert f"its process {survivor.pid} was not" in said[0]
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_torn_record_is_none(tmp_path: Path) -> None:
    (tmp_path / LOCK).parent.mkdir()
    (tmp_path / LOCK).write_text('{"reprod')
    with alone_in(tmp_path, print) as record:
        assert record({"reproduction": "a"}) == {}


def test_plain_dvc_holds_the_workspace_as_long_as_it_runs(checkout: Path) -> None:
    """`tasks.reproduce` becomes DVC, which keeps the lock until it ends; its stages do not."""
    import yaml

    pipeline = yaml.safe_load((checkout / "dvc.yaml").read_text())
    go = checkout / "go"
    waits = f"touch {checkout}/ready; for i in $(seq 3000); do test -e {go} && break; sleep 0.02; done"
    pipeline["stages"]["one"]["cmd"] = f"{waits}; mkdir -p out && touch out/one.txt"
    (checkout / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    command = [sys.executable, "-m", "tasks.reproduce", "--stage", "one"]
    first = subprocess.Popen(command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(REPO)})
    second = None
    try:
        wait_for(checkout / "ready", first)
        second = subprocess.Popen(
            command,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        assert second.stderr.readline().startswith("waits: reproduction ")
        go.touch()
        assert first.wait(timeout=60) == 0
        assert second.wait(timeout=60) == 0
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
