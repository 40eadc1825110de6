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
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import psutil
import yaml

from chatloom.config import Params
from chatloom.errors import InputError, Unavailable
from chatloom.git import head
from chatloom.registry.lineage import INPUTS_TAG, OUT_TAG, describe_machine
from chatloom.registry.resolve import few_retries, first_line, may_pass
from stages.outbox import (
    Errors,
    Event,
    Outbox,
    Record,
    create,
    import_mlflow,
    now,
    perform,
    send_kept,
    sqlite_file,
)
from stages.recorded import hash_inputs

log = logging.getLogger("stages.run")

# Tags of a run
PRESET, STAGE = "chatloom.preset", "chatloom.stage"
WORKSPACE, HOST, PID, STARTED = "chatloom.workspace", "chatloom.host", "chatloom.pid", "chatloom.process_started"
SAME_START = 5.0
"""Seconds that two readings of one process's start may differ: the system's clock is set now and then."""
SAMPLE_ROWS = 20
MAX_PARAM_LENGTH = 6000  # MLflow refuses longer values
SECONDS_BETWEEN_TRIES, SECONDS_TO_TRY = 60.0, 5
"""Of sending what was kept while MLflow did not answer: a server that hangs costs a stage no more than their ratio."""

Numbers = Mapping[str, float]


class MlflowRun:
    """The stage's MLflow run, and its parent where the stage is part of a reproduction."""

    def __init__(self, api: Any, errors: Errors, record: Record, keep: bool) -> None:
        self._api, self._errors, self._record, self._keep = api, errors, record, keep
        self._outbox: Outbox | None = None
        self._next_try = 0.0

    @cached_property
    def _client(self) -> Any:
        """Made when first used: a local store is made, or found broken, with it."""
        return self._api.MlflowClient(self._record.uri)

    @classmethod
    def start(
        cls, name: str, params: Params, root: Path, preset: str, reproduction: str | None, must_answer: bool = False
    ) -> MlflowRun:
        """Connect, find or create experiment and parent run, start the stage's run with its tags and params.

        Args:
            must_answer: the stage cannot do its work without MLflow, whatever `tracking.on_outage` says.

        Raises:
            InputError: where the store cannot be used; Unavailable where it is only down or busy and that is a reason
                (`tracking.on_outage`).
        """
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
        mlflow, errors = import_mlflow()
        mlflow.set_tracking_uri(uri)
        own = {STAGE: name, WORKSPACE: str(root), "machine": json.dumps(describe_machine()), **_process_tags()}
        if (inputs := hash_inputs(name, params)) is not None:
            own[INPUTS_TAG] = inputs
        record = Record(uri, name, _with_context(own), _tags(root, preset), reproduction, now())
        keep = params.tracking.on_outage == "keep" and not must_answer and _is_server(uri)
        run = cls(mlflow, errors, record, keep)
        try:
            # Stages started at once race for a fresh store and for the parent run: one at a time.
            with _store_lock(uri), few_retries():
                send_kept(mlflow, uri)
                experiment = create(run._client, record)
                _end_abandoned(run._client, experiment, record)
                mlflow.start_run(record.id)
        except errors as error:
            if not (keep and may_pass(error)):
                raise (Unavailable if may_pass(error) else InputError)(
                    f"MLflow at MLFLOW_TRACKING_URI={uri} does not answer: {first_line(error)}\n"
                    "start it (make ui), or unset MLFLOW_TRACKING_URI to record in ./mlflow.db"
                ) from error
            run._begin_to_keep(error)
        log.info("%s: MLflow run %s", name, record.id or "will be made later")
        values = params.model_dump(mode="json", by_alias=True)
        flat = flattened({key: values[key] for key in (name, "runtime") if key in values})
        run._tell({"do": "params", "values": flat})
        return run

    def metrics(self, values: Numbers, step: int | None = None) -> None:
        self.curves([(name, step or 0, float(value)) for name, value in values.items()])

    def curves(self, points: Sequence[tuple[str, int, float]]) -> None:
        """Metrics of many steps at once, as (name, step, value)."""
        at = now()
        self._tell({"do": "metrics", "points": [[name, step, value, at] for name, step, value in points]})

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Rows of `tables/<name>.json`; a second call appends."""
        self._tell({"do": "table", "name": name, "columns": {key: list(cells) for key, cells in columns.items()}})

    def artifact(self, path: Path, folder: str) -> None:
        self._tell({"do": "artifact", "path": str(path), "folder": folder})

    def outs(self, hashes: Mapping[str, str]) -> None:
        """What the run made: from the bytes of a model one finds the run."""
        self._tell({"do": "tags", "values": {f"{OUT_TAG}{path}": md5 for path, md5 in hashes.items()}})

    def dataset(self, path: Path, name: str) -> None:
        """A few rows of what the stage read, and its DVC hash as the digest."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on integer columns and on what kind of source a path is
            data = self._api.data.from_pandas(_sample(path), source=str(path), name=name, digest=dvc_hash(path))
            self._tell({"do": "dataset", "fields": data.to_dict()})

    def end(self, status: str) -> None:
        """Give the run and its parent their last status."""
        try:
            self._tell({"do": "end", "status": status, "at": now()})
        finally:
            # Off MLflow's list of active runs: what is on it when the process ends is ended once more, with patience.
            with few_retries(0, SECONDS_TO_TRY), suppress(*self._errors):
                self._api.end_run(status)
        if self._outbox is not None:
            self._outbox.close()
            log.warning(
                "MLflow at %s does not answer: the run is kept in %s, and is sent when the next stage starts, or by "
                "python -m stages.outbox",
                self._record.uri,
                self._outbox.folder,
            )

    def end_badly(self, status: str) -> None:
        """As `end`, where trouble with MLflow must not hide what went wrong before it."""
        trouble: Errors = (InputError, *self._errors)
        try:
            with few_retries(0, SECONDS_TO_TRY):
                self.end(status)
        except trouble as error:
            log.error("MLflow run %s left without its status %s: %s", self._record.id, status, first_line(error))

    def _tell(self, event: Event) -> None:
        """Tell MLflow, or keep the event while MLflow does not answer and try again every now and then."""
        if self._outbox is None:
            try:
                with few_retries() if self._keep else nullcontext():  # else a stage has work to lose: MLflow's patience
                    perform(self._client, self._record, event)
                return
            except self._errors as error:
                if not may_pass(error):
                    raise
                if not self._keep:
                    raise Unavailable(
                        f"MLflow at MLFLOW_TRACKING_URI={self._record.uri} does not answer any more: "
                        f"{first_line(error)}\nstart it and run again, which goes on from the last state, or set "
                        "tracking.on_outage: keep in params.yaml to go on without it"
                    ) from error
                self._begin_to_keep(error)
        assert self._outbox is not None
        self._outbox.add(event)
        if time.monotonic() >= self._next_try or event["do"] == "end":
            self._try_to_send()

    def _begin_to_keep(self, error: BaseException) -> None:
        self._outbox = Outbox(self._record)
        self._next_try = time.monotonic() + SECONDS_BETWEEN_TRIES
        log.warning(
            "MLflow at %s does not answer: %s; its run goes to %s meanwhile",
            self._record.uri,
            first_line(error),
            self._outbox.folder,
        )

    def _try_to_send(self) -> None:
        assert self._outbox is not None
        try:
            with few_retries(0, SECONDS_TO_TRY):
                self._record = self._outbox.send(self._client)
        except self._errors as error:
            if not may_pass(error):
                raise
            self._next_try = time.monotonic() + SECONDS_BETWEEN_TRIES
        else:
            self._outbox = None
            log.info("MLflow answers again: it has run %s with all that was kept", self._record.id)


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


