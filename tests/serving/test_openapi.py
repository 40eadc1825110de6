"""Requests that schemathesis makes up from the OpenAPI document, sound ones and others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from chatloom.serving.engine import Engine
from tests.serving.server import serving

schemathesis = pytest.importorskip("schemathesis", reason="an environment older than the lock has no schemathesis")


@pytest.fixture(scope="module")
def document(parrot: Engine) -> Iterator[Any]:
    with serving(parrot) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
def test_every_route(case: Any) -> None:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "tiny"  # else most end at 404
        case.body["max_tokens"] = 2
    wanted = (checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance)
    case.call_and_validate(checks=[not_a_server_error, *wanted])
