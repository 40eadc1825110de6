"""Where rows come from: files of several kinds, downloads, `datasets`. Every reader streams (line, fields).

What is wrong with one row is a `RowFault` in its place; what is wrong with a file is an `InputError` that names it.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import logging
import os
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

from chatloom.config import DataSource
from chatloom.data.drops import RowFault
from chatloom.data.schemas import Fields
from chatloom.errors import InputError, Unavailable
from chatloom.progress import progress

log = logging.getLogger(__name__)

Item = tuple[int, Fields | RowFault]
"""Line (or row) number from 1, and what stands there."""
DOWNLOAD_TIMEOUT = httpx.Timeout(30.0, read=120.0)
RETRIES = 4
"""Times that a connection that broke is taken up again, each from the byte where the last one ended."""
RETRY_DELAY = 1.0
"""Seconds before the first of them; twice as long before each further one."""
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, or a whole `datasets` split."""

    name: str
    """How rows name it as their origin."""
    path: Path | None
    """None for a `datasets` split."""
    read: Callable[[], Iterator[Item]]

    @property
    def is_text(self) -> bool:
        return self.path is not None and _kind(self.path) == ".txt"


def locate(source: DataSource, key: str, downloads: Path) -> tuple[list[SourceFile], list[str]]:
    """The files of `source`, and the names of those in its folder that are no data.

    `key` is the place in `params.yaml`, for messages; `downloads` holds what a `url` gives.

    Raises:
        InputError: where there is none, or its kind is not known.
    """
    if source.hf is not None:
        return [_hf_split(source.hf, f"{key}.hf = {source.hf!r}")], []
    if source.url is not None:
        path = download(source.url, str(source.sha256), downloads, f"{key}.url = {source.url!r}")
        return [_source_file(path, source.url)], []
    return local_files(str(source.path), f"{key}.path = {source.path!r}")


def local_files(pattern: str, where: str) -> tuple[list[SourceFile], list[str]]:
    """The files of a path, a folder or a glob on this machine, and the names of those in the folder that are no data.

    `where` is who named them, for messages.

    Raises:
        InputError: where there is none, or its kind is not known.
    """
    paths, skipped = _matches(pattern, where)
    return [_source_file(path, str(path)) for path in paths], skipped


def _matches(pattern: str, where: str) -> tuple[list[Path], list[str]]:
    pattern = os.path.expandvars(pattern)
    if "$" in pattern:
        raise InputError(f"{where}: an environment variable in it is not set; set it, or write the path out")
    path = Path(pattern)
    if path.is_dir():
        inside = sorted(path.iterdir())
        found = [file for file in inside if file.is_file() and _kind(file) in _READERS and file.name[0] != "."]
        if not found:
            raise InputError(f"{where}: the folder has no file that ends with {_SUFFIXES}")
        return found, [f"{entry.name}/" if entry.is_dir() else entry.name for entry in inside if entry not in found]
    if path.is_file():
        return [path], []
    # Not Path.glob, which refuses an absolute pattern.
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207
    found = sorted(path for path in map(Path, matches) if path.is_file())
    if not found:
        what = "no file matches" if glob.has_magic(pattern) else "no such file or folder"
        raise InputError(f"{where}: {what} (looked from {Path.cwd()})")
    return found, []


def _source_file(path: Path, name: str) -> SourceFile:
    kind = _kind(path)
    if kind not in _READERS:
        raise InputError(f"{name}: unknown kind of file; accepted: {_SUFFIXES}")
    return SourceFile(name, path, lambda: _READERS[kind](path, name))


def _kind(path: Path) -> str:
    """Suffix without that of the compression."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path)
    if name.endswith(".zst"):
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _broken_compression(path: Path, name: str, error: Exception) -> InputError:
    kind = {".gz": "gzip", ".zst": "Zstandard"}.get(path.suffix.lower())
    return InputError(f"{name}: not a valid {kind} file: {error}" if kind else f"{name}: cannot be read: {error}")


_READ_ERRORS = (OSError, EOFError, zlib.error)
"""What a damaged or cut compressed file raises, and a disk."""


def _read_whole(path: Path, name: str) -> bytes:
    try:
        with _open(path) as file:
            return file.read()
    except _READ_ERRORS as error:
        raise _broken_compression(path, name, error) from error


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends; a byte order mark is left out."""
    try:
        file = _open(path)
    except _READ_ERRORS as error:
        raise _broken_compression(path, name, error) from error
    with file:
        number = 0
        while True:
            try:
                raw = file.readline()
                number += 1
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except _READ_ERRORS as error:
                raise _broken_compression(path, name, error) from error
            except UnicodeDecodeError as error:
                raise InputError(f"{name}:{number}: not valid UTF-8: {error.reason}; save the file as UTF-8") from error
            if not raw:
                return
            yield number, line


