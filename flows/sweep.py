"""Several parameter sets as DVC experiments, compared in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, Failed

from chatloom.errors import InputError
from flows.parameters import Override, ParameterSet, Preset
from flows.pipeline import walk_dag
from flows.walk import Walk, at_work, reporting
from tasks.dvc import dependencies, upstream
from tasks.experiments import experiment_path, make_experiment, save_experiment
from tasks.notify import HOOKS
from tasks.report import read_metrics
from tasks.workspace import DEFAULT, load_values


@flow(name="sweep", flow_run_name="sweep-{preset}", **HOOKS)
def sweep(sets: list[ParameterSet], preset: Preset = DEFAULT) -> State[Any]:
    """Run the DAG up to `evaluate` with each parameter set, as a DVC experiment in a workspace of its own.

    One that fails does not keep the others from running. Nothing is registered.

    Args:
        sets: Names and values of the experiments.
        preset: What the values are laid over: a file of params/ without its ending, or 'default'.
    """
    names = [one.name for one in sets]
    if not sets or len(set(names)) < len(names):
        raise InputError(f"sets: give at least one, each with a name of its own; found {names}")
    root = Path.cwd()
    for one in sets:
        load_values(preset, root, one.overrides)  # a wrong value is said at once, not after the other experiments
    states = {one.name: experiment(one.name, preset, one.overrides, return_state=True) for one in sets}
    found = {one.name: read_metrics(experiment_path(preset, root, one.overrides)) for one in sets}
    create_table_artifact(
        tabulate(sets, {name: state.name or "" for name, state in states.items()}, found),
        key="sweep",
        description="`dvc exp show` has them too, `dvc exp apply NAME` takes one over",
    )
    if failed := [name for name, state in states.items() if not state.is_completed()]:
        return Failed(message=f"{', '.join(failed)} of {len(sets)} experiments did not end well")
    return Completed(message=f"{len(sets)} experiments")


@flow(name="experiment", flow_run_name="experiment-{name}")
def experiment(name: str, preset: Preset, overrides: list[Override]) -> dict[str, str]:
    """One experiment of a sweep."""
    root = Path.cwd()
    workspace = experiment_path(preset, root, overrides)
    with at_work(workspace, lambda: make_experiment(preset, root, overrides)) as reproduction:
        stages = upstream({"evaluate"}, dependencies(reproduction.workspace))
        run = Walk(reproduction, only=stages)
        with reporting(run):
            walk_dag(run)
        save_experiment(reproduction, name, run.outcomes)
        get_run_logger().info("experiment %s is in dvc exp show", name)
    return run.outcomes


def tabulate(
    sets: list[ParameterSet], outcomes: dict[str, str], metrics: dict[str, dict[str, float]]
) -> list[dict[str, str]]:
    """A row for what was set, one for what became of it, and one a metric; a column an experiment."""
    rows = [
        {"": "set", **{one.name: " ".join(one.overrides) for one in sets}},
        {"": "outcome", **outcomes},
    ]
    for metric in sorted({metric for values in metrics.values() for metric in values}):
        cells = {name: f"{values[metric]:.4g}" if metric in values else "" for name, values in metrics.items()}
        rows.append({"": metric, **cells})
    return rows
