"""What Prefect learns from DVC, on real toy repositories; the functions below the tasks."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from toy_pipeline import wait_for

from tasks.dvc import (
    StageFailed,
    StageUnavailable,
    changed_stages,
    dependencies,
    downstream,
    reproduce_stage,
    upstream,
)
from tasks.processes import end_tree
from tasks.workspace import DVC, Reproduction

log = logging.getLogger("test")


@pytest.fixture
def reproduction(checkout: Path) -> Reproduction:
    return Reproduction.start("default", checkout)


def walk(reproduction: Reproduction) -> dict[str, str]:
    return {name: reproduce_stage(name, reproduction, log.info) for name in ("one", "two", "three")}


def set_command(checkout: Path, stage: str, command: str) -> None:
    pipeline = yaml.safe_load((checkout / "dvc.yaml").read_text())
    pipeline["stages"][stage]["cmd"] = command
    (checkout / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))


def test_the_graph_is_that_of_dvc(checkout: Path, tmp_path: Path) -> None:
    # Named alike from wherever we look: the current folder is not the repository's.
    assert Path.cwd() != checkout
    assert dependencies(checkout) == {"one": [], "two": ["one"], "three": ["two"]}


def test_downstream_reaches_through_the_graph() -> None:
    needs = {"a": [], "b": ["a"], "c": ["b"], "d": ["a", "c"], "e": []}
    assert downstream({"b"}, needs) == {"b", "c", "d"}
    assert downstream(set(), needs) == set()
    assert upstream({"c"}, needs) == {"a", "b", "c"}


def test_outcomes_follow_the_work(checkout: Path, reproduction: Reproduction) -> None:
    assert changed_stages(reproduction) == {"one", "two", "three"}
    assert walk(reproduction) == {"one": "ran", "two": "ran", "three": "ran"}
    assert changed_stages(reproduction) == set()
    assert walk(reproduction) == {"one": "unchanged", "two": "unchanged", "three": "unchanged"}

    (checkout / "input.txt").write_text("input.txt\nand a second line\n")
    # Whether `three` has work to do shows only after `two` has run: it is asked, and has none.
    assert changed_stages(reproduction) == {"one", "two", "three"}
    assert walk(reproduction) == {"one": "ran", "two": "ran", "three": "unchanged"}

    (checkout / "input.txt").write_text("input.txt\n")
    assert walk(reproduction) == {"one": "cached", "two": "cached", "three": "unchanged"}


def test_a_change_in_a_workspace_is_named_as_in_the_checkout(checkout: Path) -> None:
    reproduction = Reproduction.start("tiny", checkout)
    walk(reproduction)
    (checkout / "input.txt").write_text("changed\n")
    assert changed_stages(Reproduction.start("tiny", checkout)) == {"one", "two", "three"}


def test_lines_come_live_and_stderr_with_them(
    checkout: Path, reproduction: Reproduction, caplog: pytest.LogCaptureFixture
) -> None:
    # The stage waits for the file that is made when its first line arrives.
    flag = checkout / "flag"
    wait = f"for i in $(seq 500); do test -e {flag} && break; sleep 0.02; done; test -e {flag}"
    set_command(checkout, "one", f"echo ready; {wait} && echo to stderr >&2 && mkdir -p out && touch out/one.txt")

    class Touch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == "ready":
                flag.touch()

    logger = logging.getLogger("live")
    logger.addHandler(Touch())
    with caplog.at_level(logging.INFO):
        assert reproduce_stage("one", reproduction, logger.info) == "ran"
    assert "to stderr" in caplog.messages


def test_a_stage_that_imitates_dvc_does_not_mislead(checkout: Path, reproduction: Reproduction) -> None:
    set_command(checkout, "one", "echo \"Stage 'one' didn't change, skipping\" && mkdir -p out && touch out/one.txt")
    assert reproduce_stage("one", reproduction, log.info) == "ran"


def test_a_long_line_is_cut(checkout: Path, reproduction: Reproduction, caplog: pytest.LogCaptureFixture) -> None:
    set_command(checkout, "one", "head -c 100000 /dev/zero | tr '\\0' x && echo && mkdir -p out && touch out/one.txt")
    with caplog.at_level(logging.INFO):
        reproduce_stage("one", reproduction, log.info)
    assert max(map(len, caplog.messages)) < 5000
    assert sum("(100000 characters)" in line for line in caplog.messages) == 1


def test_a_failure_ends_with_the_last_lines(checkout: Path, reproduction: Reproduction) -> None:
    set_command(checkout, "one", "seq 100 && echo train_sft: lr = 0 is too small >&2 && exit 3")
    with pytest.raises(StageFailed, match=r"stage one in .* ended with status 255") as failed:
        reproduce_stage("one", reproduction, log.info)
    message = str(failed.value)
    assert "train_sft: lr = 0 is too small" in message
    assert "exited with 3" in message
    assert "\n80\n" not in message


def test_a_status_that_says_try_again_is_told_from_others(checkout: Path, reproduction: Reproduction) -> None:
    set_command(checkout, "one", "exit 75")
    with pytest.raises(StageUnavailable, match="exited with 75"):
        reproduce_stage("one", reproduction, log.info)
    set_command(checkout, "one", "echo exited with 75 && exit 1")
    with pytest.raises(StageFailed) as failed:
        reproduce_stage("one", reproduction, log.info)
    assert type(failed.value) is StageFailed


def test_a_stage_that_somebody_else_runs_is_worth_another_try(checkout: Path, reproduction: Reproduction) -> None:
    set_command(checkout, "one", f"touch {checkout}/ready && sleep 300; true")
    other = subprocess.Popen([*DVC, "repro", "one"], cwd=checkout, env=reproduction.environment())
    try:
        wait_for(checkout / "ready", other)
        with pytest.raises(StageUnavailable):
            reproduce_stage("one", reproduction, log.info)
        with pytest.raises(StageUnavailable):
            changed_stages(reproduction)
    finally:
        end_tree(other.pid, seconds=5)
        other.wait()


def test_a_stage_is_run_by_force(reproduction: Reproduction) -> None:
    walk(reproduction)
    assert reproduce_stage("one", reproduction, log.info, force=True) == "ran"


def test_a_broken_pipeline_says_so(checkout: Path, reproduction: Reproduction) -> None:
    (checkout / "dvc.yaml").write_text("stages: [\n")
    with pytest.raises(StageFailed, match=r"dvc status in .* ended with status"):
        changed_stages(reproduction)


RANK = """
import signal, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: Path("rank asked").open("a").write("x"))
Path("ready").touch()
while not Path("step is over").exists():
    time.sleep(0.02)