# --- readers --------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, name: str) -> Iterator[Item]:
    decoder = _Decoder()
    for number, line in _lines(path, name):
        if line.strip():
            yield number, decoder.row(line.rstrip("\r\n"))


class _Decoder:
    """JSON whose faults are named: `json` alone keeps the last of two equal keys, and says nothing."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        self._json = json.JSONDecoder(object_pairs_hook=self._pairs)

    def row(self, text: str) -> Fields | RowFault:
        """The one object that `text` holds."""
        try:
            found, end = self.item(text, _skip_space(text, 0))
        except json.JSONDecodeError as error:
            return RowFault("broken_json", f"not valid JSON: {error.msg} at column {error.colno}")
        if (end := _skip_space(text, end)) < len(text):
            return RowFault("broken_json", f"not valid JSON: Extra data at column {end + 1}")
        return found

    def item(self, text: str, position: int) -> tuple[Fields | RowFault, int]:
        """The object at `position`, and where it ends."""
        self._repeated.clear()
        try:
            value, end = self._json.raw_decode(text, position)
        except RecursionError:
            raise json.JSONDecodeError("Nested too deeply", text, position) from None
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a number of thousands of digits
            raise json.JSONDecodeError(str(error).split(";")[0], text, position) from None
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {"messages": value}  # a bare list of messages is a row too
        if not isinstance(value, dict):
            return RowFault("not_an_object", "expected a JSON object"), end
        if self._repeated:
            return RowFault("repeated_key", f"the key {self._repeated[0]!r} stands in one object twice"), end
        return value, end

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self._repeated += [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        return found


def _repeated(names: Sequence[str]) -> str | None:
    """The first name that stands twice."""
    counts = Counter(names)
    return next((name for name in names if counts[name] > 1), None)


def _read_json(path: Path, name: str) -> Iterator[Item]:
    """A list of objects; objects one a line, as the Hub's `.json` files have them, are read as `.jsonl`."""
    try:
        text = _read_whole(path, name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}:{line}: not valid UTF-8: {error.reason}; save the file as UTF-8") from error
    start = _skip_space(text, 0)
    if text.startswith("{", start):
        yield from _read_jsonl(path, name)
        return
    if not text.startswith("[", start):
        raise InputError(f"{name}:{text.count(chr(10), 0, start) + 1}: expected a JSON list of objects")
    yield from _list_items(text, start + 1, name)


def _list_items(text: str, position: int, name: str) -> Iterator[Item]:
    """Objects of the list whose inside begins at `position`, each with the line it begins on."""
    decoder = _Decoder()
    line, counted = 1, 0
    position = _skip_space(text, position)
    first = True
    while not (first and text.startswith("]", position)):
        line, counted = line + text.count("\n", counted, position), position
        try:
            item, end = decoder.item(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"{name}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
        yield line, item
        first = False
        end = _skip_space(text, end)
        if text.startswith("]", end):
            break
        if not text.startswith(",", end):
            at = text.count("\n", 0, end) + 1
            raise InputError(f"{name}:{at}: not valid JSON: expected a comma or the end of the list")
        position = _skip_space(text, end + 1)


def _skip_space(text: str, position: int) -> int:
    found = _NOT_SPACE.search(text, position)
    return found.start() if found else len(text)


_NOT_SPACE = re.compile(r"[^ \t\r\n]")


def _read_csv(path: Path, name: str) -> Iterator[Item]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in _lines(path, name)), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise InputError(f"{name}: empty; expected a line of column names")
        columns = [column.strip() for column in header]
        if (twice := _repeated(columns)) is not None:
            raise InputError(f"{name}:1: two columns are called {twice!r}: give each its own name")
        line = reader.line_num + 1  # a quoted cell may span lines: a row is named by its first
        for cells in reader:
            if len(cells) == len(columns):
                yield line, dict(zip(columns, cells, strict=True))
            elif cells:
                yield line, RowFault("wrong_columns", f"{len(cells)} cells, expected {len(columns)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{name}:{reader.line_num}: not valid CSV: {error}") from error


