"""The project's own params: what a job does not say is as users get it."""

from __future__ import annotations

from pathlib import Path

from chatloom.config import Params, load_params, load_preset, validate_params

ROOT = Path(__file__).parents[1]


def preset_params(name: str) -> Params:
    """Of a preset: `default`, or a file of `params/`."""
    default = ROOT / "params.yaml"
    if name == "default":
        return load_params(default)
    return validate_params(load_preset(ROOT / "params" / f"{name}.yaml", default), name)
