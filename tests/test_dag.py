"""`dvc.yaml` against the code: the public stages, their code deps against the import graph, their params sections."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
STAGES = [
    "base_model",
    "raw_data",
    "prepare_data",
    "train_sft",
    "compare",
    "train_reward",
    "train_gold",
    "train_ppo",
    "quantize",
    "evaluate",
    "register",
]
PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))

# Modules that cannot change an out, so that no stage depends on them (an empty __init__.py holds nothing, so neither).
UNTRACKED = {
    # The schema of params.yaml: the values themselves are tracked, as params.
    "chatloom/config.py",
    # What a failing stage says; a stage that fails has no outs.
    "chatloom/errors.py",
    # How a file is put in its place, not what is in it.
    "chatloom/files.py",
    # How processes are started and ended, not what they compute.
    "chatloom/parallel/launch.py",
    "stages/training.py",
    # What a terminal shows.
    "chatloom/progress.py",
    # Which chatter of other libraries is silenced.
    "stages/__init__.py",
    # The harness: it hands paths and values through, and a new way to log must not retrain anything.
    "stages/run.py",
}

# Modules that a stage hands to another program by their path instead of importing them.
LOADED_BY_PATH = {"register": ["chatloom/registry/agent.py"]}


def test_the_public_stages_in_order() -> None:
    assert list(PIPELINE["stages"]) == STAGES
    for name, stage in PIPELINE["stages"].items():
        assert stage["cmd"] == f"python -m stages.{name}"


def test_every_stage_reports_metrics_that_dvc_caches() -> None:
    for name, stage in PIPELINE["stages"].items():
        # A plain path, not {path: {cache: false}}: going back to old code brings its metrics back too.
        assert stage["metrics"] == [f"metrics/{name}.json"]


def test_params_are_the_own_section_and_the_machine() -> None:
    sections = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for name, stage in PIPELINE["stages"].items():
        assert stage["params"][0] == name
        # The lineage of a registered version also names the base model and the licences of the data.
        # And the champion answers as `evaluate` let the new model answer.
        lineage = {"base_model.source", "raw_data.sources", "evaluate"} if name == "register" else set()
        assert set(stage["params"]) <= {name, "runtime"} | lineage
        assert {key.split(".")[0] for key in stage["params"]} <= set(sections)
    assert set(sections) == {*STAGES, "runtime", "tracking"}


def test_data_deps_and_plots_are_made_by_a_stage_or_tracked_by_git() -> None:
    outs = [out for stage in PIPELINE["stages"].values() for out in (*stage.get("outs", []), *stage["metrics"])]
    assert len(outs) == len(set(outs))
    for stage in PIPELINE["stages"].values():
        for dep in stage["deps"]:
            assert dep in outs or (ROOT / dep).exists(), f"{dep}: no stage makes it and it is not there"
    for plot in PIPELINE["plots"]:
        if isinstance(plot, str):
            assert plot in outs, f"{plot}: no stage makes it"
            continue
        (options,) = plot.values()
        for file in (*options["y"], *(options["x"] if isinstance(options["x"], dict) else ())):
            assert str(Path(file).parent) in outs, f"{file}: no stage makes it"


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_are_what_the_stage_imports(stage: str) -> None:
    imported = import_closure(f"stages/{stage}.py", *LOADED_BY_PATH.get(stage, []))
    deps = [dep for dep in PIPELINE["stages"][stage]["deps"] if is_code(dep)]
    covered = {module: [dep for dep in deps if module == dep or module.startswith(f"{dep}/")] for module in imported}
    wrong = {
        "imported, but in no dep": sorted(module for module, by in covered.items() if not by),
        "in a dep, but not imported": sorted(module for dep in deps for module in code_in(dep) - imported),
        "in two deps": sorted(module for module, by in covered.items() if len(by) > 1),
    }
    assert not any(wrong.values()), f"deps of {stage} in dvc.yaml: {json.dumps(wrong, indent=2)}"


def is_code(dep: str) -> bool:
    return dep.startswith(("stages/", "chatloom/"))


def code_in(dep: str) -> set[str]:
    """The modules a dep stands for; a folder stands for all of its modules that hold anything."""
    if dep.endswith(".py"):
        return {dep}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / dep).rglob("*.py")}
    return {file for file in files if is_tracked(file)}


def is_tracked(module: str) -> bool:
    path = ROOT / module
    holds_nothing = path.name == "__init__.py" and not _has_code(path)
    return module not in UNTRACKED and not holds_nothing


def _has_code(path: Path) -> bool:
    """Whether a module holds more than a docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text(encoding="utf-8")).body)


def import_closure(*start: str) -> set[str]:
    """Every tracked module of ours that the `start` modules import, themselves included, through tracked modules."""
    seen: set[str] = set()
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        if module in seen or not is_tracked(module):
            continue
        seen.add(module)
        waiting += [found for name in imports_of(ROOT / module) for found in files_of(name)]
    return seen


def imports_of(path: Path) -> list[str]:
    """Dotted names a module imports, at its top or inside a function; imports for type checkers only do not count."""
    names: list[str] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from a import b` may name a module or something inside one: files_of knows.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        waiting += ast.iter_child_nodes(node)
    return names


def files_of(name: str) -> list[str]:
    """Files that run when `name` is imported: its module, and the `__init__.py` of every package around it."""
    parts = name.split(".")
    if parts[0] not in ("stages", "chatloom"):
        return []
    files: list[str] = []
    for end in range(1, len(parts) + 1):
        path = "/".join(parts[:end])
        files += [file for file in (f"{path}/__init__.py", f"{path}.py") if (ROOT / file).is_file()]
    return files


def test_the_import_graph_agrees_with_python() -> None:
    """The walk above finds what an interpreter loads at import (and more: imports inside functions)."""
    script = "import sys, {0}\nprint([m.__file__ for n, m in sys.modules.items() if n.startswith('chatloom')])"
    module = "chatloom/data/prepared.py"
    done = subprocess.run(
        [sys.executable, "-c", script.format("chatloom.data.prepared")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {Path(file).relative_to(ROOT).as_posix() for file in ast.literal_eval(done.stdout)}
    assert {file for file in loaded if is_tracked(file)} <= import_closure(module)
