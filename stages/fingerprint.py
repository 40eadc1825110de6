"""What a stage depends on, as hashes: its state may be resumed only while they stay."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from chatloom.config import Params
from chatloom.resume import file_hash
from stages.recorded import listed_stage, value_at


def fingerprint(stage: str, params: Params, pipeline: Path = Path("dvc.yaml")) -> dict[str, str] | None:
    """Hashes of everything DVC lists for `stage`: `{"params train_sft": ..., "code chatloom/sft.py": ...}`.

    Content decides, as with DVC, and not times or names of runs. None where `pipeline` is missing or does not list the
    stage: what the stage depends on is unknown then.
    """
    listed = listed_stage(stage, pipeline)
    if listed is None:
        return None
    values = params.model_dump(mode="json", by_alias=True)
    values["train_ppo"].pop("guards")  # they decide when to stop, not what is computed
    for name in ("train_sft", "train_reward", "train_gold", "train_ppo"):
        _drop_layout(values[name])
    hashes = {
        f"params {key}": _text_hash(json.dumps(value_at(values, key), sort_keys=True)) for key in listed["params"]
    }
    for dep in listed["deps"]:
        kind = "code" if dep.startswith(("stages/", "chatloom/")) else "data"
        hashes[f"{kind} {dep}"] = tree_hash(Path(dep))
    return hashes


def _drop_layout(section: dict[str, Any]) -> None:
    """Leave what a step's rows are, and not how many processes share them by which strategy: rounding apart, any number
    of them goes on from the state of any other."""
    parallel = section.pop("parallel")
    processes = parallel["num_processes"] // parallel["tensor_size"]
    rows = section.pop("batch_size")
    if "accumulation_steps" in section:
        section["rows_per_step"] = rows * section.pop("accumulation_steps") * processes


def tree_hash(path: Path) -> str:
    """Of a file its SHA-256, of a folder that of its files' names and contents; of what is missing, a word."""
    if not path.exists():
        return "missing"
    if path.is_file():
        return file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return _text_hash("\n".join(f"{file_hash(file)} {file.relative_to(path).as_posix()}" for file in files))


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
