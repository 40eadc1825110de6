"""`python -m bench`: measure, and say what came of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from bench.measure import Setup, measure
from bench.pages import BENCHMARKS, fill
from bench.parts import PARTS, select
from bench.presets import ROOT
from bench.report import Measured, all_lines, all_points, markdown, measured_parts, terminal_tables
from bench.results import read_measurements
from chatloom.errors import InputError

T = TypeVar("T")
WORKSPACE = ROOT / ".bench"
RESULTS = ROOT / "bench" / "results"
STARTER = str(ROOT / "data/starter/*.jsonl")

app = typer.Typer(add_completion=False, help=f"Parts: {', '.join(part.name for part in PARTS)}.")


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    part: Annotated[list[str] | None, typer.Option(help="Only parts that begin so; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that the sides take turns.")] = 3,
    checkpoint: Annotated[Path, typer.Option(help="The model both sides start from.")] = ROOT / "models" / "base",
    rows: Annotated[str, typer.Option(help="Instructions, in any format that raw_data accepts.")] = STARTER,
    preferences: Annotated[str, typer.Option(help="Ranked responses or preferences, likewise.")] = STARTER,
    results: Annotated[Path, typer.Option(help="Folder of the JSON files and pictures.")] = RESULTS,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny random model and few steps, to see it run.")] = False,
) -> None:
    """Measure every part, or some, against the peers, in turn; print the ratios, write JSON and pictures."""
    if context.invoked_subcommand is not None:
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if smoke:
        rounds, results = 1, WORKSPACE / "smoke"
    setup = Setup(checkpoint.resolve(), _absolute(rows), _absolute(preferences), WORKSPACE, results, rounds, smoke)
    parts = _or_exit(lambda: select(part or []))
    measured = _or_exit(lambda: measure(parts, setup))
    show(list(zip(parts, measured, strict=True)))
    draw(_read(results), results)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of the JSON files.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="Page whose results are written anew.")] = BENCHMARKS,
) -> None:
    """Show all results again, and write them into the page."""
    measured = _read(results)
    show(measured)
    pictures = [os.path.relpath(picture, page.parent) for picture in draw(measured, results)]
    _or_exit(lambda: fill(page, {"results": markdown(measured, pictures)}))


def show(measured: Measured) -> None:
    console = Console()
    for table in terminal_tables(measured):
        console.print(table)


def draw(measured: Measured, folder: Path) -> list[Path]:
    """The pictures that the measurements allow, in `folder`."""
    from bench.plots import plot_ratios, plot_scaling  # matplotlib takes a second to import

    pictures = []
    if lines := all_lines(measured):
        plot_ratios(lines, folder / "ratios.png")
        pictures.append(folder / "ratios.png")
    if points := all_points(measured):
        plot_scaling(points, folder / "scaling.png")
        pictures.append(folder / "scaling.png")
    return pictures


def _read(results: Path) -> Measured:
    return _or_exit(lambda: measured_parts(read_measurements(results)))


def _absolute(pattern: str) -> str:
    """A path or glob as seen from here: the processes run in the project's root."""
    return str(Path.cwd() / pattern)


def _or_exit(work: Callable[[], T]) -> T:
    try:
        return work()
    except InputError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
