"""What a model was made from: code, data, parameters, runs and machine, as facts that travel with the version.

The facts are those of `dvc.lock`, which names every file by the hash of its bytes; a run in MLflow belongs to a stage
when it made those very bytes, and not because it ran last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import yaml

from chatloom.config import Params
from chatloom.errors import InputError
from chatloom.files import read_json
from chatloom.git import head
from chatloom.registry.hashes import dvc_md5

log = logging.getLogger(__name__)

NONE = "none"
"""In place of something that this workspace does not have, a commit for example: said, and not left out."""
FILE = "lineage.json"
"""Name of the facts among the files of a registered version."""
OUT_TAG = "out/"
"""Begins the tags of a run that say what it made: `out/models/ppo` with the hash that DVC gives these bytes."""
WEIGHTS_TAG = "dvc.model"
"""Tag of a version: DVC's hash of the checkpoint that was registered, or `NONE`."""
PARENT_TAG = "chatloom.reproduction"
"""Tag of the run that is the parent of a reproduction's stages; its value is the reproduction's id."""
INPUTS_TAG = "chatloom.inputs"
"""Tag of a run: one hash of everything that DVC lists as its stage's deps and params."""
RAW_REPORT, PREPARE_REPORT = Path("reports/raw_data.json"), Path("reports/prepare_data.json")
FILES = ("params.yaml", "dvc.yaml", "requirements.lock")
"""Files beside the stages' own that say how a model was made."""
PACKAGES = ("torch", "transformers", "gptqmodel")

Facts = dict[str, Any]
"""The lineage as JSON, see `collect_lineage`."""


def collect_lineage(params: Params, model_out: str, preset: str | None, workspace: Path = Path()) -> Facts:
    """What leads from a model back to its making.

    Args:
        params: as in `params.yaml` of the workspace.
        model_out: path of the model among the outs of `dvc.lock`; its DVC hash names the very bytes.
        preset: name of the preset, where one was laid over `params.yaml`.

    Returns:
        `model`, `preset`, `code`, `files` (hashes), `params` (values), `base_model`, `sources` (rows, licences, files),
        `stages` (deps and outs with their hashes, in the order of the DAG) and `machine`.

    Raises:
        InputError: where `params.yaml` is missing, or `dvc.lock` or a report is not what its name says.
    """
    commit, changed = head(workspace)
    if commit is None:
        log.warning("there is no git commit here: the registered model cannot be traced to its code")
    if not (workspace / "params.yaml").is_file():
        raise InputError(f"{workspace / 'params.yaml'}: no such file; run this in a workspace of the pipeline")
    stages = read_stages(workspace / "dvc.lock")
    hashes = {path: md5 for stage in stages.values() for path, md5 in stage["outs"].items()}
    return {
        "model": {"path": model_out, "md5": hashes.get(model_out, NONE)},
        "preset": preset or "default",
        "code": {"revision": commit or NONE, "dirty": NONE if changed is None else str(changed).lower()},
        "files": {name: dvc_md5(workspace / name) or NONE for name in FILES},
        "params": params.model_dump(mode="json", by_alias=True),
        "base_model": params.base_model.source.model_dump(mode="json"),
        "sources": _sources(params, workspace),
        "stages": stages,
        "machine": describe_machine(),
    }


def lineage_tags(facts: Facts) -> dict[str, str]:
    """What of the facts is looked for in MLflow's UI, as tags of the version."""
    upstream = json.dumps(facts["stages"], sort_keys=True, ensure_ascii=False)
    return {
        "git.revision": facts["code"]["revision"],
        "git.dirty": facts["code"]["dirty"],
        WEIGHTS_TAG: facts["model"]["md5"],
        "dvc.lock.upstream_sha256": hashlib.sha256(upstream.encode()).hexdigest() if facts["stages"] else NONE,
        "params.md5": facts["files"]["params.yaml"],
        "params": json.dumps(facts["params"], ensure_ascii=False),
        "chatloom.preset": facts["preset"],
        "base_model.source": json.dumps(facts["base_model"], ensure_ascii=False),
        "data.sources": json.dumps(
            [{key: source[key] for key in ("name", "from", "license")} for source in facts["sources"]],
            ensure_ascii=False,
        ),
    }


