"""`chatloom data`: look at files before a run reads them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from chatloom.config import CleaningParams, DataSource, Format, load_params
from chatloom.errors import InputError
from chatloom.files import atomic_file
from chatloom.terminal import input_errors

# pyarrow and what reads files take a while to import: the functions that read import them.
app = typer.Typer(help="Look at data files before a run reads them.", no_args_is_help=True)

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="A file, a folder or a quoted glob of any accepted kind.")
]
FormatOption = Annotated[str, typer.Option("--format", help="Schema of the rows; auto detects it, once per file.")]
LangOption = Annotated[str | None, typer.Option(help="Language of rows that do not say their own.")]
ParamsOption = Annotated[Path, typer.Option(help="Values of the cleaning steps and of the length limits.")]


@app.command()
def validate(
    file: FileArgument,
    format: FormatOption = "auto",
    lang: LangOption = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Name every row that a run would drop, as file:line: reason: detail; exit with status 1 where there is one."""
    with input_errors():
        source, cleaning = _source(file, format, lang), load_params(params).prepare_data.cleaning
        rows = faulty = 0
        for line in findings(source, cleaning):
            rows += line is None
            if line is not None:
                faulty += ": warning: " not in line
                typer.echo(line)
    typer.echo(f"{rows} rows can be used, {faulty} faults", err=True)
    if faulty:
        raise typer.Exit(1)


@app.command()
def inspect(
    file: FileArgument,
    format: FormatOption = "auto",
    lang: LangOption = None,
    params: ParamsOption = Path("params.yaml"),
    model: Annotated[Path, typer.Option(help="Folder with the tokenizer that counts tokens.")] = Path("models/base"),
    html: Annotated[Path | None, typer.Option(help="Write the page that a run writes, too.")] = None,
) -> None:
    """Show what a run would make of the files: rows in and out by step, languages, lengths, near-duplicates, tokens."""
    with input_errors():
        raw, prepared = _reports(_source(file, format, lang), params, model)
    from rich.console import Console

    console = Console()
    for part in _tables(raw, prepared):
        console.print(part)
    if html is not None:
        from chatloom.data.report import render_data_report

        with atomic_file(html) as temporary:
            temporary.write_text(render_data_report(raw, prepared), encoding="utf-8")


def findings(source: DataSource, cleaning: CleaningParams) -> Iterator[str | None]:
    """What is wrong with each row, or a whole file, of `source`; None for each row that a run would keep.

    A line with `: warning: ` is about a row that is kept: mended, or only looked at.
    """
    from chatloom.data.cleaning import clean
    from chatloom.data.drops import RowFault
    from chatloom.data.raw import converted_rows
    from chatloom.data.splits import prompt_key

    seen: dict[tuple[str, ...], str] = {}
    with tempfile.TemporaryDirectory() as downloads:
        for name, line, row in converted_rows(source, "FILE", Path(downloads)):
            place = f"{name}:{line}"
            if isinstance(row, InputError):
                yield str(row)
                continue
            try:
                if isinstance(row, RowFault):
                    raise row
                cleaned = clean(row.messages, row.responses, row.lang, cleaning)
            except RowFault as fault:
                yield f"{place}: {fault.reason}: {fault}"
                continue
            first = seen.setdefault((prompt_key(cleaned.messages), *cleaned.responses), place)
            if first != place:
                yield f"{place}: duplicate: same prompt and responses as {first}"
                continue
            for step, detail in (*cleaned.mended, *cleaned.noticed):
                yield f"{place}: warning: {step}: {detail}"
            yield None


def _source(file: str, format: str, lang: str | None) -> DataSource:
    known = get_args(Format)
    if format not in known:
        raise InputError(f"--format {format}: unknown; one of {', '.join(known)}")
    return DataSource.model_validate(
        {
            "name": "file",
            "path": file,
            "format": format,
            "lang": lang,
            "license": "",
            "splits": ["sft", "reward", "ppo", "ptx", "eval"],
            "group": None,
            "max_rows": None,
            "weight": 1,
        }
    )


def _reports(source: DataSource, params: Path, model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reports that `raw_data` and `prepare_data` would write of `source` alone."""
    from chatloom.data.raw import ingest

    values = load_params(params)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        raw.mkdir()
        raw_report = ingest(values.raw_data.model_copy(update={"sources": [source]}), raw)
        from chatloom.data.prepare import prepare
        from chatloom.data.templates import load_tokenizer

        return raw_report, prepare(values.prepare_data, raw, *load_tokenizer(model), Path(folder, "prepared"))


def _tables(raw: dict[str, Any], prepared: dict[str, Any]) -> Iterator[Any]:
    """The report as tables for a terminal."""
    from rich.table import Table
    from rich.text import Text

    for source in raw["sources"]:
        for file in source["files"]:
            ignored = f"; keys not read: {', '.join(file['ignored_keys'])}" if file["ignored_keys"] else ""
            how = "detected" if file["detected"] else "given"
            yield Text(f"{file['file']}: {file['format']} ({how}), {file['rows_in']} rows{ignored}")
    yield Text(f"{raw['rows_in']} rows in, {prepared['rows_out']} out")
    groups = [("dropped", raw["dropped"]), *((what, prepared[what]) for what in ("dropped", "mended", "noticed"))]
    if any(found for _, found in groups):
        table = Table("", "step", "rows", "for example", title="Steps", title_justify="left")
        for what, found in groups:
            for step, item in found.items():
                example = Text("\n".join(item["examples"][:1]), overflow="ellipsis", no_wrap=True)
                table.add_row(what, step, str(item["rows"]), example)
        yield table
    table = Table(
        "split", "rows", "languages", "tokens", "prompt tokens", "response tokens", title="Splits", title_justify="left"
    )
    for split, found in prepared["splits"].items():
        languages = ", ".join(f"{lang} {rows}" for lang, rows in found["languages"].items())
        lengths = [found["lengths"][name] for name in ("prompt_tokens", "response_tokens")]
        ranges = [f"{spread['median']:.0f} (to {spread['max']:.0f})" if spread else "" for spread in lengths]
        table.add_row(split, str(found["rows"]), languages, str(found["tokens"]), *ranges)
    yield table
    clusters = prepared["clusters"]
    yield Text(f"{clusters['clusters']} clusters of {clusters['rows']} rows that ask nearly the same")
    for cluster in clusters["largest"]:
        yield Text(f"  {cluster['rows']} rows: {cluster['examples'][0]}", overflow="ellipsis", no_wrap=True)
