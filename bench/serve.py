"""The server under load, alone and beside `transformers serve`, in turn: `make bench-serve`.

    python -m bench.serve --rounds 3

Servers run as their users start them, each a process of its own, and are asked over HTTP. Tokens are those of the text
that came back, tokenised anew by the checkpoint's own tokenizer: the same count for every server.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import psutil
import typer

from bench.environments import python_of
from bench.load import Loaded, load
from bench.machine import describe_machine
from bench.measure import DTYPE, LONGEST_PROMPT, SEED, run_process
from bench.ours.assets import make_random_model, make_rows, read_source
from bench.ours.first_token import Job as FirstToken
from bench.pages import BENCHMARKS, fill, table
from bench.parts import OURS
from bench.presets import ROOT
from bench.side import Rollouts
from chatloom.errors import InputError
from chatloom.files import write_json
from chatloom.models.checkpoint import load_tokenizer

PEERS = "transformers-5.23"
WORKSPACE = ROOT / ".bench"
STARTER = str(ROOT / "data/starter/*.jsonl")
STREAMS = 16
TARGETS = {"decode": 1.0, "streams": 4.0, "overhead": 0.015, "lost": 0, "memory": 1.05, "peer": 1.5}
"""At least, for ratios of speed; at most, for seconds, requests, and memory at the end over memory before."""
RESULTS = ROOT / "bench" / "results" / "serve" / "serve.json"
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Server:
    name: str
    environment: str
    command: Callable[[Path, str, int], list[str]]
    """From the environment's interpreter, the checkpoint and the port."""
    model: Callable[[str], str]
    """What requests call the checkpoint."""


@dataclass(frozen=True)
class Amount:
    """How much is asked."""

    tokens: int
    """Of an answer, at most."""
    streams: int
    """Answers of a throughput run."""
    alone: int
    """Answers of the run with one client."""
    requests: int
    """Of the run with many clients ..."""
    clients: int
    """... and how many those are."""
    first_tokens: int


FULL = Amount(tokens=64, streams=64, alone=8, requests=1000, clients=64, first_tokens=40)
SMOKE = Amount(tokens=8, streams=16, alone=2, requests=32, clients=8, first_tokens=4)


def _ours(python: Path, checkpoint: str, port: int) -> list[str]:
    place = ["--port", str(port), "--device", "cpu", "--watch", "0", "--batch", str(STREAMS)]
    return [str(python), "-m", "chatloom.cli", "serve", "--model", checkpoint, *place]


def _theirs(*options: str) -> Callable[[Path, str, int], list[str]]:
    def command(python: Path, checkpoint: str, port: int) -> list[str]:
        program = str(python.with_name("transformers"))
        place = ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", DTYPE]
        return [program, "serve", checkpoint, *place, *options]

    return command


SERVERS = (
    Server(OURS, OURS, _ours, lambda checkpoint: Path(checkpoint).name),
    Server("transformers serve", PEERS, _theirs(), lambda checkpoint: checkpoint),
    Server("transformers serve, batching", PEERS, _theirs("--continuous-batching"), lambda checkpoint: checkpoint),
)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Option(help="Model that all servers serve.")] = ROOT / "models" / "ppo",
    quantized: Annotated[Path, typer.Option(help="The same at 4 bits.")] = ROOT / "models" / "chat-4bit",
    rows: Annotated[str, typer.Option(help="Questions, in any format that raw_data accepts.")] = STARTER,
    rounds: Annotated[int, typer.Option(min=1, help="Times that the servers take turns.")] = 3,
    out: Annotated[Path, typer.Option(help="JSON file of the results.")] = RESULTS,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A tiny random model in this environment, to see it run.")
    ] = False,
) -> None:
    """Measure, write the JSON file, and say what came of it."""
    if context.invoked_subcommand is not None:
        return
    amount = SMOKE if smoke else FULL
    with TemporaryDirectory() as name:
        folder = Path(name)
        if smoke:
            rounds, out = 1, WORKSPACE / "smoke" / "serve.json"
            checkpoint = quantized = folder / "model"
            make_random_model(checkpoint, hidden_size=64, num_layers=2)
        for path, option in ((checkpoint, "--checkpoint"), (quantized, "--quantized")):
            if not (path / "config.json").is_file():
                raise InputError(f"{option} {path}: no checkpoint; `make repro` makes models/ppo and models/chat-4bit")
        results = measure(checkpoint.resolve(), quantized.resolve(), rows, rounds, amount, folder, smoke=smoke)
    write_json(out, results)
    typer.echo(markdown(results))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="JSON file of the results.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="Page whose table is written anew.")] = BENCHMARKS,
) -> None:
    """Write the results into the page."""
    fill(page, {"serve": markdown(json.loads(results.read_text(encoding="utf-8")))})