def read_stages(lock: Path) -> dict[str, dict[str, Any]]:
    """`{"train_sft": {"cmd", "deps": {path: md5}, "outs": {path: md5}}}` of every stage that `dvc.lock` has, in the
    order of the DAG, but `register`, whose own entry is written after it has run; nothing where there is no such file.

    Raises:
        InputError: where the file is not one of DVC's.
    """
    if not lock.is_file():
        log.warning("%s is missing: the registered model cannot be traced to its data", lock)
        return {}
    try:
        recorded: dict[str, Any] = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
        stages = {
            name: {
                "cmd": stage["cmd"],
                **{
                    kind: {entry["path"]: entry.get("md5", NONE) for entry in stage.get(kind, [])}
                    for kind in ("deps", "outs")
                },
            }
            for name, stage in recorded.items()
            if name != "register"
        }
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(f"{lock}: not a lock file of DVC: {error}; run `dvc repro` to write it anew") from error
    depth = _depths(stages)
    return {name: stages[name] for name in sorted(stages, key=lambda name: (depth[name], name))}


def parents(stages: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """The stages whose outs `name` reads."""
    deps = stages[name]["deps"]
    return [other for other, stage in stages.items() if other != name and deps.keys() & stage["outs"].keys()]


def _depths(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many stages lie before each, by the longest way."""
    found: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((depth(parent) for parent in parents(stages, name)), default=-1)
        return found[name]

    return {name: depth(name) for name in stages}


def find_runs(facts: Facts) -> dict[str, dict[str, Any]]:
    """Of each stage that has one, the last finished run in MLflow that made the very bytes of its outs.

    Returns:
        `id`, `revision` of git, `machine` and `metrics` that begin with `cost/`, by stage.
    """
    import mlflow

    found = {}
    for name, stage in facts["stages"].items():
        clauses = [f"tags.`{OUT_TAG}{path}` = '{md5}'" for path, md5 in stage["outs"].items()]
        clauses += ["attributes.status = 'FINISHED'", f"tags.`chatloom.stage` = '{name}'"]
        runs = mlflow.search_runs(
            search_all_experiments=True,
            filter_string=" and ".join(clauses),
            order_by=["attributes.start_time DESC"],
            max_results=1,
            output_format="list",
        )
        for run in runs:
            found[name] = {
                "id": run.info.run_id,
                "revision": run.data.tags.get("git.revision", NONE),
                "machine": json.loads(run.data.tags.get("machine", "{}")),
                "cost": {
                    key.removeprefix("cost/"): value
                    for key, value in run.data.metrics.items()
                    if key.startswith("cost/")
                },
            }
    return found


def describe_machine() -> dict[str, Any]:
    """What computes: processor, cores, memory, accelerators, versions."""
    torch = sys.modules.get("torch")  # seconds to import: who has not, uses no accelerator
    gpus = range(torch.cuda.device_count()) if torch is not None and torch.cuda.is_available() else ()
    return {
        "cpu": _cpu_name(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus] if torch is not None else [],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
    }


def _cpu_name(cpuinfo: Path) -> str:
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _sources(params: Params, workspace: Path) -> list[dict[str, Any]]:
    """Every source with its licence and, where the reports of the data stages are there, what came of its rows."""
    raw, prepared = (_read_report(workspace / path) for path in (RAW_REPORT, PREPARE_REPORT))
    read = {source["name"]: source for source in raw.get("sources", [])}
    splits: dict[str, dict[str, Any]] = prepared.get("splits", {})
    return [
        {
            "name": source.name,
            "from": source.path or source.url or source.hf,
            "license": source.license,
            "rows_in": read.get(source.name, {}).get("rows_in"),
            "rows_out": prepared.get("sources", {}).get(source.name, {}).get("rows_out"),
            "splits": {
                split: rows for split, report in splits.items() if (rows := report.get("sources", {}).get(source.name))
            },
            "files": [
                {key: file[key] for key in ("file", "sha256", "rows_out")}
                for file in read.get(source.name, {}).get("files", [])
            ],
        }
        for source in params.raw_data.sources
    ]


def _read_report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        log.warning("%s is missing: the registered model cannot be traced to its rows", path)
        return {}
    return read_json(path, "run its stage again")
