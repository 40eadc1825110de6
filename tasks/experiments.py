"""Reproductions as DVC experiments: each in a workspace of its own, recorded in the checkout.

Not by `dvc exp run -S`: where params.yaml has an alias, as ours does, it changes every section that shares the alias.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from dvc.config import Config, merge

from chatloom.errors import InputError
from tasks.workspace import (
    DVC,
    FOLDER,
    SHARED,
    Reproduction,
    copy_if_changed,
    load_values,
    mirror,
    new_id,
    workspace_name,
)


def experiment_path(preset: str, root: Path, overrides: Sequence[str]) -> Path:
    return root / FOLDER / f"exp-{workspace_name(preset, overrides)}"


def make_experiment(preset: str, root: Path, overrides: Sequence[str]) -> Reproduction:
    """A workspace that is a git repository at the checkout's commit, with its changes and with `overrides`.

    Raises:
        InputError: as `make_workspace` does.
    """
    root = root.resolve()
    values = load_values(preset, root, overrides)
    workspace = experiment_path(preset, root, overrides)
    workspace.mkdir(parents=True, exist_ok=True)
    _git(workspace, "init", "--quiet")
    _sign(workspace)
    _git(workspace, "fetch", "--quiet", "--update-head-ok", str(root), "HEAD")
    _git(workspace, "reset", "--quiet", "FETCH_HEAD")
    _git(workspace, "checkout", "--quiet", "FETCH_HEAD", "--", ".dvc")
    _share_cache(root, workspace)
    mirror(root, workspace, values)
    for folder in SHARED:  # copied: git would take a link for the end of what it tracks there
        for file in (path for path in (root / folder).rglob("*") if path.is_file()):
            copy_if_changed(file, workspace / file.relative_to(root))
    return Reproduction(workspace.name, root, workspace, new_id())


def save_experiment(reproduction: Reproduction, name: str, stages: Iterable[str]) -> None:
    """Record `stages` of the workspace as the experiment `name` of the checkout: `dvc exp show`, `dvc exp apply`.

    Raises:
        InputError: where DVC refuses.
    """
    for command in (
        ["exp", "save", "--force", "--name", name, *stages],
        ["exp", "push", "--force", "--no-cache", str(reproduction.root), name],
    ):
        done = subprocess.run(
            [*DVC, *command],
            cwd=reproduction.workspace,
            env=reproduction.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InputError(
                f"experiment {name!r}: dvc exp {command[1]} in {reproduction.workspace}: {done.stderr.strip()}"
            )


def _share_cache(root: Path, workspace: Path) -> None:
    """The checkout's own settings and its cache, in the file that git ignores."""
    settings = Config(str(root / ".dvc")).load_one("local")
    merge(settings, {"cache": {"dir": str(root / ".dvc" / "cache")}} if "dir" not in settings["cache"] else {})
    with Config(str(workspace / ".dvc")).edit("local") as written:
        written.clear()
        written.update(settings)


def _sign(workspace: Path) -> None:
    """An experiment is a commit: of nobody in particular where the machine has no name for its user."""
    for key, value in (("user.name", "chatloom"), ("user.email", "chatloom@localhost")):
        if subprocess.run(["git", "config", key], cwd=workspace, capture_output=True, check=False).returncode:
            _git(workspace, "config", key, value)


def _git(folder: Path, *command: str) -> None:
    done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{folder}: git {command[0]}: {done.stderr.strip()}; experiments need a git checkout")
