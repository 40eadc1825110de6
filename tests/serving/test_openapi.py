"""Requests that schemathesis makes up from the OpenAPI document, sound ones and others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from chatloom.serving.engine import Engine
from tests.serving.server import serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def document(parrot: Engine) -> Iterator[Any]:
    with serving(parrot) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
def test_every_route(case: Any) -> None:
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "tiny"  # else most end at 404
        case.body["max_tokens"] = 2
    case.call_and_validate(checks=CHECKS)