def _read_text(path: Path, name: str) -> Iterator[Item]:
    for number, line in _lines(path, name):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


def _read_parquet(path: Path, name: str) -> Iterator[Item]:
    compressed = path.name.lower().endswith(COMPRESSED)
    file: Any = io.BytesIO(_read_whole(path, name)) if compressed else path
    number = 0
    try:
        table = pq.ParquetFile(file)
        if (twice := _repeated(table.schema_arrow.names)) is not None:
            raise InputError(f"{name}: two columns are called {twice!r}: give each its own name")
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not valid UTF-8 after row {number}: {error.reason}; write text as UTF-8") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: not a valid Parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Item]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
_SUFFIXES = f"{', '.join(_READERS)} (each also with .gz or .zst)"


# --- elsewhere ------------------------------------------------------------------------------------------------------


def download(url: str, sha256: str, folder: Path, where: str) -> Path:
    """The file at `url`, in `folder`; one that is there already and has the checksum is not fetched again.

    What a broken connection, or a run that was stopped, left behind is taken up where it ended. `where` names the
    params key and its value.

    Raises:
        InputError: where it cannot be had, or its checksum is another; Unavailable where it may be had later.
    """
    path = folder / sha256[:16] / (PurePosixPath(urlsplit(url).path).name or "download")
    if path.is_file() and file_sha256(path) == sha256:
        return path
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    begun = part.stat().st_size if part.exists() else 0
    try:
        found = _fetch(url, part)
        if found != sha256 and begun:
            # What was begun may be of an older version of the file: once more, from its first byte.
            part.unlink()
            found = _fetch(url, part)
    except httpx.HTTPStatusError as error:
        raise trouble(error)(f"{where}: the server answered {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise trouble(error)(f"{where}: cannot be downloaded: {error or type(error).__name__}") from error
    if found != sha256:
        part.unlink()
        raise InputError(
            f"{where}: the download has sha256 {found}, params.yaml says {sha256}; the file has changed, "
            "or the checksum is of another one: look at it before you correct the checksum"
        )
    part.replace(path)
    return path


def trouble(error: httpx.HTTPError | httpx.InvalidURL) -> type[InputError]:
    """What the failure of a request is: `Unavailable` where it may pass."""
    if isinstance(error, httpx.HTTPStatusError):
        passes = error.response.is_server_error or error.response.status_code == httpx.codes.TOO_MANY_REQUESTS
    else:
        passes = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)
    return Unavailable if passes else InputError


def _fetch(url: str, part: Path) -> str:
    """Fetch what `part` lacks of the file at `url`, over several connections where one breaks; its sha256."""
    for attempt in range(RETRIES + 1):
        try:
            _fetch_once(url, part)
            break
        except httpx.TransportError as error:
            if attempt == RETRIES or isinstance(error, httpx.UnsupportedProtocol):
                raise
            log.warning("%s: %s; trying again", url, error or type(error).__name__)
            time.sleep(RETRY_DELAY * 2**attempt)
    return file_sha256(part)


def _fetch_once(url: str, part: Path) -> None:
    begun = part.stat().st_size if part.exists() else 0
    # The file as it is stored: a compressed transfer of it would have another checksum.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={begun}-"} if begun else {})}
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=DOWNLOAD_TIMEOUT) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all of it was there
        response.raise_for_status()
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            begun = 0  # a server that knows no ranges sends all of it again
        total = begun + int(response.headers.get("content-length", 0))
        with part.open("ab" if begun else "wb") as file, progress(f"download {part.stem}", total) as advance:
            advance(begun)
            for chunk in response.iter_raw():
                file.write(chunk)
                advance(len(chunk))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hf_split(name: str, where: str) -> SourceFile:
    dataset, colon, split = name.rpartition(":")
    if not colon or not dataset or not split:
        raise InputError(f"{where}: name the split after a colon, for example {name.strip(':')}:train")
    return SourceFile(name, None, lambda: _read_hf(dataset, split, where))


def _read_hf(dataset: str, split: str, where: str) -> Iterator[Item]:
    # Seconds to import, and only this kind of source needs it.
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        # Streamed: no second copy in the cache of `datasets`.
        yield from enumerate(datasets.load_dataset(dataset, split=split, streaming=True), start=1)
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(f"{where}: `datasets` cannot load it: {error}") from error
