"""The harness of every stage: values in; outs, metrics, curves and an MLflow run out.

    with stage("train_sft") as run:
        with run.out("models/sft") as folder:
            ...

Files DVC hashes never hold a run id or a time, so that equal work gives equal bytes. What is measured goes to DVC
(files) and to MLflow (a run) from one call, so that the two cannot differ.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

import yaml
from rich.console import Console
from rich.logging import RichHandler

from chatloom.config import Params, load_params
from chatloom.errors import InputError
from chatloom.files import atomic_dir, atomic_file, write_json

log = logging.getLogger("stages.run")

REPRODUCTION, PRESET = "CHATLOOM_REPRODUCTION", "CHATLOOM_PRESET"
SAMPLE_ROWS = 20
MAX_PARAM_LENGTH = 6000  # MLflow refuses longer values
MAX_PARAMS_AT_ONCE = 100  # and larger batches

Numbers = Mapping[str, float]


class _Terminated(BaseException):
    """SIGTERM, as an exception: `with` blocks end as they do on Ctrl-C."""


@contextmanager
def stage(name: str) -> Iterator[StageRun]:
    """Run the block as the stage `name`, in the folder that holds `params.yaml`.

    An `InputError` is one line on stderr and exit status 1; any other exception keeps its traceback. Metrics and curves
    are written when the block has ended well, all of them or none.
    """
    with _log_to_stderr(), _sigterm_raises():
        started = time.monotonic()
        run = None
        try:
            params = load_params()
            run = StageRun(name, params, _MlflowRun.start(name, params, Path.cwd()))
            yield run
            run._write()
        except InputError as error:
            _end_failed(run, "FAILED")
            log.error("%s: %s", name, error)
            raise SystemExit(1) from None
        except (KeyboardInterrupt, _Terminated) as interrupt:
            _end_failed(run, "KILLED")
            log.error("%s: interrupted", name)
            raise SystemExit(143 if isinstance(interrupt, _Terminated) else 130) from None
        except BaseException:
            _end_failed(run, "FAILED")
            raise
        run._mlflow.end("FINISHED")
        log.info("%s: done in %.1f s", name, time.monotonic() - started)


class StageRun:
    """What `stage` hands to its block."""

    def __init__(self, name: str, params: Params, mlflow_run: _MlflowRun) -> None:
        self.name, self.params = name, params
        self._mlflow = mlflow_run
        self._curves: dict[str, dict[int, dict[str, float]]] = {}
        self._metrics: dict[str, Any] | None = None

    def out(self, path: str) -> AbstractContextManager[Path]:
        """A fresh folder that becomes the out `path` when the block ends well."""
        return atomic_dir(Path(path))

    def log(self, step: int, values: Numbers) -> None:
        """Values of one step, `{"train/loss": 1.2}`: column `loss` of `plots/<stage>/train.csv`, and MLflow.

        A loop that resumes logs its earlier steps again (from its checkpoint): the files then hold the whole curve.
        """
        for metric, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{metric} is {float(value)} at step {step}")
            part, slash, column = metric.partition("/")
            if not slash or not part or not column:
                raise ValueError(f"metric {metric!r} has no part: name it like 'train/loss'")
            self._curves.setdefault(part, {}).setdefault(step, {})[column] = float(value)
        self._mlflow.metrics(values, step)

    def metrics(self, values: Numbers) -> None:
        """The stage's results, `{"reward/accuracy": 0.7}`, once: nested in `metrics/<stage>.json`, and MLflow."""
        assert self._metrics is None, "a stage reports its metrics once"
        for metric, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{metric} is {float(value)}")
        self._metrics = nested(values)
        self._mlflow.metrics(values, None)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Rows to look at in MLflow, under `tables/<name>.json`; a second call appends."""
        self._mlflow.api.log_table({key: list(cells) for key, cells in columns.items()}, f"tables/{name}.json")

    def report(self, name: str, value: Any) -> None:
        """`value` as `reports/<name>.json`, and as an artifact of the run."""
        path = Path("reports", f"{name}.json")
        write_json(path, value)
        self._mlflow.api.log_artifact(str(path), "reports")

    def artifact(self, path: Path) -> None:
        """A file the stage wrote under `reports/`, as an artifact of the run too."""
        self._mlflow.api.log_artifact(str(path), "reports")

    def figure(self, name: str, figure: Any) -> None:
        """A matplotlib figure as `reports/<name>.png`, and as an artifact of the run."""
        path = Path("reports", f"{name}.png")
        with atomic_file(path) as temporary:
            # Without the version of matplotlib in it: equal figures are equal files.
            figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
        self._mlflow.api.log_artifact(str(path), "reports")

    def dataset(self, path: str | Path, name: str) -> None:
        """Record what the stage read: a few rows of it, and its DVC hash as the digest."""
        self._mlflow.dataset(Path(path), name)

    def _write(self) -> None:
        if self._curves:
            with atomic_dir(Path("plots", self.name)) as folder:
                for part, rows in self._curves.items():
                    _write_curve(folder / f"{part}.csv", rows)
        if self._metrics is not None:
            write_json(Path("metrics", f"{self.name}.json"), self._metrics)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": 1}` as `{"a": {"b": 1}}`; a name that is both a value and a group is a ValueError."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, leaf = name.split("/")
        inside = tree
        for group in groups:
            inside = inside.setdefault(group, {})
            if not isinstance(inside, dict):
                raise ValueError(f"metric {name!r}: {group!r} is a value already")
        if leaf in inside:
            raise ValueError(f"metric {name!r} is given twice, or is also a group")
        inside[leaf] = value
    return tree


def flattened(values: Any, prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`; a list is one value, as JSON."""
    if isinstance(values, dict):
        inner = (flattened(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items())
        return {key: text for part in inner for key, text in part.items()}
    text = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
    return {prefix: text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 1] + "…"}


