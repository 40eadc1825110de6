"""DVC as Prefect sees it: what changed, and one stage run by name in a subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any, Literal, cast

import psutil
from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from tasks.workspace import Reproduction

Outcome = Literal["unchanged", "cached", "ran"]
DVC = [sys.executable, "-m", "dvc"]
LINES_IN_A_FAILURE = 20
LONGEST_LINE = 4000  # Prefect drops a record that is too long
SECONDS_TO_END = 30.0
SECONDS_OF_GRACE = 8.0
"""In which a stage that is told to stop finishes its training step and saves its state: a cancel takes under 10 s."""

# What DVC says of a stage, as whole lines: a stage may print anything.
SAYS: dict[str, Outcome] = {
    "Stage '{}' didn't change, skipping": "unchanged",
    "Stage '{}' is cached - skipping run, checking out outputs": "cached",
    "Running stage '{}':": "ran",
}


class StageFailed(RuntimeError):
    """A stage, or DVC around it, ended with an error; the message ends with its last lines."""


def dependencies(folder: Path) -> dict[str, list[str]]:
    """DVC's graph: every stage with the stages whose outs it needs, in the order of `dvc.yaml`."""
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    def name(node: Any) -> str:
        # As `dvc status` names it there; DVC's own `addressing` goes by our current folder.
        return cast(str, node.name if isinstance(node, PipelineStage) else node.path_in_repo)

    with Repo(str(folder)) as repo:
        graph = repo.index.graph
        return {name(node): [name(need) for need in graph.successors(node)] for node in graph}


def changed_stages(reproduction: Reproduction) -> frozenset[str]:
    """Stages that may have work to do: those that `dvc status` calls changed, and all that follow from them.

    Asked once, before anything runs: while a stage runs, DVC's lock makes `dvc status` fail.

    Raises:
        StageFailed: where DVC cannot tell.
    """
    folder = reproduction.workspace
    done = subprocess.run(
        [*DVC, "status", "--json"],
        cwd=folder,
        env=reproduction.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StageFailed(f"dvc status in {folder} ended with status {done.returncode}:\n{done.stderr.strip()}")
    return downstream(set(json.loads(done.stdout)), dependencies(folder))


def downstream(stages: set[str], needs: dict[str, list[str]]) -> frozenset[str]:
    """`stages` and every stage that needs one of them, directly or not."""
    reached = set(stages)
    while new := {name for name, needed in needs.items() if name not in reached and reached & set(needed)}:
        reached |= new
    return frozenset(reached)


def reproduce_stage(name: str, reproduction: Reproduction, log: Logger | LoggerAdapter[Any]) -> Outcome:
    """Run one stage as `dvc repro --single-item` does; its lines go to `log` as they come.

    Only for a walk in topological order: DVC takes stale inputs of a single item as they are.

    Raises:
        StageFailed: where the stage fails.
    """
    said: dict[str, Outcome] = {line.format(name): outcome for line, outcome in SAYS.items()}
    outcome: Outcome | None = None
    last: deque[str] = deque(maxlen=LINES_IN_A_FAILURE)
    with _subprocess([*DVC, "repro", "--single-item", name], reproduction) as process:
        assert process.stdout is not None
        for line in process.stdout:
            text = _shortened(line.rstrip())
            if not text:
                continue
            log.info(text)
            last.append(text)
            outcome = outcome or said.get(text)
        status = process.wait()
    if status or outcome is None:
        raise StageFailed("\n".join([f"stage {name} in {reproduction.workspace} ended with status {status}:", *last]))
    return outcome


@contextmanager
def _subprocess(command: list[str], reproduction: Reproduction) -> Iterator[subprocess.Popen[str]]:
    """In a session of its own: it is told to stop once, by us, when the block is left before its end.

    Prefect's cancel and Ctrl-C go to whole process groups, and a training loop that is told twice stops without saving.
    """
    process = subprocess.Popen(
        command,
        cwd=reproduction.workspace,
        env=reproduction.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            end_tree(process.pid, SECONDS_OF_GRACE, top=False)
        process.wait()


def end_tree(pid: int, seconds: float = SECONDS_TO_END, *, top: bool = True) -> None:
    """SIGTERM to a process and all below; SIGKILL to what is left after `seconds`, or once we are told to stop again.

    Args:
        top: False where the process ends by itself when those below it have: DVC then frees its locks. Who is in a
            session of its own, as the ranks of a stage are, is then told by the process that started it, and so once.
    """
    process = psutil.Process(pid)
    session, below = os.getsid(pid), process.children(recursive=True)
    try:
        for one in [*below, process] if top or not below else below:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if top or os.getsid(one.pid) == session:
                    one.terminate()
        psutil.wait_procs([*below, process], timeout=seconds)
    finally:
        for one in (*below, process):
            with suppress(psutil.NoSuchProcess):
                one.kill()


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ... ({len(line)} characters)"


@task(name="changed_stages", task_run_name="dvc status", cache_policy=NO_CACHE)
def find_changed(reproduction: Reproduction) -> frozenset[str]:
    changed = changed_stages(reproduction)
    get_run_logger().info("may have work to do: %s", ", ".join(sorted(changed)) or "nothing")
    return changed


@task(task_run_name="{name}", cache_policy=NO_CACHE)
def run_stage(name: str, reproduction: Reproduction, changed: frozenset[str]) -> State[None]:
    """Ends in a state named Unchanged, Cached or Ran.

    Without a result: Prefect takes for an input of a task whatever task made an object that is among its arguments,
    and "ran" is one object for all stages.
    """
    outcome = reproduce_stage(name, reproduction, get_run_logger()) if name in changed else "unchanged"
    return Completed(name=outcome.capitalize())
