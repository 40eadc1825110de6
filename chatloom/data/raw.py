"""Raw rows: every source in one canonical schema, each row with its provenance. What `raw_data` writes."""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from chatloom.config import DataSource, Format, RawDataParams
from chatloom.data.drops import Drops, RowFault
from chatloom.data.feedback import learn
from chatloom.data.schemas import (
    ACCEPTED,
    Fields,
    RawRow,
    convert,
    detect_format,
    detect_language,
    ignored_keys,
    keys_of,
    text_of,
)
from chatloom.data.sources import Item, SourceFile, file_sha256, locate
from chatloom.errors import InputError

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("lang", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("responses", pa.list_(pa.string())),
        ("source", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("license", pa.string()),
        ("group", pa.string()),
        ("splits", pa.list_(pa.string())),
        ("weight", pa.float64()),
    ]
)
ROWS_LOOKED_AT = 20
"""Rows whose keys tell the format of a file."""


@dataclass
class _FileReport:
    """What became of one file's rows."""

    file: str
    format: Format
    detected: bool
    ignored_keys: list[str]
    sha256: str | None
    rows_in: int = 0
    leading_assistant: int = 0
    without_group: int = 0
    drops: Drops = field(default_factory=Drops)

    def report(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "sha256": self.sha256,
            "format": self.format,
            "detected": self.detected,
            "ignored_keys": self.ignored_keys,
            "rows_in": self.rows_in,
            "rows_out": self.rows_in - self.drops.total,
            "dropped": self.drops.report(),
            "leading_assistant_turns_made_system": self.leading_assistant,
            "rows_without_group": self.without_group,
        }


@dataclass(frozen=True)
class _Source:
    params: DataSource
    key: str
    """Its place in `params.yaml`."""
    group: re.Pattern[str] | None
    several_files: bool


def ingest(params: RawDataParams, out: Path, *, downloads: Path | None = None) -> dict[str, Any]:
    """Write the rows of every source to `out/<source>-00000.parquet`, ...; equal sources give equal bytes.

    `downloads` keeps what came from a `url` (None: only while this runs).

    Returns:
        The report, as JSON: rows in and out and every drop by reason, in all, by source and by file.

    Raises:
        InputError: naming the params key or the file and line, where a source cannot be used at all.
    """
    with tempfile.TemporaryDirectory() as temporary:
        ids: set[str] = set()
        sources = [
            _ingest_source(
                source, f"raw_data.sources[{index}]", out, params.shard_rows, ids, downloads or Path(temporary)
            )
            for index, source in enumerate(params.sources)
        ]
    drops = Drops()
    languages: Counter[str] = Counter()
    for source_drops, report in sources:
        drops.merge(source_drops)
        languages.update(report["languages"])
    reports = [report for _, report in sources]
    return {
        **_totals(reports),
        "dropped": drops.report(),
        "languages": dict(sorted(languages.items())),
        "sources": reports,
    }


def converted_rows(
    source: DataSource, key: str, downloads: Path
) -> Iterator[tuple[str, int, RawRow | RowFault | InputError]]:
    """Name, line and row of all there is in a source, or what is wrong with it: of a whole file at the line 0.

    Raises:
        InputError: where there is no such source.
    """
    files, skipped = locate(source, key, downloads)
    context = _Source(source, key, _group_pattern(source, key), len(files) > 1)
    for name in skipped:
        yield name, 0, InputError(f"{name}: warning: not read: no kind of file that is known")
    for file in files:
        empty = True
        try:
            for line, row in _converted(file, context, []):
                empty = False
                yield file.name, line, row
            if empty:
                raise InputError(f"{file.name}: no rows")
        except InputError as error:
            yield file.name, 0, error


