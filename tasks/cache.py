"""`python -m tasks.cache`: every object of DVC's cache hashed again, and those removed that a disk or a hand spoiled.

DVC trusts what it has written: it hashes no object of its local cache again, and checks a spoiled one out as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import typer
import yaml

from chatloom.registry.hashes import DIRECTORY, dvc_md5

OBJECT = re.compile(rf"[0-9a-f]{{30}}(?:{re.escape(DIRECTORY)})?")


def objects(cache: Path) -> Iterator[Path]:
    """Files of a cache; a name says the MD5 of the bytes, a `.dir` being the list of a folder."""
    return (path for path in sorted(cache.glob("[0-9a-f][0-9a-f]/*")) if OBJECT.fullmatch(path.name))


def is_whole(path: Path) -> bool:
    """Whether an object is what its name says."""
    return dvc_md5(path) == path.parent.name + path.name.removesuffix(DIRECTORY)


def touch_differing(lock: Path) -> None:
    """Have DVC look again at the outs whose bytes are not those of `dvc.lock`: it believes what it checked out."""
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.is_file() else {}
    for out in (out for stage in stages.values() for out in stage.get("outs", [])):
        path = Path(out["path"])
        if path.exists() and dvc_md5(path) != out["md5"]:
            for file in (path, *path.rglob("*")):
                os.utime(file)


def main() -> None:
    """Check the cache of the checkout in the current folder; exit status 1 where an object had to go."""
    from dvc.repo import Repo

    with Repo() as repo:
        cache = Path(repo.cache.local.path)
    whole = 0
    spoiled: list[Path] = []
    for path in objects(cache):
        if is_whole(path):
            whole += 1
        else:
            spoiled.append(path)
            path.unlink()
            typer.echo(f"{path}: its bytes are not what its name says: removed")
    typer.echo(f"{whole} objects are whole, {len(spoiled)} were removed")
    if spoiled:
        touch_differing(Path("dvc.lock"))
        typer.echo("dvc pull fetches them from the remote; what that does not have, make repro makes again")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
