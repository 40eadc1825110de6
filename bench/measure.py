"""The sides of a part in turn, each run a process of its own: A B A B A B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from bench.environments import python_of
from bench.machine import describe_machine
from bench.parts import Part, Side
from bench.presets import ROOT, preset_params
from bench.results import Measurement, Result, Run, write_measurement
from bench.side import Job, Ppo, Training
from chatloom.errors import InputError
from chatloom.progress import progress

SEED = 42
DTYPE = "bfloat16"
LONGEST_PROMPT = 256
SYNTHETIC_ROWS = 64
SMOKE_MODEL = "random-64x2"
SMOKE_LENGTH = 1024
"""A byte-level vocabulary makes long rows."""
LINES_SHOWN = 15


@dataclass(frozen=True)
class Setup:
    """Where a benchmark takes things from and puts them."""

    checkpoint: Path
    instructions: str
    preferences: str
    workspace: Path
    """Environments, logs, and what is made for one run: all of it can be deleted."""
    results: Path
    rounds: int
    smoke: bool
    """Whether it is only to be seen to run: on a tiny random model, in few steps."""

    @property
    def preset(self) -> str:
        return "smoke" if self.smoke else "default"


class Assets:
    """Rows and models by their name in `bench.parts`, made when first asked for."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._setup, self._folder = setup, folder

    def checkpoint(self, name: str) -> Path:
        if name == "base" and self._setup.smoke:
            name = SMOKE_MODEL
        if name == "base":
            if not (self._setup.checkpoint / "config.json").is_file():
                raise InputError(
                    f"--checkpoint {self._setup.checkpoint}: no checkpoint; `dvc repro base_model` makes models/base"
                )
            return self._setup.checkpoint
        hidden_size, num_layers = map(int, name.removeprefix("random-").split("x"))
        return self._made("make_random_model", name, hidden_size=hidden_size, num_layers=num_layers)

    def reward_model(self, checkpoint: Path) -> Path:
        name = f"reward-{checkpoint.name}"
        return self._made("make_untrained_reward_model", name, checkpoint=str(checkpoint), preset=self._setup.preset)

    def rows(self, name: str, checkpoint: Path, max_length: int) -> Path:
        """Tokens of `checkpoint`, in rows of `max_length` at most."""
        file = f"{name}-{checkpoint.name}-{max_length}.jsonl"
        if name.startswith("synthetic-"):
            length = int(name.removeprefix("synthetic-"))
            return self._made("make_synthetic_rows", file, length=length, count=SYNTHETIC_ROWS)
        preferences = name == "preferences"
        return self._made(
            "make_rows",
            file,
            checkpoint=str(checkpoint),
            source=self._setup.preferences if preferences else self._setup.instructions,
            max_prompt=max_length if self._setup.smoke else LONGEST_PROMPT,
            max_length=max_length,
            responses=2 if preferences else 1,
        )

    def _made(self, maker: str, name: str, **values: Any) -> Path:
        out = self._folder / name
        if not out.exists():
            run_process(sys.executable, "bench.ours.assets", [maker, {"out": str(out), **values}], self._log(name), 1)
        return out

    def _log(self, name: str) -> Path:
        return self._setup.workspace / "logs" / f"{name}.log"


def measure(parts: list[Part], setup: Setup) -> list[Measurement]:
    """Each part, one after another; what a round found is on disk before the next begins.

    Raises:
        InputError: where something is missing, or a process fails: with the end of its log.
    """
    setup.workspace.mkdir(parents=True, exist_ok=True)
    (setup.workspace / ".gitignore").write_text("*\n", encoding="utf-8")
    with TemporaryDirectory() as folder:
        assets = Assets(setup, Path(folder))
        return [_measure(part, setup, assets) for part in parts]


def _measure(part: Part, setup: Setup, assets: Assets) -> Measurement:
    pythons = {side.environment: python_of(side.environment, setup.workspace) for side in part.sides}
    jobs = [(side, make_job(part, side, setup, assets)) for side in part.sides]
    runs: list[Run] = []
    with progress(part.name, setup.rounds * len(jobs)) as advance:
        for number in range(1, setup.rounds + 1):
            for side, job in jobs:
                load = os.getloadavg()[0]
                log = setup.workspace / "logs" / f"{part.name}, {side.name}.log"
                output = run_process(str(pythons[side.environment]), side.module, asdict(job), log, job.threads)
                result = parse_result(output, side)
                runs.append(Run(round=number, side=side.name, load_before=load, result=result))
                advance(1, **{f"{side.name}: {result.unit}/s": result.per_second})
            measurement = Measurement(
                part=part.name,
                smoke=setup.smoke,
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
                machine=describe_machine(),
                settings=settings_of(part, setup.smoke),
                runs=runs,
            )
            write_measurement(setup.results, measurement)
    return measurement


def settings_of(part: Part, smoke: bool, side: Side | None = None) -> dict[str, Any]:
    """The part's settings, those of `side` over them, those of a smoke run over all."""
    own = side.settings if side is not None else {}
    return {**part.settings, **own, **(part.smoke if smoke else {})}


def make_job(part: Part, side: Side, setup: Setup, assets: Assets) -> Job:
    values = settings_of(part, setup.smoke, side)
    checkpoint = assets.checkpoint(values.pop("checkpoint", "base"))
    if part.job is Training:
        values["lora"] = preset_params(setup.preset).train_sft.lora.model_dump()
    if part.job is Ppo:
        values["reward_model"] = str(assets.reward_model(checkpoint))
    max_length = values.get("max_length", SMOKE_LENGTH if setup.smoke else 2 * LONGEST_PROMPT)
    return part.job(
        checkpoint=str(checkpoint),
        rows=str(assets.rows(values.pop("rows", part.rows), checkpoint, max_length)),
        preset=setup.preset,
        dtype=DTYPE,
        threads=len(os.sched_getaffinity(0)),
        seed=SEED,
        **values,
    )


def run_process(python: str, module: str, job: Any, log: Path, threads: int) -> str:
    """What `module` printed; its messages go to `log`.

    Raises:
        InputError: where it fails, with the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",  # the CPU is compared, whatever else there is
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as messages:
        file = Path(folder, "job.json")
        file.write_text(json.dumps(job), encoding="utf-8")
        command = [python, "-m", module, str(file)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=messages, text=True, check=False
        )
    if done.returncode:
        end = log.read_text(encoding="utf-8").splitlines()[-LINES_SHOWN:]
        raise InputError("\n".join([f"{module} failed ({done.returncode}); the end of {log}:", *end]))
    return done.stdout


def parse_result(output: str, side: Side) -> Result:
    """The last line that a side printed."""
    lines = output.strip().splitlines()
    try:
        return Result.model_validate_json(lines[-1] if lines else "")
    except ValidationError as error:
        raise InputError(f"{side.module} ({side.name}) printed no result: {error}") from error