def raw_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report of `ingest`, flat."""
    return {
        "rows/in": report["rows_in"],
        "rows/out": report["rows_out"],
        **{f"languages/{language}": rows for language, rows in report["languages"].items()},
        "dropped/total": report["rows_in"] - report["rows_out"],
        **{f"dropped/{reason}": found["rows"] for reason, found in report["dropped"].items()},
    }


def read_raw(folder: Path) -> Iterator[RawRow]:
    """The rows that `ingest` wrote, source by source by name.

    Raises:
        InputError: where the folder has no shard.
    """
    for shard in raw_shards(folder):
        yield from read_shard(shard)


def raw_shards(folder: Path) -> list[Path]:
    """The files that `ingest` wrote, in the order of their rows."""
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise InputError(f"{folder}: no raw rows; run the stage raw_data first")
    return shards


def count_rows(shard: Path) -> int:
    return int(pq.read_metadata(shard).num_rows)


def read_shard(shard: Path) -> Iterator[RawRow]:
    for row in pq.read_table(shard, schema=SCHEMA).to_pylist():
        yield RawRow(**row)


def content_hash(row: RawRow) -> str:
    """Of the text of a row, whatever its id or place."""
    text = json.dumps([row.messages, row.responses], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _ingest_source(
    source: DataSource, key: str, out: Path, shard_rows: int, ids: set[str], downloads: Path
) -> tuple[Drops, dict[str, Any]]:
    files, skipped = locate(source, key, downloads)
    context = _Source(source, key, _group_pattern(source, key), len(files) > 1)
    reports: list[_FileReport] = []
    rows: Iterable[RawRow] = chain.from_iterable(_rows_of_file(file, context, reports) for file in files)
    if source.max_rows is not None:
        rows = _cap(rows, source.max_rows, reports)
    languages: Counter[str] = Counter()
    _write_shards(_counted(rows, languages), source.name, out, shard_rows, ids)
    drops = Drops()
    for report in reports:
        drops.merge(report.drops)
    file_reports = [report.report() for report in reports]
    totals = _totals(file_reports)
    log.info("raw_data: %s: %d of %d rows", source.name, totals["rows_out"], totals["rows_in"])
    return drops, {
        "name": source.name,
        "license": source.license,
        "splits": source.splits,
        "weight": source.weight,
        **totals,
        "dropped": drops.report(),
        "languages": dict(sorted(languages.items())),
        "skipped_files": skipped,
        "files": file_reports,
    }


def _totals(reports: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(report[key] for report in reports) for key in ("rows_in", "rows_out")}


def _group_pattern(source: DataSource, key: str) -> re.Pattern[str] | None:
    if source.group is None:
        return None
    where = f"{key}.group = {source.group!r}"
    try:
        pattern = re.compile(source.group)
    except re.error as error:
        raise InputError(f"{where}: not a regular expression: {error}") from error
    if not pattern.groups:
        raise InputError(f"{where}: has no group; put the part that translations share in parentheses")
    return pattern


def _rows_of_file(file: SourceFile, source: _Source, reports: list[_FileReport]) -> Iterator[RawRow]:
    """Converted rows of one file; its report, added to `reports`, is complete when the last row is taken."""
    for line, row in _converted(file, source, reports):
        report = reports[-1]
        report.rows_in += 1
        if isinstance(row, RowFault):
            report.drops.add(row.reason, f"{file.name}:{line}: {row}")
        else:
            yield row
    report = reports[-1]
    if not report.rows_in:
        raise InputError(f"{file.name}: no rows")
    if report.drops.total == report.rows_in:
        raise InputError(
            f"{report.drops.first()}\nnone of the {report.rows_in} rows of {file.name} can be used as {report.format}; "
            f"if that is not its format, set {source.key}.format"
        )


def _converted(
    file: SourceFile, source: _Source, reports: list[_FileReport]
) -> Iterator[tuple[int, RawRow | RowFault]]:
    """Every row of a file with its line; the file's report is added to `reports` first."""
    items = file.read()
    report, looked_at = _begin(file, source, items)
    reports.append(report)
    rows = chain(looked_at, items)
    for line, fields in learn(rows) if report.format == "feedback" else rows:
        try:
            if isinstance(fields, RowFault):
                raise fields
            row: RawRow | RowFault = _row(fields, line, report, source)
        except RowFault as fault:
            row = fault
        yield line, row


def _begin(file: SourceFile, source: _Source, items: Iterator[Item]) -> tuple[_FileReport, list[Item]]:
    """The format of a file, and the items that were read to find it."""
    looked_at: list[Item] = []
    samples: list[Fields] = []
    for item in items:
        looked_at.append(item)
        if not isinstance(item[1], RowFault):
            samples.append(item[1])
        if len(samples) == ROWS_LOOKED_AT:
            break
    given = source.params.format
    format = given if given != "auto" else _detected(file, source.key, looked_at, samples)
    sha256 = file_sha256(file.path) if file.path is not None else None
    ignored = ignored_keys(samples, format)
    if ignored:
        log.info("raw_data: %s: %s rows; keys not read: %s", file.name, format, ", ".join(ignored))
    return _FileReport(file.name, format, given == "auto", ignored, sha256), looked_at


