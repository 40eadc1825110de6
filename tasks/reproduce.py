"""`python -m tasks.reproduce --preset smoke`: plain `dvc repro` where the preset runs, without Prefect."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from chatloom.errors import InputError
from tasks.workspace import DEFAULT, Reproduction


def main(
    preset: Annotated[str, typer.Option(help="A file of params/, or 'default'.")] = DEFAULT,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage and what it needs; repeatable.")] = None,
) -> None:
    """Bring every stage up to date."""
    try:
        reproduction = Reproduction.start(preset, Path.cwd())
    except InputError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    os.chdir(reproduction.workspace)
    # DVC takes the place of this process: its exit status and the signals sent to it need no passing on.
    os.execve(sys.executable, [sys.executable, "-m", "dvc", "repro", *(stage or [])], reproduction.environment())


if __name__ == "__main__":
    typer.run(main)