Path("saved").touch()
"""
# As the launcher of a stage in several processes does, which passes on what it is told.
TRAINS = f"""
import signal, subprocess, sys
from pathlib import Path
def asked(*_):
    Path("asked").open("a").write("x")
    rank.terminate()
signal.signal(signal.SIGTERM, asked)
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}], start_new_session=True)
rank.wait()
raise SystemExit(143)
"""
RUNS = """
import logging, signal, sys
from pathlib import Path
from tasks.dvc import reproduce_stage
from tasks.workspace import Reproduction
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
reproduce_stage("one", Reproduction.start("default", Path.cwd()), logging.getLogger().info)
"""


@pytest.mark.parametrize("way", ["alone", "group", "twice"])
def test_a_stage_is_told_once_to_stop_and_outlives_nobody(way: str, checkout: Path) -> None:
    """SIGTERM to the runner alone, to its group as Prefect's worker sends it, and twice: then nobody waits any more."""
    (checkout / "trains.py").write_text(TRAINS)
    set_command(checkout, "one", f"{sys.executable} trains.py; exit $?")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", RUNS]
    runner = subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True)
    wait_for(checkout / "ready", runner)
    tree = psutil.Process(runner.pid).children(recursive=True)
    assert len(tree) >= 4, "DVC, a shell, the stage and its rank"
    if way == "group":
        os.killpg(runner.pid, signal.SIGTERM)
    else:
        runner.terminate()
    wait_for(checkout / "asked", runner)
    if way == "twice":
        runner.terminate()
    else:
        (checkout / "step is over").touch()
    assert runner.wait(timeout=60) == 1
    assert psutil.wait_procs(tree, timeout=10)[1] == []
    assert (checkout / "asked").read_text() == "x"
    assert (checkout / "saved").exists() == (way != "twice")
    if way != "twice":
        assert (checkout / "rank asked").read_text() == "x"
        assert json.loads((checkout / ".dvc/tmp/rwlock").read_text()) == {}, "DVC freed its locks"


def test_a_whole_tree_ends() -> None:
    shell = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; sleep 300 & sleep 300 & echo up; wait"], stdout=subprocess.PIPE
    )
    assert shell.stdout is not None
    shell.stdout.readline()
    tree = psutil.Process(shell.pid).children(recursive=True)
    assert len(tree) == 2
    end_tree(shell.pid, seconds=0.5)
    shell.wait(timeout=10)
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert alive == []
