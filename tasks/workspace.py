"""Where a preset runs, and with which environment.

The preset `default` is the checkout itself. Any other runs in `workspaces/<preset>/`, a copy of the checkout with the
preset's params, its own outs and its own `dvc.lock`, on the checkout's DVC cache: nothing is computed twice, and going
back to `default` finds everything as it was.
"""

from __future__ import annotations

import difflib
import filecmp
import json
import os
import secrets
import shutil
import subprocess
import sys
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

DEFAULT = "default"
OWN = ("params.yaml", "dvc.lock")  # files that a workspace has for itself, as it has .dvc/
# What people put there is shared by all presets, written to, and not to be copied: linked.
SHARED = (Path("data/own"), Path("data/rankings"))


@dataclass(frozen=True)
class Reproduction:
    """One walk through the DAG."""

    preset: str
    root: Path
    """The checkout."""
    workspace: Path
    """Where DVC runs."""
    id: str
    """Names the MLflow run that is the parent of the stages' runs."""

    @classmethod
    def start(cls, preset: str, root: Path) -> Reproduction:
        """Bring the workspace of `preset` up to date and take an id: when it began, and letters against a collision.

        Raises:
            InputError: as `make_workspace` does.
        """
        workspace = make_workspace(preset, root)
        given = os.environ.get(REPRODUCTION)
        return cls(preset, root, workspace, given or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}")

    def environment(self) -> dict[str, str]:
        """What DVC and the stages below it find in their environment."""
        return {
            **os.environ,
            # dvc.yaml says `python`: the one that runs this.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root}/mlflow.db",
            PRESET: self.preset,
            REPRODUCTION: self.id,
        }


def presets(root: Path) -> list[str]:
    return [DEFAULT, *sorted(path.stem for path in (root / "params").glob("*.yaml") if path.stem != DEFAULT)]


def make_workspace(preset: str, root: Path | None = None) -> Path:
    """The folder in which `preset` runs, up to date with the checkout `root` (default: the current folder).

    Raises:
        InputError: for an unknown preset, or one whose values do not hold together.
    """
    root = (root or Path.cwd()).resolve()
    if preset == DEFAULT:
        return root
    if preset not in (known := presets(root)):
        near = difflib.get_close_matches(preset, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"preset {preset!r} is none of {', '.join(known)}{hint}")
    params = load_preset(root / "params" / f"{preset}.yaml", root / "params.yaml")
    workspace = root / "workspaces" / preset
    _write_dvc_config(root / ".dvc", workspace / ".dvc")
    _mirror(root, workspace)
    for folder in SHARED:
        _link(root / folder, workspace / folder)
    _write_if_changed(workspace / "params.yaml", _dump(params))
    return workspace


def _mirror(root: Path, workspace: Path) -> None:
    """Copy what git tracks or would track; touch only what changed, and remove what an earlier copy brought."""
    files = _checkout_files(root)
    record = workspace / ".dvc" / "workspace.json"
    earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    for name in set(earlier) - set(files):
        (workspace / name).unlink(missing_ok=True)
    # Recorded before it is done, so that an interrupted copy is cleaned up too.
    write_json(record, sorted({*earlier, *files}))
    for name in files:
        _copy_if_changed(root / name, workspace / name)
    write_json(record, files)


def _checkout_files(root: Path) -> list[str]:
    """Tracked files and untracked ones that git does not ignore, without a workspace's own."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise InputError(f"{root}: a preset other than {DEFAULT!r} needs git and a git checkout") from error
    names = sorted(set(done.stdout.split("\0")) - {""})
    elsewhere = (".dvc/", "workspaces/", *(f"{folder}/" for folder in SHARED))
    return [name for name in names if name not in OWN and not name.startswith(elsewhere) and (root / name).is_file()]


def _link(source: Path, target: Path) -> None:
    if source.is_dir() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(source, target.parent), target_is_directory=True)


def _copy_if_changed(source: Path, target: Path) -> None:
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
