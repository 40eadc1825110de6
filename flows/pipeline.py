"""The pipeline as a Prefect flow: when and where it runs. What runs is `dvc.yaml`; a test holds the two together.

`python -m flows.pipeline --preset smoke` runs it here, against the server of `PREFECT_API_URL` or one of its own.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import State, flow
from prefect.settings import PREFECT_SERVER_ANALYTICS_ENABLED, PREFECT_SERVER_LOGGING_LEVEL, temporary_settings
from rich.console import Console
from rich.table import Table

from chatloom.errors import InputError
from tasks.dvc import find_changed, run_stage
from tasks.workspace import DEFAULT, Reproduction, make_workspace


@flow(name="reproduce", flow_run_name="reproduce-{preset}")
def reproduce(preset: str = DEFAULT) -> dict[str, str]:
    """Bring every stage of the checkout in the current folder up to date; one line a stage, its inputs as arguments."""
    run = _Walk(Reproduction.start(preset, Path.cwd()))
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
    return run.outcomes


class _Walk:
    """Runs stages by name, each after others, and keeps what came of them."""

    def __init__(self, reproduction: Reproduction) -> None:
        self.reproduction = reproduction
        self.changed = find_changed(reproduction)
        self.outcomes: dict[str, str] = {}

    def __call__(self, name: str, *after: State[Any]) -> State[Any]:
        """The stage's last state; raises where the stage fails, so that nothing runs on stale inputs."""
        task = run_stage.with_options(name=name)
        state: State[Any] = task(name, self.reproduction, self.changed, wait_for=after, return_state=True)
        state.result()  # raises
        self.outcomes[name] = (state.name or "").lower()
        return state


def main(preset: Annotated[str, typer.Option(help="A file of params/, or 'default'.")] = DEFAULT) -> None:
    """Bring every stage up to date, one Prefect task a stage."""
    console = Console(soft_wrap=True)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        # A terminal that is closed is as Ctrl-C: stages are in sessions of their own and would not notice.
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        make_workspace(preset)  # a wrong preset fails before a server is started for it
    except InputError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    # Of a server of our own: its end cuts off its own services, which log that as errors.
    with temporary_settings({PREFECT_SERVER_LOGGING_LEVEL: "CRITICAL", PREFECT_SERVER_ANALYTICS_ENABLED: False}):
        state = reproduce(preset, return_state=True)
    if not state.is_completed():
        console.print(f"{state.name}: {state.message}", style="red", markup=False)
        raise typer.Exit(1)
    table = Table("stage", "outcome")
    for name, outcome in state.result().items():
        table.add_row(name, outcome)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
