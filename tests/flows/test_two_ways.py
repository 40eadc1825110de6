"""Two ways, one truth: after any edit the flow and plain `dvc repro` run the same stages and end with one lock."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flows.pipeline import reproduce
from tasks.workspace import DVC

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("prefect_server")]
SEED = 26


def edit_code(root: Path, choice: random.Random) -> str:
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    code = sorted({dep for stage in stages.values() for dep in stage["deps"] if dep.endswith(".py")})
    file = choice.choice(code)
    (root / file).write_text(f"# {choice.random()}\n")
    return file


def edit_params(root: Path, choice: random.Random) -> str:
    values = yaml.safe_load((root / "params.yaml").read_text())
    section = choice.choice([name for name in sorted(values) if "seed" in values[name]])
    values[section] = {**values[section], "seed": choice.randrange(10**6)}
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return f"{section}.seed"


def add_data(root: Path, choice: random.Random) -> str:
    (root / "data" / "own" / f"{choice.randrange(10**6)}.jsonl").write_text("{}\n")
    return "data/own"


def remove_out(root: Path, choice: random.Random) -> str:
    out = choice.choice(["metrics/quantize.json", "metrics/train_sft.json", "reports/evaluate.json"])
    (root / out).unlink()
    return out


def undo_code(root: Path, choice: random.Random) -> str:
    """Back to what was committed: stages that ran so before come from the cache."""
    subprocess.run(["git", "checkout", "--quiet", "--", "stages", "chatloom"], cwd=root, check=True)
    return "git checkout"


EDITS: list[Callable[[Path, random.Random], str]] = [edit_code, edit_params, add_data, remove_out]


def by_dvc(root: Path) -> dict[str, str]:
    done = subprocess.run([*DVC, "repro"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    ran = re.findall(r"^Running stage '(\w+)':$", done.stdout, re.MULTILINE)
    cached = re.findall(r"^Stage '(\w+)' is cached - skipping run", done.stdout, re.MULTILINE)
    return {name: "ran" if name in ran else "cached" if name in cached else "unchanged" for name in stages}


def steps(choice: random.Random) -> list[list[Callable[[Path, random.Random], str]]]:
    """Every edit once, in two steps, and an undo."""
    edits = choice.sample(EDITS, len(EDITS))
    return [edits[:2], edits[2:], [undo_code]]


def test_any_edits_are_reproduced_alike(reproduced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(reproduced, twin, symlinks=True)
    seen: set[str] = set()
    for number, step in enumerate(steps(random.Random(SEED))):
        # The same choices in both: each has a generator of its own, at the same place.
        edits = {edit(root, random.Random(SEED + number)) for root in (reproduced, twin) for edit in step}
        monkeypatch.chdir(reproduced)
        flow, plain = reproduce(), by_dvc(twin)
        assert flow == plain, f"step {number}, after {edits}"
        locks = [yaml.safe_load((root / "dvc.lock").read_text()) for root in (reproduced, twin)]
        assert locks[0] == locks[1], f"step {number}, after {edits}"
        seen |= set(flow.values())
    assert seen == {"ran", "cached", "unchanged"}, "the walk saw every outcome"
