"""How long MLflow is waited for."""

from __future__ import annotations

import os
import threading

import pytest
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

from chatloom.registry.resolve import few_retries


def test_a_short_wait_ends_with_its_block_and_leaves_alone_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MLFLOW_HTTP_REQUEST_MAX_RETRIES.name, raising=False)
    monkeypatch.setenv(MLFLOW_HTTP_REQUEST_TIMEOUT.name, "3")
    with few_retries(1, 20):
        with few_retries(5, 20):
            assert (MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), MLFLOW_HTTP_REQUEST_TIMEOUT.get()) == (1, 3)
        assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 1
    assert (MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), MLFLOW_HTTP_REQUEST_TIMEOUT.get()) == (7, 3)


def test_other_threads_read_the_environment_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As urllib does to find proxies: a variable that vanishes while it reads is a KeyError there."""
    monkeypatch.delenv(MLFLOW_HTTP_REQUEST_MAX_RETRIES.name, raising=False)
    over = threading.Event()
    failures = []

    def read() -> None:
        while not over.is_set():
            try:
                dict(os.environ.items())
            except KeyError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(2000):
        with few_retries():
            pass
    over.set()
    reader.join()
    assert not failures
