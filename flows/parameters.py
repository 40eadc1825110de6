"""Types of flow parameters, from which Prefect's UI makes its forms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Preset = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", examples=["default", "smoke"])]
Override = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*=", examples=["train_sft.optimizer.lr=1.0e-4"])]
Stage = Literal[
    "base_model",
    "raw_data",
    "prepare_data",
    "train_sft",
    "compare",
    "train_reward",
    "train_gold",
    "train_ppo",
    "quantize",
    "evaluate",
    "register",
]
Hours = Annotated[float, Field(gt=0)]
Version = Annotated[str, Field(pattern=r"^models:/[^/@]+(@[^/@]+|/\d+)$")]


class ParameterSet(BaseModel):
    """One experiment of a sweep."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$", description="Of the DVC experiment.")]
    overrides: list[Override] = Field(description="Its values, as train_sft.optimizer.lr=1.0e-4.")
