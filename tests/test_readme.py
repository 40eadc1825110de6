"""What the README says of the tree and of the DAG is so."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def outs(stage: str) -> list[str]:
    return [*STAGES[stage]["outs"], *STAGES[stage]["metrics"]]


def test_the_picture_of_the_dag_has_only_real_edges_and_every_stage() -> None:
    drawn = {(a, b) for a, b in re.findall(r"^  (\w+) --> (\w+)$", README, re.MULTILINE)}
    real = {(a, b) for a in STAGES for b in STAGES if any(dep == out for dep in STAGES[b]["deps"] for out in outs(a))}
    assert drawn <= real
    assert {stage for edge in drawn for stage in edge} == set(STAGES)


def test_the_table_of_stages_names_each_with_an_out_of_its_own() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| `([^`]+)` \|$", README, re.MULTILINE)
    table = {name: out for name, out in rows if name in STAGES}
    assert list(table) == list(STAGES)
    for name, out in table.items():
        assert any(real == out or real.startswith(out.rstrip("*")) for real in outs(name)), (name, out)


def test_every_path_in_the_tree_exists() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for line in tree.strip().splitlines():
        for name in line.split("   ")[0].split():
            assert (ROOT / name).exists(), name


def test_every_preset_is_in_the_table() -> None:
    for preset in (ROOT / "params").glob("*.yaml"):
        assert f"`{preset.stem}`" in README


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    table = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
