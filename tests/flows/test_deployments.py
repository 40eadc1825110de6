"""`prefect.yaml` and the templates for other work pools: what they name exists, and what they give is accepted."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.exceptions import ParameterTypeError

from flows.pipeline import reproduce
from flows.sweep import sweep
from tests.conftest import ROOT

POOLS = sorted((ROOT / "deploy" / "pools").glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def flow_of(entrypoint: str) -> Flow[..., Any]:
    file, _, name = entrypoint.partition(":")
    found = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
    assert isinstance(found, Flow)
    return found


OURS = read(ROOT / "prefect.yaml")["deployments"]


def test_what_is_promised_is_deployed() -> None:
    assert [one["name"] for one in OURS] == ["reproduce", "nightly", "promote", "evaluate-only", "serve", "sweep"]


@pytest.mark.parametrize("deployment", OURS, ids=lambda one: one["name"])
def test_a_deployment_is_a_flow_of_its_name_with_help_for_every_parameter(deployment: dict[str, Any]) -> None:
    found = flow_of(deployment["entrypoint"])
    assert found.name == deployment["name"]
    fields = found.parameters.properties
    assert set(deployment["parameters"]) <= set(fields)
    for name, field in fields.items():
        assert field.get("description"), f"{found.name}: {name} has no help text"
    if not found.parameters.required:
        found.validate_parameters(deployment["parameters"])


def test_the_templates_deploy_the_same_elsewhere() -> None:
    assert [path.stem for path in POOLS] == ["docker", "kubernetes"]
    for path in POOLS:
        template = read(path)
        pool = template["definitions"]["work_pools"][path.stem]
        assert pool["job_variables"]["image"] == "{{ $CHATLOOM_IMAGE }}"
        assert [one["work_pool"] for one in template["deployments"]] == [pool] * len(OURS)
        assert [one | {"work_pool": 0} for one in template["deployments"]] == [one | {"work_pool": 0} for one in OURS]


@pytest.mark.parametrize(
    ("flow", "parameters"),
    [
        (reproduce, {"preset": "../elsewhere"}),
        (reproduce, {"overrides": ["train_sft.seed"]}),
        (reproduce, {"from_stage": "train"}),
        (reproduce, {"force": "perhaps"}),
        (sweep, {"sets": [{"name": "no spaces", "overrides": []}]}),
        (sweep, {"sets": [{"name": "a", "overrides": ["x"]}]}),
        (sweep, {"sets": [{"name": "a"}]}),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(flow: Flow[..., Any], parameters: dict[str, Any]) -> None:
    with pytest.raises(ParameterTypeError):
        flow.validate_parameters(parameters)
