"""`python -m flows.ui`: MLflow's UI, a Prefect server, its worker and the deployments, on loopback, until Ctrl-C.

`python -m flows.ui --down` ends what another terminal started.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import psutil
import typer
from rich.console import Console

from chatloom.files import write_json
from tasks.processes import end_tree
from tasks.report import MLFLOW_UI
from tasks.servers import SECONDS_BETWEEN_LOOKS, Server, ServerFailed

POOL, HOST = "chatloom", "127.0.0.1"
STARTED = Path(".state/ui/processes.json")
"""Who runs: `{name: [pid, when it began]}`, the command itself first."""
SECONDS_TO_STOP = 60.0


def main(
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's server and UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's UI.")] = 5000,
    down: Annotated[bool, typer.Option("--down", help="End what runs.")] = False,
) -> None:
    """Start the UIs and a worker for the deployments; Ctrl-C ends all of them."""
    console = Console(soft_wrap=True, highlight=False)
    root = Path.cwd()
    if down:
        ended = stop(root)
        console.print(f"ended {', '.join(ended)}" if ended else "nothing runs")
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if running(root):
            raise ServerFailed("it runs already in this checkout: make down ends it")
        with ExitStack() as ends:
            try:
                _serve(ends, root, prefect_port, mlflow_port, console)
            finally:
                # A second Ctrl-C must not leave servers behind.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:
        console.print("stopped")
    except ServerFailed as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None


def running(root: Path) -> dict[str, psutil.Process]:
    """What `make ui` started in `root` and is still there, by name; the command itself first."""
    path = root / STARTED
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {}
    for name, (pid, began) in recorded.items():
        # A number is given out again, so that the start decides.
        if psutil.pid_exists(pid) and abs((process := psutil.Process(pid)).create_time() - began) < 1:
            found[name] = process
    return found


def stop(root: Path) -> list[str]:
    """End all of it: the command, which ends the rest in order, and then what a killed command left behind."""
    found = running(root)
    if (command := found.get("ui")) is not None:
        command.terminate()
        psutil.wait_procs([command], timeout=SECONDS_TO_STOP)
    for process in found.values():
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            end_tree(process.pid)
    (root / STARTED).unlink(missing_ok=True)
    return list(found)


def _serve(ends: ExitStack, root: Path, prefect_port: int, mlflow_port: int, console: Console) -> None:
    prefect, mlflow = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    own_mlflow = not store.startswith(("http://", "https://"))
    environment = {
        **os.environ,
        "PWD": str(root),  # what prefect.yaml takes as the folder of the checkout
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Who holds which slot: in its memory alone it would be lost with the server, and the slots taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for evaluation jobs that nobody starts here
        MLFLOW_UI: mlflow if own_mlflow else store,
    }
    servers: list[Server] = []
    began = {"ui": [os.getpid(), psutil.Process().create_time()]}
    write_json(root / STARTED, began)
    ends.callback((root / STARTED).unlink, missing_ok=True)

    def start(name: str, *command: str) -> Server:
        servers.append(server := Server(name, list(command), root, environment))
        ends.callback(server.end)
        began[name] = [server.process.pid, psutil.Process(server.process.pid).create_time()]
        write_json(root / STARTED, began)
        return server

    console.print("starting; this takes up to a minute")
    api = start("prefect", *_prefect_server(prefect_port))
    if own_mlflow:
        start("mlflow", *_mlflow_server(store, root, mlflow_port)).wait_for(f"{mlflow}/health")
    api.wait_for(f"{prefect}/api/health")
    start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process")
    servers[-1].wait_for(f"{prefect}/api/work_pools/{POOL}")
    start("deployments", "prefect", "--no-prompt", "deploy", "--all").finish()
    servers.pop()
    console.print(f"Prefect  {prefect}\nMLflow   {environment[MLFLOW_UI]}")
    console.print("Ctrl-C, or make down in another terminal, ends both and the worker. Flows run from the UI, or:")
    run = "prefect deployment run reproduce/reproduce --param preset=smoke --watch"
    console.print(f"  PREFECT_API_URL={prefect}/api .venv/bin/{run}", style="bold")
    while True:
        for server in servers:
            server.check()
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _prefect_server(port: int) -> list[str]:
    _require_free(port, "PREFECT_PORT")
    return ["prefect", "server", "start", "--host", HOST, "--port", str(port)]


def _mlflow_server(store: str, root: Path, port: int) -> list[str]:
    _require_free(port, "MLFLOW_PORT")
    # One worker process: several race for a fresh store.
    address = ["--host", HOST, "--port", str(port), "--workers", "1"]
    artifacts = (root / "mlartifacts").as_uri()
    return ["mlflow", "server", "--backend-store-uri", store, "--default-artifact-root", artifacts, *address]


def _require_free(port: int, variable: str) -> None:
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise ServerFailed(f"port {port} is in use: choose another one, make ui {variable}={port + 1}")


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    typer.run(main)
