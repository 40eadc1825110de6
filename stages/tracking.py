"""A stage's run in MLflow: on what it ran and where, what was measured, how it ended."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
import yaml

from chatloom.config import Params
from chatloom.errors import InputError, Unavailable
from chatloom.git import head
from chatloom.registry.lineage import INPUTS_TAG, OUT_TAG, describe_machine
from chatloom.registry.resolve import few_retries, may_pass
from stages.recorded import hash_inputs

log = logging.getLogger("stages.run")

# Tags of a run
PRESET, REPRODUCTION, STAGE = "chatloom.preset", "chatloom.reproduction", "chatloom.stage"
WORKSPACE, HOST, PID, STARTED = "chatloom.workspace", "chatloom.host", "chatloom.pid", "chatloom.process_started"
SAME_START = 5.0
"""Seconds that two readings of one process's start may differ: the system's clock is set now and then."""
SAMPLE_ROWS = 20
MAX_PARAM_LENGTH = 6000  # MLflow refuses longer values
MAX_PARAMS_AT_ONCE, MAX_METRICS_AT_ONCE = 100, 1000  # and larger batches

Numbers = Mapping[str, float]


class MlflowRun:
    """The stage's MLflow run, and its parent where the stage is part of a reproduction."""

    def __init__(self, api: Any, id: str, parent: str | None) -> None:
        self._api, self._client, self.id, self.parent = api, api.MlflowClient(), id, parent

    @classmethod
    def start(cls, name: str, params: Params, root: Path, preset: str, reproduction: str | None) -> MlflowRun:
        """Connect, find or create experiment and parent run, start the stage's run with its tags and params.

        Raises:
            InputError: where the store cannot be used; Unavailable where it is only down or busy.
        """
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
        mlflow, store_errors = _import_mlflow()
        try:
            # Stages started at once race for a fresh store and for the parent run: one at a time.
            # In seconds it is known that a server is down; later there is work to lose, and MLflow's patience is right.
            with _store_lock(uri), few_retries():
                mlflow.set_tracking_uri(uri)
                experiment = _experiment(mlflow, uri)
                tags = _tags(root, preset)
                parent = _parent_run(mlflow, experiment, reproduction, tags)
                own = {STAGE: name, WORKSPACE: str(root), "machine": json.dumps(describe_machine()), **_process_tags()}
                if (inputs := hash_inputs(name, params)) is not None:
                    own[INPUTS_TAG] = inputs
                _end_abandoned(mlflow, experiment, own, parent)
                run = mlflow.start_run(
                    experiment_id=experiment, run_name=name, parent_run_id=parent, tags={**tags, **own}
                )
        except store_errors as error:
            raise (Unavailable if may_pass(error) else InputError)(
                f"MLflow at MLFLOW_TRACKING_URI={uri} does not answer: {_first_line(error)}\n"
                "start it (make ui), or unset MLFLOW_TRACKING_URI to record in ./mlflow.db"
            ) from error
        log.info("%s: MLflow run %s", name, run.info.run_id)
        started = cls(mlflow, run.info.run_id, parent)
        values = params.model_dump(mode="json", by_alias=True)
        started._params(flattened({key: values[key] for key in (name, "runtime") if key in values}))
        return started

    def metrics(self, values: Numbers, step: int | None = None) -> None:
        self._api.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def curves(self, points: Sequence[tuple[str, int, float]]) -> None:
        """Metrics of many steps at once, as (name, step, value)."""
        now = int(time.time() * 1000)
        metrics = [self._api.entities.Metric(name, value, now, step) for name, step, value in points]
        for start in range(0, len(metrics), MAX_METRICS_AT_ONCE):
            self._client.log_batch(self.id, metrics=metrics[start : start + MAX_METRICS_AT_ONCE])

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Rows of `tables/<name>.json`; a second call appends."""
        self._api.log_table({key: list(cells) for key, cells in columns.items()}, f"tables/{name}.json")

    def artifact(self, path: Path, folder: str) -> None:
        self._api.log_artifact(str(path), folder)

    def outs(self, hashes: Mapping[str, str]) -> None:
        """What the run made: from the bytes of a model one finds the run."""
        for path, md5 in hashes.items():
            self._client.set_tag(self.id, f"{OUT_TAG}{path}", md5)

    def dataset(self, path: Path, name: str) -> None:
        """A few rows of what the stage read, and its DVC hash as the digest."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on integer columns and on what kind of source a path is
            data = self._api.data.from_pandas(_sample(path), source=str(path), name=name, digest=dvc_hash(path))
            self._api.log_input(data, context=name)

    def end(self, status: str) -> None:
        """Give the run and its parent their last status."""
        self._api.end_run(status)
        if self.parent is not None:
            self._client.set_terminated(self.parent, status)

    def end_badly(self, status: str) -> None:
        """As `end`, where trouble with MLflow must not hide what went wrong before it."""
        try:
            self.end(status)
        except self._api.exceptions.MlflowException as error:
            log.error("MLflow run %s left without its status %s: %s", self.id, status, _first_line(error))

    def _params(self, values: dict[str, str]) -> None:
        items = list(values.items())
        for start in range(0, len(items), MAX_PARAMS_AT_ONCE):
            self._api.log_params(dict(items[start : start + MAX_PARAMS_AT_ONCE]))


