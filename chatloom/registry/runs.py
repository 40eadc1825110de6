"""The runs of one reproduction in MLflow, as addresses of its pages."""

from __future__ import annotations

from typing import Any

from chatloom.registry.lineage import PARENT_TAG
from chatloom.registry.resolve import registry_errors, use_tracking_store

REPORT = "reports/report.html"


def run_pages(reproduction: str, ui: str) -> dict[str, str]:
    """Pages of MLflow's UI by name: the reproduction's run, each stage's last run, and the report.

    Args:
        reproduction: id of the reproduction.
        ui: address of MLflow's UI.

    Raises:
        InputError: where the store refuses.
        Unavailable: where it is down.
    """
    use_tracking_store(f"the runs of {reproduction}")
    import mlflow

    with registry_errors(f"the runs of {reproduction}"):
        parents = mlflow.search_runs(
            search_all_experiments=True, filter_string=f"tags.`{PARENT_TAG}` = '{reproduction}'", output_format="list"
        )
        pages: dict[str, str] = {}
        for parent in parents:
            pages[reproduction] = _page(ui, parent)
            of_stages = mlflow.search_runs(
                [parent.info.experiment_id],
                f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
                order_by=["attributes.start_time ASC"],
                output_format="list",
            )
            pages |= {run.info.run_name: _page(ui, run) for run in of_stages}
    if "register" in pages:
        pages["report"] = f"{pages['register']}/artifacts/{REPORT}"
    return pages


def _page(ui: str, run: Any) -> str:
    return f"{ui.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
