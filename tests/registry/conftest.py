"""An MLflow store of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mlflow_server import own_experiment


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a fresh sqlite store, set as MLflow's, with an experiment whose artifacts lie beside it."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    with own_experiment(uri, folder / "mlartifacts"):
        yield uri