def _end_abandoned(client: Any, experiment: str, record: Record) -> None:
    """End earlier runs of this stage, in this workspace on this host, whose process was killed outright.

    Such a process could not end its run, nor the run of its reproduction, which is ended too unless it goes on.
    """
    own = record.tags
    same = " and ".join(f"tags.`{tag}` = '{own[tag]}'" for tag in (STAGE, HOST))
    for run in client.search_runs([experiment], f"attributes.status = 'RUNNING' and {same}"):
        tags = run.data.tags
        if tags[WORKSPACE] != own[WORKSPACE] or _is_running(int(tags[PID]), float(tags[STARTED])):
            continue
        client.set_terminated(run.info.run_id, "KILLED")
        if (its_parent := tags.get("mlflow.parentRunId")) not in (None, record.parent):
            client.set_terminated(its_parent, "KILLED")
        log.info("%s: MLflow run %s ended, its process was killed", own[STAGE], run.info.run_id)


def _with_context(tags: dict[str, str]) -> dict[str, str]:
    """And what MLflow itself says of every run: user, program."""
    from mlflow.tracking.context.registry import resolve_tags

    return cast("dict[str, str]", resolve_tags(tags))


def _is_server(uri: str) -> bool:
    """Whether it is something that can be down, and not a file."""
    return urlsplit(uri).scheme not in ("", "file", "sqlite")


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


@contextmanager
def _store_lock(uri: str) -> Iterator[None]:
    """One process at a time in a local store; a server does its own locking."""
    import fcntl

    store = sqlite_file(uri)
    if store is None:
        yield
        return
    with store.with_name(f"{store.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
