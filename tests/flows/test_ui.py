"""`make ui` for real: servers, worker and deployment, on free ports, over a toy repository."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import mlflow
import psutil
import pytest
import yaml

from chatloom.registry.register import AGENT
from chatloom.registry.resolve import ARTIFACT
from flows import ui
from tasks.servers import Server, ServerFailed
from tests.loopback import free_port, poll

REPO = Path(__file__).resolve().parents[2]
STAGES = list(yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"])


def wait_until(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 180) -> Any:
    """The first true answer of `what`; a server that is not reached, or too busy (503), is asked again."""

    def ask() -> Any:
        assert process.poll() is None, "the servers ended"
        try:
            return what()
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                raise
        except httpx.TransportError:
            return None

    return poll(ask, seconds, pause=0.2)


@dataclass(frozen=True)
class Team:
    """`make ui` over a checkout whose stages take no time; the tests below use it one after the other."""

    checkout: Path
    process: subprocess.Popen[str]
    prefect: str
    mlflow: str

    def get(self, path: str) -> Any:
        return wait_until(lambda: httpx.get(f"{self.prefect}/api/{path}").raise_for_status().json(), self.process)

    def ask(self, path: str, body: dict[str, Any], *, method: str = "POST") -> Any:
        answer: httpx.Response = wait_until(
            lambda: httpx.request(method, f"{self.prefect}/api/{path}", json=body).raise_for_status(), self.process
        )
        return answer.json() if answer.content else None

    def start(self, deployment: str, **parameters: Any) -> str:
        found = self.get(f"deployments/name/{deployment}")
        return str(self.ask(f"deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"])

    def state(self, run: str, *names: str) -> dict[str, Any]:
        """The state of a flow run once its name is one of `names`."""

        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = self.get(f"flow_runs/{run}")["state"]
            assert found["name"] in names or found["type"] not in ("FAILED", "CRASHED"), found
            return found if found["name"] in names else None

        state: dict[str, Any] = wait_until(look, self.process)
        return state

    def cancel(self, run: str) -> None:
        self.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
        self.state(run, "Cancelled")

    def runs(self, flow: str, *states: str) -> list[dict[str, Any]]:
        query = {"flows": {"name": {"any_": [flow]}}, "flow_runs": {"state": {"name": {"any_": states}}}}
        found: list[dict[str, Any]] = self.ask("flow_runs/filter", query)
        return found

    def outcomes(self) -> dict[str, str]:
        """Of the stages in the latest run that has any."""
        query = {"flow_runs": {"name": {"like_": "reproduce-"}}, "sort": "EXPECTED_START_TIME_ASC"}
        return {one["name"]: one["state_name"] for one in self.ask("task_runs/filter", query) if one["name"] in STAGES}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    from toy_pipeline import make_checkout, real_graph

    folder = tmp_path_factory.mktemp("team")
    checkout = make_checkout(folder / "checkout", real_graph())
    shutil.copy(REPO / "prefect.yaml", checkout)
    shutil.copytree(REPO / "flows", checkout / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    prefect, mlflow = free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CHATLOOM_", "MLFLOW_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.ui", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)],
        cwd=checkout,
        env={**environment, "PYTHONPATH": str(REPO), "PREFECT_HOME": str(folder / "prefect"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        _read_until(process.stdout, "Ctrl-C, or make down")
        yield Team(checkout, process, f"http://127.0.0.1:{prefect}", f"http://127.0.0.1:{mlflow}")
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
def test_a_run_is_cancelled_and_dvc_stays_clean(team: Team) -> None:
    assert httpx.get(f"{team.mlflow}/health").text == "OK"
    deployment = team.get("deployments/name/reproduce/reproduce")
    assert deployment["parameters"] == {"preset": "default"}
    (step,) = deployment["pull_steps"]
    assert step["prefect.deployments.steps.set_working_directory"]["directory"] == str(team.checkout)

    pid, file = team.checkout / "pid", team.checkout / "dvc.yaml"
    before = file.read_text()
    pipeline = yaml.safe_load(before)
    pipeline["stages"]["base_model"]["cmd"] = f"echo $$ > {pid} && sleep 300; true"
    file.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    run = team.start("reproduce/reproduce", preset="default")
    stage = psutil.Process(int(wait_until(lambda: pid.is_file() and pid.read_text().strip(), team.process)))
    tree = [stage, *stage.children(recursive=True)]
    team.cancel(run)
    assert psutil.wait_procs(tree, timeout=10)[1] == []
    assert json.loads((team.checkout / ".dvc/tmp/rwlock").read_text()) == {}, "DVC freed its locks"
    file.write_text(before)


# In place of the stage: a version of the same bytes, whose gates hold.
REGISTERS = """
import json, sys
from pathlib import Path
import mlflow
gates = [{"metric": "ppo/kl", "value": 12.0, "bound": "<= 40", "verdict": "pass", "blocks": True, "note": ""}]
tags = {"status": "accepted", "champion.compared_with": "1", "gates": json.dumps(gates)}
version = mlflow.MlflowClient().create_model_version("chatloom", source=sys.argv[1], tags=tags).version
Path("metrics/register.json").write_text(json.dumps({"version": int(version), "champion": 0.0}))
"""


@pytest.fixture
def champion(team: Team, checkpoint: Path) -> mlflow.MlflowClient:
    """The registry of the checkout, whose stage `register` makes versions beside a first one, @champion."""
    files = team.checkout / "mlartifacts" / "chatloom"
    mlflow.pyfunc.save_model(
        files, python_model=str(AGENT), artifacts={ARTIFACT: str(checkpoint)}, pip_requirements=["mlflow"]
    )
    samples = [{"prompt": "Capital of France?", "answers": {"sft": {"text": "Lyon"}, "4bit": {"text": "Paris"}}}]
    (files / "evaluate.json").write_text(json.dumps({"samples": samples}))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{team.checkout}/mlflow.db")
    client.create_registered_model("chatloom")
    client.create_model_version("chatloom", source=files.as_uri())
    client.set_registered_model_alias("chatloom", "champion", "1")

    (team.checkout / "registers.py").write_text(REGISTERS)
    file = team.checkout / "dvc.yaml"
    pipeline = yaml.safe_load(file.read_text())
    pipeline["stages"]["register"]["cmd"] += f" && {sys.executable} registers.py {files.as_uri()}"
    file.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return client


@pytest.mark.smoke
def test_a_night_brings_rows_asks_and_a_person_makes_the_champion(
    team: Team, champion: mlflow.MlflowClient, browser: Any
) -> None:
    """By cron, approved in the UI, under a chat server that follows the champion."""
    port = free_port()
    server, chat = team.start("serve/serve", port=port), f"http://127.0.0.1:{port}"
    feedback = team.checkout / "feedback"
    feedback.mkdir()
    (feedback / "rows.jsonl").write_text('{"prompt": "Hello?"}\n{"unfini')

    nightly = team.get("deployments/name/nightly/nightly")
    assert nightly["global_concurrency_limit"]["limit"] == 1
    (schedule,) = nightly["schedules"]
    assert not schedule["active"]
    parameters = {"preset": "default", "inbox": ["feedback"]}
    team.ask(f"deployments/{nightly['id']}", {"parameters": parameters}, method="PATCH")
    each_minute = {"active": True, "schedule": {"cron": "* * * * *", "timezone": "UTC"}}
    team.ask(f"deployments/{nightly['id']}/schedules/{schedule['id']}", each_minute, method="PATCH")
    (night,) = wait_until(lambda: team.runs("nightly", "Running", "Asked", "Failed", "Crashed"), team.process)
    team.ask(f"deployments/{nightly['id']}/schedules/{schedule['id']}", each_minute | {"active": False}, method="PATCH")
    assert night["auto_scheduled"]
    team.state(night["id"], "Asked")
    assert (team.checkout / "data/own/inbox/feedback/rows.jsonl").read_text() == '{"prompt": "Hello?"}\n'
    # The server records what became of tasks by and by, and may still be at it when the flow has ended.
    wait_until(lambda: team.outcomes() == dict.fromkeys(STAGES, "Ran"), team.process)

    wait_until(lambda: served(chat) == "1", team.process)
    (asked,) = wait_until(lambda: team.runs("promote", "Paused"), team.process)
    approve(browser, f"{team.prefect}/runs/flow-run/{asked['id']}")
    team.state(asked["id"], "Promoted")

    assert str(champion.get_model_version_by_alias("chatloom", "champion").version) == "2"
    tags = champion.get_model_version("chatloom", "2").tags
    kept = {name: value for name, value in tags.items() if name.startswith("approval.")}
    assert kept.pop("approval.at")
    assert kept == {"approval.decision": "approved", "approval.by": "Ann", "approval.reason": "reads better"}
    wait_until(lambda: served(chat) == "2", team.process)
    asks = {"model": "chatloom", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}
    assert httpx.post(f"{chat}/v1/chat/completions", json=asks, timeout=60).json()["system_fingerprint"] == "chatloom/2"

    team.cancel(server)
    with pytest.raises(httpx.ConnectError):
        served(chat)


def served(chat: str) -> str:
    version: str = httpx.get(f"{chat}/ready", timeout=30).raise_for_status().json()["version"]
    return version


def approve(browser: Any, run: str) -> None:
    """What a person does on the page of a paused run."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(run)
    page.get_by_role("button", name="Resume").first.click()
    form = page.locator(".p-modal")
    form.get_by_text("Capital of France?").wait_for()
    assert form.get_by_role("cell", name="ppo/kl").is_visible(), "the table is drawn"
    reason, name = (form.locator("textarea").nth(place) for place in (0, 1))
    form.get_by_role("switch").click()
    reason.fill("reads better")
    name.fill("Ann")
    form.get_by_role("button", name="Submit").click()
    form.wait_for(state="hidden")
    page.close()


