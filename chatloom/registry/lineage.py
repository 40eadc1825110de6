"""What a model was made from, as tags: code, data, parameters and the base model."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import yaml

from chatloom.config import Params
from chatloom.errors import InputError

log = logging.getLogger(__name__)

NONE = "none"
"""The tag of something that this workspace does not have, a commit for example: said, and not left out."""


def collect_lineage(params: Params, model_out: str, preset: str | None, workspace: Path = Path()) -> dict[str, str]:
    """Tags that lead from a registered model back to its making.

    Args:
        params: as in `params.yaml` of the workspace.
        model_out: path of the model among the outs of `dvc.lock`; its DVC hash names the very bytes.
        preset: name of the preset, where one was laid over `params.yaml`.

    Raises:
        InputError: where `params.yaml` is missing or `dvc.lock` is not one.
    """
    commit = _git(workspace, "rev-parse", "HEAD")
    # dvc.lock changes while a reproduction runs, and has a digest of its own.
    changed = _git(workspace, "status", "--porcelain", "--", ":/", ":(exclude,top)dvc.lock")
    if commit is None:
        log.warning("there is no git commit here: the registered model cannot be traced to its code")
    return {
        "git.revision": commit or NONE,
        "git.dirty": NONE if changed is None else str(bool(changed)).lower(),
        **_dvc_tags(workspace / "dvc.lock", model_out),
        "params.sha256": _sha256(workspace / "params.yaml"),
        "params": json.dumps(params.model_dump(mode="json", by_alias=True), ensure_ascii=False),
        "chatloom.preset": preset or "default",
        "base_model.source": json.dumps(params.base_model.source.model_dump(mode="json"), ensure_ascii=False),
        "data.sources": json.dumps(
            [
                {"name": source.name, "from": source.path or source.url or source.hf, "license": source.license}
                for source in params.raw_data.sources
            ],
            ensure_ascii=False,
        ),
    }


def _dvc_tags(lock: Path, model_out: str) -> dict[str, str]:
    """The digest covers every stage but `register`, whose own entry is written after it has run: so whoever has the
    commit can compute the digest again."""
    if not lock.is_file():
        log.warning("%s is missing: the registered model cannot be traced to its data", lock)
        return {"dvc.lock.upstream_sha256": NONE, "dvc.model": NONE}
    try:
        stages: dict[str, Any] = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(f"{lock}: not a lock file of DVC: {error}; run `dvc repro` to write it anew") from error
    upstream = {name: stage for name, stage in stages.items() if name != "register"}
    hashes = {out["path"]: out.get("md5", NONE) for stage in upstream.values() for out in stage.get("outs", [])}
    text = json.dumps(upstream, sort_keys=True, ensure_ascii=False)
    return {
        "dvc.lock.upstream_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "dvc.model": hashes.get(model_out, NONE),
    }


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file; run this in a workspace of the pipeline")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git(workspace: Path, *arguments: str) -> str | None:
    """Output of a git command; None where there is no git, no repository or no commit."""
    try:
        done = subprocess.run(
            ["git", "-C", str(workspace), *arguments], capture_output=True, text=True, timeout=60, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
