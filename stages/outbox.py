"""A stage's run as MLflow is told of it, event by event; what MLflow could not take is kept on disk and sent later.

A kept run is a folder of `.state/unsent/`: `run.json` (what creates the run, and how far sending came), `events.jsonl`
(what to tell, in order) and copies of files. A stage sends what earlier ones left before it starts its own run;
`python -m stages.outbox` does so for the checkout and the workspaces of its presets. What was under way when MLflow
went down may be told twice: metrics, params and tags stay as they are then, rows of a table are there twice.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO, cast

from chatloom.files import write_json
from chatloom.registry.lineage import PARENT_TAG
from chatloom.registry.resolve import few_retries, first_line, may_pass

log = logging.getLogger("stages.outbox")

KEPT = Path(".state/unsent")
RECORD, EVENTS, FILES = "run.json", "events.jsonl", "files"
MAX_PARAMS_AT_ONCE, MAX_METRICS_AT_ONCE = 100, 1000  # MLflow refuses larger batches

Event = dict[str, Any]
Errors = tuple[type[Exception], ...]


@dataclass
class Record:
    """One stage's run: what creates it, and what became of that."""

    uri: str
    """Of the MLflow that is told."""
    name: str
    tags: dict[str, str]
    """Of the run."""
    common: dict[str, str]
    """Of the run and of its parent."""
    reproduction: str | None
    started: int
    """Milliseconds."""
    id: str | None = None
    """Of the run, once MLflow has created it."""
    parent: str | None = None
    """Id of the parent run, where the stage is part of a reproduction."""
    sent: int = 0
    """Events that MLflow has been told."""


def create(client: Any, record: Record) -> str:
    """Create the run, and its parent where that is not there; the id of their experiment."""
    experiment = _experiment(client, record.uri)
    record.parent = _parent(client, experiment, record)
    child = {} if record.parent is None else {"mlflow.parentRunId": record.parent}
    created = client.create_run(experiment, record.started, record.common | record.tags | child, record.name)
    record.id = created.info.run_id
    return experiment


