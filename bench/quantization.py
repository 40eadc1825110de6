"""GPTQ's settings on one model, beside rounding to nearest, by language: errors, perplexity, sizes.

    python -m bench.quantization --model models/ppo --prepared data/prepared

Calibrated on rows of the ptx split, compared on rows of eval, as the stage `quantize` does it with the values of a
preset; each run changes some of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from bench import pages
from bench.machine import describe_machine
from bench.presets import ROOT, preset_params
from chatloom.config import QuantizeParams
from chatloom.data.prepared import read_split
from chatloom.device import resolve_device
from chatloom.files import write_json
from chatloom.quantization.comparison import compare
from chatloom.quantization.gptq import calibration_rows, quantize

RUNS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, symmetric": {"symmetric": True},
    "8 bits": {"bits": 8},
    "4 bits, act-order": {"act_order": True},
    "3 bits": {"bits": 3},
}
"""By name: what each changes of the values that all have."""
COMMON = {"calibration_rows": 64, "held_out_rows": 32, "worse_than_rounding": "warn"}
app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="The model that is quantized.")] = ROOT / "models" / "ppo",
    prepared: Annotated[Path, typer.Option(help="What prepare_data wrote.")] = ROOT / "data" / "prepared",
    preset: Annotated[str, typer.Option(help="Whose quantize section holds otherwise.")] = "default",
    only: Annotated[str | None, typer.Option(help="Only runs so named; the page stays as it is.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file of the results.")] = ROOT
    / "bench"
    / "results"
    / "quantization"
    / "quantization.json",
) -> None:
    """Quantize with each of the settings, and compare."""
    calibration, held_out = read_split(prepared / "ptx"), read_split(prepared / "eval")
    device = resolve_device("cpu", "auto", 0)
    common = preset_params(preset).quantize.model_copy(update=COMMON)
    found: dict[str, dict[str, float]] = {}
    for name, changed in RUNS.items():
        if only is not None and only not in name:
            continue
        params = QuantizeParams.model_validate(common.model_dump() | changed)
        with TemporaryDirectory() as folder:
            started = time.monotonic()
            metrics = quantize(model, Path(folder), calibration_rows(calibration, params), params)
            seconds = time.monotonic() - started
            compared = compare(model, Path(folder), held_out, params, device).metrics
        found[name] = {"seconds": seconds, **metrics, **compared}
        typer.echo(table({name: found[name]}, params.languages))
        if only is None:  # after each, since the next ones take minutes
            write_json(out, {"machine": describe_machine().model_dump(), "runs": found})
            pages.fill(pages.BENCHMARKS, {"quantization": table(found, common.languages)})


def table(runs: Mapping[str, Mapping[str, float]], languages: Sequence[str]) -> str:
    """Markdown. Perplexities are GPTQ's and rounding's, as ratios to the unquantized model's."""
    head = [
        "settings",
        *(f"perplexity {lang}: full" for lang in languages),
        *(f"{lang}: GPTQ" for lang in languages),
        *(f"{lang}: rounded" for lang in languages),
        "layer error: GPTQ",
        "rounded",
        "layers worse",
        "same likeliest token",
        "files / 16 bit",
        "layers / 16 bit",
        "seconds",
    ]
    rows = []
    for name, found in runs.items():
        full = {lang: found[f"perplexity/full_{lang}"] for lang in languages}
        rows.append(
            [
                name,
                *(f"{full[lang]:.2f}" for lang in languages),
                *(f"{found[f'perplexity/gptq_{lang}'] / full[lang]:.3f}x" for lang in languages),
                *(f"{found[f'perplexity/rounded_{lang}'] / full[lang]:.3f}x" for lang in languages),
                f"{found['error/gptq']:.4f}",
                f"{found['error/rounded']:.4f}",
                f"{found['error/layers_worse']:.0f} of {found['layers']:.0f}",
                f"{100 * found['agreement/all']:.1f} %",
                f"{found['ratio_16bit/files']:.3f}x",
                f"{found['ratio_16bit/linear']:.3f}x",
                f"{found['seconds']:.0f}",
            ]
        )
    return pages.table(head, rows)


if __name__ == "__main__":
    app()
