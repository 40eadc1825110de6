"""Pages of docs/ whose tables are written by programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.presets import ROOT
from chatloom.errors import InputError
from chatloom.files import atomic_file

BENCHMARKS = ROOT / "docs" / "benchmarks.md"


def filled(page: str, sections: Mapping[str, str]) -> str:
    """`page` with each section in its place, between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.

    Raises:
        InputError: where a marker is missing.
    """
    for name, section in sections.items():
        before, begin, rest = page.partition(f"<!-- begin: {name} -->")
        _, end, after = rest.partition(f"<!-- end: {name} -->")
        if not begin or not end:
            raise InputError(f"the page has no place for {name}: it needs <!-- begin: {name} --> and its end")
        page = f"{before}{begin}\n\n{section}\n\n{end}{after}"
    return page


def fill(page: Path, sections: Mapping[str, str]) -> None:
    """Write the sections into the file."""
    text = filled(page.read_text(encoding="utf-8"), sections)
    with atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
