"""`python -m flows.ui`: MLflow's UI, a Prefect server, its worker and the deployment, on loopback, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from tasks.dvc import end_tree

POOL, HOST = "chatloom", "127.0.0.1"
SECONDS_TO_START, SECONDS_BETWEEN_LOOKS = 120.0, 0.3
LINES_OF_A_LOG = 20


class ServerFailed(RuntimeError):
    """A server did not start, or ended."""


class Server:
    """A child process whose output goes to a file in `.state/ui/`."""

    def __init__(self, name: str, command: list[str], root: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.log = root / ".state" / "ui" / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            # Ctrl-C reaches us alone, so that we end them in the right order.
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, url: str) -> None:
        """Return when `url` answers."""
        deadline = time.monotonic() + SECONDS_TO_START
        while not _answers(url):
            self.check()
            if time.monotonic() > deadline:
                self.fail(f"did not answer at {url} within {SECONDS_TO_START:.0f} s")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def finish(self) -> None:
        """Return when the process has ended well."""
        if status := self.process.wait(SECONDS_TO_START):
            self.fail(f"ended with status {status}")

    def check(self) -> None:
        if (status := self.process.poll()) is not None:
            self.fail(f"ended with status {status}")

    def fail(self, what: str) -> NoReturn:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_A_LOG:]
        raise ServerFailed("\n".join([f"{self.name} {what}; the end of {self.log}:", *lines]))

    def end(self) -> None:
        if self.process.poll() is None:
            end_tree(self.process.pid)
        self.process.wait()


def main(
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's server and UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's UI.")] = 5000,
) -> None:
    """Start the UIs and a worker for the deployment; Ctrl-C ends all of them."""
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(soft_wrap=True, highlight=False)
    try:
        with ExitStack() as ends:
            try:
                _serve(ends, Path.cwd(), prefect_port, mlflow_port, console)
            finally:
                # A second Ctrl-C must not leave servers behind.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:
        console.print("stopped")
    except ServerFailed as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None


def _serve(ends: ExitStack, root: Path, prefect_port: int, mlflow_port: int, console: Console) -> None:
    prefect, mlflow = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
    environment = {
        **os.environ,
        "PWD": str(root),  # what prefect.yaml takes as the folder of the checkout
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for evaluation jobs that nobody starts here
    }
    servers: list[Server] = []

    def start(name: str, *command: str) -> Server:
        servers.append(Server(name, list(command), root, environment))
        ends.callback(servers[-1].end)
        return servers[-1]

    console.print("starting; this takes up to a minute")
    api = start("prefect", *_prefect_server(prefect_port))
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    if store.startswith(("http://", "https://")):
        mlflow = store  # a server of somebody else's
    else:
        start("mlflow", *_mlflow_server(store, root, mlflow_port)).wait_for(f"{mlflow}/health")
    api.wait_for(f"{prefect}/api/health")
    start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process")
    servers[-1].wait_for(f"{prefect}/api/work_pools/{POOL}")
    start("deployment", "prefect", "--no-prompt", "deploy", "--all").finish()
    servers.pop()
    console.print(f"Prefect  {prefect}\nMLflow   {mlflow}")
    console.print("Ctrl-C ends both and the worker. The pipeline runs from the UI, or:")
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


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    typer.run(main)
