"""What a run of the benchmarks leaves behind: one JSON file a part, checked when it is read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from chatloom.errors import InputError
from chatloom.files import write_json


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(Record):
    cpu: str
    cores: int
    """That this process may use."""
    features: list[str]
    """Instructions that matter here, of those the processor has."""
    memory_bytes: int
    system: str
    python: str

    @property
    def line(self) -> str:
        features = ", ".join(self.features) or "no vector extension of interest"
        memory = self.memory_bytes / 2**30
        return f"{self.cpu}, {self.cores} cores ({features}), {memory:.0f} GiB, {self.system}, Python {self.python}"


class Result(Record):
    """What one process printed."""

    work: float
    unit: str
    seconds: float
    peak_bytes: int
    """Largest resident set of the whole process."""
    threads: int
    versions: dict[str, str]
    details: dict[str, float | str]

    @property
    def per_second(self) -> float:
        return self.work / self.seconds


class Run(Record):
    round: int
    side: str
    load_before: float
    """The machine's load average of the last minute: how quiet it was."""
    result: Result


class Measurement(Record):
    part: str
    smoke: bool
    """Whether it only showed that everything runs."""
    finished: str
    machine: Machine
    settings: dict[str, Any]
    """The part's, which every side had but for its own."""
    runs: list[Run]

    def rounds(self) -> list[dict[str, Result]]:
        """Results by side, of each round in which every side came to its end."""
        found: dict[int, dict[str, Result]] = {}
        for run in self.runs:
            found.setdefault(run.round, {})[run.side] = run.result
        whole = max((len(results) for results in found.values()), default=0)
        return [results for _, results in sorted(found.items()) if len(results) == whole]


def write_measurement(folder: Path, measurement: Measurement) -> None:
    write_json(folder / f"{measurement.part}.json", measurement.model_dump(mode="json"))


def read_measurements(folder: Path) -> dict[str, Measurement]:
    """By part.

    Raises:
        InputError: where there is none, or one cannot be read.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = Measurement.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValidationError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: no result of this benchmark: {error}") from error
    if not found:
        raise InputError(f"{folder}: no results; run python -m bench first")
    return found
