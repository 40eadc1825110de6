"""New rows for the next run: files that others write, copied or fetched into `data/own/inbox/`."""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import httpx

from chatloom.data.sources import trouble
from chatloom.errors import InputError
from chatloom.files import atomic_file

FOLDER = Path("data/own/inbox")
SECONDS = 60.0


def pull(sources: Sequence[str], root: Path) -> list[str]:
    """Bring `data/own/inbox/` up to date with `sources`; the names of files that changed.

    Args:
        sources: files, folders (the files right in them), or addresses https://...

    Raises:
        InputError: where a source is not there.
        Unavailable: where its server does not answer.
    """
    changed = []
    for name, bring in (file for source in sources for file in _files(source, root)):
        target = root / FOLDER / name
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder, "fresh")
            bring(fresh)
            if target.is_file() and filecmp.cmp(fresh, target, shallow=False):
                continue
            with atomic_file(target) as temporary:
                shutil.copyfile(fresh, temporary)
        changed.append(name)
    return changed


def _files(source: str, root: Path) -> list[tuple[str, Callable[[Path], None]]]:
    """Each file of a source: its name in the inbox, and what brings it."""
    if source.startswith(("http://", "https://")):
        return [(PurePosixPath(urlsplit(source).path).name or "download", partial(_fetch, source))]
    path = root / source
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return [(f"{path.name}/{file.name}", partial(_copy, file)) for file in files]
    if not path.is_file():
        raise InputError(f"inbox {source!r}: no such file or folder; looked at {path}")
    return [(path.name, partial(_copy, path))]


def _copy(file: Path, target: Path) -> None:
    """Whole lines of it: whoever appends to it may be in the middle of one, which the next pull has."""
    shutil.copyfile(file, target)
    if file.suffix == ".jsonl":
        with target.open("rb+") as opened:
            opened.truncate(opened.read().rfind(b"\n") + 1)


def _fetch(url: str, target: Path) -> None:
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=SECONDS) as answer, target.open("wb") as opened:
            answer.raise_for_status()
            for piece in answer.iter_bytes():
                opened.write(piece)
    except httpx.HTTPStatusError as error:
        raise trouble(error)(f"inbox {url}: the server answered {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise trouble(error)(f"inbox {url}: cannot be fetched: {error or type(error).__name__}") from error
