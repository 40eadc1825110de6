"""Fault injection: training stages, killed with SIGKILL at random steps, must end as one that was left alone.

    python -m bench.faults --kills 20 --seed 1 --out faults.json

The stages run as DVC runs them, `python -m stages.train_sft`, in a workspace made from the smoke preset, with a few
more steps. Each trial kills one stage up to twice in a row, lets it finish, and compares every byte of its outs, plots
and metrics with those of a run that nobody killed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml

from bench.presets import ROOT
from chatloom.config import load_preset

LOOPS = ("train_sft", "train_reward", "train_ppo")
BEFORE = ("base_model", "raw_data", "prepare_data", "train_sft", "compare", "train_reward", "train_ppo")
LINKED = ("stages", "chatloom", "data/starter", "data/templates", "data/own")
MORE_STEPS = {
    "train_sft": {"num_epochs": 2, "max_steps": 10, "eval_every": 4, "checkpoint_every": 3},
    "train_reward": {"num_epochs": 2, "max_steps": 8, "eval_every": 3, "checkpoint_every": 3},
    "train_ppo": {"num_steps": 6, "sample_every": 2, "checkpoint_every": 2},
}
LOG = "stages.log"
IN_A_ROW = 2
SECONDS_BETWEEN_LOOKS = 0.002


@dataclass(frozen=True)
class Kill:
    stage: str
    trial: int
    """Kills of one trial hit one run, one after the other."""
    step: int
    """The step that had been logged when the process was killed."""
    resumed_after: int
    """The step whose state the killed process had started from; 0: it had started afresh."""
    state: int
    """The step of the newest state that it left behind, 0 for none."""
    equal: bool
    """Whether the stage, once it could finish, wrote what the uninterrupted run wrote."""


@dataclass(frozen=True)
class Campaign:
    """A workspace in which every stage has run once, uninterrupted."""

    workspace: Path
    expected: dict[str, dict[str, str]]
    """Of each loop, its files with their hashes."""
    steps: dict[str, int]
    """Of each loop."""
    forked: bool
    """Stages are forks of one process that has imported all they need, which takes them longer than their work."""

    @classmethod
    def prepare(cls, workspace: Path, forked: bool = False) -> Campaign:
        """Make the workspace and run everything up to PPO in it."""
        for name in LINKED:
            (workspace / name).parent.mkdir(parents=True, exist_ok=True)
            (workspace / name).symlink_to(ROOT / name)
        shutil.copy(ROOT / "dvc.yaml", workspace)
        params = load_preset(ROOT / "params/smoke.yaml", ROOT / "params.yaml")
        for section, values in MORE_STEPS.items():
            params[section] |= values
        (workspace / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        new = cls(workspace, {}, {}, forked)
        for stage in BEFORE:
            assert new.finish(stage) == 0, new.log()
        for loop in LOOPS:
            new.expected[loop] = outs(workspace, loop)
            new.steps[loop] = json.loads((workspace / f"metrics/{loop}.json").read_text(encoding="utf-8"))["steps"]
        return new

    def run(self, kills: int, seed: int) -> list[Kill]:
        """Kill stages until so many kills have hit, the loops taking turns."""
        rng = random.Random(seed)
        done: list[Kill] = []
        trial = 0
        while len(done) < kills:
            stage = LOOPS[trial % len(LOOPS)]
            trial += 1
            done += self._trial(stage, trial, min(IN_A_ROW, kills - len(done)), rng)
        return done

    def _trial(self, stage: str, trial: int, kills: int, rng: random.Random) -> list[Kill]:
        self.forget(stage)
        hit: list[Kill] = []
        status = -signal.SIGKILL
        while len(hit) < kills and status == -signal.SIGKILL:
            resumed_after = self.state(stage)
            step = rng.randint(resumed_after + 1, self.steps[stage] - 1)
            status = self.stop(stage, step, signal.SIGKILL)
            if status == -signal.SIGKILL:
                hit.append(Kill(stage, trial, step, resumed_after, self.state(stage), equal=False))
        # A stage that was done before the signal came has nothing left to do: that was no kill.
        if status != 0:
            status = self.finish(stage)
        assert status == 0, self.log()
        equal = self.is_as_expected(stage)
        return [replace(kill, equal=equal) for kill in hit]

    def stop(self, stage: str, step: int, number: signal.Signals) -> int:
        """Start a stage, send it a signal as soon as it has logged `step`, and wait; its exit status."""
        since = int(time.time() * 1000)
        with self._started(stage) as process:
            while process.poll() is None and self._logged(stage, since) < step:
                time.sleep(SECONDS_BETWEEN_LOOKS)
            process.send_signal(number)
            return process.wait()

    def finish(self, stage: str) -> int:
        """Start a stage, let it run to its end; its exit status."""
        with self._started(stage) as process:
            return process.wait()

    def is_as_expected(self, stage: str) -> bool:
        """Whether the stage wrote what the uninterrupted run wrote, and left no state behind."""
        return outs(self.workspace, stage) == self.expected[stage] and self.state(stage) == 0

    def state(self, stage: str) -> int:
        """The step of the newest saved state, 0 for none."""
        names = [path.name for path in (self.workspace / ".state" / stage).glob("step-*.pt")]
        return max((int(name.split(".")[0].removeprefix("step-")) for name in names), default=0)

    def log(self) -> str:
        """What the stages said."""
        return (self.workspace / LOG).read_text(encoding="utf-8", errors="replace")

    def forget(self, stage: str) -> None:
        """Remove what a stage wrote, as DVC does before it runs it."""
        for path in _outs_of(stage):
            shutil.rmtree(self.workspace / path, ignore_errors=True)
            (self.workspace / path).unlink(missing_ok=True)

    @contextmanager
    def _started(self, stage: str) -> Iterator[subprocess.Popen[bytes] | Fork]:
        process = Fork(self.workspace, stage) if self.forked else _python(self.workspace, stage)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def _logged(self, stage: str, since: int) -> int:
        """The last step in MLflow of a run that was started after `since` (ms), 0 for none."""
        query = "SELECT MAX(step) FROM metrics JOIN runs USING (run_uuid) WHERE name = ? AND start_time >= ?"
        with closing(sqlite3.connect(self.workspace / "mlflow.db")) as store:
            return store.execute(query, (stage, since)).fetchone()[0] or 0


def outs(workspace: Path, stage: str) -> dict[str, str]:
    """The files of a stage's outs and metrics with their hashes."""
    files: list[Path] = []
    for path in _outs_of(stage):
        whole = workspace / path
        files += [whole] if whole.is_file() else sorted(file for file in whole.rglob("*") if file.is_file())
    return {str(file.relative_to(workspace)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _outs_of(stage: str) -> list[str]:
    listed: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]
    return [*listed["outs"], *listed["metrics"]]


def _environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "CHATLOOM_"))}
    return environment | {"MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}


def _python(workspace: Path, stage: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"stages.{stage}"]
    with (workspace / LOG).open("ab") as log:
        return subprocess.Popen(command, cwd=workspace, env=_environment(), stdout=log, stderr=log)


class Fork:
    """A stage as a fork of a process that has imported everything, with those methods of `Popen` that are used here."""

    def __init__(self, workspace: Path, stage: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mlflow.data", *(f"stages.{name}" for name in BEFORE)])
        self._process = context.Process(target=_run_fork, args=(workspace, stage))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


def _run_fork(workspace: Path, stage: str) -> None:
    os.chdir(workspace)
    os.environ.clear()
    os.environ.update(_environment())
    with Path(LOG).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    # What a new process has and forks share.
    random.seed()
    np.random.seed()
    importlib.import_module(f"stages.{stage}").main()


def main(
    kills: Annotated[int, typer.Option(min=1)] = 20,
    seed: int = 1,
    out: Annotated[Path | None, typer.Option(help="Where the table goes as JSON.")] = None,
) -> None:
    """Kill the three training loops at random steps and compare what they write in the end."""
    with tempfile.TemporaryDirectory() as folder:
        done = Campaign.prepare(Path(folder) / "workspace").run(kills, seed)
    print("trial stage         killed at  resumed after  state left  equal")
    for kill in done:
        print(
            f"{kill.trial:5d} {kill.stage:12s} {kill.step:10d} {kill.resumed_after:14d} {kill.state:11d}  "
            f"{'yes' if kill.equal else 'NO'}"
        )
    equal = sum(kill.equal for kill in done)
    print(f"{equal} of {len(done)} kills ended in the bytes of the uninterrupted run")
    if out is not None:
        table = {"seed": seed, "kills": len(done), "equal": equal, "table": [asdict(kill) for kill in done]}
        out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    if equal < len(done):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
