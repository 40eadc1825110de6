"""A real MLflow server that tests kill and start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import mlflow
import pytest

from tests.loopback import free_port, poll

SECONDS_TO_START = 180.0


class MlflowServer:
    """One address and one store; down until `up` is called."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self.folder, self.options, self.environment = folder, options, environment
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        assert self.process is None
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--workers", "1", *self.options],
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self.environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        poll(self._listens, SECONDS_TO_START)
        httpx.get(f"{self.uri}/health", timeout=60).raise_for_status()

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def down(self) -> None:
        """SIGKILL to the server and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def own_experiment(uri: str, artifacts: Path | None = None) -> Iterator[None]:
    """Have MLflow work on the store `uri`, in a new experiment, for the block; then as before.

    MLflow remembers the number of the last experiment whatever the store, and gives it to processes that are started.
    """
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
        patch.setenv("MLFLOW_EXPERIMENT_ID", "")
        mlflow.set_tracking_uri(uri)
        number = mlflow.create_experiment("tests", artifact_location=artifacts.as_uri() if artifacts else None)
        mlflow.set_experiment(experiment_id=number)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)
