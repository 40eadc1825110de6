"""Data preparation against the plain `datasets.map` recipe, in turn, in one run, and over sizes: `make bench-data`.

    python -m bench.data --rows instructions.jsonl.gz

Both sides read the same file and write what training reads. Ours also cleans, finds near-duplicates, splits and checks
for leaks. Time is of the whole process, imports included; memory is the largest sum of its processes' resident sets.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import psutil
import typer

from bench.machine import describe_machine
from bench.pages import BENCHMARKS, fill, table
from bench.presets import ROOT
from chatloom.files import write_json

PROCESSES = 2
POLL_SECONDS = 0.1
MOST_SECONDS, MOST_BYTES, MOST_RATIO = 60, 2e9, 3
app = typer.Typer(add_completion=False)


@app.command()
def main(
    rows: Annotated[Path, typer.Option(help="JSON lines of Alpaca rows, plain or .gz.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder with the tokenizer.")] = ROOT / "models" / "base",
    sizes: Annotated[
        str, typer.Option(help="Rows of the runs over sizes; more than there are repeats them, changed.")
    ] = "10000,104004,416016",
    rounds: Annotated[int, typer.Option(min=1, help="Times that the two sides take turns on the whole file.")] = 3,
    out: Annotated[Path, typer.Option(help="JSON file of the results.")] = ROOT
    / "bench"
    / "results"
    / "data"
    / "data.json",
) -> None:
    """Measure both sides on the whole file, in turn, then ours on each size."""
    with TemporaryDirectory() as folder:
        results: dict[str, Any] = {"machine": describe_machine().model_dump(), "rounds": [], "sizes": []}
        for number in range(rounds):
            ours = run("bench.ours.data", rows, checkpoint, Path(folder))
            plain = run("bench.peers.data_map", rows, checkpoint, Path(folder))
            results["rounds"].append({"ours": ours, "plain": plain})
            typer.echo(f"round {number + 1}: ours {describe(ours)}; plain {describe(plain)}")
        for size in map(int, sizes.split(",")):
            resized = Path(folder, f"rows-{size}.jsonl")
            resize(rows, resized, size)
            found = run("bench.ours.data", resized, checkpoint, Path(folder))
            results["sizes"].append(found)
            typer.echo(f"{size} rows: {describe(found)}, {size / found['seconds']:.0f} rows/s")
            resized.unlink()
    write_json(out, results)
    section = markdown(results)
    typer.echo(section)
    fill(BENCHMARKS, {"data": section})


def run(module: str, rows: Path, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """One side in a process of its own: seconds, largest memory of the process and its children, and what it says."""
    job = {"rows": str(rows.resolve()), "checkpoint": str(checkpoint.resolve()), "processes": PROCESSES}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    with TemporaryDirectory(dir=folder) as work:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps({**job, "out": work})],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - started
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{module} failed ({process.returncode})")
    return {"seconds": seconds, "peak_bytes": peak, **json.loads(output.strip().splitlines()[-1])}


def resident(pid: int) -> int:
    """Bytes in memory of a process and its children; pages that they share count for each."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def resize(rows: Path, out: Path, size: int) -> None:
    """The first `size` rows, or copies of all of them, each with its number in question and answer."""
    content = rows.read_bytes()
    lines = (gzip.decompress(content) if rows.suffix == ".gz" else content).decode().splitlines()
    with out.open("w", encoding="utf-8") as file:
        for number in range(size):
            copy, place = divmod(number, len(lines))
            row = json.loads(lines[place])
            if copy:
                row["id"] = f"{row['id']}-{copy}"
                # Words of its own throughout, so that a copy is no near-duplicate that is dropped early.
                row["instruction"] = " ".join(f"{word}{copy}" for word in row["instruction"].split())
                row["output"] = " ".join(f"{word}{copy}" for word in row["output"].split())
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def markdown(results: dict[str, Any]) -> str:
    """Medians of the rounds, then a line for each size."""
    rounds = results["rounds"]
    ratios = [pair["ours"]["seconds"] / pair["plain"]["seconds"] for pair in rounds]

    def row(name: str, runs: Sequence[dict[str, Any]], met: str = "") -> tuple[str, ...]:
        seconds = [found["seconds"] for found in runs]
        spread = f" ({min(seconds):.1f} to {max(seconds):.1f})" if len(runs) > 1 else ""
        peak = max(found["peak_bytes"] for found in runs)
        speed = runs[0]["rows_in"] / median(seconds)
        return name, f"{median(seconds):.1f}{spread}", f"{speed:,.0f}", f"{peak / 2**30:.2f} GiB", met

    ours = [pair["ours"] for pair in rounds]
    met = median([found["seconds"] for found in ours]) <= MOST_SECONDS
    met = met and max(found["peak_bytes"] for found in ours) <= MOST_BYTES and median(ratios) <= MOST_RATIO
    rows = [
        row("`raw_data` and `prepare_data`", ours, "yes" if met else "no"),
        row("plain `datasets.map`", [pair["plain"] for pair in rounds]),
        *(row(f"ours, {found['rows_in']:,} rows", [found]) for found in results["sizes"]),
    ]
    return (
        f"{table(('run', 'seconds', 'rows/s', 'peak memory', 'met'), rows)}\n\n"
        f"Ours takes {median(ratios):.2f} times the plain recipe ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"wanted: at most {MOST_RATIO}, {MOST_SECONDS} s and {MOST_BYTES / 1e9:.0f} GB."
    )


def describe(found: dict[str, Any]) -> str:
    return f"{found['seconds']:.1f} s, {found['peak_bytes'] / 2**30:.2f} GiB, {found['rows']} rows"


if __name__ == "__main__":
    app()
