"""The flow on a real Prefect server, over a toy repository with the project's own graph."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import TaskRunSort

from flows import pipeline
from flows.pipeline import reproduce
from tasks.dvc import dependencies

REPO = Path(__file__).resolve().parents[2]
STAGES = list(yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"])


def real_server(test: Callable[..., None]) -> Callable[..., None]:
    return cast(Callable[..., None], pytest.mark.smoke(pytest.mark.usefixtures("prefect_server")(test)))


def test_the_body_of_the_flow_is_dvcs_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage once, after all that it needs, with exactly those as its arguments."""
    seen: dict[str, set[str]] = {}

    class Recorder:
        outcomes: ClassVar[dict[str, str]] = {}

        def __init__(self, _: Any) -> None:
            pass

        def __call__(self, name: str, *after: str) -> str:
            assert name not in seen
            assert set(after) <= set(seen)
            seen[name] = set(after)
            return name

    monkeypatch.setattr(pipeline, "_Walk", Recorder)
    monkeypatch.chdir(REPO)
    reproduce.fn("default")
    assert seen == {name: set(needed) for name, needed in dependencies(REPO).items()}


def run(preset: str = "default", *, stages: int = len(STAGES)) -> tuple[Any, FlowRun, list[TaskRun]]:
    """Run the flow here; its last state, its run, and the runs of its `stages` stages by their start."""
    state = reproduce(preset, return_state=True)
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(state.state_details.flow_run_id)
        only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        deadline = time.monotonic() + 60
        while True:  # the server writes down states of tasks some time after it was told
            found = client.read_task_runs(flow_run_filter=only, sort=TaskRunSort.EXPECTED_START_TIME_ASC)
            of_stages = [task_run for task_run in found if task_run.name != "dvc status"]
            if len(of_stages) == stages and all(one.state and one.state.is_final() for one in of_stages):
                return state, flow_run, of_stages
            assert time.monotonic() < deadline, states(of_stages)
            time.sleep(0.1)


def states(task_runs: list[TaskRun]) -> dict[str, str]:
    return {task_run.name: task_run.state_name or "" for task_run in task_runs}


def logged(flow_run: FlowRun) -> set[str]:
    """What the server has of the run's log once it has its end, which comes in batches."""
    only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while True:
            lines = {line.message for line in client.read_logs(only, limit=200)}
            if "this is register" in lines:
                return lines
            assert time.monotonic() < deadline, lines
            time.sleep(0.1)


def upstream(task_run: TaskRun, names: dict[Any, str]) -> set[str]:
    """Stages that a task run waited for."""
    return {
        names[one.id] for inputs in task_run.task_inputs.values() for one in inputs if getattr(one, "id", 0) in names
    }


@real_server
def test_the_flow_is_dvcs_graph_and_tells_what_was_done(checkout: Path) -> None:
    state, flow_run, task_runs = run()
    assert state.is_completed(), state.message
    assert flow_run.name == "reproduce-default"
    assert state.result() == dict.fromkeys(STAGES, "ran")
    assert states(task_runs) == dict.fromkeys(STAGES, "Ran")

    needs = dependencies(checkout)
    names = {task_run.id: task_run.name for task_run in task_runs}
    assert {task_run.name: upstream(task_run, names) for task_run in task_runs} == {
        name: set(needed) for name, needed in needs.items()
    }
    ended: set[str] = set()
    for task_run in task_runs:  # in the order of their start
        assert set(needs[task_run.name]) <= ended
        ended.add(task_run.name)

    assert "this is train_ppo" in logged(flow_run)

    _, _, again = run()
    assert states(again) == dict.fromkeys(STAGES, "Unchanged")

    # A change of code in one place.
    (checkout / "stages" / "quantize.py").write_text("changed\n")
    _, _, after = run()
    ran = {name for name, name_of_state in states(after).items() if name_of_state == "Ran"}
    assert ran == {"quantize", "evaluate", "register"}
    assert set(states(after).values()) == {"Ran", "Unchanged"}


@real_server
def test_a_failing_stage_ends_the_flow_with_its_last_lines(checkout: Path) -> None:
    pipeline = yaml.safe_load((checkout / "dvc.yaml").read_text())
    pipeline["stages"]["raw_data"]["cmd"] = "echo raw_data: no such file >&2; exit 1"
    (checkout / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    state, _, task_runs = run(stages=2)
    assert state.is_failed()
    assert "raw_data: no such file" in state.message
    assert states(task_runs) == {"base_model": "Ran", "raw_data": "Failed"}


@real_server
def test_a_wrong_preset_fails_and_lists_the_right_ones(checkout: Path) -> None:
    state, _, task_runs = run("tinny", stages=0)
    assert state.is_failed()
    assert "preset 'tinny' is none of default, tiny; did you mean 'tiny'?" in state.message
    assert task_runs == []


def test_the_command_refuses_a_wrong_preset_before_it_starts_anything(checkout: Path) -> None:
    command = [sys.executable, "-m", "flows.pipeline", "--preset", "tinny"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == "preset 'tinny' is none of default, tiny; did you mean 'tiny'?\n"
    assert "Traceback" not in done.stderr