class Untracked:
    """In place of a run in MLflow, for processes that another one speaks for."""

    def metrics(self, values: Numbers, step: int | None = None) -> None:
        pass

    def curves(self, points: Sequence[tuple[str, int, float]]) -> None:
        pass

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        pass

    def artifact(self, path: Path, folder: str) -> None:
        pass

    def outs(self, hashes: Mapping[str, str]) -> None:
        pass

    def dataset(self, path: Path, name: str) -> None:
        pass

    def end(self, status: str) -> None:
        pass

    def end_badly(self, status: str) -> None:
        pass


def flattened(values: Any, prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`; a list is one value, as JSON."""
    if isinstance(values, dict):
        inner = (flattened(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items())
        return {key: text for part in inner for key, text in part.items()}
    text = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
    return {prefix: text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 1] + "…"}


def dvc_hash(path: Path, lock: Path = Path("dvc.lock")) -> str | None:
    """The hash DVC recorded for `path`, None where it recorded none."""
    if not lock.is_file():
        return None
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    # An out wins over a dep: it is what the last run made, a dep is what another stage last saw.
    for kind in ("outs", "deps"):
        for recorded in stages.values():
            for entry in recorded.get(kind, []):
                if entry["path"] == path.as_posix():
                    return cast("str | None", entry.get("md5"))
    return None


def _import_mlflow() -> tuple[Any, tuple[type[Exception], ...]]:
    """MLflow (seconds to import) with its chatter off, and what it raises where its store cannot be used."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow
    import mlflow.data
    from sqlalchemy.exc import SQLAlchemyError

    return mlflow, (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError)


def _experiment(mlflow: Any, uri: str) -> str:
    """Id of the experiment; one in a local store keeps its artifacts beside the store."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "chatloom"
    if (found := mlflow.get_experiment_by_name(name)) is not None:
        return cast(str, found.experiment_id)
    store = _sqlite_file(uri)
    location = (store.parent / "mlartifacts").as_uri() if store is not None else None
    return cast(str, mlflow.create_experiment(name, artifact_location=location))


def _parent_run(mlflow: Any, experiment: str, reproduction: str | None, tags: dict[str, str]) -> str | None:
    """Id of the run of this reproduction, shown as running while a stage runs; None outside a reproduction."""
    if reproduction is None:
        return None
    client = mlflow.MlflowClient()
    found = client.search_runs([experiment], f"tags.`{REPRODUCTION}` = '{reproduction}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return cast(str, found[0].info.run_id)
    created = client.create_run(experiment, run_name=reproduction, tags=tags | {REPRODUCTION: reproduction})
    return cast(str, created.info.run_id)


def _end_abandoned(mlflow: Any, experiment: str, own: dict[str, str], parent: str | None) -> None:
    """End earlier runs of this stage, in this workspace on this host, whose process was killed outright.

    Such a process could not end its run, nor the run of its reproduction, which is ended too unless it goes on.
    """
    client = mlflow.MlflowClient()
    same = " and ".join(f"tags.`{tag}` = '{own[tag]}'" for tag in (STAGE, HOST))
    for run in client.search_runs([experiment], f"attributes.status = 'RUNNING' and {same}"):
        tags = run.data.tags
        if tags[WORKSPACE] != own[WORKSPACE] or _is_running(int(tags[PID]), float(tags[STARTED])):
            continue
        client.set_terminated(run.info.run_id, "KILLED")
        if (its_parent := tags.get("mlflow.parentRunId")) not in (None, parent):
            client.set_terminated(its_parent, "KILLED")
        log.info("%s: MLflow run %s ended, its process was killed", own[STAGE], run.info.run_id)


def _process_tags() -> dict[str, str]:
    process = psutil.Process()
    return {HOST: socket.gethostname(), PID: str(process.pid), STARTED: str(process.create_time())}


def _is_running(pid: int, started: float) -> bool:
    """Whether the process that had `pid` and began at `started` is still there: a number is given out again."""
    try:
        process = psutil.Process(pid)
        gone = process.status() == psutil.STATUS_ZOMBIE
        return not gone and abs(process.create_time() - started) < SAME_START
    except psutil.NoSuchProcess:
        return False


def _tags(root: Path, preset: str) -> dict[str, str]:
    tags = {PRESET: preset}
    revision, changed = head(root)
    if revision is not None:
        tags |= {"git.revision": revision, "git.dirty": str(changed).lower()}
    lock = root / "dvc.lock"
    if lock.is_file():
        tags["dvc.lock.sha256"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return tags


def _sample(path: Path) -> Any:
    """A few rows to recognise a dataset by: of its first Arrow or Parquet file, or the list of its files."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    shards = [file for file in files if file.suffix in (".arrow", ".parquet")]
    if not shards:
        return pd.DataFrame({"file": [str(file) for file in files], "bytes": [file.stat().st_size for file in files]})
    if shards[0].suffix == ".arrow":
        rows = pa.ipc.open_file(pa.memory_map(str(shards[0]))).read_all().slice(0, SAMPLE_ROWS).to_pylist()
    else:
        batches = pq.ParquetFile(shards[0]).iter_batches(SAMPLE_ROWS)
        rows = next(batches).to_pylist() if pq.read_metadata(shards[0]).num_rows else []
    # Nested cells as JSON: MLflow's schemas have no word for some of Arrow's types.
    for row in rows:
        row.update({key: json.dumps(cell, ensure_ascii=False) for key, cell in row.items() if isinstance(cell, list)})
    return pd.DataFrame(rows)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


@contextmanager
def _store_lock(uri: str) -> Iterator[None]:
    """One process at a time in a local store; a server does its own locking."""
    import fcntl

    store = _sqlite_file(uri)
    if store is None:
        yield
        return
    with store.with_name(f"{store.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
