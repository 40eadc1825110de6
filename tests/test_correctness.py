"""Every function and every test that docs/correctness.md names exists."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs/correctness.md").read_text(encoding="utf-8")
NAMED = sorted({(file, name) for file, _, name in re.findall(r"`([\w/]+\.py)(::|:)(\w+)`", PAGE)})
RULES = 22


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda part: part)
def test_what_is_named_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_rule_names_code_and_a_test() -> None:
    rows = re.findall(r"^\| (\d+) \| .+? \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert {int(number) for number, _, _ in rows} == set(range(1, RULES + 1))
    for number, code, tests in rows:
        assert "`chatloom/" in code, number
        assert "`tests/" in tests, number
