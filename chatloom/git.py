"""What git knows of the code that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path


def run_git(folder: Path, *arguments: str) -> bytes | None:
    """Output of a git command in `folder`; None where it fails, for want of a repository, a commit or git itself."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=60, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout


def head(folder: Path) -> tuple[str | None, bool | None]:
    """The commit that is checked out, and whether files differ from it; None for what there is not.

    `dvc.lock` does not count: it changes while a reproduction runs, and is recorded by its own hash.
    """
    commit = run_git(folder, "rev-parse", "HEAD")
    changed = run_git(folder, "status", "--porcelain", "--", ":/", ":(exclude,top)dvc.lock")
    return commit.decode().strip() if commit is not None else None, bool(changed) if changed is not None else None
