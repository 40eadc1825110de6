"""What all commands have in common on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from chatloom.errors import InputError

ModelOption = Annotated[
    str, typer.Option("--model", help="models:/name@alias, models:/name/version, or a checkpoint's folder.")
]


@contextmanager
def input_errors() -> Iterator[None]:
    """An input error is a line for the user; any other error is a bug and keeps its traceback."""
    try:
        yield
    except InputError as error:
        typer.echo(f"chatloom: {error}", err=True)
        raise typer.Exit(1) from error
