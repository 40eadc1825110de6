"""Every night: new rows, a run if anything changed, and the question whether its model becomes champion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import Completed

from chatloom.config import load_params
from chatloom.errors import InputError, Unavailable
from chatloom.files import read_json
from chatloom.registry.approval import read_candidate
from flows.parameters import Hours, Override, Preset
from flows.pipeline import reproduce
from tasks.dvc import retry_on
from tasks.inbox import pull
from tasks.notify import HOOKS
from tasks.workspace import DEFAULT, workspace_path

ASKS = "register.promotion=approval"


@flow(name="nightly", flow_run_name="nightly-{preset}", **HOOKS)
def nightly(
    preset: Preset = DEFAULT,
    overrides: list[Override] = [],  # noqa: B006 - Prefect's UI shows it, nobody changes it
    inbox: list[str] = [],  # noqa: B006
    hours: Hours = 72.0,
) -> State[Any]:
    """Pull new rows, reproduce what they change, and start the flow `promote` for the version that came of it.

    Args:
        preset: A file of params/ without its ending, or 'default' for params.yaml as it is.
        overrides: Values laid over the preset, one a line: train_sft.num_epochs=2.
        inbox: Files, folders or https addresses with new rows; they are brought to data/own/inbox, where a source of
            raw_data reads them.
        hours: How long the promotion waits for a decision; then the version is rejected.
    """
    log = get_run_logger()
    log.info("new in data/own/inbox: %s", ", ".join(pull_inbox(inbox)) or "nothing")
    values = [*overrides, ASKS]
    outcomes = reproduce(preset, values)
    if set(outcomes.values()) == {"unchanged"}:
        return Completed(name="Unchanged", message="Nothing changed since the last night: nothing ran.")
    workspace = workspace_path(preset, Path.cwd(), values)
    version = read_json(workspace / "metrics" / "register.json", "run register again")["version"]
    model = f"models:/{load_params(workspace / 'params.yaml').register_.model_name}/{version:.0f}"
    try:
        read_candidate(model)
    except Unavailable:
        raise
    except InputError as error:
        return Completed(name="Rejected", message=str(error))
    asked = run_deployment("promote/promote", parameters={"model": model, "hours": hours}, timeout=0, as_subflow=False)
    assert isinstance(asked, FlowRun)  # no coroutine: we are no async flow
    return Completed(name="Asked", message=f"{model} waits for a decision in the flow run {asked.name}")


@task(task_run_name="pull new rows", cache_policy=NO_CACHE, **retry_on(Unavailable))
def pull_inbox(inbox: list[str]) -> list[str]:
    return pull(inbox, Path.cwd())