@pytest.mark.smoke
def test_down_ends_all_of_it(team: Team) -> None:
    checkout, process = team.checkout, team.process
    # A second `make ui` is refused, and `make down` ends the first: nothing is left.
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3
    second, down = (
        subprocess.run(
            [sys.executable, "-m", "flows.ui", *options],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
            check=False,
        )
        for options in ([], ["--down"])
    )
    assert second.returncode == 1
    assert "make down ends it" in second.stdout
    assert down.stdout.startswith("ended ui, prefect, mlflow, worker")
    assert process.wait(timeout=90) == 0
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_down_ends_what_a_killed_command_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, other = (subprocess.Popen(["sleep", "300"]) for _ in range(2))
    began = psutil.Process(left.pid).create_time()
    (tmp_path / ".state" / "ui").mkdir(parents=True)
    # The second number was given to a process of somebody else's since.
    found = {"ui": [2**22 + 1, began], "prefect": [left.pid, began], "worker": [other.pid, began - 1000]}
    (tmp_path / ui.STARTED).write_text(json.dumps(found))
    try:
        assert ui.stop(tmp_path) == ["prefect"]
        assert not psutil.pid_exists(left.pid)
        assert other.poll() is None
        assert ui.stop(tmp_path) == []
    finally:
        other.kill()
        other.wait()


def test_a_taken_port_is_named(checkout: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailed, match=f"port {port} is in use.*make ui PREFECT_PORT={port + 1}"):
            ui._prefect_server(port)


def test_a_server_that_ends_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = Server("broken", ["this_module_is_not_there"], tmp_path, dict(os.environ))
    with pytest.raises(ServerFailed, match="No module named this_module_is_not_there"):
        server.wait_for(f"http://127.0.0.1:{free_port()}/")
    server.end()
