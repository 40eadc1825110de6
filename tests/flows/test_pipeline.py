"""The flow on a real Prefect server, over a toy repository with the project's own graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast, get_args

import psutil
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from toy_pipeline import wait_for

from flows import walk
from flows.parameters import ParameterSet, Stage
from flows.pipeline import evaluate_only, reproduce, walk_dag
from flows.sweep import sweep
from tasks.dvc import dependencies
from tasks.slots import ensure_slots, slot_of
from tasks.workspace import DVC, Reproduction
from tests.loopback import is_over, poll

REPO = Path(__file__).resolve().parents[2]
STAGES = list(yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"])


def real_server(test: Callable[..., None]) -> Callable[..., None]:
    return cast(Callable[..., None], pytest.mark.smoke(pytest.mark.usefixtures("prefect_server")(test)))


def test_the_body_of_the_flow_is_dvcs_graph() -> None:
    """Every stage once, after all that it needs, with exactly those as its arguments."""
    seen: dict[str, set[str]] = {}

    def record(name: str, *after: Any) -> Any:
        assert name not in seen
        assert set(after) <= set(seen)
        seen[name] = set(after)
        return name

    walk_dag(record)
    assert seen == {name: set(needed) for name, needed in dependencies(REPO).items()}


def test_the_form_offers_every_stage() -> None:
    assert list(get_args(Stage)) == STAGES


def run(
    preset: str = "default", *, stages: int = len(STAGES), called: Any = reproduce, **parameters: Any
) -> tuple[Any, FlowRun, list[TaskRun]]:
    """Run the flow here; its last state, its run, and the runs of its `stages` stages by their start."""
    state = called(preset, **parameters, return_state=True)
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(state.state_details.flow_run_id)
        only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))

        def of_stages() -> list[TaskRun]:
            found = client.read_task_runs(flow_run_filter=only, sort=TaskRunSort.EXPECTED_START_TIME_ASC)
            return [task_run for task_run in found if task_run.name != "dvc status"]

        def written_down() -> bool:
            """The server has states of tasks some time after it was told."""
            known = of_stages()
            return len(known) == stages and all(one.state and one.state.is_final() for one in known)

        poll(written_down, seconds=60, pause=0.1)
        return state, flow_run, of_stages()


def states(task_runs: list[TaskRun]) -> dict[str, str]:
    return {task_run.name: task_run.state_name or "" for task_run in task_runs}


def logged(flow_run: FlowRun) -> set[str]:
    """What the server has of the run's log once it has its end, which comes in batches."""
    only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))
    with get_client(sync_client=True) as client:

        def lines() -> set[str]:
            return {line.message for line in client.read_logs(only, limit=200)}

        poll(lambda: "this is register" in lines(), seconds=60, pause=0.1)
        return lines()


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

    with get_client(sync_client=True) as client:
        found = client.read_latest_artifacts()
    tables = {one.key: json.loads(cast(str, one.data)) for one in found if one.type == "table"}
    assert [(row["stage"], row["outcome"]) for row in tables["stages-default"]] == [
        (name, "ran" if name in ran else "unchanged") for name in STAGES
    ]
    metrics = {row["metric"]: row for row in tables["metrics-default"]}
    assert metrics["base_model/checksum"]["change"] == "+0"
    assert metrics["quantize/checksum"]["change"] not in ("", "+0")


@real_server
def test_a_part_of_the_dag_runs_alone_and_never_on_stale_inputs(reproduced: Path) -> None:
    (reproduced / "stages" / "register.py").write_text("changed\n")
    state, _, task_runs = run(from_stage="evaluate", stages=2)
    assert state.is_completed(), state.message
    assert states(task_runs) == {"evaluate": "Unchanged", "register": "Ran"}
    _, _, task_runs = run(called=evaluate_only, force=True, stages=1)
    assert states(task_runs) == {"evaluate": "Ran"}
    (reproduced / "stages" / "quantize.py").write_text("changed\n")
    for parameters in ({"from_stage": "evaluate"}, {"called": evaluate_only}):
        state, _, _ = run(**parameters, stages=0)  # type: ignore[arg-type]
        assert state.is_failed()
        assert "quantize changed and would not run: reproduce the whole DAG first" in state.message


