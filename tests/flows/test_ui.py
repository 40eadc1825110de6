"""`make ui` for real: servers, worker and deployment, on free ports, over a toy repository."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest
import yaml

from flows import ui
from tests.loopback import free_port

REPO = Path(__file__).resolve().parents[2]
STAGES = list(yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"])


def wait_until(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 180) -> Any:
    """The first true answer of `what`; a server that is not reached, or too busy (503), is asked again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if answer := what():
                return answer
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                raise
        except httpx.TransportError:
            pass
        assert process.poll() is None, "the servers ended"
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.2)


@pytest.fixture
def servers(checkout: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The running command and the addresses of Prefect's API and of MLflow."""
    shutil.copy(REPO / "prefect.yaml", checkout)
    shutil.copytree(REPO / "flows", checkout / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    prefect, mlflow = free_port(), free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.ui", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(REPO), "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        _read_until(process.stdout, "Ctrl-C ends")
        yield process, f"http://127.0.0.1:{prefect}/api", f"http://127.0.0.1:{mlflow}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def _read_until(lines: IO[str], part: str) -> None:
    read = []
    for line in lines:
        read.append(line)
        if part in line:
            return
    pytest.fail("".join(read))


@pytest.mark.smoke
def test_a_worker_runs_the_deployment_and_cancels_it(
    checkout: Path, servers: tuple[subprocess.Popen[str], str, str]
) -> None:
    process, prefect, mlflow = servers
    assert httpx.get(f"{mlflow}/health").text == "OK"
    deployment = httpx.get(f"{prefect}/deployments/name/reproduce/reproduce").json()
    assert deployment["parameters"] == {"preset": "default"}
    assert deployment["global_concurrency_limit"]["limit"] == 1
    (schedule,) = deployment["schedules"]
    assert schedule["active"] is False
    (step,) = deployment["pull_steps"]
    assert step["prefect.deployments.steps.set_working_directory"]["directory"] == str(checkout)

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = wait_until(
            lambda: httpx.post(f"{prefect}/{path}", json=body).raise_for_status().json(), process
        )
        return answer

    def start(preset: str) -> str:
        return str(post(f"deployments/{deployment['id']}/create_flow_run", {"parameters": {"preset": preset}})["id"])

    def state(run: str, *kinds: str) -> dict[str, Any] | None:
        found: dict[str, Any] = httpx.get(f"{prefect}/flow_runs/{run}").raise_for_status().json()["state"]
        return found if found["type"] in kinds else None

    run = start("tiny")
    ended = wait_until(lambda: state(run, "COMPLETED", "FAILED", "CRASHED"), process)
    assert ended["type"] == "COMPLETED", ended["message"]
    query = {"flow_runs": {"id": {"any_": [run]}}}

    def outcomes() -> dict[str, str]:
        task_runs = httpx.post(f"{prefect}/task_runs/filter", json=query).raise_for_status().json()
        return {one["name"]: one["state_name"] for one in task_runs if one["name"] in STAGES}

    # The server records what became of tasks by and by, and may still be at it when the flow has ended.
    wait_until(lambda: outcomes() == dict.fromkeys(STAGES, "Ran"), process)
    assert (checkout / "workspaces" / "tiny" / "metrics" / "register.json").is_file()

    # Cancelled while a stage runs: the stage's own process ends with it.
    pid = checkout / "pid"
    pipeline = yaml.safe_load((checkout / "dvc.yaml").read_text())
    pipeline["stages"]["base_model"]["cmd"] = f"echo $$ > {pid} && sleep 300; true"
    (checkout / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    run = start("default")
    stage = psutil.Process(int(wait_until(lambda: pid.is_file() and pid.read_text().strip(), process)))
    tree = [stage, *stage.children(recursive=True)]
    post(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    wait_until(lambda: state(run, "CANCELLED"), process)
    assert psutil.wait_procs(tree, timeout=10)[1] == []

    # Ctrl-C, twice as people do: nothing is left.
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=90) == 0
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_taken_port_is_named(checkout: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ui.ServerFailed, match=f"port {port} is in use.*make ui PREFECT_PORT={port + 1}"):
            ui._prefect_server(port)


def test_a_server_that_ends_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = ui.Server("broken", ["this_module_is_not_there"], tmp_path, dict(os.environ))
    with pytest.raises(ui.ServerFailed, match="No module named this_module_is_not_there"):
        server.wait_for(f"http://127.0.0.1:{free_port()}/")
    server.end()
