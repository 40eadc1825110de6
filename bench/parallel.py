"""SFT in two processes against one with as many threads, at the same rows a step, in turn: `make bench-parallel`.

    python -m bench.parallel --rounds 3

Every run is the loop of the stage on mapped rows, in fresh processes. Steps are timed from the end of the first to the
end of the last; the time to start is from the command to the moment when all processes are connected.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from bench import pages
from bench.machine import describe_machine
from bench.measure import LONGEST_PROMPT, run_process
from bench.ours.assets import make_random_model, make_rows
from bench.ours.parallel import Job
from bench.presets import ROOT
from bench.side import Row
from chatloom.config import Strategy
from chatloom.data.prepared import PreparedRow, write_split
from chatloom.errors import InputError
from chatloom.files import write_json
from chatloom.parallel.memory import Job as PlannedJob
from chatloom.parallel.memory import moments
from chatloom.parallel.shapes import Shape

PROCESSES = 2
ROWS_PER_STEP = 8
ALONE: Strategy = "none"
STRATEGIES: tuple[Strategy, ...] = (ALONE, "ddp", "colossalai_zero1", "colossalai_zero2")
HEAD = (
    "strategy",
    "seconds a step",
    "over one process (lowest to highest)",
    "waiting for rows",
    "to start",
    "to the end of the first step",
    "peak memory a process",
    "of it over imports",
    "planned",
    "last loss",
    "met",
)
OVERHEAD, IDLE = 1.25, 0.02
"""At most: time a step over that of one process; share of it spent waiting for rows."""
app = typer.Typer(add_completion=False)


@app.command()
def main(
    rows: Annotated[str, typer.Option(help="Rows in any accepted format.")] = str(ROOT / "data/starter/*.jsonl"),
    checkpoint: Annotated[Path, typer.Option(help="Model that is trained.")] = ROOT / "models" / "base",
    rounds: Annotated[int, typer.Option(min=1, help="Times that the strategies take turns.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of a run; the first one is not timed.")] = 8,
    smoke: Annotated[bool, typer.Option(help="On a tiny random model, to see it run; nothing is kept.")] = False,
    out: Annotated[Path, typer.Option(help="JSON file of the results.")] = ROOT
    / "bench"
    / "results"
    / "parallel"
    / "parallel.json",
) -> None:
    """Measure each strategy in turn, and show the medians."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if smoke:
            checkpoint = folder / "model"
            make_random_model(checkpoint, hidden_size=64, num_layers=2)
        elif not (checkpoint / "config.json").is_file():
            raise InputError(f"--checkpoint {checkpoint}: no checkpoint; `dvc repro base_model` makes models/base")
        make_split(folder, checkpoint, rows, steps * ROWS_PER_STEP)
        results: dict[str, Any] = {"machine": describe_machine().model_dump(), "steps": steps, "rounds": []}
        for number in range(rounds):
            found = {strategy: run(strategy, folder, checkpoint, steps) for strategy in STRATEGIES}
            results["rounds"].append(found)
            typer.echo(f"round {number + 1}: " + ", ".join(f"{k} {slowest(v):.2f} s" for k, v in found.items()))
        results["table"] = table(results["rounds"], steps, Shape.named(str(checkpoint)))
    for line in results["table"]:
        typer.echo(line)
    if not smoke:
        write_json(out, results)
        pages.fill(pages.BENCHMARKS, {"parallel": "\n".join(results["table"])})


def make_split(folder: Path, checkpoint: Path, source: str, count: int) -> None:
    """`count` prepared rows in `folder`/split, every strategy's."""
    make_rows(folder / "rows.jsonl", str(checkpoint), source, 4 * LONGEST_PROMPT, 4 * LONGEST_PROMPT, 1)
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    if len(lines) < count:
        raise InputError(f"--rows {source}: it has {len(lines)} usable rows, and {count} are needed; lower --steps")
    found = [Row(**json.loads(line)) for line in lines]
    prepared = [
        PreparedRow(str(i), "en", [], row.prompt_ids, [False] * len(row.prompt_ids), [""], [list(row.response_ids[0])])
        for i, row in enumerate(found)
    ]
    write_split(folder / "split", prepared, count)


def run(strategy: Strategy, folder: Path, checkpoint: Path, steps: int) -> dict[str, Any]:
    """One run in fresh processes: the load before it, and what each process saw."""
    load = os.getloadavg()[0]
    with TemporaryDirectory(dir=folder) as out:
        job = Job(
            checkpoint=str(checkpoint),
            split=str(folder / "split"),
            strategy=strategy,
            processes=1 if strategy == ALONE else PROCESSES,
            rows_per_step=ROWS_PER_STEP,
            steps=steps,
            started=time.time(),
            out=out,
        )
        threads = len(os.sched_getaffinity(0))
        run_process(sys.executable, "bench.ours.parallel", asdict(job), folder / f"{strategy}.log", threads)
        seen = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(out).glob("*.json"))]
    assert len(seen) == job.processes, "each process leaves a file"
    return {"load_before": load, "processes": seen}


def slowest(found: dict[str, Any]) -> float:
    """Seconds of the timed steps."""
    return max(float(seen["seconds"]) for seen in found["processes"])


def planned(shape: Shape, strategy: Strategy, processes: int, most_tokens: int) -> float:
    """Bytes that `chatloom plan` counts for one process whose largest microbatch has `most_tokens`."""
    job = PlannedJob("sft", strategy, processes, batch=1, seq=most_tokens)
    return max(memory.total for memory in moments(shape, job).values())


def table(rounds: Sequence[dict[str, Any]], steps: int, shape: Shape) -> list[str]:
    """Medians of the rounds as lines of Markdown; ratios are of the two runs of one round."""
    rows = []
    for strategy in (name for name in STRATEGIES if name in rounds[0]):
        runs = [found[strategy] for found in rounds]
        ratios = [slowest(found[strategy]) / slowest(found[ALONE]) for found in rounds]
        step = median(map(slowest, runs)) / (steps - 1)

        def largest(name: str, runs: Sequence[dict[str, Any]] = runs) -> float:
            return median(max(float(seen[name]) for seen in found["processes"]) for found in runs)

        over_imports = median(
            max(seen["peak_bytes"] - seen["imported_bytes"] for seen in found["processes"]) for found in runs
        )
        plan = planned(shape, strategy, len(runs[0]["processes"]), int(largest("most_tokens")))
        idle = median(max(seen["waited"] / seen["seconds"] for seen in found["processes"]) for found in runs)
        met = "yes" if median(ratios) <= OVERHEAD and idle < IDLE else "no"
        rows.append(
            (
                f"`{strategy}`",
                f"{step:.3g}",
                f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{100 * idle:.2g} %",
                f"{largest('to_start'):.1f} s",
                f"{largest('to_first_step'):.1f} s",
                f"{largest('peak_bytes') / 2**30:.2f} GiB",
                f"{over_imports / 2**30:.2f} GiB",
                f"{plan / 2**30:.2f} GiB",
                f"{largest('loss'):.3f}",
                met if strategy != ALONE else "",
            )
        )
    return pages.table(HEAD, rows).splitlines()


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        sys.exit(str(error))
