"""The pipeline as a Prefect flow: when and where it runs. What runs is `dvc.yaml`; a test holds the two together.

`python -m flows.pipeline --preset smoke` runs it here, against the server of `PREFECT_API_URL` or one of its own.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import State, flow
from prefect.settings import (
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_SERVER_LOGGING_LEVEL,
    temporary_settings,
)
from rich.console import Console
from rich.table import Table

from chatloom.errors import InputError
from flows.parameters import Override, Preset, Stage
from flows.walk import walking
from tasks.dvc import dependencies, downstream
from tasks.notify import HOOKS
from tasks.workspace import DEFAULT, workspace_path

Done = State[Any] | None


def walk_dag(run: Callable[..., Done]) -> None:
    """Bring every stage up to date; one line a stage, its inputs as arguments."""
    base = run("base_model")
    raw = run("raw_data")
    prepared = run("prepare_data", base, raw)
    sft = run("train_sft", base, prepared)
    comparisons = run("compare", sft, prepared)
    reward = run("train_reward", sft, comparisons)
    gold = run("train_gold", sft, comparisons)
    ppo = run("train_ppo", sft, reward, prepared)
    chat = run("quantize", ppo, prepared)
    evaluation = run("evaluate", base, sft, reward, gold, ppo, chat, comparisons, prepared)
    run("register", raw, prepared, sft, gold, chat, evaluation)


@flow(name="reproduce", flow_run_name="reproduce-{preset}", validate_parameters=True, **HOOKS)
def reproduce(
    preset: Preset = DEFAULT,
    overrides: list[Override] = [],  # noqa: B006 - Prefect's UI shows it, nobody changes it
    from_stage: Stage | None = None,
    force: bool = False,
) -> dict[str, str]:
    """Bring every stage up to date; what did not change is not run.

    Args:
        preset: A file of params/ without its ending, or 'default' for params.yaml as it is.
        overrides: Values laid over the preset, one a line: train_sft.optimizer.lr=1.0e-4. They run in a workspace of
            their own.
        from_stage: Only this stage and those that follow from it; refused where an earlier one has changed.
        force: Run them though nothing changed, as `dvc repro --force` does.

    Returns:
        What became of each stage: unchanged, cached or ran.
    """
    only = downstream({from_stage}, dependencies(Path.cwd())) if from_stage else None
    with walking(preset, overrides, only=only, force=force) as run:
        walk_dag(run)
    return run.outcomes


@flow(name="evaluate-only", flow_run_name="evaluate-{preset}", **HOOKS)
def evaluate_only(
    preset: Preset = DEFAULT,
    force: bool = False,
) -> dict[str, str]:
    """Evaluate the models that are there; nothing is trained and nothing registered.

    Args:
        preset: A file of params/ without its ending, or 'default' for params.yaml as it is.
        force: Evaluate though nothing changed.

    Returns:
        What became of the stage: unchanged, cached or ran.
    """
    with walking(preset, [], only=frozenset({"evaluate"}), force=force) as run:
        walk_dag(run)
    return run.outcomes


def main(
    preset: Annotated[str, typer.Option(help="A file of params/, or 'default'.")] = DEFAULT,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Another value, as train_sft.seed=7; repeatable.")
    ] = None,
) -> None:
    """Bring every stage up to date, one Prefect task a stage."""
    console = Console(soft_wrap=True)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        # A terminal that is closed is as Ctrl-C: stages are in sessions of their own and would not notice.
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        workspace_path(preset, Path.cwd(), override or [])  # wrong values fail before a server is started for them
    except InputError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    # Of a server of our own: its end cuts off its own services, which log that as errors; at its first start it makes
    # its database, which takes longer than the 20 s that Prefect waits.
    settings = {
        PREFECT_SERVER_LOGGING_LEVEL: "CRITICAL",
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 180,
    }
    with temporary_settings(settings):
        state = reproduce(preset, override or [], return_state=True)
    if not state.is_completed():
        console.print(f"{state.name}: {state.message}", style="red", markup=False)
        raise typer.Exit(1)
    table = Table("stage", "outcome")
    for name, outcome in state.result().items():
        table.add_row(name, outcome)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