def perform(client: Any, record: Record, event: Event) -> None:
    """Tell MLflow one thing of a run that it has created."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    match event:
        case {"do": "metrics", "points": points}:
            metrics = [Metric(name, value, at, step) for name, step, value, at in points]
            for some in _split(metrics, MAX_METRICS_AT_ONCE):
                client.log_batch(record.id, metrics=some)
        case {"do": "params", "values": values}:
            for some in _split([Param(*item) for item in values.items()], MAX_PARAMS_AT_ONCE):
                client.log_batch(record.id, params=some)
        case {"do": "tags", "values": values}:
            client.log_batch(record.id, tags=[RunTag(*item) for item in values.items()])
        case {"do": "table", "name": name, "columns": columns}:
            client.log_table(record.id, columns, f"tables/{name}.json")
        case {"do": "artifact", "path": path, "folder": folder}:
            client.log_artifact(record.id, path, folder)
        case {"do": "dataset", "fields": fields}:
            tag = InputTag("mlflow.data.context", fields["name"])
            client.log_inputs(record.id, [DatasetInput(Dataset(**fields), [tag])])
        case {"do": "end", "status": status, "at": at}:
            client.set_terminated(record.id, status, at)
            if record.parent is not None:
                client.set_terminated(record.parent, status, at)
        case _:
            raise ValueError(f"{event}: no such event")


class Outbox:
    """The folder of one run, while the process that fills it lives: nobody else sends it meanwhile."""

    def __init__(self, record: Record) -> None:
        self.folder = KEPT / f"{record.started}-{record.name}-{os.getpid()}"
        (self.folder / FILES).mkdir(parents=True)
        self._events = (self.folder / EVENTS).open("a", encoding="utf-8")
        fcntl.flock(self._events, fcntl.LOCK_EX)
        write_json(self.folder / RECORD, asdict(record))

    def add(self, event: Event) -> None:
        if event["do"] == "artifact":  # the file may be another one by then
            kept = Path(FILES, str(sum(1 for _ in (self.folder / FILES).iterdir())), Path(event["path"]).name)
            (self.folder / kept).parent.mkdir()
            shutil.copy2(event["path"], self.folder / kept)
            event = event | {"path": str(kept)}
        self._events.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._events.flush()

    def send(self, client: Any) -> Record:
        """Send all of it; what was not sent stays where MLflow fails, and is what the next call begins with."""
        record = _send(self.folder, client)
        self.close()
        return record

    def close(self) -> None:
        """From now on another process may send it."""
        self._events.close()


def send_kept(api: Any, uri: str, root: Path = Path()) -> int:
    """Send the runs of processes that are gone, oldest first; how many.

    What MLflow refuses, which is another thing than not to answer, stays and is named.
    """
    sent = 0
    for folder in kept_runs(root):
        if (lock := _lock(folder)) is None:
            continue
        with lock:
            if read_record(folder).uri != uri:
                continue
            try:
                _send(folder, api.MlflowClient(uri))
            except api.exceptions.MlflowException as error:
                if may_pass(error):
                    raise
                log.error("%s: MLflow refuses it: %s; mend or remove this folder", folder, first_line(error))
            else:
                log.info("%s: kept while MLflow did not answer, and sent now", folder.name)
                sent += 1
    return sent


def kept_runs(root: Path) -> list[Path]:
    """Folders of kept runs in a workspace, oldest first."""
    return sorted(file.parent for file in (root / KEPT).glob(f"*/{RECORD}"))


def read_record(folder: Path) -> Record:
    return Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))


def _send(folder: Path, client: Any) -> Record:
    record = read_record(folder)
    if record.id is None:
        create(client, record)
        write_json(folder / RECORD, asdict(record))
    for batch, count in _batches(_read_events(folder)[record.sent :]):
        perform(client, record, batch | ({"path": str(folder / batch["path"])} if "path" in batch else {}))
        record.sent += count
        write_json(folder / RECORD, asdict(record))
    shutil.rmtree(folder)
    return record


def _lock(folder: Path) -> TextIO | None:
    """The events of a run that is ours to send until they are closed; None: its process lives, or somebody sends it.

    Where that process could not say how its run ended, that is added.
    """
    try:
        file = (folder / EVENTS).open("r+", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return None
    if not (folder / RECORD).is_file():  # sent while we opened it
        return None
    events = _read_events(folder)
    if not events or events[-1]["do"] != "end":
        at = int((folder / EVENTS).stat().st_mtime * 1000)
        file.seek(0, os.SEEK_END)
        file.write("\n" + json.dumps({"do": "end", "status": "KILLED", "at": at}) + "\n")
        file.flush()
    return file


def _read_events(folder: Path) -> list[Event]:
    events = []
    for line in (folder / EVENTS).read_text(encoding="utf-8").split("\n"):
        with suppress(json.JSONDecodeError):  # nothing, or the last line of a process that was killed
            events.append(json.loads(line))
    return events


def _batches(events: Sequence[Event]) -> Iterator[tuple[Event, int]]:
    """The events, metrics that follow each other as one; each with the number of events in it."""
    for is_metrics, group in groupby(events, key=lambda event: event["do"] == "metrics"):
        some = list(group)
        if is_metrics:
            yield {"do": "metrics", "points": [point for event in some for point in event["points"]]}, len(some)
        else:
            yield from ((event, 1) for event in some)


def _split(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _experiment(client: Any, uri: str) -> str:
    """Id of the experiment; one in a local store keeps its artifacts beside the store."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "chatloom"
    if (found := client.get_experiment_by_name(name)) is not None:
        return cast(str, found.experiment_id)
    store = sqlite_file(uri)
    location = (store.parent / "mlartifacts").as_uri() if store is not None else None
    return cast(str, client.create_experiment(name, artifact_location=location))


def _parent(client: Any, experiment: str, record: Record) -> str | None:
    """Id of the run of the reproduction, shown as running while a stage runs; None outside a reproduction."""
    if record.reproduction is None:
        return None
    found = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{record.reproduction}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return cast(str, found[0].info.run_id)
    tags = record.common | {PARENT_TAG: record.reproduction}
    return cast(str, client.create_run(experiment, record.started, tags, record.reproduction).info.run_id)


def import_mlflow() -> tuple[Any, Errors]:
    """MLflow (seconds to import) with its chatter off, and what it raises where its store cannot be used."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow
    import mlflow.data
    from sqlalchemy.exc import SQLAlchemyError

    return mlflow, (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError)


def sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def main() -> None:
    """Send what is kept below the current folder; exit status 1 where something stays."""
    from stages.run import log_to_stderr

    with log_to_stderr():
        roots = [root for root in (Path(), *Path("workspaces").glob("*")) if (root / KEPT).is_dir()]
        api, errors = import_mlflow()
        for root in roots:
            for uri in sorted({read_record(folder).uri for folder in kept_runs(root)}):
                try:
                    with few_retries():
                        send_kept(api, uri, root)
                except errors as error:
                    log.error("%s: MLflow at %s does not answer: %s", root / KEPT, uri, first_line(error))
        left = [str(folder) for root in roots for folder in kept_runs(root)]
        log.info("%s", "nothing is kept" if not left else f"still kept: {', '.join(left)}")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
