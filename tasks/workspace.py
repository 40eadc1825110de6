"""Where a preset runs, and with which environment.

The preset `default` is the checkout itself. Any other runs in `workspaces/<preset>/`, a copy of the checkout with the
preset's params, its own outs and its own `dvc.lock`, on the checkout's DVC cache: nothing is computed twice, and going
back to `default` finds everything as it was. So does a preset with overrides, in a workspace named after both.
"""

from __future__ import annotations

import difflib
import filecmp
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from dvc.config import Config, merge
from dvc.config_schema import RelPath

from chatloom.config import load_preset
from chatloom.errors import InputError
from chatloom.files import atomic_file, write_json
from stages.run import PRESET, REPRODUCTION

DEFAULT, FOLDER = "default", "workspaces"
DVC = [sys.executable, "-m", "dvc"]
OWN = ("params.yaml", "dvc.lock")  # files that a workspace has for itself, as it has .dvc/
# What people put there is shared by all presets, written to, and not to be copied: linked.
SHARED = (Path("data/own"), Path("data/rankings"))


@dataclass(frozen=True)
class Reproduction:
    """One walk through the DAG."""

    name: str
    """Of its workspace: the preset, and letters for its overrides if it has any."""
    root: Path
    """The checkout."""
    workspace: Path
    """Where DVC runs."""
    id: str
    """Names the MLflow run that is the parent of the stages' runs."""

    @classmethod
    def start(cls, preset: str, root: Path, overrides: Sequence[str] = ()) -> Reproduction:
        """Bring the workspace of `preset` up to date and take an id: when it began, and letters against a collision.

        Raises:
            InputError: as `make_workspace` does.
        """
        workspace = make_workspace(preset, root, overrides)
        given = os.environ.get(REPRODUCTION)
        return cls(workspace_name(preset, overrides), root, workspace, given or new_id())

    def environment(self) -> dict[str, str]:
        """What DVC and the stages below it find in their environment."""
        return {
            **os.environ,
            # dvc.yaml says `python`: the one that runs this.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root}/mlflow.db",
            PRESET: self.name,
            REPRODUCTION: self.id,
        }


def new_id() -> str:
    """Of a reproduction."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def presets(root: Path) -> list[str]:
    return [DEFAULT, *sorted(path.stem for path in (root / "params").glob("*.yaml") if path.stem != DEFAULT)]


def workspace_name(preset: str, overrides: Sequence[str] = ()) -> str:
    """`smoke`, and with overrides `smoke-3f2a91c0`: equal ones, in whatever order, share a workspace."""
    if not overrides:
        return preset
    return f"{preset}-{hashlib.sha256(json.dumps(sorted(overrides)).encode()).hexdigest()[:8]}"


def workspace_path(preset: str, root: Path, overrides: Sequence[str] = ()) -> Path:
    """The folder in which `preset` runs, not looked at.

    Raises:
        InputError: for an unknown preset or override, or values that do not hold together.
    """
    load_values(preset, root, overrides)
    name = workspace_name(preset, overrides)
    return root if name == DEFAULT else root / FOLDER / name


def load_values(preset: str, root: Path, overrides: Sequence[str]) -> dict[str, Any]:
    if preset not in (known := presets(root)):
        near = difflib.get_close_matches(preset, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"preset {preset!r} is none of {', '.join(known)}{hint}")
    file = None if preset == DEFAULT else root / "params" / f"{preset}.yaml"
    return load_preset(file, root / "params.yaml", overrides)


def make_workspace(preset: str, root: Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """The folder in which `preset` runs, up to date with the checkout `root` (default: the current folder).

    Raises:
        InputError: for an unknown preset or override, or values that do not hold together.
    """
    root = (root or Path.cwd()).resolve()
    if workspace_name(preset, overrides) == DEFAULT:
        return root
    values = load_values(preset, root, overrides)
    workspace = root / FOLDER / workspace_name(preset, overrides)
    _write_dvc_config(root / ".dvc", workspace / ".dvc")
    mirror(root, workspace, values)
    for folder in SHARED:
        _link(root / folder, workspace / folder)
    return workspace


def mirror(root: Path, workspace: Path, values: dict[str, Any]) -> None:
    """Copy what git tracks or would track, and write `values` as params.yaml.

    What did not change is not touched; what an earlier copy brought and is gone is removed.
    """
    files = _checkout_files(root)
    record = workspace / ".dvc" / "workspace.json"
    earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    for name in set(earlier) - set(files):
        (workspace / name).unlink(missing_ok=True)
    # Recorded before it is done, so that an interrupted copy is cleaned up too.
    write_json(record, sorted({*earlier, *files}))
    for name in files:
        copy_if_changed(root / name, workspace / name)
    write_json(record, files)
    _write_if_changed(workspace / "params.yaml", _dump(values))


def _checkout_files(root: Path) -> list[str]:
    """Tracked files and untracked ones that git does not ignore, without a workspace's own."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise InputError(f"{root}: a preset other than {DEFAULT!r} needs git and a git checkout") from error
    names = sorted(set(done.stdout.split("\0")) - {""})
    elsewhere = (".dvc/", f"{FOLDER}/", *(f"{folder}/" for folder in SHARED))
    return [name for name in names if name not in OWN and not name.startswith(elsewhere) and (root / name).is_file()]


def _link(source: Path, target: Path) -> None:
    if source.is_dir() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(source, target.parent), target_is_directory=True)


def copy_if_changed(source: Path, target: Path) -> None:
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as temporary:
        shutil.copy(source, temporary)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _write_dvc_config(main: Path, own: Path) -> None:
    """The checkout's DVC settings, its remotes and its cache, for a folder that git does not track."""
    own.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {}
    checkout = Config(str(main))
    for level in ("repo", "local"):
        merge(settings, checkout.load_one(level))
    settings["core"]["no_scm"] = "true"
    settings["cache"].setdefault("dir", RelPath(main / "cache"))
    with Config(str(own)).edit("repo") as written:
        written.clear()
        written.update(settings)


class _PlainDumper(yaml.SafeDumper):
    """Writes a value that occurs twice twice, not as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(params: dict[str, Any]) -> str:
    return yaml.dump(params, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