@real_server
def test_what_may_pass_is_tried_again_and_nothing_else(reproduced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry is down at the first try; the second one finds what the first one left."""
    monkeypatch.setattr(walk, "run_stage", walk.run_stage.with_options(retry_delay_seconds=0))
    pipeline = yaml.safe_load((reproduced / "dvc.yaml").read_text())
    down = "if ! test -e tries; then echo x > tries; exit 75; fi"
    pipeline["stages"]["register"]["cmd"] = f"{down}; {pipeline['stages']['register']['cmd']}"
    (reproduced / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    state, _, task_runs = run()
    assert state.is_completed(), state.message
    assert {one.name: one.run_count for one in task_runs} == {name: 1 + (name == "register") for name in STAGES}


@real_server
def test_a_slot_is_taken_strictly(reproduced: Path) -> None:
    reproduction = Reproduction.start("default", reproduced)
    with get_client(sync_client=True) as client:
        for name in ("gpu", "cpu-train"):
            with suppress(ObjectNotFound):
                client.delete_global_concurrency_limit_by_name(name)
        with pytest.raises(ConcurrencySlotAcquisitionError), slot_of("train_sft", reproduction, print):
            pytest.fail("no limit, no slot")
        ensure_slots()
        ensure_slots()
        with slot_of("train_sft", reproduction, print), slot_of("raw_data", reproduction, print):
            assert client.read_global_concurrency_limit_by_name("cpu-train").active_slots == 1
        assert client.read_global_concurrency_limit_by_name("cpu-train").active_slots == 0


@real_server
def test_a_flow_that_was_killed_is_noticed_and_cleaned_up_after(reproduced: Path) -> None:
    """SIGKILL of the flow's process, as of a worker with all below it; its stage is in a session of its own.

    A stage without a slot: that of one who was killed is free only when its lease ends, after minutes.
    """
    pipeline = yaml.safe_load((reproduced / "dvc.yaml").read_text())
    command = pipeline["stages"]["raw_data"]["cmd"]
    trains = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (open('state', 'w').close(), sys.exit(1)))"
    pipeline["stages"]["raw_data"]["cmd"] = (
        f"test -e state || {sys.executable} -c \"{trains}; open('ready', 'w').close(); signal.pause()\" && {command}"
    )
    (reproduced / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PREFECT_API_URL": cast(str, PREFECT_API_URL.value())}
    killed = subprocess.Popen([sys.executable, "-m", "flows.pipeline"], cwd=reproduced, env=environment)
    wait_for(reproduced / "ready", killed)
    (dvc,) = (one for one in psutil.Process(killed.pid).children() if "dvc" in one.cmdline())
    killed.kill()
    killed.wait()
    assert dvc.is_running(), "the stage is an orphan"

    state, _, task_runs = run()
    assert state.is_completed(), state.message
    assert is_over(dvc.pid)
    assert (reproduced / "state").exists(), "the stage was asked, and saved its state"
    assert states(task_runs)["raw_data"] == "Ran"
    assert json.loads((reproduced / ".dvc/tmp/rwlock").read_text()) == {}
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(limit=2, sort=FlowRunSort.START_TIME_DESC)
    assert [one.state_name for one in runs] == ["Completed", "Crashed"]


@real_server
def test_a_sweep_makes_experiments_and_compares_them(reproduced: Path) -> None:
    pipeline = yaml.safe_load((reproduced / "dvc.yaml").read_text())
    read_rows = "import json, yaml; rows = yaml.safe_load(open('params.yaml'))['raw_data']['shard_rows']; json.dump"
    count = f"{sys.executable} -c \"{read_rows}({{'rows': rows}}, open('metrics/raw_data.json', 'w'))\""
    pipeline["stages"]["raw_data"]["cmd"] += f" && {count} && ! grep 3 metrics/raw_data.json"
    (reproduced / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    (reproduced / "data" / "own" / "rows.jsonl").write_text("not tracked\n")
    before = subprocess.run(
        ["git", "status", "--short"], cwd=reproduced, capture_output=True, text=True, check=True
    ).stdout
    sets = [
        ParameterSet(name="one", overrides=["raw_data.shard_rows=1"]),
        ParameterSet(name="fails", overrides=["raw_data.shard_rows=3"]),
    ]
    state = sweep([*sets, ParameterSet(name="wrong", overrides=["raw_data.shard_row=1"])], return_state=True)
    assert "raw_data.shard_row: unknown key; did you mean 'shard_rows'" in state.message
    assert not (reproduced / "workspaces").exists()
    state = sweep(sets, return_state=True)
    assert state.is_failed()
    assert state.message == "fails of 2 experiments did not end well"
    with get_client(sync_client=True) as client:
        (table,) = (one for one in client.read_latest_artifacts() if one.key == "sweep")
    rows = {row[""]: row for row in json.loads(cast(str, table.data))}
    assert rows["outcome"] == {"": "outcome", "one": "Completed", "fails": "Failed"}
    assert rows["raw_data/rows"] == {"": "raw_data/rows", "one": "1", "fails": "3"}
    assert not any(name.startswith("register/") for name in rows)

    show = subprocess.run(
        [*DVC, "exp", "show", "--json"],
        cwd=reproduced,
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"one"' in show.stdout
    assert '"fails"' not in show.stdout
    after = subprocess.run(
        ["git", "status", "--short"], cwd=reproduced, capture_output=True, text=True, check=True
    ).stdout
    assert after == before, "the checkout is as it was"
    # Experiments are made without a name; who applies one has to have told git theirs.
    for key in ("user.name", "user.email"):
        subprocess.run(["git", "config", key, "somebody"], cwd=reproduced, check=True)
    command = [*DVC, "exp", "apply", "one"]
    applied = subprocess.run(command, cwd=reproduced, check=False, capture_output=True, text=True)
    assert "metrics/register.json" in applied.stderr, "DVC misses what no experiment makes"
    assert "metrics/evaluate.json" not in applied.stderr
    assert yaml.safe_load((reproduced / "params.yaml").read_text())["raw_data"]["shard_rows"] == 1
    assert json.loads((reproduced / "metrics" / "raw_data.json").read_text()) == {"rows": 1}


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
