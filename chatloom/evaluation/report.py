"""`reports/report.html`: the run on one self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure


def render_report(
    *,
    metrics: Mapping[str, float],
    models: Sequence[str],
    samples: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Figure],
) -> str:
    """The page as HTML, pictures inside.

    Args:
        metrics: flat, as in `metrics/evaluate.json`.
        models: names of the models in the order their answers are shown.
        samples: `{"lang", "prompt", "answers": {model: {"text", "score"}}}`.
        figures: by what is written above them.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    pictures = {title: _data_url(figure) for title, figure in figures.items()}
    template = environment.get_template("report.html.jinja")
    return template.render(metrics=dict(sorted(metrics.items())), models=models, samples=samples, pictures=pictures)


def _data_url(figure: Figure) -> str:
    buffer = io.BytesIO()
    # Without the version of matplotlib in it: equal figures are equal pages.
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
