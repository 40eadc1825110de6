"""`chatloom lineage`, `verify`, `promote` and `rollback`: look behind a registered version, and move the champion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from chatloom.errors import InputError
from chatloom.files import atomic_file
from chatloom.terminal import input_errors

# MLflow takes seconds to import: the commands import what needs it.
app = typer.Typer()

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="models:/name@alias or models:/name/version.")]
NameOption = Annotated[str, typer.Option("--model", help="Name of the registered model.")]
ReasonOption = Annotated[str, typer.Option(help="Why; kept as a tag of the model, with who and when.")]
ExpectOption = Annotated[
    str | None, typer.Option(help="Version that has to be champion now, 'none' for none; else nothing is moved.")
]


@app.command()
def lineage(
    model: ModelArgument = "models:/chatloom@champion",
    as_json: Annotated[bool, typer.Option("--json", help="Every fact, as JSON.")] = False,
    graph: Annotated[Path | None, typer.Option(help="Write the graph, as .svg or as a page .html.")] = None,
) -> None:
    """Show what stands behind a version: runs, data with rows and licences, code, params, machine."""
    with input_errors():
        from chatloom.registry.graph import draw_lineage, page_of
        from chatloom.registry.versions import describe, read_version

        if graph is not None and graph.suffix not in (".svg", ".html"):
            raise InputError(f"--graph {graph}: give a name that ends with .svg or .html")
        version = read_version(model)
        if graph is not None:
            svg = draw_lineage(version.title, version.facts)
            with atomic_file(graph) as temporary:
                temporary.write_text(svg if graph.suffix == ".svg" else page_of(version.title, svg), encoding="utf-8")
            typer.echo(f"{graph}: the graph", err=True)
        typer.echo(json.dumps(version.as_json(), indent=2, ensure_ascii=False) if as_json else describe(version))


@app.command()
def verify(
    model: ModelArgument = "models:/chatloom@champion",
    workspace: Annotated[
        Path | None, typer.Option(help="Where the stages ran; found by itself for presets of this checkout.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every finding, as JSON.")] = False,
) -> None:
    """Hash everything behind a version again; exit with status 1 where something is missing, changed or unrepeatable.

    Bytes are looked for in this workspace, in DVC's cache and in git.
    """
    with input_errors():
        from chatloom.registry.verify import check_version, summarize

        findings = check_version(model, workspace)
        typer.echo(
            json.dumps([vars(finding) for finding in findings], indent=2, ensure_ascii=False)
            if as_json
            else summarize(findings)
        )
    if any(finding.bad for finding in findings):
        raise typer.Exit(1)


@app.command()
def promote(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="models:/name/version or models:/name@challenger.")],
    reason: ReasonOption,
    expect: ExpectOption = None,
    without_comparison: Annotated[
        bool, typer.Option("--without-comparison", help="Though its gates compared it with another champion.")
    ] = False,
) -> None:
    """Make a version the champion; one that failed a gate is refused."""
    with input_errors():
        from chatloom.registry.versions import promote as run

        move = run(model, reason, expect, compared=not without_comparison)
    typer.echo(f"version {move.version} is champion, before: {move.before or 'none'}")


@app.command()
def rollback(
    reason: ReasonOption,
    model: NameOption = "chatloom",
    expect: ExpectOption = None,
) -> None:
    """Make the version champion again that was it before the present one."""
    with input_errors():
        from chatloom.registry.versions import rollback as run

        move = run(model, reason, expect)
    typer.echo(f"version {move.version} is champion again, before: {move.before}")
