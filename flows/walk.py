"""A walk through the DAG in a workspace of one's own: what all flows that run stages have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import State, get_run_logger
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from chatloom.errors import InputError
from tasks.alone import alone_in
from tasks.dvc import dependencies, find_changed, run_stage, upstream
from tasks.report import publish_links, publish_metrics, publish_stages
from tasks.slots import ensure_slots
from tasks.workspace import Reproduction, workspace_path


class Walk:
    """Runs stages by name, each after others, and keeps what came of them.

    Args:
        only: stages to run; calls for others do nothing. None runs all.
        force: run them though nothing changed.

    Raises:
        InputError: where a stage that `only` leaves out has changed: its outs would be taken as they are.
    """

    def __init__(self, reproduction: Reproduction, *, only: frozenset[str] | None = None, force: bool = False) -> None:
        self.reproduction, self.only, self.force = reproduction, only, force
        self.changed = find_changed(reproduction)
        self.stages: dict[str, tuple[str, float]] = {}
        if only is not None:
            needed = upstream(set(only), dependencies(reproduction.workspace)) - only
            if stale := sorted(self.changed & needed):
                raise InputError(
                    f"{', '.join(stale)} changed and would not run: reproduce the whole DAG first, or with from_stage "
                    "at the first of them"
                )

    def __call__(self, name: str, *after: State[Any] | None) -> State[Any] | None:
        """The stage's last state; raises where the stage fails, so that nothing runs on stale inputs."""
        if self.only is not None and name not in self.only:
            return None
        task = run_stage.with_options(name=name)
        began = time.monotonic()
        state: State[Any] = task(
            name,
            self.reproduction,
            self.changed,
            self.force,
            wait_for=[state for state in after if state is not None],
            return_state=True,
        )
        self.stages[name] = ((state.name or "").lower(), time.monotonic() - began)
        state.result()  # raises
        return state

    @property
    def outcomes(self) -> dict[str, str]:
        return {name: outcome for name, (outcome, _) in self.stages.items()}


@contextmanager
def walking(
    preset: str, overrides: Sequence[str], *, only: frozenset[str] | None = None, force: bool = False
) -> Iterator[Walk]:
    """A walk in the workspace of a preset, for the block; tables of what came of it when it ends."""
    root = Path.cwd()
    with at_work(
        workspace_path(preset, root, overrides), lambda: Reproduction.start(preset, root, overrides)
    ) as reproduction:
        walk = Walk(reproduction, only=only, force=force)
        with reporting(walk):
            yield walk


@contextmanager
def at_work(workspace: Path, start: Callable[[], Reproduction]) -> Iterator[Reproduction]:
    """The reproduction that `start` makes, alone in `workspace`; one that was killed there is cleaned up after."""
    log, context = get_run_logger(), FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    with alone_in(workspace, log.info) as record:
        reproduction = start()
        own = str(context.flow_run.id)
        earlier = record({"reproduction": reproduction.id, "flow_run": own})
        if earlier.get("flow_run", own) != own:  # the same one was killed and is tried again
            _end_flow_run(UUID(earlier["flow_run"]))
        ensure_slots()
        yield reproduction


@contextmanager
def reporting(walk: Walk) -> Iterator[None]:
    """Publish the walk's tables and links when the block ends: of a failed one the stages, of one without work too."""
    try:
        yield
    finally:
        publish_stages(walk.reproduction, walk.stages)
    if set(walk.outcomes.values()) != {"unchanged"}:
        publish_metrics(walk.reproduction)
        publish_links(walk.reproduction)


def _end_flow_run(id: UUID) -> None:
    """Say of a flow run whose process was killed that it crashed: nobody else would."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_flow_run(id)
        except ObjectNotFound:  # of another server
            return
        if found.state is None or not found.state.is_final():
            client.set_flow_run_state(
                id, Crashed(message="Its process was killed; a later run found that."), force=True
            )