def _write_curve(path: Path, rows: dict[int, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["step", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": step, **rows[step]} for step in sorted(rows))


# --- MLflow ---------------------------------------------------------------------------------------------------------


class _MlflowRun:
    """The stage's MLflow run, and its parent where the stage is part of a reproduction."""

    def __init__(self, api: Any, parent: str | None) -> None:
        self.api, self.parent = api, parent

    @classmethod
    def start(cls, name: str, params: Params, root: Path) -> _MlflowRun:
        """Connect, find or create experiment and parent run, start the stage's run with its tags and params."""
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
        mlflow, store_errors = _import_mlflow()
        try:
            # Stages started at once race for a fresh store and for the parent run: one at a time.
            with _store_lock(uri), _few_retries():
                mlflow.set_tracking_uri(uri)
                experiment = _experiment(mlflow, uri)
                parent = _parent_run(mlflow, experiment, root)
                tags = _tags(root) | {"chatloom.stage": name}
                mlflow.start_run(experiment_id=experiment, run_name=name, parent_run_id=parent, tags=tags)
        except store_errors as error:
            raise InputError(
                f"MLflow at MLFLOW_TRACKING_URI={uri} does not answer: {_first_line(error)}\n"
                "start it (make ui), or unset MLFLOW_TRACKING_URI to record in ./mlflow.db"
            ) from error
        run = cls(mlflow, parent)
        values = params.model_dump(mode="json", by_alias=True)
        run.params(flattened({key: values[key] for key in (name, "runtime") if key in values}))
        log.info("%s: MLflow run %s", name, mlflow.active_run().info.run_id)
        return run

    def params(self, values: dict[str, str]) -> None:
        items = list(values.items())
        for start in range(0, len(items), MAX_PARAMS_AT_ONCE):
            self.api.log_params(dict(items[start : start + MAX_PARAMS_AT_ONCE]))

    def metrics(self, values: Numbers, step: int | None) -> None:
        self.api.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def dataset(self, path: Path, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on integer columns and on what kind of source a path is
            data = self.api.data.from_pandas(_sample(path), source=str(path), name=name, digest=dvc_hash(path))
            self.api.log_input(data, context=name)

    def end(self, status: str) -> None:
        """Give the run and its parent their last status."""
        self.api.end_run(status)
        if self.parent is not None:
            self.api.MlflowClient().set_terminated(self.parent, status)


def _end_failed(run: StageRun | None, status: str) -> None:
    """As `end`, where trouble with MLflow must not hide what went wrong before it."""
    if run is None:
        return
    try:
        run._mlflow.end(status)
    except run._mlflow.api.exceptions.MlflowException as error:
        log.error("%s: MLflow run left without its status %s: %s", run.name, status, _first_line(error))


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


def _parent_run(mlflow: Any, experiment: str, root: Path) -> str | None:
    """Id of the run of this reproduction, shown as running while a stage runs; None outside a reproduction."""
    reproduction = os.environ.get(REPRODUCTION)
    if not reproduction:
        return None
    if not re.fullmatch(r"[\w.:+-]+", reproduction):
        raise InputError(f"{REPRODUCTION}={reproduction!r}: use letters, digits and . _ : + - only")
    client = mlflow.MlflowClient()
    tag = "chatloom.reproduction"
    found = client.search_runs([experiment], f"tags.`{tag}` = '{reproduction}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return cast(str, found[0].info.run_id)
    created = client.create_run(experiment, run_name=reproduction, tags=_tags(root) | {tag: reproduction})
    return cast(str, created.info.run_id)


def _tags(root: Path) -> dict[str, str]:
    tags = {"chatloom.preset": os.environ.get(PRESET) or "default"}
    if (revision := _git(root, "rev-parse", "HEAD")) is not None:
        # dvc.lock changes while a reproduction runs, and is recorded by its own hash.
        changed = _git(root, "status", "--porcelain", "--", ":/", ":(exclude,top)dvc.lock")
        tags |= {"git.revision": revision, "git.dirty": str(bool(changed)).lower()}
    lock = root / "dvc.lock"
    if lock.is_file():
        tags["dvc.lock.sha256"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return tags


def _git(root: Path, *command: str) -> str | None:
    """Output of git, None where there is no repository, no commit or no git."""
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _sample(path: Path) -> Any:
    """A few rows to recognise a dataset by: of its first Parquet shard, or the list of its files."""
    import pandas as pd
    import pyarrow.parquet as pq

    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    shards = [file for file in files if file.suffix == ".parquet"]
    if not shards:
        return pd.DataFrame({"file": [str(file) for file in files], "bytes": [file.stat().st_size for file in files]})
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


@contextmanager
def _few_retries() -> Iterator[None]:
    """Learn within seconds that a server is down; later a stage has work to lose and MLflow's patience is right."""
    short = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    added = {key: value for key, value in short.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- the process ----------------------------------------------------------------------------------------------------


class _Stderr:
    """Today's `sys.stderr`: while a live bar is up, rich puts its own there, which writes lines above the bar."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Our own modules from INFO up, everybody else's from WARNING up."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    if sys.stderr.isatty():
        console = Console(file=cast("IO[str]", _Stderr()), force_terminal=True)
        handler = RichHandler(console=console, show_path=False, log_time_format="%X")
    ours = [logging.getLogger(name) for name in ("__main__", "stages", "chatloom")]
    levels = [logger.level for logger in ours]
    for logger in ours:
        logger.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
