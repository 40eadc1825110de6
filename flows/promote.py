"""A person decides whether a version becomes @champion."""

from __future__ import annotations

from typing import Any

from prefect import State, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Completed, Failed
from pydantic import Field

from chatloom.errors import Unavailable
from chatloom.registry.approval import Candidate, decide, question, read_candidate
from flows.parameters import Hours, Version
from tasks.dvc import retry_on
from tasks.notify import HOOKS

SECONDS_BETWEEN_LOOKS = 2


class Decision(RunInput):
    """What a person answers."""

    approve: bool = Field(default=False, description="On makes the version @champion, off rejects it.")
    reason: str = Field(min_length=1, pattern=r"\S", description="Why; kept with the version.")
    name: str = Field(min_length=1, pattern=r"\S", description="Who decides; kept with the version.")


@flow(name="promote", flow_run_name="promote {model}", **HOOKS)
def promote(model: Version = "models:/chatloom@challenger", hours: Hours = 72.0) -> State[Any]:
    """Ask a person whether a version becomes champion, with its gates and sample answers; the answer is recorded.

    Args:
        model: The version, as models:/chatloom/3 or models:/chatloom@challenger.
        hours: How long to wait for a decision; then the version is rejected.
    """
    log = get_run_logger()
    candidate = read(model)
    asked = question(candidate)
    create_markdown_artifact(asked, key="approval", description=f"{candidate.uri}: is it to be champion?")
    log.info("%s waits for a decision: Resume in the UI", candidate.uri)
    try:
        said = pause_flow_run(
            wait_for_input=Decision.with_initial_data(description=asked),
            timeout=int(hours * 3600),
            poll_interval=SECONDS_BETWEEN_LOOKS,
        )
    except FlowPauseTimeout:
        reason = f"nobody decided within {hours:g} hours"
        record(candidate, False, "nobody", reason)
        return Failed(name="TimedOut", message=f"{candidate.uri} is rejected: {reason}")
    record(candidate, said.approve, said.name.strip(), said.reason.strip())
    if said.approve:
        return Completed(name="Promoted", message=f"{candidate.uri} is champion, says {said.name}: {said.reason}")
    return Completed(name="Rejected", message=f"{candidate.uri} is rejected by {said.name}: {said.reason}")


@task(task_run_name="read {model}", cache_policy=NO_CACHE, **retry_on(Unavailable))
def read(model: str) -> Candidate:
    return read_candidate(model)


@task(task_run_name="record the decision", cache_policy=NO_CACHE, **retry_on(Unavailable))
def record(candidate: Candidate, approved: bool, by: str, reason: str) -> None:
    decide(candidate, approved=approved, by=by, reason=reason)