def measure(
    checkpoint: Path, quantized: Path, rows: str, rounds: int, amount: Amount, folder: Path, *, smoke: bool
) -> dict[str, Any]:
    """All figures; what every round found, by server."""
    pythons = {OURS: Path(sys.executable), PEERS: Path(sys.executable) if smoke else python_of(PEERS, WORKSPACE)}
    file = folder / "rows.jsonl"
    make_rows(file, str(checkpoint), rows, LONGEST_PROMPT, 4 * LONGEST_PROMPT, 1)
    questions = [row.messages[-1]["content"] for row in read_source(rows)]
    count = tokens_of(checkpoint)
    found: dict[str, Any] = {
        "finished": "",
        "smoke": smoke,
        "machine": describe_machine().model_dump(mode="json"),
        "amount": asdict(amount),
        "rounds": [],
    }
    for number in range(1, rounds + 1):
        load_before = os.getloadavg()[0]
        decode = {
            "4-bit, ours": decode_rate("bench.ours.rollouts", pythons[OURS], quantized, file, amount, folder),
            "bf16, generate": decode_rate("bench.peers.rollouts", pythons[PEERS], checkpoint, file, amount, folder),
        }
        servers = {}
        for server in SERVERS:
            python = pythons[server.environment]
            with running(server, python, checkpoint, folder) as (address, process):
                model = server.model(str(checkpoint))
                load(address, model, questions[:2], 2, 4)  # warms up
                many = load(address, model, cycled(questions, amount.streams), STREAMS, amount.tokens)
                servers[server.name] = {"streams": summary(many, count)}
                if server.name == OURS:
                    alone = load(address, model, cycled(questions, amount.alone), 1, amount.tokens)
                    servers[OURS]["alone"] = summary(alone, count)
                    if number == 1:
                        found["soak"] = soak(address, model, questions, amount, process, count)
        job = FirstToken(checkpoint=str(checkpoint), prompts=cycled(questions, amount.first_tokens))
        threads = len(os.sched_getaffinity(0))
        printed = run_process(sys.executable, "bench.ours.first_token", asdict(job), _log("first_token"), threads)
        found["rounds"].append(
            {
                "load_before": load_before,
                "decode": decode,
                "servers": servers,
                "first_token": json.loads(printed.splitlines()[-1]),
            }
        )
        typer.echo(f"round {number} of {rounds} is done", err=True)
    found["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    return found


def decode_rate(
    module: str, python: Path, checkpoint: Path, rows: Path, amount: Amount, folder: Path
) -> dict[str, float]:
    """Tokens a second of one answer after the other, and of 16 at once, without a server."""
    rates = {}
    for name, batch in (("alone", 1), ("together", STREAMS)):
        job = Rollouts(
            checkpoint=str(checkpoint),
            rows=str(rows),
            preset="default",
            dtype=DTYPE,
            threads=len(os.sched_getaffinity(0)),
            seed=SEED,
            num_prompts=max(batch, amount.alone),
            batch_size=batch,
            max_new_tokens=amount.tokens,
            natural=False,
        )
        printed = run_process(str(python), module, asdict(job), _log(module), job.threads)
        result = json.loads(printed.strip().splitlines()[-1])
        rates[name] = result["work"] / result["seconds"]
    return rates


def soak(
    address: str,
    model: str,
    questions: Sequence[str],
    amount: Amount,
    process: psutil.Process,
    count: Callable[[str], int],
) -> dict[str, Any]:
    """Many clients for long; memory after a fifth of the requests, and after all."""
    prompts = cycled(questions, amount.requests)
    first, rest = prompts[: amount.requests // 5], prompts[amount.requests // 5 :]
    begun = load(address, model, first, amount.clients, amount.tokens)
    before = process.memory_info().rss
    ended = load(address, model, rest, amount.clients, amount.tokens)
    together = Loaded([*begun.replies, *ended.replies], begun.seconds + ended.seconds)
    return {**summary(together, count), "rss_before": before, "rss_after": process.memory_info().rss}


def summary(loaded: Loaded, count: Callable[[str], int]) -> dict[str, Any]:
    first = [reply.first_seconds for reply in loaded.replies if reply.first_seconds is not None]
    return {
        "requests": len(loaded.replies),
        "lost": loaded.lost,
        "tokens_per_second": sum(count(reply.text) for reply in loaded.replies) / loaded.seconds,
        "seconds": percentiles([reply.seconds for reply in loaded.replies]),
        "first_token_seconds": percentiles(first),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The middle one, and those that 5 and 1 of 100 are above."""
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99)} if ordered else {}


def tokens_of(checkpoint: Path) -> Callable[[str], int]:
    tokenizer = load_tokenizer(checkpoint)
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def cycled(questions: Sequence[str], count: int) -> list[str]:
    return list(islice(cycle(questions), count))


@contextmanager
def running(server: Server, python: Path, checkpoint: Path, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server from its start to its end, with its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    log = _log(server.name)
    with log.open("w", encoding="utf-8") as messages:
        process = psutil.Popen(
            server.command(python, str(checkpoint), port),
            cwd=folder,
            env=environment,
            stdout=messages,
            stderr=subprocess.STDOUT,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, log)
            yield address, process
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait(address: str, process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + 600
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise InputError(f"the server did not start; the end of {log}:\n{log.read_text(encoding='utf-8')[-3000:]}")
        try:
            if httpx.get(f"{address}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)


def _log(name: str) -> Path:
    path = WORKSPACE / "logs" / f"serve, {name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# --- what came of it ---


def markdown(results: Mapping[str, Any]) -> str:
    """The figures with their targets, then each server under 16 streams."""
    rounds, soaked, machine = results["rounds"], results["soak"], results["machine"]
    before = [r["load_before"] for r in rounds]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {results['finished']}; {len(rounds)} rounds, "
        f"load before a round {min(before):.1f} to {max(before):.1f}.",
        "",
        table(
            ("what", "figure (lowest to highest)", "target", "met"), [_figure_row(*found) for found in figures(results)]
        ),
        "",
        table(
            (f"{STREAMS} streams", "tokens/s", "first token, p50 / p95", "answer, p50 / p95 / p99", "lost"),
            [
                *(
                    _server_row(server.name, [r["servers"][server.name]["streams"] for r in rounds])
                    for server in SERVERS
                ),
                _server_row(f"ours, {results['amount']['clients']} clients, {soaked['requests']} requests", [soaked]),
            ],
        ),
    ]
    return "\n".join(lines)


def figures(results: Mapping[str, Any]) -> Iterator[tuple[str, list[float], str, str, bool]]:
    """Name, value of each round, unit, target, and whether the median meets it."""

    def at_least(what: str, values: list[float], target: float) -> tuple[str, list[float], str, str, bool]:
        return what, values, "x", f"≥ {target:g}x", statistics.median(values) >= target

    rounds, soaked = results["rounds"], results["soak"]
    for batch in ("alone", "together"):
        name = "one answer" if batch == "alone" else f"{STREAMS} at once"
        ratios = [r["decode"]["4-bit, ours"][batch] / r["decode"]["bf16, generate"][batch] for r in rounds]
        yield at_least(f"4-bit decode over bf16 `generate`, {name}: tokens/s", ratios, TARGETS["decode"])
    own = [r["servers"][OURS] for r in rounds]
    ratios = [s["streams"]["tokens_per_second"] / s["alone"]["tokens_per_second"] for s in own]
    yield at_least(f"{STREAMS} streams over one: tokens/s", ratios, TARGETS["streams"])
    overheads = [1000 * overhead(r["first_token"]) for r in rounds]
    most = 1000 * TARGETS["overhead"]
    yield (
        "server's part of the time to a first token",
        overheads,
        " ms",
        f"< {most:g} ms",
        statistics.median(overheads) < most,
    )
    yield "requests lost", [float(soaked["lost"])], "", "0", soaked["lost"] == TARGETS["lost"]
    grown = soaked["rss_after"] / soaked["rss_before"]
    yield (
        "memory at the end over a fifth of the way",
        [grown],
        "x",
        f"≤ {TARGETS['memory']:g}x",
        grown <= TARGETS["memory"],
    )
    ratios = [
        r["servers"][OURS]["streams"]["tokens_per_second"]
        / max(r["servers"][server.name]["streams"]["tokens_per_second"] for server in SERVERS[1:])
        for r in rounds
    ]
    yield at_least(f"over `transformers serve` at its best, {STREAMS} streams: tokens/s", ratios, TARGETS["peer"])


def overhead(first_token: Mapping[str, Sequence[float]]) -> float:
    """Seconds: the median over prompts of what the server took more than the batch alone."""
    pairs = zip(first_token["served"], first_token["direct"], strict=True)
    return statistics.median(served - direct for served, direct in pairs)


def _figure_row(what: str, values: Sequence[float], unit: str, target: str, met: bool) -> tuple[str, ...]:
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return what, f"{statistics.median(values):.3g}{unit}{spread}", target, "yes" if met else "no"


def _server_row(name: str, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    def middle(part: str, p: str) -> str:
        return f"{statistics.median(run[part][p] for run in runs):.2f}"

    first = " / ".join(middle("first_token_seconds", p) for p in ("p50", "p95"))
    whole = " / ".join(middle("seconds", p) for p in ("p50", "p95", "p99"))
    rate = statistics.median(run["tokens_per_second"] for run in runs)
    return name, f"{rate:.3g}", f"{first} s", f"{whole} s", str(sum(run["lost"] for run in runs))


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        sys.exit(str(error))
