"""DVC as Prefect sees it: what changed, and one stage run by name in a subprocess."""

from __future__ import annotations

import json
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from prefect import State, Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import Completed
from prefect.tasks import exponential_backoff

from chatloom.errors import EX_TEMPFAIL
from tasks.processes import SECONDS_OF_GRACE, end_tree
from tasks.progress import ProgressArtifact
from tasks.slots import slot_of
from tasks.workspace import DVC, Reproduction

Outcome = Literal["unchanged", "cached", "ran"]
LINES_IN_A_FAILURE = 20
LONGEST_LINE = 4000  # Prefect drops a record that is too long

# What DVC says of a stage, as whole lines: a stage may print anything.
SAYS: dict[str, Outcome] = {
    "Stage '{}' didn't change, skipping": "unchanged",
    "Stage '{}' is cached - skipping run, checking out outputs": "cached",
    "Running stage '{}':": "ran",
}


# As whole lines too: an exit status of a stage that may pass, and DVC's locks in the hands of somebody else.
PASSES = re.compile(
    rf"ERROR: failed to reproduce '\S+': failed to run: .*, exited with {EX_TEMPFAIL}"
    r"|ERROR: (failed to reproduce '\S+': )?(Unable to acquire lock\..*|'.*' is busy, it is being blocked by:)"
)
RETRIES, SECONDS_OF_BACKOFF = 4, 15
"""Tries after the first one, and the wait before the first of them, which doubles: four minutes in all."""


class StageFailed(RuntimeError):
    """A stage, or DVC around it, ended with an error; the message ends with its last lines."""


class StageUnavailable(StageFailed):
    """For a reason that may pass: a network, a registry that is down, a lock that somebody else holds."""


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
        kind = StageUnavailable if any(map(PASSES.fullmatch, done.stderr.splitlines())) else StageFailed
        raise kind(f"dvc status in {folder} ended with status {done.returncode}:\n{done.stderr.strip()}")
    return downstream(set(json.loads(done.stdout)), dependencies(folder))


def downstream(stages: set[str], needs: dict[str, list[str]]) -> frozenset[str]:
    """`stages` and every stage that needs one of them, directly or not."""
    reached = set(stages)
    while new := {name for name, needed in needs.items() if name not in reached and reached & set(needed)}:
        reached |= new
    return frozenset(reached)


def upstream(stages: set[str], needs: dict[str, list[str]]) -> frozenset[str]:
    """`stages` and every stage that one of them needs, directly or not."""
    reached = set(stages)
    while new := {need for name in reached for need in needs[name]} - reached:
        reached |= new
    return frozenset(reached)


def reproduce_stage(
    name: str, reproduction: Reproduction, say: Callable[[str], None], *, force: bool = False
) -> Outcome:
    """Run one stage as `dvc repro --single-item` does; `say` gets its lines as they come.

    Only for a walk in topological order: DVC takes stale inputs of a single item as they are.

    Args:
        force: run it though nothing changed.

    Raises:
        StageUnavailable: where the stage fails for a reason that may pass.
        StageFailed: where it fails.
    """
    said: dict[str, Outcome] = {line.format(name): outcome for line, outcome in SAYS.items()}
    outcome: Outcome | None = None
    kind = StageFailed
    last: deque[str] = deque(maxlen=LINES_IN_A_FAILURE)
    command = [*DVC, "repro", "--single-item", *(["--force"] if force else []), name]
    with _subprocess(command, reproduction) as process:
        assert process.stdout is not None
        for line in map(str.rstrip, process.stdout):
            if not line:
                continue
            say(_shortened(line))
            last.append(_shortened(line))
            outcome = outcome or said.get(line)
            if PASSES.fullmatch(line):
                kind = StageUnavailable
        status = process.wait()
    if status or outcome is None:
        raise kind("\n".join([f"stage {name} in {reproduction.workspace} ended with status {status}:", *last]))
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


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ... ({len(line)} characters)"


def retry_on(kind: type[Exception]) -> dict[str, Any]:
    """Options of a task that is tried again, ever later, where it raises `kind`, and for nothing else."""

    def may_pass(_task: Task[..., Any], _task_run: TaskRun, state: State[Any]) -> bool:
        return isinstance(state.data, kind)

    return {
        "retries": RETRIES,
        "retry_delay_seconds": exponential_backoff(SECONDS_OF_BACKOFF),
        "retry_condition_fn": may_pass,
    }


@task(name="changed_stages", task_run_name="dvc status", cache_policy=NO_CACHE, **retry_on(StageUnavailable))
def find_changed(reproduction: Reproduction) -> frozenset[str]:
    changed = changed_stages(reproduction)
    get_run_logger().info("may have work to do: %s", ", ".join(sorted(changed)) or "nothing")
    return changed


@task(task_run_name="{name}", cache_policy=NO_CACHE, **retry_on(StageUnavailable))
def run_stage(name: str, reproduction: Reproduction, changed: frozenset[str], force: bool = False) -> State[None]:
    """Ends in a state named Unchanged, Cached or Ran.

    Without a result: Prefect takes for an input of a task whatever task made an object that is among its arguments,
    and "ran" is one object for all stages.
    """
    if name not in changed and not force:
        return Completed(name="Unchanged")
    log, progress = get_run_logger(), ProgressArtifact(name)

    def say(line: str) -> None:
        log.info(line)
        progress.read(line)

    with slot_of(name, reproduction, log.info):
        outcome = reproduce_stage(name, reproduction, say, force=force)
    return Completed(name=outcome.capitalize())
