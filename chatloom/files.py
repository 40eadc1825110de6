"""Outs appear whole or not at all: write under a temporary name, then rename. A line added is on the disk."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatloom.errors import InputError

BLOCK = 1 << 16
"""Bytes read at once where the end of a file is looked at."""


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A fresh folder that becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name that becomes the file `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        remedy: what to do where there is none, for the error.

    Raises:
        InputError: where the file is missing or is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {remedy}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON: {error}; {remedy}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object, found {type(found).__name__}; {remedy}")
    return found


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; a NaN or infinity raises ValueError, since JSON has neither."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def append_line(path: Path, value: Any) -> None:
    """Add `value` as a line of JSON; it is on the disk when this returns, and not at all where this raises.

    Several threads and processes may add to one file.

    Raises:
        OSError: where the disk is full, or the file cannot be written.
    """
    line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        last = _after_last_line_end(file)
        if last and _is_json(last):
            line = b"\n" + line
        elif last:
            # Cut in the middle by a crash, and so never confirmed: it must not swallow this one.
            file.truncate(file.seek(0, os.SEEK_END) - len(last))
        begin = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(begin)
            raise


def _after_last_line_end(file: io.FileIO) -> bytes:
    """Nothing, in a file that is whole."""
    found = b""
    start = file.seek(0, os.SEEK_END)
    while start and b"\n" not in found:
        size = min(start, BLOCK)
        start -= size
        file.seek(start)
        found = file.read(size) + found
    return found[found.rfind(b"\n") + 1 :]


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
