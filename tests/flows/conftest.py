from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chromium import open_browser

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests" / "tasks"))  # toy_pipeline, shared with the tests there


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server of our own, with an empty database."""
    from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    # Its database waits 60 s for a lock, and so does a client for the server, by default: who asks for a slot again
    # because the answer was late waits for itself, on a server like this one, which takes back no slots.
    with temporary_settings({PREFECT_API_REQUEST_TIMEOUT: 300}), prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, reproduced once; to be copied."""
    from toy_pipeline import make_checkout, real_graph

    from tasks.workspace import DVC

    root = make_checkout(tmp_path_factory.mktemp("finished") / "checkout", real_graph())
    subprocess.run([*DVC, "repro", "--quiet"], cwd=root, check=True)
    return root


@pytest.fixture
def reproduced(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which every stage is up to date."""
    for name in ("MLFLOW_TRACKING_URI", "CHATLOOM_REPRODUCTION", "CHATLOOM_PRESET"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "checkout"
    shutil.copytree(finished, root, symlinks=True)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's own graph over shell commands."""
    from toy_pipeline import make_checkout, real_graph

    for name in ("MLFLOW_TRACKING_URI", "CHATLOOM_REPRODUCTION", "CHATLOOM_PRESET"):
        monkeypatch.delenv(name, raising=False)
    root = make_checkout(tmp_path / "checkout", real_graph())
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened
