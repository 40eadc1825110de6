from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests" / "tasks"))  # toy_pipeline, shared with the tests there


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server of our own, with an empty database."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's own graph over shell commands."""
    from toy_pipeline import make_checkout, real_graph

    for name in ("MLFLOW_TRACKING_URI", "CHATLOOM_REPRODUCTION", "CHATLOOM_PRESET"):
        monkeypatch.delenv(name, raising=False)
    root = make_checkout(tmp_path / "checkout", real_graph())
    monkeypatch.chdir(root)
    return root
