"""Requests that schemathesis makes up from the OpenAPI document, sound ones and others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from chatloom.serving.engine import Engine
from tests.serving.server import serving

schemathesis = pytest.importorskip("schemathesis", reason="an environment older than the lock has no schemathesis")


def test_every_route(parrot: Engine) -> None:
    with serving(parrot) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) > 8
        for operation in operations:
            check(operation)


def check(operation: Any) -> None:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = (checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance)

    @given(case=operation.as_strategy())
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"  # else most end at 404
            case.body["max_tokens"] = 2
        case.call_and_validate(checks=[not_a_server_error, *wanted])

    ask()
