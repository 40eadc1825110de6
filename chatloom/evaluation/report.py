"""`reports/report.html`: the whole run on one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from chatloom.evaluation.figures import TITLES


def render_report(
    *,
    title: str,
    metrics: Mapping[str, float],
    evaluation: Mapping[str, Any],
    pictures: Path,
    verdicts: Sequence[Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]],
    currency: str,
    sources: Sequence[Mapping[str, Any]],
    graph: str,
) -> str:
    """The page as HTML, pictures inside.

    Args:
        metrics: flat, as in `metrics/evaluate.json`.
        evaluation: `reports/evaluate.json`.
        pictures: folder with `<name>.png` of each of the evaluation's `figures`.
        verdicts: on the gates.
        costs: of each stage, and of all in the last place.
        sources: of the data, as in the lineage.
        graph: the lineage as SVG.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.jinja").render(
        title=title,
        metrics=dict(sorted(metrics.items())),
        evaluation=evaluation,
        pictures={
            TITLES[name]: _data_url(pictures / f"{name}.png") for name in TITLES if name in evaluation["figures"]
        },
        verdicts=verdicts,
        costs=costs,
        currency=currency,
        sources=sources,
        graph=graph,
    )


def _data_url(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