def _detected(file: SourceFile, key: str, looked_at: list[Item], samples: list[Fields]) -> Format:
    if file.is_text:
        return "text"
    found = detect_format(samples)
    if found is not None:
        return found
    if not samples:
        faults = [f"{file.name}:{line}: {fault}" for line, fault in looked_at if isinstance(fault, RowFault)]
        raise InputError(
            f"{faults[0]}\nnone of its {len(faults)} rows can be read" if faults else f"{file.name}: no rows"
        )
    keys = keys_of(samples)
    accepted = "\n".join(f"  {format}: {shape}" for format, shape in ACCEPTED.items())
    raise InputError(
        f"{file.name}: unknown schema, its rows have the keys {', '.join(keys)}; accepted:\n{accepted}\n"
        f"rename its keys, or set {key}.format"
    )


def _row(fields: Fields, line: int, report: _FileReport, source: _Source) -> RawRow:
    conversation = convert(fields, report.format)
    params = source.params
    stem = f"{params.name}-{Path(report.file).name.split('.')[0]}" if source.several_files else params.name
    own_id = _own(fields, "id")
    found = source.group.search(own_id) if source.group is not None and own_id is not None else None
    report.leading_assistant += conversation.leading_assistant
    report.without_group += source.group is not None and found is None
    return RawRow(
        id=f"{stem}-{line}" if own_id is None else own_id,
        lang=_language(fields) or params.lang or detect_language(conversation),
        messages=conversation.messages,
        responses=conversation.responses,
        source=params.name,
        file=report.file,
        line=line,
        license=params.license,
        # With the pattern: item 7 of one dataset is not item 7 of another.
        group=f"{params.group} {found.group(1)}" if found else None,
        splits=params.splits,
        weight=params.weight,
    )


def _own(fields: Fields, key: str) -> str | None:
    """The row's own id or language; a number is one too."""
    value = fields.get(key)
    if value is None or value == "":
        return None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_of(value, key)


def _language(fields: Fields) -> str | None:
    """The row's own language code, which becomes part of metric names."""
    code = _own(fields, "lang")
    if code is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", code):
        raise RowFault("unknown_language", f"lang is {code!r}, expected a code like en or zh")
    return code


def _cap(rows: Iterable[RawRow], max_rows: int, reports: list[_FileReport]) -> Iterator[RawRow]:
    """The rows with the smallest hashes, in their order: rows that are added later displace few of them."""
    read: Counter[str] = Counter()

    def counted() -> Iterator[tuple[int, RawRow]]:
        for order, row in enumerate(rows):
            read[row.file] += 1
            yield order, row

    kept = sorted(
        heapq.nsmallest(max_rows, counted(), key=lambda item: content_hash(item[1])), key=lambda item: item[0]
    )
    taken = Counter(row.file for _, row in kept)
    for report in reports:
        report.drops.add_count("over_max_rows", read[report.file] - taken[report.file])
    return (row for _, row in kept)


def _counted(rows: Iterable[RawRow], languages: Counter[str]) -> Iterator[RawRow]:
    for row in rows:
        languages[row.lang] += 1
        yield row


def _write_shards(rows: Iterable[RawRow], name: str, out: Path, shard_rows: int, ids: set[str]) -> None:
    remaining = iter(rows)
    number = 0
    while shard := list(islice(remaining, shard_rows)):
        values = [{**vars(row), "id": _unique(row, ids)} for row in shard]
        table = pa.Table.from_pylist(values, schema=SCHEMA)
        pq.write_table(table, out / f"{name}-{number:05d}.parquet", compression="zstd")
        number += 1


def _unique(row: RawRow, ids: set[str]) -> str:
    """The row's id, with its source's name where another row has it, and with its line where that is not enough."""
    for candidate in (row.id, f"{row.source}-{row.id}", f"{row.source}-{row.id}-{row.line}"):
        if candidate not in ids:
            break
    else:
        number = 2
        while f"{candidate}~{number}" in ids:
            number += 1
        candidate = f"{candidate}~{number}"
    ids.add(candidate)
    return candidate
