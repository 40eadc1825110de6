"""`python -m tasks.reproduce --preset smoke`: plain `dvc repro` where the preset runs, without Prefect."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from chatloom.errors import InputError
from tasks.alone import alone_in
from tasks.workspace import DEFAULT, DVC, Reproduction, workspace_path


def main(
    preset: Annotated[str, typer.Option(help="A file of params/, or 'default'.")] = DEFAULT,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Another value, as train_sft.seed=7; repeatable.")
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage and what it needs; repeatable.")] = None,
) -> None:
    """Bring every stage up to date."""
    root, overrides = Path.cwd().resolve(), override or []
    try:
        workspace = workspace_path(preset, root, overrides)
        with alone_in(workspace, lambda line: typer.echo(line, err=True)) as record:
            reproduction = Reproduction.start(preset, root, overrides)
            record({"reproduction": reproduction.id})
            os.chdir(workspace)
            # DVC takes the place of this process: its exit status and the signals sent to it need no passing on.
            command = [*DVC, "repro", *(stage or [])]
            os.execve(sys.executable, command, reproduction.environment())
    except InputError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
