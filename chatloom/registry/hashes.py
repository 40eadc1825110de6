"""Hashes as DVC has them in `dvc.lock`, so that bytes can be compared with what it recorded, without DVC."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

DIRECTORY = ".dir"
"""At the end of the hash of a folder."""


def dvc_md5(path: Path) -> str | None:
    """Of a file its MD5; of a folder the MD5 of its files' names and MD5s, with `.dir` behind it; of nothing, None.

    What `.dvcignore` leaves out of folders, Python's own caches, is left out here too.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    if not path.is_dir():
        return None
    files = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return dvc_dir_md5({file.relative_to(path).as_posix(): str(dvc_md5(file)) for file in files})


def dvc_dir_md5(files: Mapping[str, str]) -> str:
    """Of a folder, from the MD5 of each file by its name inside."""
    listed = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + DIRECTORY
